"""The KV cache in the compute dtype and in int8: time to decode a token, memory, and what rounding costs.

    python -m benchmarks.kv_cache [--threads 1] [--dtype float32] [--contexts 100 2000]

The error is that of the hidden state after all blocks (4 random ones), relative to the same with float32 keys
and values, over 16 tokens decoded behind the context.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import transformers

from benchmarks.blocks import bloom, llama
from benchmarks.harness import interleaved, median_ratio
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.stack import BlockStack
from petal_swarm.server.hardware import kv_bytes_per_token
from petal_swarm.span import Span
from petal_swarm.wire.tensors import DTYPES

BLOCKS = 4
DECODED = 16
ROUNDS = 60


def grouped() -> Any:
    return transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=BLOCKS,
        num_attention_heads=16,
        num_key_value_heads=4,
        architectures=["LlamaForCausalLM"],
    )


MODELS = {
    "BLOOM, 16 heads of 64": bloom(1024, 16, BLOCKS),
    "Llama, 16 heads of 64": llama(1024, 16, BLOCKS),
    "Llama, 16 heads of 64 over 4": grouped(),
}


class Decoder:
    """Blocks with a context of random tokens behind which tokens are decoded, over and over."""

    def __init__(self, stack: BlockStack, context: int, kv_dtype: str) -> None:
        self._stack = stack
        self._context = context
        rows = context + DECODED
        self._pool = KVPool.allocate(stack.config, stack.span, rows, stack.dtype, "cpu", kv_dtype)
        generator = torch.Generator().manual_seed(0)
        self._hidden = torch.randn(rows, stack.config.hidden_size, generator=generator).to(stack.dtype)
        self._step(0, context)

    def _step(self, position: int, length: int) -> torch.Tensor:
        end = position + length
        batch = PackedBatch.build([PackedSlice(0, length, position, ((0, end),))])
        return self._stack.forward(self._hidden[position:end], batch, self._pool, self._stack.span)

    def outputs(self) -> torch.Tensor:
        return torch.cat([self._step(self._context + n, 1) for n in range(DECODED)]).float()

    def seconds(self) -> float:
        started = time.perf_counter()
        self._step(self._context, 1)
        return time.perf_counter() - started


def make_stack(hf: Any, dtype: torch.dtype) -> BlockStack:
    config = ModelConfig.from_hf(hf.to_dict())
    family, span = family_of(config), Span(0, config.num_blocks)
    torch.manual_seed(1)
    blocks = []
    for _ in span.blocks():
        shapes = family.block_shapes(config).items()
        tensors = {
            name: torch.randn(shape) * 1.5 / shape[-1] ** 0.5 if len(shape) > 1 else torch.ones(shape)
            for name, shape in shapes
        }
        blocks.append(family.build_block(config, {name: value.to(dtype) for name, value in tensors.items()}))
    return BlockStack(config, span, blocks, dtype=dtype)


def report(name: str, hf: Any, dtype: torch.dtype, context: int) -> None:
    stack = make_stack(hf, dtype)
    exact = Decoder(make_stack(hf, torch.float32), context, "auto").outputs()
    decoders = {kv_dtype: Decoder(stack, context, kv_dtype) for kv_dtype in ("auto", "int8")}
    took = interleaved({kind: decoder.seconds for kind, decoder in decoders.items()}, ROUNDS)
    for kind, decoder in decoders.items():
        error = float((decoder.outputs() - exact).norm() / exact.norm())
        micros = statistics.median(took[kind]) / BLOCKS * 1e6
        held = kv_bytes_per_token(stack.config, dtype, kind)
        ratio = median_ratio(took[kind], took["auto"])
        print(
            f"| {name} | {context} | {str(dtype)[6:] if kind == 'auto' else kind} | {micros:.0f}"
            f" | {ratio:.2f} | {held} | {error:.2%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--contexts", type=int, nargs="+", default=[100, 2000], metavar="TOKENS")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, {arguments.dtype}")
    print("| model | context | KV cache | us a block | ratio | bytes a token and block | error |")
    print("|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for name, hf in MODELS.items():
            for context in arguments.contexts:
                report(name, hf, DTYPES[arguments.dtype], context)


if __name__ == "__main__":
    main()
