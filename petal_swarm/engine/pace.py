"""When batches run and how large they are, by what they were measured to take. Pure: no clock, no tensors.

Whoever decodes waits for at most one block of a prefill batch; so a chunk has as many rows as make one
block of it short beside a decode step, and prefill is owed a share of the time that decoding takes: more
of it when a peer's own prompts keep its sessions from decoding together. A decode batch waits a moment for
sessions that are about to join it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

#: Of the time of a decode batch: what one block of prefill may take, and what prefill is owed after it.
BLOCK_SHARE = 1 / 4
PREFILL_SHARE = 1 / 3
#: What it is owed at most where whoever decodes has prompts waiting, too.
MOST_PREFILL_SHARE = 4.0
#: What a piece of work may take, of the time that decode and prefill had since the last one.
WORK_SHARE = 1 / 3

#: When nobody decoded for `ACTIVE_S`, a block may take this long, or this many times a decode step's block,
#: whichever is longer: large blocks are not worth running for a few rows.
ACTIVE_S = 1.0
IDLE_BLOCK_S = 0.25
IDLE_BLOCKS = 4

#: Fewer rows cost hardly less, since the weights are read all the same. Chunks are multiples of it.
MIN_ROWS = 16

#: A decode batch waits for the next session this part of the time that one takes, and in all at most that.
#: The answers of a batch come back as new steps one after the other: without this the first of them would
#: run alone, and the others wait for it.
LINGER = 1 / 20
LINGER_IN_ALL = 1 / 8

#: A session that was in none of so many decode batches is not waited for.
COMPANY = 8

#: How much one new measurement moves a running mean.
SMOOTHING = 0.1


class Pace:
    """Sizes chunks of prefill, and says whose turn it is. Times in seconds.

    `row_s` is a running mean of what one row of prefill takes in one block, `decode_s` of a decode batch in
    all its blocks, `block_s` in one; 0 before anything was measured.
    """

    def __init__(
        self, max_rows: int, *, row_s: float = 0.0, decode_s: float = 0.0, block_s: float = 0.0
    ) -> None:
        self.row_s = row_s
        self.decode_s = decode_s
        self.block_s = block_s
        self._max_rows = max_rows
        self._last_decode_s = float("-inf")
        self._owed_s = 0.0
        self._piece_s = 0.0
        self._decode_every_s = 0.0
        #: When the next piece of work goes before decode and prefill.
        self.work_due_s = float("-inf")

    @property
    def owes_prefill(self) -> bool:
        """Whether prefill, if any waits, goes before the next decode batch."""
        return self._owed_s > 0.0

    def decoded(self, now_s: float, elapsed_s: float, blocks: int, *, prefill_share: float) -> None:
        """A decode batch took `elapsed_s` until `now_s`; see `prefill_share`."""
        if now_s - self._last_decode_s < ACTIVE_S:
            self._decode_every_s = smooth(self._decode_every_s, now_s - self._last_decode_s)
        self._last_decode_s = now_s
        self._owed_s = elapsed_s * prefill_share
        self.decode_s = smooth(self.decode_s, elapsed_s)
        self.block_s = smooth(self.block_s, elapsed_s / blocks)

    def prefilled(self, elapsed_s: float, rows: int) -> None:
        """One block of a prefill batch took `elapsed_s`."""
        self._owed_s -= elapsed_s
        self.row_s = smooth(self.row_s, elapsed_s / rows)

    def worked(self, now_s: float, elapsed_s: float) -> None:
        """A piece of work took `elapsed_s` until `now_s`."""
        self._piece_s = elapsed_s
        self.work_due_s = now_s + elapsed_s / WORK_SHARE

    def spares_time(self, now_s: float) -> bool:
        """Whether a piece of work may run because nothing else waits now.

        The next decode step would wait for its end: that is of no account only if nobody decodes, or if steps
        come much more seldom.
        """
        if now_s - self._last_decode_s >= ACTIVE_S:
            return True
        return self._piece_s <= self._decode_every_s * BLOCK_SHARE

    def chunk_rows(self, now_s: float) -> int:
        """How many rows the next prefill batch may have."""
        if self.row_s == 0.0:
            return self._max_rows
        if now_s - self._last_decode_s < ACTIVE_S:
            limit_s = self.decode_s * BLOCK_SHARE
        else:
            limit_s = max(IDLE_BLOCK_S, IDLE_BLOCKS * self.block_s)
        rows = int(limit_s / self.row_s) // MIN_ROWS * MIN_ROWS
        return min(max(rows, MIN_ROWS), self._max_rows)

    def estimate_s(self, decode_batches: float, prefill_rows: int, blocks: int) -> float:
        """What this much work will take."""
        return decode_batches * self.decode_s + prefill_rows * blocks * self.row_s


class Company:
    """Which sessions decode at present, and so how long a decode batch waits for more of them."""

    def __init__(self) -> None:
        self._seen_s: dict[Hashable, float] = {}  # by session, the latest last
        self._until_s: float | None = None

    def decoded(self, now_s: float, sessions: Iterable[Hashable]) -> None:
        """These were in a decode batch that has just ended."""
        self._until_s = None
        for session in sessions:
            self._seen_s.pop(session, None)
            self._seen_s[session] = now_s

    def left(self, session: Hashable) -> None:
        """It will not come again."""
        self._seen_s.pop(session, None)

    def linger_s(self, now_s: float, ready: int, decode_s: float) -> float:
        """How long to wait for another session when `ready` are there and a batch takes `decode_s`."""
        while self._seen_s:
            session = next(iter(self._seen_s))
            if now_s - self._seen_s[session] < decode_s * COMPANY:
                break
            del self._seen_s[session]
        if ready >= len(self._seen_s):
            return 0.0
        if self._until_s is None:
            self._until_s = now_s + decode_s * LINGER_IN_ALL
        return max(0.0, min(decode_s * LINGER, self._until_s - now_s))


def prefill_share(decoding: Iterable[str], prefilling: Iterable[str]) -> float:
    """Of the time of a decode batch, what prefill is owed after it; both name the peer of each session.

    A batch of few rows takes hardly less than one of many. So a peer of whose sessions most still wait with
    their prompts gets the others to decode beside them sooner if the few wait. A peer that has no prompt
    here never waits for those of others longer than for `PREFILL_SHARE` of the time.
    """
    waiting = Counter(prefilling)
    if not waiting:
        return 0.0
    own = min((waiting[peer] / count for peer, count in Counter(decoding).items()), default=0.0)
    return min(max(own, PREFILL_SHARE), MOST_PREFILL_SHARE)


def smooth(mean: float, value: float) -> float:
    """A running mean after one more value; 0 stands for none yet."""
    return value if mean == 0.0 else mean + SMOOTHING * (value - mean)
