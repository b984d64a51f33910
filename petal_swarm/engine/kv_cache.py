"""The KV cache of many sessions: which rows of the pool hold which positions of which sequence.

Memory is in proportion to the tokens in use. Positions are absolute: extending a sequence at position
p truncates it to p first, so that rollback, re-sending and resuming are one mechanism. Forks share
pages; a page that two sequences share is copied before one of them writes to it. This file moves page
numbers only; the caller copies the rows that `Placement.copies` names.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from petal_swarm.engine.pages import PAGE_TOKENS, OutOfPagesError, PageAllocator
from petal_swarm.errors import (
    BadMessageError,
    CacheFullError,
    RemoteError,
    SessionTooLongError,
    UnknownSessionError,
)
from petal_swarm.span import Slice


class Placement(NamedTuple):
    """Where one slice lives: `extents` hold positions `0..slice.end`; `copies` are (from, to, rows)."""

    extents: tuple[tuple[int, int], ...]
    copies: tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class _Cached:
    """One sequence: its pages in order, their rows with neighbours joined, and how many tokens are valid."""

    pages: list[int] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)
    length: int = 0


@dataclass(slots=True)
class _Session:
    max_length: int
    sequences: dict[int, _Cached] = field(default_factory=dict)

    def copy(self) -> dict[int, _Cached]:
        """The sequences as they are now, to go back to."""
        return {
            number: _Cached(list(cached.pages), cached.runs, cached.length)
            for number, cached in self.sequences.items()
        }


class KVCache:
    """Page tables of all sessions over a pool of `tokens` rows. Not thread-safe."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens // PAGE_TOKENS * PAGE_TOKENS
        self._pages = PageAllocator(self.tokens // PAGE_TOKENS)
        self._sessions: dict[Hashable, _Session] = {}

    @property
    def tokens_free(self) -> int:
        return self._pages.free * PAGE_TOKENS

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def open(self, key: Hashable, max_length: int) -> None:
        """Begin a session whose sequences may each grow to `max_length` tokens. Takes no memory yet.

        Raises:
            CacheFullError: `max_length` tokens could not be held even now.
        """
        if max_length > self.tokens_free:
            raise CacheFullError(
                f"the KV cache has {self.tokens_free} of {self.tokens} tokens free, the session wants"
                f" {max_length}; ask for a smaller max_length or raise --kv-tokens on the server"
            )
        assert key not in self._sessions, "a session is opened once"
        self._sessions[key] = _Session(max_length)

    def close(self, key: Hashable) -> None:
        """End a session and free its pages; unknown keys are ignored."""
        session = self._sessions.pop(key, None)
        if session is not None:
            for sequence in session.sequences.values():
                self._pages.release(sequence.pages)

    def fork(self, key: Hashable, sources: Sequence[int]) -> None:
        """Sequence i becomes a copy of sequence `sources[i]`; all others end.

        Raises:
            UnknownSessionError: no such session.
            BadMessageError: a source does not exist; nothing has changed.
        """
        session = self._session(key)
        for source in sources:
            if source not in session.sequences:
                raise BadMessageError(f"sequence {source} cannot be forked: it does not exist")
        forked = {}
        for index, source in enumerate(sources):
            original = session.sequences[source]
            self._pages.share(original.pages)
            forked[index] = _Cached(list(original.pages), original.runs, original.length)
        for sequence in session.sequences.values():
            self._pages.release(sequence.pages)
        session.sequences = forked

    def extend(self, key: Hashable, piece: Slice) -> Placement:
        """Truncate the sequence to `piece.position`, then make room for `piece.length` tokens.

        Raises:
            UnknownSessionError: no such session.
            SessionTooLongError: past the session's `max_length`.
            BadMessageError: the position is past the sequence's end.
            CacheFullError: not enough free pages; the sequence has not changed.
        """
        session = self._session(key)
        if piece.end > session.max_length:
            raise SessionTooLongError(
                f"a step up to position {piece.end} passes the session's max_length of {session.max_length}"
            )
        sequence = session.sequences.get(piece.sequence)
        if piece.position > (sequence.length if sequence else 0):
            raise BadMessageError(
                f"sequence {piece.sequence} has {sequence.length if sequence else 0} tokens,"
                f" a step cannot start at position {piece.position}"
            )
        if sequence is None:
            sequence = _Cached()
        copies = self._grow(sequence, piece)
        sequence.length = piece.end
        session.sequences[piece.sequence] = sequence
        return Placement(_trim(sequence.runs, piece.end), copies)

    def place(
        self, key: Hashable, slices: Sequence[Slice], forks: Sequence[int] | None = None
    ) -> list[Placement]:
        """`fork` if asked for, then `extend` by each slice: all of it, or nothing.

        The caller copies rows in the order of the placements, once it has all of them.

        Raises:
            As `fork` and `extend`; nothing has changed.
        """
        if forks is None and len(slices) == 1:
            return [self.extend(key, slices[0])]
        session = self._session(key)
        before, pages = session.copy(), self._pages.state()
        try:
            if forks is not None:
                self.fork(key, forks)
            return [self.extend(key, piece) for piece in slices]
        except RemoteError:
            session.sequences = before
            self._pages.restore(pages)
            raise

    def could_place(self, key: Hashable, slices: Sequence[Slice], forks: Sequence[int] | None = None) -> bool:
        """Whether `place` might succeed if all other sessions ended."""
        sequences = self._session(key).sequences
        if forks is not None:
            sequences = {index: sequences[source] for index, source in enumerate(forks)}
        kept = {piece.sequence: -(-piece.position // PAGE_TOKENS) for piece in slices}
        pages = {
            page
            for number, sequence in sequences.items()
            for page in sequence.pages[: kept.get(number, len(sequence.pages))]
        }
        fresh = sum(-(-piece.end // PAGE_TOKENS) - kept[piece.sequence] for piece in slices)
        return len(pages) + fresh <= self._pages.total

    def rename(self, key: Hashable, new: Hashable) -> None:
        """The session goes on under another key, which is not in use."""
        assert new not in self._sessions, "a session is opened once"
        self._sessions[new] = self._sessions.pop(key)

    def length(self, key: Hashable, sequence: int) -> int:
        """Valid tokens of a sequence; zero if it does not exist."""
        cached = self._session(key).sequences.get(sequence)
        return cached.length if cached else 0

    def _grow(self, sequence: _Cached, piece: Slice) -> tuple[tuple[int, int, int], ...]:
        kept = -(-piece.position // PAGE_TOKENS)
        needed = -(-piece.end // PAGE_TOKENS)
        pages = sequence.pages
        rows_in_last = piece.position % PAGE_TOKENS
        copy_last = bool(rows_in_last) and self._pages.shared(pages[kept - 1])
        # Sequences share a prefix of their pages: where one is not shared, those behind it are not either.
        own_rest = kept == len(pages) or not self._pages.shared(pages[kept])
        if needed == len(pages) and own_rest and not copy_last:
            return ()
        owned = kept - 1 if copy_last else kept
        # Pages past the truncation are given back first, unless allocating still might fail.
        freed = [page for page in pages[kept:] if not self._pages.shared(page)]
        if needed - owned > self._pages.free + len(freed):
            raise CacheFullError(
                f"the KV cache has {self.tokens_free} of {self.tokens} tokens free,"
                f" the step needs {(needed - owned) * PAGE_TOKENS}"
            )
        self._pages.release(pages[kept:])
        del pages[kept:]
        try:
            fresh = self._pages.allocate(needed - owned, after=pages[owned - 1] if owned else None)
        except OutOfPagesError:  # pragma: no cover - checked above
            raise AssertionError("pages were counted wrongly") from None
        copies: tuple[tuple[int, int, int], ...] = ()
        if copy_last:
            old = pages.pop()
            copies = ((old * PAGE_TOKENS, fresh[0] * PAGE_TOKENS, rows_in_last),)
            self._pages.release([old])
        pages.extend(fresh)
        sequence.runs = _runs(pages)
        return copies

    def _session(self, key: Hashable) -> _Session:
        session = self._sessions.get(key)
        if session is None:
            raise UnknownSessionError("the session is unknown here, or has ended")
        return session


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """Ranges of pool rows of these pages, in order, neighbouring pages joined."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        start = page * PAGE_TOKENS
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + PAGE_TOKENS)
        else:
            runs.append((start, start + PAGE_TOKENS))
    return runs


def _trim(runs: list[tuple[int, int]], length: int) -> tuple[tuple[int, int], ...]:
    """The first `length` rows of `runs`; the runs end in the page that holds the last of them."""
    if len(runs) == 1:
        start = runs[0][0]
        return ((start, start + length),)
    spare = sum(stop - start for start, stop in runs) - length
    start, stop = runs[-1]
    return (*runs[:-1], (start, stop - spare))
