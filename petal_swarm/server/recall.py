"""What a hop can say later of steps that it got and sent on, so that its client can audit its neighbours."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

from petal_swarm.wire.messages import Recall, Recalled, Step, TensorMeta
from petal_swarm.wire.step_log import StepLog

#: Of what was received, the last few small steps are kept: audits pick steps of decoding.
KEPT_STEPS = 16
KEPT_STEP_BYTES = 256 << 10
#: What is answered at once is bounded like a step.
MAX_ROWS = 512
MAX_MESSAGES = 64
MAX_BYTES = 64 << 20


class Receipts:
    """The last steps that came to a session."""

    def __init__(self) -> None:
        self._kept: deque[Recalled] = deque(maxlen=KEPT_STEPS)

    def keep(self, step: Step) -> None:
        """Called before anything is done with the step, which is then changed."""
        if len(step.payload) <= KEPT_STEP_BYTES:
            self._kept.append(
                Recalled(0, False, step.step, step.slices, step.tensor, bytes(step.payload), step.forks)
            )

    def find(self, first: int, last: int) -> list[Recalled]:
        return [kept for kept in self._kept if first <= kept.step <= last]


def answer(question: Recall, log: StepLog, receipts: Receipts) -> Iterator[Recalled]:
    """The messages that answer a question; one without slices if what it is about is not known here."""
    if question.received:
        found: Iterable[Recalled | Step] = receipts.find(question.first, question.last)
    else:
        found = log.between(question.first, question.last, max_rows=MAX_ROWS)
    answers, nbytes = [], 0
    for kept in islice(found, MAX_MESSAGES):
        nbytes += kept.tensor.nbytes
        if nbytes > MAX_BYTES:
            break
        answers.append(
            Recalled(question.number, True, kept.step, kept.slices, kept.tensor, kept.payload, kept.forks)
        )
    yield from answers[:-1]
    if answers:
        yield replace(answers[-1], more=False)
    else:
        yield Recalled(question.number, False, 0, (), TensorMeta("float32", (0, 0)), b"")
