"""The two ranges the project speaks of: a `Span` of blocks and a `Slice` of a sequence's tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from petal_swarm.errors import ConfigError

_SPAN = re.compile(r"(\d{1,6}):(\d{1,6})")


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks `[start, end)` of a model.

    Raises:
        ConfigError: if the span is empty or starts below zero.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ConfigError(f"a span needs 0 <= start < end, got {self.start}:{self.end}")

    @classmethod
    def parse(cls, text: str) -> Span:
        """`"4:8"` -> blocks 4, 5, 6 and 7."""
        match = _SPAN.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"a span is written START:END, for example 0:12, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.end

    def covers(self, other: Span) -> bool:
        return self.start <= other.start and other.end <= self.end

    def blocks(self) -> range:
        return range(self.start, self.end)


class Slice(NamedTuple):
    """`length` tokens of `sequence`, the first of which stands at the absolute `position`."""

    sequence: int
    position: int
    length: int

    @property
    def end(self) -> int:
        return self.position + self.length
