"""A process that hosts a few blocks of a large model needs little more memory than those blocks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HIDDEN = 512
BLOCKS = 24
HOSTED = 4
MIB = 1 << 20

_SCRIPT = """
import resource, sys, torch
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.stack import load_blocks
from petal_swarm.span import Span
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
checkpoint = open_checkpoint(sys.argv[1])
before = peak()
stack = load_blocks(checkpoint, Span(10, 14), dtype=torch.float32)
checkpoint.model_key
print(before, peak(), stack.nbytes, "transformers" in sys.modules)
"""
_SHAPES = {
    "input_layernorm.weight": (HIDDEN,),
    "input_layernorm.bias": (HIDDEN,),
    "self_attention.query_key_value.weight": (3 * HIDDEN, HIDDEN),
    "self_attention.query_key_value.bias": (3 * HIDDEN,),
    "self_attention.dense.weight": (HIDDEN, HIDDEN),
    "self_attention.dense.bias": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.bias": (HIDDEN,),
    "mlp.dense_h_to_4h.weight": (4 * HIDDEN, HIDDEN),
    "mlp.dense_h_to_4h.bias": (4 * HIDDEN,),
    "mlp.dense_4h_to_h.weight": (HIDDEN, 4 * HIDDEN),
    "mlp.dense_4h_to_h.bias": (HIDDEN,),
}


def shapes():
    named = {f"h.{n}.{local}": shape for n in range(BLOCKS) for local, shape in _SHAPES.items()}
    return {**named, "ln_f.weight": (HIDDEN,)}


def write_sparse_safetensors(folder: Path) -> None:
    """A header, and zeros that take no room on the disk."""
    header, offset = {}, 0
    for name, shape in shapes().items():
        end = offset + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write_bin(folder: Path) -> None:
    torch.save({name: torch.zeros(shape) for name, shape in shapes().items()}, folder / "pytorch_model.bin")


@pytest.mark.skipif(sys.platform == "win32", reason="needs getrusage")
@pytest.mark.parametrize("write", [write_sparse_safetensors, write_bin])
def test_memory_peaks_at_the_hosted_blocks(tmp_path, write):
    config = {
        "architectures": ["BloomForCausalLM"],
        "n_layer": BLOCKS,
        "hidden_size": HIDDEN,
        "n_head": 8,
        "vocab_size": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    write(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    before, peak, hosted, transformers_imported = done.stdout.split()
    block = int(hosted) / HOSTED
    total = BLOCKS * block
    assert total > int(hosted) + 200 * MIB, "the test must be able to fail"
    # While a block is read it is there twice: as mapped pages of the file, and as converted tensors.
    assert int(peak) - int(before) < int(hosted) + 2 * block + 40 * MIB
    assert transformers_imported == "False"
