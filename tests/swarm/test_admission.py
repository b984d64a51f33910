"""Full servers: who waits, for how long, who is told what, and what routing makes of it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from petal_swarm.engine.compute import InlineCompute
from petal_swarm.errors import BadMessageError, BusyError, CacheFullError, IdleError
from petal_swarm.net.channel import Channel
from petal_swarm.server.host import SessionHost
from petal_swarm.span import Slice, Span
from petal_swarm.wire.messages.opening import Open, Opened
from petal_swarm.wire.messages.parts import Neighbour
from petal_swarm.wire.messages.steps import Output, Step
from petal_swarm.wire.tensors import encode_tensor
from tests.checkpoints import VOCABULARY, reference
from tests.swarm.local import LocalSwarm
from tests.swarm.test_bad_input import HIDDEN, Intruder


def host_of(swarm: LocalSwarm, index: int = 0) -> SessionHost:
    host = swarm.servers[index]._host
    assert host is not None
    return host


class Visitor(Intruder):
    """A client by hand, with a session id of its own for every session."""

    count = 0

    async def open(self, max_length: int, *, wait_s: float = 0.0) -> Channel:
        """A session at the first server; raises what the server answers instead."""
        channel = await self.ask(max_length, wait_s=wait_s)
        await channel.expect(Opened, timeout_s=100)
        return channel

    async def ask(self, max_length: int, *, wait_s: float) -> Channel:
        Visitor.count += 1
        channel = await self.dial()
        session = Visitor.count.to_bytes(16, "big")
        channel.send(dataclasses.replace(self.opening, session=session, max_length=max_length, wait_s=wait_s))
        return channel

    async def fill(self, channel: Channel, tokens: int, *, step: int = 0) -> None:
        """Use the session: a step of `tokens` tokens."""
        await self.step(channel, torch.zeros(tokens, HIDDEN), (Slice(0, 0, tokens),), step=step)


def hand_over_slowly(swarm: LocalSwarm, seconds: float) -> None:
    """Make the first server's compute thread busy: sessions open and are freed so much later."""
    compute = swarm.servers[0]._compute
    assert isinstance(compute, InlineCompute)
    call = compute.call

    def call_later(function: Callable[[], object]) -> Future[object]:
        future: Future[object] = Future()
        swarm.loop.call_later(seconds, lambda: future.set_result(call(function).result()))
        return future

    compute.call = call_later  # type: ignore[method-assign, assignment]
    compute.close_session = lambda key: call_later(  # type: ignore[method-assign]
        lambda: compute.engine.close_session(key)
    )


@pytest.fixture
def swarm(bloom: Path) -> Iterator[LocalSwarm]:
    """One server with room for 64 tokens."""
    with LocalSwarm(bloom, ["0:4"], kv_tokens=64) as swarm:
        yield swarm
        swarm.kill_strangers()
        swarm.run(asyncio.sleep(3))
        host = host_of(swarm)
        assert host.num_sessions == 0
        assert host.tokens_available == 64


@pytest.mark.parametrize("slowly_s", [0, 2])
def test_a_session_waits_until_another_ends(swarm: LocalSwarm, slowly_s: float) -> None:
    hand_over_slowly(swarm, slowly_s)

    async def work() -> None:
        visitor = Visitor(swarm)
        first = await visitor.open(64)
        await visitor.fill(first, 40)
        waiting = asyncio.create_task(visitor.open(32, wait_s=60))
        await asyncio.sleep(20.2)
        assert not waiting.done()
        await first.close()
        started = swarm.loop.time()
        second = await waiting
        assert swarm.loop.time() - started < 2 * slowly_s + 0.1, "woken, not found out later"
        await visitor.fill(second, 32)

    swarm.run(work())


def test_a_session_waits_until_pages_are_freed(swarm: LocalSwarm) -> None:
    """By a step that goes back to an earlier position, of which nobody is told."""

    async def work() -> None:
        visitor = Visitor(swarm)
        first = await visitor.open(64)
        await visitor.fill(first, 60)
        waiting = asyncio.create_task(visitor.open(32, wait_s=60))
        await asyncio.sleep(5)
        assert not waiting.done()
        await visitor.fill(first, 10, step=1)
        await asyncio.wait_for(waiting, 1)

    swarm.run(work())


