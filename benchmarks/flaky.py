"""How fast generation is while servers keep dying, against a swarm in which none does.

python -m benchmarks.flaky [--chance 0.001] [--tokens 1024] [--runs 5]

Everything but time is real: the tokens are checked. Time is that of a virtual clock, on which a link takes
5 ms each way, a decode step 5 ms at each of three hops, and a prompt or replay 1 ms a token. Each span is
served three times. Each hop dies at each step with `--chance`; the first is seen at once, the second falls
silent, and so on in turn. 20 s later another server joins in its place.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import checkpoint, reference, workspace
from petal_swarm.client.session import InferenceSession
from petal_swarm.engine.compute import Done, InlineCompute
from petal_swarm.engine.engine import Engine
from petal_swarm.engine.steps import StepRequest
from tests.swarm.local import LocalSwarm

SPANS = ["0:3", "3:5", "5:8"]
#: With fewer, both servers of a span may be dead at once: then a client has to wait for the next one.
COPIES = 3
DECODE_S = 0.005
TOKEN_S = 0.001
REJOIN_S = 20.0


class TimedCompute(InlineCompute):
    """Computes at once, and hands over the result when hardware of the stated speed would have it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._free_at = 0.0

    def run_now(self, request: StepRequest) -> None:  # type: ignore[override]
        """Every step takes its time."""

    def submit(self, request: StepRequest, done: Done) -> None:
        loop = asyncio.get_running_loop()
        result = self.engine.run([request])[0]
        takes_s = max(DECODE_S, TOKEN_S * request.hidden.shape[0])
        self._free_at = max(loop.time(), self._free_at) + takes_s
        loop.call_at(self._free_at, done, result)


class Killer:
    """A streamer that lets hops of a session die."""

    def __init__(
        self, swarm: LocalSwarm, session: InferenceSession, chance: float, rng: random.Random
    ) -> None:
        self._swarm = swarm
        self._session = session
        self._chance = chance
        self._rng = rng
        self.deaths = 0

    def put(self, _: torch.Tensor) -> None:
        for hop in self._session.route.hops if self._session.route else ():
            if self._rng.random() < self._chance:
                self._die(hop.peer_id, str(hop.span))

    def end(self) -> None:
        pass

    def _die(self, peer_id: str, span: str) -> None:
        self.deaths += 1
        swarm = self._swarm

        def die() -> None:
            if self.deaths % 2:
                swarm.network.kill(peer_id)
            else:
                announcer = swarm.server_of(peer_id)._announcer
                assert announcer is not None
                assert announcer._task is not None
                announcer._task.cancel()
                for other in list(swarm.network._peers):
                    swarm.network.cut(peer_id, other)
            swarm.loop.call_later(REJOIN_S, lambda: swarm.loop.create_task(swarm.start_server(span)))

        swarm.loop.call_later(self._rng.uniform(0, 0.03), die)


def seconds(
    path: Path, tokens: int, chance: float, seed: int, check: Callable[[torch.Tensor, torch.Tensor], None]
):  # type: ignore[no-untyped-def]
    """Virtual seconds of one generation, and how many servers died in it."""
    rng = random.Random(seed)
    ids = torch.randint(5, 1000, (1, 16), generator=torch.Generator().manual_seed(seed))
    with LocalSwarm(path, SPANS * COPIES, seed=seed, compute=TimedCompute) as swarm:
        swarm.network.default.jitter_s = 0.0
        model = swarm.model()
        with model.open_session(max_length=tokens + 20) as session:
            killer = Killer(swarm, session, chance, rng)
            started = swarm.loop.time()
            new = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                session=session,
                streamer=killer,
            )
            took_s = swarm.loop.time() - started
    check(ids, new)
    return took_s, killer.deaths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chance", type=float, default=0.001, help="of each hop at each step")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with workspace() as folder:
        path = checkpoint("tiny", folder)
        local = reference(path)

        def check(ids: torch.Tensor, ours: torch.Tensor) -> None:
            new = arguments.tokens
            theirs = local.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            if not torch.equal(ours, theirs):
                raise SystemExit("the tokens are not those of transformers")

        ratios = []
        for seed in itertools.islice(itertools.count(), arguments.runs):
            steady_s, _ = seconds(path, arguments.tokens, 0.0, seed, check)
            flaky_s, deaths = seconds(path, arguments.tokens, arguments.chance, seed, check)
            ratios.append(steady_s / flaky_s)
            print(f"{deaths} deaths: {flaky_s:.1f} s against {steady_s:.1f} s, {ratios[-1]:.3f} of the speed")
        print(f"median {statistics.median(ratios):.3f}, worst {min(ratios):.3f}")


if __name__ == "__main__":
    main()
