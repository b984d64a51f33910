"""Which sessions of an engine have an adapter, and where the prefixes of those lie in the KV pool.

A prefix is kept once for all sessions that use it, in pages of its own; they read it in front of their
own rows. So positions and pages of a session count from its first token, as without one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from petal_swarm.engine.kv_cache import KVCache
from petal_swarm.models.packed_adapters import Segment, ServedAdapter
from petal_swarm.models.packing import KVPool
from petal_swarm.span import Slice

if TYPE_CHECKING:
    from petal_swarm.engine.engine import Chunk


class PrefixRows(NamedTuple):
    """Where a prefix of so many tokens lies: ranges of pool rows, in order."""

    tokens: int
    extents: tuple[tuple[int, int], ...]


class _Kept:
    """A prefix in the pool, and how many sessions use it."""

    def __init__(self, rows: PrefixRows) -> None:
        self.rows = rows
        self.uses = 0


class AdaptedSessions:
    """The adapters of an engine's sessions, by session."""

    def __init__(self, cache: KVCache, pool: KVPool) -> None:
        self._cache = cache
        self._pool = pool
        self._kept: dict[ServedAdapter, _Kept] = {}
        #: The adapter, and the rows of its prefix, of each session that has one. To be read by the engine.
        self.adapters: dict[Hashable, ServedAdapter] = {}
        self.prefixes: dict[Hashable, PrefixRows] = {}

    @property
    def num_prefixes(self) -> int:
        """Prefixes in the KV cache, each of which counts there as a session."""
        return len(self._kept)

    def open(self, session: Hashable, adapter: ServedAdapter) -> None:
        """A session with this adapter begins.

        Raises:
            CacheFullError: the KV cache has no room for its prefix; nothing has changed.
        """
        if adapter.prefix_tokens:
            kept = self._kept.get(adapter)
            if kept is None:
                kept = self._kept[adapter] = _Kept(self._write(adapter))
            kept.uses += 1
            self.prefixes[session] = kept.rows
        self.adapters[session] = adapter

    def close(self, session: Hashable) -> None:
        """The session has ended; unknown ones are ignored."""
        adapter = self.adapters.pop(session, None)
        if adapter is None or self.prefixes.pop(session, None) is None:
            return
        kept = self._kept[adapter]
        kept.uses -= 1
        if not kept.uses:
            del self._kept[adapter]
            self._cache.close(adapter)

    def rename(self, session: Hashable, new: Hashable) -> None:
        """The session goes on under another key."""
        if session in self.adapters:
            self.adapters[new] = self.adapters.pop(session)
        if session in self.prefixes:
            self.prefixes[new] = self.prefixes.pop(session)

    def sorted(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Those of the same adapter next to each other, so that their rows are multiplied together."""
        places: dict[ServedAdapter | None, int] = {}
        for chunk in chunks:
            places.setdefault(self.adapters.get(chunk.step.request.session), len(places))
        return sorted(chunks, key=lambda chunk: places[self.adapters.get(chunk.step.request.session)])

    def segments(self, chunks: Sequence[Chunk]) -> tuple[Segment, ...]:
        """The rows of a batch of these chunks to which LoRA adds something."""
        found: list[Segment] = []
        row = 0
        for step, rows in chunks:
            adapter = self.adapters.get(step.request.session)
            if adapter is not None and adapter.deltas is not None:
                if found and found[-1].stop == row and found[-1].deltas is adapter.deltas:
                    found[-1] = found[-1]._replace(stop=row + rows)
                else:
                    found.append(Segment(row, row + rows, adapter.deltas))
            row += rows
        return tuple(found)

    def _write(self, adapter: ServedAdapter) -> PrefixRows:
        self._cache.open(adapter, adapter.prefix_tokens)
        try:
            placement = self._cache.extend(adapter, Slice(0, 0, adapter.prefix_tokens))
            self._pool.write_prefix(adapter, placement.extents)
        except BaseException:
            self._cache.close(adapter)
            raise
        return PrefixRows(adapter.prefix_tokens, placement.extents)
