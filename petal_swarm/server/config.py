"""What a server is told when it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from petal_swarm.errors import ConfigError
from petal_swarm.net.addresses import is_loopback, is_peer_id
from petal_swarm.span import Span
from petal_swarm.wire.announcement import MAX_ADAPTERS
from petal_swarm.wire.messages.prefixes import MAX_PAGES, PAGE_TOKENS

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
MIN_KV_TOKENS = 64
#: Keys of all pages of a step must fit one message.
MAX_BATCH_TOKENS = MAX_PAGES * PAGE_TOKENS
MIN_UPLOAD_MBIT, MAX_UPLOAD_MBIT = 0.1, 1e6
KV_DTYPES = ("auto", "int8")
REACHABILITY = ("auto", "public", "private")
OFFLOADS = ("none", "cpu", "disk")
NOWHERE = "none"
EVERYWHERE = "/ip4/0.0.0.0/tcp/0"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of one server; the names are those of `run_server --help`.

    Without a `cache_dir` nothing is kept for the next start. `swarm_key` is the file of a private swarm's
    key. Only `allow_peers` may open sessions, if there are any. `rebalance` is whether it moves to other
    blocks when the swarm needs them more; None is yes, unless `blocks` says which. `adapters` are offered to
    everybody, each a folder or Hub id, or `NAME=` and that; `adapter_mib` is the room for clients' own.
    `upload_mbit` is how fast the line sends; None is to measure it.
    `training_mib` is the room for what passes of training keep; None is a share of the free memory. Blocks
    and KV cache take `device_memory_mib` at most; None is a share of what is free. Blocks that do not fit are
    where `offload` says, and there is no training then. `tensor_parallel` is over how many devices of one
    kind each block is shared out. With `kernels` those of our own are tried on a CUDA device, and used where
    they are right and faster.

    Raises:
        ConfigError: settings that contradict each other.
    """

    model: str
    initial_peers: tuple[str, ...] = ()
    new_swarm: bool = False
    blocks: Span | None = None
    num_blocks: int | None = None
    listen: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    reachability: str = "auto"
    identity: str | None = None
    swarm_key: str | None = None
    allow_peers: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    quant: str = "auto"
    kv_dtype: str = "auto"
    kv_tokens: int | None = None
    prefix_tokens: int | None = None
    max_batch_tokens: int = 2048
    max_mbit_per_peer: float = 2000.0
    upload_mbit: float | None = None
    name: str = ""
    drain_timeout_s: float = 60.0
    cache_dir: str | None = None
    rebalance: bool | None = None
    adapters: tuple[str, ...] = ()
    adapter_mib: int = 512
    training_mib: int | None = None
    tensor_parallel: int = 1
    kernels: bool = False
    offload: str = "none"
    device_memory_mib: int | None = None

    def __post_init__(self) -> None:
        if self.new_swarm == bool(self.initial_peers):
            raise ConfigError(
                "give --new-swarm to start a swarm, or --initial-peers ADDR to join one (and not both)"
            )
        for peer_id in self.allow_peers:
            if not is_peer_id(peer_id):
                raise ConfigError(f"--allow-peer takes a peer id such as 12D3Koo..., got {peer_id!r:.100}")
        if self.blocks is not None and self.num_blocks is not None:
            raise ConfigError("give --blocks or --num-blocks, not both")
        if self.blocks is not None and self.rebalance:
            raise ConfigError("--blocks stays where it is; give --num-blocks to --rebalance")
        for name, value in (
            ("num-blocks", self.num_blocks),
            ("kv-tokens", self.kv_tokens),
            ("max-batch-tokens", self.max_batch_tokens),
            ("tensor-parallel", self.tensor_parallel),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}")
        if self.max_batch_tokens > MAX_BATCH_TOKENS:
            raise ConfigError(f"--max-batch-tokens may be {MAX_BATCH_TOKENS} at most")
        if not self.max_mbit_per_peer > 0:
            raise ConfigError(f"--max-mbit-per-peer must be more than 0, got {self.max_mbit_per_peer:g}")
        if self.upload_mbit is not None and not MIN_UPLOAD_MBIT <= self.upload_mbit <= MAX_UPLOAD_MBIT:
            raise ConfigError(
                f"--upload-mbit must be {MIN_UPLOAD_MBIT:g} to {MAX_UPLOAD_MBIT:,.0f},"
                f" got {self.upload_mbit:g}"
            )
        if self.prefix_tokens is not None and self.prefix_tokens < 0:
            raise ConfigError(f"--prefix-tokens must be at least 0, got {self.prefix_tokens}")
        if self.reachability not in REACHABILITY:
            raise ConfigError(
                f"--reachability must be one of {', '.join(REACHABILITY)}, got {self.reachability!r}"
            )
        if NOWHERE in self.listen and (self.listen != (NOWHERE,) or self.reachability != "private"):
            raise ConfigError("--listen none goes alone, and with --reachability private")
        if self.reachability == "private" and (self.announce or self.new_swarm):
            raise ConfigError(
                "--reachability private means being reached through relays: join with --initial-peers,"
                " and do not --announce"
            )
        if self.kv_dtype not in KV_DTYPES:
            raise ConfigError(f"--kv-dtype must be one of {', '.join(KV_DTYPES)}, got {self.kv_dtype!r}")
        if self.kv_tokens is not None and self.kv_tokens < MIN_KV_TOKENS:
            raise ConfigError(f"--kv-tokens must be at least {MIN_KV_TOKENS}, got {self.kv_tokens}")
        if self.offload not in OFFLOADS:
            raise ConfigError(f"--offload must be one of {', '.join(OFFLOADS)}, got {self.offload!r}")
        if self.offload == "disk" and self.cache_dir is None:
            raise ConfigError("--offload disk keeps blocks in files: it needs a --cache-dir")
        if self.offload != "none" and self.tensor_parallel > 1:
            raise ConfigError("blocks that are shared out cannot come and go: --offload or --tensor-parallel")
        if self.offload != "none" and self.training_mib:
            raise ConfigError(
                "blocks that come and go cannot be trained through: --offload or --training-mib"
            )
        if self.device_memory_mib is not None and self.device_memory_mib < 1:
            raise ConfigError(f"--device-memory must be at least 1, got {self.device_memory_mib}")
        if self.adapter_mib < 0:
            raise ConfigError(f"--adapter-mib must be at least 0, got {self.adapter_mib}")
        if self.training_mib is not None and self.training_mib < 0:
            raise ConfigError(f"--training-mib must be at least 0, got {self.training_mib}")
        if len(self.adapters) > MAX_ADAPTERS:
            raise ConfigError(f"--adapters takes {MAX_ADAPTERS} at most")

    def session_limits(self) -> SessionLimits:
        """Bounds on what peers may ask, with what was said of them here."""
        return SessionLimits(max_bytes_per_s_of_peer=self.max_mbit_per_peer * 1e6 / 8)

    @property
    def upload_bytes_per_s(self) -> float:
        """What the server was told of its line; 0 if it is to measure that."""
        return (self.upload_mbit or 0.0) * 1e6 / 8

    @property
    def trains(self) -> bool:
        return self.training_mib != 0 and self.offload == "none"

    @property
    def rebalances(self) -> bool:
        return self.blocks is None if self.rebalance is None else self.rebalance

    def listen_addresses(self) -> tuple[str, ...]:
        """Where to listen: as told; else on loopback while the swarm is on this machine; else everywhere."""
        if self.listen:
            return () if self.listen == (NOWHERE,) else self.listen
        return (LOOPBACK,) if all(map(is_loopback, self.initial_peers)) else (EVERYWHERE,)


