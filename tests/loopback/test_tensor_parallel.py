"""`run_server --tensor-parallel 2` as a real process: a client's answers, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("hivemind")

from petal_swarm.cli.local_swarm import LocalSwarm, wait_ready
from petal_swarm.cli.main import main
from tests.checkpoints import VOCABULARY, reference, save_llama
from tests.cli.tokenizers_of_tests import save_words

NEW_TOKENS = 8

# hivemind finds its daemon by an old function of importlib.resources.
pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")


def expected_answer(folder: Path, prompt: str) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    answer = reference(folder).generate(
        input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=1
    )
    return str(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_it_serves_and_its_ranks_die_with_it(tmp_path: Path, capsys: Any) -> None:
    model = save_llama(tmp_path / "tiny", blocks=2)
    save_words(model, VOCABULARY)
    with LocalSwarm() as servers:
        arguments = [str(model), "--new-swarm", "--tensor-parallel", "2", "--threads", "2"]
        arguments += ["--listen", "/ip4/127.0.0.1/tcp/0", "--kv-tokens", "256", "--cache-dir", "none"]
        server = servers.start("pair", arguments)
        wait_ready([server], timeout_s=100, on_ready=lambda server: None)
        prompt = "w7 w11 w13 w17"
        words = ["generate", str(model), prompt, "--max-new-tokens", str(NEW_TOKENS)]
        assert main([*words, "--initial-peers", server.address.result()]) == 0
        assert capsys.readouterr().out.strip() == expected_answer(model, prompt)
        ranks = [
            child
            for child in psutil.Process(server.pid).children()
            if "petal_swarm.engine.worker" in child.cmdline()
        ]
        assert len(ranks) == 1
        os.kill(server.pid, signal.SIGKILL)
        assert psutil.wait_procs(ranks, timeout=30)[1] == []
