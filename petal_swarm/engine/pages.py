"""Pages of the KV pool: who uses which, with reference counts.

A page is `PAGE_TOKENS` consecutive rows of the pool. Attention reads a sequence without copying where
its pages are consecutive, so the allocator's aim is long runs: a sequence grows into the page behind
its last one, and a new one starts in the middle of the largest gap, which leaves its neighbour room.

A page may be kept for later sessions (`keep`). While nobody else uses it, it is idle: not free, and
given up, the longest idle first, by `drop_oldest_idle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class OutOfPagesError(Exception):
    """There are fewer free pages than asked for. Internal to the engine."""


class AllocatorState(NamedTuple):
    """What a `PageAllocator` knows; not to be changed."""

    counts: list[int]
    kept: set[int]
    idle: dict[int, None]
    free: int


class PageAllocator:
    """Hands out page numbers in `[0, num_pages)`."""

    def __init__(self, num_pages: int) -> None:
        self._counts = [0] * num_pages
        self._kept: set[int] = set()
        self._idle: dict[int, None] = {}  # ordered by when they became idle
        self.total = self.free = num_pages

    @property
    def idle(self) -> int:
        """Kept pages that nobody uses."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """Pages that are free or could be freed."""
        return self.free + len(self._idle)

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """`count` pages, behind page `after` if that is possible, in as few runs as it finds.

        Raises:
            OutOfPagesError: nothing was allocated.
        """
        if count > self.free:
            raise OutOfPagesError
        pages: list[int] = []
        cursor = after + 1 if after is not None else len(self._counts)
        while len(pages) < count:
            if cursor >= len(self._counts) or self._counts[cursor]:
                cursor = self._place(count - len(pages))
            self._counts[cursor] = 1
            pages.append(cursor)
            cursor += 1
        self.free -= count
        return pages

    def share(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._counts[page] += 1
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Give up pages of a sequence, which are in order: the last one becomes idle first."""
        for page in reversed(pages):
            self._counts[page] -= 1
            if self._counts[page] == 0:
                self.free += 1
            elif self._counts[page] == 1 and page in self._kept:
                self._idle[page] = None

    def keep(self, page: int) -> None:
        """Keep a page that is in use when its users have gone."""
        self._kept.add(page)
        self._counts[page] += 1

    def drop_oldest_idle(self) -> int:
        """Free the page that has been idle for longest, and return its number; there must be one."""
        page = next(iter(self._idle))
        del self._idle[page]
        self._kept.remove(page)
        self._counts[page] = 0
        self.free += 1
        return page

    def state(self) -> AllocatorState:
        """Everything there is to know, for `restore`."""
        return AllocatorState(self._counts.copy(), self._kept.copy(), self._idle.copy(), self.free)

    def restore(self, state: AllocatorState) -> None:
        """Undo whatever happened since `state` was asked for."""
        self._counts, self._kept, self._idle, self.free = state

    def shared(self, page: int) -> bool:
        """Whether writing to the page would change what somebody else reads."""
        return self._counts[page] > 1

    def last_user(self, page: int) -> bool:
        """Whether the page is free or idle once one more user has gone."""
        return self._counts[page] - (page in self._kept) == 1

    def _place(self, count: int) -> int:
        """Where to start in the largest gap."""
        best_start, best_length, start = 0, 0, None
        for page, users in enumerate([*self._counts, 1]):
            if users == 0:
                start = page if start is None else start
            elif start is not None:
                if page - start > best_length:
                    best_start, best_length = start, page - start
                start = None
        if best_start == 0 or best_length <= count:
            return best_start
        return best_start + min(best_length // 2, best_length - count)
