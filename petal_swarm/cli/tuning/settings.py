"""What a run of `petal-swarm tune` is told, as far as its result depends on it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from petal_swarm.errors import ConfigError

#: Share of the steps in which the learning rate grows to its full value.
WARM_UP = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """`steps` None: as many as `epochs` passes over the examples take."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all-linear",)
    learning_rate: float = 3e-4
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 8
    max_length: int = 256
    seed: int = 0
    held_out: float = 0.05

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "learning_rate", "epochs", "batch_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be more than 0")
        if self.max_length < 2:
            raise ConfigError("--max-length must be at least 2: a token is predicted from those before it")
        if self.held_out >= 1:
            raise ConfigError("--held-out must be less than 1: something must be left to learn")

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps or max(1, math.ceil(self.epochs * steps_per_epoch))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Any) -> TuneSettings:
        """
        Raises:
            ConfigError: these are no settings of this version.
        """
        if not isinstance(stored, dict) or set(stored) != {field.name for field in dataclasses.fields(cls)}:
            raise ConfigError("the settings are not those of this version of petal_swarm")
        for field in dataclasses.fields(cls):
            if not isinstance(stored[field.name], _JSON_TYPES[field.name]):
                raise ConfigError(f"the setting {field.name} is damaged: {stored[field.name]!r}")
        return cls(**stored | {"targets": tuple(stored["targets"])})


_NUMBER = (int, float)
_JSON_TYPES: dict[str, Any] = {
    "rank": int,
    "alpha": _NUMBER,
    "targets": list,
    "learning_rate": _NUMBER,
    "steps": (int, type(None)),
    "epochs": _NUMBER,
    "batch_size": int,
    "max_length": int,
    "seed": int,
    "held_out": _NUMBER,
}


def learning_rate_at(step: int, total_steps: int, peak: float) -> float:
    """Up to `peak` within the first steps, then straight down; steps count from 0, none gets zero."""
    warm_up = max(1, round(WARM_UP * total_steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (total_steps - step) / max(1, total_steps - warm_up)
