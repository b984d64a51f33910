"""The registry: every family of models this package has blocks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from petal_swarm.errors import UnsupportedArchitectureError
from petal_swarm.models import bloom, llama
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.family import Family

FAMILIES: tuple[Family, ...] = (bloom.FAMILY, llama.FAMILY)

_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}
_BY_NAME = {family.name: family for family in FAMILIES}


def supported_architectures() -> tuple[str, ...]:
    return tuple(_BY_ARCHITECTURE)


def family_of(config: Mapping[str, Any] | ModelConfig) -> Family:
    """The family of a parsed configuration, or of a Hugging Face one by its `architectures`.

    Raises:
        UnsupportedArchitectureError: none; the message lists those that are supported.
    """
    if isinstance(config, ModelConfig):
        return _BY_NAME[config.family]
    named = config.get("architectures") or [f"model_type {config.get('model_type')!r}"]
    names = [str(name) for name in named] if isinstance(named, list | tuple) else [str(named)]
    for name in names:
        if name in _BY_ARCHITECTURE:
            return _BY_ARCHITECTURE[name]
    raise UnsupportedArchitectureError(f"{names[0]} is not supported; supported: {_supported()}")


def family_of_gguf(architecture: str) -> tuple[Family, str]:
    """Family and architecture for a GGUF file's `general.architecture`.

    Raises:
        UnsupportedArchitectureError: there is none.
    """
    for family in FAMILIES:
        if architecture in family.gguf_architectures:
            return family, family.gguf_architectures[architecture]
    known = ", ".join(name for family in FAMILIES for name in family.gguf_architectures)
    raise UnsupportedArchitectureError(f"GGUF architecture {architecture!r} is not supported, only {known}")


def _supported() -> str:
    return ", ".join(supported_architectures())
