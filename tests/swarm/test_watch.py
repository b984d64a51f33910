"""Watching a swarm on a virtual clock: servers come, die, move and leave, and everybody is told in time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from petal_swarm.client import watch as watching
from petal_swarm.client.config import ClientConfig
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.client.watch import SwarmWatch
from petal_swarm.directory.memory import MemoryDirectory
from petal_swarm.errors import BusyError, HopLostError, PeerUnreachableError
from petal_swarm.wire.announcement import Announcement
from tests.swarm.local import LocalSwarm


class Watched:
    """A swarm, and a watch of it that is watched."""

    def __init__(self, local: LocalSwarm) -> None:
        self.local = local
        shape = local.checkpoint.config
        self.ref = ModelRef(local.checkpoint.model_key, shape.num_blocks, shape.hidden_size)
        directory = MemoryDirectory(local.registry)
        self.swarm = Swarm(ClientConfig(initial_peers=("unused",)), local.transport(), directory)
        self.watch = local.run(self._start())
        self._watching = self.watch.watching()
        self._watching.__enter__()

    async def _start(self) -> SwarmWatch:
        watch = SwarmWatch(self.swarm, self.ref, "model", now=self.local.loop.time)
        assert await watch.later_than(0, timeout_s=10)
        return watch

    def after(self, seconds: float) -> list[str]:
        """The events of so many seconds from now on, in words."""
        known = len(self.watch.happenings)
        self.local.run(asyncio.sleep(seconds))
        return [happening.event.kind for happening in list(self.watch.happenings)[known:]]

    def peer_ids(self) -> set[str]:
        return {server.announcement().peer_id for server in self.local.servers}

    def close(self) -> None:
        self._watching.__exit__(None, None, None)
        self.local.run(self.watch.close())


@pytest.fixture
def watched(bloom: Path) -> Iterator[Watched]:
    with LocalSwarm(bloom, ["0:2", "2:4"]) as local:
        watched = Watched(local)
        yield watched
        watched.close()


def test_who_was_there_before_is_no_news(watched: Watched) -> None:
    assert watched.watch.status is not None
    assert watched.watch.status.missing == ()
    assert len(watched.watch.status.rtts_s) == 2
    assert watched.after(20) == []


def test_servers_come_and_go(watched: Watched) -> None:
    watched.local.add_server("2:4")
    joined = watched.after(4)
    assert joined[0] == "joined"
    assert set(joined) <= {"joined", "serving"}
    watched.local.run(watched.local.servers[2].close())
    assert watched.after(4)[-1] == "left"


def test_a_killed_server_has_failed_until_its_record_is_gone(watched: Watched) -> None:
    watched.local.network.kill(watched.local.servers[0].announcement().peer_id)
    assert watched.after(6) == ["failed", "gap_opened"]
    assert watched.watch.status is not None
    assert watched.watch.status.missing == (0, 1)
    watched.local.run(watched.local.servers[0].close())
    assert watched.after(4) == ["left"]
    assert watched.watch.happenings[-1].event.words == "did not come back"
    watched.local.add_server("0:2")
    assert watched.after(4)[-1] == "gap_closed"


def test_one_late_answer_is_no_failure(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, asked = watched.watch._measure, []

    async def lossy(peers):
        asked.append([peer.peer_id for peer in peers])
        return await measure(peers) if len(asked) % 2 == 0 else {}

    monkeypatch.setattr(watched.watch, "_measure", lossy)
    assert watched.after(10) == []
    assert asked[:2] == [asked[0], asked[0]]


@pytest.fixture
def heard(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Who answers pings; at first all that are there."""
    measure, heard = watched.watch._measure, watched.peer_ids()

    async def of_heard(peers):
        return await measure([peer for peer in peers if peer.peer_id in heard])

    monkeypatch.setattr(watched.watch, "_measure", of_heard)
    return heard


def state_of(watched: Watched, peer_id: str) -> str:
    status = watched.watch.status
    assert status is not None
    return next(status.state(peer) for peer in status.announcements if peer.peer_id == peer_id)


