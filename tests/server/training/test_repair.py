"""Hops of a run that are lost and replaced: what was under way comes out all the same, once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch

from petal_swarm.errors import PassGoneError
from petal_swarm.span import Span
from petal_swarm.wire.frames import PREFIX
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.parts import Neighbour
from petal_swarm.wire.messages.repair import Lost, Rerouted
from petal_swarm.wire.messages.tuning import (
    Backwarded,
    Failed,
    Finish,
    Forwarded,
    Gradients,
    Relink,
)

from .bench import Bench, Hop, Line, backward, factor, forward, neighbour, rows_of, tensor_of

SPANS = ("0:1", "1:3", "3:4")
WHOLE = Span(0, 4)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as bench:
        bench.run(bench.add_client())
        yield bench


async def three(bench: Bench) -> tuple[list[Hop], list[Line]]:
    hops = [await bench.add_hop(span) for span in SPANS]
    return hops, await bench.chain(hops)


async def replace(bench: Bench, lines: list[Line], index: int, passes: tuple[int, ...], epoch: int) -> Line:
    """Another hop in the place of one that is gone, linked to its neighbours."""
    hop = await bench.add_hop(SPANS[index])
    before = lines[index - 1] if index else None
    behind = lines[index + 1] if index + 1 < len(lines) else None
    if behind is not None:
        behind.send(Relink(epoch, upstream=hop.peer_id, passes=passes))
    if before is not None:
        before.send(Relink(epoch, next=neighbour(hop), passes=passes))
    line = await bench.open(
        hop,
        epoch=epoch,
        upstream=before.hop.peer_id if before else None,
        next=neighbour(behind.hop) if behind else None,
    )
    for other in (before, behind):
        if other is not None:
            await asyncio.sleep(0.1)
            assert other.of(Rerouted)[-1].epoch == epoch
    lines[index] = line
    return line


def check_results(lines: list[Line], numbers: set[int]) -> None:
    """Each of them came out, with the right values, of whichever hops."""
    forwarded = {message.number: message for message in lines[-1].of(Forwarded)}
    backwarded = {message.number: message for message in lines[0].of(Backwarded)}
    assert set(backwarded) == numbers
    for number in numbers:
        expected = rows_of(number) * factor(WHOLE)
        assert torch.equal(tensor_of(backwarded[number]), expected)
        if number in forwarded:
            assert torch.equal(tensor_of(forwarded[number]), expected)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_hop_is_replaced(bench: Bench, index: int, when: str) -> None:
    async def check() -> None:
        hops, lines = await three(bench)
        hops[index].compute.held = when == "forward"
        for number in range(2):
            lines[0].send(forward(number, adapter="a:1"))
        await asyncio.sleep(1)
        if when == "backward":
            hops[index].compute.held = True
            for number in range(2):
                lines[2].send(backward(number))
            await asyncio.sleep(1)
        bench.network.kill(hops[index].peer_id)
        await asyncio.sleep(1)
        for at, line in enumerate(lines):
            if at != index:
                assert [lost.upstream for lost in line.of(Lost)] == [at > index] * (abs(at - index) == 1)
        await replace(bench, lines, index, (0, 1), 1)
        if index == 0:  # the client sends again what it sent there
            for number in range(2):
                lines[0].send(forward(number, adapter="a:1"))
        if index == 2 or when == "forward":
            for number in range(2):
                lines[2].send(backward(number))
        await asyncio.sleep(2)
        hops[index].compute.go_on()
        check_results(lines, {0, 1})
        assert {m.number for m in lines[index].of(Gradients)} == {0, 1}
        assert not any(line.of(Failed) for line in lines)
        for at, hop in enumerate(hops):
            if at != index:
                assert sorted(hop.passes.forwards) == sorted(hop.passes.backwards) == [0, 1]

    bench.run(check())


def test_what_is_computed_while_nobody_follows_is_kept(bench: Bench) -> None:
    async def check() -> None:
        hops, lines = await three(bench)
        bench.network.kill(hops[1].peer_id)
        await asyncio.sleep(1)
        lines[0].send(forward(0))
        lines[2].send(backward(0))
        await asyncio.sleep(1)
        await replace(bench, lines, 1, (), 1)
        await asyncio.sleep(1)
        check_results(lines, {0})

    bench.run(check())


def test_two_neighbours_are_lost_at_once(bench: Bench) -> None:
    async def check() -> None:
        hops, lines = await three(bench)
        for number in range(2):
            lines[0].send(forward(number))
        await asyncio.sleep(1)
        for hop in hops[1:]:
            bench.network.kill(hop.peer_id)
        await asyncio.sleep(1)
        others = [await bench.add_hop(span) for span in SPANS[1:]]
        lines[0].send(Relink(4, next=neighbour(others[0]), passes=(0, 1)))
        lines[1:] = await asyncio.gather(
            bench.open(others[0], epoch=4, upstream=hops[0].peer_id, next=neighbour(others[1])),
            bench.open(others[1], epoch=4, upstream=others[0].peer_id),
        )
        for number in range(2):
            lines[2].send(backward(number))
        await asyncio.sleep(1)
        check_results(lines, {0, 1})

    bench.run(check())


def test_a_replacement_is_lost_before_it_is_linked(bench: Bench) -> None:
    async def check() -> None:
        hops, lines = await three(bench)
        lines[0].send(forward(0))
        await asyncio.sleep(1)
        bench.network.kill(hops[1].peer_id)
        await asyncio.sleep(1)
        dead = await bench.add_hop(SPANS[1])
        bench.network.kill(dead.peer_id)
        lines[0].send(Relink(1, next=neighbour(dead), passes=(0,)))
        await asyncio.sleep(6)
        assert lines[0].of(Lost)[-1].epoch == 1
        lines[2].send(backward(0))
        await replace(bench, lines, 1, (0,), 2)
        await asyncio.sleep(1)
        check_results(lines, {0})

    bench.run(check())


def test_two_hops_that_live_connect_again(bench: Bench) -> None:
    """The link between them broke, and nothing else."""

    async def check() -> None:
        hops, lines = await three(bench)
        lines[0].send(forward(0))
        await asyncio.sleep(1)
        lines[2].send(Relink(1, upstream=hops[1].peer_id, passes=(0,)))
        lines[1].send(Relink(1, next=neighbour(hops[2]), passes=(0,)))
        await asyncio.sleep(1)
        assert [line.of(Rerouted) != [] for line in lines] == [False, True, True]
        lines[0].send(forward(1))
        for number in range(2):
            lines[2].send(backward(number))
        await asyncio.sleep(1)
        check_results(lines, {0, 1})
        assert [hop.passes.forwards for hop in hops] == [[0, 1]] * 3

    bench.run(check())


def test_what_was_dropped_is_told_when_it_is_wanted() -> None:
    """Room for one pass: the older one's rows cannot be sent again, and its backward still works."""
    with Bench(room_bytes=2800) as bench:

        async def check() -> None:
            await bench.add_client()
            hops, lines = await three(bench)
            for number in range(2):
                lines[0].send(forward(number))
            await asyncio.sleep(1)
            bench.network.kill(hops[1].peer_id)
            await asyncio.sleep(1)
            await replace(bench, lines, 1, (0, 1), 1)
            assert [(m.number, m.code) for m in lines[0].of(Failed)] == [(0, PassGoneError.code)]
            lines[2].send(backward(1))
            await asyncio.sleep(1)
            check_results(lines, {1})

        bench.run(check())


