"""Adapters of a client for the blocks of a server: the shape is offered, the numbers follow if wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.span import Span
from petal_swarm.wire import fields
from petal_swarm.wire.announcement import MAX_BLOCKS, span_from_list
from petal_swarm.wire.frames import Buffer, Frame
from petal_swarm.wire.messages.parts import DTYPE_BYTES

MAX_PLACES = 2048
MAX_STEM = 64
MAX_RANK = 1 << 16
MAX_PREFIX_TOKENS = 4096
MAX_NUMBERS = 1 << 31
MAX_TTL_S = 86400.0
ADAPTER_DIGEST_BYTES = 32
#: Numbers travel in parts of at most so many bytes, so that whoever reads them may say when it is enough.
MAX_PART_BYTES = 4 << 20


class Place(NamedTuple):
    """A projection of a block that gets `scale * b @ a`, of that rank, on top of its weight."""

    block: int
    stem: str
    rank: int
    scale: float

    @classmethod
    def from_header(cls, value: Any) -> Place:
        if type(value) is not list or len(value) != 4:
            raise RemoteProtocolError(
                f"field 'places': expected [block, stem, rank, scale], got {fields.shown(value)}"
            )
        entry = dict(zip(cls._fields, value, strict=True))
        return cls(
            fields.integer(entry, "block", 0, MAX_BLOCKS),
            fields.text(entry, "stem", limit=MAX_STEM),
            fields.integer(entry, "rank", 1, MAX_RANK),
            fields.number(entry, "scale", -1e6, 1e6),
        )


@dataclass(frozen=True, slots=True)
class AdapterOffer:
    """Client to a server: I have an adapter of this shape for the blocks of `span`; do you need its numbers?

    There are `numbers` of them, which travel as `dtype`; `digest` is that of shape and numbers. With `eager`
    they follow at once. Unused, the adapter need not be kept longer than `ttl_s` seconds.
    """

    type: ClassVar[str] = "adapter-offer"
    model: str
    span: Span
    adapter: str
    numbers: int
    digest: bytes
    places: tuple[Place, ...] = ()
    prefix_tokens: int = 0
    dtype: str = "float32"
    eager: bool = False
    ttl_s: float = 3600.0

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return self.numbers * DTYPE_BYTES[self.dtype]

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "model": self.model,
            "span": [self.span.start, self.span.end],
            "adapter": self.adapter,
            "numbers": self.numbers,
            "digest": self.digest,
            "places": [list(place) for place in self.places],
            "prefix_tokens": self.prefix_tokens,
            "dtype": self.dtype,
            "eager": self.eager,
            "ttl_s": self.ttl_s,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> AdapterOffer:
        header = frame.header
        return cls(
            model=fields.text(header, "model", limit=256),
            span=span_from_list(header.get("span")),
            adapter=adapter_id(header, "adapter"),
            numbers=fields.integer(header, "numbers", 1, MAX_NUMBERS),
            digest=fields.raw(header, "digest", ADAPTER_DIGEST_BYTES, ADAPTER_DIGEST_BYTES),
            places=fields.items(header, "places", Place.from_header, limit=MAX_PLACES),
            prefix_tokens=fields.integer(header, "prefix_tokens", 0, MAX_PREFIX_TOKENS, 0),
            dtype=fields.choice(header, "dtype", tuple(DTYPE_BYTES), "float32"),
            eager=fields.flag(header, "eager", False),
            ttl_s=fields.number(header, "ttl_s", 0, MAX_TTL_S, 3600.0),
        )


@dataclass(frozen=True, slots=True)
class AdapterWanted:
    """Answer to an `AdapterOffer` that is not `eager`: the server has it not, and takes it."""

    type: ClassVar[str] = "adapter-wanted"

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type}

    @classmethod
    def from_frame(cls, frame: Frame) -> AdapterWanted:
        return cls()


@dataclass(frozen=True, slots=True, eq=False)
class AdapterPart:
    """The next numbers, little-endian; all parts of an adapter come in order and make up its size."""

    type: ClassVar[str] = "adapter-part"
    payload: Buffer

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type}

    @classmethod
    def from_frame(cls, frame: Frame) -> AdapterPart:
        if not 0 < frame.payload.nbytes <= MAX_PART_BYTES:
            raise RemoteProtocolError(
                f"a part of {frame.payload.nbytes} bytes; 1 to {MAX_PART_BYTES} are allowed"
            )
        return cls(frame.payload)


@dataclass(frozen=True, slots=True)
class AdapterReady:
    """The server has the adapter that was offered: sessions and passes of this client may name it."""

    type: ClassVar[str] = "adapter-ready"

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type}

    @classmethod
    def from_frame(cls, frame: Frame) -> AdapterReady:
        return cls()


def adapter_id(header: fields.Header, name: str) -> str:
    """The name of an adapter among those of one peer: 1 to 64 printable ASCII characters, no spaces.

    Raises:
        RemoteProtocolError: it is anything else.
    """
    value = fields.text(header, name, limit=64)
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        raise RemoteProtocolError(f"field {name!r}: {fields.shown(value)} cannot name an adapter")
    return value


AdapterMessage: TypeAlias = AdapterOffer | AdapterWanted | AdapterPart | AdapterReady
