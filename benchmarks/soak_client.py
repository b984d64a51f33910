"""One client of a soak: it generates and chats without end, and compares every token with transformers'.

As a process of its own, over the transport that is asked for:

python -m benchmarks.soak_client MODEL SECONDS SEED TRANSPORT ADDRESS [ADDRESS ...]

It prints one JSON object for each generation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BloomForCausalLM, LogitsProcessor, LogitsProcessorList

from benchmarks.harness import SHAPES, reference
from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.client.session import InferenceSession

VOCABULARY = SHAPES["tiny"]["vocab_size"]
MAX_PROMPT = 300
MAX_CALLS = 4
MAX_PAUSE_S = 8.0
KINDS = ("greedy", "greedy", "sampled", "sampled", "beams", "drafts")


@dataclass(frozen=True)
class Outcome:
    """One call of `generate`. `began_s` and `ended_s` are of `time.monotonic`."""

    kind: str
    prompt: int
    new: int
    began_s: float
    ended_s: float
    exact: bool
    repairs: int
    #: Why there are no tokens, or where they differ.
    failure: str = ""


class Perturb(LogitsProcessor):  # type: ignore[misc]
    """Sampling with random numbers of its own: those of torch belong to all threads together."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.rand(scores.shape, generator=self._generator).clamp(min=1e-9)
        return scores - torch.log(-torch.log(uniform))


class Client:
    """Chats of random shape that follow from a seed, each in a session of its own."""

    def __init__(
        self,
        model: SwarmModelForCausalLM,
        local: BloomForCausalLM,
        seed: int,
        tell: Callable[[Outcome], None],
    ) -> None:
        self._model = model
        self._local = local
        self._rng = random.Random(seed)
        self._tell = tell
        self._session: InferenceSession | None = None

    @property
    def peers(self) -> set[str]:
        """Whom it uses now."""
        route = self._session.route if self._session else None
        return {hop.peer_id for hop in route.hops} if route else set()

    def run(self, ended: threading.Event) -> None:
        """Chat until told to end."""
        while not ended.is_set():
            self._chat(ended)

    def _chat(self, ended: threading.Event) -> None:
        kind = self._rng.choice(KINDS)
        calls = 1 if kind == "beams" else self._rng.choice((1, 1, 2, MAX_CALLS))
        held = torch.zeros(1, 0, dtype=torch.long)
        with self._model.open_session(max_length=MAX_PROMPT * 2 + 64 * MAX_CALLS) as session:
            self._session = session
            for call in range(calls):
                longest = self._rng.choice((20, MAX_PROMPT)) if call == 0 else 60
                new = torch.tensor(
                    [[self._rng.randrange(5, VOCABULARY) for _ in range(self._rng.randint(1, longest))]]
                )
                tokens = self._generate(session, kind, held, new)
                if tokens is None or ended.is_set():
                    return
                held = torch.cat([held, tokens], 1)
                if call + 1 < calls and ended.wait(self._rng.choice((0.0, 0.5, MAX_PAUSE_S))):
                    return

    def _generate(
        self, session: InferenceSession, kind: str, held: torch.Tensor, new: torch.Tensor
    ) -> torch.Tensor | None:
        """One call; the new tokens behind their prompt, or None if they are not to be had."""
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": self._rng.choice((8, 32, 64))}
        if kind == "beams":
            options["num_beams"] = 3
        seed = self._rng.randrange(1 << 30)
        began_s = time.monotonic()
        repairs = session._ring.repairs if session._ring else 0
        drafts = {"prompt_lookup_num_tokens": 4} if kind == "drafts" else {}
        tokens, failure = None, ""
        try:
            tokens = self._model.generate(
                new,
                attention_mask=torch.ones_like(new),
                session=session,
                **options,
                **drafts,
                **_processors(kind, seed),
            )
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        ended_s = time.monotonic()
        if tokens is not None:
            ids = torch.cat([held, new], 1)
            theirs = self._local.generate(
                ids, attention_mask=torch.ones_like(ids), **options, **_processors(kind, seed)
            )
            failure = self._difference(theirs[:, held.shape[1] :], tokens, theirs)
        self._tell(
            Outcome(
                kind=kind,
                prompt=held.shape[1] + new.shape[1],
                new=0 if tokens is None else tokens.shape[1] - new.shape[1],
                began_s=began_s,
                ended_s=ended_s,
                exact=tokens is not None and not failure,
                repairs=(session._ring.repairs if session._ring else 0) - repairs,
                failure=failure,
            )
        )
        return None if failure else tokens

    def _difference(self, theirs: torch.Tensor, ours: torch.Tensor, whole: torch.Tensor) -> str:
        """Where the tokens begin to differ, and by how much transformers preferred its own; else nothing."""
        if torch.equal(theirs, ours):
            return ""
        common = min(theirs.shape[1], ours.shape[1])
        differs = (theirs[0, :common] != ours[0, :common]).nonzero()
        at = int(differs[0]) if len(differs) else common
        end = whole.shape[1] - theirs.shape[1] + at
        with torch.no_grad():
            best = self._local(whole[:, :end]).logits[0, -1].topk(2).values
        return f"differs at token {at} of {theirs.shape[1]}; the best logits there are {best.tolist()}"


def _processors(kind: str, seed: int) -> dict[str, Any]:
    return {"logits_processor": LogitsProcessorList([Perturb(seed)])} if kind == "sampled" else {}


def connect(path: Path, addresses: Sequence[str], *, transport: str = "auto") -> SwarmModelForCausalLM:
    """A client model of the swarm."""
    return AutoSwarmModelForCausalLM.from_pretrained(
        str(path), initial_peers=addresses, transport=transport, progress=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("transport")
    parser.add_argument("addresses", nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ended = threading.Event()
    threading.Timer(arguments.seconds, ended.set).start()

    def tell(outcome: Outcome) -> None:
        print(json.dumps(dataclasses.asdict(outcome)), flush=True)

    with connect(arguments.model, arguments.addresses, transport=arguments.transport) as model:
        Client(model, reference(arguments.model), arguments.seed, tell).run(ended)


if __name__ == "__main__":
    main()
