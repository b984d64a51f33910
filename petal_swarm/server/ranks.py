"""The processes of the other ranks of a server: started with it, ended with it, missed when they are gone."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from petal_swarm.engine.crew import Crew
from petal_swarm.engine.leading import LeadingStack
from petal_swarm.engine.ranks import RankSettings, TorchGroup
from petal_swarm.engine.worker import read_part
from petal_swarm.errors import ModelError
from petal_swarm.models.checkpoint import Checkpoint, Progress
from petal_swarm.models.meetings import MeetingError
from petal_swarm.models.sharding import Shard

_COMMAND = (sys.executable, "-m", "petal_swarm.engine.worker")
_END_TIMEOUT_S = 5.0


class RankProcesses:
    """Processes that load their parts as `settings` say, each for its rank and on its device.

    `on_lost` is called in another thread when one ends before it was dismissed. `folder` goes with them.
    """

    def __init__(
        self,
        settings: Sequence[RankSettings],
        on_lost: Callable[[], None],
        folder: tempfile.TemporaryDirectory[str],
    ) -> None:
        self._on_lost = on_lost
        self._folder = folder
        self._expected = False
        self._processes: list[subprocess.Popen[bytes]] = []
        #: Threads that end with their process, once `on_lost` has been called if it has to be.
        self.watchers: list[threading.Thread] = []
        try:
            for own in settings:
                process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                self._processes.append(process)
                pipe = _there(process.stdin)
                pipe.write(pickle.dumps(own))
                pipe.flush()
        except BaseException:
            self.end()
            raise

    @property
    def pipes(self) -> list[IO[bytes]]:
        """Where they take commands."""
        return [_there(process.stdin) for process in self._processes]

    def wait_loaded(self) -> None:
        """Return when they have their blocks.

        Raises:
            PetalSwarmError: one could not load them, or has ended.
        """
        for process in self._processes:
            with _there(process.stdout) as answer:
                try:
                    error = pickle.load(answer)
                except EOFError:
                    error = ModelError("a process that loads a part of the blocks has ended; see above")
            if error is not None:
                raise error

    def watch(self) -> None:
        """From now on somebody wants to know when one is gone."""
        for process in self._processes:
            watcher = threading.Thread(target=self._wait, args=[process], name="rank watcher", daemon=True)
            watcher.start()
            self.watchers.append(watcher)

    def kill(self) -> None:
        """They end, whatever they do, and are missed. Does not wait."""
        for process in self._processes:
            process.kill()

    def end(self) -> None:
        """They end, whatever they do, and nobody misses them. Idempotent."""
        self._expected = True
        self.kill()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    _there(pipe).close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_TIMEOUT_S)
        self._folder.cleanup()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        if not self._expected:
            self._on_lost()


def _there(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "processes are started with pipes"
    return pipe


def load_ranks(
    checkpoint: Checkpoint,
    settings: RankSettings,
    devices: Sequence[str],
    progress: Progress | None,
    on_lost: Callable[[], None],
) -> LeadingStack:
    """Loads the leader's part here, as `settings` say, and the others' in a process for each of `devices`.

    Raises:
        PetalSwarmError: a part cannot be loaded, or a rank has ended; no process is left.
    """
    folder = tempfile.TemporaryDirectory(prefix="petal-swarm-")  # nobody else can look into it
    settings = replace(settings, rendezvous=Path(folder.name) / "ranks")
    others = [
        replace(settings, shard=Shard(rank, settings.shard.ranks), device=device)
        for rank, device in enumerate(devices, 1)
    ]
    processes = RankProcesses(others, on_lost, folder)
    try:
        blocks = read_part(settings, checkpoint, progress)
        processes.wait_loaded()
        group = _meet(settings)
    except BaseException:
        processes.end()
        raise
    if settings.device == "cpu":  # NCCL looks into it for as long as it lives
        folder.cleanup()
    processes.watch()
    return LeadingStack(
        checkpoint.config,
        settings.span,
        blocks,
        dtype=settings.dtype,
        device=settings.device,
        crew=Crew(processes, group),
    )


def _meet(settings: RankSettings) -> TorchGroup:
    try:
        return TorchGroup(settings)
    except (RuntimeError, MeetingError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"the processes that share the blocks out do not meet: {reason}") from error
