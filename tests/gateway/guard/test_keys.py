"""The file of keys."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest

from petal_swarm.errors import ConfigError
from petal_swarm.gateway.guard.config import Limits
from petal_swarm.gateway.guard.keys import KeyRing

ALICE = "sk-alice-0123456789abcdef"
BOB = "sk-bob-0123456789abcdef01"
OTHERS = Limits(requests_per_min=10, tokens_per_min=100, max_requests=3)


def ring(folder: Path, text: str) -> KeyRing:
    path = folder / "keys"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return KeyRing(path, OTHERS)


def test_keys_have_names_and_limits(tmp_path: Path) -> None:
    hashed = hashlib.sha256(BOB.encode()).hexdigest()
    keys = ring(tmp_path, f"# ours\n\n{ALICE} alice 100 5000  # a friend\nsha256:{hashed} bob - 7\n")
    alice, bob = keys.find(ALICE.encode()), keys.find(BOB.encode())
    assert alice is not None
    assert bob is not None
    assert (alice.name, alice.limits) == (
        "alice",
        Limits(requests_per_min=100, tokens_per_min=5000, max_requests=3),
    )
    assert (bob.name, bob.limits) == ("bob", Limits(requests_per_min=10, tokens_per_min=7, max_requests=3))
    assert len(keys) == 2


def test_a_key_without_a_name_gets_one_that_says_nothing_of_it(tmp_path: Path) -> None:
    key = ring(tmp_path, ALICE).find(ALICE.encode())
    assert key is not None
    assert key.name.startswith("key-")
    assert key.name[4:] not in ALICE
    assert key.limits == OTHERS


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"sk",
        ALICE[:-1].encode(),
        ALICE.encode() + b"x",
        ALICE.upper().encode(),
        b"\xff" * 40,
        b"a" * 10**6,
    ],
)
def test_others_are_nobody(tmp_path: Path, wrong: bytes) -> None:
    keys = ring(tmp_path, f"{ALICE}\nsha256:{hashlib.sha256(BOB.encode()).hexdigest()}")
    assert keys.find(wrong) is None
    assert keys.find(hashlib.sha256(BOB.encode()).hexdigest().encode()) is None  # the hash is not the key


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("short", "16 to 512"),
        ("k" * 513, "16 to 512"),
        ("schlüssel-schlüssel", "ASCII"),
        ("sha256:12", "sha256: needs 64 hexadecimal digits"),
        ("sha256:" + "z" * 64, "sha256: needs 64 hexadecimal digits"),
        (f"{ALICE} a/b", "a name has"),
        (f"{ALICE} alice many", "a limit is a number"),
        (f"{ALICE} alice 0", "above 0"),
        (f"{ALICE} alice 1 2 3", "at most a key"),
        (f"{ALICE} alice 1\n{BOB} alice 2", "other limits"),
    ],
)
def test_a_bad_line_is_named_and_not_shown(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        ring(tmp_path, line)
    assert "line " in str(caught.value)
    assert line.split()[0] not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none: no such file or directory$"):
        KeyRing(tmp_path / "none", OTHERS)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no UTF-8 text"):
        KeyRing(tmp_path / "bytes", OTHERS)


def test_a_file_without_keys_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 keys"):
        ring(tmp_path, "# none yet\n")
    with pytest.raises(ConfigError, match="cannot read"):
        KeyRing(tmp_path / "nowhere", OTHERS)


def test_reading_again_takes_what_is_there_and_keeps_the_old_if_it_is_broken(tmp_path: Path) -> None:
    keys = ring(tmp_path, ALICE)
    path = tmp_path / "keys"
    path.write_text(f"{BOB} bob\n")
    keys.reload()
    assert keys.find(ALICE.encode()) is None
    assert keys.find(BOB.encode()) is not None
    path.write_text("short\n")
    with pytest.raises(ConfigError):
        keys.reload()
    assert keys.find(BOB.encode()) is not None


def test_a_file_that_others_can_read_is_complained_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ring(tmp_path, ALICE)
    assert not caplog.records
    (tmp_path / "keys").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        keys.reload()
    assert "chmod 600" in caplog.text
    assert ALICE not in caplog.text
