"""Random small models of every kind, with weights large enough that no block is near the identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.ends import Ends, load_ends
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.span import Span

VOCABULARY = 97
BLOCKS = 3
TOLERANCE = 1e-4

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


def _bloom(heads: int, **fields: Any) -> transformers.PreTrainedConfig:
    return transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=16 * heads, n_layer=BLOCKS, n_head=heads, **fields
    )


def _llama(**fields: Any) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(**{**_LLAMA, **fields})


CONFIGS: dict[str, Any] = {
    "bloom": lambda: _bloom(4),
    "bloom-6-heads": lambda: _bloom(6),
    "bloom-post-norm": lambda: _bloom(4, apply_residual_connection_post_layernorm=True),
    "llama": lambda: _llama(),
    "llama3-biases": lambda: _llama(
        rope_parameters=dict(_LLAMA3), num_attention_heads=8, attention_bias=True, mlp_bias=True
    ),
    "llama-yarn-tied": lambda: _llama(rope_parameters=dict(_YARN), tie_word_embeddings=True),
    "llama-linear": lambda: _llama(rope_parameters=dict(_LINEAR), num_key_value_heads=4),
    "mistral-window": lambda: transformers.MistralConfig(**_LLAMA, sliding_window=9),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **_LLAMA, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_LLAMA, head_dim=32),
}

#: Rows so long that each of two parts of them is still a whole number of nf4's blocks.
WIDE: dict[str, Any] = {
    "bloom-wide": lambda: _bloom(8),
    "qwen2-wide": lambda: transformers.Qwen2Config(**{**_LLAMA, "hidden_size": 128}),
}


def make(name: str, seed: int = 0) -> Any:
    """A transformers model in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config({**CONFIGS, **WIDE}[name]()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


class Local:
    """A whole model from a checkpoint, with one sequence in its pool."""

    def __init__(self, path: Path | str, dtype: torch.dtype = torch.float32, pool_tokens: int = 512) -> None:
        self.checkpoint = open_checkpoint(str(path))
        span = Span(0, self.checkpoint.config.num_blocks)
        self.stack: BlockStack = load_blocks(self.checkpoint, span, dtype=dtype)
        self.ends: Ends = load_ends(self.checkpoint, dtype=dtype)
        self.pool = KVPool.allocate(self.checkpoint.config, span, pool_tokens, dtype, "cpu")

    def run(self, batch: PackedBatch, ids: Tensor) -> Tensor:
        hidden = self.stack.forward(self.ends.embed(ids), batch, self.pool, self.stack.span)
        return self.ends.logits(hidden)

    def step(self, ids: Tensor, position: int, extents: tuple[tuple[int, int], ...] | None = None) -> Tensor:
        """Logits of `ids` at `position`; the sequence lies from row 3 on unless `extents` say otherwise."""
        end = position + len(ids)
        piece = PackedSlice(0, len(ids), position, extents or ((3, 3 + end),))
        return self.run(PackedBatch.build([piece]), ids)

    def in_chunks(self, ids: Tensor, size: int) -> Tensor:
        return torch.cat([self.step(ids[i : i + size], i) for i in range(0, len(ids), size)])
