"""The messages of the three stream protocols, each a frozen dataclass that checks what it reads.

A message is a frame: its header is the map made by `to_header`, its payload (for those that carry a
tensor) the encoded tensor. Reading ignores unknown fields and raises `RemoteProtocolError` for
anything missing, mistyped or out of range. Tensors stay bytes here; `tensors.py` decodes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

from petal_swarm.errors import LocalProtocolError, RemoteProtocolError, UnknownVersionError
from petal_swarm.span import Slice, Span
from petal_swarm.wire import fields
from petal_swarm.wire.announcement import MAX_ADDRESSES, span_from_list
from petal_swarm.wire.frames import Buffer, Frame, encode_frame
from petal_swarm.wire.protocols import VERSION

SESSION_ID_BYTES = 16
MAX_POSITION = 1 << 30
MAX_EXTENT = 1 << 31
MAX_SEQUENCES = 1024
MAX_STEP = 1 << 53
MAX_HOPS = 1024
MAX_WAIT_S = 600
MAX_RETRY_AFTER_S = 3600
MAX_ANNOUNCEMENTS = 512
MAX_RECORD_BYTES = 8 << 10
#: Prefixes are shared in pages of so many tokens; a key stands for everything up to a page's end.
PAGE_TOKENS = 16
PAGE_KEY_BYTES = 32
MAX_PAGES = 4096

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
CODECS = ("raw",)

Rows: TypeAlias = Literal["last", "all", "none"]
ROWS = ("last", "all", "none")


class TensorMeta(NamedTuple):
    """What a payload holds: a row-major little-endian matrix `[rows, columns]`, packed by `codec`."""

    dtype: str
    shape: tuple[int, int]
    codec: str = "raw"

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * DTYPE_BYTES[self.dtype]

    def to_header(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": self.shape, "codec": self.codec}

    @classmethod
    def from_frame(cls, frame: Frame) -> TensorMeta:
        """Read and check against the payload's true length."""
        header = fields.mapping(frame.header, "tensor")
        dtype, shape, codec = header.get("dtype"), header.get("shape"), header.get("codec")
        if type(dtype) is not str or dtype not in DTYPE_BYTES:
            raise RemoteProtocolError(
                f"field 'dtype': expected one of {', '.join(DTYPE_BYTES)}, got {fields.shown(dtype)}"
            )
        if type(codec) is not str or codec not in CODECS:
            raise RemoteProtocolError(
                f"field 'codec': expected one of {', '.join(CODECS)}, got {fields.shown(codec)}"
            )
        if not (type(shape) is list and len(shape) == 2 and all(map(_is_extent, shape))):
            raise RemoteProtocolError(f"field 'shape': expected [rows, columns], got {fields.shown(shape)}")
        meta = cls(dtype, (shape[0], shape[1]), codec)
        if meta.nbytes != frame.payload.nbytes:
            raise RemoteProtocolError(
                f"tensor {list(shape)} {dtype} is {meta.nbytes} bytes, not {frame.payload.nbytes}"
            )
        return meta


