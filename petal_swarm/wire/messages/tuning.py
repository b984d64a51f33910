"""Training: passes of packed rows forward through a chain of hops, and their gradients back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.span import Span
from petal_swarm.wire import fields
from petal_swarm.wire.announcement import span_from_list
from petal_swarm.wire.frames import Buffer, Frame
from petal_swarm.wire.messages.error import MAX_RETRY_AFTER_S
from petal_swarm.wire.messages.opening import SESSION_ID_BYTES, read_version
from petal_swarm.wire.messages.parts import (
    DTYPE_BYTES,
    MAX_POSITION,
    MAX_SEQUENCES,
    MAX_STEP,
    Neighbour,
    TensorMeta,
    optional_neighbour,
    optional_peer,
)
from petal_swarm.wire.messages.steps import MAX_HOPS, seconds
from petal_swarm.wire.protocols import VERSION

#: Of one run at one hop that are not finished.
MAX_PASSES = 4096
MAX_ADAPTER_ID = 128
MAX_NUMBERS = 1 << 40

#: How far a pass is at a hop; each comes after the one before it, `GONE` after any.
ARRIVED, FORWARD_DONE, BACKWARD_ARRIVED, BACKWARD_DONE, GONE = range(5)


@dataclass(frozen=True, slots=True)
class TrainOpen:
    """Client to each hop: passes of `run` will go through `span`. `upstream` and `next` as in `Open`."""

    type: ClassVar[str] = "train-open"
    run: bytes
    epoch: int
    model: str
    span: Span
    upstream: str | None = None
    next: Neighbour | None = None
    version: int = VERSION

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "version": self.version,
            "run": self.run,
            "epoch": self.epoch,
            "model": self.model,
            "span": [self.span.start, self.span.end],
            "upstream": self.upstream,
            "next": self.next.to_header() if self.next else None,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> TrainOpen:
        header = frame.header
        return cls(
            version=read_version(header),
            run=fields.raw(header, "run", SESSION_ID_BYTES, SESSION_ID_BYTES),
            epoch=fields.integer(header, "epoch", 0, MAX_STEP),
            model=fields.text(header, "model", limit=256),
            span=span_from_list(header.get("span")),
            upstream=optional_peer(header, "upstream"),
            next=optional_neighbour(header, "next"),
        )


@dataclass(frozen=True, slots=True)
class TrainOpened:
    """Answer to `TrainOpen`, and to `PushOpen` between hops.

    A pass of more than `max_pass_tokens` rows is refused, and so is one while `max_passes` of the run are
    not finished. `dtype` is what the blocks compute in.
    """

    type: ClassVar[str] = "train-opened"
    dtype: str = "float32"
    max_pass_tokens: int = 1
    max_passes: int = 1

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "dtype": self.dtype,
            "max_pass_tokens": self.max_pass_tokens,
            "max_passes": self.max_passes,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> TrainOpened:
        return cls(
            dtype=fields.choice(frame.header, "dtype", tuple(DTYPE_BYTES), "float32"),
            max_pass_tokens=fields.integer(frame.header, "max_pass_tokens", 1, 1 << 40, 1),
            max_passes=fields.integer(frame.header, "max_passes", 1, MAX_PASSES, 1),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """Packed rows of pass `number` for the blocks of the next hop: sequences of `lengths`, from their start.

    With `keep` a `Backward` follows. `adapter` is the id of what is added to the blocks. `trace` holds, for
    each hop so far, the seconds from the arrival of the rows to their departure.
    """

    type: ClassVar[str] = "forward"
    number: int
    lengths: tuple[int, ...]
    tensor: TensorMeta
    payload: Buffer
    keep: bool = False
    adapter: str | None = None
    trace: tuple[float, ...] = ()

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "number": self.number,
            "lengths": self.lengths,
            "keep": self.keep,
            "adapter": self.adapter,
            "trace": self.trace,
            "tensor": self.tensor.to_header(),
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Forward:
        header = frame.header
        lengths = fields.items(header, "lengths", _length, limit=MAX_SEQUENCES, low=1)
        tensor = TensorMeta.from_frame(frame)
        if sum(lengths) != tensor.shape[0]:
            raise RemoteProtocolError("field 'lengths': they do not add up to the tensor's rows")
        return cls(
            number=fields.integer(header, "number", 0, MAX_STEP),
            lengths=lengths,
            tensor=tensor,
            payload=frame.payload,
            keep=fields.flag(header, "keep", False),
            adapter=fields.optional(
                header, "adapter", lambda: fields.text(header, "adapter", limit=MAX_ADAPTER_ID)
            ),
            trace=_trace(header),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Forwarded:
    """Last hop to client: what came out of pass `number`, in the order of its rows."""

    type: ClassVar[str] = "forwarded"
    number: int
    tensor: TensorMeta
    payload: Buffer
    trace: tuple[float, ...] = ()

    def to_header(self) -> dict[str, Any]:
        return _rows_header(self)

    @classmethod
    def from_frame(cls, frame: Frame) -> Forwarded:
        return cls(*_rows(frame), _trace(frame.header))


@dataclass(frozen=True, slots=True, eq=False)
class Backward:
    """The gradient of what came out of pass `number`: client to last hop, and each hop to the one before it.

    Without `inputs` nobody wants the gradient of the rows that went into the first hop.
    """

    type: ClassVar[str] = "backward"
    number: int
    tensor: TensorMeta
    payload: Buffer
    inputs: bool = True
    trace: tuple[float, ...] = ()

    def to_header(self) -> dict[str, Any]:
        return {**_rows_header(self), "inputs": self.inputs}

    @classmethod
    def from_frame(cls, frame: Frame) -> Backward:
        return cls(*_rows(frame), fields.flag(frame.header, "inputs", True), _trace(frame.header))


@dataclass(frozen=True, slots=True, eq=False)
class Backwarded:
    """First hop to client: the gradient of the rows that pass `number` began with; none without `inputs`."""

    type: ClassVar[str] = "backwarded"
    number: int
    tensor: TensorMeta
    payload: Buffer
    trace: tuple[float, ...] = ()

    def to_header(self) -> dict[str, Any]:
        return _rows_header(self)

    @classmethod
    def from_frame(cls, frame: Frame) -> Backwarded:
        return cls(*_rows(frame), _trace(frame.header))


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """Each hop to the client: gradients of its `total` adapter numbers, from `first` on, `[1, count]`."""

    type: ClassVar[str] = "gradients"
    number: int
    first: int
    total: int
    tensor: TensorMeta
    payload: Buffer

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "number": self.number,
            "first": self.first,
            "total": self.total,
            "tensor": self.tensor.to_header(),
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Gradients:
        header = frame.header
        number, tensor, payload = _rows(frame)
        total = fields.integer(header, "total", 1, MAX_NUMBERS)
        first = fields.integer(header, "first", 0, total)
        if tensor.shape[0] != 1 or not 1 <= tensor.shape[1] <= total - first:
            raise RemoteProtocolError(f"gradients {list(tensor.shape)} do not fit after {first} of {total}")
        if tensor.dtype != "float32":
            raise RemoteProtocolError(f"gradients are float32, not {tensor.dtype}")
        return cls(number, first, total, tensor, payload)


@dataclass(frozen=True, slots=True)
class Finish:
    """Client to each hop: nothing of these passes is wanted any more, whatever their state."""

    type: ClassVar[str] = "finish"
    numbers: tuple[int, ...]

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "numbers": self.numbers}

    @classmethod
    def from_frame(cls, frame: Frame) -> Finish:
        return cls(fields.items(frame.header, "numbers", _number, limit=MAX_PASSES, low=1))


@dataclass(frozen=True, slots=True)
class Relink:
    """Client to a hop: its neighbours change; each new link is of `epoch`. Answered by `Rerouted`.

    The rows of `passes` go to the new `next`, and their gradients to the new `upstream`, also those that went
    to the one before; other passes only as they are computed. None leaves a neighbour as it is.
    """

    type: ClassVar[str] = "relink"
    epoch: int
    upstream: str | None = None
    next: Neighbour | None = None
    passes: tuple[int, ...] = ()

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "epoch": self.epoch,
            "upstream": self.upstream,
            "next": self.next.to_header() if self.next else None,
            "passes": self.passes,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Relink:
        header = frame.header
        return cls(
            epoch=fields.integer(header, "epoch", 0, MAX_STEP),
            upstream=optional_peer(header, "upstream"),
            next=optional_neighbour(header, "next"),
            passes=fields.items(header, "passes", _number, limit=MAX_PASSES),
        )


@dataclass(frozen=True, slots=True)
class Failed:
    """A hop to its client: it can do no more for this pass; the others go on.

    `code`, `message` and `retry_after_s` as in `Error`. `backward`: its rows went through, its gradient not.
    """

    type: ClassVar[str] = "failed"
    number: int
    code: str
    message: str
    backward: bool = False
    retry_after_s: float | None = None

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "number": self.number,
            "code": self.code,
            "message": self.message[: fields.MAX_TEXT],
            "backward": self.backward,
            "retry_after_s": self.retry_after_s,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Failed:
        header = frame.header
        return cls(
            number=fields.integer(header, "number", 0, MAX_STEP),
            code=fields.text(header, "code", limit=64),
            message=fields.text(header, "message"),
            backward=fields.flag(header, "backward", False),
            retry_after_s=fields.optional(
                header, "retry_after_s", lambda: fields.number(header, "retry_after_s", 0, MAX_RETRY_AFTER_S)
            ),
        )


@dataclass(frozen=True, slots=True)
class PassStates:
    """Answer to `Probe`: each pass that is not finished here, `(number, ARRIVED ... GONE)`."""

    type: ClassVar[str] = "pass-states"
    number: int
    states: tuple[tuple[int, int], ...]

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "number": self.number, "states": self.states}

    @classmethod
    def from_frame(cls, frame: Frame) -> PassStates:
        return cls(
            fields.integer(frame.header, "number", 0, MAX_STEP),
            fields.items(frame.header, "states", _state, limit=MAX_PASSES),
        )


TuningMessage: TypeAlias = (
    TrainOpen
    | TrainOpened
    | Forward
    | Forwarded
    | Backward
    | Backwarded
    | Gradients
    | Finish
    | Relink
    | Failed
    | PassStates
)


def _rows_header(message: Forwarded | Backward | Backwarded) -> dict[str, Any]:
    return {
        "type": message.type,
        "number": message.number,
        "trace": message.trace,
        "tensor": message.tensor.to_header(),
    }


def _rows(frame: Frame) -> tuple[int, TensorMeta, Buffer]:
    number = fields.integer(frame.header, "number", 0, MAX_STEP)
    return number, TensorMeta.from_frame(frame), frame.payload


def _trace(header: Mapping[str, Any]) -> tuple[float, ...]:
    return fields.items(header, "trace", seconds, limit=MAX_HOPS)


def _length(value: Any) -> int:
    return fields.integer({"length": value}, "length", 1, MAX_POSITION)


def _number(value: Any) -> int:
    return fields.integer({"number": value}, "number", 0, MAX_STEP)


def _state(value: Any) -> tuple[int, int]:
    if type(value) is not list or len(value) != 2:
        raise RemoteProtocolError(f"field 'states': expected [number, state], got {fields.shown(value)}")
    return _number(value[0]), fields.integer({"state": value[1]}, "state", ARRIVED, GONE)
