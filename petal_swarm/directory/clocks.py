"""Clocks that differ, in plain words. Announcements live for seconds, so who is late is not seen at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from petal_swarm.directory.records import CLOCK_SLACK_S
from petal_swarm.errors import StaleRecordError


def is_ordinary(error: StaleRecordError) -> bool:
    """Whether a record is late as any may be: a server has died, or an answer took its time."""
    return 0 <= error.late_s <= CLOCK_SLACK_S


def about_records(errors: Sequence[StaleRecordError], *, good: int, source: str) -> dict[str, str]:
    """What to say of the records in one answer that are from another time, by the peer it is about.

    Is everything in the answer as wrong, then the fault may well be here.
    """
    late_s = [error.late_s for error in errors]
    if not good and (min(late_s) > 0 or max(late_s) < 0):
        return {
            source: f"all announcements told by {source} are {_early_or_late(median(late_s))}:"
            " is this machine's clock right? (or theirs is wrong)"
        }
    return {
        error.peer_id: f"{error}, as told by {source}: that peer's clock or this machine's is"
        f" {'behind' if error.late_s > 0 else 'ahead'}, or somebody repeats old announcements"
        for error in errors
    }


def about_offsets(offsets_s: Mapping[str, float]) -> str | None:
    """What to say of other peers' clocks, by peer id seconds ahead of this machine's; None if all agree."""
    wrong = {peer_id: offset for peer_id, offset in offsets_s.items() if abs(offset) > CLOCK_SLACK_S}
    if not wrong:
        return None
    peer_id, offset_s = next(iter(wrong.items()))
    apart = f"{duration(abs(offset_s))} {'behind' if offset_s > 0 else 'ahead of'}"
    if len(wrong) == len(offsets_s) > 1:
        return f"this machine's clock is {apart} those of all {len(wrong)} peers asked: set it right"
    return (
        f"this machine's clock is {apart} that of peer {peer_id}: yours or theirs is wrong,"
        f" and servers whose clocks are over {CLOCK_SLACK_S:g} s apart do not see each other"
    )


def duration(seconds: float) -> str:
    """`90` -> `1.5 min`."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if round(seconds / size, 1) >= 1:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _early_or_late(late_s: float) -> str:
    return f"{duration(late_s)} old" if late_s > 0 else f"from {duration(-late_s)} in the future"