class PageKeys(NamedTuple):
    """Keys of consecutive full pages of a sequence, from page `first_page` on, each `PAGE_KEY_BYTES` long."""

    sequence: int
    first_page: int
    keys: tuple[bytes, ...]

    def to_header(self) -> list[Any]:
        return [self.sequence, self.first_page, b"".join(self.keys)]

    @classmethod
    def from_header(cls, value: Any) -> PageKeys:
        if type(value) is not list or len(value) != 3:
            raise RemoteProtocolError(
                f"field 'keys': expected [sequence, first page, keys], got {fields.shown(value)}"
            )
        entry = {"sequence": value[0], "first_page": value[1], "keys": value[2]}
        joined = fields.raw(entry, "keys", 0, MAX_PAGES * PAGE_KEY_BYTES)
        if len(joined) % PAGE_KEY_BYTES:
            raise RemoteProtocolError(f"field 'keys': {len(joined)} bytes are no whole number of keys")
        return cls(
            _sequence(entry["sequence"]),
            fields.integer(entry, "first_page", 0, MAX_POSITION // PAGE_TOKENS),
            tuple(joined[i : i + PAGE_KEY_BYTES] for i in range(0, len(joined), PAGE_KEY_BYTES)),
        )


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A peer on a route and where to dial it."""

    peer_id: str
    addresses: tuple[str, ...] = ()

    def to_header(self) -> dict[str, Any]:
        return {"peer_id": self.peer_id, "addresses": list(self.addresses)}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Neighbour:
        return cls(
            fields.text(header, "peer_id", limit=128),
            fields.items(header, "addresses", fields.as_text, limit=MAX_ADDRESSES),
        )


@dataclass(frozen=True, slots=True)
class Open:
    """Client to each hop: begin a session on `span`.

    `upstream` is None at the first hop, `next` at the last. `wait_s` is how long the client will wait
    for room, in seconds. With `share_prefixes` the session may start behind a prefix that another session
    has left, and leaves its own.
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
    version: int = VERSION

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "version": self.version,
            "session": self.session,
            "epoch": self.epoch,
            "share_prefixes": self.share_prefixes,
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
            version=_version(header),
            session=fields.raw(header, "session", SESSION_ID_BYTES, SESSION_ID_BYTES),
            epoch=fields.integer(header, "epoch", 0, MAX_STEP),
            model=fields.text(header, "model", limit=256),
            span=span_from_list(header.get("span")),
            max_length=fields.integer(header, "max_length", 1, MAX_POSITION),
            upstream=fields.text(header, "upstream", limit=128)
            if header.get("upstream") is not None
            else None,
            next=Neighbour.from_header(fields.mapping(header, "next"))
            if header.get("next") is not None
            else None,
            share_prefixes=fields.flag(header, "share_prefixes", False),
            wait_s=fields.number(header, "wait_s", 0, MAX_WAIT_S, 0.0),
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
            version=_version(frame.header),
            session=fields.raw(frame.header, "session", SESSION_ID_BYTES, SESSION_ID_BYTES),
            epoch=fields.integer(frame.header, "epoch", 0, MAX_STEP),
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """Answer to `Open` and `PushOpen`: ready for steps. `dtype` is what the blocks compute in."""

    type: ClassVar[str] = "opened"
    dtype: str = "float32"
    max_batch_tokens: int = 1
    kv_tokens_free: int = 0

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "dtype": self.dtype,
            "max_batch_tokens": self.max_batch_tokens,
            "kv_tokens_free": self.kv_tokens_free,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Opened:
        return cls(
            dtype=fields.choice(frame.header, "dtype", tuple(DTYPE_BYTES), "float32"),
            max_batch_tokens=fields.integer(frame.header, "max_batch_tokens", 1, 1 << 40, 1),
            kv_tokens_free=fields.integer(frame.header, "kv_tokens_free", 0, 1 << 40, 0),
        )


@dataclass(slots=True, eq=False)
class Step:
    """Packed hidden states for the blocks of the next hop.

    Not frozen: a hop sends on the step that it got, with its own tensor and trace.

    Before anything else, if `forks` is not None, sequence i becomes a copy of sequence `forks[i]`
    and all others end. Then each slice truncates its sequence to its position, and appends.
    `rows` says which rows the last hop answers with. `trace` holds, for each hop so far, the seconds
    from a step's arrival to its departure. `keys`, between hops, are those of the pages that the step
    completes.
    """

    type: ClassVar[str] = "step"
    step: int
    epoch: int
    slices: tuple[Slice, ...]
    tensor: TensorMeta
    payload: Buffer
    rows: Rows = "last"
    forks: tuple[int, ...] | None = None
    trace: tuple[float, ...] = ()
    keys: tuple[PageKeys, ...] = ()

    def to_header(self) -> dict[str, Any]:
        header: dict[str, Any] = {
            "type": self.type,
            "step": self.step,
            "epoch": self.epoch,
            "slices": self.slices,
            "rows": self.rows,
            "tensor": self.tensor.to_header(),
        }
        if self.forks is not None:
            header["forks"] = self.forks
        if self.trace:
            header["trace"] = self.trace
        if self.keys:
            header["keys"] = [pages.to_header() for pages in self.keys]
        return header

    @classmethod
    def from_frame(cls, frame: Frame) -> Step:
        header = frame.header
        forks = header.get("forks")
        slices = fields.items(header, "slices", _slice, limit=MAX_SEQUENCES, low=1)
        tensor = TensorMeta.from_frame(frame)
        if len(slices) > 1 and len({entry[0] for entry in slices}) != len(slices):
            raise RemoteProtocolError("field 'slices': a sequence appears twice")
        if sum([entry[2] for entry in slices]) != tensor.shape[0]:
            raise RemoteProtocolError("field 'slices': lengths do not add up to the tensor's rows")
        return cls(
            fields.integer(header, "step", 0, MAX_STEP),
            fields.integer(header, "epoch", 0, MAX_STEP),
            slices,
            tensor,
            frame.payload,
            fields.choice(header, "rows", ROWS),  # type: ignore[arg-type]
            None if forks is None else fields.items(header, "forks", _sequence, limit=MAX_SEQUENCES, low=1),
            fields.items(header, "trace", _seconds, limit=MAX_HOPS),
            _page_keys(header, low=0),
        )


@dataclass(frozen=True, slots=True)
class FindPrefix:
    """Hop k-1 to hop k: what do you hold of these prefixes? Comes before the step `step` that needs it.

    Every hop that finds pages lets the sequence start behind them, and asks the next one for as many.
    """

    type: ClassVar[str] = "find-prefix"
    step: int
    epoch: int
    keys: tuple[PageKeys, ...]

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "step": self.step,
            "epoch": self.epoch,
            "keys": [pages.to_header() for pages in self.keys],
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> FindPrefix:
        header = frame.header
        return cls(
            fields.integer(header, "step", 0, MAX_STEP),
            fields.integer(header, "epoch", 0, MAX_STEP),
            _page_keys(header, low=1),
        )


@dataclass(frozen=True, slots=True)
class PrefixFound:
    """Answer to `FindPrefix`: how many pages this hop and all behind it hold, for each of its entries."""

    type: ClassVar[str] = "prefix-found"
    step: int
    pages: tuple[int, ...]

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "step": self.step, "pages": self.pages}

    @classmethod
    def from_frame(cls, frame: Frame) -> PrefixFound:
        return cls(
            fields.integer(frame.header, "step", 0, MAX_STEP),
            fields.items(frame.header, "pages", _pages, limit=MAX_SEQUENCES, low=1),
        )


