"""Key pairs: the file, the peer id that libp2p makes of it, and signatures that only its owner can make."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import base58
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petal_swarm.errors import ConfigError
from petal_swarm.net.identity import Identity, verify

same_every_time = settings(deadline=None, derandomize=True, max_examples=50)
PREFIX = b"\x08\x01\x12\x40"


@pytest.fixture
def identity() -> Identity:
    return Identity.from_seed(bytes(range(32)))


def test_the_file_is_made_once_and_read_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "identity"
    first = Identity.load_or_create(path)
    assert Identity.load_or_create(str(path)).peer_id == first.peer_id
    assert path.read_bytes() == first.private_key_protobuf()
    assert Identity.generate().peer_id != first.peer_id


def test_only_the_owner_can_read_the_file(tmp_path: Path, identity: Identity) -> None:
    old = os.umask(0)
    try:
        Identity.load_or_create(tmp_path / "made")
        identity.save(tmp_path / "saved")
    finally:
        os.umask(old)
    for name in ("made", "saved"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_a_file_is_never_written_over(tmp_path: Path, identity: Identity) -> None:
    path = tmp_path / "identity"
    identity.save(path)
    with pytest.raises(FileExistsError):
        Identity.generate().save(path)
    assert path.read_bytes() == identity.private_key_protobuf()


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Identity.load_or_create("~/identity")
    assert (tmp_path / "identity").exists()


def test_the_peer_id_is_that_of_the_specification() -> None:
    """The test vector of libp2p's "Peer Ids and Keys"."""
    key = bytes.fromhex(
        "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
        "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
    )
    identity = Identity.from_protobuf(key)
    public = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    assert base58.b58decode(identity.peer_id) == b"\x00\x24\x08\x01\x12\x20" + public
    assert identity.peer_id.startswith("12D3KooW")
    assert identity.private_key_protobuf() == key


def test_a_damaged_file_is_refused(tmp_path: Path, identity: Identity) -> None:
    good = identity.private_key_protobuf()
    path = tmp_path / "identity"
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ConfigError, match=str(path)):
            Identity.load_or_create(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        PREFIX,
        PREFIX + bytes(63),
        PREFIX + bytes(65),
        b"\x08\x00\x12\x40" + bytes(64),
        b"\x08\x02\x12\x20" + bytes(32),
        b"-----BEGIN PRIVATE KEY-----\n",
    ],
    ids=repr,
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a libp2p Ed25519 private key"):
        Identity.load_or_create(path)
    assert path.read_bytes() == content


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot use the identity file"):
        Identity.load_or_create(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot use the identity file"):
        Identity.load_or_create(tmp_path / "file" / "identity")


@same_every_time
@given(seed=st.binary(min_size=32, max_size=32), data=st.binary(max_size=50))
def test_signatures(seed: bytes, data: bytes) -> None:
    identity = Identity.from_seed(seed)
    again = Identity.from_protobuf(identity.private_key_protobuf())
    assert again.peer_id == identity.peer_id
    signature = again.sign(data)
    assert len(signature) == 64
    assert verify(identity.peer_id, data, signature)
    assert not verify(identity.peer_id, data + b"\0", signature)
    assert not verify(Identity.from_seed(bytes(31) + b"\x01").peer_id, data, signature)


@same_every_time
@given(place=st.integers(0, 63), bit=st.integers(0, 7))
def test_a_changed_signature(place: int, bit: int) -> None:
    identity = Identity.from_seed(bytes(32))
    signature = bytearray(identity.sign(b"data"))
    signature[place] ^= 1 << bit
    assert not verify(identity.peer_id, b"data", bytes(signature))


@same_every_time
@given(peer_id=st.text(max_size=60), signature=st.binary(max_size=70))
def test_noise_is_no_signature(peer_id: str, signature: bytes) -> None:
    assert not verify(peer_id, b"data", signature)
    assert not verify(Identity.from_seed(bytes(32)).peer_id, b"data", signature)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00\x24\x08\x01\x12\x20" + bytes(31),
        b"\x00\x24\x08\x01\x12\x20" + bytes(33),
        b"\x00\x24\x08\x02\x12\x20" + bytes(32),
        b"\x12\x20" + bytes(32),
        b"\x00\x24\x08\x01\x12\x20" + b"\xff" * 32,
    ],
    ids=repr,
)
def test_peer_ids_of_other_kinds(raw: bytes, identity: Identity) -> None:
    """RSA ids hold a hash, the rest is damaged: none can be checked, so none is believed."""
    assert not verify(base58.b58encode(raw).decode(), b"data", identity.sign(b"data"))


@pytest.mark.parametrize("peer_id", ["0OIl", "12D3KooW\0", "12D3KooWé", "\ud800", "Qm" + "1" * 5000])
def test_peer_ids_that_are_no_base58(peer_id: str, identity: Identity) -> None:
    assert not verify(peer_id, b"data", identity.sign(b"data"))


@pytest.mark.parametrize(
    "spelling",
    ["{}\n", "{} ", "\t{}", "1{}", "{}1"],
)
def test_an_id_has_one_spelling(spelling: str, identity: Identity) -> None:
    """Or else one key is several peers to whoever compares ids as text."""
    signature = identity.sign(b"data")
    assert verify(identity.peer_id, b"data", signature)
    assert not verify(spelling.format(identity.peer_id), b"data", signature)
