"""Decoding with adapters in one packed batch: what LoRA and prefixes cost, and what batching them saves.

    python -m benchmarks.adapters [--threads 1] [--sessions 16] [--rank 16] [--rounds 20]

Four blocks of bloom-560m's shape in one process. Every session decodes a token behind 64 others; they have no
adapter, all the same, or several. "one by one" are as many batches of one session, each with its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.blocks import bloom
from benchmarks.harness import interleaved, median_ratio
from benchmarks.kv_cache import make_stack
from petal_swarm.engine.engine import Engine
from petal_swarm.engine.steps import StepRequest
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.packed_adapters import ServedAdapter
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Slice

BLOCKS = 4
CONTEXT = 64
STEMS = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


class Sessions:
    """Sessions that decode, with as many different adapters as there are in `adapters`, in turn."""

    def __init__(self, stack: BlockStack, count: int, adapters: list[ServedAdapter | None]) -> None:
        self.engine = Engine(stack, kv_tokens=(count + 1) * 2 * CONTEXT + 4096, max_batch_tokens=512)
        generator = torch.Generator().manual_seed(count)
        self._span = stack.span
        self._rows = torch.randn(count, CONTEXT, stack.config.hidden_size, generator=generator)
        for number, rows in enumerate(self._rows):
            adapter = adapters[number % len(adapters)]
            self.engine.open_session(number, max_length=2 * CONTEXT, adapter=adapter)
            self.engine.run([StepRequest(number, self._span, (Slice(0, 0, CONTEXT),), rows)])

    def _step(self, number: int) -> StepRequest:
        return StepRequest(number, self._span, (Slice(0, CONTEXT, 1),), self._rows[number, :1])

    def together(self) -> float:
        """Seconds for one token of each, in one batch."""
        requests = [self._step(number) for number in range(len(self._rows))]
        started = time.perf_counter()
        self.engine.run(requests)
        return time.perf_counter() - started

    def one_by_one(self) -> float:
        started = time.perf_counter()
        for number in range(len(self._rows)):
            self.engine.run([self._step(number)])
        return time.perf_counter() - started


def adapter(stack: BlockStack, rank: int, prefix_tokens: int = 0, seed: int = 0) -> ServedAdapter:
    places = [LoraPlace(block, stem, rank, 1.0) for block in stack.span.blocks() for stem in STEMS if rank]
    layout = AdapterLayout(tuple(places), prefix_tokens)
    size = layout.numbers(stack.config, stack.span)
    numbers = 0.02 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return stack.serve_adapter(layout, numbers, stack.span)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stack, count = make_stack(bloom(1024, 16, BLOCKS), torch.float32), arguments.sessions
    many: list[ServedAdapter | None] = [adapter(stack, arguments.rank, seed=seed) for seed in range(count)]
    apart = Sessions(stack, count, many)
    works: dict[str, Callable[[], float]] = {
        "no adapters": Sessions(stack, count, [None]).together,
        "one adapter": Sessions(stack, count, many[:1]).together,
        "half with one, half without": Sessions(stack, count, [many[0], None]).together,
        "4 adapters": Sessions(stack, count, many[:4]).together,
        f"{count} adapters": apart.together,
        f"{count} adapters, one by one": apart.one_by_one,
        "a prefix of 32 tokens": Sessions(stack, count, [adapter(stack, 0, 32)]).together,
    }
    for work in works.values():
        work()
    results = interleaved(works, arguments.rounds)
    base = results["no adapters"]
    print(f"{count} sessions, {BLOCKS} blocks, rank {arguments.rank}")
    for name, seconds in results.items():
        print(
            f"{name:28} {statistics.median(seconds) * 1e3:7.2f} ms, {median_ratio(seconds, base):.2f} times"
        )


if __name__ == "__main__":
    main()
