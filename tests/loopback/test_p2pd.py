"""Two daemons and their transports in one process: bytes, refusals, back-pressure, and deaths."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("hivemind")

from petal_swarm.errors import (
    ConfigError,
    NetworkError,
    PeerUnreachableError,
    StreamClosedError,
    UnsupportedProtocolError,
)
from petal_swarm.net import p2pd
from petal_swarm.net.identity import Identity
from petal_swarm.net.p2pd import P2pdTransport
from petal_swarm.net.p2pd_stream import READ_AHEAD_BYTES, P2pdStream
from petal_swarm.net.transport import WRITE_HIGH_WATER_BYTES, Stream

pytestmark = [
    # hivemind finds its daemon by an old function of importlib.resources.
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket.socket .*hivemind-p2pd:ResourceWarning"),
    pytest.mark.timeout(90),
]

Scenario = Callable[["Pair"], Coroutine[Any, Any, None]]
Run = Callable[[Scenario], None]
TIMEOUT_S = 20.0
MIB = 1 << 20


@dataclass
class Pair:
    """`peer` serves, `me` calls. `accepted` are the streams of `/hold/1`, which does nothing by itself."""

    me: P2pdTransport
    peer: P2pdTransport
    accepted: asyncio.Queue[Stream] = field(default_factory=asyncio.Queue)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def open(self, protocol: str) -> P2pdStream:
        return await self.me.open_stream(
            self.peer.peer_id, protocol, addresses=self.peer.addresses(), timeout_s=TIMEOUT_S
        )

    async def hold(self) -> tuple[P2pdStream, Stream]:
        """Both ends of a stream."""
        mine = await self.open("/hold/1")
        return mine, await self.accepted.get()


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        stream.write(data)
        await stream.drain()


async def crash(stream: Stream) -> None:
    await stream.read()
    raise ZeroDivisionError


async def start() -> Pair:
    me, peer = await asyncio.gather(P2pdTransport.create(listen=()), P2pdTransport.create())
    pair = Pair(me, peer)

    async def hold(stream: Stream) -> None:
        pair.accepted.put_nowait(stream)
        await pair.released.wait()

    await peer.serve("/echo/1", echo)
    await peer.serve("/crash/1", crash)
    await peer.serve("/hold/1", hold)
    return pair


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        pair = runner.run(start())

        def run(scenario: Scenario) -> None:
            async def within_time() -> None:
                async with asyncio.timeout(60):
                    await scenario(pair)
                pair.released.set()
                await asyncio.sleep(0)
                pair.released.clear()

            runner.run(within_time())

        yield run

        async def stop() -> None:
            pair.released.set()
            await asyncio.gather(pair.me.close(), pair.peer.close())

        runner.run(stop())


async def read_exactly(stream: Stream, size: int) -> bytes:
    parts, missing = [], size
    while missing > 0:
        data = await stream.read()
        assert data, f"the stream ended {missing} bytes early"
        parts.append(data)
        missing -= len(data)
    assert missing == 0
    return b"".join(parts)


async def until_full(stream: P2pdStream) -> None:
    """So much has arrived unread that the stream reads no further."""
    while stream._arrived_bytes <= READ_AHEAD_BYTES:  # noqa: ASYNC110
        await asyncio.sleep(0)


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def test_small_messages(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        stream = await pair.open("/echo/1")
        assert stream.peer_id == pair.peer.peer_id
        for number in range(50):
            message = noise(number + 1, number)
            stream.write(message[:3], bytearray(message[3:5]), memoryview(message)[5:])
            assert await read_exactly(stream, len(message)) == message
        stream.write(b"")
        assert stream.unsent_bytes == 0
        await stream.close()

    run(scenario)


def test_both_ends_know_each_other(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        mine, theirs = await pair.hold()
        assert (mine.peer_id, theirs.peer_id) == (pair.peer.peer_id, pair.me.peer_id)
        await mine.close()
        await mine.close()
        assert await theirs.read() == b""
        assert await theirs.read() == b""

    run(scenario)


@pytest.mark.parametrize("chunk_bytes", [100_000, 16 * MIB])
def test_sixteen_mebibytes_both_ways(run: Run, chunk_bytes: int) -> None:
    async def scenario(pair: Pair) -> None:
        stream = await pair.open("/echo/1")
        sent = noise(16 * MIB)

        async def send() -> None:
            for start in range(0, len(sent), chunk_bytes):
                stream.write(sent[start : start + chunk_bytes])
                await stream.drain()

        sending = asyncio.create_task(send())
        assert hashlib.sha256(await read_exactly(stream, len(sent))).digest() == hashlib.sha256(sent).digest()
        await sending
        assert stream.unsent_bytes == 0
        await stream.close()

    run(scenario)


def test_writes_of_another_thread_keep_their_order(run: Run) -> None:
    """Some go straight to the kernel, some through the loop: no byte may overtake another."""

    async def scenario(pair: Pair) -> None:
        mine, theirs = await pair.hold()
        sizes = [random.Random(number).choice([1, 50, 3_000, 200_000]) for number in range(300)]
        whole = noise(sum(sizes))

        def write() -> None:
            start = 0
            for size in sizes:
                mine.write(whole[start : start + size // 2], whole[start + size // 2 : start + size])
                start += size

        writing = asyncio.create_task(asyncio.to_thread(write))
        assert await read_exactly(theirs, len(whole)) == whole
        await writing
        await mine.close()

    run(scenario)


def test_closing_sends_what_is_queued(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        mine, theirs = await pair.hold()
        sent = noise(4 * MIB)
        mine.write(sent)
        closing = asyncio.create_task(mine.close())
        assert await read_exactly(theirs, len(sent)) == sent
        assert await theirs.read() == b""
        await closing
        mine.write(b"a no-op")

    run(scenario)


def test_a_cancelled_read_loses_nothing(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        mine, theirs = await pair.hold()
        for number in range(20):
            reading = asyncio.create_task(mine.read())
            await asyncio.sleep(0)
            theirs.write(bytes([number]) * 10)
            if number % 2:
                reading.cancel()
                with suppress(asyncio.CancelledError):
                    await reading
                assert await read_exactly(mine, 10) == bytes([number]) * 10
            else:
                assert await reading == bytes([number]) * 10
        await mine.close()

    run(scenario)


class Heard:
    """A subscriber that counts."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ends = 0
        self._changed = asyncio.Event()

    def __call__(self, data: bytes) -> None:
        self.data += data
        self.ends += not data
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


