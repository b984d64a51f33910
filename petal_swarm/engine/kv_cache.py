"""The KV cache of many sessions: which rows of the pool hold which positions of which sequence.

Memory is in proportion to the tokens in use. Positions are absolute: extending a sequence at position
p truncates it to p first, so that rollback, re-sending and resuming are one mechanism. Forks share
pages; a page that two sequences share is copied before one of them writes to it. Full pages whose key
is known are filed, so that later sessions with the same prefix start behind it (`prefixes`). This file
moves page numbers only; the caller copies the rows that `Placement.copies` names.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from petal_swarm.engine.pages import OutOfPagesError, PageAllocator
from petal_swarm.engine.prefixes import PrefixIndex, PrefixScope, SequencePrefix, input_keys, scoped_key
from petal_swarm.errors import (
    BadMessageError,
    CacheFullError,
    RemoteError,
    SessionTooLongError,
    UnknownSessionError,
)
from petal_swarm.span import Slice
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS, PageKeys

#: Page tables take memory too, and forks and shared prefixes make them for nothing.
MAX_SESSION_PAGES = 1 << 18


class Placement(NamedTuple):
    """Where one slice lives: `extents` hold positions `0..slice.end`; `copies` are (from, to, rows)."""

    extents: tuple[tuple[int, int], ...]
    copies: tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class _Cached:
    """One sequence: its pages in order, their rows with neighbours joined, and how many tokens are valid.

    `prefix` is None in a session that shares nothing.
    """

    prefix: SequencePrefix | None
    pages: list[int] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)
    length: int = 0

    def fork(self) -> _Cached:
        prefix = None if self.prefix is None else self.prefix.copy()
        return _Cached(prefix, list(self.pages), self.runs, self.length)


@dataclass(slots=True)
class _Session:
    max_length: int
    scope: PrefixScope | None
    sequences: dict[int, _Cached] = field(default_factory=dict)

    def new_sequence(self) -> _Cached:
        return _Cached(None if self.scope is None else SequencePrefix(self.scope))

    def copy(self) -> dict[int, _Cached]:
        """The sequences as they are now, to go back to."""
        return {number: cached.fork() for number, cached in self.sequences.items()}


class KVCache:
    """Page tables of all sessions over a pool of `tokens` rows. Not thread-safe.

    At most `prefix_tokens` are kept of prefixes that no session uses; with 0, nothing is shared.
    """

    def __init__(self, tokens: int, prefix_tokens: int = 0) -> None:
        self.tokens = tokens // PAGE_TOKENS * PAGE_TOKENS
        self._pages = PageAllocator(self.tokens // PAGE_TOKENS)
        self._prefixes = PrefixIndex(self._pages, prefix_tokens // PAGE_TOKENS)
        self._sessions: dict[Hashable, _Session] = {}

    @property
    def tokens_free(self) -> int:
        """Room for new tokens, that which idle prefixes would make included."""
        return self._pages.available * PAGE_TOKENS

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def open(self, key: Hashable, max_length: int, scope: PrefixScope | None = None) -> None:
        """Begin a session whose sequences may each grow to `max_length` tokens. Takes no memory yet.

        With a `scope` it shares prefixes with the sessions of the same scope.

        Raises:
            CacheFullError: `max_length` tokens would not fit even an empty cache.
        """
        if max_length > self.tokens:
            raise CacheFullError(
                f"the KV cache has {self.tokens_free} of {self.tokens} tokens free, the session wants"
                f" {max_length}; ask for a smaller max_length or raise --kv-tokens on the server"
            )
        assert key not in self._sessions, "a session is opened once"
        self._sessions[key] = _Session(max_length, scope if self._prefixes.enabled else None)

    def close(self, key: Hashable) -> None:
        """End a session and free its pages; unknown keys are ignored."""
        session = self._sessions.pop(key, None)
        if session is not None:
            for sequence in session.sequences.values():
                self._pages.release(sequence.pages)
            self._prefixes.trim()

    def stop_sharing(self, key: Hashable) -> None:
        """File nothing more of a session, and let it attach nothing; unknown keys are ignored."""
        session = self._sessions.get(key)
        if session is not None:
            session.scope = None
            for sequence in session.sequences.values():
                sequence.prefix = None

    def fork(self, key: Hashable, sources: Sequence[int]) -> None:
        """Sequence i becomes a copy of sequence `sources[i]`; all others end.

        Raises:
            UnknownSessionError: no such session.
            BadMessageError: a source does not exist, or the copies have too many pages; nothing has changed.
        """
        session = self._session(key)
        for source in sources:
            if source not in session.sequences:
                raise BadMessageError(f"sequence {source} cannot be forked: it does not exist")
        if sum(len(session.sequences[source].pages) for source in sources) > MAX_SESSION_PAGES:
            raise BadMessageError(f"a session's sequences may list {MAX_SESSION_PAGES} pages in all")
        forked = {}
        for index, source in enumerate(sources):
            original = session.sequences[source]
            self._pages.share(original.pages)
            forked[index] = original.fork()
        for sequence in session.sequences.values():
            self._pages.release(sequence.pages)
        self._prefixes.trim()
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
            sequence = session.new_sequence()
        copies = self._grow(sequence, piece)
        if sequence.prefix is not None and piece.position < sequence.prefix.length:
            sequence.prefix.truncate(piece.position)
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
        before = session.copy()
        try:
            with self._prefixes.undone_by(RemoteError):
                if forks is not None:
                    self.fork(key, forks)
                return [self.extend(key, piece) for piece in slices]
        except RemoteError:
            session.sequences = before
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

    def hashes_inputs(self, key: Hashable) -> bool:
        """Whether a session's keys are made here, of what it receives."""
        session = self._sessions.get(key)
        return session is not None and session.scope is not None and session.scope.hashes

    def lookup(self, key: Hashable, piece: Slice, hidden: torch.Tensor) -> tuple[bytes, ...]:
        """Keys of the full pages of `hidden [piece.length, hidden_size]`, as far as their prefix is filed.

        Raises:
            UnknownSessionError: no such session.
        """
        session = self._session(key)
        sequence = session.sequences.get(piece.sequence)
        if session.scope is None or piece.position % PAGE_TOKENS:
            return ()
        before, first_page = session.scope.scope, piece.position // PAGE_TOKENS
        if first_page:
            if sequence is None or sequence.prefix is None or len(sequence.prefix.keys) < first_page:
                return ()
            before = sequence.prefix.keys[first_page - 1]
        known: list[bytes] = []
        for row in range(0, hidden.shape[0] - PAGE_TOKENS + 1, PAGE_TOKENS):
            (before,) = input_keys(before, hidden[row : row + PAGE_TOKENS])
            if not self._prefixes.match([before]):
                break
            known.append(before)
        return tuple(known)

    def scoped(self, key: Hashable, keys: Sequence[bytes]) -> tuple[bytes, ...]:
        """This hop's own keys for those that the hop before it gave.

        Raises:
            UnknownSessionError: no such session.
        """
        scope = self._session(key).scope
        return () if scope is None else tuple(scoped_key(scope.scope, given) for given in keys)

    def attach(self, key: Hashable, known: PageKeys) -> int:
        """Let a sequence, truncated to the first of these pages, go on with them; returns how many there are.

        Raises:
            UnknownSessionError: no such session.
        """
        session = self._session(key)
        sequence = session.sequences.get(known.sequence) or session.new_sequence()
        first = known.first_page
        if sequence.prefix is None or len(sequence.prefix.keys) < first:
            return 0
        pages = self._prefixes.match(known.keys)[: session.max_length // PAGE_TOKENS - first]
        listed = sum(len(other.pages) for other in session.sequences.values())
        if not pages or listed + len(pages) > MAX_SESSION_PAGES:
            return 0
        self._pages.share(pages)
        self._pages.release(sequence.pages[first:])
        self._prefixes.trim()
        sequence.pages[first:] = pages
        sequence.runs = _runs(sequence.pages)
        sequence.length = len(sequence.pages) * PAGE_TOKENS
        sequence.prefix.truncate(first * PAGE_TOKENS)
        sequence.prefix.extend(known.keys[: len(pages)])
        session.sequences[known.sequence] = sequence
        return len(pages)

    def file_inputs(self, key: Hashable, piece: Slice, hidden: torch.Tensor) -> PageKeys | None:
        """File the pages that a slice has completed, after its keys and values were computed.

        `hidden [piece.length, hidden_size]` is what was received. Returns the new keys, if there are any.
        """
        sequence = self._sharing(key, piece.sequence)
        if sequence is None or sequence.prefix is None:
            return None
        before = len(sequence.prefix.keys)
        sequence.prefix.append(piece.position, hidden)
        return self._file(sequence, piece.sequence, before)

    def file_keys(self, key: Hashable, given: PageKeys) -> PageKeys | None:
        """As `file_inputs`, by the keys that the hop before this one gave."""
        sequence = self._sharing(key, given.sequence)
        if sequence is None or sequence.prefix is None:
            return None
        before = len(sequence.prefix.keys)
        if (given.first_page + len(given.keys)) * PAGE_TOKENS <= sequence.length:
            sequence.prefix.accept(given.first_page, given.keys)
        return self._file(sequence, given.sequence, before)

    def _sharing(self, key: Hashable, index: int) -> _Cached | None:
        session = self._sessions.get(key)
        return None if session is None else session.sequences.get(index)

    def _file(self, sequence: _Cached, index: int, before: int) -> PageKeys | None:
        assert sequence.prefix is not None
        keys = tuple(sequence.prefix.keys[before:])
        if not keys:
            return None
        own = sequence.pages[before : before + len(keys)]
        pages = [self._prefixes.file(key, page) for key, page in zip(keys, own, strict=True)]
        # Somebody else computed the same at the same time: one copy is enough. But a sequence that decodes
        # keeps its page, since attention is faster over one run of rows than over two.
        if len(keys) > 1 and pages != own:
            self._pages.share(pages)
            self._pages.release(own)
            sequence.pages[before : before + len(keys)] = pages
            sequence.runs = _runs(sequence.pages)
        return PageKeys(index, before, keys)

    def _grow(self, sequence: _Cached, piece: Slice) -> tuple[tuple[int, int, int], ...]:
        kept = -(-piece.position // PAGE_TOKENS)
        needed = -(-piece.end // PAGE_TOKENS)
        pages = sequence.pages
        rows_in_last = piece.position % PAGE_TOKENS
        copy_last = bool(rows_in_last) and self._pages.shared(pages[kept - 1])
        own_rest = not any(map(self._pages.shared, pages[kept:]))
        if needed == len(pages) and own_rest and not copy_last:
            return ()
        owned = kept - 1 if copy_last else kept
        # Pages past the truncation are given back first, unless allocating still might fail.
        freed = [page for page in pages[kept:] if self._pages.last_user(page)]
        if needed - owned > self._pages.available + len(freed):
            raise CacheFullError(
                f"the KV cache has {self.tokens_free} of {self.tokens} tokens free,"
                f" the step needs {(needed - owned) * PAGE_TOKENS}"
            )
        self._pages.release(pages[kept:])
        del pages[kept:]
        self._prefixes.trim()
        self._prefixes.make_room(needed - owned)
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
