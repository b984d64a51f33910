"""Hops that train, with blocks that multiply, on a virtual clock; and a client to speak by hand."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from petal_swarm.errors import PassGoneError
from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.net.channel import Channel
from petal_swarm.net.memory import Link, MemoryNetwork, MemoryTransport, VirtualClockLoop
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.gate import StreamGate
from petal_swarm.server.training.host import TrainingHost
from petal_swarm.server.training.limits import TrainingLimits
from petal_swarm.span import Span
from petal_swarm.wire.connection import TRAIN_PUSH_TABLE, TRAIN_TABLE, Role
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.parts import Neighbour
from petal_swarm.wire.messages.tuning import Backward, Forward, TrainOpen, TrainOpened
from petal_swarm.wire.protocols import TRAIN, TRAIN_PUSH
from petal_swarm.wire.tensors import decode_tensor, encode_tensor

T = TypeVar("T")

HIDDEN = 4
NUMBERS = 6
MODEL = "model"
RUN = b"r" * 16
ADAPTER = (AdapterLayout(), torch.arange(NUMBERS, dtype=torch.float32))


def factor(blocks: Span) -> float:
    """What these blocks multiply rows by."""
    value = 1.0
    for block in blocks.blocks():
        value *= block + 2
    return value


class MultiplyingPasses:
    """Block b multiplies by b + 2; the gradient of each adapter number is the mean of that of the rows."""

    def __init__(self) -> None:
        self.forwards: list[int] = []
        self.backwards: list[int] = []
        self.kept: dict[Hashable, tuple[Span, bool]] = {}
        self.failing: Callable[[int, bool], None] = lambda number, backward: None

    def forward(
        self,
        key: Hashable,
        hidden: Tensor,
        lengths: Sequence[int],
        blocks: Span,
        adapter: tuple[AdapterLayout, Tensor] | None,
        *,
        keep: bool,
        peer: str,
    ) -> Generator[None, None, Tensor]:
        number = key[2]  # type: ignore[index]
        self.forwards.append(number)
        for block in blocks.blocks():
            hidden = hidden * (block + 2)
            yield
        self.failing(number, False)
        if keep:
            self.kept[key] = (blocks, adapter is not None)
        return hidden

    def backward(self, key: Hashable, grad: Tensor) -> Generator[None, None, tuple[Tensor, Tensor | None]]:
        number = key[2]  # type: ignore[index]
        self.backwards.append(number)
        if key not in self.kept:
            raise PassGoneError("nothing is known of this pass")
        blocks, adapted = self.kept[key]
        yield
        self.failing(number, True)
        numbers = grad.mean() * torch.ones(NUMBERS) if adapted else None
        return grad * factor(blocks), numbers

    def forget(self, key: Hashable) -> None:
        self.kept.pop(key, None)


class StepwiseCompute:
    """Runs work at once, or, while `held`, not before it is told to."""

    def __init__(self, span: Span) -> None:
        stack = SimpleNamespace(config=SimpleNamespace(hidden_size=HIDDEN), span=span, dtype=torch.float32)
        self.engine: Any = SimpleNamespace(stack=stack, max_batch_tokens=64)
        self.held = False
        self._waiting: deque[tuple[Iterator[None], Future[Any]]] = deque()

    def run_work(self, work: Iterator[None], peer: str) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((work, future))
        if not self.held:
            self.go_on()
        return future

    def go_on(self) -> None:
        while self._waiting:
            work, future = self._waiting.popleft()
            try:
                while True:
                    next(work)
            except StopIteration as done:
                future.set_result(done.value)
            except Exception as error:
                future.set_exception(error)

    def call(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(function())
        return future


class Hop:
    """One server, for `span`."""

    def __init__(self, bench: Bench, span: str, limits: TrainingLimits) -> None:
        self.span = Span.parse(span)
        self.transport: MemoryTransport = bench.network.transport()
        self.passes = MultiplyingPasses()
        self.compute = StepwiseCompute(self.span)
        self.adapters = {"a:1": ADAPTER}
        self.host = TrainingHost(
            self.compute,  # type: ignore[arg-type]
            self.passes,  # type: ignore[arg-type]
            self.transport,
            model_key=MODEL,
            limits=SessionLimits(),
            training=limits,
            gate=StreamGate(SessionLimits()),
            adapter_of=lambda peer, name, span: self.adapters.get(name),
        )

    @property
    def peer_id(self) -> str:
        return self.transport.peer_id


class Line:
    """The client's stream to one hop, and what came by it."""

    def __init__(self, hop: Hop, channel: Channel) -> None:
        self.hop = hop
        self.channel = channel
        self.heard: list[Message] = []
        self.ended = False

    def listen(self) -> None:
        self.channel.subscribe(self.heard.append, self._on_end)

    def send(self, message: Message) -> None:
        self.channel.send(message)

    def of(self, kind: type[T]) -> list[T]:
        """What came of that kind, in order."""
        return [message for message in self.heard if isinstance(message, kind)]

    def _on_end(self, error: Exception | None) -> None:
        self.ended = True


