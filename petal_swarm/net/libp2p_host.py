"""The stock host of py-libp2p in a trio thread, and the bridge between it and an asyncio loop.

A call in either direction is an append to a queue and a wake-up; neither side blocks for the other.
Imported by `libp2p.py`, on use. What of py-libp2p 0.8.1 is worked around, and why, is said at the place.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, TypeVarTuple

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection import swarm_connection
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from petal_swarm.errors import (
    ConfigError,
    NetworkError,
    PeerUnreachableError,
    UnsupportedProtocolError,
)
from petal_swarm.net.libp2p_stream import CLOSE_TIMEOUT_S, POLL_S, Libp2pStream, reason

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

logger = logging.getLogger(__name__)

# py-libp2p cuts its logger off and gives it no handler, so that Python's handler of last resort prints.
logging.getLogger("libp2p").addHandler(logging.NullHandler())
# This module of it logs to the root logger, which installs a handler in the user's program.
swarm_connection.logging = logging.getLogger("libp2p.network.connection.swarm_connection")

#: A connection that takes longer to send a frame, or to answer a ping behind an upload, is given up.
WRITE_TIMEOUT_S = 30.0
PING_INTERVAL_S = 15.0
PING_TIMEOUT_S = 30.0

#: How long the thread may take to end.
STOP_TIMEOUT_S = 5.0


class Host:
    """Made by `start`, in the loop, and ended by `stop`."""

    def __init__(self, private_key: bytes, listen: Sequence[str]) -> None:
        self.addresses: tuple[str, ...] = ()
        self._listen = [Multiaddr(address) for address in listen]
        self._host = _new_host(private_key)
        self._network = self._host.get_network()
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[Host] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="petal-swarm-libp2p", daemon=True)
        self._token: trio.lowlevel.TrioToken | None = None
        self._stopping = trio.Event()
        self._streams: set[Libp2pStream] = set()
        self._dialling: dict[str, trio.Lock] = {}

    @classmethod
    async def start(cls, private_key: bytes, listen: Sequence[str]) -> Host:
        """
        Raises:
            ConfigError: an address to listen on cannot be used.
        """
        host = cls(private_key, listen)
        host._thread.start()
        try:
            return await asyncio.shield(host._started)
        except asyncio.CancelledError:
            host._started.add_done_callback(lambda _: host.post(host._stopping.set))
            raise
        except (ConfigError, NetworkError):
            host._thread.join()  # this was its last word
            raise

    async def stop(self) -> None:
        self.post(self._stopping.set)
        await asyncio.wait([self._ended], timeout=STOP_TIMEOUT_S)
        if self._ended.done():
            self._thread.join()  # its last act was to set the future: this returns at once

    def post(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Run `function` in the trio thread, in the order of the posts; dropped when that has ended."""
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function, *args)

    def reply(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Run `function` in the loop; if that is closed, there is nobody left to work for."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            self._stopping.set()

    async def call(
        self, what: str, function: Callable[[*Ts], Awaitable[T]], *args: *Ts, timeout_s: float
    ) -> T:
        """In the loop: run an async function in trio. A stream that it returns too late is aborted.

        Raises:
            PeerUnreachableError: it, `what`, has not returned within `timeout_s`.
            NetworkError: trio has ended; and whatever `function` raises.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        scope = trio.CancelScope()

        async def run() -> None:
            try:
                with scope:
                    self.reply(_finish, future, await function(*args))
            except Exception as error:
                self.reply(_fail, future, error)
            finally:
                self.reply(_fail, future, NetworkError("the transport is closed"))

        if self._ended.done():
            raise NetworkError("the transport is closed")
        self.post(trio.lowlevel.spawn_system_task, run)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(future)
        except TimeoutError:
            future.add_done_callback(_discard)
            raise PeerUnreachableError(f"no answer from {what} within {timeout_s:g} s") from None
        except asyncio.CancelledError:
            future.add_done_callback(_discard)
            raise
        finally:
            self.post(scope.cancel)

    # -- in trio

    async def connect(self, peer_id: str, bases: Sequence[str]) -> None:
        """Dial a peer at all of its addresses at once, unless there is a connection.

        Not by `host.connect`: that tries one TCP address of a peer only, no loopback address if there is
        any other, and none at all for 60 s after a failure.
        """
        peer = ID.from_base58(peer_id)
        async with self._dialling.setdefault(peer_id, trio.Lock()):
            if self._is_connected(peer):
                return
            failures: list[str] = []

            async def attempt(base: str) -> None:
                try:
                    await self._network.dial_addr(Multiaddr(base), peer)
                    nursery.cancel_scope.cancel()
                except Exception as error:
                    # The boundary to a peer nobody knows yet: py-libp2p raises as it pleases.
                    failures.append(f"at {base}: {reason(error)}")

            async with trio.open_nursery() as nursery:
                for base in bases:
                    nursery.start_soon(attempt, base)
            if not self._is_connected(peer):
                why = "; ".join(failures) or "no address of it is known: pass `addresses`"
                raise PeerUnreachableError(f"cannot reach peer {peer_id}: {why}")

    def _is_connected(self, peer: ID) -> bool:
        return any(not connection.is_closed for connection in self._network.get_connections(peer))

    async def open_stream(self, peer_id: str, protocol: str, bases: Sequence[str]) -> Libp2pStream:
        await self.connect(peer_id, bases)
        try:
            opened = await self._host.new_stream(ID.from_base58(peer_id), [protocol])
        except Exception as error:
            if "protocols not supported" in str(error.__cause__):
                raise UnsupportedProtocolError(
                    f"peer {peer_id} does not speak {protocol}; it may run another version"
                ) from None
            raise PeerUnreachableError(f"cannot open a stream to {peer_id}: {reason(error)}") from None
        stream = Libp2pStream(self, opened)
        trio.lowlevel.spawn_system_task(self._carry, stream)
        return stream

    def serve(self, protocol: str, accept: Callable[[Libp2pStream], object]) -> None:
        """`accept` is called in the loop for each stream of this protocol."""

        async def handle(opened: Any) -> None:
            stream = Libp2pStream(self, opened)
            self.reply(accept, stream)
            await self._carry(stream)

        self._host.set_stream_handler(protocol, handle)

    async def _carry(self, stream: Libp2pStream) -> None:
        self._streams.add(stream)
        try:
            await stream.carry()
        finally:
            self._streams.discard(stream)

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except ConfigError as error:
            self.reply(_fail, self._started, error)
        except BaseException as error:
            logger.exception("the trio thread failed")
            self.reply(_fail, self._started, NetworkError(f"py-libp2p failed: {reason(error)}"))
        self.reply(self._ended.set_result, None)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with self._host.run(self._listen):
            # This one dials whatever addresses other peers tell of.
            await self._network.auto_connector.stop()
            self.addresses = tuple(map(str, self._host.get_transport_addrs()))
            listening = len(self._network.listeners) == len(self._listen)
            if listening:
                self.reply(_finish, self._started, self)
                await self._stopping.wait()
                await self._hang_up()
        if not listening:
            raise ConfigError(f"cannot listen on {', '.join(map(str, self._listen))}")

    async def _hang_up(self) -> None:
        """Send what is queued and let peers end, as far as that can be done in time."""
        with trio.move_on_after(CLOSE_TIMEOUT_S):
            for stream in self._streams:
                stream.finish()
            while self._streams:  # noqa: ASYNC110 - for a second, once
                await trio.sleep(POLL_S)
        # Sockets first: py-libp2p says goodbye, and waits for whoever is writing to a peer that hangs.
        for connection in self._network.get_connections():
            await connection.muxed_conn.secured_conn.close()
        async with trio.open_nursery() as nursery:
            for connection in self._network.get_connections():
                nursery.start_soon(connection.close)


class _TcpStream(TrioTCPStream):  # type: ignore[misc]
    """A write cannot be cancelled, but has a deadline.

    Cancelled between encrypting and sending, as when a stream takes too long to open, it would leave the
    ciphers of the two sides out of step, and the connection would be lost.
    """

    async def write(self, data: bytes) -> None:
        with trio.CancelScope(deadline=trio.current_time() + WRITE_TIMEOUT_S, shield=True) as scope:
            await super().write(data)
        if scope.cancelled_caught:
            await trio.aclose_forcefully(self.stream)
            raise ConnectionClosedError("the peer takes no data")


class _Tcp(TCP):  # type: ignore[misc]
    async def dial(self, maddr: Multiaddr) -> Any:
        connection = await super().dial(maddr)
        connection.stream = _TcpStream(connection.stream.stream)
        return connection

    def create_listener(self, handler_function: Callable[[Any], Awaitable[None]]) -> Any:
        return super().create_listener(lambda stream: handler_function(_TcpStream(stream.stream)))


def _new_host(private_key: bytes) -> Any:
    key = Ed25519PrivateKey.from_bytes(private_key)
    keys = KeyPair(key, key.get_public_key())
    host = new_host(
        key_pair=keys,
        # Noise only: by default, a peer may also offer not to authenticate itself at all.
        sec_opt={NOISE: NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)},
        # Not mplex, which resets a stream that is not read for 5 s and stops all others until then.
        muxer_opt={YAMUX: Yamux},
        transports=[_Tcp()],
        connection_config=ConnectionConfig(
            # Longer than any deadline of the callers.
            outbound_stream_protocol_negotiation_timeout=3600,
            enable_health_monitoring=True,
            health_initial_delay=0,
            health_warmup_window=0,
            health_check_interval=PING_INTERVAL_S,
            ping_timeout=PING_TIMEOUT_S,
            abort_connection_on_ping_failure=True,
            # A peer that answers at all is not replaced, however slow it is.
            min_health_threshold=0,
            min_ping_success_rate=0,
            max_ping_latency=float("inf"),
        ),
        disable_identify_address_discovery=True,
    )
    network = host.get_network()
    # It counts a dial that is cancelled for ever, and denies all others in the end.
    network.set_resource_manager(None)
    network.retry_config = RetryConfig(max_retries=0)
    handler = network.common_stream_handler

    async def handle(stream: Any) -> None:
        """A peer that names a protocol by what is not text must not end the whole host."""
        try:
            await handler(stream)
        except Exception as error:
            logger.debug("a stream from %s failed: %s", stream.muxed_conn.peer_id, reason(error))
            await stream.reset()

    network.set_stream_handler(handle)
    return host


def _finish(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _discard(future: asyncio.Future[Any]) -> None:
    if future.exception() is None and isinstance(future.result(), Libp2pStream):
        future.result().abort()
