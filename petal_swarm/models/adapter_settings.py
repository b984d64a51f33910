"""What can be trained in front of, and inside, frozen blocks, and how PEFT's configurations say it.

`target_modules`, patterns and the like mean what they mean in PEFT, which matches them against the names of
a transformers model: those of the checkpoint's tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from petal_swarm.errors import AdapterError, ConfigError
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.config import Fields, ModelConfig
from petal_swarm.models.families import family_of

ALL_LINEAR = "all-linear"
#: PEFT's own choice for the families that there are here.
DEFAULT_TARGETS = ("query_key_value", "q_proj", "v_proj")
MAX_VIRTUAL_TOKENS = 1 << 16
#: Trained as a whole, on the client. PEFT lists "classifier" beside "score" for every model.
WHOLE_MODULES = ("lm_head", "score", "classifier")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA of `rank` on linear layers of the blocks, scaled by `alpha / rank`, or by `alpha / sqrt(rank)`
    with `rslora` (arXiv:2312.03732).

    `targets` are names, or ends of names, of linear layers ("q_proj", "mlp.up_proj"), a regular expression
    for whole names, or "all-linear"; `exclude` likewise. `blocks` restricts them to some blocks. Patterns
    give ranks and alphas of their own to layers whose names they match. `whole_modules` ("lm_head") are
    trained themselves.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] | str = DEFAULT_TARGETS
    exclude: tuple[str, ...] | str = ()
    blocks: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    whole_modules: tuple[str, ...] = ()

    def layout(self, config: ModelConfig) -> AdapterLayout:
        """The layers of the model that this names.

        Raises:
            AdapterError: there are none, or some outside the blocks; a rank or scale makes no sense.
        """
        family = family_of(config)
        for stem in (family.ends.embedding, family.ends.head):
            if self._excluded(stem) or self.targets == ALL_LINEAR:
                continue
            if self._targeted(stem, None):
                raise AdapterError(f"LoRA on {stem} is not supported, only on layers of the blocks")
        places = [
            self._place(block, stem, name)
            for block, stem, name in linear_layers(config)
            if not self._excluded(name) and self._targeted(name, block)
        ]
        if not places:
            raise AdapterError(f"no linear layer of the model is named by {self.targets!r}")
        layout = AdapterLayout(tuple(places))
        try:
            layout.check(config)
        except ConfigError as error:
            raise AdapterError(str(error)) from error
        return layout

    def _targeted(self, name: str, block: int | None) -> bool:
        if self.targets == ALL_LINEAR:
            return block is not None and self._in_blocks(block)
        if isinstance(self.targets, str):
            return _matches(self.targets, name) and self._in_blocks(block)
        return name in self.targets or (_ends(name, self.targets) and self._in_blocks(block))

    def _excluded(self, name: str) -> bool:
        if isinstance(self.exclude, str):
            return _matches(self.exclude, name)
        excluded = (*self.exclude, *self.whole_modules)
        return name in excluded or _ends(name, excluded)

    def _in_blocks(self, block: int | None) -> bool:
        return self.blocks is None or block in self.blocks

    def _place(self, block: int, stem: str, name: str) -> LoraPlace:
        rank = _of_pattern(self.rank_pattern, name, self.rank)
        alpha = _of_pattern(self.alpha_pattern, name, self.alpha)
        if rank < 1:
            raise AdapterError(f"a LoRA's rank must be at least 1, got {rank} for {name}")
        return LoraPlace(block, stem, rank, alpha / (rank**0.5 if self.rslora else rank))


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """`tokens` trained keys and values in front of every block ("deep prompts", PEFT's prefix tuning)."""

    tokens: int = 20
    whole_modules: tuple[str, ...] = ()

    def layout(self, config: ModelConfig) -> AdapterLayout:
        """Raises:
        AdapterError: a length that makes no sense.
        """
        _check_tokens(self.tokens)
        return AdapterLayout(prefix_tokens=self.tokens)


@dataclass(frozen=True, kw_only=True)
class SoftPrompt:
    """`tokens` trained embeddings in front of the text (PEFT's prompt tuning); they never leave the client
    but as hidden states.

    They begin as random numbers, or as the embeddings of `token_ids`, repeated.
    """

    tokens: int = 20
    token_ids: tuple[int, ...] = ()
    whole_modules: tuple[str, ...] = ()

    def layout(self, config: ModelConfig) -> AdapterLayout:
        """Nothing in the blocks.

        Raises:
            AdapterError: a length that makes no sense.
        """
        _check_tokens(self.tokens)
        return AdapterLayout()


Settings = Lora | Prefix | SoftPrompt


def linear_layers(config: ModelConfig) -> Iterator[tuple[int, str, str]]:
    """Block, stem and whole name of every linear layer of the blocks."""
    family = family_of(config)
    stems = [
        name.removesuffix(".weight") for name, shape in family.block_shapes(config).items() if len(shape) == 2
    ]
    for block in range(config.num_blocks):
        for stem in stems:
            yield block, stem, family.block_prefix.format(block) + stem


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name.endswith(f".{ending}") for ending in endings)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise AdapterError(f"{pattern!r} is not a regular expression: {error}") from error


def _of_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """As PEFT: the first key that the name ends with, each key being a regular expression."""
    for key, value in pattern.items():
        if _matches(rf"(.*\.)?({key})", name):
            return value
    return default


def _check_tokens(tokens: int) -> None:
    if not 1 <= tokens <= MAX_VIRTUAL_TOKENS:
        raise AdapterError(f"a prompt or prefix must have 1 to {MAX_VIRTUAL_TOKENS} tokens, not {tokens}")


# -- PEFT's configurations -------------------------------------------------------------------------

