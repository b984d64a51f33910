"""The command from its arguments to what it prints, with a model of bigrams in the place of a swarm's."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from petal_swarm.cli import tune
from petal_swarm.cli.tuning.run_folder import RunFolder
from petal_swarm.errors import NetworkError
from tests.checkpoints import save_llama
from tests.cli.tokenizers_of_tests import characters
from tests.cli.tuning.models_of_tests import VOCABULARY, Bigrams

PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDasaFDPtTnvLvp8pUkS1sGWUHeN2cQTneTYkjJtEw2aZ"
TEXT = "the bees of the hive and the hive of the bees. " * 12


class SwarmOfOne(Bigrams):
    """Generates and takes adapters as well."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.config = SimpleNamespace(max_position_embeddings=512)
        self.generation_config = SimpleNamespace(eos_token_id=None, pad_token_id=None)
        self.settings: list[Any] = []

    def add_adapter(self, settings: Any) -> None:
        self.settings.append(settings)

    def generate(self, prompt: torch.Tensor, *, max_new_tokens: int, **unused: Any) -> torch.Tensor:
        for _ in range(max_new_tokens):
            best = (self.embeddings[prompt[:, -1]] @ self.head).argmax(-1)
            prompt = torch.cat([prompt, best[:, None]], 1)
        return prompt


