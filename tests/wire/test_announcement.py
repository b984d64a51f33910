"""Announcements: written by servers, read by everyone, trusted by nobody."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields as dataclass_fields
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.span import Span
from petal_swarm.wire.announcement import (
    MAX_ADAPTERS,
    MAX_ADDRESSES,
    MAX_BLOCKS,
    MAX_NEIGHBOURS,
    Announcement,
)

from .samples import announcements, same_every_time

SMALL = Announcement("peer", "model", Span(0, 4), kv_tokens=9, next_rtts_s={"other": 0.5})
NUMBERS = [True, "1", None, [], float("nan"), float("inf"), -1e-9, -1]
COUNTS = [True, 1.0, "1", None, -1, (1 << 40) + 1]


def transmitted(header: dict[str, Any]) -> dict[str, Any]:
    unpacked: dict[str, Any] = msgpack.unpackb(msgpack.packb(header), raw=False)
    return unpacked


@same_every_time
@given(announcement=announcements)
def test_there_and_back(announcement: Announcement) -> None:
    assert Announcement.from_header(transmitted(announcement.to_header())) == announcement


def test_what_may_be_missing() -> None:
    header = {"peer_id": "peer", "model": "model", "span": [0, 4], "block_time_s": 0.001}
    assert Announcement.from_header(header) == Announcement("peer", "model", Span(0, 4))
    assert Announcement.from_header({**header, "colour": "red"}) == Announcement("peer", "model", Span(0, 4))
    for name in header:
        with pytest.raises(RemoteProtocolError, match=repr(name)):
            Announcement.from_header({key: value for key, value in header.items() if key != name})


BAD: dict[str, list[Any]] = {
    "peer_id": [None, 5, b"peer", "x" * 129],
    "model": [None, 5, b"model", "x" * 257],
    "span": [
        None,
        5,
        "0:4",
        [],
        [1],
        [2, 2],
        [3, 1],
        [-1, 2],
        [0, MAX_BLOCKS + 1],
        [0.0, 1.0],
        [False, True],
    ],
    "addresses": [
        5,
        "ab",
        {},
        ["/ip4/::/p2p/peer"] * (MAX_ADDRESSES + 1),
        [5],
        ["/" + "x" * 1020 + "/p2p/peer"],
        ["/ip4/::"],
        ["/ip4/::/p2p/another"],
        ["ip4/::/p2p/peer"],
        *([f"/dns/a{odd}b/p2p/peer"] for odd in (" ", "\n", "\x1b[2J", "\u202e", "\u00e9")),
    ],
    "name": [None, 5, "x" * 65],
    "state": [None, "", "dead", 5, ["serving"]],
    "dtype": [None, 5, "x" * 33],
    "quant": [None, 5, "x" * 33],
    "kv_dtype": [None, 5, "x" * 33],
    "block_time_s": [*NUMBERS, 0, 1e-10, 1e4 + 1, 10**400],
    "step_time_s": [*NUMBERS, 1e4 + 1, 10**400],
    "prefill_tokens_per_s": [*NUMBERS, 1e13],
    "queue_s": [*NUMBERS, 1e7],
    "kv_tokens_free": [*COUNTS, SMALL.kv_tokens + 1],
    "kv_tokens": COUNTS,
    "max_batch_tokens": COUNTS,
    "bandwidth_bytes_per_s": [*NUMBERS, 1e16, 5e-324, 0.99],
    "next_rtts_s": [
        None,
        5,
        [],
        {str(n): 0.1 for n in range(MAX_NEIGHBOURS + 1)},
        {"x" * 129: 0.1},
        *({"peer": value} for value in [*NUMBERS, 1e5]),
    ],
    "version": [None, 5, "x" * 65],
    "movable": [None, 0, "yes"],
    "trains": [None, 0, "yes"],
    "adapters": [
        None,
        5,
        {},
        ["tone"],
        [["tone"]],
        [["tone", "0f" * 15]],
        [["tone", "0F" * 16]],
        [["tone", 5]],
        *([[odd, "0f" * 16]] for odd in ("", "a b", "a\n", "x" * 65, 5)),
        [["tone", "0f" * 16]] * (MAX_ADAPTERS + 1),
    ],
    "moving_to": [5, "0:4", [], [2, 2], [-1, 2], [0, MAX_BLOCKS + 1], [0.0, 1.0], {}],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fields(name: str) -> None:
    for value in BAD[name]:
        with pytest.raises(RemoteProtocolError) as caught:
            Announcement.from_header({**SMALL.to_header(), name: value})
        assert len(str(caught.value)) < 300, value


def test_every_field_is_checked() -> None:
    assert set(BAD) == {field.name for field in dataclass_fields(Announcement)} == set(SMALL.to_header())


@pytest.mark.parametrize("header", [None, [], "text", 5, b"", [["peer_id", "peer"]]], ids=repr)
def test_no_map(header: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="map"):
        Announcement.from_header(header)


def test_neighbours_that_are_no_text_are_left_out() -> None:
    header = {**SMALL.to_header(), "next_rtts_s": {b"bytes": 0.1, "text": 0.2}}
    assert Announcement.from_header(header).next_rtts_s == {"text": 0.2}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@same_every_time
@given(changes=st.dictionaries(st.sampled_from(sorted(BAD)), values, max_size=4))
def test_noise_raises_nothing_else(changes: dict[str, Any]) -> None:
    with suppress(RemoteProtocolError):
        Announcement.from_header({**SMALL.to_header(), **changes})
