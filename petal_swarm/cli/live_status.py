"""`petal-swarm status --watch`: the swarm in a terminal as it changes, or a line for each event in a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console
from rich.live import Live

from petal_swarm.cli.swarm_picture import line_of, picture, summary
from petal_swarm.client.status import Status, to_json
from petal_swarm.client.watch import Happening, SwarmWatch

#: How soon the picture follows a window that has another size.
TICK_S = 0.5
LONG_S = 3600.0


async def live_status(watch: SwarmWatch, as_json: bool) -> Status:
    """Show what the watch sees until `q` or Ctrl-C; returns what was seen last."""
    with watch.watching():
        await watch.later_than(0, timeout_s=LONG_S)
        console = Console(highlight=False)
        if as_json or not console.is_terminal:
            await follow(watch, as_json)
        else:
            await _draw(watch, console)
    return _seen(watch)[0]


async def follow(watch: SwarmWatch, as_json: bool) -> None:
    """Print what there is, then a line for each event, for ever. In JSON, every line is a document."""
    (status, is_reachable), version = _seen(watch), watch.version
    print(json.dumps(to_json(status)) if as_json else summary(status, is_reachable), flush=True)
    while True:
        await watch.later_than(version, timeout_s=LONG_S)
        for change in watch.since(version) or ():
            for happening in change.happenings:
                print(json.dumps(_to_json(happening)) if as_json else line_of(happening), flush=True)
        version = watch.version


def _to_json(happening: Happening) -> dict[str, object]:
    return {"at": round(happening.at_s, 3), **asdict(happening.event)}


async def _draw(watch: SwarmWatch, console: Console) -> None:
    stop = asyncio.Event()
    status, is_reachable = _seen(watch)
    with _keys(stop), Live(console=console, screen=True, auto_refresh=False) as live:
        while not stop.is_set():
            status, is_reachable = _seen(watch)
            drawn = picture(status, tuple(watch.happenings), *console.size, is_reachable=is_reachable)
            live.update(drawn, refresh=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await stop.wait()
    console.print(summary(status, is_reachable))


def _seen(watch: SwarmWatch) -> tuple[Status, bool]:
    assert watch.status is not None
    return watch.status, watch.trouble is None


@contextlib.contextmanager
def _keys(stop: asyncio.Event) -> Iterator[None]:
    """`q` sets the event, where there are keys to press and a way to read them one by one."""
    try:
        import termios
        import tty
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def pressed() -> None:
        if (keys := os.read(keyboard, 64)) == b"" or b"q" in keys.lower():
            stop.set()

    loop = asyncio.get_running_loop()
    tty.setcbreak(keyboard)
    loop.add_reader(keyboard, pressed)
    try:
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
