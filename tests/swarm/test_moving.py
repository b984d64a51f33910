"""A real server moves to other blocks: what clients, sessions and the directory see of it."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from petal_swarm.engine.engine import Engine
from petal_swarm.errors import BusyError, CheckpointError, MissingBlocksError
from petal_swarm.net.channel import Channel
from petal_swarm.routing import coverage
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.entrance import Entrance
from petal_swarm.server.gate import StreamGate
from petal_swarm.server.server import Server
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement
from petal_swarm.wire.connection import SESSION_TABLE, Role
from petal_swarm.wire.messages.opening import Opened
from petal_swarm.wire.protocols import SESSION
from tests.checkpoints import VOCABULARY, reference
from tests.directory.samples import stream_pair
from tests.swarm.local import LocalSwarm

LAST = Span(2, 4)


def prompt(length: int = 8) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))


def expected(bloom: Path, count: int) -> torch.Tensor:
    return reference(bloom).generate(prompt(), max_new_tokens=count, do_sample=False)


def announced(swarm: LocalSwarm) -> dict[str, tuple[str, Span]]:
    """State and span of every server, as others see them."""
    listed = swarm.registry.shelf.book(swarm.checkpoint.model_key).announcements()
    return {a.peer_id: (a.state, a.span) for a in listed}


def announced_of(swarm: LocalSwarm, server: Server) -> tuple[str, Span] | None:
    return announced(swarm).get(server.announcement().peer_id)


def kill(swarm: LocalSwarm, server: Server) -> None:
    """Its process dies, and with it all that it would have said."""
    swarm.network.kill(server.announcement().peer_id)
    assert server._announcer is not None
    for task in (server._announcer._task, server._rebalancing, *server._tasks):
        if task is not None:
            task.cancel()


def fail_to_load(server: Server, *spans: Span) -> None:
    load = server._loader.load

    def failing(span: Span, *rest: Any) -> Engine:
        if span in spans:
            raise CheckpointError("the disk is gone")
        return load(span, *rest)

    server._loader.load = failing  # type: ignore[method-assign]


def test_clients_generate_before_and_after_a_move(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2", "0:2", "2:4"]) as swarm:
        model = swarm.model(wait_for_blocks_s=5)
        assert torch.equal(model.generate(prompt(), max_new_tokens=6, do_sample=False), expected(bloom, 6))
        mover, gone = swarm.servers[1], swarm.servers[2]
        kill(swarm, gone)
        swarm.run(asyncio.sleep(13))
        with pytest.raises(MissingBlocksError, match="blocks 2-3"):
            model.generate(prompt(), max_new_tokens=6)
        before = mover.announcement()
        waiting = swarm.transport()  # a stream that is open, and says nothing
        swarm.run(waiting.open_stream(before.peer_id, SESSION, addresses=before.addresses, timeout_s=1))
        stack = weakref.ref(mover._compute.engine.stack)  # type: ignore[union-attr]
        swarm.run(mover.move(LAST))
        gc.collect()
        assert stack() is None, "the old blocks are still in memory"
        after = mover.announcement()
        assert (after.peer_id, after.addresses) == (before.peer_id, before.addresses)
        assert announced_of(swarm, mover) == ("serving", LAST)
        assert torch.equal(model.generate(prompt(), max_new_tokens=6, do_sample=False), expected(bloom, 6))
        assert model.last_route is not None
        assert model.last_route.hops[1].peer_id == after.peer_id


def test_servers_fill_a_gap_and_open_none(bloom: Path) -> None:
    with LocalSwarm(bloom, []) as swarm:
        for _ in range(5):
            swarm.add_server(None, num_blocks=2)
        spans = [str(server.span) for server in swarm.servers]
        assert {"0:2", "2:4"} == set(spans)
        few = min(set(spans), key=spans.count)
        other = "0:2" if few == "2:4" else "2:4"
        dying = [server for server in swarm.servers if str(server.span) == few]
        model = swarm.model(wait_for_blocks_s=120)
        for server in dying:
            kill(swarm, server)
        living = [server for server in swarm.servers if server not in dying]
        held = Span.parse(other).blocks()

        async def watch() -> None:
            for _ in range(3000):
                await asyncio.sleep(0.05)
                count = coverage([server.announcement() for server in living], 4)
                assert all(count[block] for block in held), "a move opened a gap"

        swarm.run(watch())
        assert sorted(str(server.span) for server in living) in (
            sorted([few, other, other]),
            sorted([few, few, other]),
        )
        assert torch.equal(model.generate(prompt(), max_new_tokens=6, do_sample=False), expected(bloom, 6))


def test_after_a_move_it_is_left_alone_for_a_while(bloom: Path) -> None:
    with LocalSwarm(bloom, ["2:4"]) as swarm:
        server = swarm.add_server(None, num_blocks=2)
        assert server.announcement().movable
        swarm.run(server.move(Span(1, 3)))
        assert not server.announcement().movable
        swarm.run(asyncio.sleep(301))
        assert server.announcement().movable


def test_servers_of_given_blocks_do_not_move(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2", "0:2", "0:2"]) as swarm:
        fixed = swarm.add_server(None, num_blocks=2, rebalance=False)
        whole = swarm.add_server(None, num_blocks=4)
        movable = [server.announcement().movable for server in swarm.servers]
        assert movable == [False] * 5
        swarm.run(fixed.close())
        swarm.run(whole.close())
        swarm.run(asyncio.sleep(120))
        assert {span for _, span in announced(swarm).values()} == {Span(0, 2)}


def test_sessions_are_handed_over_before_a_move(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:4", "0:4"]) as swarm:
        model = swarm.model()
        with model.open_session(max_length=64) as session:
            ids = model.generate(prompt(), max_new_tokens=3, do_sample=False, session=session)
            assert session.route is not None
            mover = swarm.server_of(session.route.hops[0].peer_id)
            moving = swarm.loop.create_task(mover.move(Span(0, 2)))
            swarm.run(asyncio.sleep(1))
            assert moving.done()
            other = swarm.model()
            again = other.generate(prompt(), max_new_tokens=6, do_sample=False)
            assert other.last_route is not None
            assert other.last_route.hops[0].peer_id != mover.announcement().peer_id
            more = model.generate(None, max_new_tokens=3, do_sample=False, session=session)
            assert mover.announcement().peer_id not in {hop.peer_id for hop in session.route.hops}
        assert moving.exception() is None
        assert announced_of(swarm, mover) == ("serving", Span(0, 2))
        assert torch.equal(again, expected(bloom, 6))
        assert more[0].tolist()[-3:] == expected(bloom, 6)[0].tolist()[-3:]
        assert ids[0].tolist() == expected(bloom, 3)[0].tolist()


def test_sessions_that_do_not_end_are_ended(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:4"], drain_timeout_s=5.0) as swarm:
        model = swarm.model()
        with model.open_session(max_length=64) as session:
            model.generate(prompt(), max_new_tokens=3, session=session)
            started = swarm.loop.time()
            swarm.run(swarm.servers[0].move(Span(0, 2)))
            assert 5 <= swarm.loop.time() - started < 7
            with pytest.raises(BusyError, match="moves to other blocks"):
                model.generate(None, max_new_tokens=3, session=session)
        assert swarm.servers[0].num_sessions == 0


def test_blocks_that_cannot_be_loaded_send_it_back(bloom: Path, caplog: pytest.LogCaptureFixture) -> None:
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm, caplog.at_level(logging.WARNING):
        mover = swarm.servers[0]
        fail_to_load(mover, LAST)
        swarm.run(mover.move(LAST))
        assert "cannot load blocks 2:4, going back to 0:2: the disk is gone" in caplog.text
        assert announced_of(swarm, mover) == ("serving", Span(0, 2))
        tokens = swarm.model().generate(prompt(), max_new_tokens=6, do_sample=False)
        assert torch.equal(tokens, expected(bloom, 6))


def test_without_any_blocks_it_leaves(bloom: Path, caplog: pytest.LogCaptureFixture) -> None:
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm, caplog.at_level(logging.WARNING):
        mover = swarm.servers[0]
        fail_to_load(mover, LAST, Span(0, 2))
        failed = swarm.loop.create_task(mover.wait_failed())
        with pytest.raises(CheckpointError):
            swarm.run(mover.move(LAST))
        swarm.run(asyncio.sleep(1))
        assert failed.done()
        assert "cannot load blocks 0:2 again, leaving the swarm" in caplog.text
        assert announced_of(swarm, mover) is None
        swarm.run(asyncio.sleep(20))
        assert announced_of(swarm, mover) is None


def test_nothing_is_announced_as_served_before_it_is(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2", "0:2"]) as swarm:
        mover = swarm.servers[0]
        said: list[Announcement] = []
        announce = mover._directory.announce

        async def noted(announcement: Announcement, *, ttl_s: float) -> None:
            engine = mover._compute and mover._compute.engine
            assert announcement.state != "serving" or (engine and engine.stack.span == announcement.span)
            said.append(announcement)
            await announce(announcement, ttl_s=ttl_s)

        mover._directory.announce = noted  # type: ignore[method-assign]
        fail_to_load(mover, Span(1, 3))
        swarm.run(mover.move(LAST))
        swarm.run(mover.move(Span(1, 3)))
        assert [(a.state, str(a.span)) for a in said] == [
            ("joining", "2:4"),
            ("serving", "2:4"),
            ("joining", "1:3"),
            ("joining", "2:4"),
            ("serving", "2:4"),
        ]


def test_a_server_told_to_leave_while_it_moves_leaves(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2"], drain_timeout_s=1000.0) as swarm:
        for _ in range(3):
            swarm.add_server(None, num_blocks=2)
        model = swarm.model()
        with model.open_session(max_length=64) as session:
            model.generate(prompt(), max_new_tokens=3, session=session)
            assert session.route is not None
            mover = swarm.server_of(session.route.hops[1].peer_id)
            assert session._ring is not None
            session._ring._keeper = lambda ring: asyncio.sleep(3600)  # a client that does not go elsewhere
            assert mover._rebalancing is not None
            mover._rebalancing.cancel()
            mover._rebalancing = swarm.loop.create_task(mover.move(Span(0, 2)))
            swarm.run(asyncio.sleep(1))
            assert announced_of(swarm, mover) == ("joining", Span(0, 2))
            leaving = swarm.loop.create_task(mover.drain(30.0))
            swarm.run(asyncio.sleep(1))
            assert mover._rebalancing.cancelled()
            assert announced_of(swarm, mover) is None
            model.generate(None, max_new_tokens=3, session=session)
        swarm.run(asyncio.wait_for(leaving, 1))
        swarm.run(asyncio.sleep(60))
        assert announced_of(swarm, mover) is None


def test_leaving_ends_the_loading(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2", "0:2"]) as swarm:
        mover = swarm.servers[0]
        load = mover._loader.load

        def told_meanwhile(span: Span, progress: Any) -> Engine:
            mover._leaving = True
            return load(span, progress)

        mover._loader.load = told_meanwhile  # type: ignore[method-assign]
        with pytest.raises(Exception, match="leaves while it loads"):
            swarm.run(mover.move(LAST))
        assert mover._compute is None


def test_whoever_comes_while_there_are_no_blocks_is_told(bloom: Path) -> None:
    async def scenario() -> None:
        entrance, (client, server) = Entrance(StreamGate(SessionLimits())), stream_pair()
        await entrance._handle_session(server)
        channel = Channel(client, SESSION_TABLE, Role.DIALER)
        with pytest.raises(BusyError, match="moving to other blocks"):
            await channel.expect(Opened, timeout_s=1)

    asyncio.run(scenario())
