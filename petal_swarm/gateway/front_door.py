"""All parts of a gateway put together, around a generator, and opened to visitors."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass

from petal_swarm.client.generation.generator import Generator
from petal_swarm.client.watch import SwarmWatch
from petal_swarm.gateway.app import make_app
from petal_swarm.gateway.config import GatewayConfig
from petal_swarm.gateway.gateway import Gateway
from petal_swarm.gateway.guard import Guard
from petal_swarm.gateway.line import Line
from petal_swarm.gateway.metrics import Metrics
from petal_swarm.gateway.serving import HttpServer, url_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LineConfig:
    """Answers at once, counted by sequences; requests that may wait for room, and for how long at most."""

    max_requests: int = 32
    max_queue: int = 256
    max_wait_s: float = 120.0


class FrontDoor:
    """Open from `open` to `close`; lives in one event loop, the generator's. Closes no generator."""

    def __init__(self, gateway: Gateway, guard: Guard, watch: SwarmWatch, bound: socket.socket) -> None:
        self.gateway = gateway
        self.guard = guard
        self.url = url_of(bound)
        self._watch = watch
        app = make_app(gateway, guard=guard, watch=watch)
        self._server = HttpServer(app, bound, guard.connections)

    @classmethod
    async def open(
        cls,
        generator: Generator,
        bound: socket.socket,
        config: GatewayConfig,
        guard: Guard,
        metrics: Metrics,
        line_config: LineConfig,
    ) -> FrontDoor:
        """Serve at `bound`, which `serving.listen` makes. `metrics` are those that `guard` tells.

        Raises:
            ConfigError: a limit cannot be used.
        """
        line = Line(
            room=line_config.max_requests,
            max_waiting=line_config.max_queue,
            max_wait_s=line_config.max_wait_s,
        )
        gateway = Gateway(generator, config, line=line, guard=guard, metrics=metrics)
        guard.connections.raise_file_limit()
        watch = SwarmWatch(generator.swarm, generator.ref, config.model_name)
        door = cls(gateway, guard, watch, bound)
        await door._server.start()
        return door

    async def close(self, drain_s: float) -> None:
        """Let nobody in any more, and those who are in go on for `drain_s`. Cancelling skips the waiting."""
        try:
            is_idle = self.gateway.is_idle
            await self._server.stop(drain_s, is_idle=is_idle, end=self.gateway.end)
        finally:
            await asyncio.shield(self._watch.close())
