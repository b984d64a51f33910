"""Adapters at the servers: each hop of a session or a lane is given its part before it is asked to use it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from petal_swarm.errors import ConfigError
from petal_swarm.models.adapter_digest import adapter_digest, adapter_id
from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.finite import all_finite
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Transport
from petal_swarm.routing.route import Hop
from petal_swarm.span import Span
from petal_swarm.wire.connection import ADAPTER_TABLE, Role
from petal_swarm.wire.messages.adapters import (
    AdapterOffer,
    AdapterPart,
    AdapterReady,
    AdapterWanted,
    Place,
)
from petal_swarm.wire.protocols import ADAPTER

#: Small enough that a slow line gets one away in a while, large enough that there are few.
PART_BYTES = 256 << 10
#: Whatever the line, so much passes in a second.
SLOWEST_BYTES_PER_S = 125e3


class Adapter(Protocol):
    """An adapter of a whole model: `numbers` are one flat float32 vector on the CPU that never changes."""

    @property
    def id(self) -> str: ...

    @property
    def layout(self) -> AdapterLayout: ...

    @property
    def numbers(self) -> Tensor: ...

    @property
    def config(self) -> ModelConfig: ...


@dataclass(frozen=True, eq=False, slots=True)
class StaticAdapter:
    """An adapter as it was trained; the id follows from its contents. Made by `of`."""

    id: str
    layout: AdapterLayout
    numbers: Tensor
    config: ModelConfig

    @classmethod
    def of(cls, config: ModelConfig, layout: AdapterLayout, numbers: Tensor) -> StaticAdapter:
        """Copies the numbers.

        Raises:
            ConfigError: the layout does not fit the model, there are more or fewer numbers than it has, or
                one of them is not finite.
        """
        layout.check(config)
        expected = layout.numbers(config, Span(0, config.num_blocks))
        if numbers.shape != (expected,):
            raise ConfigError(f"the adapter has {expected} numbers, got {list(numbers.shape)}")
        kept = numbers.detach().to(device="cpu", dtype=torch.float32, copy=True)
        if not all_finite(kept):
            raise ConfigError("the adapter has numbers that are not finite")
        return cls(adapter_id(layout, kept, config.num_blocks), layout, kept, config)


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter that servers offer to everybody, known by its id alone: nothing is uploaded."""

    id: str


class Snapshots:
    """An adapter whose numbers change now and then, as what it is each time it is asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._last: StaticAdapter | None = None

    def of(self, layout: AdapterLayout, numbers: Tensor) -> StaticAdapter | None:
        """See `StaticAdapter.of`; None if there is nothing in it for blocks.

        Raises:
            ConfigError: as there.
        """
        last, flat = self._last, numbers.detach()
        if not flat.numel():
            return None
        if last is None or last.layout != layout or not torch.equal(last.numbers, flat.to(last.numbers)):
            last = self._last = StaticAdapter.of(self._config, layout, flat)
        return last


def name_at(adapter: Adapter | NamedAdapter, blocks: Span) -> str | None:
    """What a hop of these blocks is told to use: nothing, where the adapter has no numbers for it."""
    if isinstance(adapter, NamedAdapter):
        return adapter.id
    start, stop = adapter.layout.bounds(adapter.config, blocks)
    return adapter.id if start < stop else None


def upload_s(adapter: Adapter | NamedAdapter | None) -> float:
    """The longest that all hops of a route together may take to get the adapter, in seconds."""
    if adapter is None or isinstance(adapter, NamedAdapter):
        return 0.0
    return adapter.numbers.nbytes / SLOWEST_BYTES_PER_S


async def ensure_adapter(
    transport: Transport, hop: Hop, model: str, adapter: Adapter, timeout_s: float, *, eager: bool = False
) -> None:
    """Let a server have the adapter's numbers for the blocks of the hop, unless it has them.

    `model` is the model's key. With `eager` the numbers are sent without asking, which saves a round trip
    where they are new. Nothing is sent if the adapter has none in these blocks. `timeout_s` is for dialling,
    for the first answer, and on top of what the numbers may take over a slow line.

    Raises:
        RemoteError: the server refuses: it has other blocks, or no room.
        NetworkError: it is gone, silent, or knows no adapters.
    """
    start, stop = adapter.layout.bounds(adapter.config, hop.span)
    if start == stop:
        return
    numbers = adapter.numbers[start:stop]
    offer = await asyncio.to_thread(_offer, model, hop.span, adapter, numbers, eager)
    stream = await transport.open_stream(hop.peer_id, ADAPTER, addresses=hop.addresses, timeout_s=timeout_s)
    channel = Channel(stream, ADAPTER_TABLE, Role.DIALER)
    try:
        channel.send(offer)
        if eager or await _is_wanted(channel, timeout_s):
            await _upload(channel, numbers, timeout_s + offer.nbytes / SLOWEST_BYTES_PER_S)
        await channel.close()
    except BaseException:
        channel.abort()
        raise


async def _is_wanted(channel: Channel, timeout_s: float) -> bool:
    answer: AdapterWanted | AdapterReady = await channel.expect(
        AdapterWanted | AdapterReady,  # type: ignore[arg-type]
        timeout_s=timeout_s,
    )
    return isinstance(answer, AdapterWanted)


async def _upload(channel: Channel, numbers: Tensor, timeout_s: float) -> None:
    """Send the numbers, and wait until the server has them; if it refuses, nobody reads on."""
    sending = asyncio.ensure_future(_send(channel, numbers))
    try:
        await channel.expect(AdapterReady, timeout_s=timeout_s)
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def _send(channel: Channel, numbers: Tensor) -> None:
    data = numbers.contiguous().numpy().data.cast("B")
    for first in range(0, len(data), PART_BYTES):
        channel.send(AdapterPart(data[first : first + PART_BYTES]))
        await channel.drain()


def _offer(model: str, span: Span, adapter: Adapter, numbers: Tensor, eager: bool) -> AdapterOffer:
    layout = adapter.layout.of_span(span)
    return AdapterOffer(
        model=model,
        span=span,
        adapter=adapter.id,
        numbers=numbers.numel(),
        digest=adapter_digest(layout, numbers, span),
        places=tuple(Place(place.block, place.stem, place.rank, place.scale) for place in layout.places),
        prefix_tokens=layout.prefix_tokens,
        eager=eager,
    )
