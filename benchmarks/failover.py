"""What it costs to lose a server in mid-generation. Real processes on loopback, each span served twice.

python -m benchmarks.failover kills [--runs 100]     tokens after a kill of the first, middle and last hop
python -m benchmarks.failover stall [--runs 10]      how long the stream of tokens stands still
python -m benchmarks.failover drain [--clients 8]    SIGTERM for a server that all clients use
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.harness import SHAPES, checkpoint, reference, workspace
from benchmarks.replicas import Replicas, Trigger, replicas
from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.client.model import SwarmModelForCausalLM

HOPS = ("first", "middle", "last")
NEW_TOKENS = 32
STALL_CONTEXT = 512


class Times:
    """A streamer that notes when each token came."""

    def __init__(self, following: Trigger | None = None) -> None:
        self.seconds: list[float] = []
        self._following = following

    def put(self, tokens: torch.Tensor) -> None:
        self.seconds.append(time.perf_counter())
        if self._following is not None:
            self._following.put(tokens)

    def end(self) -> None:
        if self._following is not None:
            self._following.end()

    def longest_gap_s(self, *, skip: int = 1) -> float:
        """Between two tokens, the first ones left out: they wait for the prompt."""
        return max(later - earlier for earlier, later in itertools.pairwise(self.seconds[skip:]))


def client(path: Path, swarm: Replicas) -> SwarmModelForCausalLM:
    return AutoSwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.addresses)


def kill_once(
    model: SwarmModelForCausalLM, swarm: Replicas, ids: torch.Tensor, hop: int, rng: random.Random, after: int
) -> tuple[torch.Tensor, float]:
    """Generate, and kill a hop after so many tokens; the tokens and the longest gap between two."""
    with model.open_session(max_length=ids.shape[1] + NEW_TOKENS + 2) as session:

        def act() -> None:
            assert session.route is not None
            hops = session.route.hops
            victim = hops[(0, len(hops) // 2, len(hops) - 1)[hop]]
            swarm.kill(victim.peer_id, daemon=rng.random() < 0.5)

        times = Times(Trigger(session, after, rng.uniform(0, 0.003), act))
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            session=session,
            streamer=times,
        )
    return tokens, times.longest_gap_s()


def kills(runs: int, seed: int) -> None:
    rng = random.Random(seed)
    with workspace() as folder:
        path = checkpoint("tiny", folder)
        local = reference(path)
        with replicas(path, ["0:3", "3:5", "5:8"], "--threads", "1") as swarm:
            model = client(path, swarm)
            gaps: list[float] = []
            for hop, name in enumerate(HOPS):
                same = 0
                for _ in range(runs):
                    ids = torch.randint(5, 1000, (1, rng.randint(4, 60)))
                    tokens, gap_s = kill_once(model, swarm, ids, hop, rng, rng.randrange(NEW_TOKENS))
                    gaps.append(gap_s)
                    theirs = local.generate(
                        ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
                    )
                    same += torch.equal(tokens, theirs)
                    swarm.restore()
                print(f"{name} hop: {same} of {runs} runs with the same tokens", flush=True)
            print(
                f"longest gap between tokens: median {statistics.median(gaps):.3f} s, worst {max(gaps):.3f} s"
            )
            model.close()


def stall(runs: int, seed: int) -> None:
    rng = random.Random(seed)
    with workspace() as folder:
        path = checkpoint("bloom-560m-blocks", folder)
        options = ("--threads", "1", "--dtype", "bfloat16")
        with replicas(path, ["0:8", "8:16", "16:24"], *options) as swarm:
            model = client(path, swarm)
            everything: list[float] = []
            for hop, name in enumerate(HOPS):
                gaps = []
                for _ in range(runs):
                    ids = torch.randint(5, SHAPES["bloom-560m-blocks"]["vocab_size"], (1, STALL_CONTEXT))
                    gaps.append(kill_once(model, swarm, ids, hop, rng, 2 + rng.randrange(8))[1])
                    swarm.restore()
                everything += gaps
                print(
                    f"{name} hop: median {statistics.median(gaps):.2f} s, worst {max(gaps):.2f} s", flush=True
                )
            print(
                f"stall at {STALL_CONTEXT} tokens: median {statistics.median(everything):.2f} s,"
                f" worst {max(everything):.2f} s"
            )
            model.close()


def drain(clients: int, shape: str, seed: int) -> None:
    torch.manual_seed(seed)
    with workspace() as folder:
        path = checkpoint(shape, folder)
        local = reference(path)
        tokens_each = 400 if shape == "tiny" else 96
        spans = ["0:3", "3:5", "5:8"] if shape == "tiny" else ["0:8", "8:16", "16:24"]
        prompts = [torch.randint(5, 1000, (1, 64)) for _ in range(clients)]
        with replicas(path, spans, "--threads", "1", "--dtype", "float32") as swarm:
            models = [client(path, swarm) for _ in prompts]
            started = threading.Barrier(clients + 1)

            def generate(index: int) -> tuple[torch.Tensor, float]:
                times = Times(Trigger(session := sessions[index], 8, 0.0, lambda: (started.wait(), None)[1]))
                ids = prompts[index]
                return (
                    models[index].generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=tokens_each,
                        min_new_tokens=tokens_each,
                        do_sample=False,
                        session=session,
                        streamer=times,
                    ),
                    times.longest_gap_s(skip=10),
                )

            sessions = [model.open_session(max_length=500) for model in models]
            with ThreadPoolExecutor(clients) as pool:
                running = [pool.submit(generate, index) for index in range(clients)]
                started.wait()
                used = [session.route.hops[1].peer_id for session in sessions if session.route]
                victim = max(set(used), key=used.count)
                begun = time.perf_counter()
                status = swarm.leave(victim)
                code = status.result()
                left_s = time.perf_counter() - begun
                results = [future.result() for future in running]
            changed = 0
            for ids, (tokens, _) in zip(prompts, results, strict=True):
                theirs = local.generate(
                    ids, max_new_tokens=tokens_each, min_new_tokens=tokens_each, do_sample=False
                )
                changed += not torch.equal(tokens, theirs)
            users = used.count(victim)
            print(
                f"{users} of {clients} clients used the server; it left after {left_s:.1f} s, status {code}"
            )
            print(f"{changed} changed, longest gap {max(gap for _, gap in results):.2f} s")
            for session, model in zip(sessions, models, strict=True):
                session.close()
                model.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("kills", "stall", "drain"))
    parser.add_argument("--runs", type=int, default=10, help="for each hop")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny", help="of the model that drains")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    measures: dict[str, Callable[[], None]] = {
        "kills": lambda: kills(arguments.runs, arguments.seed),
        "stall": lambda: stall(arguments.runs, arguments.seed),
        "drain": lambda: drain(arguments.clients, arguments.shape, arguments.seed),
    }
    measures[arguments.what]()


if __name__ == "__main__":
    main()
