"""Steps and outputs: slices, forks and traces that are none, and the size of a step."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.span import Slice
from petal_swarm.wire.messages import Message, decode, encode
from petal_swarm.wire.messages.parts import MAX_EXTENT, MAX_POSITION, MAX_SEQUENCES, TensorMeta
from petal_swarm.wire.messages.steps import MAX_HOPS, Output, Step, StepMessage

from .damage import LISTS, STEP_NUMBERS, TENSORS, altered, check_bad_fields

BAD: dict[type[Message], dict[str, list[Any]]] = {
    Step: {
        "step": [*STEP_NUMBERS, ...],
        "epoch": [*STEP_NUMBERS, ...],
        "slices": [*LISTS, None, [], [[n, 0, 1] for n in range(MAX_SEQUENCES + 1)], ...],
        "rows": ["", "first", "LAST", None, 5, [], ...],
        "tensor": TENSORS,
        "tensor__dtype": [None, 5, [], {}, "int8", "float64", ...],
        "tensor__codec": [None, 5, [], "zip", ...],
        "tensor__shape": [
            None,
            5,
            [],
            [3],
            [3, 2, 1],
            [3, -2],
            [3, 2.0],
            [True, 6],
            [3, MAX_EXTENT + 1],
            ...,
        ],
        "forks": [*LISTS, [], [0] * (MAX_SEQUENCES + 1)],
        "trace": [*LISTS, None, [0.0] * (MAX_HOPS + 1)],
        "keys": [*LISTS, None, [None], [[0, 0]], [[0, 0, bytes(31)]], [[0, 0, "x" * 32]]],
    },
    Output: {
        "step": [*STEP_NUMBERS, ...],
        "epoch": [*STEP_NUMBERS, ...],
        "tensor": TENSORS,
        "tensor__codec": ["zip", ...],
        "trace": [*LISTS, None, [0.0] * (MAX_HOPS + 1)],
    },
}


@pytest.mark.parametrize("kind", get_args(StepMessage), ids=lambda kind: kind.type)
def test_bad_fields_are_named(kind: type[Message]) -> None:
    check_bad_fields(kind, BAD[kind])


@pytest.mark.parametrize(
    "slices", [[[0, 0, 2]], [[0, 0, 4]], [[0, 0, 3], [1, 0, 1]], [[0, 0, MAX_POSITION]]], ids=repr
)
def test_slices_that_lie_about_the_rows(slices: list[list[int]]) -> None:
    with pytest.raises(RemoteProtocolError, match="'slices'"):
        decode(altered(Step, slices=slices))


def test_a_sequence_may_appear_once() -> None:
    with pytest.raises(RemoteProtocolError, match=r"'slices'.*twice"):
        decode(altered(Step, slices=[[0, 0, 1], [1, 0, 1], [0, 1, 1]]))


@pytest.mark.parametrize("forks", [[0, MAX_SEQUENCES], [-1], [None], [0.0], [True], [[0]]], ids=repr)
def test_forks_that_are_none(forks: list[Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="'sequence'"):
        decode(altered(Step, forks=forks))


@pytest.mark.parametrize(
    "trace", [[-1.0], [float("nan")], [float("inf")], [2e9], ["1"], [None], [True], [[]]], ids=repr
)
def test_traces_that_are_none(trace: list[Any]) -> None:
    for kind in (Step, Output):
        with pytest.raises(RemoteProtocolError, match="'seconds'"):
            decode(altered(kind, trace=trace))


def test_a_step_stays_small() -> None:
    """One token of one sequence: what is not needed is not sent."""
    step = Step(1 << 20, 1, (Slice(0, 1 << 20, 1),), TensorMeta("bfloat16", (1, 1)), bytes(2))
    assert {"forks", "trace"}.isdisjoint(step.to_header())
    assert len(encode(step)[0]) < 120
