"""Tokens a second of clients that decode at once, on bloom-560m's blocks in bfloat16, through two servers.

    python -m benchmarks.batching [--clients 1 8 32] [--tokens 20] [--rounds 5] [--prompt 32]

Clients are sessions of one process, driven at the level of hidden states: each step sends a random row. On
one machine the head of every client would compete with the servers for its cores; in a swarm it does not.
The CPU time of that process is printed beside, to tell whether it is the bottleneck.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.harness import SHAPES, checkpoint, interleaved, median_ratio, servers, workspace
from petal_swarm import AutoSwarmModelForCausalLM

SHAPE = "bloom-560m-blocks"
HIDDEN = SHAPES[SHAPE]["hidden_size"]


class Clients:
    """`count` open sessions, each with a prompt in its cache and a thread of its own."""

    def __init__(self, model: Any, count: int, prompt: int, tokens: int) -> None:
        self._tokens = tokens
        self._prompt = prompt
        self._pool = ThreadPoolExecutor(count)
        self._sessions = [model.open_session(max_length=prompt + tokens) for _ in range(count)]
        generator = torch.Generator().manual_seed(count)
        self._rows = torch.randn(count, 1, HIDDEN, generator=generator)
        for session in self._sessions:
            session.step(torch.randn(prompt, HIDDEN, generator=generator), [prompt])
        self.cpu_share = 0.0

    def decode(self) -> float:
        """Tokens a second, all clients together; each begins behind its prompt again."""
        started, cpu = time.perf_counter(), time.process_time()
        list(self._pool.map(self._generate, self._sessions, self._rows))
        elapsed = time.perf_counter() - started
        self.cpu_share = (time.process_time() - cpu) / elapsed
        return len(self._sessions) * self._tokens / elapsed

    def _generate(self, session: Any, row: torch.Tensor) -> None:
        session.truncate([self._prompt])
        for _ in range(self._tokens):
            session.step(row, [1])

    def close(self) -> None:
        self._pool.shutdown()
        for session in self._sessions:
            session.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = ("--threads", "1", "--dtype", "bfloat16", "--quant", "none", "--kv-tokens", "16384")
    with workspace() as folder:
        path = checkpoint(SHAPE, folder)
        with (
            servers(path, ["0:12", "12:24"], *options) as running,
            AutoSwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=[running[0].address], progress=False
            ) as model,
        ):
            clients = {
                str(count): Clients(model, count, arguments.prompt, arguments.tokens)
                for count in arguments.clients
            }
            for each in clients.values():
                each.decode()
            results = interleaved({name: each.decode for name, each in clients.items()}, arguments.rounds)
            for each in clients.values():
                each.close()
    alone = next(iter(results.values()))
    for name, rates in results.items():
        print(
            f"{name} clients: {statistics.median(rates):.1f} tokens/s, {median_ratio(rates, alone):.2f} times"
            f" the first (clients' CPU: {clients[name].cpu_share:.0%} of a core)"
        )


if __name__ == "__main__":
    main()
