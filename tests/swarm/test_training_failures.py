"""Hops die, fall silent or are cut off in the middle of training, and loss and gradients do not change."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.client.training.courses import Pass
from petal_swarm.client.training.lane import Lane
from petal_swarm.client.training.pool import LanePool
from petal_swarm.client.training.trainer import Trainer
from petal_swarm.errors import ConfigError, MissingBlocksError, PetalSwarmError
from petal_swarm.models.adapter_settings import Lora
from petal_swarm.span import Span
from tests.checkpoints import save_bloom, save_llama
from tests.swarm.local import LocalSwarm
from tests.swarm.test_training import assert_near, batch

SPANS = ["0:2", "0:2", "2:4", "2:4", "4:6", "4:6"]


@pytest.fixture(scope="module", params=["bloom", "llama"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = {"bloom": save_bloom, "llama": save_llama}[request.param]
    return save(tmp_path_factory.mktemp(request.param), blocks=6, hidden=32)


class Trial:
    """Two steps of training in a swarm; the second may be disturbed."""

    def __init__(self, checkpoint: Path, spans: list[str], *, seed: int = 0, **settings: object) -> None:
        self.swarm = LocalSwarm(checkpoint, spans, seed=seed)
        self.model: SwarmModelForCausalLM = self.swarm.model(training_lanes=1, **settings)
        torch.manual_seed(5)
        self.adapter = self.model.add_adapter(Lora(rank=2, targets="all-linear"))
        with torch.no_grad():
            for parameter in self.adapter.parameters():
                parameter.normal_(0, 0.1)
        self.embeds = self.model.ends.embed(batch()[0]).requires_grad_()
        self.done: list[str] = []

    def step(self, between: Callable[[], object] = lambda: None) -> list[Tensor]:
        """The loss, the gradient of the inputs and those of the adapter."""
        _, mask, labels = batch()
        loss = self.model(inputs_embeds=self.embeds, attention_mask=mask, labels=labels).loss
        between()
        loss.backward()
        trained = [self.embeds, *self.adapter.parameters()]
        found = [loss.detach(), *(each.grad for each in trained)]
        for each in trained:
            each.grad = None
        return found

    @property
    def lanes(self) -> list[Lane]:
        return self.model._blocks._trainer._pools[Span(0, 6)]._lanes

    def at(self, seconds: float, act: Callable[[str], object], *hops: int) -> None:
        """So many seconds from now, do it to the servers of those hops."""

        async def wait() -> None:
            await asyncio.sleep(seconds)
            if self.lanes:
                victims = [self.lanes[-1].members[hop].peer_id for hop in hops]
                for victim in victims:
                    act(victim)
                self.done += victims

        self.swarm.loop.create_task(wait())

    def kill(self, peer_id: str) -> None:
        self.swarm.network.kill(peer_id)

    def silence(self, peer_id: str) -> None:
        """A stopped process: nothing is closed, nothing answers."""
        for other in list(self.swarm.network._peers):
            if other != peer_id:
                self.swarm.network.cut(peer_id, other)

    @property
    def avoided(self) -> frozenset[str]:
        """The peers that the client avoids now."""

        async def look() -> frozenset[str]:
            return self.model._swarm.view.avoidance.peers()

        return self.swarm.run(look())

    def later(self, seconds: float) -> None:
        self.swarm.run(asyncio.sleep(seconds))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_near(one, other, f"result {index}")


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_killed_hop_is_replaced(small: Path, hop: int) -> None:
    rng = random.Random(hop)
    for _ in range(4):
        trial = Trial(small, SPANS, seed=rng.randrange(1000))
        with trial.swarm:
            expected = trial.step()
            moment = rng.uniform(0.0, 0.04)
            trial.at(moment, trial.kill, hop)
            assert_same(trial.step(), expected)
            assert trial.done, moment
            assert_same(trial.step(), expected)


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_hop_killed_between_forward_and_backward(small: Path, hop: int) -> None:
    trial = Trial(small, SPANS)
    with trial.swarm:
        expected = trial.step()

        def kill() -> None:
            trial.kill(trial.lanes[0].members[hop].peer_id)
            trial.later(0.5)

        assert_same(trial.step(kill), expected)
        assert [lane.repairs for lane in trial.lanes] == [1]


@pytest.mark.parametrize("hops", [(0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_several_hops_at_once(small: Path, hops: tuple[int, ...]) -> None:
    trial = Trial(small, SPANS)
    with trial.swarm:
        expected = trial.step()
        trial.at(0.02, trial.kill, *hops)
        assert_same(trial.step(), expected)
        assert len(trial.done) == len(hops)


def test_the_replacement_is_lost_too(small: Path) -> None:
    trial = Trial(small, [*SPANS, "2:4"])
    with trial.swarm:
        expected = trial.step()
        first = trial.lanes[0].members[1].peer_id
        trial.at(0.01, trial.kill, 1)

        async def again() -> None:
            while trial.lanes[0].members[1].peer_id == first:  # noqa: ASYNC110 - the lane has no event for it
                await asyncio.sleep(0.001)
            trial.at(0.0, trial.kill, 1)

        trial.swarm.loop.create_task(again())
        assert_same(trial.step(), expected)
        assert len(set(trial.done)) == 2


@pytest.mark.parametrize("hop", [0, 1, 2])
@pytest.mark.parametrize("moment", [0.01, 0.035])
def test_a_silent_hop_is_noticed_within_seconds(small: Path, hop: int, moment: float) -> None:
    trial = Trial(small, SPANS)
    with trial.swarm:
        expected = trial.step()
        started = trial.swarm.loop.time()
        trial.at(moment, trial.silence, hop)
        assert_same(trial.step(), expected)
        assert trial.done
        assert trial.swarm.loop.time() - started < 10.0


def test_hops_that_lost_each_other_are_linked_again(small: Path) -> None:
    """Nothing arrives from one to the other, and nobody is told, until the cable is back."""
    trial = Trial(small, ["0:2", "2:4", "4:6"])
    with trial.swarm:
        expected = trial.step()
        one, other = (member.peer_id for member in trial.lanes[0].members[:2])
        trial.swarm.network.cut(one, other)
        trial.at(3.0, lambda _: trial.swarm.network.restore(one, other), 0)
        assert_same(trial.step(), expected)
        assert trial.done


def test_a_server_that_restarts_is_waited_for(small: Path) -> None:
    trial = Trial(small, ["0:2", "2:4", "4:6"])
    with trial.swarm:
        expected = trial.step()
        trial.at(0.02, trial.kill, 1)

        async def restart() -> None:
            await asyncio.sleep(5.0)
            await trial.swarm.start_server("2:4")

        trial.swarm.loop.create_task(restart())
        assert_same(trial.step(), expected)


def test_one_pass_that_fails_leaves_none_of_the_others(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody will ask for their backward."""
    once = Trainer._forward_once

    async def failing(trainer: Trainer, pool: LanePool, each: Pass, *, keep: bool) -> Tensor:
        if each.lengths[-1] == 18:  # the last sequence
            await asyncio.sleep(1.0)
            raise ConfigError("it cannot be")
        return await once(trainer, pool, each, keep=keep)

    trial = Trial(small, ["0:2", "2:4", "4:6"])
    with trial.swarm:
        expected = trial.step()
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_forward_once", failing)
            with pytest.raises(ConfigError):
                trial.step()
        assert not any(lane.courses for lane in trial.lanes)
        assert_same(trial.step(), expected)


