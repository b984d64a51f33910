"""`Libp2pTransport` against a real p2pd. Each side is a process: hivemind and libp2p cannot share one."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from petal_swarm.net.identity import Identity

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PEER_START_S = 30
CLIENT_S = 30


def _start(script: str, *args: str, python: Sequence[str] = (), **options: object) -> subprocess.Popen[str]:
    # A process group of its own: the daemon is killed with the peer that started it.
    return subprocess.Popen(
        [sys.executable, *python, str(HERE / script), *args],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,  # type: ignore[call-overload]
    )


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@contextmanager
def _peer(folder: Path) -> Iterator[tuple[str, int]]:
    """A peer behind p2pd: its address and its process group."""
    identity = folder / "identity"
    Identity.generate().save(identity)
    process = _start("echo_peer.py", str(identity), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], PEER_START_S)
        assert ready, "the peer did not start"
        yield process.stdout.readline().strip(), process.pid
    finally:
        _kill(process)


def _client(scenario: str, *args: str) -> None:
    # An unclosed socket or a coroutine that was never awaited shows on stderr.
    python = () if scenario == "beside_hivemind" else ("-W", "error")
    process = _start("libp2p_client.py", scenario, *args, python=python, stderr=subprocess.PIPE)
    try:
        output, errors = process.communicate(timeout=CLIENT_S)
    finally:
        _kill(process)
    # Nothing else may be printed: py-libp2p is talkative, and so is an asyncio that has lost a task.
    assert not errors, errors
    assert (process.returncode, output) == (0, "ok\n")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with _peer(tmp_path_factory.mktemp("peer")) as (address, _):
        yield address


@pytest.mark.parametrize(
    "scenario",
    [
        "echo",
        "many",
        "unsupported",
        "unreachable",
        "misaddressed",
        "relayed",
        "ended",
        "stalled",
        "unread",
        "subscribed",
        "aborted",
        "cancelled",
        "served",
        "listening",
        "closed",
        "left",
    ],
)
def test_against_p2pd(scenario: str, address: str) -> None:
    _client(scenario, address)


@pytest.mark.parametrize("scenario", ["killed", "silent"])
def test_lost_peer_is_noticed(scenario: str, tmp_path: Path) -> None:
    with _peer(tmp_path) as (address, process_group):
        _client(scenario, address, str(process_group))


def test_hivemind_in_the_same_process_is_a_clear_error() -> None:
    _client("beside_hivemind")