def test_what_nobody_asks_for_expires() -> None:
    with Bench(keep_s=20.0) as bench:

        async def check() -> None:
            await bench.add_client()
            hops, lines = await three(bench)
            lines[0].send(forward(0))
            await asyncio.sleep(30)
            assert all(hop.passes.kept == {} for hop in hops)
            assert hops[0].host._trainer.retained.nbytes == 0
            lines[2].send(backward(0))
            await asyncio.sleep(1)
            assert [(m.number, m.code) for m in lines[2].of(Failed)] == [(0, PassGoneError.code)]

        bench.run(check())


def test_a_gradient_that_waits_too_long_is_told(bench: Bench) -> None:
    """Its room is needed: the rows, when they come, are not computed for nothing."""
    bench.limits = type(bench.limits)(room_bytes=2800)

    async def check() -> None:
        _, lines = await three(bench)
        lines[2].send(backward(0))
        lines[2].send(backward(1))
        lines[0].send(forward(0))
        lines[0].send(forward(1))
        await asyncio.sleep(1)
        assert [m.number for m in lines[0].of(Backwarded)] == [1]
        assert [(m.number, m.code) for m in lines[2].of(Failed)] == [(0, PassGoneError.code)]

    bench.run(check())


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (0, Relink(0, next=Neighbour("x"))),
        (0, Relink(1, upstream="x")),
        (2, Relink(1, next=Neighbour("x"))),
    ],
    ids=["epoch", "first", "last"],
)
def test_relinks_that_cannot_be(bench: Bench, index: int, told: Relink) -> None:
    async def check() -> None:
        _, lines = await three(bench)
        lines[index].send(told)
        await asyncio.sleep(1)
        assert [error.code for error in lines[index].of(Error)] == ["bad-message"]

    bench.run(check())


