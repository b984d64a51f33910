"""What is kept of passes is bounded, and whoever keeps most gives up first."""

from __future__ import annotations

import pytest

from petal_swarm.errors import BusyError
from petal_swarm.server.training.ledger import REMEMBERED_PASSES, Ledger, Pass, Retained
from petal_swarm.wire.messages.tuning import ARRIVED, BACKWARD_ARRIVED, BACKWARD_DONE, FORWARD_DONE, GONE

from .bench import backward, forward

#: Of a message with three rows of four numbers, two sequences, and no trace.
COST = 512 + 2 * 40 + 3 * 4 * 4


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def begun(ledger: Ledger, number: int) -> Pass:
    held = ledger.begin(number)
    assert held is not None
    return held


def keep(ledger: Ledger, number: int) -> Pass:
    """A pass whose output is kept."""
    held = begun(ledger, number)
    held.forward_done, held.output = True, forward(number)
    ledger.changed(held)
    return held


def test_bytes_are_counted_until_the_pass_is_finished() -> None:
    retained = Retained(1 << 20)
    ledger = Ledger("a", retained, Clock(), max_passes=10)
    first, second = keep(ledger, 0), keep(ledger, 1)
    assert retained.nbytes == 2 * COST
    first.gradient = backward(0)
    ledger.changed(first)
    assert retained.nbytes == 3 * COST - 80
    assert ledger.finish([0, 7]) == [first]
    assert (retained.nbytes, first.finished, second.finished) == (COST, True, False)
    ledger.changed(first)
    assert retained.nbytes == COST, "it is finished: it counts no more"
    ledger.close()
    assert (retained.nbytes, len(ledger)) == (0, 0)


def test_who_keeps_most_gives_up_its_oldest() -> None:
    retained = Retained(4 * COST)
    large = Ledger("large", retained, Clock(), max_passes=10)
    small = Ledger("small", retained, Clock(), max_passes=10)
    passes = [keep(large, number) for number in range(3)]
    mine = [keep(small, number) for number in range(2)]
    assert [held.output is None for held in passes] == [True, False, False]
    assert all(held.output is not None for held in mine)
    assert retained.nbytes == 4 * COST
    assert not passes[0].failed, "its backward needs nothing of this"


def test_a_waiting_gradient_that_is_dropped_fails_its_pass() -> None:
    retained = Retained(COST)
    ledger = Ledger("a", retained, Clock(), max_passes=10)
    held = begun(ledger, 0)
    held.backward = backward(0)
    ledger.changed(held)
    keep(ledger, 1)
    assert (held.failed, held.backward, held.state) == (True, None, GONE)


def test_the_number_of_passes_is_bounded() -> None:
    ledger = Ledger("a", Retained(1 << 20), Clock(), max_passes=2)
    begun(ledger, 0)
    begun(ledger, 1)
    with pytest.raises(BusyError, match="finish some"):
        ledger.begin(2)
    assert ledger.begin(1) is ledger.find(1)
    ledger.finish([0])
    begun(ledger, 2)


def test_finished_numbers_are_remembered_for_a_while() -> None:
    ledger = Ledger("a", Retained(1 << 20), Clock(), max_passes=10)
    ledger.finish([0])
    assert ledger.begin(0) is None
    ledger.finish(range(1, REMEMBERED_PASSES))
    assert ledger.begin(0) is None
    ledger.finish([REMEMBERED_PASSES])
    assert ledger.begin(0) is not None


def test_what_nobody_touches_expires() -> None:
    clock, retained = Clock(), Retained(1 << 20)
    ledger = Ledger("a", retained, clock, max_passes=10)
    left, touched, working = keep(ledger, 0), keep(ledger, 1), keep(ledger, 2)
    working.working = True
    clock.now = 50.0
    ledger.begin(1)
    clock.now = 101.0
    assert ledger.expire(100.0) == [left]
    assert (left.state, touched.failed, working.failed) == (GONE, False, False)
    assert retained.nbytes == 2 * COST
    assert ledger.expire(100.0) == [], "once"
    assert ledger.find(0) is left, "its number stays known"


def test_states_in_order() -> None:
    held = Pass(0, 0.0)
    states = [held.state]
    held.forward_done = True
    states.append(held.state)
    held.backward_arrived = True
    states.append(held.state)
    held.gradient_done = True
    states.append(held.state)
    held.failed = True
    states.append(held.state)
    assert states == [ARRIVED, FORWARD_DONE, BACKWARD_ARRIVED, BACKWARD_DONE, GONE]
