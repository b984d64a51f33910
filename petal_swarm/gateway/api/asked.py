"""From a checked body to a request for the swarm, and to the shape its answer is to have."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from petal_swarm.client.generation.request import GenerationRequest, Sampling
from petal_swarm.errors import ConfigError
from petal_swarm.gateway.api.errors import bad_request, from_validation, too_long
from petal_swarm.gateway.api.schemas import Body, ChatBody, CompletionBody
from petal_swarm.gateway.api.shapes import ChatShape, CompletionShape, Shape
from petal_swarm.gateway.config import GatewayConfig
from petal_swarm.models.prompts import Message, chat_tokens, has_template, stop_text, text_tokens

#: Of a completion whose length is not said, as OpenAI's.
DEFAULT_COMPLETION_TOKENS = 16
#: Longer texts are cut into tokens in a thread: about a millisecond for each 4,000 characters.
INLINE_CHARACTERS = 4000
#: No text that somebody wants answered has so many for each token. Two megabytes would keep a core busy for
#: seconds, only to be refused.
MAX_CHARACTERS_PER_TOKEN = 16
#: A template adds at least so many to a message.
MESSAGE_CHARACTERS = 16
#: Prompt and answer of a model that does not say how long they may be, as BLOOM: without a bound, one long
#: prompt's embeddings would take all memory.
UNSAID_CONTEXT_TOKENS = 1 << 14
#: To make objects of two megabytes of `[[],[],...` takes a second, in which nobody else is answered.
MAX_BRACKETS = 1 << 16

B = TypeVar("B", bound=Body)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, understood. `model` is the name it was asked of by."""

    model: str
    request: GenerationRequest
    shape: Shape
    stream: bool
    include_usage: bool
    include_swarm: bool

    @property
    def num_choices(self) -> int:
        return len(self.request.prompts) * self.request.choices


def parse(kind: type[B], data: bytes) -> B:
    """A body of this kind.

    Raises:
        ApiError: it is not JSON, or something in it cannot be used.
    """
    if len(data) > MAX_BRACKETS and data.count(b"[") + data.count(b"{") > MAX_BRACKETS:
        raise bad_request(f"The body has more than {MAX_BRACKETS} lists and objects.")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise from_validation(error, kind.UNSUPPORTED) from None


