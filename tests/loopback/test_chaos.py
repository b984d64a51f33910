"""Real servers behind cables that can be cut: killed, stopped, told to leave, while a client generates."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("hivemind")

from benchmarks.churn import EventLog, Member, Swarm
from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.client.model import SwarmModelForCausalLM
from tests.checkpoints import VOCABULARY, assert_lively, reference, save_bloom

NEW_TOKENS = 48

pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bloom(tmp_path_factory.mktemp("chaos") / "tiny-bloom")


@pytest.fixture(scope="module")
def swarm(checkpoint: Path) -> Iterator[Swarm]:
    """Two spans, each served by one that stays and by another."""
    swarm = Swarm(checkpoint, EventLog(), spans=("0:4", "4:8"), copies=2)
    yield swarm
    swarm.close()


@pytest.fixture(scope="module")
def model(checkpoint: Path, swarm: Swarm) -> Iterator[SwarmModelForCausalLM]:
    with AutoSwarmModelForCausalLM.from_pretrained(
        str(checkpoint), initial_peers=swarm.addresses, progress=False
    ) as client:
        yield client


class At:
    """A streamer that does something at given tokens."""

    def __init__(self, acts: dict[int, Callable[[], object]]) -> None:
        self._acts = acts
        self._count = 0

    def put(self, _: torch.Tensor) -> None:
        act = self._acts.get(self._count)
        if act is not None:
            act()
        self._count += 1

    def end(self) -> None:
        pass


def test_everything_at_once(checkpoint: Path, swarm: Swarm, model: SwarmModelForCausalLM) -> None:
    """In one session, at tokens that follow from a seed; the last two leave only those that stay."""
    rng = random.Random(4)
    ids = torch.randint(5, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with model.open_session(max_length=40 + NEW_TOKENS) as session:

        def used(*, stay: bool | None = None) -> Member:
            """A server of the route, or else any."""
            route = session.route
            assert route is not None
            members = [m for kind in (False, True) if stay in (None, kind) for m in swarm.members(stay=kind)]
            on_route = [m for m in members if m.peer_id in {hop.peer_id for hop in route.hops}]
            return rng.choice(on_route or members)

        acts: list[Callable[[], object]] = [
            lambda: swarm.reset(used()),
            lambda: swarm.cut(used(), 1.5, rng.random()),
            lambda: swarm.stop(used(stay=False), 2.0, daemon=rng.random() < 0.5),
            lambda: swarm.kill(used(stay=False), daemon=False),
            lambda: swarm.leave(used(stay=False)),
        ]
        tokens = sorted(rng.sample(range(1, NEW_TOKENS - 1), len(acts)))
        ours = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            session=session,
            streamer=At(dict(zip(tokens, acts, strict=True))),
            **settings,
        )
        repairs = session._ring.repairs if session._ring else 0
    theirs = reference(checkpoint).generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert_lively(theirs, ids.shape[1])
    assert torch.equal(ours, theirs), swarm.log.since(0.0)
    assert repairs >= 1
    assert len(swarm.members(stay=True)) == 2
