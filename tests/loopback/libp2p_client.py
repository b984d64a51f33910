"""One scenario with `Libp2pTransport`, in a process of its own: hivemind and libp2p cannot share one.

    libp2p_client.py SCENARIO [ADDRESS [PROCESS_GROUP]]

Exits with 0 and prints `ok` if what the scenario asserts holds. Run by test_libp2p_transport.py.
"""

import asyncio
import hashlib
import logging.handlers
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

import pytest

from petal_swarm.errors import (
    ConfigError,
    NetworkError,
    PeerUnreachableError,
    StreamClosedError,
    UnsupportedProtocolError,
)
from petal_swarm.net.identity import Identity
from petal_swarm.net.libp2p import Libp2pTransport
from petal_swarm.net.transport import WRITE_HIGH_WATER_BYTES

MIB = 1 << 20
TIMEOUT_S = 5.0


async def read_exactly(stream, count):
    parts = []
    while count:
        data = await stream.read()
        assert data, "the stream ended early"
        parts.append(data)
        count -= len(data)
    assert count == 0
    return b"".join(parts)


async def read_all(stream):
    """Until the end, which p2pd may say by a reset."""
    parts = []
    with suppress(StreamClosedError):
        while data := await stream.read():
            parts.append(data)
    return b"".join(parts)


async def echoed(stream, data):
    async def send():
        for start in range(0, len(data), MIB):
            stream.write(memoryview(data)[start : start + MIB])
            await stream.drain()

    _, answer = await asyncio.gather(send(), read_exactly(stream, len(data)))
    return answer


async def ask(transport, peer_id, protocol):
    stream = await transport.open_stream(peer_id, protocol, timeout_s=TIMEOUT_S)
    stream.write(b"?")
    answer = await read_all(stream)
    await stream.close()
    return answer


async def echo(transport, address):
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    stream = await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S)
    assert stream.peer_id == peer_id
    for size in (1, 2 << 10, 28 << 10, 16 * MIB):
        data = os.urandom(size)
        assert await echoed(stream, data) == data
    await stream.close()
    await stream.close()


async def many(transport, address):
    """The first of them dials; all share the connection."""
    peer_id = address.rpartition("/")[2]

    async def one(number):
        stream = await transport.open_stream(peer_id, "/echo/1", addresses=[address], timeout_s=TIMEOUT_S)
        data = bytes([number]) * (1000 * number + 1)
        assert await echoed(stream, data) == data
        await stream.close()

    await asyncio.gather(*map(one, range(100)))


async def unsupported(transport, address):
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    with pytest.raises(UnsupportedProtocolError, match=f"{peer_id} does not speak /no-such/1"):
        await transport.open_stream(peer_id, "/no-such/1", timeout_s=TIMEOUT_S)
    stream = await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S)
    assert await echoed(stream, b"still there") == b"still there"


async def unreachable(transport, address):
    peer_id = address.rpartition("/")[2]
    with socket.create_server(("127.0.0.1", 0)) as hole:
        port = hole.getsockname()[1]
        start = time.monotonic()
        # The kernel accepts; nobody ever answers.
        with pytest.raises(PeerUnreachableError, match=r"no answer .* within 0.3 s"):
            await transport.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}", timeout_s=0.3)
        assert time.monotonic() - start < 2
    closed = f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}"
    with pytest.raises(PeerUnreachableError, match=f"tcp/{port}: connection refused") as caught:
        await transport.open_stream(peer_id, "/echo/1", addresses=[closed], timeout_s=TIMEOUT_S)
    assert "\n" not in str(caught.value)
    stranger = Identity.generate().peer_id
    with pytest.raises(PeerUnreachableError, match=stranger):
        await transport.connect(address.replace(peer_id, stranger), timeout_s=TIMEOUT_S)
    with pytest.raises(PeerUnreachableError, match="transport"):
        await transport.connect(f"/ip4/127.0.0.1/udp/1/quic-v1/p2p/{stranger}", timeout_s=TIMEOUT_S)
    # A failure is not held against the peer, and one good address among bad ones is enough.
    stream = await transport.open_stream(peer_id, "/echo/1", addresses=[closed, address], timeout_s=TIMEOUT_S)
    assert await echoed(stream, b"at last") == b"at last"


