"""What a KV cache takes, and how many tokens of it fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from petal_swarm.errors import ConfigError
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.packing import KVPool
from petal_swarm.server import hardware
from petal_swarm.server.config import ServerConfig
from petal_swarm.span import Span

CPU = torch.device("cpu")
CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["BloomForCausalLM"],
        "n_layer": 3,
        "hidden_size": 128,
        "n_head": 2,
        "vocab_size": 50,
    }
)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_token_are_those_of_the_pool(dtype, kv_dtype):
    pool = KVPool.allocate(CONFIG, Span(0, 3), 32, dtype, CPU, kv_dtype)
    assert pool.nbytes == 3 * 32 * hardware.kv_bytes_per_token(CONFIG, dtype, kv_dtype)


def test_a_kv_dtype_that_is_not_known():
    with pytest.raises(ConfigError, match="--kv-dtype must be one of auto, int8, got 'int4'"):
        ServerConfig(model="m", new_swarm=True, kv_dtype="int4")


class Gpu:
    """What torch would say of a GPU."""

    def __init__(self, monkeypatch, *, bfloat16):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation
        )


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_is_taken_by_its_number(monkeypatch, name):
    Gpu(monkeypatch, bfloat16=True)
    assert hardware.resolve_device(name) == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("own", "bfloat16", "expected"),
    [
        ("float32", True, torch.bfloat16),
        ("bfloat16", True, torch.bfloat16),
        ("float16", True, torch.float16),
        ("float32", False, torch.float16),
        ("bfloat16", False, torch.float16),
    ],
)
def test_16_bits_that_the_gpu_can_compute_in(monkeypatch, own, bfloat16, expected):
    Gpu(monkeypatch, bfloat16=bfloat16)
    config = replace(CONFIG, torch_dtype=own)
    assert hardware.resolve_dtype("auto", config, torch.device("cuda", 0)) == expected
    assert hardware.resolve_dtype("float16", config, torch.device("cuda", 0)) == torch.float16


def test_bfloat16_on_a_gpu_without_it(monkeypatch):
    Gpu(monkeypatch, bfloat16=False)
    with pytest.raises(ConfigError, match="--dtype bfloat16: this GPU cannot"):
        hardware.resolve_dtype("bfloat16", CONFIG, torch.device("cuda", 0))
    assert hardware.resolve_dtype("bfloat16", CONFIG, CPU) == torch.bfloat16
    assert hardware.resolve_dtype("auto", CONFIG, CPU) == torch.float32


def test_ranks_have_gpus_of_their_own_or_share_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert hardware.rank_devices(torch.device("cuda", 0), 3) == ["cuda:0", "cuda:1", "cuda:2"]
    assert hardware.rank_devices(CPU, 2) == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "--tensor-parallel 2: this machine has 1 CUDA devices"),
        ("mps", "needs CUDA devices or a CPU"),
    ],
)
def test_ranks_without_devices(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=message):
        hardware.rank_devices(torch.device(device), 2)
