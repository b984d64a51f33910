"""A server's watch on its reachability: when it goes to relays, and when it says something."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

import pytest

from petal_swarm.directory import reachability as asking
from petal_swarm.directory.reachability import Reachability, Sighting
from petal_swarm.errors import NetworkError
from petal_swarm.net.memory import MemoryNetwork, MemoryTransport, VirtualClockLoop
from petal_swarm.net.relay import HOP_PROTOCOL, Candidate
from petal_swarm.net.transport import Stream
from petal_swarm.server import reachability as watching
from petal_swarm.server.reachability import AGAIN_S, PAUSE_S, RENEW_S, SOON_S, ReachabilityWatch

PORT = 31330


class Relayed(MemoryTransport):
    relayed: tuple[str, ...] = ()
    failing = False

    def addresses(self) -> tuple[str, ...]:
        return (f"/ip4/192.168.1.2/tcp/{PORT}/p2p/{self.peer_id}", *self.relayed)

    async def refresh_addresses(self) -> None:
        if self.failing:
            raise NetworkError("the daemon is gone")


@dataclass
class World:
    mine: Relayed
    relay: MemoryTransport
    verdicts: list[Reachability] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    def watch(self, *, private: bool = False, rounds: int = 1) -> ReachabilityWatch:
        address = f"/ip4/8.8.4.4/tcp/1/p2p/{self.relay.peer_id}"

        async def helpers() -> Sequence[Candidate]:
            return [Candidate(self.relay.peer_id, (address,))]

        async def sleep(seconds: float) -> None:
            self.pauses.append(seconds)
            if len(self.pauses) == rounds:
                raise asyncio.CancelledError

        return ReachabilityWatch(
            self.mine, helpers, private=private, on_change=self.verdicts.append, sleep=sleep
        )

    def seen(self, *reached: int) -> None:
        self.sightings[:] = [Sighting("helper", "8.8.8.8", (PORT,), reached)]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[World], Coroutine[None, None, None]]], None]:
    def run(scenario: Callable[[World], Coroutine[None, None, None]]) -> None:
        async def whole() -> None:
            network = MemoryNetwork()
            relay = network.transport()
            mine = Relayed(network, network.transport().identity)
            network._peers[mine.peer_id] = mine
            world = World(mine, relay)

            async def survey(*_: object) -> list[Sighting]:
                return list(world.sightings)

            async def hop(stream: Stream) -> None:
                await stream.read()
                stream.write(b"\x04\x08\x02\x28\x64")  # status OK, no limits
                await stream.drain()

            monkeypatch.setattr(watching, "survey", survey)
            await relay.serve(HOP_PROTOCOL, hop)
            await scenario(world)
            await relay.close()
            await mine.close()

        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            runner.run(whole())

    return run


Play = Callable[[Callable[[World], Coroutine[None, None, None]]], None]


def test_relays_are_taken_when_nobody_gets_through_and_given_up_when_somebody_does(play: Play) -> None:
    async def scenario(world: World) -> None:
        watch = world.watch()
        world.seen()
        assert (await watch.check()).kind == "relay"
        [circuit] = world.mine.relayed
        assert circuit == f"/ip4/8.8.4.4/tcp/1/p2p/{world.relay.peer_id}/p2p-circuit/p2p/{world.mine.peer_id}"
        assert circuit in world.mine.addresses()
        world.seen(PORT)
        assert (await watch.check()).kind == "direct"
        assert world.mine.relayed == ()
        assert [verdict.kind for verdict in world.verdicts] == ["relay", "direct"]

    play(scenario)


def test_changes_are_told_once(play: Play) -> None:
    async def scenario(world: World) -> None:
        watch = world.watch()
        for reached in ([PORT], [PORT], [], [], []):
            world.seen(*reached)
            await watch.check()
        assert [verdict.kind for verdict in world.verdicts] == ["direct", "relay"]

    play(scenario)


def test_a_moment_without_witnesses_costs_no_relay(play: Play) -> None:
    async def scenario(world: World) -> None:
        watch = world.watch()
        world.seen()
        await watch.check()
        world.sightings.clear()
        assert (await watch.check()).kind == "relay"
        assert len(world.verdicts) == 1

    play(scenario)


def test_nobody_to_ask_is_no_reason_for_relays(play: Play) -> None:
    async def scenario(world: World) -> None:
        assert (await world.watch().check()).kind == "unknown"
        assert world.mine.relayed == ()

    play(scenario)


def test_private_needs_no_witness(play: Play) -> None:
    async def scenario(world: World) -> None:
        assert (await world.watch(private=True).check()).kind == "relay"
        world.mine.relayed = ()
        await world.relay.close()
        lost = world.watch(private=True)
        assert (await lost.check()).kind == "none"
        assert "nobody is there" in lost.refusals

    play(scenario)


def test_a_failing_daemon_ends_nothing(play: Play) -> None:
    async def scenario(world: World) -> None:
        world.mine.failing = True
        assert (await world.watch().check()).kind == "unknown"

    play(scenario)


def test_settling_has_patience_where_it_may_help(play: Play) -> None:
    async def scenario(world: World) -> None:
        world.seen()
        assert (await world.watch(rounds=9).settle()).kind == "relay"
        assert world.pauses == [PAUSE_S, PAUSE_S]  # a router may open a port yet
        world.pauses.clear()
        assert (await world.watch(rounds=9, private=True).settle()).kind == "relay"
        world.seen(PORT)
        assert (await world.watch(rounds=9).settle()).kind == "direct"
        assert world.pauses == []
        await world.relay.close()
        assert (await world.watch(rounds=9, private=True).settle()).kind == "none"
        assert world.pauses == [PAUSE_S, PAUSE_S]

    play(scenario)


def test_it_looks_again_soon_at_first_and_seldom_once_reached(play: Play) -> None:
    async def scenario(world: World) -> None:
        world.seen()
        watch = world.watch(rounds=5)
        with pytest.raises(asyncio.CancelledError):
            await watch.run()
        assert world.pauses == [SOON_S, SOON_S, SOON_S, RENEW_S, RENEW_S]
        world.pauses.clear()
        world.seen(PORT)
        with pytest.raises(asyncio.CancelledError):
            await world.watch(rounds=1).run()
        assert world.pauses == [AGAIN_S]

    play(scenario)


def test_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="petal_swarm.server.reachability")
    for verdict in (
        asking.judge([Sighting("helper", "8.8.8.8", (PORT,), (PORT,))], [f"/ip4/8.8.8.8/tcp/{PORT}"]),
        asking.judge([Sighting("helper", "8.8.8.8", (PORT,))], [f"/ip4/8.8.8.8/tcp/{PORT}"]),
        asking.judge([], []),
    ):
        watching.log_change(verdict)
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING, logging.INFO]
    assert "forward TCP port 31330" in caplog.records[1].message
