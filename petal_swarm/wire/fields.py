"""Reading fields of a decoded header that somebody else wrote: every value is checked before it is used."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from petal_swarm.errors import RemoteProtocolError

T = TypeVar("T")
Header = Mapping[str, Any]

MAX_TEXT = 1024


def shown(value: object) -> str:
    """A bounded `repr`: lists nested a thousand deep pass msgpack, and overflow the stack of `repr`."""
    return reprlib.repr(value)[:60]


def _bad(name: str, expected: str, value: object) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"field {name!r}: expected {expected}, got {type(value).__name__} {shown(value)}"
    )


def integer(header: Header, name: str, low: int, high: int, default: int | None = None) -> int:
    """An integer in `[low, high]`."""
    value = header.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise _bad(name, f"an integer in [{low}, {high}]", value)
    return value


def number(header: Header, name: str, low: float, high: float, default: float | None = None) -> float:
    """A finite number in `[low, high]`."""
    value = header.get(name, default)
    if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
        raise _bad(name, f"a number in [{low}, {high}]", value)
    return float(value)


def text(header: Header, name: str, default: str | None = None, *, limit: int = MAX_TEXT) -> str:
    """A string of at most `limit` characters."""
    value = header.get(name, default)
    if type(value) is not str or len(value) > limit:
        raise _bad(name, f"a string of at most {limit} characters", value)
    return value


def flag(header: Header, name: str, default: bool) -> bool:
    """A truth value."""
    value = header.get(name, default)
    if type(value) is not bool:
        raise _bad(name, "true or false", value)
    return value


def choice(header: Header, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
    """One of `allowed`."""
    value = header.get(name, default)
    if value not in allowed:
        raise _bad(name, "one of " + ", ".join(allowed), value)
    return str(value)


def raw(header: Header, name: str, low: int, high: int) -> bytes:
    """Bytes whose length is in `[low, high]`."""
    value = header.get(name)
    if type(value) is not bytes or not low <= len(value) <= high:
        raise _bad(name, f"{low} to {high} bytes", value)
    return value


def items(header: Header, name: str, parse: Callable[[Any], T], *, limit: int, low: int = 0) -> tuple[T, ...]:
    """A list of at least `low` and at most `limit` entries, each read by `parse`; missing means empty."""
    value = header.get(name, ())
    if not isinstance(value, (list, tuple)) or not low <= len(value) <= limit:
        raise _bad(name, f"a list of {low} to {limit} entries", value)
    return tuple(parse(entry) for entry in value)


def mapping(header: Header, name: str) -> Header:
    """A nested header."""
    value = header.get(name)
    if not isinstance(value, dict):
        raise _bad(name, "a map", value)
    return value


def optional(header: Header, name: str, read: Callable[[], T]) -> T | None:
    """What `read` gives for a field that may be absent or null."""
    return None if header.get(name) is None else read()


def as_text(value: Any) -> str:
    """`parse` for `items`: a string."""
    return text({"entry": value}, "entry")
