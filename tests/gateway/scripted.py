"""A generator that says what it was told to, and how the tests talk with an application around it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from petal_swarm.client.generation.pieces import HopTime, Piece, Progress, TokenLogprob
from petal_swarm.client.generation.request import GenerationRequest
from petal_swarm.gateway.app import make_app
from petal_swarm.gateway.config import GatewayConfig
from petal_swarm.gateway.gateway import Gateway
from petal_swarm.gateway.line import Line
from petal_swarm.net.memory import VirtualClockLoop
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
    over: asyncio.Event = field(default_factory=asyncio.Event)

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
        self.over.set()

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
                ended = (self._scored("<end>"),) if left and asked.top_logprobs is not None else ()
                yield Piece(choice, "", 0, ended, "stop" if left else "length")

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


def post(source: ScriptedSource, path: str, body: Any, **settings: Any) -> httpx.Response:
    """The answer to one request; `body` is sent as JSON, or bytes as they are. Streams arrive whole."""

    async def ask() -> httpx.Response:
        async with client_of(app_around(source, **settings)) as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(path, content=content)

    return asyncio.run(ask())


def client_of(app: Any) -> httpx.AsyncClient:
    """A client that talks with the application without a socket."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


def openai_of(app: Any) -> openai.AsyncOpenAI:
    """The official package, without a socket."""
    http = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")
    client = http.AsyncClient(transport=http.ASGITransport(app, raise_app_exceptions=False))
    return openai.AsyncOpenAI(base_url="http://gateway/v1", api_key="k", max_retries=0, http_client=client)


class Visit:
    """One request by ASGI alone, in the running loop: what was answered so far; its visitor can leave."""

    def __init__(self, app: Any, path: str, body: Any, *, may_read: bool = True) -> None:
        self.messages: list[dict[str, Any]] = []
        self.may_read = asyncio.Event()
        if may_read:
            self.may_read.set()
        self._left = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [],
            "asgi": {"version": "3.0", "spec_version": "2.4"},
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is None:
            await self._left.wait()
            return {"type": "http.disconnect"}
        data, self._body = self._body, None
        return {"type": "http.request", "body": data, "more_body": False}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.may_read.wait()
        self.messages.append(message)

    def leave(self) -> None:
        self._left.set()

    @property
    def status(self) -> int | None:
        return self.messages[0]["status"] if self.messages else None

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def text(self) -> str:
        return b"".join(m.get("body", b"") for m in self.messages).decode()

    @property
    def is_whole(self) -> bool:
        return bool(self.messages) and not self.messages[-1].get("more_body", True)

    @property
    def events(self) -> list[Any]:
        """What the events say; `[DONE]` and comments as text."""
        return events_of(self.text)


def events_of(text: str) -> list[Any]:
    found: list[Any] = []
    for event in filter(None, text.split("\n\n")):
        data = event.removeprefix("data: ")
        found.append(json.loads(data) if data.startswith("{") else data)
    return found


async def settle() -> None:
    """Let everything happen that can without time passing."""
    for _ in range(50):
        await asyncio.sleep(0)


def on_virtual_clock(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(work)
