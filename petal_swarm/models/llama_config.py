"""Reading the configuration of the Llama family, from `config.json` and from GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from petal_swarm.errors import UnsupportedArchitectureError
from petal_swarm.models.config import Fields, ModelConfig, refuse
from petal_swarm.models.rope import ROPE_KINDS, RopeParameters, yarn_amplitude

_DEFAULT_EPS = 1e-6
_DEFAULT_THETA = 10_000.0
_MISTRAL_WINDOW = 4096


def parse(config: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(config)
    named = config["architectures"]
    architecture = next(
        name for name in ([named] if isinstance(named, str) else named) if name in _MODEL_TYPES
    )
    refuse(config, "hidden_act", ("silu", "swish"))
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    blocks = fields.blocks("num_hidden_layers")
    positions = fields.integer("max_position_embeddings")
    qwen2, qwen3 = architecture == "Qwen2ForCausalLM", architecture == "Qwen3ForCausalLM"
    biased = fields.flag("attention_bias", False) and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    window, windowed = _windows(architecture, fields, blocks)
    return ModelConfig(
        family="llama",
        architecture=architecture,
        num_blocks=blocks,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", default=heads),
        head_dim=fields.integer("head_dim", default=128 if qwen3 else hidden // heads),
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        norm_eps=fields.number("rms_norm_eps", default=_DEFAULT_EPS),
        max_positions=positions,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        torch_dtype=fields.dtype(),
        rope=_rope(config, positions),
        qkv_bias=qwen2 or biased,
        output_bias=biased,
        mlp_bias=architecture == "LlamaForCausalLM" and fields.flag("mlp_bias", False),
        qk_norm=qwen3,
        sliding_window=window,
        windowed_blocks=windowed,
    )


def _windows(architecture: str, fields: Fields, blocks: int) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window and the blocks it holds for."""
    every = tuple(range(blocks))
    if architecture == "MistralForCausalLM":
        if fields.raw("sliding_window", _MISTRAL_WINDOW) is None:
            return None, ()
        return fields.integer("sliding_window", default=_MISTRAL_WINDOW), every
    if architecture == "LlamaForCausalLM" or not fields.flag("use_sliding_window", False):
        return None, ()
    window = fields.integer("sliding_window", default=_MISTRAL_WINDOW)
    kinds = fields.raw("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", default=28)
        return window, every[first:]
    return window, tuple(n for n in every if kinds[n] == "sliding_attention")


def _rope(config: Mapping[str, Any], positions: int) -> RopeParameters:
    """Both spellings: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in stated.values()):
        raise UnsupportedArchitectureError("rope parameters that differ by layer are not supported here")
    fields = Fields(stated)
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise UnsupportedArchitectureError(
            f"rope type {kind!r} is not supported here, only {', '.join(ROPE_KINDS)}"
        )
    rotated = stated.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if rotated not in (None, 1, 1.0):
        raise UnsupportedArchitectureError("a partial_rotary_factor other than 1 is not supported here")
    theta = fields.number("rope_theta", default=Fields(config).number("rope_theta", default=_DEFAULT_THETA))
    factors = tuple(float(value) for value in stated.get("frequency_factors", ()))
    if kind == "default":
        return RopeParameters(theta=theta, frequency_factors=factors)
    original = fields.integer(
        "original_max_position_embeddings",
        default=Fields(config).integer("original_max_position_embeddings", default=positions),
    )
    factor = fields.number("factor", default=positions / original if kind == "yarn" else None)
    return _stretched(fields, kind, theta, factor, positions if kind == "dynamic" else original)


def _stretched(fields: Fields, kind: str, theta: float, factor: float, original: int) -> RopeParameters:
    if factor <= 0 or original <= 0:
        raise ValueError("rope scaling needs a positive factor and context length")
    if kind in ("linear", "dynamic"):
        return RopeParameters(theta, kind, factor, original if kind == "dynamic" else 0)
    if kind == "llama3":
        return RopeParameters(
            theta,
            kind,
            factor,
            original,
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
        )
    mscale, mscale_all_dim = fields.raw("mscale"), fields.raw("mscale_all_dim")
    return RopeParameters(
        theta,
        kind,
        factor,
        original,
        beta_fast=fields.number("beta_fast", default=32.0),
        beta_slow=fields.number("beta_slow", default=1.0),
        truncate=fields.flag("truncate", True),
        amplitude=fields.number("attention_factor", default=yarn_amplitude(factor, mscale, mscale_all_dim)),
    )


_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def gguf_to_hf(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """A `config.json` for the metadata of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""
    arch = metadata["general.architecture"]

    def field(name: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{name}", default)

    heads = metadata[f"{arch}.attention.head_count"]
    config = {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[architecture],
        "num_hidden_layers": metadata[f"{arch}.block_count"],
        "hidden_size": metadata[f"{arch}.embedding_length"],
        "intermediate_size": metadata[f"{arch}.feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", metadata[f"{arch}.embedding_length"] // heads),
        "max_position_embeddings": metadata[f"{arch}.context_length"],
        "rms_norm_eps": metadata[f"{arch}.attention.layer_norm_rms_epsilon"],
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": field("rope.freq_base", _DEFAULT_THETA)}
    kind = field("rope.scaling.type", "none")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": field("rope.scaling.factor", 1.0)}
        original = field("rope.scaling.original_context_length")
        if original is not None:
            rope["original_max_position_embeddings"] = original
    config["rope_parameters"] = rope
    return config
