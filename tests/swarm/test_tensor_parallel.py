"""A server whose blocks two processes share out: what clients and others in the swarm see of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from petal_swarm.engine.leading import LeadingStack
from petal_swarm.errors import ConfigError, PetalSwarmError
from tests.checkpoints import VOCABULARY, reference
from tests.swarm.local import LocalSwarm

PROMPT = torch.randint(5, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def test_it_answers_as_one_and_leaves_when_a_process_is_gone(bloom: Path) -> None:
    expected = reference(bloom).generate(PROMPT, max_new_tokens=6, num_beams=2, do_sample=False)
    with LocalSwarm(bloom, ["0:4"], tensor_parallel=2) as swarm:
        model = swarm.model(wait_for_blocks_s=1)
        found = model.generate(PROMPT, max_new_tokens=6, num_beams=2, do_sample=False)
        assert torch.equal(found, expected)
        server = swarm.servers[0]
        assert not server.announcement().trains
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 3}, "--tensor-parallel 3 does not divide this model's 4 heads; it may be 2, 4"),
        ({"tensor_parallel": 0}, "--tensor-parallel must be at least 1, got 0"),
        ({"tensor_parallel": 2, "training_mib": 64}, "--tensor-parallel does not train"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(bloom: Path, settings: dict[str, int], message: str) -> None:
    with LocalSwarm(bloom, []) as swarm, pytest.raises(ConfigError, match=message):
        swarm.add_server("0:4", **settings)
