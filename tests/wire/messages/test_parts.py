"""Slices and tensors that are none, in the messages that carry them."""

from __future__ import annotations

from typing import Any

import pytest

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.wire.messages import Message, decode
from petal_swarm.wire.messages.parts import MAX_EXTENT, MAX_POSITION, MAX_SEQUENCES, TensorMeta
from petal_swarm.wire.messages.steps import Output, Step

from .damage import altered


@pytest.mark.parametrize(
    "piece",
    [
        None,
        5,
        [],
        [0, 0],
        [0, 0, 3, 0],
        [MAX_SEQUENCES, 0, 3],
        [-1, 0, 3],
        [0, MAX_POSITION + 1, 3],
        [0, -1, 3],
        [0, 0, 0],
        [0, 0, -3],
        [0, 0, MAX_POSITION + 1],
        [0, 0, 3.0],
        [False, 0, 3],
        [0, True, 3],
        [0, "0", 3],
        {"0": 0},
    ],
    ids=repr,
)
def test_slices_that_are_none(piece: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="slice"):
        decode(altered(Step, slices=[piece]))


@pytest.mark.parametrize("kind", [Step, Output])
@pytest.mark.parametrize("shape", [[3, 3], [0, 0], [1, 6], [MAX_EXTENT, MAX_EXTENT]], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensors_that_lie_about_their_size(kind: type[Message], shape: list[int], dtype: str) -> None:
    size = shape[0] * shape[1] * (4 if dtype == "float32" else 2)
    frame = altered(kind, tensor__shape=shape, tensor__dtype=dtype)
    if size == frame.payload.nbytes and kind is Output:
        assert decode(frame).tensor == TensorMeta(dtype, (shape[0], shape[1]))  # type: ignore[union-attr]
        return
    with pytest.raises(RemoteProtocolError):
        decode(frame)