class Reader:
    """Makes requests of bodies, for a model of so many tokens."""

    def __init__(
        self, tokenizer: Any, config: GatewayConfig, *, vocabulary: int, context_tokens: int | None
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._vocabulary = vocabulary
        self._context_tokens = UNSAID_CONTEXT_TOKENS if context_tokens is None else context_tokens
        self._one_at_a_time = asyncio.Lock()

    async def chat(self, body: ChatBody, adapter: str | None) -> Asked:
        """
        Raises:
            ApiError: it cannot be answered.
        """
        messages: list[Message] = [
            {"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in body.messages
        ]
        characters = sum(len(message["content"]) for message in messages)
        self._check_characters(characters, "messages")
        try:
            is_short = characters + MESSAGE_CHARACTERS * len(messages) <= INLINE_CHARACTERS
            prompt = await self._encode(is_short, chat_tokens, self._tokenizer, messages)
        except ConfigError as error:
            raise bad_request(str(error), "messages", "invalid_value") from None
        stop = stop_text(self._tokenizer)
        request = self._request(
            body,
            ((*prompt,),),
            adapter=adapter,
            default_tokens=self._config.max_tokens,
            stops=(*body.stops, stop) if stop else body.stops,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        shape = ChatShape(logprobs=bool(body.logprobs), strip=not has_template(self._tokenizer))
        return _asked(body, request, shape)

    async def completion(self, body: CompletionBody, adapter: str | None) -> Asked:
        """
        Raises:
            ApiError: it cannot be answered.
        """
        texts, prompts = await self._prompts(body)
        echo = bool(body.echo)
        if body.max_tokens == 0 and not echo:
            raise bad_request("max_tokens may be 0 only with echo.", "max_tokens", "invalid_value")
        with_logprobs = body.logprobs is not None
        scored = echo and (with_logprobs or body.max_tokens == 0)
        request = self._request(
            body,
            prompts,
            adapter=adapter,
            default_tokens=DEFAULT_COMPLETION_TOKENS,
            stops=body.stops,
            top_logprobs=body.logprobs if with_logprobs else 0 if scored else None,
            prompt_logprobs=scored,
        )
        echoes = [text for text in texts for _ in range(request.choices)] if echo else []
        return _asked(body, request, CompletionShape(logprobs=with_logprobs, echoes=echoes))

    async def _prompts(self, body: CompletionBody) -> tuple[list[str], tuple[tuple[int, ...], ...]]:
        """Each prompt as text, which only an echo needs, and as tokens."""
        given: Any = body.prompt
        each: Sequence[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        self._check_choices(len(each) * (body.n or 1))
        characters = sum(len(prompt) for prompt in each if isinstance(prompt, str))
        texts, prompts = [], []
        for prompt in each:
            if isinstance(prompt, str):
                self._check_characters(len(prompt), "prompt")
                try:
                    is_short = characters <= INLINE_CHARACTERS
                    tokens = await self._encode(is_short, text_tokens, self._tokenizer, prompt)
                except ConfigError as error:
                    raise bad_request(str(error), "prompt", "invalid_value") from None
                texts.append(prompt)
            else:
                if len(prompt) >= self._context_tokens:
                    raise too_long(len(prompt), 1, self._context_tokens, "prompt")
                tokens = prompt
                texts.append(await self._decode(prompt) if body.echo else "")
            prompts.append(tuple(tokens))
        return texts, tuple(prompts)

    def _check_characters(self, characters: int, param: str) -> None:
        limit = self._context_tokens
        if characters > limit * MAX_CHARACTERS_PER_TOKEN:
            raise bad_request(
                f"This model's context has {limit} tokens, which {characters} characters do not fit in."
                " Shorten the prompt.",
                param,
                "context_length_exceeded",
            )

    def _check_choices(self, choices: int) -> None:
        if choices > self._config.max_choices:
            raise bad_request(
                f"At most {self._config.max_choices} answers can be asked for at once here.", "n", "too_many"
            )

    async def _encode(self, is_short: bool, work: Any, *arguments: Any) -> list[int]:
        if is_short:
            tokens: list[int] = work(*arguments)
            return tokens
        async with self._one_at_a_time:  # long prompts of a crowd leave the other cores to the swarm
            return await asyncio.to_thread(work, *arguments)

    async def _decode(self, tokens: list[int]) -> str:
        self._check_tokens(tokens, "prompt")
        return str(await asyncio.to_thread(self._tokenizer.decode, tokens))

    def _check_tokens(self, tokens: Sequence[int], param: str) -> None:
        if max(tokens, default=0) >= self._vocabulary:
            raise bad_request(f"{param}: the model's tokens are 0 to {self._vocabulary - 1}.", param)

    def _request(
        self,
        body: Body,
        prompts: tuple[tuple[int, ...], ...],
        *,
        adapter: str | None,
        default_tokens: int,
        stops: tuple[str, ...],
        top_logprobs: int | None,
        prompt_logprobs: bool = False,
    ) -> GenerationRequest:
        for prompt in prompts:
            self._check_tokens(prompt, "prompt")
        self._check_tokens(tuple(body.logit_bias or ()), "logit_bias")
        choices = body.n or 1
        self._check_choices(len(prompts) * choices)
        new_tokens = self._new_tokens(body, max(map(len, prompts)), default_tokens)
        try:
            return GenerationRequest(
                prompts=prompts,
                max_new_tokens=new_tokens,
                choices=choices,
                stops=stops,
                sampling=_sampling(body),
                top_logprobs=top_logprobs,
                prompt_logprobs=prompt_logprobs,
                ignore_eos=bool(body.ignore_eos),
                adapter=adapter,
            )
        except ConfigError as error:
            raise bad_request(str(error), _named(str(error)), "invalid_value") from None

    def _new_tokens(self, body: Body, longest: int, default: int) -> int:
        wanted, limit = body.answer_tokens, self._config.max_tokens
        if wanted is not None and wanted > limit:
            raise bad_request(f"max_tokens must be at most {limit} here, got {wanted}.", "max_tokens")
        room = self._context_tokens - longest
        if wanted is None:
            wanted = min(default, limit, max(room, 1))
        if wanted > room:
            param = "messages" if isinstance(body, ChatBody) else "prompt"
            raise too_long(longest, wanted, self._context_tokens, param)
        return wanted


def _asked(body: Body, request: GenerationRequest, shape: Shape) -> Asked:
    options = body.stream_options
    return Asked(
        model=body.model,
        request=request,
        shape=shape,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        include_swarm=bool(options and options.include_swarm),
    )


def _sampling(body: Body) -> Sampling:
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p or None,
        "top_k": None if body.top_k is None else max(body.top_k, 0),  # -1 is no limit elsewhere
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": body.logit_bias,
        "seed": body.seed,
    }
    if body.top_p == 0:  # the likeliest token alone
        given["temperature"] = 0.0
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def _named(message: str) -> str | None:
    """The parameter that a message of ours is about."""
    names = {"stop texts": "stop", "max_new_tokens": "max_tokens", "top_p": "top_p"}
    return next((param for words, param in names.items() if words in message), None)
