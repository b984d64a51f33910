"""Who serves which blocks of a model, how fast, and how busy: what a client can say of it at one moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from petal_swarm.routing.blocks import missing_blocks
from petal_swarm.wire.announcement import Announcement

#: A server is busy from so much work or so full a KV cache on, and free again below the lower figures.
BUSY_QUEUE_S, FREE_QUEUE_S = 2.0, 0.5
BUSY_LOAD, FREE_LOAD = 0.95, 0.8


@dataclass(frozen=True, slots=True)
class Status:
    """What the swarm says of a model. `rtts_s` has those who answer, by peer id; `busy` some of them.

    `joining` are new, and have not answered yet: a server is announced before its port is open.
    """

    name: str
    model_key: str
    num_blocks: int
    announcements: tuple[Announcement, ...]
    rtts_s: Mapping[str, float]
    busy: frozenset[str] = frozenset()
    joining: frozenset[str] = frozenset()

    @property
    def missing(self) -> tuple[int, ...]:
        """Blocks that nobody serves. Whoever does not answer does not count: its record outlives it."""
        return missing_blocks([a for a in self.announcements if a.peer_id in self.rtts_s], self.num_blocks)

    @property
    def adapters(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name and id of each that is offered to everybody, and the blocks that nobody serves with it."""
        there = [a for a in self.announcements if a.peer_id in self.rtts_s]
        offered = sorted({adapter for announcement in there for adapter in announcement.adapters})
        return [
            (*adapter, missing_blocks([a for a in there if adapter in a.adapters], self.num_blocks))
            for adapter in offered
        ]

    def state(self, announcement: Announcement) -> str:
        if announcement.peer_id in self.rtts_s:
            return announcement.state
        return "joining" if announcement.peer_id in self.joining else "no answer"


def in_order(announcements: Iterable[Announcement]) -> tuple[Announcement, ...]:
    """By span, as they are shown."""
    return tuple(sorted(announcements, key=lambda a: (a.span.start, a.span.end, a.name, a.peer_id)))


def tokens_per_s(peer: Announcement) -> float:
    """How many tokens of one session the peer's span decodes in a second, by its own measurement."""
    return 1 / max(peer.step_time_s + len(peer.span) * peer.block_time_s, 1e-9)


def load(peer: Announcement) -> float:
    """The share of the peer's KV cache that is taken, 0 to 1."""
    return 1 - peer.kv_tokens_free / peer.kv_tokens if peer.kv_tokens else 0.0


def is_busy(peer: Announcement, *, was: bool) -> bool:
    """Whether new work would wait there. It takes less to stay busy than to become so."""
    queue_s, full = (FREE_QUEUE_S, FREE_LOAD) if was else (BUSY_QUEUE_S, BUSY_LOAD)
    return peer.state == "serving" and (peer.queue_s > queue_s or load(peer) > full)


def short_id(peer_id: str) -> str:
    """The end of a peer id, which tells peers apart and leads to none of them."""
    return peer_id[-8:]


def to_json(status: Status) -> dict[str, Any]:
    """The document of `petal-swarm status --json`."""
    return {
        "model": status.name,
        "model_key": status.model_key,
        "num_blocks": status.num_blocks,
        "missing_blocks": list(status.missing),
        "adapters": [
            {"name": name, "id": adapter, "missing_blocks": list(missing)}
            for name, adapter, missing in status.adapters
        ],
        "peers": [peer_to_json(status, announcement) for announcement in status.announcements],
    }


def peer_to_json(status: Status, peer: Announcement) -> dict[str, Any]:
    return {
        "peer_id": peer.peer_id,
        "name": peer.name,
        "span": [peer.span.start, peer.span.end],
        "state": status.state(peer),
        "dtype": peer.dtype,
        "quant": peer.quant,
        "tokens_per_s": round(tokens_per_s(peer), 2),
        "queue_s": peer.queue_s,
        "kv_tokens": peer.kv_tokens,
        "kv_tokens_free": peer.kv_tokens_free,
        "rtt_s": status.rtts_s.get(peer.peer_id),
        "bandwidth_bytes_per_s": peer.bandwidth_bytes_per_s,
        "version": peer.version,
        "addresses": list(peer.addresses),
    }


def public_peer(status: Status, peer: Announcement) -> dict[str, Any]:
    """One server for everybody's eyes: who runs it and where stays unsaid."""
    rtt_s = status.rtts_s.get(peer.peer_id)
    moving_to = peer.moving_to
    return {
        "id": short_id(peer.peer_id),
        "name": peer.name,
        "span": [peer.span.start, peer.span.end],
        "state": status.state(peer),
        "busy": peer.peer_id in status.busy,
        "moving_to": [moving_to.start, moving_to.end] if moving_to else None,
        "tokens_per_s": _rounded(tokens_per_s(peer)),
        "queue_s": _rounded(peer.queue_s),
        "load": round(load(peer), 2),
        "kv_tokens": peer.kv_tokens,
        "kv_tokens_free": peer.kv_tokens_free,
        "rtt_s": None if rtt_s is None else _rounded(rtt_s),
        "dtype": peer.dtype,
        "quant": peer.quant,
        "trains": peer.trains,
        "adapters": [name for name, _ in peer.adapters],
        "version": peer.version,
    }


def _rounded(value: float) -> float:
    """To two digits: more of them only change all the time."""
    return float(f"{value:.2g}")
