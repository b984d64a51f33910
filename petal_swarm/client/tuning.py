"""Adapters of a model object: adding, loading and saving them, as users of PEFT and Hugging Face know it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import nn

from petal_swarm.client.adapter import SwarmAdapter
from petal_swarm.errors import AdapterError, ConfigError
from petal_swarm.models.adapter_settings import Settings, SoftPrompt, settings_of
from petal_swarm.models.ends import Ends
from petal_swarm.models.peft_format import StoredAdapter, read_adapter, write_adapter

TRAINED_FILE = "model.safetensors"
#: How PEFT may initialize LoRA; others of its ways look at the weights of blocks, which are not here.
_PLAIN_START = (None, True, "True", "true")


class Adaptable(Protocol):
    """A model with one adapter, and heads that may be trained as a whole."""

    task_type: str
    name_or_path: str

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def push_to_hub(self, repo_id: str, **options: Any) -> str: ...

    @property
    def adapter(self) -> SwarmAdapter | None: ...

    @property
    def ends(self) -> Ends: ...

    def use_adapter(self, adapter: SwarmAdapter | None) -> None: ...

    def train_whole(self, module: str) -> None:
        """Make the parameters of a head trainable.

        Raises:
            AdapterError: the model has no such head.
        """
        ...

    def whole_modules(self) -> Mapping[str, nn.Parameter]:
        """The heads that are trained or have been, by PEFT's names ("score.weight")."""
        ...


def add_adapter(model: Adaptable, given: object) -> SwarmAdapter:
    """Put a new adapter into `model`, by settings of ours or a configuration object of PEFT.

    Raises:
        ConfigError: it has one already.
        AdapterError: settings that are not supported, or do not fit the model.
    """
    if model.adapter is not None:
        raise ConfigError("the model has an adapter already: call remove_adapter() first")
    settings = settings_of(given)
    if not isinstance(given, Settings):
        _check_start(given)
    _train_heads(model, settings)
    ends = model.ends
    adapter = SwarmAdapter(ends.config, settings, embedding=ends.embedding, device=ends.device)
    model.use_adapter(adapter)
    return adapter


def load_adapter(
    model: Adaptable, folder: str | os.PathLike[str], *, is_trainable: bool = True, **hub: str | None
) -> SwarmAdapter:
    """Put a saved adapter into `model`, in the place of the one it has.

    Raises:
        UnknownModelError, AdapterError: as `read_adapter`; the model is left as it is then.
    """
    ends = model.ends
    stored = read_adapter(folder, ends.config, **hub)
    adapter = SwarmAdapter(ends.config, stored.extras.settings, device=ends.device)
    adapter.fill(stored)
    _fill_heads(model, stored)
    adapter.requires_grad_(is_trainable)
    if not is_trainable:
        for parameter in model.whole_modules().values():
            parameter.requires_grad_(False)
    model.use_adapter(adapter)
    return adapter


def save_pretrained(
    model: Adaptable,
    folder: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **options: Any,
) -> None:
    """Write the adapter in PEFT's files, which `peft.PeftModel.from_pretrained` reads, and load_adapter.

    What else is trainable goes by its name to `model.safetensors`. With an option `state_dict`, which Hugging
    Face's Trainer gives, also as None, all that is trainable does: it resumes from there. Other options of
    Hugging Face's method are about large checkpoints, and do nothing.

    Raises:
        ConfigError: there is nothing to save.
        AdapterError: numbers that are not finite.
    """
    if not is_main_process:
        return
    _save(model, folder, all_of_it="state_dict" in options)
    if push_to_hub:
        hub = {name: options[name] for name in ("token", "private", "commit_message") if name in options}
        model.push_to_hub(repo_id or Path(folder).name, **hub)


def _save(model: Adaptable, folder: str | os.PathLike[str], *, all_of_it: bool) -> None:
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    heads = model.whole_modules()
    if model.adapter is not None:
        known = {id(value) for value in (*model.adapter.parameters(), *heads.values())}
        stored = model.adapter.stored(
            {name: value.detach() for name, value in heads.items()},
            base_model=model.name_or_path or None,
            task_type=model.task_type,
        )
        write_adapter(folder, model.ends.config, stored)
        if not all_of_it:
            trained = {name: value for name, value in trained.items() if id(value) not in known}
    elif not trained:
        raise ConfigError("the model has no adapter, and nothing of it is trained: there is nothing to save")
    if trained:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        new = path / f"{TRAINED_FILE}.new"
        tensors = {name: value.detach().cpu().contiguous() for name, value in trained.items()}
        save_file(tensors, new, metadata={"format": "pt"})
        new.replace(path / TRAINED_FILE)


def not_frozen(model: nn.Module, names: list[str]) -> list[str]:
    """Those names that are of trainable parameters: of the others none is expected in a checkpoint."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [name for name in names if name in parameters and parameters[name].requires_grad]


def warn_of_checkpointing() -> None:
    warnings.warn(
        "activations of the blocks are kept by servers, which bound them: checkpointing is not used",
        stacklevel=3,
    )


def _train_heads(model: Adaptable, settings: Settings) -> None:
    for module in settings.whole_modules:
        if module != "classifier":  # PEFT names it beside "score" whatever the model has
            model.train_whole(module)


def _fill_heads(model: Adaptable, stored: StoredAdapter) -> None:
    """All or nothing: shapes are looked at before anything is copied."""
    _train_heads(model, stored.extras.settings)
    heads = model.whole_modules()
    for name, tensor in stored.extras.modules.items():
        if name not in heads:
            raise AdapterError(f"the adapter has {name}, and the model no such head")
        if heads[name].shape != tensor.shape:
            raise AdapterError(
                f"{name} of the adapter has shape {tuple(tensor.shape)}, and the model's"
                f" {tuple(heads[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in stored.extras.modules.items():
            heads[name].copy_(tensor)


def _check_start(given: Any) -> None:
    """What a PEFT configuration says about training alone, and is not the same here."""
    start = getattr(given, "init_lora_weights", None)
    if start not in _PLAIN_START:
        raise AdapterError(f"init_lora_weights={start!r} is not supported, only PEFT's default")
    if getattr(given, "prefix_projection", False):
        raise AdapterError("prefix_projection is not supported: a prefix is trained itself")
    if getattr(given, "prompt_tuning_init_text", None):
        raise AdapterError(
            f"a soft prompt begins with given tokens by {SoftPrompt.__name__}(token_ids=...), which are the"
            " tokens of prompt_tuning_init_text"
        )
    if getattr(given, "lora_dropout", 0.0):
        warnings.warn("LoRA in remote blocks has no dropout: lora_dropout is not used", stacklevel=4)