@dataclass(slots=True, eq=False)
class Output:
    """Last hop to client: the rows that step `step` asked for, in the order of its slices."""

    type: ClassVar[str] = "output"
    step: int
    epoch: int
    tensor: TensorMeta
    payload: Buffer
    trace: tuple[float, ...] = ()

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "step": self.step,
            "epoch": self.epoch,
            "tensor": self.tensor.to_header(),
            "trace": self.trace,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Output:
        return cls(
            step=fields.integer(frame.header, "step", 0, MAX_STEP),
            epoch=fields.integer(frame.header, "epoch", 0, MAX_STEP),
            tensor=TensorMeta.from_frame(frame),
            payload=frame.payload,
            trace=fields.items(frame.header, "trace", _seconds, limit=MAX_HOPS),
        )


@dataclass(frozen=True, slots=True)
class Error:
    """Why a message was refused; `step` names the step at fault, if it was one. The stream ends after it.

    `retry_after_s`, where the listener can tell: in how many seconds it may be worth to ask it again.
    """

    type: ClassVar[str] = "error"
    code: str
    message: str
    step: int | None = None
    retry_after_s: float | None = None

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "code": self.code,
            "message": self.message[: fields.MAX_TEXT],
            "step": self.step,
            "retry_after_s": self.retry_after_s,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Error:
        return cls(
            code=fields.text(frame.header, "code", limit=64),
            message=fields.text(frame.header, "message"),
            step=fields.integer(frame.header, "step", 0, MAX_STEP)
            if frame.header.get("step") is not None
            else None,
            retry_after_s=fields.number(frame.header, "retry_after_s", 0, MAX_RETRY_AFTER_S)
            if frame.header.get("retry_after_s") is not None
            else None,
        )


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask for a `Pong`, to measure the round trip."""

    type: ClassVar[str] = "ping"

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type}

    @classmethod
    def from_frame(cls, frame: Frame) -> Ping:
        return cls()


@dataclass(frozen=True, slots=True)
class Pong(Ping):
    """Answer to `Ping`."""

    type: ClassVar[str] = "pong"


@dataclass(frozen=True, slots=True)
class ListRequest:
    """Ask for the signed announcements that a peer knows of `model`."""

    type: ClassVar[str] = "list"
    model: str

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "model": self.model}

    @classmethod
    def from_frame(cls, frame: Frame) -> ListRequest:
        return cls(fields.text(frame.header, "model", limit=256))


@dataclass(frozen=True, slots=True)
class Listing:
    """Answer to `ListRequest`: signed records, opaque here, checked by whoever reads them."""

    type: ClassVar[str] = "listing"
    records: tuple[bytes, ...] = field(default=())

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "count": len(self.records)}

    @classmethod
    def from_frame(cls, frame: Frame) -> Listing:
        return cls(_split_records(fields.integer(frame.header, "count", 0, MAX_ANNOUNCEMENTS), frame.payload))


Message: TypeAlias = (
    Open
    | PushOpen
    | Opened
    | Step
    | FindPrefix
    | PrefixFound
    | Output
    | Error
    | Ping
    | Pong
    | ListRequest
    | Listing
)

_TYPES: dict[str, type[Message]] = {cls.type: cls for cls in get_args(Message)}


def encode(message: Message) -> list[Buffer]:
    """The buffers of one message, to be sent in order.

    Raises:
        LocalProtocolError: the message is over the protocol's bounds.
    """
    if isinstance(message, (Step, Output)):
        return encode_frame(message.to_header(), message.payload)
    if isinstance(message, Listing):
        return encode_frame(message.to_header(), _join_records(message.records))
    return encode_frame(message.to_header())


def decode(frame: Frame) -> Message:
    """The message in a frame.

    Raises:
        RemoteProtocolError: an unknown type, or fields that do not fit it.
    """
    kind = fields.text(frame.header, "type", limit=64)
    if kind not in _TYPES:
        raise RemoteProtocolError(f"unknown message type {kind!r}")
    return _TYPES[kind].from_frame(frame)


def _join_records(records: tuple[bytes, ...]) -> bytes:
    if len(records) > MAX_ANNOUNCEMENTS or not all(0 < len(record) <= MAX_RECORD_BYTES for record in records):
        raise LocalProtocolError(f"a listing of {len(records)} records is over the protocol's bounds")
    return b"".join(len(record).to_bytes(4, "big") + record for record in records)


def _split_records(count: int, payload: memoryview) -> tuple[bytes, ...]:
    records, offset = [], 0
    for _ in range(count):
        size = int.from_bytes(payload[offset : offset + 4], "big")
        record = bytes(payload[offset + 4 : offset + 4 + size])
        if size > MAX_RECORD_BYTES or len(record) != size or not size:
            raise RemoteProtocolError("a listing's records do not add up to its payload")
        records.append(record)
        offset += 4 + size
    if offset != payload.nbytes:
        raise RemoteProtocolError("a listing's records do not add up to its payload")
    return tuple(records)


def _version(header: Mapping[str, Any]) -> int:
    """Read before any other field, since those may differ in other versions."""
    version = fields.integer(header, "version", 0, 1 << 31)
    if version != VERSION:
        raise UnknownVersionError(f"protocol version {version} is not spoken here, only {VERSION}")
    return version


def _is_extent(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_EXTENT


def _sequence(value: Any) -> int:
    return fields.integer({"sequence": value}, "sequence", 0, MAX_SEQUENCES - 1)


def _page_keys(header: Mapping[str, Any], low: int) -> tuple[PageKeys, ...]:
    entries = fields.items(header, "keys", PageKeys.from_header, limit=MAX_SEQUENCES, low=low)
    if len(entries) > 1 and len({entry.sequence for entry in entries}) != len(entries):
        raise RemoteProtocolError("field 'keys': a sequence appears twice")
    return entries


def _pages(value: Any) -> int:
    return fields.integer({"pages": value}, "pages", 0, MAX_PAGES)


def _seconds(value: Any) -> float:
    if type(value) is float and 0.0 <= value <= 1e9:
        return value
    return fields.number({"seconds": value}, "seconds", 0, 1e9)


def _slice(value: Any) -> Slice:
    if type(value) is list and len(value) == 3:
        sequence, position, length = value
        if (
            type(sequence) is type(position) is type(length) is int
            and 0 <= sequence < MAX_SEQUENCES
            and 0 <= position <= MAX_POSITION
            and 0 < length <= MAX_POSITION
        ):
            return Slice(sequence, position, length)
    raise RemoteProtocolError(
        f"a slice must be [sequence, position, length] within bounds, got {fields.shown(value)}"
    )
