"""Frames: any split of the bytes means the same, and no bytes do harm."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.errors import LocalProtocolError, RemoteProtocolError
from petal_swarm.wire.frames import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX,
    Frame,
    FrameDecoder,
    encode_frame,
)

from .samples import joined, same_every_time

headers = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.text(max_size=5)
        | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        max_leaves=5,
    ),
    max_size=4,
)
frame_lists = st.lists(st.tuples(headers, st.binary(max_size=40)), min_size=1, max_size=5)


def decoded(decoder: FrameDecoder, *parts: bytes) -> list[tuple[dict[str, Any], bytes]]:
    return [(frame.header, bytes(frame.payload)) for part in parts for frame in decoder.feed(part)]


def framed(packed: bytes, payload: bytes = b"") -> bytes:
    return PREFIX.pack(len(packed), len(payload)) + packed + payload


@same_every_time
@given(frames=frame_lists, data=st.data())
def test_every_split_gives_the_same_frames(frames: list[Any], data: st.DataObject) -> None:
    stream = b"".join(joined(encode_frame(header, payload)) for header, payload in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    decoder = FrameDecoder()
    assert decoded(decoder, *parts) == frames
    assert not decoder.mid_frame


def test_every_place_to_cut_twice() -> None:
    frames = [({"a": 1}, b"payload"), ({}, b""), ({"b": [b"\0" * 3]}, b"\xff" * 9)]
    stream = b"".join(joined(encode_frame(*frame)) for frame in frames)
    ends = {len(b"".join(joined(encode_frame(*frame)) for frame in frames[:n])) for n in range(4)}
    for first in range(len(stream) + 1):
        decoder = FrameDecoder()
        found = decoded(decoder, stream[:first])
        assert decoder.mid_frame == (first not in ends)
        for second in range(first, len(stream) + 1):
            other = FrameDecoder()
            assert decoded(other, stream[:first], stream[first:second], stream[second:]) == frames
        assert found + decoded(decoder, stream[first:]) == frames


def test_byte_by_byte() -> None:
    stream = joined(encode_frame({"key": "value"}, bytes(range(200)))) * 3
    decoder = FrameDecoder()
    parts = [stream[i : i + 1] for i in range(len(stream))]
    assert decoded(decoder, *parts) == [({"key": "value"}, bytes(range(200)))] * 3


def test_the_layout_is_fixed() -> None:
    assert joined(encode_frame({"a": 1}, b"xyz")) == b"\0\0\0\4\0\0\0\3\x81\xa1a\x01xyz"
    assert joined(encode_frame({}, memoryview(struct.pack("<2f", 1, 2)).cast("f"))) == (
        b"\0\0\0\1\0\0\0\x08\x80\0\0\x80?\0\0\0@"
    )


def test_the_payload_is_not_copied_on_the_way_out() -> None:
    payload = bytearray(100)
    buffers = encode_frame({"a": 1}, payload)
    assert buffers[-1] is payload
    assert len(encode_frame({"a": 1})) == 1


@pytest.mark.parametrize("cut", [0, 1, 8, 20, 60])
def test_payloads_stay_as_they_were_while_more_arrives(cut: int) -> None:
    """A frame is read while the next is decoded: its memory must not be used again."""
    decoder, kept = FrameDecoder(), []
    for number in range(20):
        stream = joined(encode_frame({"n": number}, bytes([number]) * 50))
        kept += decoder.feed(stream[:cut]) if cut else []
        kept += decoder.feed(stream[cut:])
    assert [bytes(frame.payload) for frame in kept] == [bytes([number]) * 50 for number in range(20)]


@pytest.mark.parametrize(
    "prefix",
    [
        PREFIX.pack(0xFFFFFFFF, 0),
        PREFIX.pack(1, 0xFFFFFFFF),
        PREFIX.pack(0xFFFFFFFF, 0xFFFFFFFF),
        PREFIX.pack(MAX_HEADER_BYTES + 1, 0),
        PREFIX.pack(1, MAX_PAYLOAD_BYTES + 1),
        PREFIX.pack(0, 0),
        PREFIX.pack(0, 10),
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_lengths_over_the_bounds_allocate_nothing(prefix: bytes, split: bool) -> None:
    decoder = FrameDecoder()
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="are allowed"):
            decoded(decoder, *([prefix[:3], prefix[3:]] if split else [prefix + bytes(100)]))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_prefix_alone_allocates_no_payload() -> None:
    """Only once the whole header has come is there anything of the payload's size."""
    decoder = FrameDecoder()
    tracemalloc.start()
    try:
        assert decoder.feed(PREFIX.pack(MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES) + bytes(1000)) == []
        assert decoder.mid_frame
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_largest_frame_passes() -> None:
    header = {"a": bytes(MAX_HEADER_BYTES - 8)}
    assert len(msgpack.packb(header)) == MAX_HEADER_BYTES
    buffers = encode_frame(header, bytes(MAX_PAYLOAD_BYTES))
    (frame,) = FrameDecoder().feed(joined(buffers))
    assert (frame.header, frame.payload.nbytes) == (header, MAX_PAYLOAD_BYTES)


def test_over_the_bounds_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="bounds"):
        encode_frame({"a": bytes(MAX_HEADER_BYTES - 7)})
    with pytest.raises(LocalProtocolError, match="bounds"):
        encode_frame({}, bytes(MAX_PAYLOAD_BYTES + 1))
    wide = memoryview(bytearray(MAX_PAYLOAD_BYTES + 4)).cast("f")
    with pytest.raises(LocalProtocolError, match="bounds"):
        encode_frame({}, wide)


