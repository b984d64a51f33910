"""BLOOM (arXiv:2211.05100): layer norms with bias, ALiBi (arXiv:2108.12409), fused query-key-value, GELU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_swarm.models.attention import Attention
from petal_swarm.models.config import Fields, ModelConfig
from petal_swarm.models.family import EndNames, Family, Shape, Split
from petal_swarm.models.linear import Projection
from petal_swarm.models.lora import Part, Project, adapt
from petal_swarm.models.norms import LayerNorm
from petal_swarm.models.quantization import Weight, make_linear, map_parts, vector


class BloomBlock:
    """One layer; the rows of `qkv` are ordered by kind (checkpoints: by head)."""

    __slots__ = (
        "_down",
        "_input_norm",
        "_mlp_norm",
        "_out",
        "_parts",
        "_qkv",
        "_residual_after_norm",
        "_up",
    )

    def __init__(self, config: ModelConfig, tensors: dict[str, Weight]) -> None:
        def linear(stem: str) -> Projection:
            return make_linear(tensors.pop(f"{stem}.weight"), vector(tensors, f"{stem}.bias"))

        def norm(stem: str) -> LayerNorm:
            weight, bias = (vector(tensors, f"{stem}.{kind}") for kind in ("weight", "bias"))
            return LayerNorm(weight, bias, config.norm_eps)

        self._input_norm = norm("input_layernorm")
        for name in [name for name in tensors if ".query_key_value." in name]:
            tensors[name] = map_parts(tensors[name], partial(_split_by_kind, config))
        self._qkv = linear("self_attention.query_key_value")
        self._out = linear("self_attention.dense")
        self._mlp_norm = norm("post_attention_layernorm")
        self._up = linear("mlp.dense_h_to_4h")
        self._down = linear("mlp.dense_4h_to_h")
        self._residual_after_norm = config.residual_after_norm
        self._parts = _parts(config)

    def __call__(self, hidden: Tensor, plan: Attention, pair: Tensor) -> Tensor:
        normed = self._input_norm(hidden)
        attended = plan.attend(self._qkv(normed), pair)
        hidden = self._out.plus(attended, normed if self._residual_after_norm else hidden)
        normed = self._mlp_norm(hidden)
        up = F.gelu(self._up(normed), approximate="tanh")
        return self._down.plus(up, normed if self._residual_after_norm else hidden)

    def adapted(self, project: Project) -> BloomBlock:
        """A copy with other projections; norms are shared."""
        made = copy(self)
        for slot, parts in self._parts.items():
            setattr(made, slot, adapt(project, parts, getattr(self, slot)))
        return made

    @property
    def nbytes(self) -> int:
        parts = (self._input_norm, self._qkv, self._out, self._mlp_norm, self._up, self._down)
        return sum(part.nbytes for part in parts)


def _parts(config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    by_kind = partial(_split_by_kind, config)
    heads = config.num_heads * config.head_dim
    return {
        "_qkv": (Part("self_attention.query_key_value", 3 * heads, by_kind),),
        "_out": (Part("self_attention.dense", hidden),),
        "_up": (Part("mlp.dense_h_to_4h", inner),),
        "_down": (Part("mlp.dense_4h_to_h", hidden),),
    }


def _split_by_kind(config: ModelConfig, rows: Tensor) -> Tensor:
    """`[heads * 3 * head_dim, ...]` with query, key and value of each head together -> by kind."""
    by_head = rows.view(config.num_heads, 3, config.head_dim, *rows.shape[1:])
    return by_head.transpose(0, 1).reshape(rows.shape)


def _join_by_head(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """GGUF files hold the fused projection by kind; canonical tensors hold it by head."""
    if ".query_key_value." not in name:
        return tensor
    by_kind = tensor.view(3, config.num_heads, config.head_dim, *tensor.shape[1:])
    return by_kind.transpose(0, 1).reshape(tensor.shape)


def alibi_slopes(config: ModelConfig) -> Tensor:
    """One slope a head, float32 `[heads]`: a geometric sequence, interleaved for other than powers of two."""
    heads = config.num_heads
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def _parse(config: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(config)
    hidden = fields.integer("n_embed", "hidden_size")
    heads = fields.integer("n_head", "num_attention_heads")
    if hidden % heads:
        raise ValueError(f"hidden_size {hidden} is not a multiple of {heads} heads")
    return ModelConfig(
        family="bloom",
        architecture="BloomForCausalLM",
        num_blocks=fields.blocks("n_layer", "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=4 * hidden,
        vocab_size=fields.integer("vocab_size"),
        norm_eps=fields.number("layer_norm_epsilon", default=1e-5),
        max_positions=None,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        torch_dtype=fields.dtype(),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        residual_after_norm=fields.flag("apply_residual_connection_post_layernorm", False),
    )


def _block_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, Shape] = {}
    for stem in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{stem}.weight"] = shapes[f"{stem}.bias"] = (hidden,)
    for stem, rows, columns in (
        ("self_attention.query_key_value", 3 * hidden, hidden),
        ("self_attention.dense", hidden, hidden),
        ("mlp.dense_h_to_4h", inner, hidden),
        ("mlp.dense_4h_to_h", hidden, inner),
    ):
        shapes[f"{stem}.weight"] = (rows, columns)
        shapes[f"{stem}.bias"] = (rows,)
    return shapes


def _gguf_to_hf(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": "bloom",
        "n_layer": metadata["bloom.block_count"],
        "hidden_size": metadata["bloom.embedding_length"],
        "n_head": metadata["bloom.attention.head_count"],
        "layer_norm_epsilon": metadata["bloom.attention.layer_norm_epsilon"],
    }


FAMILY = Family(
    name="bloom",
    architectures=("BloomForCausalLM", "BloomModel"),
    base_prefix="transformer.",
    block_prefix="transformer.h.{}.",
    ends=EndNames(
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        final_norm="transformer.ln_f",
        head="lm_head",
    ),
    fingerprint=("self_attention.query_key_value.weight", "mlp.dense_4h_to_h.weight"),
    parse=_parse,
    block_shapes=_block_shapes,
    build_block=BloomBlock,
    slopes=alibi_slopes,
    rms_norms=False,
    default_quant="int8",
    splits={
        "self_attention.query_key_value": Split("rows", "heads"),
        "self_attention.dense": Split("columns", "heads"),
        "mlp.dense_h_to_4h": Split("rows", "inner"),
        "mlp.dense_4h_to_h": Split("columns", "inner"),
    },
    gguf_architectures={"bloom": "BloomForCausalLM"},
    gguf_block={
        "input_layernorm": "attn_norm",
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    gguf_ends={
        "transformer.word_embeddings": "token_embd",
        "transformer.word_embeddings_layernorm": "token_embd_norm",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    gguf_to_hf=_gguf_to_hf,
    gguf_restore=_join_by_head,
)
