"""Prefixes that sessions share: the keys of full pages, and which page holds what a key stands for.

A page's key is a hash of the inputs of its tokens, chained: it stands for everything from position 0
to the page's end. The first hop of a route hashes what it received. A later hop is told keys by the
hop before it, and mixes in who that was (`scoped_key`), so that what one peer says of a prefix is
believed in that peer's own sessions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple

import torch

from petal_swarm.engine.pages import PageAllocator
from petal_swarm.wire.messages.prefixes import PAGE_KEY_BYTES, PAGE_TOKENS


class PrefixScope(NamedTuple):
    """What a session's keys depend on besides its inputs; `hashes` at the first hop of a route."""

    scope: bytes
    hashes: bool


def scoped_key(scope: bytes, key: bytes) -> bytes:
    """The key under which a hop files what the hop before it calls `key`."""
    return blake2b(scope + key, digest_size=PAGE_KEY_BYTES).digest()


def input_keys(before: bytes, hidden: torch.Tensor) -> list[bytes]:
    """Keys of the full pages in `hidden [tokens, hidden_size]` (on the CPU), whose first row starts a page.

    `before` is the key of the page before them, or the scope at position 0.
    """
    keys = []
    for row in range(0, hidden.shape[0] - PAGE_TOKENS + 1, PAGE_TOKENS):
        before = _page_key(before, [hidden[row : row + PAGE_TOKENS]])
        keys.append(before)
    return keys


def _page_key(before: bytes, rows: Sequence[torch.Tensor]) -> bytes:
    digest = blake2b(before, digest_size=PAGE_KEY_BYTES)
    for part in rows:
        flat = part.contiguous()
        # The dtype belongs to the key; numpy has no bfloat16.
        digest.update(str(flat.dtype).encode())
        digest.update((flat.view(torch.int16) if flat.dtype is torch.bfloat16 else flat).numpy().data)
    return digest.digest()


class SequencePrefix:
    """What is known of one sequence: keys of its leading full pages, and the inputs that follow them.

    `length` counts the tokens that are covered. It falls behind the sequence where it was rolled back
    into the middle of a page, whose inputs are not kept; from there on nothing is known.
    """

    __slots__ = ("_rows", "_scope", "keys", "length")

    def __init__(self, scope: PrefixScope) -> None:
        self._scope = scope
        self._rows: list[torch.Tensor] = []
        self.keys: list[bytes] = []
        self.length = 0

    def copy(self) -> SequencePrefix:
        twin = SequencePrefix(self._scope)
        twin._rows, twin.keys, twin.length = list(self._rows), list(self.keys), self.length
        return twin

    @property
    def last_key(self) -> bytes:
        return self.keys[-1] if self.keys else self._scope.scope

    def truncate(self, position: int) -> None:
        """Forget what follows the first `position` tokens."""
        if position >= self.length:
            return
        full, rest = divmod(position, PAGE_TOKENS)
        if full < len(self.keys):
            del self.keys[full:]
            self._rows = []
            self.length = full * PAGE_TOKENS
            return
        self._rows = [torch.cat(self._rows)[:rest]] if rest else []
        self.length = position

    def append(self, position: int, hidden: torch.Tensor) -> None:
        """Inputs of the tokens from `position` on: makes keys of the pages that they complete."""
        if position != self.length:
            return
        count = hidden.shape[0]
        filled = position % PAGE_TOKENS
        self.length += count
        if filled + count < PAGE_TOKENS:
            self._rows.append(hidden.clone())  # lest a few rows keep a message of megabytes alive
            return
        rows = torch.cat([*self._rows, hidden]) if self._rows else hidden
        self.keys += input_keys(self.last_key, rows)
        rest = self.length % PAGE_TOKENS
        self._rows = [rows[len(rows) - rest :].clone()] if rest else []

    def accept(self, first_page: int, keys: Sequence[bytes]) -> None:
        """Keys that the hop before this one gave; those that leave a gap are ignored."""
        if first_page == len(self.keys):
            self.extend([scoped_key(self._scope.scope, key) for key in keys])

    def extend(self, keys: Sequence[bytes]) -> None:
        """Keys of this hop itself, of the pages that follow."""
        self.keys += keys
        self._rows = []
        self.length = len(self.keys) * PAGE_TOKENS


class PrefixIndex:
    """Which page holds which prefix; keeps at most `max_idle_pages` that no session uses any more.

    Pages that no session uses are given up when others need room, the least recently used first. Who uses
    a page uses those before it, or copies of them, and gives them up last page first: the oldest page is
    hardly ever in front of one that stays, which then cannot be found any more and grows old itself.
    """

    def __init__(self, pages: PageAllocator, max_idle_pages: int) -> None:
        self._pages = pages
        self._max_idle_pages = max_idle_pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._dropped: list[tuple[bytes, int]] | None = None

    @property
    def enabled(self) -> bool:
        return self._max_idle_pages > 0

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the leading keys that are known."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def file(self, key: bytes, page: int) -> int:
        """Keep `page` under `key`, and return it; if another page is there already, that one."""
        known = self._page_of.setdefault(key, page)
        if known == page and page not in self._key_of:
            self._key_of[page] = key
            self._pages.keep(page)
        return known

    def make_room(self, pages: int) -> None:
        """Give up idle pages until `pages` are free, or none is idle."""
        while self._pages.free < pages and self._pages.idle:
            self._drop()

    def trim(self) -> None:
        """Give up what is over `max_idle_pages`."""
        while self._pages.idle > self._max_idle_pages:
            self._drop()

    @contextmanager
    def undone_by(self, *errors: type[Exception]) -> Iterator[None]:
        """If the block ends with one of `errors`, pages and keys are what they were before it."""
        before, self._dropped = self._pages.state(), []
        try:
            yield
        except errors:
            self._pages.restore(before)
            for key, page in self._dropped:
                self._page_of[key] = page
                self._key_of[page] = key
            raise
        finally:
            self._dropped = None

    def _drop(self) -> None:
        page = self._pages.drop_oldest_idle()
        key = self._key_of.pop(page)
        del self._page_of[key]
        if self._dropped is not None:
            self._dropped.append((key, page))
