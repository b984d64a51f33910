"""Engines on the simulated device beside the same on the host, and what sessions may do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from petal_swarm.engine.engine import Chunk, Engine
from petal_swarm.engine.steps import StepRequest
from petal_swarm.models import attention, devices, int8, int8_kv, nf4
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.families import family_of
from petal_swarm.models.offload import Residence
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.span import Slice, Span
from tests.models.tiny_models import BLOCKS

#: Where a model is, by its name; made when first asked for.
Folders: TypeAlias = Callable[[str], Path]

WHOLE = Span(0, BLOCKS)
TOLERANCE = 1e-5
#: What a step may make the host wait for: its end,
END = [("synchronize", "engine.engine:Engine.synchronize")]
#: and, where whole steps of several sessions were computed together, a copy of all their rows at once.
TOGETHER = [("copy to the host", "engine.engine:_fetched"), *END]


def waits_of(what: str) -> list[tuple[str, str]]:
    """Of the batches of a `Script`, by their names there."""
    if what == "begin a chunk":
        return []
    return TOGETHER if what in ("prompts", "decode", "verify", "roll back", "decode beside a prompt") else END


@dataclass(frozen=True)
class Kind:
    """A model and how it is computed. `ways` says that the host must go the ways of a device, too, since its
    own round to int8 or 16 bits in other places.
    """

    model: str
    quant: str = "none"
    kv_dtype: str = "auto"
    dtype: torch.dtype = torch.float32

    @property
    def ways(self) -> bool:
        return (self.quant, self.kv_dtype, self.dtype) != ("none", "auto", torch.float32)

    def __str__(self) -> str:
        kv = "" if self.kv_dtype == "auto" else f"{self.kv_dtype}_kv"
        kind = "" if self.dtype is torch.float32 else str(self.dtype).removeprefix("torch.")
        return "-".join(part for part in (self.model, self.quant, kv, kind) if part not in ("none", ""))


KINDS = [
    Kind("bloom"),
    Kind("llama3-biases"),
    Kind("mistral-window"),
    Kind("qwen2-window"),
    Kind("qwen3"),
    Kind("bloom", quant="int8"),
    Kind("llama", quant="nf4"),
    Kind("bloom", kv_dtype="int8"),
    Kind("mistral-window", quant="int8", kv_dtype="int8", dtype=torch.float16),
    Kind("bloom", dtype=torch.float16),
    Kind("qwen3", dtype=torch.bfloat16),
]


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host computes as a device does."""
    monkeypatch.setattr(devices, "on_host", lambda place: False)
    monkeypatch.setattr(int8, "packing_works", lambda: False)
    monkeypatch.setattr(int8, "_fused_works", lambda values: False)
    monkeypatch.setattr(nf4, "packing_works", lambda size: False)
    monkeypatch.setattr(int8_kv, "_STRIP_ROWS_CPU", int8_kv._STRIP_ROWS)
    assert attention.devices is devices


def load(folder: Path, place: str, kind: Kind, residence: Residence | None = None) -> BlockStack:
    options: dict[str, Any] = {} if kind.quant == "none" else {"quant": kind.quant}
    checkpoint = open_checkpoint(str(folder))
    return load_blocks(checkpoint, WHOLE, dtype=kind.dtype, device=place, residence=residence, **options)


