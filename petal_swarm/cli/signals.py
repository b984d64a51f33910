"""Signals that ask a program to leave, as futures of its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Any


class Signals:
    """`first` and `second` are done when that many SIGTERM or SIGINT have come."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.second: asyncio.Future[None] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError):  # Windows
                loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        for future in (self.first, self.second):
            if not future.done():
                future.set_result(None)
                return


async def first_of(*futures: asyncio.Future[Any]) -> None:
    """Return when one of them is done; none is cancelled."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
