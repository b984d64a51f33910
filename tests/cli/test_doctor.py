"""What the doctor says of facts, without a network; the whole of it is in tests/loopback."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from petal_swarm.cli import checkup
from petal_swarm.cli.checkup import (
    UPLOADS_TRIED,
    Check,
    clock,
    daemon_failed,
    disk,
    hardware,
    reachability,
    software,
    upload,
)
from petal_swarm.cli.doctor import show_check
from petal_swarm.cli.main import main
from petal_swarm.directory.reachability import Sighting, judge
from petal_swarm.errors import ConfigError, NetworkError
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.net.relay import Candidate
from petal_swarm.server.config import ServerConfig
from tests.checkpoints import save_bloom

HOME = "/ip4/192.168.1.2/tcp/31330"


def config(**fields: Any) -> ServerConfig:
    return ServerConfig(**{"model": "", "new_swarm": True, "device": "cpu", **fields})


def test_software(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Python 3" in software().text
    monkeypatch.setattr(checkup, "_version", lambda package: None if package == "hivemind" else "1")
    check = software()
    assert (check.state, "hivemind is missing" in check.text) == ("problem", True)
    assert "pip install hivemind" in check.advice


def test_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware(config(), None).text.startswith("CPU, ")
    checkpoint = open_checkpoint(str(save_bloom(tmp_path / "tiny", blocks=2, hidden=32)))
    assert hardware(config(), checkpoint).text.endswith(f"2 of 2 blocks of {checkpoint.name} fit")
    monkeypatch.setattr("petal_swarm.server.loader.free_bytes", lambda device: 1000)
    full = hardware(config(), checkpoint)
    assert full.state == "problem"
    assert "are free on cpu" in full.text


def test_disk() -> None:
    assert disk(Path("/x"), 500 << 30) == Check("disk", "ok", "500 GiB free for /x")
    little = disk(Path("/x"), 1 << 30)
    assert (little.state, "--cache-dir" in little.advice) == ("warning", True)


@pytest.mark.parametrize(
    ("rates", "state", "text"),
    [
        ([None, 5e6], "ok", "40 Mbit/s to ..number-1"),
        ([1e5], "warning", "0.8 Mbit/s to ..number-0"),
        ([None] * 300, "warning", "nobody could tell how fast it is"),
    ],
)
def test_upload(rates: list[float | None], state: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the first that tells; few are asked, each of which may take a minute to be silent."""
    asked = []

    async def measure(transport: Any, peer_id: str, addresses: Any) -> float:
        asked.append(peer_id)
        rate = rates[len(asked) - 1]
        if rate is None:
            raise NetworkError("ended the stream")
        return rate

    monkeypatch.setattr(checkup, "measure_upload", measure)
    helpers = [Candidate(f"peer-number-{place}", ()) for place in range(len(rates))]
    check = asyncio.run(upload(cast(Any, None), helpers))
    assert (check.state, check.text) == (state, text)
    assert len(asked) == min(len(rates), UPLOADS_TRIED)


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert checkup._free_bytes(tmp_path / "a" / "b") > 0


@pytest.mark.parametrize(
    ("ahead_s", "state", "text"),
    [
        (None, "warning", "nobody told the time"),
        (0.4, "ok", "agrees"),
        (-1.9, "ok", "agrees"),
        (3600.0, "problem", "3,600 s behind the swarm's"),
        (-7.0, "problem", "7 s ahead of the swarm's"),
    ],
)
def test_clock(ahead_s: float | None, state: str, text: str) -> None:
    check = clock(ahead_s)
    assert check.state == state
    assert text in check.text


def test_reachability() -> None:
    seen = Sighting("helper", "8.8.8.8", (31330,))
    verdict = judge([seen], [HOME])
    check = reachability(verdict, "peer X will not relay")
    assert check.state == "problem"
    assert check.text.endswith("(relays: peer X will not relay)")
    verdict = judge([Sighting("helper", "8.8.8.8", (31330,), (31330,))], [HOME])
    assert reachability(verdict, "peer X will not relay") == Check(
        "reachability", "ok", "others can reach this machine directly, at 8.8.8.8:31330"
    )


def test_a_daemon_that_does_not_start() -> None:
    check = daemon_failed(ConfigError("no"), config(listen=("/ip4/0.0.0.0/tcp/31330",)))
    assert "already, on /ip4/0.0.0.0/tcp/31330" in check.advice
    assert daemon_failed(ConfigError("no"), config()).advice == ""


def test_a_line_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    show_check(Check("clock", "problem", "wrong\x1b[2J", "set it"))
    assert capsys.readouterr().out == "BAD  clock: wrong?[2J\n     -> set it\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--initial-peers", "nonsense"],
        ["--reachability", "sometimes"],
        ["--reachability", "private"],
        ["--listen", "none"],
        ["no/such/model/anywhere"],
    ],
)
def test_arguments_that_cannot_be_used(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: object = main(["doctor", *arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert capsys.readouterr().err.startswith("error: ")
