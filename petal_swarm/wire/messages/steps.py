"""The steps of a session, which go along the ring, and what the last hop answers. On the hot path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.span import Slice
from petal_swarm.wire import fields
from petal_swarm.wire.frames import Buffer, Frame
from petal_swarm.wire.messages.parts import MAX_SEQUENCES, MAX_STEP, TensorMeta, as_sequence, as_slice
from petal_swarm.wire.messages.prefixes import PageKeys, page_keys

MAX_HOPS = 1024

Rows: TypeAlias = Literal["last", "all", "none"]
ROWS = ("last", "all", "none")


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
        slices = fields.items(header, "slices", as_slice, limit=MAX_SEQUENCES, low=1)
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
            None if forks is None else fields.items(header, "forks", as_sequence, limit=MAX_SEQUENCES, low=1),
            fields.items(header, "trace", seconds, limit=MAX_HOPS),
            page_keys(header, low=0),
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
            trace=fields.items(frame.header, "trace", seconds, limit=MAX_HOPS),
        )


StepMessage: TypeAlias = Step | Output


def seconds(value: Any) -> float:
    """`parse` for `items`: an entry of a trace."""
    if type(value) is float and 0.0 <= value <= 1e9:
        return value
    return fields.number({"seconds": value}, "seconds", 0, 1e9)
