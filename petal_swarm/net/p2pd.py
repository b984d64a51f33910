"""The default transport on Linux x86-64: hivemind's `P2P`, with the Go libp2p daemon as a child process.

The daemon gives encryption (TLS 1.3), NAT traversal and relays; this process talks to it over a Unix
socket, one per stream. hivemind is imported on use: it cannot share a process with py-libp2p.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from petal_swarm.errors import (
    ConfigError,
    NetworkError,
    PeerUnreachableError,
    RemoteProtocolError,
    StreamClosedError,
    UnsupportedProtocolError,
)
from petal_swarm.net.addresses import is_circuit, is_loopback, join_address, split_address, tcp_port
from petal_swarm.net.identity import Identity
from petal_swarm.net.p2pd_addresses import address_from_bytes, address_to_bytes
from petal_swarm.net.p2pd_stream import P2pdStream
from petal_swarm.net.relay import Candidate, RelayRefusedError, reserve
from petal_swarm.net.transport import StreamHandler, run_handler
from petal_swarm.wire.announcement import MAX_ADDRESSES

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0

#: A message passes several goroutines of the daemon. With more than one thread each of them may wake another
#: core: 0.04 ms a hop [measured], and no throughput is gained (16 MiB there and back in 0.06 s either way).
DAEMON_GO_THREADS = "1"

#: What others' traffic through this daemon may take: 32 peers with a place, 16 connections each, two buffers
#: for each connection. 64 MiB at most; the daemon's own defaults come to 64 GiB.
RELAY_BOUNDS = {"relayMaxReservations": 32, "relayMaxCircuits": 16, "relayBufferSize": 64 << 10}

#: Of a daemon that got its relay wrong, which is rare with one Go thread.
RELAY_RESTARTS = 4


class P2pdTransport:
    """A peer with its own daemon. `p2p` is hivemind's object, which the DHT shares."""

    def __init__(self, p2p: Any, announced: tuple[str, ...], *, listens: bool) -> None:
        self.p2p = p2p
        self.peer_id = str(p2p.peer_id)
        self.listens = listens
        #: Where this peer can be dialled through relays, to be told to others too.
        self.relayed: tuple[str, ...] = ()
        self._announced = announced
        self._visible: tuple[str, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @classmethod
    async def create(
        cls,
        *,
        identity: Identity | None = None,
        listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        announce: Sequence[str] = (),
        initial_peers: Sequence[str] = (),
        reachability: str = "auto",
        startup_timeout_s: float = 15.0,
    ) -> P2pdTransport:
        """Start the daemon. `announce` is what others are told to dial; no `listen` makes a pure client.

        `reachability` is what the daemon takes for granted: `public` makes it a full relay for others from
        the start, `private` makes it look for relays, `auto` lets it find out from its peers (AutoNAT).
        `announce` implies `public`.

        Raises:
            ConfigError: hivemind is not installed, or the daemon refuses an address.
        """
        if announce and reachability == "auto":
            reachability = "public"
        options: dict[str, Any] = {"listen": listen, "announce": announce, "initial_peers": initial_peers}
        options |= {"reachability": reachability, "startup_timeout_s": startup_timeout_s}
        identity = identity or Identity.generate()
        self = await cls._start(identity, **options)
        for _ in range(RELAY_RESTARTS if listen and reachability == "public" else 0):
            try:
                if await self._relays_as_told(listen):
                    break
            except BaseException:
                await self.close()
                raise
            await self.close()
            self = await cls._start(identity, **options)
        return self

    @classmethod
    async def _start(
        cls,
        identity: Identity,
        *,
        listen: Sequence[str],
        announce: Sequence[str],
        initial_peers: Sequence[str],
        reachability: str,
        startup_timeout_s: float,
    ) -> P2pdTransport:
        p2p_class, daemon_error = _import_hivemind()
        relays = _one_address_each(initial_peers) if reachability != "public" else []
        bounds = RELAY_BOUNDS | ({"relayDiscovery": False} if relays else {})
        daemon_class = _with_arguments(p2p_class, bounds)
        for address in initial_peers:
            split_address(address)
        with tempfile.TemporaryDirectory(prefix="petal-swarm-") as folder:
            # The daemon reads the key once, at its start, and only from a file.
            key_file = Path(folder, "identity")
            identity.save(key_file)
            try:
                with _default_environment("GOMAXPROCS", DAEMON_GO_THREADS):
                    p2p = await daemon_class.create(
                        identity_path=str(key_file),
                        check_if_identity_free=False,
                        host_maddrs=list(listen),
                        no_listen=not listen,
                        announce_maddrs=[split[0] for split in map(_split_optional, announce)] or None,
                        initial_peers=list(initial_peers) or None,
                        dht_mode="server" if listen and reachability != "private" else "client",
                        nat_port_map=any(not is_loopback(address) for address in listen),
                        force_reachability=None if reachability == "auto" else reachability,
                        use_auto_relay=bool(relays),
                        trusted_relays=relays or None,
                        startup_timeout=startup_timeout_s,
                        idle_timeout=startup_timeout_s,
                    )
            except (daemon_error, ValueError) as error:
                await _bury(daemon_class)
                raise ConfigError(f"the libp2p daemon did not start: {_first_line(error)}") from error
        announced = tuple(join_address(address, identity.peer_id) for address in announce)
        self = cls(p2p, announced, listens=bool(listen))
        try:
            await self.refresh_addresses()
        except BaseException:
            await p2p.shutdown()
            raise
        return self

    async def _relays_as_told(self, listen: Sequence[str]) -> bool:
        """Whether the daemon relays within `RELAY_BOUNDS`, as far as can be found out from this machine.

        It installs its relay twice, in two goroutines: with its arguments, and with limits too low to be
        of use. The later one wins. Asked is by a daemon of its own, since none dials itself.
        """
        own = [address.replace("/0.0.0.0/", "/127.0.0.1/").replace("/::/", "/::1/") for address in listen]
        own = [join_address(address, self.peer_id) for address in own if tcp_port(address)]
        asking = await P2pdTransport.create(listen=())
        try:
            await reserve(asking, Candidate(self.peer_id, (*own, *self._visible)))
        except RelayRefusedError:
            return False
        except (NetworkError, RemoteProtocolError) as error:
            logger.info("could not find out whether this machine relays for others: %s", error)
        finally:
            await asking.close()
        return True

    def addresses(self) -> tuple[str, ...]:
        direct = (self._announced or self._visible)[: MAX_ADDRESSES - len(self.relayed)]
        return tuple(dict.fromkeys((*direct, *self.relayed)))

    async def refresh_addresses(self) -> None:
        """Ask the daemon where it can be dialled: a router's answer, or a relay's, may come late.

        Raises:
            NetworkError: the daemon does not answer.
        """
        from hivemind.proto.p2pd_pb2 import Request

        try:
            response = await self._ask_daemon_once(Request(type=Request.IDENTIFY))
        except Exception as error:  # the daemon's own, or those of a socket that it has left
            raise NetworkError(f"the libp2p daemon does not answer: {_first_line(error)}") from None
        told = [join_address(address_from_bytes(base), self.peer_id) for base in response.identify.addrs]
        self._visible = tuple(address for address in told if self.listens or is_circuit(address))

    async def connect(self, address: str, *, timeout_s: float) -> str:
        _, peer_id = split_address(address)
        await self._connect(peer_id, [address], timeout_s)
        return peer_id

    async def _connect(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        """Dial all addresses of a peer at once; the daemon keeps the first that answers."""
        from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
        from hivemind.proto.p2pd_pb2 import ConnectRequest, Request

        told = " or ".join(addresses)
        try:
            target = PeerID.from_base58(peer_id)
            bases = [address_to_bytes(split_address(address)[0]) for address in addresses]
        except ValueError as error:
            raise ConfigError(f"not a usable address: {told:.200} ({_first_line(error)})") from None
        try:
            async with asyncio.timeout(timeout_s):
                request = ConnectRequest(peer=target.to_bytes(), addrs=bases)
                await self._ask_daemon_once(Request(type=Request.CONNECT, connect=request))
        except TimeoutError:
            raise PeerUnreachableError(f"no answer from {told} within {timeout_s:g} s") from None
        except Exception as error:
            raise PeerUnreachableError(f"cannot reach {told}: {_first_line(error)}") from None

    async def open_stream(
        self, peer_id: str, protocol: str, *, addresses: Sequence[str] = (), timeout_s: float
    ) -> P2pdStream:
        from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
        from hivemind.proto.p2pd_pb2 import Request, StreamOpenRequest

        try:
            async with asyncio.timeout(timeout_s):
                await self._dial(peer_id, addresses, timeout_s)
                request = StreamOpenRequest(peer=PeerID.from_base58(peer_id).to_bytes(), proto=[protocol])
                _, reader, writer = await self._ask_daemon(
                    Request(type=Request.STREAM_OPEN, streamOpen=request)
                )
        except (NetworkError, ConfigError):
            raise
        except TimeoutError:
            raise PeerUnreachableError(f"no answer from peer {peer_id} within {timeout_s:g} s") from None
        except Exception as error:
            # The daemon reports everything as ControlFailure with a Go error message.
            if "protocols not supported" in str(error) or "protocol not supported" in str(error):
                raise UnsupportedProtocolError(
                    f"peer {peer_id} does not speak {protocol}; it may run another version"
                ) from None
            raise PeerUnreachableError(f"cannot reach peer {peer_id}: {_first_line(error)}") from None
        return await P2pdStream.adopt(peer_id, reader, writer)

    async def _ask_daemon(self, request: Any) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request on a connection of its own; return the daemon's consent and that connection.

        As hivemind's own calls, which leave the connection behind if the daemon refuses or the caller
        is cancelled.
        """
        from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
        from hivemind.proto.p2pd_pb2 import Response

        reader, writer = await self.p2p._client.control.daemon_connector.open_connection()
        try:
            await write_pbmsg(writer, request)
            response = Response()
            await read_pbmsg_safe(reader, response)
            raise_if_failed(response)
        except BaseException:
            writer.transport.abort()
            raise
        return response, reader, writer

    async def _ask_daemon_once(self, request: Any) -> Any:
        """The daemon's answer to a request that needs its connection no longer."""
        response, _, writer = await self._ask_daemon(request)
        writer.close()
        return response

    async def _connected_peers(self) -> set[bytes]:
        from hivemind.proto.p2pd_pb2 import Request

        response = await self._ask_daemon_once(Request(type=Request.LIST_PEERS))
        return {peer.id for peer in response.peers}

    async def _dial(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        """Connect to the peer if the daemon is not connected yet."""
        from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID

        own = [address for address in addresses if split_address(address)[1] == peer_id]
        if own and PeerID.from_base58(peer_id).to_bytes() not in await self._connected_peers():
            await self._connect(peer_id, own, timeout_s)

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        async def on_stream(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            with contextlib.suppress(StreamClosedError, asyncio.CancelledError):
                stream = await P2pdStream.adopt(str(info.peer_id), reader, writer)
                stream.remote_address = address_from_bytes(info.addr.to_bytes())
                await run_handler(protocol, handler, stream, logger)

        await self.p2p.add_binary_stream_handler(protocol, on_stream)

    async def wait_daemon(self) -> None:
        """Return when the daemon has ended: by `close`, or because it died."""
        await self.p2p._child.wait()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.p2p.shutdown()
        except TimeoutError:
            self.p2p._child.kill()
            await self.p2p._child.wait()


def _import_hivemind() -> tuple[Any, type[Exception]]:
    try:
        from hivemind.p2p import P2P
        from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
    except ImportError as error:
        raise ConfigError(
            "the p2pd transport needs hivemind, which ships for Linux x86-64 only; use transport='libp2p'"
        ) from error
    return P2P, P2PDaemonError


#: A terminal sends Ctrl-C to its whole foreground group, and a daemon in it would end at once, while its
#: program still has steps to finish. It ends with its program in any case: it notices that it is alone.
_APART = (
    *(sys.executable, "-I", "-S", "-c"),
    "import os, sys; os.setpgid(0, 0); os.execv(sys.argv[1], sys.argv[1:])",
)


def _with_arguments(p2p_class: Any, arguments: dict[str, Any]) -> Any:
    """A `P2P` whose daemon gets arguments that `P2P.create` knows nothing of, and its own process group."""

    class Daemon(p2p_class):  # type: ignore[misc]
        last: Any = None

        def __init__(self) -> None:
            super().__init__()
            type(self).last = self

        @staticmethod
        def _make_process_args(*args: Any, **given: Any) -> list[str]:
            return [*_APART, *p2p_class._make_process_args(*args, **given, **arguments)]

    return Daemon


async def _bury(daemon_class: Any) -> None:
    """Wait for a daemon that did not start: hivemind leaves its process to whoever closes the loop."""
    child = daemon_class.last._child if daemon_class.last is not None else None
    if child is None:
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await child.wait()
    child._transport.close()


def _one_address_each(addresses: Sequence[str]) -> list[str]:
    """The first direct address of each peer: the daemon counts a relay with two addresses as two."""
    first: dict[str, str] = {}
    for address in addresses:
        if not is_circuit(address):
            first.setdefault(split_address(address)[1], address)
    return list(first.values())


@contextlib.contextmanager
def _default_environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for child processes started inside, unless it is set: hivemind takes no argument."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _split_optional(address: str) -> tuple[str, str]:
    return split_address(address) if "/p2p/" in address else (address, "")


_GO_PREFIXES = re.compile(
    r"^(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d |Daemon failed to start: |Connect failed\. msg="
    r"|failed to dial:? ?(\w{40,}: )?)+"
)


def _first_line(error: BaseException) -> str:
    """The reason in an error of the daemon, without Go's timestamps and its repeated beginnings."""
    lines = str(error).strip().splitlines()
    return _GO_PREFIXES.sub("", lines[0])[:300] if lines else type(error).__name__
