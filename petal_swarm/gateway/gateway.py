"""What all requests of a gateway share: the model, the room for answers, the counters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager

from petal_swarm.errors import DeadlineError, NetworkError
from petal_swarm.gateway.api.asked import Asked, Reader
from petal_swarm.gateway.api.errors import RETRY_S, ApiError
from petal_swarm.gateway.config import GatewayConfig
from petal_swarm.gateway.guard import Guard, Usage, Visitor
from petal_swarm.gateway.line import Line, OnPlace
from petal_swarm.gateway.metrics import Metrics
from petal_swarm.gateway.source import Answers, Source
from petal_swarm.version import __version__

#: A swarm of which nothing is heard is asked peer by peer, for minutes; the page waits for this.
ADAPTERS_TIMEOUT_S = 3.0


class Gateway:
    """Lives in one event loop; closes nothing that it was given."""

    def __init__(
        self,
        source: Source,
        config: GatewayConfig,
        *,
        line: Line,
        guard: Guard | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.source = source
        self.config = config
        self.metrics = metrics or Metrics()
        self.reader = Reader(
            source.tokenizer,
            config,
            vocabulary=source.vocabulary,
            context_tokens=source.context_tokens,
        )
        self.created_s = int(time.time())
        self.fingerprint = f"petal-swarm-{__version__}"
        #: Has an error for all who are still being answered, once they have to go.
        self.ending: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._line = line
        self._guard = guard

    def end(self) -> None:
        """Tell all who are still being answered, or wait, that it is over."""
        if not self.ending.done():
            told = "The gateway is shutting down; try again in a moment."
            self.ending.set_result(ApiError(503, told, code="shutting_down", retry_after_s=RETRY_S))

    @property
    def num_running(self) -> int:
        """Answers under way, counted by sequences."""
        return self._line.stats.running

    def is_idle(self) -> bool:
        """Whether nobody is answered, nor waits for it."""
        stats = self._line.stats
        return not stats.running and not stats.waiting

    async def models(self) -> list[str]:
        """The names that can be asked for: the model's, and those of its adapters."""
        try:
            others = await self._adapters()
        except NetworkError:  # a swarm that is gone has none, and the model is still asked for by its name
            others = ()
        return [self.config.model_name, *sorted(name for name in others if name != self.config.model_name)]

    async def adapter_of(self, model: str) -> str | None:
        """Which adapter a model's name means; None for the model itself.

        Raises:
            ApiError: there is none of this name.
        """
        if model == self.config.model_name:
            return None
        if model in await self._adapters():
            return model
        raise ApiError(
            404,
            f"The model {model[:100]!r} does not exist here; {self.config.model_name!r} does.",
            param="model",
            code="model_not_found",
        )

    async def _adapters(self) -> Collection[str]:
        """
        Raises:
            NetworkError: the swarm does not say, or not in time.
        """
        try:
            async with asyncio.timeout(ADAPTERS_TIMEOUT_S):
                return await self.source.adapters()
        except TimeoutError:
            raise DeadlineError(
                f"the swarm's adapters are not known after {ADAPTERS_TIMEOUT_S:g} s"
            ) from None

    @asynccontextmanager
    async def answers(
        self, asked: Asked, visitor: Visitor, *, on_place: OnPlace | None = None
    ) -> AsyncIterator[tuple[Answers, float]]:
        """Wait for room, then answer: the answers, and how many seconds the wait was.

        Whatever ends the block, the session at the servers is freed.

        Raises:
            PetalSwarmError: there is no room, or the request cannot be answered.
        """
        arrived_s = time.monotonic()
        async with AsyncExitStack() as stack:
            usage = Usage()
            if self._guard is not None:
                usage = stack.enter_context(self._guard.reserve(visitor, asked.request.max_tokens))
            with self.metrics.queued.track_inprogress():
                room = self._line.enter(visitor.name, asked.num_choices, on_place=on_place)
                await stack.enter_async_context(room)
            queued_s = time.monotonic() - arrived_s
            self.metrics.admitted(queued_s)
            stack.enter_context(self.metrics.running.track_inprogress())
            answers = self.source.start(asked.request)
            try:
                yield answers, queued_s
            finally:
                progress = answers.progress
                usage.tokens = progress.prompt_tokens + progress.new_tokens
                self.metrics.generated(progress, asked.num_choices)
                await answers.aclose()
