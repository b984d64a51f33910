"""What a server makes of `--quant`: resolved, counted, announced, cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from petal_swarm.cli import run_server
from petal_swarm.errors import ConfigError
from petal_swarm.models.block_cache import BlockCache
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.stack import load_blocks
from petal_swarm.server import hardware
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.loader import Loader
from petal_swarm.span import Span
from tests.checkpoints import save_bloom, save_llama
from tests.swarm.local import LocalSwarm


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bloom(tmp_path_factory.mktemp("bloom"), blocks=2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), blocks=2)


def test_auto_depends_on_the_family(bloom: Path, llama: Path) -> None:
    assert hardware.resolve_quant("auto", open_checkpoint(str(bloom)).config) == "int8"
    assert hardware.resolve_quant("auto", open_checkpoint(str(llama)).config) == "none"
    assert hardware.resolve_quant("nf4", open_checkpoint(str(llama)).config) == "nf4"
    with pytest.raises(ConfigError, match="--quant must be auto or one of none, int8, nf4, not 'int4'"):
        hardware.resolve_quant("int4", open_checkpoint(str(bloom)).config)


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_estimates_of_memory_are_what_is_used(request: Any, family: str, quant: Any) -> None:
    checkpoint = open_checkpoint(str(request.getfixturevalue(family)))
    stack = load_blocks(checkpoint, Span(0, 1), dtype=torch.float32, quant=quant)
    estimate = hardware.block_bytes(checkpoint.config, torch.float32, quant)
    # Norms keep a scaled copy of their weight; packed nf4 keeps its scales in 16 bits.
    assert estimate == pytest.approx(stack.nbytes, rel=0.12)


def test_quantized_blocks_fit_in_larger_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(save_bloom(tmp_path, blocks=2, hidden=256)))
    plain = hardware.block_bytes(checkpoint.config, torch.float32, "none")
    monkeypatch.setattr("petal_swarm.server.loader.free_bytes", lambda device: 5 * plain // 2)
    fitting = []
    for quant in ("none", "int8"):
        config = ServerConfig(
            model="m", new_swarm=True, quant=quant, kv_tokens=64, max_batch_tokens=64, adapter_mib=0
        )
        fitting.append(Loader(config, checkpoint).capacity())
    assert fitting == [1, 2]


def test_devices_that_share_blocks_hold_more_of_them(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's ranks are in one memory, each GPU has its own."""
    checkpoint = open_checkpoint(str(bloom))
    config = ServerConfig(
        model="m",
        new_swarm=True,
        quant="none",
        kv_tokens=64,
        max_batch_tokens=64,
        adapter_mib=0,
        device="cpu",
        device_memory_mib=1,
        tensor_parallel=2,
    )
    room = hardware.block_bytes(checkpoint.config, torch.float32, "none")
    loader = Loader(config, checkpoint)
    on_cpu = loader.plan(1).needs
    loader.device = torch.device("cuda", 0)
    monkeypatch.setattr("petal_swarm.server.loader.free_bytes", lambda device: 1 << 34)
    on_cuda = loader.plan(1).needs
    assert on_cpu.block_bytes == room
    assert on_cuda.block_bytes == room // 2
    assert on_cuda.kv_bytes_per_token == on_cpu.kv_bytes_per_token // 2


@pytest.mark.parametrize(("asked", "announced"), [("auto", "int8"), ("none", "none"), ("nf4", "nf4")])
def test_the_resolved_quantization_is_announced(bloom: Path, asked: str, announced: str) -> None:
    with LocalSwarm(bloom, ["0:2"], quant=asked) as swarm:
        assert swarm.servers[0].announcement().quant == announced


def test_a_swarm_of_int8_servers_generates(bloom: Path, tmp_path: Path) -> None:
    """Twice: the second time from the cache, and the same."""
    prompt = torch.tensor([[5, 17, 3, 8]])
    found = []
    for _ in range(2):
        with LocalSwarm(bloom, ["0:1", "1:2"], quant="int8", cache_dir=str(tmp_path)) as swarm:
            found.append(swarm.model().generate(prompt, max_new_tokens=12, do_sample=False))
    assert found[0].shape == (1, 16)
    assert torch.equal(found[0], found[1])
    assert len(list(tmp_path.glob("quantized/*/block-*.safetensors"))) == 2


def test_without_a_folder_nothing_is_kept(
    bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockCache, "of", lambda *_: pytest.fail("there is no folder"))
    with LocalSwarm(bloom, ["0:2"], quant="int8") as swarm:
        assert swarm.servers[0].announcement().quant == "int8"


def test_plain_weights_are_not_cached(bloom: Path, tmp_path: Path) -> None:
    with LocalSwarm(bloom, ["0:2"], quant="none", cache_dir=str(tmp_path / "cache")):
        assert not (tmp_path / "cache" / "quantized").exists()


def test_options() -> None:
    arguments = run_server.build_parser().parse_args(["m", "--new-swarm"])
    assert ServerConfig(model="m", new_swarm=True).quant == arguments.quant == "auto"
    help_text = " ".join(run_server.build_parser().format_help().split())
    assert "--quant {auto,none,int8,nf4}" in help_text
    assert "int8 for BLOOM, else none" in help_text
