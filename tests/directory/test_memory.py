"""`MemoryDirectory` means what the DHT means."""

from __future__ import annotations

import asyncio

import pytest

from petal_swarm.directory.directory import Directory
from petal_swarm.directory.memory import MemoryDirectory, MemoryRegistry
from petal_swarm.directory.records import read_record
from petal_swarm.errors import ConfigError, LocalProtocolError
from petal_swarm.net.identity import Identity

from .samples import MODEL, Clock, announcement

ALICE, BOB = Identity.generate(), Identity.generate()


def test_peers_see_each_other_until_they_leave_or_expire() -> None:
    async def scenario() -> None:
        clock = Clock()
        registry = MemoryRegistry(now=clock)
        alice: Directory = MemoryDirectory(registry, identity=ALICE)
        bob: Directory = MemoryDirectory(registry, identity=BOB)
        client: Directory = MemoryDirectory(registry)
        await alice.announce(announcement(ALICE), ttl_s=12)
        await bob.announce(announcement(BOB), ttl_s=30)
        seen = await client.lookup(MODEL)
        assert seen == sorted([announcement(ALICE), announcement(BOB)], key=lambda entry: entry.peer_id)
        assert await client.lookup("other") == []
        await bob.announce(announcement(BOB, state="left"), ttl_s=12)
        assert await client.lookup(MODEL) == [announcement(ALICE)]
        states = [read_record(record, now=clock())[0].state for record in await client.records(MODEL)]
        assert states == ["serving", "left"]
        clock.advance(12)
        assert await client.lookup(MODEL) == []
        await client.close()

    asyncio.run(scenario())


def test_a_client_and_an_impostor_cannot_announce() -> None:
    registry = MemoryRegistry(now=Clock())
    with pytest.raises(ConfigError, match="without an identity"):
        asyncio.run(MemoryDirectory(registry).announce(announcement(ALICE), ttl_s=12))
    with pytest.raises(LocalProtocolError, match="cannot sign for"):
        asyncio.run(MemoryDirectory(registry, identity=BOB).announce(announcement(ALICE), ttl_s=12))