def test_passes_that_never_came_are_not_remembered(bench: Bench) -> None:
    """A client may name as many as it likes, and a neighbour that is never there."""

    async def check() -> None:
        hops, lines = await three(bench)
        lines[0].send(forward(0))
        await asyncio.sleep(1)
        bench.network.kill(hops[1].peer_id)
        await asyncio.sleep(1)
        for epoch in range(1, 4):
            first = epoch * 4000
            nobody = Neighbour("nobody")
            lines[0].send(Relink(epoch, next=nobody, passes=(0, *range(first, first + 4000))))
            await asyncio.sleep(1)
        (run,) = hops[0].host._runs.values()
        assert list(run._down._owed) == [0]

    bench.run(check())


def test_who_is_not_replaced_ends_the_run(bench: Bench) -> None:
    async def check() -> None:
        hops, lines = await three(bench)
        bench.network.kill(hops[1].peer_id)
        await asyncio.sleep(59)
        assert not lines[0].ended
        await asyncio.sleep(2)
        assert [[error.code for error in line.of(Error)] for line in (lines[0], lines[2])] == [["idle"]] * 2

    bench.run(check())


def test_a_run_that_is_left_alone_ends() -> None:
    with Bench(idle_timeout_s=100.0) as bench:

        async def check() -> None:
            await bench.add_client()
            _, lines = await three(bench)
            await asyncio.sleep(80)
            lines[0].send(forward(0))
            await asyncio.sleep(80)
            assert not any(line.ended for line in lines)
            lines[0].send(Finish((0,)))
            await asyncio.sleep(110)
            assert all(line.of(Error)[0].code == "idle" for line in lines)

        bench.run(check())


@pytest.mark.parametrize("index", [0, 2])
def test_half_a_pass_and_not_its_rest(bench: Bench, index: int) -> None:
    async def check() -> None:
        hops, lines = await three(bench)
        message = forward(0) if index == 0 else backward(0)
        data = b"".join(map(bytes, lines[index].channel._connection.send(message)))
        lines[index].channel._stream.write(data[: PREFIX.size + 40])
        await asyncio.sleep(60)
        assert [error.code for error in lines[index].of(Error)] == ["timeout"]
        assert hops[index].host.num_runs == 0

    bench.run(check())


def test_who_reads_no_results_is_let_go(bench: Bench) -> None:
    async def check() -> None:
        (hop,) = [await bench.add_hop("0:4")]
        (line,) = await bench.chain([hop])
        hop.adapters["large"] = (hop.adapters["a:1"][0], torch.zeros(1))
        line.channel.pause()
        number = 0
        link = bench.network.link(bench.client.peer_id, hop.peer_id)
        link.bytes_per_s = 10.0
        while hop.host.num_runs and number < 200:
            line.send(forward(number, rows=64))
            number += 1
            await asyncio.sleep(1)
        await asyncio.sleep(120)
        assert hop.host.num_runs == 0

    bench.run(check())


def test_after_a_relink_nothing_goes_to_the_old_hop(bench: Bench) -> None:
    """It is alive, and is to leave; what comes while the new one is dialled waits for that."""

    async def check() -> None:
        hops, lines = await three(bench)
        lines[0].send(forward(0))
        await asyncio.sleep(1)
        hop = await bench.add_hop(SPANS[1])
        bench.network.link(hops[0].peer_id, hop.peer_id).latency_s = 0.5
        lines[2].send(Relink(1, upstream=hop.peer_id, passes=(0,)))
        lines[0].send(Relink(1, next=neighbour(hop), passes=(0,)))
        lines[0].send(forward(1))
        line = await bench.open(hop, epoch=1, upstream=hops[0].peer_id, next=neighbour(hops[2]))
        await asyncio.sleep(5)
        for number in range(2):
            lines[2].send(backward(number))
        await asyncio.sleep(5)
        check_results(lines, {0, 1})
        assert sorted(hop.passes.backwards) == [0, 1]
        assert hops[1].passes.forwards == [0]
        assert not lines[0].of(Lost), "it was told to"
        assert not line.of(Failed)

    bench.run(check())


def test_who_sends_faster_than_it_reads_is_not_read(bench: Bench) -> None:
    """Rows wait while others are computed, even if the client has taken its answers meanwhile."""

    async def check() -> None:
        hop = await bench.add_hop("0:4")
        (line,) = await bench.chain([hop])
        hop.compute.held = True
        for number in range(100):
            line.send(forward(number, rows=64))
        await asyncio.sleep(1)
        (run,) = hop.host._runs.values()
        assert 32 <= run.rows.in_flight < 64
        run._hushed = asyncio.create_task(run._listen_again())
        await asyncio.sleep(1)
        assert run.rows.in_flight < 64
        hop.compute.held = False
        hop.compute.go_on()
        await asyncio.sleep(1)
        assert len(line.of(Forwarded)) == 100

    bench.run(check())
