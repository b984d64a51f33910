"""Servers for `benchmarks.audits`: honest ones of every kind, and what dishonest ones answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.quantization import model_config, random_block
from petal_swarm.client.audit import Precision
from petal_swarm.models import quantization
from petal_swarm.models.checkpoint import Checkpoint
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.models.family import Block
from petal_swarm.models.int8 import Int8Linear
from petal_swarm.models.nf4 import Nf4Linear
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.quantization import Quant, Weight, quantize
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Span

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """How an honest server computes; `plain` takes the products that machines without special ones take."""

    precision: Precision
    plain: bool = False


KINDS = [
    Kind(Precision("float32")),
    Kind(Precision("float32", kv_dtype="int8")),
    Kind(Precision("bfloat16")),
    Kind(Precision("bfloat16", kv_dtype="int8")),
    Kind(Precision("float16")),
    Kind(Precision("float32", "int8")),
    Kind(Precision("bfloat16", "int8", "int8")),
    Kind(Precision("bfloat16", "int8"), plain=True),
    Kind(Precision("float16", "int8")),
    Kind(Precision("bfloat16", "nf4")),
    Kind(Precision("float32", "nf4"), plain=True),
    Kind(Precision("float16", "nf4", "int8")),
]


@dataclass
class Model:
    """A model's blocks as float32 tensors, and rows that go into the first of them."""

    name: str
    config: ModelConfig
    tensors: Callable[[int], Tensors]
    prompts: list[Tensor]
    _blocks: dict[tuple[str, str, bool], list[Block]] = field(default_factory=dict)

    def blocks(self, kind: Kind) -> list[Block]:
        """All blocks as a server of this kind holds them."""
        precision = kind.precision
        key = (precision.dtype, precision.quant, kind.plain)
        if key not in self._blocks:
            numbers = range(self.config.num_blocks)
            self._blocks[key] = [self.build(self.tensors(number), kind) for number in numbers]
        return self._blocks[key]

    def build(self, tensors: Tensors, kind: Kind) -> Block:
        dtype, quant = DTYPES[kind.precision.dtype], cast(Quant, kind.precision.quant)
        weights: dict[str, Weight] = {}
        for name, tensor in tensors.items():
            matrix = quant != "none" and tensor.dim() > 1
            weights[name] = quantize(name, tensor, quant) if matrix else tensor.to(dtype, copy=True)
        with ExitStack() as patches:
            if kind.plain:
                patches.enter_context(patch.object(quantization, "make_int8_linear", Int8Linear))
                patches.enter_context(patch.object(quantization, "make_nf4_linear", Nf4Linear))
            return family_of(self.config).build_block(self.config, weights)

    def run(
        self,
        kind: Kind,
        inputs: Tensor,
        span: Span,
        cuts: Sequence[int] = (),
        blocks: list[Block] | None = None,
    ) -> list[Tensor]:
        """What comes out of each block of `span`, computed in steps that begin at the rows `cuts`.

        Each is float32 `[rows, hidden_size]`.
        """
        dtype, rows = DTYPES[kind.precision.dtype], len(inputs)
        blocks = self.blocks(kind)[span.start : span.end] if blocks is None else blocks
        stack = BlockStack(self.config, span, blocks, dtype=dtype)
        pool = KVPool.allocate(self.config, span, rows, dtype, "cpu", kind.precision.kv_dtype)
        outputs: list[list[Tensor]] = [[] for _ in span.blocks()]
        bounds = [0, *cuts, rows]
        with torch.inference_mode():
            for start, stop in pairwise(bounds):
                batch = PackedBatch.build([PackedSlice(0, stop - start, start, ((0, stop),))])
                hidden = inputs[start:stop].to(dtype)
                for found, output in zip(
                    outputs, stack.forward_by_block(hidden, batch, pool, span), strict=True
                ):
                    found.append(output.float())
        return [torch.cat(found) for found in outputs]


def smollm(checkpoint: Checkpoint, prompts: list[Tensor]) -> Model:
    family, config = checkpoint.family, checkpoint.config

    def tensors(number: int) -> Tensors:
        prefix = family.block_prefix.format(number)
        loaded = checkpoint.load(family.block_tensors(config, number), dtype=torch.float32)
        return {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}

    return Model("SmolLM2-135M", config, tensors, prompts)


