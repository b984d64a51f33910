"""Servers that host more blocks than their memory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from petal_swarm.cli import run_server
from petal_swarm.cli.serve import describe
from petal_swarm.server.config import ServerConfig
from tests.checkpoints import save_bloom
from tests.swarm.local import LocalSwarm

#: 4096 tokens of KV cache take 2 MiB a block, and a block a fifth of one.
BLOCKS = 8
KV_MIB = 2 * BLOCKS


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bloom(tmp_path_factory.mktemp("bloom"), blocks=BLOCKS)


def generated(bloom: Path, *spans: str, **settings: Any) -> torch.Tensor:
    prompt = torch.tensor([[5, 17, 3, 8, 2, 900, 71]])
    with LocalSwarm(bloom, list(spans), **settings) as swarm:
        found = swarm.model().generate(prompt, max_new_tokens=12, do_sample=False)
        assert isinstance(found, torch.Tensor)
        return found


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_a_swarm_with_memory_for_half_of_the_blocks(
    bloom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], offload: str
) -> None:
    expected = generated(bloom, "0:8")
    settings: dict[str, Any] = {"offload": offload, "cache_dir": str(tmp_path)}
    with LocalSwarm(bloom, [], **settings) as swarm:
        server = swarm.add_server(None, device_memory_mib=KV_MIB + 1)
        assert len(server.span) == BLOCKS
        plan = server.memory
        assert plan is not None
        assert (plan.kept, plan.slots) == (3, 2)
        assert not server.announcement().trains
        describe(server)
        found = swarm.model().generate(
            torch.tensor([[5, 17, 3, 8, 2, 900, 71]]), max_new_tokens=12, do_sample=False
        )
        assert torch.equal(found, expected)
    told = capsys.readouterr().err
    assert f"; {KV_MIB + 1} of it for blocks and KV cache, as told. Of these\n" in told
    assert "3 blocks that stay, and 2 at a time of 5 from" in told
    assert "KV cache of 4,096 tokens" in told
    files = list(tmp_path.glob("offloaded/*/block-*.chunk"))
    assert len(files) == (5 if offload == "disk" else 0)


def test_with_memory_for_all_nothing_is_offloaded(bloom: Path, tmp_path: Path) -> None:
    with LocalSwarm(bloom, ["2:5"], offload="disk", cache_dir=str(tmp_path)) as swarm:
        (server,) = swarm.servers
        assert server.memory is not None
        assert (server.memory.kept, server.memory.slots) == (3, 0)
    assert not (tmp_path / "offloaded").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--offload", "disk", "--cache-dir", "none"], "needs a --cache-dir"),
        (["--offload", "cpu", "--training-mib", "64"], "cannot be trained through"),
        (["--offload", "cpu", "--tensor-parallel", "2"], "--offload or --tensor-parallel"),
        (["--device-memory", "0"], "--device-memory must be at least 1"),
    ],
)
def test_options_that_contradict_each_other(
    capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert run_server.main(["m", "--new-swarm", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_no_training_with_offload() -> None:
    assert ServerConfig(model="m", new_swarm=True).trains
    assert not ServerConfig(model="m", new_swarm=True, offload="cpu").trains
    assert ServerConfig(model="m", new_swarm=True, offload="cpu", training_mib=0).offload == "cpu"
