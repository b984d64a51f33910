"""Single tokens as text and as bytes, for those who ask for the probabilities of each."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"
MAX_REMEMBERED = 65_536


class TokenTexts:
    """What a tokenizer writes for each token alone: bytes, which may be half of a character."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        kinds = _decoder_kinds(getattr(tokenizer, "backend_tokenizer", None))
        self._byte_level = "ByteLevel" in kinds
        self._sentence_piece = "ByteFallback" in kinds or "Metaspace" in kinds
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._added = frozenset(getattr(tokenizer, "added_tokens_decoder", ()))
        self.data = lru_cache(MAX_REMEMBERED)(self._data)

    def text(self, token: int) -> str:
        """As text, with the replacement character for bytes that are none."""
        return self.data(token).decode("utf-8", "replace")

    def _data(self, token: int) -> bytes:
        raw = self._tokenizer.convert_ids_to_tokens(token)
        if raw is None:
            return b""
        if token not in self._added and token not in self._special:
            if self._byte_level and all(character in _BYTES for character in raw):
                return bytes(_BYTES[character] for character in raw)
            if self._sentence_piece:
                match = _BYTE_TOKEN.fullmatch(raw)
                return bytes([int(match[1], 16)]) if match else raw.replace(_SPACE, " ").encode()
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text.encode("utf-8", "replace")


def _decoder_kinds(backend: Any) -> set[str]:
    """The names of the steps by which a fast tokenizer writes tokens."""
    if backend is None or backend.decoder is None:
        return set()
    stated = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in (stated, *stated.get("decoders", ()))}


def _byte_alphabet() -> dict[str, int]:
    """The printable character by which byte-level tokenizers write each byte: GPT-2's table."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(0x100) if byte not in set(printable))
    return table | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_alphabet()