@pytest.mark.parametrize("hop", [0, 1, 2])
@pytest.mark.parametrize("others", [1, 2])
def test_a_replacement_that_takes_smaller_passes(small: Path, hop: int, others: int) -> None:
    """Another takes its place if there is one; else what was under way is cut again."""
    trial = Trial(small, ["0:2", "2:4", "4:6"])
    with trial.swarm:
        expected = trial.step()
        span = trial.lanes[0].members[hop].hop.span
        for tokens in (24, 64)[:others]:
            trial.swarm.add_server(str(span), max_batch_tokens=tokens)
        trial.later(10.0)
        trial.at(0.02, trial.kill, hop)
        assert_same(trial.step(), expected)
        assert trial.done
        assert_same(trial.step(), expected)


def test_a_server_that_nobody_replaces(small: Path) -> None:
    trial = Trial(small, ["0:2", "2:4", "4:6"], wait_for_blocks_s=3.0)
    with trial.swarm:
        trial.step()
        trial.at(0.02, trial.kill, 1)
        with pytest.raises(PetalSwarmError):
            trial.step()


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_server_that_leaves(small: Path, moment: str) -> None:
    """It goes as soon as no pass needs it, and is not waited for."""
    trial = Trial(small, SPANS)
    with trial.swarm:
        expected = trial.step()
        leaving = trial.lanes[0].members[1].peer_id
        draining = []

        def leave() -> None:
            work = trial.swarm.server_of(leaving).drain(60.0)
            draining.append(trial.swarm.loop.create_task(work))
            trial.later(0.5)

        if moment == "before":
            leave()
        assert_same(trial.step(leave if moment == "between" else lambda: None), expected)
        trial.later(0.1)
        assert draining[0].done()
        assert_same(trial.step(), expected)
        (lane,) = (lane for lane in trial.lanes if lane.error is None)
        assert leaving not in {member.peer_id for member in lane.members}


