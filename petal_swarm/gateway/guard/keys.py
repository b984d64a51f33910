"""API keys: a file of them, and who comes with which."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from petal_swarm.errors import ConfigError
from petal_swarm.gateway.guard.config import Limits

logger = logging.getLogger(__name__)

MIN_KEY_CHARACTERS = 16
MAX_KEY_CHARACTERS = 512
MAX_KEYS = 100_000
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
_HASH = "sha256:"
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_INDEX_BYTES = 16


@dataclass(frozen=True, slots=True)
class Key:
    """A key's holder; the key itself is nowhere in here."""

    name: str
    limits: Limits


class KeyRing:
    """The keys of a file, which has one a line: `KEY [NAME [REQUESTS/MIN [TOKENS/MIN]]]`, with `-` for what
    is as for others. In place of the key, `sha256:` and its SHA-256 in hex may stand; `#` begins a comment.

    Keys are held by a digest under a secret of this process, and found by half of that: how long it takes
    says nothing about how much of a guess was right, however many keys there are. The whole digest is then
    compared in constant time. Several keys may have one name; they share an account.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        """Raises:
        ConfigError: the file cannot be read, or a line of it cannot be understood.
        """
        self._path = path
        self._limits = limits
        self._secret = secrets.token_bytes(32)
        self._keys: dict[bytes, tuple[bytes, Key]] = {}
        self.reload()

    def __len__(self) -> int:
        return len(self._keys)

    def reload(self) -> None:
        """Read the file again; keys that are gone are refused from now on.

        Raises:
            ConfigError: as at first. What was known before is still.
        """
        try:
            text = self._path.read_text(encoding="utf-8")
            mode = self._path.stat().st_mode
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise ConfigError(f"cannot read the keys in {self._path}: {why}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"cannot read the keys in {self._path}: they are no UTF-8 text") from None
        if mode & (stat.S_IRGRP | stat.S_IROTH):
            logger.warning("others on this machine can read the keys in %s: chmod 600 it", self._path)
        keys: dict[bytes, tuple[bytes, Key]] = {}
        limits: dict[str, Limits] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            fields = line.partition("#")[0].split()
            if fields:
                try:
                    digest, key = self._parse(fields)
                    if limits.setdefault(key.name, key.limits) != key.limits:
                        raise ValueError(f"{key.name} has other limits in another line")
                except ValueError as error:
                    # The line is not shown: it holds a key.
                    raise ConfigError(f"{self._path}, line {number}: {error}") from None
                blinded = self._blinded(digest)
                keys[blinded[:_INDEX_BYTES]] = blinded, key
        if not keys or len(keys) > MAX_KEYS:
            raise ConfigError(f"{self._path} has {len(keys)} keys: 1 to {MAX_KEYS} are needed")
        self._keys = keys

    def find(self, key: bytes) -> Key | None:
        """Who holds this key; None if it is none."""
        if len(key) > MAX_KEY_CHARACTERS:
            return None
        blinded = self._blinded(hashlib.sha256(key).digest())
        known, holder = self._keys.get(blinded[:_INDEX_BYTES], (b"", None))
        return holder if hmac.compare_digest(known, blinded) else None

    def _blinded(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, "sha256")

    def _parse(self, fields: list[str]) -> tuple[bytes, Key]:
        text, *rest = fields
        if len(rest) > 3:
            raise ValueError("at most a key, a name and two limits are expected")
        name, requests, tokens = (*rest, *("-" for _ in range(3 - len(rest))))
        if text.startswith(_HASH):
            if not _SHA256.fullmatch(text.removeprefix(_HASH)):
                raise ValueError("sha256: needs 64 hexadecimal digits")
            digest = bytes.fromhex(text.removeprefix(_HASH))
        elif not MIN_KEY_CHARACTERS <= len(text) <= MAX_KEY_CHARACTERS or not text.isascii():
            raise ValueError(f"a key has {MIN_KEY_CHARACTERS} to {MAX_KEY_CHARACTERS} ASCII characters")
        else:
            digest = hashlib.sha256(text.encode()).digest()
        if name == "-":
            name = f"key-{digest.hex()[:8]}"
        elif not _NAME.fullmatch(name):
            raise ValueError("a name has letters, digits and . @ _ - only, 64 at most")
        limits = self._limits
        if requests != "-":
            limits = replace(limits, requests_per_min=_limit(requests))
        if tokens != "-":
            limits = replace(limits, tokens_per_min=_limit(tokens))
        return digest, Key(name, limits)


def _limit(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a limit is a number, or - for that of others") from None
