"""Who is too slow, and who only looks like it."""

from __future__ import annotations

from petal_swarm.server.config import SessionLimits
from petal_swarm.server.slow_peers import LOOK_S, SlowReader, SlowWriter
from petal_swarm.wire.frames import FrameDecoder, encode_frame

LIMITS = SessionLimits(frame_timeout_s=30, write_timeout_s=30, min_bytes_per_s=1000)


def frame(payload_bytes: int) -> bytes:
    return b"".join(map(bytes, encode_frame({"type": "x"}, bytes(payload_bytes))))


def seconds_until_cut(data: bytes, bytes_per_s: float, *, excused: bool = False) -> float | None:
    """How long a peer that writes so fast is put up with; None if its data has come by then."""
    decoder, watch = FrameDecoder(), SlowWriter(LIMITS)
    fed = 0
    for look in range(10_000):
        now = look * LOOK_S
        until = min(int(now * bytes_per_s) + 1, len(data))
        decoder.feed(data[fed:until])
        fed = until
        if watch.is_too_slow(now, decoder, excused=excused):
            return now
        if fed == len(data):
            return None
    raise AssertionError("it goes on for ever")


def test_a_frame_that_trickles_in_is_cut_off() -> None:
    found = seconds_until_cut(frame(1000), 0.5)
    assert found is not None
    assert 30 <= found <= 45


def test_a_prefix_that_trickles_in_is_cut_off() -> None:
    found = seconds_until_cut(frame(1000), 0.0)
    assert found is not None
    assert 30 <= found <= 45


def test_a_large_frame_over_a_slow_link_has_its_time() -> None:
    assert seconds_until_cut(frame(500_000), 1100) is None
    found = seconds_until_cut(frame(500_000), 500)
    assert found is not None
    assert 530 <= found <= 900


def test_small_frames_over_a_slow_link_are_no_slow_frame() -> None:
    assert seconds_until_cut(frame(100) * 100, 20) is None


def test_what_we_do_not_read_is_not_the_writers_fault() -> None:
    decoder, watch = FrameDecoder(), SlowWriter(LIMITS)
    decoder.feed(frame(1000)[:500])
    assert not any(watch.is_too_slow(now, decoder, excused=True) for now in range(0, 1000, 5))
    assert not watch.is_too_slow(1000, decoder, excused=False), "its time begins now"
    assert not watch.is_too_slow(1030, decoder, excused=False)
    assert watch.is_too_slow(1035, decoder, excused=False)


def test_between_frames_no_time_passes() -> None:
    decoder, watch = FrameDecoder(), SlowWriter(LIMITS)
    decoder.feed(frame(10))
    assert not any(watch.is_too_slow(now, decoder, excused=False) for now in range(0, 10_000, 5))


def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    watch = SlowReader(LIMITS)
    looks = [watch.is_too_slow(now, sent_bytes=100, unsent_bytes=1) for now in (0, 5, 10, 25, 30)]
    assert looks == [False, False, False, False, True]


def test_a_reader_that_takes_little_of_much_is_cut_off() -> None:
    watch = SlowReader(LIMITS)
    assert not watch.is_too_slow(0, sent_bytes=1_000_000, unsent_bytes=1_000_000)
    assert watch.is_too_slow(30, sent_bytes=1_000_000, unsent_bytes=980_000)


def test_a_slow_reader_that_goes_on_reading_is_not() -> None:
    watch = SlowReader(LIMITS)
    for look in range(100):
        now = look * LOOK_S
        assert not watch.is_too_slow(now, sent_bytes=1_000_000, unsent_bytes=1_000_000 - int(1100 * now))


def test_a_little_that_is_always_on_its_way_is_no_slow_reader() -> None:
    """One small result every second; whenever one looks, the last is not quite there."""
    watch = SlowReader(LIMITS)
    for look in range(100):
        now = look * LOOK_S
        assert not watch.is_too_slow(now, sent_bytes=int(100 * now) + 100, unsent_bytes=100)


def test_a_reader_is_forgiven_once_it_has_taken_everything() -> None:
    watch = SlowReader(LIMITS)
    for now in (0, 20, 40, 60):
        assert not watch.is_too_slow(now, sent_bytes=100, unsent_bytes=100)
        assert not watch.is_too_slow(now + 10, sent_bytes=100, unsent_bytes=0)
