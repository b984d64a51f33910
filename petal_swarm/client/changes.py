"""What happened between two looks at a swarm. Pure: no clock, no network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from petal_swarm.client.status import Status, load, short_id, tokens_per_s
from petal_swarm.routing.blocks import format_blocks
from petal_swarm.wire.announcement import Announcement

#: Round trips that differ by less are the same: below a millisecond they never stop changing.
SAME_RTT_S = 0.001

#: What an event can be of: a server, or the whole model.
KINDS = (
    "joined",  # a new server answers
    "left",  # it has said so, or its record has run out
    "failed",  # it does not answer
    "back",  # it answers again
    "serving",  # it has loaded its blocks
    "leaving",  # it finishes what it has begun
    "moving",  # it means to serve other blocks
    "moved",
    "busy",
    "free",
    "gap_opened",  # blocks that nobody serves any more
    "gap_closed",
    "lost",  # the swarm cannot be asked
    "found",
)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened, as one of `KINDS`; `words` follow the server's name in a sentence.

    `peer_id` and `name` are empty in events of the whole model, whose `words` are the whole sentence.
    `blocks` are those that it is about.
    """

    kind: str
    words: str
    peer_id: str = ""
    name: str = ""
    blocks: tuple[int, ...] = ()

    @property
    def sentence(self) -> str:
        """The event in words, with the name as its owner wrote it."""
        return f"{self.who} {self.words}" if self.peer_id else self.words

    @property
    def who(self) -> str:
        return self.name or f"..{short_id(self.peer_id)}"


def changes(old: Status, new: Status) -> tuple[Event, ...]:
    """What happened from `old` to `new`, servers in the order of their spans, then gaps."""
    before = {peer.peer_id: peer for peer in old.announcements}
    after = {peer.peer_id: peer for peer in new.announcements}
    events: list[Event] = []
    for peer_id, peer in before.items():
        if peer_id not in after:
            if peer_id in old.joining:
                words = "left before it was ready"
            else:
                words = "left" if peer_id in old.rtts_s else "did not come back"
            events.append(_of(peer, "left", words))
    for peer_id, peer in after.items():
        events += _of_peer(before.get(peer_id), peer, old, new)
    return (*events, *_gaps(old, new))


def _of_peer(was: Announcement | None, peer: Announcement, old: Status, new: Status) -> Iterator[Event]:
    there = peer.peer_id in new.rtts_s
    if was is None or peer.peer_id in old.joining:
        if there:
            yield _of(peer, "joined", f"joined {_doing(peer)}")
        elif was is not None and peer.peer_id not in new.joining:
            yield _of(peer, "failed", f"does not answer; it was to serve {_blocks(peer)}")
        return
    if there != (peer.peer_id in old.rtts_s):
        if there:
            yield _of(peer, "back", f"answers {_doing(peer)}")
        else:
            yield _of(peer, "failed", f"does not answer; it served {_blocks(was)}")
    if not there:
        return
    if was.span != peer.span:
        yield _of(peer, "moved", f"moved from {_blocks(was)} to {_blocks(peer)}")
    elif was.state != peer.state:
        if peer.state == "serving":
            yield _of(peer, "serving", f"now serves {_blocks(peer)}")
        else:
            yield _of(peer, "leaving", f"is about to leave {_blocks(peer)}")
    if peer.moving_to not in (None, was.moving_to):
        assert peer.moving_to is not None
        yield _of(peer, "moving", f"moves to {format_blocks(peer.moving_to.blocks())}")
    was_busy, busy = peer.peer_id in old.busy, peer.peer_id in new.busy
    if busy and not was_busy:
        yield _of(peer, "busy", "is busy")
    elif was_busy and not busy:
        yield _of(peer, "free", "has room again")


def _gaps(old: Status, new: Status) -> Iterator[Event]:
    before, after = set(old.missing), set(new.missing)
    if opened := tuple(sorted(after - before)):
        yield Event("gap_opened", f"nobody serves {format_blocks(opened)}", blocks=opened)
    if closed := tuple(sorted(before - after)):
        rest = "" if after else "; the model is whole again"
        yield Event("gap_closed", f"{format_blocks(closed)} served again{rest}", blocks=closed)


def _of(peer: Announcement, kind: str, words: str) -> Event:
    return Event(kind, words, peer.peer_id, peer.name, tuple(peer.span.blocks()))


def _doing(peer: Announcement) -> str:
    return f"{'with' if peer.state == 'serving' else 'and loads'} {_blocks(peer)}"


def _blocks(peer: Announcement) -> str:
    return format_blocks(peer.span.blocks())


def looks_different(old: Status, new: Status) -> frozenset[str]:
    """The peer ids of those in `new` that are not as they were, as far as one could see."""
    before = {peer.peer_id: peer for peer in old.announcements}
    return frozenset(
        peer.peer_id
        for peer in new.announcements
        if (was := before.get(peer.peer_id)) is None
        or _standing(old, was) != _standing(new, peer)
        # Most of a large swarm is as it was a moment ago: the same object.
        or (was is not peer and _figures(was) != _figures(peer))
    )


def _standing(status: Status, peer: Announcement) -> tuple[object, ...]:
    rtt_s = status.rtts_s.get(peer.peer_id)
    return (
        status.state(peer),
        peer.peer_id in status.busy,
        None if rtt_s is None else round(2 * math.log2(max(rtt_s, SAME_RTT_S))),
    )


def _figures(peer: Announcement) -> tuple[object, ...]:
    return (
        (peer.span, peer.name, peer.state, peer.moving_to),
        f"{tokens_per_s(peer):.2g}",
        f"{peer.queue_s:.1g}",
        round(load(peer), 2),
        (peer.dtype, peer.quant, peer.version, peer.trains, peer.adapters),
    )
