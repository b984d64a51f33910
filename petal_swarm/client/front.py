"""What stands before the first block: embeddings of tokens, and a soft prompt in front of each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petal_swarm.client.packing import Packing
from petal_swarm.models.ends import Ends


@dataclass(frozen=True, slots=True)
class Front:
    """`prompt [count, hidden_size]` are embeddings, from before BLOOM's embedding norm."""

    ends: Ends
    prompt: Tensor | None = None

    def rows(
        self, given: Tensor, packing: Packing, *, prompted: bool = True
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Packed rows for block 0, and the lengths of the sequences.

        `given` are tokens `[batch, width]` or embeddings `[batch, width, hidden_size]`. With `prompted` the
        soft prompt, if there is one, comes first in each sequence.
        """
        packed = packing.pack(given)
        hidden = self.ends.embed(packed) if given.dim() == 2 else self.ends.enter(packed)
        return self.enter(hidden, packing.lengths) if prompted else (hidden, packing.lengths)

    def enter(self, hidden: Tensor, lengths: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Put the soft prompt, if there is one, before each sequence of `hidden [tokens, hidden_size]`."""
        if self.prompt is None:
            return hidden, tuple(lengths)
        prompt = self.ends.enter(self.prompt.to(hidden))
        sequences = torch.split(hidden, list(lengths))
        rows = torch.cat([piece for sequence in sequences for piece in (prompt, sequence)])
        return rows, tuple(length + len(prompt) for length in lengths)


def strip_prompt(rows: Tensor, lengths: Sequence[int], kept: Sequence[int]) -> Tensor:
    """The last `kept[i]` of the `lengths[i]` rows of each sequence."""
    if tuple(lengths) == tuple(kept):
        return rows
    sequences = torch.split(rows, list(lengths))
    return torch.cat([sequence[-count:] for sequence, count in zip(sequences, kept, strict=True)])
