"""The DHT's calls between members and strangers, with a daemon made of two dictionaries."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("hivemind")

from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hivemind.proto import dht_pb2

from petal_swarm.directory import guard as guard_module
from petal_swarm.directory.guard import CALLER, GuardedP2P
from petal_swarm.errors import StrangerError
from petal_swarm.net.swarm_key import Side, SwarmKey

from .samples import START_S

KEY, OTHER_KEY = SwarmKey(b"k" * 32), SwarmKey(b"o" * 32)
PING, STORE = "DHTProtocol.rpc_ping", "DHTProtocol.rpc_store"


class Daemon:
    """What a `P2P` does between its calls; errors arrive as hivemind passes them on."""

    peers: dict[str, Daemon]

    def __init__(self, peer_id: str, peers: dict[str, Daemon]) -> None:
        self.peer_id = peer_id
        self.peers = peers
        self.handlers: dict[str, Any] = {}
        self.sent: list[bytes] = []
        peers[peer_id] = self

    async def add_protobuf_handler(self, name: str, handler: Any, kind: Any, **options: Any) -> None:
        self.handlers[name] = handler

    async def remove_protobuf_handler(self, name: str, **options: Any) -> None:
        del self.handlers[name]

    async def call_protobuf_handler(self, peer_id: str, name: str, request: Any, kind: Any) -> Any:
        self.sent.append(request.auth.signature)
        received = type(request).FromString(request.SerializeToString())
        try:
            context = SimpleNamespace(remote_id=self.peer_id)
            response = await self.peers[peer_id].handlers[name](received, context)
        except Exception as error:
            raise P2PHandlerError(repr(error)) from None
        return kind.FromString(response.SerializeToString())


class Node:
    """A node that answers pings, and notes who called."""

    def __init__(self, daemon: Daemon, key: SwarmKey | None, *, clock_s: float = START_S) -> None:
        self.guard = GuardedP2P(daemon, key, now=lambda: clock_s)
        self.clock_s = clock_s
        self.callers: list[str] = []

    async def start(self) -> None:
        await self.guard.add_protobuf_handler(PING, self.answer, dht_pb2.PingRequest)

    async def answer(self, request: Any, context: Any) -> Any:
        self.callers.append(CALLER.get())
        return dht_pb2.PingResponse(dht_time=self.clock_s)

    async def ping(self, peer_id: str) -> Any:
        return await self.guard.call_protobuf_handler(
            peer_id, PING, dht_pb2.PingRequest(), dht_pb2.PingResponse
        )


async def two(
    one_key: SwarmKey | None, other_key: SwarmKey | None, **options: Any
) -> tuple[Node, Node, dict[str, Daemon]]:
    daemons: dict[str, Daemon] = {}
    nodes = Node(Daemon("one", daemons), one_key), Node(Daemon("other", daemons), other_key, **options)
    for node in nodes:
        await node.start()
    return (*nodes, daemons)


@pytest.mark.parametrize("key", [None, KEY])
def test_those_of_one_swarm_hear_each_other(key: SwarmKey | None) -> None:
    async def scenario() -> None:
        one, other, _ = await two(key, key, clock_s=START_S + 100)
        assert (await one.ping("other")).dht_time == START_S + 100
        assert other.callers == ["one"]
        assert one.guard.refusals == {}
        assert one.guard.clock_offsets_s == {"other": 100}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("one_key", "other_key", "told"),
    [
        (None, KEY, "peer other: this swarm is private: ask its owner for the key"),
        (OTHER_KEY, KEY, "peer other is in a private swarm with another key"),
        (KEY, None, "peer other is in no private swarm"),
    ],
)
def test_those_of_different_swarms_are_told_so(
    one_key: SwarmKey | None,
    other_key: SwarmKey | None,
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        one, other, _ = await two(one_key, other_key)
        for _ in range(3):
            with pytest.raises(StrangerError, match=told):
                await one.ping("other")
        assert other.callers == []
        assert one.guard.refusals["other"].startswith(told)
        assert one.guard.clock_offsets_s == {}

    asyncio.run(scenario())
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().startswith("refused peer one: it has ")


def test_a_node_that_knows_nothing_of_proofs_is_not_believed() -> None:
    """A plain hivemind node ignores the field, and answers."""

    async def scenario() -> None:
        one, other, daemons = await two(KEY, None)
        daemons["other"].handlers[PING] = other.answer
        with pytest.raises(StrangerError, match="is in no private swarm"):
            await one.ping("other")
        daemons["other"].handlers[PING] = _answers(KEY.proof(Side.DIALER, PING, "one", "other"))
        with pytest.raises(StrangerError, match="is in no private swarm"):
            await one.ping("other")
        daemons["other"].handlers[PING] = _answers(KEY.proof(Side.LISTENER, PING, "one", "other"))
        await one.ping("other")

    asyncio.run(scenario())


def _answers(proof: bytes) -> Any:
    async def answer(request: Any, context: Any) -> Any:
        response = dht_pb2.PingResponse()
        response.auth.signature = proof
        return response

    return answer


def test_a_proof_that_was_seen_is_no_use_to_others() -> None:
    async def scenario() -> None:
        one, other, daemons = await two(KEY, KEY)
        await one.ping("other")
        [seen] = daemons["one"].sent
        mallory = Daemon("mallory", daemons)
        for name, proof in ((PING, seen), (PING, KEY.proof(Side.DIALER, STORE, "mallory", "other"))):
            request = dht_pb2.PingRequest()
            request.auth.signature = proof
            with pytest.raises(P2PHandlerError, match="private-swarm"):
                await mallory.call_protobuf_handler("other", name, request, dht_pb2.PingResponse)
        assert other.callers == ["one"]

    asyncio.run(scenario())


def test_other_errors_pass_and_a_peer_may_change_its_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        one, other, daemons = await two(KEY, OTHER_KEY)
        with pytest.raises(StrangerError):
            await one.ping("other")
        restarted = Node(daemons["other"], KEY)
        await restarted.start()
        await one.ping("other")
        assert one.guard.refusals == {}
        await other.guard.remove_protobuf_handler(PING)
        with pytest.raises(P2PHandlerError):
            await one.ping("other")
        assert one.guard.refusals == {}

    asyncio.run(scenario())


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "MAX_REMEMBERED_PEERS", 3)

    async def scenario() -> None:
        daemons: dict[str, Daemon] = {}
        one = Node(Daemon("one", daemons), KEY)
        for number in range(9):
            await Node(Daemon(f"open{number}", daemons), None).start()
            await Node(Daemon(f"member{number}", daemons), KEY).start()
            await one.ping(f"member{number}")
            with pytest.raises(StrangerError):
                await one.ping(f"open{number}")
        assert list(one.guard.refusals) == ["open6", "open7", "open8"]
        assert list(one.guard.clock_offsets_s) == ["member6", "member7", "member8"]

    asyncio.run(scenario())
