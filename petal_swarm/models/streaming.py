"""Which blocks stay on the device, and which are brought there ahead of use, into a few slots by turns.

Everything here is decided by places of blocks in a span; what brings the bytes is a `Transfer`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

from petal_swarm.models.family import Block

#: One block computes while the next one comes. With more slots fewer blocks could stay.
SLOTS = 2


def streamed_places(count: int, kept: int) -> tuple[int, ...]:
    """Which of `count` blocks do not stay on the device if `kept` of them may.

    Spread evenly, so that transfers are idle least. An odd number is spread as if there were one more behind
    the last: that one's slot is the one that the next pass needs first, so it cannot be filled before.
    """
    streamed = count - kept
    if streamed == count:
        return tuple(range(count))
    return tuple(number * count // (streamed + streamed % SLOTS) for number in range(streamed))


class Transfer(Protocol):
    """Brings streamed blocks, by their number among them, into slots. For one thread at a time."""

    @property
    def slots(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Memory of the slots on the device."""
        ...

    def block(self, number: int, slot: int) -> Block:
        """What computes with the streamed block `number` while it is in `slot`."""
        ...

    def begin(self, number: int, slot: int) -> None:
        """Let it come. What was in the slot is not used any more by what was computed or launched so far."""
        ...

    def wait(self, slot: int) -> None:
        """Until what was begun last has come: what is computed or launched after this sees it.

        Raises:
            OSError: it could not be read. It may be begun again.
        """
        ...


class Streaming:
    """Keeps the slots filled with the blocks that are used next.

    `places` are those of the streamed blocks in the span, in rising order. Number `n` of them always goes to
    slot `n % slots`, so that whatever wraps blocks need not know when which is there.
    """

    def __init__(self, places: Sequence[int], transfer: Transfer) -> None:
        self.places = tuple(places)
        self._transfer = transfer
        self._content: list[int | None] = [None] * transfer.slots

    @property
    def nbytes(self) -> int:
        """Memory of the slots on the device."""
        return self._transfer.nbytes

    def block(self, number: int) -> Block:
        """What computes with the streamed block `number`, when a `Pass` has said that it is there."""
        return self._transfer.block(number, number % len(self._content))

    def begin(self, blocks: Sequence[Block], start: int, stop: int) -> Pass:
        """A pass of hidden states through the places `start:stop`, `blocks` being those of the whole span."""
        first, last = bisect_left(self.places, start), bisect_left(self.places, stop)
        return Pass(self, blocks, range(first, last))

    def reach(self, number: int, own: range, is_streamed: bool) -> None:
        """Somebody is at the streamed block `number`, one of `own`, or at one that stays just before it.

        After the last of `own` is assumed to come the first: another pass through the same blocks.
        """
        content, slots = self._content, len(self._content)
        claimed: set[int] = set()
        for ahead in range(min(slots, len(own))):
            coming = own[(number - own.start + ahead) % len(own)]
            slot = coming % slots
            if slot in claimed:  # an odd number of blocks, and again from the first: it has to wait
                break
            claimed.add(slot)
            if content[slot] != coming:
                content[slot] = None
                self._transfer.begin(coming, slot)
                content[slot] = coming
        if is_streamed:
            slot = number % slots
            try:
                self._transfer.wait(slot)
            except BaseException:
                content[:] = [None] * slots  # what was begun ahead may have failed, too, and nobody has heard
                raise


class Pass:
    """The blocks of a span for one pass: each is there when it is asked for, in rising order.

    Between two of them other passes may run; then what they needed is in the slots, and comes again.
    """

    __slots__ = ("_blocks", "_own", "_streaming")

    def __init__(self, streaming: Streaming, blocks: Sequence[Block], own: range) -> None:
        self._streaming = streaming
        self._blocks = blocks
        self._own = own

    def __getitem__(self, place: int) -> Block:
        own = self._own
        if own:
            places = self._streaming.places
            number = bisect_left(places, place, own.start, own.stop)
            is_streamed = number < own.stop and places[number] == place
            self._streaming.reach(number if number < own.stop else own.start, own, is_streamed)
        return self._blocks[place]
