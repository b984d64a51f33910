"""Places at relays: one half of libp2p's circuit relay protocol, version 2, over streams of a transport.

The daemon does the rest: it relays for others, takes connections that come through a relay, and dials
through one. Who asks for a place where, and when, is decided here, since only this program knows who is
in the swarm and whether it needs a relay at all. What a relay says is bounded and checked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from petal_swarm.errors import NetworkError, PetalSwarmError, RemoteProtocolError, StreamClosedError
from petal_swarm.net.addresses import circuit_address, is_circuit, is_loopback
from petal_swarm.net.transport import Stream, Transport

logger = logging.getLogger(__name__)

HOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"
MAX_MESSAGE_BYTES = 4096
#: Two, so that one of them may die.
RELAYS = 2
#: Of one relay: others may reach it at one and not at another.
ADDRESSES_PER_RELAY = 2
RESERVE_TIMEOUT_S = 5.0
#: A relay that cuts a connection off before this is none for hidden states: a prompt of 1,000 tokens of
#: a large model has 57 MB. go-libp2p's default is 128 KiB in 2 minutes.
MIN_DATA_BYTES = 64 << 20

_RESERVE = b"\x08\x00"
_STATUS, _OK = 2, 100
_REASONS = {
    200: "it has no place left",
    201: "it has no place left",
    202: "it does not allow it",
    400: "it did not understand",
    401: "it did not understand",
}


class RelayRefusedError(NetworkError):
    """The peer will not relay, or not enough."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that might relay, and where it can be dialled directly."""

    peer_id: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """A relay's promise. `limit_s` and `limit_bytes` bound each connection through it; 0 is no bound."""

    limit_s: int
    limit_bytes: int


async def reserve(transport: Transport, relay: Candidate, *, timeout_s: float = RESERVE_TIMEOUT_S) -> Place:
    """Ask for a place at a relay, or to keep the one there is. It lasts as long as the connection does.

    Raises:
        RelayRefusedError: it does not relay, has no room, or would cut connections off too early.
        NetworkError: it cannot be reached, or does not answer within `timeout_s`.
        RemoteProtocolError: what it answers is not of this protocol.
    """
    try:
        async with asyncio.timeout(timeout_s):
            stream = await transport.open_stream(
                relay.peer_id, HOP_PROTOCOL, addresses=relay.addresses, timeout_s=timeout_s
            )
            try:
                stream.write(bytes([len(_RESERVE)]) + _RESERVE)
                answer = await _read_message(stream)
            finally:
                stream.abort()
    except TimeoutError:
        raise NetworkError(f"relay {relay.peer_id} did not answer within {timeout_s:g} s") from None
    return _place_in(answer, relay.peer_id)


def _place_in(answer: bytes, relay: str) -> Place:
    """
    Raises:
        RelayRefusedError, RemoteProtocolError: see `reserve`.
    """
    fields = _fields(answer)
    status = fields.get(5)
    if fields.get(1) != _STATUS or not isinstance(status, int):
        raise RemoteProtocolError(f"relay {relay} answered with something else than a status")
    if status != _OK:
        raise RelayRefusedError(f"peer {relay} will not relay: {_REASONS.get(status, f'status {status}')}")
    limit = fields.get(4, b"")
    limits = _fields(limit) if isinstance(limit, bytes) else {}
    duration_s, data_bytes = limits.get(1, 0), limits.get(2, 0)
    if not isinstance(duration_s, int) or not isinstance(data_bytes, int):
        raise RemoteProtocolError(f"relay {relay} states its limits in another format")
    if 0 < data_bytes < MIN_DATA_BYTES:
        raise RelayRefusedError(
            f"peer {relay} relays {data_bytes >> 10} KiB and no more for each connection: too little;"
            " it does not know yet that it can be reached itself (--reachability public tells it)"
        )
    return Place(duration_s, data_bytes)


async def _read_message(stream: Stream) -> bytes:
    """One message, with its length before it as a varint."""
    data = b""
    while True:
        chunk = await stream.read()
        if not chunk:
            raise StreamClosedError(f"relay {stream.peer_id} ended the stream before it answered")
        data += chunk
        size, start = _varint(data, 0, partial=True)
        if size > MAX_MESSAGE_BYTES or len(data) > MAX_MESSAGE_BYTES + 2:
            raise RemoteProtocolError(f"relay {stream.peer_id} sent a message that is too long")
        if start and len(data) >= start + size:
            return data[start : start + size]


def _fields(message: bytes) -> dict[int, int | bytes]:
    """The fields of a protobuf message by number, the last of each; numbers of fixed width are left out.

    Raises:
        RemoteProtocolError: it is none.
    """
    found: dict[int, int | bytes] = {}
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        value: int | bytes | None
        if tag & 7 == 0:
            value, position = _varint(message, position)
        elif tag & 7 == 2:
            size, position = _varint(message, position)
            value = message[position : position + size]
            position += size
        elif tag & 7 in (1, 5):
            value = None
            position += 8 if tag & 7 == 1 else 4
        else:
            raise RemoteProtocolError("a relay's answer is not a protobuf message")
        if value is not None:
            found[tag >> 3] = value
    if position != len(message):
        raise RemoteProtocolError("a relay's answer ends in the middle of a field")
    return found


def _varint(data: bytes, position: int, *, partial: bool = False) -> tuple[int, int]:
    """A varint, and the position behind it; with `partial`, (0, 0) if its end has not come yet."""
    value = 0
    for index, byte in enumerate(data[position : position + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    if partial and len(data) - position < 10:
        return 0, 0
    raise RemoteProtocolError("a relay's answer is not a protobuf message")


class RelayKeeper:
    """Keeps places at up to `RELAYS` relays. `keep`, called from time to time, notices who left."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._places: dict[str, tuple[Candidate, Place]] = {}
        #: Why the candidates of the last `keep` that refused did so.
        self.refusals: tuple[str, ...] = ()

    @property
    def relays(self) -> tuple[str, ...]:
        """Peer ids of the relays at which this peer has a place."""
        return tuple(self._places)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this peer through its relays."""
        return tuple(
            circuit_address(address, self._transport.peer_id)
            for relay, _ in self._places.values()
            for address in relay.addresses[:ADDRESSES_PER_RELAY]
        )

    async def keep(self, candidates: Sequence[Candidate]) -> None:
        """Renew the places there are, and find others for those that are lost.

        What peers do raises nothing.
        """
        held = [relay for relay, _ in self._places.values()]
        refusals = []
        for relay in [*held, *self._new(candidates)]:
            if relay.peer_id not in self._places and len(self._places) >= RELAYS:
                break
            try:
                place = await reserve(self._transport, relay)
            except PetalSwarmError as error:
                if self._places.pop(relay.peer_id, None):
                    logger.warning("lost a relay: %s", error)
                refusals.append(str(error))
            else:
                self._places[relay.peer_id] = (relay, place)
        self.refusals = tuple(refusals)

    def release(self) -> None:
        """Ask for no place again. Those there are end with their connections."""
        self._places.clear()

    def _new(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that can be dialled directly, by their better addresses first."""
        found = []
        for candidate in candidates:
            direct = [address for address in candidate.addresses if not is_circuit(address)]
            others = [address for address in direct if not is_loopback(address)]
            known = candidate.peer_id in self._places or candidate.peer_id == self._transport.peer_id
            if direct and not known:
                found.append(Candidate(candidate.peer_id, tuple(others or direct)))
        return found
