"""Spans of blocks and slices of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petal_swarm.errors import ConfigError
from petal_swarm.span import Slice, Span

same_every_time = settings(deadline=None, derandomize=True)
spans = st.tuples(st.integers(0, 50), st.integers(1, 20)).map(lambda pair: Span(pair[0], sum(pair)))


@same_every_time
@given(span=spans, block=st.integers(-2, 80))
def test_a_span_is_its_blocks(span: Span, block: int) -> None:
    blocks = list(range(span.start, span.end))
    assert list(span.blocks()) == blocks
    assert len(span) == len(blocks) > 0
    assert (block in span) == (block in blocks)
    assert Span.parse(str(span)) == span
    assert hash(Span(span.start, span.end)) == hash(span)


@same_every_time
@given(one=spans, other=spans)
def test_covering_is_holding_every_block(one: Span, other: Span) -> None:
    assert one.covers(other) == (set(other.blocks()) <= set(one.blocks()))


@pytest.mark.parametrize(("start", "end"), [(0, 0), (5, 5), (5, 4), (-1, 3), (-3, -1)])
def test_empty_spans(start: int, end: int) -> None:
    with pytest.raises(ConfigError, match=f"{start}:{end}"):
        Span(start, end)


@pytest.mark.parametrize(
    ("text", "span"), [("0:12", Span(0, 12)), (" 4:8\n", Span(4, 8)), ("007:010", Span(7, 10))]
)
def test_parsing(text: str, span: Span) -> None:
    assert Span.parse(text) == span


@pytest.mark.parametrize(
    "text",
    ["", ":", "4", "4:", ":8", "4-8", "a:b", "4:8:9", "-1:4", "4.0:8", "4 : 8", "8:4", "4:4", "1" * 7 + ":9"],
)
def test_what_is_no_span(text: str) -> None:
    with pytest.raises(ConfigError):
        Span.parse(text)


def test_a_span_does_not_change() -> None:
    with pytest.raises(AttributeError):
        Span(0, 4).start = 1  # type: ignore[misc]


def test_slices() -> None:
    piece = Slice(2, 10, 5)
    assert piece == (2, 10, 5)
    assert piece.end == 15
