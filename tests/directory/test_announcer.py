"""The refresh task of a server, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from petal_swarm.directory.announcer import REFRESH_S, TTL_S, Announcer
from petal_swarm.directory.memory import MemoryDirectory, MemoryRegistry
from petal_swarm.errors import NetworkError
from petal_swarm.net.identity import Identity
from petal_swarm.wire.announcement import Announcement

from .samples import MODEL, Clock, announcement

ALICE = Identity.generate()


class FlakyDirectory(MemoryDirectory):
    """Fails, or hangs, as the test says."""

    failure: Exception | None = None
    hangs = False
    calls = 0

    async def announce(self, announcement: Announcement, *, ttl_s: float) -> None:
        self.calls += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.failure:
            raise self.failure
        await super().announce(announcement, ttl_s=ttl_s)


class Stage:
    """A server's announcer, its directory, and time that passes when told to."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.directory = FlakyDirectory(MemoryRegistry(now=self.clock), identity=ALICE)
        self._wake = asyncio.Semaphore(0)
        self.announcer = Announcer(self.directory, announcement(ALICE), sleep=self._sleep)

    async def pass_refresh(self) -> None:
        """Let the time of one refresh pass, and the refresh happen."""
        self.clock.advance(REFRESH_S)
        self._wake.release()
        for _ in range(10):
            await asyncio.sleep(0)

    async def visible(self) -> list[Announcement]:
        return await self.directory.lookup(MODEL)

    async def _sleep(self, seconds: float) -> None:
        assert seconds == REFRESH_S
        await self._wake.acquire()


def play(scenario: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        stage = Stage()
        try:
            await scenario(stage)
        finally:
            stage.directory.hangs = False
            await stage.announcer.leave()

    asyncio.run(run())


def test_a_record_stays_alive_by_refreshes_with_the_latest_figures() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.announcer.start()
        assert await stage.visible() == [announcement(ALICE)]
        busier = announcement(ALICE, queue_s=0.5)
        stage.announcer.update(busier)
        assert await stage.visible() == [announcement(ALICE)]
        for _ in range(5):
            await stage.pass_refresh()
            assert await stage.visible() == [busier]

    play(scenario)


def test_refresh_now_does_not_wait() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.announcer.start()
        stage.announcer.update(announcement(ALICE, state="joining"))
        assert await stage.announcer.refresh_now()
        assert [entry.state for entry in await stage.visible()] == ["joining"]

    play(scenario)


@pytest.mark.parametrize("failure", [NetworkError("nobody there"), RuntimeError("a bug")])
def test_failures_are_logged_and_tried_again(failure: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(stage: Stage) -> None:
        stage.directory.failure = failure
        await stage.announcer.start()
        assert await stage.visible() == []
        stage.directory.failure = None
        await stage.pass_refresh()
        assert await stage.visible() == [announcement(ALICE)]

    with caplog.at_level(logging.WARNING):
        play(scenario)
    assert "announcing failed, next try in 4 s" in caplog.text


def test_two_failed_refreshes_are_survived_and_a_dead_server_expires() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.announcer.start()
        stage.directory.failure = NetworkError("nobody there")
        await stage.pass_refresh()
        await stage.pass_refresh()
        assert await stage.visible() == [announcement(ALICE)]
        await stage.pass_refresh()
        assert stage.directory.calls == 4
        assert await stage.visible() == []

    play(scenario)


def test_leaving_takes_the_record_back_at_once_and_for_good() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.announcer.start()
        await stage.announcer.leave()
        assert await stage.visible() == []
        assert len(await stage.directory.records(MODEL)) == 1
        calls = stage.directory.calls
        await stage.pass_refresh()
        assert not await stage.announcer.refresh_now()
        await stage.announcer.leave()
        assert stage.directory.calls == calls

    play(scenario)


def test_leaving_is_bounded_and_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.announcer.start()
        stage.directory.hangs = True
        await stage.announcer.leave(timeout_s=0.01)

    with caplog.at_level(logging.WARNING):
        play(scenario)
    assert f"others notice within {TTL_S:g} s" in caplog.text


def test_a_refresh_in_flight_does_not_overtake_the_farewell() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.announcer.start()
        stage.directory.hangs = True
        refresh = asyncio.create_task(stage.announcer.refresh_now())
        await asyncio.sleep(0)
        leaving = asyncio.create_task(stage.announcer.leave())
        await asyncio.sleep(0)
        stage.directory.hangs = False
        refresh.cancel()
        await leaving
        assert await stage.visible() == []

    play(scenario)


def test_the_announcement_is_what_was_last_given() -> None:
    async def scenario(stage: Stage) -> None:
        latest = dataclasses.replace(announcement(ALICE), name="new")
        stage.announcer.update(latest)
        assert stage.announcer.announcement == latest

    play(scenario)