async def misaddressed(transport, address):
    peer_id = address.rpartition("/")[2]
    for bad in (
        "",
        "localhost:80",
        "/ip4/127.0.0.1/tcp/80",
        "/ip4/127.0.0.1/tcp/80/p2p/",
        "/ip4/127.0.0.1/tcp/80/p2p/12D3KooWnonsense",
        f"/ip4/127.0.0.1/tcp/65536/p2p/{peer_id}",
        f"/ip4/127.0.0.1/tcp/x/p2p/{peer_id}",
        f"/ip4/999.0.0.1/tcp/80/p2p/{peer_id}",
        f"/ip6/127.0.0.1/tcp/80/p2p/{peer_id}",
        f"/cable/127.0.0.1/tcp/80/p2p/{peer_id}",
    ):
        with pytest.raises(ConfigError):
            await transport.connect(bad, timeout_s=TIMEOUT_S)
    with pytest.raises(ConfigError):
        await transport.open_stream("me", "/echo/1", timeout_s=TIMEOUT_S)
    with pytest.raises(ConfigError):
        await Libp2pTransport.create(listen=["/ip4/192.0.2.1/tcp/0"])


async def relayed(transport, address):
    """py-libp2p's TCP would dial the relay and take it for the peer behind it."""
    hidden = f"{address}/p2p-circuit/p2p/12D3KooWDasaFDPtTnvLvp8pUkS1sGWUHeN2cQTneTYkjJtEw2aZ"
    peer_id = hidden.rpartition("/")[2]
    with pytest.raises(PeerUnreachableError, match="only be reached through a relay"):
        await transport.connect(hidden, timeout_s=TIMEOUT_S)
    with pytest.raises(PeerUnreachableError, match="only be reached through a relay"):
        await transport.open_stream(peer_id, "/echo/1", addresses=[hidden], timeout_s=TIMEOUT_S)
    # A direct address beside it is enough.
    both = [f"{address}/p2p-circuit/p2p/{address.rpartition('/')[2]}", address]
    stream = await transport.open_stream(
        both[1].rpartition("/")[2], "/echo/1", addresses=both, timeout_s=TIMEOUT_S
    )
    stream.abort()


async def killed(transport, address, process_group):
    """A `kill -9` fails pending reads and drains, at once; the stream does not look as if it had ended."""
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    stream = await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S)
    assert await echoed(stream, b"alive") == b"alive"
    stalled = await transport.open_stream(peer_id, "/stall/1", timeout_s=TIMEOUT_S)
    stalled.write(bytes(32 * MIB))
    waiting = [asyncio.ensure_future(each) for each in (stream.read(), stalled.drain())]
    await asyncio.wait(waiting, timeout=0.1)
    start = time.monotonic()
    os.killpg(int(process_group), signal.SIGKILL)
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, StreamClosedError), result
    assert time.monotonic() - start < 1
    with pytest.raises(StreamClosedError):
        await stream.drain()
    stream.write(b"into the void")
    await stream.close()
    with pytest.raises(PeerUnreachableError):
        await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S)


async def silent(transport, address, process_group):
    """A peer that has vanished without a word is given up; one that has nothing to say is not."""
    from petal_swarm.net import libp2p_host

    await transport.close()
    libp2p_host.PING_INTERVAL_S = libp2p_host.PING_TIMEOUT_S = 0.5
    transport = await Libp2pTransport.create()
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    stream = await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S)
    reading = asyncio.ensure_future(stream.read())
    done, _ = await asyncio.wait([reading], timeout=0.8)
    assert not done
    os.killpg(int(process_group), signal.SIGSTOP)
    with pytest.raises(StreamClosedError, match="is gone"):
        async with asyncio.timeout(TIMEOUT_S):
            await reading
    await transport.close()


