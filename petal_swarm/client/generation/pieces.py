"""What comes of a request, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token as text of its own and as bytes, and the logarithm of its probability; None for the first of a
    prompt, which nothing predicts. `top` are the likeliest tokens in its place, likeliest first.
    """

    token: int
    text: str
    data: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one more token adds to answer `choice`.

    `text` is what is certain now: it may be empty while a character, or what may become a stop text, is not
    whole, and is then part of a later piece. `tokens` counts the new tokens it stands for: zero in a piece
    that only ends the answer. `logprobs` belong to these tokens; in a first piece of no tokens to the
    prompt's, and in a last one to the end-of-sequence token.
    """

    choice: int
    text: str
    tokens: int = 1
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class HopTime:
    """One hop of the route in use: what it did for the last step, and for all of them so far, in seconds."""

    peer_id: str
    name: str
    start: int
    end: int
    step_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a generation is; times in seconds since it was started."""

    route: tuple[HopTime, ...]
    prompt_tokens: int
    new_tokens: int
    first_token_s: float | None
    elapsed_s: float
    tokens_per_s: float
    repairs: int
