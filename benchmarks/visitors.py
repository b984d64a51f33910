"""Tokens a second of many visitors at once, against batches of transformers in one process.

    python -m benchmarks.visitors MODEL.gguf [--visitors 32] [--rounds 3] [--dtype bfloat16]

Prompts of 10 to 500 tokens, answers of 5 to 200, of a seeded mix, another one for each round; tokens that
somebody asked for count, no others. All visitors come at the same moment. The swarm is two servers of one
thread each, and a gateway with one; its generator, without HTTP, is measured beside. transformers has two
threads in all. It gets the same prompts in left-padded batches, in order of arrival, or sorted by length
before (bucketed). Each of `--batches` is tried with the first mix, and of either kind the fastest is
measured. A visitor's latency is the time until the whole answer is there: in a batch, until its longest
answer is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from benchmarks.harness import READY_TIMEOUT_S, median_ratio, servers
from petal_swarm.cli.local_swarm import TETHERED, LocalSwarm
from petal_swarm.client.config import ClientConfig
from petal_swarm.client.generation.generator import Generator, connect_generator
from petal_swarm.client.generation.request import GenerationRequest, Sampling
from petal_swarm.client.loop import new_event_loop

THREADS = 2
MODEL_NAME = "model"
PROMPT_TOKENS = (10, 500)
ANSWER_TOKENS = (5, 200)
#: Ids above are not used: some of them are special in some model.
VOCABULARY = range(100, 40_000)


class Wish(NamedTuple):
    """What one visitor asks for."""

    prompt: tuple[int, ...]
    answer_tokens: int


class Served(NamedTuple):
    """All visitors of a mix were served: seconds until each had the whole answer."""

    tokens_per_s: float
    latencies_s: Sequence[float]

    @property
    def p95_s(self) -> float:
        return statistics.quantiles(self.latencies_s, n=20)[-1]


def wishes(count: int, seed: int) -> list[Wish]:
    """A mix of `count` visitors in order of arrival."""
    chance = random.Random(seed)
    return [
        Wish(
            tuple(chance.choices(VOCABULARY, k=chance.randint(*PROMPT_TOKENS))),
            chance.randint(*ANSWER_TOKENS),
        )
        for _ in range(count)
    ]


def served(mix: Sequence[Wish], latencies_s: Sequence[float]) -> Served:
    return Served(sum(wish.answer_tokens for wish in mix) / max(latencies_s), latencies_s)


class Batches:
    """transformers in a thread of this process."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        plain = GgufConfig(dequantize=True)  # its kernels for packed weights are slower
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=dtype, quantization_config=plain
        )
        model.eval().generation_config.eos_token_id = None  # all answers are as long as was asked for
        self._model = model

    async def serve(self, mix: Sequence[Wish], size: int, *, bucketed: bool) -> Served:
        order = sorted(mix, key=lambda wish: len(wish.prompt)) if bucketed else list(mix)
        return served(mix, await asyncio.to_thread(self._serve, order, size))

    def _serve(self, order: Sequence[Wish], size: int) -> list[float]:
        torch.set_num_threads(THREADS)  # of this thread alone
        latencies_s: list[float] = []
        started = time.perf_counter()
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            self._generate(batch)
            latencies_s += [time.perf_counter() - started] * len(batch)
        return latencies_s

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Wish]) -> None:
        width = max(len(wish.prompt) for wish in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, wish in enumerate(batch):
            ids[row, width - len(wish.prompt) :] = torch.tensor(wish.prompt)
            mask[row, width - len(wish.prompt) :] = 1
        most = max(wish.answer_tokens for wish in batch)
        self._model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0)


async def serve_by_gateway(url: str, mix: Sequence[Wish]) -> Served:
    started = time.perf_counter()

    async def answer(client: httpx.AsyncClient, wish: Wish) -> float:
        body = {
            "model": MODEL_NAME,
            "prompt": wish.prompt,
            "max_tokens": wish.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},  # half characters have no event of their own
        }
        last = ""
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                last = line if line.startswith("data: {") else last
        tokens = json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"]
        assert tokens == wish.answer_tokens, (
            f"{tokens} tokens, and {wish.answer_tokens} were asked for: {last}"
        )
        return time.perf_counter() - started

    everybody = httpx.Limits(max_connections=len(mix))
    async with httpx.AsyncClient(limits=everybody, timeout=READY_TIMEOUT_S) as client:
        return served(mix, await asyncio.gather(*(answer(client, wish) for wish in mix)))