def random_bloom(blocks: int, ids: Sequence[Tensor], seed: int) -> Model:
    """Random weights of bloom-560m's shape, with outliers; each token of the prompts has a random row."""
    config = model_config(blocks)
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(int(max(part.max() for part in ids)) + 1, config.hidden_size, generator=generator)
    prompts = [embedding[part] for part in ids]
    return Model(
        f"random BLOOM {seed}", config, lambda number: random_block(config, 1000 * seed + number), prompts
    )


class Identity:
    """A block that is not computed."""

    nbytes = 0

    def __call__(self, hidden: Tensor, plan: Any, pair: Tensor) -> Tensor:
        return hidden


@dataclass
class Situation:
    """A hop's part in a session: what it gets, and the rows of the last steps, which are audited."""

    model: Model
    span: Span
    inputs: Tensor
    other: Tensor  # inputs of somebody else's session
    rows: int
    rng: random.Random

    def honest(self, kind: Kind, blocks: list[Block] | None = None) -> Tensor:
        return self.model.run(kind, self.inputs, self.span, self._decoding, blocks)[-1][-self.rows :]

    @property
    def _decoding(self) -> range:
        return range(len(self.inputs) - self.rows, len(self.inputs))

    @cached_property
    def culprit(self) -> int:
        """Which block of the span is at fault, where one is."""
        return self.rng.randrange(len(self.span))

    def own(self, kind: Kind) -> list[Block]:
        return self.model.blocks(kind)[self.span.start : self.span.end]

    def rebuilt(
        self, kind: Kind, change: Callable[[str, Tensor], Tensor], *, one: bool = False
    ) -> list[Block]:
        """The span's blocks, or one of them, with other matrices."""
        blocks = self.own(kind)
        for index in [self.culprit] if one else range(len(blocks)):
            tensors = self.model.tensors(self.span.start + index)
            changed = {n: change(n, t) if t.dim() > 1 else t for n, t in tensors.items()}
            blocks[index] = self.model.build(changed, kind)
        return blocks

    def each(self, kind: Kind, history: Callable[[int], Tensor]) -> Tensor:
        """Rows computed one by one, each after another `history(position)`, its own input the last of it."""
        found = [self.model.run(kind, history(position), self.span)[-1][-1] for position in self._decoding]
        return torch.stack(found)


Fault = Callable[[Situation, Kind], Tensor]


def int4(tensor: Tensor, group: int = 32) -> Tensor:
    """Rounded to 15 levels for each `group` of neighbours."""
    parts = tensor.reshape(-1, group)
    step = parts.abs().amax(1, keepdim=True).clamp_min(1e-12) / 7
    return ((parts / step).round() * step).view(tensor.shape)


def _noise(size: float) -> Fault:
    def fault(at: Situation, kind: Kind) -> Tensor:
        rows = at.honest(kind)
        change = rows - at.inputs[-at.rows :]
        deviation = change.abs().median(-1, keepdim=True).values * 1.4826
        generator = torch.Generator().manual_seed(at.rng.randrange(1 << 30))
        return rows + size * deviation * torch.randn(rows.shape, generator=generator)

    return fault


def _spoilt(spoil: Callable[[Tensor], object]) -> Fault:
    def fault(at: Situation, kind: Kind) -> Tensor:
        rows = at.honest(kind)
        spoil(rows)
        return rows

    return fault


def _large_zeroed(rows: Tensor) -> None:
    rows.scatter_(1, rows.abs().topk(4).indices, 0.0)


def _finetuned(size: float, *, one: bool = False) -> Fault:
    def fault(at: Situation, kind: Kind) -> Tensor:
        generator = torch.Generator().manual_seed(at.rng.randrange(1 << 30))

        def change(_: str, t: Tensor) -> Tensor:
            return t + size * t.std() * torch.randn(t.shape, generator=generator)

        return at.honest(kind, at.rebuilt(kind, change, one=one))

    return fault


