"""Clients that generate while servers are killed, stopped, cut off, slowed, told to leave, and replaced.

python -m benchmarks.soak [--minutes 20] [--clients 8] [--processes 2] [--seed 0] [--every 4] [--events]

Real processes on loopback. Each span is served by one server that stays and by `--copies` less one that do
not; every server is reached through a TCP proxy that can cut, slow and break its connections. Clients are
threads of this process over p2pd, `--processes` of them processes of their own over py-libp2p. Every
finished generation is compared with transformers'. Memory and file descriptors are those of this process,
of the client processes and of the servers that stay, with their daemons.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from benchmarks.churn import Churn, EventLog, Swarm
from benchmarks.harness import checkpoint, reference, workspace
from benchmarks.soak_client import Client, Outcome, connect

SAMPLE_S = 5.0
#: Memory and descriptors are compared from here on: caches fill first.
WARM_S = 120.0
SHOWN_FAILURES = 20
SHOWN_EVENTS = 80
#: A generation of usually one second that takes so long is noted among the events.
SLOW_S = 8.0


@dataclass
class Watched:
    """One process that lives all the time, with the daemons that it has started."""

    name: str
    process: psutil.Process
    #: Seconds, bytes of memory and file descriptors, of the process and of its daemons.
    samples: list[tuple[float, int, int, int, int]] = field(default_factory=list)

    def sample(self, now_s: float) -> None:
        try:
            own = self.process.memory_info().rss, self.process.num_fds()
            daemons = [child for child in self.process.children() if "p2pd" in child.name()]
            memory = sum(child.memory_info().rss for child in daemons)
            descriptors = sum(child.num_fds() for child in daemons)
        except psutil.NoSuchProcess:
            return
        self.samples.append((now_s, *own, memory, descriptors))

    def rows(self, warm_s: float) -> list[str]:
        """Memory and descriptors when warm and at the end, and what a minute adds."""
        warm = [sample for sample in self.samples if sample[0] >= warm_s] or self.samples[-2:]
        if len(warm) < 2:
            return []
        lines = []
        for part, memory, descriptors in (("", 1, 2), (" daemon", 3, 4)):
            if not any(sample[descriptors] for sample in warm):
                continue
            slope = _slope([s[0] for s in warm], [s[memory] for s in warm]) * 60 / 1e6
            fds = _slope([s[0] for s in warm], [s[descriptors] for s in warm]) * 60
            first, last = _ends(warm, memory), _ends(warm, descriptors)
            lines.append(
                f"{self.name + part:24} {first[0] / 1e6:8.1f} {first[1] / 1e6:8.1f} {slope:+9.3f}"
                f" {last[0]:8.0f} {last[1]:8.0f} {fds:+9.3f}"
            )
        return lines


class ClientNotes(logging.Handler):
    """Puts what the clients of this process say of their repairs among the events."""

    def __init__(self, log: EventLog) -> None:
        super().__init__(logging.INFO)
        self._events = log

    def emit(self, record: logging.LogRecord) -> None:
        self._events.note(f"{record.threadName}: {record.getMessage()}")


class Tally:
    """What became of all generations; failures are told at once, with what came before."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._lock = threading.Lock()
        self.outcomes: list[Outcome] = []

    def tell(self, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes.append(outcome)
            failed = sum(not each.exact for each in self.outcomes)
        if not outcome.exact and failed <= SHOWN_FAILURES:
            began_s, ended_s = (t - self._log.started_s for t in (outcome.began_s, outcome.ended_s))
            print(
                f"FAILED {outcome.kind}, {outcome.prompt} tokens, {began_s:.2f} to {ended_s:.2f} s,"
                f" {outcome.repairs} repairs: {outcome.failure}"
            )
            for event in self._log.since(outcome.began_s)[:SHOWN_EVENTS]:
                print(f"    {event}", flush=True)
        elif outcome.ended_s - outcome.began_s > SLOW_S:
            self._log.note(
                f"{outcome.kind} took {outcome.ended_s - outcome.began_s:.1f} s, {outcome.repairs} repairs"
            )

    def show(self, minutes: float) -> None:
        done = [outcome for outcome in self.outcomes if outcome.new]
        exact = sum(outcome.exact for outcome in self.outcomes)
        reasons = collections.Counter(o.failure.partition(":")[0] for o in self.outcomes if not o.new)
        print(
            f"{len(self.outcomes)} generations in {minutes:.1f} minutes: {len(done)} finished, {exact} exact"
        )
        print(f"{len(done) - exact} with other tokens, {sum(reasons.values())} failed: {dict(reasons)}")
        for kind in sorted({outcome.kind for outcome in self.outcomes}):
            of_kind = [outcome for outcome in self.outcomes if outcome.kind == kind]
            good = [outcome for outcome in of_kind if outcome.exact]
            took = [outcome.ended_s - outcome.began_s for outcome in good] or [0.0]
            repairs = sum(outcome.repairs for outcome in of_kind)
            print(
                f"  {kind:8} {len(of_kind):6}, exact {len(good):6}, repairs {repairs:5},"
                f" median {statistics.median(took):.2f} s, worst {max(took):.2f} s"
            )


class Processes:
    """Clients in processes of their own."""

    def __init__(self, path: Path, swarm: Swarm, seconds: float, seeds: Sequence[int], tally: Tally) -> None:
        self.running = []
        self._readers = []
        for seed in seeds:
            command = [sys.executable, "-m", "benchmarks.soak_client", str(path), str(seconds), str(seed)]
            process = subprocess.Popen(
                [*command, "libp2p", *swarm.addresses], stdout=subprocess.PIPE, text=True
            )
            self.running.append(process)
            reader = threading.Thread(target=self._read, args=(process, tally))
            reader.start()
            self._readers.append(reader)

    def _read(self, process: subprocess.Popen[str], tally: Tally) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            tally.tell(Outcome(**json.loads(line)))

    def join(self, timeout_s: float) -> list[int]:
        """Their exit statuses; who does not end is killed."""
        for reader in self._readers:
            reader.join(timeout_s)
        for process in self.running:
            if process.poll() is None:
                process.kill()
        return [process.wait() for process in self.running]


def soak(arguments: argparse.Namespace, folder: Path) -> bool:
    """Run it all; whether every generation was exact."""
    path = checkpoint("tiny", folder)
    log = EventLog(shown=arguments.events)
    tally = Tally(log)
    clients_say = logging.getLogger("petal_swarm.client")
    clients_say.setLevel(logging.INFO)
    clients_say.addHandler(ClientNotes(log))
    swarm = Swarm(path, log, copies=arguments.copies)
    local = reference(path)
    ended = threading.Event()
    seconds = arguments.minutes * 60
    seeds = [1000 * arguments.seed + number for number in range(arguments.clients)]
    try:
        models = [connect(path, swarm.addresses) for _ in seeds[arguments.processes :]]
        clients = [
            Client(model, local, seed, tally.tell)
            for model, seed in zip(models, seeds[arguments.processes :], strict=True)
        ]
        others = Processes(path, swarm, seconds, seeds[: arguments.processes], tally)
        watched = [Watched("clients (threads)", psutil.Process())]
        watched += [Watched("client (libp2p)", psutil.Process(each.pid)) for each in others.running]
        staying = [Watched(f"server {m.span}", psutil.Process(m.pid)) for m in swarm.members(stay=True)]
        watched += staying
        threads = [
            threading.Thread(target=client.run, args=(ended,), name=f"client {number}")
            for number, client in enumerate(clients)
        ]
        for thread in threads:
            thread.start()

        def used() -> set[str]:
            return set().union(*(client.peers for client in clients))

        churn = Churn(swarm, arguments.seed, arguments.every, used)
        started_s = time.monotonic()
        for tick in itertools.count(1):
            now_s = time.monotonic() - started_s
            if now_s >= seconds:
                break
            for each in watched:
                each.sample(now_s)
            if tick % 12 == 0:
                exact = sum(outcome.exact for outcome in tally.outcomes)
                print(f"{now_s / 60:5.1f} minutes: {exact} of {len(tally.outcomes)} exact", flush=True)
            time.sleep(SAMPLE_S)
        ended.set()
        for thread in threads:
            thread.join(120)
        churn.stop()
        statuses = others.join(120)
        tally.show(arguments.minutes)
        print(f"disturbed {sum(churn.counts.values())} times: {churn.counts}")
        if any(statuses):
            print(f"client processes ended with {statuses}")
        _show_growth(watched, min(WARM_S, seconds / 3))
        for model in models:
            model.close()
        _show_settled(staying, arguments.settle)
        stuck = [thread for thread in threads if thread.is_alive()]
        if stuck:
            print(f"{len(stuck)} clients hang")
        return (
            bool(tally.outcomes) and all(o.exact for o in tally.outcomes) and not stuck and not any(statuses)
        )
    finally:
        ended.set()
        swarm.close()


def _show_growth(watched: Sequence[Watched], warm_s: float) -> None:
    print(f"{'':24} MB at {warm_s:2.0f} s   at end  a minute   fds at   at end  a minute")
    for each in watched:
        print("\n".join(each.rows(warm_s)))


def _show_settled(watched: Sequence[Watched], settle_s: float) -> None:
    """What servers hold on to when all clients have left, against what they held before the first came."""
    time.sleep(settle_s)
    print(f"{settle_s:.0f} s after the clients left  fds then    before  daemon then    before")
    for each in watched:
        each.sample(0.0)
        _, _, own, _, of_daemons = each.samples[-1]
        _, _, own_before, _, before = each.samples[0]
        print(f"{each.name:26} {own:9} {own_before:9} {of_daemons:12} {before:9}")


def _ends(samples: Sequence[tuple[float, ...]], column: int) -> tuple[float, float]:
    """Medians of a few samples at the beginning and at the end."""
    few = max(1, min(6, len(samples) // 2))
    return (
        statistics.median(sample[column] for sample in samples[:few]),
        statistics.median(sample[column] for sample in samples[-few:]),
    )


def _slope(seconds: Sequence[float], values: Sequence[float]) -> float:
    return statistics.linear_regression(seconds, values).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2, help="how many of them are processes over libp2p")
    parser.add_argument("--copies", type=int, default=3, help="servers of each span, one of which stays")
    parser.add_argument("--every", type=float, default=4.0, help="mean seconds between two disturbances")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settle", type=float, default=90.0, help="seconds from the last client to the end")
    parser.add_argument("--events", action="store_true", help="print what is done to the swarm")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with workspace() as folder:
        good = soak(arguments, folder)
    sys.stdout.flush()
    # A client that hangs must not keep this process.
    os._exit(0 if good else 1)


if __name__ == "__main__":
    main()
