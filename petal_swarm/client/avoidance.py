"""Which peers a client does not use for now. Pure: the clock is an argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: After its first failure a peer is avoided for this long, after each further one for so many times longer.
FIRST_S = 5.0
GROWTH = 3.0
LONGEST_S = 600.0
#: A peer that has not failed for this long has a clean slate.
FORGIVE_S = 1800.0
MAX_PEERS = 4096


@dataclass(slots=True)
class _Record:
    failures: int = 0
    last_failure_s: float = 0.0
    until_s: float = 0.0


class Avoidance:
    """Peers that failed or refused, each avoided for a while that grows with its failures; they come back."""

    def __init__(self, *, now: Callable[[], float]) -> None:
        self._now = now
        self._records: dict[str, _Record] = {}
        self._banned: dict[str, str] = {}

    def failed(self, peer_id: str) -> float:
        """The peer went away or broke the rules; returns for how many seconds it is now avoided."""
        now = self._now()
        record = self._record(peer_id)
        if record.failures and now - record.last_failure_s > FORGIVE_S:
            record.failures = 0
        wait_s = min(LONGEST_S, FIRST_S * GROWTH**record.failures)
        record.failures += 1
        record.last_failure_s = now
        record.until_s = max(record.until_s, now + wait_s)
        return wait_s

    def busy(self, peer_id: str, retry_after_s: float) -> None:
        """The peer asked to be left alone for a time; that is no failure."""
        record = self._record(peer_id)
        record.until_s = max(record.until_s, self._now() + min(retry_after_s, LONGEST_S))

    def ban(self, peer_id: str, reason: str) -> None:
        """Use this peer no more, for as long as this client runs."""
        self._banned[peer_id] = reason

    @property
    def banned(self) -> frozenset[str]:
        """Those that are not used even where nobody else is left."""
        return frozenset(self._banned)

    def peers(self) -> frozenset[str]:
        """All that are avoided now."""
        now = self._now()
        return self.banned.union(peer for peer, record in self._records.items() if record.until_s > now)

    def _record(self, peer_id: str) -> _Record:
        record = self._records.pop(peer_id, None) or _Record()
        self._records[peer_id] = record
        if len(self._records) > MAX_PEERS:
            del self._records[next(iter(self._records))]
        return record
