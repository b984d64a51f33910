"""Thousands of damaged frames, while somebody else generates: the short form of `benchmarks/fuzz.py`."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
import torch

from petal_swarm.net.memory import MemoryTransport
from tests.checkpoints import VOCABULARY, reference
from tests.hostile_frames import Hostile, Target
from tests.hostile_peer import HostilePeer
from tests.swarm.local import LocalSwarm
from tests.swarm.test_bad_input import HIDDEN

FRAMES = 4000
AT_ONCE = 8


def targets(swarm: LocalSwarm) -> list[Target]:
    found = [server.announcement() for server in swarm.servers]
    return [Target(each.peer_id, each.addresses, each.span, each.model, HIDDEN) for each in found]


async def assault(swarm: LocalSwarm, peer: HostilePeer, hostile: Hostile, frames: int) -> None:
    """Several streams at once, until so many frames more are sent."""
    first, second = targets(swarm)
    wanted = peer.frames_sent + frames

    async def attack_on() -> None:
        while peer.frames_sent < wanted:
            await peer.carry_out(first, hostile.attack(first, second))
            await peer.carry_out(second, hostile.attack(second))

    await asyncio.gather(*(attack_on() for _ in range(AT_ONCE)))


def test_damaged_frames_break_nothing(bloom: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.randint(5, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(3))
    expected = reference(bloom).generate(ids, max_new_tokens=40, do_sample=False)
    with (
        LocalSwarm(bloom, ["0:2", "2:4"], max_batch_tokens=64) as swarm,
        caplog.at_level(logging.ERROR),
    ):
        model = swarm.model()
        transport: MemoryTransport = swarm.transport()
        peer, hostile = HostilePeer(transport), Hostile(11, transport.peer_id)
        tasks = len(asyncio.all_tasks(swarm.loop))
        with model.open_session(max_length=64) as session:
            got = [model.generate(ids, max_new_tokens=4, do_sample=False, session=session)]
            for _ in range(9):
                swarm.run(assault(swarm, peer, hostile, FRAMES // 9))
                got.append(model.generate(None, max_new_tokens=4, do_sample=False, session=session))
        assert torch.equal(torch.cat(got, dim=1), expected)
        assert peer.frames_sent >= FRAMES - 9
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
        peer.let_go()
        swarm.run(asyncio.sleep(120))
        for server in swarm.servers:
            host, compute = server._host, server._compute
            assert host is not None
            assert compute is not None
            assert (server.num_sessions, server._gate.num_streams, server._gate.num_opening) == (0, 0, 0)
            assert (len(host._quotas), host._quotas.nbytes) == (0, 0)
            assert compute.engine.stats().sessions == 0
            training = server._training
            assert training is not None
            trainer = training._trainer
            assert (training.num_runs, len(training._arrivals), trainer.retained.nbytes) == (0, 0, 0)
            assert (len(trainer.quotas), trainer.quotas.nbytes, trainer.passes.stats().passes) == (0, 0, 0)
            store = host.adapters.store
            assert len(store) > 0, "those that were not damaged were taken"
            assert store.nbytes == sum(held.nbytes for held in store._held.values())
        assert len(asyncio.all_tasks(swarm.loop)) <= tasks
