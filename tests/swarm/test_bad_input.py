"""Whatever one peer sends, it gets a clear error, and the server goes on serving the others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import torch

from petal_swarm.errors import (
    BadMessageError,
    BadTensorError,
    BusyError,
    CacheFullError,
    PetalSwarmError,
    RemoteError,
    SessionTooLongError,
    UnknownSessionError,
    VersionMismatchError,
    WrongModelError,
    WrongSpanError,
    remote_error,
)
from petal_swarm.net.channel import Channel
from petal_swarm.net.memory import MemoryTransport
from petal_swarm.span import Slice, Span
from petal_swarm.wire.connection import PUSH_TABLE, SESSION_TABLE, Role
from petal_swarm.wire.frames import PREFIX, encode_frame
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.opening import Open, Opened, PushOpen
from petal_swarm.wire.messages.parts import TensorMeta
from petal_swarm.wire.messages.repair import Leaving
from petal_swarm.wire.messages.steps import Output, Step
from petal_swarm.wire.protocols import PUSH, SESSION
from petal_swarm.wire.tensors import encode_tensor
from tests.checkpoints import VOCABULARY, reference
from tests.swarm.local import LocalSwarm

HIDDEN = 32


class Intruder:
    """A peer that speaks the protocol by hand to the first server of a swarm."""

    def __init__(self, swarm: LocalSwarm) -> None:
        self.swarm = swarm
        self.transport: MemoryTransport = swarm.transport()
        self.target = swarm.servers[0].announcement().peer_id
        self.opening = Open(
            session=b"s" * 16, epoch=0, model=swarm.checkpoint.model_key, span=Span(0, 2), max_length=32
        )

    async def dial(self, protocol: str = SESSION) -> Channel:
        stream = await self.transport.open_stream(self.target, protocol, timeout_s=5)
        return Channel(stream, SESSION_TABLE if protocol == SESSION else PUSH_TABLE, Role.DIALER)

    async def opened(self, **changes: object) -> Channel:
        channel = await self.dial()
        fields = {name: getattr(self.opening, name) for name in Open.__slots__} | changes
        channel.send(Open(**fields))
        await channel.expect(Opened, timeout_s=5)
        return channel

    async def step(
        self, channel: Channel, hidden: torch.Tensor, slices: tuple[Slice, ...], **changes: object
    ) -> Output:
        meta, payload = encode_tensor(hidden)
        fields = {"step": 0, "epoch": 0, "slices": slices, "tensor": meta, "payload": payload} | changes
        channel.send(Step(**fields))
        while isinstance(message := await channel.receive(), Leaving):
            pass
        if isinstance(message, Error):
            raise remote_error(message.code, message.message)
        assert isinstance(message, Output), message
        return message

    async def raw(self, data: bytes, *, after_open: bool) -> None:
        """Send bytes as they are, end the stream, and wait until the server has done with it."""
        channel = await self.opened() if after_open else await self.dial()
        stream = channel._stream
        stream.write(data)
        await stream.close()
        other = stream._other
        async with asyncio.timeout(60):
            while other in other.owner._streams:  # noqa: ASYNC110 - the server's end has no event to wait for
                await asyncio.sleep(0.01)


@pytest.fixture
def swarm(bloom: Path) -> Iterator[LocalSwarm]:
    """Two servers; afterwards a client must still get the right tokens from them."""
    with LocalSwarm(bloom, ["0:2", "2:4"], kv_tokens=256, max_batch_tokens=64) as swarm:
        yield swarm
        swarm.kill_strangers()
        ids = torch.randint(5, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(3))
        tokens = swarm.model().generate(ids, max_new_tokens=10, do_sample=False)
        assert torch.equal(tokens, reference(bloom).generate(ids, max_new_tokens=10, do_sample=False))
        swarm.run(asyncio.sleep(1))
        for server in swarm.servers:
            assert server.num_sessions == 0
            figures = server.announcement()
            assert figures.kv_tokens_free == figures.kv_tokens


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "another"}, WrongModelError),
        ({"span": Span(0, 4)}, WrongSpanError),
        ({"span": Span(2, 3)}, WrongSpanError),
        ({"max_length": 100_000}, CacheFullError),
    ],
)
def test_an_open_that_cannot_be(swarm: LocalSwarm, changes: dict[str, object], error: type) -> None:
    with pytest.raises(error):
        swarm.run(Intruder(swarm).opened(**changes))


@pytest.mark.parametrize(
    ("hidden", "slices", "changes", "error", "message"),
    [
        (torch.zeros(3, HIDDEN + 1), (Slice(0, 0, 3),), {}, BadTensorError, "expected"),
        (torch.zeros(65, HIDDEN), (Slice(0, 0, 32), Slice(1, 0, 33)), {}, BadTensorError, "limit of 64"),
        (torch.zeros(40, HIDDEN), (Slice(0, 0, 40),), {}, SessionTooLongError, "max_length of 32"),
        (torch.zeros(1, HIDDEN), (Slice(0, 7, 1),), {}, BadMessageError, "position 7"),
        (torch.zeros(1, HIDDEN), (Slice(0, 0, 1),), {"forks": (5,)}, BadMessageError, "cannot be forked"),
        (torch.zeros(1, HIDDEN), (Slice(0, 0, 1),), {"epoch": 4}, BadMessageError, "epoch 4"),
    ],
)
def test_a_step_that_cannot_be(
    swarm: LocalSwarm,
    hidden: torch.Tensor,
    slices: tuple[Slice, ...],
    changes: dict[str, object],
    error: type,
    message: str,
) -> None:
    async def attempt() -> None:
        intruder = Intruder(swarm)
        await intruder.step(await intruder.opened(), hidden, slices, **changes)

    with pytest.raises(error, match=message):
        swarm.run(attempt())


def test_the_same_step_number_twice(swarm: LocalSwarm) -> None:
    async def attempt() -> None:
        intruder = Intruder(swarm)
        channel = await intruder.opened()
        one = torch.zeros(1, HIDDEN)
        await intruder.step(channel, one, (Slice(0, 0, 1),), step=3)
        await intruder.step(channel, one, (Slice(0, 1, 1),), step=3)

    with pytest.raises(BadMessageError, match="step 3"):
        swarm.run(attempt())


def test_a_dtype_that_is_none(swarm: LocalSwarm) -> None:
    async def attempt() -> None:
        intruder = Intruder(swarm)
        channel = await intruder.opened()
        meta = TensorMeta("float32", (1, HIDDEN))
        await intruder.step(
            channel, torch.zeros(1, HIDDEN), (Slice(0, 0, 1),), tensor=meta._replace(dtype="float64")
        )

    with pytest.raises(BadMessageError, match="dtype"):
        swarm.run(attempt())


def test_an_unknown_version_is_refused_with_a_reason(swarm: LocalSwarm) -> None:
    async def attempt() -> None:
        intruder = Intruder(swarm)
        channel = await intruder.dial()
        header = intruder.opening.to_header() | {"version": 9}
        channel._connection.send(intruder.opening)
        channel._stream.write(*encode_frame(header))
        await channel.expect(Opened, timeout_s=5)

    with pytest.raises(VersionMismatchError, match="version 9"):
        swarm.run(attempt())


def test_steps_for_a_session_of_nobody(swarm: LocalSwarm) -> None:
    async def attempt() -> None:
        channel = await Intruder(swarm).dial(PUSH)
        channel.send(PushOpen(b"x" * 16, 0))
        await channel.expect(Opened, timeout_s=60)

    with pytest.raises(UnknownSessionError):
        swarm.run(attempt())


def test_only_the_upstream_may_push(swarm: LocalSwarm) -> None:
    async def attempt() -> None:
        intruder, thief = Intruder(swarm), Intruder(swarm)
        await intruder.opened(upstream=intruder.transport.peer_id)
        channel = await thief.dial(PUSH)
        channel.send(PushOpen(b"s" * 16, 0))
        await channel.expect(Opened, timeout_s=60)

    with pytest.raises(UnknownSessionError):
        swarm.run(attempt())


def test_a_client_does_not_step_past_its_upstream(swarm: LocalSwarm) -> None:
    async def attempt() -> None:
        intruder = Intruder(swarm)
        channel = await intruder.opened(upstream=intruder.transport.peer_id)
        await intruder.step(channel, torch.zeros(1, HIDDEN), (Slice(0, 0, 1),))

    with pytest.raises(BadMessageError, match="upstream"):
        swarm.run(attempt())


def test_a_session_id_in_use(swarm: LocalSwarm) -> None:
    async def attempt() -> None:
        intruder = Intruder(swarm)
        await intruder.opened()
        await intruder.opened()

    with pytest.raises(BadMessageError, match="open already"):
        swarm.run(attempt())


def test_a_draining_server_takes_no_session_and_lets_others_end(swarm: LocalSwarm) -> None:
    async def attempt() -> None:
        intruder = Intruder(swarm)
        channel = await intruder.opened()
        extra = swarm.servers[0]
        draining = asyncio.create_task(extra.drain(60))
        await asyncio.sleep(1)
        with pytest.raises(BusyError, match="leaving"):
            await intruder.opened(session=b"t" * 16)
        await intruder.step(channel, torch.zeros(1, HIDDEN), (Slice(0, 0, 1),))
        assert not draining.done()
        await channel.close()
        await draining
        assert extra.num_sessions == 0

    swarm.run(attempt())
    swarm.add_server("0:2")
    swarm.run(swarm.servers.pop(0).close())


@pytest.mark.parametrize("after_open", [False, True])
def test_hostile_bytes(swarm: LocalSwarm, after_open: bool) -> None:
    intruder = Intruder(swarm)
    meta, payload = encode_tensor(torch.zeros(2, HIDDEN))
    step = Step(0, 0, (Slice(0, 0, 2),), meta, payload)
    honest = b"".join(
        encode_frame(step.to_header(), payload) if after_open else encode_frame(intruder.opening.to_header())
    )
    rng = random.Random(5)
    attacks = [
        PREFIX.pack(0xFFFFFFFF, 0),
        PREFIX.pack(10, 0xFFFFFFFF) + b"x" * 10,
        PREFIX.pack(0, 0),
        honest[: len(honest) // 2],
        PREFIX.pack(40, 0) + msgpack.packb([[[]]] * 3),
        b"GET / HTTP/1.1\r\nHost: example\r\n\r\n",
        b"".join(encode_frame({"type": "step"})),
        b"".join(encode_frame({"type": "no such type"})),
        b"".join(encode_frame({**step.to_header(), "slices": [[0, 0, 9]]}, payload)),
        b"".join(encode_frame({**step.to_header(), "slices": [[0, -1, 2]]}, payload)),
        b"".join(encode_frame(step.to_header(), bytes(payload)[:-1])),
    ]
    for _ in range(100):
        mutated = bytearray(honest)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        attacks.append(bytes(mutated))

    async def attack() -> None:
        for data in attacks:
            await intruder.raw(data, after_open=after_open)

    swarm.run(attack())


def test_errors_name_what_a_peer_did_and_nothing_else(swarm: LocalSwarm) -> None:
    """A bug inside the server must not tell strangers about it."""

    async def attempt() -> None:
        intruder = Intruder(swarm)
        channel = await intruder.opened()
        host = swarm.servers[0]._host
        assert host is not None
        host._sessions[b"s" * 16]._submit = lambda message: 1 / 0  # type: ignore[method-assign]
        await intruder.step(channel, torch.zeros(1, HIDDEN), (Slice(0, 0, 1),))

    with pytest.raises(RemoteError, match=r"^internal error$"):
        swarm.run(attempt())


def test_one_bad_session_leaves_the_other_alone(swarm: LocalSwarm) -> None:
    model = swarm.model()
    ids = torch.randint(5, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(4))
    with model.open_session(max_length=64) as session:
        first = model.generate(ids, max_new_tokens=5, do_sample=False, session=session)
        with pytest.raises(PetalSwarmError):
            swarm.run(_bad_step(swarm))
        rest = model.generate(None, max_new_tokens=5, do_sample=False, session=session)
    whole = swarm.model().generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(torch.cat([first, rest], dim=1), whole)


async def _bad_step(swarm: LocalSwarm) -> None:
    intruder = Intruder(swarm)
    await intruder.step(await intruder.opened(), torch.zeros(1, 3), (Slice(0, 0, 1),))
