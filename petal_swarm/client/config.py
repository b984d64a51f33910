"""How a client finds and uses a swarm."""

from __future__ import annotations

import importlib.util
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from petal_swarm.errors import ConfigError
from petal_swarm.wire.messages.opening import MAX_WAIT_S

TRANSPORTS = ("auto", "p2pd", "libp2p")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Settings of one client. Times in seconds.

    With `share_prefixes`, sessions may start behind what earlier sessions with the same beginning left in
    the servers' KV caches, and leave their own; see `docs/threat-model.md` for what that reveals.
    `prefill_chunk_tokens` cuts long prompts into steps of so many tokens; None chooses for each route.
    `wait_for_room_s` is how long to wait in the queue of a full server when no other serves its blocks.
    `swarm_key` is the file of a private swarm's key. `identity` is a file that keeps the peer id, made if
    missing; without it every client has a new one.

    When a server is lost in the middle of a session, another one is looked for during `repair_timeout_s`,
    and each that is tried has `repair_open_timeout_s`. A server that is busy is left alone for
    `retry_busy_s`. `max_log_bytes` bounds what all sessions together keep of what they sent, to send it
    again; a session whose part was dropped cannot survive the loss of its first server.

    With an `audit_rate`, that share of the steps of each hop is computed again by another server, beside the
    session, and a server that fails two audits is not used any more. Such sessions share no prefixes.

    Training goes through at most `training_lanes` routes at once that have no server in common.

    Raises:
        ConfigError: no initial peers, an unknown transport, or a number out of range.
    """

    initial_peers: tuple[str, ...]
    transport: str = "auto"
    connect_timeout_s: float = 10.0
    open_timeout_s: float = 20.0
    step_timeout_s: float = 120.0
    wait_for_blocks_s: float = 20.0
    open_attempts: int = 4
    max_step_bytes: int = 16 << 20
    share_prefixes: bool = True
    prefill_chunk_tokens: int | None = None
    wait_for_room_s: float = 30.0
    repair_timeout_s: float = 30.0
    repair_open_timeout_s: float = 4.0
    retry_busy_s: float = 5.0
    max_log_bytes: int = 1 << 30
    audit_rate: float = 0.0
    training_lanes: int = 4
    swarm_key: str | Path | None = None
    identity: str | Path | None = None

    def __post_init__(self) -> None:
        if not self.initial_peers:
            raise ConfigError(
                "initial_peers is empty: give the address that a server printed after `ready`, for example"
                " /ip4/127.0.0.1/tcp/31330/p2p/12D3Koo..."
            )
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"transport must be one of {', '.join(TRANSPORTS)}, got {self.transport!r}")
        if self.prefill_chunk_tokens is not None and self.prefill_chunk_tokens < 1:
            raise ConfigError(f"prefill_chunk_tokens must be at least 1, got {self.prefill_chunk_tokens}")
        if self.training_lanes < 1:
            raise ConfigError(f"training_lanes must be at least 1, got {self.training_lanes}")
        if not 0 <= self.audit_rate <= 1:
            raise ConfigError(f"audit_rate must be 0 to 1, got {self.audit_rate}")
        if not 0 <= self.wait_for_room_s <= MAX_WAIT_S:
            raise ConfigError(f"wait_for_room_s must be 0 to {MAX_WAIT_S}, got {self.wait_for_room_s}")

    def choose_transport(self) -> str:
        """`auto`: the Go daemon where hivemind ships it, py-libp2p elsewhere.

        hivemind and py-libp2p cannot be imported in one process, so one that is loaded already decides.
        """
        if self.transport != "auto":
            return self.transport
        if "libp2p" in sys.modules:
            return "libp2p"
        daemon_ships = sys.platform == "linux" and platform.machine() == "x86_64"
        return "p2pd" if daemon_ships and importlib.util.find_spec("hivemind") else "libp2p"
