"""Peers that neither go on nor go away: half a frame and not its rest, or results that nobody takes.

Looked at every few seconds rather than timed frame by frame: a timer for each would cost as much as a
small block. So a deadline is late by `LOOK_S` at most. Pure: the clock is an argument.
"""

from __future__ import annotations

from typing import Protocol

from petal_swarm.server.config import SessionLimits

LOOK_S = 5.0


class Incoming(Protocol):
    """What is asked of a `wire.frames.FrameDecoder`."""

    frames_read: int

    @property
    def frame_bytes(self) -> int: ...


class SlowWriter:
    """Watches what one peer sends: a frame that it has begun must be whole in time.

    That is `frame_timeout_s`, and what its bytes take at `min_bytes_per_s`.
    """

    def __init__(self, limits: SessionLimits) -> None:
        self._limits = limits
        self._frame = -1
        self._since_s = 0.0

    def is_too_slow(self, now: float, incoming: Incoming, *, excused: bool) -> bool:
        """Look once more. `excused`: we do not read now, so the time does not count."""
        size = incoming.frame_bytes
        if not size or excused or incoming.frames_read != self._frame:
            self._frame = incoming.frames_read if size and not excused else -1
            self._since_s = now
            return False
        limits = self._limits
        return now - self._since_s > limits.frame_timeout_s + size / limits.min_bytes_per_s


class SlowReader:
    """Watches what one peer takes of what it is sent.

    In `write_timeout_s` all that was unsent at its beginning must be gone, or `min_bytes_per_s` on average.
    """

    def __init__(self, limits: SessionLimits) -> None:
        self._limits = limits
        self._since_s: float | None = None
        self._sent_bytes = 0
        self._gone_bytes = 0

    def is_too_slow(self, now: float, *, sent_bytes: int, unsent_bytes: int) -> bool:
        """Look once more: `sent_bytes` were written so far, of which `unsent_bytes` did not get away."""
        if not unsent_bytes:
            self._since_s = None
            return False
        gone_bytes = sent_bytes - unsent_bytes
        if self._since_s is not None:
            elapsed_s = now - self._since_s
            if elapsed_s < self._limits.write_timeout_s:
                return False
            moved = gone_bytes - self._gone_bytes >= elapsed_s * self._limits.min_bytes_per_s
            if not moved and gone_bytes < self._sent_bytes:
                return True
        self._since_s, self._sent_bytes, self._gone_bytes = now, sent_bytes, gone_bytes
        return False
