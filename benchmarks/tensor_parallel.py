"""One engine whose blocks two processes share out, against one process: prefill, decode and training.

    python -m benchmarks.tensor_parallel [--ranks 2] [--blocks 24] [--tokens 512] [--rounds 5] [--spread]

Every process has one thread, and the shape is that of bloom-560m's blocks. Training is a pass of sequences of
128 tokens there and back, with LoRA of rank 8 on two projections of each block. Rounds are interleaved; the
ratio is the median of those of the rounds. `--spread` shares norms and residuals of a prompt out by rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from transformers import BloomConfig, BloomForCausalLM

from benchmarks.harness import interleaved, median_ratio
from petal_swarm.engine.engine import Engine
from petal_swarm.engine.ranks import RankSettings
from petal_swarm.engine.steps import StepRequest
from petal_swarm.engine.training import Passes
from petal_swarm.engine.works import Pieces
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.checkpoint import Checkpoint, open_checkpoint
from petal_swarm.models.sharding import Shard
from petal_swarm.models.stack import load_blocks
from petal_swarm.server.ranks import load_ranks
from petal_swarm.span import Slice, Span

HIDDEN = 1024
DECODE_STEPS = 5
SEQUENCE = 128
LORA_STEMS = ("self_attention.query_key_value", "mlp.dense_4h_to_h")
T = TypeVar("T")


def checkpoint(folder: str, blocks: int) -> Checkpoint:
    torch.manual_seed(2)
    config = BloomConfig(hidden_size=HIDDEN, n_layer=blocks, n_head=16, vocab_size=1000)
    BloomForCausalLM(config).save_pretrained(folder)
    return open_checkpoint(folder)


def shared(source: Checkpoint, ranks: int, quant: str, spread: bool) -> Engine:
    settings = RankSettings(
        model=source.source,
        span=Span(0, source.config.num_blocks),
        shard=Shard(0, ranks),
        dtype=torch.float32,
        device="cpu",
        quant=quant,  # type: ignore[arg-type]
        threads=1,
        spread_from=2 if spread else None,
    )
    stack = load_ranks(source, settings, ["cpu"] * (ranks - 1), None, lambda: print("a rank is gone"))
    return Engine(stack, kv_tokens=4096, max_batch_tokens=4096)


def measured(engine: Engine, tokens: int) -> tuple[Callable[[], float], Callable[[], float], torch.Tensor]:
    """What takes the time of a prompt, what that of a token behind it, and what came out."""
    hidden = torch.randn(tokens + 1, HIDDEN, generator=torch.Generator().manual_seed(1))
    blocks = engine.stack.span
    engine.open_session("a", max_length=tokens + 1)

    def run(position: int, count: int) -> tuple[float, torch.Tensor]:
        rows = hidden[position : position + count]
        (result,) = engine.run([StepRequest("a", blocks, (Slice(0, position, count),), rows)])
        if result.hidden is None:
            raise SystemExit(f"a step failed: {result.error}")
        return result.compute_s, result.hidden

    def decode() -> float:
        return statistics.median(run(tokens, 1)[0] for _ in range(DECODE_STEPS))

    first = run(0, tokens)[1]
    return lambda: run(0, tokens)[0], decode, torch.cat([first, run(tokens, 1)[1]])


def trained(engine: Engine, tokens: int) -> tuple[Callable[[], float], torch.Tensor]:
    """What takes the time of a pass there and back, and what its gradients are."""
    blocks, config = engine.stack.span, engine.stack.config
    layout = AdapterLayout(
        tuple(LoraPlace(block, s, 8, 1.0) for block in blocks.blocks() for s in LORA_STEMS)
    )
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(layout.numbers(config, blocks), generator=generator) * 0.02
    hidden, grad = (torch.randn(tokens, HIDDEN, generator=generator) for _ in range(2))
    lengths = [SEQUENCE] * (tokens // SEQUENCE)
    lengths += [tokens % SEQUENCE] * (tokens % SEQUENCE > 0)
    passes = Passes(engine.stack)

    def train() -> tuple[float, torch.Tensor]:
        started = time.perf_counter()
        _all(passes.forward("a", hidden, lengths, blocks, (layout, numbers), keep=True))
        rows, of_numbers = _all(passes.backward("a", grad))
        passes.forget("a")
        took_s = time.perf_counter() - started
        if of_numbers is None:
            raise SystemExit("a pass with an adapter has given no gradient for it")
        return took_s, torch.cat([rows.flatten(), of_numbers])

    return lambda: train()[0], train()[1]


def _all(pieces: Pieces[T]) -> T:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: T = end.value
            return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quant", default="none", choices=("none", "int8", "nf4"))
    parser.add_argument("--spread", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint(str(Path(folder)), arguments.blocks)
        stack = load_blocks(source, Span(0, arguments.blocks), dtype=torch.float32, quant=arguments.quant)
        one = Engine(stack, kv_tokens=4096, max_batch_tokens=4096)
        many = shared(source, arguments.ranks, arguments.quant, arguments.spread)
    try:
        prefill_one, decode_one, expected = measured(one, arguments.tokens)
        prefill_many, decode_many, found = measured(many, arguments.tokens)
        train_one, expected_gradients = trained(one, arguments.tokens)
        train_many, found_gradients = trained(many, arguments.tokens)
        error = _error(found, expected)
        gradient_error = _error(found_gradients, expected_gradients)
        rounds = {"p1": prefill_one, "pn": prefill_many, "d1": decode_one, "dn": decode_many}
        rounds |= {"t1": train_one, "tn": train_many}
        took = interleaved(rounds, arguments.rounds)
    finally:
        many.close()
    print(
        f"{arguments.blocks} blocks, {arguments.ranks} ranks, quant {arguments.quant}; error {error:.1e},"
        f" of gradients {gradient_error:.1e}"
    )
    for name, alone, together in (("prefill", "p1", "pn"), ("decode", "d1", "dn"), ("training", "t1", "tn")):
        ms = [1e3 * statistics.median(took[key]) for key in (alone, together)]
        ratio = median_ratio(took[together], took[alone])
        print(f"{name}: one {ms[0]:.1f} ms, together {ms[1]:.1f} ms, ratio {ratio:.2f}")


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
