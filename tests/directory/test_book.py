"""Merging records from sources that are late, repeat themselves or lie."""

from __future__ import annotations

import asyncio

import pytest

from petal_swarm.directory.book import Bookshelf, RecordBook
from petal_swarm.directory.records import sign_record
from petal_swarm.errors import RemoteProtocolError
from petal_swarm.net.identity import Identity

from .samples import MODEL, START_S, Clock, announcement

PEERS = sorted((Identity.generate() for _ in range(3)), key=lambda identity: identity.peer_id)
ALICE, BOB, CAROL = PEERS


def _record(identity: Identity, ttl_s: float = 12, **fields: object) -> bytes:
    return sign_record(announcement(identity, **fields), identity, expires_at=START_S + ttl_s)


def test_one_announcement_for_each_peer_sorted_and_the_newest() -> None:
    book = RecordBook(MODEL, now=Clock())
    for record in (_record(BOB, 14, name="new"), _record(ALICE), _record(BOB, 12, name="old")):
        book.add(record)
    assert [(entry.peer_id, entry.name) for entry in book.announcements()] == [
        (ALICE.peer_id, ""),
        (BOB.peer_id, "new"),
    ]


def test_a_peer_that_left_is_not_brought_back_by_a_late_source() -> None:
    book = RecordBook(MODEL, now=Clock())
    serving, farewell = _record(ALICE, 12), _record(ALICE, 13, state="left")
    for record in (serving, farewell, serving, _record(BOB)):
        book.add(record)
    assert [entry.peer_id for entry in book.announcements()] == [BOB.peer_id]
    assert book.records() == [_record(BOB), farewell]


def test_records_expire() -> None:
    clock = Clock()
    book = RecordBook(MODEL, now=clock)
    book.add(_record(ALICE, 12))
    book.add(_record(BOB, 15))
    clock.advance(12)
    assert [entry.peer_id for entry in book.announcements()] == [BOB.peer_id]
    clock.advance(3)
    assert book.records() == []


def test_a_record_under_another_model_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match=f"{ALICE.peer_id} is of another model"):
        RecordBook("other", now=Clock()).add(_record(ALICE))


def test_a_full_book_refuses_new_peers_until_old_ones_expire() -> None:
    clock = Clock()
    book = RecordBook(MODEL, now=clock, limit=2)
    book.add(_record(ALICE, 10))
    book.add(_record(BOB, 30))
    with pytest.raises(RemoteProtocolError, match="over 2 peers"):
        book.add(_record(CAROL, 30))
    book.add(_record(BOB, 31))
    clock.advance(11)
    book.add(_record(CAROL, 30))
    assert [entry.peer_id for entry in book.announcements()] == [BOB.peer_id, CAROL.peer_id]


def test_merging_keeps_the_good_ones() -> None:
    book = RecordBook(MODEL, now=Clock())
    records = [b"junk", _record(ALICE), _record(ALICE), _record(BOB, -1), _record(CAROL)] + [
        b"%d" % i for i in range(80)
    ]
    assert asyncio.run(book.merge(records, source="a test")) == 2
    assert asyncio.run(book.merge(records, source="a test")) == 2
    assert [entry.peer_id for entry in book.announcements()] == [ALICE.peer_id, CAROL.peer_id]


def test_the_shelf_forgets_the_model_unused_for_longest() -> None:
    shelf = Bookshelf(now=Clock(), limit=2)
    first, _ = shelf.book("a"), shelf.book("b")
    assert shelf.book("a") is first
    shelf.book("c")
    assert shelf.book("a") is first
    assert len(shelf._books) == 2
