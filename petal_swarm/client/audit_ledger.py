"""Which steps are audited, by whom, and who is to blame when two servers disagree.

Pure: random numbers and the time are arguments. An audit that fails accuses everybody on whose word it
rests: who computed, who recomputed, and whoever said what went in or came out. A peer is banned when two
failed audits have nobody but that peer in common. So one liar, whatever its part in them, cannot have an
honest server banned: it is among the accused each time itself.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from itertools import count

from petal_swarm.client.audit import Precision, Tolerance, Verdict
from petal_swarm.errors import ConfigError

FORGET_AFTER_S = 24 * 3600.0
MAX_FINDINGS = 1000
#: Auditors whose tolerance is at most so many times the least are as good as the best.
_SHARP = 1.5


class AuditSampler:
    """Picks steps for audits, each with the probability `rate`: whether one was just audited tells nothing.

    Raises:
        ConfigError: a rate that is no probability.
    """

    def __init__(self, rate: float, rng: random.Random) -> None:
        if not 0 <= rate <= 1:
            raise ConfigError(f"audit_rate must be 0 to 1, got {rate}")
        self._rate = rate
        self._rng = rng

    def picks(self) -> bool:
        """Whether to audit this step of this hop; ask once for each."""
        return self._rng.random() < self._rate


def order_auditors(
    audited: Precision, candidates: Mapping[str, Precision], *, blocks: int, rng: random.Random
) -> list[str]:
    """Peer ids of `candidates`, who serve the audited blocks, in the order to ask them.

    Those with a tolerance near the least come first. Among them chance decides, so that nobody becomes
    everybody's auditor by what it announces.
    """
    allowed = {
        peer: Tolerance.between(audited, precision, blocks).of_change
        for peer, precision in candidates.items()
    }
    least = min(allowed.values(), default=0.0)
    drawn = rng.sample(sorted(allowed), len(allowed))
    return sorted(drawn, key=lambda peer: allowed[peer] > _SHARP * least)


@dataclass(frozen=True, slots=True)
class Audit:
    """Who takes part in one audit.

    `sources` are peers on whose word alone its inputs or the claimed rows rest: hop k-1 if the inputs come
    from its log, unless the audited peer acknowledged them; hop k+1 if it reported what it got, unless the
    audited peer acknowledged that. Rows that the client sent or received itself have no source.
    """

    audited: str
    auditor: str
    sources: frozenset[str] = frozenset()

    def suspects(self, verdict: Verdict) -> frozenset[str]:
        """Who may be wrong, by the comparison of claimed and recomputed rows alone. Nobody if they agree."""
        accused: frozenset[str] = frozenset()
        if "claimed" in verdict.suspects:
            accused |= {self.audited, *self.sources}
        if "recomputed" in verdict.suspects:
            accused |= {self.auditor}
        return accused

    def settled(
        self, verdict: Verdict, third: str, with_claim: Verdict, with_auditor: Verdict
    ) -> frozenset[str]:
        """As `suspects`, now that `third` has recomputed the rows too.

        `with_claim` compares the claimed rows with the third's, `with_auditor` the auditor's with them.
        """
        accused = self.suspects(verdict)
        if len(accused) <= 1 or with_claim.ok == with_auditor.ok:
            # The third agrees with both (its tolerance is wide) or with none (then it may be wrong too).
            return accused if with_claim.ok or len(accused) <= 1 else accused | {third}
        if with_auditor.ok:
            return accused - {self.auditor}
        return accused & {self.auditor}


@dataclass(frozen=True, slots=True)
class Finding:
    """A failed audit: `what` differed, and who may be to blame."""

    audit: Hashable
    suspects: frozenset[str]
    what: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Ban:
    """A peer that this client will not use again; `str` is the line for the log."""

    peer_id: str
    findings: tuple[Finding, Finding]

    def __str__(self) -> str:
        first, second = (finding.what for finding in self.findings)
        return f"banned {self.peer_id}, whose answers failed two audits: {first}; and {second}"


class AuditLedger:
    """What failed audits have found; all times are of one clock of the caller's, in seconds."""

    def __init__(self, *, forget_after_s: float = FORGET_AFTER_S) -> None:
        self._forget_after_s = forget_after_s
        self._findings: deque[Finding] = deque(maxlen=MAX_FINDINGS)
        self._banned: dict[str, Ban] = {}
        self._numbers = count()
        self.passed = 0
        self.failed = 0

    @property
    def banned(self) -> Mapping[str, Ban]:
        """Peers never to be used again, by id."""
        return self._banned

    def record_pass(self) -> None:
        """An audit found nothing. It excuses nobody: who cheats now and then passes most audits."""
        self.passed += 1

    def record(
        self, suspects: Collection[str], what: str, *, now_s: float, audit: Hashable = None
    ) -> Ban | None:
        """Take down a failed audit; returns the ban that follows from it, if one does.

        `audit` names the audited step: two findings about one step count as one.
        """
        self.failed += 1
        self._forget(now_s)
        if not suspects or not self._banned.keys().isdisjoint(suspects):
            return None  # explained: somebody took part who is known to be wrong
        if audit is None:
            audit = next(self._numbers)
        new = Finding(audit, frozenset(suspects), what, now_s)
        for old in self._findings:
            common = old.suspects & new.suspects
            if len(common) == 1 and old.audit != new.audit:
                return self._ban(Ban(next(iter(common)), (old, new)))
        self._findings.append(new)
        return None

    def suspicion(self, peer_id: str, *, now_s: float) -> int:
        """In how many failed audits, not yet explained, the peer is a suspect: better to avoid it."""
        self._forget(now_s)
        return sum(peer_id in finding.suspects for finding in self._findings)

    def _ban(self, ban: Ban) -> Ban:
        self._banned[ban.peer_id] = ban
        explained = [finding for finding in self._findings if ban.peer_id in finding.suspects]
        for finding in explained:
            self._findings.remove(finding)
        return ban

    def _forget(self, now_s: float) -> None:
        horizon_s = now_s - self._forget_after_s if math.isfinite(self._forget_after_s) else -math.inf
        while self._findings and self._findings[0].at_s < horizon_s:
            self._findings.popleft()
