"""Training passes: forward and backward of packed sequences through blocks of this server's stack.

A pass is kept for its backward: one autograd graph for each block, so that a backward frees memory block by
block as it goes. Where memory is short graphs are dropped, and the backward computes a block again from its
input, or from an earlier one. `forward` and `backward` are generators of small pieces, for
`Compute.run_work`; everything here is for one thread at a time, between any two pieces of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petal_swarm.engine.graphs import AdapterState, Gradient, Group, Pass, grouped
from petal_swarm.engine.leading import LeadingStack
from petal_swarm.engine.led_passes import LedPass
from petal_swarm.engine.works import Pieces
from petal_swarm.errors import BadTensorError, NotFiniteError, PassGoneError
from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.models.devices import to_device, wait_for
from petal_swarm.models.finite import all_finite
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Span


@dataclass(frozen=True)
class PassLimits:
    """What passes may keep between their forward and their backward, all together, and how large one may be.

    `activation_bytes` are for graphs, `input_bytes` for the inputs of blocks whose graphs were dropped; none
    is kept for longer than `keep_s`. `adapter_bytes` are for numbers of adapters, each state of them once.
    """

    activation_bytes: int = 1 << 30
    input_bytes: int = 1 << 28
    adapter_bytes: int = 1 << 29
    max_rows: int = 4096
    keep_s: float = 600.0


@dataclass(frozen=True, slots=True)
class PassStats:
    """A snapshot of what is kept."""

    passes: int
    activation_bytes: int
    input_bytes: int


class Passes:
    """Runs passes through the blocks of `stack`, and keeps what their backwards need.

    `piece_rows()` says of how many rows to compute a block at once, at present; a sequence is never cut.
    """

    def __init__(
        self,
        stack: BlockStack,
        limits: PassLimits | None = None,
        *,
        piece_rows: Callable[[], float] = lambda: math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or PassLimits()
        self._stack = stack
        self._piece_rows = piece_rows
        self._clock = clock
        self._passes: dict[Hashable, Pass] = {}  # the oldest first
        self._activation_bytes = self._input_bytes = 0

    def forward(
        self,
        key: Hashable,
        hidden: Tensor,
        lengths: Sequence[int],
        blocks: Span,
        adapter: tuple[AdapterLayout, Tensor] | None = None,
        *,
        keep: bool,
        peer: str = "",
    ) -> Pieces[Tensor]:
        """Whole sequences of `lengths`, packed in `hidden [tokens, hidden_size]`, through `blocks`.

        `adapter` has the numbers for `blocks`, which nobody may change while the pass is kept. With `keep` it
        is, as `key`, in the place of one of that name. Returns what comes out, like `hidden`.

        Raises:
            BadTensorError: `hidden` does not fit, is too large or is not finite.
            NotFiniteError: names the block whose result is not finite.
            ConfigError: `adapter` does not fit.
        """
        self.expire()
        self._check(hidden, sum(lengths), "hidden")
        started = self._new(lengths, blocks, adapter, peer)
        self.forget(key)
        if keep:
            self._passes[key] = started
            self._touch(started)
            self._trim_adapters(started)
        try:
            outs = []
            for group in started.groups:
                out = self._own(hidden[group.row : group.row + group.rows], self._stack.dtype)
                sums = []
                for block in blocks.blocks():
                    out = self._forward(key, started, group, block, out)
                    sums.append(out.sum(dtype=torch.float32))
                    self._synchronize()
                    yield
                _check_sums(sums, list(blocks.blocks()), "what comes out")
                outs.append(out)
        except BaseException:
            if self._passes.get(key) is started:
                self.forget(key)
            raise
        finally:
            if self._passes.get(key) is not started:
                started.clear()
        self._touch(started)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def backward(self, key: Hashable, grad: Tensor) -> Pieces[tuple[Tensor, Tensor | None]]:
        """From the gradient of a pass's result to those of its input and of its adapter's numbers.

        They are like `hidden` (in float32 where the blocks compute in float16), and float32 of one dimension.
        The pass's input is still kept: until `forget`, the backward can be run again.

        Raises:
            PassGoneError: nothing is kept of the pass any more.
            BadTensorError: `grad` does not fit, or is not finite.
            NotFiniteError: names the block whose gradient is not finite.
        """
        self.expire()
        kept = self._passes.get(key)
        if kept is None:
            raise PassGoneError("nothing is kept of this training pass any more")
        self._touch(kept)
        self._check(grad, kept.rows, "the gradient")
        gradient = kept.gradient()
        try:
            found = yield from self._backward(key, kept, gradient, grad)
            numbers = gradient.complete()
        finally:
            gradient.close()
            if self._passes.get(key) is not kept:
                kept.clear()  # once more: it went on for a while after it was forgotten
        self._touch(kept)
        return found, numbers

    def _backward(self, key: Hashable, kept: Pass, gradient: Gradient, grad: Tensor) -> Pieces[Tensor]:
        outs = []
        for group in kept.groups:
            part = self._own(grad[group.row : group.row + group.rows], gradient.dtype)
            sums = []
            inputs: dict[int, Tensor] = {}
            for block in reversed(kept.blocks.blocks()):
                if block not in group.graphs:
                    yield from self._recompute(key, kept, group, block, inputs)
                    kept.train(group, block, inputs.pop(block))
                part = gradient.through(group, block, part)
                if block != kept.blocks.start:
                    group.inputs.pop(block, None)
                self._count(kept)
                sums.append(part.sum(dtype=torch.float32))
                self._synchronize()
                self._trim()
                yield
            _check_sums(sums, list(reversed(kept.blocks.blocks())), "the gradient")
            outs.append(gradient.end(part))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def forget(self, key: Hashable) -> None:
        """Free what is kept of a pass; unknown keys are ignored. If its backward is under way, that fails."""
        kept = self._passes.pop(key, None)
        if kept is not None:
            kept.clear()
            self._count(kept)

    def has(self, key: Hashable) -> bool:
        """Whether a backward of this pass could be run. Any thread may ask."""
        return key in self._passes

    def expire(self) -> None:
        """Forget passes whose time is up."""
        now = self._clock()
        for key in [key for key, kept in self._passes.items() if kept.until_s <= now]:
            self.forget(key)

    def stats(self) -> PassStats:
        return PassStats(len(self._passes), self._activation_bytes, self._input_bytes)

    def _new(
        self, lengths: Sequence[int], blocks: Span, adapter: tuple[AdapterLayout, Tensor] | None, peer: str
    ) -> Pass:
        state = None if adapter is None else self._state(*adapter, blocks)
        groups = list(grouped(lengths, self._piece_rows()))
        stack = self._stack
        if isinstance(stack, LeadingStack):
            return LedPass(stack.passes, stack, blocks, groups, state, peer)
        return Pass(stack, blocks, groups, state, peer)

    def _state(self, layout: AdapterLayout, numbers: Tensor, blocks: Span) -> AdapterState:
        """Maybe on the device already, for another pass."""
        for kept in self._passes.values():
            if kept.state is not None and kept.state.is_of(layout, numbers, blocks):
                return kept.state
        return AdapterState(self._stack, layout, numbers, blocks)

    def _forward(self, key: Hashable, kept: Pass, group: Group, block: int, hidden: Tensor) -> Tensor:
        if self._passes.get(key) is not kept:  # not to be kept, or too large, or forgotten meanwhile
            return kept.run(group, block, hidden)
        out = kept.train(group, block, hidden)
        group.inputs[block] = hidden
        self._count(kept)
        self._trim()
        return out

    def _recompute(
        self, key: Hashable, kept: Pass, group: Group, block: int, inputs: dict[int, Tensor]
    ) -> Iterator[None]:
        """Puts the input of `block` into `inputs`, and those that it meets on the way there."""
        known = {**group.inputs, **inputs}
        start = max((number for number in known if number <= block), default=None)
        if start is None or self._passes.get(key) is not kept:
            raise PassGoneError("the inputs of this training pass were dropped for want of memory")
        hidden = inputs[start] = known[start]
        for number in range(start, block):
            hidden = inputs[number + 1] = kept.run(group, number, hidden)
            self._synchronize()
            yield

    def _trim(self) -> None:
        """Drop what is over the limits: graphs, then inputs of inner blocks, then passes; of the peer that
        has most, the oldest first.
        """
        while self._activation_bytes > self.limits.activation_bytes:
            _, kept = self._heaviest(lambda kept: kept.counted.activation_bytes)
            kept.drop_graph()
            self._count(kept)
        while self._input_bytes > self.limits.input_bytes:
            if any(kept.counted.inner_bytes for kept in self._passes.values()):
                _, kept = self._heaviest(lambda kept: kept.counted.inner_bytes)
                kept.drop_inner_inputs()
                self._count(kept)
            else:
                self.forget(self._heaviest(lambda kept: kept.counted.input_bytes)[0])

    def _count(self, kept: Pass) -> None:
        """What the pass keeps has changed."""
        before, now = kept.counted, kept.count()
        self._activation_bytes += now.activation_bytes - before.activation_bytes
        self._input_bytes += now.input_bytes - before.input_bytes

    def _trim_adapters(self, newest: Pass) -> None:
        """Forget passes whose adapters are too much together: of the peer that has most, the oldest first."""
        while sum(self._adapters().values()) > self.limits.adapter_bytes:
            of_peers: dict[str, int] = {}
            for (peer, _), nbytes in self._adapters().items():
                of_peers[peer] = of_peers.get(peer, 0) + nbytes
            old = [key for key, kept in self._passes.items() if kept.state is not None and kept is not newest]
            if not old:
                return
            key = max(old, key=lambda key: of_peers[self._passes[key].peer])
            self.forget(key)

    def _adapters(self) -> dict[tuple[str, int], int]:
        """Bytes of the states of adapters that passes hold, by peer and place."""
        return {
            (kept.peer, kept.state.numbers.data_ptr()): kept.state.numbers.nbytes
            for kept in self._passes.values()
            if kept.state is not None
        }

    def _heaviest(self, weight: Callable[[Pass], int]) -> tuple[Hashable, Pass]:
        """Of the peer whose passes weigh most together, the oldest that weighs anything."""
        totals: dict[str, int] = {}
        for kept in self._passes.values():
            totals[kept.peer] = totals.get(kept.peer, 0) + weight(kept)
        peer = max(totals, key=lambda peer: totals[peer])
        return next((key, kept) for key, kept in self._passes.items() if kept.peer == peer and weight(kept))

    def _touch(self, kept: Pass) -> None:
        kept.until_s = self._clock() + self.limits.keep_s

    def _check(self, rows: Tensor, count: int, what: str) -> None:
        expected = (count, self._stack.config.hidden_size)
        if rows.shape != expected or not count:
            raise BadTensorError(f"{what} has shape {list(rows.shape)}, expected {list(expected)}")
        if count > self.limits.max_rows:
            limit = self.limits.max_rows
            raise BadTensorError(f"a pass of {count} tokens is over this server's limit of {limit}")
        if not all_finite(rows):
            raise BadTensorError(f"{what} of a training pass is not finite")

    def _own(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """On the device of the blocks; nothing made in inference mode can have gradients."""
        with torch.inference_mode(False):
            moved = to_device(rows, self._stack.device).to(dtype)
            return moved.clone() if moved.is_inference() else moved.detach()

    def _synchronize(self) -> None:
        if self._stack.device.type != "cpu":
            wait_for(self._stack.device)


def _check_sums(sums: Sequence[Tensor], blocks: Sequence[int], what: str) -> None:
    """One look for all blocks: a device need not be waited for after each."""
    finite = torch.stack(list(sums)).isfinite()
    if not bool(finite.all()):
        block = blocks[int(finite.logical_not().nonzero()[0])]
        raise NotFiniteError(f"{what} of block {block} is not finite in a training pass")
