"""The upload of adapters: what is taken, what is known already, and what is refused and why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BloomConfig

from petal_swarm.client.adapters import StaticAdapter, ensure_adapter
from petal_swarm.engine.adapters import AdapterLimits, AdapterStore, cost_bytes
from petal_swarm.errors import (
    AdapterFullError,
    BadAdapterError,
    BadMessageError,
    ConfigError,
    RemoteError,
    TooSlowError,
    WrongModelError,
    WrongSpanError,
)
from petal_swarm.models.adapter_digest import adapter_digest
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.config import ModelConfig
from petal_swarm.net.channel import Channel
from petal_swarm.net.memory import MemoryNetwork, MemoryTransport, VirtualClockLoop
from petal_swarm.routing.route import Hop
from petal_swarm.server.adapters import AdapterHost
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.gate import StreamGate
from petal_swarm.server.offered import OfferedAdapter
from petal_swarm.span import Span
from petal_swarm.wire.connection import ADAPTER_TABLE, Role
from petal_swarm.wire.messages.adapters import AdapterOffer, AdapterPart, AdapterReady, AdapterWanted, Place
from petal_swarm.wire.protocols import ADAPTER

CONFIG = ModelConfig.from_hf(
    {
        **BloomConfig(vocab_size=50, hidden_size=32, n_layer=4, n_head=4).to_dict(),
        "architectures": ["BloomModel"],
    }
)
SPAN = Span(1, 3)
STEM = "self_attention.query_key_value"
LAYOUT = AdapterLayout(tuple(LoraPlace(block, STEM, 2, 0.5) for block in range(4)), 3)
SIZE = LAYOUT.numbers(CONFIG, SPAN)


def adapter(seed: int = 0, layout: AdapterLayout = LAYOUT) -> StaticAdapter:
    size = layout.numbers(CONFIG, Span(0, 4))
    return StaticAdapter.of(CONFIG, layout, torch.randn(size, generator=torch.Generator().manual_seed(seed)))


class Scene:
    """A server that hosts `SPAN`, and a client; counts the parts that came."""

    def __init__(self, limits: AdapterLimits, offered: tuple[OfferedAdapter, ...]) -> None:
        loop = asyncio.get_running_loop()
        network = MemoryNetwork()
        self.server: MemoryTransport = network.transport()
        self.client: MemoryTransport = network.transport()
        self.other: MemoryTransport = network.transport()
        self.store = AdapterStore(CONFIG, SPAN, limits, loop.time)
        session_limits = SessionLimits()
        self.host = AdapterHost(
            self.store,
            model_key="m",
            limits=session_limits,
            gate=StreamGate(session_limits),
            offered=offered,
        )
        self.hop = Hop(self.server.peer_id, SPAN)

    async def upload(self, given: StaticAdapter, *, eager: bool = False) -> None:
        await ensure_adapter(self.client, self.hop, "m", given, 5.0, eager=eager)

    async def dial(self) -> Channel:
        stream = await self.client.open_stream(self.server.peer_id, ADAPTER, timeout_s=5)
        return Channel(stream, ADAPTER_TABLE, Role.DIALER)


@asynccontextmanager
async def scene(
    limits: AdapterLimits | None = None, offered: tuple[OfferedAdapter, ...] = ()
) -> AsyncIterator[Scene]:
    made = Scene(limits or AdapterLimits(), offered)
    await made.server.serve(ADAPTER, made.host.handle)
    try:
        yield made
    finally:
        for transport in (made.server, made.client, made.other):
            await transport.close()


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(work())


def offer(**changes: Any) -> AdapterOffer:
    start, stop = LAYOUT.bounds(CONFIG, SPAN)
    layout = LAYOUT.of_span(SPAN)
    made = AdapterOffer(
        "m",
        SPAN,
        "x",
        SIZE,
        adapter_digest(layout, adapter().numbers[start:stop], SPAN),
        tuple(Place(place.block, place.stem, place.rank, place.scale) for place in layout.places),
        3,
    )
    return replace(made, **changes)


@pytest.mark.parametrize("eager", [False, True])
def test_a_server_gets_its_part(eager: bool) -> None:
    async def work() -> None:
        async with scene() as made:
            given = adapter()
            await made.upload(given, eager=eager)
            found = made.store.numbers_for(made.client.peer_id, given.id, SPAN)
            assert found is not None
            start, stop = LAYOUT.bounds(CONFIG, SPAN)
            assert found[0] == LAYOUT.of_span(SPAN)
            assert torch.equal(found[1], given.numbers[start:stop])
            assert made.store.numbers_for(made.other.peer_id, given.id, SPAN) is None

    run(work)


def test_what_is_known_is_not_sent_again() -> None:
    async def work() -> None:
        async with scene() as made:
            channel = await made.dial()
            channel.send(offer())
            await channel.expect(AdapterWanted, timeout_s=5)
            start, stop = LAYOUT.bounds(CONFIG, SPAN)
            payload = adapter().numbers[start:stop].numpy().tobytes()
            for first in range(0, len(payload), 100):
                channel.send(AdapterPart(payload[first : first + 100]))
            await channel.expect(AdapterReady, timeout_s=5)
            channel.send(offer())
            await channel.expect(AdapterReady, timeout_s=5)
            inner = Span(2, 3)
            start, stop = LAYOUT.bounds(CONFIG, inner)
            part = LAYOUT.of_span(inner)
            digest = adapter_digest(part, adapter().numbers[start:stop], inner)
            places = tuple(place for place in offer().places if place.block == 2)
            channel.send(offer(span=inner, numbers=stop - start, digest=digest, places=places))
            await channel.expect(AdapterReady, timeout_s=5)
            await channel.close()
            assert len(made.store) == 1

    run(work)


def test_blocks_without_numbers_are_not_bothered() -> None:
    async def work() -> None:
        async with scene() as made:
            await made.upload(adapter(layout=AdapterLayout((LoraPlace(0, STEM, 2, 0.5),))))
            assert not len(made.store)

    run(work)


def test_what_is_offered_to_everybody() -> None:
    async def work() -> None:
        given = adapter()
        async with scene(offered=(OfferedAdapter("tone", LAYOUT, given.numbers),)) as made:
            assert made.host.offered == (("tone", given.id),)
            assert made.store.find(made.other.peer_id, given.id, SPAN)
            before = made.store.nbytes
            await made.upload(given)
            assert made.store.nbytes == before, "nothing was sent"

    run(work)


REFUSED: dict[str, tuple[dict[str, Any], type[RemoteError], str]] = {
    "model": ({"model": "another"}, WrongModelError, "hosts m"),
    "span": ({"span": Span(0, 3)}, WrongSpanError, "hosts blocks 1:3"),
    "stem": ({"places": (Place(1, "mlp.down_proj", 2, 0.5),)}, BadAdapterError, "no projection"),
    "norm": ({"places": (Place(1, "input_layernorm", 2, 0.5),)}, BadAdapterError, "no projection"),
    "rank": ({"places": (Place(1, STEM, 33, 0.5),)}, BadAdapterError, "rank 33"),
    "twice": ({"places": (Place(1, STEM, 2, 0.5), Place(1, STEM, 1, 0.5))}, BadAdapterError, "twice"),
    "block": ({"places": (Place(0, STEM, 2, 0.5),)}, BadAdapterError, "outside 1:3"),
    "size": ({"numbers": SIZE + 1}, BadAdapterError, f"it has {SIZE} numbers"),
    "prefix": ({"prefix_tokens": 4}, BadAdapterError, "numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_offer_that_does_not_fit(name: str) -> None:
    changes, kind, why = REFUSED[name]

    async def work() -> None:
        async with scene() as made:
            channel = await made.dial()
            channel.send(offer(**changes))
            with pytest.raises(kind, match=why):
                await channel.expect(AdapterWanted, timeout_s=5)
            assert not len(made.store)
            assert made.store.nbytes == 0

    run(work)


@pytest.mark.parametrize(
    ("payload", "kind", "why"),
    [
        (bytes(4 * SIZE), BadAdapterError, "digests differ"),
        (b"\xff" * 4 * SIZE, BadAdapterError, "not finite"),
        (bytes(4 * SIZE + 1), BadMessageError, "more than"),
        (bytes(4 * SIZE - 1), TooSlowError, "in time"),
    ],
    ids=["other", "nan", "more", "less"],
)
def test_numbers_that_were_not_offered(payload: bytes, kind: type[RemoteError], why: str) -> None:
    async def work() -> None:
        async with scene() as made:
            channel = await made.dial()
            channel.send(offer())
            await channel.expect(AdapterWanted, timeout_s=5)
            assert made.store.nbytes == cost_bytes(SIZE), "room is kept before anything comes"
            channel.send(AdapterPart(payload))
            with pytest.raises(kind, match=why):
                await channel.expect(AdapterReady, timeout_s=3600)
            assert not len(made.store)
            assert made.store.nbytes == 0

    run(work)


def test_a_server_without_room_says_so_before_it_reads() -> None:
    async def work() -> None:
        async with scene(AdapterLimits(max_bytes=100)) as made:
            for eager in (False, True):
                with pytest.raises(AdapterFullError, match="limit"):
                    await made.upload(adapter(), eager=eager)

    run(work)


def test_numbers_in_16_bits() -> None:
    async def work() -> None:
        async with scene() as made:
            start, stop = LAYOUT.bounds(CONFIG, SPAN)
            rounded = adapter().numbers[start:stop].bfloat16()
            digest = adapter_digest(LAYOUT, rounded.float(), SPAN)
            channel = await made.dial()
            channel.send(offer(dtype="bfloat16", digest=digest, eager=True))
            channel.send(AdapterPart(rounded.view(torch.int16).numpy().tobytes()))
            await channel.expect(AdapterReady, timeout_s=5)
            found = made.store.numbers_for(made.client.peer_id, "x", SPAN)
            assert found is not None
            assert torch.equal(found[1], rounded.float())

    run(work)


def test_a_client_looks_at_its_adapter_first() -> None:
    size = LAYOUT.numbers(CONFIG, Span(0, 4))
    with pytest.raises(ConfigError, match=f"{size} numbers"):
        StaticAdapter.of(CONFIG, LAYOUT, torch.zeros(size + 1))
    with pytest.raises(ConfigError, match="not finite"):
        StaticAdapter.of(CONFIG, LAYOUT, torch.full((size,), torch.inf))
    with pytest.raises(ConfigError, match="no projection"):
        StaticAdapter.of(CONFIG, AdapterLayout((LoraPlace(0, "x", 1, 1.0),)), torch.zeros(2))
