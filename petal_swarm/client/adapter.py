"""What a client trains of a model whose blocks are elsewhere, as parameters of torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from petal_swarm.errors import AdapterError
from petal_swarm.models.adapter_settings import Lora, Prefix, Settings, SoftPrompt
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.models.peft_format import Extras, StoredAdapter
from petal_swarm.span import Span


class LoraPair(nn.Module):
    """`lora_B @ lora_A` for one layer, which begins as nothing: initialized as PEFT does."""

    def __init__(self, place: LoraPlace, rows: int, columns: int, device: torch.device) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(place.rank, columns, device=device))
        self.lora_B = nn.Parameter(torch.zeros(rows, place.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))


class SwarmAdapter(nn.Module):
    """The parameters of one adapter, float32: `lora`, `prefix` or `soft_prompt`, whichever it is.

    `numbers()` is what the blocks get of it, as `layout` says. `soft_prompt [tokens, hidden_size]` goes in
    front of the embeddings of every sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: Settings,
        *,
        embedding: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`embedding [vocab_size, hidden_size]` is where a soft prompt begins, or random numbers.

        Raises:
            AdapterError: the model has no layers of these names, or a size makes no sense.
        """
        super().__init__()
        device = torch.device(device)
        self.config = config
        self.settings = settings
        self.layout: AdapterLayout = settings.layout(config)
        self.lora = nn.ModuleDict()
        self.prefix: nn.Parameter | None = None
        self.soft_prompt: nn.Parameter | None = None
        if isinstance(settings, Lora):
            shapes = family_of(config).block_shapes(config)
            for place in self.layout.places:
                rows, columns = shapes[f"{place.stem}.weight"]
                self.lora[_key(place)] = LoraPair(place, rows, columns, device)
        elif isinstance(settings, Prefix):
            shape = (config.num_blocks, 2, config.num_kv_heads, settings.tokens, config.head_dim)
            self.prefix = nn.Parameter(torch.randn(shape, device=device))
        else:
            self.soft_prompt = nn.Parameter(_first_prompt(config, settings, embedding).to(device))

    @property
    def prompt_tokens(self) -> int:
        """How many rows the soft prompt puts in front of each sequence."""
        return 0 if self.soft_prompt is None else self.soft_prompt.shape[0]

    def numbers(self) -> Tensor:
        """The flat float32 vector of the whole model, in the layout's order; differentiable."""
        if self.prefix is not None:
            return self.prefix.flatten()
        pieces = [parameter.flatten() for pair in self._pairs() for parameter in (pair.lora_A, pair.lora_B)]
        return torch.cat(pieces) if pieces else torch.empty(0)

    def fill(self, stored: StoredAdapter) -> None:
        """Take over the numbers of an adapter of the same settings.

        Raises:
            AdapterError: it is of another shape.
        """
        soft_prompt = stored.extras.soft_prompt
        of_prompt = None if soft_prompt is None else soft_prompt.shape
        if stored.layout != self.layout or of_prompt != getattr(self.soft_prompt, "shape", None):
            raise AdapterError("these numbers are of an adapter of another shape")
        with torch.no_grad():
            if self.soft_prompt is not None and soft_prompt is not None:
                self.soft_prompt.copy_(soft_prompt)
            if self.prefix is not None:
                self.prefix.copy_(stored.numbers.view(self.prefix.shape))
            blocks = Span(0, self.config.num_blocks)
            split = self.layout.split(self.config, stored.numbers, blocks)
            for place, pair in zip(self.layout.places, self._pairs(), strict=True):
                matrices = split[place.block].lora[place.stem]
                pair.lora_A.copy_(matrices.a)
                pair.lora_B.copy_(matrices.b)

    def stored(
        self, modules: dict[str, Tensor], *, base_model: str | None = None, task_type: str | None = None
    ) -> StoredAdapter:
        """What `write_adapter` writes; `modules` are tensors trained as a whole, by PEFT's names."""
        whole = {name.rpartition(".")[0] for name in modules}
        settings = replace(self.settings, whole_modules=tuple(sorted(whole)))
        soft_prompt = None if self.soft_prompt is None else self.soft_prompt.detach()
        with torch.no_grad():
            numbers = self.numbers().cpu()
        extras = Extras(settings, soft_prompt, modules, base_model, task_type)
        return StoredAdapter(self.layout, numbers, extras)

    def _pairs(self) -> list[LoraPair]:
        return [cast(LoraPair, pair) for pair in self.lora.values()]


def _key(place: LoraPlace) -> str:
    """A name without dots, which torch does not allow."""
    return f"{place.block}-{place.stem.replace('.', '-')}"


def _first_prompt(config: ModelConfig, settings: SoftPrompt, embedding: Tensor | None) -> Tensor:
    """As PEFT: the embeddings of given tokens, repeated; otherwise of tokens drawn at random."""
    if embedding is None:
        return torch.randn(settings.tokens, config.hidden_size)
    if settings.token_ids:
        repeats = -(-settings.tokens // len(settings.token_ids))
        ids = torch.tensor((settings.token_ids * repeats)[: settings.tokens])
        if int(ids.min()) < 0 or int(ids.max()) >= len(embedding):
            raise AdapterError(
                f"the soft prompt begins with tokens that the model lacks: {settings.token_ids}"
            )
    else:
        ids = torch.randint(len(embedding), (settings.tokens,))
    return embedding.detach()[ids.to(embedding.device)].float().clone()
