"""Judging reachability: pure; and asking for it, over the memory transport."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from petal_swarm.directory.dial_back import DialBackService
from petal_swarm.directory.memory import MemoryDirectory, MemoryRegistry
from petal_swarm.directory.reachability import (
    Reachability,
    Sighting,
    advice,
    ask,
    candidates,
    clock_ahead_s,
    judge,
    listening_ports,
    sentence,
    survey,
)
from petal_swarm.directory.service import DirectoryService
from petal_swarm.errors import RemoteError
from petal_swarm.net.identity import Identity
from petal_swarm.net.memory import MemoryNetwork, MemoryTransport, VirtualClockLoop
from petal_swarm.net.relay import Candidate
from petal_swarm.wire.protocols import DIRECTORY

from .samples import START_S, Clock, announcement

ME = Identity.from_seed(bytes(32)).peer_id
RELAY = Identity.from_seed(bytes(31) + b"r").peer_id
HOME = f"/ip4/192.168.1.2/tcp/31330/p2p/{ME}"
CIRCUIT = f"/ip4/8.8.4.4/tcp/31330/p2p/{RELAY}/p2p-circuit/p2p/{ME}"


def seen(ip: str | None, *reached: int, tried: Sequence[int] = (31330,)) -> Sighting:
    return Sighting("helper", ip, tuple(tried), reached)


def test_reached_from_the_internet() -> None:
    verdict = judge([seen("8.8.8.8", 31330)], [HOME])
    assert verdict == Reachability(
        "direct", "internet", ("/ip4/8.8.8.8/tcp/31330",), ("8.8.8.8",), (31330,), 1
    )
    assert sentence(verdict) == "others can reach this machine directly, at 8.8.8.8:31330"
    assert advice(verdict) == ""
    assert verdict.reachable


def test_ipv6_is_written_as_people_do() -> None:
    verdict = judge([seen("2600::1", 31330)], [f"/ip6/2600::1/tcp/31330/p2p/{ME}"])
    assert sentence(verdict).endswith("at [2600::1]:31330")
    verdict = judge([seen("2600::1")], [f"/ip6/2600::1/tcp/31330/p2p/{ME}"])
    assert "--listen /ip6/::/tcp/31330 --announce /ip6/2600::1/tcp/31330" in advice(verdict)


@pytest.mark.parametrize(("ip", "scope"), [("192.168.1.2", "network"), ("127.0.0.1", "machine")])
def test_reached_from_near(ip: str, scope: str) -> None:
    verdict = judge([seen(ip, 31330)], [HOME])
    assert (verdict.kind, verdict.scope) == ("direct", scope)
    assert {"network": "local network", "machine": "this machine alone"}[scope] in sentence(verdict)
    assert advice(verdict)


def test_those_far_away_decide() -> None:
    """The same router's machines reach it; what counts is whether others do."""
    verdict = judge([seen("192.168.1.2", 31330), seen("127.0.0.1", 31330), seen("8.8.8.8")], [HOME])
    assert verdict.kind == "none"
    assert "8.8.8.8" in sentence(verdict)


@pytest.mark.parametrize(("reached", "failed", "kind"), [(1, 1, "direct"), (1, 2, "none"), (2, 1, "direct")])
def test_half_of_the_witnesses_are_enough(reached: int, failed: int, kind: str) -> None:
    sightings = [seen("8.8.8.8", 31330)] * reached + [seen("8.8.8.8")] * failed
    assert judge(sightings, [HOME]).kind == kind


def test_a_relay() -> None:
    verdict = judge([seen("8.8.8.8")], [HOME, CIRCUIT])
    assert (verdict.kind, verdict.scope, verdict.addresses) == ("relay", "internet", (CIRCUIT,))
    assert sentence(verdict) == (
        f"others can reach this machine only through a relay (/ip4/8.8.4.4/tcp/31330/p2p/{RELAY}): slower"
    )
    assert advice(verdict).startswith("to be reached directly, forward TCP port 31330 in your router")
    assert "--announce /ip4/8.8.8.8/tcp/31330" in advice(verdict)
    assert verdict.reachable


def test_not_at_all() -> None:
    verdict = judge([seen("8.8.8.8")], [HOME])
    assert sentence(verdict) == (
        "others cannot reach this machine at all: 1 peer tried in vain; others see it at 8.8.8.8"
    )
    assert "relayed" in advice(verdict)
    assert not verdict.reachable


