"""The numbers of a client's adapter while they are trained: each state of them has an id of its own."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from petal_swarm.errors import ConfigError
from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.finite import all_finite
from petal_swarm.span import Span

RUN_ID_BYTES = 8


@dataclass(frozen=True, eq=False, slots=True)
class TrainedAdapter:
    """One state of an adapter of the whole model; `numbers` are float32, on the CPU, and never change."""

    id: str
    layout: AdapterLayout
    numbers: Tensor
    config: ModelConfig

    def bounds(self, blocks: Span) -> tuple[int, int]:
        """Where the numbers of `blocks` lie; both are equal if there are none."""
        return self.layout.bounds(self.config, blocks)


class AdapterVersions:
    """Gives the states of one adapter their ids. Numbers that are equal to the last ones are the same state.

    The id is `RUN:VERSION`; the run is random, so that two clients of one identity never mean the same.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._run = secrets.token_hex(RUN_ID_BYTES)
        self._last: TrainedAdapter | None = None
        self._version = 0
        self._lock = threading.Lock()

    def of(self, layout: AdapterLayout, numbers: Tensor) -> TrainedAdapter:
        """The state that these numbers are; they are copied.

        Raises:
            ConfigError: the layout does not fit the model, or there are more or fewer numbers than it
                has, or one of them is not finite.
        """
        with self._lock:
            return self._of(layout, numbers.detach())

    def _of(self, layout: AdapterLayout, numbers: Tensor) -> TrainedAdapter:
        last = self._last
        if last is not None and last.layout == layout and _equal(last.numbers, numbers):
            return last
        layout.check(self._config)
        expected = layout.numbers(self._config, Span(0, self._config.num_blocks))
        if numbers.shape != (expected,):
            raise ConfigError(f"the adapter has {expected} numbers, got {list(numbers.shape)}")
        kept = numbers.to(device="cpu", dtype=torch.float32, copy=True)
        if not all_finite(kept):
            raise ConfigError("the adapter has numbers that are not finite: a smaller learning rate may help")
        self._version += 1
        self._last = TrainedAdapter(f"{self._run}:{self._version}", layout, kept, self._config)
        return self._last


def _equal(kept: Tensor, numbers: Tensor) -> bool:
    return kept.shape == numbers.shape and torch.equal(kept, numbers.to(kept))
