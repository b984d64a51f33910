"""How a client audits a hop: its neighbours recall what they sent to it, and got from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.span import Slice
from petal_swarm.wire import fields
from petal_swarm.wire.frames import Buffer, Frame
from petal_swarm.wire.messages.parts import MAX_SEQUENCES, MAX_STEP, TensorMeta, as_sequence, as_slice

DIGEST_BYTES = 16


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
        slices = fields.items(header, "slices", as_slice, limit=MAX_SEQUENCES)
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
            fields.optional(
                header,
                "forks",
                lambda: fields.items(header, "forks", as_sequence, limit=MAX_SEQUENCES, low=1),
            ),
            fields.raw({"digest": header.get("digest", b"")}, "digest", 0, DIGEST_BYTES),
        )


AuditMessage: TypeAlias = Recall | Recalled
