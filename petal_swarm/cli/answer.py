"""An answer while it comes: printed piece by piece, timed, and ended by a stop string or by Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

from petal_swarm.models.text_stream import AnswerText


class Answer:
    """A stopping criterion that prints: `generate` calls it after every token, before it goes on.

    A streamer would be told of a token only after that decision. `write` gets the pieces of text; `stop`
    is a text that ends the answer and is no part of it. For one sequence, without beams.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], None],
        *,
        stop: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.text = ""
        self.num_tokens = 0
        self.stopped = False
        self._stream = AnswerText(tokenizer, stops=(stop,) if stop else ())
        self._write = write
        self._clock = clock
        self._prompt_length: int | None = None
        self._started_s = self._first_s = self._last_s = clock()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        """Take `input_ids [1, tokens]`, whose last token is new, or several with drafts; whether to stop."""
        if self._prompt_length is None:
            self._prompt_length = input_ids.shape[1] - 1
            self._first_s = self._clock()
        self._last_s = self._clock()
        self._take(input_ids[0, self._prompt_length + self.num_tokens :].tolist())
        return torch.full((input_ids.shape[0],), self.stopped, dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Print what was held back."""
        if not self.stopped:
            self._emit(self._stream.finish())

    def whole(self, tokens: torch.Tensor) -> None:
        """Print an answer that was not seen to grow: `tokens` of one sequence, without the prompt."""
        self._first_s = self._started_s
        self._last_s = self._clock()
        self._take(tokens.tolist())
        self.finish()

    def interrupt(self) -> None:
        """End the answer after the token that is being computed."""
        self.stopped = True

    @property
    def first_token_s(self) -> float:
        """How long the first token took."""
        return self._first_s - self._started_s

    @property
    def tokens_per_s(self) -> float:
        """The speed after the first token, which waits for the whole prompt and says little about it."""
        after = self.num_tokens - 1
        elapsed_s = self._last_s - self._first_s if after else self.first_token_s
        return max(after, 1) / max(elapsed_s, 1e-9) if self.num_tokens else 0.0

    def summary(self) -> str:
        """For the last line of a program."""
        count = (
            f"{self.num_tokens} token{'' if self.num_tokens == 1 else 's'}, {self.tokens_per_s:.1f} tokens/s"
        )
        return f"{count}, the first after {self.first_token_s:.2f} s" if self.first_token_s else count

    def _take(self, tokens: list[int]) -> None:
        self.num_tokens += len(tokens)
        for token in tokens:
            self._emit(self._stream.take(token))
        self.stopped = self.stopped or self._stream.stopped

    def _emit(self, text: str) -> None:
        if text:
            self._write(text)
            self.text += text


@contextlib.contextmanager
def stopped_by_ctrl_c(answer: Answer) -> Iterator[None]:
    """The first Ctrl-C ends the answer between two tokens, which keeps its session; the second interrupts."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        answer.interrupt()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    earlier = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
