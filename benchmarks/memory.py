"""Whether the memory of servers that nobody disturbs stays flat.

    python -m benchmarks.memory [--minutes 40] [--clients 6] [--sample-s 60]

Two servers of the tiny model, one thread each, and clients in threads of this process that generate without
a pause: prompts of 1 to 400 tokens, answers of 1 to 40, every fourth a batch of two. A row a sample: resident
MB of servers and daemons, open files of servers.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from benchmarks.harness import SHAPES, checkpoint, servers, workspace
from petal_swarm import AutoSwarmModelForCausalLM

SPANS = ("0:4", "4:8")


class Clients:
    """Threads that generate until `seconds` are over; `generations` counts what they have done."""

    def __init__(self, model: Any, count: int, seconds: float) -> None:
        self._model = model
        self._end_s = time.monotonic() + seconds
        self._lock = threading.Lock()
        self.generations = 0
        self._threads = [threading.Thread(target=self._generate, args=(seed,)) for seed in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _generate(self, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < self._end_s:
            shape = (chance.choice((1, 1, 1, 2)), chance.randint(1, 400))
            ids = torch.randint(0, SHAPES["tiny"]["vocab_size"], shape)
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=chance.randint(1, 40),
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
            with self._lock:
                self.generations += 1


def resident_mb(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


def sample(started_s: float, generations: int, processes: Sequence[psutil.Process]) -> str:
    cells = [f"{(time.monotonic() - started_s) / 60:5.1f} min", f"{generations:7,} generations"]
    for process in processes:
        daemons = sum(map(resident_mb, process.children()))
        cells.append(f"server {resident_mb(process):.1f}, daemon {daemons:.1f} MB, {process.num_fds()} files")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--sample-s", type=float, default=60.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with workspace() as folder:
        path = checkpoint("tiny", folder)
        with servers(path, SPANS, "--threads", "1", "--kv-tokens", "16384") as running:
            processes = [psutil.Process(server.process.pid) for server in running]
            with AutoSwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=[running[0].address]
            ) as model:
                started_s = time.monotonic()
                clients = Clients(model, arguments.clients, 60 * arguments.minutes)
                while clients.busy:
                    time.sleep(arguments.sample_s)
                    print(sample(started_s, clients.generations, processes), flush=True)


if __name__ == "__main__":
    main()
