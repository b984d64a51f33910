"""Steps in chunks of rows, and what counts as decoding."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
import torch

from petal_swarm.engine.kv_cache import Placement
from petal_swarm.engine.steps import DECODE_ROWS, DECODE_TOKENS, PlacedStep, StepRequest, is_decode
from petal_swarm.models.packing import PackedBatch, PackedSlice
from petal_swarm.span import Slice

from .tiny import WHOLE, rows


def request(*slices: Slice, wanted: str = "all") -> StepRequest:
    hidden = rows(sum(piece.length for piece in slices))
    return StepRequest("a", WHOLE, slices, hidden, None, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slices", "decodes"),
    [
        ([Slice(0, 500, 1)], True),
        ([Slice(0, 0, DECODE_TOKENS)], True),
        ([Slice(0, 0, DECODE_TOKENS + 1)], False),
        ([Slice(n, 40, 1) for n in range(16)], True),
        ([Slice(n, 40, 1) for n in range(DECODE_ROWS)], True),
        ([Slice(n, 40, 1) for n in range(DECODE_ROWS + 1)], False),
        ([Slice(0, 40, 1), Slice(1, 0, 20)], False),
    ],
)
def test_what_decodes(slices: list[Slice], decodes: bool) -> None:
    assert is_decode(request(*slices)) == decodes


@pytest.mark.parametrize("wanted", ["all", "last", "none"])
@pytest.mark.parametrize("seed", range(10))
def test_chunks_cover_the_step_in_order(seed: int, wanted: str) -> None:
    random = Random(seed)
    slices = [Slice(n, random.choice([0, 7, 40]), random.choice([1, 2, 30])) for n in (3, 1, 0, 2)]
    whole = request(*slices, wanted=wanted)
    placements, base = [], 0
    for piece in slices:
        # In up to three extents, which a chunk must be able to end in, or between.
        cuts = sorted(random.sample(range(1, piece.end), min(2, piece.end - 1)))
        edges = [0, *cuts, piece.end]
        extents = tuple((base + 100 * k + a, base + 100 * k + b) for k, (a, b) in enumerate(pairwise(edges)))
        placements.append(Placement(extents, ()))
        base += 1000
    slots = PackedBatch.build(
        [
            PackedSlice(
                sum(s.length for s in slices[:n]), piece.length, piece.position, placements[n].extents
            )
            for n, piece in enumerate(slices)
        ]
    ).slots
    step = PlacedStep(whole, len(whole.hidden), placements)
    seen: list[PackedSlice] = []
    done = 0
    while step.rows_left:
        count = random.randint(1, min(20, step.rows_left))
        pieces: list[PackedSlice] = []
        hidden = step.take(count, pieces, 0)
        batch = PackedBatch.build(pieces)
        assert torch.equal(hidden, whole.hidden[done : done + count])
        assert torch.equal(batch.slots, slots[done : done + count])
        seen += pieces
        done += count
        step.give(hidden * 2)
    ends = torch.tensor([piece.length for piece in slices]).cumsum(0) - 1
    expected = {"all": whole.hidden, "last": whole.hidden[ends], "none": whole.hidden[:0]}[wanted]
    assert torch.equal(step.result(), expected * 2)
    assert sum(piece.length for piece in seen) == done == len(whole.hidden)
