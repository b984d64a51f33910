"""What messages of several subjects are made of: tensors, slices, neighbours, and the bounds on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.span import Slice
from petal_swarm.wire import fields
from petal_swarm.wire.announcement import MAX_ADDRESSES
from petal_swarm.wire.frames import Frame

MAX_POSITION = 1 << 30
MAX_EXTENT = 1 << 31
MAX_SEQUENCES = 1024
MAX_STEP = 1 << 53
#: Before the first step.
NO_STEP = -1

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
CODECS = ("raw",)


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


def as_slice(value: Any) -> Slice:
    """`parse` for `items`: some rows of a step."""
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


def as_sequence(value: Any) -> int:
    """`parse` for `items`: the index of a sequence."""
    return fields.integer({"sequence": value}, "sequence", 0, MAX_SEQUENCES - 1)


def _is_extent(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_EXTENT


def optional_peer(header: Mapping[str, Any], name: str) -> str | None:
    """A peer id, or None."""
    return fields.optional(header, name, lambda: fields.text(header, name, limit=128))


def optional_neighbour(header: Mapping[str, Any], name: str) -> Neighbour | None:
    """A neighbour in the ring, or None."""
    return fields.optional(header, name, lambda: Neighbour.from_header(fields.mapping(header, name)))
