"""The messages of the three stream protocols, each a frozen dataclass that checks what it reads.

A message is a frame: its header is the map made by `to_header`, its payload (for those that carry a
tensor) the encoded tensor. Reading ignores unknown fields and raises `RemoteProtocolError` for
anything missing, mistyped or out of range. Tensors stay bytes here; `tensors.py` decodes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar, get_args

from petal_swarm.errors import LocalProtocolError, RemoteProtocolError, UnknownVersionError
from petal_swarm.span import Slice, Span
from petal_swarm.wire import fields
from petal_swarm.wire.announcement import MAX_ADDRESSES, span_from_list
from petal_swarm.wire.frames import Buffer, Frame, encode_frame
from petal_swarm.wire.protocols import VERSION

T = TypeVar("T")

SESSION_ID_BYTES = 16
MAX_POSITION = 1 << 30
MAX_EXTENT = 1 << 31
MAX_SEQUENCES = 1024
MAX_STEP = 1 << 53
#: Before the first step.
NO_STEP = -1
MAX_HOPS = 1024
MAX_WAIT_S = 600
MAX_RETRY_AFTER_S = 3600
MAX_ANNOUNCEMENTS = 512
MAX_RECORD_BYTES = 8 << 10
MAX_DIALED_PORTS = 4
#: Prefixes are shared in pages of so many tokens; a key stands for everything up to a page's end.
PAGE_TOKENS = 16
PAGE_KEY_BYTES = 32
DIGEST_BYTES = 16
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
    has left, and leaves its own. The last hop answers the steps after `answered` only: earlier ones are
    sent again to fill its KV cache. A `spare` sends nothing on until a `Reroute` tells it to. With
    `receipts` the hop can recall what it received.
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
            upstream=_optional(header, "upstream", lambda: fields.text(header, "upstream", limit=128)),
            next=_optional(header, "next", lambda: Neighbour.from_header(fields.mapping(header, "next"))),
            share_prefixes=fields.flag(header, "share_prefixes", False),
            wait_s=fields.number(header, "wait_s", 0, MAX_WAIT_S, 0.0),
            answered=fields.integer(header, "answered", NO_STEP, MAX_STEP, NO_STEP),
            spare=fields.flag(header, "spare", False),
            receipts=fields.flag(header, "receipts", False),
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


@dataclass(frozen=True, slots=True)
class Reroute:
    """Client to a hop: its neighbours in the ring change; each new link is of `epoch`.

    `upstream`: steps come from this peer from now on, and no more from the one before. `next`: results go
    there, from the first that it lacks on; `also` keeps the present next hop beside it. `answered`: the
    client has had all answers up to this step; the last hop owes it those after that, and a replay may
    join those before. None leaves a thing as it is.
    """

    type: ClassVar[str] = "reroute"
    epoch: int
    upstream: str | None = None
    next: Neighbour | None = None
    also: bool = False
    answered: int | None = None

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "epoch": self.epoch,
            "upstream": self.upstream,
            "next": self.next.to_header() if self.next else None,
            "also": self.also,
            "answered": self.answered,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Reroute:
        header = frame.header
        return cls(
            epoch=fields.integer(header, "epoch", 0, MAX_STEP),
            upstream=_optional(header, "upstream", lambda: fields.text(header, "upstream", limit=128)),
            next=_optional(header, "next", lambda: Neighbour.from_header(fields.mapping(header, "next"))),
            also=fields.flag(header, "also", False),
            answered=_optional(
                header, "answered", lambda: fields.integer(header, "answered", NO_STEP, MAX_STEP)
            ),
        )


@dataclass(frozen=True, slots=True)
class Rerouted:
    """Answer to `Reroute`: it is done, and the new next hop, if there is one, takes steps."""

    type: ClassVar[str] = "rerouted"
    epoch: int

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "epoch": self.epoch}

    @classmethod
    def from_frame(cls, frame: Frame) -> Rerouted:
        return cls(fields.integer(frame.header, "epoch", 0, MAX_STEP))


@dataclass(frozen=True, slots=True)
class Lost:
    """A hop to its client: the link of `epoch`, to the next hop or from the `upstream`, is gone.

    The session lives on here and waits for a `Reroute`. Where not all that was sent to the next hop is
    still known, another one cannot take its place: then it is not `replayable`.
    """

    type: ClassVar[str] = "lost"
    epoch: int
    upstream: bool = False
    replayable: bool = True
    reason: str = ""

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "epoch": self.epoch,
            "upstream": self.upstream,
            "replayable": self.replayable,
            "reason": self.reason[: fields.MAX_TEXT],
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Lost:
        return cls(
            fields.integer(frame.header, "epoch", 0, MAX_STEP),
            fields.flag(frame.header, "upstream", False),
            fields.flag(frame.header, "replayable", True),
            fields.text(frame.header, "reason", ""),
        )


@dataclass(frozen=True, slots=True)
class Leaving:
    """A hop to its client: this server wants to leave; another one should take its place."""

    type: ClassVar[str] = "leaving"

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type}

    @classmethod
    def from_frame(cls, frame: Frame) -> Leaving:
        return cls()


@dataclass(frozen=True, slots=True)
class Probe:
    """Client to a hop: are you there, and how far?"""

    type: ClassVar[str] = "probe"
    number: int

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "number": self.number}

    @classmethod
    def from_frame(cls, frame: Frame) -> Probe:
        return cls(fields.integer(frame.header, "number", 0, MAX_STEP))


@dataclass(frozen=True, slots=True)
class Progress:
    """Answer to `Probe`: the last step that has arrived, and the last that is computed."""

    type: ClassVar[str] = "progress"
    number: int
    arrived: int
    done: int

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "number": self.number, "arrived": self.arrived, "done": self.done}

    @classmethod
    def from_frame(cls, frame: Frame) -> Progress:
        return cls(
            fields.integer(frame.header, "number", 0, MAX_STEP),
            fields.integer(frame.header, "arrived", NO_STEP, MAX_STEP),
            fields.integer(frame.header, "done", NO_STEP, MAX_STEP),
        )


@dataclass(frozen=True, slots=True)
class Recall:
    """Client to a hop, to audit a neighbour: the steps `first` to `last` that it sent on, or `received`."""

    type: ClassVar[str] = "recall"
    number: int
    received: bool
    first: int
    last: int

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "number": self.number,
            "received": self.received,
            "first": self.first,
            "last": self.last,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Recall:
        header = frame.header
        return cls(
            fields.integer(header, "number", 0, MAX_STEP),
            fields.flag(header, "received", False),
            fields.integer(header, "first", 0, MAX_STEP),
            fields.integer(header, "last", 0, MAX_STEP),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Recalled:
    """Answer to `Recall`: one of its steps. Without slices: no more are known.

    The last message of an answer has `more` = False. With a step that was received comes the `digest`
    of the payloads of all steps up to that one, in order (16 bytes of BLAKE2b).
    """

    type: ClassVar[str] = "recalled"
    number: int
    more: bool
    step: int
    slices: tuple[Slice, ...]
    tensor: TensorMeta
    payload: Buffer
    forks: tuple[int, ...] | None = None
    digest: bytes = b""

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "number": self.number,
            "digest": self.digest,
            "more": self.more,
            "step": self.step,
            "slices": self.slices,
            "tensor": self.tensor.to_header(),
            "forks": self.forks,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Recalled:
        header = frame.header
        slices = fields.items(header, "slices", _slice, limit=MAX_SEQUENCES)
        tensor = TensorMeta.from_frame(frame)
        if sum(piece.length for piece in slices) != tensor.shape[0]:
            raise RemoteProtocolError("field 'slices': lengths do not add up to the tensor's rows")
        return cls(
            fields.integer(header, "number", 0, MAX_STEP),
            fields.flag(header, "more", False),
            fields.integer(header, "step", 0, MAX_STEP),
            slices,
            tensor,
            frame.payload,
            _optional(
                header, "forks", lambda: fields.items(header, "forks", _sequence, limit=MAX_SEQUENCES, low=1)
            ),
            fields.raw({"digest": header.get("digest", b"")}, "digest", 0, DIGEST_BYTES),
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


@dataclass(frozen=True, slots=True)
class DialBack:
    """Ask whether this peer answers at these TCP ports of the address that its connection comes from.

    Not addresses: a peer is never made to dial anybody but the one who asks.
    """

    type: ClassVar[str] = "dial-back"
    ports: tuple[int, ...] = ()

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "ports": self.ports}

    @classmethod
    def from_frame(cls, frame: Frame) -> DialBack:
        return cls(_ports(frame.header, "ports"))


@dataclass(frozen=True, slots=True)
class DialedBack:
    """Answer to `DialBack`.

    `observed` is the multiaddr that the connection comes from, without a peer id at its end; empty if it is
    not known. `tried` are the ports that were dialled, `reached` those at which the peer answered, with its
    own key. `time_s` is the answering peer's clock, in seconds since 1970.
    """

    type: ClassVar[str] = "dialed-back"
    observed: str = ""
    tried: tuple[int, ...] = ()
    reached: tuple[int, ...] = ()
    time_s: float = 0.0

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "observed": self.observed,
            "tried": self.tried,
            "reached": self.reached,
            "time_s": self.time_s,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> DialedBack:
        return cls(
            fields.text(frame.header, "observed", ""),
            _ports(frame.header, "tried"),
            _ports(frame.header, "reached"),
            fields.number(frame.header, "time_s", 0, 1e12, 0.0),
        )


Message: TypeAlias = (
    Open
    | PushOpen
    | Opened
    | Reroute
    | Rerouted
    | Lost
    | Leaving
    | Probe
    | Progress
    | Recall
    | Recalled
    | Step
    | FindPrefix
    | PrefixFound
    | Output
    | Error
    | Ping
    | Pong
    | ListRequest
    | Listing
    | DialBack
    | DialedBack
)

_TYPES: dict[str, type[Message]] = {cls.type: cls for cls in get_args(Message)}


def encode(message: Message) -> list[Buffer]:
    """The buffers of one message, to be sent in order.

    Raises:
        LocalProtocolError: the message is over the protocol's bounds.
    """
    if isinstance(message, (Step, Output, Recalled)):
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


def _optional(header: Mapping[str, Any], name: str, read: Callable[[], T]) -> T | None:
    """A field that may be absent or null."""
    return None if header.get(name) is None else read()


def _is_extent(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_EXTENT


def _sequence(value: Any) -> int:
    return fields.integer({"sequence": value}, "sequence", 0, MAX_SEQUENCES - 1)


def _page_keys(header: Mapping[str, Any], low: int) -> tuple[PageKeys, ...]:
    entries = fields.items(header, "keys", PageKeys.from_header, limit=MAX_SEQUENCES, low=low)
    if len(entries) > 1 and len({entry.sequence for entry in entries}) != len(entries):
        raise RemoteProtocolError("field 'keys': a sequence appears twice")
    return entries


def _ports(header: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return fields.items(header, name, _port, limit=MAX_DIALED_PORTS)


def _port(value: Any) -> int:
    return fields.integer({"port": value}, "port", 1, (1 << 16) - 1)


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
