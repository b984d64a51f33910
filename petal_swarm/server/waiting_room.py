"""Where sessions wait for room: the clock and the futures around `Admission`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from petal_swarm.engine.compute import Compute
from petal_swarm.errors import PetalSwarmError
from petal_swarm.server.admission import Admission, Request
from petal_swarm.server.config import SessionLimits

#: While somebody waits, room is looked for this often: steps that go back to an earlier position free
#: pages without a word, and sessions become idle.
LOOK_S = 0.5


class WaitingRoom:
    """Lives in the event loop. `make_room` is called while somebody waits and does not fit."""

    def __init__(self, compute: Compute, limits: SessionLimits, make_room: Callable[[], None]) -> None:
        self._compute = compute
        self._make_room = make_room
        self._admission = Admission(compute.engine.stats().kv_tokens, limits)
        self._waiting: dict[bytes, asyncio.Future[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def tokens_available(self) -> int:
        """The largest `max_length` that a session arriving now would get without waiting."""
        return self._admission.tokens_available(self._tokens_free)

    async def enter(self, request: Request, *, wait_s: float) -> None:
        """Return when the session may open: it then has room until `leave`. Cancelling leaves the queue.

        Raises:
            CacheFullError, BusyError: there was no room for it within `wait_s`.
        """
        if self._admission.enter(request, self._tokens_free, may_wait=wait_s > 0):
            return
        admitted = self._waiting[request.key] = self._loop.create_future()
        if self._timer is None:
            self._timer = self._loop.call_later(0, self._look)
        try:
            async with asyncio.timeout(wait_s):
                await admitted
        except BaseException as error:
            self.leave(request)
            if not isinstance(error, TimeoutError):
                raise
            raise self._admission.refusal(request, self._tokens_free) from None
        finally:
            del self._waiting[request.key]

    def leave(self, request: Request) -> None:
        """The session has ended, or waits no longer."""
        self._admission.leave(request)
        self._let_in()

    def wake(self) -> None:
        """Pages were freed."""
        self._let_in()
        if self._admission.num_waiting:
            self._make_room()

    def refuse_all(self, error: PetalSwarmError) -> None:
        """Let nobody in who waits now."""
        for admitted in self._waiting.values():
            if not admitted.done():
                admitted.set_exception(error)

    @property
    def _tokens_free(self) -> int:
        return self._compute.engine.stats().kv_tokens_free

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
