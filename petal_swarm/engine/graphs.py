"""What is kept of a training pass: for each block an autograd graph, or the rows that went into it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from petal_swarm.models.adapters import AdapterLayout, BlockAdapter
from petal_swarm.models.lora import LoraMatrices
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Span

#: What the graph of a block costs besides its tensors. Measured.
GRAPH_BYTES = 24 << 10
# Gradients in float16 are kept near this size: those of a mean over many tokens would vanish.
_FLOAT16_SIZE = 64.0


class BlockGraph:
    """The way back through one block: `edge` is its result, `leaves` are its input and its adapter's tensors.

    `nbytes` counts what it keeps alive, but for what other blocks share.
    """

    __slots__ = ("edge", "leaves", "nbytes")

    def __init__(self, edge: GradientEdge, leaves: list[Tensor], nbytes: int) -> None:
        self.edge = edge
        self.leaves = leaves
        self.nbytes = nbytes


class Kept(NamedTuple):
    """Bytes of graphs, of inputs of blocks without one, and of those inputs that others would give."""

    activation_bytes: int = 0
    input_bytes: int = 0
    inner_bytes: int = 0


class Group:
    """Some sequences of a pass, which go through the blocks together: `rows` from `row` on.

    It is at `place` among its pass's.
    """

    __slots__ = ("graphs", "inputs", "lengths", "place", "row", "rows", "sequences")

    def __init__(
        self, stack: BlockStack, place: int, row: int, lengths: Sequence[int], prefix_tokens: int
    ) -> None:
        self.place = place
        self.row = row
        self.lengths = tuple(lengths)
        self.rows = sum(lengths)
        self.sequences = stack.sequences(lengths, prefix_tokens)
        self.graphs: dict[int, BlockGraph] = {}
        self.inputs: dict[int, Tensor] = {}

    @property
    def activation_bytes(self) -> int:
        """Of graphs, and of the masks that they share."""
        masks = sum(plan.mask_bytes for plan in self.sequences.values()) if self.graphs else 0
        return masks + sum(graph.nbytes + GRAPH_BYTES for graph in self.graphs.values())

    def drop_masks(self) -> None:
        """Unless graphs need them."""
        if not self.graphs:
            for plan in self.sequences.values():
                plan.drop_masks()


class AdapterState:
    """An adapter in training: `given` on the device, in float32, and the `parts` that each block here adds.

    Raises:
        ConfigError: `given` has another length than the layout says for `blocks`.
    """

    def __init__(self, stack: BlockStack, layout: AdapterLayout, given: Tensor, blocks: Span) -> None:
        self.layout = layout
        self.blocks = blocks
        self._given = given
        with torch.inference_mode(False):
            numbers = given.to(stack.device, torch.float32)
            self.numbers = numbers.clone() if numbers.is_inference() else numbers.detach()
        self.parts = parts_of(stack, layout, self.numbers, blocks)

    def is_of(self, layout: AdapterLayout, given: Tensor, blocks: Span) -> bool:
        """Whether it was made of these very numbers."""
        same = (given.data_ptr(), given.numel()) == (self._given.data_ptr(), self._given.numel())
        return same and blocks == self.blocks and layout == self.layout


def parts_of(
    stack: BlockStack, layout: AdapterLayout, numbers: Tensor, blocks: Span
) -> dict[int, BlockAdapter]:
    """Views into `numbers`, the vector for `blocks`: of what each block of `stack` adds."""
    split = layout.split(stack.config, numbers, blocks)
    return {block: stack.part_of(adapter) for block, adapter in split.items()}


class Pass:
    """One pass, of groups of sequences of these `lengths`; made at its forward."""

    def __init__(
        self,
        stack: BlockStack,
        blocks: Span,
        lengths: Sequence[Sequence[int]],
        state: AdapterState | None,
        peer: str = "",
    ) -> None:
        self.stack = stack
        self.blocks = blocks
        self.state = state
        self.peer = peer
        self.until_s = math.inf
        #: As of the last `count`, which takes a while.
        self.counted = Kept()
        self.groups: list[Group] = []
        prefix_tokens = 0 if state is None else state.layout.prefix_tokens
        row = 0
        for place, own in enumerate(lengths):
            self.groups.append(Group(stack, place, row, own, prefix_tokens))
            row += self.groups[-1].rows
        self.rows = row

    def adapter(self, block: int) -> BlockAdapter:
        return _NOTHING if self.state is None else self.state.parts.get(block, _NOTHING)

    def run(self, group: Group, block: int, hidden: Tensor) -> Tensor:
        """`block` without a graph."""
        with torch.inference_mode(False), torch.no_grad():
            return self.stack.forward_trained(block, hidden, group.sequences, self.adapter(block))

    def train(self, group: Group, block: int, hidden: Tensor) -> Tensor:
        """`block`, whose graph the group has then."""
        out, group.graphs[block] = _trained_block(self, group, block, hidden)
        return out

    def gradient(self) -> Gradient:
        """For one backward."""
        return Gradient(self)

    def count(self) -> Kept:
        """What is kept now. A graph keeps its input anyway."""
        inner = inputs = 0
        for group in self.groups:
            for block, hidden in group.inputs.items():
                if block not in group.graphs:
                    inputs += hidden.nbytes
                    inner += hidden.nbytes if block > self.blocks.start else 0
        self.counted = Kept(sum(group.activation_bytes for group in self.groups), inputs, inner)
        return self.counted

    def clear(self) -> None:
        """Nothing is needed any more, unless a block is computed again."""
        for group in self.groups:
            group.graphs.clear()
            group.inputs.clear()

    def drop_graph(self) -> None:
        """Drop the graph that the backward needs last."""
        group = next(group for group in reversed(self.groups) if group.graphs)
        self.drop(group, min(group.graphs))

    def drop(self, group: Group, block: int) -> None:
        """Drop the graph of one block."""
        del group.graphs[block]
        group.drop_masks()

    def drop_inner_inputs(self) -> None:
        for group in self.groups:
            for block in self._inner(group):
                del group.inputs[block]

    def _inner(self, group: Group) -> list[int]:
        return [block for block in group.inputs if block > self.blocks.start and block not in group.graphs]


def _trained_block(kept: Pass, group: Group, block: int, hidden: Tensor) -> tuple[Tensor, BlockGraph]:
    """What comes out of `block`, detached, and the way back."""
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # attention keeps what it results in, which would hold its own graph for ever

    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(count, _same):
        hidden = hidden.detach().requires_grad_()
        adapter = _as_leaves(kept.adapter(block))
        out = kept.stack.forward_trained(block, hidden, group.sequences, adapter)
        graph = BlockGraph(get_gradient_edge(out), [hidden, *_tensors(adapter)], 0)
    # It may be some rows of a larger tensor.
    saved[hidden.untyped_storage().data_ptr()] = hidden.nbytes
    shared = {address for plan in group.sequences.values() for address in plan.mask_addresses()}
    if kept.state is not None:
        shared.add(kept.state.numbers.untyped_storage().data_ptr())
    graph.nbytes = sum(size for address, size in saved.items() if address not in shared)
    return out.detach(), graph


class Gradient:
    """The backward of a pass: each group `through` its blocks, last to first. `numbers` adds up the adapter's
    on the way; close it when it is `complete`, or will not be.
    """

    def __init__(self, kept: Pass) -> None:
        self.numbers: Tensor | None = None
        self._blocks = kept.blocks
        self._targets: dict[int, BlockAdapter] = {}
        state = kept.state
        if state is not None:
            with torch.inference_mode(False):
                self.numbers = torch.zeros_like(state.numbers)
            self._targets = parts_of(kept.stack, state.layout, self.numbers, kept.blocks)
        self._narrow = kept.stack.dtype is torch.float16
        #: That in which gradients come: they must not lose their range before they are scaled.
        self.dtype = torch.float32 if self._narrow else kept.stack.dtype
        self._scale: Tensor | None = None

    def through(self, group: Group, block: int, grad: Tensor) -> Tensor:
        """The gradient of what goes into `block`, whose graph is used up."""
        if block == self._blocks.end - 1:
            self._scale = None
        graph = group.graphs.pop(block)
        with torch.inference_mode(False):
            if self._narrow:
                grad = self._rescaled(grad)
            found, *of_adapter = torch.autograd.grad([graph.edge], graph.leaves, [grad])
            for target, own in zip(_tensors(self._targets.get(block, _NOTHING)), of_adapter, strict=True):
                target += own if self._scale is None else own / self._scale
        if block == self._blocks.start:
            group.drop_masks()
        return found

    def end(self, grad: Tensor) -> Tensor:
        """The gradient of what the group began with."""
        return grad if self._scale is None else grad.float() / self._scale

    def complete(self) -> Tensor | None:
        """The gradient of the adapter's numbers, of all groups."""
        return self.numbers

    def close(self) -> None:
        """Nothing comes any more. Idempotent."""

    def _rescaled(self, grad: Tensor) -> Tensor:
        wide = grad.float()
        factor = _FLOAT16_SIZE / wide.abs().amax().clamp_min(1e-30)
        self._scale = factor if self._scale is None else self._scale * factor
        return (wide * factor).half()


def grouped(lengths: Sequence[int], rows: float) -> Iterator[list[int]]:
    """Cuts a pass up: groups of at most so many rows, but whole sequences."""
    group: list[int] = []
    for length in lengths:
        if group and sum(group) + length > rows:
            yield group
            group = []
        group.append(length)
    yield group


_NOTHING = BlockAdapter()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _as_leaves(adapter: BlockAdapter) -> BlockAdapter:
    lora = {
        stem: LoraMatrices(own.a.detach().requires_grad_(), own.b.detach().requires_grad_(), own.scale)
        for stem, own in adapter.lora.items()
    }
    prefix = None if adapter.prefix is None else adapter.prefix.detach().requires_grad_()
    return BlockAdapter(lora, prefix)


def _tensors(adapter: BlockAdapter) -> list[Tensor]:
    found = [tensor for own in adapter.lora.values() for tensor in (own.a, own.b)]
    return found if adapter.prefix is None else [*found, adapter.prefix]
