"""Key files: only whole ones, and only of those who keep them to themselves."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from petal_swarm.errors import ConfigError
from petal_swarm.net.swarm_key import Side, SwarmKey, load_swarm_key

posix = pytest.mark.skipif(os.name != "posix", reason="mode bits")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "swarm.key"
    SwarmKey(bytes(range(32))).save(path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        SwarmKey.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_back(file: Path) -> None:
    assert re.fullmatch(r"petal-swarm-key-1 [a-z2-7]{56}\n", file.read_text())
    key = SwarmKey.load(file)
    assert key.record_tag == SwarmKey(bytes(range(32))).record_tag
    assert key.fingerprint == "55acfdc5"
    assert load_swarm_key(None) is None
    assert SwarmKey.generate().fingerprint != SwarmKey.generate().fingerprint


@posix
def test_only_the_owner_can_read_what_is_written(file: Path) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_nothing_is_overwritten(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="never overwritten"):
        SwarmKey.generate().save(file)
    assert file.read_bytes() == before
    with pytest.raises(ConfigError, match="cannot write"):
        SwarmKey.generate().save(file / "below a file")


@posix
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o602, 0o610])
def test_a_file_that_others_can_touch_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    message = refusal(file)
    assert f"mode {mode:04o}" in message
    assert f"chmod 600 {file}" in message


def test_damaged_files(file: Path) -> None:
    text = file.read_text()
    letters = text.split()[1]
    swapped = letters[:30] + letters[31] + letters[30] + letters[32:]
    cases = {
        "": "is empty",
        " \n": "is empty",
        text[:-10]: "cut off",
        text.split()[0]: "cut off",
        f"{text} more": "too much",
        text.replace(letters, letters[:-1] + "1"): "damaged",
        text.replace(letters, swapped): "damaged",
        text.replace(letters, "é" * 28): "damaged",
        text.replace("key-1", "key-2"): "newer version",
        "-----BEGIN PRIVATE KEY-----": "is not a swarm key",
        "\0" * 5000: "is not a swarm key",
        text + " " * 2000: "is not a swarm key",
    }
    for content, expected in cases.items():
        file.write_text(content)
        assert expected in refusal(file), content
        assert letters[10:20] not in refusal(file)


def test_every_cut_is_noticed(file: Path) -> None:
    text = file.read_text()
    for length in range(len(text) - 1):
        file.write_text(text[:length])
        refusal(file)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "petal-swarm key new" in refusal(tmp_path / "nowhere")
    assert "not a file" in refusal(tmp_path)


def test_the_key_is_not_shown(file: Path) -> None:
    key = SwarmKey.load(file)
    assert repr(key) == f"SwarmKey({key.fingerprint})"


def test_a_proof_is_good_for_one_purpose() -> None:
    """The value is that of the text in docs/protocol.md: another implementation must come to the same."""
    key = SwarmKey(bytes(range(32)))
    proofs = [
        key.proof(Side.DIALER, "/x/1", "alice", "bob"),
        key.proof(Side.LISTENER, "/x/1", "alice", "bob"),
        key.proof(Side.DIALER, "/x/1", "bob", "alice"),
        key.proof(Side.DIALER, "/x/2", "alice", "bob"),
        key.proof(Side.DIALER, "/x/1a", "lice", "bob"),
        SwarmKey(bytes(range(1, 33))).proof(Side.DIALER, "/x/1", "alice", "bob"),
    ]
    assert len(set(proofs)) == len(proofs)
    assert {len(proof) for proof in proofs} == {32}
    assert proofs[0].hex() == "c2d4cd603b2e7f17ab8cfbd63cc81509d0541cb6dd10a623696c012c55fa3142"
