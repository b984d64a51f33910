import json
from dataclasses import replace

import pytest
import torch

from petal_swarm.cli.tuning.run_folder import RunFolder
from petal_swarm.errors import CheckpointError, ConfigError, PetalSwarmError
from tests.cli.tuning.models_of_tests import Bigrams, first_state

TENSORS = {"parameter:a": torch.arange(3.0), "step:a": torch.tensor(2.0)}


def state(step=2):
    return replace(first_state(rank=3, targets=("q_proj", "v_proj")), step=step, losses=(0.1 + 0.2,) * step)


def save(folder, step=2):
    folder.save(state(step), TENSORS, Bigrams().save_pretrained)


@pytest.fixture
def folder(tmp_path):
    made = RunFolder.create(tmp_path / "some" / "run")
    made.make()
    return made


def names(path):
    return sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_file())


def test_what_is_saved_is_loaded(folder):
    save(folder)
    loaded, tensors = RunFolder.open(folder.path).load()
    assert loaded == state()
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "parameter:a": [0.0, 1.0, 2.0],
        "step:a": 2.0,
    }


def test_the_folder_holds_the_last_state_only(folder):
    for step in (2, 3, 3):
        save(folder, step)
    assert names(folder.path) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint/step-000003/state.json",
        "checkpoint/step-000003/tensors.safetensors",
        "losses.csv",
    ]
    assert (folder.path / "losses.csv").read_text().splitlines() == [
        "step,loss",
        *(f"{n},0.300000" for n in (1, 2, 3)),
    ]


def test_steps_are_ordered_as_numbers(folder):
    """As after a crash between saving a state and removing the one before."""
    save(folder, 2)
    checkpoints = folder.path / "checkpoint"
    (checkpoints / "step-000002").rename(checkpoints / "step-1000000")
    for name in ("step-999999", "step-x", ".unfinished-abc"):
        (checkpoints / name).mkdir()
    assert folder.load()[0].step == 2
    save(folder, 3)
    assert sorted(each.name for each in checkpoints.iterdir()) == [".unfinished-abc", "step-000003", "step-x"]


def test_a_crash_while_saving_leaves_what_was_saved_before(folder):
    save(folder)

    def crash(scratch):
        (scratch / "adapter_config.json").write_text("half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.save(state(3), TENSORS, crash)
    assert (folder.path / "adapter_config.json").read_text() == "{}"
    assert folder.load()[0].step == 3
    with pytest.raises(AttributeError):
        folder.save(state(4), {"not": "a tensor"}, Bigrams().save_pretrained)
    assert folder.load()[0].step == 3
    assert not list(folder.path.rglob(".unfinished-*"))


def test_a_folder_that_is_taken_is_left_alone(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match=r"choose another --out|cannot be used"):
            RunFolder.create(taken)
    save(folder)
    with pytest.raises(ConfigError, match="add --resume"):
        RunFolder.create(folder.path)
    with pytest.raises(ConfigError, match="cannot be made"):
        RunFolder(tmp_path / "file" / "under").make()


def test_an_empty_folder_is_not_taken(tmp_path):
    RunFolder.create(tmp_path).make()


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_nothing_to_resume(tmp_path, name):
    with pytest.raises(ConfigError, match="there is no run to resume"):
        RunFolder.open(tmp_path / name)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _edit(**fields):
    def edit(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.json", _truncate),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", lambda path: path.unlink()),
        ("state.json", _edit(format="petal-swarm-tune-9")),
        ("state.json", _edit(step=5)),
        ("state.json", _edit(losses=None)),
        ("state.json", _edit(losses=["a", "b"])),
        ("state.json", _edit(model=None)),
        ("state.json", _edit(held_out_loss="low")),
        ("state.json", _edit(settings={})),
        (
            "state.json",
            lambda path: _edit(settings=json.loads(path.read_text())["settings"] | {"rank": "8"})(path),
        ),
        (
            "state.json",
            lambda path: _edit(settings=json.loads(path.read_text())["settings"] | {"rank": 0})(path),
        ),
        ("tensors.safetensors", _truncate),
        ("tensors.safetensors", _flip),
        ("tensors.safetensors", lambda path: path.unlink()),
    ],
)
def test_damage_is_told_and_nothing_is_overwritten(folder, file, damage):
    save(folder)
    path = folder.path / "checkpoint" / "step-000002" / file
    damage(path)
    before = names(folder.path)
    with pytest.raises(CheckpointError, match="step-000002 is damaged and cannot be resumed"):
        folder.load()
    assert names(folder.path) == before


def test_a_disk_that_is_full_is_one_line(folder):
    def full(scratch):
        raise OSError(28, "No space left on device")

    with pytest.raises(PetalSwarmError, match=r"cannot be saved in .*No space left"):
        folder.save(state(), TENSORS, full)
