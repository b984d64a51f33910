"""What a server says about itself: the record that goes into the DHT, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from petal_swarm.errors import ConfigError, RemoteProtocolError
from petal_swarm.span import Span
from petal_swarm.wire import fields

MAX_ADDRESSES = 16
MAX_NEIGHBOURS = 64
MAX_BLOCKS = 100_000
MAX_PEER_ID = 128
MAX_ADAPTERS = 16
MAX_ADAPTER_NAME = 64
ADAPTER_ID_DIGITS = 32
#: Announced bandwidths are divided by.
MIN_BANDWIDTH_BYTES_PER_S = 1.0
STATES = ("joining", "serving", "left")


@dataclass(frozen=True, slots=True)
class Announcement:
    """One server's span of one model, with the measurements that routing needs.

    Times are seconds. `block_time_s` is what one decode step of one token costs for each block;
    `step_time_s` what a step costs whatever its blocks; `queue_s` the work already waiting.
    `next_rtts_s` holds round trips this server measured to peers that may follow it on a route.
    `adapters` are those that it offers to everybody: name and id of each.
    `movable`: it goes where the swarm needs it. `moving_to`: it still serves `span`, and means to leave it.
    `trains`: its blocks pass gradients, too.
    """

    peer_id: str
    model: str
    span: Span
    addresses: tuple[str, ...] = ()
    name: str = ""
    state: str = "serving"
    dtype: str = "float32"
    quant: str = "none"
    kv_dtype: str = "auto"
    block_time_s: float = 0.001
    step_time_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    queue_s: float = 0.0
    kv_tokens_free: int = 0
    kv_tokens: int = 0
    max_batch_tokens: int = 0
    bandwidth_bytes_per_s: float = 0.0
    next_rtts_s: Mapping[str, float] = field(default_factory=dict)
    version: str = ""
    movable: bool = False
    moving_to: Span | None = None
    trains: bool = False
    adapters: tuple[tuple[str, str], ...] = ()

    def to_header(self) -> dict[str, Any]:
        """A msgpack-able map, read back by `from_header`."""
        return {
            "peer_id": self.peer_id,
            "model": self.model,
            "span": [self.span.start, self.span.end],
            "addresses": list(self.addresses),
            "name": self.name,
            "state": self.state,
            "dtype": self.dtype,
            "quant": self.quant,
            "kv_dtype": self.kv_dtype,
            "block_time_s": self.block_time_s,
            "step_time_s": self.step_time_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "queue_s": self.queue_s,
            "kv_tokens_free": self.kv_tokens_free,
            "kv_tokens": self.kv_tokens,
            "max_batch_tokens": self.max_batch_tokens,
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s,
            "next_rtts_s": dict(self.next_rtts_s),
            "version": self.version,
            "movable": self.movable,
            "moving_to": [self.moving_to.start, self.moving_to.end] if self.moving_to else None,
            "trains": self.trains,
            "adapters": [list(adapter) for adapter in self.adapters],
        }

    @classmethod
    def from_header(cls, header: Any) -> Announcement:
        """Read what another peer wrote; unknown fields are ignored.

        Raises:
            RemoteProtocolError: a field is missing, of the wrong type or out of range.
        """
        if not isinstance(header, dict):
            raise RemoteProtocolError("an announcement must be a map")
        peer_id = fields.text(header, "peer_id", limit=MAX_PEER_ID)
        rtts = fields.mapping(header, "next_rtts_s") if "next_rtts_s" in header else {}
        if len(rtts) > MAX_NEIGHBOURS:
            raise RemoteProtocolError(f"field 'next_rtts_s': more than {MAX_NEIGHBOURS} entries")
        kv_tokens = fields.integer(header, "kv_tokens", 0, 1 << 40, 0)
        moving_to = header.get("moving_to")
        return cls(
            peer_id=peer_id,
            model=fields.text(header, "model", limit=256),
            span=span_from_list(header.get("span")),
            addresses=fields.items(
                header, "addresses", lambda value: _own_address(value, peer_id), limit=MAX_ADDRESSES
            ),
            name=fields.text(header, "name", "", limit=64),
            state=fields.choice(header, "state", STATES, "serving"),
            dtype=fields.text(header, "dtype", "float32", limit=32),
            quant=fields.text(header, "quant", "none", limit=32),
            kv_dtype=fields.text(header, "kv_dtype", "auto", limit=32),
            block_time_s=fields.number(header, "block_time_s", 1e-9, 1e4),
            step_time_s=fields.number(header, "step_time_s", 0, 1e4, 0.0),
            prefill_tokens_per_s=fields.number(header, "prefill_tokens_per_s", 0, 1e12, 0.0),
            queue_s=fields.number(header, "queue_s", 0, 1e6, 0.0),
            kv_tokens_free=fields.integer(header, "kv_tokens_free", 0, kv_tokens, 0),
            kv_tokens=kv_tokens,
            max_batch_tokens=fields.integer(header, "max_batch_tokens", 0, 1 << 40, 0),
            bandwidth_bytes_per_s=_bandwidth(header),
            next_rtts_s={
                fields.text({"peer_id": peer}, "peer_id", limit=MAX_PEER_ID): fields.number(
                    rtts, peer, 0, 1e4
                )
                for peer in rtts
                if isinstance(peer, str)
            },
            version=fields.text(header, "version", "", limit=64),
            movable=fields.flag(header, "movable", False),
            moving_to=None if moving_to is None else span_from_list(moving_to, "moving_to"),
            trains=fields.flag(header, "trains", False),
            adapters=fields.items(header, "adapters", _adapter, limit=MAX_ADAPTERS),
        )


def span_from_list(value: Any, name: str = "span") -> Span:
    """`[start, end]` from the wire, in the field `name`, as a `Span`.

    Raises:
        RemoteProtocolError: if it is not one.
    """
    start, end = fields.items({name: value}, name, _block_index, limit=2, low=2)
    try:
        return Span(start, end)
    except ConfigError as error:
        raise RemoteProtocolError(f"field {name!r}: {error}") from None


def _own_address(value: Any, peer_id: str) -> str:
    """An address that leads to the peer itself. It is dialled, logged and shown, so nothing odd is in it."""
    address = fields.as_text(value)
    if not (address.startswith("/") and address.endswith(f"/p2p/{peer_id}")):
        raise RemoteProtocolError(f"field 'addresses': {fields.shown(address)} is no address of that peer")
    if not address.isascii() or not address.isprintable() or " " in address:
        raise RemoteProtocolError(f"field 'addresses': {fields.shown(address)} has odd characters")
    return address


def _adapter(value: Any) -> tuple[str, str]:
    """Name and id of an adapter: the name is shown, and typed, so nothing odd is in it."""
    if type(value) is not list or len(value) != 2:
        raise RemoteProtocolError(f"field 'adapters': expected [name, id], got {fields.shown(value)}")
    entry = {"name": value[0], "id": value[1]}
    name = fields.text(entry, "name", limit=MAX_ADAPTER_NAME)
    digits = fields.text(entry, "id", limit=ADAPTER_ID_DIGITS)
    if not name or not name.isprintable() or " " in name:
        raise RemoteProtocolError(f"field 'adapters': {fields.shown(name)} cannot name an adapter")
    if len(digits) != ADAPTER_ID_DIGITS or not set(digits) <= set("0123456789abcdef"):
        raise RemoteProtocolError(f"field 'adapters': {fields.shown(digits)} is no id")
    return name, digits


def _bandwidth(header: fields.Header) -> float:
    value = fields.number(header, "bandwidth_bytes_per_s", 0, 1e15, 0.0)
    if 0 < value < MIN_BANDWIDTH_BYTES_PER_S:
        raise RemoteProtocolError(
            f"field 'bandwidth_bytes_per_s': 0, or at least {MIN_BANDWIDTH_BYTES_PER_S:g}, not {value:g}"
        )
    return value


def _block_index(value: Any) -> int:
    return fields.integer({"block": value}, "block", 0, MAX_BLOCKS)
