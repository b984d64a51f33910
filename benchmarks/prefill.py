"""Time to first token of a long prompt through two servers: whole, in the chosen chunks, in others.

    python -m benchmarks.prefill [--tokens 2048] [--rounds 3] [--chunks 64 128 256 512 1024]

bloom-560m's shape, bfloat16, two servers of one thread each, on loopback. From hidden states to the
last row of hidden states: embeddings and LM head are the client's, and the same in all cases. Every
measurement is a session of its own with inputs of its own. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.harness import checkpoint, interleaved, median_ratio, servers, workspace
from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.routing import choose_chunk, stages_of

HIDDEN = 1024
ROW_BYTES = 2 * HIDDEN
SERVER_OPTIONS = ("--threads", "1", "--dtype", "bfloat16", "--quant", "none", "--kv-tokens", "8192")


def prefill_s(model: SwarmModelForCausalLM, tokens: int, chunk: int | None) -> float:
    """Seconds from the first chunk's departure to the last row's arrival; the session is open already."""
    swarm = model._swarm
    swarm.config = dataclasses.replace(swarm.config, prefill_chunk_tokens=chunk)
    with model.open_session(max_length=tokens + 16) as session:
        session.step(torch.randn(1, HIDDEN), [1])
        session.truncate([0])
        hidden = torch.randn(tokens, HIDDEN)
        started = time.perf_counter()
        session.step(hidden, [tokens])
        return time.perf_counter() - started


def chosen_chunk(model: SwarmModelForCausalLM, tokens: int) -> int:
    """What the client chooses with the figures that the servers announce now."""
    with model.open_session(max_length=tokens) as session:
        session.step(torch.randn(1, HIDDEN), [1])
        assert session.route is not None
        for hop in session.route.hops:
            print(f"  {hop}: {hop.step_s * 1e3:.1f} ms a step + {hop.token_s * 1e3:.3f} ms a token")
        return choose_chunk(tokens, stages_of(session.route.hops, ROW_BYTES), limit=2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, nargs="*", default=[64, 128, 256, 512, 1024])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with workspace() as folder:
        path = checkpoint("bloom-560m", folder)
        with (
            servers(path, ["0:12", "12:24"], *SERVER_OPTIONS) as running,
            AutoSwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=[running[0].address], progress=False
            ) as model,
        ):
            print(f"chosen before the first prompt: {chosen_chunk(model, arguments.tokens)} tokens")
            cases: dict[str, int | None] = {"whole": arguments.tokens, "chosen": None}
            cases |= {f"{size} tokens": size for size in arguments.chunks}
            measures: dict[str, Callable[[], float]] = {
                name: lambda size=size: prefill_s(model, arguments.tokens, size)  # type: ignore[misc]
                for name, size in cases.items()
            }
            measures["chosen"](), measures["whole"]()
            results = interleaved(measures, arguments.rounds)
            print(f"chosen after the last prompt: {chosen_chunk(model, arguments.tokens)} tokens")
    for name, values in results.items():
        ratio = median_ratio(values, results["whole"])
        spread = f"({min(values):.2f} to {max(values):.2f})"
        print(f"{name}: {statistics.median(values):.2f} s {spread}, {ratio:.3f} of whole")


if __name__ == "__main__":
    main()
