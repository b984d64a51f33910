"""Peers that ask for too much, or take and do not use: bounds hold, and others get what they came for."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from petal_swarm.engine.compute import Done, InlineCompute
from petal_swarm.engine.steps import StepRequest
from petal_swarm.errors import (
    BadMessageError,
    BusyError,
    CacheFullError,
    ConfigError,
    PetalSwarmError,
    TooSlowError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import WRITE_HIGH_WATER_BYTES, Stream
from petal_swarm.server.host import SessionHost
from petal_swarm.server.quotas import Quotas
from petal_swarm.span import Slice
from petal_swarm.wire.connection import PUSH_TABLE, Role
from petal_swarm.wire.frames import encode_frame
from petal_swarm.wire.messages.opening import Opened, PushOpen
from petal_swarm.wire.messages.parts import Neighbour
from petal_swarm.wire.messages.repair import Lost
from petal_swarm.wire.messages.steps import Output, Step
from petal_swarm.wire.protocols import PUSH
from petal_swarm.wire.tensors import encode_tensor
from tests.checkpoints import VOCABULARY, reference
from tests.swarm.local import LocalSwarm
from tests.swarm.test_bad_input import HIDDEN, Intruder

THOUSAND = 1000


def prompt(seed: int = 3) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def swarm(bloom: Path) -> Iterator[LocalSwarm]:
    """Two servers; afterwards nothing is left of the strangers, and a client gets the right tokens."""
    with LocalSwarm(bloom, ["0:2", "2:4"], max_batch_tokens=64) as swarm:
        tasks = len(asyncio.all_tasks(swarm.loop))
        yield swarm
        tokens = swarm.model().generate(prompt(), max_new_tokens=10, do_sample=False)
        assert torch.equal(tokens, reference(bloom).generate(prompt(), max_new_tokens=10, do_sample=False))
        swarm.run(asyncio.sleep(1))
        for server in swarm.servers:
            host, compute = server._host, server._compute
            assert host is not None
            assert compute is not None
            left = (host._sessions, len(host._arrivals), host._room._waiting)
            assert left == ({}, 0, {})
            assert (swarm.servers[0]._gate.num_opening, len(host._quotas), host._quotas.nbytes) == (0, 0, 0)
            assert compute.engine.stats().sessions == 0
            assert host.tokens_available == compute.engine.stats().kv_tokens
        assert len(asyncio.all_tasks(swarm.loop)) == tasks


def session_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def open_thousand(swarm: LocalSwarm, peers: int) -> tuple[list[Channel], int]:
    """Sessions that are opened and then left alone, and how many were refused."""
    intruders = [Intruder(swarm) for _ in range(peers)]

    async def attempt(number: int) -> Channel | PetalSwarmError:
        try:
            intruder = intruders[number % peers]
            return await intruder.opened(session=session_id(number), max_length=8)
        except PetalSwarmError as error:
            return error

    found = await asyncio.gather(*(attempt(number) for number in range(THOUSAND)))
    refused = [error for error in found if not isinstance(error, Channel)]
    assert all(isinstance(error, BusyError) for error in refused)
    return [channel for channel in found if isinstance(channel, Channel)], len(refused)


def test_a_session_of_no_tokens(swarm: LocalSwarm) -> None:
    with pytest.raises(ConfigError, match="max_length must be at least 1 and at most 1073741824, got 0"):
        swarm.model().open_session(max_length=0)

    async def attempt() -> None:
        intruder = Intruder(swarm)
        channel = await intruder.dial()
        channel._connection.send(intruder.opening)
        channel._stream.write(*encode_frame(intruder.opening.to_header() | {"max_length": 0}))
        await channel.expect(Opened, timeout_s=5)

    with pytest.raises(BadMessageError, match="max_length"):
        swarm.run(attempt())


def test_a_session_of_a_billion_tokens(swarm: LocalSwarm) -> None:
    started = swarm.loop.time()
    session = swarm.model().open_session(max_length=1_000_000_000)
    with pytest.raises(CacheFullError, match="4096 of 4096 tokens free, the session wants 1000000000"):
        session.step(torch.zeros(1, HIDDEN), [1])
    assert swarm.loop.time() - started < 2
    with pytest.raises(ConfigError, match="at most"):
        swarm.model().open_session(max_length=2_000_000_000)


def test_more_sequences_than_there_is_room_for(swarm: LocalSwarm) -> None:
    """`max_length` is of each sequence, so the cache may still become full in the middle."""

    async def attempt() -> None:
        intruder = Intruder(swarm)
        channel = await intruder.opened()
        for first in range(0, 1024, 2):
            meta, payload = encode_tensor(torch.zeros(64, HIDDEN))
            slices = (Slice(first, 0, 32), Slice(first + 1, 0, 32))
            channel.send(Step(first, 0, slices, meta, payload))
            await channel.expect(Output, timeout_s=300)

    with pytest.raises(CacheFullError):
        swarm.run(attempt())


def test_a_thousand_sessions_opened_and_abandoned(swarm: LocalSwarm) -> None:
    channels, refused = swarm.run(open_thousand(swarm, peers=2))
    assert (len(channels), refused) == (512, 488)
    with pytest.raises(BusyError, match="512 sessions"):
        swarm.model(wait_for_room_s=0).generate(prompt(), max_new_tokens=2)
    swarm.run(asyncio.sleep(59))
    assert swarm.servers[0].num_sessions == 512
    swarm.run(asyncio.sleep(2))  # first_step_timeout_s
    assert swarm.servers[0].num_sessions == 0


def test_a_thousand_sessions_opened_and_cut(swarm: LocalSwarm) -> None:
    swarm.run(open_thousand(swarm, peers=2))
    assert swarm.servers[0].num_sessions == 512
    swarm.kill_strangers()
    swarm.run(asyncio.sleep(0.5))
    assert swarm.servers[0].num_sessions == 0


def test_a_thousand_sessions_of_one_peer_leave_room_for_others(swarm: LocalSwarm) -> None:
    channels, refused = swarm.run(open_thousand(swarm, peers=1))
    assert (len(channels), refused) == (256, 744)
    tokens = swarm.model(wait_for_room_s=0).generate(prompt(), max_new_tokens=2)
    assert tokens.shape == (1, 10)
    swarm.kill_strangers()


def test_who_waits_for_room_elsewhere_does_not_idle_meanwhile(swarm: LocalSwarm) -> None:
    swarm.run(Intruder(swarm).opened(wait_s=30.0))
    swarm.run(asyncio.sleep(89))
    assert swarm.servers[0].num_sessions == 1
    swarm.run(asyncio.sleep(2))
    assert swarm.servers[0].num_sessions == 0


async def trickle(swarm: LocalSwarm, piece_bytes: int, every_s: float) -> float:
    """Send a step of 64 rows so slowly, and return how long it took until it was answered."""
    intruder = Intruder(swarm)
    channel = await intruder.opened(max_length=64)
    started = swarm.loop.time()
    answer = asyncio.create_task(channel.expect(Output, timeout_s=1000))
    meta, payload = encode_tensor(torch.zeros(64, HIDDEN))
    frame = b"".join(map(bytes, channel._connection.send(Step(0, 0, (Slice(0, 0, 64),), meta, payload))))
    for start in range(0, len(frame), piece_bytes):
        channel._stream.write(frame[start : start + piece_bytes])
        if (await asyncio.wait({answer}, timeout=every_s))[0]:
            break
    try:
        await answer
    finally:
        await channel.close()
        trickled_s = swarm.loop.time() - started
    return trickled_s


def test_a_step_that_trickles_in_is_cut_off(swarm: LocalSwarm) -> None:
    """A byte every second: it would hold a session for hours."""
    started = swarm.loop.time()
    with pytest.raises(TooSlowError, match="its rest did not come in time"):
        swarm.run(trickle(swarm, 1, 1.0))
    assert 30 <= swarm.loop.time() - started < 50


def test_a_first_step_may_take_long_to_arrive(swarm: LocalSwarm) -> None:
    """Longer than an idle session is let be, if it is that large."""
    for server in swarm.servers:
        assert server._host is not None
        server._host._limits = dataclasses.replace(server._host._limits, min_bytes_per_s=100.0)
    assert 75 < swarm.run(trickle(swarm, 500, 5.0)) < 90


def test_a_session_behind_a_hop_that_trickles(swarm: LocalSwarm) -> None:
    """Its client is told that a hop is to blame, and may look for another."""

    async def attempt() -> None:
        client, upstream = Intruder(swarm), Intruder(swarm)
        channel = await client.opened(upstream=upstream.transport.peer_id)
        push = await upstream.dial(PUSH)
        push.send(PushOpen(client.opening.session, 0))
        await push.expect(Opened, timeout_s=5)
        push._stream.write(b"\0\0")
        lost = await channel.expect(Lost, timeout_s=100)
        assert lost.upstream
        assert "sent a part of a step and not its rest" in lost.reason
        await channel.close()

    swarm.run(attempt())


def test_half_a_message_from_a_client_that_has_nothing_to_say(swarm: LocalSwarm) -> None:
    async def attempt() -> None:
        client = Intruder(swarm)
        channel = await client.opened(upstream=client.transport.peer_id)
        channel._stream.write(b"\0\0")
        await channel.expect(Output, timeout_s=55)

    with pytest.raises(TooSlowError):
        swarm.run(attempt())


def test_a_session_abandoned_behind_another_hop(swarm: LocalSwarm) -> None:
    """Nobody pushes into it; or whoever did has gone."""

    async def abandon() -> None:
        last = swarm.servers[1].announcement()
        for number in range(2):
            client, upstream = Intruder(swarm), Intruder(swarm)
            client.target = upstream.target = last.peer_id
            await client.opened(
                session=session_id(number), span=last.span, upstream=upstream.transport.peer_id
            )
            if number:
                push = await upstream.dial(PUSH)
                push.send(PushOpen(session_id(number), 0))
                await push.expect(Opened, timeout_s=5)
                await asyncio.sleep(100)  # the first step may take its time at the hop before
                await push.close()

    swarm.run(abandon())
    assert swarm.servers[1].num_sessions == 1, "the other"
    swarm.run(asyncio.sleep(121))
    assert swarm.servers[1].num_sessions == 0


def test_streams_that_never_say_what_they_want(swarm: LocalSwarm) -> None:
    async def attempt() -> None:
        intruder = Intruder(swarm)
        silent = await asyncio.gather(*(intruder.dial() for _ in range(500)))
        pushing = await asyncio.gather(*(intruder.dial(PUSH) for _ in range(600)))
        for number, channel in enumerate(pushing):
            channel.send(PushOpen(session_id(number), 0))
        await asyncio.sleep(1)
        host = swarm.servers[0]._host
        assert host is not None
        assert swarm.servers[0]._gate.num_opening == host._limits.max_opening_of_peer == 512
        assert swarm.servers[0]._gate.num_streams == 512
        with pytest.raises(BusyError, match="being opened") as caught:
            await pushing[-1].expect(Opened, timeout_s=1)
        assert caught.value.retry_after_s == host._limits.open_timeout_s
        await (await Intruder(swarm).opened(session=session_id(5000))).close()
        await asyncio.sleep(15)
        assert not swarm.servers[0]._gate.num_opening
        for channel in [*silent, *pushing]:
            channel.abort()

    swarm.run(attempt())


def test_a_peer_that_stops_reading(swarm: LocalSwarm, bloom: Path) -> None:
    """It is made to wait, then its session ends; who decodes meanwhile gets the tokens it gets alone."""
    intruder = Intruder(swarm)
    piece = (Slice(0, 0, 32),)

    async def ask_on() -> Channel:
        channel = await intruder.opened()
        meta, payload = encode_tensor(torch.zeros(32, HIDDEN))
        for number in range(3000):  # 4 KiB each, and as much in answer
            channel.send(Step(number, 0, piece, meta, payload, rows="all"))
        return channel

    def waiting_bytes() -> int:
        """What the server has for the intruder, and the intruder does not take."""
        return sum(session._client._stream.unsent_bytes for session in host._sessions.values())

    host = swarm.servers[0]._host
    assert host is not None
    model = swarm.model()
    expected = reference(bloom).generate(prompt(), max_new_tokens=20, do_sample=False)
    with model.open_session(max_length=64) as session:
        got = [model.generate(prompt(), max_new_tokens=5, do_sample=False, session=session)]
        channel = swarm.run(ask_on())
        for pause_s in (5, 20, 10):
            assert waiting_bytes() < WRITE_HIGH_WATER_BYTES + (64 << 10)
            got.append(model.generate(None, max_new_tokens=5, do_sample=False, session=session))
            assert host.num_sessions == 2
            swarm.run(asyncio.sleep(pause_s))
        assert host.num_sessions == 1, "the intruder's has ended after `write_timeout_s`"
    assert channel._stream._other._unread > WRITE_HIGH_WATER_BYTES, (
        "the rest was never taken from the network"
    )
    assert torch.equal(torch.cat(got, dim=1), expected)


def test_a_bad_wait(swarm: LocalSwarm) -> None:
    with pytest.raises(ConfigError, match="wait_for_room_s"):
        swarm.model(wait_for_room_s=-1)
    with pytest.raises(ConfigError, match="prefill_chunk_tokens"):
        swarm.model(prefill_chunk_tokens=0)

    async def attempt() -> None:
        intruder = Intruder(swarm)
        opening = dataclasses.replace(intruder.opening, wait_s=601.0)
        channel = await intruder.dial()
        channel.send(opening)
        await channel.expect(Opened, timeout_s=5)

    with pytest.raises(BadMessageError, match="wait_s"):
        swarm.run(attempt())


async def ask_for_rows(intruder: Intruder, steps: int) -> Channel:
    """Ask for many rows, and read no answer."""
    channel = await intruder.opened(session=secrets_of(intruder))
    meta, payload = encode_tensor(torch.zeros(32, HIDDEN))
    for number in range(steps):
        channel.send(Step(number, 0, (Slice(0, 0, 32),), meta, payload, rows="all"))
    return channel


def secrets_of(intruder: Intruder) -> bytes:
    return intruder.transport.peer_id.encode()[-16:]


def test_a_peer_that_reads_nothing_and_asks_for_no_more(swarm: LocalSwarm) -> None:
    """Its few results would stay here for as long as it likes."""
    intruder = Intruder(swarm)
    swarm.run(ask_for_rows(intruder, 10))
    assert swarm.servers[0].num_sessions == 1
    swarm.run(asyncio.sleep(29))
    assert swarm.servers[0].num_sessions == 1
    swarm.run(asyncio.sleep(11))
    assert swarm.servers[0].num_sessions == 0


def test_a_next_hop_that_does_not_read(swarm: LocalSwarm) -> None:
    """It takes the push stream and then nothing; the client is told which hop it was."""
    client, sink = Intruder(swarm), swarm.transport()

    async def accept(stream: Stream) -> None:
        channel = Channel(stream, PUSH_TABLE, Role.LISTENER)
        await channel.expect(PushOpen, timeout_s=5)
        channel.send(Opened())
        await asyncio.sleep(1000)

    async def attempt() -> None:
        await sink.serve(PUSH, accept)
        channel = await client.opened(next=Neighbour(sink.peer_id, sink.addresses()))
        meta, payload = encode_tensor(torch.zeros(32, HIDDEN))
        channel.send(Step(0, 0, (Slice(0, 0, 32),), meta, payload))
        lost = await channel.expect(Lost, timeout_s=60)
        assert f"next hop {sink.peer_id} is gone: it took nothing for too long" in lost.reason
        await channel.close()

    started = swarm.loop.time()
    swarm.run(attempt())
    assert 30 <= swarm.loop.time() - started < 45
    swarm.kill_strangers()


def test_a_client_that_reads_slowly_but_reads(swarm: LocalSwarm) -> None:
    """1.3 MB of results at 20 kB/s."""
    intruder = Intruder(swarm)
    target = intruder.target

    async def attempt() -> None:
        channel = await ask_for_rows(intruder, 30)
        swarm.network.link(intruder.transport.peer_id, target).bytes_per_s = 20e3
        for _ in range(30):
            await channel.expect(Output, timeout_s=100)
            await asyncio.sleep(3)
        await channel.close()

    swarm.run(attempt())


def limit(swarm: LocalSwarm, **limits: float) -> SessionHost:
    """Other limits for the sessions of the first server from now on."""
    host = swarm.servers[0]._host
    assert host is not None
    host._limits = dataclasses.replace(host._limits, **limits)  # type: ignore[arg-type]
    host._quotas = Quotas(host._limits, swarm.loop.time)
    return host


def test_a_peer_has_so_much_under_way_over_all_its_sessions(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest stays in its streams; nobody else waits for it, and it is taken later."""
    host = limit(swarm, max_queued_tokens_of_peer=128)
    compute = swarm.servers[0]._compute
    assert isinstance(compute, InlineCompute)
    late: list[tuple[StepRequest, Done]] = []
    monkeypatch.setattr(compute, "run_now", lambda request: None)
    monkeypatch.setattr(compute, "submit", lambda *arguments: late.append(arguments))
    greedy, modest = Intruder(swarm), Intruder(swarm)
    meta, payload = encode_tensor(torch.zeros(16, HIDDEN))

    async def send(intruder: Intruder, number: int) -> Channel:
        channel = await intruder.opened(session=session_id(number))
        for step in range(6):
            channel.send(Step(step, 0, (Slice(0, 0, 16),), meta, payload))
        return channel

    async def work() -> None:
        channels = [await send(greedy, number) for number in range(5)]
        await asyncio.sleep(1)
        taken = len(late)
        assert 8 <= taken <= 8 + 4, "128 rows, and one more step of each session that had begun"
        other = await send(modest, 100)
        await asyncio.sleep(1)
        assert len(late) == taken + 6
        monkeypatch.undo()
        for request, done in late:
            compute.submit(request, done)
        for channel in (*channels, other):
            for _ in range(6):
                await channel.expect(Output, timeout_s=10)
            await channel.close()
        await asyncio.sleep(1)
        assert (len(host._quotas), host._quotas.nbytes) == (0, 0)

    swarm.run(work())


