"""Warnings about what other peers do: each peer once in a while, and few in all.

What a stranger can cause, it can cause a thousand times a second and under a thousand names; a log that
repeats it is no use to its reader, and fills his disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

#: A peer that goes on is named again after this.
WINDOW_S = 600.0
#: Different peers that are named within one window.
LIMIT = 16


class Complaints:
    """Logs as warnings the first complaint about each peer in `WINDOW_S`, others at debug level."""

    def __init__(self, logger: logging.Logger, *, now: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._now = now
        self._warned: dict[str, float] = {}

    def about(self, peer_id: str, message: str, *arguments: object) -> None:
        """Complain; `message` and `arguments` as for `logging`, and they should name the peer."""
        now = self._now()
        if self._warned.get(peer_id, -WINDOW_S) <= now - WINDOW_S:
            self._warned = {peer: at for peer, at in self._warned.items() if at > now - WINDOW_S}
            if len(self._warned) < LIMIT:
                self._warned[peer_id] = now
                last = " (further peers at debug level only)" if len(self._warned) == LIMIT else ""
                self._logger.warning(message + last, *arguments)
                return
        self._logger.debug(message, *arguments)
