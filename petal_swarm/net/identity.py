"""A peer's key pair. Its peer id is made from the public key, so whoever can sign for an id owns it.

Keys are Ed25519 in libp2p's formats (specs: libp2p "Peer Ids and Keys"): the private key as the
protobuf `PrivateKey{type, data}`, the peer id as base58 of the identity multihash of the protobuf
`PublicKey{type, data}`. Both protobufs are a fixed prefix and 32 or 64 bytes, so no protobuf library
is needed, and none can clash.
"""

from __future__ import annotations

import os
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from petal_swarm.errors import ConfigError

_PRIVATE_PREFIX = b"\x08\x01\x12\x40"
_PEER_ID_PREFIX = b"\x00\x24\x08\x01\x12\x20"


class Identity:
    """An Ed25519 key pair with its peer id."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer_id = base58.b58encode(_PEER_ID_PREFIX + key.public_key().public_bytes_raw()).decode()

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity that 32 given bytes make; for tests, which want the same peers every time."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load_or_create(cls, path: str | Path) -> Identity:
        """Read the key file, or make one that only its owner can read.

        Raises:
            ConfigError: the file is not a libp2p Ed25519 private key, or cannot be read or written.
        """
        path = Path(path).expanduser()
        try:
            if path.exists():
                return cls.from_protobuf(path.read_bytes(), source=str(path))
            identity = cls.generate()
            path.parent.mkdir(parents=True, exist_ok=True)
            identity.save(path)
            return identity
        except OSError as error:
            raise ConfigError(f"cannot use the identity file {path}: {error.strerror}") from error

    @classmethod
    def from_protobuf(cls, data: bytes, *, source: str = "the key") -> Identity:
        """Read libp2p's `PrivateKey` protobuf.

        Raises:
            ConfigError: it is damaged, or of another key type.
        """
        if len(data) != len(_PRIVATE_PREFIX) + 64 or not data.startswith(_PRIVATE_PREFIX):
            raise ConfigError(
                f"{source} is not a libp2p Ed25519 private key; name a file that does not exist to make one"
            )
        seed, public = data[4:36], data[36:]
        key = Ed25519PrivateKey.from_private_bytes(seed)
        if key.public_key().public_bytes_raw() != public:
            raise ConfigError(f"{source} is damaged: its two halves do not belong together")
        return cls(key)

    def private_key_protobuf(self) -> bytes:
        return _PRIVATE_PREFIX + self._key.private_bytes_raw() + self._key.public_key().public_bytes_raw()

    def save(self, path: Path) -> None:
        """Write the key file with mode 0600; never overwrites."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.private_key_protobuf())

    def sign(self, data: bytes) -> bytes:
        """A 64-byte Ed25519 signature (RFC 8032)."""
        return self._key.sign(data)


def verify(peer_id: str, data: bytes, signature: bytes) -> bool:
    """Whether `signature` over `data` was made by the key that `peer_id` is made from.

    False also for ids of other key types, which cannot be checked without the key itself.
    """
    try:
        decoded = base58.b58decode(peer_id)
    except ValueError:
        return False
    if base58.b58encode(decoded).decode() != peer_id:
        return False  # another spelling of an id would be another peer to whoever compares text
    if len(decoded) != len(_PEER_ID_PREFIX) + 32 or not decoded.startswith(_PEER_ID_PREFIX):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(decoded[len(_PEER_ID_PREFIX) :]).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
