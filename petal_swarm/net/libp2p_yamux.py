"""Yamux, the stream multiplexer of libp2p, as a state machine: bytes and calls in, events and bytes out.

It must not know of sockets, tasks, clocks or libp2p. The normative text is
https://github.com/hashicorp/yamux/blob/master/spec.md.

py-libp2p 0.8.1 has a yamux of its own, which cannot carry a session of ours:

- a write fails for good when the peer has not read for 5 s (a busy server), and polls every 10 ms
  while it waits for the window;
- a reset stream, and every stream of a killed peer, reads as a clean end (`read_stream` no longer finds
  the stream and raises `MuxedStreamEOF`), so a truncated answer looks complete;
- FIN and RST are ignored on a frame that also carries ACK, which Go sends;
- what has arrived is dropped when the connection closes;
- each read awaits a window update of its own before it returns the data.

Its loop, its reads and its writes would all have to be overridden, so this replaces it.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

from petal_swarm.net.transport import Buffer

PROTOCOL = "/yamux/1.0.0"

_HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length
HEADER_BYTES = _HEADER.size
_DATA, _WINDOW, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8

#: The window that each side of a new stream has, by the specification.
INITIAL_WINDOW_BYTES = 256 << 10

#: What a peer may have in flight to us on one stream. It bounds the memory of a stream nobody reads, and
#: the throughput over a WAN: 4 MiB in each round trip.
WINDOW_BYTES = 4 << 20

#: The most data in one frame; go-yamux sends no larger ones. It is a stream's turn on the wire.
MAX_FRAME_BYTES = (64 << 10) - HEADER_BYTES

#: The most streams that a peer may hold open to us on one connection.
MAX_INBOUND_STREAMS = 256

#: Answers to a peer that asks without reading them must not pile up.
MAX_UNSENT_REPLIES = 4096


class YamuxError(Exception):
    """The peer broke the rules; the connection cannot go on."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer opened a stream."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes came; they count against the window until `consumed` says otherwise."""

    stream_id: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The peer will send no more on this stream."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class Reset:
    """The peer gave the stream up, in both directions."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer is about to close the connection."""

    code: int


Event: TypeAlias = Opened | Received | Ended | Reset | GoneAway


@dataclass(slots=True)
class _Stream:
    stream_id: int
    send_window: int = INITIAL_WINDOW_BYTES
    receive_window: int = INITIAL_WINDOW_BYTES  # what the peer may still send
    window: int = INITIAL_WINDOW_BYTES  # what it could send at most, if everything were read
    unread: int = 0
    pending: deque[memoryview] = field(default_factory=deque)
    pending_bytes: int = 0
    scheduled: bool = False
    finishing: bool = False
    finished: bool = False
    ended: bool = False


