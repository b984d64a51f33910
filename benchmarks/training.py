"""Training through two servers against local autograd, and passes in flight against one at a time.

    python -m benchmarks.training [--shape tiny bloom-560m-blocks] [--rounds 5] [--lora]

Two servers of one thread each on loopback, against transformers in this process with two threads: 8 sequences
of 128 tokens, float32, from hidden states to hidden states and the gradient back to them. With `--lora` also
the gradients of LoRA, rank 8, on the attention's projections, against PEFT; its numbers change each time, as
an optimizer does it. Embeddings, LM head and loss are the client's, and left out. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from torch import Tensor

from benchmarks.harness import checkpoint, interleaved, median_ratio, reference, servers, workspace
from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.client.training.lane import Lane
from petal_swarm.models.adapter_settings import Lora

SEQUENCES, TOKENS = 8, 128
THREADS = 2
LORA: dict[str, Any] = {"rank": 8, "alpha": 16.0}
TARGETS = ("query_key_value", "dense")


def inputs(hidden_size: int) -> tuple[Tensor, Tensor]:
    """Hidden states, and the gradient of what comes out."""
    hidden = torch.randn(SEQUENCES, TOKENS, hidden_size)
    return hidden.requires_grad_(), torch.randn_like(hidden)


def timed(forward: Callable[[Tensor], Tensor], hidden_size: int) -> float:
    """Seconds of a forward and a backward."""
    hidden, gradient = inputs(hidden_size)
    started = time.perf_counter()
    forward(hidden).backward(gradient)
    return time.perf_counter() - started


class Local:
    """The blocks in transformers, in this process."""

    def __init__(self, path: Path, *, lora: bool) -> None:
        model = reference(path).requires_grad_(False)
        if lora:
            settings = peft.LoraConfig(
                r=LORA["rank"],
                lora_alpha=LORA["alpha"],
                target_modules=list(TARGETS),
                init_lora_weights=False,
            )
            model = peft.get_peft_model(model, settings).base_model.model
        self._transformer = model.transformer
        # Between them lie neither embeddings nor the final norm.
        self._transformer.word_embeddings_layernorm = torch.nn.Identity()
        self._transformer.ln_f = torch.nn.Identity()

    def __call__(self, hidden: Tensor) -> Tensor:
        output: Tensor = self._transformer(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return output


class Swarm:
    """The blocks at servers; `window` passes in flight at most, or as many as the client chooses."""

    def __init__(self, model: SwarmModelForCausalLM, window: int | None = None) -> None:
        self._model = model
        self._window = window

    def __call__(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter in self._model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1e-3 * torch.randn_like(parameter))
        return self._model.run_blocks(hidden)

    def seconds(self, hidden_size: int) -> float:
        if self._window is None:
            return timed(self, hidden_size)
        with mock.patch.object(Lane, "window", self._window):
            return timed(self, hidden_size)


def measure(shape: str, rounds: int, *, lora: bool) -> dict[str, list[float]]:
    with workspace() as folder:
        path = checkpoint(shape, folder)
        local = Local(path, lora=lora)
        size = local._transformer.config.hidden_size
        layers = local._transformer.config.n_layer
        spans = [f"0:{layers // 2}", f"{layers // 2}:{layers}"]
        with (
            servers(path, spans, "--threads", "1", "--dtype", "float32") as running,
            AutoSwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=[running[0].address], progress=False
            ) as model,
        ):
            if lora:
                model.add_adapter(Lora(**LORA, targets=TARGETS))
            chosen, single = Swarm(model), Swarm(model, window=1)
            measures: dict[str, Callable[[], float]] = {
                "local": lambda: timed(local, size),
                "swarm": lambda: chosen.seconds(size),
                "swarm, one at a time": lambda: single.seconds(size),
            }
            for each in measures.values():
                each()
            return interleaved(measures, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=["tiny", "bloom-560m-blocks"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lora", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    for shape in arguments.shape:
        results = measure(shape, arguments.rounds, lora=arguments.lora)
        print(f"{shape}{', LoRA' if arguments.lora else ''}: {SEQUENCES} x {TOKENS} tokens")
        for name, values in results.items():
            rate = SEQUENCES * TOKENS / statistics.median(values)
            # Times of local autograd by those of the case: how many times as fast it is.
            speed = median_ratio(results["local"], values)
            spread = f"{min(values):.3f} to {max(values):.3f} s"
            print(f"  {name}: {rate:.0f} tokens/s ({spread}), {speed:.2f} times local")
        gain = median_ratio(results["swarm, one at a time"], results["swarm"])
        print(f"  in flight together against one at a time: {gain:.2f} times")


if __name__ == "__main__":
    main()
