"""Whole schedules of kills, silences, cuts, delays, drains and joins, each from a seed, on the virtual clock.

The schedules leave every block somebody who could serve it; then every token is that of an undisturbed
run, and when the session is closed nothing of it is left anywhere.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from petal_swarm.client.session import InferenceSession
from petal_swarm.server.server import Server
from tests.checkpoints import VOCABULARY, reference
from tests.swarm.local import LocalSwarm

#: Two ways to cut eight blocks, each span served twice.
SPANS = ["0:3", "3:5", "5:8", "0:4", "4:8"] * 2
NUM_BLOCKS = 8
TASKS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True, "top_p": 0.9},
    {"num_beams": 3},
    {"do_sample": False, "prompt_lookup_num_tokens": 4},
]
#: Longer than any deadline of a server that waits for a neighbour.
SETTLE_S = 90.0
#: Tasks that a server has for as long as it lives.
LASTING = ("Announcer.", "Server._update_figures", "Server._ping_neighbours", "Uplink.run")


class Chaos:
    """Disturbs one session at random moments, until it is told to stop."""

    def __init__(self, swarm: LocalSwarm, session: InferenceSession, rng: random.Random) -> None:
        self.swarm = swarm
        self.session = session
        self.log: list[str] = []
        self._rng = rng
        self._unfit: set[str] = set()
        self._cut: set[tuple[str, str]] = set()
        self._task = swarm.run(self._start())
        self._others: set[asyncio.Task[Any]] = set()

    async def _start(self) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        acts = (self.kill, self.kill, self.silence, self.cut, self.delay, self.drain, self.join)
        while True:
            for _ in range(self._rng.randint(1, 4)):
                await asyncio.sleep(self._rng.choice((0.01, 0.1, 0.5)) * self._rng.random())
                self._rng.choice(acts)()
            await asyncio.sleep(self._rng.choice((0.2, 1.0, 4.0)))

    async def stop(self) -> None:
        """Do no more; all cables are whole again, and who was silent speaks."""
        for task in (self._task, *self._others):
            task.cancel()
        await asyncio.gather(self._task, *self._others, return_exceptions=True)
        for one, other in list(self._cut):
            self.swarm.network.restore(one, other)

    @property
    def living(self) -> list[Server]:
        return [server for server in self.swarm.servers if server.announcement().peer_id not in self._unfit]

    def _victim(self) -> Server | None:
        """A server of the route, or any; None if some block would be left to nobody."""
        used = {hop.peer_id for hop in self.session.route.hops} if self.session.route else set()
        candidates = [s for s in self.living if s.announcement().peer_id in used] or self.living
        victim = self._rng.choice(candidates)
        rest = [server.span for server in self.living if server is not victim]
        if all(sum(block in span for span in rest) >= 2 for block in range(NUM_BLOCKS)):
            return victim
        return None

    def _note(self, what: str, *peers: str) -> None:
        names = " ".join(peer[-6:] for peer in peers)
        self.log.append(f"{self.swarm.loop.time():.3f} {what} {names}")

    def _later(self, seconds: float, act: Any, *arguments: Any) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            await act(*arguments)

        task = self.swarm.loop.create_task(wait())
        self._others.add(task)
        task.add_done_callback(self._others.discard)

    def kill(self) -> None:
        victim = self._victim()
        if victim is None:
            return
        peer_id = victim.announcement().peer_id
        self._note("kill", peer_id)
        self._unfit.add(peer_id)
        self.swarm.network.kill(peer_id)
        assert victim._announcer is not None
        assert victim._announcer._task is not None
        victim._announcer._task.cancel()

    def silence(self) -> None:
        """A stopped process, which may go on later."""
        victim = self._victim()
        if victim is None:
            return
        peer_id = victim.announcement().peer_id
        self._note("silence", peer_id)
        self._unfit.add(peer_id)
        pairs = [(peer_id, other) for other in self.swarm.network._peers if other != peer_id]
        self._cut_all(pairs)
        self._later(self._rng.uniform(0.2, 20.0), self._speak, peer_id, pairs)

    async def _speak(self, peer_id: str, pairs: list[tuple[str, str]]) -> None:
        self._note("speak", peer_id)
        self._restore_all(pairs)
        self._unfit.discard(peer_id)

    def cut(self) -> None:
        """A cable between two neighbours of the route, or between the client and a hop."""
        if self.session.route is None or self._cut:
            return
        peers = [
            self.swarm.strangers[-1].peer_id,
            *(hop.peer_id for hop in self.session.route.hops),
            self.swarm.strangers[-1].peer_id,
        ]
        at = self._rng.randrange(len(peers) - 1)
        pair = (peers[at], peers[at + 1])
        if self._unfit.intersection(pair):
            return
        self._note("cut", *pair)
        self._cut_all([pair])
        self._later(self._rng.uniform(0.1, 8.0), self._join_cable, pair)

    async def _join_cable(self, pair: tuple[str, str]) -> None:
        self._note("restore", *pair)
        self._restore_all([pair])

    def delay(self) -> None:
        link = self.swarm.network.link(*self._rng.sample(sorted(self.swarm.network._peers), 2))
        link.latency_s = self._rng.choice((0.005, 0.02, 0.3))

    def drain(self) -> None:
        victim = self._victim()
        if victim is None:
            return
        peer_id = victim.announcement().peer_id
        self._note("drain", peer_id)
        self._unfit.add(peer_id)
        self._later(0.0, self._leave, victim)

    async def _leave(self, server: Server) -> None:
        await server.drain(self._rng.uniform(0.5, 30))
        await server.close()

    def join(self) -> None:
        if len(self.living) < 12:
            self._note("join")
            self._later(0.0, self.swarm.start_server, self._rng.choice(SPANS))

    def _cut_all(self, pairs: list[tuple[str, str]]) -> None:
        for pair in pairs:
            self.swarm.network.cut(*pair)
            self._cut.add(pair)

    def _restore_all(self, pairs: list[tuple[str, str]]) -> None:
        for pair in pairs:
            if pair in self._cut:
                self._cut.remove(pair)
                self.swarm.network.restore(*pair)


def generate(model: Any, rng: random.Random, seed: int, **more: Any) -> list[torch.Tensor]:
    """The calls that follow from the seed; those of transformers if there is no session."""
    options = {"max_new_tokens": 40, **rng.choice(TASKS)}
    batch = 1 if "prompt_lookup_num_tokens" in options else rng.choice((1, 1, 2))
    if more.get("session") is None:
        options.pop("prompt_lookup_num_tokens", None)
    calls = 1 if "num_beams" in options else 2
    results: list[torch.Tensor] = []
    held = torch.zeros(batch, 0, dtype=torch.long)
    for call in range(calls):
        length = rng.choice((1, 12, 40, 150)) if call == 0 else rng.randrange(1, 30)
        new = torch.randint(
            5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed + call)
        )
        ids = new if more.get("session") is not None else torch.cat([held, new], 1)
        torch.manual_seed(seed)
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)
        tokens = tokens[:, ids.shape[1] :]
        results.append(tokens)
        held = torch.cat([held, new, tokens], 1)
    return results


def expected(checkpoint: Path, seed: int) -> list[torch.Tensor]:
    return generate(reference(checkpoint), random.Random(f"calls {seed}"), seed)


def leftovers(swarm: LocalSwarm, model: Any, servers: list[Server]) -> list[str]:
    """What of closed sessions is still anywhere."""
    left = []
    if model._swarm._logs.used_bytes or model._swarm._logs._logs:
        left.append("logs of the client")
    if model._swarm.transport._streams:
        left.append(f"streams of the client: {len(model._swarm.transport._streams)}")
    for server in servers:
        host = server._host
        assert host is not None
        found = {
            "sessions": host.num_sessions,
            "logs": len(host._logs._logs),
            "log bytes": host._logs.used_bytes,
            "awaited sessions": len(host._arrivals),
            "streams being opened": server._gate.num_opening,
            "peers with quotas": len(host._quotas),
            "bytes under way": host._quotas.nbytes,
            "streams": len(swarm.network.find(server.announcement().peer_id)._streams),  # type: ignore[union-attr]
            "KV sessions": server._compute.engine.stats().sessions,  # type: ignore[union-attr]
        }
        left += [f"{count} {what} of {server.span}" for what, count in found.items() if count]
    for task in asyncio.all_tasks(swarm.loop):
        name = getattr(task.get_coro(), "__qualname__", "")
        if not name.startswith(LASTING):
            left.append(f"task {name}")
    return left


@pytest.mark.parametrize("seed", range(12))
def test_no_token_is_lost_and_nothing_is_left(checkpoint: Path, seed: int) -> None:
    theirs = expected(checkpoint, seed)
    rng = random.Random(seed)
    with LocalSwarm(checkpoint, SPANS, seed=seed) as swarm:
        if rng.random() < 0.3:
            for server in swarm.servers:
                assert server._host is not None
                server._host._logs.limit_bytes = 5000
        model = swarm.model(prefill_chunk_tokens=rng.choice((None, 16)))
        with model.open_session(max_length=330) as session:
            chaos = Chaos(swarm, session, rng)
            try:
                ours = generate(model, random.Random(f"calls {seed}"), seed, session=session)
            finally:
                swarm.run(chaos.stop())
            for mine, other in zip(ours, theirs, strict=True):
                assert torch.equal(mine, other), chaos.log
        swarm.run(asyncio.sleep(SETTLE_S))
        assert leftovers(swarm, model, chaos.living) == [], chaos.log