def test_a_peer_that_moves_too_much_is_slowed_down(swarm: LocalSwarm) -> None:
    limit(swarm, max_bytes_per_s_of_peer=10_000.0)
    greedy, modest = Intruder(swarm), Intruder(swarm)

    async def exchange(intruder: Intruder, steps: int) -> float:
        started = swarm.loop.time()
        channel = await ask_for_rows(intruder, steps)
        for _ in range(steps):
            await channel.expect(Output, timeout_s=100)
        await channel.close()
        return swarm.loop.time() - started

    async def work() -> None:
        took_s, other_s = await asyncio.gather(exchange(greedy, 50), exchange(modest, 1))
        assert 35 < took_s < 45, "4 KiB there and 4 KiB back, 50 times"
        assert other_s < 1

    swarm.run(work())


def test_a_large_step_counts_from_its_beginning(swarm: LocalSwarm) -> None:
    """And one that is not let in yet is read no further, until others of its peer are done."""
    host = limit(swarm, max_bytes_in_flight_of_peer=8000)
    intruder = Intruder(swarm)
    meta, payload = encode_tensor(torch.zeros(32, HIDDEN))
    step = Step(0, 0, (Slice(0, 0, 32),), meta, payload)

    async def begin(number: int) -> tuple[Channel, bytes]:
        channel = await intruder.opened(session=session_id(number))
        frame = b"".join(map(bytes, channel._connection.send(step)))
        channel._stream.write(frame[:2000])
        return channel, frame[2000:]

    async def work() -> None:
        begun = [await begin(number) for number in range(4)]
        await asyncio.sleep(1)
        assert host._quotas.nbytes == 2 * 4096
        for channel, rest in reversed(begun):
            channel._stream.write(rest)
        for channel, _ in begun:
            await channel.expect(Output, timeout_s=5)
        assert host._quotas.nbytes == 0
        for channel, _ in begun:
            await channel.close()

    swarm.run(work())


