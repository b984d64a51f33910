"""Joining, and joining again after an outage, with a network made of answers."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import pytest

from petal_swarm.directory import membership
from petal_swarm.directory.membership import Membership
from petal_swarm.errors import PeerUnreachableError
from petal_swarm.net.addresses import split_address
from petal_swarm.net.identity import Identity

from .samples import announcement

ALICE, BOB, CAROL = (Identity.generate() for _ in range(3))


class Network:
    """Transport and node in one: `up` answer, `hung` accept a connection and say nothing, others are down."""

    peer_id = "this"

    def __init__(
        self, *up: Identity, hung: tuple[Identity, ...] = (), strangers: tuple[Identity, ...] = ()
    ) -> None:
        self.up = {identity.peer_id for identity in up}
        self.hung = {identity.peer_id for identity in hung}
        self.strangers = {identity.peer_id for identity in strangers}
        self.dialled: list[str] = []
        self.met = 0
        self.refusals: dict[str, str] = {}
        self.clock_offsets_s: dict[str, float] = {}

    async def connect(self, address: str, *, timeout_s: float) -> str:
        peer_id = split_address(address)[1]
        self.dialled.append(peer_id)
        if peer_id in self.hung:
            await asyncio.sleep(3600)
        if peer_id not in self.up | self.strangers:
            raise PeerUnreachableError(f"cannot reach {address}")
        return peer_id

    async def ping(self, peer_id: str) -> bool:
        return peer_id in self.up

    def refusal(self, peer_id: str) -> str | None:
        return self.refusals.get(peer_id)

    async def meet_neighbours(self) -> None:
        self.met += 1


def address(identity: Identity) -> str:
    return f"/ip4/127.0.0.1/tcp/4000/p2p/{identity.peer_id}"


def members(network: Network, *initial: Identity) -> Membership:
    return Membership(cast(Any, network), cast(Any, network), [address(identity) for identity in initial])


def test_joining_by_some_of_the_peers_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    network = Network(BOB)
    with caplog.at_level(logging.WARNING):
        asyncio.run(members(network, ALICE, BOB).join(timeout_s=1))
    assert network.met == 1
    assert f"cannot reach {address(ALICE)}" in caplog.text


def test_a_peer_that_hangs_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "STRAGGLER_S", 0.01)
    network = Network(BOB, hung=(ALICE,))

    async def run() -> None:
        async with asyncio.timeout(1):
            await members(network, ALICE, BOB).join(timeout_s=3600)

    asyncio.run(run())
    assert network.met == 1


def test_when_nobody_lets_us_in_the_error_says_why() -> None:
    network = Network(hung=(BOB,), strangers=(CAROL,))
    with pytest.raises(PeerUnreachableError) as caught:
        asyncio.run(members(network, ALICE, BOB, CAROL).join(timeout_s=0.02))
    message = str(caught.value)
    assert f"cannot reach {address(ALICE)}" in message
    assert f"no answer from {address(BOB)} within 0.02 s" in message
    assert f"{address(CAROL)} accepts connections, but does not answer as a node" in message
    assert message.endswith(
        "; is a server running there, and is this the address that it printed after `ready`?"
    )
    assert "\n" not in message


def test_why_a_peer_is_of_another_swarm_is_passed_on() -> None:
    network = Network(strangers=(CAROL,))
    network.refusals[CAROL.peer_id] = "peer carol: this swarm is private"
    with pytest.raises(
        PeerUnreachableError, match=r"^cannot join the swarm: peer carol: this swarm is private$"
    ):
        asyncio.run(members(network, CAROL).join(timeout_s=1))


def test_a_clock_that_is_off_is_told_when_joining(caplog: pytest.LogCaptureFixture) -> None:
    network = Network(BOB)
    network.clock_offsets_s = {BOB.peer_id: 0.2}
    asyncio.run(members(network, BOB).join(timeout_s=1))
    assert caplog.text == ""
    network.clock_offsets_s = {BOB.peer_id: -3600.0}
    asyncio.run(members(network, BOB).join(timeout_s=1))
    assert f"this machine's clock is 1.0 h ahead of that of peer {BOB.peer_id}" in caplog.text


def test_rejoining_also_asks_servers_seen_since_and_only_so_often() -> None:
    async def run() -> None:
        network = Network(BOB)
        membership_ = members(network, ALICE)
        membership_.remember([announcement(BOB)])
        first = membership_.start_rejoining()
        assert first is not None
        assert membership_.start_rejoining() is first
        await first
        assert sorted(network.dialled) == sorted([ALICE.peer_id, BOB.peer_id])
        assert network.met == 1
        assert membership_.start_rejoining() is None
        await membership_.close()

    asyncio.run(run())


def test_a_server_that_is_alone_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(membership, "REJOIN_INTERVAL_S", 0.0)

    async def run() -> None:
        alone = members(Network(), ALICE)
        for _ in range(3):
            attempt = alone.start_rejoining()
            assert attempt is not None
            await attempt

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert caplog.text.count("alone in the DHT") == 1


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MAX_REMEMBERED_PEERS", 2)
    known = members(Network(), ALICE)
    known.remember([announcement(Identity.generate()) for _ in range(5)] + [announcement(BOB)])
    assert len(known.addresses) == 3
    assert known.addresses[0] == address(ALICE)
    assert known.addresses[-1] == address(BOB)
    assert members(Network()).start_rejoining() is None
