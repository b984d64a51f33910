"""Dialling back: whom it dials, and whom it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from petal_swarm.directory.dial_back import (
    MAX_DIALING,
    PER_S,
    REQUESTS_OF_IP,
    REQUESTS_OF_PEER,
    DialBackService,
    RateLimit,
)
from petal_swarm.wire.messages.directory import DialBack, DialedBack
from petal_swarm.wire.messages.error import Error

from .samples import START_S, Clock

SEEN = "/ip4/203.0.113.7/tcp/40001"


class Doors:
    """Answers at some ports, and notes where somebody knocked."""

    def __init__(self, *answering: int) -> None:
        self.answering = answering
        self.knocks: list[tuple[str, int, str]] = []

    async def __call__(self, ip: str, port: int, peer_id: str) -> bool:
        self.knocks.append((ip, port, peer_id))
        return port in self.answering


def ask(doors: Doors, ports: Sequence[int], seen: str = SEEN) -> DialedBack | Error:
    service = DialBackService(doors, now=Clock(), clock=lambda: START_S)
    return asyncio.run(service.answer(DialBack(tuple(ports)), "alice", seen))


def test_only_the_address_of_the_connection_is_dialled() -> None:
    doors = Doors(31330)
    assert ask(doors, [31330, 80, 80]) == DialedBack(SEEN, (31330, 80), (31330,), START_S)
    assert doors.knocks == [("203.0.113.7", 31330, "alice"), ("203.0.113.7", 80, "alice")]


def test_ipv6() -> None:
    doors = Doors(1)
    ask(doors, [1], "/ip6/2001:db8::7/tcp/5")
    assert doors.knocks == [("2001:db8::7", 1, "alice")]


@pytest.mark.parametrize(
    "seen",
    [
        "",
        "/memory",
        "/ip4/203.0.113.7/tcp/1/p2p/QmRelay/p2p-circuit",
        "/dns4/example.org/tcp/1",
        "/ip4/1.2/tcp/1",
    ],
)
def test_nobody_is_dialled_where_the_address_is_not_the_peers_own(seen: str) -> None:
    doors = Doors(1)
    assert ask(doors, [1], seen) == DialedBack(seen, time_s=START_S)
    assert doors.knocks == []


def test_without_ports_it_says_what_it_sees() -> None:
    assert ask(Doors(), []) == DialedBack(SEEN, time_s=START_S)


def test_a_peer_that_asks_too_often_waits() -> None:
    async def run() -> None:
        clock, doors = Clock(), Doors(1)
        service = DialBackService(doors, now=clock)
        for number in range(REQUESTS_OF_PEER):
            # From other addresses too: it is the peer that counts.
            assert isinstance(
                await service.answer(DialBack((1,)), "alice", f"/ip4/203.0.113.{number}/tcp/1"), DialedBack
            )
        refused = await service.answer(DialBack((1,)), "alice", SEEN)
        assert isinstance(refused, Error)
        assert refused.code == "busy"
        assert len(doors.knocks) == REQUESTS_OF_PEER
        clock.advance(PER_S)
        assert isinstance(await service.answer(DialBack((1,)), "alice", SEEN), DialedBack)

    asyncio.run(run())


def test_many_peers_at_one_address_wait_too() -> None:
    async def run() -> None:
        doors = Doors(1)
        service = DialBackService(doors, now=Clock())
        answers = [
            await service.answer(DialBack((1,)), f"peer {number}", SEEN)
            for number in range(REQUESTS_OF_IP + 1)
        ]
        assert [isinstance(answer, Error) for answer in answers] == [False] * REQUESTS_OF_IP + [True]
        assert len(doors.knocks) == REQUESTS_OF_IP

    asyncio.run(run())


def test_few_are_dialled_at_once() -> None:
    async def run() -> None:
        opened = asyncio.Event()

        async def knock(ip: str, port: int, peer_id: str) -> bool:
            await opened.wait()
            return True

        service = DialBackService(knock, now=Clock())
        waiting = [
            asyncio.create_task(service.answer(DialBack((1,)), f"peer {i}", SEEN)) for i in range(MAX_DIALING)
        ]
        await asyncio.sleep(0)
        assert isinstance(await service.answer(DialBack((1,)), "one more", SEEN), Error)
        opened.set()
        await asyncio.gather(*waiting)
        assert isinstance(await service.answer(DialBack((1,)), "one more", SEEN), DialedBack)

    asyncio.run(run())


def test_the_memory_of_a_rate_limit_is_bounded() -> None:
    limit = RateLimit(1, 60, limit=2, now=Clock())
    assert [limit.allows(key) for key in "aabc"] == [True, False, True, True]
    assert limit.allows("a")  # the one seen longest ago is forgotten
    assert not limit.allows("c")