def engine_of(stack: BlockStack, kv_dtype: str = "auto", **sizes: int) -> Engine:
    return Engine(stack, **{"kv_tokens": 1024, "max_batch_tokens": 256, **sizes}, kv_dtype=kv_dtype)


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def far(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Largest differences, relative to the largest number, of those tensors that are not the same."""
    assert [own.shape for own in found] == [other.shape for other in expected]
    pairs = [(own.cpu(), other) for own, other in zip(found, expected, strict=True) if other.numel()]
    distances = [float((own.float() - other).abs().max() / other.abs().max()) for own, other in pairs]
    return [distance for distance in distances if not distance < TOLERANCE]


def adapter_of(stack: BlockStack, *, every: int, prefix: int, seed: int) -> tuple[AdapterLayout, Tensor]:
    """LoRA on each `every`-th projection, and a prefix."""
    shapes = family_of(stack.config).block_shapes(stack.config)
    stems = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2][::every]
    places = tuple(LoraPlace(block, stem, 2, 0.5) for block in WHOLE.blocks() for stem in stems)
    layout = AdapterLayout(places, prefix)
    return layout, 0.3 * rows(1, layout.numbers(stack.config, WHOLE), seed)[0]


class Script:
    """Steps of some sessions; `found` are the answers. `after(what)` is called behind each batch."""

    def __init__(self, engine: Engine, after: Callable[[str], None] = lambda what: None) -> None:
        self.engine = engine
        self.found: list[Tensor] = []
        self._after = after
        self._seed = 0

    def step(self, session: str, *pieces: tuple[int, int, int], **fields: Any) -> StepRequest:
        """Of (sequence, position, length)."""
        slices = tuple(Slice(*piece) for piece in pieces)
        self._seed += 1
        width = self.engine.stack.config.hidden_size
        hidden = rows(sum(piece.length for piece in slices), width, self._seed)
        return StepRequest(session, WHOLE, slices, hidden, **fields)

    def run(self, what: str, *requests: StepRequest) -> None:
        results = self.engine.run(requests)
        self._after(what)
        for result in results:
            assert result.error is None, result.error
            assert result.hidden is not None
            self.found.append(result.hidden)

    def prefill_beside_decoding(self) -> None:
        """A prompt in two chunks, interrupted at every block by decoding of others."""
        placed = self.engine.place(self.step("c", (0, 0, 30)))
        position = 40
        for chunk in (17, 13):
            batch = self.engine.begin([Chunk(placed, chunk)])
            self._after("begin a chunk")
            while not batch.done:
                batch.advance()
                self._after("a block of a chunk")
                self.run("decode", self.step("a", (0, position, 1)), self.step("b", (0, position - 25, 1)))
                position += 1
        self.found.append(placed.result())

    def everything(self) -> list[Tensor]:
        self.run("prompt", self.step("a", (0, 0, 40)))
        self.run("prompts", self.step("b", (0, 0, 15)), self.step("d", (0, 0, 3)))
        self.prefill_beside_decoding()
        self.run("decode alone", self.step("a", (0, 46, 1)))
        ragged = [self.step("a", (0, 47, 1)), self.step("b", (0, 21, 1)), self.step("c", (0, 30, 1))]
        self.run("decode", *ragged, self.step("d", (0, 3, 1)))
        self.run("verify", self.step("a", (0, 48, 5)), self.step("b", (0, 20, 4)))
        self.run("roll back", self.step("a", (0, 49, 2)), self.step("b", (0, 21, 1)))
        self.run("decode beside a prompt", self.step("d", (0, 4, 20)), self.step("a", (0, 51, 1)))
        beams = ((0, 51, 1), (1, 51, 1), (2, 51, 1))
        self.run("fork", self.step("a", *beams, forks=(0, 0, 0), rows="last"))
        beams = ((0, 52, 1), (1, 52, 1), (2, 52, 1))
        self.run("reorder", self.step("a", *beams, forks=(2, 0, 0)), self.step("c", (0, 31, 2), rows="last"))
        self.run(
            "the last rows", self.step("c", (0, 33, 20), rows="last"), self.step("d", (1, 0, 9), rows="none")
        )
        return self.found


def on_the_host(
    folder: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch, work: Callable[[BlockStack], list[Tensor]]
) -> list[Tensor]:
    """What `work` gives there, computed in the host's own way where that is as exact."""
    with monkeypatch.context() as patch:
        if not kind.ways:
            return work(load(folder, "cpu", kind))
        as_on_a_device(patch)
        with sdpa_kernel(SDPBackend.MATH):
            return work(load(folder, "cpu", kind))
