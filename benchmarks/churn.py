"""A swarm of real processes whose servers come and go; each span has one server that stays."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RunningServer, start_server
from benchmarks.proxy import Proxy

SPANS = ("0:3", "3:5", "5:8")
#: What a server that comes in place of another serves now and then.
OTHER_SPANS = ("0:4", "4:8", "2:6")
#: Servers that stay are a little farther away, so that clients prefer the others.
STAYING_DELAY_S = 0.002
#: A daemon whose server was killed alone is given so long to notice.
ORPHAN_S = 30.0
DRAIN_S = 20.0


class EventLog:
    """What was done to the swarm, and when: to say what came before a failure."""

    def __init__(self, *, shown: bool = False, limit: int = 4096) -> None:
        self.started_s = time.monotonic()
        self._events: deque[tuple[float, str]] = deque(maxlen=limit)
        self._shown = shown

    def note(self, what: str) -> None:
        self._events.append((time.monotonic(), what))
        if self._shown:
            print(f"{self.now_s:8.2f} s  {what}", flush=True)

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.started_s

    def since(self, moment: float, *, before_s: float = 5.0) -> list[str]:
        """Events from a little before that moment of `time.monotonic` on."""
        return [
            f"{when - self.started_s:.2f} s {what}"
            for when, what in list(self._events)
            if when >= moment - before_s
        ]


@dataclass(frozen=True)
class Member:
    """A server process and the port by which others reach it."""

    running: RunningServer
    span: str
    port: int
    stays: bool

    @property
    def peer_id(self) -> str:
        return self.running.address.rpartition("/")[2]

    @property
    def pid(self) -> int:
        return self.running.process.pid


class Swarm:
    """One server of each span that stays, and `copies - 1` that may be killed, stopped or told to leave."""

    def __init__(self, model: Path, log: EventLog, *, spans: Sequence[str] = SPANS, copies: int = 3) -> None:
        self.log = log
        self._model = model
        self._proxy = Proxy()
        self._lock = threading.Lock()
        self._members: dict[str, Member] = {}
        self._pool = ThreadPoolExecutor(2)
        self._coming: list[Future[None]] = []
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._timers: list[threading.Timer] = []
        for number in range(copies):
            for span in spans:
                self._start(span, stays=number == 0)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the servers that stay."""
        return tuple(member.running.address for member in self.members(stay=True))

    def members(self, *, stay: bool) -> list[Member]:
        with self._lock:
            return [member for member in self._members.values() if member.stays == stay]

    def kill(self, member: Member, *, daemon: bool) -> None:
        """`kill -9` for the server, with its daemon or alone."""
        self.log.note(f"kill {'with daemon' if daemon else 'alone'} {_told(member)}")
        self._forget(member)
        (os.killpg if daemon else os.kill)(member.pid, signal.SIGKILL)
        member.running.process.wait()
        if not daemon:
            self._later(ORPHAN_S, self._end, member.pid)
        else:
            self._end(member.pid)

    def stop(self, member: Member, seconds: float, *, daemon: bool) -> None:
        """SIGSTOP, and after a while SIGCONT."""
        self.log.note(f"stop {'with daemon' if daemon else 'alone'} for {seconds:.1f} s {_told(member)}")
        send = os.killpg if daemon else os.kill
        send(member.pid, signal.SIGSTOP)

        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):
                send(member.pid, signal.SIGCONT)
                self.log.note(f"goes on {_told(member)}")

        self._later(seconds, go_on)

    def leave(self, member: Member) -> None:
        """SIGTERM: it drains, and leaves."""
        self.log.note(f"told to leave {_told(member)}")
        self._forget(member)
        member.running.process.send_signal(signal.SIGTERM)

        def wait() -> None:
            status = member.running.process.wait()
            self._end(member.pid)
            self.log.note(f"left with status {status} {_told(member)}")

        threading.Thread(target=wait, daemon=True).start()

    def cut(self, member: Member, seconds: float, which: float | None) -> None:
        """Nothing goes through one connection, or through any, and nobody is told."""
        what = "all connections" if which is None else "one connection"
        self.log.note(f"cut {what} for {seconds:.1f} s {_told(member)}")
        self._proxy.do("cut", member.port, seconds) if which is None else self._proxy.do(
            "cut_one", member.port, seconds, which
        )

    def reset(self, member: Member) -> None:
        """All its connections break."""
        self.log.note(f"reset connections {_told(member)}")
        self._proxy.do("reset", member.port)

    def delay(self, member: Member, delay_s: float, seconds: float) -> None:
        """Everything takes longer for a while, each way."""
        self.log.note(f"delay of {1e3 * delay_s:.0f} ms for {seconds:.1f} s {_told(member)}")
        self._proxy.do("delay", member.port, delay_s)
        usual_s = STAYING_DELAY_S if member.stays else 0.0
        self._later(seconds, self._proxy.do, "delay", member.port, usual_s)

    def come(self, span: str) -> None:
        """A new server starts, in a while."""
        self._coming.append(self._pool.submit(self._start, span, stays=False))

    @property
    def num_coming(self) -> int:
        return sum(not future.done() for future in self._coming)

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._pool.shutdown(cancel_futures=True)
        for pid in list(self._processes):
            self._end(pid)
        self._proxy.close()

    def _start(self, span: str, *, stays: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            hidden = taken.getsockname()[1]
        port = self._proxy.do("add", hidden)
        if stays:
            self._proxy.do("delay", port, STAYING_DELAY_S)
        options = ["--threads", "1", "--drain-timeout", f"{DRAIN_S:g}", "--kv-tokens", "16384"]
        options += ["--announce", f"/ip4/127.0.0.1/tcp/{port}"]
        running = start_server(self._model, span, self.addresses, *options, port=hidden)
        self._processes[running.process.pid] = running.process
        member = Member(running, span, port, stays)
        with self._lock:
            self._members[member.peer_id] = member
        self.log.note(f"serves {_told(member)}")

    def _forget(self, member: Member) -> None:
        with self._lock:
            self._members.pop(member.peer_id, None)

    def _later(self, seconds: float, act: Callable[..., object], *arguments: Any) -> None:
        self._timers = [timer for timer in self._timers if timer.is_alive()]
        timer = threading.Timer(seconds, act, arguments)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def _end(self, pid: int) -> None:
        """Nothing stays of a server and its daemon."""
        process = self._processes.pop(pid, None)
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


class Churn:
    """Does things to a swarm at random, in an order that follows from the seed, until it is stopped.

    `used` tells the peers on the clients' routes, which are disturbed more often than others.
    """

    def __init__(self, swarm: Swarm, seed: int, every_s: float, used: Callable[[], Collection[str]]) -> None:
        self._swarm = swarm
        self._rng = random.Random(seed)
        self._every_s = every_s
        self._used = used
        self._wanted = len(swarm.members(stay=False))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="churn")
        self._thread.start()
        self.counts: dict[str, int] = {}

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        acts: Sequence[Callable[[], None]] = (
            self._kill,
            self._kill,
            self._kill,
            self._stop_and_go,
            self._stop_and_go,
            self._leave,
            self._cut,
            self._cut,
            self._reset,
            self._delay,
        )
        while not self._stopped.wait(self._every_s * self._rng.uniform(0.2, 1.8)):
            act = self._rng.choice(acts)
            act()
            missing = self._wanted - len(self._swarm.members(stay=False)) - self._swarm.num_coming
            for _ in range(missing):
                self._swarm.come(self._rng.choice(SPANS * 3 + OTHER_SPANS))

    def _victim(self, *, any_may: bool = False) -> Member | None:
        members = self._swarm.members(stay=False) + (self._swarm.members(stay=True) if any_may else [])
        used = self._used()
        on_routes = [member for member in members if member.peer_id in used]
        return self._rng.choice(on_routes or members) if members else None

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _kill(self) -> None:
        for _ in range(self._rng.choice((1, 1, 1, 2))):
            victim = self._victim()
            if victim is not None:
                self._count("kill")
                self._swarm.kill(victim, daemon=self._rng.random() < 0.5)

    def _stop_and_go(self) -> None:
        victim = self._victim()
        if victim is not None:
            self._count("stop")
            self._swarm.stop(victim, self._rng.uniform(0.5, 10.0), daemon=self._rng.random() < 0.5)

    def _leave(self) -> None:
        victim = self._victim()
        if victim is not None:
            self._count("leave")
            self._swarm.leave(victim)

    def _cut(self) -> None:
        one = self._rng.random() < 0.6
        victim = self._victim(any_may=one)
        if victim is not None:
            self._count("cut")
            which = self._rng.random() if one else None
            self._swarm.cut(victim, self._rng.uniform(0.3, 10.0), which)

    def _reset(self) -> None:
        victim = self._victim(any_may=True)
        if victim is not None:
            self._count("reset")
            self._swarm.reset(victim)

    def _delay(self) -> None:
        victim = self._victim(any_may=True)
        if victim is not None:
            self._count("delay")
            self._swarm.delay(victim, self._rng.choice((0.005, 0.03, 0.1)), self._rng.uniform(1.0, 10.0))


def _told(member: Member) -> str:
    return f"{member.span} {member.peer_id[-6:]} (pid {member.pid}{', stays' if member.stays else ''})"
