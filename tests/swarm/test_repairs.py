"""Repairs that are themselves disturbed, hops that lie about their links, and sessions that nobody steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import petal_swarm.net.channel
import petal_swarm.net.memory
from petal_swarm.client.members import Member
from petal_swarm.engine.steps import StepRequest, StepResult
from petal_swarm.routing.route import Route
from petal_swarm.server.hosted import HostedSession
from petal_swarm.server.server import Server
from petal_swarm.span import Slice
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.repair import Lost
from petal_swarm.wire.messages.steps import Output, Step
from petal_swarm.wire.tensors import encode_tensor
from tests.checkpoints import reference
from tests.swarm.local import LocalSwarm
from tests.swarm.test_failover import SPANS, TASKS, Disturber, Outcome, expected, prompt, run

GREEDY = TASKS["greedy"]
#: Of 40 tokens through three hops, undisturbed.
USUAL_S = 40 * 4 * 0.007


@pytest.fixture
def swarm(bloom8: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(bloom8, SPANS) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def bloom8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.checkpoints import save_bloom

    return save_bloom(tmp_path_factory.mktemp("bloom8"))


def hosted_by(server: Server) -> HostedSession:
    assert server._host is not None
    (hosted,) = server._host._sessions.values()
    return hosted


def greedy(
    swarm: LocalSwarm, bloom8: Path, disturb: Callable[[Disturber], object], *, within_s: float
) -> Outcome:
    """Its tokens are right, and it takes only so many seconds more than usual."""
    ids = prompt(1, 14)
    started = swarm.loop.time()
    outcome = run(swarm, ids, GREEDY, disturb)
    assert torch.equal(outcome.tokens, expected(bloom8, ids, GREEDY))
    assert swarm.loop.time() - started < USUAL_S + within_s
    return outcome


@pytest.mark.parametrize("hop", [0, 1])
def test_a_cut_cable_is_not_dialled_for_long(swarm: LocalSwarm, bloom8: Path, hop: int) -> None:
    """Both ends live, and others could take the place of either."""

    def disturb(disturber: Disturber) -> None:
        def act(peer_id: str) -> None:
            route = disturber.session.route
            assert route is not None
            swarm.network.cut(peer_id, route.hops[hop + 1].peer_id)

        disturber.at(0.2, act, hop)

    assert greedy(swarm, bloom8, disturb, within_s=5).ring.epoch > 0


def test_a_lost_connection_to_the_only_server(bloom8: Path) -> None:
    """Nobody else serves its blocks, and nothing is wrong with it."""
    with LocalSwarm(bloom8, ["0:4", "4:8"]) as swarm:

        def disturb(disturber: Disturber) -> None:
            def act(peer_id: str) -> None:
                ring = disturber.session._ring
                assert ring is not None
                ring.members[1].channel.abort()

            disturber.at(0.2, act, 1)

        assert greedy(swarm, bloom8, disturb, within_s=2).ring.repairs == 1


def test_a_hop_that_says_again_and_again_that_its_link_is_lost(swarm: LocalSwarm, bloom8: Path) -> None:
    def disturb(disturber: Disturber) -> None:
        def act(peer_id: str) -> None:
            hosted = hosted_by(swarm.server_of(peer_id))

            async def lie() -> None:
                while not hosted.ended:
                    hosted._tell(Lost(hosted.upstream.epoch, upstream=True, reason="a lie"))
                    await asyncio.sleep(0.005)

            swarm.loop.create_task(lie())

        disturber.at(0.2, act, 1)

    outcome = greedy(swarm, bloom8, disturb, within_s=2)
    assert outcome.victims[0] not in {member.peer_id for member in outcome.ring.members}


def test_a_new_link_that_is_lost_before_the_repair_is_done(swarm: LocalSwarm, bloom8: Path) -> None:
    """The hop before says so while the client still waits for others; the hop behind does not notice."""
    told: list[int] = []

    def disturb(disturber: Disturber) -> None:
        def act(peer_id: str) -> None:
            ring = disturber.session._ring
            assert ring is not None
            hosted = hosted_by(swarm.server_of(ring.members[0].peer_id))
            adopt = ring.adopt

            def late(members: list[Member], route: Route) -> None:
                if not told:
                    told.append(ring.epoch)
                    ring._hear(
                        ring.members[0], Lost(ring.epoch, upstream=False, replayable=True, reason="gone")
                    )
                    assert hosted._downstream is not None
                    for link in list(hosted._downstream.outbox.links):
                        link.channel.abort = lambda: None  # type: ignore[method-assign]
                        hosted._downstream.outbox.drop(link)
                adopt(members, route)

            ring.adopt = late  # type: ignore[method-assign, assignment]
            swarm.network.kill(peer_id)

        disturber.at(0.2, act, 1)

    assert greedy(swarm, bloom8, disturb, within_s=0.5).ring.repairs == 2
    assert told == [1]


def test_a_last_hop_that_computes_and_does_not_answer(swarm: LocalSwarm, bloom8: Path) -> None:
    def disturb(disturber: Disturber) -> None:
        def act(peer_id: str) -> None:
            hosted = hosted_by(swarm.server_of(peer_id))
            tell = hosted._tell

            def keep_quiet(message: Message) -> None:
                if not isinstance(message, Output):
                    tell(message)

            hosted._tell = keep_quiet  # type: ignore[method-assign]

        disturber.at(0.2, act, 2)

    assert greedy(swarm, bloom8, disturb, within_s=2.5).ring.repairs == 1


def test_answers_of_a_wrong_shape_lose_the_hop_and_not_the_session(swarm: LocalSwarm, bloom8: Path) -> None:
    def disturb(disturber: Disturber) -> None:
        def act(peer_id: str) -> None:
            compute = swarm.server_of(peer_id)._compute
            assert compute is not None
            right = compute.engine.run

            def wrong(requests: list[StepRequest]) -> list[StepResult]:
                results = right(requests)
                for result in results:
                    if result.hidden is not None:
                        result.hidden = result.hidden[:, :-1].clone()
                return results

            compute.engine.run = wrong  # type: ignore[method-assign, assignment]

        disturber.at(0.2, act, 2)

    outcome = greedy(swarm, bloom8, disturb, within_s=1)
    assert outcome.victims[0] not in {member.peer_id for member in outcome.ring.members}


def test_a_silent_first_hop_is_noticed_while_a_long_prompt_waits_to_be_sent(
    swarm: LocalSwarm, bloom8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the steps that were sent wants an answer."""
    for module in (petal_swarm.net.channel, petal_swarm.net.memory):
        monkeypatch.setattr(module, "WRITE_HIGH_WATER_BYTES", 4096)
    ids, options = prompt(1, 150), {"max_new_tokens": 10, "do_sample": False}
    started = swarm.loop.time()
    outcome = run(swarm, ids, options, lambda d: d.at(0.001, d.silence, 0), prefill_chunk_tokens=16)
    assert torch.equal(outcome.tokens, expected(bloom8, ids, options))
    assert swarm.loop.time() - started < 4


