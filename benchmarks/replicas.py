"""A swarm of real server processes, each span served twice, to be killed, stopped and restarted."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.harness import RunningServer, start_server
from petal_swarm.client.session import InferenceSession


class Replicas:
    """`copies` servers for each of `spans`; one that was killed is replaced by `restore`."""

    def __init__(self, model: Path, spans: Sequence[str], *options: str, copies: int = 2) -> None:
        self._model = model
        self._options = options
        self._servers: dict[str, tuple[RunningServer, str]] = {}
        self._starting: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(2)
        self._lock = threading.Lock()
        for span in [*spans] * copies:
            self._start(span)

    @property
    def addresses(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(server.address for server, _ in self._servers.values())

    def pid(self, peer_id: str) -> int:
        """The process id of a server, and of its process group."""
        return self._servers[peer_id][0].process.pid

    def kill(self, peer_id: str, *, daemon: bool = True) -> None:
        """`kill -9` for a server, with its libp2p daemon or without, and begin to start another one."""
        with self._lock:
            server, span = self._servers.pop(peer_id)
        (os.killpg if daemon else os.kill)(server.process.pid, signal.SIGKILL)
        server.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGCONT)
        self._starting.append(self._pool.submit(self._start, span))

    def leave(self, peer_id: str) -> Future[int]:
        """SIGTERM; the future is of the exit status. Nobody is started instead."""
        with self._lock:
            server, _ = self._servers.pop(peer_id)
        server.process.send_signal(signal.SIGTERM)
        return self._pool.submit(server.process.wait)

    def restore(self) -> None:
        """Wait until all that were killed are replaced."""
        starting, self._starting = self._starting, []
        for future in starting:
            future.result()

    def close(self) -> None:
        with contextlib.suppress(SystemExit):
            self.restore()
        self._pool.shutdown()
        for server, _ in self._servers.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()

    def _start(self, span: str) -> None:
        server = start_server(self._model, span, self.addresses, *self._options)
        with self._lock:
            self._servers[server.address.rpartition("/")[2]] = (server, span)


@contextlib.contextmanager
def replicas(model: Path, spans: Sequence[str], *options: str, copies: int = 2) -> Iterator[Replicas]:
    """A swarm that ends with the `with` block."""
    swarm = Replicas(model, spans, *options, copies=copies)
    try:
        yield swarm
    finally:
        swarm.close()


class Trigger:
    """A streamer that does something once, after so many tokens and so many seconds more."""

    def __init__(
        self, session: InferenceSession, token: int, delay_s: float, act: Callable[[], None]
    ) -> None:
        self._session = session
        self._left = token
        self._delay_s = delay_s
        self._act = act
        self.thread: threading.Thread | None = None

    def put(self, _: torch.Tensor) -> None:
        """Called with the prompt, and then for each token."""
        if self._left == 0:
            self.thread = threading.Thread(target=self._run)
            self.thread.start()
        self._left -= 1

    def end(self) -> None:
        if self.thread is not None:
            self.thread.join()

    def _run(self) -> None:
        waited = threading.Event()
        while self._session.route is None:
            waited.wait(0.0005)
        waited.wait(self._delay_s)
        self._act()
