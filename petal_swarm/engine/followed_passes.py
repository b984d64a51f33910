"""Training passes at a rank other than the leader: the same passes, of this rank's part of the blocks.

What is computed and kept, when, and for how long, is told; see `led_passes`. What there is no memory for is
missing here, and blocks for which something is missing come to nothing, which the leader sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

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
    take_numbers,
    take_rows,
)
from petal_swarm.models.devices import there
from petal_swarm.models.meetings import WHOLE
from petal_swarm.models.sharded_stack import ShardedStack


class FollowedPasses:
    """Carries out commands on `stack`, whose rows and sums come by its meetings."""

    def __init__(self, stack: ShardedStack) -> None:
        self._stack = stack
        self._meetings = stack.meetings
        self._adapters: dict[int, AdapterState | None] = {}
        self._begun: dict[int, BeginPass] = {}
        self._passes: dict[int, Pass | None] = {}
        self._gradients: dict[int, Gradient | None] = {}
        self._last: Tensor | None = None

    @property
    def held(self) -> int:
        """How many adapters, graphs and gradients are kept here."""
        kept = [own for own in self._passes.values() if own is not None]
        graphs = sum(len(group.graphs) for own in kept for group in own.groups)
        return len(self._adapters) + graphs + len(self._gradients)

    @torch.inference_mode(False)
    def carry_out(self, command: TrainingCommand) -> None:
        attempt = self._meetings.attempt
        match command:
            case Train(place, kept, shared):
                self._block(place, shared, lambda group, rows: self._train(place, kept, group, rows))
            case Through(number, place, shared):
                self._through(number, place, shared)
            case BeginPass(number):
                self._begun[number] = command
                self._passes[number] = attempt(lambda: self._begin(command))
            case EndPass(number):
                del self._begun[number], self._passes[number]
                self._last = None
            case DropGraph(place):
                own = self._passes[place.number]
                if own is not None and place.block in own.groups[place.group].graphs:
                    own.drop(own.groups[place.group], place.block)
            case BeginGradient(number, of):
                self._gradients[number] = attempt(lambda: Gradient(there(self._passes[of])))
            case EndGradient(number, complete):
                self._end_gradient(self._gradients.pop(number), complete)
            case TrainAdapter(number):
                self._adapters[number] = self._adapt(command)
            case EndAdapter(number):
                del self._adapters[number]

    def _adapt(self, command: TrainAdapter) -> AdapterState | None:
        _, layout, blocks, size = command
        numbers = take_numbers(self._meetings, size, torch.float32)
        if numbers is None:
            return None
        return self._meetings.attempt(lambda: AdapterState(self._stack, layout, numbers, blocks))

    def _begin(self, command: BeginPass) -> Pass:
        state = None if command.adapter is None else there(self._adapters[command.adapter])
        return Pass(self._stack, command.blocks, command.lengths, state)

    def _train(self, place: Place, kept: bool, group: Group, rows: Tensor) -> Tensor:
        own = there(self._passes[place.number])
        return (own.train if kept else own.run)(group, place.block, rows)

    def _through(self, number: int, place: Place, shared: torch.dtype | None) -> None:
        gradient = self._gradients[number]

        def through(group: Group, rows: Tensor) -> Tensor:
            there(group.graphs.get(place.block))
            return there(gradient).through(group, place.block, rows)

        self._block(place, shared, through)
        if self._last is not None:
            return
        own = self._passes[place.number]
        if own is not None:
            own.groups[place.group].graphs.pop(place.block, None)
        if gradient is not None and gradient.numbers is not None:
            # What is missing may not be in anything that the leader sees before the end.
            gradient.numbers.fill_(math.nan)

    def _end_gradient(self, gradient: Gradient | None, complete: bool) -> None:
        if complete:
            numbers = there(gradient).numbers
            if numbers is not None:
                self._meetings.sum(numbers)

    def _block(
        self, place: Place, shared: torch.dtype | None, compute: Callable[[Group, Tensor], Tensor]
    ) -> None:
        """What comes out of one block is what the next may go on from, unless there was no memory for it."""
        count = sum(self._begun[place.number].lengths[place.group])
        rows, self._last = self._last, None
        if shared is not None:
            rows = take_rows(self._meetings, count, shared)

        def attempted() -> Tensor:
            group = there(self._passes[place.number]).groups[place.group]
            self._last = compute(group, there(rows))
            return self._last

        self._meetings.block(attempted, count, WHOLE)
