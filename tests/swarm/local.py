"""A whole swarm in one thread: servers, directory and client on one virtual clock, over `net.memory`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import torch

from petal_swarm.client.config import ClientConfig
from petal_swarm.client.loop import LoopThread
from petal_swarm.client.model import SwarmModelForCausalLM
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.directory.memory import MemoryDirectory, MemoryRegistry
from petal_swarm.engine.compute import Compute, InlineCompute
from petal_swarm.engine.engine import Engine
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.ends import load_ends
from petal_swarm.net.memory import Link, MemoryNetwork, MemoryTransport, VirtualClockLoop
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.server import Server
from petal_swarm.span import Span

T = TypeVar("T")


class LocalSwarm:
    """`spans` are served from the start, one server each; close it, or use it as a context manager."""

    def __init__(
        self,
        model: Path,
        spans: list[str],
        *,
        seed: int = 0,
        compute: Callable[[Engine], Compute] = InlineCompute,
        **settings: Any,
    ) -> None:
        self._compute = compute
        self.loop = VirtualClockLoop()
        self._thread = LoopThread(self.loop, background=False)
        self.network = MemoryNetwork(seed, Link(latency_s=0.005, jitter_s=0.002))
        self.registry = MemoryRegistry(now=self.loop.time)
        self.checkpoint = open_checkpoint(str(model))
        self.servers: list[Server] = []
        self.models: list[SwarmModelForCausalLM] = []
        self.strangers: list[MemoryTransport] = []
        self._settings = settings
        for span in spans:
            self.add_server(span)

    def run(self, work: Coroutine[Any, Any, T], *, timeout_s: float = 3600.0) -> T:
        """Drive the swarm until `work` is done; `timeout_s` is virtual."""
        return self._thread.run(work, timeout_s=timeout_s)

    def add_server(self, span: str | None, **settings: Any) -> Server:
        return self.run(self.start_server(span, **settings))

    def transport(self) -> MemoryTransport:
        """A peer that is neither server nor model."""

        async def make() -> MemoryTransport:
            return self.network.transport()

        inside = asyncio._get_running_loop() is self.loop
        transport = self.network.transport() if inside else self.run(make())
        self.strangers.append(transport)
        return transport

    def kill_strangers(self) -> None:
        """Every client dies at once, without a word."""
        for transport in self.strangers:
            self.network.kill(transport.peer_id)

    def model(self, **settings: Any) -> SwarmModelForCausalLM:
        """A client of its own peer id."""
        transport = self.transport()
        config = ClientConfig(initial_peers=("unused",), **settings)
        swarm = Swarm(config, transport, MemoryDirectory(self.registry))
        shape = self.checkpoint.config
        ref = ModelRef(self.checkpoint.model_key, shape.num_blocks, shape.hidden_size)
        ends = load_ends(self.checkpoint, dtype=torch.float32)
        model = SwarmModelForCausalLM(self.checkpoint.hf_config(), ends, self._thread, swarm, ref)
        model.generation_config = self.checkpoint.generation_config()
        self.models.append(model.eval())
        return model

    def server_of(self, peer_id: str) -> Server:
        return next(server for server in self.servers if server.announcement().peer_id == peer_id)

    def close(self) -> None:
        for model in self.models:
            model._closed = True  # its loop is this swarm's, closed below
        for server in self.servers:
            self.run(server.close())
        self._thread.close()

    def __enter__(self) -> LocalSwarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def start_server(self, span: str | None, **settings: Any) -> Server:
        """A server of `span`, or of what the swarm needs; announced when this returns."""
        values: dict[str, Any] = {
            "kv_tokens": 4096,
            "device": "cpu",
            "quant": "none",
            **self._settings,
            **settings,
        }
        blocks = Span.parse(span) if span else None
        config = ServerConfig(model="unused", new_swarm=True, blocks=blocks, **values)
        transport = self.network.transport()
        directory = MemoryDirectory(self.registry, identity=transport.identity)
        server = await Server.start(config, self.checkpoint, transport, directory, compute=self._compute)
        self.servers.append(server)
        return server
