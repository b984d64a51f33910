"""The other ranks of a server, as its leader commands them: all do the same together, or none ever again."""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
from collections.abc import Iterator, Sequence
from typing import IO, Protocol

import torch
from torch import Tensor

from petal_swarm.engine.ranks import Command, Vote
from petal_swarm.errors import RemoteError
from petal_swarm.models.meetings import Meetings
from petal_swarm.models.rank_sums import Group

logger = logging.getLogger(__name__)

LOST = "a process that computes a part of this server's blocks is gone, so the server leaves"


class Others(Protocol):
    """The processes of the other ranks."""

    @property
    def pipes(self) -> Sequence[IO[bytes]]:
        """Where they take commands, by rank."""
        ...

    def kill(self) -> None:
        """They end, whatever they do; that they are gone is somebody's business. Does not wait."""
        ...

    def end(self) -> None:
        """They end, and nobody misses them."""
        ...


class Crew:
    """The other ranks, as the leader commands them; `group` is with them."""

    def __init__(self, others: Others, group: Group) -> None:
        self.group = group
        self._others = others
        self._pipes = others.pipes
        self._gone = False

    def tell(self, command: Command) -> None:
        data = pickle.dumps(command, pickle.HIGHEST_PROTOCOL)
        for pipe in self._pipes:
            pipe.write(data)
            pipe.flush()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside all ranks do, or none ever again.

        Raises:
            RemoteError: a rank is gone, or something failed at this one and the others wait in vain.
        """
        if self._gone:
            raise RemoteError(LOST)
        try:
            yield
        except BaseException as error:
            if not self._gone:
                self._gone = True
                logger.error("computing with the other ranks failed", exc_info=error)
                self._others.kill()
            if isinstance(error, Exception):
                raise RemoteError(LOST) from error
            raise

    def check(self, one: Tensor, meetings: Meetings) -> None:
        """Look at `one` number of those that are all NaN if a rank lacked memory for them.

        Raises:
            torch.OutOfMemoryError: it did.
        """
        if math.isnan(one.item()):
            self.ask(meetings)

    def ask(self, meetings: Meetings) -> None:
        """Ask all ranks whether they lacked memory since they were asked last.

        Raises:
            torch.OutOfMemoryError: one did.
        """
        with self.together():
            self.tell(Vote())
            lacking = meetings.vote()
        if lacking:
            raise torch.OutOfMemoryError(f"out of memory at ranks {lacking} of those that share the blocks")

    def tell_if_there(self, command: Command) -> None:
        """Of something that they need not keep any more, which they do not once they are gone."""
        with contextlib.suppress(RemoteError), self.together():
            self.tell(command)

    def dismiss(self) -> None:
        """Nothing will be computed any more."""
        self._gone = True
        self._others.end()
