"""Mutated and random frames against live servers, while somebody else generates. Over p2pd, on loopback.

    python -m benchmarks.fuzz [--frames 100000] [--seed 1] [--at-once 24]

Two servers of a tiny model, one peer that attacks both on all protocols (and the DHT's own calls), and one
client that generates greedily all the while: its tokens must be those of a run that nobody disturbs.
Memory and open files are those of a server and its libp2p daemon. Exits 1 if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from benchmarks.harness import SHAPES, RunningServer, checkpoint, servers, workspace
from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.errors import PetalSwarmError
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.net.addresses import split_address
from petal_swarm.net.p2pd import P2pdTransport
from petal_swarm.span import Span
from tests.hostile_frames import Hostile, Target
from tests.hostile_peer import HostilePeer

SHAPE = "tiny"
SPANS = ("0:4", "4:8")
TOKENS = 100
LOOK_S = 2.0
PING_S = 5.0
#: Until sessions that were left alone have ended, and streams with them.
SETTLE_S = 100.0
#: The share of attacks that are calls of the DHT's.
DHT_SHARE = 0.1


@dataclass
class Watch:
    """What one server and its daemon need, from look to look."""

    server: RunningServer
    rss: list[tuple[int, int]] = field(default_factory=list)
    files: list[tuple[int, int]] = field(default_factory=list)

    def look(self) -> None:
        python = psutil.Process(self.server.process.pid)
        daemon = python.children()[0]
        self.rss.append((python.memory_info().rss, daemon.memory_info().rss))
        self.files.append((python.num_fds(), daemon.num_fds()))

    @property
    def alive(self) -> bool:
        return self.server.process.poll() is None

    def grown(self) -> float:
        """Memory of both processes at the end against the first look."""
        return sum(self.rss[-1]) / sum(self.rss[0]) - 1


class Bystander(threading.Thread):
    """Generates the same tokens over and over, as a client of its own."""

    def __init__(self, path: Path, address: str) -> None:
        super().__init__(name="bystander", daemon=True)
        self._model = AutoSwarmModelForCausalLM.from_pretrained(str(path), initial_peers=[address])
        self._ids = torch.arange(5, 25)[None]
        self._over = threading.Event()
        self.expected = self._generate()
        self.runs = 0
        self.wrong = 0
        self.failed: list[str] = []
        self.slowest_s = 0.0

    def run(self) -> None:
        while not self._over.is_set():
            started = time.perf_counter()
            try:
                tokens = self._generate()
            except PetalSwarmError as error:
                self.failed.append(f"{type(error).__name__}: {error}")
                continue
            self.slowest_s = max(self.slowest_s, time.perf_counter() - started)
            self.runs += 1
            self.wrong += not torch.equal(tokens, self.expected)

    def stop(self) -> None:
        self._over.set()
        self.join()
        self._model.close()

    def _generate(self) -> torch.Tensor:
        return self._model.generate(self._ids, max_new_tokens=TOKENS, do_sample=False)


class DhtCalls:
    """The DHT's remote calls with damaged protobufs."""

    def __init__(self, transport: P2pdTransport, seed: int) -> None:
        self._p2p = transport.p2p
        self._rng = random.Random(seed)
        self.calls = 0
        self.outcomes: Counter[str] = Counter()

    async def call(self, target: Target) -> None:
        from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID

        name, data = self._request(target)
        self.calls += 1
        peer_id = PeerID.from_base58(target.peer_id)
        try:
            async with asyncio.timeout(PING_S):
                await self._p2p._client.call_unary_handler(peer_id, f"DHTProtocol.{name}", data)
            self.outcomes["answered"] += 1
        except TimeoutError:
            self.outcomes["no answer"] += 1
        except Exception as error:
            self.outcomes[type(error).__name__] += 1

    def _request(self, target: Target) -> tuple[str, bytes]:
        import msgpack
        from hivemind.proto import dht_pb2

        from petal_swarm.directory.validator import key_of

        rng = self._rng
        key = key_of(target.model).to_bytes()
        node = dht_pb2.NodeInfo(node_id=rng.randbytes(20))
        dictionary = msgpack.packb([10, 1e12, [[b"k", b"v", 1e12]]])
        value = rng.choice(
            (
                b"",
                rng.randbytes(300),
                msgpack.packb(msgpack.ExtType(0x50, dictionary)),
                msgpack.packb(msgpack.ExtType(0x50, rng.randbytes(50))),
                msgpack.packb(msgpack.ExtType(0x40, b"\x91" * 60_000)),
                b"\x91" * 60_000,
            )
        )
        name, message = rng.choice(
            (
                ("rpc_ping", dht_pb2.PingRequest(peer=node, validate=rng.random() < 0.3)),
                (
                    "rpc_store",
                    dht_pb2.StoreRequest(
                        keys=[key] * rng.randint(0, 3),
                        subkeys=[b"\xa1x"] * rng.randint(0, 3),
                        values=[value] * rng.randint(0, 3),
                        expiration_time=[rng.choice((0.0, time.time() + 30, float("nan"), 1e300))],
                        in_cache=[rng.random() < 0.3],
                        peer=node,
                    ),
                ),
                (
                    "rpc_find",
                    dht_pb2.FindRequest(keys=[key, rng.randbytes(20)] * rng.choice((1, 1, 500)), peer=node),
                ),
            )
        )
        data = bytearray(message.SerializeToString())
        for _ in range(rng.choice((0, 1, 3, 20))):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        return name, bytes(data[: rng.choice((len(data), len(data), rng.randint(0, len(data))))])


