"""What any steps of any sessions have to answer: a plain full forward for each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from petal_swarm.engine.steps import StepRequest
from petal_swarm.span import Slice, Span

from .tiny import WHOLE, Tiny, rows

SPANS = [WHOLE, Span(1, 3), Span(3, 4)]


class Oracle:
    """What every sequence was fed so far, and so what the next answer has to be."""

    def __init__(self, tiny: Tiny) -> None:
        self._tiny = tiny
        self.inputs: dict[tuple[str, int], Tensor] = {}

    def length(self, session: str, sequence: int) -> int:
        return len(self.inputs.get((session, sequence), ()))

    def sequences(self, session: str) -> list[int]:
        return [sequence for key, sequence in self.inputs if key == session]

    def fork(self, session: str, sources: Sequence[int]) -> None:
        forked = {(session, index): self.inputs[session, source] for index, source in enumerate(sources)}
        self.forget(session)
        self.inputs |= forked

    def forget(self, session: str) -> None:
        for sequence in self.sequences(session):
            del self.inputs[session, sequence]

    def answer(self, request: StepRequest) -> Tensor:
        session = str(request.session)
        if request.forks is not None:
            self.fork(session, request.forks)
        parts, row = [], 0
        for piece in request.slices:
            key = (session, piece.sequence)
            before = self.inputs.get(key, rows(0))[: piece.position]
            self.inputs[key] = torch.cat([before, request.hidden[row : row + piece.length]])
            row += piece.length
            expected = self._tiny.expected(self.inputs[key], request.blocks)[piece.position :]
            parts.append(expected[-1:] if request.rows == "last" else expected)
        return torch.cat(parts)[: None if request.rows != "none" else 0]


def random_step(
    random: Random, oracle: Oracle, session: str, blocks: Span, *, longest: int = 12, limit: int = 70
) -> StepRequest:
    """A next step of a session: sequences grow, roll back and fork as they like, up to `limit` tokens."""
    existing = oracle.sequences(session)
    forks = None
    if existing and random.random() < 0.2:
        forks = tuple(random.choices(existing, k=random.randint(1, 3)))
        existing = list(range(len(forks)))
    chosen = random.sample(range(4), random.randint(1, 3))
    slices = []
    for sequence in chosen:
        length = 0
        if sequence in existing:
            length = oracle.length(session, forks[sequence] if forks else sequence)
        back = random.choice([0, 0, 0, random.randint(0, 20), length % 16])
        position = min(max(0, length - back), limit - 1)
        size = random.choice([1, 1, 2, random.randint(1, longest)])
        slices.append(Slice(sequence, position, min(size, limit - position)))
    hidden = rows(sum(piece.length for piece in slices), random.randrange(1 << 30))
    return StepRequest(
        session, blocks, tuple(slices), hidden, forks, random.choice(["all", "all", "last", "none"])
    )
