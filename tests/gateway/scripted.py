"""A generator that says what it was told to, and how the tests talk with an application around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from petal_swarm.client.generation.pieces import HopTime, Piece, Progress, TokenLogprob
from petal_swarm.client.generation.request import GenerationRequest
from petal_swarm.gateway.app import make_app
from petal_swarm.gateway.config import GatewayConfig
from petal_swarm.gateway.gateway import Gateway
from petal_swarm.gateway.line import Line
from tests.cli.tokenizers_of_tests import characters

ROUTE = (
    HopTime("12D3KooWalice", "alice", 0, 12, 0.0012, 0.012),
    HopTime("12D3KooWbob", "bob", 12, 24, 0.0015, 0.015),
)
Step = str | BaseException | asyncio.Event


@dataclass
class ScriptedAnswers:
    """Each word of the script is a token of every choice; an event is waited for, an exception raised."""

    request: GenerationRequest
    script: Sequence[Step]
    route: tuple[HopTime, ...] = ROUTE
    new_tokens: int = 0
    closed: int = 0
    repairs: int = 0

    @property
    def progress(self) -> Progress:
        return Progress(
            route=self.route,
            prompt_tokens=self.request.prompt_tokens,
            new_tokens=self.new_tokens,
            first_token_s=0.25 if self.new_tokens else None,
            elapsed_s=1.0,
            tokens_per_s=8.0,
            repairs=self.repairs,
        )

    async def aclose(self) -> None:
        self.closed += 1

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[Piece]:
        asked, left = self.request, self.request.max_new_tokens
        choices = range(len(asked.prompts) * asked.choices)
        if asked.prompt_logprobs:
            for choice in choices:
                prompt = asked.prompts[choice // asked.choices]
                scored = tuple(self._scored(chr(token), first=not at) for at, token in enumerate(prompt))
                yield Piece(choice, "", 0, scored)
        for step in self.script:
            if isinstance(step, asyncio.Event):
                await step.wait()
                continue
            if isinstance(step, BaseException):
                raise step
            if not left:
                break
            left -= 1
            for choice in choices:
                self.new_tokens += 1
                scored = () if asked.top_logprobs is None else (self._scored(step),)
                yield Piece(choice, step, 1, scored, None if left else "length")
        if left or not asked.max_new_tokens:
            for choice in choices:
                yield Piece(choice, "", 0, (), "stop" if left else "length")

    def _scored(self, text: str, *, first: bool = False) -> TokenLogprob:
        data = text.encode()
        top = [
            TokenLogprob(n, f"alt{n}", b"alt%d" % n, -1.0 - n) for n in range(self.request.top_logprobs or 0)
        ]
        return TokenLogprob(7, text, data, None if first else -0.5, () if first else tuple(top))


@dataclass
class ScriptedSource:
    """Answers all requests alike; `started` are its answers, in order."""

    script: Sequence[Step] = ("Hello", " there", ".")
    tokenizer: Any = field(default_factory=characters)
    context_tokens: int | None = 1000
    names: tuple[str, ...] = ("pirate",)
    vocabulary: int = 257
    refuse: Exception | None = None
    started: list[ScriptedAnswers] = field(default_factory=list)

    def start(self, request: GenerationRequest) -> ScriptedAnswers:
        if self.refuse is not None:
            raise self.refuse
        self.started.append(ScriptedAnswers(request, self.script))
        return self.started[-1]

    async def adapters(self) -> tuple[str, ...]:
        return self.names


def app_around(source: ScriptedSource, **settings: Any) -> Any:
    """The application, in a running loop; `settings` are those of `GatewayConfig`, and `line`."""
    line = settings.pop("line", None) or Line(room=32, max_waiting=32)
    config = GatewayConfig(**{"model_name": "org/tiny", "max_tokens": 100, **settings})
    return make_app(Gateway(source, config, line=line))


def client_of(app: Any) -> httpx.AsyncClient:
    """A client that talks with the application without a socket. Streams arrive whole."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


def run(work: Callable[[], Any]) -> Any:
    return asyncio.run(work())
