"""A private swarm of real processes: who has the key is served, and nobody else gets anywhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hivemind")

from petal_swarm.cli.local_swarm import LocalSwarm, ServerProcess, wait_ready
from petal_swarm.cli.main import main
from petal_swarm.directory.dht import DhtDirectory
from petal_swarm.directory.records import sign_record
from petal_swarm.errors import PeerUnreachableError, PrivateSwarmError, StrangerError
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.net.identity import Identity
from petal_swarm.net.p2pd import P2pdTransport
from petal_swarm.net.private import PrivateTransport
from petal_swarm.net.swarm_key import SwarmKey
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement
from petal_swarm.wire.protocols import ADAPTER, DIRECTORY, PUSH, SESSION
from tests.checkpoints import VOCABULARY, save_bloom
from tests.cli.tokenizers_of_tests import save_words

# hivemind finds its daemon by an old function of importlib.resources.
pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")


@dataclass(frozen=True)
class Swarms:
    """Two servers with `key`, the second of which computes for the peer of `client` only; and an open one."""

    model: Path
    key: Path
    other_key: Path
    client: Path
    first: ServerProcess
    second: ServerProcess
    open: ServerProcess


@pytest.fixture(scope="module")
def swarms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarms]:
    folder = tmp_path_factory.mktemp("private")
    model = save_bloom(folder / "tiny-bloom", blocks=4)
    save_words(model, VOCABULARY)
    key, other_key, client = (folder / name for name in ("key", "other key", "client"))
    SwarmKey.generate().save(key)
    SwarmKey.generate().save(other_key)
    allowed = Identity.load_or_create(client).peer_id
    common = [str(model), "--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1", "--kv-tokens", "256"]
    common += ["--cache-dir", str(folder / "cache"), "--quant", "none"]
    with LocalSwarm() as servers:
        keyed = [*common, "--swarm-key", str(key)]
        first = servers.start("first", [*keyed, "--new-swarm", "--blocks", "0:2"])
        public = servers.start("open", [*common, "--new-swarm", "--blocks", "0:4"])
        wait_ready([first, public], timeout_s=60, on_ready=lambda server: None)
        options = ["--blocks", "2:4", "--allow-peer", allowed, "--initial-peers", first.address.result()]
        second = servers.start("second", [*keyed, *options])
        wait_ready([second], timeout_s=60, on_ready=lambda server: None)
        yield Swarms(model, key, other_key, client, first, second, public)


def run(capsys: Any, *argv: object) -> tuple[int, str, str]:
    status = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def generate(swarms: Swarms, *options: object, at: ServerProcess | None = None) -> tuple[object, ...]:
    address = (at or swarms.first).address.result()
    words = ("generate", swarms.model, "w7 w11", "--max-new-tokens", 4, "--wait", 0, *options)
    return (*words, "--initial-peers", address)


def test_a_member_is_answered(swarms: Swarms, capsys: Any) -> None:
    options = ("--swarm-key", swarms.key, "--identity", swarms.client)
    status, _, err = run(capsys, *generate(swarms, *options))
    assert (status, err.count(" -> ")) == (0, 3), err
    status, out, _ = run(
        capsys, "status", swarms.model, *options, "--initial-peers", swarms.second.address.result()
    )
    assert (status, "all 4 blocks are served" in out) == (0, True)


def test_only_allowed_peers_get_sessions(swarms: Swarms, capsys: Any) -> None:
    status, _, err = run(capsys, *generate(swarms, "--swarm-key", swarms.key))
    assert status == 2
    assert "this server computes for some peers only: ask its owner for --allow-peer 12D3Koo" in err


@pytest.mark.parametrize(
    ("options", "private", "expected"),
    [
        ((), True, "this swarm is private: ask its owner for the key, and give it with --swarm-key"),
        (("--swarm-key", "other_key"), True, "is in a private swarm with another key"),
        (("--swarm-key", "key"), False, "is in no private swarm: leave out --swarm-key"),
    ],
)
def test_clients_and_servers_at_the_wrong_door(
    swarms: Swarms, capsys: Any, options: tuple[str, ...], private: bool, expected: str
) -> None:
    told = [getattr(swarms, word) if hasattr(swarms, word) else word for word in options]
    server = swarms.first if private else swarms.open
    started_s = time.perf_counter()
    status, _, err = run(capsys, *generate(swarms, *told, at=server))
    assert (status, len(err.splitlines())) == (2, 1), err
    assert expected in err
    listen = ("--listen", "/ip4/127.0.0.1/tcp/0", "--kv-tokens", 256)
    join = ("run-server", swarms.model, *listen, *told, "--initial-peers", server.address.result())
    status, _, err = run(capsys, *join)
    assert (status, len(err.splitlines())) == (2, 1), err
    assert expected in err
    assert time.perf_counter() - started_s < 60, "an answer, not a timeout"


@pytest.mark.parametrize("key", [None, "other_key"])
def test_a_stranger_can_neither_write_nor_read_nor_open(swarms: Swarms, key: str | None) -> None:
    async def scenario() -> None:
        from hivemind.dht.node import DHTNode
        from hivemind.p2p import PeerID

        from petal_swarm.directory.guard import GuardedP2P
        from petal_swarm.directory.validator import key_of, node_id_of

        mallory = Identity.generate()
        address, victim = swarms.first.address.result(), swarms.first.address.result().rpartition("/")[2]
        transport = await P2pdTransport.create(identity=mallory, initial_peers=[address])
        await transport.connect(address, timeout_s=5)
        secret = SwarmKey.load(getattr(swarms, key)) if key else None
        node = await DHTNode.create(
            p2p=GuardedP2P(transport.p2p, secret), node_id=node_id_of(transport.p2p.peer_id)
        )
        target = PeerID.from_base58(victim)
        try:
            model = open_checkpoint(str(swarms.model)).model_key
            own = Announcement(peer_id=mallory.peer_id, model=model, span=Span(0, 4))
            expires_at = time.time() + 10
            record = sign_record(own, mallory, expires_at=expires_at, key=secret)
            place = key_of(model)
            assert await node.protocol.call_ping(target) is None
            stored = await node.protocol.call_store(
                target, [place], [record], [expires_at], subkeys=[mallory.peer_id]
            )
            assert stored is None
            assert await node.protocol.call_find(target, [place]) is None
            peer = PrivateTransport(transport, secret) if secret else transport
            for protocol in (SESSION, PUSH, ADAPTER, DIRECTORY):
                await refused(peer, victim, protocol)
            with pytest.raises(PeerUnreachableError, match="cannot join the swarm: peer"):
                await DhtDirectory.create(
                    transport, identity=None, initial_peers=[address], client_mode=True, key=secret
                )
        finally:
            await node.shutdown()
            await transport.close()

    asyncio.run(scenario())


async def refused(transport: Any, peer_id: str, protocol: str) -> None:
    from petal_swarm.net.channel import Channel
    from petal_swarm.wire.connection import ADAPTER_TABLE, DIRECTORY_TABLE, PUSH_TABLE, SESSION_TABLE, Role
    from petal_swarm.wire.messages.adapters import AdapterOffer, AdapterReady
    from petal_swarm.wire.messages.directory import Ping, Pong
    from petal_swarm.wire.messages.opening import Open, Opened, PushOpen

    first: dict[str, tuple[Any, Any, type]] = {
        SESSION: (SESSION_TABLE, Open(b"s" * 16, 0, "model", Span(0, 1), 8), Opened),
        PUSH: (PUSH_TABLE, PushOpen(b"s" * 16, 0), Opened),
        ADAPTER: (ADAPTER_TABLE, AdapterOffer("model", Span(0, 1), "x", 8, bytes(32)), AdapterReady),
        DIRECTORY: (DIRECTORY_TABLE, Ping(), Pong),
    }
    table, message, answer = first[protocol]
    channel = Channel(await transport.open_stream(peer_id, protocol, timeout_s=5), table, Role.DIALER)
    channel.send(message)
    with pytest.raises((PrivateSwarmError, StrangerError)):
        await channel.expect(answer, timeout_s=5)
    channel.abort()
