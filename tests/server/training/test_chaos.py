"""Whatever is lost and whenever: every pass comes out, right, as long as its client goes by the protocol."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest
import torch

from petal_swarm.span import Span
from petal_swarm.wire.messages.repair import Probe
from petal_swarm.wire.messages.tuning import (
    Backwarded,
    Failed,
    Finish,
    Forwarded,
    Gradients,
    Relink,
)

from .bench import NUMBERS, Bench, Hop, Line, backward, factor, forward, neighbour, rows_of, tensor_of

SPANS = ("0:1", "1:3", "3:4")
PASSES = 6
SEEDS = range(25)


class Client:
    """A run along one hop for each of `SPANS`, and what came of its passes by whichever hops."""

    def __init__(self, bench: Bench, lines: list[Line]) -> None:
        self.bench = bench
        self.lines = lines
        self.left: list[Line] = []
        self.sent: set[int] = set()
        self.sent_back: set[int] = set()
        self.epoch = 0

    def send_forward(self, number: int) -> None:
        self.sent.add(number)
        self.lines[0].send(forward(number, adapter="a:1"))

    def send_backward(self, number: int) -> None:
        self.sent_back.add(number)
        self.lines[-1].send(backward(number))

    def found(self, kind: type, span: Span | None = None) -> dict[int, torch.Tensor]:
        """What came of each pass; if twice, then the same."""
        results: dict[int, torch.Tensor] = {}
        for line in [*self.left, *self.lines]:
            if span is None or line.hop.span == span:
                for message in line.of(kind):
                    value = tensor_of(message)
                    assert torch.equal(results.setdefault(message.number, value), value)
        return results

    def missing(self) -> set[int]:
        """Passes under way of which not everything has come."""
        complete = set(self.found(Backwarded))
        for span in SPANS:
            complete &= set(self.found(Gradients, Span.parse(span)))
        return self.sent - complete

    async def replace(self, places: list[int], *, kill: bool) -> None:
        """Other hops take the places of these, which are killed, or left once it is done."""
        self.epoch += 1
        passes = tuple(sorted(self.missing()))
        hops: list[Hop] = []
        for place, line in enumerate(self.lines):
            hops.append(await self.bench.add_hop(SPANS[place]) if place in places else line.hop)
        for place in places:
            if kill:
                self.bench.network.kill(self.lines[place].hop.peer_id)
            self.lines[place].hop.compute.held = False
            self.lines[place].hop.compute.go_on()
            self.left.append(self.lines[place])
        await asyncio.gather(*(self._link(place, hops, places, passes) for place in range(len(hops))))
        for line in self.left:
            await line.channel.close()
        for number in passes:
            if 0 in places:
                self.lines[0].send(forward(number, adapter="a:1"))
            if len(SPANS) - 1 in places and number in self.sent_back:
                self.lines[-1].send(backward(number))

    async def _link(self, place: int, hops: list[Hop], new: list[int], passes: tuple[int, ...]) -> None:
        upstream = hops[place - 1].peer_id if place else None
        following = neighbour(hops[place + 1]) if place + 1 < len(hops) else None
        if place in new:
            self.lines[place] = await self.bench.open(
                hops[place], epoch=self.epoch, upstream=upstream, next=following
            )
            return
        told = Relink(
            self.epoch,
            upstream=upstream if place - 1 in new else None,
            next=following if place + 1 in new else None,
            passes=passes,
        )
        if told.upstream or told.next:
            self.lines[place].send(told)


async def live(client: Client, rng: random.Random) -> None:
    """Passes go through, hops hang and come back, and up to two at once are lost, again and again."""
    ahead = list(range(PASSES))
    while ahead or len(client.sent_back) < PASSES:
        event = rng.random()
        if event < 0.35 and ahead:
            client.send_forward(ahead.pop(0))
        elif event < 0.6 and (rest := sorted(client.sent - client.sent_back)):
            client.send_backward(rng.choice(rest))
        elif event < 0.75:
            compute = rng.choice(client.lines).hop.compute
            compute.held = not compute.held
            if not compute.held:
                compute.go_on()
        elif event < 0.85:
            places = sorted(rng.sample(range(3), rng.choice([1, 1, 2])))
            await client.replace(places, kill=rng.random() < 0.6)
        elif event < 0.9:
            rng.choice(client.lines).send(Probe(0))
        await asyncio.sleep(rng.random() * 0.03)


def check(client: Client) -> None:
    expected = {number: rows_of(number) * factor(Span(0, 4)) for number in range(PASSES)}
    for kind in (Forwarded, Backwarded):
        results = client.found(kind)
        assert set(results) == set(range(PASSES))
        assert all(torch.equal(results[number], expected[number]) for number in expected)
    behind = 1.0
    for span in map(Span.parse, reversed(SPANS)):
        gradients = client.found(Gradients, span)
        for number in range(PASSES):
            assert torch.equal(gradients[number], torch.full((1, NUMBERS), behind * (number + 1)))
        behind *= factor(span)
    assert not any(line.of(Failed) for line in [*client.left, *client.lines])


@pytest.mark.parametrize("seed", SEEDS)
def test_every_pass_comes_out(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    with Bench() as bench, caplog.at_level(logging.ERROR):

        async def go() -> None:
            await bench.add_client()
            client = Client(bench, await bench.chain([await bench.add_hop(span) for span in SPANS]))
            await live(client, random.Random(seed))
            for line in client.lines:
                line.hop.compute.held = False
                line.hop.compute.go_on()
            await asyncio.sleep(5)
            check(client)
            for line in client.lines:
                line.send(Finish(tuple(range(PASSES))))
            await asyncio.sleep(1)
            assert all(len(line.hop.host._runs) == 1 for line in client.lines)

        bench.run(go())
        assert not caplog.records