def test_a_subscriber_hears_everything_and_the_end_once(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        mine, theirs = await pair.hold()
        theirs.write(b"before")
        heard = Heard()
        mine.subscribe(heard)
        sent = noise(2 * MIB)
        theirs.write(sent)
        await heard.until(lambda: len(heard.data) == 6 + len(sent))
        assert heard.data == b"before" + sent
        assert heard.ends == 0
        await theirs.close()
        await heard.until(lambda: heard.ends > 0)
        await mine.close()
        assert heard.ends == 1

    run(scenario)


def test_a_paused_subscriber_hears_nothing_more(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        mine, theirs = await pair.hold()
        heard = Heard()
        mine.subscribe(heard)
        mine.pause()
        mine.pause()
        theirs.write(b"while paused")
        stream = await pair.open("/echo/1")  # a round trip on the same connection
        stream.write(b"x")
        assert await stream.read() == b"x"
        assert not heard.data
        mine.resume()
        mine.resume()
        await heard.until(lambda: heard.data == b"while paused")
        await mine.close()
        await stream.close()
        mine.pause()
        mine.resume()

    run(scenario)


def test_a_subscriber_that_comes_late_hears_what_waited(run: Run) -> None:
    """So much waits that reading was paused: subscribing must resume it."""

    async def scenario(pair: Pair) -> None:
        mine, theirs = await pair.hold()
        sent = noise(2 * READ_AHEAD_BYTES)
        theirs.write(sent)
        await until_full(mine)
        heard = Heard()
        mine.subscribe(heard)
        await heard.until(lambda: len(heard.data) == len(sent))
        assert heard.data == sent
        await mine.close()

    run(scenario)


def test_a_peer_that_does_not_read_holds_up_the_writer(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        mine, theirs = await pair.hold()
        assert isinstance(theirs, P2pdStream)
        theirs.pause()
        written = hashlib.sha256()
        total, part = 0, noise(MIB)
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while True:
                    mine.write(part)
                    written.update(part)
                    total += MIB
                    await mine.drain()
        assert total < 64 * MIB, "buffers are bounded all the way"
        assert WRITE_HIGH_WATER_BYTES <= mine.unsent_bytes <= WRITE_HIGH_WATER_BYTES + 2 * MIB
        theirs.resume()
        read = hashlib.sha256(await read_exactly(theirs, total))
        assert read.digest() == written.digest()
        await mine.drain()
        await mine.close()

    run(scenario)


def test_a_reader_that_waits_buffers_no_more_than_it_says(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        mine, theirs = await pair.hold()
        theirs.write(bytes(4 * READ_AHEAD_BYTES))
        await until_full(mine)
        stream = await pair.open("/echo/1")  # time for more to come, if it did
        stream.write(bytes(4 * MIB))
        await read_exactly(stream, 4 * MIB)
        await stream.close()
        assert READ_AHEAD_BYTES < mine._arrived_bytes < 2 * READ_AHEAD_BYTES
        await read_exactly(mine, 4 * READ_AHEAD_BYTES)
        await mine.close()

    run(scenario)


def test_closing_does_not_wait_for_a_peer_that_does_not_read(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p2pd, "CLOSE_TIMEOUT_S", 0.1)

    async def scenario(pair: Pair) -> None:
        mine, theirs = await pair.hold()
        assert isinstance(theirs, P2pdStream)
        theirs.pause()
        mine.write(bytes(64 * MIB))
        async with asyncio.timeout(5):
            await mine.close()
            await mine.close()
        assert mine._transport.get_write_buffer_size() == 0, "nothing of it is kept"
        theirs.abort()

    run(scenario)


def test_aborting(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        mine, theirs = await pair.hold()
        other, others = await pair.hold()
        assert isinstance(theirs, P2pdStream)
        theirs.pause()
        mine.write(bytes(64 * MIB))
        waiting = [asyncio.create_task(mine.read()), asyncio.create_task(mine.drain())]
        await asyncio.sleep(0)
        mine.abort()
        for task in waiting:
            with pytest.raises(StreamClosedError, match="aborted"):
                await task
        with pytest.raises(StreamClosedError, match="aborted"):
            await mine.read()
        with pytest.raises(StreamClosedError, match="aborted"):
            await mine.drain()
        mine.write(b"a no-op")
        mine.abort()
        await mine.close()
        theirs.resume()
        with suppress(StreamClosedError):
            while await theirs.read():
                pass
        others.write(b"unharmed")
        assert await other.read() == b"unharmed"
        await other.close()

    run(scenario)


def test_a_handler_that_fails_ends_its_stream(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(pair: Pair) -> None:
        stream = await pair.open("/crash/1")
        stream.write(b"now")
        with suppress(StreamClosedError):
            assert await stream.read() == b""
        await stream.close()

    with caplog.at_level(logging.ERROR):
        run(scenario)
    assert "ZeroDivisionError" in caplog.text


def test_another_protocol(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        with pytest.raises(UnsupportedProtocolError, match="/echo/2"):
            await pair.open("/echo/2")

    run(scenario)


def test_nobody_there(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        nobody = Identity.from_seed(bytes(32)).peer_id
        address = f"/ip4/127.0.0.1/tcp/1/p2p/{nobody}"
        with pytest.raises(PeerUnreachableError):
            await pair.me.open_stream(nobody, "/echo/1", timeout_s=5)
        with pytest.raises(PeerUnreachableError):
            await pair.me.open_stream(nobody, "/echo/1", addresses=[address], timeout_s=5)
        with pytest.raises(PeerUnreachableError):
            await pair.me.connect(address, timeout_s=5)

    run(scenario)


def test_somebody_else_there(run: Run) -> None:
    """The address is right and the peer id is not: no connection."""

    async def scenario(pair: Pair) -> None:
        base = pair.peer.addresses()[0].rpartition("/p2p/")[0]
        nobody = Identity.from_seed(bytes(32)).peer_id
        with pytest.raises(PeerUnreachableError):
            await pair.me.connect(f"{base}/p2p/{nobody}", timeout_s=5)

    run(scenario)


@pytest.mark.parametrize(
    "address",
    ["", "nonsense", "/ip4/127.0.0.1/tcp/1", "/ip4/300.0.0.1/tcp/1/p2p/{}", "/ip4/127.0.0.1/tcp/1/p2p/0OIl"],
)
def test_bad_addresses(run: Run, address: str) -> None:
    async def scenario(pair: Pair) -> None:
        with pytest.raises(ConfigError):
            await pair.me.connect(address.format(pair.peer.peer_id), timeout_s=5)

    run(scenario)


def test_connecting_says_who_is_there(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        (address, *_) = pair.peer.addresses()
        assert await pair.me.connect(address, timeout_s=TIMEOUT_S) == pair.peer.peer_id
        assert pair.me.addresses() == ()

    run(scenario)


def daemons() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "p2pd" in child.name()]


def sockets(transport: P2pdTransport) -> list[Path]:
    """The files through which a transport and its daemon talk."""
    addresses = (transport.p2p._daemon_listen_maddr, transport.p2p._client_listen_maddr)
    return [path for path in (Path(address["unix"]) for address in addresses) if path.exists()]


def test_an_open_that_is_cancelled_leaves_no_connection_to_the_daemon(run: Run) -> None:
    """Wherever it is cancelled. A connection left to the garbage collector is a warning, and so a failure."""

    async def scenario(pair: Pair) -> None:
        for turns in range(12):
            opening = asyncio.create_task(pair.open("/echo/1"))
            for _ in range(turns):
                await asyncio.sleep(0)
            opening.cancel()
            with suppress(asyncio.CancelledError):
                await (await opening).close()
        await asyncio.sleep(0)
        gc.collect()

    run(scenario)


def test_closing_leaves_nothing_behind(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        before, threads = len(daemons()), threading.active_count()
        transport = await P2pdTransport.create()
        stream = await transport.open_stream(
            pair.peer.peer_id, "/echo/1", addresses=pair.peer.addresses(), timeout_s=TIMEOUT_S
        )
        assert len(daemons()) == before + 1
        assert sockets(transport)
        await transport.close()
        await transport.close()
        await transport.wait_daemon()
        assert len(daemons()) == before
        assert sockets(transport) == []
        # asyncio waits for a child process in a thread, which ends a moment after the child.
        async with asyncio.timeout(TIMEOUT_S):
            while threading.active_count() > threads:  # noqa: ASYNC110 - threads have no event
                await asyncio.sleep(0.01)
        with suppress(NetworkError):
            while await stream.read():
                pass
        await stream.close()

    run(scenario)


def test_ctrl_c_in_a_terminal_does_not_reach_the_daemons(run: Run) -> None:
    """A terminal signals its foreground process group."""

    async def scenario(pair: Pair) -> None:
        groups = {os.getpgid(transport.p2p._child.pid) for transport in (pair.me, pair.peer)}
        assert os.getpgrp() not in groups

    run(scenario)


#: Prints the pid of its daemon.
ALONE = """
import asyncio
from petal_swarm.net.p2pd import P2pdTransport
async def main():
    transport = await P2pdTransport.create(listen=())
    print(transport.p2p._child.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_a_daemon_ends_with_its_program_even_after_kill_9() -> None:
    program = subprocess.Popen([sys.executable, "-c", ALONE], stdout=subprocess.PIPE)
    with program:
        assert program.stdout is not None
        daemon = psutil.Process(int(program.stdout.readline()))
        program.kill()
    _, alive = psutil.wait_procs([daemon], timeout=TIMEOUT_S)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_a_daemon_that_dies_is_noticed_by_both(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        other = await P2pdTransport.create()
        accepted: asyncio.Queue[Stream] = asyncio.Queue()

        async def hold(stream: Stream) -> None:
            accepted.put_nowait(stream)
            await asyncio.Event().wait()

        await other.serve("/hold/2", hold)
        mine = await pair.me.open_stream(
            other.peer_id, "/hold/2", addresses=other.addresses(), timeout_s=TIMEOUT_S
        )
        theirs = await accepted.get()
        reading = [asyncio.create_task(stream.read()) for stream in (mine, theirs)]
        waiting = asyncio.create_task(other.wait_daemon())
        await asyncio.sleep(0)
        assert not waiting.done()
        os.kill(other.p2p._child.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            await waiting
            for task in reading:
                with suppress(StreamClosedError):
                    assert await task == b""
        with pytest.raises(NetworkError):
            await other.open_stream(
                pair.peer.peer_id, "/echo/1", addresses=pair.peer.addresses(), timeout_s=5
            )
        await mine.close()
        await other.close()
        for path in sockets(other):  # a killed daemon cannot remove its own
            path.unlink()

    run(scenario)
