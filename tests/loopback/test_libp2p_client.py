"""The real thing without a daemon: two `run_server` processes, and a client over py-libp2p in another."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from petal_swarm.net.swarm_key import SwarmKey

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("hivemind", "libp2p")), reason="needs hivemind and py-libp2p"
)

HERE = Path(__file__).parent
READY_S = 20
CLIENT_S = 75
SERVER = (sys.executable, "-m", "petal_swarm.cli.run_server")


def save_model(folder: Path) -> Path:
    """A random BLOOM, its blocks scaled up until its tokens depend on them: a tied head likes to repeat."""
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=4, n_head=4, vocab_size=512))
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            if parameter.dim() == 2:
                parameter.mul_(15.0)
    model.save_pretrained(folder)
    return folder


@contextmanager
def process(*command: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process in a group of its own, with what it prints to stderr in a file; both end with the block."""
    with tempfile.NamedTemporaryFile("w") as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)},
        )
        try:
            yield child, Path(errors.name)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


@contextmanager
def server(model: Path, blocks: str, *arguments: str) -> Iterator[str]:
    """A server of these blocks: its address."""
    listen = ("--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1", "--kv-tokens", "4096", "--quant", "none")
    cache = ("--cache-dir", str(model.parent / "cache"))
    with process(*SERVER, str(model), "--blocks", blocks, *listen, *cache, *arguments) as (child, errors):
        assert child.stdout is not None
        ready, _, _ = select.select([child.stdout], [], [], READY_S)
        line = child.stdout.readline() if ready else ""
        assert line.startswith("ready "), f"{line!r}; stderr: {errors.read_text()}"
        yield line.split()[1]


@pytest.mark.parametrize("private", [False, True])
def test_generates_what_transformers_does(tmp_path: Path, private: bool) -> None:
    model = save_model(tmp_path / "bloom")
    key = tmp_path / "key"
    SwarmKey.generate().save(key)
    keyed = ("--swarm-key", str(key)) if private else ()
    with ExitStack() as stack:
        address = stack.enter_context(server(model, "0:2", *keyed, "--new-swarm"))
        stack.enter_context(server(model, "2:4", *keyed, "--initial-peers", address))
        client = (sys.executable, str(HERE / "libp2p_generate.py"), str(model), address, *keyed[1:])
        child, errors = stack.enter_context(process(*client))
        try:
            output, _ = child.communicate(timeout=CLIENT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end within {CLIENT_S} s: {errors.read_text()}")
        assert (child.returncode, output) == (0, "ok\n"), errors.read_text()
