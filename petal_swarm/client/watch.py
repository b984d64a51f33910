"""Looking at a swarm again and again, and telling everybody who watches what has changed.

There is one look for all, whoever watches: each has only read up to some version of the same bounded log, so
that nobody, however slow, costs more than a number. Who has fallen behind its beginning is shown the
whole again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from petal_swarm.client.changes import Event, changes, looks_different
from petal_swarm.client.status import Status, in_order, is_busy
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.directory.remote import Pinger
from petal_swarm.errors import PetalSwarmError
from petal_swarm.routing.blocks import latest
from petal_swarm.wire.announcement import Announcement

logger = logging.getLogger(__name__)

#: Pauses between two looks while somebody watches, and while nobody does.
WATCHED_S = 2.0
UNWATCHED_S = 30.0
#: While somebody is expected to answer soon, looks are frequent, whoever watches.
EXPECTED_S = 60.0
#: So many are asked at once whether they are there: none of them waits for one that is not.
PINGS_AT_ONCE = 64
#: Of a large swarm, so many in each look; in the next one others.
PINGS_A_LOOK = 48
#: Who did not answer is asked again after so long, who was expected after a shorter time.
SILENT_AGAIN_S = 8.0
EXPECTED_AGAIN_S = 1.5
#: A session that finds a server where no ping did has it asked; so often at most.
VOUCHED_AGAIN_S = 1.0
PING_TIMEOUT_S = 2.0
#: Of each, the newest are kept.
MAX_CHANGES = 256
MAX_EVENTS = 200
#: A swarm of more servers than these is shown in part, those of the first blocks first.
MAX_PEERS = 1000

#: Instead of one event for each server.
LOST = Event("lost", "the swarm cannot be reached")
FOUND = Event("found", "the swarm can be reached again")


@dataclass(frozen=True, slots=True)
class Happening:
    """An event, its number in this watch, and when it was seen, in seconds since 1970."""

    number: int
    at_s: float
    event: Event


@dataclass(frozen=True, slots=True)
class Change:
    """From the version before to `version`. `different` and `gone` are peer ids."""

    version: int
    at_s: float
    status: Status
    different: frozenset[str]
    gone: frozenset[str]
    happenings: tuple[Happening, ...]
    trouble: str | None


class SwarmWatch:
    """Lives in one event loop; closes nothing that it was given.

    `now` gives the time of day in seconds since 1970. Until the first look is over, `status` is None;
    `trouble` says why the swarm cannot be asked, while it cannot.
    """

    def __init__(
        self, swarm: Swarm, model: ModelRef, name: str, *, now: Callable[[], float] = time.time
    ) -> None:
        self._view = swarm.view
        self._pinger = Pinger(swarm.transport, parallel=PINGS_AT_ONCE)
        self._model = model
        self._name = name
        self._now = now
        self._loop = asyncio.get_running_loop()
        #: Numbers and versions are of this watch alone.
        self.id = secrets.token_hex(4)
        self._watchers = 0
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self._looked = asyncio.Event()
        self._looked_s = -math.inf
        self._asked_s: dict[str, float] = {}
        self._rtts_s: dict[str, float] = {}
        #: What was known of a server when it was asked last: another record is a sign of life.
        self._asked: dict[str, Announcement] = {}
        #: Since when a server has been silent, and which have never answered since they came.
        self._silent_s: dict[str, float] = {}
        self._new: set[str] = set()
        self._vouched_s = -math.inf
        self._log: deque[Change] = deque(maxlen=MAX_CHANGES)
        self._numbers = 0
        self.version = 0
        self.status: Status | None = None
        self.trouble: str | None = None
        self.happenings: deque[Happening] = deque(maxlen=MAX_EVENTS)
        self._view.listeners.append(self._session_saw)
        self._view.witnesses.append(self._session_found)
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(lambda _: self._looked.set())

    @property
    def watchers(self) -> int:
        return self._watchers

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While somebody does, looks are frequent."""
        self._watchers += 1
        self._wake.set()
        try:
            yield
        finally:
            self._watchers -= 1

    def since(self, version: int) -> Sequence[Change] | None:
        """What came after that version; None if that is not known any more, or never was."""
        if version > self.version or (version < self.version and not self._log):
            return None
        if version < self.version and self._log[0].version > version + 1:
            return None
        return [change for change in self._log if change.version > version]

    async def later_than(self, version: int, *, timeout_s: float) -> bool:
        """Wait until there is something after that version; whether there is. Cancelling does no harm."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.version <= version:
                    await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def fresh(self, max_age_s: float) -> Status | None:
        """What was seen at most so long ago; looks now if need be. None once this is closed."""
        while self._loop.time() - self._looked_s > max_age_s and not self._task.done():
            looked = self._looked
            self._wake.set()
            await looked.wait()
        return self.status

    async def close(self) -> None:
        """Look no more. Who waits for news goes on waiting. Idempotent."""
        with contextlib.suppress(ValueError):
            self._view.listeners.remove(self._session_saw)
            self._view.witnesses.remove(self._session_found)
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._look()
            except PetalSwarmError as error:
                logger.info("watch: the swarm cannot be asked: %s", error)
                self._lose(str(error))
            except (
                Exception
            ):  # as a process that has no file left: who reads `status` must not take it for news
                logger.exception("watch: a look failed")
                self._lose("the look failed")
            self._looked_s = self._loop.time()
            looked, self._looked = self._looked, asyncio.Event()
            looked.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCHED_S if self._is_in_a_hurry() else UNWATCHED_S):
                    await self._wake.wait()

    def _is_in_a_hurry(self) -> bool:
        return bool(self._watchers) or any(map(self._is_expected, self._silent_s))

    async def _look(self) -> None:
        found = in_order(latest(await self._view.announcements(self._model.key)))[:MAX_PEERS]
        there = {peer.peer_id for peer in found}
        self._new = (self._new & there) | self._newcomers(found)
        for known in (self._asked_s, self._asked, self._rtts_s, self._silent_s):
            for peer_id in known.keys() - there:
                del known[peer_id]
        await self._ping(found)
        was_busy = self.status.busy if self.status else frozenset()
        status = Status(
            self._name,
            self._model.key,
            self._model.num_blocks,
            found,
            dict(self._rtts_s),
            frozenset(
                peer.peer_id
                for peer in found
                if peer.peer_id in self._rtts_s and is_busy(peer, was=peer.peer_id in was_busy)
            ),
            frozenset(peer.peer_id for peer in found if self._is_joining(peer)),
        )
        self._publish(status, trouble=None)

    def _newcomers(self, found: Sequence[Announcement]) -> set[str]:
        """Who was not there at the look before; of those of the first look, who says that it is not ready."""
        if self.status is None:
            return {peer.peer_id for peer in found if peer.state == "joining"}
        return {peer.peer_id for peer in found} - {peer.peer_id for peer in self.status.announcements}

    async def _ping(self, found: Sequence[Announcement]) -> None:
        """Ask new ones, and the rest in turn. One answer that is late is no failure: it is asked again."""
        due = self._due(found)
        for start in range(0, len(due), PINGS_AT_ONCE):
            batch = due[start : start + PINGS_AT_ONCE]
            asked_s = self._loop.time()
            answers = await self._measure(batch)
            late = [p for p in batch if p.peer_id not in answers and p.peer_id in self._rtts_s]
            answers |= await self._measure(late) if late else {}
            for peer in batch:
                self._asked_s[peer.peer_id] = asked_s
                self._asked[peer.peer_id] = peer
                if peer.peer_id in answers:
                    self._rtts_s[peer.peer_id] = answers[peer.peer_id]
                    self._silent_s.pop(peer.peer_id, None)
                    self._new.discard(peer.peer_id)
                else:
                    self._rtts_s.pop(peer.peer_id, None)
                    self._silent_s.setdefault(peer.peer_id, asked_s)

    async def _measure(self, peers: Sequence[Announcement]) -> dict[str, float]:
        return await self._pinger.measure(peers, timeout_s=PING_TIMEOUT_S, max_age_s=0.0)

    def _due(self, found: Sequence[Announcement]) -> list[Announcement]:
        new = [peer for peer in found if peer.peer_id not in self._asked_s]
        known = [
            peer
            for peer in found
            if peer.peer_id in self._asked_s and (peer.peer_id in self._rtts_s or self._may_be_back(peer))
        ]
        known.sort(key=lambda peer: self._asked_s[peer.peer_id])
        return new + known[: max(0, PINGS_A_LOOK - len(new))]

    def _may_be_back(self, peer: Announcement) -> bool:
        """Whether it is time to ask a silent server again."""
        again_s = EXPECTED_AGAIN_S if self._is_expected(peer.peer_id) else SILENT_AGAIN_S
        waited_s = self._loop.time() - self._asked_s[peer.peer_id]
        return waited_s >= again_s or peer != self._asked.get(peer.peer_id)

    def _is_expected(self, peer_id: str) -> bool:
        """Whether a silent server is likely to answer soon: it has just come, or just failed."""
        return self._loop.time() - self._silent_s.get(peer_id, -math.inf) < EXPECTED_S

    def _is_joining(self, peer: Announcement) -> bool:
        """Whether it is silent since it is not ready yet. It may load for long, and says so."""
        if peer.peer_id in self._rtts_s:
            return False
        is_new = peer.peer_id in self._new
        return is_new and (peer.state == "joining" or self._is_expected(peer.peer_id))

    def _session_saw(self, peer_id: str, error: PetalSwarmError) -> None:
        """A server failed a session of this process. That is known at once; the next look asks the server."""
        status = self.status
        if status is None or peer_id not in status.rtts_s:
            return
        logger.info("watch: %s failed a session: %s", peer_id, error)
        self._rtts_s.pop(peer_id, None)
        self._asked_s.pop(peer_id, None)
        self._silent_s[peer_id] = self._loop.time()
        if not self._watchers:
            self._wake.set()
        rtts_s = {peer: rtt_s for peer, rtt_s in status.rtts_s.items() if peer != peer_id}
        self._publish(replace(status, rtts_s=rtts_s, busy=status.busy - {peer_id}), trouble=self.trouble)

    def _session_found(self, peer_id: str) -> None:
        """A server that is held for silent, or is not known yet, serves a session: it is asked at once."""
        if peer_id in self._rtts_s:
            return
        self._asked_s.pop(peer_id, None)
        if self._loop.time() - self._vouched_s >= VOUCHED_AGAIN_S:
            self._vouched_s = self._loop.time()
            self._wake.set()

    def _lose(self, trouble: str) -> None:
        """Whoever cannot ask anybody cannot use anybody either."""
        for known in (self._asked_s, self._asked, self._rtts_s, self._silent_s):
            known.clear()
        self._new.clear()
        status = self.status or Status(self._name, self._model.key, self._model.num_blocks, (), {})
        self._publish(replace(status, rtts_s={}, busy=frozenset(), joining=frozenset()), trouble=trouble)

    def _publish(self, status: Status, *, trouble: str | None) -> None:
        old = self.status or replace(status, announcements=())
        events = self._events(status, trouble)
        different = looks_different(old, status)
        gone = frozenset(p.peer_id for p in old.announcements) - {p.peer_id for p in status.announcements}
        is_first = self.status is None
        self.status, self.trouble = status, trouble
        if not (is_first or events or different or gone):
            return
        at_s = self._now()
        happenings = tuple(Happening(self._numbers + n, at_s, event) for n, event in enumerate(events, 1))
        self._numbers += len(happenings)
        self.happenings.extend(happenings)
        self.version += 1
        self._log.append(Change(self.version, at_s, status, different, gone, happenings, trouble))
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _events(self, status: Status, trouble: str | None) -> list[Event]:
        """What is told of this look; nothing that was there before the first one is news."""
        events = list(changes(self.status, status)) if self.status else []
        if (trouble is None) == (self.trouble is None):
            return events
        told = LOST if trouble is not None else FOUND
        return [told, *(event for event in events if event.kind not in ("failed", "back"))]