#: What would change the result and is not computed here, with the values that mean "not used".
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "num_transformer_submodules": (None, 1),
}
#: These change the weights of the model they are used with.
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def settings_of(given: object) -> Settings:
    """Our settings from ours, from PEFT's configuration objects, or from the dictionary of an
    `adapter_config.json`.

    Raises:
        AdapterError: a method, or an option of it, that there is not here, or a value of the wrong type.
    """
    if isinstance(given, Settings):
        return given
    if isinstance(given, Mapping):
        stated = dict(given)
    elif hasattr(given, "to_dict") and hasattr(given, "peft_type"):
        stated = dict(given.to_dict())
    else:
        raise AdapterError(f"{type(given).__name__} is no configuration of an adapter")
    kind = str(getattr(stated.get("peft_type"), "value", stated.get("peft_type")))
    if kind not in _READERS:
        raise AdapterError(f"adapters of type {kind} are not supported, only {', '.join(_READERS)}")
    for name, unused in _REFUSED.items():
        if stated.get(name) not in unused:
            raise AdapterError(f"an adapter with {name}={stated[name]!r} is not supported")
    try:
        return _READERS[kind](stated)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise AdapterError(f"the adapter's configuration cannot be used: {error}") from error


def _lora(stated: Mapping[str, Any]) -> Lora:
    initialized = str(stated.get("init_lora_weights")).lower()
    if initialized.startswith(_CHANGES_WEIGHTS):
        raise AdapterError(f"LoRA that was initialized by {initialized!r} needs a model with other weights")
    fields = Fields(stated)
    targets = stated.get("target_modules")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = ALL_LINEAR
    return Lora(
        rank=fields.integer("r", default=8),
        alpha=fields.number("lora_alpha", default=8),
        targets=DEFAULT_TARGETS if targets is None else _names(targets),
        exclude=_names(stated.get("exclude_modules") or ()),
        blocks=_blocks(stated),
        rank_pattern={str(key): _positive(value) for key, value in _pattern(stated, "rank_pattern")},
        alpha_pattern={str(key): float(value) for key, value in _pattern(stated, "alpha_pattern")},
        rslora=fields.flag("use_rslora", False),
        whole_modules=_whole_modules(stated),
    )


def _prefix(stated: Mapping[str, Any]) -> Prefix:
    return Prefix(tokens=Fields(stated).integer("num_virtual_tokens"), whole_modules=_whole_modules(stated))


def _soft_prompt(stated: Mapping[str, Any]) -> SoftPrompt:
    return SoftPrompt(
        tokens=Fields(stated).integer("num_virtual_tokens"), whole_modules=_whole_modules(stated)
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], Settings]] = {
    "LORA": _lora,
    "PREFIX_TUNING": _prefix,
    "PROMPT_TUNING": _soft_prompt,
}


def _names(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return value
    names = tuple(sorted(value))
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{value!r} are no names of layers")
    return names


def _blocks(stated: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = stated.get("layers_to_transform")
    if value is None or value == []:
        return None
    blocks = (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(block, int) for block in blocks):
        raise ValueError(f"layers_to_transform {value!r} are no numbers of blocks")
    return blocks


def _pattern(stated: Mapping[str, Any], name: str) -> list[tuple[Any, Any]]:
    return list((stated.get(name) or {}).items())


def _positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"a rank of {value!r}")
    return value


def _whole_modules(stated: Mapping[str, Any]) -> tuple[str, ...]:
    names = stated.get("modules_to_save") or ()
    for name in names:
        if name not in WHOLE_MODULES:
            raise AdapterError(
                f"the adapter has {name!r} in modules_to_save; only {', '.join(WHOLE_MODULES)} can be trained"
                " as a whole, since everything else is in the blocks"
            )
    return tuple(sorted(set(names)))


def to_peft(settings: Settings, config: ModelConfig) -> dict[str, Any]:
    """The fields of an `adapter_config.json` that say the same."""
    whole = list(settings.whole_modules) or None
    if isinstance(settings, Lora):
        targets = settings.targets
        if settings.targets == ALL_LINEAR or settings.targets == DEFAULT_TARGETS:
            counted = Counter(place.stem for place in settings.layout(config).places)
            targets = tuple(sorted(counted))
        return {
            "peft_type": "LORA",
            "r": settings.rank,
            "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
            "target_modules": targets if isinstance(targets, str) else list(targets),
            "exclude_modules": _listed(settings.exclude),
            "layers_to_transform": None if settings.blocks is None else list(settings.blocks),
            "rank_pattern": dict(settings.rank_pattern),
            "alpha_pattern": dict(settings.alpha_pattern),
            "use_rslora": settings.rslora,
            "modules_to_save": whole,
            "bias": "none",
            "lora_dropout": 0.0,
            "init_lora_weights": True,
        }
    shape = {"num_layers": config.num_blocks, "num_transformer_submodules": 1, "modules_to_save": whole}
    shape["num_virtual_tokens"] = settings.tokens
    if isinstance(settings, Prefix):
        of_block = config.num_kv_heads * config.head_dim
        shape |= {"num_attention_heads": config.num_kv_heads, "token_dim": of_block}
        return {
            "peft_type": "PREFIX_TUNING",
            **shape,
            "prefix_projection": False,
            "encoder_hidden_size": of_block,
        }
    shape |= {"num_attention_heads": config.num_heads, "token_dim": config.hidden_size}
    return {"peft_type": "PROMPT_TUNING", **shape, "prompt_tuning_init": "RANDOM"}


def _listed(names: tuple[str, ...] | str) -> list[str] | str | None:
    return names if isinstance(names, str) and names else list(names) or None