async def ended(transport, address):
    """Either side can end first, and nothing that it sent before is lost."""
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    stream = await transport.open_stream(peer_id, "/bye/1", timeout_s=TIMEOUT_S)
    assert await read_all(stream) == b"bye"
    stream.write(b"too late")
    await stream.close()
    stream = await transport.open_stream(peer_id, "/hear/1", timeout_s=TIMEOUT_S)
    data = os.urandom(3 * MIB)
    stream.write(data, b"", b"!")
    await stream.close()
    assert await ask(transport, peer_id, "/told/1") == hashlib.sha256(data + b"!").digest()
    with pytest.raises(StreamClosedError):
        await stream.read()


async def stalled(transport, address):
    """A peer that does not read makes `drain` wait, and loses nothing when it reads at last."""
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    stream = await transport.open_stream(peer_id, "/stall/1", timeout_s=TIMEOUT_S)
    data = os.urandom(32 * MIB)
    stream.write(data)
    draining = asyncio.ensure_future(stream.drain())
    done, _ = await asyncio.wait([draining], timeout=0.5)
    assert not done
    # The connection is not held up by the stream.
    other = await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S)
    assert await echoed(other, bytes(MIB)) == bytes(MIB)
    await ask(transport, peer_id, "/release/1")
    async with asyncio.timeout(TIMEOUT_S):
        await draining
    await stream.close()
    assert await ask(transport, peer_id, "/told/1") == hashlib.sha256(data).digest()


async def unread(transport, address):
    """What nobody reads stays at the peer: it may have 4 MiB under way, no more."""
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    stream = await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S)
    data = os.urandom(48 * MIB)
    stream.write(data)
    done, _ = await asyncio.wait([asyncio.ensure_future(stream.drain())], timeout=0.5)
    assert not done
    assert await read_exactly(stream, len(data)) == data
    async with asyncio.timeout(TIMEOUT_S):
        await stream.drain()


async def subscribed(transport, address):
    """A subscriber gets what came before, what comes, nothing while it pauses, and the end once."""
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    stream = await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S)
    heard, came = [], asyncio.Event()

    def receive(data):
        heard.append(data)
        came.set()

    stream.write(b"before")
    assert await stream.read() == b"before"
    stream.subscribe(receive)
    thread = threading.Thread(target=stream.write, args=(b"from", b" a thread"))
    thread.start()
    thread.join()
    async with asyncio.timeout(TIMEOUT_S):
        await came.wait()
    assert b"".join(heard) == b"from a thread"
    data = os.urandom(48 * MIB)
    heard.clear()
    stream.pause()
    stream.write(data)
    done, _ = await asyncio.wait([asyncio.ensure_future(stream.drain())], timeout=0.5)
    assert not done
    assert not heard
    assert stream.unsent_bytes > WRITE_HIGH_WATER_BYTES
    stream.resume()
    async with asyncio.timeout(TIMEOUT_S):
        while sum(map(len, heard)) < len(data):
            came.clear()
            await came.wait()
    assert b"".join(heard) == data
    heard.clear()
    stream.abort()
    await asyncio.sleep(0)
    assert heard == [b""]


async def aborted(transport, address):
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    first, second = [await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S) for _ in range(2)]
    first.write(bytes(2 * WRITE_HIGH_WATER_BYTES))
    waiting = [asyncio.ensure_future(first.drain()), asyncio.ensure_future(second.read())]
    await asyncio.wait(waiting, timeout=0.01)
    first.abort()
    with pytest.raises(StreamClosedError, match="aborted"):
        await waiting[0]
    with pytest.raises(StreamClosedError, match="aborted"):
        await first.read()
    first.write(b"a no-op")
    await first.close()
    second.write(b"unharmed")
    assert await waiting[1] == b"unharmed"
    second.abort()


async def cancelled(transport, address):
    """A cancelled read or open loses nothing, and leaves nothing behind."""
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    stream = await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await stream.read()
    assert await echoed(stream, b"kept") == b"kept"
    for turns in range(20):
        opening = asyncio.ensure_future(transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S))
        await asyncio.wait([opening], timeout=turns * 0.0001)
        opening.cancel()
        await asyncio.wait([opening])
    assert await echoed(stream, b"kept again") == b"kept again"


