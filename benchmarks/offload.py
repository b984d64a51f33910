"""All blocks of a model with memory for half of them: here, and in accelerate, in the same run.

    python -m benchmarks.offload [--shape bloom-560m] [--offload disk cpu] [--threads 1] [--cold]
    python -m benchmarks.offload --device cuda --offload cpu disk

Blocks have random weights. accelerate gets the same ones as a transformers model: half of the blocks on the
device and the others offloaded ("half"), and all of them offloaded, which is what its `disk_offload` and
`cpu_offload` do ("all"). Steps of all take turns; times are medians. On a CPU both sides read files through
the system's page cache, which holds all of them if there is the memory; with --cold it is emptied before
every step, so that both read from the disk. accelerate has no offload to memory on a CPU: nothing moves, and
it is not compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.gpu import SHAPES, save_blocks
from benchmarks.harness import workspace
from petal_swarm.models.checkpoint import Checkpoint, open_checkpoint
from petal_swarm.models.devices import wait_for
from petal_swarm.models.offload import Residence
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.stack import load_blocks
from petal_swarm.server.capacity import device_name
from petal_swarm.server.hardware import resolve_device
from petal_swarm.span import Span
from petal_swarm.wire.tensors import DTYPES

CONTEXT = 100
TOLERANCE = {torch.float32: 1e-5}


@dataclass
class Contender:
    """`decode` computes one token behind a context, `prefill` a prompt; both return the last hidden state."""

    name: str
    decode: Callable[[], Tensor]
    prefill: Callable[[], Tensor]
    folder: Path | None = None
    took_s: dict[str, list[float]] = field(default_factory=lambda: {"decode": [], "prefill": []})


class Inputs:
    """What goes into block 0: a context, the token behind it, and a prompt."""

    def __init__(self, width: int, prompt: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(CONTEXT + 1 + prompt, width, generator=generator)
        self.context, self.token, self.prompt = rows.to(dtype).to(device).split([CONTEXT, 1, prompt])


def ours(
    name: str, checkpoint: Checkpoint, inputs: Inputs, device: torch.device, residence: Residence | None
) -> Contender:
    span, dtype = Span(0, checkpoint.config.num_blocks), inputs.token.dtype
    stack = load_blocks(checkpoint, span, dtype=dtype, device=device, residence=residence)
    room = CONTEXT + 1 + len(inputs.prompt)
    pool = KVPool.allocate(checkpoint.config, span, room, dtype, device)

    def step(hidden: Tensor, position: int, first: int) -> Tensor:
        end = position + len(hidden)
        batch = PackedBatch.build([PackedSlice(0, len(hidden), position, ((first, first + end),))], device)
        return stack.forward(hidden, batch, pool, span)[-1]

    step(inputs.context, 0, 0)
    return Contender(
        name,
        lambda: step(inputs.token, CONTEXT, 0),
        lambda: step(inputs.prompt, 0, CONTEXT + 1),
        None if residence is None else residence.folder,
    )


def theirs(
    name: str,
    checkpoint: Checkpoint,
    inputs: Inputs,
    device: torch.device,
    kept: int,
    offload: str,
    folder: Path,
) -> Contender:
    """transformers' model with accelerate's hooks: `kept` blocks on the device, the others offloaded."""
    from accelerate import dispatch_model

    count, dtype = checkpoint.config.num_blocks, inputs.token.dtype
    config = transformers.AutoConfig.from_pretrained(checkpoint.source)
    model: Any = transformers.BloomModel(config).to(dtype).eval()
    tensors = {
        name: shape
        for block in range(count)
        for name, shape in checkpoint.family.block_tensors(checkpoint.config, block).items()
    }
    loaded = {
        key.removeprefix("transformer."): value
        for key, value in checkpoint.load(tensors, dtype=dtype).items()
    }
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected
    assert not any(name.startswith("h.") for name in missing)
    # What is around the blocks is no part of the comparison.
    model.word_embeddings_layernorm = torch.nn.Identity()
    model.ln_f = torch.nn.Identity()
    first: str | int = "cpu" if device.type == "cpu" else device.index or 0
    around = ("word_embeddings", "word_embeddings_layernorm", "ln_f")
    places: dict[str, str | int] = dict.fromkeys(around, first)
    places |= {f"h.{block}": first if block < kept else offload for block in range(count)}
    if offload in places.values():
        model = dispatch_model(
            model, places, main_device=first, offload_dir=str(folder), offload_buffers=False, force_hooks=True
        )
    cache = transformers.DynamicCache(config=config)

    def run(hidden: Tensor, past: Any) -> Tensor:
        found: Tensor = model(
            inputs_embeds=hidden[None], past_key_values=past, use_cache=True
        ).last_hidden_state
        return found[0, -1]

    def decode() -> Tensor:
        found = run(inputs.token, cache)
        cache.crop(-1)
        return found

    run(inputs.context, cache)
    return Contender(
        name, decode, lambda: run(inputs.prompt, transformers.DynamicCache(config=config)), folder
    )


def empty_page_cache(folder: Path | None) -> None:
    """Of the files in `folder`; what is mapped is let go by who maps it."""
    for path in () if folder is None else folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def measure(contenders: list[Contender], device: torch.device, rounds: int, cold: bool) -> None:
    for turn in range(rounds + 1):
        for kind in ("decode", "prefill"):
            for contender in contenders:
                if cold:
                    empty_page_cache(contender.folder)
                wait_for(device)
                started = time.perf_counter()
                getattr(contender, kind)()
                wait_for(device)
                if turn:  # the first warms up
                    contender.took_s[kind].append(time.perf_counter() - started)


def compare(contenders: list[Contender], dtype: torch.dtype) -> None:
    """All of them compute the same, or their times would mean nothing."""
    for kind in ("decode", "prefill"):
        expected, *others = (getattr(contender, kind)().float().cpu() for contender in contenders)
        for contender, found in zip(contenders[1:], others, strict=True):
            error = float((found - expected).abs().max() / expected.abs().max())
            assert error <= TOLERANCE.get(dtype, 0.05), f"{contender.name} is off by {error:.1e} in {kind}"


def report(contenders: list[Contender]) -> None:
    base = {kind: statistics.median(contenders[-1].took_s[kind]) for kind in ("decode", "prefill")}
    for contender in contenders:
        cells = []
        for kind in ("decode", "prefill"):
            median = statistics.median(contender.took_s[kind])
            cells += [f"{median * 1e3:.1f}", f"{base[kind] / median:.2f}"]
        print(f"| {contender.name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default="bloom-560m", choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--offload", nargs="+", default=["disk"], choices=("cpu", "disk"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="empty the page cache before every step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, dtype = resolve_device(arguments.device), DTYPES[arguments.dtype]
    with torch.inference_mode(), workspace() as folder:
        checkpoint = open_checkpoint(str(save_blocks(arguments.shape, folder)))
        inputs = Inputs(checkpoint.config.hidden_size, arguments.prompt, dtype, device)
        fitting = checkpoint.config.num_blocks // 2
        print(
            f"{device_name(device)}, {arguments.threads} threads, torch {torch.__version__},"
            f" {arguments.dtype}:"
        )
        print(
            f"{checkpoint.config.num_blocks} blocks of {arguments.shape}, memory for {fitting};"
            f" {'empty' if arguments.cold else 'warm'} page cache\n"
        )
        for offload in arguments.offload:
            contenders = [ours("all blocks in memory", checkpoint, inputs, device, None)]
            residence = Residence(offload, fitting, folder / "ours")
            contenders.append(ours(f"petal_swarm, {offload}", checkpoint, inputs, device, residence))
            if offload == "disk" or device.type != "cpu":
                for name, kept in (("half", fitting), ("all", 0)):
                    contenders.append(
                        theirs(
                            f"accelerate, {name} {offload}",
                            checkpoint,
                            inputs,
                            device,
                            kept,
                            offload,
                            folder / name,
                        )
                    )
            compare(contenders, dtype)
            measure(contenders, device, arguments.rounds, arguments.cold)
            last = contenders[-1].name
            print(
                f"| {offload} | decode, ms | times {last} | prefill, {arguments.prompt} tokens, ms"
                f" | times {last} |"
            )
            print("|---|---|---|---|---|")
            report(contenders)


if __name__ == "__main__":
    main()
