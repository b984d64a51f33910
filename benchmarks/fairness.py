"""Gaps between a client's tokens while another prefills 8,000: bloom-560m's blocks, bfloat16, two servers.

    python -m benchmarks.fairness [--tokens 150] [--prompt 8000] [--rounds 3]

Each client is a process and a peer of its own, driven at the level of hidden states: random rows, no
head, which on one machine would compete with the servers for its cores. A round is: so many gaps while nobody
else is there; a prompt while nobody decodes; a prompt, and gaps for as long as it takes.
"""

from __future__ import annotations

import argparse
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import SHAPES, checkpoint, servers, workspace
from petal_swarm import AutoSwarmModelForCausalLM

SHAPE = "bloom-560m-blocks"
HIDDEN = SHAPES[SHAPE]["hidden_size"]
CONTEXT = 100
MAX_LENGTH = CONTEXT + 50
PARTS = (0.5, 0.95, 0.99)


def gaps_ms(model: Any, wanted: Callable[[int], bool]) -> list[float]:
    """Between the tokens of a client that decodes, while `wanted(gaps so far)`."""
    row = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1))
    gaps: list[float] = []
    with model.inference_session(max_length=MAX_LENGTH) as session:
        session.step(row.repeat(CONTEXT, 1), [CONTEXT])
        session.step(row, [1])
        before = time.perf_counter()
        while wanted(len(gaps)):
            if session.position == MAX_LENGTH:
                session.truncate([CONTEXT])  # or its own context, not the prompt, would lengthen the gaps
            session.step(row, [1])
            now = time.perf_counter()
            gaps.append((now - before) * 1e3)
            before = now
    return gaps


class Prefiller:
    """The other client: a process that sends a prompt whenever it is told to."""

    def __init__(self, path: Path, address: str, prompt: int) -> None:
        command = [sys.executable, "-m", "benchmarks.fairness", "--prefill-at", str(path), address]
        self._process = subprocess.Popen(
            [*command, "--prompt", str(prompt)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._line()

    def start(self) -> None:
        """Send the prompt."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)

    @property
    def busy(self) -> bool:
        assert self._process.stdout is not None
        return not select.select([self._process.stdout], [], [], 0)[0]

    def took_s(self) -> float:
        """How long the prompt took, from the first row sent to the last row's answer."""
        return float(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def prefill(path: str, address: str, prompt: int) -> None:
    """What the other process does."""
    rows = torch.randn(prompt, HIDDEN, generator=torch.Generator().manual_seed(2))
    # The same prompt again is to be computed again.
    with AutoSwarmModelForCausalLM.from_pretrained(
        path, initial_peers=[address], progress=False, share_prefixes=False
    ) as model:
        print("ready", flush=True)
        for _ in sys.stdin:
            with model.inference_session(max_length=prompt + 1) as session:
                session.step(rows[:1], [1])
                session.truncate([0])
                started = time.perf_counter()
                session.step(rows, [prompt])
                print(time.perf_counter() - started, flush=True)


def measure(model: Any, other: Prefiller, tokens: int, rounds: int) -> dict[str, list[list[float]]]:
    """For each round: gaps without and with the prompt, and what it took without and with them."""
    results: dict[str, list[list[float]]] = {"unloaded": [], "loaded": [], "alone": [], "beside": []}
    gaps_ms(model, lambda count: count < 20)
    for _ in range(rounds):
        results["unloaded"].append(gaps_ms(model, lambda count: count < tokens))
        other.start()
        results["alone"].append([other.took_s()])
        other.start()
        results["loaded"].append(gaps_ms(model, lambda _: other.busy))
        results["beside"].append([other.took_s()])
    return results


def report(results: dict[str, list[list[float]]], prompt: int) -> None:
    for name in ("unloaded", "loaded"):
        gaps = [gap for each in results[name] for gap in each]
        p50, p95, p99 = (percentile(gaps, part) for part in PARTS)
        print(f"{name}: {len(gaps)} gaps, p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f} ms")
    pairs = list(zip(results["loaded"], results["unloaded"], strict=True))
    ratios = [
        statistics.median(percentile(loaded, part) / percentile(free, part) for loaded, free in pairs)
        for part in PARTS
    ]
    print("loaded / unloaded, medians of rounds: p50 {:.2f}, p95 {:.2f}, p99 {:.2f}".format(*ratios))
    alone, beside = (statistics.median(each[0] for each in results[name]) for name in ("alone", "beside"))
    print(f"{prompt} tokens of prompt: {alone:.1f} s alone, {beside:.1f} s beside the decoding client")


def percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--prompt", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill-at", nargs=2, metavar=("MODEL", "ADDRESS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.prefill_at:
        model, address = arguments.prefill_at
        prefill(model, address, arguments.prompt)
        return
    options = ("--threads", "1", "--dtype", "bfloat16", "--quant", "none", "--kv-tokens", "16384")
    with workspace() as folder:
        path = checkpoint(SHAPE, folder)
        with (
            servers(path, ["0:12", "12:24"], *options) as running,
            AutoSwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=[running[0].address], progress=False
            ) as model,
        ):
            other = Prefiller(path, running[0].address, arguments.prompt)
            try:
                results = measure(model, other, arguments.tokens, arguments.rounds)
            finally:
                other.close()
    report(results, arguments.prompt)


if __name__ == "__main__":
    main()
