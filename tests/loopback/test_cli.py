"""The programs against each other: two real servers of a tiny model, and every client command."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hivemind")

from petal_swarm.cli.local_swarm import LocalSwarm, ServerProcess, wait_ready
from petal_swarm.cli.main import main
from petal_swarm.models.prompts import plain_chat
from tests.checkpoints import VOCABULARY, reference, save_bloom
from tests.cli.tokenizers_of_tests import save_words

BLOCKS = 4
KV_TOKENS = 256
NEW_TOKENS = 12
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDasaFDPtTnvLvp8pUkS1sGWUHeN2cQTneTYkjJtEw2aZ"

# hivemind finds its daemon by an old function of importlib.resources.
pytestmark = pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")


@dataclass(frozen=True)
class Swarm:
    model: Path
    first: ServerProcess
    second: ServerProcess

    @property
    def address(self) -> str:
        return self.first.address.result()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_bloom(tmp_path_factory.mktemp("cli") / "tiny-bloom", blocks=BLOCKS)
    save_words(folder, VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    """LoRA in PEFT's format, of random numbers."""
    import peft
    import torch

    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT uses what transformers has deprecated
        adapted = peft.get_peft_model(reference(model), settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    adapted.save_pretrained(model.parent / "tone")
    return model.parent / "tone"


@pytest.fixture(scope="module")
def swarm(model: Path, adapter: Path) -> Iterator[Swarm]:
    common = [str(model), "--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1", "--kv-tokens", str(KV_TOKENS)]
    common += ["--cache-dir", str(model.parent / "cache"), "--quant", "none", "--adapters", str(adapter)]
    with LocalSwarm() as servers:
        first = servers.start("first", [*common, "--new-swarm", "--blocks", "0:2", "--name", "first"])
        wait_ready([first], timeout_s=60, on_ready=lambda server: None)
        join = ["--initial-peers", first.address.result()]
        second = servers.start("second", [*common, *join, "--blocks", "2:4", "--name", "second"])
        wait_ready([second], timeout_s=60, on_ready=lambda server: None)
        yield Swarm(model, first, second)


def run(capsys: Any, *argv: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `petal-swarm`, in this process: importing torch takes seconds."""
    status = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def expected_answer(
    folder: Path, prompt: str, new_tokens: int = NEW_TOKENS, adapter: Path | None = None
) -> str:
    """What transformers says, or PEFT."""
    import peft
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    model: Any = reference(folder)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, adapter)
    answer = model.generate(input_ids=ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=1)
    return str(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))


def test_status_as_a_program_of_its_own(swarm: Swarm) -> None:
    command = ["status", str(swarm.model), "--initial-peers", swarm.address, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "petal_swarm.cli.main", *command], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["missing_blocks"] == []
    peers = [(peer["name"], peer["span"], peer["state"]) for peer in document["peers"]]
    assert peers == [("first", [0, 2], "serving"), ("second", [2, 4], "serving")]
    assert all(peer["kv_tokens"] == KV_TOKENS and peer["rtt_s"] > 0 for peer in document["peers"])


def test_status_for_people(swarm: Swarm, capsys: Any) -> None:
    status, out, _ = run(capsys, "status", swarm.model, "--initial-peers", swarm.address)
    assert status == 0
    assert f"all {BLOCKS} blocks are served" in out
    assert "adapter tone (" in out
    assert "nobody has it" not in out


@pytest.mark.parametrize("named", ["folder", "name"])
def test_generate_with_an_adapter(swarm: Swarm, adapter: Path, capsys: Any, named: str) -> None:
    prompt = "w7 w11 w13 w17"
    words = ("generate", swarm.model, prompt, "--max-new-tokens", NEW_TOKENS)
    given = adapter if named == "folder" else adapter.name
    status, out, _ = run(capsys, *words, "--adapter", given, "--initial-peers", swarm.address)
    expected = expected_answer(swarm.model, prompt, adapter=adapter).strip()
    assert (status, out.strip()) == (0, expected)
    assert expected != expected_answer(swarm.model, prompt).strip()


def test_generate_says_what_the_model_says(swarm: Swarm, capsys: Any) -> None:
    prompt = "w7 w11 w13 w17"
    status, out, err = run(
        capsys,
        *("generate", swarm.model, prompt, "--max-new-tokens", NEW_TOKENS),
        "--initial-peers",
        swarm.address,
    )
    assert (status, out.strip()) == (0, expected_answer(swarm.model, prompt).strip())
    assert "you -> first 0:2 -> second 2:4 -> you" in err
    assert f"{NEW_TOKENS} tokens, " in err


def test_chat_goes_on_as_if_all_had_been_sent_again(
    swarm: Swarm, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 w5\nw7 w11\n"))
    options = ["--max-new-tokens", 6, "--temperature", 0, "--max-length", 200]
    status, out, _ = run(capsys, "chat", swarm.model, *options, "--initial-peers", swarm.address)
    messages: list[dict[str, str]] = []
    for question, answer in zip(("w3 w5", "w7 w11"), out.splitlines(), strict=True):
        messages.append({"role": "user", "content": question})
        assert answer == expected_answer(swarm.model, plain_chat(messages), 6)
        messages.append({"role": "assistant", "content": answer})
    assert status == 0


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (
            ["run-server", "MODEL", "--new-swarm", "--blocks", "3:5"],
            "outside the model, which has blocks 0:4",
        ),
        (["run-server", "MODEL", "--initial-peers", NOBODY], "cannot join the swarm"),
        (["status", "MODEL", "--initial-peers", NOBODY], "cannot join the swarm"),
        (["generate", "MODEL", "w3", "--initial-peers", NOBODY], "cannot join the swarm"),
        (["generate", "MODEL", "w3 " * 2 * KV_TOKENS, "--initial-peers", "ADDRESS"], "KV cache"),
    ],
)
def test_what_only_the_network_can_refuse(swarm: Swarm, capsys: Any, argv: list[str], reason: str) -> None:
    names = {"MODEL": str(swarm.model), "ADDRESS": swarm.address}
    status, out, err = run(capsys, *(names.get(word, word) for word in argv))
    assert (status, out.strip()) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert reason in err


def test_sigterm_is_a_farewell(swarm: Swarm, capsys: Any) -> None:
    """The last test here: it ends the second server."""
    os.kill(swarm.second.pid, signal.SIGTERM)
    assert swarm.second.wait(10) == 0
    status, out, _ = run(capsys, "status", swarm.model, "--initial-peers", swarm.address, "--json")
    document = json.loads(out)
    assert (status, document["missing_blocks"]) == (1, [2, 3])
    assert [peer["name"] for peer in document["peers"]] == ["first"]
    status, _, err = run(capsys, "generate", swarm.model, "w3", "--wait", 0, "--initial-peers", swarm.address)
    assert status == 2
    assert "nobody serves blocks 2-3" in err