def test_servers_that_do_not_train_are_left_out(small: Path) -> None:
    """Neither for the first route, nor to take the place of a hop; nor those that take smaller passes."""
    trial = Trial(small, ["0:2", "2:4", "4:6"])
    with trial.swarm:
        others = [
            trial.swarm.add_server("0:6", training_mib=0).announcement().peer_id,
            trial.swarm.add_server("2:4", max_batch_tokens=8).announcement().peer_id,
        ]
        expected = trial.step()
        assert not {member.peer_id for member in trial.lanes[0].members} & {others[0]}
        trial.swarm.network.kill(others[1])
        last = trial.swarm.add_server("2:4").announcement().peer_id
        others.append(trial.swarm.add_server("2:4", max_batch_tokens=8).announcement().peer_id)
        trial.at(0.02, trial.kill, [m.hop.span.start for m in trial.lanes[0].members].index(2))
        assert_same(trial.step(), expected)
        assert last in {member.peer_id for member in trial.lanes[-1].members}


def test_nobody_trains(small: Path) -> None:
    trial = Trial(small, [], wait_for_blocks_s=1.0)
    with trial.swarm:
        trial.swarm.add_server("0:6", training_mib=0)
        with pytest.raises(MissingBlocksError, match=r"nobody trains blocks? .*training-mib"):
            trial.step()


def test_what_servers_have_forgotten_is_sent_again(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The backward comes too late: the forward is done again, and nobody sees it."""
    trial = Trial(small, ["0:2", "2:4", "4:6"])
    with trial.swarm, caplog.at_level(logging.INFO, logger="petal_swarm"):
        expected = trial.step()
        assert_same(trial.step(lambda: trial.later(1500.0)), expected)
        assert "begins again" in caplog.text


def test_killed_while_many_passes_are_under_way(small: Path) -> None:
    """Over two lanes, with the random moments of a dozen seeds."""
    repairs = 0
    for seed in range(12):
        rng = random.Random(seed)
        with LocalSwarm(small, [*SPANS, *SPANS[::2]], seed=seed, max_batch_tokens=140) as swarm:
            model = swarm.model(training_lanes=2)
            embeds = model.ends.embed(batch(9, 70)[0])
            ours, theirs = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
            weights = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(seed))
            expected = model.run_blocks(theirs)
            expected.backward(weights)
            pool = model._blocks._trainer._pools[Span(0, 6)]
            assert len(pool.lanes) == 2
            for moment in (rng.uniform(0, 0.1), rng.uniform(0, 0.2)):
                victim = rng.choice(pool.lanes).members[rng.randrange(3)].peer_id
                swarm.loop.call_later(moment, swarm.network.kill, victim)
            found = model.run_blocks(ours)
            found.backward(weights)
            assert_near(found, expected, f"seed {seed}")
            assert_near(ours.grad, theirs.grad, f"seed {seed}")
            repairs += sum(lane.repairs for lane in pool.lanes)
    assert repairs >= 6
