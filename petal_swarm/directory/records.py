"""Signed announcements: what is stored in the DHT, and listed by the `directory` protocol.

A record is the msgpack array `[body, signature]`. The body is msgpack too, `{"announcement": header,
"expires_at": seconds since 1970}`, and stays bytes: the signature is over a domain, and these very
bytes, as in libp2p's signed envelopes (specs: RFC 0002). So nothing is ever encoded a second time to be
checked, fields from newer versions are covered, and a signature cannot be taken for one on something
else. The body names the peer, the model and the expiry, so that a record can be replayed neither for
another peer, nor under another model, nor for longer. In a private swarm the domain holds a secret made
from the swarm key: nobody else can make such a record, or tell whether one is good. This file does no I/O
and has no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from petal_swarm.errors import (
    BadRecordError,
    ConfigError,
    LocalProtocolError,
    RemoteProtocolError,
    StaleRecordError,
)
from petal_swarm.net.identity import Identity, verify
from petal_swarm.net.swarm_key import SwarmKey
from petal_swarm.wire import fields
from petal_swarm.wire.announcement import Announcement
from petal_swarm.wire.messages.directory import MAX_RECORD_BYTES

#: No record lives longer, so a replayed one cannot keep a dead peer visible for longer either.
MAX_TTL_S = 60.0
#: How far the clocks of honest peers may be apart.
CLOCK_SLACK_S = 5.0

_DOMAIN = b"petal-swarm/1/announcement\n"
_PRIVATE_DOMAIN = b"petal-swarm/1/private-announcement\n"
_SIGNATURE_BYTES = 64
_MAX_TIME_S = 1e12


def sign_record(
    announcement: Announcement, identity: Identity, *, expires_at: float, key: SwarmKey | None = None
) -> bytes:
    """The record of `announcement`, good until `expires_at` (seconds since 1970), in the swarm of `key`.

    Raises:
        LocalProtocolError: it names another peer than `identity`, or others would refuse it.
        ConfigError: it is larger than `MAX_RECORD_BYTES`.
    """
    if announcement.peer_id != identity.peer_id:
        raise LocalProtocolError(f"{identity.peer_id} cannot sign for {announcement.peer_id}")
    header = announcement.to_header()
    try:
        Announcement.from_header(header)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"this announcement would be refused: {error}") from None
    body = msgpack.packb({"announcement": header, "expires_at": float(expires_at)}, use_bin_type=True)
    record: bytes = msgpack.packb([body, identity.sign(_domain(key) + body)], use_bin_type=True)
    if len(record) > MAX_RECORD_BYTES:
        raise ConfigError(
            f"the announcement takes {len(record)} bytes, over {MAX_RECORD_BYTES}; announce fewer addresses"
        )
    return record


def open_record(record: bytes, *, key: SwarmKey | None = None) -> tuple[Announcement, float]:
    """Check everything about a record except whether it is still good; see `read_record`.

    Raises:
        RemoteProtocolError: it is damaged, too large, or not signed for this swarm by the peer that it names.
        BadRecordError: it is well signed, and says what it may not.
    """
    if type(record) is not bytes or len(record) > MAX_RECORD_BYTES:
        raise RemoteProtocolError(f"a record must be at most {MAX_RECORD_BYTES} bytes")
    parts = _unpack(record, "a record")
    if not isinstance(parts, list) or [type(part) for part in parts] != [bytes, bytes]:
        raise RemoteProtocolError("a record must be a body and a signature")
    body, signature = parts
    if len(signature) != _SIGNATURE_BYTES or msgpack.packb(parts, use_bin_type=True) != record:
        raise RemoteProtocolError("a record must be a body and a signature, encoded in the shortest way")
    content = _unpack(body, "a record's body")
    if not isinstance(content, dict):
        raise RemoteProtocolError("a record's body must be a map")
    # Signature first: what is said after it about the peer, or to it, it has brought upon itself.
    peer_id = fields.text(fields.mapping(content, "announcement"), "peer_id", limit=128)
    if not verify(peer_id, _domain(key) + body, signature):
        raise RemoteProtocolError(_why_unsigned(peer_id, body, signature, key))
    try:
        announcement = Announcement.from_header(content["announcement"])
        return announcement, fields.number(content, "expires_at", 0, _MAX_TIME_S)
    except RemoteProtocolError as error:
        raise BadRecordError(f"announcement of {peer_id}: {error}", peer_id) from None


def read_record(record: bytes, *, now: float, key: SwarmKey | None = None) -> tuple[Announcement, float]:
    """The announcement in a record from anybody, and when it expires (seconds since 1970).

    Raises:
        RemoteProtocolError, BadRecordError: see `open_record`.
        StaleRecordError: it has expired, or claims to be good for more than `MAX_TTL_S` from `now`.
    """
    announcement, expires_at = open_record(record, key=key)
    if expires_at <= now or expires_at > now + MAX_TTL_S + CLOCK_SLACK_S:
        raise stale(announcement.peer_id, expires_at, now)
    return announcement, expires_at


def stale(peer_id: str, expires_at: float, now: float) -> StaleRecordError:
    """What to say of a record whose time has passed, or has not come."""
    late_s = now - expires_at
    if late_s < 0:
        says, late_s = f"expires in {-late_s:.1f} s, not {MAX_TTL_S:g}", late_s + MAX_TTL_S
    else:
        says = f"expired {late_s:.1f} s ago"
    return StaleRecordError(f"announcement of {peer_id} {says}", peer_id, late_s)


class RecordSigner:
    """Signs one peer's announcements so that each replaces the one before it."""

    def __init__(self, identity: Identity, *, now: Callable[[], float], key: SwarmKey | None = None) -> None:
        self._identity = identity
        self._key = key
        self._now = now
        self._latest: dict[str, float] = {}

    def sign(self, announcement: Announcement, *, ttl_s: float) -> tuple[bytes, float]:
        """The record, and when it expires: after `ttl_s`, and later than any before it for that model.

        hivemind's DHT, and every `RecordBook`, keep the record that expires last; so a farewell with
        a shorter `ttl_s` than the record it replaces must live longer than asked.

        Raises:
            ConfigError: `ttl_s` is not in (0, MAX_TTL_S], or the announcement is too large.
            LocalProtocolError: see `sign_record`.
        """
        if not 0 < ttl_s <= MAX_TTL_S:
            raise ConfigError(f"an announcement lives for 0 to {MAX_TTL_S:g} s, not {ttl_s:g}")
        expires_at = max(self._now() + ttl_s, self._latest.get(announcement.model, 0.0) + 1e-3)
        record = sign_record(announcement, self._identity, expires_at=expires_at, key=self._key)
        self._latest[announcement.model] = expires_at
        return record, expires_at


def _domain(key: SwarmKey | None) -> bytes:
    return _DOMAIN if key is None else _PRIVATE_DOMAIN + key.record_tag


def _why_unsigned(peer_id: str, body: bytes, signature: bytes, key: SwarmKey | None) -> str:
    named = f"announcement of {peer_id!r:.140}"
    if key is None:
        return f"{named} is not signed by that peer, or not for an open swarm"
    if verify(peer_id, _DOMAIN + body, signature):
        return f"{named} was made without this swarm's key"
    return f"{named} is not signed by that peer with this swarm's key"


def _unpack(packed: bytes, what: str) -> Any:
    try:
        return msgpack.unpackb(packed, raw=False, strict_map_key=True, max_ext_len=0)
    except Exception as error:
        # msgpack raises a dozen unrelated types, ValueError and UnicodeDecodeError among them.
        raise RemoteProtocolError(f"{what} is not msgpack: {type(error).__name__}") from None
