"""Quantized weights against bfloat16: whole steps through blocks of bloom-560m's shape, memory, and errors.

    python -m benchmarks.quantization [--threads 1] [--rounds 9] [--blocks 24]

Weights are random; the norms lift six features so far that activations are above 6.0, as in large models.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import transformers
from torch import Tensor

from benchmarks.harness import SHAPES, interleaved, median_ratio
from petal_swarm.models import bloom
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.int8 import OUTLIER, Int8Rows, make_int8_linear, quantize_int8
from petal_swarm.models.linear import Projection
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.quantization import Quant, Weight, make_linear, quantize
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Span

FEATURES = [11, 200, 333, 512, 700, 901]
LIFT = 20.0
POSITION = 16
SESSIONS = 128
REFERENCE = "bfloat16"
VARIANTS: dict[str, tuple[Quant, torch.dtype]] = {
    "float32": ("none", torch.float32),
    REFERENCE: ("none", torch.bfloat16),
    "int8 in float32": ("int8", torch.float32),
    "int8 in bfloat16": ("int8", torch.bfloat16),
    "nf4 in float32": ("nf4", torch.float32),
    "nf4 in bfloat16": ("nf4", torch.bfloat16),
}


def model_config(blocks: int) -> ModelConfig:
    shape = {**SHAPES["bloom-560m"], "n_layer": blocks}
    hf = transformers.BloomConfig(**shape, architectures=["BloomForCausalLM"])
    return ModelConfig.from_hf(hf.to_dict())


def random_block(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, shape in bloom.FAMILY.block_shapes(config).items()
    }
    for stem in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{stem}.weight"].zero_().add_(1)[FEATURES] = LIFT
    return tensors


def stacks(config: ModelConfig) -> dict[str, BlockStack]:
    blocks: dict[str, list[bloom.BloomBlock]] = {name: [] for name in VARIANTS}
    for number in range(config.num_blocks):
        plain = random_block(config, number)
        for name, (quant, dtype) in VARIANTS.items():
            tensors: dict[str, Weight] = {}
            for local, tensor in plain.items():
                quantized = quant != "none" and tensor.dim() > 1
                tensors[local] = quantize(local, tensor, quant) if quantized else tensor.to(dtype, copy=True)
            blocks[name].append(bloom.BloomBlock(config, tensors))
    span = Span(0, config.num_blocks)
    return {name: BlockStack(config, span, blocks[name], dtype=VARIANTS[name][1]) for name in VARIANTS}


class Step:
    """One packed step of every stack; `rows` tokens of as many sessions, or of one prompt."""

    def __init__(self, config: ModelConfig, rows: int, *, prompt: bool) -> None:
        span = Span(0, config.num_blocks)
        if prompt:
            pieces = [PackedSlice(0, rows, 0, ((0, rows),))]
        else:
            stride = POSITION + 1
            extents = [((row * stride, (row + 1) * stride),) for row in range(rows)]
            pieces = [PackedSlice(row, 1, POSITION, extent) for row, extent in enumerate(extents)]
        tokens = pieces[-1].extents[-1][1]
        self._batch = PackedBatch.build(pieces)
        self._hidden = torch.randn(rows, config.hidden_size, generator=torch.Generator().manual_seed(1))
        self._pools = {}
        for dtype in (torch.float32, torch.bfloat16):
            self._pools[dtype] = KVPool.allocate(config, span, tokens, dtype, "cpu")
            for pair in self._pools[dtype].pairs:
                pair.normal_(generator=torch.Generator().manual_seed(2))

    @torch.inference_mode()
    def run(self, stack: BlockStack) -> Tensor:
        hidden = self._hidden.to(stack.dtype)
        return stack.forward(hidden, self._batch, self._pools[stack.dtype], stack.span)

    def timed(self, stack: BlockStack) -> Callable[[], float]:
        def measure() -> float:
            started = time.perf_counter()
            self.run(stack)
            return time.perf_counter() - started

        return measure


class Watched:
    """A product that counts the tokens that come to it, and those that hold an outlier."""

    seen = 0
    with_outliers = 0

    def __init__(self, inner: Projection) -> None:
        self._inner = inner
        self.nbytes = inner.nbytes

    def _count(self, x: Tensor) -> None:
        Watched.seen += len(x)
        Watched.with_outliers += int((x.abs() > OUTLIER).any(1).sum())

    def __call__(self, x: Tensor) -> Tensor:
        self._count(x)
        return self._inner(x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        self._count(x)
        return self._inner.plus(x, residual)


@contextmanager
def watched_products() -> Iterator[None]:
    with patch.object(bloom, "make_linear", lambda weight, bias: Watched(make_linear(weight, bias))):
        yield


def share_of_outliers(config: ModelConfig, step: Step) -> float:
    """How many of the tokens that come to a product have an activation above 6.0."""
    with watched_products():
        blocks = [
            bloom.BloomBlock(config, {**random_block(config, number)}) for number in range(config.num_blocks)
        ]
    step.run(BlockStack(config, Span(0, config.num_blocks), blocks, dtype=torch.float32))
    return Watched.with_outliers / Watched.seen


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def absmax(x: Tensor) -> Tensor:
    steps = x.abs().amax(1, keepdim=True) / 127
    return (x / steps).round() * steps


def print_outlier_errors() -> None:
    """One product with planted outliers: what the rounding of activations adds to that of the weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 1024, generator=generator)
    rows: Int8Rows = quantize_int8(weight)
    rounded = rows.dequantized()
    print("\nrelative errors of a product, weight 1024 x 4096, six features lifted to SIZE")
    print("  size   against rounded weights: absmax, LLM.int8(), here   against float32 weights: the same")
    for size in (10.0, 20.0, 60.0, 300.0):
        x = torch.randn(64, 1024, generator=generator)
        x[:, FEATURES] = size
        columns = (x.abs() > OUTLIER).any(0)
        inner = absmax(x.masked_fill(columns, 0)) @ rounded.t()
        results = (
            absmax(x) @ rounded.t(),
            inner + x[:, columns] @ rounded[:, columns].t(),
            make_int8_linear(rows, None)(x),
        )
        errors = [off(found, x @ w.t()) for w in (rounded, weight) for found in results]
        print(f"  {size:5.0f}  " + "  ".join(f"{error:.5f}" for error in errors))


