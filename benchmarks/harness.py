"""What the benchmarks share: random checkpoints of a given shape, server processes, medians."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BloomConfig, BloomForCausalLM

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0

SHAPES = {
    "tiny": {"hidden_size": 64, "n_layer": 8, "n_head": 4, "vocab_size": 1000},
    "bloom-560m": {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250_880},
    # Its blocks, which is all that servers see: embeddings and head belong to the clients' machines.
    "bloom-560m-blocks": {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 1000},
}


@dataclass(frozen=True)
class RunningServer:
    """A `run_server` process and the address that it printed."""

    process: subprocess.Popen[str]
    address: str
    ready_s: float


def checkpoint(shape: str, folder: Path) -> Path:
    """A BLOOM of random weights; scaled up, since at their initial scale blocks hardly change anything."""
    path = folder / shape
    torch.manual_seed(2)
    model = BloomForCausalLM(BloomConfig(**SHAPES[shape])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "word_embeddings" not in name:
                parameter.mul_(15.0)
    model.save_pretrained(path)
    return path


def reference(path: Path) -> BloomForCausalLM:
    """The same model in transformers, float32."""
    return BloomForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@contextlib.contextmanager
def servers(model: Path | str, spans: Sequence[str], *options: str) -> Iterator[list[RunningServer]]:
    """One `run_server` process for each span, on loopback; all are gone afterwards.

    Weights are plain unless `options` say otherwise: the tokens must be those of transformers.
    """
    running: list[RunningServer] = []
    try:
        for index, span in enumerate(spans):
            joined = [running[0].address] if running else []
            running.append(start_server(model, span, joined, "--name", f"server-{index}", *options))
        yield running
    finally:
        for server in running:
            server.process.send_signal(signal.SIGTERM)
        for server in running:
            try:
                server.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(server.process.pid, signal.SIGKILL)
            assert server.process.stdout is not None
            server.process.stdout.close()


def start_server(
    model: Path | str, span: str, initial_peers: Sequence[str], *options: str, port: int = 0
) -> RunningServer:
    """A `run_server` process on loopback that is ready; without initial peers it starts a swarm."""
    join = ["--initial-peers", *initial_peers] if initial_peers else ["--new-swarm"]
    command = [sys.executable, "-m", "petal_swarm.cli.run_server", str(model), *join]
    command += ["--blocks", span, "--quant", "none", *options, "--listen", f"/ip4/127.0.0.1/tcp/{port}"]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], READY_TIMEOUT_S)
    line = process.stdout.readline() if ready else ""
    if not line.startswith("ready "):
        os.killpg(process.pid, signal.SIGKILL)
        raise SystemExit(f"a server did not start: {' '.join(command)}")
    return RunningServer(process, line.split()[1], time.perf_counter() - started)


def interleaved(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each measure once a round, so that a machine whose speed drifts treats them alike."""
    results: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            results[name].append(measure())
    return results


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder for checkpoints."""
    with tempfile.TemporaryDirectory(prefix="petal-swarm-benchmark-") as folder:
        yield Path(folder)
