"""A model that can learn, in the place of one whose blocks are in a swarm, and material for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from petal_swarm.cli.tuning.batches import IGNORED
from petal_swarm.cli.tuning.data import Example
from petal_swarm.cli.tuning.run_folder import RunState
from petal_swarm.cli.tuning.settings import TuneSettings

VOCABULARY = 257


class Bigrams(nn.Module):
    """Predicts a token from the one before it; called as Hugging Face's models are.

    `fail_at` are the numbers of calls, from 1, that raise instead.
    """

    def __init__(self, *, fail_at: dict[int, BaseException] | None = None, frozen_head: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embeddings = nn.Parameter(0.1 * torch.randn(VOCABULARY, 8, generator=generator))
        self.head = nn.Parameter(torch.randn(8, VOCABULARY, generator=generator), not frozen_head)
        self.fail_at = fail_at or {}
        self.calls = 0
        self.seen: list[list[list[int]]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        self.calls += 1
        if self.calls in self.fail_at:
            raise self.fail_at[self.calls]
        self.seen.append(input_ids.tolist())
        logits = self.embeddings[input_ids] @ self.head
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        return SimpleNamespace(loss=loss)

    def save_pretrained(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(str(self.calls))


class Watcher:
    """Notes all steps, and stops after `stop_after` of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.steps: list[tuple[int, float, int]] = []
        self._stop_after = stop_after

    def on_step(self, step: int, loss: float, tokens: int, elapsed_s: float) -> None:
        self.steps.append((step, loss, tokens))

    @property
    def stopping(self) -> bool:
        return self._stop_after is not None and len(self.steps) >= self._stop_after


def examples(count: int = 10) -> list[Example]:
    """Of different lengths, and each different from the others."""
    made = []
    for number in range(count):
        tokens = torch.arange(3 + number % 4) * 7 + number
        made.append(Example(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    return made


def first_state(**settings: Any) -> RunState:
    return RunState(
        step=0,
        settings=TuneSettings(**settings),
        model="model",
        data="data",
        losses=(),
        held_out_loss=None,
        sample=None,
    )
