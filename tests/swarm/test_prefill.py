"""Long prompts: in which steps they travel, that the answer stays the same, and how much waits where."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from petal_swarm.client import steps as steps_module
from petal_swarm.engine.compute import Done, InlineCompute
from petal_swarm.engine.steps import StepRequest
from petal_swarm.routing import Stage
from tests.checkpoints import VOCABULARY, reference
from tests.swarm.local import LocalSwarm

HIDDEN = 32


def prompt(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, VOCABULARY, (batch, length), generator=generator)


def steps_of(swarm: LocalSwarm) -> list[list[int]]:
    """The tokens of each step that the servers compute from now on, a list for each server."""
    found: list[list[int]] = []
    for server in swarm.servers:
        assert server._compute is not None
        engine, sizes = server._compute.engine, []
        found.append(sizes)

        def run(requests: Sequence[StepRequest], *, run=engine.run, sizes=sizes):  # type: ignore[no-untyped-def]
            sizes.extend(request.hidden.shape[0] for request in requests)
            return run(requests)

        engine.run = run  # type: ignore[method-assign]
    return found


def test_a_given_chunk_size(bloom: Path) -> None:
    ids = prompt(1, 100)
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        model = swarm.model(prefill_chunk_tokens=48)
        steps = steps_of(swarm)
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert steps == [[48, 48, 4, 1, 1]] * 2
        assert torch.equal(tokens, reference(bloom).generate(ids, max_new_tokens=3, do_sample=False))


def test_the_chosen_size_follows_from_the_routes_figures(
    bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def choose(tokens: int, stages: Sequence[Stage], *, limit: int) -> int:
        asked.append((tokens, stages, limit))
        return 64

    monkeypatch.setattr(steps_module, "choose_chunk", choose)
    ids = prompt(2, 80)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    with LocalSwarm(bloom, ["0:2", "2:4"], max_batch_tokens=100) as swarm:
        announced = [server.announcement() for server in swarm.servers]
        model = swarm.model()
        steps = steps_of(swarm)
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert steps == [[64, 64, 12, 2, 2]] * 2
        expected = reference(bloom).generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert torch.equal(tokens, expected)
        ((count, stages, limit),) = asked
        assert (count, limit) == (140, 100)
        assert model.last_route is not None
        figures = [Stage(hop.step_s, hop.token_s) for hop in model.last_route.hops]
        assert stages[1::2] == figures
        for before, stage in zip(announced, figures, strict=True):
            assert stage.token_s == pytest.approx(1 / before.prefill_tokens_per_s)


def test_all_rows_of_a_prompt_in_chunks(bloom: Path) -> None:
    ids = prompt(1, 70)
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm, torch.no_grad():
        actual = swarm.model(prefill_chunk_tokens=16)(ids).logits
        expected = reference(bloom)(ids).logits
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_chunks_do_not_count_as_a_hops_overhead(bloom: Path) -> None:
    """They wait for one another, which says nothing about what a step costs."""
    with LocalSwarm(bloom, ["0:4"]) as swarm:
        host = swarm.servers[0]._host
        assert host is not None
        added: list[float] = []
        host.overhead.add = added.append  # type: ignore[method-assign]
        swarm.model(prefill_chunk_tokens=16).generate(prompt(1, 64), max_new_tokens=3, min_new_tokens=3)
        assert len(added) == 2


def test_a_long_prompt_waits_with_the_client_and_not_in_buffers(
    bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are made when the network takes them; servers take no more than they may hold."""
    high_water = 16 << 10
    for module in ("channel", "memory"):
        monkeypatch.setattr(f"petal_swarm.net.{module}.WRITE_HIGH_WATER_BYTES", high_water)
    made = itertools.count()
    make = steps_module.Steps.make
    counts: list[int] = []

    def counted(self: steps_module.Steps, *arguments: object) -> object:
        counts.append(next(made))
        return make(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(steps_module.Steps, "make", counted)
    chunk_bytes = 16 * HIDDEN * 4
    tokens = 16 * 120
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        for server in swarm.servers:
            assert isinstance(server._compute, InlineCompute)
            _take_a_second(server._compute)
        highest = {"unsent": 0, "steps": 0, "ahead": 0}

        async def watch() -> None:
            while len(counts) < 120:
                for server in swarm.servers:
                    assert server._host is not None
                    for hosted in server._host._sessions.values():
                        highest["steps"] = max(highest["steps"], hosted.upstream.in_flight)
                        links = hosted._downstream.outbox.links if hosted._downstream else ()
                        for link in links:
                            highest["unsent"] = max(highest["unsent"], link.channel._stream.unsent_bytes)
                ring = session._ring
                if ring is not None:
                    highest["unsent"] = max(highest["unsent"], ring.members[0].channel._stream.unsent_bytes)
                highest["ahead"] = max(highest["ahead"], len(counts) - swarm.loop.time())
                await asyncio.sleep(0.25)

        model = swarm.model(prefill_chunk_tokens=16, step_timeout_s=600)
        with model.open_session(max_length=tokens) as session:
            watching = swarm.loop.create_task(watch())
            rows = session.step(torch.randn(tokens, HIDDEN), [tokens])
            swarm.run(asyncio.wait({watching}))
        assert rows.shape == (1, HIDDEN)
        assert 32 <= highest["steps"] <= 32 + high_water // chunk_bytes
        assert high_water <= highest["unsent"] <= high_water + 2 * chunk_bytes
        assert highest["ahead"] < 60


def _take_a_second(compute: InlineCompute) -> None:
    """Each step of a prompt takes a second of the virtual clock, one after the other."""
    free_at_s = 0.0
    submit = compute.submit

    def later(request: StepRequest, done: Done) -> None:
        nonlocal free_at_s
        loop = asyncio.get_running_loop()
        free_at_s = max(free_at_s, loop.time()) + 1.0
        loop.call_at(free_at_s, submit, request, done)

    compute.submit = later  # type: ignore[method-assign]
    compute.run_now = lambda request: None  # type: ignore[method-assign, assignment, return-value]
