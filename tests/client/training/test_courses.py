"""What hops answer is put together, and checked."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_swarm.client.training.adapters import AdapterVersions, TrainedAdapter
from petal_swarm.client.training.courses import Course
from petal_swarm.errors import PassGoneError, RemoteProtocolError
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.span import Span
from petal_swarm.wire.messages.tuning import Backward, Backwarded, Forward, Forwarded, Gradients
from petal_swarm.wire.tensors import encode_tensor
from tests.client.training.test_adapters import CONFIG

LAYOUT = AdapterLayout((LoraPlace(0, "self_attn.q_proj", 1, 1.0), LoraPlace(1, "self_attn.q_proj", 2, 1.0)))
#: Of block 0, and of both.
FIRST, ALL = 32, 96
ROWS = torch.arange(48.0).view(3, 16)


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


def adapter() -> TrainedAdapter:
    return AdapterVersions(CONFIG).of(LAYOUT, torch.ones(ALL))


def course(*, adapted: bool = True) -> Course:
    """In its forward; call it inside an event loop."""
    forward = Forward(0, (3,), *encode_tensor(ROWS), keep=True)
    return Course(forward, adapter() if adapted else None, asyncio.get_running_loop().create_future(), 0.0)


def returning(*, adapted: bool = True, inputs: bool = True) -> Course:
    """On its way back, through both blocks."""
    made = course(adapted=adapted)
    made.take_output(Forwarded(0, *encode_tensor(ROWS)), "p")
    made.begin_backward(Backward(0, *encode_tensor(ROWS), inputs=inputs), Span(0, 2), 1.0)
    return made


def backwarded(rows: Tensor = ROWS) -> Backwarded:
    return Backwarded(0, *encode_tensor(rows))


def numbers(first: int, total: int, values: Tensor) -> Gradients:
    return Gradients(0, first, total, *encode_tensor(values[None]))


@in_loop
async def test_gradients_of_all_hops_make_one_vector() -> None:
    made = returning()
    assert made.gradient is not None
    values = torch.arange(float(ALL))
    assert not made.take_numbers(numbers(0, ALL - FIRST, values[FIRST : FIRST + 10]), Span(1, 2), "q")
    assert not made.take_rows(backwarded(2 * ROWS), "p")
    assert not made.take_numbers(numbers(0, FIRST, values[:FIRST]), Span(0, 1), "p")
    assert made.take_numbers(numbers(10, ALL - FIRST, values[FIRST + 10 :]), Span(1, 2), "q")
    found = made.gradient.result()
    assert torch.equal(found.rows, 2 * ROWS)
    assert torch.equal(found.numbers, values)
    assert not made.take_rows(backwarded(), "p")  # late copies do no harm
    assert not made.take_numbers(numbers(0, FIRST, values[:FIRST]), Span(0, 1), "p")


@in_loop
async def test_a_hop_that_takes_over_begins_its_part_again() -> None:
    made = returning()
    assert made.gradient is not None
    values = torch.arange(float(ALL))
    made.take_rows(backwarded(), "p")
    made.take_numbers(numbers(0, ALL, values[:40]), Span(0, 2), "p")
    assert not made.take_numbers(numbers(0, ALL, values[:50]), Span(0, 2), "q")
    assert made.take_numbers(numbers(50, ALL, values[50:]), Span(0, 2), "q")
    assert torch.equal(made.gradient.result().numbers, values)


@in_loop
async def test_without_adapter_and_inputs_an_empty_answer_is_all() -> None:
    made = returning(adapted=False, inputs=False)
    assert made.gradient is not None
    assert made.take_rows(backwarded(torch.empty(0, 16)), "p")
    assert made.gradient.result().rows is None
    assert made.gradient.result().numbers is None


@in_loop
async def test_what_does_not_fit_is_refused() -> None:
    made = course()
    for rows, message in (
        (ROWS[:2], "shape"),
        (ROWS[:, :8].contiguous(), "shape"),
        (ROWS / 0, "not finite"),
    ):
        with pytest.raises(RemoteProtocolError, match=f"peer p answered .*{message}"):
            made.take_output(Forwarded(0, *encode_tensor(rows)), "p")
    made = returning()
    with pytest.raises(RemoteProtocolError, match="shape"):
        made.take_rows(backwarded(torch.empty(0, 16)), "p")
    for message in (
        numbers(0, ALL, torch.ones(ALL)),  # that is not how many this span has
        numbers(1, FIRST, torch.ones(1)),
        numbers(0, FIRST, torch.full((FIRST,), float("inf"))),
    ):
        with pytest.raises(RemoteProtocolError, match="peer p sent"):
            made.take_numbers(message, Span(0, 1), "p")
    with pytest.raises(RemoteProtocolError, match="nobody asked for"):
        returning(adapted=False).take_numbers(numbers(0, FIRST, torch.ones(FIRST)), Span(0, 1), "p")


@in_loop
async def test_failures_reach_who_waits_or_will() -> None:
    made = course()
    made.fail(PassGoneError("gone"))
    with pytest.raises(PassGoneError):
        await made.output
    made = returning()
    assert made.gradient is not None
    made.fail(PassGoneError("gone"))
    with pytest.raises(PassGoneError):
        await made.gradient
    between = course()
    between.take_output(Forwarded(0, *encode_tensor(ROWS)), "p")
    between.fail(PassGoneError("gone"))
    assert isinstance(between.error, PassGoneError)