class Yamux:
    """One side of a connection: `initiator` is the side that dialled."""

    def __init__(self, *, initiator: bool) -> None:
        self._next_id = 1 if initiator else 2
        self._streams: dict[int, _Stream] = {}
        self._inbound = 0
        self._control: deque[bytes] = deque()
        self._ready: deque[_Stream] = deque()
        self._partial = b""
        self._body: tuple[int, int, int] | None = None  # stream id, bytes still to come, flags

    # -- what the local side wants

    def open(self) -> int:
        """Start a stream. The peer learns of it with the next output, and may refuse it with a reset."""
        stream_id = self._next_id
        self._next_id += 2
        self._streams[stream_id] = _Stream(stream_id)
        self._frame(_WINDOW, _SYN, stream_id, 0)
        return stream_id

    def send(self, stream_id: int, *buffers: Buffer) -> None:
        """Queue bytes; dropped if the stream is gone or `finish` was called."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.finishing:
            return
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            if view.nbytes:
                stream.pending.append(view)
                stream.pending_bytes += view.nbytes
        self._schedule(stream)

    def consumed(self, stream_id: int, count: int) -> None:
        """`count` received bytes have left the reader's buffer: the peer may send as many again.

        It is told so when half of its window is used up, not for every read, and first then is the
        window raised from the 256 KiB of the specification: a decode step costs no extra frame.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        stream.unread -= count
        grant = WINDOW_BYTES - stream.receive_window - stream.unread
        low = stream.receive_window * 2 <= stream.window
        if low and grant * 4 >= WINDOW_BYTES and not stream.ended:
            self._frame(_WINDOW, 0, stream_id, grant)
            stream.receive_window += grant
            stream.window = WINDOW_BYTES

    def finish(self, stream_id: int) -> None:
        """End our direction after what is queued."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.finishing:
            stream.finishing = True
            self._schedule(stream)

    def reset(self, stream_id: int) -> None:
        """Give the stream up in both directions, now; what is queued is dropped."""
        if stream_id in self._streams:
            self._forget(stream_id)
            self._frame(_WINDOW, _RST, stream_id, 0)

    def ping(self, value: int) -> None:
        """Ask the peer for a sign of life; any bytes from it are one."""
        self._frame(_PING, _SYN, 0, value & 0xFFFFFFFF)

    def go_away(self) -> None:
        """Say that the connection is about to close, in good order."""
        self._frame(_GO_AWAY, 0, 0, 0)

    # -- bytes out

    @property
    def has_output(self) -> bool:
        """Whether `data_to_send` is worth a call."""
        return bool(self._control or self._ready)

    def data_to_send(self, limit: int) -> tuple[bytes, list[tuple[int, int]]]:
        """Up to `limit` bytes for the wire, and how many bytes of which stream they carry.

        Streams take turns of a frame each, so that a step of 2 KB does not wait for another's 16 MiB.
        """
        parts: list[bytes | memoryview] = []
        carried: list[tuple[int, int]] = []
        room = limit
        while self._control and room >= HEADER_BYTES:
            parts.append(self._control.popleft())
            room -= HEADER_BYTES
        while self._ready and room > HEADER_BYTES:
            stream = self._ready.popleft()
            stream.scheduled = False
            count = min(stream.pending_bytes, stream.send_window, room - HEADER_BYTES, MAX_FRAME_BYTES)
            if count:
                parts.append(_HEADER.pack(0, _DATA, 0, stream.stream_id, count))
                _take(stream, count, parts)
                carried.append((stream.stream_id, count))
                room -= HEADER_BYTES + count
            if stream.finishing and not stream.pending_bytes and room >= HEADER_BYTES:
                parts.append(_HEADER.pack(0, _WINDOW, _FIN, stream.stream_id, 0))
                room -= HEADER_BYTES
                stream.finished = True
                if stream.ended:
                    self._forget(stream.stream_id)
            else:
                self._schedule(stream)
        return b"".join(parts), carried

    # -- bytes in

    def receive_data(self, data: bytes) -> list[Event]:
        """What the peer's next bytes mean, in order.

        Raises:
            YamuxError: they break the rules.
        """
        data = self._partial + data if self._partial else data
        events: list[Event] = []
        position, size = 0, len(data)
        while True:
            if self._body is not None:
                if position == size:
                    break
                position += self._receive_body(data, position, events)
            elif size - position >= HEADER_BYTES:
                version, kind, flags, stream_id, length = _HEADER.unpack_from(data, position)
                position += HEADER_BYTES
                if version != 0:
                    raise YamuxError(f"yamux version {version}")
                self._receive_header(kind, flags, stream_id, length, events)
            else:
                break
        self._partial = data[position:]
        return events

    def _receive_header(
        self, kind: int, flags: int, stream_id: int, length: int, events: list[Event]
    ) -> None:
        if kind == _PING:
            if flags & _SYN:
                self._reply(_PING, _ACK, 0, length)
            return
        if kind == _GO_AWAY:
            events.append(GoneAway(length))
            return
        if kind not in (_DATA, _WINDOW):
            raise YamuxError(f"frame of unknown type {kind}")
        if flags & _SYN:
            self._accept(stream_id, events)
        stream = self._streams.get(stream_id)
        if kind == _WINDOW:
            if stream is not None:
                stream.send_window += length
                self._schedule(stream)
            self._apply_flags(stream_id, flags, events)
            return
        if stream is not None:
            stream.receive_window -= length
            stream.unread += length
            if stream.receive_window < 0 or (stream.ended and length):
                raise YamuxError("more data than the window allows")
        elif length > WINDOW_BYTES:
            raise YamuxError("more data than any window allows")
        if length:
            self._body = (stream_id, length, flags)
        else:
            self._apply_flags(stream_id, flags, events)

    def _receive_body(self, data: bytes, position: int, events: list[Event]) -> int:
        """Take what there is of a frame's data; a large frame is passed on in pieces, as they come."""
        assert self._body is not None
        stream_id, left, flags = self._body
        chunk = data[position : position + left]
        if stream_id in self._streams:
            events.append(Received(stream_id, chunk))
        if len(chunk) < left:
            self._body = (stream_id, left - len(chunk), flags)
        else:
            self._body = None
            self._apply_flags(stream_id, flags, events)
        return len(chunk)

    def _accept(self, stream_id: int, events: list[Event]) -> None:
        ours = stream_id % 2 == self._next_id % 2
        if stream_id == 0 or ours or stream_id in self._streams:
            raise YamuxError(f"the peer cannot open stream {stream_id}")
        if self._inbound >= MAX_INBOUND_STREAMS:
            self._reply(_WINDOW, _RST, stream_id, 0)
            return
        self._inbound += 1
        self._streams[stream_id] = _Stream(stream_id)
        self._frame(_WINDOW, _ACK, stream_id, 0)
        events.append(Opened(stream_id))

    def _apply_flags(self, stream_id: int, flags: int, events: list[Event]) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if flags & _RST:
            self._forget(stream_id)
            events.append(Reset(stream_id))
        elif flags & _FIN and not stream.ended:
            stream.ended = True
            events.append(Ended(stream_id))
            if stream.finished:
                self._forget(stream_id)

    # -- inside

    def _schedule(self, stream: _Stream) -> None:
        sendable = min(stream.pending_bytes, stream.send_window) > 0
        to_finish = stream.finishing and not stream.finished and not stream.pending_bytes
        if (sendable or to_finish) and not stream.scheduled:
            stream.scheduled = True
            self._ready.append(stream)

    def _forget(self, stream_id: int) -> None:
        stream = self._streams.pop(stream_id)
        if stream_id % 2 != self._next_id % 2:
            self._inbound -= 1
        stream.pending.clear()
        stream.pending_bytes = 0
        # A stream may still stand in the queue: with nothing to send, its turn is skipped.
        stream.finishing = False

    def _frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        self._control.append(_HEADER.pack(0, kind, flags, stream_id, length))

    def _reply(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if len(self._control) > MAX_UNSENT_REPLIES:
            raise YamuxError("the peer asks more than it listens to")
        self._frame(kind, flags, stream_id, length)


def _take(stream: _Stream, count: int, parts: list[bytes | memoryview]) -> None:
    stream.pending_bytes -= count
    stream.send_window -= count
    while count:
        view = stream.pending[0]
        if view.nbytes <= count:
            parts.append(stream.pending.popleft())
            count -= view.nbytes
        else:
            parts.append(view[:count])
            stream.pending[0] = view[count:]
            count = 0
