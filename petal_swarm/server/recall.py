"""What a hop can say later of steps that it got and sent on, so that its client can audit its neighbours."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from petal_swarm.wire.messages import Recall, Recalled, Step, TensorMeta
from petal_swarm.wire.step_log import StepLog

#: Of what was received, the last few small steps are kept: audits pick steps of decoding.
KEPT_STEPS = 16
KEPT_STEP_BYTES = 256 << 10
#: What is answered at once is bounded like a step.
MAX_ROWS = 512
MAX_MESSAGES = 64


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
        found = receipts.find(question.first, question.last)
    else:
        steps = log.after(question.first - 1, done=question.last, max_rows=MAX_ROWS) or []
        found = [
            Recalled(0, False, step.step, step.slices, step.tensor, step.payload, step.forks)
            for step in steps
            if step.step <= question.last
        ]
    found = found[:MAX_MESSAGES] or [Recalled(0, False, 0, (), TensorMeta("float32", (0, 0)), b"")]
    for index, kept in enumerate(found):
        yield Recalled(
            question.number,
            index + 1 < len(found),
            kept.step,
            kept.slices,
            kept.tensor,
            kept.payload,
            kept.forks,
        )
