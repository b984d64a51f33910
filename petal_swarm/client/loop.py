"""An event loop in a thread of its own, so that blocking code such as `generate` can use the network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from petal_swarm.errors import DeadlineError, StreamClosedError

T = TypeVar("T")

CLOSE_TIMEOUT_S = 10.0


class LoopThread:
    """Starts on creation; `close` ends it."""

    def __init__(self, name: str = "petal-swarm-client") -> None:
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], *, timeout_s: float) -> T:
        """Run a coroutine in the loop and wait for it; on a deadline or Ctrl-C it is cancelled.

        Raises:
            DeadlineError: it took longer than `timeout_s`.
        """
        if self._loop.is_closed():
            work.close()
            raise StreamClosedError("the model is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        return wait(future, timeout_s)

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function in the loop, soon."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            raise StreamClosedError("the model is closed") from None

    def close(self) -> None:
        """Cancel what is left in the loop and end the thread. Idempotent; never called from the loop."""
        if self._loop.is_closed():
            return
        assert threading.current_thread() is not self._thread
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._loop.close()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop loop where it is installed: it takes a tenth of a millisecond off every token."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def wait(future: Future[T], timeout_s: float) -> T:
    """The future's result.

    Raises:
        DeadlineError: none within `timeout_s`; the future is cancelled.
    """
    try:
        return future.result(timeout_s)
    except FutureTimeoutError:
        if future.done():
            raise
        future.cancel()
        raise DeadlineError(f"no answer within {timeout_s:g} s") from None
    except BaseException:
        future.cancel()
        raise


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
