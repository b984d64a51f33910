"""`petal-swarm tune` with two real servers: as a program that is interrupted, and resumed in this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hivemind")

from petal_swarm.cli.local_swarm import LocalSwarm, serve_locally
from petal_swarm.cli.main import main
from tests.checkpoints import save_llama
from tests.cli.tokenizers_of_tests import characters

STEPS = 12
TEXT = "How doth the little crocodile improve his shining tail, and pour the waters of the Nile?\n" * 6

# hivemind finds its daemon by an old function of importlib.resources.
pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("tune") / "tiny-llama", blocks=4, vocabulary=257)
    characters().save_pretrained(folder)
    (folder.parent / "data.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def swarm(model: Path) -> Iterator[LocalSwarm]:
    with serve_locally(str(model), tell=lambda line: None) as servers:
        yield servers


def command(model: Path, swarm: LocalSwarm, out: Path, *options: object) -> list[str]:
    files = ["--data", model.parent / "data.txt", "--out", out]
    return [str(word) for word in ("tune", model, *files, *options, "--initial-peers", *swarm.addresses)]


LEARNING = ["--steps", STEPS, "--max-length", 32, "--batch-size", 4, "--rank", 2, "--learning-rate", 0.01]


def losses(out: Path) -> list[float]:
    return [float(line.split(",")[1]) for line in (out / "losses.csv").read_text().splitlines()[1:]]


def interrupted(words: list[str], *, at: str) -> tuple[int, str]:
    """Status and stderr of a program that gets Ctrl-C at some line, with its whole process group."""
    process = subprocess.Popen(
        [sys.executable, "-m", "petal_swarm.cli.main", *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stderr is not None
        seen = ""
        try:
            for line in process.stderr:
                if at in line:
                    os.killpg(process.pid, signal.SIGINT)
                seen += line
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, seen


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    model: Path, swarm: LocalSwarm, tmp_path: Path, capsys: Any
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(model, swarm, whole, *LEARNING)) == 0
    shown = capsys.readouterr().out
    assert f"saved in {whole}" in shown
    assert "held-out loss: " in shown
    expected = losses(whole)
    assert expected[-1] < expected[0] - 0.05

    status, err = interrupted(command(model, swarm, parts, *LEARNING), at="step 3/")
    done = len(losses(parts))
    assert (status, f"stopped after step {done} of {STEPS}" in err) == (130, True), err
    assert 3 <= done < STEPS
    assert main(command(model, swarm, parts, "--resume")) == 0
    assert losses(parts) == pytest.approx(expected, abs=1e-5)
    assert capsys.readouterr().out.replace(str(parts), str(whole)) == shown


def test_what_was_learned_is_used_by_generate(
    model: Path, swarm: LocalSwarm, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    prompt = "How doth"
    assert main(command(model, swarm, out, *LEARNING, "--sample", prompt)) == 0
    (after,) = (line for line in capsys.readouterr().out.split("\n") if line.startswith("after:  "))
    words = ["generate", model, "--no-chat", prompt, "--max-new-tokens", 40, "--adapter", out]
    assert main([str(word) for word in (*words, "--initial-peers", *swarm.addresses)]) == 0
    generated = capsys.readouterr().out
    assert after.removeprefix("after:  ") == generated.split("\n")[0]


def test_without_servers_nothing_is_left_behind(model: Path, tmp_path: Path, capsys: Any) -> None:
    peer = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDasaFDPtTnvLvp8pUkS1sGWUHeN2cQTneTYkjJtEw2aZ"
    out = tmp_path / "out"
    words = ["tune", model, "--data", model.parent / "data.txt", "--out", out, "--initial-peers", peer]
    assert main([str(word) for word in words]) == 2
    assert "cannot join the swarm" in capsys.readouterr().err
    assert not any(out.iterdir())
