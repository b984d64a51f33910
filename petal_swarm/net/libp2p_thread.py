"""A trio run in a thread of its own, and the two-way bridge to an asyncio loop.

py-libp2p runs on trio, everything else here on asyncio. A call in either direction is an append to a
queue and a wake-up, about 30 us; nothing on either side ever waits for the other in a blocking way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, TypeVarTuple

from petal_swarm.errors import NetworkError

if TYPE_CHECKING:
    import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

logger = logging.getLogger(__name__)


class TrioThread:
    """Made by `start`; ended by `stop`, or by the end of the asyncio loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._started: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._calls: set[_Call[Any]] = set()

    @classmethod
    async def start(cls, name: str) -> TrioThread:
        thread = cls(asyncio.get_running_loop(), name)
        thread._thread.start()
        await asyncio.shield(thread._started)
        return thread

    # -- from asyncio to trio

    def post(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Run `function` in the trio thread, in the order of the posts; dropped when trio has ended.

        It must not raise: that would be the end of the trio thread.
        """
        if self._token is not None:
            with contextlib.suppress(RuntimeError):  # trio.RunFinishedError, which cannot be imported here
                self._token.run_sync_soon(function, *args)

    async def call(
        self,
        function: Callable[[*Ts], Awaitable[T]],
        *args: *Ts,
        discard: Callable[[T], object] | None = None,
    ) -> T:
        """Run an async function in a trio task. Cancelling cancels the task; a result that comes all the same
        is given to `discard`, in the trio thread.

        Raises:
            NetworkError: trio has ended; and whatever `function` raises.
        """
        if self._nursery is None or self._ended.done():
            raise NetworkError("the transport is closed")
        call = _Call(self, function, args, discard)
        self._calls.add(call)
        self.post(self._spawn, call)
        try:
            return await call.future
        except asyncio.CancelledError:
            call.drop()
            raise
        finally:
            self._calls.discard(call)
            self.post(call.abandon)

    async def stop(self, timeout_s: float) -> None:
        """Cancel everything in the trio thread and wait for its end, at most `timeout_s`."""
        self.post(self._cancel)
        await asyncio.wait([self._ended], timeout=timeout_s)
        if self._ended.done():
            self._thread.join(timeout_s)  # its last act was to set the future: this returns at once
        else:
            logger.warning("the trio thread did not end within %g s", timeout_s)

    def on_end(self, function: Callable[[], object]) -> None:
        """Call `function` in the loop once trio has ended, for whatever reason."""
        self._ended.add_done_callback(lambda _: function())

    # -- from trio to asyncio

    def reply(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Run `function` in the asyncio loop; if that is closed, there is nobody left to work for."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            self._cancel()

    def spawn(self, function: Callable[[*Ts], Awaitable[object]], *args: *Ts) -> None:
        """Start a background task; from the trio thread only. Dropped when trio is about to end."""
        assert self._nursery is not None
        with contextlib.suppress(RuntimeError):  # the nursery is closed to new arrivals
            self._nursery.start_soon(function, *args)

    # -- inside

    def _run(self) -> None:
        try:
            import trio

            trio.run(self._main)
        except BaseException:
            logger.exception("the trio thread failed")
        finally:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._on_end)

    async def _main(self) -> None:
        import trio

        async with trio.open_nursery() as nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._nursery = nursery
            self.reply(_set, self._started)
            await trio.sleep_forever()

    def _cancel(self) -> None:
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def _spawn(self, call: _Call[Any]) -> None:
        self.spawn(call.run)

    def _on_end(self) -> None:
        _set(self._started)
        _set(self._ended)
        for call in self._calls:
            if not call.future.done():
                call.future.set_exception(NetworkError("the transport is closed"))


class _Call(Generic[T]):
    """One async function running in trio for an asyncio future."""

    def __init__(
        self,
        thread: TrioThread,
        function: Callable[..., Awaitable[T]],
        args: tuple[Any, ...],
        discard: Callable[[T], object] | None,
    ) -> None:
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._thread = thread
        self._function = function
        self._args = args
        self._discard = discard
        self._scope: trio.CancelScope | None = None
        self._abandoned = False

    async def run(self) -> None:
        import trio

        with trio.CancelScope() as self._scope:
            if self._abandoned:
                return
            try:
                result = await self._function(*self._args)
            except Exception as error:
                self._thread.reply(self._fail, error)
            else:
                self._thread.reply(self._finish, result)

    def abandon(self) -> None:
        """The caller no longer waits: in the trio thread."""
        self._abandoned = True
        if self._scope is not None:
            self._scope.cancel()

    def drop(self) -> None:
        """The caller was cancelled, maybe when the result was there already: in the loop."""
        future = self.future
        if self._discard is not None and future.done() and not future.cancelled() and not future.exception():
            self._thread.post(self._discard, future.result())

    def _finish(self, result: T) -> None:
        if not self.future.done():
            self.future.set_result(result)
        elif self._discard is not None:
            self._thread.post(self._discard, result)

    def _fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
