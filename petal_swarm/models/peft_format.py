"""Adapters in the files of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`.

PEFT itself is not needed. A folder holds one adapter of one kind, and the modules that were trained with it
as a whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from petal_swarm.errors import AdapterError, CheckpointError, UnknownModelError
from petal_swarm.models.adapter_settings import Lora, Prefix, Settings, settings_of, to_peft
from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.models.family import Shape
from petal_swarm.models.folders import open_folder, read_json
from petal_swarm.models.tensor_files import OpenTensors, open_tensors
from petal_swarm.span import Span

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_OLD_WEIGHTS_FILE = "adapter_model.bin"
_PROMPT = "prompt_embeddings"
_PREFIXES = ("base_model.model.", "base_model.")


@dataclass(frozen=True)
class Extras:
    """What an adapter has besides what blocks need: all of it is the client's.

    `soft_prompt [tokens, hidden_size]` float32; `modules` are whole tensors by name ("score.weight").
    """

    settings: Settings
    soft_prompt: Tensor | None = None
    modules: Mapping[str, Tensor] = field(default_factory=dict)
    base_model: str | None = None
    task_type: str | None = None


class StoredAdapter(NamedTuple):
    """`numbers` is the flat float32 vector of the whole model, as `layout` says."""

    layout: AdapterLayout
    numbers: Tensor
    extras: Extras


def read_adapter(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> StoredAdapter:
    """Reads a folder, or a repository of the Hugging Face Hub, that PEFT or `write_adapter` has written.

    Raises:
        UnknownModelError: there is no such folder or repository.
        AdapterError: there is no adapter in it, it is damaged or not finite, is of a kind that is not
            supported, or is for a model of another shape.
    """
    if Path(folder).expanduser().is_file():
        raise UnknownModelError(f"{os.fspath(folder)} is a file: an adapter is a folder with {CONFIG_FILE}")
    opened = open_folder(
        os.fspath(folder), revision=revision, cache_dir=cache_dir, token=token, kind="adapter"
    )
    try:
        stated = read_json(opened, CONFIG_FILE)
        if stated is None:
            raise AdapterError(f"{opened.source} has no {CONFIG_FILE}, so it is not an adapter")
        settings = settings_of(stated)
        layout = settings.layout(config)
        path = opened.find(WEIGHTS_FILE) or opened.find(_OLD_WEIGHTS_FILE)
        if path is None:
            raise AdapterError(f"{opened.source} has no {WEIGHTS_FILE}")
        with open_tensors(path) as tensors:
            numbers, soft_prompt, modules = _Reader(tensors, config).read(settings, layout)
    except (CheckpointError, AdapterError) as error:
        raise AdapterError(f"the adapter {opened.source} cannot be used: {error}") from error
    base, task = stated.get("base_model_name_or_path"), stated.get("task_type")
    extras = Extras(settings, soft_prompt, modules, _text(base), _text(task))
    return StoredAdapter(layout, numbers, extras)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


class _Reader:
    """Takes the tensors of one file one by one, so that what nobody asked for is noticed."""

    def __init__(self, tensors: OpenTensors, config: ModelConfig) -> None:
        self._tensors = tensors
        self._config = config
        self._left = set(tensors.names())

    def read(
        self, settings: Settings, layout: AdapterLayout
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Numbers, soft prompt and whole modules."""
        config, blocks = self._config, Span(0, self._config.num_blocks)
        numbers = torch.empty(layout.numbers(config, blocks))
        soft_prompt = None
        if isinstance(settings, Lora):
            for name, view in _lora_views(layout, config, numbers):
                self._take(f"base_model.model.{name}", view)
        elif isinstance(settings, Prefix):
            self._take_prefix(settings.tokens, numbers)
        else:
            soft_prompt = torch.empty(settings.tokens, config.hidden_size)
            self._take(_PROMPT, soft_prompt)
        modules = dict(self._whole_modules(settings.whole_modules))
        if self._left:
            raise AdapterError(
                f"it has {len(self._left)} tensors that its configuration does not name, such as"
                f" {min(self._left)}"
            )
        return numbers, soft_prompt, modules

    def _take_prefix(self, tokens: int, numbers: Tensor) -> None:
        """PEFT: a row a token, with keys, then values, of each block, by head."""
        config = self._config
        of_block = config.num_kv_heads * config.head_dim
        stored = torch.empty(tokens, config.num_blocks * 2 * of_block)
        self._take(_PROMPT, stored)
        numbers.copy_(_prefix_by_block(stored, config).flatten())

    def _take(self, name: str, out: Tensor) -> None:
        if name not in self._left:
            raise AdapterError(f"it lacks the tensor {name}")
        self._left.discard(name)
        shape = self._tensors.shape(name)
        if shape != tuple(out.shape):
            raise AdapterError(
                f"tensor {name} has shape {shape}, and would have {tuple(out.shape)} for this model"
            )
        self._tensors.read(name, out)
        if not bool(torch.isfinite(out).all()):
            raise AdapterError(f"tensor {name} holds numbers that are not finite")

    def _whole_modules(self, modules: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        for module in modules:
            for kind in ("weight", "bias"):
                for prefix in _PREFIXES:
                    name = f"{prefix}{module}.{kind}"
                    if name in self._left:
                        out = torch.empty(self._module_shape(name))
                        self._take(name, out)
                        yield f"{module}.{kind}", out

    def _module_shape(self, name: str) -> Shape:
        """Heads have as many rows as they like, within reason."""
        shape = self._tensors.shape(name)
        rows = shape[0] if shape else 0
        if not 1 <= rows <= max(self._config.vocab_size, 1 << 16):
            raise AdapterError(f"tensor {name} has shape {shape}")
        return (rows, self._config.hidden_size) if name.endswith(".weight") else (rows,)


def write_adapter(folder: str | os.PathLike[str], config: ModelConfig, adapter: StoredAdapter) -> None:
    """Writes what `peft.PeftModel.from_pretrained` reads; files of the same names are replaced.

    Each file is whole at any time: the old one, or the new one.

    Raises:
        AdapterError: numbers that are not finite, or not as many as the layout says.
        OSError: the folder cannot be written.
    """
    extras = adapter.extras
    tensors = dict(_tensors(config, adapter))
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"tensor {name} holds numbers that are not finite: the adapter is not written")
    stated = to_peft(extras.settings, config)
    stated |= {
        "base_model_name_or_path": extras.base_model,
        "task_type": extras.task_type or "CAUSAL_LM",
        "inference_mode": True,
    }
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    weights, settings = path / f"{WEIGHTS_FILE}.new", path / f"{CONFIG_FILE}.new"
    save_file(tensors, weights, metadata={"format": "pt"})
    settings.write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights.replace(path / WEIGHTS_FILE)
    settings.replace(path / CONFIG_FILE)