def test_who_waits_in_vain_is_told_what_is_free(swarm: LocalSwarm) -> None:
    async def work() -> None:
        visitor = Visitor(swarm)
        first = await visitor.open(64)
        await visitor.fill(first, 40)
        started = swarm.loop.time()
        with pytest.raises(CacheFullError, match=r"16 of 64 tokens free, the session wants 32; ask for"):
            await visitor.open(32, wait_s=10)
        assert 10 <= swarm.loop.time() - started < 10.1
        with pytest.raises(CacheFullError, match=r"16 of 64 tokens free, the session wants 32"):
            await visitor.open(32)
        assert swarm.loop.time() - started < 10.2, "who does not want to wait is told at once"

    swarm.run(work())


def test_a_server_lets_nobody_wait_for_longer_than_it_likes(swarm: LocalSwarm) -> None:
    async def work() -> None:
        visitor = Visitor(swarm)
        first = await visitor.open(64)
        for step in range(8):
            await visitor.fill(first, 40, step=step)
            if step == 0:
                waiting = asyncio.create_task(visitor.open(32, wait_s=600))
            await asyncio.sleep(10)
        assert waiting.done()
        with pytest.raises(CacheFullError):
            await waiting

    swarm.run(work())


def test_what_can_never_fit_is_refused_at_once(swarm: LocalSwarm) -> None:
    async def work() -> None:
        with pytest.raises(CacheFullError, match="64 of 64 tokens free, the session wants 1000000000"):
            await Visitor(swarm).open(1_000_000_000, wait_s=60)

    started = swarm.loop.time()
    swarm.run(work())
    assert swarm.loop.time() - started < 0.1
    engine = swarm.servers[0]._compute.engine  # type: ignore[union-attr]
    assert engine.stats().sessions == 0


@pytest.mark.parametrize("goodbye", ["close", "abort", "speak"])
def test_who_goes_away_leaves_the_queue_at_once(swarm: LocalSwarm, goodbye: str) -> None:
    async def work() -> None:
        visitor, other = Visitor(swarm), Visitor(swarm)
        first = await visitor.open(64)
        await visitor.fill(first, 40)
        big = await visitor.ask(64, wait_s=60)
        await asyncio.sleep(1)
        small = asyncio.create_task(other.open(16, wait_s=60))
        await asyncio.sleep(1)
        assert not small.done(), "the big one came first"
        if goodbye == "speak":
            big._stream.write(b"\0\0\0\1\0\0\0\0\x80")
            with pytest.raises(BadMessageError):
                await big.expect(Opened, timeout_s=1)
        elif goodbye == "close":
            await big.close()
        else:
            big.abort()
        await asyncio.wait_for(small, 0.1)

    swarm.run(work())


def test_a_session_that_idles_makes_room_for_one_that_waits(swarm: LocalSwarm) -> None:
    async def work() -> None:
        visitor, other = Visitor(swarm), Visitor(swarm)
        lazy, lazier, busy = [await Visitor(swarm).open(40) for _ in range(3)]
        await visitor.fill(lazier, 20)
        await asyncio.sleep(5)
        await visitor.fill(lazy, 10)
        await asyncio.sleep(35)
        await visitor.fill(busy, 10)
        started = swarm.loop.time()
        waiting = asyncio.create_task(other.open(30, wait_s=60))
        await asyncio.sleep(19)
        assert not waiting.done()
        last = await waiting
        assert 20 <= swarm.loop.time() - started < 21, "when `lazier` had been idle for 60 s"
        with pytest.raises(IdleError, match="others wait"):
            await lazier.expect(Opened, timeout_s=1)
        await other.fill(last, 16)
        await asyncio.sleep(100)
        await visitor.fill(lazy, 10, step=1)
        await visitor.fill(busy, 10, step=1)

    swarm.run(work())


