"""Servers that compute something else are found out and replaced; honest ones of any precision are not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from petal_swarm.client.swarm import Swarm
from petal_swarm.models.stack import BlockStack
from petal_swarm.server.server import Server
from tests.checkpoints import VOCABULARY, reference
from tests.swarm.local import LocalSwarm

Fault = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FAULTS: dict[str, Fault] = {
    "noise": lambda before, after: after + 0.2 * after.std() * torch.randn_like(after),
    "zeros": lambda before, after: torch.zeros_like(after),
    "skipped": lambda before, after: before.clone(),
    "scaled": lambda before, after: after * 1.5,
}


def prompt(seed: int) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (1, 10), generator=torch.Generator().manual_seed(seed))


def corrupt(server: Server, fault: Fault) -> None:
    """From now on the server's blocks compute something else."""
    assert server._compute is not None
    stack = server._compute.engine.stack
    forward = stack.forward

    def lying(hidden: torch.Tensor, *arguments: object) -> torch.Tensor:
        before = hidden.clone()
        return fault(before, forward(hidden, *arguments))  # type: ignore[arg-type]

    stack.forward = lying  # type: ignore[method-assign]
    assert isinstance(stack, BlockStack)


def bans_of(swarm: Swarm) -> set[str]:
    return set(swarm.audits.banned)


@pytest.fixture
def swarm(bloom: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(bloom, ["0:2", "0:2", "0:2", "2:4", "2:4", "2:4"]) as swarm:
        yield swarm


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("hop", [0, 1])
def test_a_lying_server_is_banned_and_honest_ones_are_not(
    bloom: Path, swarm: LocalSwarm, fault: str, hop: int
) -> None:
    model = swarm.model(audit_rate=0.3)
    model.generate(prompt(0), max_new_tokens=2)
    assert model.last_route is not None
    liar = model.last_route.hops[hop].peer_id
    corrupt(swarm.server_of(liar), FAULTS[fault])
    for seed in range(1, 4):
        with model.open_session(max_length=80) as session:
            model.generate(prompt(seed), max_new_tokens=40, min_new_tokens=40, session=session)
            swarm.run(asyncio.sleep(10))  # audits go on after the last token
    assert bans_of(model._swarm) == {liar}
    ids = prompt(9)
    tokens = model.generate(ids, max_new_tokens=10, do_sample=False)
    expected = reference(bloom).generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(tokens, expected)
    assert model.last_route is not None
    assert liar not in {each.peer_id for each in model.last_route.hops}


def test_honest_servers_of_mixed_precision(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        for span in ("0:2", "2:4"):
            swarm.add_server(span, dtype="bfloat16")
            swarm.add_server(span, quant="int8")
        model = swarm.model(audit_rate=1.0)
        for seed in range(2):
            with model.open_session(max_length=80) as session:
                model.generate(prompt(seed), max_new_tokens=30, min_new_tokens=30, session=session)
                swarm.run(asyncio.sleep(30))
        audits = model._swarm.audits
        assert audits.failed == 0
        assert audits.passed > 50
        assert not audits.banned


def test_nobody_else_serves_the_blocks(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        model = swarm.model(audit_rate=1.0)
        ids = prompt(1)
        tokens = model.generate(ids, max_new_tokens=10, do_sample=False)
        expected = reference(bloom).generate(ids, max_new_tokens=10, do_sample=False)
        assert torch.equal(tokens, expected)
        assert model._swarm.audits.passed == model._swarm.audits.failed == 0


def test_nothing_is_left_behind(swarm: LocalSwarm) -> None:
    model = swarm.model(audit_rate=1.0)
    model.generate(prompt(1), max_new_tokens=20)
    swarm.run(asyncio.sleep(1))
    assert not any(server.num_sessions for server in swarm.servers)
