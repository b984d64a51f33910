"""Time to the first answer of a prompt whose first 1,000 tokens were sent before, against a new one.

Two servers of bloom-560m's shape. Hidden states in, last row out: the ends are the client's own.

python -m benchmarks.prefixes [--rounds 5] [--threads 1] [--dtype bfloat16] [--quant none]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.harness import checkpoint, interleaved, median_ratio, servers, workspace
from petal_swarm import AutoSwarmModelForCausalLM

SHARED, NEW = 1000, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quant", default="none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with workspace() as folder:
        path = checkpoint("bloom-560m", folder)
        options = ["--threads", str(arguments.threads), "--dtype", arguments.dtype]
        options += ["--quant", arguments.quant, "--kv-tokens", "16384"]
        with (
            servers(path, ["0:12", "12:24"], *options) as running,
            AutoSwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=[running[0].address], progress=False
            ) as model,
        ):
            generator = torch.Generator().manual_seed(1)
            hidden_size = model.config.hidden_size

            def random_rows(count: int) -> torch.Tensor:
                return torch.randn(count, hidden_size, generator=generator)

            shared = random_rows(SHARED)

            def first_answer(prefix: torch.Tensor) -> float:
                """Milliseconds from an open session to the last row of the prompt."""
                hidden = torch.cat([prefix, random_rows(NEW)])
                with model.open_session(max_length=2 * (SHARED + NEW)) as session:
                    session.step(random_rows(1), [1])  # opens the route; the prompt takes its place
                    session.truncate([0])
                    started = time.perf_counter()
                    session.step(hidden, [len(hidden)])
                    return (time.perf_counter() - started) * 1e3

            first_answer(shared)
            results = interleaved(
                {"shared": lambda: first_answer(shared), "new": lambda: first_answer(random_rows(SHARED))},
                arguments.rounds,
            )
    for name, values in results.items():
        print(f"{name}: {statistics.median(values):.1f} ms to the first answer")
    ratio = median_ratio(results["shared"], results["new"])
    print(f"ratio, median of {arguments.rounds} rounds: {ratio:.3f}")


if __name__ == "__main__":
    main()