@pytest.mark.parametrize("slowly_s", [0, 2])
def test_as_few_idle_sessions_end_as_are_needed(swarm: LocalSwarm, slowly_s: float) -> None:
    """Nor more of them while what one held is still being freed."""
    hand_over_slowly(swarm, slowly_s)

    async def work() -> None:
        visitor, other = Visitor(swarm), Visitor(swarm)
        idle = [await visitor.open(32) for _ in range(4)]
        for channel in idle:
            await visitor.fill(channel, 16)
            await asyncio.sleep(10)
        await asyncio.sleep(200)
        await other.open(32, wait_s=10)
        assert host_of(swarm).num_sessions == 3
        for channel in idle[:2]:
            with pytest.raises(IdleError):
                await channel.expect(Opened, timeout_s=1)
        for channel in idle[2:]:
            await visitor.fill(channel, 16, step=1)

    swarm.run(work())


def test_a_session_that_idles_makes_room_for_a_step_that_waits(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No session is in the queue; a step of one that is open found no pages."""

    async def work() -> None:
        visitor = Visitor(swarm)
        lazier, lazy, busy = [await visitor.open(40) for _ in range(3)]
        await visitor.fill(lazier, 10)
        await asyncio.sleep(30)
        await visitor.fill(lazy, 10)
        await asyncio.sleep(25)
        await visitor.fill(busy, 10)
        started = swarm.loop.time()
        monkeypatch.setattr(InlineCompute, "steps_waiting_for_room", 1)
        with pytest.raises(IdleError, match="others wait"):
            await lazier.expect(Opened, timeout_s=100)
        assert 4.5 <= swarm.loop.time() - started < 6, "when it had been idle for 60 s"
        monkeypatch.setattr(InlineCompute, "steps_waiting_for_room", 0)
        await asyncio.sleep(200)
        assert host_of(swarm).num_sessions == 2, "nothing waits any more"
        for channel in (lazy, busy):
            await visitor.fill(channel, 10, step=1)

    swarm.run(work())


def test_a_server_without_sessions_looks_for_no_steps(swarm: LocalSwarm) -> None:
    async def work() -> None:
        for _ in range(2):
            channel = await Visitor(swarm).open(40)
            assert host_of(swarm)._looks_for_steps is not None
            await channel.close()
            await asyncio.sleep(2)
            assert host_of(swarm)._looks_for_steps is None

    swarm.run(work())


def test_a_leaving_server_lets_nobody_wait(swarm: LocalSwarm) -> None:
    async def work() -> None:
        visitor = Visitor(swarm)
        first = await visitor.open(64)
        await visitor.fill(first, 40)
        waiting = asyncio.create_task(visitor.open(32, wait_s=60))
        await asyncio.sleep(1)
        host = host_of(swarm)
        host.draining = True
        draining = asyncio.create_task(host.drained())
        with pytest.raises(BusyError, match="leaving"):
            await waiting
        await first.close()
        await draining

    swarm.run(work())


def test_a_peer_with_more_than_its_share_loses_sessions_to_one_that_waits(swarm: LocalSwarm) -> None:
    """One after the other, as few as are needed, and only when they were waited for long enough."""

    async def work() -> None:
        greedy, other = Visitor(swarm), Visitor(swarm)
        held = [await greedy.open(32) for _ in range(4)]  # twice the cache
        for step in range(3):  # and none of them idles for long
            for channel in held:
                await greedy.fill(channel, 1, step=step)
            await asyncio.sleep(5)
        started = swarm.loop.time()
        await other.open(32, wait_s=30)
        assert 10 <= swarm.loop.time() - started < 13, "two of them had to end for it"
        assert host_of(swarm).num_sessions == 3
        with pytest.raises(BusyError, match="more than an equal share") as caught:
            await held[0].expect(Opened, timeout_s=1)
        assert caught.value.retry_after_s is not None
        for channel in held[2:]:
            await greedy.fill(channel, 1, step=9)
        with pytest.raises(CacheFullError):
            await other.open(40, wait_s=30)
        assert host_of(swarm).num_sessions == 3, "who has its share takes nothing from others"

    swarm.run(work())


def test_who_has_no_more_than_its_share_keeps_it(swarm: LocalSwarm) -> None:
    async def work() -> None:
        first = await Visitor(swarm).open(64)
        second = await Visitor(swarm).open(64)
        with pytest.raises(CacheFullError) as caught:
            await Visitor(swarm).open(16, wait_s=30)
        assert caught.value.retry_after_s is not None
        assert 1 <= caught.value.retry_after_s <= 60
        for channel in (first, second):
            await Visitor(swarm).fill(channel, 1)

    swarm.run(work())


def test_what_can_never_fit_has_no_time_to_retry(swarm: LocalSwarm) -> None:
    with pytest.raises(CacheFullError) as caught:
        swarm.run(Visitor(swarm).open(65))
    assert caught.value.retry_after_s is None


def test_an_announcement_says_what_a_new_session_gets_and_says_it_soon(swarm: LocalSwarm) -> None:
    async def announced() -> int:
        (found,) = await swarm.models[0]._swarm.view.announcements(swarm.checkpoint.model_key)
        return found.kv_tokens_free

    async def work() -> None:
        visitor = Visitor(swarm)
        assert await announced() == 64
        first = await visitor.open(64)
        second = await visitor.open(64)
        await asyncio.sleep(1.1)
        assert await announced() == 0, "no page is in use, but all are promised twice"
        await first.close()
        await second.close()
        await asyncio.sleep(1.1)
        assert await announced() == 64

    swarm.model()
    swarm.run(work())


def test_a_client_goes_around_full_servers_before_it_waits(bloom: Path) -> None:
    ids = torch.randint(5, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(3))
    with LocalSwarm(bloom, ["0:4", "0:4"], kv_tokens=64) as swarm:
        model = swarm.model()
        model.generate(ids, max_new_tokens=1)
        assert model.last_route is not None
        best = model.last_route.hops[0].peer_id

        async def fill() -> None:
            for _ in range(2):
                visitor = Visitor(swarm)
                visitor.target = best
                await visitor.open(64)

        swarm.run(fill())  # and nobody has announced it yet
        started = swarm.loop.time()
        tokens = model.generate(ids, max_new_tokens=10, do_sample=False)
        assert swarm.loop.time() - started < 2
        assert model.last_route.hops[0].peer_id != best
        assert torch.equal(tokens, reference(bloom).generate(ids, max_new_tokens=10, do_sample=False))
        swarm.kill_strangers()


def test_a_client_waits_where_every_server_is_full(bloom: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.randint(5, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(3))
    with LocalSwarm(bloom, ["0:3", "3:4", "3:4"], kv_tokens=64) as swarm:
        model = swarm.model()

        async def fill() -> list[Channel]:
            channels = []
            for server in (*swarm.servers[1:], *swarm.servers[1:]):
                visitor = Visitor(swarm)
                visitor.target = server.announcement().peer_id
                visitor.opening = dataclasses.replace(visitor.opening, span=Span(3, 4))
                channels.append(await visitor.open(64))
            return channels

        async def leave_later(channels: list[Channel]) -> None:
            await asyncio.sleep(20)
            for channel in channels:
                await channel.close()

        channels = swarm.run(fill())
        leaving = swarm.loop.create_task(leave_later(channels))
        started = swarm.loop.time()
        with caplog.at_level(logging.WARNING):
            tokens = model.generate(ids, max_new_tokens=10, do_sample=False)
        assert 20 <= swarm.loop.time() - started < 22
        assert "every server of block 3 is full; waiting up to 30 s" in caplog.text
        assert torch.equal(tokens, reference(bloom).generate(ids, max_new_tokens=10, do_sample=False))
        swarm.run(asyncio.wait({leaving}))

        swarm.run(fill())
        started = swarm.loop.time()
        with pytest.raises(CacheFullError, match="0 of 64 tokens free"):
            model.generate(ids, max_new_tokens=10)
        assert 30 <= swarm.loop.time() - started < 32
        with pytest.raises(CacheFullError, match="0 of 64 tokens free"):
            swarm.model(wait_for_room_s=0).generate(ids, max_new_tokens=10)
        assert swarm.loop.time() - started < 34
        swarm.kill_strangers()


def test_the_reason_counts_and_not_the_messenger(bloom: Path) -> None:
    """The first hop may be quicker to say that the second has refused than the second itself."""
    with LocalSwarm(bloom, ["0:2", "2:4"], kv_tokens=64) as swarm:
        model = swarm.model(wait_for_room_s=10)
        visitor, last = Visitor(swarm), swarm.servers[1].announcement()
        visitor.target = last.peer_id
        visitor.opening = dataclasses.replace(visitor.opening, span=last.span)

        async def fill() -> None:
            await visitor.open(64)
            await visitor.open(64)

        swarm.run(fill())
        swarm.network.link(model._swarm.transport.peer_id, last.peer_id).latency_s = 0.1
        with pytest.raises(CacheFullError, match="0 of 64 tokens free"):
            model.generate(torch.full((1, 8), 7), max_new_tokens=2)
        swarm.kill_strangers()


def _opening(swarm: LocalSwarm, session: bytes, hop: int, wait_s: float) -> Open:
    first, second = (server.announcement() for server in swarm.servers)
    return Open(
        session=session,
        epoch=0,
        model=swarm.checkpoint.model_key,
        span=first.span if hop == 0 else second.span,
        max_length=64,
        upstream=first.peer_id if hop else None,
        next=None if hop else Neighbour(second.peer_id, second.addresses),
        wait_s=wait_s,
    )


async def _ask(swarm: LocalSwarm, session: bytes, hop: int, wait_s: float) -> Channel:
    """Ask one hop of a session over both servers, by a client of its own peer id for each session."""
    visitor = Visitor(swarm)
    visitor.target = swarm.servers[hop].announcement().peer_id
    channel = await visitor.dial()
    channel.send(_opening(swarm, session, hop, wait_s))
    return channel


async def _open_both(swarm: LocalSwarm, session: bytes, wait_s: float) -> list[Channel]:
    channels = [await _ask(swarm, session, hop, wait_s) for hop in (0, 1)]
    await asyncio.gather(*(channel.expect(Opened, timeout_s=100) for channel in channels))
    return channels


@pytest.mark.parametrize("full", [0, 1])
def test_a_hop_that_waits_for_room_holds_the_others(bloom: Path, full: int) -> None:
    """30 s are more than a hop usually waits for a push stream's session, and for an answer to one."""
    with LocalSwarm(bloom, ["0:2", "2:4"], kv_tokens=64) as swarm:

        async def work() -> None:
            blocking = []
            for blocker in (Visitor(swarm), Visitor(swarm)):
                server = swarm.servers[full].announcement()
                blocker.target = server.peer_id
                blocker.opening = dataclasses.replace(blocker.opening, span=server.span)
                blocking.append(await blocker.open(64))
            first, second = [await _ask(swarm, b"n" * 16, hop, 45) for hop in (0, 1)]
            opened = [
                asyncio.create_task(channel.expect(Opened, timeout_s=100)) for channel in (first, second)
            ]
            await asyncio.sleep(30)
            assert not opened[0].done(), "it answers for the hop behind it too"
            assert opened[1].done() == (full == 0)
            for channel in blocking:
                await channel.close()
            await asyncio.wait_for(asyncio.gather(*opened), 1)
            meta, payload = encode_tensor(torch.zeros(5, HIDDEN))
            first.send(Step(0, 0, (Slice(0, 0, 5),), meta, payload))
            await second.expect(Output, timeout_s=1)

        swarm.run(work())
        swarm.kill_strangers()


def test_two_clients_that_hold_what_the_other_wants_do_not_wait_for_ever(bloom: Path) -> None:
    """Who gives up first lets the other in."""
    with LocalSwarm(bloom, ["0:2", "2:4"], kv_tokens=64) as swarm:

        async def work() -> None:
            await _open_both(swarm, b"n" * 16, 0)  # of two sessions that fit, this is one
            started = swarm.loop.time()
            first = await _ask(swarm, b"1" * 16, 0, 10)
            other_second = await _ask(swarm, b"2" * 16, 1, 20)
            await asyncio.sleep(1)
            second = await _ask(swarm, b"1" * 16, 1, 10)
            other_first = await _ask(swarm, b"2" * 16, 0, 20)
            with pytest.raises(CacheFullError):
                await second.expect(Opened, timeout_s=100)
            assert 11 <= swarm.loop.time() - started < 11.2
            first.abort()
            await other_first.expect(Opened, timeout_s=1)
            await other_second.expect(Opened, timeout_s=1)

        swarm.run(work())
        swarm.kill_strangers()
        swarm.run(asyncio.sleep(1))
        assert all(server.num_sessions == 0 for server in swarm.servers)
