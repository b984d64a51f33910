"""From tokens, one after the other, to text that can be shown: what is certain, and nothing twice.

Three things make a token's text uncertain. A character may take several tokens. A tokenizer may write a
token in another way behind others (sentencepiece leaves out the first space). And the text may turn out
to be the beginning of one that ends the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

REPLACEMENT = "\ufffd"
#: So many tokens before the first one settle how that is written.
CONTEXT_TOKENS = 5
#: A character takes four tokens at most: what is none after so many more will never be one.
MAX_PENDING_TOKENS = 12


class TextStream:
    """Takes tokens and gives their text, without special tokens; all of it together takes linear time.

    `prompt` are the tokens before the first: the answer's text is what they are continued by.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._decode = _decoder(tokenizer)
        self._window = list(prompt[-CONTEXT_TOKENS:])
        self._shown = self._decode(self._window) if self._window else ""
        if self._shown.endswith(REPLACEMENT):
            self._window, self._shown = [], ""
        self._settled = len(self._window)

    def take(self, token: int) -> str:
        """The text that is certain now, which is often the token's, or none."""
        self._window.append(token)
        text = self._decode(self._window)
        pending = len(self._window) - self._settled
        if text.endswith(REPLACEMENT) and pending <= MAX_PENDING_TOKENS:
            return ""
        new = text[len(self._shown) :]
        if new or pending > MAX_PENDING_TOKENS:
            # What is shown stays in front of what comes until the next text, and then goes.
            self._window = self._window[self._settled :]
            self._settled = len(self._window)
            self._shown = self._decode(self._window)
        return new

    def finish(self) -> str:
        """What was held back at the end: half a character, as far as it can be written."""
        return self._decode(self._window)[len(self._shown) :]


class StopScanner:
    """Lets text through up to the first of `stops`, and holds back what may become one of them."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def take(self, text: str) -> str:
        """What of the text so far is certain to come before any of the stops, and was not given yet."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        certain = self._certain(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _certain(self, text: str) -> int:
        longest = max(map(len, self._stops)) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            rest = text[start:]
            if any(stop.startswith(rest) for stop in self._stops):
                return start
        return len(text)


class AnswerText:
    """Both of these: the text of an answer as its tokens come; `stopped` once one of `stops` has come."""

    def __init__(self, tokenizer: Any, *, stops: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._stream = TextStream(tokenizer, prompt)
        self._scanner = StopScanner(stops)

    @property
    def stopped(self) -> bool:
        return self._scanner.stopped

    def take(self, token: int) -> str:
        """What can be shown now; after a stop text, nothing."""
        text = self._stream.take(token)
        return self._scanner.take(text) if text else ""

    def finish(self) -> str:
        """All that was held back; it may still contain a stop text, and ends before that."""
        return self._scanner.take(self._stream.finish()) + self._scanner.finish()


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """How tokens become text; without transformers' layers around it where there is a fast tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decode = tokenizer.decode if backend is None else backend.decode
    options = {"skip_special_tokens": True}
    if backend is None:
        options["clean_up_tokenization_spaces"] = False

    def text_of(tokens: list[int]) -> str:
        text: str = decode(tokens, **options)
        return text

    return text_of