class Bench:
    """A network, hops and a client. Use as a context manager; everything runs in `run`."""

    def __init__(self, **limits: Any) -> None:
        self.loop = VirtualClockLoop()
        self.network = MemoryNetwork(0, Link(latency_s=0.005))
        self.limits = TrainingLimits(**{"max_pass_tokens": 64, **limits})
        self.hops: list[Hop] = []
        self.client: MemoryTransport

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    async def add_hop(self, span: str) -> Hop:
        hop = Hop(self, span, self.limits)
        await hop.transport.serve(TRAIN, hop.host.handle_train)
        await hop.transport.serve(TRAIN_PUSH, hop.host.handle_push)
        self.hops.append(hop)
        return hop

    async def add_client(self) -> MemoryTransport:
        self.client = self.network.transport()
        return self.client

    async def dial(self, hop: Hop, **changes: Any) -> Line:
        """A line on which `train-open` has been sent."""
        stream = await self.client.open_stream(hop.peer_id, TRAIN, timeout_s=5)
        channel = Channel(stream, TRAIN_TABLE, Role.DIALER)
        fields: dict[str, Any] = {"run": RUN, "epoch": 0, "model": MODEL, "span": hop.span, **changes}
        channel.send(TrainOpen(**fields))
        return Line(hop, channel)

    async def open(self, hop: Hop, **changes: Any) -> Line:
        line = await self.dial(hop, **changes)
        await line.channel.expect(TrainOpened, timeout_s=30)
        line.listen()
        return line

    async def chain(self, hops: Sequence[Hop], epoch: int = 0) -> list[Line]:
        """A run through these hops, open."""
        return list(
            await asyncio.gather(
                *(
                    self.open(
                        hop,
                        epoch=epoch,
                        upstream=hops[index - 1].peer_id if index else None,
                        next=neighbour(hops[index + 1]) if index + 1 < len(hops) else None,
                    )
                    for index, hop in enumerate(hops)
                )
            )
        )

    async def push_stream(self, hop: Hop, transport: MemoryTransport) -> Channel:
        stream = await transport.open_stream(hop.peer_id, TRAIN_PUSH, timeout_s=5)
        return Channel(stream, TRAIN_PUSH_TABLE, Role.DIALER)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            for transport in [self.client, *(hop.transport for hop in self.hops)]:
                await transport.close()
            await asyncio.sleep(60)  # repair timers of runs that have just ended

        self.run(end())
        for hop in self.hops:
            assert (hop.host.num_runs, len(hop.host._arrivals)) == (0, 0)
            assert (hop.host._trainer.retained.nbytes, hop.host._trainer.quotas.nbytes) == (0, 0)
            assert len(hop.host._trainer.quotas) == 0
            assert hop.passes.kept == {}
        self.loop.close()


def neighbour(hop: Hop) -> Neighbour:
    return Neighbour(hop.peer_id, hop.transport.addresses())


def rows_of(number: int, rows: int = 3) -> Tensor:
    return torch.full((rows, HIDDEN), number + 1.0)


def forward(number: int, *, rows: int = 3, keep: bool = True, adapter: str | None = None) -> Forward:
    meta, payload = encode_tensor(rows_of(number, rows))
    return Forward(number, (rows - 1, 1) if rows > 1 else (rows,), meta, payload, keep, adapter)


def backward(number: int, *, rows: int = 3, inputs: bool = True) -> Backward:
    meta, payload = encode_tensor(torch.ones(rows, HIDDEN) * (number + 1))
    return Backward(number, meta, payload, inputs)


def tensor_of(message: Any) -> Tensor:
    return decode_tensor(message.tensor, message.payload)
