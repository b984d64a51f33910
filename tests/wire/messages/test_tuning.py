"""Passes of training: fields that are none, and what does not fit together."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from petal_swarm.errors import RemoteProtocolError, UnknownVersionError
from petal_swarm.wire.fields import MAX_TEXT
from petal_swarm.wire.messages import Message, decode
from petal_swarm.wire.messages.error import MAX_RETRY_AFTER_S
from petal_swarm.wire.messages.parts import MAX_SEQUENCES
from petal_swarm.wire.messages.tuning import (
    GONE,
    MAX_ADAPTER_ID,
    MAX_NUMBERS,
    MAX_PASSES,
    Backward,
    Backwarded,
    Failed,
    Finish,
    Forward,
    Forwarded,
    Gradients,
    PassStates,
    Relink,
    TrainOpen,
    TrainOpened,
    TuningMessage,
)

from .damage import FLAGS, LISTS, STEP_NUMBERS, TENSORS, TEXTS, altered, check_bad_fields

NUMBER = {"number": [*STEP_NUMBERS, ...]}
TRACE = {"trace": [*LISTS, [0.5] * 1025]}
TENSOR = {"tensor": TENSORS}
NEIGHBOUR = {"next": [5, "peer", []], "next__peer_id": [*TEXTS, "x" * 129, ...]}
UPSTREAM = {"upstream": [5, b"peer", ["peer"], "x" * 129]}
PASSES = [*LISTS, [0] * (MAX_PASSES + 1)]

BAD: dict[type[Message], dict[str, list[Any]]] = {
    TrainOpen: {
        "run": [None, 5, "x" * 16, b"x" * 15, b"x" * 17, ...],
        "epoch": [*STEP_NUMBERS, ...],
        "model": [*TEXTS, "x" * 257, ...],
        **UPSTREAM,
        **NEIGHBOUR,
    },
    TrainOpened: {
        "dtype": [None, 5, "int8", "float64"],
        "max_pass_tokens": [0, -1, True, 1.0, None, (1 << 40) + 1],
        "max_passes": [0, -1, True, 1.0, None, MAX_PASSES + 1],
    },
    Forward: {
        **NUMBER,
        "lengths": [*LISTS, [], [1, 1], [1] * (MAX_SEQUENCES + 1), ...],
        **TENSOR,
        "keep": FLAGS,
        "adapter": [5, b"a", ["a"], "x" * (MAX_ADAPTER_ID + 1)],
        **TRACE,
    },
    Forwarded: {**NUMBER, **TENSOR, **TRACE},
    Backward: {**NUMBER, **TENSOR, "inputs": FLAGS, **TRACE},
    Backwarded: {**NUMBER, **TENSOR, **TRACE},
    Gradients: {
        **NUMBER,
        "first": [*STEP_NUMBERS, 10, ...],
        "total": [0, *STEP_NUMBERS, MAX_NUMBERS + 1, ...],
        **TENSOR,
    },
    Finish: {"numbers": [*PASSES, [], ...]},
    Relink: {"epoch": [*STEP_NUMBERS, ...], **UPSTREAM, **NEIGHBOUR, "passes": PASSES},
    Failed: {
        **NUMBER,
        "code": [*TEXTS, "x" * 65, ...],
        "message": [*TEXTS, "x" * (MAX_TEXT + 1), ...],
        "backward": FLAGS,
        "retry_after_s": [-1, MAX_RETRY_AFTER_S + 1, True, "1", float("nan")],
    },
    PassStates: {
        **NUMBER,
        "states": [*LISTS, [5], [[1]], [[1, 2, 3]], ["ab"], [[0, 0]] * (MAX_PASSES + 1)],
    },
}


@pytest.mark.parametrize("kind", get_args(TuningMessage), ids=lambda kind: kind.type)
def test_bad_fields_are_named(kind: type[Message]) -> None:
    check_bad_fields(kind, BAD[kind])


@pytest.mark.parametrize(
    "changes",
    [
        {"first": 8},
        {"total": 5},
        {"tensor__shape": [2, 1]},
        {"tensor__shape": [1, 0]},
        {"tensor__dtype": "float16", "tensor__shape": [1, 4]},
    ],
    ids=str,
)
def test_gradients_fit_their_place(changes: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(altered(Gradients, **changes))


@pytest.mark.parametrize("number", [-1, True, 1.0, "1", None, []], ids=repr)
def test_entries_of_lists(number: Any) -> None:
    for kind, changes in (
        (Finish, {"numbers": [number]}),
        (Relink, {"passes": [number]}),
        (PassStates, {"states": [[number, 0]]}),
        (PassStates, {"states": [[0, number if number != 1 else GONE + 1]]}),
        (Forward, {"lengths": [number, 4 if number == -1 else 2]}),
        (Forward, {"trace": [number if number != 1 else 1e10]}),
    ):
        with pytest.raises(RemoteProtocolError, match=r"number|state|length|seconds"):
            decode(altered(kind, **changes))


def test_another_version_is_said_first() -> None:
    with pytest.raises(UnknownVersionError):
        decode(altered(TrainOpen, version=2, run=5))