def test_a_payload_where_none_belongs(swarm: LocalSwarm) -> None:
    async def attempt() -> None:
        intruder = Intruder(swarm)
        channel = await intruder.dial()
        frame = encode_frame(intruder.opening.to_header(), bytes(100_000))
        channel._connection.send(intruder.opening)
        channel._stream.write(*frame)
        await channel.expect(Opened, timeout_s=5)

    with pytest.raises(BadMessageError, match="100000 bytes; at most 65536"):
        swarm.run(attempt())


def test_a_push_stream_that_waits_for_its_session_is_read_no_further(swarm: LocalSwarm) -> None:
    """A thousand of them, with all that they send at once, would fill the memory."""

    async def attempt() -> None:
        channel = await Intruder(swarm).dial(PUSH)
        channel.send(PushOpen(session_id(1), 0))
        await asyncio.sleep(1)
        stream = channel._stream
        assert stream._other._paused
        channel.abort()
        await asyncio.sleep(20)

    swarm.run(attempt())


def test_results_that_pile_up_later_are_noticed_without_another_step(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine was busy, so they come when nothing more is asked for."""
    compute, host = swarm.servers[0]._compute, swarm.servers[0]._host
    assert isinstance(compute, InlineCompute)
    assert host is not None
    late: list[tuple[StepRequest, Done]] = []
    monkeypatch.setattr("petal_swarm.net.channel.WRITE_HIGH_WATER_BYTES", 10_000)
    monkeypatch.setattr("petal_swarm.net.memory.WRITE_HIGH_WATER_BYTES", 10_000)

    async def work() -> None:
        with monkeypatch.context() as busy:
            busy.setattr(compute, "run_now", lambda request: None)
            busy.setattr(compute, "submit", lambda *arguments: late.append(arguments))
            await ask_for_rows(Intruder(swarm), 10)
            await asyncio.sleep(1)
        (session,) = host._sessions.values()
        assert len(late) == 10
        assert session.upstream._throttled is None
        for request, done in late:
            compute.submit(request, done)
        await asyncio.sleep(1)
        assert session.upstream._throttled is not None
        await asyncio.sleep(30)
        assert host.num_sessions == 0

    swarm.run(work())
