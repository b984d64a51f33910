"""Clients outside of the DHT: listings merged from servers of which some are dead, late or lie."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from petal_swarm.directory import remote
from petal_swarm.directory.memory import MemoryDirectory, MemoryRegistry
from petal_swarm.directory.records import sign_record
from petal_swarm.directory.remote import Pinger, RemoteDirectory, measure_rtt
from petal_swarm.directory.service import DirectoryService
from petal_swarm.errors import ConfigError, PeerUnreachableError, PrivateSwarmError
from petal_swarm.net.identity import Identity
from petal_swarm.net.refusal import refuse
from petal_swarm.net.transport import Stream, StreamHandler

from .samples import MODEL, START_S, Clock, PairedStream, announcement, stream_pair

ALICE, BOB, CAROL = sorted((Identity.generate() for _ in range(3)), key=lambda identity: identity.peer_id)
Handler = Callable[[Stream], Awaitable[None]]


class Network:
    """A transport whose peers are handlers; a peer without one cannot be reached."""

    peer_id = "client"

    def __init__(self, peers: dict[str, Handler]) -> None:
        self.peers = peers
        self.dialled: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()

    def addresses(self) -> tuple[str, ...]:
        return ()

    async def connect(self, address: str, *, timeout_s: float) -> str:
        raise NotImplementedError

    async def open_stream(
        self, peer_id: str, protocol: str, *, addresses: Sequence[str] = (), timeout_s: float
    ) -> PairedStream:
        assert addresses
        self.dialled.append(peer_id)
        if peer_id not in self.peers:
            raise PeerUnreachableError(f"cannot reach {peer_id}")
        dialer, listener = stream_pair(listener=peer_id)

        async def handle() -> None:
            await self.peers[peer_id](listener)

        task = asyncio.create_task(handle())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return dialer

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()


class FixedDirectory(MemoryDirectory):
    """Lists these records, checked by nobody."""

    def __init__(self, records: list[bytes]) -> None:
        super().__init__(MemoryRegistry(now=Clock()))
        self.listed = records

    async def records(self, model: str) -> list[bytes]:
        return self.listed


def lists(*records: bytes) -> Handler:
    return DirectoryService(FixedDirectory(list(records))).handle


async def hangs(stream: Stream) -> None:
    await asyncio.Event().wait()


def record(identity: Identity, ttl_s: float = 12, **fields: object) -> bytes:
    return sign_record(announcement(identity, **fields), identity, expires_at=START_S + ttl_s)


def address(identity: Identity) -> str:
    return f"/ip4/127.0.0.1/tcp/1/p2p/{identity.peer_id}"


def look_up(network: Network, *initial: Identity, times: int = 1) -> list[tuple[str, str]]:
    """Peer ids and states after `times` lookups."""

    async def run() -> list[tuple[str, str]]:
        directory = RemoteDirectory(network, [address(identity) for identity in initial], now=Clock())
        async with asyncio.timeout(5):
            for _ in range(times):
                found = await directory.lookup(MODEL)
        await directory.close()
        await network.close()
        return [(entry.peer_id, entry.state) for entry in found]

    return asyncio.run(run())


def test_listings_are_merged_and_verified() -> None:
    forged = bytearray(record(CAROL))
    forged[-1] ^= 1
    network = Network({ALICE.peer_id: lists(record(ALICE), bytes(forged)), BOB.peer_id: lists(record(BOB))})
    assert look_up(network, ALICE, BOB) == [(ALICE.peer_id, "serving"), (BOB.peer_id, "serving")]


def test_what_a_private_swarm_answers_is_the_error() -> None:
    async def refuses(stream: Stream) -> None:
        await refuse(stream, PrivateSwarmError, "this swarm is private")

    with pytest.raises(PrivateSwarmError, match="this swarm is private"):
        look_up(Network({ALICE.peer_id: refuses}), ALICE, BOB)
    network = Network({ALICE.peer_id: refuses, BOB.peer_id: lists(record(BOB))})
    assert look_up(network, ALICE, BOB) == [(BOB.peer_id, "serving")]


def test_the_tombstone_of_one_beats_the_late_view_of_another() -> None:
    network = Network(
        {
            ALICE.peer_id: lists(record(ALICE), record(CAROL)),
            BOB.peer_id: lists(record(CAROL, 13, state="left")),
        }
    )
    assert look_up(network, ALICE, BOB) == [(ALICE.peer_id, "serving")]


def test_dead_initial_peers_are_survived() -> None:
    network = Network({CAROL.peer_id: lists(record(CAROL))})
    assert look_up(network, ALICE, BOB, CAROL) == [(CAROL.peer_id, "serving")]


def test_a_silent_peer_does_not_hold_up_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "GRACE_S", 0.02)
    network = Network({ALICE.peer_id: hangs, BOB.peer_id: lists(record(BOB))})
    assert look_up(network, ALICE, BOB) == [(BOB.peer_id, "serving")]


def test_servers_learnt_of_are_asked_when_the_initial_peer_dies() -> None:
    async def run() -> None:
        network = Network({ALICE.peer_id: lists(record(ALICE), record(BOB)), BOB.peer_id: lists(record(BOB))})
        directory = RemoteDirectory(network, [address(ALICE)], now=Clock())
        await directory.lookup(MODEL)
        del network.peers[ALICE.peer_id]
        network.dialled.clear()
        found = await directory.lookup(MODEL)
        assert [entry.peer_id for entry in found] == [ALICE.peer_id, BOB.peer_id]
        assert BOB.peer_id in network.dialled
        assert len(await directory.records(MODEL)) == 2
        await network.close()

    asyncio.run(run())


def test_nobody_left_to_ask_is_one_clear_error() -> None:
    with pytest.raises(PeerUnreachableError, match=f"none of 1 known peers answers; .*{ALICE.peer_id}"):
        look_up(Network({}), ALICE)


def test_the_peers_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_CONTACTS", 2)
    others = [record(Identity.generate()) for _ in range(6)]
    network = Network({ALICE.peer_id: lists(record(ALICE), *others)})
    assert len(look_up(network, ALICE, times=2)) == 7
    assert len(set(network.dialled)) <= 1 + 2


def test_arguments_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="at least one initial peer"):
        RemoteDirectory(Network({}), [])
    with pytest.raises(ConfigError, match="looks like"):
        RemoteDirectory(Network({}), ["localhost:31330"])
    directory = RemoteDirectory(Network({}), [address(ALICE)])
    with pytest.raises(ConfigError, match="can announce"):
        asyncio.run(directory.announce(announcement(ALICE), ttl_s=12))


def test_round_trips_are_measured_in_parallel_and_remembered_for_a_while() -> None:
    async def run() -> None:
        clock = Clock()
        network = Network({ALICE.peer_id: lists(), BOB.peer_id: hangs})
        pinger = Pinger(network, max_age_s=30, now=clock)
        peers = [announcement(identity) for identity in (ALICE, BOB, CAROL)]
        measured = await pinger.measure(peers, timeout_s=0.05)
        assert list(measured) == [ALICE.peer_id]
        assert 0 < measured[ALICE.peer_id] < 0.05
        network.dialled.clear()
        assert await pinger.measure(peers[:1]) == measured
        assert network.dialled == []
        clock.advance(31)
        assert pinger.known([ALICE.peer_id]) == {}
        assert list(await pinger.measure(peers[:1])) == [ALICE.peer_id]
        await network.close()

    asyncio.run(run())


def test_the_measurements_kept_are_bounded() -> None:
    async def run() -> None:
        network = Network({identity.peer_id: lists() for identity in (ALICE, BOB, CAROL)})
        pinger = Pinger(network, limit=2)
        await pinger.measure([announcement(identity) for identity in (ALICE, BOB, CAROL)])
        assert len(pinger.known([ALICE.peer_id, BOB.peer_id, CAROL.peer_id])) == 2
        with pytest.raises(PeerUnreachableError):
            await measure_rtt(network, "nobody", ["/ip4/127.0.0.1/tcp/1/p2p/nobody"], timeout_s=1)
        await network.close()

    asyncio.run(run())
