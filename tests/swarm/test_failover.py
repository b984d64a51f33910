"""Hops die, fall silent or are cut off at any moment, and the tokens are those of an undisturbed run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from petal_swarm.client.ring import Ring
from petal_swarm.client.session import InferenceSession
from petal_swarm.errors import HopLostError
from petal_swarm.server.server import Server
from tests.checkpoints import VOCABULARY, assert_lively, reference
from tests.swarm.local import LocalSwarm

SPANS = ["0:3", "0:3", "3:5", "3:5", "5:8", "5:8"]
TASKS = {
    "greedy": {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False},
    "sampled": {"max_new_tokens": 30, "do_sample": True, "top_p": 0.9},
    "beams": {"max_new_tokens": 25, "num_beams": 4},
    "drafts": {"max_new_tokens": 30, "do_sample": False, "prompt_lookup_num_tokens": 4},
}


def prompt(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


class Disturber:
    """Does something to the hops of a session, at moments of the virtual clock that follow from a seed."""

    def __init__(self, swarm: LocalSwarm, session: InferenceSession) -> None:
        self.swarm = swarm
        self.session = session
        self.done: list[str] = []

    def at(self, seconds: float, act: Callable[[str], object], hop: int) -> None:
        """Once the session has a route: so many seconds later, do it to the server of that hop."""

        async def wait() -> None:
            while self.session.route is None:  # noqa: ASYNC110 - the session has no event for it
                await asyncio.sleep(0.001)
            await asyncio.sleep(seconds)
            hops = self.session.route.hops
            peer_id = hops[hop % len(hops)].peer_id
            self.done.append(peer_id)
            act(peer_id)

        self.swarm.loop.create_task(wait())

    def kill(self, peer_id: str) -> None:
        self.swarm.network.kill(peer_id)

    def silence(self, peer_id: str) -> None:
        """A stopped process: nothing is closed, nothing answers."""
        for other in list(self.swarm.network._peers):
            if other != peer_id:
                self.swarm.network.cut(peer_id, other)


class Outcome(NamedTuple):
    """What came of a generation that was disturbed."""

    tokens: torch.Tensor
    ring: Ring
    victims: list[str]


def killing(hop: int, moment: float) -> Callable[[Disturber], None]:
    return lambda disturber: disturber.at(moment, disturber.kill, hop)


def mask_of(ids: torch.Tensor) -> torch.Tensor:
    """The first sequence of a batch is padded on the left."""
    mask = torch.ones_like(ids)
    if ids.shape[0] > 1:
        mask[0, : ids.shape[1] // 3] = 0
    return mask


def run(
    swarm: LocalSwarm,
    ids: torch.Tensor,
    options: dict[str, object],
    disturb: Callable[[Disturber], object],
    **settings: object,
) -> Outcome:
    model = swarm.model(**settings)
    with model.open_session(max_length=ids.shape[1] + 80) as session:
        disturber = Disturber(swarm, session)
        disturb(disturber)
        torch.manual_seed(7)
        tokens = model.generate(ids, attention_mask=mask_of(ids), session=session, **options)
        return Outcome(tokens, session._ring, disturber.done)


def expected(checkpoint: Path, ids: torch.Tensor, options: dict[str, object]) -> torch.Tensor:
    options = {name: value for name, value in options.items() if name != "prompt_lookup_num_tokens"}
    torch.manual_seed(7)
    return reference(checkpoint).generate(ids, attention_mask=mask_of(ids), **options)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_killed_hop_is_replaced_and_no_token_changes(checkpoint: Path, task: str, hop: int) -> None:
    rng = random.Random(f"{task} {hop}")
    ids = prompt(1 if task in ("drafts", "greedy") else 2, 14)
    theirs = expected(checkpoint, ids, TASKS[task])
    if task == "greedy":
        assert_lively(theirs, ids.shape[1])
    for _ in range(3):
        with LocalSwarm(checkpoint, SPANS, seed=rng.randrange(1000)) as swarm:
            moment = rng.uniform(0.0, 0.5)
            outcome = run(swarm, ids, TASKS[task], killing(hop, moment))
            assert torch.equal(outcome.tokens, theirs), moment
            assert outcome.victims
            assert outcome.ring.repairs == 1


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_in_the_middle_of_a_long_prompt(checkpoint: Path, hop: int) -> None:
    ids, options = prompt(2, 150), {"max_new_tokens": 10, "do_sample": False}
    theirs = expected(checkpoint, ids, options)
    with LocalSwarm(checkpoint, SPANS) as swarm:
        outcome = run(swarm, ids, options, killing(hop, 0.012), prefill_chunk_tokens=16)
        assert outcome.ring.repairs == 1
        assert torch.equal(outcome.tokens, theirs)


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_silent_hop_is_noticed_within_two_seconds(checkpoint: Path, hop: int) -> None:
    ids = prompt(1, 14)
    with LocalSwarm(checkpoint, SPANS) as swarm:
        started = swarm.loop.time()
        outcome = run(swarm, ids, TASKS["greedy"], lambda d: d.at(0.1, d.silence, hop))
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"]))
        assert outcome.ring.repairs == 1
        undisturbed_s = 40 * 4 * 0.007
        assert swarm.loop.time() - started < undisturbed_s + 2.5


def test_two_hops_that_lost_each_other_connect_again(checkpoint: Path) -> None:
    """A broken stream between two living hops costs nothing but a new one."""
    ids = prompt(1, 14)

    def break_link(disturber: Disturber) -> None:
        def act(peer_id: str) -> None:
            route = disturber.session.route
            assert route is not None
            host = disturber.swarm.server_of(peer_id)._host
            assert host is not None
            (hosted,) = host._sessions.values()
            assert hosted._downstream is not None
            hosted._downstream.outbox.links[0].channel._stream.abort()

        disturber.at(0.2, act, 1)

    with LocalSwarm(checkpoint, SPANS) as swarm:
        outcome = run(swarm, ids, TASKS["greedy"], break_link)
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"]))
        assert outcome.ring.repairs == 1
        assert outcome.victims[0] in {member.peer_id for member in outcome.ring.members}
        assert outcome.ring.log.last_step >= 39


def test_a_cut_cable_between_two_living_hops(checkpoint: Path) -> None:
    ids = prompt(1, 14)

    def cut(disturber: Disturber) -> None:
        def act(peer_id: str) -> None:
            route = disturber.session.route
            assert route is not None
            disturber.swarm.network.cut(peer_id, route.hops[2].peer_id)

        disturber.at(0.2, act, 1)

    with LocalSwarm(checkpoint, SPANS) as swarm:
        outcome = run(swarm, ids, TASKS["greedy"], cut)
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"]))
        assert outcome.ring.repairs >= 1


@pytest.mark.parametrize("silent", [0, 2])
def test_one_hop_dies_and_another_falls_silent(checkpoint: Path, silent: int) -> None:
    """The repair of the first does not wait for the second for longer than for any silent hop."""
    ids = prompt(1, 14)
    with LocalSwarm(checkpoint, SPANS) as swarm:

        def disturb(disturber: Disturber) -> None:
            disturber.at(0.2, disturber.silence, silent)
            disturber.at(0.2, disturber.kill, 1)

        started = swarm.loop.time()
        outcome = run(swarm, ids, TASKS["greedy"], disturb)
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"]))
        assert outcome.ring.epoch > 0, "it was mended, not begun again"
        assert swarm.loop.time() - started < 40 * 4 * 0.007 + 3


def test_all_hops_die_at_once(checkpoint: Path) -> None:
    ids = prompt(1, 14)
    with LocalSwarm(checkpoint, SPANS) as swarm:
        outcome = run(swarm, ids, TASKS["greedy"], lambda d: [d.at(0.2, d.kill, hop) for hop in (0, 1, 2)])
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"]))
        assert outcome.ring.repairs == 1


@pytest.mark.parametrize("seed", range(8))
def test_the_replacement_dies_in_the_replay(checkpoint: Path, seed: int) -> None:
    rng = random.Random(seed)
    ids = prompt(1, 14)
    spans = [*SPANS, *SPANS]
    moments = sorted(rng.uniform(0.0, 0.6) for _ in range(3))
    hop = rng.randrange(3)
    with LocalSwarm(checkpoint, spans, seed=seed) as swarm:

        def disturb(disturber: Disturber) -> None:
            for moment in moments:
                disturber.at(moment, disturber.kill, hop)
            disturber.at(moments[0] + 0.03, disturber.kill, hop)  # while it is being filled

        outcome = run(swarm, ids, TASKS["greedy"], disturb)
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"])), moments
        assert len(outcome.victims) == 4
        assert outcome.ring.repairs >= 2


def test_where_the_log_is_gone_the_client_sends_everything_again(checkpoint: Path) -> None:
    ids = prompt(1, 14)
    with LocalSwarm(checkpoint, SPANS) as swarm:
        for server in swarm.servers:
            assert server._host is not None
            server._host._logs.limit_bytes = 2000
        outcome = run(swarm, ids, TASKS["greedy"], killing(1, 0.3))
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"]))
        assert outcome.ring.epoch == 0, "it was begun again, under another id"
        assert outcome.victims[0] not in {member.peer_id for member in outcome.ring.members}


def test_a_session_behind_a_shared_prefix(checkpoint: Path) -> None:
    ids = prompt(1, 70)
    options = {"max_new_tokens": 12, "do_sample": False}
    theirs = expected(checkpoint, ids, options)
    for hop in range(3):
        with LocalSwarm(checkpoint, SPANS) as swarm:
            swarm.model().generate(ids, **options)
            outcome = run(swarm, ids, options, killing(hop, 0.1))
            assert torch.equal(outcome.tokens, theirs)
            assert outcome.ring.repairs == 1


def test_a_hop_that_dies_between_two_calls(checkpoint: Path) -> None:
    ids = prompt(1, 10)
    theirs = reference(checkpoint).generate(ids, max_new_tokens=16, do_sample=False)
    with LocalSwarm(checkpoint, SPANS) as swarm:
        model = swarm.model()
        with model.open_session(max_length=64) as session:
            one = model.generate(ids, max_new_tokens=8, do_sample=False, session=session)
            assert session.route is not None
            swarm.network.kill(session.route.hops[1].peer_id)
            swarm.run(asyncio.sleep(5))
            two = model.generate(None, max_new_tokens=8, do_sample=False, session=session)
        assert torch.equal(torch.cat([one, two], 1), theirs)


def test_a_session_that_idled_for_too_long_begins_again(checkpoint: Path) -> None:
    ids = prompt(1, 10)
    theirs = reference(checkpoint).generate(ids, max_new_tokens=16, do_sample=False)
    with LocalSwarm(checkpoint, ["0:4", "4:8"]) as swarm:
        model = swarm.model()
        with model.open_session(max_length=64) as session:
            one = model.generate(ids, max_new_tokens=8, do_sample=False, session=session)
            swarm.run(asyncio.sleep(2000))
            assert not any(server.num_sessions for server in swarm.servers)
            two = model.generate(None, max_new_tokens=8, do_sample=False, session=session)
        assert torch.equal(torch.cat([one, two], 1), theirs)


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_silent_replacement_is_tried_once(checkpoint: Path, hop: int) -> None:
    ids = prompt(1, 14)
    with LocalSwarm(checkpoint, SPANS) as swarm:

        def disturb(disturber: Disturber) -> None:
            def act(peer_id: str) -> None:
                span = swarm.server_of(peer_id).span
                (other,) = [s for s in swarm.servers if s.span == span and s is not swarm.server_of(peer_id)]
                disturber.silence(other.announcement().peer_id)
                disturber.kill(peer_id)
                for _ in range(2):
                    swarm.loop.call_later(1.0, lambda: swarm.loop.create_task(swarm.start_server(str(span))))

            disturber.at(0.2, act, hop)

        started = swarm.loop.time()
        outcome = run(swarm, ids, TASKS["greedy"], disturb)
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"]))
        assert swarm.loop.time() - started < 40 * 4 * 0.007 + 4.5 + 1


@pytest.mark.parametrize("hop", [0, 1])
def test_a_broken_connection_to_the_only_server(checkpoint: Path, hop: int) -> None:
    """It was the connection that died, and not the peer."""
    ids = prompt(1, 14)
    with LocalSwarm(checkpoint, ["0:4", "4:8"]) as swarm:

        def disturb(disturber: Disturber) -> None:
            def act(peer_id: str) -> None:
                transport = swarm.network.find(peer_id)
                assert transport is not None
                for stream in list(transport._streams):
                    stream.abort()

            disturber.at(0.2, act, hop)

        outcome = run(swarm, ids, TASKS["greedy"], disturb)
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"]))
        assert outcome.ring.repairs >= 1


def test_a_silent_hop_that_nobody_can_replace_is_waited_for(checkpoint: Path) -> None:
    """It may be a server with too much to do."""
    ids = prompt(1, 14)
    with LocalSwarm(checkpoint, ["0:4", "4:8"]) as swarm:

        def disturb(disturber: Disturber) -> None:
            def act(peer_id: str) -> None:
                others = [other for other in swarm.network._peers if other != peer_id]
                disturber.silence(peer_id)
                for other in others:
                    swarm.loop.call_later(8.0, swarm.network.restore, peer_id, other)

            disturber.at(0.2, act, 1)

        outcome = run(swarm, ids, TASKS["greedy"], disturb)
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"]))
        assert outcome.ring.repairs == 0


def test_nobody_is_left(checkpoint: Path) -> None:
    with LocalSwarm(checkpoint, ["0:4", "4:8"]) as swarm:
        model = swarm.model(repair_timeout_s=7)
        with model.open_session(max_length=64) as session:
            model.generate(prompt(1, 8), max_new_tokens=3, session=session)
            assert session.route is not None
            swarm.network.kill(session.route.hops[1].peer_id)
            started = swarm.loop.time()
            with pytest.raises(HopLostError, match=r"nobody took its place within 7 s.*blocks 4-7"):
                model.generate(None, max_new_tokens=3, session=session)
            assert 6 < swarm.loop.time() - started < 8
        swarm.run(asyncio.sleep(1))
        assert swarm.servers[0].num_sessions == 0


def test_a_server_that_joins_in_time_takes_over(checkpoint: Path) -> None:
    ids = prompt(1, 14)
    with LocalSwarm(checkpoint, ["0:4", "4:8"]) as swarm:

        def disturb(disturber: Disturber) -> None:
            def act(peer_id: str) -> None:
                disturber.kill(peer_id)
                swarm.loop.call_later(9.0, lambda: swarm.loop.create_task(swarm.start_server("3:8")))

            disturber.at(0.2, act, 1)

        outcome = run(swarm, ids, TASKS["greedy"], disturb)
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"]))
        assert outcome.ring.repairs == 1


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_draining_server_hands_its_sessions_over(checkpoint: Path, hop: int) -> None:
    ids = prompt(1, 14)
    with LocalSwarm(checkpoint, SPANS) as swarm:
        drained_s: list[float] = []

        def disturb(disturber: Disturber) -> None:
            async def drain(server: Server) -> None:
                begun = swarm.loop.time()
                await server.drain(60)
                drained_s.append(swarm.loop.time() - begun)

            disturber.at(0.2, lambda peer: swarm.loop.create_task(drain(swarm.server_of(peer))), hop)

        outcome = run(swarm, ids, TASKS["greedy"], disturb)
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"]))
        assert outcome.ring.repairs == 1
        assert drained_s[0] < 1
        assert swarm.server_of(outcome.victims[0]).num_sessions == 0


def test_a_draining_server_that_nobody_can_replace_serves_to_the_end(checkpoint: Path) -> None:
    ids = prompt(1, 14)
    with LocalSwarm(checkpoint, ["0:4", "4:8"]) as swarm:

        def disturb(disturber: Disturber) -> None:
            def act(peer_id: str) -> None:
                swarm.loop.create_task(swarm.server_of(peer_id).drain(60))

            disturber.at(0.2, act, 1)

        outcome = run(swarm, ids, TASKS["greedy"], disturb)
        assert torch.equal(outcome.tokens, expected(checkpoint, ids, TASKS["greedy"]))
        assert outcome.ring.repairs == 0