def _tensors(config: ModelConfig, adapter: StoredAdapter) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as PEFT stores them."""
    layout, numbers, extras = adapter
    blocks = Span(0, config.num_blocks)
    numbers = numbers.detach().to("cpu", torch.float32)
    if numbers.shape != (layout.numbers(config, blocks),):
        raise AdapterError(f"an adapter of {layout.numbers(config, blocks)} numbers has {numbers.numel()}")
    if isinstance(extras.settings, Lora):
        for name, view in _lora_views(layout, config, numbers):
            yield f"base_model.model.{name}", view.clone()
    elif isinstance(extras.settings, Prefix):
        shape = (config.num_blocks, 2, config.num_kv_heads, layout.prefix_tokens, config.head_dim)
        by_token = numbers.view(shape).permute(3, 0, 1, 2, 4)
        yield _PROMPT, by_token.reshape(layout.prefix_tokens, -1).contiguous()
    elif extras.soft_prompt is not None:
        yield _PROMPT, extras.soft_prompt.detach().to("cpu", torch.float32).contiguous()
    prefix = _PREFIXES[0] if isinstance(extras.settings, Lora) else _PREFIXES[1]
    for name, tensor in extras.modules.items():
        yield prefix + name, tensor.detach().to("cpu").contiguous().clone()


def _lora_views(layout: AdapterLayout, config: ModelConfig, numbers: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names, without PEFT's own prefix, and views into the flat vector of the whole model."""
    blocks = Span(0, config.num_blocks)
    prefix = family_of(config).block_prefix
    for block, adapter in layout.split(config, numbers, blocks).items():
        for stem, matrices in adapter.lora.items():
            name = prefix.format(block) + stem
            yield f"{name}.lora_A.weight", matrices.a
            yield f"{name}.lora_B.weight", matrices.b


def _prefix_by_block(stored: Tensor, config: ModelConfig) -> Tensor:
    """`[tokens, blocks * 2 * kv_heads * head_dim]` -> `[blocks, 2, kv_heads, tokens, head_dim]`."""
    shape = (stored.shape[0], config.num_blocks, 2, config.num_kv_heads, config.head_dim)
    return stored.view(shape).permute(1, 2, 3, 0, 4)
