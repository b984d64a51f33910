"""A server measures its line: whom it asks, what counts, and when it asks again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random

import pytest

from petal_swarm.errors import NetworkError, PetalSwarmError, RemoteError
from petal_swarm.net.memory import MemoryNetwork
from petal_swarm.net.transport import Transport
from petal_swarm.server.uplink import AGAIN_S, ASKED, FEW_AGAIN_S, SOON_S, TRIED, Uplink
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement


def server(peer_id: str, state: str = "serving", at: str = "/memory") -> Announcement:
    return Announcement(
        peer_id=peer_id, model="m", span=Span(0, 4), addresses=(f"{at}/p2p/{peer_id}",), state=state
    )


class World:
    """Rates by peer, or why there is none; `servers` raises what it is, if it is an error."""

    def __init__(
        self, rates: dict[str, float | PetalSwarmError], servers: Sequence[Announcement] | None = None
    ) -> None:
        self.rates = rates
        self.servers: Sequence[Announcement] | PetalSwarmError = (
            [server(peer) for peer in rates] if servers is None else servers
        )
        self.asked: list[str] = []
        self.pauses: list[float] = []

    async def others(self) -> Sequence[Announcement]:
        if isinstance(self.servers, PetalSwarmError):
            raise self.servers
        return self.servers

    async def measure(self, transport: Transport, peer_id: str, addresses: Sequence[str]) -> float:
        assert {address.rpartition("/p2p/")[2] for address in addresses} == {peer_id}
        self.asked.append(peer_id)
        rate = self.rates[peer_id]
        if isinstance(rate, PetalSwarmError):
            raise rate
        return rate

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        if len(self.pauses) == self._rounds:
            raise asyncio.CancelledError

    def run(self, own: tuple[str, ...] = (), rounds_of: int = 2) -> float:
        """What is known after so many rounds."""
        self._rounds = rounds_of

        async def rounds() -> float:
            transport = MemoryNetwork().transport()
            transport.addresses = lambda: own or ("/memory/p2p/self",)  # type: ignore[method-assign]
            uplink = Uplink(
                transport,
                self.others,
                rng=Random(0),
                measure=self.measure,
                sleep=self.sleep,
            )
            with pytest.raises(asyncio.CancelledError):
                await uplink.run()
            return uplink.bytes_per_s

        return asyncio.run(rounds())


def test_the_middle_of_three_counts() -> None:
    """So one that lies, or is slow itself, does not decide."""
    world = World({"slow": 1e3, "honest": 5e6, "liar": 1e12})
    assert world.run() == 5e6
    assert sorted(world.asked[:3]) == ["honest", "liar", "slow"]
    assert world.pauses == [AGAIN_S, AGAIN_S]


def test_of_two_the_faster_since_the_other_may_be_slow_itself() -> None:
    world = World({"a": 1e6, "b": 2e6})
    assert world.run() == 2e6
    assert world.pauses == [FEW_AGAIN_S, FEW_AGAIN_S], "one may have lied: somebody else may be there by then"


def test_few_are_asked_and_others_in_place_of_those_that_do_not_answer() -> None:
    world = World({f"peer{number}": 1e6 for number in range(20)})
    world.run()
    assert len(world.asked) == 2 * ASKED
    world = World({f"peer{number}": NetworkError("gone") for number in range(20)})
    assert world.run() == 0
    assert len(world.asked) == 2 * TRIED
    assert world.pauses == [SOON_S, 2 * SOON_S]
    world = World({"busy": RemoteError("busy"), "gone": NetworkError("gone"), "there": 3e6})
    assert world.run() == 3e6


def test_who_is_alone_asks_again_soon() -> None:
    world = World({}, [])
    assert world.run() == 0
    assert world.pauses == [SOON_S, SOON_S]


def test_servers_that_load_or_leave_are_spared() -> None:
    world = World({"there": 1e6}, [server("loads", "joining"), server("there"), server("gone", "left")])
    assert world.run() == 1e6
    assert set(world.asked) == {"there"}


def test_a_directory_that_cannot_be_asked_ends_nothing() -> None:
    world = World({})
    world.servers = NetworkError("no way out")
    assert world.run() == 0
    assert world.pauses == [SOON_S, SOON_S]


def test_a_swarm_that_never_answers_is_asked_less_and_less() -> None:
    """Of older versions: they must not be sent to, nor log, every few seconds for ever."""
    world = World({"old": NetworkError("ended the stream")})
    world.run(rounds_of=10)
    assert world.pauses == [min(SOON_S * 2**number, AGAIN_S) for number in range(10)]
    assert world.pauses[-1] == AGAIN_S


def test_who_does_not_see_the_line_is_asked_last() -> None:
    """A sibling on the same machine, and one whose relay would be measured."""
    relayed = server("relayed", at="/ip4/192.0.2.9/tcp/1/p2p/relay/p2p-circuit")
    sibling = server("sibling", at="/ip4/198.51.100.1/tcp/2")
    rates: dict[str, float | PetalSwarmError] = {"relayed": 1e5, "sibling": 5e9, "far": 3e6}
    own = ("/ip4/198.51.100.1/tcp/1/p2p/self",)
    seen = [relayed, sibling, server("far", at="/ip4/203.0.113.5/tcp/1")]
    world = World(rates, seen)
    assert world.run(own) == 3e6
    assert world.asked == ["far", "far"]
    world = World(rates | {"far": NetworkError("gone")}, seen)
    assert world.run(own) == 5e9
    assert world.asked[0] == "far"
