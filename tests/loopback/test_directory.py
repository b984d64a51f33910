"""The DHT directory between real p2pd daemons, all in one process and one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgpack
import pytest

pytest.importorskip("hivemind")

from petal_swarm.directory.dht import DhtDirectory
from petal_swarm.directory.records import read_record, sign_record
from petal_swarm.directory.remote import Pinger, RemoteDirectory
from petal_swarm.directory.service import DirectoryService
from petal_swarm.directory.upload import measure_upload
from petal_swarm.errors import ConfigError, NetworkError, PeerUnreachableError
from petal_swarm.net.identity import Identity
from petal_swarm.net.p2pd import P2pdTransport
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement
from petal_swarm.wire.protocols import DIRECTORY

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, Any]], Any]
LISTEN = ("/ip4/127.0.0.1/tcp/0",)

# hivemind finds its daemon by an old function of importlib.resources.
pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")


@dataclass
class Peer:
    identity: Identity
    transport: P2pdTransport
    directory: DhtDirectory

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    def announcement(self, model: str, **fields: Any) -> Announcement:
        addresses = self.transport.addresses()[:1]
        return Announcement(peer_id=self.peer_id, model=model, span=Span(0, 4), addresses=addresses, **fields)

    async def announce(self, model: str, *, ttl_s: float = 12, **fields: Any) -> None:
        await self.directory.announce(self.announcement(model, **fields), ttl_s=ttl_s)

    async def sees(self, model: str) -> set[str]:
        return {entry.peer_id for entry in await self.directory.lookup(model)}

    async def close(self) -> None:
        await self.directory.close()
        await self.transport.close()


async def start_peer(*initial: Peer, client_mode: bool = False) -> Peer:
    identity = Identity.generate()
    initial_peers = [peer.transport.addresses()[0] for peer in initial]
    transport = await P2pdTransport.create(
        identity=identity, listen=() if client_mode else LISTEN, initial_peers=initial_peers
    )
    try:
        directory = await DhtDirectory.create(
            transport, identity=identity, initial_peers=initial_peers, client_mode=client_mode
        )
    except BaseException:
        await transport.close()
        raise
    return Peer(identity, transport, directory)


async def timed(work: Awaitable[T]) -> tuple[T, float]:
    start_s = time.perf_counter()
    return await work, time.perf_counter() - start_s


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield runner.run


@dataclass
class Swarm:
    servers: list[Peer]
    client: Peer


@pytest.fixture(scope="module")
def swarm(run: Run) -> Iterator[Swarm]:
    async def start() -> Swarm:
        first = await start_peer()
        others = [await start_peer(first) for _ in range(2)]
        return Swarm([first, *others], await start_peer(first, client_mode=True))

    async def stop(swarm: Swarm) -> None:
        for peer in (swarm.client, *swarm.servers):
            await peer.close()

    started = run(start())
    yield started
    run(stop(started))


def test_what_one_announces_all_see_at_once(run: Run, swarm: Swarm) -> None:
    async def scenario() -> None:
        for server in swarm.servers:
            await server.announce("everybody")
        everybody = sorted(
            (server.announcement("everybody") for server in swarm.servers), key=lambda entry: entry.peer_id
        )
        for peer in (*swarm.servers, swarm.client):
            assert await peer.directory.lookup("everybody") == everybody
            assert await peer.directory.lookup("nobody") == []

    run(scenario())


def test_figures_are_replaced_and_a_clean_leave_is_seen_at_once(run: Run, swarm: Swarm) -> None:
    async def scenario() -> None:
        leaver, *stayers = swarm.servers
        for server in swarm.servers:
            await server.announce("leaving", ttl_s=30)
        await leaver.announce("leaving", queue_s=0.5)
        [found] = [a for a in await swarm.client.directory.lookup("leaving") if a.peer_id == leaver.peer_id]
        assert found.queue_s == 0.5
        await leaver.announce("leaving", state="left")
        for peer in (*stayers, swarm.client):
            assert await peer.sees("leaving") == {server.peer_id for server in stayers}
        *_, tombstone = await stayers[0].directory.records("leaving")
        assert read_record(tombstone, now=time.time())[0].state == "left"

    run(scenario())


def test_a_late_joiner_and_whoever_joined_by_it(run: Run, swarm: Swarm) -> None:
    async def scenario() -> None:
        await swarm.servers[0].announce("late")
        late = await start_peer(swarm.servers[1])
        latest = await start_peer(late, client_mode=True)
        try:
            await late.announce("late")
            for peer in (late, latest, swarm.client):
                assert await peer.sees("late") == {swarm.servers[0].peer_id, late.peer_id}
        finally:
            await latest.close()
            await late.close()

    run(scenario())


def test_a_client_asks_by_stream_and_measures_round_trips_and_its_line(run: Run, swarm: Swarm) -> None:
    async def scenario() -> None:
        first, second, _ = swarm.servers
        await first.announce("stream")
        await second.announce("stream")
        for server in (first, second):
            await server.transport.serve(DIRECTORY, DirectoryService(server.directory).handle)
        transport = swarm.client.transport
        directory = RemoteDirectory(transport, first.transport.addresses()[:1])
        found = await directory.lookup("stream")
        assert {entry.peer_id for entry in found} == {first.peer_id, second.peer_id}
        rtts_s = await Pinger(transport).measure(found)
        assert set(rtts_s) == {first.peer_id, second.peer_id}
        assert all(0 < rtt_s < 0.5 for rtt_s in rtts_s.values())
        assert await measure_upload(transport, first.peer_id, ()) > 1e6  # 8 Mbit/s: any machine, however busy

    run(scenario())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_node_expires_and_slows_nobody(run: Run, swarm: Swarm, how: signal.Signals) -> None:
    """SIGKILL closes its connections; SIGSTOP is a machine that vanished: they stay, and are mute."""

    async def scenario() -> None:
        model, ttl_s = f"dead by {how.name}", 3.0
        victim = await start_peer(swarm.servers[0])
        survivor = swarm.servers[1]
        try:
            await survivor.announce(model)
            await victim.announce(model, ttl_s=ttl_s)
            assert victim.peer_id in await survivor.sees(model)  # while nothing makes that slow
            died_s = time.perf_counter()
            victim.transport.p2p._child.send_signal(how)
            for peer in (survivor, swarm.client):
                _, lookup_s = await timed(peer.sees(model))
                assert lookup_s < 2
            _, announce_s = await timed(survivor.announce(model))
            assert announce_s < 2
            while victim.peer_id in await swarm.client.sees(model):
                assert time.perf_counter() - died_s < ttl_s + 2
                await asyncio.sleep(0.1)
            assert await survivor.sees(model) == {survivor.peer_id}
        finally:
            with contextlib.suppress(ProcessLookupError):
                victim.transport.p2p._child.kill()
            await victim.close()

    run(scenario())


def forgeries(model: str, alice: Peer, mallory: Identity) -> dict[str, tuple[str, str | None, bytes, float]]:
    """(model, subkey, value, expiration) of what nobody may store: all about alice, or nobody at all."""
    now = time.time()
    genuine = sign_record(alice.announcement(model), alice.identity, expires_at=now + 10)
    own = Announcement(peer_id=mallory.peer_id, model=model, span=Span(0, 4))
    signed = sign_record(own, mallory, expires_at=now + 10)
    body, signature = msgpack.unpackb(genuine)
    resigned = msgpack.packb([body, mallory.sign(b"petal-swarm/1/announcement\n" + body)])
    renamed = body.replace(b"serving", b"joining")
    eternal = sign_record(own, mallory, expires_at=now + 1000)
    return {
        "another's subkey": (model, alice.peer_id, signed, now + 10),
        "another's signature": (model, alice.peer_id, resigned, now + 10),
        "changed": (model, alice.peer_id, msgpack.packb([renamed, signature]), now + 10),
        "later expiry": (model, alice.peer_id, genuine, now + 40),
        "another model": (model + "!", alice.peer_id, genuine, now + 10),
        "no subkey": (model, None, signed, now + 10),
        "no signature": (model, alice.peer_id, msgpack.packb([body, b""]), now + 10),
        "too far ahead": (model, mallory.peer_id, eternal, now + 1000),
        "junk": (model, alice.peer_id, b"\xc1junk", now + 10),
        "nothing": (model, alice.peer_id, b"", now + 10),
    }


async def start_dishonest(p2p: Any) -> Any:
    """A plain hivemind node, which stores and tells whatever it likes."""
    from hivemind.dht.node import DHTNode

    from petal_swarm.directory.validator import node_id_of

    return await DHTNode.create(p2p=p2p, node_id=node_id_of(p2p.peer_id))


def test_forged_records_are_neither_stored_nor_believed(run: Run, swarm: Swarm) -> None:
    async def scenario() -> None:
        from hivemind.p2p import PeerID

        from petal_swarm.directory.validator import key_of

        alice, honest = swarm.servers[:2]
        mallory = Identity.generate()
        model = "forged"
        own = Announcement(peer_id=mallory.peer_id, model=model, span=Span(0, 4))
        honest_words = (alice.announcement(model), own)
        await alice.announce(model)
        address = honest.transport.addresses()[0]
        transport = await P2pdTransport.create(identity=mallory, initial_peers=[address])
        await transport.connect(address, timeout_s=5)
        node = await start_dishonest(transport.p2p)
        victim_transport = await P2pdTransport.create(listen=(), initial_peers=transport.addresses()[:1])
        victim = await DhtDirectory.create(
            victim_transport, identity=None, initial_peers=transport.addresses()[:1], client_mode=True
        )
        try:
            for name, (under, subkey, value, expiration) in forgeries(model, alice, mallory).items():
                key = key_of(under)
                for in_cache in (False, True):
                    stored = await node.protocol.call_store(
                        PeerID.from_base58(honest.peer_id),
                        [key],
                        [value],
                        [expiration],
                        subkeys=[subkey],
                        in_cache=in_cache,
                    )
                    assert stored == [False], name
                node.protocol.storage.clear()
                node.protocol.storage.store(key, value, expiration, subkey=subkey)
                # What mallory says about herself, and alice about herself, is true wherever it is found.
                assert all(entry in honest_words for entry in await victim.lookup(under)), name
            assert await victim.lookup(model + "!") == []
            genuine = sign_record(alice.announcement(model), alice.identity, expires_at=time.time() + 10)
            node.protocol.storage.clear()
            node.protocol.storage.store_subkey(key_of(model), mallory.peer_id, b"junk", time.time() + 20)
            node.protocol.storage.store_subkey(key_of(model), alice.peer_id, genuine, time.time() + 20)
            assert alice.announcement(model) in await victim.lookup(model)
            assert await honest.sees(model) == {alice.peer_id}
        finally:
            await victim.close()
            await victim_transport.close()
            await node.shutdown()
            await transport.close()

    run(scenario())


def test_a_nested_value_does_not_crash_a_node(run: Run, swarm: Swarm) -> None:
    """hivemind's own decoder recurses into it until the process dies of a full C stack."""

    async def scenario() -> None:
        from hivemind.p2p import PeerID
        from hivemind.proto import dht_pb2

        bomb = b"\x90"
        for _ in range(2000):
            bomb = msgpack.packb(msgpack.ExtType(0x40, b"\x91" + bomb))
        attacker, victim = swarm.servers[:2]
        protocol = attacker.directory._node._node.protocol
        request = dht_pb2.StoreRequest(
            keys=[b"\x00" * 20],
            subkeys=[b""],
            values=[bomb],
            expiration_time=[time.time() + 10],
            in_cache=[False],
            peer=protocol.node_info,
        )
        with pytest.raises(Exception, match="not a flat dictionary"):
            await protocol.get_stub(PeerID.from_base58(victim.peer_id)).rpc_store(request, timeout=5)
        await victim.announce("alive")
        assert await attacker.sees("alive") == {victim.peer_id}

    run(scenario())