def default_cache_dir(environment: Mapping[str, str], home: Path) -> Path:
    """Where a user's programs keep what they can do without: `$XDG_CACHE_HOME`, or `.cache` at home."""
    base = environment.get("XDG_CACHE_HOME", "")
    # The XDG specification: paths that are not absolute are to be ignored.
    return (Path(base) if os.path.isabs(base) else home / ".cache") / "petal_swarm"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """Bounds on what peers may ask of a server. Times in seconds, rates in bytes a second.

    `overcommit`: all open sessions together may have asked for so many times the KV cache. `max_wait_s`:
    in the queue for room. `max_opening`: streams that have not said yet what they are, or push into
    a session that is not there yet. `idle_when_full_s`: while somebody waits for room. `reclaim_after_s`: so
    long somebody waits before peers with more than an equal share of the cache lose sessions. What is
    `of_peer` counts over all sessions whose client the peer is; one more step may come on top of it.
    `min_bytes_per_s`: slower than this, for longer than `frame_timeout_s` or `write_timeout_s`, is too slow.
    `repair_timeout_s`: without a next hop. `max_log_bytes`: of what was sent on, kept in all sessions for
    a hop that takes over.
    """

    max_sessions: int = 512
    max_sessions_of_peer: int = 256
    max_streams: int = 8192
    max_streams_of_peer: int = 1024
    max_opening: int = 1024
    max_opening_of_peer: int = 512
    max_steps_in_flight: int = 32
    max_bytes_in_flight: int = 128 << 20
    max_bytes_in_flight_of_peer: int = 256 << 20
    max_bytes_in_flight_of_all: int = 1 << 30
    max_queued_tokens_of_peer: int = 1 << 16
    max_bytes_per_s_of_peer: float = 250e6
    overcommit: float = 2.0
    max_waiting: int = 64
    max_waiting_of_peer: int = 8
    max_wait_s: float = 60.0
    open_timeout_s: float = 15.0
    dial_timeout_s: float = 5.0
    first_step_timeout_s: float = 60.0
    idle_timeout_s: float = 1800.0
    idle_when_full_s: float = 60.0
    reclaim_after_s: float = 10.0
    write_timeout_s: float = 30.0
    repair_timeout_s: float = 60.0
    max_log_bytes: int = 1 << 30
    frame_timeout_s: float = 30.0
    min_bytes_per_s: float = 4096.0