def test_nobody_knows() -> None:
    for sightings in ([], [Sighting("helper", None)], [Sighting("helper", "8.8.8.8")]):
        verdict = judge(sightings, [HOME])
        assert (verdict.kind, verdict.reachable) == ("unknown", False)
        assert "not known" in sentence(verdict)
        assert "--initial-peers" in advice(verdict)


def test_who_is_private_is_not_reached_directly_whatever_they_say() -> None:
    assert judge([seen("8.8.8.8", 31330)], [HOME, CIRCUIT], private=True).kind == "relay"
    verdict = judge([], [], private=True)
    assert verdict.kind == "none"
    assert "no relay was found" in sentence(verdict)
    assert "TCP port 31330" in advice(verdict)


def test_who_listens_nowhere_is_not_reached() -> None:
    assert judge([Sighting("helper", "8.8.8.8")], []).kind == "none"


def test_ports_are_those_that_are_dialled_directly() -> None:
    addresses = [HOME, CIRCUIT, HOME, f"/ip4/1.2.3.4/udp/9/quic-v1/p2p/{ME}"]
    addresses += [f"/ip4/1.2.3.4/tcp/{port}/p2p/{ME}" for port in range(1, 9)]
    assert listening_ports(addresses) == (31330, 1, 2, 3)


def test_candidates() -> None:
    first, second = Identity.from_seed(bytes(31) + b"1"), Identity.from_seed(bytes(31) + b"2")
    one = f"/ip4/8.8.8.8/tcp/1/p2p/{first.peer_id}"
    other = f"/ip4/8.8.8.8/tcp/2/p2p/{first.peer_id}"
    hidden = announcement(Identity.from_seed(bytes(32)), addresses=(CIRCUIT,))
    mixed = f"/ip4/8.8.8.8/tcp/3/p2p/{second.peer_id}"
    known = [announcement(first), announcement(second, addresses=(CIRCUIT, mixed)), hidden]
    assert candidates([one, other], known) == [
        Candidate(first.peer_id, (one, other)),
        Candidate(second.peer_id, (mixed,)),
    ]


def test_clocks() -> None:
    assert clock_ahead_s([]) is None
    assert clock_ahead_s([Sighting("a", None, clock_ahead_s=s) for s in (0.1, 3600, 0.3)]) == 0.3


class At(MemoryTransport):
    """A peer with an address."""

    told: tuple[str, ...] = ()

    def addresses(self) -> tuple[str, ...]:
        return self.told or super().addresses()


def test_asking() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        helper, old = network.transport(), network.transport()

        async def knock(ip: str, port: int, peer_id: str) -> bool:
            return (ip, port, peer_id) == ("8.8.8.8", 31330, mine.peer_id)

        dial_back = DialBackService(knock, now=Clock(), clock=lambda: START_S + 3)
        directory = MemoryDirectory(MemoryRegistry(now=Clock()))
        await helper.serve(DIRECTORY, DirectoryService(directory, dial_back=dial_back).handle)
        mine = At(network, Identity.generate())
        network._peers[mine.peer_id] = mine
        mine.told = (
            f"/ip4/192.168.1.2/tcp/31330/p2p/{mine.peer_id}",
            f"/ip4/192.168.1.2/tcp/9/p2p/{mine.peer_id}",
        )
        mine.seen_at = "/ip4/8.8.8.8/tcp/40001"

        sighting = await ask(mine, Candidate(helper.peer_id, ()), now=lambda: START_S)
        assert sighting == Sighting(helper.peer_id, "8.8.8.8", (31330, 9), (31330,), 3.0)

        mine.seen_at = f"/ip4/8.8.8.8/tcp/1/p2p/{RELAY}/p2p-circuit"
        assert (await ask(mine, Candidate(helper.peer_id, ()))).ip is None

        everybody = [Candidate(peer.peer_id, ()) for peer in (mine, old, helper)]
        assert [s.peer_id for s in await survey(mine, everybody)] == [helper.peer_id]
        for _ in range(8):
            await survey(mine, everybody)
        with pytest.raises(RemoteError, match="too often"):
            await ask(mine, Candidate(helper.peer_id, ()))
        for transport in (mine, helper, old):
            await transport.close()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(scenario())