def test_a_stranger_cannot_hide_others_behind_a_cached_record(run: Run, swarm: Swarm) -> None:
    """hivemind answers with the cached dictionary if it expires later than the stored one."""

    async def scenario() -> None:
        from hivemind.p2p import PeerID

        from petal_swarm.directory.validator import key_of

        alice, stranger = swarm.servers[:2]
        model = "cached"
        await alice.announce(model)
        expires_at = time.time() + 50
        record = sign_record(stranger.announcement(model), stranger.identity, expires_at=expires_at)
        for server in swarm.servers:
            if server is not stranger:
                await stranger.directory._node._node.protocol.call_store(
                    PeerID.from_base58(server.peer_id),
                    [key_of(model)],
                    [record],
                    [expires_at],
                    subkeys=[stranger.peer_id],
                    in_cache=True,
                )
        told = await swarm.client.directory._node.fetch(PeerID.from_base58(alice.peer_id), key_of(model))
        assert told is not None
        assert alice.peer_id in [read_record(entry, now=time.time())[0].peer_id for entry in told]

    run(scenario())


def test_a_swarm_that_cannot_be_reached_is_one_clear_error(run: Run) -> None:
    async def scenario() -> None:
        gone = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"
        transport = await P2pdTransport.create()
        try:
            for client_mode in (False, True):
                with pytest.raises(PeerUnreachableError, match="cannot join the swarm") as caught:
                    await DhtDirectory.create(
                        transport, identity=None, initial_peers=[gone], client_mode=client_mode
                    )
                assert gone in str(caught.value)
                assert "\n" not in str(caught.value)
            with pytest.raises(ConfigError, match="at least one"):
                await DhtDirectory.create(transport, identity=None, initial_peers=[], client_mode=True)
            with pytest.raises(ConfigError, match="the identity is of"):
                await DhtDirectory.create(
                    transport, identity=Identity.generate(), initial_peers=[], client_mode=False
                )
        finally:
            await transport.close()

    run(scenario())


