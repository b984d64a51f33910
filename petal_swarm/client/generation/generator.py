"""Answers of a model in a swarm, for programs with an event loop: many at once, each a stream."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from petal_swarm.client.config import ClientConfig
from petal_swarm.client.generation.adapters import Adapters, ReadyAdapter, load_adapter
from petal_swarm.client.generation.generation import Generation, Model
from petal_swarm.client.generation.head import Head
from petal_swarm.client.generation.request import GenerationRequest
from petal_swarm.client.loading_bar import loading_bar
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.errors import ConfigError
from petal_swarm.models.checkpoint import Checkpoint, open_checkpoint
from petal_swarm.models.ends import Ends, load_ends
from petal_swarm.models.token_texts import TokenTexts
from petal_swarm.models.tokenizer import load_tokenizer
from petal_swarm.net.swarm_key import load_swarm_key


class Generator:
    """Lives in the swarm's event loop, and closes nothing that it was given.

    `context_tokens` is how long the model lets prompt and answer be together; None if it does not say.
    """

    def __init__(
        self,
        swarm: Swarm,
        ref: ModelRef,
        ends: Ends,
        tokenizer: Any,
        *,
        end_tokens: frozenset[int],
        context_tokens: int | None,
        adapters: Mapping[str, ReadyAdapter] | None = None,
    ) -> None:
        self.swarm = swarm
        self.ref = ref
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self._running: weakref.WeakSet[Generation] = weakref.WeakSet()
        self._model = Model(
            swarm,
            ref,
            ends,
            Head(ends),
            tokenizer,
            TokenTexts(tokenizer),
            Adapters(swarm, ref, adapters or {}),
            end_tokens,
        )

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, from 0."""
        return self._model.ends.lm_head().shape[0]

    def start(self, request: GenerationRequest) -> Generation:
        """An answer, or several; nothing is sent before somebody waits for it.

        Raises:
            ConfigError: prompt and answer are longer than the model's context, a token is none that it has,
                or there is no such adapter.
        """
        longest = max(map(len, request.prompts)) + request.max_new_tokens
        if self.context_tokens is not None and longest > self.context_tokens:
            raise ConfigError(
                f"prompt and new tokens are {longest}, and the model's context is of {self.context_tokens}"
            )
        tokens = (*(token for prompt in request.prompts for token in prompt), *request.sampling.logit_bias)
        if not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            raise ConfigError(f"tokens must be 0 to {self.vocabulary - 1}")
        self._model.adapters.check(request.adapter)
        generation = Generation(self._model, request)
        self._running.add(generation)
        return generation

    async def adapters(self) -> tuple[str, ...]:
        """Names of adapters that a request can have; what servers offer may be a few seconds old.

        Raises:
            NetworkError: the directory cannot be asked.
        """
        return await self._model.adapters.names()

    async def close(self) -> None:
        """End what still runs, and the thread of the head. Idempotent."""
        await asyncio.gather(*(generation.aclose() for generation in list(self._running)))
        await self._model.head.close()


async def connect_generator(
    model: str,
    config: ClientConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    progress: bool = True,
) -> Generator:
    """Read embeddings, LM head, tokenizer and adapters, and join the swarm. Close it, then its `swarm`.

    `adapters` are folders by the names that requests use; `progress` shows a bar.

    Raises:
        UnknownModelError, UnsupportedArchitectureError, CheckpointError: the model cannot be read.
        AdapterError: an adapter cannot be used with it.
        PeerUnreachableError: no initial peer answers.
        ConfigError: an argument cannot be used.
    """
    load_swarm_key(config.swarm_key)  # a bad one is told before minutes of reading
    checkpoint = await asyncio.to_thread(open_checkpoint, model)
    tokenizer = await asyncio.to_thread(load_tokenizer, model)
    own = {
        name: await asyncio.to_thread(load_adapter, folder, checkpoint.config)
        for name, folder in (adapters or {}).items()
    }
    with loading_bar(f"loading {checkpoint.name}", shown=progress) as report:
        ends = await asyncio.to_thread(load_ends, checkpoint, dtype=dtype, device=device, progress=report)
    shape = checkpoint.config
    swarm = await Swarm.connect(config)
    return Generator(
        swarm,
        ModelRef(checkpoint.model_key, shape.num_blocks, shape.hidden_size),
        ends,
        tokenizer,
        end_tokens=end_tokens_of(checkpoint, tokenizer),
        context_tokens=context_tokens_of(checkpoint),
        adapters=own,
    )


def end_tokens_of(checkpoint: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the model's, or if it does not say, the tokenizer's."""
    stated = checkpoint.generation_config().eos_token_id
    if stated is None:
        stated = tokenizer.eos_token_id
    if stated is None:
        return frozenset()
    return frozenset((stated,) if isinstance(stated, int) else stated)


def context_tokens_of(checkpoint: Checkpoint) -> int | None:
    """How long a text the model was made for; None if it does not say (BLOOM's ALiBi has no end)."""
    length = getattr(checkpoint.hf_config(), "max_position_embeddings", None)
    return int(length) if length else None
