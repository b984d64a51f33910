"""Gradients through a swarm against transformers and PEFT in one process: how far they differ.

    python -m benchmarks.gradients MODEL [--servers 1 2 4] [--kill]

MODEL is a GGUF file that transformers can read, such as the one that scripts/fetch-model gets. A batch that
is padded on the right; LoRA on every projection, a prefix, a soft prompt; float32. With `--kill` every span
has two servers, and one in use is killed after the forward. Errors are the largest difference, as a share of
the largest number.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.harness import servers
from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.peft_format import read_adapter

KINDS = {
    "LoRA": peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
    "soft prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8),
}


def batch() -> dict[str, Tensor]:
    ids = torch.randint(100, 40_000, (4, 48), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 30:] = mask[2, 7:] = mask[3, 1:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: Any, folder: Path, config: ModelConfig) -> Tensor:
    """All of them, in the order of PEFT's files."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    model.save_pretrained(str(folder))
    stored = read_adapter(folder, config)
    prompt = stored.extras.soft_prompt
    return stored.numbers if prompt is None else prompt.flatten()


def expected(path: Path, kind: str, folder: Path, config: ModelConfig) -> tuple[float, Tensor]:
    """Loss and gradients of PEFT; leaves the adapter in `folder`."""
    torch.manual_seed(4)
    local = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    made = peft.get_peft_model(local, KINDS[kind]).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.02)
    made.save_pretrained(str(folder))
    loss = made(**batch()).loss
    loss.backward()
    return loss.item(), gradients(made, folder / "theirs", config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--servers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--kill", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = arguments.model
    config = open_checkpoint(str(path)).config
    with tempfile.TemporaryDirectory(prefix="petal-swarm-benchmark-") as place:
        folders = {kind: Path(place) / kind for kind in KINDS}
        wanted = {kind: expected(path, kind, folder, config) for kind, folder in folders.items()}
        for count in arguments.servers:
            share = -(-config.num_blocks // count)
            spans = [f"{n}:{min(n + share, config.num_blocks)}" for n in range(0, config.num_blocks, share)]
            copies = 2 if arguments.kill else 1
            for kind, folder in folders.items():
                with (
                    servers(path, spans * copies, "--dtype", "float32", "--threads", "1") as running,
                    AutoSwarmModelForCausalLM.from_pretrained(
                        str(path),
                        initial_peers=[server.address for server in running],
                        progress=False,
                        training_lanes=1,
                    ) as model,
                ):
                    model.load_adapter(folder)
                    loss = model(**batch()).loss
                    if arguments.kill:
                        used = {member.peer_id for member in _members(model)}
                        victim = next(s for s in running if s.address.rpartition("/")[2] in used)
                        os.killpg(victim.process.pid, signal.SIGKILL)
                    loss.backward()
                    found = gradients(model, folder / f"ours-{count}", config)
                theirs, numbers = wanted[kind]
                error = (found - numbers).abs().max() / numbers.abs().max()
                killed = ", one killed" if arguments.kill else ""
                print(
                    f"{count} servers{killed}, {kind}: gradients {error:.1e},"
                    f" loss {abs(loss.item() - theirs):.1e}",
                    flush=True,
                )


def _members(model: Any) -> list[Any]:
    """The hops in use."""
    (pool,) = model._blocks._trainer._pools.values()
    return [member for lane in pool.lanes for member in lane.members]


if __name__ == "__main__":
    main()
