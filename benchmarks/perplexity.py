"""Perplexity of a model on Python's own documentation, with plain and with quantized weights.

    python -m benchmarks.perplexity MODEL [--tokens 20480] [--window 1024] [--quants int8,nf4]

Everything happens in this process: the blocks of a server and the ends of a client, float32.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import sys
import time
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from petal_swarm.models.checkpoint import Checkpoint, open_checkpoint
from petal_swarm.models.ends import Ends, load_ends
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.quantization import QUANTS, Quant
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.models.tokenizer import load_tokenizer
from petal_swarm.span import Span


def text_tokens(model: str, count: int) -> Tensor:
    """The first `count` tokens of the topics of `help()`, in alphabetical order."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = load_tokenizer(model)(text, verbose=False)["input_ids"]
    if len(ids) < count:
        raise SystemExit(f"there are only {len(ids)} tokens of text")
    return torch.tensor(ids[:count])


@torch.inference_mode()
def losses(stack: BlockStack, ends: Ends, ids: Tensor, window: int, bar: tqdm[None]) -> list[float]:
    """Mean loss of each window, in nats a token."""
    pool = KVPool.allocate(stack.config, stack.span, window, stack.dtype, "cpu")
    found = []
    for part in ids.split(window):
        batch = PackedBatch.build([PackedSlice(0, len(part), 0, ((0, len(part)),))])
        logits = ends.logits(stack.forward(ends.embed(part), batch, pool, stack.span))
        found.append(F.cross_entropy(logits[:-1], part[1:]).item())
        bar.update(len(part))
    return found


def measure(
    checkpoint: Checkpoint, ends: Ends, ids: Tensor, window: int, quant: Quant
) -> tuple[list[float], int]:
    """The losses, and the memory of the blocks in bytes."""
    stack = load_blocks(checkpoint, Span(0, checkpoint.config.num_blocks), dtype=torch.float32, quant=quant)
    with tqdm(total=len(ids), desc=quant, unit="tok", leave=False, disable=not sys.stderr.isatty()) as bar:
        return losses(stack, ends, ids, window, bar), stack.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--quants", default="int8,nf4")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quants = arguments.quants.split(",")
    if not set(quants) <= set(QUANTS):
        raise SystemExit(f"--quants must be of {', '.join(QUANTS)}")
    ids = text_tokens(arguments.model, arguments.tokens)
    checkpoint = open_checkpoint(arguments.model)
    ends = load_ends(checkpoint, dtype=torch.float32)
    print(f"{checkpoint.name}, {len(ids)} tokens in windows of {arguments.window}")
    plain: list[float] = []
    plain_bytes = 0
    for quant in ["none", *quants]:
        started = time.perf_counter()
        found, nbytes = measure(checkpoint, ends, ids, arguments.window, cast(Quant, quant))
        if quant == "none":
            plain, plain_bytes = found, nbytes
        differences = torch.tensor(found) - torch.tensor(plain)
        mean = sum(found) / len(found)
        change = math.expm1(float(differences.mean()))
        spread = float(differences.std()) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        print(
            f"{quant:5} perplexity {math.exp(mean):.4f} ({change:+.3%} +- {spread:.3%}),"
            f" blocks {nbytes / plain_bytes:.3f} of float32, {time.perf_counter() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
