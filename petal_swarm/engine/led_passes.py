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
    share_numbers,
)
from petal_swarm.models.meetings import WHOLE, Meetings
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Span


@dataclass(slots=True)
class _Told:
    """An adapter that the others have as `number`, for so many passes."""

    number: int
    passes: int = 0


class PassLeader:
    """What the other ranks know of passes: `numbers` name what they are told of."""

    def __init__(self, crew: Crew, meetings: Meetings, numbers: Iterator[int]) -> None:
        self.crew = crew
        self.meetings = meetings
        self.numbers = numbers
        self._adapters: dict[AdapterState, _Told] = {}
        self._last: weakref.ref[Tensor] | None = None

    def hand(self, command: Callable[[torch.dtype | None], TrainingCommand], rows: Tensor) -> None:
        """Tell what is to be done with `rows`, which they have if they came out of what was done last."""
        if self._last is not None and self._last() is rows:
            self.crew.tell(command(None))
        else:
            self.crew.tell(command(rows.dtype))
            self.crew.group.share(rows)

    def block(self, compute: Callable[[], Tensor], rows: int) -> Tensor:
        """What comes out of what was handed."""
        self._last = None
        out = self.meetings.block(compute, rows, WHOLE)
        self._last = weakref.ref(out)
        return out

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
                share_numbers(self.crew.group, state.numbers, state.numbers.device)
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

    What it raises when a rank is lost is a `RemoteError`; where one lacked memory, it is as if this one had.
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
        return self._lead(super().run, group, block, hidden, kept=False)

    def train(self, group: Group, block: int, hidden: Tensor) -> Tensor:
        """See `Pass`."""
        try:
            return self._lead(super().train, group, block, hidden, kept=True)
        except torch.OutOfMemoryError:
            group.graphs.pop(block, None)
            self.leader.crew.tell_if_there(DropGraph(self.place(group, block)))
            raise

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

    def _lead(
        self,
        compute: Callable[[Group, int, Tensor], Tensor],
        group: Group,
        block: int,
        hidden: Tensor,
        *,
        kept: bool,
    ) -> Tensor:
        leader = self.leader
        leader.meetings.set_aside(group.rows, hidden.dtype)
        hidden = hidden.contiguous()
        with leader.crew.together():
            place = self.place(group, block)
            leader.hand(lambda shared: Train(place, kept, shared), hidden)
            out = leader.block(lambda: compute(group, block, hidden), group.rows)
        leader.crew.check(out[0, 0], leader.meetings)
        return out


class _LedGradient(Gradient):
    """See `Gradient`."""

    def __init__(self, kept: LedPass) -> None:
        self._kept = kept
        self._leader = kept.leader
        self._number: int | None = None
        super().__init__(kept)
        with self._leader.crew.together():
            number = next(self._leader.numbers)
            self._leader.crew.tell(BeginGradient(number, kept.number()))
        self._number = number

    def through(self, group: Group, block: int, grad: Tensor) -> Tensor:
        """See `Gradient`."""
        number, leader = self._own_number, self._leader
        leader.meetings.set_aside(group.rows, grad.dtype)
        grad = grad.contiguous()
        compute = super().through
        with leader.crew.together():
            place = self._kept.place(group, block)
            leader.hand(lambda shared: Through(number, place, shared), grad)
            out = leader.block(lambda: compute(group, block, grad), group.rows)
        leader.crew.check(out[0, 0], leader.meetings)
        return out

    def complete(self) -> Tensor | None:
        """See `Gradient`: what all ranks have."""
        with self._leader.crew.together():
            self._leader.crew.tell(EndGradient(self._own_number, True))
            self._number = None
            if self.numbers is not None:
                self._leader.crew.group.sum(self.numbers)
        if self.numbers is not None and len(self.numbers):
            self._leader.crew.check(self.numbers[0], self._leader.meetings)
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
