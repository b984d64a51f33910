"""The yamux state machine: two of them back to back, and frames written by hand from the specification."""

from __future__ import annotations

import struct
from collections import defaultdict
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.net.libp2p_yamux import (
    INITIAL_WINDOW_BYTES,
    MAX_INBOUND_STREAMS,
    MAX_UNSENT_REPLIES,
    WINDOW_BYTES,
    Ended,
    Event,
    GoneAway,
    Opened,
    Received,
    Reset,
    Yamux,
    YamuxError,
)

DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


def frame(kind: int, flags: int, stream_id: int, length: int, body: bytes = b"") -> bytes:
    return struct.pack("!BBHII", 0, kind, flags, stream_id, length) + body


def output(yamux: Yamux) -> bytes:
    parts = []
    while data := yamux.data_to_send(1000)[0]:
        parts.append(data)
    return b"".join(parts)


def exchange(a: Yamux, b: Yamux, *, reads: bool = True) -> tuple[list[Event], list[Event]]:
    """Pass bytes until both are silent; each side reads what it gets, or nothing."""
    events: tuple[list[Event], list[Event]] = ([], [])
    while a.has_output or b.has_output:
        for source, target, seen in ((a, b, events[1]), (b, a, events[0])):
            data, _ = source.data_to_send(65519)
            for event in target.receive_data(data):
                seen.append(event)
                if reads and isinstance(event, Received):
                    target.consumed(event.stream_id, len(event.data))
    return events


def received(events: list[Event]) -> dict[int, bytes]:
    data: dict[int, bytes] = defaultdict(bytes)
    for event in events:
        if isinstance(event, Received):
            data[event.stream_id] += event.data
    return data


@pytest.fixture
def pair() -> tuple[Yamux, Yamux]:
    return Yamux(initiator=True), Yamux(initiator=False)


def test_frames_are_those_of_the_specification() -> None:
    yamux = Yamux(initiator=True)
    stream = yamux.open()
    yamux.send(stream, b"hel", memoryview(b"lo"), b"")
    yamux.finish(stream)
    assert output(yamux) == frame(WINDOW, SYN, 1, 0) + frame(DATA, 0, 1, 5, b"hello") + frame(
        WINDOW, FIN, 1, 0
    )
    assert not yamux.has_output
    assert yamux.open() == 3
    assert Yamux(initiator=False).open() == 2


@given(cut=st.integers(1, 200))
def test_every_split_means_the_same(cut: int) -> None:
    stream = (
        frame(WINDOW, SYN, 2, 0)
        + frame(DATA, 0, 2, 60, bytes(60))
        + frame(PING, SYN, 0, 7)
        + frame(DATA, FIN, 2, 40, bytes(40))
        + frame(DATA, SYN | FIN, 4, 3, b"all")
        + frame(GO_AWAY, 0, 0, 0)
    )
    yamux = Yamux(initiator=True)
    events: list[Event] = []
    for start in range(0, len(stream), cut):
        events += yamux.receive_data(stream[start : start + cut])
    assert received(events) == {2: bytes(100), 4: b"all"}
    rest = [event for event in events if not isinstance(event, Received)]
    assert rest == [Opened(2), Ended(2), Opened(4), Ended(4), GoneAway(0)]
    assert output(yamux) == frame(WINDOW, ACK, 2, 0) + frame(PING, ACK, 0, 7) + frame(WINDOW, ACK, 4, 0)


@pytest.mark.parametrize("kind", [DATA, WINDOW])
@pytest.mark.parametrize("flags", [0, ACK])
def test_an_end_counts_on_a_frame_that_also_acknowledges(kind: int, flags: int) -> None:
    yamux = Yamux(initiator=True)
    first, second = yamux.open(), yamux.open()
    assert yamux.receive_data(frame(kind, flags | FIN, first, 0)) == [Ended(first)]
    assert yamux.receive_data(frame(kind, flags | RST, second, 0)) == [Reset(second)]


