"""Prefixes that sessions share: the keys of their pages, and the question who holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.wire import fields
from petal_swarm.wire.frames import Frame
from petal_swarm.wire.messages.parts import MAX_POSITION, MAX_SEQUENCES, MAX_STEP, as_sequence

#: Prefixes are shared in pages of so many tokens; a key stands for everything up to a page's end.
PAGE_TOKENS = 16
PAGE_KEY_BYTES = 32
MAX_PAGES = 4096


class PageKeys(NamedTuple):
    """Keys of consecutive full pages of a sequence, from page `first_page` on, each `PAGE_KEY_BYTES` long."""

    sequence: int
    first_page: int
    keys: tuple[bytes, ...]

    def to_header(self) -> list[Any]:
        return [self.sequence, self.first_page, b"".join(self.keys)]

    @classmethod
    def from_header(cls, value: Any) -> PageKeys:
        if type(value) is not list or len(value) != 3:
            raise RemoteProtocolError(
                f"field 'keys': expected [sequence, first page, keys], got {fields.shown(value)}"
            )
        entry = {"sequence": value[0], "first_page": value[1], "keys": value[2]}
        joined = fields.raw(entry, "keys", 0, MAX_PAGES * PAGE_KEY_BYTES)
        if len(joined) % PAGE_KEY_BYTES:
            raise RemoteProtocolError(f"field 'keys': {len(joined)} bytes are no whole number of keys")
        return cls(
            as_sequence(entry["sequence"]),
            fields.integer(entry, "first_page", 0, MAX_POSITION // PAGE_TOKENS),
            tuple(joined[i : i + PAGE_KEY_BYTES] for i in range(0, len(joined), PAGE_KEY_BYTES)),
        )


@dataclass(frozen=True, slots=True)
class FindPrefix:
    """Hop k-1 to hop k: what do you hold of these prefixes? Comes before the step `step` that needs it.

    Every hop that finds pages lets the sequence start behind them, and asks the next one for as many.
    """

    type: ClassVar[str] = "find-prefix"
    step: int
    epoch: int
    keys: tuple[PageKeys, ...]

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "step": self.step,
            "epoch": self.epoch,
            "keys": [pages.to_header() for pages in self.keys],
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> FindPrefix:
        header = frame.header
        return cls(
            fields.integer(header, "step", 0, MAX_STEP),
            fields.integer(header, "epoch", 0, MAX_STEP),
            page_keys(header, low=1),
        )


@dataclass(frozen=True, slots=True)
class PrefixFound:
    """Answer to `FindPrefix`: how many pages this hop and all behind it hold, for each of its entries."""

    type: ClassVar[str] = "prefix-found"
    step: int
    pages: tuple[int, ...]

    def to_header(self) -> dict[str, Any]:
        return {"type": self.type, "step": self.step, "pages": self.pages}

    @classmethod
    def from_frame(cls, frame: Frame) -> PrefixFound:
        return cls(
            fields.integer(frame.header, "step", 0, MAX_STEP),
            fields.items(frame.header, "pages", _pages, limit=MAX_SEQUENCES, low=1),
        )


PrefixMessage: TypeAlias = FindPrefix | PrefixFound


def page_keys(header: Mapping[str, Any], low: int) -> tuple[PageKeys, ...]:
    """The field `keys`: at least `low` entries, none of them for the same sequence."""
    entries = fields.items(header, "keys", PageKeys.from_header, limit=MAX_SEQUENCES, low=low)
    if len(entries) > 1 and len({entry.sequence for entry in entries}) != len(entries):
        raise RemoteProtocolError("field 'keys': a sequence appears twice")
    return entries


def _pages(value: Any) -> int:
    return fields.integer({"pages": value}, "pages", 0, MAX_PAGES)
