"""The transport without a daemon, for macOS, Windows, ARM and notebooks: the host of py-libp2p.

    transport = await Libp2pTransport.create()
    stream = await transport.open_stream(PEER_ID, "/x/1", addresses=[ADDRESS], timeout_s=5)

A thin adapter, with TCP, Noise and yamux: what the Go daemon of `p2pd` and every other libp2p peer
speak. It knows no relays and no hole punching, so it reaches peers that can be dialled, and serves
those and the ones that it has dialled itself. Limitations of py-libp2p 0.8.1 to live with:

- what has come but was not read yet is lost when the connection breaks, and now and then the break of a
  connection reads as a clean end: who waits for an answer must know when it is whole;
- a peer that vanishes without a word is noticed after 15 to 45 s, and dialled anew only then;
- a peer may open any number of streams.

libp2p and trio are imported by `create`: libp2p cannot share a process with hivemind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from petal_swarm.errors import ConfigError, PeerUnreachableError
from petal_swarm.net.addresses import is_circuit, join_address, split_address
from petal_swarm.net.identity import Identity
from petal_swarm.net.transport import StreamHandler, run_handler

if TYPE_CHECKING:
    from petal_swarm.net.libp2p_host import Host
    from petal_swarm.net.libp2p_stream import Libp2pStream

logger = logging.getLogger(__name__)

HANDLERS_TIMEOUT_S = 1.0


class Libp2pTransport:
    """A peer without a daemon. Made by `create`, to be closed with `close`."""

    def __init__(self, host: Host, peer_id: str, addresses: Sequence[str]) -> None:
        self.peer_id = peer_id
        self._host = host
        self._addresses = tuple(join_address(address, peer_id) for address in addresses)
        self._known: dict[str, tuple[str, ...]] = {}
        self._served: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @classmethod
    async def create(
        cls, *, identity: Identity | None = None, listen: Sequence[str] = (), announce: Sequence[str] = ()
    ) -> Libp2pTransport:
        """Start the trio thread. `announce` replaces what others are told to dial; no `listen`: a client.

        Raises:
            ConfigError: py-libp2p is missing or hivemind is loaded, or an address cannot be used.
        """
        if any(find_spec(name) is None for name in ("libp2p", "trio")):
            raise ConfigError("the libp2p transport needs py-libp2p: pip install libp2p")
        try:
            from petal_swarm.net.libp2p_host import Host
        except TypeError as error:
            # What protobuf raises for a duplicate symbol.
            raise ConfigError("py-libp2p cannot be loaded beside hivemind; use transport='p2pd'") from error
        for address in (*listen, *announce):
            _require_multiaddr(address)
        identity = identity or Identity.generate()
        host = await Host.start(identity.private_key_protobuf()[4:36], listen)
        return cls(host, identity.peer_id, announce or host.addresses)

    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    async def connect(self, address: str, *, timeout_s: float) -> str:
        peer_id = split_address(address)[1]
        bases = self._bases(peer_id, [address])
        await self._host.call(address, self._host.connect, peer_id, bases, timeout_s=timeout_s)
        self._known[peer_id] = bases
        return peer_id

    async def open_stream(
        self, peer_id: str, protocol: str, *, addresses: Sequence[str] = (), timeout_s: float
    ) -> Libp2pStream:
        bases = self._bases(peer_id, addresses)
        stream = await self._host.call(
            f"peer {peer_id}", self._host.open_stream, peer_id, protocol, bases, timeout_s=timeout_s
        )
        self._known[peer_id] = bases
        return stream

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """See `Transport.serve`. Without `listen`, it is the peers that this one has dialled that are served.

        Raises:
            ConfigError: `protocol` is served already.
        """
        if protocol in self._served:
            raise ConfigError(f"{protocol} is served already")
        self._served.add(protocol)

        def accept(stream: Libp2pStream) -> None:
            task = asyncio.get_running_loop().create_task(run_handler(protocol, handler, stream, logger))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._host.post(self._host.serve, protocol, accept)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=HANDLERS_TIMEOUT_S)
        await self._host.stop()

    def _bases(self, peer_id: str, addresses: Sequence[str]) -> tuple[str, ...]:
        """Where to dial a peer: at those of `addresses` that are its own, or where it was found before.

        Raises:
            ConfigError: one is no address.
            PeerUnreachableError: all lead through relays. py-libp2p's TCP would dial the relay, and find the
                wrong peer there.
        """
        for address in (f"/p2p/{peer_id}", *addresses):
            _require_multiaddr(address)
        own = {base: is_circuit(base) for base, owner in map(split_address, addresses) if owner == peer_id}
        bases = tuple(base for base, relayed in own.items() if not relayed) or self._known.get(peer_id, ())
        if own and not bases:
            raise PeerUnreachableError(
                f"peer {peer_id} can only be reached through a relay, which the libp2p transport cannot use;"
                " use p2pd (Linux x86-64), or other servers"
            )
        return bases


def _require_multiaddr(address: str) -> None:
    """
    Raises:
        ConfigError: not one, or the peer id in it is not one.
    """
    from multiaddr import Multiaddr
    from multiaddr.exceptions import ParseError

    try:
        Multiaddr(address)
    except (ParseError, ValueError) as error:
        raise ConfigError(f"not a usable address: {address!r:.200} ({error})") from None