@pytest.mark.parametrize(
    "header",
    [{"a": 1 << 64}, {"a": object()}, {"a": {1, 2}}, {"a": "\ud800"}],
    ids=["number", "object", "set", "half a character"],
)
def test_what_msgpack_cannot_say_is_our_own_fault(header: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError):
        encode_frame(header)


BOMBS = {
    "not a map": msgpack.packb([1, 2]),
    "a number": b"\x07",
    "a string": msgpack.packb("text"),
    "nil": b"\xc0",
    "reserved byte": b"\xc1",
    "two objects": msgpack.packb({}) * 2,
    "cut short": msgpack.packb({"a": 1})[:-1],
    "integer keys": msgpack.packb({1: 2}),
    "nil keys": b"\x81\xc0\x01",
    "list keys": b"\x81\x91\x01\x01",
    "integer keys inside": msgpack.packb({"a": {1: 2}}),
    "ext type": msgpack.packb({"a": msgpack.ExtType(5, b"data")}),
    "timestamp": msgpack.packb({"a": msgpack.Timestamp(1)}),
    "invalid utf-8": b"\x81\xa1a\xa2\xff\xfe",
    "surrogate": b"\x81\xa1a\xa3\xed\xa0\x80",
    "huge array": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "huge map": b"\xdf\xff\xff\xff\xff",
    "huge string": b"\x81\xa1a\xdb\xff\xff\xff\xff",
    "huge bytes": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "huge ext": b"\x81\xa1a\xc9\xff\xff\xff\xff\x05",
    "nested arrays": b"\x81\xa1a" + b"\x91" * 200_000,
    "nested maps": b"\x81\xa1a" * 80_000,
    "nested huge arrays": b"\x81\xa1a" + b"\xdd\x00\x0f\xff\xff" * 1000,
}


@pytest.mark.parametrize("packed", BOMBS.values(), ids=BOMBS)
def test_hostile_headers(packed: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="header"):
            FrameDecoder().feed(framed(packed))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(RemoteProtocolError, match="header"):
        decoded(FrameDecoder(), *[bytes([byte]) for byte in framed(packed[:500])], bytes(1))


@same_every_time
@given(data=st.binary(max_size=200), cut=st.integers(0, 200))
def test_noise_raises_nothing_else(data: bytes, cut: int) -> None:
    with suppress(RemoteProtocolError):
        decoded(FrameDecoder(), data[:cut], data[cut:])


@same_every_time
@given(packed=st.binary(min_size=1, max_size=60), payload=st.binary(max_size=5))
def test_noise_for_a_header_raises_nothing_else(packed: bytes, payload: bytes) -> None:
    with suppress(RemoteProtocolError):
        for frame in FrameDecoder().feed(framed(packed, payload)):
            assert isinstance(frame, Frame)
            assert type(frame.header) is dict


@same_every_time
@given(frames=frame_lists, where=st.integers(0, 1 << 20), value=st.integers(0, 255), cut=st.integers(0, 99))
def test_one_wrong_byte_raises_nothing_else(frames: list[Any], where: int, value: int, cut: int) -> None:
    stream = bytearray(b"".join(joined(encode_frame(*frame)) for frame in frames))
    stream[where % len(stream)] = value
    data = bytes(stream)
    with suppress(RemoteProtocolError):
        decoded(FrameDecoder(), data[:cut], data[cut:])


@same_every_time
@given(frame=st.tuples(headers, st.binary(max_size=20)), missing=st.integers(1, 1000))
def test_a_truncated_frame_waits_for_the_rest(frame: Any, missing: int) -> None:
    stream = joined(encode_frame(*frame))
    missing = min(missing, len(stream) - 1)
    decoder = FrameDecoder()
    assert decoder.feed(stream[:-missing]) == []
    assert decoder.mid_frame
    assert decoded(decoder, stream[-missing:]) == [frame]


def test_a_peer_may_be_allowed_less() -> None:
    decoder = FrameDecoder()
    decoder.max_payload_bytes = 100
    assert len(decoder.feed(joined(encode_frame({"a": 1}, bytes(100))))) == 1
    for cut in (8, 200):
        decoder = FrameDecoder()
        decoder.max_payload_bytes = 100
        with pytest.raises(RemoteProtocolError, match="101 bytes; at most 100 are allowed here"):
            decoder.feed(joined(encode_frame({"a": 1}, bytes(101)))[:cut])


def test_how_far_a_frame_has_come() -> None:
    decoder = FrameDecoder()
    whole = joined(encode_frame({"a": 1}, bytes(50)))
    seen = []
    for byte in whole:
        decoder.feed(bytes([byte]))
        seen.append((decoder.frame_bytes, decoder.payload_under_way, decoder.frames_read))
    size = len(whole)
    head = size - 50
    assert seen[:7] == [(count, 0, 0) for count in range(1, 8)]
    assert seen[7 : head - 1] == [(size, 0, 0)] * (head - 8)
    assert seen[head - 1 : -1] == [(size, 50, 0)] * 50
    assert seen[-1] == (0, 0, 1)
    decoder.feed(whole + whole)
    assert decoder.frames_read == 3
