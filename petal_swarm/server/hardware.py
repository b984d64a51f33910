"""What this machine is: the device, its free memory, the dtype; and what a model's parts take of it."""

from __future__ import annotations

import psutil
import torch

from petal_swarm.errors import ConfigError
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.models.int8_kv import row_bytes
from petal_swarm.models.offload import OFFLOADS, Offload
from petal_swarm.models.quantization import QUANTS, Quant, matrix_bytes
from petal_swarm.wire.tensors import DTYPES

#: Of what is free once blocks and KV cache are there, training may take this part, up to a bound.
_TRAINING_SHARE = 0.25
_MAX_DEFAULT_TRAINING_BYTES = 8 << 30


def resolve_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: the device was asked for by name and is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise ConfigError(f"--device {name}: this machine has no usable {name} device; try --device cpu")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def rank_devices(first: torch.device, ranks: int) -> list[str]:
    """Where the ranks of one server compute: on GPUs of their own, or all on the CPU.

    Raises:
        ConfigError: there are not so many.
    """
    if first.type == "cpu":
        return ["cpu"] * ranks
    if first.type != "cuda":
        raise ConfigError(f"--tensor-parallel needs CUDA devices or a CPU, not --device {first.type}")
    if torch.cuda.device_count() < ranks:
        raise ConfigError(
            f"--tensor-parallel {ranks}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return [f"cuda:{number}" for number in range(ranks)]


def resolve_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto`: float32 on the CPU, else the checkpoint's own 16-bit type (bfloat16 if it has none).

    GPUs older than NVIDIA's Ampere emulate bfloat16, slowly: there `auto` is float16.

    Raises:
        ConfigError: bfloat16 was asked for by name, and this GPU does not have it.
    """
    no_bfloat16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bfloat16" and no_bfloat16:
        raise ConfigError("--dtype bfloat16: this GPU cannot compute in it; try --dtype float16")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if config.torch_dtype == "float16" or no_bfloat16 else torch.bfloat16


def free_bytes(device: torch.device) -> int:
    """Memory that a new server may take on `device`, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def resolve_quant(name: str, config: ModelConfig) -> Quant:
    """`auto` is what the model's family does by default.

    Raises:
        ConfigError: there is no quantization of that name.
    """
    if name == "auto":
        return family_of(config).default_quant
    for quant in QUANTS:
        if name == quant:
            return quant
    raise ConfigError(f"--quant must be auto or one of {', '.join(QUANTS)}, not {name!r}")


def resolve_offload(name: str) -> Offload:
    """Where blocks are that do not fit the device.

    Raises:
        ConfigError: there is no such place.
    """
    for offload in OFFLOADS:
        if name == offload:
            return offload
    raise ConfigError(f"--offload must be one of {', '.join(OFFLOADS)}, got {name!r}")


def block_bytes(config: ModelConfig, dtype: torch.dtype, quant: Quant) -> int:
    """One block's weights in bytes.

    Raises:
        ConfigError: this model cannot be quantized so.
    """
    shapes = family_of(config).block_shapes(config).values()
    return sum(matrix_bytes(quant if len(shape) > 1 else "none", shape, dtype) for shape in shapes)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype, kv_dtype: str = "auto") -> int:
    """Keys and values of one token in one block, in bytes; `kv_dtype` as in `KVPool.allocate`."""
    row = row_bytes(config.head_dim) if kv_dtype == "int8" else config.head_dim * dtype.itemsize
    return 2 * config.num_kv_heads * row


def default_training_bytes(device: torch.device) -> int:
    """Memory for what passes of training keep, on a machine whose blocks are loaded."""
    return min(int(free_bytes(device) * _TRAINING_SHARE), _MAX_DEFAULT_TRAINING_BYTES)
