"""Training passes as the leader runs them: what it does to a pass, the other ranks do to theirs.

They hold the graphs of their parts of the blocks, and nothing else for longer than it is used. Rows that go
from block to block are the same at all ranks: they travel only where a pass begins or is taken up again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petal_swarm.engine.crew import Crew
from petal_swarm.engine.graphs import AdapterState, Gradient, Group, Pass
from petal_swarm.engine.ranks import (
    BeginGradient,
    BeginPass,
    DropGraph,
    EndAdapter,
    EndGradient,
    EndPass,
    Place,
    Through,
    Train,
    TrainAdapter,
    TrainingCommand,
)
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Span


@dataclass(slots=True)
class _Told:
    """An adapter that the others have as `number`, for so many passes."""

    number: int
    passes: int = 0


class PassLeader:
    """What the other ranks know of passes: `numbers` name what they are told of."""

    def __init__(self, crew: Crew, numbers: Iterator[int]) -> None:
        self.crew = crew
        self.numbers = numbers
        self._adapters: dict[AdapterState, _Told] = {}
        self._last: weakref.ref[Tensor] | None = None

    def hand(self, command: Callable[[torch.dtype | None], TrainingCommand], rows: Tensor) -> None:
        """Tell what is to be done with `rows`, which they have if they came out of what was done last."""
        if self._last is not None and self._last() is rows:
            self.crew.tell(command(None))
        else:
            self.crew.tell(command(rows.dtype))
            self.crew.group.share(rows.contiguous())

    def came_out(self, rows: Tensor) -> Tensor:
        """Of what was handed."""
        self._last = weakref.ref(rows)
        return rows

    def begin(self, started: Pass) -> int:
        """What they call a pass of which they have not known."""
        number = next(self.numbers)
        state = started.state
        told = None
        if state is not None:
            told = self._adapters.get(state)
            if told is None:
                told = self._adapters[state] = _Told(next(self.numbers))
                size = len(state.numbers)
                self.crew.tell(TrainAdapter(told.number, state.layout, state.blocks, size))
                self.crew.group.share(state.numbers.contiguous())
            told.passes += 1
        lengths = tuple(group.lengths for group in started.groups)
        self.crew.tell(BeginPass(number, started.blocks, lengths, None if told is None else told.number))
        return number

    def end(self, number: int, state: AdapterState | None) -> None:
        """They forget the pass `number`, and its adapter with the last pass that has it."""
        self._last = None
        self.crew.tell_if_there(EndPass(number))
        if state is None:
            return
        told = self._adapters[state]
        told.passes -= 1
        if not told.passes:
            del self._adapters[state]
            self.crew.tell_if_there(EndAdapter(told.number))


class LedPass(Pass):
    """A pass that the others know of from its first block until it is cleared.

    What it raises when a rank is lost is a `RemoteError`.
    """

    def __init__(
        self,
        leader: PassLeader,
        stack: BlockStack,
        blocks: Span,
        lengths: Sequence[Sequence[int]],
        state: AdapterState | None,
        peer: str = "",
    ) -> None:
        super().__init__(stack, blocks, lengths, state, peer)
        self.leader = leader
        self._number: int | None = None

    def run(self, group: Group, block: int, hidden: Tensor) -> Tensor:
        """See `Pass`."""
        with self.leader.crew.together():
            self._hand(group, block, hidden, kept=False)
            return self.leader.came_out(super().run(group, block, hidden))

    def train(self, group: Group, block: int, hidden: Tensor) -> Tensor:
        """See `Pass`."""
        with self.leader.crew.together():
            self._hand(group, block, hidden, kept=True)
            return self.leader.came_out(super().train(group, block, hidden))

    def gradient(self) -> Gradient:
        """See `Pass`."""
        return _LedGradient(self)

    def drop(self, group: Group, block: int) -> None:
        """See `Pass`."""
        super().drop(group, block)
        self.leader.crew.tell_if_there(DropGraph(self.place(group, block)))

    def clear(self) -> None:
        """See `Pass`."""
        super().clear()
        if self._number is not None:
            number, self._number = self._number, None
            self.leader.end(number, self.state)

    def place(self, group: Group, block: int) -> Place:
        """Where that is, for the others, who know of this pass then."""
        return Place(self.number(), group.place, block)

    def number(self) -> int:
        """What they call it."""
        if self._number is None:
            self._number = self.leader.begin(self)
        return self._number

    def _hand(self, group: Group, block: int, hidden: Tensor, *, kept: bool) -> None:
        place = self.place(group, block)
        self.leader.hand(lambda shared: Train(place, kept, shared), hidden)


class _LedGradient(Gradient):
    """See `Gradient`."""

    def __init__(self, kept: LedPass) -> None:
        self._kept = kept
        self._leader = kept.leader
        self._number: int | None = None
        with self._leader.crew.together():
            super().__init__(kept)
            number = next(self._leader.numbers)
            self._leader.crew.tell(BeginGradient(number, kept.number()))
        self._number = number

    def through(self, group: Group, block: int, grad: Tensor) -> Tensor:
        """See `Gradient`."""
        number = self._own_number
        with self._leader.crew.together():
            place = self._kept.place(group, block)
            self._leader.hand(lambda shared: Through(number, place, shared), grad)
            return self._leader.came_out(super().through(group, block, grad))

    def complete(self) -> Tensor | None:
        """See `Gradient`: what all ranks have."""
        with self._leader.crew.together():
            self._leader.crew.tell(EndGradient(self._own_number, True))
            self._number = None
            if self.numbers is not None:
                self._leader.crew.group.sum(self.numbers)
        return self.numbers

    def close(self) -> None:
        """See `Gradient`."""
        if self._number is not None:
            number, self._number = self._number, None
            self._leader.crew.tell_if_there(EndGradient(number, False))

    @property
    def _own_number(self) -> int:
        assert self._number is not None, "a gradient that is complete goes through no further block"
        return self._number
