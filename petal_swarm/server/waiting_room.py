"""Where sessions wait for room: the clock and the futures around `Admission`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from petal_swarm.engine.compute import Compute
from petal_swarm.errors import PetalSwarmError, RemoteError
from petal_swarm.server.admission import Admission, Request
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.turnover import Turnover

#: While somebody waits, room is looked for this often: steps that go back to an earlier position free
#: pages without a word, and sessions become idle.
LOOK_S = 0.5


class WaitingRoom:
    """Lives in the event loop. `make_room` is called while somebody waits and does not fit."""

    def __init__(self, compute: Compute, limits: SessionLimits, make_room: Callable[[], None]) -> None:
        self._compute = compute
        self._make_room = make_room
        self._admission = Admission(compute.engine.stats().kv_tokens, limits)
        self._turnover = Turnover()
        self._reclaim_after_s = limits.reclaim_after_s
        self._waiting: dict[bytes, asyncio.Future[None]] = {}
        self._opened_s: dict[bytes, float] = {}
        self._came_s: dict[bytes, float] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def tokens_available(self) -> int:
        """The largest `max_length` that a session arriving now would get without waiting."""
        return self._admission.tokens_available(self._tokens_free)

    @property
    def retry_after_s(self) -> float:
        """In how many seconds one who does not wait here may find room, as far as can be told."""
        return self._turnover.retry_after_s(self._admission.num_open, self._admission.num_waiting)

    async def enter(self, request: Request, *, wait_s: float) -> None:
        """Return when the session may open: it then has room until `leave`. Cancelling leaves the queue.

        Raises:
            CacheFullError, BusyError: there was no room for it within `wait_s`.
        """
        try:
            entered = self._admission.enter(request, self._tokens_free, may_wait=wait_s > 0)
        except RemoteError as error:
            raise self._with_hint(error, request) from None
        if not entered:
            await self._wait(request, wait_s)
        self._opened_s[request.key] = self._loop.time()

    def leave(self, request: Request) -> None:
        """The session has ended, or waits no longer."""
        opened_s = self._opened_s.pop(request.key, None)
        if opened_s is not None:
            self._turnover.ended(self._loop.time() - opened_s)
        self._admission.leave(request)
        self._let_in()

    def wake(self) -> None:
        """Pages were freed."""
        self._let_in()
        if self._admission.next_in_turn is not None:
            self._make_room()

    def over_share(self) -> list[bytes]:
        """Sessions that may end in favour of others: who is next has waited for long, and their peers
        would still have more than an equal share (`Admission.over_share`).
        """
        following = self._admission.next_in_turn
        if following is None or self._loop.time() - self._came_s[following.key] < self._reclaim_after_s:
            return []
        return self._admission.over_share()

    def refuse_all(self, error: PetalSwarmError) -> None:
        """Let nobody in who waits now."""
        for admitted in self._waiting.values():
            if not admitted.done():
                admitted.set_exception(error)

    @property
    def _tokens_free(self) -> int:
        return self._compute.engine.stats().kv_tokens_free

    async def _wait(self, request: Request, wait_s: float) -> None:
        admitted = self._waiting[request.key] = self._loop.create_future()
        self._came_s[request.key] = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(0, self._look)
        try:
            async with asyncio.timeout(wait_s):
                await admitted
        except BaseException as error:
            self.leave(request)
            if not isinstance(error, TimeoutError):
                raise
            refusal = self._admission.refusal(request, self._tokens_free)
            raise self._with_hint(refusal, request) from None
        finally:
            del self._waiting[request.key]
            del self._came_s[request.key]

    def _with_hint(self, error: RemoteError, request: Request) -> RemoteError:
        """Say when to ask again, unless that would never help."""
        if request.max_length <= self._admission.kv_tokens:
            error.retry_after_s = self.retry_after_s
        return error

    def _let_in(self) -> None:
        if self._admission.num_waiting:
            for request in self._admission.admit(self._tokens_free):
                admitted = self._waiting[request.key]
                if not admitted.done():  # else it has just given up, and leaves at once
                    admitted.set_result(None)

    def _look(self) -> None:
        self._timer = None
        self.wake()
        if self._admission.num_waiting:
            self._timer = self._loop.call_later(LOOK_S, self._look)
