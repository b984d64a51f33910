"""A swarm drawn for a terminal: blocks across, servers down, what happened below. Pure.

What other people wrote is stripped of what a terminal would obey.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from petal_swarm.cli.status import count_peers, duration, printable
from petal_swarm.client.status import Status, load, short_id, tokens_per_s
from petal_swarm.client.watch import Happening
from petal_swarm.routing.blocks import coverage, format_blocks
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

NAME_COLUMNS = 14
FIGURE_COLUMNS = 30
FEED_LINES = 8
MAX_BLOCK_COLUMNS = 6
HEIGHTS = "▁▂▃▄▅▆▇█"
#: By state: the sign before a name, and the colours of its bar. The sign says it where colours do not.
LOOKS = {
    "serving": ("", "black on green"),
    "busy": ("~", "black on yellow"),
    "joining": ("+", "black on cyan"),
    "no answer": ("×", "white on red"),
}
LEGEND = "~ busy   + loading or leaving   × no answer"
FEED_STYLES = dict.fromkeys(("joined", "back", "serving", "gap_closed", "found"), "green") | dict.fromkeys(
    ("failed", "gap_opened", "lost"), "bold red"
)


class Scale:
    """Blocks to columns: several columns for each block of a small model, or several blocks in one."""

    def __init__(self, num_blocks: int, columns: int) -> None:
        self.num_blocks = num_blocks
        self.columns = min(columns, num_blocks * MAX_BLOCK_COLUMNS)
        if self.columns > num_blocks:
            self.columns -= self.columns % num_blocks

    def column(self, block: int) -> int:
        return min(block, self.num_blocks) * self.columns // self.num_blocks

    def columns_of(self, span: Span) -> tuple[int, int]:
        """First column and one after the last; at least one."""
        first = min(self.column(span.start), self.columns - 1)
        return first, max(first + 1, self.column(span.end))

    def blocks_at(self, column: int) -> range:
        """The blocks that a column stands for, at least one."""
        first = column * self.num_blocks // self.columns
        return range(first, max(first + 1, (column + 1) * self.num_blocks // self.columns))


def picture(
    status: Status, happenings: Sequence[Happening], width: int, height: int, *, is_reachable: bool = True
) -> Group:
    """All that fits on so many columns and lines: a line for each server, or several servers in one."""
    feed = [feed_line(happening) for happening in list(happenings)[-FEED_LINES:]]
    room = max(1, height - len(feed) - 7)
    if len(status.announcements) <= room:
        scale = Scale(status.num_blocks, max(8, width - NAME_COLUMNS - FIGURE_COLUMNS))
        rows = [_row(status, peer, scale) for peer in status.announcements]
    else:
        scale = Scale(status.num_blocks, max(8, width - NAME_COLUMNS))
        rows = _packed(status, scale, room)
    head = [Text(summary(status, is_reachable), style=_mood(status, is_reachable)), Text()]
    head += [_axis(scale), _coverage(status, scale)]
    lines = [*head, *rows, Text(), *feed, Text(f"q quits   {LEGEND}", style="dim")]
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
    return Group(*lines[:height])


def summary(status: Status, is_reachable: bool = True) -> str:
    """One line: can the model be used?"""
    about = (
        f"{printable(status.name)}: {status.num_blocks} blocks, {count_peers(len(status.announcements))}; "
    )
    if not is_reachable:
        return f"{about}the swarm cannot be reached"
    if status.missing:
        return f"{about}nobody serves {format_blocks(status.missing)}"
    return f"{about}all blocks are served"


def line_of(happening: Happening) -> str:
    """An event as one line for a log."""
    return f"{_clock(happening.at_s)} {printable(happening.event.sentence)}"


def feed_line(happening: Happening) -> Text:
    event = happening.event
    line = Text().append(f"{_clock(happening.at_s)} ", style="dim")
    return line.append(printable(event.sentence), style=FEED_STYLES.get(event.kind))


def _mood(status: Status, is_reachable: bool) -> str:
    return "bold green" if is_reachable and not status.missing else "bold red"


def _axis(scale: Scale) -> Text:
    """Every so many columns the block that begins there."""
    line = ""
    step = next(
        s for s in (1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100, 1 << 20) if scale.column(s) >= 5 or s > 100
    )
    for block in range(0, scale.num_blocks, step):
        line = line.ljust(scale.column(block)) + str(block)
    return Text("block".ljust(NAME_COLUMNS) + line[: scale.columns], style="dim")


def _coverage(status: Status, scale: Scale) -> Text:
    """How many serve each block, as heights; a gap is a sign of its own."""
    counts = coverage((p for p in status.announcements if p.peer_id in status.rtts_s), status.num_blocks)
    line = Text().append("servers".ljust(NAME_COLUMNS), style="dim")
    top = max(*counts, len(HEIGHTS))
    for column in range(scale.columns):
        count = min(counts[block] for block in scale.blocks_at(column))
        height = HEIGHTS[min(len(HEIGHTS) - 1, (count - 1) * len(HEIGHTS) // top)]
        line.append("×" if not count else height, style="white on red" if not count else "green")
    return line


def _row(status: Status, peer: Announcement, scale: Scale) -> Text:
    first, end = scale.columns_of(peer.span)
    _, style = LOOKS[_look(status, peer)]
    line = Text(_fit(_called(status, peer), NAME_COLUMNS - 1) + " ")
    line.append("·" * first, style="dim")
    line.append(_fit(f" {peer.span}", end - first), style=style)
    line.append("·" * (scale.columns - end), style="dim")
    return line.append(f"  {_figures(status, peer)}")


def _figures(status: Status, peer: Announcement) -> str:
    state = status.state(peer)
    if state != "serving":
        return state
    rtt_s = status.rtts_s[peer.peer_id]
    return f"{tokens_per_s(peer):5,.0f} tok/s {load(peer):4.0%} full {duration(rtt_s):>6}"


def _packed(status: Status, scale: Scale, room: int) -> list[Text]:
    """Servers whose spans do not touch share a line; what does not fit is counted."""
    lanes: list[list[Announcement]] = []
    ends: list[int] = []
    for peer in status.announcements:
        first, end = scale.columns_of(peer.span)
        lane = next((index for index, taken in enumerate(ends) if taken <= first), len(lanes))
        if lane == len(lanes):
            lanes.append([])
            ends.append(0)
        lanes[lane].append(peer)
        ends[lane] = end
    lines = [_lane(status, lane, scale) for lane in lanes]
    if len(lines) <= room:
        return lines
    hidden = sum(map(len, lanes[room - 1 :]))
    return [*lines[: room - 1], Text(f"{'':{NAME_COLUMNS}}and {count_peers(hidden)} more", style="dim")]


def _lane(status: Status, lane: Sequence[Announcement], scale: Scale) -> Text:
    line = Text(" " * NAME_COLUMNS)
    column = 0
    for peer in lane:
        first, end = scale.columns_of(peer.span)
        _, style = LOOKS[_look(status, peer)]
        line.append("·" * (first - column), style="dim")
        # The first column of each bar sets it apart from the one before it.
        line.append("▏" + _fit(_called(status, peer), end - first - 1), style=style)
        column = end
    return line.append("·" * (scale.columns - column), style="dim")


def _look(status: Status, peer: Announcement) -> str:
    state = status.state(peer)
    return "busy" if state == "serving" and peer.peer_id in status.busy else state


def _called(status: Status, peer: Announcement) -> str:
    return LOOKS[_look(status, peer)][0] + printable(peer.name or f"..{short_id(peer.peer_id)}")


def _fit(text: str, columns: int) -> str:
    """Exactly so many columns; wide letters count as two."""
    fitting = Text(text)
    fitting.truncate(max(0, columns), overflow="ellipsis" if columns > 3 else "crop", pad=True)
    return fitting.plain


def _clock(at_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at_s))