async def serve_by_generator(generator: Generator, mix: Sequence[Wish]) -> Served:
    started = time.perf_counter()

    async def answer(wish: Wish) -> float:
        request = GenerationRequest(
            prompts=(wish.prompt,),
            max_new_tokens=wish.answer_tokens,
            sampling=Sampling(temperature=0.0),
            ignore_eos=True,
        )
        tokens = 0
        async for piece in generator.start(request):
            tokens += piece.tokens
        assert tokens == wish.answer_tokens
        return time.perf_counter() - started

    return served(mix, await asyncio.gather(*map(answer, mix)))


async def best_size(batches: Batches, mix: Sequence[Wish], sizes: Sequence[int], *, bucketed: bool) -> int:
    if len(sizes) == 1:
        return sizes[0]
    tried = {size: (await batches.serve(mix, size, bucketed=bucketed)).tokens_per_s for size in sizes}
    kind = "bucketed" if bucketed else "static"
    print(f"{kind}, tokens/s by batch size: {', '.join(f'{s}: {r:.0f}' for s, r in tried.items())}")
    return max(tried, key=lambda size: tried[size])


async def run(arguments: argparse.Namespace, address: str, url: str) -> None:
    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    batches = Batches(arguments.model, dtype)
    config = ClientConfig(initial_peers=(address,))
    generator: Any = await connect_generator(str(arguments.model), config, dtype=dtype, progress=False)
    await serve_by_generator(generator, wishes(4, seed=0))
    await serve_by_gateway(url, wishes(4, seed=0))
    first = wishes(arguments.visitors, seed=1)
    sizes = [await best_size(batches, first, arguments.batches, bucketed=kind) for kind in (False, True)]
    results: dict[str, list[Served]] = {"gateway": [], "generator": [], "static": [], "bucketed": []}
    for number in range(arguments.rounds):
        mix = wishes(arguments.visitors, seed=2 + 2 * number)
        other = wishes(arguments.visitors, seed=3 + 2 * number)  # servers know the first one's prompts now
        results["gateway"].append(await serve_by_gateway(url, mix))
        results["generator"].append(await serve_by_generator(generator, other))
        results["static"].append(await batches.serve(mix, sizes[False], bucketed=False))
        results["bucketed"].append(await batches.serve(mix, sizes[True], bucketed=True))
    await generator.close()
    await generator.swarm.close()
    report(results)


def report(results: dict[str, list[Served]]) -> None:
    ours = results["gateway"]
    for kind, theirs in results.items():
        rate = statistics.median(each.tokens_per_s for each in theirs)
        p95_s = statistics.median(each.p95_s for each in theirs)
        faster = median_ratio([each.tokens_per_s for each in ours], [each.tokens_per_s for each in theirs])
        sooner = median_ratio([each.p95_s for each in theirs], [each.p95_s for each in ours])
        print(
            f"{kind}: {rate:.0f} tokens/s, p95 latency {p95_s:.1f} s;"
            f" the gateway has {faster:.2f} times the tokens/s, {sooner:.2f} times sooner"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--visitors", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--spans", nargs="+", default=["0:15", "15:30"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32])
    arguments = parser.parse_args()
    threads = str(max(1, THREADS // len(arguments.spans)))
    options = ("--threads", threads, "--dtype", arguments.dtype, "--kv-tokens", "32768")
    with servers(arguments.model, arguments.spans, *options) as running:
        address = running[0].address
        words = ["--model", str(arguments.model), "--model-name", MODEL_NAME, "--port", "0", "--threads", "1"]
        words += ["--dtype", arguments.dtype, "--max-requests", str(arguments.visitors)]
        with LocalSwarm(command=(*TETHERED, "gateway")) as gateways:
            gateway = gateways.start("gateway", [*words, "--initial-peers", address])
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(run(arguments, address, gateway.address.result(READY_TIMEOUT_S)))


if __name__ == "__main__":
    main()
