"""Passes through one hop and through several: what comes out, and who is told what."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch

from petal_swarm.errors import (
    AdapterMissingError,
    BadMessageError,
    BadTensorError,
    BusyError,
    HopLostError,
    NotFiniteError,
    PassGoneError,
    PetalSwarmError,
    UnknownSessionError,
    WrongModelError,
    WrongSpanError,
)
from petal_swarm.span import Span
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.opening import PushOpen
from petal_swarm.wire.messages.parts import Neighbour
from petal_swarm.wire.messages.repair import Leaving, Probe
from petal_swarm.wire.messages.tuning import (
    ARRIVED,
    BACKWARD_ARRIVED,
    BACKWARD_DONE,
    FORWARD_DONE,
    GONE,
    Backwarded,
    Failed,
    Finish,
    Forwarded,
    Gradients,
    PassStates,
    TrainOpened,
)

from .bench import (
    HIDDEN,
    NUMBERS,
    RUN,
    Bench,
    Hop,
    Line,
    backward,
    factor,
    forward,
    neighbour,
    rows_of,
    tensor_of,
)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as bench:
        bench.run(bench.add_client())
        yield bench


async def chain_of(bench: Bench, *spans: str) -> tuple[list[Hop], list[Line]]:
    hops = [await bench.add_hop(span) for span in spans]
    return hops, await bench.chain(hops)


@pytest.mark.parametrize("spans", [("0:4",), ("0:2", "2:4"), ("0:1", "1:3", "3:4")])
def test_forward_and_back(bench: Bench, spans: tuple[str, ...]) -> None:
    async def check() -> None:
        _, lines = await chain_of(bench, *spans)
        for number in range(3):
            lines[0].send(forward(number, adapter="a:1"))
        await asyncio.sleep(1)
        for number, message in enumerate(lines[-1].of(Forwarded)):
            assert message.number == number
            assert torch.equal(tensor_of(message), rows_of(number) * factor(Span(0, 4)))
            assert len(message.trace) == len(spans)
        assert len(lines[-1].of(Forwarded)) == 3
        for number in (1, 0, 2):
            lines[-1].send(backward(number))
        await asyncio.sleep(1)
        found = {message.number: message for message in lines[0].of(Backwarded)}
        assert sorted(found) == [0, 1, 2]
        for number, message in found.items():
            assert torch.equal(tensor_of(message), rows_of(number) * factor(Span(0, 4)))
            assert len(message.trace) == len(spans)
        behind = 1.0
        for line in reversed(lines):
            for part in line.of(Gradients):
                assert (part.first, part.total) == (0, NUMBERS)
                assert torch.equal(tensor_of(part), torch.full((1, NUMBERS), behind * (part.number + 1)))
            assert len(line.of(Gradients)) == 3
            behind *= factor(line.hop.span)
        for line in lines:
            line.send(Finish((0, 1, 2)))
        await asyncio.sleep(1)
        assert all(hop.host._trainer.retained.nbytes == 0 for hop in bench.hops)
        assert not any(line.of(Failed) or line.ended for line in lines)

    bench.run(check())


def test_nobody_wants_the_gradient_of_the_inputs(bench: Bench) -> None:
    async def check() -> None:
        _, lines = await chain_of(bench, "0:2", "2:4")
        lines[0].send(forward(0, adapter="a:1"))
        lines[1].send(backward(0, inputs=False))
        await asyncio.sleep(1)
        (message,) = lines[0].of(Backwarded)
        assert message.tensor.shape == (0, HIDDEN)
        assert len(lines[0].of(Gradients)) == len(lines[1].of(Gradients)) == 1

    bench.run(check())


def test_nothing_is_computed_twice(bench: Bench) -> None:
    async def check() -> None:
        hops, lines = await chain_of(bench, "0:2", "2:4")
        for _ in range(2):
            lines[0].send(forward(0))
            lines[1].send(backward(0))
            await asyncio.sleep(1)
        assert [hop.passes.forwards for hop in hops] == [[0], [0]]
        assert [hop.passes.backwards for hop in hops] == [[0], [0]]
        assert (len(lines[1].of(Forwarded)), len(lines[0].of(Backwarded))) == (1, 1)
        assert not lines[0].of(Gradients), "there is no adapter"

    bench.run(check())


def test_a_gradient_waits_for_its_rows(bench: Bench) -> None:
    async def check() -> None:
        hops, lines = await chain_of(bench, "0:2", "2:4")
        lines[1].send(backward(5))
        await asyncio.sleep(1)
        assert hops[1].passes.backwards == []
        assert hops[1].host._trainer.retained.nbytes > 0
        lines[0].send(forward(5))
        await asyncio.sleep(1)
        assert [message.number for message in lines[0].of(Backwarded)] == [5]

    bench.run(check())


def test_states_tell_how_far_a_pass_is(bench: Bench) -> None:
    async def states(line: Line) -> dict[int, int]:
        line.send(Probe(9))
        await asyncio.sleep(1)
        answer = line.of(PassStates)[-1]
        assert answer.number == 9
        return dict(answer.states)

    async def check() -> None:
        (hop,), (line,) = await chain_of(bench, "0:4")
        line.send(forward(0))
        line.send(forward(1, adapter="unknown"))
        await asyncio.sleep(1)
        assert await states(line) == {0: FORWARD_DONE, 1: GONE}
        hop.compute.held = True
        line.send(backward(0))
        line.send(forward(2))
        assert await states(line) == {0: BACKWARD_ARRIVED, 1: GONE, 2: ARRIVED}
        hop.compute.held = False
        hop.compute.go_on()
        assert await states(line) == {0: BACKWARD_DONE, 1: GONE, 2: FORWARD_DONE}
        line.send(Finish((0, 1, 7)))
        assert await states(line) == {2: FORWARD_DONE}

    bench.run(check())


def test_what_is_finished_is_not_begun_again(bench: Bench) -> None:
    async def check() -> None:
        (hop,), (line,) = await chain_of(bench, "0:4")
        line.send(Finish((3,)))
        line.send(forward(3))
        line.send(backward(3))
        await asyncio.sleep(1)
        assert (hop.passes.forwards, line.heard) == ([], [])

    bench.run(check())


def test_what_is_finished_while_it_is_computed_is_dropped(bench: Bench) -> None:
    async def check() -> None:
        (hop,), (line,) = await chain_of(bench, "0:4")
        hop.compute.held = True
        line.send(forward(0))
        line.send(forward(1))
        line.send(Finish((0,)))
        await asyncio.sleep(1)
        hop.compute.held = False
        hop.compute.go_on()
        await asyncio.sleep(1)
        assert [message.number for message in line.of(Forwarded)] == [1]
        assert hop.passes.forwards == [1], "it had not begun"

    bench.run(check())


def failure(line: Line, number: int, error: type[PetalSwarmError], *, backward: bool = False) -> None:
    (failed,) = [message for message in line.of(Failed) if message.number == number]
    assert (failed.code, failed.backward) == (error.code, backward)  # type: ignore[attr-defined]


def test_one_pass_fails_and_the_others_do_not(bench: Bench) -> None:
    def fail(number: int, backward: bool) -> None:
        if (number, backward) in ((1, False), (2, True)):
            raise NotFiniteError("block 3 computed NaN")

    async def check() -> None:
        hops, lines = await chain_of(bench, "0:2", "2:4")
        hops[1].passes.failing = fail
        for number in range(4):
            lines[0].send(forward(number))
            lines[1].send(backward(number))
        await asyncio.sleep(1)
        assert {(m.number, m.code, m.backward) for m in lines[1].of(Failed)} == {
            (1, "not-finite", False),
            (2, "not-finite", True),
        }
        assert [message.number for message in lines[0].of(Backwarded)] == [0, 3]
        for line in lines:
            line.send(Finish((0, 1, 2, 3)))

    bench.run(check())


def test_an_unknown_error_is_told_without_details(bench: Bench) -> None:
    def fail(number: int, backward: bool) -> None:
        raise RuntimeError("secret")

    async def check() -> None:
        (hop,), (line,) = await chain_of(bench, "0:4")
        hop.passes.failing = fail
        line.send(forward(0))
        await asyncio.sleep(1)
        (failed,) = line.of(Failed)
        assert (failed.code, failed.message) == ("internal", "internal error")

    bench.run(check())


def test_passes_that_cannot_be(bench: Bench) -> None:
    async def check() -> None:
        (hop,), (line,) = await chain_of(bench, "0:4")
        line.send(forward(0, adapter="unknown"))
        line.send(forward(1, rows=65))
        line.send(forward(2, keep=False))
        line.send(forward(3))
        await asyncio.sleep(1)
        line.send(backward(2))
        line.send(backward(3, rows=65))
        await asyncio.sleep(1)
        failure(line, 0, AdapterMissingError)
        failure(line, 1, BadTensorError)
        failure(line, 2, PassGoneError, backward=True)
        failure(line, 3, BadTensorError, backward=True)
        line.send(backward(0))
        await asyncio.sleep(1)
        assert [m.code for m in line.of(Failed) if m.number == 0] == ["adapter-missing", "pass-gone"]
        assert hop.passes.kept == {}

    bench.run(check())


def test_gradient_rows_must_be_as_many_as_went_through(bench: Bench) -> None:
    async def check() -> None:
        _, (line,) = await chain_of(bench, "0:4")
        line.send(forward(0, rows=3))
        line.send(backward(0, rows=2))
        await asyncio.sleep(1)
        failure(line, 0, BadTensorError, backward=True)

    bench.run(check())


def test_too_many_passes() -> None:
    with Bench(max_passes=2) as bench:

        async def check() -> None:
            await bench.add_client()
            (hop,), (line,) = await chain_of(bench, "0:4")
            for number in range(3):
                line.send(forward(number))
            await asyncio.sleep(1)
            failure(line, 2, BusyError)
            line.send(Finish((0,)))
            line.send(forward(3))
            await asyncio.sleep(1)
            assert hop.passes.forwards == [0, 1, 3]

        bench.run(check())


def test_too_many_runs() -> None:
    with Bench(max_runs_of_peer=1) as bench:

        async def check() -> None:
            await bench.add_client()
            (hop,), _ = await chain_of(bench, "0:4")
            with pytest.raises(BusyError) as caught:
                await bench.open(hop, run=b"x" * 16)
            assert caught.value.retry_after_s == 30

        bench.run(check())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "another"}, WrongModelError),
        ({"span": Span(0, 5)}, WrongSpanError),
        ({"next": Neighbour("12D3nobody")}, HopLostError),
    ],
)
def test_runs_that_cannot_be(bench: Bench, changes: dict[str, object], error: type[Exception]) -> None:
    async def check() -> None:
        hop = await bench.add_hop("0:4")
        with pytest.raises(error):
            await bench.open(hop, **changes)

    bench.run(check())


def test_a_run_of_the_same_id(bench: Bench) -> None:
    async def check() -> None:
        (hop,), (line,) = await chain_of(bench, "0:4")
        with pytest.raises(BadMessageError, match="open already"):
            await bench.open(hop)
        line.send(forward(0))
        await asyncio.sleep(1)
        assert line.of(Forwarded), "the first one goes on"

    bench.run(check())


def test_who_drains_lets_nobody_in_and_says_so(bench: Bench) -> None:
    async def check() -> None:
        (hop,), (line,) = await chain_of(bench, "0:4")
        hop.host.draining = True
        drained = asyncio.create_task(hop.host.drained())
        await asyncio.sleep(1)
        assert line.of(Leaving)
        assert not drained.done()
        with pytest.raises(BusyError, match="leaving"):
            await bench.open(hop, run=b"x" * 16)
        await line.channel.close()
        await asyncio.sleep(1)
        assert drained.done()

    bench.run(check())


def test_a_push_of_somebody_else(bench: Bench) -> None:
    """Who is not the upstream that the client named learns nothing, whatever it knows."""

    async def check() -> None:
        hops, _ = await chain_of(bench, "0:2", "2:4")
        for session, epoch in ((RUN, 0), (RUN, 1), (b"x" * 16, 0)):
            channel = await bench.push_stream(hops[1], bench.client)
            channel.send(PushOpen(session, epoch))
            with pytest.raises(UnknownSessionError, match="no run of this id"):
                await channel.expect(TrainOpened, timeout_s=30)

    bench.run(check())


def test_a_push_may_come_before_its_run(bench: Bench) -> None:
    async def check() -> None:
        hops = [await bench.add_hop("0:2"), await bench.add_hop("2:4")]
        first = await bench.dial(hops[0], next=neighbour(hops[1]))
        await asyncio.sleep(10)
        second = await bench.open(hops[1], upstream=hops[0].peer_id)
        await first.channel.expect(TrainOpened, timeout_s=1)
        first.listen()
        first.send(forward(0))
        await asyncio.sleep(1)
        assert second.of(Forwarded)

    bench.run(check())


@pytest.mark.parametrize(("line", "message"), [(1, forward(0)), (0, backward(0))], ids=["rows", "gradient"])
def test_what_a_client_may_not_send(bench: Bench, line: int, message: object) -> None:
    async def check() -> None:
        _, lines = await chain_of(bench, "0:2", "2:4")
        lines[line].send(message)  # type: ignore[arg-type]
        await asyncio.sleep(1)
        (error,) = lines[line].of(Error)
        assert error.code == "bad-message"
        assert lines[line].ended

    bench.run(check())