@pytest.mark.parametrize("hop", [0, 1])
def test_a_silent_hop_behind_one_that_reads_no_more(
    swarm: LocalSwarm, bloom8: Path, monkeypatch: pytest.MonkeyPatch, hop: int
) -> None:
    """What the first hop is told of its new neighbour comes behind steps that it does not read."""
    for module in (petal_swarm.net.channel, petal_swarm.net.memory):
        monkeypatch.setattr(module, "WRITE_HIGH_WATER_BYTES", 4096)
    ids, options = prompt(1, 150), {"max_new_tokens": 10, "do_sample": False}
    started = swarm.loop.time()
    outcome = run(swarm, ids, options, lambda d: d.at(0.02, d.silence, hop + 1), prefill_chunk_tokens=8)
    assert torch.equal(outcome.tokens, expected(bloom8, ids, options))
    assert swarm.loop.time() - started < 9


def test_chunks_of_a_prompt_that_are_on_their_way_are_not_answered(swarm: LocalSwarm) -> None:
    model = swarm.model()
    with model.open_session(max_length=64) as session:
        model.generate(prompt(1, 8), max_new_tokens=3, do_sample=False, session=session)
        ring = session._ring
        assert ring is not None
        answered = ring.answered
        assert answered == ring.last_sent
        meta, payload = encode_tensor(torch.zeros(2, 64))
        chunk = Step(answered + 1, 0, (Slice(0, session.position, 2),), meta, payload, rows="none")
        swarm._thread.call(lambda: ring.send(chunk))
        assert ring.answered == answered
        assert ring.is_waiting


def test_a_session_that_nobody_uses_waits_for_servers_to_come_back(bloom8: Path) -> None:
    ids = prompt(1, 10)
    theirs = reference(bloom8).generate(ids, max_new_tokens=16, do_sample=False)
    with LocalSwarm(bloom8, ["0:4", "4:8"]) as swarm:
        model = swarm.model(repair_timeout_s=10)
        with model.open_session(max_length=64) as session:
            one = model.generate(ids, max_new_tokens=8, do_sample=False, session=session)
            assert session.route is not None
            swarm.network.kill(session.route.hops[1].peer_id)
            swarm.run(asyncio.sleep(100))
            swarm.add_server("4:8")
            two = model.generate(None, max_new_tokens=8, do_sample=False, session=session)
        assert torch.equal(torch.cat([one, two], 1), theirs)
