"""Who is audited and who is banned: nobody honest, whatever one liar does."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petal_swarm.client.audit import Precision, Verdict
from petal_swarm.client.audit_ledger import Audit, AuditLedger, AuditSampler, order_auditors
from petal_swarm.errors import ConfigError

AGREE = Verdict(0.3)
DIFFER = Verdict(3.0, "rows differ", ("claimed", "recomputed"))
CLAIM_BROKEN = Verdict(9.0, "the claimed rows are broken", ("claimed",))
AUDITOR_BROKEN = Verdict(9.0, "the recomputed rows are broken", ("recomputed",))

same_every_time = settings(deadline=None, derandomize=True)


def test_about_one_step_in_so_many_is_picked_and_none_is_foretold() -> None:
    sampler = AuditSampler(0.05, random.Random(1))
    picked = [sampler.picks() for _ in range(20_000)]
    assert 900 < sum(picked) < 1100
    after = [second for first, second in pairwise(picked) if first]
    assert 0.02 < sum(after) / len(after) < 0.09
    assert not any(AuditSampler(0.0, random.Random(1)).picks() for _ in range(100))
    assert all(AuditSampler(1.0, random.Random(1)).picks() for _ in range(100))


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="audit_rate"):
        AuditSampler(rate, random.Random(1))


def test_sharp_auditors_come_first_and_chance_decides_among_them() -> None:
    candidates = {
        "plain": Precision("bfloat16"),
        "half": Precision("float16"),
        "equal": Precision("float32", "nf4"),
        "too": Precision("bfloat16", "nf4"),
        "int8": Precision("bfloat16", "int8"),
    }
    rng = random.Random(0)
    orders = [order_auditors(Precision("float32", "nf4"), candidates, blocks=3, rng=rng) for _ in range(50)]
    assert all(set(order[:2]) == {"equal", "too"} for order in orders)
    assert all(sorted(order) == sorted(candidates) for order in orders)
    assert len({tuple(order) for order in orders}) > 6
    assert order_auditors(Precision(), {}, blocks=1, rng=rng) == []


def test_everybody_on_whose_word_an_audit_rests_is_a_suspect() -> None:
    audit = Audit("a", "b", frozenset({"before", "after"}))
    assert audit.suspects(AGREE) == set()
    assert audit.suspects(DIFFER) == {"a", "b", "before", "after"}
    assert audit.suspects(CLAIM_BROKEN) == {"a", "before", "after"}
    assert audit.suspects(AUDITOR_BROKEN) == {"b"}


def test_a_third_opinion_settles_it() -> None:
    audit = Audit("a", "b", frozenset({"before"}))
    assert audit.settled(DIFFER, "c", with_claim=DIFFER, with_auditor=AGREE) == {"a", "before"}
    assert audit.settled(DIFFER, "c", with_claim=AGREE, with_auditor=DIFFER) == {"b"}
    assert audit.settled(DIFFER, "c", with_claim=AGREE, with_auditor=AGREE) == {"a", "b", "before"}
    assert audit.settled(DIFFER, "c", with_claim=DIFFER, with_auditor=DIFFER) == {"a", "b", "c", "before"}
    assert audit.settled(AUDITOR_BROKEN, "c", with_claim=DIFFER, with_auditor=DIFFER) == {"b"}


def test_two_settled_failures_are_a_ban_and_its_line_says_what_differed() -> None:
    ledger = AuditLedger()
    assert ledger.record({"a"}, "row 5 differs by 0.4", now_s=0) is None
    assert ledger.suspicion("a", now_s=0) == 1
    ban = ledger.record({"a"}, "row 9 differs by 0.7", now_s=5)
    assert ban is not None
    assert ban.peer_id == "a"
    assert (
        str(ban)
        == "banned a, whose answers failed two audits: row 5 differs by 0.4; and row 9 differs by 0.7"
    )
    assert list(ledger.banned) == ["a"]
    assert ledger.failed == 2


def test_passed_audits_excuse_nobody() -> None:
    ledger = AuditLedger()
    ledger.record({"a"}, "x", now_s=0)
    for _ in range(100):
        ledger.record_pass()
    assert ledger.passed == 100
    assert ledger.record({"a"}, "y", now_s=1) is not None


def test_one_step_counts_once() -> None:
    ledger = AuditLedger()
    assert ledger.record({"a"}, "x", now_s=0, audit="step 7") is None
    assert ledger.record({"a"}, "x", now_s=1, audit="step 7") is None
    assert ledger.record({"a"}, "x", now_s=2, audit="step 8") is not None


def test_two_who_only_contradict_each_other_are_both_left_alone() -> None:
    ledger = AuditLedger()
    assert all(ledger.record({"a", "b"}, "x", now_s=n) is None for n in range(10))
    assert ledger.suspicion("a", now_s=10) == ledger.suspicion("b", now_s=10) == 10


def test_who_contradicts_two_others_is_banned_and_the_others_are_cleared() -> None:
    ledger = AuditLedger()
    ledger.record({"liar", "b"}, "x", now_s=0)
    ban = ledger.record({"liar", "c"}, "y", now_s=1)
    assert ban is not None
    assert ban.peer_id == "liar"
    assert ledger.suspicion("b", now_s=1) == ledger.suspicion("c", now_s=1) == 0
    assert ledger.record({"liar", "b"}, "z", now_s=2) is None, "explained by who is banned already"
    assert ledger.suspicion("b", now_s=2) == 0


def test_old_findings_are_forgotten_but_bans_are_not() -> None:
    ledger = AuditLedger(forget_after_s=60)
    ledger.record({"a"}, "x", now_s=0)
    assert ledger.record({"a"}, "y", now_s=61) is None
    assert ledger.record({"a"}, "z", now_s=100) is not None
    ledger.record({"b"}, "x", now_s=1000)
    assert list(ledger.banned) == ["a"]


@same_every_time
@given(
    liar=st.integers(0, 5),
    audits=st.lists(
        st.tuples(
            st.permutations(range(6)),
            st.integers(0, 2),
            st.booleans(),
            st.tuples(st.booleans(), st.booleans(), st.booleans()),
        ),
        max_size=30,
    ),
)
def test_one_liar_never_has_an_honest_peer_banned(
    liar: int, audits: list[tuple[list[int], int, bool, tuple[bool, bool, bool]]]
) -> None:
    """It may be audited, auditor, third or a source, and lie or not as it likes, each time anew.

    Honest peers agree with each other, whatever the inputs; a source that lies breaks the claim for all
    who recompute. What a comparison with the liar's rows says is the liar's choice.
    """
    ledger = AuditLedger()
    for step, (order, sources, ask_third, choices) in enumerate(audits):
        audited, auditor, third, *rest = order
        audit = Audit(str(audited), str(auditor), frozenset(map(str, rest[:sources])))
        source_lies = liar in rest[:sources] and choices[0]
        outcomes = {
            pair: _outcome(pair, liar, source_lies and audited in pair, choice)
            for pair, choice in zip(combinations((audited, auditor, third), 2), choices, strict=True)
        }
        verdict = outcomes[audited, auditor]
        if verdict.ok:
            continue
        suspects = audit.suspects(verdict)
        if ask_third:
            with_claim, with_auditor = outcomes[audited, third], outcomes[auditor, third]
            suspects = audit.settled(verdict, str(third), with_claim, with_auditor)
        assert str(liar) in suspects
        ban = ledger.record(suspects, "x", now_s=step)
        assert ban is None or ban.peer_id == str(liar)


def _outcome(pair: tuple[int, int], liar: int, spoilt: bool, choice: bool) -> Verdict:
    differs = choice if liar in pair else spoilt
    return DIFFER if differs else AGREE


@same_every_time
@given(seed=st.integers(0, 1000), servers=st.integers(3, 8))
def test_a_liar_is_banned_once_two_others_have_met_it(seed: int, servers: int) -> None:
    rng = random.Random(seed)
    ledger = AuditLedger()
    for step in range(400):
        audited, auditor = rng.sample(range(servers), 2)
        if 0 in (audited, auditor) and ledger.record({str(audited), str(auditor)}, "x", now_s=step):
            break
    assert list(ledger.banned) == ["0"]
