"""Random checkpoints of four blocks, far from the identity, and transformers' own layers to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from petal_swarm.engine.engine import Engine
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.span import Span

BLOCKS = 4
HIDDEN = 32
WHOLE = Span(0, BLOCKS)
TOLERANCE = 1e-4

_CONFIGS: dict[str, Any] = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=50, hidden_size=HIDDEN, n_layer=BLOCKS, n_head=4),
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ),
}
KINDS = tuple(_CONFIGS)


@dataclass
class Tiny:
    stack: BlockStack
    model: Any

    def engine(self, *, kv_tokens: int = 2048, max_batch_tokens: int = 256) -> Engine:
        return Engine(self.stack, kv_tokens=kv_tokens, max_batch_tokens=max_batch_tokens)

    @torch.inference_mode()
    def expected(self, hidden: Tensor, blocks: Span = WHOLE) -> Tensor:
        """`hidden [tokens, hidden_size]` of one whole sequence through transformers' layers."""
        base = self.model.base_model
        layers = base.h if hasattr(base, "h") else base.layers
        found: list[Tensor] = []

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((hidden[None], *args[1:]), kwargs)

        def leave(_: Any, args: tuple[Any, ...], output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        hooks = [
            layers[blocks.start].register_forward_pre_hook(enter, with_kwargs=True),
            layers[blocks.end - 1].register_forward_hook(leave),
        ]
        try:
            base(torch.zeros(1, len(hidden), dtype=torch.long), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0].view(hidden.shape)


def make(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(len(kind))
        model = transformers.AutoModelForCausalLM.from_config(_CONFIGS[kind]()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    stack = load_blocks(open_checkpoint(str(folder)), WHOLE, dtype=dtype)
    return Tiny(stack, model)


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor | None, expected: Tensor) -> bool:
    assert found is not None
    assert found.shape == expected.shape
    return not expected.numel() or float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE
