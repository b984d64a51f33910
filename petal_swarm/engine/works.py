"""Work in pieces, such as a training pass: done between batches, a piece at a time, peers by turns."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias, TypeVar

from petal_swarm.errors import PetalSwarmError, RemoteError
from petal_swarm.models.devices import is_out_of_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: A piece for each `next`; the result comes by `return`.
Pieces: TypeAlias = Generator[None, None, T]


class Work(NamedTuple):
    """What is to be done for `peer`, and where the result goes. Cancelling the future ends it early."""

    pieces: Pieces[Any]
    future: Future[Any]
    peer: str

    def advance(self) -> bool:
        """Do the next piece; False if there is none any more, and the future has its result."""
        if self.future.cancelled():
            self.drop()
            return False
        try:
            next(self.pieces)
        except StopIteration as end:
            if self.future.set_running_or_notify_cancel():
                self.future.set_result(end.value)
            return False
        except Exception as error:
            self.fail(error if isinstance(error, PetalSwarmError) else internal_error(error))
            return False
        return True

    def fail(self, error: PetalSwarmError) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def drop(self) -> None:
        """Let go of what a half-done piece of work holds."""
        try:
            self.pieces.close()
        except Exception:
            logger.exception("work could not be ended")


class Works:
    """Keeps works until they are done. The peer that had the least time goes next, with its oldest work."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Work]] = {}
        self._served_s: dict[str, float] = {}

    def __len__(self) -> int:
        """How many peers have work here."""
        return len(self._queues)

    def add(self, work: Work) -> None:
        """Its turn comes; a peer that had no work here starts with the least time of those that have."""
        if work.peer not in self._queues:
            self._queues[work.peer] = deque()
            self._served_s[work.peer] = min(self._served_s.values(), default=0.0)
        self._queues[work.peer].append(work)

    def advance(self, clock: Callable[[], float]) -> float:
        """Do one piece of somebody's work, and return the seconds it took. There is some."""
        peer = min(self._queues, key=lambda peer: self._served_s[peer])
        queue = self._queues[peer]
        started = clock()
        going_on = queue[0].advance()
        elapsed = clock() - started
        self._served_s[peer] += elapsed
        if not going_on:
            queue.popleft()
            if not queue:
                del self._queues[peer], self._served_s[peer]
        return elapsed

    def clear(self, error: PetalSwarmError) -> None:
        """Everything here fails."""
        queues = list(self._queues.values())
        self._queues.clear()
        self._served_s.clear()
        for queue in queues:
            for work in queue:
                work.drop()
                work.fail(error)


def internal_error(error: Exception) -> RemoteError:
    """What whoever asked for work is told of a bug or a lack of memory; the details are for this log."""
    if is_out_of_memory(error):
        logger.warning("out of memory: %s", str(error).partition("\n")[0])
        return RemoteError("the server has no memory left for this; use another server, or try again")
    logger.error("computing failed", exc_info=error)
    return RemoteError(f"the server failed to compute: {type(error).__name__}")
