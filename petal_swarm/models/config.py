"""What a model is, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from petal_swarm.errors import CheckpointError, UnsupportedArchitectureError
from petal_swarm.models.rope import RopeParameters

# What a checkpoint may state about itself without computing anything else.
_NOT_MATHEMATICS = ("architecture", "torch_dtype", "max_positions")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and mathematics of a model; made by `from_hf`.

    `torch_dtype` is the checkpoint's own dtype ("bfloat16", ...). `max_positions` is None where positions
    have no limit of their own (ALiBi). `rope` is None for models without rotary embeddings. Blocks in
    `windowed_blocks` see the last `sliding_window` positions only.
    """

    family: str
    architecture: str
    num_blocks: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    max_positions: int | None
    tied_embeddings: bool
    torch_dtype: str
    rope: RopeParameters | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    residual_after_norm: bool = False
    sliding_window: int | None = None
    windowed_blocks: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads the dictionary of a Hugging Face `config.json`.

        Raises:
            UnsupportedArchitectureError: no family here has blocks for it.
            CheckpointError: a field is missing or impossible.
        """
        from petal_swarm.models.families import family_of

        config = {**config, "architectures": _of_causal_models(config)}
        family = family_of(config)
        if config.get("quantization_config"):
            raise UnsupportedArchitectureError(
                "quantized checkpoints are not supported: load the original one, or a GGUF file"
            )
        try:
            made = family.parse(config)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"config.json cannot be used: {_describe(error)}") from error
        made._check()
        return made

    def _check(self) -> None:
        sizes = (
            self.num_blocks,
            self.hidden_size,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.intermediate_size,
            self.vocab_size,
        )
        if min(sizes) < 1 or (self.sliding_window is not None and self.sliding_window < 1):
            raise CheckpointError("config.json cannot be used: sizes must be positive")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config.json cannot be used: {self.num_heads} heads do not divide into "
                f"{self.num_kv_heads} key-value heads"
            )
        if self.rope is not None and self.head_dim % 2:
            raise CheckpointError("config.json cannot be used: rotary embeddings need an even head size")

    def window(self, block: int) -> int | None:
        """How many positions `block` sees, its own included; None for all."""
        return self.sliding_window if block in self.windowed_blocks else None

    def mathematics(self) -> dict[str, Any]:
        """The fields that change what the model computes."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_MATHEMATICS}

    def key(self, weights: bytes) -> str:
        """Name that peers agree on for this model with these `weights` (a sample of them)."""
        text = json.dumps(_rounded(self.mathematics()), sort_keys=True, separators=(",", ":"))
        digest = hashlib.blake2b(text.encode() + b"\0" + weights, digest_size=6).hexdigest()
        return f"{self.family}-{self.num_blocks}x{self.hidden_size}-{digest}"


def _of_causal_models(config: Mapping[str, Any]) -> Any:
    """A classifier has the blocks of the causal language model of the same name."""
    named = config.get("architectures")
    if not isinstance(named, list | tuple):
        return named
    return [str(name).replace("ForSequenceClassification", "ForCausalLM") for name in named]


def _rounded(value: Any) -> Any:
    """Floats to nine digits: the last bits of a logarithm differ between platforms."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, tuple) else value


def _describe(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no field {error.args[0]!r}"
    return str(error) or type(error).__name__


class Fields:
    """Typed access to a `config.json`; wrong types raise `ValueError` naming the field."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def _get(self, names: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for name in names:
            if self._config.get(name) is not None:
                return name, self._config[name]
        if default is _REQUIRED:
            raise KeyError(names[0])
        return names[0], default

    def integer(self, *names: str, default: Any = None) -> int:
        name, value = self._get(names, _REQUIRED if default is None else default)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > 1 << 40:
            raise ValueError(f"{name} must be an integer, not {value!r}")
        return value

    def blocks(self, *names: str) -> int:
        name, value = names[0], self.integer(*names)
        if not 1 <= value <= _MAX_BLOCKS:
            raise ValueError(f"{name} must be between 1 and {_MAX_BLOCKS}, not {value}")
        return value

    def number(self, *names: str, default: Any = None) -> float:
        name, value = self._get(names, _REQUIRED if default is None else default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} must be a number, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._get((name,), default)[1])

    def dtype(self) -> str:
        value = str(self._get(("dtype", "torch_dtype"), "float32")[1])
        return value.removeprefix("torch.")

    def raw(self, name: str, default: Any = None) -> Any:
        """The value as it stands: here null is different from absent."""
        return self._config.get(name, default)


_REQUIRED = object()
_MAX_BLOCKS = 10_000


def refuse(config: Mapping[str, Any], field: str, supported: tuple[Any, ...]) -> None:
    """Raises `UnsupportedArchitectureError` if `field` is there and is none of `supported`."""
    value = config.get(field)
    if value is not None and value not in supported:
        known = ", ".join(map(str, supported))
        raise UnsupportedArchitectureError(f"{field} {value!r} is not supported here, only {known}")
