"""Llama and its relatives (Mistral, Qwen2, Qwen3, SmolLM2): RMS norms, RoPE, grouped queries, gated MLP.

What they differ in is in the configuration: biases, norms of queries and keys, sliding windows.
"""

from __future__ import annotations

from copy import copy
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from petal_swarm.models.attention import Attention
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.differentiable import silu_gate
from petal_swarm.models.family import EndNames, Family, Shape, Split, no_slopes
from petal_swarm.models.linear import Projection
from petal_swarm.models.llama_config import gguf_to_hf, parse
from petal_swarm.models.lora import Part, Project, adapt
from petal_swarm.models.norms import RMSNorm
from petal_swarm.models.quantization import Weight, make_linear, map_parts, stack_rows, vector
from petal_swarm.models.rope import interleave_heads


class LlamaBlock:
    """One layer. Queries and keys are kept interleaved for `rope.rotate_`; gate and up are one matrix."""

    __slots__ = (
        "_down",
        "_gate_up",
        "_input_norm",
        "_mlp_norm",
        "_out",
        "_parts",
        "_qk_norm",
        "_qkv",
    )

    def __init__(self, config: ModelConfig, tensors: dict[str, Weight]) -> None:
        def norm(stem: str) -> RMSNorm:
            return RMSNorm(vector(tensors, f"{stem}.weight"), config.norm_eps)

        self._input_norm = norm("input_layernorm")
        self._qkv = _fused_qkv(config, tensors)
        self._qk_norm = _joint_qk_norm(config, tensors) if config.qk_norm else None
        self._out = _fused(tensors, "self_attn.o_proj")
        self._mlp_norm = norm("post_attention_layernorm")
        self._gate_up = _fused(tensors, "mlp.gate_proj", "mlp.up_proj")
        self._down = _fused(tensors, "mlp.down_proj")
        self._parts = _parts(config)

    def __call__(self, hidden: Tensor, plan: Attention, pair: Tensor) -> Tensor:
        qkv = plan.rotate(self._qkv(self._input_norm(hidden)), self._qk_norm)
        hidden = self._out.plus(plan.attend(qkv, pair), hidden)
        gate_up = self._gate_up(self._mlp_norm(hidden))
        if gate_up.requires_grad:
            return self._down.plus(silu_gate(gate_up), hidden)
        gate, up = gate_up.chunk(2, dim=1)
        return self._down.plus(F.silu(gate).mul_(up), hidden)

    def adapted(self, project: Project) -> LlamaBlock:
        """A copy with other projections; norms are shared."""
        made = copy(self)
        for slot, parts in self._parts.items():
            setattr(made, slot, adapt(project, parts, getattr(self, slot)))
        return made

    @property
    def nbytes(self) -> int:
        parts = (self._input_norm, self._qkv, self._out, self._mlp_norm, self._gate_up, self._down)
        return sum(p.nbytes for p in parts) + (0 if self._qk_norm is None else self._qk_norm.nbytes)


def _fused(tensors: dict[str, Weight], *stems: str) -> Projection:
    weight = stack_rows([tensors.pop(f"{stem}.weight") for stem in stems])
    biases = [vector(tensors, f"{stem}.bias") for stem in stems if f"{stem}.bias" in tensors]
    return make_linear(weight, torch.cat(biases) if biases else None)


def _parts(config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_kv_heads * config.head_dim
    interleave = partial(interleave_heads, head_dim=config.head_dim)
    return {
        "_qkv": (
            Part("self_attn.q_proj", config.num_heads * config.head_dim, interleave),
            Part("self_attn.k_proj", keys, interleave),
            Part("self_attn.v_proj", keys),
        ),
        "_out": (Part("self_attn.o_proj", hidden),),
        "_gate_up": (Part("mlp.gate_proj", inner), Part("mlp.up_proj", inner)),
        "_down": (Part("mlp.down_proj", hidden),),
    }


def _fused_qkv(config: ModelConfig, tensors: dict[str, Weight]) -> Projection:
    interleave = partial(interleave_heads, head_dim=config.head_dim)
    for stem in ("self_attn.q_proj", "self_attn.k_proj"):
        for name in (f"{stem}.weight", f"{stem}.bias"):
            if name in tensors:
                tensors[name] = map_parts(tensors[name], interleave)
    return _fused(tensors, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _joint_qk_norm(config: ModelConfig, tensors: dict[str, Weight]) -> RMSNorm:
    """The norms of queries and keys as one, with a weight for each head."""
    query = interleave_heads(vector(tensors, "self_attn.q_norm.weight"), config.head_dim)
    key = interleave_heads(vector(tensors, "self_attn.k_norm.weight"), config.head_dim)
    rows = [query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)]
    return RMSNorm(torch.cat(rows), config.norm_eps)


def _block_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    for stem, rows, columns, bias in (
        ("self_attn.q_proj", queries, hidden, config.qkv_bias),
        ("self_attn.k_proj", keys, hidden, config.qkv_bias),
        ("self_attn.v_proj", keys, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, queries, config.output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ):
        shapes[f"{stem}.weight"] = (rows, columns)
        if bias:
            shapes[f"{stem}.bias"] = (rows,)
    return shapes


def _undo_gguf_order(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """GGUF's "llama" interleaves the heads of queries and keys; canonical tensors are half-split."""
    interleaved = config.architecture == "LlamaForCausalLM"
    if not interleaved or not (".q_proj." in name or ".k_proj." in name):
        return tensor
    pairs = tensor.view(-1, config.head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    base_prefix="model.",
    block_prefix="model.layers.{}.",
    ends=EndNames(embedding="model.embed_tokens", final_norm="model.norm", head="lm_head"),
    fingerprint=("self_attn.q_proj.weight", "mlp.down_proj.weight"),
    parse=parse,
    block_shapes=_block_shapes,
    build_block=LlamaBlock,
    slopes=no_slopes,
    rms_norms=True,
    splits={
        "self_attn.q_proj": Split("rows", "heads"),
        "self_attn.k_proj": Split("rows", "kv"),
        "self_attn.v_proj": Split("rows", "kv"),
        "self_attn.o_proj": Split("columns", "heads"),
        "mlp.gate_proj": Split("rows", "inner"),
        "mlp.up_proj": Split("rows", "inner"),
        "mlp.down_proj": Split("columns", "inner"),
    },
    gguf_architectures={
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    },
    gguf_block={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    gguf_ends={"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    gguf_to_hf=gguf_to_hf,
    gguf_restore=_undo_gguf_order,
)
