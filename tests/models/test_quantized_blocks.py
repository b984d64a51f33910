"""Quantized blocks of every family against twins that hold the same weights in floating point."""

from __future__ import annotations

import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, make, tokens

from petal_swarm.errors import CheckpointError, ConfigError
from petal_swarm.models import block_source, nf4
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.ends import load_ends
from petal_swarm.models.int8 import Int8Linear, packing_works
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.quantization import quantize
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.span import Span

QUANTS = ["int8", "nf4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture
def small_ones_packed(monkeypatch):
    """Models of tests are too small to be worth packing."""
    monkeypatch.setattr("petal_swarm.models.int8._SMALL_WEIGHT", 0)


@pytest.fixture
def bloom(folders):
    return open_checkpoint(str(folders("bloom")))


def twin(checkpoint, span, quant):
    """Blocks of the weights that `quant` leaves, in float32."""
    config, family = checkpoint.config, checkpoint.family
    blocks = []
    for number in span.blocks():
        shapes = family.block_tensors(config, number)
        tensors = checkpoint.load(shapes, dtype=torch.float32)
        prefix = family.block_prefix.format(number)
        plain = {
            name.removeprefix(prefix): tensor
            if tensor.dim() < 2
            else quantize(name, tensor, quant).dequantized()
            for name, tensor in tensors.items()
        }
        blocks.append(family.build_block(config, plain))
    return BlockStack(config, span, blocks, dtype=torch.float32)


@torch.inference_mode()
def outputs(stack, hidden, dtype=torch.float32):
    """A prompt, and five tokens that follow it one by one."""
    count = hidden.shape[0]
    pool = KVPool.allocate(stack.config, stack.span, count, dtype, "cpu")
    found = []
    for start, stop in [(0, count - 5), *((i, i + 1) for i in range(count - 5, count))]:
        batch = PackedBatch.build([PackedSlice(0, stop - start, start, ((0, stop),))])
        found.append(stack.forward(hidden[start:stop].to(dtype), batch, pool, stack.span))
    return torch.cat(found).float()


@pytest.mark.usefixtures("small_ones_packed")
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_compute_with_the_rounded_weights(folders, name, quant):
    checkpoint = open_checkpoint(str(folders(name)))
    span = Span(1, 3)
    hidden = load_ends(checkpoint, dtype=torch.float32).embed(tokens(40))
    stack = load_blocks(checkpoint, span, dtype=torch.float32, quant=quant)
    expected = outputs(twin(checkpoint, span, quant), hidden)
    found = outputs(stack, hidden)
    assert (found - expected).norm() < 0.05 * expected.norm()
    plain = outputs(load_blocks(checkpoint, span, dtype=torch.float32), hidden)
    far = (plain - expected).norm() / expected.norm()
    assert far > (0.002 if quant == "int8" else 0.03), "or the twin was not quantized"


@pytest.mark.usefixtures("small_ones_packed")
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_bfloat16_around_quantized_weights(folders, name, quant):
    checkpoint = open_checkpoint(str(folders(name)))
    span = Span(1, 3)
    hidden = load_ends(checkpoint, dtype=torch.float32).embed(tokens(40))
    stack = load_blocks(checkpoint, span, dtype=torch.bfloat16, quant=quant)
    expected = outputs(twin(checkpoint, span, quant), hidden)
    assert (outputs(stack, hidden, torch.bfloat16) - expected).norm() < 0.05 * expected.norm()


def test_weights_are_rounded_from_the_checkpoint_not_from_bfloat16(bloom, monkeypatch):
    seen = []
    monkeypatch.setattr(
        block_source,
        "quantize",
        lambda name, tensor, quant: seen.append(tensor.dtype) or quantize(name, tensor, quant),
    )
    load_blocks(bloom, Span(0, 1), dtype=torch.bfloat16, quant="int8")
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("quant", QUANTS)
def test_memory_of_a_span(tmp_path, quant):
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(hidden_size=512, n_layer=1, n_head=8, vocab_size=16)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    plain = load_blocks(checkpoint, Span(0, 1), dtype=torch.float32).nbytes
    share = load_blocks(checkpoint, Span(0, 1), dtype=torch.float32, quant=quant).nbytes / plain
    assert share <= (0.27 if quant == "int8" else 0.16)


@pytest.mark.parametrize("threads", [1, 2])
def test_floating_point_tensors_go_as_they_come(bloom, monkeypatch, threads):
    """At no time are more of them alive than there are threads to quantize them."""
    alive, most = [], 0

    def count(name, tensor, quant):
        nonlocal most
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return quantize(name, tensor, quant)

    monkeypatch.setattr(block_source, "quantize", count)
    load_blocks(bloom, Span(0, 3), dtype=torch.float32, quant="int8", threads=threads)
    assert len(alive) == 12
    assert most <= threads


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_undefined_weights_are_refused(bloom, folders, tmp_path, quant, bad):
    source = folders("bloom")
    stored = load_file(source / "model.safetensors")
    name = "transformer.h.1.mlp.dense_h_to_4h.weight"
    stored[name][5, 7] = bad
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=f"tensor {name} holds infinite or undefined"):
        load_blocks(open_checkpoint(str(tmp_path)), Span(0, 2), dtype=torch.float32, quant=quant)


