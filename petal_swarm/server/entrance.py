"""Where sessions, training and pushes come in, whichever span a server hosts, and while it hosts none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from petal_swarm.errors import BusyError
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Stream, StreamHandler, Transport
from petal_swarm.server.allowed import only_for
from petal_swarm.server.gate import StreamGate
from petal_swarm.server.host import SessionHost
from petal_swarm.server.results import error_message
from petal_swarm.server.training.host import TrainingHost
from petal_swarm.wire.connection import (
    ADAPTER_TABLE,
    PUSH_TABLE,
    SESSION_TABLE,
    TRAIN_PUSH_TABLE,
    TRAIN_TABLE,
    Role,
    Table,
)
from petal_swarm.wire.protocols import ADAPTER, PUSH, SESSION, TRAIN, TRAIN_PUSH

_MOVING = "this server is moving to other blocks"


class Entrance:
    """Hands streams to the `host` and the `training` of now. A transport is told only once who handles a
    protocol; those of training only if this server ever trains.

    The `gate` counts streams; only `allow_peers` may open sessions, if there are any.
    """

    def __init__(self, gate: StreamGate, allow_peers: tuple[str, ...] = ()) -> None:
        self._gate = gate
        self._allow_peers = allow_peers
        self.host: SessionHost | None = None
        self.training: TrainingHost | None = None
        self._handling: set[asyncio.Task[None]] = set()

    async def open(self, transport: Transport, *, trains: bool) -> None:
        sessions: StreamHandler = self._handle_session
        adapters: StreamHandler = self._handle_adapters
        runs: StreamHandler = self._handle_train
        if self._allow_peers:
            sessions = only_for(self._allow_peers, sessions)
            adapters = only_for(self._allow_peers, adapters)
            runs = only_for(self._allow_peers, runs)
        if trains:
            await transport.serve(TRAIN_PUSH, self._gate.guarded(TRAIN_PUSH_TABLE, self._handle_train_push))
            await transport.serve(TRAIN, self._gate.guarded(TRAIN_TABLE, runs))
        await transport.serve(PUSH, self._gate.guarded(PUSH_TABLE, self._handle_push))
        await transport.serve(ADAPTER, self._gate.guarded(ADAPTER_TABLE, adapters))
        await transport.serve(SESSION, self._gate.guarded(SESSION_TABLE, sessions))

    async def clear(self) -> None:
        """End every stream, so that nothing holds the host, and with it its blocks, in memory."""
        self.host = self.training = None
        handling = list(self._handling)
        for task in handling:
            task.cancel()
        await asyncio.gather(*handling, return_exceptions=True)

    async def _handle_session(self, stream: Stream) -> None:
        await self._handle(stream, SESSION_TABLE, None if self.host is None else self.host.handle_session)

    async def _handle_adapters(self, stream: Stream) -> None:
        await self._handle(stream, ADAPTER_TABLE, None if self.host is None else self.host.adapters.handle)

    async def _handle_push(self, stream: Stream) -> None:
        await self._handle(stream, PUSH_TABLE, None if self.host is None else self.host.handle_push)

    async def _handle_train(self, stream: Stream) -> None:
        training = self.training
        await self._handle(stream, TRAIN_TABLE, None if training is None else training.handle_train)

    async def _handle_train_push(self, stream: Stream) -> None:
        training = self.training
        await self._handle(stream, TRAIN_PUSH_TABLE, None if training is None else training.handle_push)

    async def _handle(
        self, stream: Stream, table: Table, handler: Callable[[Stream], Awaitable[None]] | None
    ) -> None:
        if handler is None:
            Channel(stream, table, Role.LISTENER).send(error_message(BusyError(_MOVING)))
            return
        task = asyncio.current_task()
        assert task is not None, "a stream has a task of its own"
        self._handling.add(task)
        try:
            await handler(stream)
        finally:
            self._handling.discard(task)
