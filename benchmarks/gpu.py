"""Steps of an engine on a GPU: tokens a second, and how much of the memory's bandwidth that uses.

    python -m benchmarks.gpu [--shapes bloom-560m bloom-176b-block] [--modes bfloat16 int8 nf4] [--plain]
    python -m benchmarks.gpu --device cpu --shapes tiny --modes float32 --seconds 0.1

A decode step has to read every weight and the keys and values of every session once. "of bandwidth" is the
time that takes at the measured speed of a copy, as a share of the time of the step, which begins and ends
with hidden states on the host, as in a server. Blocks have random weights. `--plain` leaves out kernels and
graphs of our own, to compare with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.harness import workspace
from petal_swarm.engine.engine import Engine
from petal_swarm.engine.steps import StepRequest
from petal_swarm.errors import ConfigError, PetalSwarmError
from petal_swarm.models.checkpoint import Checkpoint, open_checkpoint
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.devices import wait_for
from petal_swarm.models.families import family_of
from petal_swarm.models.kernels import permit
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.server.capacity import device_name
from petal_swarm.server.hardware import kv_bytes_per_token, resolve_device
from petal_swarm.span import Slice, Span
from petal_swarm.wire.tensors import DTYPES

SHAPES = {
    "tiny": {"hidden_size": 64, "n_layer": 4, "n_head": 4},
    "bloom-560m": {"hidden_size": 1024, "n_layer": 24, "n_head": 16},
    "bloom-176b-block": {"hidden_size": 14_336, "n_layer": 1, "n_head": 112},
}
SESSIONS = (1, 8, 32)
CHUNK_TOKENS = 512
COPY_BYTES = {"cuda": 1 << 30, "mps": 1 << 28, "cpu": 1 << 26}


def save_blocks(shape: str, folder: Path) -> Path:
    """A checkpoint without embeddings and head, of random bfloat16 weights."""
    path = folder / shape
    path.mkdir()
    hf = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "vocab_size": 100, **SHAPES[shape]}
    (path / "config.json").write_text(json.dumps(hf))
    config = ModelConfig.from_hf(hf)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for block in range(config.num_blocks):
        for name, size in family_of(config).block_tensors(config, block).items():
            tensor = torch.empty(size, dtype=torch.bfloat16)
            # Uniform numbers are drawn much faster than normal ones, and a 176B block has 2.5 billion.
            tensors[name] = tensor.uniform_(-1, 1, generator=generator).mul_(size[-1] ** -0.5)
    for kind in ("weight", "bias"):  # a part of what identifies a model
        tensors[f"{family_of(config).ends.final_norm}.{kind}"] = torch.ones(config.hidden_size)
    save_file(tensors, path / "model.safetensors")
    return path


def load(checkpoint: Checkpoint, mode: str, device: torch.device) -> BlockStack:
    options: dict[str, Any] = {} if mode in DTYPES else {"quant": mode}
    span = Span(0, checkpoint.config.num_blocks)
    dtype = DTYPES.get(mode, torch.bfloat16)
    return load_blocks(checkpoint, span, dtype=dtype, device=device, **options)


def median_s(work: Callable[[], object], seconds: float) -> float:
    """Of calls for so long, and at least three, after two to warm up."""
    work()
    work()
    took: list[float] = []
    until = time.perf_counter() + seconds
    while len(took) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes read and written in a second by a large copy on the device."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        wait_for(device)

    return 2 * source.nbytes / median_s(copy, seconds)


class Bench:
    """An engine with `sessions` open, each with a context of `context` random tokens."""

    def __init__(self, stack: BlockStack, sessions: int, context: int, kv_dtype: str) -> None:
        room = -(-(context + CHUNK_TOKENS) // 16) * 16
        self._stack = stack
        self._engine = Engine(
            stack, kv_tokens=sessions * room, max_batch_tokens=CHUNK_TOKENS, kv_dtype=kv_dtype
        )
        self._engine.quicken()
        self._hidden = torch.randn(CHUNK_TOKENS, stack.config.hidden_size).to(stack.dtype)
        self._sessions = range(sessions)
        for session in self._sessions:
            self._engine.open_session(session, max_length=context + CHUNK_TOKENS)
            for start in range(0, context, CHUNK_TOKENS):
                self._run([session], start, min(CHUNK_TOKENS, context - start))
        self._context = context

    def _run(self, sessions: Sequence[int], position: int, length: int) -> None:
        piece, hidden = Slice(0, position, length), self._hidden[:length]
        span = self._stack.span
        for result in self._engine.run([StepRequest(n, span, (piece,), hidden) for n in sessions]):
            if result.error is not None:
                raise result.error
            assert result.hidden is not None
            result.hidden.cpu()

    def decode(self) -> None:
        """A token of every session; the next call takes its place."""
        self._run(self._sessions, self._context, 1)

    def prefill(self) -> None:
        """A chunk of one session's prompt, behind the context."""
        self._run([0], self._context, CHUNK_TOKENS)


