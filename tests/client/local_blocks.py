"""A stand-in for the blocks in a swarm: those of transformers in this process, with autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.span import Span


class LocalBlocks:
    """Takes the place of `RemoteBlocks`, for the whole model only."""

    def __init__(self, model: PreTrainedModel, config: ModelConfig) -> None:
        self._base = model.base_model.requires_grad_(False)
        self._config = config
        self._family = family_of(config)
        names = [self._family.ends.final_norm, self._family.ends.embedding_norm]
        for name in (name for name in names if name is not None):
            setattr(self._base, name.removeprefix(self._family.base_prefix), nn.Identity())
        self.calls = 0

    def __call__(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        blocks: Span,
        *,
        layout: AdapterLayout | None = None,
        numbers: Tensor | None = None,
    ) -> Tensor:
        assert blocks == Span(0, self._config.num_blocks)
        self.calls += 1
        weights: dict[str, Tensor] = {}
        prefix: list[tuple[Tensor, Tensor]] = []
        if layout is not None and numbers is not None:
            own = dict(self._base.named_parameters())
            for block, adapter in layout.split(self._config, numbers, blocks).items():
                for stem, lora in adapter.lora.items():
                    name = f"{self._family.block_prefix.format(block)}{stem}.weight"
                    name = name.removeprefix(self._family.base_prefix)
                    weights[name] = own[name] + lora.scale * lora.b @ lora.a
                if adapter.prefix is not None:
                    prefix.append((adapter.prefix[0][None], adapter.prefix[1][None]))
        rows = [self._sequence(piece[None], weights, prefix) for piece in torch.split(hidden, list(lengths))]
        return torch.cat(rows)

    def _sequence(
        self, embeds: Tensor, weights: dict[str, Tensor], prefix: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        options: dict[str, Any] = {"inputs_embeds": embeds}
        if prefix:
            options["past_key_values"] = DynamicCache(prefix)
        result = torch.func.functional_call(self._base, weights, (), options)
        return result.last_hidden_state[0]

    def close(self) -> None:
        """Nothing to close."""
