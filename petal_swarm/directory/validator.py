"""Where records and nodes belong in the DHT, and what an honest node refuses to read and to store.

Imports hivemind at once, as `kademlia`: import it on use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgpack
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import PeerID
from hivemind.utils import MSGPackSerializer

from petal_swarm.directory.guard import CALLER
from petal_swarm.directory.records import CLOCK_SLACK_S, MAX_TTL_S, open_record, stale
from petal_swarm.errors import BadRecordError, RemoteProtocolError, StaleRecordError
from petal_swarm.net.complaints import Complaints
from petal_swarm.net.swarm_key import SwarmKey

logger = logging.getLogger(__name__)

#: As p2pd: it passes no larger message.
MAX_VALUE_BYTES = 4 << 20
_DICTIONARY_EXT = 0x50


def key_of(model: str) -> DHTID:
    """Where the records of `model` are kept."""
    return DHTID.generate(source=f"petal-swarm/1/{model}".encode())


def node_id_of(peer_id: PeerID) -> DHTID:
    """A peer's place in the id space: by the hash of its peer id, so that it cannot take another's."""
    return DHTID.generate(source=peer_id.to_bytes())


class SignedRecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """What an honest node agrees to store: records, each where its own peer would put it.

    That is under its model's key, under its peer id as subkey, for no longer than was signed. A record
    that has expired by less than the clocks' slack passes, and is then dropped by the storage:
    hivemind judges dictionaries as a whole, and one late record must not take the others with it.
    With a `key`, records of that swarm only. Why one is refused is said once for each peer.
    """

    def __init__(self, *, now: Callable[[], float], key: SwarmKey | None = None) -> None:
        self._now = now
        self._key = key
        self._complaints = Complaints(logger)

    def validate(self, record: DHTRecord) -> bool:
        try:
            self._check(record)
        except StaleRecordError as error:
            self._complaints.about(
                error.peer_id, "refused to store: %s: its clock or this machine's is wrong", error
            )
        except BadRecordError as error:
            self._complaints.about(error.peer_id, "refused to store: %s", error)
        except RemoteProtocolError as error:
            caller = CALLER.get()
            self._complaints.about(caller, "refused to store for peer %s: %s", caller, error)
        else:
            return True
        return False

    def _check(self, record: DHTRecord) -> None:
        """
        Raises:
            RemoteProtocolError: it is not to be stored; where somebody signed it, a `BadRecordError`.
        """
        announcement, expires_at = open_record(record.value, key=self._key)
        peer_id = announcement.peer_id
        if (
            record.key != key_of(announcement.model).to_bytes()
            or record.subkey != msgpack.packb(peer_id)
            or record.expiration_time != expires_at
        ):
            raise RemoteProtocolError(f"announcement of {peer_id} in the place, or for the time, of another")
        now = self._now()
        if not now - CLOCK_SLACK_S < expires_at <= now + MAX_TTL_S + CLOCK_SLACK_S:
            raise stale(peer_id, expires_at, now)


class FlatSerializer(MSGPackSerializer):  # type: ignore[misc]
    """hivemind's encoding, less the nesting of its types.

    Its own decoder recurses wherever the bytes say so: 60 KB from anybody, read before any validator
    sees them, overflow the C stack and kill the process. What this DHT holds is one dictionary deep.
    """

    @classmethod
    def loads(cls, buf: bytes) -> Any:
        """A plain value, or a dictionary: `[maxsize, expiration, [[subkey, value, expiration], ...]]`.

        Raises:
            RemoteProtocolError: it is another extension.
            ValueError, TypeError: it is damaged, in one of msgpack's or hivemind's ways.
        """
        value = msgpack.unpackb(buf, raw=False, max_ext_len=MAX_VALUE_BYTES)
        if not isinstance(value, msgpack.ExtType):
            return value
        if value.code != _DICTIONARY_EXT:
            raise RemoteProtocolError("a value is not a flat dictionary")
        _, _, entries = msgpack.unpackb(value.data, raw=False)
        with DictionaryDHTValue().freeze() as dictionary:
            for subkey, record, expiration in entries:
                dictionary.store(subkey, record, float(expiration))
        return dictionary
