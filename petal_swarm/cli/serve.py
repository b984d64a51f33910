"""The life of a server process: from its arguments to `ready`, and from a signal to the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sys

from petal_swarm.cli.signals import Signals, first_of
from petal_swarm.client.loading_bar import loading_bar
from petal_swarm.directory.dht import DhtDirectory
from petal_swarm.directory.reachability import Reachability, advice, candidates, sentence
from petal_swarm.errors import ConfigError, ModelError, NetworkError, PeerUnreachableError
from petal_swarm.models.checkpoint import Checkpoint, open_checkpoint
from petal_swarm.net.addresses import is_loopback
from petal_swarm.net.identity import Identity
from petal_swarm.net.p2pd import P2pdTransport
from petal_swarm.net.private import PrivateTransport
from petal_swarm.net.relay import Candidate
from petal_swarm.net.swarm_key import load_swarm_key
from petal_swarm.net.transport import Transport
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.reachability import ReachabilityWatch, log_change
from petal_swarm.server.server import Server
from petal_swarm.wire.announcement import Announcement

logger = logging.getLogger("petal_swarm.cli")

#: Each part of leaving has a deadline of its own; this is for the sum.
CLOSE_TIMEOUT_S = 20.0


async def serve(config: ServerConfig) -> int:
    """Start a server, tell its address, and keep it until a signal comes. Returns the exit status."""
    signals = Signals()
    starting = asyncio.create_task(start(config))
    await first_of(starting, signals.first)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return 0
    server, transport, watch = starting.result()
    print(f"ready {best_address(server.addresses)}", flush=True)
    describe(server)
    watching = asyncio.create_task(watch.run())
    # What was loaded stays: the collector need not look at it again in the middle of a step.
    gc.collect()
    gc.freeze()
    daemon = asyncio.create_task(transport.wait_daemon())
    failed = asyncio.create_task(server.wait_failed())
    await first_of(daemon, failed, signals.first)
    try:
        if failed.done():
            raise ModelError("this server has no blocks any more; see above, then start it again")
        if not signals.first.done():
            raise NetworkError("the libp2p daemon has died; start the server again")
        await leave(server, signals)
        return 0
    finally:
        daemon.cancel()
        watching.cancel()
        failed.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await server.close()


async def start(config: ServerConfig) -> tuple[Server, P2pdTransport, ReachabilityWatch]:
    """Everything between the arguments and a serving server; leaves nothing behind if it fails."""
    key = load_swarm_key(config.swarm_key)
    checkpoint = await asyncio.to_thread(open_checkpoint, config.model)
    identity = Identity.load_or_create(config.identity) if config.identity else Identity.generate()
    try:
        transport = await P2pdTransport.create(
            identity=identity,
            listen=config.listen_addresses(),
            announce=config.announce,
            initial_peers=config.initial_peers,
            reachability=config.reachability,
        )
    except ConfigError as error:
        if "bootstrap peers" not in str(error):
            raise
        raise PeerUnreachableError(
            f"cannot join the swarm: nobody answers at {', '.join(config.initial_peers)};"
            " is a server running there, and is this the address that it printed after `ready`?"
        ) from None
    private = config.reachability == "private"
    try:
        # Whom others cannot dial by its peer id alone is no node for them to ask.
        directory = await DhtDirectory.create(
            transport, identity=identity, initial_peers=config.initial_peers, client_mode=private, key=key
        )
    except BaseException:
        await transport.close()
        raise
    peer = PrivateTransport(transport, key) if key else transport
    watch = watch_reachability(config, checkpoint, transport, peer, directory)
    try:
        if private and not (await watch.settle()).reachable:
            raise PeerUnreachableError(f"no relay took this server in: {watch.refusals or 'nobody answers'}")
    except BaseException:
        await directory.close()
        await transport.close()
        raise
    with loading_bar("loading blocks", shown=sys.stderr.isatty()) as report:
        server = await Server.start(config, checkpoint, peer, directory, progress=report)
        return server, transport, watch


def watch_reachability(
    config: ServerConfig,
    checkpoint: Checkpoint,
    transport: P2pdTransport,
    peer: Transport,
    directory: DhtDirectory,
) -> ReachabilityWatch:
    """Asks the initial peers by `peer`, then servers of the same model; tells stderr first, then the log."""
    told = False

    async def helpers() -> list[Candidate]:
        known: list[Announcement] = []
        with contextlib.suppress(NetworkError):  # the initial peers may relay all the same
            known = await directory.lookup(checkpoint.model_key)
        return candidates(config.initial_peers, known)

    def tell(verdict: Reachability) -> None:
        nonlocal told
        if told or verdict.kind == "unknown":
            log_change(verdict)
        elif verdict.scope != "machine":  # else `describe` says what there is to say
            print("\n".join(filter(None, (sentence(verdict), advice(verdict)))), file=sys.stderr)
        told = True

    return ReachabilityWatch(
        transport, helpers, peer=peer, private=config.reachability == "private", on_change=tell
    )


async def leave(server: Server, signals: Signals) -> None:
    """Let running sessions end, unless a second signal comes."""
    if server.num_sessions:
        print(
            f"leaving: waiting up to {server.config.drain_timeout_s:g} s for {server.num_sessions} sessions;"
            " once more to leave at once",
            file=sys.stderr,
        )
    draining = asyncio.create_task(server.drain(server.config.drain_timeout_s))
    await first_of(draining, signals.second)
    draining.cancel()
    await asyncio.gather(draining, return_exceptions=True)


def describe(server: Server) -> None:
    """Say on stderr what is served, and what to do next."""
    address = best_address(server.addresses)
    kept = server.announcement()
    weights = kept.dtype if kept.quant == "none" else f"{kept.quant} weights, {kept.dtype}"
    key = f" --swarm-key {server.config.swarm_key}" if server.config.swarm_key else ""
    print(
        f"serving blocks {server.span} of {server.checkpoint.name} ({weights},"
        f" room for {kept.kv_tokens} tokens of KV cache)\n"
        f"join with: run_server {server.config.model}{key} --initial-peers {address}",
        file=sys.stderr,
    )
    if all(map(is_loopback, server.addresses)):
        print(
            "only this machine can reach it; to let others join, add --listen /ip4/0.0.0.0/tcp/31330",
            file=sys.stderr,
        )


def best_address(addresses: tuple[str, ...]) -> str:
    """The one address to print: one that other machines can dial, if there is any."""
    public = [address for address in addresses if not is_loopback(address)]
    return (public or list(addresses))[0]
