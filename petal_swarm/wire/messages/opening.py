"""How a session begins: `Open` to each hop, `PushOpen` from hop to hop, and the answer to both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from petal_swarm.errors import UnknownVersionError
from petal_swarm.span import Span
from petal_swarm.wire import fields
from petal_swarm.wire.announcement import span_from_list
from petal_swarm.wire.frames import Frame
from petal_swarm.wire.messages.adapters import adapter_id
from petal_swarm.wire.messages.parts import (
    DTYPE_BYTES,
    MAX_POSITION,
    MAX_STEP,
    NO_STEP,
    Neighbour,
    optional_neighbour,
    optional_peer,
)
from petal_swarm.wire.protocols import VERSION

SESSION_ID_BYTES = 16
MAX_WAIT_S = 600


@dataclass(frozen=True, slots=True)
class Open:
    """Client to each hop: begin a session on `span`.

    `upstream` is None at the first hop, `next` at the last. `wait_s` is how long the client will wait
    for room, in seconds. With `share_prefixes` the session may start behind a prefix that another session
    has left, and leaves its own. The last hop answers the steps after `answered` only: earlier ones are
    sent again to fill its KV cache. A `spare` sends nothing on until a `Reroute` tells it to. With
    `receipts` the hop can recall what it received. `adapter` names one that the client has uploaded, or that
    the server offers to everybody.
    """

    type: ClassVar[str] = "open"
    session: bytes
    epoch: int
    model: str
    span: Span
    max_length: int
    upstream: str | None = None
    next: Neighbour | None = None
    share_prefixes: bool = False
    wait_s: float = 0.0
    answered: int = NO_STEP
    spare: bool = False
    receipts: bool = False
    adapter: str | None = None
    version: int = VERSION

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "version": self.version,
            "session": self.session,
            "epoch": self.epoch,
            "share_prefixes": self.share_prefixes,
            "answered": self.answered,
            "spare": self.spare,
            "receipts": self.receipts,
            "adapter": self.adapter,
            "model": self.model,
            "span": [self.span.start, self.span.end],
            "max_length": self.max_length,
            "upstream": self.upstream,
            "next": self.next.to_header() if self.next else None,
            "wait_s": self.wait_s,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Open:
        header = frame.header
        return cls(
            version=read_version(header),
            session=fields.raw(header, "session", SESSION_ID_BYTES, SESSION_ID_BYTES),
            epoch=fields.integer(header, "epoch", 0, MAX_STEP),
            model=fields.text(header, "model", limit=256),
            span=span_from_list(header.get("span")),
            max_length=fields.integer(header, "max_length", 1, MAX_POSITION),
            upstream=optional_peer(header, "upstream"),
            next=optional_neighbour(header, "next"),
            share_prefixes=fields.flag(header, "share_prefixes", False),
            wait_s=fields.number(header, "wait_s", 0, MAX_WAIT_S, 0.0),
            answered=fields.integer(header, "answered", NO_STEP, MAX_STEP, NO_STEP),
            spare=fields.flag(header, "spare", False),
            receipts=fields.flag(header, "receipts", False),
            adapter=fields.optional(header, "adapter", lambda: adapter_id(header, "adapter")),
        )


@dataclass(frozen=True, slots=True)
class PushOpen:
    """Hop k-1 to hop k: this stream carries the steps of `session`."""

    type: ClassVar[str] = "push-open"
    session: bytes
    epoch: int
    version: int = VERSION

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "version": self.version, "session": self.session, "epoch": self.epoch}

    @classmethod
    def from_frame(cls, frame: Frame) -> PushOpen:
        return cls(
            version=read_version(frame.header),
            session=fields.raw(frame.header, "session", SESSION_ID_BYTES, SESSION_ID_BYTES),
            epoch=fields.integer(frame.header, "epoch", 0, MAX_STEP),
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """Answer to `Open` and `PushOpen`: ready for the steps after `last_step`, which arrived earlier.

    `dtype` is what the blocks compute in.
    """

    type: ClassVar[str] = "opened"
    dtype: str = "float32"
    max_batch_tokens: int = 1
    kv_tokens_free: int = 0
    last_step: int = NO_STEP

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "dtype": self.dtype,
            "max_batch_tokens": self.max_batch_tokens,
            "kv_tokens_free": self.kv_tokens_free,
            "last_step": self.last_step,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Opened:
        return cls(
            dtype=fields.choice(frame.header, "dtype", tuple(DTYPE_BYTES), "float32"),
            max_batch_tokens=fields.integer(frame.header, "max_batch_tokens", 1, 1 << 40, 1),
            kv_tokens_free=fields.integer(frame.header, "kv_tokens_free", 0, 1 << 40, 0),
            last_step=fields.integer(frame.header, "last_step", NO_STEP, MAX_STEP, NO_STEP),
        )


OpeningMessage: TypeAlias = Open | PushOpen | Opened


def read_version(header: Mapping[str, Any]) -> int:
    """Read before any other field, since those may differ in other versions."""
    version = fields.integer(header, "version", 0, 1 << 31)
    if version != VERSION:
        raise UnknownVersionError(f"protocol version {version} is not spoken here, only {VERSION}")
    return version