class Assault:
    """Everything that attacks, and who looks meanwhile whether the servers answer."""

    def __init__(self, targets: list[Target], transport: P2pdTransport, seed: int) -> None:
        self.targets = targets
        self.peer = HostilePeer(transport)
        self.dht = DhtCalls(transport, seed)
        self._hostile = Hostile(seed, transport.peer_id)
        self._rng = random.Random(seed)
        self.pings_s: list[float] = []
        self.unanswered = 0
        self.damage: Counter[str] = Counter()

    async def run(self, frames: int, at_once: int) -> None:
        """Until so many frames more have been sent."""
        wanted = self.peer.frames_sent + frames

        async def attack_on() -> None:
            while self.peer.frames_sent < wanted:
                first, second = self._rng.sample(self.targets, 2)
                if self._rng.random() < DHT_SHARE:
                    await self.dht.call(first)
                    continue
                follows = second.span.start == first.span.end
                attack = self._hostile.attack(first, second if follows else None)
                self.damage.update(attack.damage)
                await self.peer.carry_out(first, attack)

        await asyncio.gather(*(attack_on() for _ in range(at_once)))

    async def ping(self) -> None:
        """Ask both servers for a sign of life."""
        for target in self.targets:
            try:
                self.pings_s.append(await self.peer.ping(target, PING_S))
            except PetalSwarmError:
                self.unanswered += 1


async def observe(assault: Assault, watches: list[Watch], stopped: asyncio.Event) -> None:
    while not stopped.is_set():
        for watch in watches:
            if watch.alive:
                watch.look()
        await assault.ping()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await stopped.wait()


async def attack(running: list[RunningServer], arguments: argparse.Namespace, path: Path) -> bool:
    model = open_checkpoint(str(path))
    transport = await P2pdTransport.create(listen=())
    targets = []
    for server, span in zip(running, SPANS, strict=True):
        await transport.connect(server.address, timeout_s=10)
        _, peer_id = split_address(server.address)
        hidden = SHAPES[SHAPE]["hidden_size"]
        targets.append(Target(peer_id, (server.address,), Span.parse(span), model.model_key, hidden))
    assault = Assault(targets, transport, arguments.seed)
    watches = [Watch(server) for server in running]
    bystander = await asyncio.to_thread(Bystander, path, running[0].address)
    bystander.start()
    await assault.run(arguments.warm_up, arguments.at_once)
    stopped = asyncio.Event()
    observing = asyncio.create_task(observe(assault, watches, stopped))
    started = time.perf_counter()
    before = assault.peer.frames_sent
    await assault.run(arguments.frames, arguments.at_once)
    took_s = time.perf_counter() - started
    sent = assault.peer.frames_sent - before
    assault.peer.let_go()
    await asyncio.sleep(arguments.settle)
    stopped.set()
    await observing
    await asyncio.to_thread(bystander.stop)
    await transport.close()
    for watch in watches:
        if watch.alive:
            watch.look()
    report(assault, bystander, watches, sent, took_s)
    return verdict(assault, bystander, watches)


def report(assault: Assault, bystander: Bystander, watches: list[Watch], sent: int, took_s: float) -> None:
    peer, pings = assault.peer, sorted(assault.pings_s)
    print(f"{sent} frames in {took_s:.0f} s, {peer.streams_opened} streams, {peer.unreachable} not opened")
    print(f"{assault.dht.calls} calls of the DHT's: {dict(assault.dht.outcomes)}")
    print(f"damage: {dict(assault.damage.most_common())}")
    print(
        f"pings: {len(pings)} answered, median {pings[len(pings) // 2] * 1e3:.0f} ms,"
        f" worst {pings[-1] * 1e3:.0f} ms; {assault.unanswered} unanswered after {PING_S:g} s"
    )
    print(
        f"bystander: {bystander.runs} runs of {TOKENS} tokens, {bystander.wrong} wrong,"
        f" {len(bystander.failed)} failed {bystander.failed[:3]}, slowest {bystander.slowest_s:.1f} s"
    )
    for index, watch in enumerate(watches):
        start, most, end = watch.rss[0], max(map(sum, watch.rss)), watch.rss[-1]
        print(
            f"server {index}: alive {watch.alive}; MB at the start {_mb(start[0])} + {_mb(start[1])},"
            f" most {_mb(most)}, at the end {_mb(end[0])} + {_mb(end[1])} ({watch.grown():+.1%});"
            f" files {sum(watch.files[0])}, most {max(map(sum, watch.files))}, {sum(watch.files[-1])}"
        )


def verdict(assault: Assault, bystander: Bystander, watches: list[Watch]) -> bool:
    """Whether all is as it must be."""
    return (
        all(watch.alive and watch.grown() <= 0.05 for watch in watches)
        and not assault.unanswered
        and bystander.runs > 0
        and not bystander.wrong
        and not bystander.failed
    )


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--warm-up", type=int, default=3000, help="frames before the first look")
    parser.add_argument("--settle", type=float, default=SETTLE_S, help="seconds before the last look")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=24, help="streams")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with workspace() as folder:
        path = checkpoint(SHAPE, folder)
        with servers(path, SPANS, "--kv-tokens", "8192", "--threads", "1", "--cache-dir", "none") as running:
            good = asyncio.run(attack(running, arguments, path))
    print("as it must be" if good else "NOT as it must be")
    sys.exit(not good)


if __name__ == "__main__":
    main()
