"""Two servers on the device and a client, all in this process, over the network in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from petal_swarm.server.config import ServerConfig
from tests.checkpoints import VOCABULARY, assert_lively, reference, save_bloom, save_llama
from tests.swarm.local import LocalSwarm

from .stacks import INT8_KV_TOLERANCE, MODES, distance

SPANS = ["0:4", "4:8"]
IDS = torch.randint(5, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_inference_mode():
    """The client decides for itself."""
    with torch.inference_mode(False):
        yield


@pytest.fixture(scope="module", params=[save_bloom, save_llama], ids=["bloom", "llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("model"))


def test_the_tokens_of_one_process(checkpoint: Path, device: torch.device) -> None:
    with LocalSwarm(checkpoint, SPANS, device=device.type, dtype="float32") as swarm:
        model, local = swarm.model(), reference(checkpoint)
        for options in ({"do_sample": False}, {"num_beams": 3}):
            ours = model.generate(IDS, max_new_tokens=40, min_new_tokens=40, **options)
            theirs = local.generate(IDS, max_new_tokens=40, min_new_tokens=40, **options)
            assert_lively(theirs, IDS.shape[1])
            assert torch.equal(ours, theirs), options


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("name", MODES)
def test_logits_are_near(checkpoint: Path, device: torch.device, name: str, kv_dtype: str) -> None:
    mode = MODES[name]
    settings: dict[str, Any] = {
        "dtype": str(mode.dtype).removeprefix("torch."),
        "quant": mode.quant,
        "kv_dtype": kv_dtype,
    }
    assert ServerConfig(model="m", new_swarm=True, **settings).quant == mode.quant
    with torch.no_grad():
        expected = reference(checkpoint)(IDS).logits
    with LocalSwarm(checkpoint, SPANS, device=device.type, **settings) as swarm:
        model = swarm.model()
        allowed = mode.tolerance + (INT8_KV_TOLERANCE if kv_dtype == "int8" else 0.0)
        assert distance(model(IDS).logits, expected) < 2 * allowed  # eight blocks, not three
        assert model.generate(IDS, max_new_tokens=8, min_new_tokens=8).shape == (2, 24)
        announced = {server.announcement().dtype for server in swarm.servers}
        assert announced == {settings["dtype"]}