def test_a_reader_gets_everything_however_large(pair: tuple[Yamux, Yamux]) -> None:
    a, b = pair
    stream = a.open()
    data = bytes(range(256)) * (12 * WINDOW_BYTES // 1024)
    a.send(stream, data)
    a.finish(stream)
    _, seen = exchange(a, b)
    assert received(seen)[stream] == data
    assert seen[-1] == Ended(stream)


def test_a_stream_nobody_reads_is_bounded_and_holds_up_no_other(pair: tuple[Yamux, Yamux]) -> None:
    a, b = pair
    stuck, free = a.open(), a.open()
    a.send(stuck, bytes(3 * WINDOW_BYTES))
    _, seen = exchange(a, b, reads=False)
    assert len(received(seen)[stuck]) == INITIAL_WINDOW_BYTES
    a.send(free, b"passes")
    _, seen = exchange(a, b, reads=False)
    assert received(seen) == {free: b"passes"}
    b.consumed(stuck, INITIAL_WINDOW_BYTES)
    _, seen = exchange(a, b, reads=False)
    assert len(received(seen)[stuck]) == WINDOW_BYTES


@given(steps=st.lists(st.integers(1, WINDOW_BYTES), min_size=1, max_size=40))
def test_a_slow_reader_is_never_stuck(steps: list[int]) -> None:
    """Whatever the steps it reads in, all data arrives, and what is unread stays within the window."""
    a, b = Yamux(initiator=True), Yamux(initiator=False)
    stream, total, unread, read = a.open(), 3 * WINDOW_BYTES, 0, 0
    a.send(stream, bytes(total))
    for turn in range(10_000):
        _, seen = exchange(a, b, reads=False)
        unread += len(received(seen)[stream])
        assert unread <= WINDOW_BYTES
        if read + unread == total:
            return
        assert unread, "nothing comes, though everything was read"
        step = min(max(steps[turn % len(steps)], WINDOW_BYTES // 64), unread)
        b.consumed(stream, step)
        unread, read = unread - step, read + step
    pytest.fail("it takes for ever")


def test_small_messages_cost_no_window_updates(pair: tuple[Yamux, Yamux]) -> None:
    a, b = pair
    stream = a.open()
    exchange(a, b)
    for _ in range(16):
        a.send(stream, bytes(2048))
        exchange(a, b)
        assert not b.has_output
        b.send(stream, bytes(2048))
        data, carried = b.data_to_send(65519)
        assert len(data) == 12 + 2048
        assert carried == [(stream, 2048)]
        a.consumed(
            stream, sum(len(event.data) for event in a.receive_data(data) if isinstance(event, Received))
        )
        assert not a.has_output


def test_streams_take_turns() -> None:
    yamux = Yamux(initiator=True)
    large, small = yamux.open(), yamux.open()
    yamux.send(large, bytes(WINDOW_BYTES))
    yamux.send(small, b"step")
    carried = [each for _ in range(3) for each in yamux.data_to_send(65519)[1]]
    assert (small, 4) in carried


def test_a_reset_drops_what_is_queued_and_what_still_comes(pair: tuple[Yamux, Yamux]) -> None:
    a, b = pair
    stream = a.open()
    exchange(a, b)
    a.send(stream, b"dropped")
    b.send(stream, b"on its way")
    a.reset(stream)
    a.reset(stream)
    a.send(stream, b"dropped too")
    a.finish(stream)
    assert exchange(a, b) == ([], [Reset(stream)])
    b.send(stream, b"into the void")
    b.consumed(stream, 1)
    assert not b.has_output


def test_finished_streams_are_forgotten(pair: tuple[Yamux, Yamux]) -> None:
    """Or else a peer could open only so many streams in the life of a connection."""
    a, b = pair
    for _ in range(MAX_INBOUND_STREAMS + 10):
        stream = a.open()
        for side in pair:
            exchange(a, b)
            side.finish(stream)
        ours, theirs = exchange(a, b)
        assert Ended(stream) in ours + theirs
        assert Reset(stream) not in ours + theirs


def test_too_many_streams_are_refused(pair: tuple[Yamux, Yamux]) -> None:
    a, b = pair
    streams = [a.open() for _ in range(MAX_INBOUND_STREAMS + 1)]
    ours, theirs = exchange(a, b)
    assert len(theirs) == MAX_INBOUND_STREAMS
    assert ours == [Reset(streams[-1])]


@pytest.mark.parametrize(
    "data",
    [
        b"\x01" + bytes(11),
        frame(9, 0, 0, 0),
        frame(WINDOW, SYN, 0, 0),
        frame(WINDOW, SYN, 1, 0),
        frame(WINDOW, SYN, 2, 0) * 2,
        frame(WINDOW, SYN, 2, 0) + frame(DATA, 0, 2, INITIAL_WINDOW_BYTES + 1),
        frame(DATA, SYN, 2, INITIAL_WINDOW_BYTES + 1),
        frame(DATA, SYN | FIN, 2, 1, b"x") + frame(DATA, 0, 2, 1, b"x"),
        frame(DATA, 0, 8, 0xFFFFFFFF),
        frame(PING, SYN, 0, 0) * (MAX_UNSENT_REPLIES + 2),
    ],
)
def test_a_broken_rule_is_an_error(data: bytes) -> None:
    with pytest.raises(YamuxError):
        Yamux(initiator=True).receive_data(data)


@given(data=st.binary(max_size=300))
def test_noise_raises_nothing_else(data: bytes) -> None:
    yamux = Yamux(initiator=True)
    yamux.open()
    with suppress(YamuxError):
        yamux.receive_data(data)
    output(yamux)
