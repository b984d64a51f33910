"""Small GGUF files written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

_BLOCK = {
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
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_ENDS = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "word_embeddings": "token_embd",
    "word_embeddings_layernorm": "token_embd_norm",
    "ln_f": "output_norm",
}


def _name(canonical: str) -> str:
    stem, _, kind = canonical.removeprefix("model.").removeprefix("transformer.").rpartition(".")
    if stem.startswith(("layers.", "h.")):
        _, number, local = stem.split(".", 2)
        block = _BLOCK.get(local) if local != "post_attention_layernorm" else "ffn_norm"
        return f"blk.{number}.{block}.{kind}"
    return f"{_ENDS[stem]}.{kind}"


def _interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _by_kind(rows: np.ndarray, head_dim: int) -> np.ndarray:
    return rows.reshape(-1, 3, head_dim, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def write_gguf(
    path: Path,
    model: Any,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    extra: Any = None,
) -> Path:
    """Writes a transformers model; `extra(writer)` adds metadata or tensors."""
    config = model.config
    arch = config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if arch == "bloom":
        writer.add_context_length(2048)
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_context_length(config.max_position_embeddings)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_key_length(head_dim)
    if extra is not None:
        extra(writer)
    for name, parameter in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        array = parameter.float().numpy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            array = _interleaved(array, head_dim)
        if ".query_key_value." in name:
            array = _by_kind(array, head_dim)
        if array.ndim == 2:
            writer.add_tensor(_name(name), quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