def test_who_has_not_answered_yet_is_loading_and_joins_with_its_first_answer(
    watched: Watched, heard: set[str]
) -> None:
    newcomer = watched.local.add_server("2:4").announcement().peer_id
    assert watched.after(5) == []
    assert state_of(watched, newcomer) == "joining"
    heard.add(newcomer)
    assert watched.after(4) == ["joined"]
    assert watched.watch.happenings[-1].event.words == "joined with blocks 2-3"
    assert state_of(watched, newcomer) == "serving"


def test_who_never_answers_is_silent_in_the_end(watched: Watched, heard: set[str]) -> None:
    newcomer = watched.local.add_server("2:4").announcement().peer_id
    assert watched.after(watching.EXPECTED_S + 10) == ["failed"]
    assert watched.watch.happenings[-1].event.words == "does not answer; it was to serve blocks 2-3"
    assert state_of(watched, newcomer) == "no answer"


def test_who_goes_before_its_first_answer_was_not_ready(watched: Watched, heard: set[str]) -> None:
    watched.local.add_server("2:4")
    watched.after(5)
    watched.local.run(watched.local.servers[-1].close())
    assert watched.after(4) == ["left"]
    assert watched.watch.happenings[-1].event.words == "left before it was ready"


def test_who_failed_just_now_is_asked_again_at_each_look(watched: Watched, heard: set[str]) -> None:
    victim = watched.local.servers[0].announcement().peer_id
    heard.remove(victim)
    assert watched.after(5) == ["failed", "gap_opened"]
    heard.add(victim)
    assert watched.after(2.1) == ["back", "gap_closed"]


def test_who_has_been_silent_for_long_is_asked_at_once_when_its_record_changes(
    watched: Watched, heard: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "EXPECTED_S", 0.0)
    monkeypatch.setattr(watching, "SILENT_AGAIN_S", 1e6)
    victim = watched.local.servers[0].announcement().peer_id
    heard.remove(victim)
    watched.after(5)
    heard.add(victim)
    record = watched.watch._asked[victim]
    announcements = watched.swarm.view.announcements

    async def unchanged(model: str):
        return [record if one.peer_id == victim else one for one in await announcements(model)]

    monkeypatch.setattr(watched.swarm.view, "announcements", unchanged)
    assert watched.after(9) == []
    record = replace(record, queue_s=1.5)
    assert watched.after(2.1) == ["back", "gap_closed"]


def test_a_session_that_opens_shows_that_a_silent_server_is_there(
    watched: Watched, heard: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "EXPECTED_S", 0.0)
    monkeypatch.setattr(watching, "SILENT_AGAIN_S", 1e6)
    watched._watching.__exit__(None, None, None)
    heard.clear()
    watched.after(40)
    assert watched.watch.status is not None
    assert watched.watch.status.missing == (0, 1, 2, 3)
    heard |= watched.peer_ids()
    model = watched.local.model()
    model._swarm = watched.swarm
    known = len(watched.watch.happenings)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)
    watched.after(0.5)
    assert [h.event.kind for h in list(watched.watch.happenings)[known:]] == ["back", "back", "gap_closed"]
    watched._watching = watched.watch.watching()
    watched._watching.__enter__()


def test_what_a_session_sees_is_known_at_once(watched: Watched) -> None:
    victim = watched.local.servers[1].announcement().peer_id
    version = watched.watch.version

    async def blame() -> None:
        watched.swarm.view.blame(victim, BusyError("later"))
        assert watched.watch.version == version
        watched.swarm.view.blame(victim, HopLostError("gone"))
        watched.swarm.view.blame(victim, HopLostError("gone"))
        assert watched.watch.version == version + 1

    watched.local.run(blame())
    assert [h.event.kind for h in watched.watch.happenings] == ["failed", "gap_opened"]
    assert watched.after(5) == ["back", "gap_closed"]


