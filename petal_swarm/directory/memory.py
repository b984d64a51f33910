"""A directory within one process, for tests and the simulator: real records, any clock, no network."""

from __future__ import annotations

import time
from collections.abc import Callable

from petal_swarm.directory.book import Bookshelf
from petal_swarm.directory.records import RecordSigner
from petal_swarm.errors import ConfigError
from petal_swarm.net.identity import Identity
from petal_swarm.net.swarm_key import SwarmKey
from petal_swarm.wire.announcement import Announcement


class MemoryRegistry:
    """What all `MemoryDirectory` objects of one swarm share. `now` is in seconds, from any epoch."""

    def __init__(self, *, now: Callable[[], float] = time.time, key: SwarmKey | None = None) -> None:
        self.now = now
        self.key = key
        self.shelf = Bookshelf(now=now, limit=1 << 20, key=key)


class MemoryDirectory:
    """One peer's view of a `MemoryRegistry`; without an `identity`, that of a client."""

    def __init__(self, registry: MemoryRegistry, *, identity: Identity | None = None) -> None:
        self._registry = registry
        self._signer = RecordSigner(identity, now=registry.now, key=registry.key) if identity else None

    async def announce(self, announcement: Announcement, *, ttl_s: float) -> None:
        if self._signer is None:
            raise ConfigError("a directory without an identity cannot announce")
        record, _ = self._signer.sign(announcement, ttl_s=ttl_s)
        self._registry.shelf.book(announcement.model).add(record)

    async def lookup(self, model: str) -> list[Announcement]:
        return self._registry.shelf.book(model).announcements()

    async def records(self, model: str) -> list[bytes]:
        return self._registry.shelf.book(model).records()

    async def close(self) -> None:
        pass
