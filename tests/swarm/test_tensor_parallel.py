"""A server whose blocks two processes share out: what clients and others in the swarm see of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.engine.leading import LeadingStack
from petal_swarm.errors import ConfigError, PetalSwarmError
from tests.checkpoints import VOCABULARY, reference
from tests.swarm.local import LocalSwarm
from tests.swarm.test_training import assert_near, batch, lora_pair

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PROMPT = torch.randint(5, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def fine_tune(checkpoint: Path, model: SwarmModelForCausalLM) -> None:
    """Two steps of LoRA on a ragged batch, with answers in between, as PEFT takes them."""
    ids, mask, labels = batch()
    local, ours, theirs = lora_pair(checkpoint, model)
    for _ in range(2):
        expected = local(input_ids=ids, attention_mask=mask, labels=labels)
        found = model(ids, attention_mask=mask, labels=labels)
        answer = model.generate(PROMPT, max_new_tokens=3, do_sample=False)
        assert torch.equal(answer, local.generate(input_ids=PROMPT, max_new_tokens=3, do_sample=False))
        assert_near(found.loss, expected.loss, "loss")
        expected.loss.backward()
        found.loss.backward()
        with torch.no_grad():
            for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
                assert_near(mine.grad, other.grad, f"parameter {index}")
                assert other.grad is not None
                other -= 0.01 * other.grad
                mine.copy_(other)
                mine.grad = other.grad = None


def test_it_answers_and_trains_as_one_and_leaves_when_a_process_is_gone(bloom: Path) -> None:
    expected = reference(bloom).generate(PROMPT, max_new_tokens=6, num_beams=2, do_sample=False)
    with LocalSwarm(bloom, ["0:4"], tensor_parallel=2) as swarm:
        model = swarm.model(wait_for_blocks_s=1)
        found = model.generate(PROMPT, max_new_tokens=6, num_beams=2, do_sample=False)
        assert torch.equal(found, expected)
        server = swarm.servers[0]
        assert server.announcement().trains
        fine_tune(bloom, swarm.model())
        embeds = model.ends.embed(PROMPT).requires_grad_()
        going_on = model.run_blocks(embeds)
        stack = server._compute.engine.stack  # type: ignore[union-attr]
        assert isinstance(stack, LeadingStack)
        processes = stack.crew._others
        processes.kill()
        for watcher in processes.watchers:  # type: ignore[attr-defined]
            watcher.join(30)
        swarm.run(server.wait_failed())
        assert [a.state for a in swarm.registry.shelf.book(swarm.checkpoint.model_key).announcements()] in (
            [],
            ["left"],
        )
        with pytest.raises(PetalSwarmError):
            model.generate(PROMPT, max_new_tokens=2, do_sample=False)
        with pytest.raises(PetalSwarmError):
            going_on.sum().backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 3}, "--tensor-parallel 3 does not divide this model's 4 heads; it may be 2, 4"),
        ({"tensor_parallel": 0}, "--tensor-parallel must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(bloom: Path, settings: dict[str, int], message: str) -> None:
    with LocalSwarm(bloom, []) as swarm, pytest.raises(ConfigError, match=message):
        swarm.add_server("0:4", **settings)
