"""What it costs to send one step from any peer of a swarm to any other: measured, or estimated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from petal_swarm.errors import ConfigError
from petal_swarm.wire.announcement import Announcement

Costs = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measurements:
    """What the client knows about the network, and what it assumes where nobody measured.

    `client_rtts_s` maps peer ids to round trips in seconds. A bandwidth of 0 is unknown. `client_load_s`
    is by how many seconds a step will take longer at a peer for what this client has under way there.
    The defaults are those of a slow home connection far away, so that a peer which nobody
    measured is not preferred to one that was.

    Raises:
        ConfigError: a time or bandwidth is negative, infinite or not a number.
    """

    client_rtts_s: Mapping[str, float] = field(default_factory=dict)
    client_bandwidth_bytes_per_s: float = 0.0
    default_rtt_s: float = 0.1
    default_bandwidth_bytes_per_s: float = 1.25e6
    client_load_s: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for peer_id, rtt_s in self.client_rtts_s.items():
            _require_finite(f"the round trip to {peer_id}", rtt_s)
        for peer_id, load_s in self.client_load_s.items():
            _require_finite(f"the load of {peer_id}", load_s)
        _require_finite("client_bandwidth_bytes_per_s", self.client_bandwidth_bytes_per_s)
        _require_finite("default_rtt_s", self.default_rtt_s)
        _require_finite("default_bandwidth_bytes_per_s", self.default_bandwidth_bytes_per_s)
        if self.default_bandwidth_bytes_per_s == 0:
            raise ConfigError("default_bandwidth_bytes_per_s must be positive")


def link_costs_s(peers: Sequence[Announcement | None], measurements: Measurements, step_bytes: int) -> Costs:
    """Seconds from peer i to peer j for one step of `step_bytes`: `costs[i, j]`.

    `None` stands for the client. A peer never follows itself: the diagonal is infinite.
    """
    to_client_s = np.array([_rtt_to_client_s(peer, measurements) for peer in peers])
    # By the triangle inequality a round trip lies between |a - b| and a + b, whose middle is max(a, b).
    rtts_s = np.maximum.outer(to_client_s, to_client_s)
    index = {peer.peer_id: i for i, peer in enumerate(peers) if peer is not None}
    senders, receivers, measured_s = [], [], []
    for i, peer in enumerate(peers):
        for neighbour, rtt_s in peer.next_rtts_s.items() if peer is not None else ():
            if neighbour in index:
                senders.append(i)
                receivers.append(index[neighbour])
                measured_s.append(rtt_s)
    if measured_s:
        rtts_s[receivers, senders] = measured_s
        rtts_s[senders, receivers] = measured_s  # after the other: the sender's own measurement counts first
    costs: Costs = rtts_s / 2 + step_bytes / _rates(peers, measurements)
    np.fill_diagonal(costs, math.inf)
    return costs


def link_rate_bytes_per_s(
    sender: Announcement | None, receiver: Announcement | None, measurements: Measurements
) -> float:
    """The bandwidth of one link: the lower one of its two ends. `None` stands for the client."""
    return float(_rates([sender, receiver], measurements)[0, 1])


def _rtt_to_client_s(peer: Announcement | None, measurements: Measurements) -> float:
    if peer is None:
        return 0.0
    return measurements.client_rtts_s.get(peer.peer_id, measurements.default_rtt_s)


def _rates(peers: Sequence[Announcement | None], measurements: Measurements) -> Costs:
    client = measurements.client_bandwidth_bytes_per_s
    announced = np.array([client if peer is None else peer.bandwidth_bytes_per_s for peer in peers])
    rates = np.where(announced > 0, announced, measurements.default_bandwidth_bytes_per_s)
    return np.minimum.outer(rates, rates)


def _require_finite(what: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{what} must be a finite number of at least 0, got {value}")
