"""A causal language model whose blocks are in the swarm, with Hugging Face's whole `generate`."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from petal_swarm.client import tuning
from petal_swarm.client.adapter import SwarmAdapter
from petal_swarm.client.adapters import Adapter, NamedAdapter, Snapshots
from petal_swarm.client.cache import SwarmCache
from petal_swarm.client.front import Front, strip_prompt
from petal_swarm.client.loop import LoopThread
from petal_swarm.client.packing import Packing
from petal_swarm.client.session import InferenceSession
from petal_swarm.client.stepping import kept_columns, step_logits
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.training.function import RemoteBlocks
from petal_swarm.client.view import ModelRef
from petal_swarm.errors import AdapterError, ConfigError
from petal_swarm.models.ends import Ends
from petal_swarm.routing.route import Route
from petal_swarm.span import Span

CLOSE_TIMEOUT_S = 15.0
#: Drafts reach past the last token that is kept.
DRAFT_ROOM = 64
#: What Hugging Face's losses leave out.
IGNORED_LABEL = -100


class SwarmModelForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Embeddings and LM head here, blocks in the swarm. Made by `AutoSwarmModelForCausalLM.from_pretrained`.

    Close it, or use it as a context manager: it holds a network thread and, on Linux, a libp2p daemon.
    """

    config_class = PretrainedConfig
    base_model_prefix = "ends"
    main_input_name = "input_ids"
    _supports_cache_class = True
    task_type = "CAUSAL_LM"
    adapter: SwarmAdapter | None

    def __init__(
        self, config: PretrainedConfig, ends: Ends, loop: LoopThread, swarm: Swarm, ref: ModelRef
    ) -> None:
        super().__init__(config)
        self.ends = ends
        self._loop = loop
        self._swarm = swarm
        self._ref = ref
        self._blocks = RemoteBlocks(loop, swarm, ref, ends.config)
        self._of_thread = _OfThread()
        self._closed = False
        self._snapshots = Snapshots(ends.config)
        self._offered: NamedAdapter | None = None
        self._front = Front(ends)
        self._own_head = False
        self.register_module("adapter", None)
        self.last_route: Route | None = None
        self._at_exit = _close_at_exit(self)

    # -- sessions ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def inference_session(self, *, max_length: int) -> Iterator[InferenceSession]:
        """A KV cache in the swarm for sequences of at most `max_length` tokens, kept over many calls.

        Inside the `with` block `generate` uses it without being told.

        Raises:
            ConfigError: `max_length` is less than one, or the model is closed.
        """
        session = self.open_session(max_length=max_length)
        outer, self._of_thread.session = self._of_thread.session, session
        try:
            yield session
        finally:
            self._of_thread.session = outer
            session.close()

    def open_session(self, *, max_length: int) -> InferenceSession:
        """A session that the caller closes; see `inference_session`."""
        if self._closed:
            raise ConfigError("the model is closed")
        used: Adapter | NamedAdapter | None = self._offered
        prompt = 0
        if self.adapter is not None:
            used = self._snapshots.of(self.adapter.layout, self.adapter.numbers())
            prompt = self.adapter.prompt_tokens
        return InferenceSession(
            self._loop, self._swarm, self._ref, max_length=max_length + prompt, adapter=used
        )

    # -- generation ----------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, *, session: InferenceSession | None = None, **kwargs: Any
    ) -> Any:
        """Hugging Face's `generate`: greedy, sampling, beams, streamers, stopping criteria, padding.

        With a `session` (given, or of an enclosing `inference_session`), `inputs` are the tokens that
        follow what the session holds already, and may be left out to go on from there. The result then
        starts with these inputs, not with earlier ones.

        Raises:
            MissingBlocksError: nobody serves some blocks.
            SessionTooLongError: prompt and new tokens do not fit the session.
            RemoteError, NetworkError: the swarm failed.
        """
        session = session or self._of_thread.session
        if session is None:
            with self._closing_caches():
                return super().generate(inputs, **kwargs)
        return self._generate_in(session, inputs, kwargs)

    def _generate_in(
        self, session: InferenceSession, inputs: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> Any:
        new = inputs if inputs is not None else kwargs.pop("input_ids", None)
        mask = kwargs.pop("attention_mask", None)
        earlier, earlier_mask = session.output_ids, session.attention_mask
        skipped = 0
        if earlier is not None and earlier_mask is not None:
            given = kwargs.get("generation_config") or self.generation_config
            if (kwargs.get("num_beams") or given.num_beams or 1) > 1:
                raise ConfigError("beam search cannot go on from an earlier call of a session; use a new one")
            skipped = earlier.shape[1]
            new = earlier[:, skipped:] if new is None else new
            if new.shape[0] != earlier.shape[0]:
                raise ConfigError(f"the session has {earlier.shape[0]} sequences, the inputs {new.shape[0]}")
            mask = _or_ones(mask, new)
            new, mask = torch.cat([earlier, new], dim=1), torch.cat([earlier_mask, mask], dim=1)
        if new is None:
            raise ConfigError("generate needs input_ids in the first call of a session")
        mask = _or_ones(mask, new)
        cache = SwarmCache(session, width=max(0, skipped - 1))
        result = super().generate(new, attention_mask=mask, past_key_values=cache, **kwargs)
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        session.output_ids = sequences
        grown = sequences.shape[1] - new.shape[1]
        mask = mask.repeat_interleave(sequences.shape[0] // mask.shape[0], dim=0)
        session.attention_mask = torch.cat([mask, mask.new_ones(mask.shape[0], grown)], dim=1)
        self.last_route = session.route
        if isinstance(result, torch.Tensor):
            return sequences[:, skipped:].clone()
        result.sequences = sequences[:, skipped:].clone()
        return result

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` needs of `generate`'s state; Hugging Face's own does much more for every token."""
        embeds = kwargs.pop("inputs_embeds", None)
        if embeds is not None and is_first_iteration:
            kept = embeds if next_sequence_length is None else embeds[:, -next_sequence_length:]
            return {"inputs_embeds": kept, **kwargs}
        if is_first_iteration and next_sequence_length is None:
            # Assisted decoding asks for all tokens, also where a session holds the first ones already; a
            # prompt in chunks asks for one chunk, which is never longer than what is held then.
            cache = kwargs.get("past_key_values")
            held = cache.width if isinstance(cache, SwarmCache) else 0
            input_ids = input_ids[:, held:] if input_ids.shape[1] > held else input_ids
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return {"input_ids": input_ids, **kwargs}

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *arguments: Any,
    ) -> None:
        """Hugging Face asks here for a KV cache; ours is a session, sized by what `generate` will need."""
        greedy = generation_mode == GenerationMode.GREEDY_SEARCH
        cache = model_kwargs.get("past_key_values")
        if generation_config.use_cache is False:
            return
        drafted = DRAFT_ROOM if generation_mode == GenerationMode.ASSISTED_GENERATION else 0
        if cache is None:
            session = self.open_session(max_length=max(1, max_cache_length + 1 + drafted))
            self._of_thread.opened.append(session)
            cache = model_kwargs["past_key_values"] = SwarmCache(session)
        if greedy:
            cache.look_ahead(_token_set(generation_config.eos_token_id), max_cache_length)

    @contextlib.contextmanager
    def _closing_caches(self) -> Iterator[None]:
        """Close the sessions that one call of `generate` opens."""
        outer = self._of_thread.opened
        opened: list[InferenceSession] = []
        self._of_thread.opened = opened
        try:
            yield
        finally:
            self._of_thread.opened = outer
            for session in opened:
                self.last_route = session.route or self.last_route
                session.close()

    # -- forward -------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SwarmCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """Logits `[batch, tokens, vocab]` for `input_ids [batch, tokens]`, through the whole swarm.

        Positions follow from `attention_mask` (padding may be on either side), so `position_ids` and
        other arguments of Hugging Face models are accepted and not needed. Padded places get zeros.
        Without `past_key_values` no KV cache outlives the call, and the result is differentiable: gradients
        go to `inputs_embeds` and to the adapter. With `labels` there is a loss, as Hugging Face computes it
        (over `num_items_in_batch` tokens, if given).

        Raises:
            ConfigError: arguments that do not fit each other, or a sequence that is too long to be trained.
            MissingBlocksError: nobody serves some blocks, or nobody trains them.
            RemoteError, NetworkError: the swarm failed.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give input_ids or inputs_embeds")
        if labels is not None and past_key_values is not None:
            raise ConfigError("there is no loss with past_key_values: give all tokens at once")
        given = cast(torch.Tensor, input_ids if input_ids is not None else inputs_embeds)
        loss = None
        if past_key_values is not None:
            logits = step_logits(self._front, given, attention_mask, past_key_values, logits_to_keep)
        elif labels is not None or self._is_trained(given):
            logits, loss = self._with_loss(given, attention_mask, labels, num_items_in_batch)
            logits = kept_columns(logits, logits_to_keep)
        else:
            with self.open_session(max_length=given.shape[1]) as session:
                cache = SwarmCache(session)
                logits = step_logits(self._front, given, attention_mask, cache, logits_to_keep)
                self.last_route = session.route
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def run_blocks(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        blocks: Span | tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """What comes out of `blocks`, by default all, for `hidden [batch, tokens, hidden_size]`.

        Differentiable: for modules of your own between blocks. Padding may be on either side, and padded
        places get zeros. An adapter of the model is used.

        Raises:
            ConfigError: there are no such blocks, or the shapes do not fit.
            MissingBlocksError: nobody trains some of them.
            RemoteError, NetworkError: the swarm failed.
        """
        if hidden.dim() != 3:
            raise ConfigError(f"hidden must be [batch, tokens, hidden_size], got {list(hidden.shape)}")
        span = Span(*blocks) if isinstance(blocks, tuple) else blocks or Span(0, self._ref.num_blocks)
        packing = Packing.of(hidden.shape[0], hidden.shape[1], attention_mask)
        return packing.unpack(self._run(packing.pack(hidden), packing.lengths, span))

    def final_rows(self, given: torch.Tensor, packing: Packing, *, before: int = 0) -> torch.Tensor:
        """What comes out of the last block, `[tokens, hidden_size]`, for tokens or embeddings `given`.

        Each sequence begins with the last `before` rows of the soft prompt. A head starts from `ends.leave`
        of the rows. Differentiable, as `forward` is.

        Raises:
            ConfigError, MissingBlocksError, RemoteError, NetworkError: as `forward`.
        """
        hidden, lengths = self._front.rows(given, packing)
        if self._is_trained(given):
            rows = self._run(hidden, lengths, Span(0, self._ref.num_blocks))
        else:
            with self.open_session(max_length=packing.width) as session:
                rows = session.step(hidden, lengths, rows="all")
                self.last_route = session.route
        return strip_prompt(rows, lengths, [length + before for length in packing.lengths])

    def _is_trained(self, given: torch.Tensor) -> bool:
        """Whether gradients are wanted, for the inputs or for the adapter."""
        parameters = () if self.adapter is None else self.adapter.parameters()
        return torch.is_grad_enabled() and any(each.requires_grad for each in (given, *parameters))

    def _run(self, rows: torch.Tensor, lengths: tuple[int, ...], blocks: Span) -> torch.Tensor:
        if self._closed:
            raise ConfigError("the model is closed")
        if self._offered is not None and self.adapter is None:
            raise ConfigError(
                "gradients need an adapter of your own: load_adapter(FOLDER) or remove_adapter()"
            )
        if self.adapter is None:
            return self._blocks(rows, lengths, blocks)
        return self._blocks(rows, lengths, blocks, layout=self.adapter.layout, numbers=self.adapter.numbers())

    def _with_loss(
        self,
        given: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of all columns, and the loss if there are labels: a soft prompt predicts the first token."""
        packing = Packing.of(given.shape[0], given.shape[1], attention_mask)
        before = 1 if labels is not None and self.adapter is not None and self.adapter.prompt_tokens else 0
        rows = self.final_rows(given, packing, before=before)
        logits = packing.widened(before).unpack(self.ends.logits(rows))
        if labels is None:
            return logits, None
        loss = self.loss_function(
            logits=logits,
            labels=nn.functional.pad(labels, (before, 0), value=IGNORED_LABEL),
            vocab_size=self.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
        )
        return logits[:, before:], loss

    # -- adapters ------------------------------------------------------------------------------

    def add_adapter(self, settings: object) -> SwarmAdapter:
        """Train `settings`: a `Lora`, `Prefix` or `SoftPrompt`, or PEFT's configuration of one.

        Its parameters are the only trainable ones of the model: `model.parameters()` with `requires_grad`.

        Raises:
            ConfigError: the model has an adapter already.
            AdapterError: settings that are not supported, or do not fit the model.
        """
        return tuning.add_adapter(self, settings)

    def load_adapter(
        self, folder: str | os.PathLike[str], *, is_trainable: bool = True, **hub: str | None
    ) -> SwarmAdapter:
        """Use, or train on, an adapter in PEFT's format, in place of the one the model has.

        `hub` may be `revision`, `cache_dir` and `token`.

        Raises:
            UnknownModelError: there is no such folder or repository of the Hugging Face Hub.
            AdapterError: it is damaged, not supported, or does not fit the model.
        """
        return tuning.load_adapter(self, folder, is_trainable=is_trainable, **hub)

    def remove_adapter(self) -> None:
        """Go back to the model as it was; a head that was trained as a whole stays as it is."""
        self.use_adapter(None)

    def use_adapter(self, adapter: SwarmAdapter | None) -> None:
        """Compute with these parameters."""
        self.adapter = adapter
        self._front = Front(self.ends, None if adapter is None else adapter.soft_prompt)
        self._offered = None

    def use_offered_adapter(self, name: str) -> None:
        """Use an adapter that servers offer to everybody, by its name or its id; only such servers are used.

        Raises:
            ConfigError: the model has an adapter of its own, or no server offers this one.
        """
        if self.adapter is not None:
            raise ConfigError("the model has an adapter already: call remove_adapter() first")
        limit_s = self._swarm.config.wait_for_blocks_s + CLOSE_TIMEOUT_S
        self._offered = self._loop.run(self._swarm.find_adapter(self._ref, name), timeout_s=limit_s)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write what was trained, in PEFT's format; see `tuning.save_pretrained`."""
        tuning.save_pretrained(self, save_directory, **options)

    def train_whole(self, module: str) -> None:
        """Train the LM head itself; `module` must be "lm_head".

        Raises:
            AdapterError: it is something else.
        """
        if module != "lm_head":
            raise AdapterError(f"this model has no {module!r}; is it of a model for another task?")
        self.ends.train_head()
        self._own_head = True

    def whole_modules(self) -> dict[str, nn.Parameter]:
        """The LM head, if it was ever trained."""
        return {"lm_head.weight": self.ends.lm_head()} if self._own_head else {}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **options: Any) -> Any:
        """As torch's; if not `strict`, what is frozen is not reported as missing."""
        result = super().load_state_dict(state_dict, strict, **options)
        result.missing_keys[:] = tuning.not_frozen(self, result.missing_keys)
        return result

    def activation_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Not needed: servers bound what they keep, and compute again what they dropped."""
        tuning.warn_of_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable

    # -- life ----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.ends.device

    @property
    def dtype(self) -> torch.dtype:
        return self.ends.dtype

    def close(self) -> None:
        """Leave the swarm. Idempotent; sessions of this model end with it."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        try:
            try:
                self._blocks.close()
            finally:
                self._loop.run(self._swarm.close(), timeout_s=CLOSE_TIMEOUT_S)
        finally:
            self._loop.close()

    def __enter__(self) -> SwarmModelForCausalLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(
                "a swarm model was not closed; call close() or use `with`", ResourceWarning, stacklevel=2
            )


class _OfThread(threading.local):
    """What belongs to the calls of one thread: `generate` may run in several at once."""

    def __init__(self) -> None:
        self.session: InferenceSession | None = None
        self.opened: list[InferenceSession] = []


def _or_ones(mask: torch.Tensor | None, token_ids: torch.Tensor) -> torch.Tensor:
    """The attention mask, which says by default that nothing is padding."""
    return torch.ones_like(token_ids) if mask is None else mask


def _token_set(token_ids: int | list[int] | None) -> frozenset[int]:
    if token_ids is None:
        return frozenset()
    return frozenset((token_ids,) if isinstance(token_ids, int) else token_ids)


def _close_at_exit(model: SwarmModelForCausalLM) -> Any:
    """Close the model at interpreter exit if nobody has, without keeping it alive."""
    reference = weakref.ref(model)

    def close() -> None:
        remaining = reference()
        if remaining is not None:
            remaining.close()

    atexit.register(close)
    return close
