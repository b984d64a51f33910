"""What a node of the DHT refuses to store, and what it says of it."""

from __future__ import annotations

import logging

import msgpack
import pytest

pytest.importorskip("hivemind")

from hivemind.dht.validation import DHTRecord

from petal_swarm.directory.guard import CALLER
from petal_swarm.directory.records import sign_record
from petal_swarm.directory.validator import SignedRecordValidator, key_of
from petal_swarm.net.identity import Identity
from petal_swarm.net.swarm_key import SwarmKey

from .samples import MODEL, START_S, Clock, announcement

ALICE, BOB = Identity.generate(), Identity.generate()
KEY, OTHER_KEY = SwarmKey(b"k" * 32), SwarmKey(b"o" * 32)


def stored(
    identity: Identity = ALICE, *, expires_in_s: float = 12, key: SwarmKey | None = None, under: str = ""
) -> DHTRecord:
    expires_at = START_S + expires_in_s
    record = sign_record(announcement(identity), identity, expires_at=expires_at, key=key)
    subkey = msgpack.packb(under or identity.peer_id)
    return DHTRecord(key_of(MODEL).to_bytes(), subkey, record, expires_at)


@pytest.mark.parametrize("key", [None, KEY])
def test_records_of_this_swarm_are_stored(key: SwarmKey | None) -> None:
    assert SignedRecordValidator(now=Clock(), key=key).validate(stored(key=key))


@pytest.mark.parametrize(
    ("record", "key", "reason"),
    [
        (stored(), KEY, "was made without this swarm's key"),
        (stored(key=OTHER_KEY), KEY, "is not signed by that peer with this swarm's key"),
        (stored(key=KEY), None, "not for an open swarm"),
        (stored(under=BOB.peer_id), None, "in the place, or for the time, of another"),
        (stored(expires_in_s=-3588), None, "expired 3588.0 s ago: its clock or this machine's is wrong"),
        (
            stored(expires_in_s=3612),
            None,
            "expires in 3612.0 s, not 60: its clock or this machine's is wrong",
        ),
    ],
)
def test_others_are_refused_and_it_is_said_once_why(
    record: DHTRecord, key: SwarmKey | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    validator = SignedRecordValidator(now=Clock(), key=key)
    token = CALLER.set("mallory")
    try:
        for _ in range(3):
            assert not validator.validate(record)
    finally:
        CALLER.reset(token)
    [warning] = [entry for entry in caplog.records if entry.levelno == logging.WARNING]
    assert reason in warning.getMessage()
    assert ALICE.peer_id in warning.getMessage()
    assert ("mallory" in warning.getMessage()) == ("clock" not in reason)
