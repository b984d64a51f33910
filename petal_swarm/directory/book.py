"""The records of one model, merged from sources that may be late or lie."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from petal_swarm.directory import clocks
from petal_swarm.directory.records import read_record
from petal_swarm.errors import BadRecordError, RemoteProtocolError, StaleRecordError
from petal_swarm.net.complaints import Complaints
from petal_swarm.net.swarm_key import SwarmKey
from petal_swarm.wire.announcement import Announcement

logger = logging.getLogger(__name__)

MAX_PEERS = 4096
#: Checking a signature takes about 0.15 ms; after this many the event loop gets its turn.
_CHUNK = 32


@dataclass(frozen=True, slots=True)
class _Entry:
    announcement: Announcement
    expires_at: float
    record: bytes


class RecordBook:
    """One record for each peer: the one that expires last, until it does.

    A peer that has left stays in the book as a tombstone (state "left"), which outlives all its
    earlier records; so a source that has not heard of it yet cannot bring the peer back. A record
    that is already in the book is not verified again. With a `key` only records of that swarm are good.
    """

    def __init__(
        self,
        model: str,
        *,
        now: Callable[[], float],
        limit: int = MAX_PEERS,
        key: SwarmKey | None = None,
        complaints: Complaints | None = None,
    ) -> None:
        self._model = model
        self._now = now
        self._limit = limit
        self._key = key
        self._complaints = complaints or Complaints(logger)
        self._entries: dict[str, _Entry] = {}

    def add(self, record: bytes, *, own: bool = False) -> None:
        """Verify a record and keep it if it is newer than what is known of its peer.

        A full book makes room for the reader's `own` record: strangers must not keep it from announcing.

        Raises:
            RemoteProtocolError: see `read_record`; or it is of another model, or the book is full.
        """
        now = self._now()
        announcement, expires_at = read_record(record, now=now, key=self._key)
        peer_id = announcement.peer_id
        if announcement.model != self._model:
            raise RemoteProtocolError(
                f"announcement of {peer_id} is of another model, {announcement.model!r}"
            )
        known = self._entries.get(peer_id)
        if known is None and len(self._entries) >= self._limit:
            self._purge(now)
            if own and len(self._entries) >= self._limit:
                del self._entries[min(self._entries, key=lambda peer: self._entries[peer].expires_at)]
            if len(self._entries) >= self._limit:
                raise RemoteProtocolError(
                    f"announcement of {peer_id}: over {self._limit} peers for one model"
                )
        if known is None or known.expires_at < expires_at:
            self._entries[peer_id] = _Entry(announcement, expires_at, record)

    async def merge(self, records: Iterable[bytes], *, source: str) -> int:
        """Add all that are good, and say of the others once for each peer why they are left out.

        `source` is who told them, for people. Returns how many were good.
        """
        known = {entry.record for entry in self._entries.values()}
        good = 0
        stale: list[StaleRecordError] = []
        for count, record in enumerate(dict.fromkeys(records)):
            if record in known:
                good += 1
                continue
            if count % _CHUNK == _CHUNK - 1:
                await asyncio.sleep(0)
            try:
                self.add(record)
                good += 1
            except StaleRecordError as error:
                if not clocks.is_ordinary(error):
                    stale.append(error)
            except RemoteProtocolError as error:
                # Whoever did not sign it is not to blame.
                about = error.peer_id if isinstance(error, BadRecordError) else source
                self._complaints.about(about, "ignored, as told by %s: %s", source, error)
        if stale:
            for peer_id, complaint in clocks.about_records(stale, good=good, source=source).items():
                self._complaints.about(peer_id, "%s", complaint)
        return good

    def announcements(self) -> list[Announcement]:
        """Who is there now, sorted by peer id; without those who left."""
        self._purge(self._now())
        return sorted(
            (entry.announcement for entry in self._entries.values() if entry.announcement.state != "left"),
            key=lambda announcement: announcement.peer_id,
        )

    def records(self) -> list[bytes]:
        """The records themselves, sorted by peer id, those of peers that left at the end."""
        self._purge(self._now())
        entries = sorted(
            self._entries.values(),
            key=lambda entry: (entry.announcement.state == "left", entry.announcement.peer_id),
        )
        return [entry.record for entry in entries]

    def _purge(self, now: float) -> None:
        self._entries = {peer: entry for peer, entry in self._entries.items() if entry.expires_at > now}


class Bookshelf:
    """A `RecordBook` for each of the models asked for lately."""

    def __init__(self, *, now: Callable[[], float], limit: int = 64, key: SwarmKey | None = None) -> None:
        self._now = now
        self._limit = limit
        self._key = key
        self._complaints = Complaints(logger)
        self._books: dict[str, RecordBook] = {}

    def book(self, model: str) -> RecordBook:
        """The model's book; past the limit the one that was unused for longest is forgotten."""
        book = self._books.pop(model, None)
        if book is None:
            book = RecordBook(model, now=self._now, key=self._key, complaints=self._complaints)
        self._books[model] = book
        if len(self._books) > self._limit:
            del self._books[next(iter(self._books))]
        return book
