"""Many sessions of one client: spread over replicas, opened without asking anew, back where a chat began."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from petal_swarm.client.generation.generator import Generator
from petal_swarm.client.generation.request import GenerationRequest
from petal_swarm.client.ring import Ring
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import FRESH_S, ModelRef
from petal_swarm.errors import CacheFullError
from petal_swarm.routing import Held
from petal_swarm.wire.announcement import Announcement
from tests.swarm.local import LocalSwarm
from tests.swarm.test_generation import GREEDY, expected, generator_of, prompt, tokens_of
from tests.swarm.test_prefixes import RowCounter

#: So slow that round trips, which are measured by a real clock, do not matter beside.
TOKEN_S = 1.0


class Client:
    """Opens sessions of up to 16 tokens; all servers are said to be equally fast."""

    def __init__(self, local: LocalSwarm) -> None:
        self.generator: Generator = generator_of(local)
        self.swarm: Swarm = self.generator.swarm
        self.ref: ModelRef = self.generator.ref
        self.lookups = 0
        self._lookup = self.swarm.directory.lookup
        self.swarm.directory.lookup = self._equal  # type: ignore[method-assign]

    async def _equal(self, model: str) -> list[Announcement]:
        self.lookups += 1
        await asyncio.sleep(0.1)
        return [
            replace(one, block_time_s=TOKEN_S, prefill_tokens_per_s=1 / TOKEN_S, queue_s=0.0, step_time_s=0.0)
            for one in await self._lookup(model)
        ]

    async def open(self, count: int = 1, held: Held | None = None) -> list[Ring]:
        openings = (self.swarm.open_ring(self.ref, max_length=16, held=held) for _ in range(count))
        return await asyncio.gather(*openings)

    async def ask(self, prompt: tuple[int, ...], new_tokens: int) -> tuple[tuple[int, ...], str]:
        """The prompt and its answer, and who gave it, of whom there is one."""
        request = GenerationRequest(prompts=(prompt,), max_new_tokens=new_tokens, sampling=GREEDY)
        generation = self.generator.start(request)
        said = tokens_of([piece async for piece in generation])
        (hop,) = generation.progress.route
        return (*prompt, *said), hop.peer_id


def peers(rings: list[Ring]) -> Counter[str]:
    return Counter(member.peer_id for ring in rings for member in ring.members)


async def close(rings: list[Ring]) -> None:
    await asyncio.gather(*(ring.close() for ring in rings))


@pytest.fixture
def local(bloom: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(bloom, ["0:4", "0:4", "0:4"]) as swarm:
        yield swarm


def test_sessions_opened_at_once_or_in_a_row_spread_over_equal_servers(local: LocalSwarm) -> None:
    client = Client(local)

    async def run() -> None:
        rings = await client.open(6)
        for _ in range(3):
            rings += await client.open()
        assert sorted(peers(rings).values()) == [3, 3, 3]
        left = rings[0].members[0].peer_id
        await close([ring for ring in rings if left in peers([ring])])
        assert peers(await client.open(3)) == {left: 3}

    local.run(run())


def test_who_opens_many_sessions_asks_who_is_there_once_a_second(local: LocalSwarm) -> None:
    client = Client(local)

    async def run() -> None:
        rings = await client.open(8)
        assert client.lookups == 1
        await asyncio.sleep(FRESH_S / 2)
        rings += await client.open(2)
        assert client.lookups == 1
        await asyncio.sleep(FRESH_S)
        rings += await client.open(2)
        assert client.lookups == 2
        await close(rings)

    local.run(run())


def test_a_server_that_died_within_the_second_is_gone_around(local: LocalSwarm) -> None:
    client = Client(local)

    async def run() -> None:
        (ring,) = await client.open()
        dead = ring.members[0].peer_id
        await ring.close()
        local.network.kill(dead)
        rings = await client.open(4)
        assert dead not in peers(rings)
        assert sorted(peers(rings).values()) == [2, 2]
        await close(rings)

    local.run(run())


def test_one_who_gives_up_waiting_does_not_take_the_answer_from_others(local: LocalSwarm) -> None:
    client = Client(local)

    async def run() -> None:
        impatient = asyncio.create_task(client.open())
        patient = asyncio.create_task(client.open())
        await asyncio.sleep(0.05)
        impatient.cancel()
        await close(await patient)
        assert impatient.cancelled()
        assert client.lookups == 1

    local.run(run())


def test_the_next_turn_goes_back_unless_too_many_are_there(local: LocalSwarm) -> None:
    client = Client(local)

    async def run() -> None:
        rings = await client.open()
        hops = rings[0].route.hops
        # 128 steps behind one more session take as long as 128 tokens of the prompt.
        (back,) = await client.open(held=Held(hops, 130))
        (away,) = await client.open(held=Held(hops, 120))
        assert peers([back]) == peers(rings)
        assert peers([away]) != peers(rings)
        await close([*rings, back, away])

    local.run(run())


def test_the_next_turn_goes_elsewhere_when_its_servers_are_full_or_gone(local: LocalSwarm) -> None:
    client = Client(local)

    async def run() -> None:
        (ring,) = await client.open()
        held = Held(ring.route.hops, 1000)
        await ring.close()
        client.swarm.view.blame(held.hops[0].peer_id, CacheFullError("full"))
        (other,) = await client.open(held=held)
        local.network.kill(held.hops[0].peer_id)
        (another,) = await client.open(held=held)
        assert held.hops[0].peer_id not in peers([other, another])
        await close([other, another])

    local.run(run())


def test_turns_of_several_chats_find_what_the_last_ones_left(local: LocalSwarm, bloom: Path) -> None:
    client, counter = Client(local), RowCounter(local)

    async def turns(said: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], str]]:
        return await asyncio.gather(*(client.ask(one, 30) for one in said))

    async def run() -> None:
        first = await turns([prompt(150, seed) for seed in range(3)])
        chats = [said for said, _ in first]
        assert len({peer for _, peer in first}) == 3
        counter.take()
        # In another order, or they would spread to the same servers anyway.
        more = [(*said, *prompt(9, seed=7)) for said in chats[::-1]]
        second = await turns(more)
        assert [peer for _, peer in second] == [peer for _, peer in first][::-1]
        # Of 180 tokens 179 were computed, 176 of them in full pages.
        assert counter.take() == [4 + 9 + 29] * 3
        for asked, (said, _) in zip(more, second, strict=True):
            assert list(said[len(asked) :]) == expected(bloom, asked, 30)

    local.run(run())


def test_a_client_that_shares_nothing_does_not_go_back(local: LocalSwarm) -> None:
    client = Client(local)
    client.swarm.config = replace(client.swarm.config, share_prefixes=False)

    async def run() -> None:
        (ring,) = await client.open()
        (other,) = await client.open(held=Held(ring.route.hops, 1000))
        assert peers([other]) != peers([ring])
        await close([ring, other])

    local.run(run())
