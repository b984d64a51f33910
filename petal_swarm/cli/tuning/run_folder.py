"""The folder of a run: the adapter as others read it, and what is needed to go on, always whole.

OUT/adapter_config.json, adapter_model.safetensors     PEFT's format
OUT/losses.csv                                         a row for each step
OUT/checkpoint/step-000120/state.json                  where the run stands, and digests of the rest
OUT/checkpoint/step-000120/tensors.safetensors         parameters and the optimizer's state
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from petal_swarm.cli.tuning.settings import TuneSettings
from petal_swarm.errors import CheckpointError, ConfigError

FORMAT = "petal-swarm-tune-1"
_TEXT = (str, type(None))
_NUMBER = (float, type(None))
STATE, TENSORS, LOSSES = "state.json", "tensors.safetensors", "losses.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run stands after `step` steps. `model` and `data` are digests of what it was made from;
    `losses` are those of all steps; `held_out_loss` and `sample` were taken before the first one.
    """

    step: int
    settings: TuneSettings
    model: str
    data: str
    losses: tuple[float, ...]
    held_out_loss: float | None
    sample: str | None


class RunFolder:
    """One run's folder; `create` it, or `open` it to go on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoints = path / "checkpoint"

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """A folder that is to be, made by `make` only.

        Raises:
            ConfigError: there is something already.
        """
        folder = cls(path)
        try:
            taken = path.exists() and any(path.iterdir())
        except OSError as error:
            raise ConfigError(f"{path} cannot be used: {error.strerror or error}") from error
        if taken:
            to_go_on = "add --resume to go on with its run, or " if folder._steps() else ""
            raise ConfigError(f"{path} exists and is not empty: {to_go_on}choose another --out")
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """
        Raises:
            ConfigError: no run was saved there.
        """
        folder = cls(path)
        if not folder._steps():
            raise ConfigError(f"there is no run to resume in {path}: leave out --resume, or correct --out")
        return folder

    def make(self) -> None:
        """Make the folder, if it is not there.

        Raises:
            ConfigError: that is not possible.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be made: {error.strerror or error}") from error

    def load(self) -> tuple[RunState, dict[str, Tensor]]:
        """The last state that was saved, and its tensors.

        Raises:
            CheckpointError: the files are damaged, or from another version.
        """
        folder = self._steps()[-1]
        try:
            stored = json.loads((folder / STATE).read_bytes())
            if not isinstance(stored, dict) or stored.get("format") != FORMAT:
                raise ConfigError("it is not of this version of petal_swarm")
            if _digest(folder / TENSORS) != stored.get("tensors"):
                raise ConfigError(f"{TENSORS} is not the file that was saved")
            return _state(stored), load_file(folder / TENSORS)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise CheckpointError(f"{folder} is damaged and cannot be resumed: {error}") from error

    def save(
        self, state: RunState, tensors: dict[str, Tensor], save_adapter: Callable[[Path], object]
    ) -> None:
        """Save all, in such a way that a crash at any moment leaves this state or the one before, whole.

        `save_adapter` writes the adapter's files into the folder it is given.

        Raises:
            ConfigError: there is no room, or no permission.
        """
        try:
            self._save_checkpoint(state, tensors)
            with self._scratch(self.path) as scratch:
                save_adapter(scratch)
                (scratch / LOSSES).write_text(_table(state.losses))
                for file in sorted(scratch.iterdir()):
                    file.replace(self.path / file.name)
        except OSError as error:
            raise ConfigError(f"the run cannot be saved in {self.path}: {error}") from error

    def _save_checkpoint(self, state: RunState, tensors: dict[str, Tensor]) -> None:
        self._checkpoints.mkdir(exist_ok=True)
        target = self._checkpoints / f"step-{state.step:06}"
        if target.exists():  # a run that was resumed, and stopped before its next step
            return
        with self._scratch(self._checkpoints) as scratch:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch / TENSORS)
            written = asdict(state) | {"settings": state.settings.to_json()}
            digest = _digest(scratch / TENSORS)
            text = json.dumps(written | {"format": FORMAT, "tensors": digest}, indent=1)
            (scratch / STATE).write_text(text)
            for file in scratch.iterdir():
                _flush(file)
            scratch.rename(target)
        _flush(self._checkpoints)
        for other in self._steps():
            if other != target:
                shutil.rmtree(other)

    @contextlib.contextmanager
    def _scratch(self, where: Path) -> Iterator[Path]:
        """A folder beside the final place, which is gone at the end unless it was renamed."""
        scratch = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=where))
        try:
            scratch.chmod(0o755)
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _steps(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        found = (path for path in self._checkpoints.glob("step-*") if path.name[5:].isdecimal())
        return sorted(found, key=lambda path: int(path.name[5:]))


def _state(stored: dict[str, Any]) -> RunState:
    losses, step = stored.get("losses"), stored.get("step", 0)
    if not isinstance(losses, list) or not all(isinstance(loss, float) for loss in losses):
        raise ConfigError("its losses are missing or damaged")
    if step != len(losses):
        raise ConfigError("its steps and losses do not fit together")
    for name, kind in (("model", str), ("data", str), ("sample", _TEXT), ("held_out_loss", _NUMBER)):
        if not isinstance(stored.get(name), kind):
            raise ConfigError(f"its field {name!r} is missing or damaged")
    return RunState(
        step=step,
        settings=TuneSettings.from_json(stored.get("settings")),
        model=stored["model"],
        data=stored["data"],
        losses=tuple(losses),
        held_out_loss=stored["held_out_loss"],
        sample=stored["sample"],
    )


def _table(losses: tuple[float, ...]) -> str:
    rows = (f"{step},{loss:.6f}" for step, loss in enumerate(losses, 1))
    return "\n".join(["step,loss", *rows, ""])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the disk hold what was written, before a name points to it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
