"""A model that sorts whole texts into classes: blocks in the swarm, the head here."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from petal_swarm.client import tuning
from petal_swarm.client.adapter import SwarmAdapter
from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.client.packing import Packing
from petal_swarm.errors import AdapterError, ConfigError
from petal_swarm.models.checkpoint import Checkpoint
from petal_swarm.models.ends import Ends

HEAD = "score"


class SwarmModelForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """A linear head on what the last token of each text has become; it is trainable from the start.

    Made by `AutoSwarmModelForSequenceClassification.from_pretrained`. Close it, or use it as a context
    manager.
    """

    config_class = PretrainedConfig
    base_model_prefix = "lm"
    main_input_name = "input_ids"
    task_type = "SEQ_CLS"

    def __init__(self, lm: SwarmModelForCausalLM, num_labels: int | None = None) -> None:
        """`lm` is closed with this model. The head begins with random weights.

        Raises:
            ConfigError: `num_labels` is less than one.
        """
        config = copy.deepcopy(lm.config)
        if num_labels is not None:
            if num_labels < 1:
                raise ConfigError(f"num_labels must be at least 1, got {num_labels}")
            config.num_labels = num_labels
        super().__init__(config)
        self.lm = lm
        self.score = nn.Linear(lm.ends.config.hidden_size, config.num_labels, bias=False, device=lm.device)
        nn.init.normal_(self.score.weight, std=getattr(config, "initializer_range", 0.02))

    def take_head(self, checkpoint: Checkpoint) -> None:
        """Begin with the checkpoint's own head, if it has one of this size."""
        name = checkpoint.family.base_prefix + f"{HEAD}.weight"
        stated = checkpoint.hf_config().num_labels
        if name in checkpoint.names() and stated == self.config.num_labels:
            shapes = {name: tuple(self.score.weight.shape)}
            with torch.no_grad():
                self.score.weight.copy_(checkpoint.load(shapes, dtype=torch.float32)[name])

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[torch.Tensor, ...]:
        """Scores `[batch, num_labels]` of texts `input_ids [batch, tokens]`; with labels, the loss too.

        The last real token of a text is that of `attention_mask`; without one, the last that is not the
        configuration's `pad_token_id`. The loss follows from `config.problem_type`, or from the labels, as in
        Hugging Face models.

        Raises:
            ConfigError: arguments that do not fit each other.
            MissingBlocksError, RemoteError, NetworkError: the swarm failed.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give input_ids or inputs_embeds")
        given = cast(torch.Tensor, input_ids if input_ids is not None else inputs_embeds)
        if attention_mask is None and input_ids is not None:
            attention_mask = self._without_padding(input_ids)
        packing = Packing.of(given.shape[0], given.shape[1], attention_mask)
        rows = self.lm.final_rows(given, packing)
        last = torch.tensor(packing.lengths, device=rows.device).cumsum(0) - 1
        scores = self.score(self.lm.ends.leave(rows[last]).to(self.score.weight.dtype))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=scores, config=self.config)
        if return_dict is False:
            return (scores,) if loss is None else (loss, scores)
        return SequenceClassifierOutputWithPast(loss=loss, logits=scores)

    def _without_padding(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """A mask of all up to the last token that is no padding; what follows changes nothing before it."""
        padding = self.config.pad_token_id
        if padding is None:
            return None
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (columns * (input_ids != padding)).argmax(-1)
        return cast(torch.Tensor, columns <= last[:, None])

    # -- adapters ------------------------------------------------------------------------------

    @property
    def adapter(self) -> SwarmAdapter | None:
        return self.lm.adapter

    @property
    def ends(self) -> Ends:
        return self.lm.ends

    def use_adapter(self, adapter: SwarmAdapter | None) -> None:
        """Compute with these parameters."""
        self.lm.use_adapter(adapter)

    def add_adapter(self, settings: object) -> SwarmAdapter:
        """As `SwarmModelForCausalLM.add_adapter`; the head is trained with it."""
        return tuning.add_adapter(self, settings)

    def load_adapter(
        self, folder: str | os.PathLike[str], *, is_trainable: bool = True, **hub: str | None
    ) -> SwarmAdapter:
        """As `SwarmModelForCausalLM.load_adapter`; with the head, if one was saved with it."""
        return tuning.load_adapter(self, folder, is_trainable=is_trainable, **hub)

    def remove_adapter(self) -> None:
        """Go on with the head alone."""
        self.use_adapter(None)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write adapter and head in PEFT's format; see `tuning.save_pretrained`."""
        tuning.save_pretrained(self, save_directory, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **options: Any) -> Any:
        """As torch's; if not `strict`, what is frozen is not reported as missing."""
        result = super().load_state_dict(state_dict, strict, **options)
        result.missing_keys[:] = tuning.not_frozen(self, result.missing_keys)
        return result

    def train_whole(self, module: str) -> None:
        """Train the head; `module` must be "score".

        Raises:
            AdapterError: it is something else.
        """
        if module != HEAD:
            raise AdapterError(f"this model has no {module!r}; is it of a model for another task?")
        self.score.requires_grad_(True)

    def whole_modules(self) -> dict[str, nn.Parameter]:
        """The head."""
        return {f"{HEAD}.weight": cast(nn.Parameter, self.score.weight)}

    def activation_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Not needed: servers bound what they keep, and compute again what they dropped."""
        tuning.warn_of_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable

    # -- life ----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.dtype

    def close(self) -> None:
        """Leave the swarm. Idempotent."""
        self.lm.close()

    def __enter__(self) -> SwarmModelForSequenceClassification:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
