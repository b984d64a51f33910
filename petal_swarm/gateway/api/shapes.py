"""How answers are written: whole, or as the chunks of a stream; one class for each kind of completion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from petal_swarm.client.generation.pieces import Piece, TokenLogprob

#: What OpenAI writes for the logarithm of zero, which JSON cannot.
LEAST_LOGPROB = -9999.0


class Shape(ABC):
    """The shape of a request's choices, and where each of them is in its text."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    id_prefix: ClassVar[str]

    @abstractmethod
    def opening(self, choice: int) -> dict[str, Any] | None:
        """The first chunk of a choice, if there is one before its first text."""

    @abstractmethod
    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """What a piece adds, as entries of `choices`."""

    @abstractmethod
    def whole(self, choice: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """An entry of `choices` for all pieces of one choice."""


class ChatShape(Shape):
    """Of `/v1/chat/completions`. With `strip`, answers lose the white space they begin with.

    Its logprobs are those of the text alone.
    """

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, *, logprobs: bool = False, strip: bool = False) -> None:
        self._logprobs = logprobs
        self._strip = strip
        self._begun: set[int] = set()

    def opening(self, choice: int) -> dict[str, Any]:
        return _delta(choice, {"role": "assistant", "content": ""}, None, None)

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        entries = []
        text = self._text(piece)
        logprobs = self._chat_logprobs(piece.logprobs) if piece.logprobs and piece.tokens else None
        if text or logprobs:
            entries.append(_delta(piece.choice, {"content": text}, logprobs, None))
        if piece.finish_reason is not None:
            entries.append(_delta(piece.choice, {}, None, piece.finish_reason))
        return entries

    def whole(self, choice: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces if piece.tokens for token in piece.logprobs]
        return {
            "index": choice,
            "message": {
                "role": "assistant",
                "content": "".join(map(self._text, pieces)),
                "refusal": None,
            },
            "logprobs": self._chat_logprobs(tokens),
            "finish_reason": _last_reason(pieces),
        }

    def _text(self, piece: Piece) -> str:
        if not self._strip or piece.choice in self._begun:
            return piece.text
        text = piece.text.lstrip()
        if text:
            self._begun.add(piece.choice)
        return text

    def _chat_logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {**_chat_token(token), "top_logprobs": list(map(_chat_token, token.top))} for token in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionShape(Shape):
    """Of `/v1/completions`. `echoes` are the prompts' texts by choice, or empty.

    Its logprobs have the end-of-sequence token, which is no text: lm-evaluation-harness takes for granted
    that one token asked for is one told of.
    """

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, *, logprobs: bool = False, echoes: Sequence[str] = ()) -> None:
        self._logprobs = logprobs
        self._echoes = echoes
        self._offsets: dict[int, int] = {}

    def opening(self, choice: int) -> dict[str, Any] | None:
        return _text(choice, self._echoes[choice], None, None) if self._echoes else None

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        if not piece.text and not piece.logprobs and piece.finish_reason is None:
            return []
        logprobs = self._list_logprobs(piece.choice, piece.logprobs) if piece.logprobs else None
        return [_text(piece.choice, piece.text, logprobs, piece.finish_reason)]

    def whole(self, choice: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [token for piece in pieces for token in piece.logprobs]
        echo = self._echoes[choice] if self._echoes else ""
        text = echo + "".join(piece.text for piece in pieces)
        return _text(choice, text, self._list_logprobs(choice, tokens), _last_reason(pieces))

    def _list_logprobs(self, choice: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        offsets = []
        for token in tokens:
            offset = self._offsets.get(choice, 0)
            offsets.append(offset)
            self._offsets[choice] = offset + len(token.text)
        return {
            "tokens": [_token_text(token) for token in tokens],
            "token_logprobs": [_bounded(token.logprob) for token in tokens],
            "top_logprobs": [_alternatives(token) for token in tokens],
            "text_offset": offsets,
        }


def _delta(choice: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
    return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _text(choice: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": choice, "logprobs": logprobs, "finish_reason": reason}


def _last_reason(pieces: Sequence[Piece]) -> str:
    reasons = [piece.finish_reason for piece in pieces if piece.finish_reason is not None]
    return reasons[-1] if reasons else "length"


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    logprob = _bounded(token.logprob)
    return {"token": _token_text(token), "bytes": list(token.data), "logprob": logprob}


def _alternatives(token: TokenLogprob) -> dict[str, float] | None:
    """The likeliest tokens in this place and the token itself; None for the first of a prompt."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for each in (*token.top, token):
        if each.logprob is not None:
            found.setdefault(_token_text(each), max(each.logprob, LEAST_LOGPROB))
    return found


def _token_text(token: TokenLogprob) -> str:
    r"""Part of a character has no text of its own: OpenAI writes `bytes:\xe2\x80`."""
    try:
        token.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)
    return token.text


def _bounded(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
