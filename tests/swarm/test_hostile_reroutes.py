"""Clients that use what repairs are made with to harm a server, or those who share it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import petal_swarm.net.channel
import petal_swarm.net.memory
from petal_swarm.engine.steps import StepRequest, StepResult
from petal_swarm.errors import TooSlowError
from petal_swarm.net.channel import Channel
from petal_swarm.span import Slice
from petal_swarm.wire.connection import PUSH_TABLE, Role
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.opening import Opened, PushOpen
from petal_swarm.wire.messages.parts import Neighbour
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS, FindPrefix, PageKeys, PrefixFound
from petal_swarm.wire.messages.repair import Probe, Progress, Reroute, Rerouted
from petal_swarm.wire.messages.steps import Output, Step
from petal_swarm.wire.protocols import PUSH
from petal_swarm.wire.tensors import encode_tensor
from tests.swarm.local import LocalSwarm
from tests.swarm.test_bad_input import HIDDEN, Intruder


@pytest.fixture
def swarm(bloom: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(bloom, ["0:2", "2:4"], max_batch_tokens=64) as swarm:
        yield swarm


def page_of_step(number: int, *, epoch: int, keys: tuple[PageKeys, ...] = ()) -> Step:
    meta, payload = encode_tensor(torch.zeros(PAGE_TOKENS, HIDDEN))
    return Step(number, epoch, (Slice(0, 0, PAGE_TOKENS),), meta, payload, keys=keys)


def test_nobody_files_pages_under_the_name_of_a_hop_whose_place_it_took(swarm: LocalSwarm) -> None:
    """Or a client could give those behind that hop a false prefix, by the keys that it learned from it."""
    compute = swarm.servers[0]._compute
    assert compute is not None
    keys: list[tuple[PageKeys, ...]] = []
    right = compute.engine.run

    def seen(requests: list[StepRequest]) -> list[StepResult]:
        keys.extend(request.keys for request in requests)
        return right(requests)

    compute.engine.run = seen  # type: ignore[method-assign, assignment]
    known = (PageKeys(0, 0, (b"k" * 32,)),)

    async def attempt() -> PrefixFound:
        client, liar = Intruder(swarm), swarm.transport()
        channel = await client.opened(upstream=swarm.servers[1].announcement().peer_id, share_prefixes=True)
        channel.send(Reroute(1, upstream=liar.peer_id))
        await channel.expect(Rerouted, timeout_s=5)
        stream = await liar.open_stream(client.target, PUSH, timeout_s=5)
        push = Channel(stream, PUSH_TABLE, Role.DIALER)
        push.send(PushOpen(b"s" * 16, 1))
        await push.expect(Opened, timeout_s=5)
        push.send(page_of_step(0, epoch=1, keys=known))
        await channel.expect(Output, timeout_s=5)
        push.send(FindPrefix(1, 1, known))
        return await push.expect(PrefixFound, timeout_s=1)

    found = swarm.run(attempt())
    assert keys == [()]
    assert found.pages == (0,), "who asks is answered at once all the same"


def test_who_takes_no_answers_is_asked_no_more(swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (petal_swarm.net.channel, petal_swarm.net.memory):
        monkeypatch.setattr(module, "WRITE_HIGH_WATER_BYTES", 4096)

    async def attempt() -> None:
        channel = await Intruder(swarm).opened(upstream=swarm.servers[1].announcement().peer_id)
        stream = channel._stream
        for number in range(1000):
            channel.send(Probe(number))
            await asyncio.sleep(0)
        await asyncio.sleep(1)
        assert stream._other is not None
        assert stream._other.unsent_bytes < 3 * 4096
        for number in range(1000):
            assert (await channel.expect(Progress, timeout_s=5)).number == number

    swarm.run(attempt())


def test_a_spare_that_is_never_needed_holds_back_only_so_much(swarm: LocalSwarm) -> None:
    host = swarm.servers[0]._host
    assert host is not None
    host._limits = dataclasses.replace(host._limits, max_bytes_in_flight=20 * PAGE_TOKENS * HIDDEN)

    async def attempt() -> Error:
        channel = await Intruder(swarm).opened(spare=True)
        for number in range(30):
            step = page_of_step(number, epoch=0)
            step.rows = "all"
            channel.send(step)
            await asyncio.sleep(0.01)
        return await channel.expect(Error, timeout_s=5)

    error = swarm.run(attempt())
    assert error.code == TooSlowError.code
    assert "spare" in error.message


def test_ten_thousand_reroutes(swarm: LocalSwarm) -> None:
    """Only the last one is worth a dial; nothing is left of the others."""
    tasks = len(asyncio.all_tasks(swarm.loop))
    dialled: list[str] = []
    transport = swarm.servers[0]._transport
    dial = transport.open_stream

    async def counted(peer_id: str, *arguments: object, **options: object) -> object:
        dialled.append(peer_id)
        return await dial(peer_id, *arguments, **options)  # type: ignore[arg-type]

    transport.open_stream = counted  # type: ignore[method-assign, assignment]
    other = swarm.servers[1].announcement().peer_id

    async def attempt() -> None:
        client = Intruder(swarm)
        channel = await client.opened(next=Neighbour(other), spare=True)
        for epoch in range(1, 10_001):
            channel.send(Reroute(epoch, next=Neighbour(other)))
        await asyncio.sleep(60)
        assert len(dialled) < 100
        await channel.close()
        await asyncio.sleep(1)

    swarm.run(attempt())
    assert len(asyncio.all_tasks(swarm.loop)) == tasks
    assert swarm.servers[0].num_sessions == 0
