"""Milliseconds a token: a loopback swarm against transformers' own `generate` in one process.

    python -m benchmarks.overhead [--shape tiny|bloom-560m] [--servers 2] [--threads 1] [--rounds 7]

Both have the same weights, dtype (float32), threads and prompt; rounds are interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.harness import SHAPES, checkpoint, interleaved, median_ratio, reference, servers, workspace
from petal_swarm import AutoSwarmModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--tokens", type=int, help="new tokens a round (default: 200, or 30 for the large shape)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = arguments.tokens or (200 if arguments.shape == "tiny" else 30)
    blocks = SHAPES[arguments.shape]["n_layer"]
    share = blocks // arguments.servers
    spans = [f"{start}:{start + share}" for start in range(0, blocks, share)]
    ids = torch.randint(5, 900, (1, 16), generator=torch.Generator().manual_seed(1))

    with workspace() as folder:
        path = checkpoint(arguments.shape, folder)
        with servers(path, spans, "--threads", str(arguments.threads)) as running:
            local = reference(path)
            with AutoSwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=[running[0].address], progress=False
            ) as model:

                def timed(candidate: object) -> float:
                    started = time.perf_counter()
                    candidate.generate(  # type: ignore[attr-defined]
                        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
                    )
                    return (time.perf_counter() - started) / tokens * 1e3

                timed(model), timed(local)
                results = interleaved(
                    {"swarm": lambda: timed(model), "transformers": lambda: timed(local)}, arguments.rounds
                )
    for name, values in results.items():
        print(f"{name}: {statistics.median(values):.3f} ms a token ({min(values):.3f} to {max(values):.3f})")
    print(f"ratio, median of {arguments.rounds} rounds: {median_ratio(*results.values()):.3f}")


if __name__ == "__main__":
    main()
