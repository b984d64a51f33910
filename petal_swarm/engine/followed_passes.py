"""Training passes at a rank other than the leader: the same passes, of this rank's part of the blocks.

What is computed and kept, when, and for how long, is told; see `led_passes`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petal_swarm.engine.graphs import AdapterState, Gradient, Pass
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
from petal_swarm.models.rank_sums import Group
from petal_swarm.models.sharded_stack import ShardedStack


class FollowedPasses:
    """Carries out commands on `stack`, whose rows and sums come by `group`."""

    def __init__(self, stack: ShardedStack, group: Group) -> None:
        self._stack = stack
        self._group = group
        self._adapters: dict[int, AdapterState] = {}
        self._passes: dict[int, Pass] = {}
        self._gradients: dict[int, Gradient] = {}
        self._last: Tensor | None = None

    @property
    def held(self) -> int:
        """How many adapters, graphs and gradients are kept here."""
        graphs = sum(len(group.graphs) for kept in self._passes.values() for group in kept.groups)
        return len(self._adapters) + graphs + len(self._gradients)

    @torch.inference_mode(False)
    def carry_out(self, command: TrainingCommand) -> None:
        match command:
            case Train(place, kept, shared):
                self._train(place, kept, shared)
            case Through(number, place, shared):
                self._through(self._gradients[number], place, shared)
            case BeginPass():
                self._begin(command)
            case EndPass(number):
                self._passes.pop(number).clear()
                self._last = None
            case DropGraph(place):
                own = self._passes[place.number]
                own.drop(own.groups[place.group], place.block)
            case BeginGradient(number, of):
                self._gradients[number] = Gradient(self._passes[of])
            case EndGradient(number, complete):
                numbers = self._gradients.pop(number).numbers
                if complete and numbers is not None:
                    self._group.sum(numbers)
            case TrainAdapter(number, layout, blocks, size):
                numbers = self._shared((size,), torch.float32)
                self._adapters[number] = AdapterState(self._stack, layout, numbers, blocks)
            case EndAdapter(number):
                del self._adapters[number]

    def _begin(self, command: BeginPass) -> None:
        state = None if command.adapter is None else self._adapters[command.adapter]
        self._passes[command.number] = Pass(self._stack, command.blocks, command.lengths, state)

    def _train(self, place: Place, kept: bool, shared: torch.dtype | None) -> None:
        own = self._passes[place.number]
        group = own.groups[place.group]
        hidden = self._rows(group.rows, shared)
        self._last = (own.train if kept else own.run)(group, place.block, hidden)

    def _through(self, gradient: Gradient, place: Place, shared: torch.dtype | None) -> None:
        group = self._passes[place.number].groups[place.group]
        self._last = gradient.through(group, place.block, self._rows(group.rows, shared))

    def _rows(self, count: int, shared: torch.dtype | None) -> Tensor:
        if shared is not None:
            return self._shared((count, self._stack.config.hidden_size), shared)
        assert self._last is not None, "the leader shares what does not go on from the last command"
        return self._last

    def _shared(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        taken = torch.empty(shape, dtype=dtype, device=self._stack.device)
        self._group.share(taken)
        return taken
