"""One decoded token through the blocks: microseconds a block, here and in transformers.

    python -m benchmarks.blocks [--threads 1] [--position 100]

transformers is measured as a whole base model (embeddings and final norm included) divided by its blocks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Span


def bloom(hidden_size: int, heads: int, blocks: int) -> Any:
    return transformers.BloomConfig(
        vocab_size=100,
        hidden_size=hidden_size,
        n_layer=blocks,
        n_head=heads,
        architectures=["BloomForCausalLM"],
    )


def llama(hidden_size: int, heads: int, blocks: int) -> Any:
    return transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        architectures=["LlamaForCausalLM"],
    )


MODELS = {
    "BLOOM, hidden 64, 4 heads": bloom(64, 4, 8),
    "Llama, hidden 64, 4 heads": llama(64, 4, 8),
    "BLOOM, hidden 1024, 16 heads": bloom(1024, 16, 4),
    "Llama, hidden 1024, 16 heads": llama(1024, 16, 4),
}


def median_us(step: Callable[[], object], seconds: float = 1.0) -> float:
    took: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(took) < 20:
        start = time.perf_counter()
        step()
        took.append(time.perf_counter() - start)
    return statistics.median(took[len(took) // 10 :]) * 1e6


def lean(hf: Any, position: int) -> Callable[[], object]:
    config = ModelConfig.from_hf(hf.to_dict())
    family, span = family_of(config), Span(0, config.num_blocks)
    shapes = family.block_shapes(config)
    tensors: list[Any] = [
        {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()} for _ in span.blocks()
    ]
    blocks = [family.build_block(config, own) for own in tensors]
    stack = BlockStack(config, span, blocks, dtype=torch.float32)
    pool = KVPool.allocate(config, span, position + 1, torch.float32, "cpu")
    for pair in pool.pairs:
        pair.zero_()
    hidden = torch.randn(1, config.hidden_size)

    def step() -> None:
        batch = PackedBatch.build([PackedSlice(0, 1, position, ((0, position + 1),))])
        stack.forward(hidden, batch, pool, span)

    return step


def reference(hf: Any, position: int) -> Callable[[], object]:
    model = transformers.AutoModel.from_config(hf).eval()
    cache = transformers.DynamicCache(config=hf)
    model(torch.zeros(1, position, dtype=torch.long), past_key_values=cache, use_cache=True)
    token = torch.zeros(1, 1, dtype=torch.long)

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--position", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        for name, hf in MODELS.items():
            blocks = hf.num_hidden_layers
            ours = median_us(lean(hf, arguments.position)) / blocks
            theirs = median_us(reference(hf, arguments.position)) / blocks
            print(f"{name}: {ours:.1f} us a block, transformers {theirs:.1f} us")


if __name__ == "__main__":
    main()
