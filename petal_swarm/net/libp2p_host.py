"""The py-libp2p side of the transport without a daemon: dialling, listening, agreeing on protocols.

Of py-libp2p 0.8.1 this uses the keys, the peer ids, multistream-select and Noise. It does without its
`Swarm` and `BasicHost`, because those

- refuse to dial a peer again for 60 s after one failure: a restarted server stays lost;
- try one TCP address of a peer only, and no loopback address if there is any other;
- know no deadline of the caller's, and sleep 100 ms for every connection they close;
- call `logging.debug` on the root logger, which installs a handler in the user's program.

Noise, not TLS: every libp2p peer speaks it, 16 MiB take two thirds of the time, and py-libp2p's TLS
writes its key to a temporary file and reports a failed read as a clean end.

Imported in the trio thread only, on use: it imports libp2p, which cannot share a process with hivemind.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
from collections.abc import Callable, Sequence
from typing import Any

import trio
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils import encode_delim
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from petal_swarm.errors import ConfigError, PeerUnreachableError, UnsupportedProtocolError
from petal_swarm.net.libp2p_connection import Channel, Connection, Socket
from petal_swarm.net.libp2p_thread import TrioThread
from petal_swarm.net.libp2p_yamux import PROTOCOL as YAMUX

logger = logging.getLogger(__name__)

# py-libp2p turns off its logger's propagation and gives it no handler, so that Python's handler of last
# resort prints its warnings ("connection closed") on stderr. A library's logger has a NullHandler.
logging.getLogger("libp2p").addHandler(logging.NullHandler())

_MULTISTREAM = "/multistream/1.0.0"
_NOT_AVAILABLE = "na"
_NAME_BYTES = 1024
_NAMES_TRIED = 16
_OUR_DEADLINE_IS_SHORTER_S = 3600

#: How long a peer that dials us may take for its handshake, and one that opens a stream to name a protocol.
HANDSHAKE_TIMEOUT_S = 10.0

#: Peers in their handshake at one time; others are turned away.
MAX_HANDSHAKES = 64

Endpoint = tuple[str, int]


class Host:
    """A peer: its key, its connections, its listeners and the protocols it serves."""

    def __init__(self, thread: TrioThread, seed: bytes) -> None:
        key = Ed25519PrivateKey.from_bytes(seed)
        keys = KeyPair(key, key.get_public_key())
        noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
        self.peer_id = str(ID.from_pubkey(keys.public_key))
        self._thread = thread
        self._upgrader = TransportUpgrader({NOISE: noise}, {})
        self._connections: dict[str, list[Connection]] = {}
        self._dialling: dict[str, trio.Lock] = {}
        self._handshakes = trio.CapacityLimiter(MAX_HANDSHAKES)
        self._served: dict[str, Callable[[Channel], object]] = {}

    # -- what the asyncio side calls

    async def connect(self, peer_id: str, endpoints: Sequence[Endpoint], timeout_s: float) -> None:
        with trio.move_on_after(timeout_s):
            await self._connection(peer_id, endpoints)
            return
        raise PeerUnreachableError(f"no answer from {_described(peer_id, endpoints)} within {timeout_s:g} s")

    async def open_stream(
        self, peer_id: str, protocol: str, endpoints: Sequence[Endpoint], timeout_s: float
    ) -> Channel:
        with trio.move_on_after(timeout_s):
            connection = await self._connection(peer_id, endpoints)
            channel = connection.open()
            try:
                await _ask(channel, protocol)
            except BaseException:
                channel.reset()
                raise
            return channel
        raise PeerUnreachableError(f"no answer from {_described(peer_id, endpoints)} within {timeout_s:g} s")

    def serve(self, protocol: str, accept: Callable[[Channel], object]) -> None:
        """`accept` is called in the asyncio loop for each stream of this protocol."""
        self._served[protocol] = accept

    async def listen(self, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        """Accept connections; gives the endpoints with their actual ports."""
        listeners: list[trio.SocketListener] = []
        for host, port in endpoints:
            try:
                listeners += await trio.open_tcp_listeners(port, host=host)
            except OSError as error:
                for listener in listeners:
                    await listener.aclose()
                raise ConfigError(f"cannot listen on {host} port {port}: {_reason(error)}") from None
        for listener in listeners:
            self._thread.spawn(self._accept_connections, listener)
        bound = [listener.socket.getsockname()[:2] for listener in listeners]
        return [each for host, port in bound for each in _reachable(host, port)]

    async def shut_down(self, timeout_s: float) -> None:
        """Send what is queued on all streams and end them, as far as that can be done in time."""
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                for connections in list(self._connections.values()):
                    for connection in list(connections):
                        nursery.start_soon(connection.shut_down)

    # -- dialling

    async def _connection(self, peer_id: str, endpoints: Sequence[Endpoint]) -> Connection:
        """The connection to a peer, made if there is none; many callers at once make one."""
        if connections := self._connections.get(peer_id):
            return connections[-1]
        if not endpoints:
            raise PeerUnreachableError(f"no TCP address of peer {peer_id} is known: pass `addresses`")
        lock = self._dialling.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                if connections := self._connections.get(peer_id):
                    return connections[-1]
                return await self._dial(peer_id, endpoints)
        finally:
            if not lock.locked():
                self._dialling.pop(peer_id, None)

    async def _dial(self, peer_id: str, endpoints: Sequence[Endpoint]) -> Connection:
        """Try all addresses at once; the first that proves to be the peer wins."""
        winners: list[Connection] = []
        failures: list[str] = []

        async def attempt(endpoint: Endpoint) -> None:
            try:
                connection = await self._dial_endpoint(peer_id, endpoint)
            except Exception as error:
                # The boundary to a peer nobody knows yet: py-libp2p and its parsers raise as they please.
                failures.append(f"{endpoint[0]} port {endpoint[1]}: {_reason(error)}")
                return
            winners.append(connection)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for endpoint in endpoints:
                nursery.start_soon(attempt, endpoint)
        if not winners:
            raise PeerUnreachableError(f"cannot reach peer {peer_id} at {'; '.join(failures)}")
        for connection in winners:
            self._start(connection)
        return winners[0]

    async def _dial_endpoint(self, peer_id: str, endpoint: Endpoint) -> Connection:
        socket = Socket(await trio.open_tcp_stream(*endpoint))
        try:
            raw = RawConnection(socket, True)
            secure = await self._upgrader.upgrade_security(raw, True, ID.from_base58(peer_id))
            communicator = MultiselectCommunicator(secure)
            await MultiselectClient().select_one_of([YAMUX], communicator, _OUR_DEADLINE_IS_SHORTER_S)
        except BaseException:
            await _close(socket)
            raise
        return self._make(peer_id, socket, secure, initiator=True)

    # -- listening

    async def _accept_connections(self, listener: trio.SocketListener) -> None:
        try:
            await trio.serve_listeners(self._greet, [listener])
        except* OSError as group:
            logger.error("stopped listening: %s", group.exceptions[0])

    async def _greet(self, stream: trio.SocketStream) -> None:
        socket = Socket(stream)
        try:
            self._handshakes.acquire_on_behalf_of_nowait(socket)
        except trio.WouldBlock:
            await _close(socket)
            return
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                secure = await self._upgrader.upgrade_security(RawConnection(socket, False), False)
                communicator = MultiselectCommunicator(secure)
                await Multiselect({YAMUX: None}).negotiate(communicator, _OUR_DEADLINE_IS_SHORTER_S)
        except Exception as error:
            # The boundary to a peer nobody knows yet, as in `_dial`.
            logger.debug("a handshake failed: %s", _reason(error))
            await _close(socket)
            return
        except BaseException:
            await _close(socket)
            raise
        finally:
            self._handshakes.release_on_behalf_of(socket)
        connection = self._make(str(secure.get_remote_peer()), socket, secure, initiator=False)
        self._remember(connection)
        await connection.run()

    async def _accept_stream(self, channel: Channel) -> None:
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                protocol = await _answer(channel, self._served)
        except (BaseLibp2pError, trio.TooSlowError, ValueError, EOFError) as error:
            logger.debug("%s opened a stream and named no protocol: %s", channel.peer_id, _reason(error))
            channel.reset()
        else:
            self._thread.reply(self._served[protocol], channel)

    # -- the connections there are

    def _make(self, peer_id: str, socket: Socket, secure: Any, *, initiator: bool) -> Connection:
        return Connection(
            peer_id,
            self._thread,
            socket,
            secure,
            initiator=initiator,
            on_stream=self._accept_stream,
            on_gone=self._forget,
        )

    def _start(self, connection: Connection) -> None:
        self._remember(connection)
        self._thread.spawn(connection.run)

    def _remember(self, connection: Connection) -> None:
        self._connections.setdefault(connection.peer_id, []).append(connection)

    def _forget(self, connection: Connection) -> None:
        connections = self._connections.get(connection.peer_id, [])
        if connection in connections:
            connections.remove(connection)
        if not connections:
            self._connections.pop(connection.peer_id, None)


async def _ask(channel: Channel, protocol: str) -> None:
    """Agree on the protocol of a stream that we open, in one round trip where py-libp2p takes two."""
    channel.write(encode_delim(_MULTISTREAM.encode()) + encode_delim(protocol.encode()))
    try:
        answers = [await _read_name(channel), await _read_name(channel)]
    except (BaseLibp2pError, ValueError) as error:
        raise PeerUnreachableError(
            f"peer {channel.peer_id} ended the stream before it answered: {_reason(error)}"
        ) from None
    if answers == [_MULTISTREAM, _NOT_AVAILABLE]:
        raise UnsupportedProtocolError(
            f"peer {channel.peer_id} does not speak {protocol}; it may run another version"
        )
    if answers != [_MULTISTREAM, protocol]:
        raise PeerUnreachableError(f"peer {channel.peer_id} does not speak multistream: {answers!r:.200}")


async def _answer(channel: Channel, served: dict[str, Callable[[Channel], object]]) -> str:
    """Agree on the protocol of a stream that the peer opened."""
    channel.write(encode_delim(_MULTISTREAM.encode()))
    if await _read_name(channel) != _MULTISTREAM:
        raise ValueError("not multistream")
    for _ in range(_NAMES_TRIED):
        name = await _read_name(channel)
        if name in served:
            channel.write(encode_delim(name.encode()))
            return name
        channel.write(encode_delim(_NOT_AVAILABLE.encode()))
    raise ValueError("none of its protocols is served here")


async def _read_name(channel: Channel) -> str:
    line: bytes = await read_varint_prefixed_bytes_limited(channel, _NAME_BYTES)
    if not line.endswith(b"\n"):
        raise ValueError("not a line")
    return line[:-1].decode()


async def _close(socket: Socket) -> None:
    with trio.CancelScope(shield=True):
        await socket.close()


def _reachable(host: str, port: int) -> list[Endpoint]:
    """Where others reach a listener: for one on all interfaces, the machine's own addresses."""
    address = ipaddress.ip_address(host)
    if not address.is_unspecified:
        return [(host, port)]
    from libp2p.utils.address_validation import get_available_interfaces

    version = f"ip{address.version}"
    found = [str(each).split("/") for each in get_available_interfaces(port)]
    return [(parts[2], port) for parts in found if parts[1] == version]


def _described(peer_id: str, endpoints: Sequence[Endpoint]) -> str:
    where = ", ".join(f"{host} port {port}" for host, port in endpoints)
    return f"peer {peer_id} at {where}" if where else f"peer {peer_id}"


def _reason(error: BaseException) -> str:
    """One line: what the kernel said, if that is at the bottom of it, or else the first words there are."""
    while error.__cause__ is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__
    if isinstance(error, BaseExceptionGroup):
        return _reason(error.exceptions[0])
    if isinstance(error, OSError) and error.errno == errno.ECONNREFUSED:
        return "connection refused"
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