async def served(transport, address):
    """A peer that was dialled can open streams here, though nothing listens."""

    async def back(stream):
        question = await read_exactly(stream, len(b"who is there?\n"))
        stream.write(b"heard: " + question)

    await transport.serve("/back/1", back)
    with pytest.raises(ConfigError):
        await transport.serve("/back/1", back)
    assert transport.addresses() == ()
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    stream = await transport.open_stream(peer_id, "/call/1", timeout_s=TIMEOUT_S)
    stream.write(b"\n")
    async with asyncio.timeout(TIMEOUT_S):
        assert await read_all(stream) == b"heard: who is there?\n"
    await stream.close()


async def listening(transport, address):
    """Peers of both kinds dial a py-libp2p peer; a handler that fails resets its stream and nothing else."""

    async def back(stream):
        question = await read_exactly(stream, len(b"who is there?\n"))
        stream.write(b"listener heard: " + question)

    async def fail(stream):
        await stream.read()
        raise ValueError("on purpose")

    log = logging.getLogger("petal_swarm.net.libp2p")
    log.addHandler(records := logging.handlers.BufferingHandler(10))
    log.propagate = False

    identity = Identity.generate()
    listener = await Libp2pTransport.create(identity=identity, listen=["/ip4/127.0.0.1/tcp/0"])
    try:
        assert listener.peer_id == identity.peer_id
        await listener.serve("/back/1", back)
        await listener.serve("/fail/1", fail)
        (own,) = listener.addresses()
        assert own.endswith(f"/p2p/{identity.peer_id}")
        peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
        stream = await transport.open_stream(peer_id, "/call/1", timeout_s=TIMEOUT_S)
        stream.write(own.encode() + b"\n")
        assert await read_all(stream) == b"listener heard: who is there?\n"
        await transport.connect(own, timeout_s=TIMEOUT_S)
        stream = await transport.open_stream(identity.peer_id, "/back/1", timeout_s=TIMEOUT_S)
        stream.write(b"who is there?\n")
        assert await read_exactly(stream, 30) == b"listener heard: who is there?\n"
        assert await stream.read() == b""
        await stream.close()
        stream = await transport.open_stream(identity.peer_id, "/fail/1", timeout_s=TIMEOUT_S)
        stream.write(b"go")
        with pytest.raises(StreamClosedError, match="reset"):
            await stream.read()
        assert [record.levelname for record in records.buffer] == ["ERROR"]
        with pytest.raises(UnsupportedProtocolError):
            await transport.open_stream(identity.peer_id, "/echo/1", timeout_s=TIMEOUT_S)
    finally:
        await listener.close()


async def closed(transport, address):
    """Closing sends what is queued, ends pending reads, takes the thread along, and can be repeated."""
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    stream = await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S)
    reading = asyncio.ensure_future(stream.read())
    heard = await transport.open_stream(peer_id, "/hear/1", timeout_s=TIMEOUT_S)
    data = os.urandom(3 * MIB)
    heard.write(data)
    assert threading.active_count() == 2
    start = time.monotonic()
    await transport.close()
    assert time.monotonic() - start < 2
    assert threading.enumerate() == [threading.main_thread()]
    with pytest.raises(StreamClosedError):
        await reading
    with pytest.raises(NetworkError):
        await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S)
    await transport.close()
    again = await Libp2pTransport.create()
    try:
        await again.connect(address, timeout_s=TIMEOUT_S)
        assert await ask(again, peer_id, "/told/1") == hashlib.sha256(data).digest()
    finally:
        await again.close()


async def left(transport, address):
    """A program that forgets to close ends all the same, silently."""
    peer_id = await transport.connect(address, timeout_s=TIMEOUT_S)
    await transport.open_stream(peer_id, "/echo/1", timeout_s=TIMEOUT_S)


async def beside_hivemind(_):
    import hivemind  # noqa: F401

    with pytest.raises(ConfigError, match="hivemind"):
        await Libp2pTransport.create()


async def main(name, *args):
    assert not {"trio", "libp2p", "hivemind"} & sys.modules.keys(), "imported before its use"
    transport = None if name == "beside_hivemind" else await Libp2pTransport.create()
    async with asyncio.timeout(20):
        await globals()[name](transport, *args)
    if transport is not None and name != "left":
        await transport.close()
        assert threading.enumerate() == [threading.main_thread()]


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
    print("ok")