def _skipped(at: Situation, kind: Kind) -> Tensor:
    blocks: list[Any] = at.own(kind)
    blocks[at.culprit] = Identity()
    return at.honest(kind, blocks)


def _swapped(at: Situation, kind: Kind) -> Tensor:
    blocks = at.own(kind)
    if len(blocks) == 1:
        return _stale(1)(at, kind)
    first = min(at.culprit, len(blocks) - 2)
    blocks[first], blocks[first + 1] = blocks[first + 1], blocks[first]
    return at.honest(kind, blocks)


def _stale(distance: int) -> Fault:
    def fault(at: Situation, kind: Kind) -> Tensor:
        blocks, every = at.own(kind), at.model.blocks(kind)
        number = at.span.start + at.culprit
        away = number + distance if number + distance < len(every) else number - distance
        blocks[at.culprit] = every[max(away, 0)]
        return at.honest(kind, blocks)

    return fault


def _windowed(tokens: int) -> Fault:
    return lambda at, kind: at.each(kind, lambda p: at.inputs[max(0, p + 1 - tokens) : p + 1])


def _without_previous(at: Situation, kind: Kind) -> Tensor:
    return at.each(kind, lambda p: torch.cat([at.inputs[: p - 1], at.inputs[p : p + 1]]))


def _shifted(at: Situation, kind: Kind) -> Tensor:
    return at.each(kind, lambda p: torch.cat([at.inputs[:1], at.inputs[:1], at.inputs[1 : p + 1]]))


def _foreign(at: Situation, kind: Kind) -> Tensor:
    return at.each(kind, lambda p: torch.cat([at.other[:p], at.inputs[p : p + 1]]))


def _previous(at: Situation, kind: Kind) -> Tensor:
    rows = at.model.run(kind, at.inputs, at.span)[-1]
    return rows[-at.rows - 1 : -1]


def _as(dtype: str, quant: str, kv_dtype: str = "auto") -> Fault:
    return lambda at, kind: at.honest(Kind(Precision(dtype, quant, kv_dtype)))


#: What the project promises to catch, for servers of plain weights and of int8.
PROMISED: dict[str, Fault] = {
    "noise, 20% of the change": _noise(0.2),
    "noise, 50% of the change": _noise(0.5),
    "zeros": _spoilt(lambda rows: rows.zero_()),
    "NaN": _spoilt(lambda rows: rows.fill_(torch.nan)),
    "one infinite number": _spoilt(lambda rows: rows[:, 5].fill_(torch.inf)),
    "nothing computed": lambda at, kind: at.inputs[-at.rows :].clone(),
    "a skipped block": _skipped,
    "two blocks swapped": _swapped,
    "a stale layer: the next block's weights": _stale(1),
    "a stale layer: another block's weights": _stale(5),
    "a stale layer: weights off by 20%": _finetuned(0.2, one=True),
    "the previous step's output": _previous,
    "another session's KV cache": _foreign,
}
#: int4 in place of bfloat16.
INT4: dict[str, Fault] = {
    "int4: nf4": _as("bfloat16", "nf4"),
    "int4: groups of 32": lambda at, kind: at.honest(kind, at.rebuilt(kind, lambda _, t: int4(t))),
}
#: Smaller ones: what is possible inside the tolerance.
SUBTLE: dict[str, Fault] = {
    "noise, 5% of the change": _noise(0.05),
    "noise, 10% of the change": _noise(0.1),
    "half the channels zeroed": _spoilt(lambda rows: rows[:, ::2].zero_()),
    "the 4 largest channels zeroed": _spoilt(_large_zeroed),
    "an earlier finetune: all weights off by 1%": _finetuned(0.01),
    "an earlier finetune: all weights off by 2%": _finetuned(0.02),
    "an earlier finetune: all weights off by 5%": _finetuned(0.05),
    "an earlier finetune: one block off by 5%": _finetuned(0.05, one=True),
    "int8 weights, unannounced": _as("bfloat16", "int8"),
    "int8 KV cache, unannounced": _as("bfloat16", "none", "int8"),
    "attention to the last 32 tokens": _windowed(32),
    "KV cache without the last token": _without_previous,
    "KV cache shifted by one": _shifted,
}
