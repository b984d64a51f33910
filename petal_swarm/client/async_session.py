"""A session for code that lives in the swarm's own event loop: as `InferenceSession`, without blocking."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import torch

from petal_swarm.client.adapters import Adapter, NamedAdapter
from petal_swarm.client.packing import Chunk
from petal_swarm.client.ring import Ring
from petal_swarm.client.steps import Steps, one_token_each, rows_of
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.errors import ConfigError, DeadlineError, SessionTooLongError, StreamClosedError
from petal_swarm.routing.affinity import Held
from petal_swarm.routing.route import Hop, Route
from petal_swarm.wire.messages.steps import Output, Rows

#: Whoever closes a session waits for so long at most; what is left is done behind its back.
CLOSE_WAIT_S = 1.0
#: Tasks that end sessions, which nobody else may hold.
_ending: set[asyncio.Task[None]] = set()


class Sent(NamedTuple):
    """A step that is on its way; `device` and `dtype` are those of what went in."""

    chunk: Chunk
    answer: asyncio.Future[Output]
    device: torch.device
    dtype: torch.dtype


class AsyncSession:
    """Many steps over one KV cache, by one task at a time; nothing happens before `open`.

    `max_length` bounds the tokens of each sequence; `held` is as in `Swarm.open_ring`. Cancelling any of the
    methods leaves the session open: whoever made it calls `aclose`, which ends it at the servers whatever it
    was in the middle of.
    """

    def __init__(
        self,
        swarm: Swarm,
        model: ModelRef,
        *,
        max_length: int,
        adapter: Adapter | NamedAdapter | None = None,
        held: Held | None = None,
    ) -> None:
        self._steps = Steps(max_length)
        self._swarm = swarm
        self._model = model
        self._adapter = adapter
        self._held = held
        self._opening: asyncio.Task[Ring] | None = None
        self._ring: Ring | None = None
        self._ending: asyncio.Task[None] | None = None
        self._timed: tuple[Hop, ...] = ()
        self._step_s: list[float] = []
        self._total_s: list[float] = []

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, with those of a step that is on its way."""
        return tuple(self._steps.lengths)

    @property
    def route(self) -> Route | None:
        """The servers in use; None before it is open."""
        return self._ring.route if self._ring else None

    @property
    def repairs(self) -> int:
        """How often hops were replaced."""
        return self._ring.repairs if self._ring else 0

    @property
    def times_s(self) -> list[tuple[Hop, float, float]]:
        """Each hop in use, with what the last step and all steps so far took there."""
        if self._ring is not None and self._ring.route.hops is not self._timed:
            self._retime(self._ring.route.hops)
        return list(zip(self._timed, self._step_s, self._total_s, strict=True))

    async def open(self) -> None:
        """Choose a route and open it. Idempotent.

        Raises:
            MissingBlocksError, RemoteError, NetworkError: see `Swarm.open_ring`.
            StreamClosedError: it was closed meanwhile.
        """
        if self._ending is not None:
            raise StreamClosedError("the session is closed")
        if self._ring is not None:
            return
        # In a task of its own, so that a ring that comes together with a cancellation is not lost.
        self._opening = asyncio.ensure_future(
            self._swarm.open_ring(
                self._model, max_length=self._steps.max_length, adapter=self._adapter, held=self._held
            )
        )
        try:
            ring = await self._opening
        except asyncio.CancelledError:
            if self._ending is not None and not _is_cancelled():
                raise StreamClosedError("the session was closed meanwhile") from None
            raise
        self._ring = ring
        self._steps.use(ring)

    def fork(self, sources: Sequence[int]) -> None:
        """Sequence i goes on as a copy of sequence `sources[i]`, the others end; as the next step is sent."""
        self._steps.fork(sources)

    async def step(
        self, hidden: torch.Tensor, lengths: Sequence[int], *, rows: Rows = "last"
    ) -> torch.Tensor:
        """Append `lengths[i]` tokens to sequence i; `hidden [tokens, hidden_size]` holds them in order.

        Returns `[len(lengths), hidden_size]` for rows "last", `[tokens, hidden_size]` for "all". Opens the
        session. Long steps travel in chunks. The first step fixes how many sequences there are.

        Raises:
            ConfigError, SessionTooLongError: see `Steps.slices`.
            MissingBlocksError, RemoteError, NetworkError: the swarm failed; the session is of no more use.
        """
        slices = self._steps.slices(lengths, rows)
        await self.open()
        ring = self._connected()
        chunks, limit_s = self._steps.chunks(ring, self._swarm.config, hidden, slices, rows)
        self._steps.took(slices)
        try:
            async with asyncio.timeout(limit_s):
                outputs = await ring.exchange(self._steps.made(chunks, hidden, rows))
        except TimeoutError:
            raise _too_late(limit_s) from None
        parts = []
        for chunk, output in zip(chunks, outputs, strict=True):
            if output is not None:
                self._note(output.trace)
                parts.append(rows_of(chunk, output, rows))
        result = parts[0] if len(parts) == 1 else torch.cat(parts)
        return result.to(device=hidden.device, dtype=hidden.dtype)

    def send(self, hidden: torch.Tensor) -> Sent:
        """Append one token to each sequence, without waiting: `hidden [sequences, hidden_size]`.

        Raises:
            ConfigError: the session has never been stepped, or has another number of sequences.
            SessionTooLongError: a sequence would pass `max_length`.
            PetalSwarmError: why the session has ended.
        """
        steps, ring = self._steps, self._connected()
        if hidden.shape[0] != len(steps.lengths):
            raise ConfigError(f"the session has {len(steps.lengths)} sequences, the step {hidden.shape[0]}")
        chunk = one_token_each(steps.lengths)
        if max(steps.lengths) >= steps.max_length:
            raise SessionTooLongError(f"the session has room for {steps.max_length} tokens of a sequence")
        answer = ring.send(steps.make(chunk, hidden, "last"))
        assert answer is not None
        steps.took(chunk.slices)
        return Sent(chunk, answer, hidden.device, hidden.dtype)

    async def take(self, sent: Sent) -> torch.Tensor:
        """The last rows `[sequences, hidden_size]` of a step that was sent.

        Raises:
            RemoteError, NetworkError: the swarm failed; the session is of no more use.
        """
        limit_s = self._swarm.config.step_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                output = await sent.answer
        except TimeoutError:
            raise _too_late(limit_s) from None
        self._note(output.trace)
        return rows_of(sent.chunk, output, "last").to(device=sent.device, dtype=sent.dtype)

    def end(self) -> asyncio.Task[None]:
        """Begin to free the KV cache in the swarm. Idempotent; the task may be left to itself."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
            _ending.add(self._ending)
            self._ending.add_done_callback(_ending.discard)
            if self._ring is not None:
                self._ring.fail(StreamClosedError("the session is closed"))
        return self._ending

    async def aclose(self) -> None:
        """As `end`, and wait for it for a moment. Idempotent, and cancelling it stops the waiting only."""
        await asyncio.wait({self.end()}, timeout=CLOSE_WAIT_S)

    async def _end(self) -> None:
        opening = self._opening
        if opening is None:
            return
        opening.cancel()
        (ring,) = await asyncio.gather(opening, return_exceptions=True)
        if isinstance(ring, Ring):
            await ring.close()

    def _connected(self) -> Ring:
        if self._ring is None or self._ending is not None:
            raise StreamClosedError("the session is closed, or was never open")
        return self._ring

    def _note(self, trace: tuple[float, ...]) -> None:
        """Add up what each hop of the route says that a step took."""
        assert self._ring is not None
        hops = self._ring.route.hops
        if hops is not self._timed:
            self._retime(hops)
        if len(trace) == len(hops):
            self._step_s = list(trace)
            self._total_s = [total + step for total, step in zip(self._total_s, trace, strict=True)]

    def _retime(self, hops: tuple[Hop, ...]) -> None:
        """The route is another one: hops that stay keep their sums."""
        known = dict(zip(self._timed, zip(self._step_s, self._total_s, strict=True), strict=True))
        times = [known.get(hop, (0.0, 0.0)) for hop in hops]
        self._timed = hops
        self._step_s, self._total_s = [step for step, _ in times], [total for _, total in times]


def _too_late(limit_s: float) -> DeadlineError:
    return DeadlineError(f"no answer within {limit_s:g} s")


def _is_cancelled() -> bool:
    """Whether the running task itself was cancelled, and not what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
