"""What the API needs of a generator; `client.generation.generator.Generator` is one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from typing import Any, Protocol

from petal_swarm.client.generation.pieces import Piece, Progress
from petal_swarm.client.generation.request import GenerationRequest


class Answers(Protocol):
    """All answers to one request: iterate over their pieces, then close."""

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    @property
    def progress(self) -> Progress: ...

    async def aclose(self) -> None: ...


class Source(Protocol):
    """Where answers come from. Lives in one event loop."""

    tokenizer: Any
    context_tokens: int | None

    @property
    def vocabulary(self) -> int: ...

    def start(self, request: GenerationRequest) -> Answers: ...

    async def adapters(self) -> Collection[str]: ...
