"""The key of a private swarm: a secret of 32 bytes in a file, and what is derived from it.

Whoever has the file is a member; there are no roles, and nobody can be put out but by a new key. The key
itself is never sent, printed or logged: peers show each other proofs, HMAC-SHA-256 under the key.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from enum import Enum
from pathlib import Path

from petal_swarm.errors import ConfigError

KEY_BYTES = 32
PROOF_BYTES = 32

_LABEL = "petal-swarm-key-1"
#: So that a typo is told from the key of another swarm. 32 + 3 bytes are 56 letters without padding.
_CHECK_BYTES = 3
_TEXT_LENGTH = (KEY_BYTES + _CHECK_BYTES) * 8 // 5
_MAX_FILE_BYTES = 1024


class Side(Enum):
    """Whose proof it is: one of them must not be good for the other's."""

    DIALER = "dialer"
    LISTENER = "listener"


class SwarmKey:
    """Made by `generate` or `load`. Its `repr` tells the fingerprint only."""

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == KEY_BYTES
        self._secret = secret

    @classmethod
    def generate(cls) -> SwarmKey:
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: str | Path) -> SwarmKey:
        """Read a key file.

        Raises:
            ConfigError: it cannot be read, others than its owner can read it, or it is not a whole key.
        """
        path = Path(path).expanduser()
        try:
            # Not blocking: a pipe that nobody writes to would never open.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            try:
                _require_private(path, os.fstat(descriptor))
                data = os.read(descriptor, _MAX_FILE_BYTES + 1)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise ConfigError(
                f"there is no swarm key {path}: copy it from another machine of the swarm,"
                f" or make one: petal-swarm key new {path}"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot read the swarm key {path}: {error.strerror}") from None
        return cls(_parse(data, path))

    def save(self, path: str | Path) -> None:
        """Write the key file with mode 0600; never overwrites.

        Raises:
            ConfigError: the file exists, or cannot be written.
        """
        path = Path(path).expanduser()
        text = base64.b32encode(self._secret + _check(self._secret)).decode().lower()
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ConfigError(f"{path} exists, and is never overwritten; name another file") from None
        except OSError as error:
            raise ConfigError(f"cannot write the swarm key {path}: {error.strerror}") from None
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{_LABEL} {text}\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise ConfigError(f"cannot write the swarm key {path}: {error.strerror}") from None

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits by which people can compare keys; they tell nothing of the key."""
        return self._mac(b"petal-swarm/1/fingerprint\n").hex()[:8]

    def proof(self, side: Side, protocol: str, dialer: str, listener: str) -> bytes:
        """32 bytes by which one of two peers shows the other that it has the key.

        `dialer` and `listener` are peer ids as the transport has authenticated them. Whoever has seen a proof
        can do nothing with it: it is good between these two, in this direction, for this protocol.
        """
        parts = (side.value, protocol, dialer, listener)
        encoded = [part.encode() for part in parts]
        return self._mac(
            b"petal-swarm/1/member\n" + b"".join(len(part).to_bytes(2, "big") + part for part in encoded)
        )

    @property
    def record_tag(self) -> bytes:
        """32 secret bytes that announcements of this swarm are signed together with."""
        return self._mac(b"petal-swarm/1/private-announcement\n")

    def __repr__(self) -> str:
        return f"SwarmKey({self.fingerprint})"

    def _mac(self, data: bytes) -> bytes:
        return hmac.digest(self._secret, data, hashlib.sha256)


def load_swarm_key(path: str | Path | None) -> SwarmKey | None:
    """`SwarmKey.load`, or None for an open swarm."""
    return None if path is None else SwarmKey.load(path)


def _require_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"the swarm key {path} is not a file")
    # Elsewhere the bits say nothing about who may read.
    if os.name == "posix" and status.st_mode & 0o077:
        raise ConfigError(
            f"others can read the swarm key {path} (mode {stat.S_IMODE(status.st_mode):04o}):"
            f" chmod 600 {path}; and if anybody may have read it, make a new one"
        )


def _parse(data: bytes, path: Path) -> bytes:
    """The secret in a key file. What is wrong is told without a letter of what was read."""
    if not data.strip():
        raise ConfigError(f"the swarm key {path} is empty; copy it again")
    words = data[:_MAX_FILE_BYTES].split()
    if len(data) > _MAX_FILE_BYTES or words[0] != _LABEL.encode():
        if words[0].startswith(_LABEL[:-1].encode()) and words[0] != _LABEL.encode():
            raise ConfigError(f"the swarm key {path} is of a newer version; update petal_swarm")
        raise ConfigError(f"{path} is not a swarm key: one is a line `{_LABEL} ...`, see petal-swarm key new")
    if len(words) != 2 or len(words[1]) != _TEXT_LENGTH:
        raise ConfigError(f"the swarm key {path} is cut off or has too much in it; copy it again")
    try:
        decoded = base64.b32decode(words[1], casefold=True)
    except binascii.Error:
        decoded = b""
    secret, check = decoded[:KEY_BYTES], decoded[KEY_BYTES:]
    if len(secret) != KEY_BYTES or not hmac.compare_digest(check, _check(secret)):
        raise ConfigError(f"the swarm key {path} is damaged: its letters do not fit together; copy it again")
    return secret


def _check(secret: bytes) -> bytes:
    return hashlib.sha256(b"petal-swarm/1/key-check\n" + secret).digest()[:_CHECK_BYTES]
