"""Keeps one server's announcement alive, and takes it back when the server leaves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable

from petal_swarm.directory.directory import Directory
from petal_swarm.errors import PetalSwarmError
from petal_swarm.wire.announcement import Announcement

logger = logging.getLogger(__name__)

#: A record survives two refreshes that fail, and a server that died is gone after at most 12 s.
REFRESH_S = 4.0
TTL_S = 12.0
LEAVE_TIMEOUT_S = 3.0


class Announcer:
    """Owns the refresh task. What fails is logged and tried again with the next refresh."""

    def __init__(
        self,
        directory: Directory,
        announcement: Announcement,
        *,
        refresh_s: float = REFRESH_S,
        ttl_s: float = TTL_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._directory = directory
        self._announcement = announcement
        self._refresh_s = refresh_s
        self._ttl_s = ttl_s
        self._sleep = sleep
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._left = False

    @property
    def announcement(self) -> Announcement:
        """What the next refresh sends."""
        return self._announcement

    async def start(self) -> None:
        """Announce once, then refresh every `refresh_s` in a task. Never raises for the network's sake."""
        assert self._task is None, "started twice"
        await self.refresh_now()
        self._task = asyncio.create_task(self._refresh_forever(), name="announcer")

    def update(self, announcement: Announcement) -> None:
        """Send these figures with the next refresh."""
        self._announcement = announcement

    async def refresh_now(self) -> bool:
        """Announce without waiting for the next refresh; whether it succeeded. After `leave`, a no-op."""
        # One at a time: a record must not be overtaken by the one before it.
        async with self._lock:
            if self._left:
                return False
            try:
                async with asyncio.timeout(self._ttl_s):
                    await self._directory.announce(self._announcement, ttl_s=self._ttl_s)
            except (PetalSwarmError, TimeoutError) as error:
                logger.warning("announcing failed, next try in %g s: %s", self._refresh_s, error or "timeout")
            except Exception:
                # The task must outlive whatever is wrong with one refresh.
                logger.exception("announcing failed, next try in %g s", self._refresh_s)
            else:
                return True
            return False

    async def leave(self, *, timeout_s: float = LEAVE_TIMEOUT_S) -> None:
        """Stop refreshing and announce state "left", within `timeout_s`. Idempotent; failures are logged."""
        if self._left:
            return
        self._left = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        farewell = dataclasses.replace(self._announcement, state="left")
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                await self._directory.announce(farewell, ttl_s=self._ttl_s)
        except (PetalSwarmError, TimeoutError) as error:
            logger.warning(
                "could not say goodbye, others notice within %g s: %s", self._ttl_s, error or "timeout"
            )

    async def _refresh_forever(self) -> None:
        while True:
            await self._sleep(self._refresh_s)
            await self.refresh_now()
