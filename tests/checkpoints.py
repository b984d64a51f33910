"""Small random checkpoints, far from the identity, so that a test on them can fail.

At their initial scale random blocks change little, and a tied head then repeats one token whatever the
blocks do: weights are scaled up, and `assert_lively` says whether that was enough. Some seeds still end
in a short cycle of tokens; the defaults do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 1000
SCALE = 15.0


def save_bloom(folder: Path, *, blocks: int = 8, hidden: int = 64, heads: int = 4, seed: int = 2) -> Path:
    """A BLOOM of random weights in `folder`."""
    config = BloomConfig(hidden_size=hidden, n_layer=blocks, n_head=heads, vocab_size=VOCABULARY)
    return _save(BloomForCausalLM, config, folder, seed)


def save_llama(
    folder: Path,
    *,
    blocks: int = 8,
    hidden: int = 64,
    heads: int = 4,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
) -> Path:
    """A Llama with grouped-query attention and tied embeddings, random weights, in `folder`."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    return _save(LlamaForCausalLM, config, folder, seed)


def _save(kind: type[Any], config: Any, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(SCALE)
    model.save_pretrained(folder)
    return folder


def reference(folder: Path) -> PreTrainedModel:
    """The same model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_lively(tokens: torch.Tensor, prompt_length: int) -> None:
    """Generated tokens that only repeat one another would make any comparison worthless."""
    distinct = len(set(tokens[:, prompt_length:].flatten().tolist()))
    assert distinct >= 10, f"only {distinct} different tokens: scale the weights up"
