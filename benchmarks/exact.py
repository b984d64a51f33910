"""Tokens and logits of a swarm of processes against transformers in one process, float32.

    python -m benchmarks.exact [--gguf FILE] [--tokens 200]

Random BLOOM and Llama checkpoints, or a real model if a GGUF file is given; 1, 2 and 4 servers;
greedy, sampled with a seed, a left-padded batch, 4 beams. Prints what differs, and exits 1 if anything does.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import servers, workspace
from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.tokenizer import load_tokenizer
from tests.checkpoints import save_bloom, save_llama

ALLOWED = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    with workspace() as folder:
        if arguments.gguf:
            models = {arguments.gguf.stem: arguments.gguf}
        else:
            models = {"BLOOM": save_bloom(folder / "bloom"), "Llama": save_llama(folder / "llama")}
        for name, path in models.items():
            local = load_reference(path)
            for count in (1, 2, 4):
                failures += compare(name, path, local, count, arguments.tokens)
    sys.exit(1 if failures else 0)


def load_reference(path: Path) -> Any:
    if path.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def compare(name: str, path: Path, local: Any, count: int, tokens: int) -> int:
    """Run every case on `count` servers; how many differ."""
    blocks = open_checkpoint(str(path)).config.num_blocks
    cuts = [blocks * index // count for index in range(count + 1)]
    spans = [f"{start}:{end}" for start, end in itertools.pairwise(cuts)]
    with (
        servers(path, spans, "--threads", "1") as running,
        AutoSwarmModelForCausalLM.from_pretrained(
            str(path), initial_peers=[running[0].address], progress=False
        ) as model,
    ):
        ids, mask = prompts(path)
        fixed: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        one = {"input_ids": ids[2:], "attention_mask": mask[2:], **fixed}
        batch = {"input_ids": ids, "attention_mask": mask, **fixed}
        cases = {
            "greedy": {**one, "do_sample": False},
            "sampled": {**one, "do_sample": True, "top_p": 0.9},
            "left-padded batch": {**batch, "do_sample": False},
            "4 beams": {**one, "num_beams": 4, "do_sample": False},
            "4 beams, left-padded batch": {**batch, "num_beams": 4, "do_sample": False},
        }
        failures = 0
        for case, options in cases.items():
            torch.manual_seed(0)
            ours = model.generate(**options)
            torch.manual_seed(0)
            theirs = local.generate(**options)
            same = torch.equal(ours, theirs)
            failures += not same
            distinct = len(set(theirs[:, ids.shape[1] :].flatten().tolist()))
            verdict = "identical" if same else f"DIFFERS from token {first_difference(ours, theirs)}"
            print(f"{name}, {count} servers, {case}: {verdict} ({distinct} different new tokens)", flush=True)
        with torch.no_grad():
            expected = local(theirs[2:]).logits
        error = float((model(theirs[2:]).logits - expected).abs().max() / expected.abs().max())
        failures += error > ALLOWED
        print(f"{name}, {count} servers, logits: relative error {error:.1e}", flush=True)
    return failures


def prompts(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[3, width]`, left-padded but for the last, and their mask: text for a real model."""
    if path.suffix == ".gguf":
        tokenizer = load_tokenizer(str(path))
        tokenizer.padding_side = "left"
        texts = ["Bees", "The capital of France is", "Once upon a time there was a small village where"]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        return batch["input_ids"], batch["attention_mask"]
    ids = torch.randint(5, 500, (3, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :6], mask[1, :3] = 0, 0
    return ids, mask


def first_difference(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    width = min(ours.shape[1], theirs.shape[1])
    differing = (ours[:, :width] != theirs[:, :width]).any(0).nonzero()
    return int(differing[0]) if len(differing) else width


if __name__ == "__main__":
    main()