def test_progress_counts_the_span(bloom):
    calls = []
    load_blocks(
        bloom,
        Span(0, 2),
        dtype=torch.float32,
        quant="int8",
        progress=lambda done, total: calls.append((done, total)),
        threads=1,
    )
    shapes = bloom.family.block_shapes(bloom.config).values()
    total = 2 * 4 * sum(torch.Size(shape).numel() for shape in shapes)
    assert calls == sorted(calls)
    assert {stated for _, stated in calls} == {total}
    assert calls[-1] == (total, total)


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_int8_blocks_where_nothing_is_packed(folders, monkeypatch, name):
    """Activations stay as they are, so only the order of summing differs from the twin."""
    monkeypatch.setattr("petal_swarm.models.int8.packing_works", lambda: False)
    monkeypatch.setattr("petal_swarm.models.int8._fused_works", lambda values: False)
    checkpoint = open_checkpoint(str(folders(name)))
    hidden = load_ends(checkpoint, dtype=torch.float32).embed(tokens(20))
    stack = load_blocks(checkpoint, Span(0, 2), dtype=torch.float32, quant="int8")
    assert isinstance(stack._blocks[0]._qkv, Int8Linear)
    expected = outputs(twin(checkpoint, Span(0, 2), "int8"), hidden)
    assert (outputs(stack, hidden) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.usefixtures("small_ones_packed")
@pytest.mark.skipif(not packing_works(), reason="needs oneDNN and VNNI")
def test_packed_blocks_do_not_hold_plain_weights_as_well(bloom):
    block = load_blocks(bloom, Span(0, 1), dtype=torch.float32, quant="int8")._blocks[0]
    held = [getattr(block._up, name) for name in block._up.__slots__]
    plain = [t for t in held if isinstance(t, torch.Tensor) and not t.is_mkldnn]
    assert max(tensor.numel() for tensor in plain) == bloom.config.intermediate_size


def test_rows_that_nf4_cannot_cut_are_refused_before_reading(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(hidden_size=48, n_layer=1, n_head=4, vocab_size=16)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="multiple of 32"):
        load_blocks(checkpoint, Span(0, 1), dtype=torch.float32, quant="nf4")


def test_nf4_without_bitsandbytes(bloom, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    nf4.bitsandbytes.cache_clear()
    try:
        with pytest.raises(ConfigError, match="pip install bitsandbytes"):
            load_blocks(bloom, Span(0, 1), dtype=torch.float32, quant="nf4")
    finally:
        nf4.bitsandbytes.cache_clear()


def test_bitsandbytes_is_loaded_on_use_and_in_silence():
    script = (
        "import sys, petal_swarm.models.stack, petal_swarm.server.server\n"
        "from petal_swarm.models import nf4\n"
        "assert not {'bitsandbytes', 'triton'} & set(sys.modules)\n"
        "nf4.bitsandbytes()\n"
        "assert 'bitsandbytes' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
