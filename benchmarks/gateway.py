"""What a token costs by way of the gateway, against `generate` of the Python client: the same tiny BLOOM.

    python -m benchmarks.gateway [--shape tiny|bloom-560m] [--servers 2] [--threads 1] [--rounds 7]

Milliseconds a token for one answer at a time, rounds interleaved. `generator` is the gateway's part below
HTTP: sessions, head, sampling and text in one event loop. `gateway` is a process of its own, and here is read
what it streams to a plain socket; `first event` is the milliseconds to the first one.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import SHAPES, checkpoint, interleaved, servers, workspace
from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.cli.local_swarm import TETHERED, LocalSwarm
from petal_swarm.client.config import ClientConfig
from petal_swarm.client.generation.generator import Generator, connect_generator
from petal_swarm.client.generation.request import GenerationRequest, Sampling
from petal_swarm.client.loop import new_event_loop

MODEL_NAME = "benchmark"
FIRST_EVENT = "gateway, first event"
WAYS: dict[str, tuple[dict[str, Any], Sampling]] = {
    "greedy": ({"do_sample": False}, Sampling(temperature=0)),
    "top_p 0.9": (
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0},
        Sampling(temperature=0.8, top_p=0.9),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=200, help="new tokens of an answer")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    blocks = SHAPES[arguments.shape]["n_layer"]
    share = blocks // arguments.servers
    spans = [f"{start}:{start + share}" for start in range(0, blocks, share)]
    with workspace() as folder:
        path = checkpoint(arguments.shape, folder)
        save_tokenizer(path, SHAPES[arguments.shape]["vocab_size"])
        with servers(path, spans, "--threads", str(arguments.threads)) as running:
            address = running[0].address
            with LocalSwarm(command=(*TETHERED, "gateway")) as gateways:
                words = [
                    "--model",
                    str(path),
                    "--model-name",
                    MODEL_NAME,
                    "--port",
                    "0",
                    "--threads",
                    str(arguments.threads),
                ]
                gateway = gateways.start("gateway", [*words, "--initial-peers", address])
                url = gateway.address.result(60)
                results = measure(path, address, url, arguments.tokens, arguments.rounds)
    for name, values in results.items():
        if name == FIRST_EVENT:
            print(f"{name}: {statistics.median(values):.1f} ms")
            continue
        base = results["model.generate, " + name.partition(", ")[2]]
        more = statistics.median(value - other for value, other in zip(values, base, strict=True))
        print(f"{name}: {statistics.median(values):.3f} ms a token, {more:+.3f} against model.generate")


def measure(path: Path, address: str, url: str, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a token of each way, round by round."""
    ids = torch.randint(5, 900, (1, 16), generator=torch.Generator().manual_seed(1))
    prompt = tuple(ids[0].tolist())
    config = ClientConfig(initial_peers=(address,))
    with (
        asyncio.Runner(loop_factory=new_event_loop) as runner,
        AutoSwarmModelForCausalLM.from_pretrained(
            str(path), initial_peers=[address], progress=False
        ) as model,
    ):
        generator = runner.run(connect_generator(str(path), config, progress=False))

        def plain(options: dict[str, Any]) -> float:
            started = time.perf_counter()
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
            return (time.perf_counter() - started) / tokens * 1e3

        def streamed(sampling: Sampling) -> float:
            request = GenerationRequest(
                prompts=(prompt,), max_new_tokens=tokens, sampling=sampling, ignore_eos=True
            )
            return runner.run(timed(generator, request))

        def asked(sampling: Sampling) -> float:
            return read_stream(url, prompt, tokens, sampling)[1]

        measures: dict[str, Callable[[], float]] = {}
        for name, (options, sampling) in WAYS.items():
            measures[f"model.generate, {name}"] = partial(plain, options)
            measures[f"generator, {name}"] = partial(streamed, sampling)
            measures[f"gateway, {name}"] = partial(asked, sampling)
        measures[FIRST_EVENT] = lambda: read_stream(url, prompt, 1, Sampling(temperature=0))[0]
        for once in measures.values():
            once()
        try:
            return interleaved(measures, rounds)
        finally:
            runner.run(generator.close())
            runner.run(generator.swarm.close())


async def timed(generator: Generator, request: GenerationRequest) -> float:
    """Milliseconds a token of one answer."""
    started = time.perf_counter()
    count = 0
    async for piece in generator.start(request):
        count += piece.tokens
    return (time.perf_counter() - started) / count * 1e3


def read_stream(url: str, prompt: tuple[int, ...], tokens: int, sampling: Sampling) -> tuple[float, float]:
    """Milliseconds to the first event, and for each token of the whole."""
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},  # special tokens have no text, and no event of their own
    }
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    first_ms, last = 0.0, b""
    while line := answer.readline():
        if line.startswith(b"data: {"):
            last = line
            first_ms = first_ms or (time.perf_counter() - started) * 1e3
    took_ms = (time.perf_counter() - started) * 1e3
    connection.close()
    assert json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"] == tokens, last
    return first_ms, took_ms / tokens


def save_tokenizer(folder: Path, count: int) -> None:
    """A tokenizer in which every token is a word, since random models have none."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, count)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(
        folder
    )


if __name__ == "__main__":
    main()
