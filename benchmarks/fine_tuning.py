"""LoRA through a swarm against the same run with peft in one process: the losses of every step.

    python -m benchmarks.fine_tuning MODEL [--steps 200] [--servers 3] [--batch-size 4] [--control]

MODEL is a GGUF file that transformers can read, such as the one that scripts/fetch-model gets. Both runs
have the same text, initial adapter, optimizer, dtype (float32) and batches.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.harness import servers
from benchmarks.perplexity import text_tokens
from petal_swarm import AutoSwarmModelForCausalLM, Lora
from petal_swarm.models.checkpoint import open_checkpoint


def batches(ids: torch.Tensor, batch_size: int, tokens: int) -> Iterator[torch.Tensor]:
    """Windows of the text, one after the other, from the start again at its end."""
    windows = ids[: len(ids) // tokens * tokens].view(-1, tokens)
    order = itertools.cycle(range(0, len(windows) - batch_size + 1, batch_size))
    return (windows[start : start + batch_size] for start in order)


def train(
    model: Any, ids: torch.Tensor, arguments: argparse.Namespace, name: str, *, turned: bool = False
) -> tuple[list[float], float]:
    """The loss of each step, and seconds a step; `turned` takes the sequences of each batch last to first."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate)
    every = itertools.islice(batches(ids, arguments.batch_size, arguments.tokens), arguments.steps)
    losses = []
    started = time.perf_counter()
    with tqdm(every, total=arguments.steps, desc=name, disable=not sys.stderr.isatty()) as bar:
        for batch in bar:
            optimizer.zero_grad()
            given = batch.flip(0) if turned else batch
            loss = model(input_ids=given, labels=given).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, (time.perf_counter() - started) / arguments.steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--control", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.model
    ids = text_tokens(str(path), arguments.steps * arguments.batch_size * arguments.tokens // 4)
    blocks = open_checkpoint(str(path)).config.num_blocks
    share = -(-blocks // arguments.servers)
    spans = [f"{start}:{min(start + share, blocks)}" for start in range(0, blocks, share)]

    with tempfile.TemporaryDirectory(prefix="petal-swarm-benchmark-") as folder:
        with (
            servers(path, spans, "--dtype", "float32", "--threads", str(arguments.threads)) as running,
            AutoSwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=[running[0].address], progress=False
            ) as swarm,
        ):
            torch.manual_seed(0)
            swarm.add_adapter(Lora(rank=8, alpha=16, targets=("q_proj", "v_proj")))
            swarm.save_pretrained(folder)
            ours, our_s = train(swarm, ids, arguments, f"swarm of {arguments.servers}")
        theirs, their_s = train(with_peft(path, folder), ids, arguments, "peft")
        again: list[float] = []
        if arguments.control:
            again, _ = train(with_peft(path, folder), ids, arguments, "peft, turned", turned=True)
    last = min(10, len(theirs))
    print(f"loss: {theirs[0]:.4f} at first, {sum(theirs[-last:]) / last:.4f} over the last {last} steps")
    print(f"swarm against peft: {differences(ours, theirs)}")
    if again:
        print(f"peft against peft:  {differences(again, theirs)}")
    print(f"seconds a step: swarm {our_s:.2f}, peft {their_s:.2f}")


def with_peft(path: Path, adapter: str) -> Any:
    """The model in this process, with the adapter to be trained."""
    local = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return PeftModel.from_pretrained(local, adapter, is_trainable=True)


def differences(ours: list[float], theirs: list[float]) -> str:
    """The largest difference of the losses, and where they first differ by so much."""
    found = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    firsts = [
        f"over {bound:g} from step {next(step for step, value in enumerate(found) if value > bound)}"
        for bound in (1e-5, 1e-4, 1e-3)
        if max(found) > bound
    ]
    return f"largest difference {max(found):.1e}, at step {found.index(max(found))}; {', '.join(firsts)}"


if __name__ == "__main__":
    main()
