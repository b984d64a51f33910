"""Passes of training: what does not fit together is the peer's fault."""

from __future__ import annotations

from typing import Any

import pytest

from petal_swarm.errors import RemoteProtocolError, UnknownVersionError
from petal_swarm.wire.messages import decode
from petal_swarm.wire.messages.tuning import (
    MAX_ADAPTER_ID,
    MAX_PASSES,
    Backward,
    Failed,
    Finish,
    Forward,
    Gradients,
    PassStates,
    Relink,
    TrainOpen,
    TrainOpened,
)

from .damage import altered

BAD: list[tuple[type[Any], str, list[Any]]] = [
    (TrainOpen, "run", [b"x" * 15, b"x" * 17, "x" * 16, None]),
    (TrainOpen, "span", [[2, 2], [3], None]),
    (TrainOpen, "next", [5, {}, {"peer_id": "x" * 129}]),
    (TrainOpened, "max_passes", [0, MAX_PASSES + 1, 1.0]),
    (TrainOpened, "dtype", ["int8", 5]),
    (Forward, "number", [-1, True, None]),
    (Forward, "lengths", [[], [3, 1], [2, 2], [3, 0], [4, -1], [1.0, 2.0], [1] * 1025, None]),
    (Forward, "keep", [1, "yes", None]),
    (Forward, "adapter", [5, b"a", "x" * (MAX_ADAPTER_ID + 1)]),
    (Forward, "trace", [[-1.0], [float("nan")], 5]),
    (Backward, "inputs", [1, None]),
    (Backward, "tensor", [{"dtype": "float32", "shape": [1, 3], "codec": "raw"}, None]),
    (Gradients, "total", [0, 5, None]),
    (Gradients, "first", [-1, 8, 10, 1.5]),
    (
        Gradients,
        "tensor",
        [
            {"dtype": "float32", "shape": [2, 1], "codec": "raw"},
            {"dtype": "float32", "shape": [1, 0], "codec": "raw"},
            {"dtype": "float16", "shape": [1, 4], "codec": "raw"},
        ],
    ),
    (Finish, "numbers", [[], [-1], [True], 5, [0] * (MAX_PASSES + 1)]),
    (Relink, "passes", [[-1], 5, [0] * (MAX_PASSES + 1)]),
    (Relink, "epoch", [-1, None]),
    (Failed, "code", [5, "x" * 65, None]),
    (Failed, "retry_after_s", [-1, 3601]),
    (PassStates, "states", [[5], [[1]], [[1, 5]], [[1, -1]], [[-1, 1]], 5, [[0, 0]] * (MAX_PASSES + 1)]),
]


@pytest.mark.parametrize(("kind", "name", "values"), BAD, ids=lambda part: getattr(part, "type", None))
def test_bad_fields(kind: type[Any], name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RemoteProtocolError):
            decode(altered(kind, **{name: value}))


def test_another_version() -> None:
    with pytest.raises(UnknownVersionError):
        decode(altered(TrainOpen, version=2, run=5))
