"""Merging records from sources that are late, repeat themselves or lie."""

from __future__ import annotations

import asyncio
import logging

import msgpack
import pytest

from petal_swarm.directory.book import Bookshelf, RecordBook
from petal_swarm.directory.records import sign_record
from petal_swarm.errors import RemoteProtocolError
from petal_swarm.net.identity import Identity
from petal_swarm.net.swarm_key import SwarmKey

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


def complaints_of(book: RecordBook, caplog: pytest.LogCaptureFixture, *records: bytes) -> list[str]:
    """What is said of these, told three times by `source`."""
    for _ in range(3):
        asyncio.run(book.merge(records, source="source"))
    return [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]


def test_a_clock_that_is_an_hour_off_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    [behind, ahead] = complaints_of(
        RecordBook(MODEL, now=Clock()), caplog, _record(ALICE), _record(BOB, -3588), _record(CAROL, 3612)
    )
    assert f"announcement of {BOB.peer_id} expired 3588.0 s ago, as told by source" in behind
    assert "that peer's clock or this machine's is behind" in behind
    assert f"announcement of {CAROL.peer_id} expires in 3612.0 s, not 60" in ahead


def test_if_everybody_is_late_it_may_be_this_machine(caplog: pytest.LogCaptureFixture) -> None:
    book = RecordBook(MODEL, now=Clock(START_S + 3600))
    [complaint] = complaints_of(book, caplog, _record(ALICE), _record(BOB), _record(CAROL))
    assert "1.0 h old: is this machine's clock right?" in complaint


def test_a_record_that_has_just_expired_is_nobodys_fault(caplog: pytest.LogCaptureFixture) -> None:
    assert complaints_of(RecordBook(MODEL, now=Clock()), caplog, _record(ALICE, -1), _record(BOB, -5)) == []


def test_a_forged_record_is_blamed_on_who_tells_it(caplog: pytest.LogCaptureFixture) -> None:
    forged = bytearray(_record(ALICE))
    forged[-1] ^= 1
    [complaint] = complaints_of(RecordBook(MODEL, now=Clock()), caplog, bytes(forged), b"junk", _record(BOB))
    assert f"as told by source: announcement of '{ALICE.peer_id}' is not signed by that peer" in complaint


def test_absurd_claims_are_blamed_on_who_signed_them(caplog: pytest.LogCaptureFixture) -> None:
    body, _ = msgpack.unpackb(_record(ALICE))
    content = msgpack.unpackb(body)
    content["announcement"]["queue_s"] = -1.0
    absurd = msgpack.packb(content)
    record = msgpack.packb([absurd, ALICE.sign(b"petal-swarm/1/announcement\n" + absurd)])
    book = RecordBook(MODEL, now=Clock())
    [complaint] = complaints_of(book, caplog, record, _record(BOB))
    assert f"announcement of {ALICE.peer_id}: field 'queue_s'" in complaint
    assert [entry.peer_id for entry in book.announcements()] == [BOB.peer_id]


def test_books_of_different_swarms_do_not_mix(caplog: pytest.LogCaptureFixture) -> None:
    keys: list[SwarmKey | None] = [None, SwarmKey(b"k" * 32), SwarmKey(b"o" * 32)]
    records = [
        sign_record(announcement(identity), identity, expires_at=START_S + 12, key=key)
        for identity, key in zip(PEERS, keys, strict=True)
    ]
    for identity, key in zip(PEERS, keys, strict=True):
        book = Bookshelf(now=Clock(), key=key).book(MODEL)
        assert asyncio.run(book.merge(records, source="source")) == 1
        assert [entry.peer_id for entry in book.announcements()] == [identity.peer_id]
    assert caplog.text.count("source: announcement of") == 3, "one for each book"


def test_the_shelf_forgets_the_model_unused_for_longest() -> None:
    shelf = Bookshelf(now=Clock(), limit=2)
    first, _ = shelf.book("a"), shelf.book("b")
    assert shelf.book("a") is first
    shelf.book("c")
    assert shelf.book("a") is first
    assert len(shelf._books) == 2
