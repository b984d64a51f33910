"""The waiting room where two things happen at once; the rest is tested with whole swarms."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from petal_swarm.server.admission import Request
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.waiting_room import WaitingRoom


def test_who_is_let_in_as_it_leaves_gives_its_room_to_the_next() -> None:
    stats = SimpleNamespace(kv_tokens=100, kv_tokens_free=0)
    compute = SimpleNamespace(engine=SimpleNamespace(stats=lambda: stats))

    async def work() -> None:
        room = WaitingRoom(compute, SessionLimits(), lambda: None)  # type: ignore[arg-type]
        requests = [Request(bytes([number]), "peer", 100) for number in range(3)]
        waiting = [asyncio.create_task(room.enter(request, wait_s=60)) for request in requests]
        await asyncio.sleep(0)
        stats.kv_tokens_free = 100
        waiting[0].cancel()
        room.wake()
        await asyncio.gather(*waiting[1:])
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        assert room.tokens_available == 0
        for request in requests[1:]:
            room.leave(request)
        assert room.tokens_available == 100

    asyncio.run(work())
