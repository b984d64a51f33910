"""Servers as child processes of this program, none of which outlives it."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from petal_swarm.errors import DeadlineError, SwarmError
from petal_swarm.span import Span

STOP_S = 5.0
START_S = 300.0
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
KV_TOKENS = 4096
TETHERED = (sys.executable, "-m", "petal_swarm.cli.tethered")
COMMAND = (*TETHERED, "run-server")


def split_evenly(num_blocks: int, parts: int) -> list[Span]:
    """Spans of nearly equal length that cover the model; fewer than `parts` if it has fewer blocks."""
    parts = min(parts, num_blocks)
    ends = [num_blocks * part // parts for part in range(parts + 1)]
    return [Span(start, end) for start, end in itertools.pairwise(ends)]


def server_arguments(
    model: str, span: Span, *, name: str, threads: int, address: str | None = None
) -> list[str]:
    """The command line of a server that nobody outside this machine can reach; of a new swarm's first one
    without `address`.
    """
    return [
        model,
        *(["--initial-peers", address] if address else ["--new-swarm"]),
        *("--name", name),
        *("--blocks", str(span)),
        *("--listen", LOOPBACK),
        *("--threads", str(threads)),
        *("--kv-tokens", str(KV_TOKENS)),
        *("--drain-timeout", "2"),
    ]


class ServerProcess:
    """A `run_server` process in a process group of its own, with its libp2p daemon."""

    def __init__(self, name: str, arguments: Sequence[str], *, command: Sequence[str] = COMMAND) -> None:
        self.name = name
        self.address: Future[str] = Future()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `kill`
        self._process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"{name} output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def terminate(self) -> None:
        """Ask it to leave."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def wait(self, timeout_s: float) -> int:
        """The exit status.

        Raises:
            DeadlineError: it is still running.
        """
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise DeadlineError(f"{self.name} did not end within {timeout_s:g} s") from None

    def kill(self, *, after_s: float) -> None:
        """Wait for its end, at most `after_s`; then nothing of it is left, its daemon neither."""
        with contextlib.suppress(DeadlineError):
            self.wait(after_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            words = line.decode(errors="replace").split()
            if len(words) == 2 and words[0] == "ready" and not self.address.done():
                self.address.set_result(words[1])
        if not self.address.done():
            self.address.set_exception(SwarmError(f"{self.name} did not start: {self._last_words()}"))

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        if lines:
            return lines[-1].removeprefix("error: ")
        return f"it ended with status {self._process.wait()} and said nothing"


class LocalSwarm:
    """Servers that live as long as a `with` block. Tests give another `command` than `run_server`."""

    def __init__(self, *, command: Sequence[str] = COMMAND, stop_s: float = STOP_S) -> None:
        self._command = command
        self._stop_s = stop_s
        self._servers: list[ServerProcess] = []

    def start(self, name: str, arguments: Sequence[str]) -> ServerProcess:
        server = ServerProcess(name, arguments, command=self._command)
        self._servers.append(server)
        return server

    @property
    def addresses(self) -> list[str]:
        """Of the servers that serve: the `initial_peers` of clients."""
        return [server.address.result() for server in self._servers if server.address.done()]

    def close(self) -> None:
        """End all servers: politely at first, for good after `stop_s`."""
        with _undisturbed():
            for server in self._servers:
                server.terminate()
            deadline_s = time.monotonic() + self._stop_s
            for server in self._servers:
                server.kill(after_s=max(0.0, deadline_s - time.monotonic()))
            self._servers.clear()

    def __enter__(self) -> LocalSwarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_ready(
    servers: Sequence[ServerProcess], *, timeout_s: float, on_ready: Callable[[ServerProcess], None]
) -> None:
    """Wait until all servers serve, and tell of each as it does.

    Raises:
        SwarmError: a server has ended instead.
        DeadlineError: it took longer than `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    waiting = {server.address: server for server in servers}
    while waiting:
        done, _ = wait(waiting, max(0.0, deadline_s - time.monotonic()), return_when=FIRST_COMPLETED)
        if not done:
            names = ", ".join(server.name for server in waiting.values())
            raise DeadlineError(f"{names} did not start within {timeout_s:g} s")
        for address in done:
            address.result()
            on_ready(waiting.pop(address))


def serve_locally(
    model: str,
    *,
    servers: int = 2,
    threads: int = 1,
    timeout_s: float = START_S,
    tell: Callable[[str], object] = print,
    command: Sequence[str] = COMMAND,
) -> LocalSwarm:
    """A swarm of its own on this machine, for trying things out: each server has an equal part of the blocks.

    It ends with `close`, as a context manager, or with this program. `tell` is called with a line for each
    server that serves.

    Raises:
        UnknownModelError, UnsupportedArchitectureError, CheckpointError: the model cannot be read.
        SwarmError, DeadlineError: a server did not start.
    """
    from petal_swarm.models.checkpoint import open_checkpoint

    spans = split_evenly(open_checkpoint(model).config.num_blocks, servers)
    swarm = LocalSwarm(command=command)
    named = {f"local-{number}": span for number, span in enumerate(spans, 1)}

    def on_ready(server: ServerProcess) -> None:
        tell(f"{server.name} serves blocks {named[server.name]}")

    def start(names: Sequence[str], address: str | None) -> None:
        started = [
            swarm.start(
                name, server_arguments(model, named[name], name=name, threads=threads, address=address)
            )
            for name in names
        ]
        wait_ready(started, timeout_s=timeout_s, on_ready=on_ready)

    try:
        first, *others = named
        start([first], None)
        start(others, swarm.addresses[0])
    except BaseException:
        swarm.close()
        raise
    return swarm


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind this program as Ctrl-C does, so that its servers are ended as well."""

    def on_signal(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    earlier = {name: signal.signal(getattr(signal, name), on_signal) for name in names}
    try:
        yield
    finally:
        for name, handler in earlier.items():
            signal.signal(getattr(signal, name), handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No signal cuts the cleaning up short; it is bounded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    earlier = {name: signal.signal(getattr(signal, name), signal.SIG_IGN) for name in names}
    try:
        yield
    finally:
        for name, handler in earlier.items():
            signal.signal(getattr(signal, name), handler)