@pytest.mark.parametrize(("off_s", "how"), [(3600, "1.0 h ahead of"), (-3600, "1.0 h behind")])
def test_a_clock_that_is_an_hour_off_is_told_on_both_sides(
    run: Run, swarm: Swarm, caplog: pytest.LogCaptureFixture, off_s: float, how: str
) -> None:
    async def scenario() -> None:
        identity = Identity.generate()
        initial = swarm.servers[0].transport.addresses()[:1]
        transport = await P2pdTransport.create(identity=identity, initial_peers=initial)
        directory = await DhtDirectory.create(
            transport,
            identity=identity,
            initial_peers=initial,
            client_mode=False,
            now=lambda: time.time() + off_s,
        )
        try:
            mine = Announcement(peer_id=identity.peer_id, model="clocks", span=Span(0, 4))
            with pytest.raises(NetworkError, match=f"refused the announcement.*clock is {how}"):
                await directory.announce(mine, ttl_s=12)
            await swarm.servers[1].announce("clocks")
            assert [entry.peer_id for entry in await directory.lookup("clocks")] == [identity.peer_id]
        finally:
            await directory.close()
            await transport.close()
        assert f"this machine's clock is {how} that of peer {swarm.servers[0].peer_id}" in caplog.text
        assert f"refused to store: announcement of {identity.peer_id}" in caplog.text
        assert "announcements told by" in caplog.text

    with caplog.at_level(logging.WARNING):
        run(scenario())


def test_one_dead_initial_peer_is_only_logged(
    run: Run, swarm: Swarm, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        gone = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.generate().peer_id}"
        transport = await P2pdTransport.create(listen=())
        directory = await DhtDirectory.create(
            transport,
            identity=None,
            initial_peers=[gone, swarm.servers[0].transport.addresses()[0]],
            client_mode=True,
        )
        await swarm.servers[2].announce("partly")
        assert [entry.peer_id for entry in await directory.lookup("partly")] == [swarm.servers[2].peer_id]
        await directory.close()
        await transport.close()

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert "without one of the peers" in caplog.text
