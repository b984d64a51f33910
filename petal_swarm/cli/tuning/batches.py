"""Which examples are learned together at a step, as a function of its number: so a run can be resumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petal_swarm.cli.tuning.data import Example

#: What Hugging Face's losses leave out.
IGNORED = -100


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Right-padded `[sequences, tokens]`; `labels` are `IGNORED` where nothing is to be learned."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def num_tokens(self) -> int:
        """Without the padding."""
        return int(self.attention_mask.sum())

    @property
    def num_learned(self) -> int:
        """How many predictions the loss is the mean of."""
        return int((self.labels[:, 1:] != IGNORED).sum())


def collate(examples: Sequence[Example]) -> Batch:
    """One batch; what stands in the padding does not matter."""
    shape = len(examples), max(len(example.tokens) for example in examples)
    input_ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        input_ids[row, :length] = example.tokens
        mask[row, :length] = 1
        labels[row, :length] = example.tokens.where(example.learned, IGNORED)
    return Batch(input_ids, mask, labels)


def hold_out(
    examples: Sequence[Example], share: float, *, seed: int, at_most: int
) -> tuple[list[Example], list[Example]]:
    """Examples to learn, and others to see whether that helps: a `share` of them, at least one if there are
    two, `at_most` so many. Both keep the order of the file.
    """
    wanted = min(at_most, max(1, round(share * len(examples)))) if share else 0
    wanted = min(wanted, len(examples) - 1)
    drawn = set(_shuffled(len(examples), seed, 0)[:wanted])
    learned = [example for number, example in enumerate(examples) if number not in drawn]
    return learned, [examples[number] for number in sorted(drawn)]


@dataclass(frozen=True, slots=True)
class Order:
    """Every example once in each epoch, each epoch in another order; the last batch of one may be smaller."""

    num_examples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_examples / self.batch_size)

    def batch(self, step: int) -> list[int]:
        """The numbers of the examples of step `step`, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        return _shuffled(self.num_examples, self.seed, 1 + epoch)[start : start + self.batch_size]


def _shuffled(count: int, seed: int, turn: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + turn) % (1 << 63))
    numbers: list[int] = torch.randperm(count, generator=generator).tolist()
    return numbers