def print_step(title: str, step: Step, every: dict[str, BlockStack], rounds: int) -> None:
    took = interleaved({name: step.timed(stack) for name, stack in every.items()}, rounds)
    exact = step.run(every["float32"])
    print(f"\n{title}")
    for name, times in took.items():
        speed = median_ratio(took[REFERENCE], times)
        share = every[name].nbytes / every["float32"].nbytes
        print(
            f"  {name:17} {statistics.median(times) * 1e3:8.2f} ms  {speed:5.2f}x the speed of {REFERENCE}"
            f"  memory {share:.3f} of float32  error {off(step.run(every[name]), exact):.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--blocks", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = model_config(arguments.blocks)
    steps = {
        "decode, 1 session": Step(config, 1, prompt=False),
        f"decode, {SESSIONS} sessions": Step(config, SESSIONS, prompt=False),
        f"a prompt of {SESSIONS} tokens": Step(config, SESSIONS, prompt=True),
    }
    share = share_of_outliers(config, steps[f"decode, {SESSIONS} sessions"])
    print(f"{arguments.blocks} blocks of bloom-560m, {arguments.threads} threads")
    print(f"tokens with an activation above {OUTLIER}, over all products: {share:.1%}")
    every = stacks(config)
    for title, step in steps.items():
        rounds = arguments.rounds * 3 if "1 session" in title else arguments.rounds
        print_step(title, step, every, rounds)
    with torch.inference_mode():
        print_outlier_errors()


if __name__ == "__main__":
    main()
