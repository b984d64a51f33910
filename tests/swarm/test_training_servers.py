"""Servers that train, as a whole: who may, who does, and what becomes of runs when a server goes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from petal_swarm.errors import (
    BusyError,
    ConfigError,
    NotAllowedError,
    RemoteError,
    UnsupportedProtocolError,
    WrongSpanError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.net.memory import MemoryTransport
from petal_swarm.server import hardware
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.server import Server
from petal_swarm.server.training.limits import TrainingLimits
from petal_swarm.span import Span
from petal_swarm.wire.connection import TRAIN_TABLE, Role
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.parts import Neighbour
from petal_swarm.wire.messages.repair import Leaving
from petal_swarm.wire.messages.tuning import (
    Backward,
    Backwarded,
    Failed,
    Forward,
    Forwarded,
    TrainOpen,
    TrainOpened,
)
from petal_swarm.wire.protocols import TRAIN
from petal_swarm.wire.tensors import encode_tensor
from tests.checkpoints import VOCABULARY, reference
from tests.swarm.local import LocalSwarm

HIDDEN = 32
LENGTHS = (5, 3)


def opening_of(server: Server, **changes: Any) -> TrainOpen:
    said = server.announcement()
    return replace(TrainOpen(b"r" * 16, 0, said.model, said.span), **changes)


async def dial(transport: MemoryTransport, server: Server) -> Channel:
    stream = await transport.open_stream(server.announcement().peer_id, TRAIN, timeout_s=5)
    return Channel(stream, TRAIN_TABLE, Role.DIALER)


async def open_run(transport: MemoryTransport, server: Server, **changes: Any) -> Channel:
    channel = await dial(transport, server)
    channel.send(opening_of(server, **changes))
    await channel.expect(TrainOpened, timeout_s=30)
    return channel


def forward(rows: torch.Tensor, number: int = 0) -> Forward:
    return Forward(number, LENGTHS, *encode_tensor(rows), keep=True)


def backward(rows: torch.Tensor, number: int = 0) -> Backward:
    return Backward(number, *encode_tensor(rows))


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(sum(LENGTHS), HIDDEN, generator=torch.Generator().manual_seed(seed))


def test_who_trains_says_so(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:4"]) as swarm:
        idle = swarm.add_server("0:4", training_mib=0)
        assert [server.announcement().trains for server in swarm.servers] == [True, False]
        with pytest.raises(UnsupportedProtocolError):
            swarm.run(dial(swarm.transport(), idle))


def test_only_for_some_peers(bloom: Path) -> None:
    with LocalSwarm(bloom, []) as swarm:
        friend, stranger = swarm.transport(), swarm.transport()
        server = swarm.add_server("0:4", allow_peers=(friend.peer_id,))

        async def check() -> None:
            await (await open_run(friend, server)).close()
            with pytest.raises(NotAllowedError):
                await open_run(stranger, server)

        swarm.run(check())


def test_a_run_among_sessions(bloom: Path) -> None:
    """Passes go through while somebody generates; the tokens are the same, and nothing is left."""
    ids = torch.randint(5, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(3))
    expected = reference(bloom).generate(ids, max_new_tokens=12, do_sample=False)
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        first, second = swarm.servers
        transport, model = swarm.transport(), swarm.model()

        async def opened() -> list[Channel]:
            names = [server.announcement().peer_id for server in swarm.servers]
            following = Neighbour(names[1], second.addresses)
            return list(
                await asyncio.gather(
                    open_run(transport, first, next=following),
                    open_run(transport, second, upstream=names[0]),
                )
            )

        async def train(channels: list[Channel], number: int) -> None:
            channels[0].send(forward(rows(number), number))
            out = await channels[1].expect(Forwarded, timeout_s=30)
            channels[1].send(Backward(number, out.tensor, out.payload))
            await channels[0].expect(Backwarded, timeout_s=30)

        channels = swarm.run(opened())
        with model.open_session(max_length=64) as session:
            got = [model.generate(ids, max_new_tokens=3, do_sample=False, session=session)]
            for number in range(3):
                swarm.run(train(channels, number))
                got.append(model.generate(None, max_new_tokens=3, do_sample=False, session=session))
        assert torch.equal(torch.cat(got, dim=1), expected)
        for channel in channels:
            swarm.run(channel.close())
        swarm.run(asyncio.sleep(1))
        for server in swarm.servers:
            assert server._training is not None
            trainer = server._training._trainer
            assert (server._training.num_runs, trainer.retained.nbytes) == (0, 0)
            assert trainer.passes.stats().passes == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite(bloom: Path, value: float) -> None:
    with LocalSwarm(bloom, ["0:4"]) as swarm:

        async def check() -> None:
            channel = await open_run(swarm.transport(), swarm.servers[0])
            spoilt = rows()
            spoilt[1, 2] = value
            channel.send(forward(spoilt))
            failed = await channel.expect(Failed, timeout_s=5)
            assert (failed.number, failed.code) == (0, "bad-tensor")
            channel.send(forward(rows(), 1))
            await channel.expect(Forwarded, timeout_s=5)
            channel.send(backward(spoilt, 1))
            failed = await channel.expect(Failed, timeout_s=5)
            assert (failed.code, failed.backward) == ("bad-tensor", True)

        swarm.run(check())


def test_who_leaves_says_so_and_waits(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:4"]) as swarm:
        (server,) = swarm.servers

        async def check() -> None:
            channel = await open_run(swarm.transport(), server)
            draining = asyncio.create_task(server.drain(60))
            await channel.expect(Leaving, timeout_s=5)
            channel.send(forward(rows()))
            await channel.expect(Forwarded, timeout_s=5)
            with pytest.raises(BusyError):
                await open_run(swarm.transport(), server, run=b"x" * 16)
            assert not draining.done()
            await channel.close()
            await asyncio.sleep(1)
            assert draining.done()

        swarm.run(check())


def test_who_moves_ends_its_runs_and_takes_others(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2"], drain_timeout_s=5.0) as swarm:
        (server,) = swarm.servers

        async def check() -> None:
            transport = swarm.transport()
            channel = await open_run(transport, server)
            await server.move(Span(2, 4))
            await channel.expect(Leaving, timeout_s=5)
            with pytest.raises(RemoteError):
                await channel.expect(Forwarded, timeout_s=5)
            with pytest.raises(WrongSpanError):
                await open_run(transport, server, span=Span(0, 2))
            again = await open_run(transport, server)
            again.send(forward(rows()))
            await again.expect(Forwarded, timeout_s=5)
            assert not isinstance(await asyncio.wait_for(channel.receive(), 5), Error)

        swarm.run(check())


def test_a_server_of_little_memory_computes_again(bloom: Path) -> None:
    """Of the first of many passes the graph is gone, and its input is not: the gradient is the same."""
    found: list[torch.Tensor] = []
    kept_bytes: list[int] = []
    with LocalSwarm(bloom, []) as swarm:
        for mib in (64, 1):
            server = swarm.add_server("0:4", training_mib=mib)

            async def gradient(server: Server = server) -> torch.Tensor:
                channel = await open_run(swarm.transport(), server)
                for number in range(20):
                    channel.send(forward(rows(number), number))
                    await channel.expect(Forwarded, timeout_s=30)
                assert server._training is not None
                stats = server._training._trainer.passes.stats()
                assert stats.passes == 20
                kept_bytes.append(stats.activation_bytes)
                channel.send(backward(rows(), 0))
                message = await channel.expect(Backwarded, timeout_s=30)
                return torch.frombuffer(bytearray(message.payload), dtype=torch.float32)

            found.append(swarm.run(gradient()))
    assert kept_bytes[1] <= 1 << 19 < kept_bytes[0]
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


def test_settings() -> None:
    with pytest.raises(ConfigError, match="--training-mib must be at least 0, got -1"):
        ServerConfig(model="m", new_swarm=True, training_mib=-1)
    assert ServerConfig(model="m", new_swarm=True).trains
    assert not ServerConfig(model="m", new_swarm=True, training_mib=0).trains


def test_a_pass_fits_a_message() -> None:
    limits = TrainingLimits(max_pass_tokens=2048)
    assert limits.rows_of_pass(1024) == 2048
    assert limits.rows_of_pass(14336) * 14336 * 4 <= 64 << 20
    assert limits.rows_of_pass(14336) == 1170


def test_a_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(hardware, "free_bytes", lambda device: 4 << 30)
    assert hardware.default_training_bytes(cpu) == 1 << 30
    monkeypatch.setattr(hardware, "free_bytes", lambda device: 400 << 30)
    assert hardware.default_training_bytes(cpu) == 8 << 30