def report(
    shape: str, mode: str, stack: BlockStack, bytes_per_s: float, arguments: argparse.Namespace
) -> None:
    blocks = len(stack.span)
    for kv_dtype in arguments.kv_dtypes:
        row_bytes = kv_bytes_per_token(stack.config, stack.dtype, kv_dtype) * blocks
        for sessions in arguments.sessions:
            bench = Bench(stack, sessions, arguments.context, kv_dtype)
            took_s = median_s(bench.decode, arguments.seconds)
            moved = stack.nbytes + sessions * arguments.context * row_bytes
            print(
                f"| {shape} | {mode} | {kv_dtype} | decode, {sessions} sessions | {took_s * 1e3:.2f}"
                f" | {sessions / took_s:.0f} | {moved / 1e6:.0f} | {moved / bytes_per_s / took_s:.0%} |"
            )
        bench = Bench(stack, 1, 0, kv_dtype)
        took_s = median_s(bench.prefill, arguments.seconds)
        print(
            f"| {shape} | {mode} | {kv_dtype} | prefill, {CHUNK_TOKENS} tokens | {took_s * 1e3:.2f}"
            f" | {CHUNK_TOKENS / took_s:.0f} | | |",
            flush=True,
        )


def report_transfers(device: torch.device, seconds: float) -> None:
    """What a chunk's result costs to bring to the host, as it is done and through pinned memory."""
    print("\n| a chunk of hidden size | to the host, us | through pinned memory, us |\n|---|---|---|")
    for hidden_size in (1024, 14_336):
        found = torch.ones(CHUNK_TOKENS, hidden_size, dtype=torch.bfloat16, device=device)

        def pinned(found: torch.Tensor = found) -> None:
            torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found)

        plain_s, pinned_s = median_s(found.cpu, seconds), median_s(pinned, seconds)
        print(f"| {hidden_size} | {plain_s * 1e6:.0f} | {pinned_s * 1e6:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", "mps"))
    parser.add_argument("--shapes", nargs="+", default=["bloom-560m", "bloom-176b-block"], choices=SHAPES)
    parser.add_argument(
        "--modes", nargs="+", default=["bfloat16", "int8", "nf4"], choices=(*DTYPES, "int8", "nf4")
    )
    parser.add_argument("--kv-dtypes", nargs="+", default=["auto", "int8"], choices=("auto", "int8"))
    parser.add_argument("--sessions", type=int, nargs="+", default=SESSIONS, metavar="N")
    parser.add_argument("--context", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--plain", action="store_true", help="without kernels and graphs of our own")
    parser.add_argument("--seconds", type=float, default=1.0, help="to measure each figure for")
    arguments = parser.parse_args()
    try:
        device = resolve_device(arguments.device)
    except ConfigError as error:
        print(f"nothing measured: {error}")
        return
    if not arguments.plain:
        permit()
    with torch.inference_mode(), workspace() as folder:
        bytes_per_s = bandwidth(device, arguments.seconds)
        print(f"{device_name(device)}, torch {torch.__version__}: a copy moves {bytes_per_s / 1e9:.0f} GB/s")
        print(f"context {arguments.context} tokens{', no kernels' if arguments.plain else ''}\n")
        print("| blocks | weights | KV cache | step | ms | tokens/s | MB to move | of bandwidth |")
        print("|---|---|---|---|---|---|---|---|")
        for shape in arguments.shapes:
            checkpoint = open_checkpoint(str(save_blocks(shape, folder)))
            for mode in arguments.modes:
                try:
                    report(shape, mode, load(checkpoint, mode, device), bytes_per_s, arguments)
                except (PetalSwarmError, torch.OutOfMemoryError) as error:
                    print(f"| {shape} | {mode} | failed: {str(error).splitlines()[0]} | | | | | |")
        if device.type == "cuda":
            report_transfers(device, arguments.seconds)


if __name__ == "__main__":
    main()
