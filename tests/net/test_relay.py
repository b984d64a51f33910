"""Places at relays, against relays of a few lines over the memory transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from petal_swarm.errors import NetworkError, PetalSwarmError, RemoteProtocolError
from petal_swarm.net.memory import MemoryNetwork, MemoryTransport, VirtualClockLoop
from petal_swarm.net.relay import (
    HOP_PROTOCOL,
    MIN_DATA_BYTES,
    Candidate,
    Place,
    RelayKeeper,
    RelayRefusedError,
    reserve,
)
from petal_swarm.net.transport import Stream

RESERVATION = b"\x1a\x04\x08\x01\x12\x00"  # field 3: expire, one address


def varint(value: int) -> bytes:
    encoded = b""
    while value >= 0x80:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def answer(status: int = 100, *, limit: tuple[int, int] | None = (1800, 1 << 32), kind: int = 2) -> bytes:
    """A `HopMessage` as go-libp2p writes it."""
    limits = b""
    if limit:
        inner = b"\x08" + varint(limit[0]) + b"\x10" + varint(limit[1])
        limits = b"\x22" + varint(len(inner)) + inner
    message = b"\x08" + varint(kind) + RESERVATION + limits + b"\x28" + varint(status)
    return varint(len(message)) + message


def relay(*chunks: bytes, asked: list[bytes] | None = None) -> Callable[[Stream], Coroutine[Any, Any, None]]:
    async def handle(stream: Stream) -> None:
        request = await stream.read()
        if asked is not None:
            asked.append(request)
        for chunk in chunks:
            stream.write(chunk)
            await asyncio.sleep(0)
        if not chunks:
            await asyncio.Event().wait()

    return handle


def run(scenario: Callable[[MemoryTransport, MemoryNetwork], Coroutine[Any, Any, None]]) -> None:
    async def play() -> None:
        network = MemoryNetwork()
        await scenario(network.transport(), network)
        for transport in list(network._peers.values()):
            await transport.close()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(play())


def ask(*chunks: bytes, asked: list[bytes] | None = None) -> Place:
    places = []

    async def scenario(mine: MemoryTransport, network: MemoryNetwork) -> None:
        other = network.transport()
        await other.serve(HOP_PROTOCOL, relay(*chunks, asked=asked))
        places.append(await reserve(mine, Candidate(other.peer_id, other.addresses())))

    run(scenario)
    return places[0]


def test_a_place() -> None:
    asked: list[bytes] = []
    assert ask(answer(), asked=asked) == Place(1800, 1 << 32)
    assert asked == [b"\x02\x08\x00"]  # one message of two bytes: type RESERVE


def test_a_place_without_limits() -> None:
    assert ask(answer(limit=None)) == Place(0, 0)
    assert ask(answer(limit=(0, 0))) == Place(0, 0)


def test_an_answer_in_pieces() -> None:
    assert ask(*(bytes([byte]) for byte in answer())) == Place(1800, 1 << 32)


@pytest.mark.parametrize(
    ("status", "reason"), [(200, "no place left"), (202, "not allow"), (299, "status 299")]
)
def test_a_refusal_says_why(status: int, reason: str) -> None:
    with pytest.raises(RelayRefusedError, match=reason):
        ask(answer(status))


def test_a_relay_for_small_talk_only_is_refused() -> None:
    with pytest.raises(RelayRefusedError, match="128 KiB"):
        ask(answer(limit=(120, 128 << 10)))
    assert ask(answer(limit=(120, MIN_DATA_BYTES))) == Place(120, MIN_DATA_BYTES)


@pytest.mark.parametrize(
    "data",
    [
        b"\x02\x08\x02",
        answer(kind=1),
        b"\x01\x08",
        b"\x03\x0b\x00\x00",
        b"\x04\x12\x7fab",
        b"\xff" * 12,
        varint(5000) + bytes(5000),
        b"\x05\x08\x02\x28\xff\xff"[:6],
    ],
    ids=repr,
)
def test_answers_that_are_none(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        ask(data)


def test_a_relay_that_hangs_has_a_deadline() -> None:
    with pytest.raises(NetworkError, match="within 5 s"):
        ask()


def test_a_peer_that_does_not_relay() -> None:
    async def scenario(mine: MemoryTransport, network: MemoryNetwork) -> None:
        with pytest.raises(PetalSwarmError):
            await reserve(mine, Candidate(network.transport().peer_id, ()))

    run(scenario)


def test_the_keeper_takes_two_places_and_replaces_those_it_loses() -> None:
    async def scenario(mine: MemoryTransport, network: MemoryNetwork) -> None:
        relays = [network.transport() for _ in range(4)]
        answers = [answer(200), answer(), answer(), answer()]
        for transport, data in zip(relays, answers, strict=True):
            await transport.serve(HOP_PROTOCOL, relay(data))
        found = [
            Candidate(r.peer_id, (f"/ip4/203.0.113.{i}/tcp/1/p2p/{r.peer_id}",)) for i, r in enumerate(relays)
        ]
        keeper = RelayKeeper(mine)
        await keeper.keep(found)
        assert keeper.relays == (relays[1].peer_id, relays[2].peer_id)
        assert len(keeper.refusals) == 1
        assert keeper.addresses[0] == f"{found[1].addresses[0]}/p2p-circuit/p2p/{mine.peer_id}"

        network.kill(relays[1].peer_id)
        await keeper.keep(found)
        assert keeper.relays == (relays[2].peer_id, relays[3].peer_id)

        keeper.release()
        assert keeper.addresses == ()

    run(scenario)


def test_the_keeper_goes_to_nobody_behind_a_relay_nor_to_itself() -> None:
    async def scenario(mine: MemoryTransport, network: MemoryNetwork) -> None:
        other = network.transport()
        asked: list[bytes] = []
        await other.serve(HOP_PROTOCOL, relay(answer(), asked=asked))
        circuit = f"/ip4/203.0.113.1/tcp/1/p2p/{mine.peer_id}/p2p-circuit/p2p/{other.peer_id}"
        keeper = RelayKeeper(mine)
        await keeper.keep([Candidate(other.peer_id, (circuit,)), Candidate(mine.peer_id, mine.addresses())])
        assert (keeper.relays, asked) == ((), [])

    run(scenario)


def test_addresses_for_other_machines_come_first() -> None:
    async def scenario(mine: MemoryTransport, network: MemoryNetwork) -> None:
        other = network.transport()
        await other.serve(HOP_PROTOCOL, relay(answer()))
        local, public = (f"/ip4/{ip}/tcp/1/p2p/{other.peer_id}" for ip in ("127.0.0.1", "203.0.113.1"))
        keeper = RelayKeeper(mine)
        await keeper.keep([Candidate(other.peer_id, (local, public))])
        assert keeper.addresses == (f"{public}/p2p-circuit/p2p/{mine.peer_id}",)

    run(scenario)
