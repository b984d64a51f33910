"""One request on its way: the prompts in, then step by step a token for each answer that goes on.

The next step leaves before the text of the last tokens is made, so that the swarm computes meanwhile. A
step too many, behind a stop text, does no harm: its sequence just ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petal_swarm.client.async_session import AsyncSession, Sent
from petal_swarm.client.front import Front, strip_prompt
from petal_swarm.client.generation.adapters import Adapters
from petal_swarm.client.generation.head import Head, Scored
from petal_swarm.client.generation.pieces import FinishReason, HopTime, Piece, Progress, TokenLogprob
from petal_swarm.client.generation.request import GenerationRequest
from petal_swarm.client.generation.sampling import Sampler
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.errors import StreamClosedError
from petal_swarm.models.ends import Ends
from petal_swarm.models.text_stream import AnswerText
from petal_swarm.models.token_texts import TokenTexts

#: More numbers than this are embedded in a thread: about a millisecond's work.
EMBED_NOW = 1 << 19
#: Tokens of a prompt of which is told before others have their turn.
TOLD_AT_ONCE = 32
NO_ROWS = torch.empty(0, 0)


@dataclass(frozen=True, eq=False, slots=True)
class Model:
    """What all generations share."""

    swarm: Swarm
    ref: ModelRef
    ends: Ends
    head: Head
    tokenizer: object
    texts: TokenTexts
    adapters: Adapters
    end_tokens: frozenset[int]


class Generation:
    """`async for piece in generation`, once; made by `Generator.start`, and nothing happens before that.

    Whoever stops before the end calls `aclose`. A task that is cancelled while it waits for a piece need not.
    """

    def __init__(self, model: Model, request: GenerationRequest) -> None:
        self._model = model
        self._request = request
        self._session: AsyncSession | None = None
        self._closed = False
        self._started_s = asyncio.get_running_loop().time()
        self._first_s = self._last_s = 0.0
        self._new_tokens = self._first_tokens = 0
        self._pieces = self._run()

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces

    @property
    def progress(self) -> Progress:
        """How far it is, at any time."""
        session, after = self._session, self._new_tokens - self._first_tokens
        hops = session.times_s if session else ()
        since_s = self._first_s if after else self._started_s
        rate = (after or self._new_tokens) / max(self._last_s - since_s, 1e-9) if self._new_tokens else 0.0
        return Progress(
            route=tuple(
                HopTime(hop.peer_id, hop.name, hop.span.start, hop.span.end, step_s, total_s)
                for hop, step_s, total_s in hops
            ),
            prompt_tokens=self._request.prompt_tokens,
            new_tokens=self._new_tokens,
            first_token_s=self._first_s - self._started_s if self._new_tokens else None,
            elapsed_s=asyncio.get_running_loop().time() - self._started_s,
            tokens_per_s=rate,
            repairs=session.repairs if session else 0,
        )

    async def aclose(self) -> None:
        """Free the KV cache at the servers, and wait for that for a second at most. Idempotent.

        Whoever waits for a piece in another task gets StreamClosedError.
        """
        self._closed = True
        if self._session is not None:
            await self._session.aclose()
        with contextlib.suppress(RuntimeError):  # somebody waits for a piece, and ends it by that error
            await self._pieces.aclose()

    async def _run(self) -> AsyncGenerator[Piece, None]:
        model, request = self._model, self._request
        adapter = await model.adapters.find(request.adapter)
        if self._closed:
            raise StreamClosedError("the generation was closed")
        room = self._request.max_tokens + adapter.prompt_tokens * len(request.prompts) * request.choices
        scope, answers = (model.ref.key, request.adapter), self._answers()
        held = model.swarm.conversations.recall(scope, request.prompts[0])
        session = self._session = AsyncSession(
            model.swarm, model.ref, max_length=room, adapter=adapter.blocks, held=held
        )
        batch = _Batch(session, Front(model.ends, adapter.soft_prompt), answers, NO_ROWS)
        try:
            told = await self._prefill(batch)
            if request.prompt_logprobs:
                end: FinishReason | None = None if request.max_new_tokens else "length"
                for answer in batch.answers:
                    yield Piece(answer.choice, "", 0, told[answer.choice // request.choices], end)
            while request.max_new_tokens and batch.goes_on:
                for piece in await self._advance(batch):
                    yield piece
        finally:
            if session.route and not session.repairs:  # a server that came later has not filed the beginning
                said = (*request.prompts[0], *answers[0].tokens)
                model.swarm.conversations.remember(scope, said, session.route.hops)
            session.end()

    def _answers(self) -> list[_Answer]:
        request = self._request
        return [
            _Answer(self._model, request, index * request.choices + number, prompt, number)
            for index, prompt in enumerate(request.prompts)
            for number in range(request.choices)
        ]

    async def _prefill(self, batch: _Batch) -> list[tuple[TokenLogprob, ...]]:
        """Send the prompts, for the last row of each answer; what is told of the tokens of each prompt."""
        request, session, front = self._request, batch.session, batch.front
        lengths = [len(prompt) for prompt in request.prompts]
        tokens = torch.tensor([token for prompt in request.prompts for token in prompt])
        if len(tokens) * self._model.ref.hidden_size > EMBED_NOW:
            hidden, given = await asyncio.to_thread(_embed, front, tokens, lengths)
        else:
            hidden, given = _embed(front, tokens, lengths)
        told: list[tuple[TokenLogprob, ...]] = []
        if request.prompt_logprobs:
            every = strip_prompt(await session.step(hidden, given, rows="all"), given, lengths)
            rows = every[torch.tensor(lengths).cumsum(0).to(every.device) - 1]
            parts = zip(request.prompts, torch.split(every, lengths), strict=True)
            told = [await self._of_prompt(prompt, part) for prompt, part in parts]
        else:
            rows = await session.step(hidden, given)
        if request.choices > 1:
            sources = [index for index in range(len(lengths)) for _ in range(request.choices)]
            session.fork(sources)
            rows = rows[sources]
        batch.prefilled = rows
        return told

    async def _of_prompt(self, prompt: Sequence[int], rows: Tensor) -> tuple[TokenLogprob, ...]:
        texts, top = self._model.texts, self._request.top_logprobs or 0
        told = [TokenLogprob(prompt[0], texts.text(prompt[0]), texts.data(prompt[0]), None)]
        scored = await self._model.head.score(rows[:-1], prompt[1:], top=top)
        for start in range(0, len(scored), TOLD_AT_ONCE):
            told += (_logprob(texts, one) for one in scored[start : start + TOLD_AT_ONCE])
            await asyncio.sleep(0)
        return tuple(told)

    async def _advance(self, batch: _Batch) -> list[Piece]:
        """One more token for each answer that goes on; the step after it is on its way then."""
        rows = await batch.take()
        samplers = [answer.sampler for answer in batch.answers]
        scored = await self._model.head.choose(rows, samplers, top=self._request.top_logprobs)
        pairs = list(zip(batch.answers, scored, strict=True))
        ends = [answer.ends_with(one.token) for answer, one in pairs]
        batch.send([None if end else one.token for one, end in zip(scored, ends, strict=True)])
        self._count(sum(end != "stop" for end in ends))
        return [answer.piece(one, end) for (answer, one), end in zip(pairs, ends, strict=True)]

    def _count(self, tokens: int) -> None:
        self._last_s = asyncio.get_running_loop().time()
        if not self._new_tokens:
            self._first_s, self._first_tokens = self._last_s, tokens
        self._new_tokens += tokens


@dataclass(slots=True, eq=False)
class _Batch:
    """The answers that go on, each a sequence of the session, and the step that is on its way for them."""

    session: AsyncSession
    front: Front
    answers: list[_Answer]
    prefilled: Tensor
    sent: Sent | None = None

    @property
    def goes_on(self) -> bool:
        return not all(answer.is_over for answer in self.answers)

    async def take(self) -> Tensor:
        """The rows that were waited for, less those of answers that a stop text has ended meanwhile."""
        if self.sent is None:
            return self.prefilled
        rows = await self.session.take(self.sent)
        kept = [index for index, answer in enumerate(self.answers) if not answer.is_over]
        if len(kept) == len(self.answers):
            return rows
        self._keep(kept)
        return rows[kept]

    def send(self, tokens: Sequence[int | None]) -> None:
        """Go on with these tokens, and without answers that have none."""
        given = [token for token in tokens if token is not None]
        if not given:
            self.session.end()
            return
        if len(given) < len(tokens):
            self._keep([index for index, token in enumerate(tokens) if token is not None])
        ends = self.front.ends
        self.sent = self.session.send(ends.embed(torch.tensor(given, device=ends.device)))

    def _keep(self, kept: Sequence[int]) -> None:
        self.answers = [self.answers[index] for index in kept]
        self.session.fork(kept)


class _Answer:
    """One sequence: how its tokens are chosen, what they say, and whether it is over."""

    def __init__(
        self, model: Model, request: GenerationRequest, choice: int, prompt: Sequence[int], number: int
    ) -> None:
        self.choice = choice
        self.sampler = Sampler(request.sampling, prompt, number)
        self.is_over = False
        self.tokens: list[int] = []
        self._text = AnswerText(model.tokenizer, stops=request.stops, prompt=prompt)
        self._texts = model.texts
        self._end_tokens = frozenset() if request.ignore_eos else model.end_tokens
        self._left = request.max_new_tokens

    def ends_with(self, token: int) -> FinishReason | None:
        """Whether this token is the last, as far as that is known without its text."""
        if token in self._end_tokens:
            return "stop"
        self.sampler.saw(token)
        self.tokens.append(token)
        self._left -= 1
        return None if self._left else "length"

    def piece(self, scored: Scored, end: FinishReason | None) -> Piece:
        """What the token says, if it is not the end of the sequence."""
        told = () if scored.logprob is None else (_logprob(self._texts, scored),)
        if end == "stop":
            self.is_over = True
            return Piece(self.choice, self._text.finish(), 0, told, "stop")
        text = self._text.take(scored.token)
        if end is not None:
            text += self._text.finish()
        if self._text.stopped:
            end = "stop"
        self.is_over = end is not None
        return Piece(self.choice, text, 1, told, end)


def _embed(front: Front, tokens: Tensor, lengths: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    return front.enter(front.ends.embed(tokens.to(front.ends.device)), lengths)


def _logprob(texts: TokenTexts, scored: Scored) -> TokenLogprob:
    top = tuple(
        TokenLogprob(token, texts.text(token), texts.data(token), logprob) for token, logprob in scored.top
    )
    token = scored.token
    return TokenLogprob(token, texts.text(token), texts.data(token), scored.logprob, top)
