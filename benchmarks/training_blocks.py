"""Forward and backward through the blocks of one process: tokens a second, here and in transformers.

    python -m benchmarks.training_blocks [--threads 1] [--rounds 7] [--lora]

The blocks are frozen; what is wanted are gradients of the input rows, with --lora (rank 8, every projection)
also of LoRA's matrices, which peft adds on the other side. Both sides take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Generator
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.blocks import bloom, llama
from petal_swarm.engine.training import Passes, PassLimits
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Span

MODELS = {
    "tiny BLOOM, hidden 64, 8 blocks": bloom(64, 4, 8),
    "tiny Llama, hidden 64, 8 blocks": llama(64, 4, 8),
    "BLOOM-560m's shape, 4 of 24 blocks": bloom(1024, 16, 4),
    "SmolLM2-135M's shape, 4 of 30 blocks": transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        architectures=["LlamaForCausalLM"],
    ),
}
RANK = 8


def finish(pieces: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def lean(hf: Any, sequences: int, length: int, lora: bool, kept: bool) -> Callable[[], float]:
    """A forward and a backward; says what the backward took, in seconds."""
    config = ModelConfig.from_hf(hf.to_dict())
    family, span = family_of(config), Span(0, config.num_blocks)
    shapes = family.block_shapes(config)
    tensors: list[Any] = [
        {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()} for _ in span.blocks()
    ]
    blocks = [family.build_block(config, own) for own in tensors]
    stack = BlockStack(config, span, blocks, dtype=torch.float32)
    limits = PassLimits(activation_bytes=1 << 40 if kept else 0)
    passes = Passes(stack, limits)
    adapter = None
    if lora:
        stems = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
        places = [LoraPlace(block, stem, RANK, 2.0) for block in span.blocks() for stem in stems]
        layout = AdapterLayout(tuple(places))
        adapter = layout, torch.randn(layout.numbers(config, span)) * 0.02
    hidden = torch.randn(sequences * length, config.hidden_size)
    lengths = [length] * sequences

    def step() -> float:
        out = finish(passes.forward("pass", hidden, lengths, span, adapter, keep=True))
        start = time.perf_counter()
        finish(passes.backward("pass", out))
        took = time.perf_counter() - start
        passes.forget("pass")
        return took

    return step


def reference(hf: Any, sequences: int, length: int, lora: bool) -> Callable[[], float]:
    model = transformers.AutoModel.from_config(hf).requires_grad_(False)
    trained: list[Tensor] = []
    if lora:
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear"))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embedded = torch.randn(sequences, length, hf.hidden_size, requires_grad=True)

    def step() -> float:
        out = model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        start = time.perf_counter()
        torch.autograd.grad(out, [embedded, *trained], out.detach())
        return time.perf_counter() - start

    return step


def medians_s(steps: list[Callable[[], float]], rounds: int) -> list[tuple[float, float]]:
    """Of whole steps, and of their backwards."""
    took: list[list[tuple[float, float]]] = [[] for _ in steps]
    for _ in range(rounds + 1):
        for own, step in zip(took, steps, strict=True):
            start = time.perf_counter()
            backward = step()
            own.append((time.perf_counter() - start, backward))
    return [
        (statistics.median(whole for whole, _ in own[1:]), statistics.median(back for _, back in own[1:]))
        for own in took
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--model", default="", help="only models whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sequences, length = arguments.sequences, arguments.length
    tokens = sequences * length
    for name, hf in MODELS.items():
        if arguments.model not in name:
            continue
        steps = [
            lean(hf, sequences, length, arguments.lora, True),
            lean(hf, sequences, length, arguments.lora, False),
            reference(hf, sequences, length, arguments.lora),
        ]
        kept, recomputed, local = medians_s(steps, arguments.rounds)
        print(
            f"{name}: {tokens / kept[0]:.0f} tokens/s, {tokens / recomputed[0]:.0f} recomputed,"
            f" transformers {tokens / local[0]:.0f}; {local[0] / kept[0]:.2f}x transformers,"
            f" {recomputed[0] / kept[0]:.2f}x recomputed ({recomputed[1] / kept[1]:.2f}x the backward alone)",
            flush=True,
        )


if __name__ == "__main__":
    main()
