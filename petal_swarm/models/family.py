"""What a family of models has to say about itself, so that the rest of the layer is the same for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from petal_swarm.models.attention import Attention
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.lora import Project
from petal_swarm.models.quantization import Quant, Weight

Shape = tuple[int, ...]


class Block(Protocol):
    """One transformer layer: `hidden [tokens, hidden_size]` to the same shape, `pair` as the plan wants it.

    It must not write into `hidden`. If `hidden` requires a gradient, and projections and plan are those of
    `training`, what comes out is differentiable.
    """

    def __call__(self, hidden: Tensor, plan: Attention, pair: Tensor) -> Tensor: ...

    def adapted(self, project: Project) -> Block:
        """A copy whose projections are what `project` makes of them; the weights are shared."""
        ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class EndNames:
    """Stems of the tensors outside the blocks (without `.weight`); `embedding_norm` is BLOOM's."""

    embedding: str
    final_norm: str
    head: str
    embedding_norm: str | None = None


class Split(NamedTuple):
    """How a projection is cut: by what comes out of it (`rows`), or by what goes into it (`columns`).

    `of` says what the cut dimension consists of: query heads, key-value heads, or numbers inside the MLP.
    """

    by: Literal["rows", "columns"]
    of: Literal["heads", "kv", "inner"]


@dataclass(frozen=True)
class Family:
    """Tables and functions of one family.

    Tensor names are those of the Hugging Face checkpoint of the causal language model ("canonical names"):
    `block_prefix.format(n) + local` for a block's tensors. `gguf_architectures` maps a GGUF
    `general.architecture` to an architecture; `gguf_block` and `gguf_ends` map canonical stems to GGUF stems.
    `default_quant` is what servers do where nobody says otherwise. `splits` names, by stem, the projections
    that ranks share out among them; all other tensors of a block are whole at every rank.
    """

    name: str
    architectures: tuple[str, ...]
    base_prefix: str
    block_prefix: str
    ends: EndNames
    fingerprint: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], ModelConfig]
    block_shapes: Callable[[ModelConfig], dict[str, Shape]]
    build_block: Callable[[ModelConfig, dict[str, Weight]], Block]
    slopes: Callable[[ModelConfig], Tensor | None]
    rms_norms: bool
    default_quant: Quant = "none"
    splits: Mapping[str, Split] = field(default_factory=dict)
    gguf_architectures: Mapping[str, str] = field(default_factory=dict)
    gguf_block: Mapping[str, str] = field(default_factory=dict)
    gguf_ends: Mapping[str, str] = field(default_factory=dict)
    gguf_to_hf: Callable[[Mapping[str, Any], str], dict[str, Any]] | None = None
    gguf_restore: Callable[[ModelConfig, str, Tensor], Tensor] | None = None

    def block_tensors(self, config: ModelConfig, block: int) -> dict[str, Shape]:
        """Canonical names and shapes of the tensors of `block`."""
        prefix = self.block_prefix.format(block)
        return {prefix + local: shape for local, shape in self.block_shapes(config).items()}

    def end_tensors(self, config: ModelConfig) -> dict[str, Shape]:
        """Canonical names and shapes of what is outside the blocks."""
        hidden, ends = (config.hidden_size,), self.ends
        shapes: dict[str, Shape] = {f"{ends.embedding}.weight": (config.vocab_size, config.hidden_size)}
        norms = [ends.final_norm] if ends.embedding_norm is None else [ends.embedding_norm, ends.final_norm]
        for stem in norms:
            shapes[f"{stem}.weight"] = hidden
            if not self.rms_norms:
                shapes[f"{stem}.bias"] = hidden
        if not config.tied_embeddings:
            shapes[f"{ends.head}.weight"] = (config.vocab_size, config.hidden_size)
        return shapes

    def canonical(self, name: str) -> str:
        """The canonical name of a stored tensor: some checkpoints leave the base model's prefix out."""
        if name.startswith((self.base_prefix, f"{self.ends.head}.")):
            return name
        return self.base_prefix + name

    def gguf_name(self, canonical: str) -> str | None:
        """How a GGUF file calls a tensor; None for tensors it has no name for."""
        stem, _, kind = canonical.rpartition(".")
        if stem in self.gguf_ends:
            return f"{self.gguf_ends[stem]}.{kind}"
        head, _, tail = self.block_prefix.partition("{}")
        number, _, local = stem.removeprefix(head).partition(tail)
        if stem.startswith(head) and number.isdigit() and local in self.gguf_block:
            return f"blk.{number}.{self.gguf_block[local]}.{kind}"
        return None


def no_slopes(config: ModelConfig) -> Tensor | None:
    """For families whose scores carry no position bias."""
    return None
