"""Decoding far into a context against decoding at its start, on bloom-560m's shape, through two servers.

python benchmarks/long_context.py [--threads 2] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.harness import checkpoint, interleaved, median_ratio, servers, workspace
from petal_swarm import AutoSwarmModelForCausalLM

POSITIONS = (100, 2000)
TOKENS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with workspace() as folder:
        path = checkpoint("bloom-560m", folder)
        options = ("--threads", str(arguments.threads), "--kv-tokens", "8192")
        with (
            servers(path, ["0:12", "12:24"], *options) as running,
            AutoSwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=[running[0].address], progress=False
            ) as model,
        ):
            token = model.ends.embed(torch.tensor([5]))
            sessions = {}
            for position in POSITIONS:
                sessions[position] = model.open_session(max_length=position + 1000)
                prompt = torch.randint(5, 900, (position,), generator=torch.Generator().manual_seed(1))
                sessions[position].step(model.ends.embed(prompt), [position])

            def decode(position: int) -> float:
                """Milliseconds a token, LM head included, beginning at `position` again each time."""
                session = sessions[position]
                session.truncate([position])
                started = time.perf_counter()
                for _ in range(TOKENS):
                    model.ends.logits(session.step(token, [1]))
                return (time.perf_counter() - started) / TOKENS * 1e3

            near, far = POSITIONS
            results = interleaved(
                {"near": lambda: decode(near), "far": lambda: decode(far)}, arguments.rounds + 1
            )
            for session in sessions.values():
                session.close()
    near_ms, far_ms = (values[1:] for values in results.values())
    for position, values in zip(POSITIONS, (near_ms, far_ms), strict=True):
        print(f"position {position}: {statistics.median(values):.1f} ms a token")
    print(f"ratio, median of {arguments.rounds} rounds: {median_ratio(far_ms, near_ms):.3f}")


if __name__ == "__main__":
    main()