def test_a_server_killed_under_a_session_is_shown_before_the_answer_is_there(watched: Watched) -> None:
    watched.local.add_server("0:2")
    watched.after(5)
    model = watched.local.model()
    model._swarm = watched.swarm
    with model.open_session(max_length=32) as session:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, session=session)
        victim = session.route.hops[0].peer_id
        watched.local.network.kill(victim)
        model.generate(torch.tensor([[8]]), max_new_tokens=4, session=session)
    assert {h.event.peer_id for h in watched.watch.happenings if h.event.kind == "failed"} == {victim}
    assert watched.watch.status is not None
    assert watched.watch.status.missing == ()
    assert victim not in watched.watch.status.rtts_s


def test_a_swarm_that_cannot_be_asked_is_one_event(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    announcements = watched.swarm.view.announcements

    async def unreachable(model: str):
        raise PeerUnreachableError("nobody answers at /ip4/203.0.113.9")

    monkeypatch.setattr(watched.swarm.view, "announcements", unreachable)
    assert watched.after(10) == ["lost", "gap_opened"]
    assert watched.watch.trouble == "nobody answers at /ip4/203.0.113.9"
    monkeypatch.setattr(watched.swarm.view, "announcements", announcements)
    assert watched.after(5) == ["found", "gap_closed"]
    assert watched.watch.trouble is None


def test_nobody_watching_means_few_looks_and_the_first_watcher_wakes_it(watched: Watched) -> None:
    looks = []
    announcements = watched.swarm.view.announcements

    async def counted(model: str):
        looks.append(watched.local.loop.time())
        return await announcements(model)

    watched.swarm.view.announcements = counted
    watched.after(20)
    assert 8 <= len(looks) <= 11
    watched._watching.__exit__(None, None, None)
    watched.after(2)
    looks.clear()
    watched.after(100)
    assert 3 <= len(looks) <= 4
    looks.clear()
    assert watched.local.run(watched.watch.fresh(1.0)) is watched.watch.status
    assert len(looks) == 1
    assert watched.local.run(watched.watch.fresh(1.0)) is watched.watch.status
    assert len(looks) == 1
    watched.after(5)
    watched._watching = watched.watch.watching()
    watched._watching.__enter__()
    watched.after(0.5)
    assert len(looks) == 2


def test_readers_catch_up_from_any_version_that_is_remembered(
    watched: Watched,
) -> None:
    watch = watched.watch
    begin = watch.version
    assert watch.since(begin) == []
    for server in watched.local.servers:
        watched.local.network.kill(server.announcement().peer_id)
        watched.after(10)
    assert [change.version for change in watch.since(begin)] == list(range(begin + 1, watch.version + 1))
    assert watch.since(watch.version + 1) is None
    while watch._log[0].version <= begin + 1:
        watch._log.popleft()
    assert watch.since(begin) is None
    assert watch.since(watch.version) == []


def test_large_swarms_are_pinged_in_turn(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "PINGS_A_LOOK", 1)
    measure, asked = watched.watch._measure, []

    async def counted(peers):
        asked.append([peer.peer_id for peer in peers])
        return await measure(peers)

    monkeypatch.setattr(watched.watch, "_measure", counted)
    watched.after(9)
    assert [len(batch) for batch in asked] == [1] * len(asked)
    assert len({peer_id for batch in asked[:2] for peer_id in batch}) == 2


def test_once_closed_nobody_waits_for_it(watched: Watched) -> None:
    async def close_while_somebody_asks() -> None:
        asking = asyncio.create_task(watched.watch.fresh(0.0))
        await asyncio.sleep(0)
        await watched.watch.close()
        await asking

    watched.local.run(close_while_somebody_asks(), timeout_s=10)
    assert watched.swarm.view.listeners == []
    assert watched.swarm.view.witnesses == []


def test_a_look_that_fails_is_not_the_last(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(model: str) -> list[Announcement]:
        raise OSError("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(watched.swarm.view, "announcements", fail)
        assert watched.after(3) == ["lost", "gap_opened"]
        assert watched.watch.trouble is not None
    assert watched.after(3) == ["found", "gap_closed"]
    assert watched.watch.trouble is None
