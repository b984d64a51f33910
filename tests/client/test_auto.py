"""`from_pretrained` when something is wrong after the swarm was joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from petal_swarm.client.auto import AutoSwarmModelForCausalLM
from petal_swarm.client.config import ClientConfig
from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.client.swarm import Swarm
from petal_swarm.directory.memory import MemoryDirectory, MemoryRegistry
from petal_swarm.errors import UnknownModelError
from petal_swarm.net.memory import Link, MemoryNetwork
from tests.checkpoints import save_llama


def test_a_model_whose_adapter_cannot_be_used_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left open, it would fail once more when the interpreter ends."""
    made: list[SwarmModelForCausalLM] = []

    async def connect(config: ClientConfig) -> Swarm:
        network, registry = MemoryNetwork(0, Link()), MemoryRegistry(now=lambda: 0.0)
        return Swarm(config, network.transport(), MemoryDirectory(registry))

    def make(*arguments: Any) -> SwarmModelForCausalLM:
        made.append(SwarmModelForCausalLM(*arguments))
        return made[0]

    monkeypatch.setattr("petal_swarm.client.auto.Swarm.connect", connect)
    monkeypatch.setattr("petal_swarm.client.auto.SwarmModelForCausalLM", make)
    folder = save_llama(tmp_path / "model", blocks=1, hidden=32)
    with pytest.raises(UnknownModelError):
        AutoSwarmModelForCausalLM.from_pretrained(
            str(folder), initial_peers=["/ip4/192.0.2.1"], progress=False, adapter="./nowhere"
        )
    assert made[0]._closed
