"""A record is accepted from anybody, and believed only as its peer signed it."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.directory.records import (
    CLOCK_SLACK_S,
    MAX_TTL_S,
    RecordSigner,
    open_record,
    read_record,
    sign_record,
)
from petal_swarm.errors import (
    BadRecordError,
    ConfigError,
    LocalProtocolError,
    RemoteProtocolError,
    StaleRecordError,
)
from petal_swarm.net.identity import Identity
from petal_swarm.net.swarm_key import SwarmKey
from petal_swarm.wire.messages.directory import MAX_RECORD_BYTES

from .samples import START_S, Clock, announcement

ALICE, BOB = Identity.generate(), Identity.generate()
RECORD = sign_record(announcement(ALICE), ALICE, expires_at=START_S + 12)


def test_a_record_is_read_back_as_it_was_signed() -> None:
    original = announcement(ALICE, name="alice", next_rtts_s={BOB.peer_id: 0.02}, state="joining")
    record = sign_record(original, ALICE, expires_at=START_S + 12)
    assert read_record(record, now=START_S) == (original, START_S + 12)


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (START_S + 12, "expired 0.0 s ago"),
        (START_S + 100, "expired 88.0 s ago"),
        (START_S + 12 - MAX_TTL_S - CLOCK_SLACK_S - 0.1, "expires in 65.1 s, not 60"),
    ],
)
def test_a_record_is_good_for_its_time_only(now: float, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=f"{ALICE.peer_id} {reason}"):
        read_record(RECORD, now=now)


def test_only_the_peer_named_can_sign() -> None:
    with pytest.raises(LocalProtocolError, match="cannot sign for"):
        sign_record(announcement(ALICE), BOB, expires_at=START_S + 12)
    body, _ = msgpack.unpackb(RECORD)
    forged = msgpack.packb([body, BOB.sign(b"petal-swarm/1/announcement\n" + body)])
    with pytest.raises(RemoteProtocolError, match=f"{ALICE.peer_id}' is not signed by that peer"):
        read_record(forged, now=START_S)


def test_a_signature_belongs_to_its_domain() -> None:
    body, _ = msgpack.unpackb(RECORD)
    with pytest.raises(RemoteProtocolError, match="not signed"):
        read_record(msgpack.packb([body, ALICE.sign(body)]), now=START_S)


@pytest.mark.parametrize("change", [{"model": "other"}, {"peer_id": BOB.peer_id}, {"state": "left"}])
def test_what_is_signed_cannot_be_changed(change: dict[str, str]) -> None:
    body, signature = msgpack.unpackb(RECORD)
    content = msgpack.unpackb(body)
    content["announcement"].update(change)
    with pytest.raises(RemoteProtocolError, match="not signed"):
        read_record(msgpack.packb([msgpack.packb(content), signature]), now=START_S)


def test_the_expiry_cannot_be_changed() -> None:
    body, signature = msgpack.unpackb(RECORD)
    content = {**msgpack.unpackb(body), "expires_at": START_S + 30}
    with pytest.raises(RemoteProtocolError, match="not signed"):
        read_record(msgpack.packb([msgpack.packb(content), signature]), now=START_S)


def test_fields_of_newer_versions_are_ignored_and_covered_by_the_signature() -> None:
    body, _ = msgpack.unpackb(RECORD)
    content = msgpack.unpackb(body)
    content["announcement"]["colour"] = "green"
    newer = msgpack.packb({**content, "more": [1, 2]})
    record = msgpack.packb([newer, ALICE.sign(b"petal-swarm/1/announcement\n" + newer)])
    assert read_record(record, now=START_S) == (announcement(ALICE), START_S + 12)


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\xc1",
        b"\x00" * (MAX_RECORD_BYTES + 1),
        msgpack.packb([b"", b""]),
        msgpack.packb([RECORD, b"\x00" * 64]),
        msgpack.packb([msgpack.packb({"announcement": 1, "expires_at": 1.0}), b"\x00" * 64]),
        msgpack.packb([msgpack.packb({}), b"\x00" * 64, b""]),
        msgpack.packb({"announcement": {}}),
        RECORD + b"\x00",
        b"\x91" * 5000,
    ],
)
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read_record(junk, now=START_S)


def test_an_encoding_of_the_same_in_more_bytes_is_refused() -> None:
    body, signature = msgpack.unpackb(RECORD)
    longer = b"\xdc\x00\x02" + msgpack.packb(body) + msgpack.packb(signature)
    assert msgpack.unpackb(longer) == msgpack.unpackb(RECORD)
    with pytest.raises(RemoteProtocolError, match="shortest"):
        open_record(longer)


@given(st.binary(max_size=400))
def test_random_bytes_never_pass(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read_record(data, now=START_S)


@given(st.integers(0, len(RECORD) - 1), st.integers(1, 255))
def test_a_changed_byte_never_passes(index: int, flip: int) -> None:
    mutated = bytearray(RECORD)
    mutated[index] ^= flip
    with pytest.raises(RemoteProtocolError):
        read_record(bytes(mutated), now=START_S)


@given(st.data())
def test_cut_and_spliced_records_never_pass(data: st.DataObject) -> None:
    other = sign_record(announcement(BOB), BOB, expires_at=START_S + 20)
    cut = data.draw(st.integers(1, len(RECORD) - 1))
    end = data.draw(st.integers(1, len(other) - 1))
    for mutated in (RECORD[:cut], RECORD[cut:], RECORD[:cut] + other[end:], RECORD[:cut] + RECORD[cut + 1 :]):
        if mutated in (RECORD, other):
            continue
        with pytest.raises(RemoteProtocolError):
            read_record(mutated, now=START_S)


def test_an_announcement_that_others_would_refuse_is_not_signed() -> None:
    with pytest.raises(LocalProtocolError, match=r"would be refused.*block_time_s"):
        sign_record(announcement(ALICE, block_time_s=float("nan")), ALICE, expires_at=START_S)
    with pytest.raises(ConfigError, match="announce fewer addresses"):
        sign_record(
            announcement(ALICE, addresses=(f"/dns/{'x' * 900}/p2p/{ALICE.peer_id}",) * 16),
            ALICE,
            expires_at=START_S,
        )


KEY, OTHER_KEY = SwarmKey.generate(), SwarmKey.generate()


def test_a_record_of_a_private_swarm_is_good_in_that_swarm_only() -> None:
    record = RecordSigner(ALICE, now=Clock(), key=KEY).sign(announcement(ALICE), ttl_s=12)[0]
    assert read_record(record, now=START_S, key=KEY) == (announcement(ALICE), START_S + 12)
    for key in (OTHER_KEY, None):
        with pytest.raises(RemoteProtocolError, match="not signed by that peer"):
            read_record(record, now=START_S, key=key)
    with pytest.raises(RemoteProtocolError, match=f"{ALICE.peer_id}' was made without this swarm's key"):
        read_record(RECORD, now=START_S, key=KEY)


def test_what_is_wrong_with_a_signed_record_is_told_of_its_peer() -> None:
    body, _ = msgpack.unpackb(RECORD)
    content = msgpack.unpackb(body)
    content["announcement"]["block_time_s"] = 1e300
    absurd = msgpack.packb(content)
    record = msgpack.packb([absurd, ALICE.sign(b"petal-swarm/1/announcement\n" + absurd)])
    with pytest.raises(BadRecordError, match=f"{ALICE.peer_id}: field 'block_time_s'") as caught:
        open_record(record)
    assert caught.value.peer_id == ALICE.peer_id
    stolen = msgpack.packb([absurd, BOB.sign(b"petal-swarm/1/announcement\n" + absurd)])
    with pytest.raises(RemoteProtocolError, match="not signed") as caught_stolen:
        open_record(stolen)
    assert not isinstance(caught_stolen.value, BadRecordError)


@pytest.mark.parametrize(("off_s", "late_s"), [(3600, 3588), (-3600, -3552)])
def test_how_far_a_record_is_from_now(off_s: float, late_s: float) -> None:
    with pytest.raises(StaleRecordError) as caught:
        read_record(RECORD, now=START_S + off_s)
    assert (caught.value.peer_id, caught.value.late_s) == (ALICE.peer_id, late_s)


def test_each_record_of_a_signer_outlives_the_one_before() -> None:
    clock = Clock()
    signer = RecordSigner(ALICE, now=clock)
    _, first = signer.sign(announcement(ALICE), ttl_s=30)
    clock.advance(1)
    farewell, second = signer.sign(dataclasses.replace(announcement(ALICE), state="left"), ttl_s=12)
    assert first == START_S + 30
    assert first < second < first + 0.01
    assert read_record(farewell, now=clock())[0].state == "left"
    clock.advance(-5)
    assert signer.sign(announcement(ALICE), ttl_s=12)[1] > second


@pytest.mark.parametrize("ttl_s", [0, -1, MAX_TTL_S + 1, float("nan")])
def test_a_ttl_out_of_range_is_refused(ttl_s: float) -> None:
    with pytest.raises(ConfigError, match="lives for 0 to 60 s"):
        RecordSigner(ALICE, now=Clock()).sign(announcement(ALICE), ttl_s=ttl_s)
