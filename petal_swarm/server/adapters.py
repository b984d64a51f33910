"""The `adapter` protocol of a server: what clients upload for its blocks, and what it offers to everybody."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

import torch
from torch import Tensor

from petal_swarm.engine.adapters import EVERYBODY, AdapterStore, HeldAdapter
from petal_swarm.errors import (
    BadAdapterError,
    BadMessageError,
    ConfigError,
    WrongModelError,
    WrongSpanError,
)
from petal_swarm.models.adapter_digest import adapter_digest, adapter_id
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.finite import all_finite
from petal_swarm.models.stack import BlockStack
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Stream
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.gate import StreamGate
from petal_swarm.server.offered import OfferedAdapter
from petal_swarm.server.results import answering_errors
from petal_swarm.span import Span
from petal_swarm.wire.connection import ADAPTER_TABLE, Role
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.adapters import (
    MAX_PART_BYTES,
    AdapterOffer,
    AdapterPart,
    AdapterReady,
    AdapterWanted,
)
from petal_swarm.wire.tensors import DTYPES

logger = logging.getLogger(__name__)

#: A client may leave its stream open for the next adapter: in training there is one for each change.
IDLE_TIMEOUT_S = 120.0


class AdapterHost:
    """Takes adapters of clients into `store`, for a server of `model_key`; `offered` are for everybody."""

    def __init__(
        self,
        store: AdapterStore,
        *,
        model_key: str,
        limits: SessionLimits,
        gate: StreamGate,
        offered: Sequence[OfferedAdapter] = (),
    ) -> None:
        self.store = store
        self._model_key = model_key
        self._limits = limits
        self._gate = gate
        #: Name and id of what is offered to everybody.
        self.offered = tuple(self._offer(adapter) for adapter in offered)

    async def handle(self, stream: Stream) -> None:
        """The adapters of one client, one after the other, until it ends the stream."""
        channel = Channel(stream, ADAPTER_TABLE, Role.LISTENER)
        channel.incoming.max_payload_bytes = MAX_PART_BYTES
        async with answering_errors(channel):
            with self._gate.being_opened(channel.peer_id):
                message: Message | None
                message = await channel.expect(AdapterOffer, timeout_s=self._limits.open_timeout_s)
            while message is not None:
                assert isinstance(message, AdapterOffer), "the table allows nothing else"
                await self._take(channel, message)
                channel.send(AdapterReady())
                async with asyncio.timeout(IDLE_TIMEOUT_S):
                    message = await channel.receive()

    @contextlib.asynccontextmanager
    async def in_use(
        self, peer: str, adapter: str | None, blocks: Span, stack: BlockStack
    ) -> AsyncIterator[HeldAdapter | None]:
        """While the block runs, the adapter of a peer's session is there, and made ready; None for none.

        Raises:
            AdapterMissingError: the peer has uploaded none of that name for these blocks, or it has gone.
        """
        if adapter is None:
            yield None
            return
        with self.store.use(self.store.find(peer, adapter, blocks)) as held:
            served = held.served
            if served is None:
                served = await asyncio.to_thread(stack.serve_adapter, held.layout, held.numbers, held.span)
                # Sessions that began together made it each: one is enough.
                held.served = held.served or served
            yield held

    async def _take(self, channel: Channel, offer: AdapterOffer) -> None:
        """Have the adapter that is offered, from before or from now on.

        Raises:
            RemoteError: it does not fit, or there is no room.
        """
        store, peer = self.store, channel.peer_id
        layout = self._check(offer)
        known = store.has(peer, offer.adapter, offer.span, offer.digest)
        if known and not offer.eager:
            return
        with store.room_for(peer, offer.numbers):
            if not offer.eager:
                channel.send(AdapterWanted())
            numbers = await self._receive(channel, offer)
            digest = await asyncio.to_thread(_digest_of, layout, numbers, offer)
        store.add(peer, offer.adapter, offer.span, layout, numbers, digest=digest, ttl_s=offer.ttl_s)
        logger.debug("adapter %s of %s for blocks %s", offer.adapter, peer, offer.span)

    def _check(self, offer: AdapterOffer) -> AdapterLayout:
        """The layout that is offered.

        Raises:
            WrongModelError, WrongSpanError: this server has not these blocks.
            BadAdapterError: it does not fit them.
        """
        store = self.store
        if offer.model != self._model_key:
            raise WrongModelError(f"this server hosts {self._model_key}, not {offer.model}")
        if not store.span.covers(offer.span):
            raise WrongSpanError(f"this server hosts blocks {store.span}, not {offer.span}")
        try:
            layout = AdapterLayout(tuple(LoraPlace(*place) for place in offer.places), offer.prefix_tokens)
            layout.check(store.config)
            if layout != layout.of_span(offer.span):
                raise ConfigError(f"it names blocks outside {offer.span}")
            expected = layout.numbers(store.config, offer.span)
            if offer.numbers != expected:
                raise ConfigError(f"it has {expected} numbers in blocks {offer.span}, not {offer.numbers}")
        except ConfigError as error:
            raise BadAdapterError(f"the adapter does not fit: {error}") from None
        return layout

    async def _receive(self, channel: Channel, offer: AdapterOffer) -> Tensor:
        """The numbers, as float32; each part has its time.

        Raises:
            DeadlineError: a part did not come in time.
            BadMessageError: the parts are more than what was offered.
        """
        dtype = DTYPES[offer.dtype]
        numbers = torch.empty(offer.numbers, dtype=dtype)
        target = numbers.view(torch.uint8).numpy().data
        filled = 0
        while filled < offer.nbytes:
            left = min(offer.nbytes - filled, MAX_PART_BYTES)
            limit_s = self._limits.frame_timeout_s + left / self._limits.min_bytes_per_s
            part = await channel.expect(AdapterPart, timeout_s=limit_s)
            size = memoryview(part.payload).nbytes
            if filled + size > offer.nbytes:
                raise BadMessageError(f"more than the {offer.nbytes} bytes of numbers that were offered")
            target[filled : filled + size] = part.payload
            filled += size
        return numbers.float()

    def _offer(self, adapter: OfferedAdapter) -> tuple[str, str]:
        store = self.store
        span, layout = store.span, adapter.layout.of_span(store.span)
        name = adapter_id(adapter.layout, adapter.numbers, store.config.num_blocks)
        start, stop = adapter.layout.bounds(store.config, span)
        own = adapter.numbers[start:stop].clone()
        store.add(EVERYBODY, name, span, layout, own, digest=adapter_digest(layout, own, span))
        return adapter.name, name


def _digest_of(layout: AdapterLayout, numbers: Tensor, offer: AdapterOffer) -> bytes:
    """The digest of what has come.

    Raises:
        BadAdapterError: it is not what was offered, or not all of it are numbers.
    """
    if not all_finite(numbers):
        raise BadAdapterError("the adapter has numbers that are not finite")
    digest = adapter_digest(layout, numbers, offer.span)
    if digest != offer.digest:
        raise BadAdapterError("the numbers that came are not those that were offered: the digests differ")
    return digest