class Workplace:
    """Runs the command; the next model is `model`."""

    def __init__(self, checkpoint: Path, folder: Path, capsys: Any) -> None:
        self.folder = folder
        self.data = folder / "data.txt"
        self.data.write_text(TEXT)
        self.out = folder / "out"
        self.checkpoint = checkpoint
        self.model = SwarmOfOne()
        self._capsys = capsys

    def tune(self, *options: object) -> tuple[int, list[str], list[str]]:
        """Exit status, lines of stdout and of stderr."""
        self._capsys.readouterr()
        files = ["--data", self.data, "--out", self.out]
        learning = ["--max-length", 16, "--batch-size", 4, "--learning-rate", 0.1, "--held-out", 0.2]
        given = learning if "--resume" not in options else []
        words = [self.checkpoint, *files, *given, *options, "--initial-peers", PEER]
        try:
            status = tune.main([str(word) for word in words])
        except SystemExit as ended:
            status = ended.code
        captured = self._capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of two different models."""
    made = []
    for blocks in (1, 2):
        made.append(save_llama(tmp_path_factory.mktemp("model"), blocks=blocks, vocabulary=VOCABULARY))
        characters().save_pretrained(made[-1])
    return made


@pytest.fixture
def place(checkpoints: list[Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    made = Workplace(checkpoints[0], tmp_path, capsys)

    @contextlib.contextmanager
    def load(arguments: Any) -> Iterator[Any]:
        yield made.model

    monkeypatch.setattr(tune, "load_client", load)
    return made


def losses(out: Path) -> list[str]:
    return (out / "losses.csv").read_text().splitlines()[1:]


def test_a_run_shows_what_it_changed_and_saves_it(place: Workplace) -> None:
    status, out, err = place.tune("--steps", 40, "--rank", 3, "--targets", "q_proj, v_proj")
    assert status == 0
    (lora,) = place.model.settings
    assert (lora.rank, lora.alpha, lora.targets) == (3, 16.0, ("q_proj", "v_proj"))
    assert err[1].startswith("29 examples to learn, 7 held out; 2,056 parameters; 40 steps")
    assert out[0] == f"saved in {place.out}"
    words = out[1].split()
    assert words[0] == "held-out"
    assert float(words[4]) < float(words[2]) - 1
    before, after = ("\n".join(out).split(f"{name}: ")[1] for name in ("before", "after"))
    assert before.split("\nafter")[0] != after.strip()
    assert len(losses(place.out)) == 40
    assert (place.out / "adapter_config.json").exists()
    words = shlex.split(err[-1])
    assert words[:2] == ["petal-swarm", "chat"]
    assert words[words.index("--adapter") + 1] == str(place.out)


def test_ctrl_c_saves_and_says_how_to_go_on(place: Workplace) -> None:
    class Interrupted(SwarmOfOne):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.calls == 9:
                signal.raise_signal(signal.SIGINT)
            return super().forward(*args, **kwargs)

    options = ["--steps", 20, "--sample", "", "--seed", 5]
    place.tune(*options)
    expected = losses(place.out)
    place.out, place.model = place.folder / "other out", Interrupted()
    status, out, err = place.tune(*options)
    assert (status, out) == (130, [])
    done = len(losses(place.out))
    assert f"stopped after step {done} of 20, and saved; to go on:" in err
    assert 0 < done < 20
    assert f"--out '{place.out}' --resume --sample '' --initial-peers" in err[-1]

    place.model = SwarmOfOne()
    status, out, err = place.tune("--resume", "--sample", "")
    assert status == 0
    assert losses(place.out) == expected
    assert f"{20 - done} steps after {done} that are done" in err[0]
    assert place.tune("--resume")[2] == [
        f"error: the run in {place.out} has done its 20 steps: more --steps or --epochs make it go on"
    ]


def test_a_swarm_that_fails_is_one_line_and_costs_nothing(place: Workplace) -> None:
    place.model = SwarmOfOne(fail_at={10: NetworkError("all servers are gone")})
    status, out, err = place.tune("--steps", 20)
    assert (status, out) == (2, [])
    done = len(losses(place.out))
    assert err[-1].startswith(f"error: step {done + 1} failed: all servers are gone; ")
    assert RunFolder.open(place.out).load()[0].step == done


def test_conversations_are_sampled_as_conversations(place: Workplace) -> None:
    place.data = place.folder / "data.jsonl"
    messages = [{"role": "user", "content": "bees?"}, {"role": "assistant", "content": "yes"}]
    place.data.write_text(json.dumps({"messages": messages}) + "\n")
    asked = []
    for sample in ([], ["--sample", "who?"]):
        place.out = place.folder / f"out-{len(sample)}"
        status, out, err = place.tune("--steps", 1, "--max-length", 99, *sample)
        assert status == 0
        assert err[1].startswith("1 examples to learn; ")
        asked.append(out[1])
    assert asked == [f"prompt: [user]{text}[end][assistant]" for text in ("bees?", "who?")]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max-length", "1"], "--max-length must be at least 2"),
        (["--max-length", "513"], "the model was made for 512 tokens at most"),
        (["--held-out", "1"], "--held-out must be less than 1"),
        (["--held-out", "2"], "--held-out: expected a number"),
        (["--targets", ","], "--targets: expected names"),
        (["--steps", "2", "--epochs", "1"], "not allowed with"),
        (["--data", "/nowhere"], "/nowhere cannot be read"),
        (["--out", "."], "exists and is not empty"),
        (["--resume"], "there is no run to resume"),
    ],
)
def test_what_cannot_be_done_is_one_line(place: Workplace, options: list[str], reason: str) -> None:
    status, out, err = place.tune(*options)
    assert (status, out, len(err)) == (2, [], 1)
    assert reason in err[0]
    assert not place.out.exists() or not any(place.out.iterdir())


def test_a_run_of_another_model_is_not_resumed(place: Workplace, checkpoints: list[Path]) -> None:
    place.tune("--steps", 1, "--sample", "")
    place.checkpoint = checkpoints[1]
    assert "is one of another model" in place.tune("--resume")[2][0]


def test_a_damaged_run_is_left_as_it_is(place: Workplace) -> None:
    place.tune("--steps", 1, "--sample", "")
    (tensors,) = place.out.glob("checkpoint/step-*/tensors.safetensors")
    tensors.write_bytes(b"nonsense")
    status, _, err = place.tune("--resume")
    assert (status, len(err)) == (2, 1)
    assert "is damaged and cannot be resumed" in err[0]
    assert tensors.read_bytes() == b"nonsense"


def test_the_command_that_goes_on_joins_in_the_same_way() -> None:
    given = ["m", "--data", "d.txt", "--out", "o", "--initial-peers", PEER, "--transport", "libp2p"]
    command = tune.resume_command(tune.build_parser().parse_args([*given, "--swarm-key", "a key"]))
    expected = [
        "petal-swarm",
        "tune",
        "m",
        "--data",
        "d.txt",
        "--out",
        "o",
        "--resume",
        "--transport",
        "libp2p",
    ]
    assert shlex.split(command) == [*expected, "--swarm-key", "a key", "--initial-peers", PEER]
