"""One new token each of many sequences, attended to together: where launching costs more than computing.

Sequence by sequence, a decode of 32 sessions launches some 130 kernels a block, most of them idle again in
a microsecond. Here the rows of a group of sequences are gathered, short ones padded in front, and attended to
in seven launches. Gathering reads and writes every row once more, so groups are bounded, and what does not
fit a group is left to be read in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from petal_swarm.models.devices import to_device
from petal_swarm.models.int8_kv import Int8Pool, Ranges

#: Gathered keys and values of a block, in numbers: 128 MiB in 16 bits.
_GROUP_NUMBERS = 1 << 26


class Decoding(NamedTuple):
    """A slice of one token: its place in the batch, and the pool rows that it sees, `keys` of them."""

    place: int
    row: int
    ranges: Ranges
    keys: int


class Group:
    """Sequences that decode together, `places` of the batch in rising order.

    `bias` is `[kv or 1, group or 1, keys]`, what is added to scores by distance from the last key, for the
    longest of them.
    """

    __slots__ = ("_bias", "_rows", "_selected", "places")

    def __init__(self, members: Sequence[Decoding], bias: Tensor, device: torch.device | str) -> None:
        members = sorted(members)
        longest = max(member.keys for member in members)
        self.places = [member.place for member in members]
        self._selected = [member.row for member in members]
        # Padding is a row of the sequence itself, since the pool may hold anything else, negated to mark it.
        host = torch.empty(len(members), longest, dtype=torch.int32)
        for line, member in zip(host, members, strict=True):
            line.fill_(~member.ranges[0][0])
            at = longest - member.keys
            for start, stop in member.ranges:
                torch.arange(start, stop, dtype=torch.int32, out=line[at : at + stop - start])
                at += stop - start
        marked = to_device(host, device)
        padding = marked < 0
        self._rows = torch.where(padding, marked.bitwise_not(), marked).flatten()
        # [kv, sequences, group, keys]
        self._bias = bias.unsqueeze(1).masked_fill(padding[None, :, None, :], -torch.inf)

    def attend(self, query: Tensor, scale: float, pair: Tensor, int8: Int8Pool | None) -> Tensor:
        """`query [tokens of the batch, kv, group, size]` -> `[sequences, kv * group * size]`.

        `pair` as in `KVPool.pairs`, the new tokens already in it.
        """
        if len(self._selected) < query.shape[0]:
            query = torch.cat([query[row : row + 1] for row in self._selected])
        kept = pair.index_select(2, self._rows)
        if int8 is not None:
            kept = int8.unpack(kept, ((0, kept.shape[2]),))
        count = len(self._selected)
        keys, values = kept.view(2, query.shape[1], count, -1, query.shape[3])
        scores = torch.matmul(query.transpose(0, 1), keys.mT)
        weights = torch.add(self._bias, scores, alpha=scale).softmax(-1)
        return torch.matmul(weights, values).transpose(0, 1).reshape(count, -1)


def in_groups(pieces: Sequence[Decoding], numbers_per_row: int) -> list[list[Decoding]]:
    """Which of `pieces` to gather together; similar lengths, at least two, within the bound."""
    groups: list[list[Decoding]] = []
    group: list[Decoding] = []
    for piece in sorted(pieces, key=lambda piece: -piece.keys):
        if group and (len(group) + 1) * group[0].keys * numbers_per_row > _GROUP_NUMBERS:
            groups.append(group)
            group = []
        group.append(piece)
    return [group for group in [*groups, group] if len(group) > 1]
