"""Before anything is learned: what is asked for, what was saved, and whether the two go together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from petal_swarm.cli.tuning.batches import Order, hold_out
from petal_swarm.cli.tuning.data import Example, read_corpus
from petal_swarm.cli.tuning.run_folder import RunFolder, RunState
from petal_swarm.cli.tuning.settings import TuneSettings
from petal_swarm.errors import ConfigError

#: More held-out examples would cost more time than they tell.
MOST_HELD_OUT = 64
#: What may differ when a run is resumed: how long it is.
LENGTHS = ("steps", "epochs")


@dataclass(frozen=True, slots=True)
class Material:
    """Examples to learn, and others that only show whether that helps; `cut` of all lost their end. `chats`:
    they are conversations.
    """

    learned: Sequence[Example]
    held_out: Sequence[Example]
    cut: int
    chats: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run that is to be started, or, with what was saved of it, to be gone on with."""

    folder: RunFolder
    data: Path
    settings: TuneSettings
    first_state: RunState
    saved: tuple[RunState, dict[str, Tensor]] | None = None

    @classmethod
    def make(cls, out: Path, data: Path, given: Mapping[str, Any], *, model: str, resume: bool) -> Plan:
        """`given` are those settings that the user chose; `model` identifies the model.

        Raises:
            ConfigError: `out` is taken, or has nothing to resume; or its run is one of another model, of
                other data or with other settings.
            CheckpointError: the run in `out` is damaged.
        """
        digest = _digest(data)
        if not resume:
            folder, settings = RunFolder.create(out), TuneSettings(**given)
            return cls(
                folder=folder, data=data, settings=settings, first_state=_first(settings, model, digest)
            )
        folder = RunFolder.open(out)
        state, tensors = folder.load()
        if state.model != model:
            raise ConfigError(f"the run in {out} is one of another model")
        if state.data != digest:
            raise ConfigError(f"{data} is not, or not any more, what the run in {out} learns from")
        settings = _merged(state.settings, given)
        state = replace(state, settings=settings)
        return cls(folder=folder, data=data, settings=settings, first_state=state, saved=(state, tensors))

    def read(self, tokenizer: Any) -> Material:
        """The examples.

        Raises:
            ConfigError: the data is wrong, or the run has learned all that it was to learn.
        """
        settings = self.settings
        corpus = read_corpus(self.data, tokenizer, max_length=settings.max_length)
        learned, held_out = hold_out(
            corpus.examples, settings.held_out, seed=settings.seed, at_most=MOST_HELD_OUT
        )
        steps = settings.total_steps(Order(len(learned), settings.batch_size, settings.seed).steps_per_epoch)
        if self.saved is not None and self.first_state.step >= steps:
            raise ConfigError(
                f"the run in {self.folder.path} has done its {self.first_state.step} steps: more --steps or"
                " --epochs make it go on"
            )
        return Material(learned, held_out, corpus.cut, corpus.chats)


def _first(settings: TuneSettings, model: str, data: str) -> RunState:
    return RunState(
        step=0, settings=settings, model=model, data=data, losses=(), held_out_loss=None, sample=None
    )


def _merged(saved: TuneSettings, given: Mapping[str, Any]) -> TuneSettings:
    for name, value in given.items():
        if name not in LENGTHS and getattr(saved, name) != value:
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"the run was started with {option} {_shown(getattr(saved, name))}, not {_shown(value)}:"
                " it can only be resumed as it is"
            )
    lengths = {name: given[name] for name in LENGTHS if name in given}
    if "epochs" in lengths:
        lengths["steps"] = None
    return replace(saved, **lengths)


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else f"{value}"


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
