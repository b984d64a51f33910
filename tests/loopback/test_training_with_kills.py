"""Training through real servers, some of which are killed in the middle of a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("hivemind")

from benchmarks.harness import RunningServer, servers
from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.client.training.lane import Lane
from petal_swarm.models.adapter_settings import Lora
from petal_swarm.span import Span
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.tuning import Backward, Forward
from tests.checkpoints import save_llama
from tests.swarm.test_training import assert_near, batch

pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")
SPANS = ["0:2", "2:4", "0:2", "2:4", "0:2", "2:4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("training") / "tiny-llama", blocks=4)


def step(
    model: SwarmModelForCausalLM, between: Callable[[], object] = lambda: None
) -> list[torch.Tensor | None]:
    """The loss, and the gradients of the adapter."""
    assert model.adapter is not None
    ids, mask, labels = batch(4, 60)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    between()
    loss.backward()
    found = [loss.detach(), *(parameter.grad for parameter in model.adapter.parameters())]
    model.adapter.zero_grad()
    return found


class Killer:
    """Kills a hop of the lane in use: at once, or when the client sends the next message of a kind."""

    def __init__(self, model: SwarmModelForCausalLM, running: list[RunningServer]) -> None:
        self._model = model
        self._processes = {server.address.rpartition("/")[2]: server.process for server in running}
        self.killed: list[str] = []

    @property
    def lane(self) -> Lane:
        return self._model._blocks._trainer._pools[Span(0, 4)].lanes[0]

    def kill(self, hop: int) -> None:
        victim = self.lane.members[hop].peer_id
        os.killpg(self._processes[victim].pid, signal.SIGKILL)
        self.killed.append(victim)

    def on_sending(self, kind: type[Message], hop: int) -> None:
        member = self.lane.members[0 if kind is Forward else -1]
        send = member.channel.send

        def sending(message: Message) -> None:
            send(message)
            if isinstance(message, kind):
                member.channel.send = send  # type: ignore[method-assign]
                self.kill(hop)

        member.channel.send = sending  # type: ignore[method-assign]


@pytest.mark.timeout(240)
def test_killed_servers_change_nothing(checkpoint: Path) -> None:
    with (
        servers(checkpoint, SPANS, "--threads", "1", "--dtype", "float32") as running,
        AutoSwarmModelForCausalLM.from_pretrained(
            str(checkpoint),
            initial_peers=[server.address for server in running],
            progress=False,
            training_lanes=1,
        ) as model,
    ):
        torch.manual_seed(1)
        adapter = model.add_adapter(Lora(rank=2, targets="all-linear"))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(0, 0.1)
        expected = step(model)
        killer = Killer(model, running)

        def check(found: list[torch.Tensor | None]) -> None:
            for index, (one, other) in enumerate(zip(found, expected, strict=True)):
                assert_near(one, other, f"result {index} after {len(killer.killed)}")

        check(step(model))
        check(step(model, lambda: killer.kill(0)))
        killer.on_sending(Forward, 1)
        check(step(model))
        check(step(model, lambda: killer.on_sending(Backward, 0)))
        assert len(set(killer.killed)) == 3
        check(step(model))
