"""Frames: `u32 header length | u32 payload length | msgpack header | payload`, lengths big-endian.

Every length is checked against its bound before anything of that size is allocated. This file knows
no message types and no tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import msgpack

from petal_swarm.errors import LocalProtocolError, RemoteProtocolError

Buffer: TypeAlias = bytes | bytearray | memoryview

PREFIX = struct.Struct(">II")
MAX_HEADER_BYTES = 256 << 10
MAX_PAYLOAD_BYTES = 64 << 20

_EMPTY = memoryview(b"")


class Frame(NamedTuple):
    """One decoded frame; `payload` is a view of memory that nobody else writes to."""

    header: dict[str, Any]
    payload: memoryview


def encode_frame(header: Mapping[str, Any], payload: Buffer = b"") -> list[Buffer]:
    """The buffers to send, in order; the payload is not copied.

    Raises:
        LocalProtocolError: a length passes its bound, or msgpack has no such value.
    """
    try:
        packed: bytes = msgpack.packb(header, use_bin_type=True)
    except (OverflowError, TypeError, ValueError) as error:
        raise LocalProtocolError(f"frame header cannot be packed: {error}") from None
    size = len(payload) if not isinstance(payload, memoryview) else payload.nbytes
    if len(packed) > MAX_HEADER_BYTES or size > MAX_PAYLOAD_BYTES:
        raise LocalProtocolError(f"frame of {len(packed)} + {size} bytes is over the protocol's bounds")
    prefix = PREFIX.pack(len(packed), size)
    if size == 0:
        return [prefix + packed]
    return [prefix + packed, payload]


class FrameDecoder:
    """Turns a stream of bytes, split anywhere, into frames.

    Memory is bounded by one frame and one read: the payload buffer is allocated once its length has
    been checked, and filled in place. `max_payload_bytes` may be set lower, for a peer that has no business
    with large ones. `frames_read` counts the frames so far.
    """

    def __init__(self) -> None:
        self.max_payload_bytes = MAX_PAYLOAD_BYTES
        self.frames_read = 0
        self._head = bytearray()
        self._header: dict[str, Any] | None = None
        self._payload = bytearray()
        self._filled = 0
        self._frame_bytes = 0

    @property
    def mid_frame(self) -> bool:
        """Whether the bytes so far end inside a frame."""
        return bool(self._head) or self._header is not None

    @property
    def payload_under_way(self) -> int:
        """The size in bytes of the payload that is being filled; 0 where there is none."""
        return 0 if self._header is None else len(self._payload)

    @property
    def frame_bytes(self) -> int:
        """The size of the frame of which a part has come, as far as it is known; 0 between frames."""
        if self._header is not None:
            return self._frame_bytes
        if len(self._head) < PREFIX.size:
            return len(self._head)
        return PREFIX.size + sum(_lengths(self._head, self.max_payload_bytes))

    def feed(self, data: Buffer) -> list[Frame]:
        """Take bytes, return the frames they complete.

        Raises:
            RemoteProtocolError: a length over its bound, or a header that is no msgpack map.
        """
        frames: list[Frame] = []
        view = memoryview(data)
        if not self.mid_frame:
            view = _take_whole_frames(view, frames, self.max_payload_bytes)
        while len(view):
            if self._header is None:
                view = self._take_head(view)
                if self._header is None:
                    break
            if not self._payload:
                frames.append(Frame(self._header, _EMPTY))
                self._header = None
                continue
            taken = min(len(view), len(self._payload) - self._filled)
            self._payload[self._filled : self._filled + taken] = view[:taken]
            self._filled += taken
            view = view[taken:]
            if self._filled < len(self._payload):
                break
            frames.append(Frame(self._header, memoryview(self._payload)))
            self._header, self._payload, self._filled = None, bytearray(), 0
        self.frames_read += len(frames)
        return frames

    def _take_head(self, view: memoryview) -> memoryview:
        """Consume prefix and header as far as they have come; sets `_header` once both are whole."""
        view = self._fill_head(view, PREFIX.size)
        if len(self._head) < PREFIX.size:
            return view
        header_bytes, payload_bytes = _lengths(self._head, self.max_payload_bytes)
        view = self._fill_head(view, PREFIX.size + header_bytes)
        if len(self._head) < PREFIX.size + header_bytes:
            return view
        self._header = _unpack_header(memoryview(self._head)[PREFIX.size :])
        self._head = bytearray()
        self._payload, self._filled = bytearray(payload_bytes), 0
        self._frame_bytes = PREFIX.size + header_bytes + payload_bytes
        return view

    def _fill_head(self, view: memoryview, size: int) -> memoryview:
        missing = size - len(self._head)
        if missing > 0:
            self._head += view[:missing]
            return view[missing:]
        return view


def _lengths(data: Buffer, max_payload_bytes: int, offset: int = 0) -> tuple[int, int]:
    """Header and payload length of the frame at `offset`, checked against their bounds."""
    header_bytes, payload_bytes = PREFIX.unpack_from(data, offset)
    if not 0 < header_bytes <= MAX_HEADER_BYTES:
        raise RemoteProtocolError(
            f"frame header of {header_bytes} bytes; 1 to {MAX_HEADER_BYTES} are allowed"
        )
    if payload_bytes > max_payload_bytes:
        raise RemoteProtocolError(
            f"frame payload of {payload_bytes} bytes; at most {max_payload_bytes} are allowed here"
        )
    return header_bytes, payload_bytes


def _take_whole_frames(view: memoryview, frames: list[Frame], max_payload_bytes: int) -> memoryview:
    """Read the frames that lie in `view` as a whole, without copying them; returns what is left."""
    offset, size = 0, len(view)
    while size - offset >= PREFIX.size:
        header_bytes, payload_bytes = _lengths(view, max_payload_bytes, offset)
        payload = offset + PREFIX.size + header_bytes
        if payload + payload_bytes > size:
            break
        header = _unpack_header(view[offset + PREFIX.size : payload])
        offset = payload + payload_bytes
        frames.append(Frame(header, view[payload:offset]))
    return view[offset:] if offset else view


def _unpack_header(packed: memoryview) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(packed, raw=False, strict_map_key=True, max_ext_len=0)
    except Exception as error:
        # msgpack raises a dozen unrelated types, ValueError and UnicodeDecodeError among them.
        raise RemoteProtocolError(f"frame header is not msgpack: {type(error).__name__}") from None
    if not isinstance(header, dict):
        raise RemoteProtocolError(f"frame header is a {type(header).__name__}, not a map")
    return header
