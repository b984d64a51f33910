"""Pages of the KV pool: who uses which, with reference counts.

A page is `PAGE_TOKENS` consecutive rows of the pool. Attention reads a sequence without copying where
its pages are consecutive, so the allocator's aim is long runs: a sequence grows into the page behind
its last one, and a new one starts in the middle of the largest gap, which leaves its neighbour room.
"""

from __future__ import annotations

PAGE_TOKENS = 16


class OutOfPagesError(Exception):
    """There are fewer free pages than asked for. Internal to the engine."""


class PageAllocator:
    """Hands out page numbers in `[0, num_pages)`."""

    def __init__(self, num_pages: int) -> None:
        self._counts = [0] * num_pages
        self.total = self.free = num_pages

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

    def share(self, pages: list[int]) -> None:
        for page in pages:
            self._counts[page] += 1

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self._counts[page] -= 1
            if self._counts[page] == 0:
                self.free += 1

    def state(self) -> tuple[list[int], int]:
        """Everything there is to know, for `restore`."""
        return self._counts.copy(), self.free

    def restore(self, state: tuple[list[int], int]) -> None:
        """Undo whatever happened since `state` was asked for."""
        self._counts, self.free = state

    def shared(self, page: int) -> bool:
        return self._counts[page] > 1

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
