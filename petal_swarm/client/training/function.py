"""The blocks in the swarm as one differentiable function, for blocking code."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from petal_swarm.client.loop import LoopThread
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.training.adapters import AdapterVersions, TrainedAdapter
from petal_swarm.client.training.courses import Gradient, Pass
from petal_swarm.client.training.openings import LaneOpenings
from petal_swarm.client.training.trainer import Trainer
from petal_swarm.client.view import ModelRef
from petal_swarm.errors import ConfigError
from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.models.config import ModelConfig
from petal_swarm.span import Span

CLOSE_TIMEOUT_S = 10.0


class RemoteBlocks:
    """The blocks of one model, which may be used by several threads; closed with the client's model."""

    def __init__(self, loop: LoopThread, swarm: Swarm, ref: ModelRef, config: ModelConfig) -> None:
        self._loop = loop
        self._config = config
        self._client_config = swarm.config
        self._versions = AdapterVersions(config)
        self._trainer = Trainer(LaneOpenings(swarm.view, swarm.transport, ref))

    def __call__(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        blocks: Span,
        *,
        layout: AdapterLayout | None = None,
        numbers: Tensor | None = None,
    ) -> Tensor:
        """What comes out of `blocks` for `hidden [tokens, hidden_size]`, packed sequences of `lengths`.

        `numbers` are those of the adapter of that `layout`, for the whole model. Gradients go to `hidden` and
        to `numbers`; the result is like `hidden`.

        Raises:
            ConfigError: a sequence is longer than the servers take, or the adapter does not fit the model.
            MissingBlocksError: nobody trains some of the blocks.
            RemoteError, NetworkError: the swarm failed.
        """
        expected = [sum(lengths), self._config.hidden_size]
        if list(hidden.shape) != expected:
            raise ConfigError(f"expected {expected} hidden states, got {list(hidden.shape)}")
        if blocks.end > self._config.num_blocks:
            raise ConfigError(f"the model has {self._config.num_blocks} blocks, no {blocks}")
        adapter = None
        if layout is not None and numbers is not None and numbers.numel():
            adapter = self._versions.of(layout, numbers)
        wanted = any(tensor is not None and tensor.requires_grad for tensor in (hidden, numbers))
        call = _Call(self, tuple(lengths), blocks, adapter, differentiable=wanted and torch.is_grad_enabled())
        output: Tensor = _Function.apply(hidden, numbers, call)  # type: ignore[no-untyped-call]
        return output

    def close(self) -> None:
        """End all that is open in the swarm. Idempotent."""
        self._loop.run(self._trainer.close(), timeout_s=CLOSE_TIMEOUT_S)

    def forward(self, rows: Tensor, call: _Call, *, keep: bool) -> tuple[Tensor, list[Pass]]:
        work = self._trainer.forward(rows, call.lengths, call.blocks, call.adapter, keep=keep)
        return self._loop.run(work, timeout_s=self._limit_s(len(call.lengths)))

    def backward(self, passes: Sequence[Pass], gradient: Tensor, *, inputs: bool) -> Gradient:
        work = self._trainer.backward(passes, gradient, inputs=inputs)
        return self._loop.run(work, timeout_s=self._limit_s(2 * len(passes)))

    @property
    def abandoned(self) -> deque[Pass]:
        return self._trainer.abandoned

    def _limit_s(self, passes: int) -> float:
        """Nothing should take so long: what is lost or silent is noticed much sooner."""
        config = self._client_config
        opening_s = config.wait_for_blocks_s + config.open_attempts * 2 * config.open_timeout_s
        return opening_s + config.repair_timeout_s + passes * config.step_timeout_s


class _Call:
    """One use of the blocks: what its backward must know besides tensors."""

    __slots__ = ("__weakref__", "adapter", "blocks", "differentiable", "lengths", "passes", "remote")

    def __init__(
        self,
        remote: RemoteBlocks,
        lengths: tuple[int, ...],
        blocks: Span,
        adapter: TrainedAdapter | None,
        *,
        differentiable: bool,
    ) -> None:
        self.remote = remote
        self.differentiable = differentiable
        self.lengths = lengths
        self.blocks = blocks
        self.adapter = adapter

    def keep(self, passes: list[Pass]) -> None:
        """The hops keep what these passes need until this object goes, with the graph that it is in."""
        self.passes = passes
        # Not from here: whoever drops a graph must not wait for the network, and may be the loop itself.
        weakref.finalize(self, self.remote.abandoned.extend, passes).atexit = False


class _Function(torch.autograd.Function):
    """`hidden` and the adapter's numbers to what comes out of the blocks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, numbers: Tensor | None, call: _Call) -> Tensor:
        keep = call.differentiable
        rows = hidden.detach().to(device="cpu", dtype=torch.float32, copy=keep).contiguous()
        output, passes = call.remote.forward(rows, call, keep=keep)
        if keep:
            call.keep(passes)
            ctx.call, ctx.numbers_device = call, None if numbers is None else numbers.device
        return output.to(device=hidden.device, dtype=hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        call: _Call = ctx.call
        wants_rows, wants_numbers, _ = ctx.needs_input_grad
        found = call.remote.backward(
            call.passes, gradient.detach().cpu().float().contiguous(), inputs=wants_rows
        )
        rows = found.rows.to(gradient) if wants_rows and found.rows is not None else None
        numbers = (
            found.numbers.to(ctx.numbers_device) if wants_numbers and found.numbers is not None else None
        )
        return rows, numbers, None
