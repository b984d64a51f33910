"""What a hop can say later of steps that it got and sent on, so that its client can audit its neighbours."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from petal_swarm.wire.messages.audit import DIGEST_BYTES, Recall, Recalled
from petal_swarm.wire.messages.parts import TensorMeta
from petal_swarm.wire.messages.steps import Step
from petal_swarm.wire.step_log import StepLog

#: Of what was received, the last few small steps are kept: audits pick steps of decoding.
KEPT_STEPS = 16
KEPT_STEP_BYTES = 256 << 10
#: Of one question; the client asks again for what follows.
MAX_STEPS = 256
MAX_BYTES = 16 << 20

_NOTHING = TensorMeta("float32", (0, 0))


class Receipts:
    """The last steps that came to a session, and a digest of all."""

    def __init__(self) -> None:
        self._kept: deque[Recalled] = deque(maxlen=KEPT_STEPS)
        self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def keep(self, step: Step) -> None:
        """Called before anything is done with the step, which is then changed."""
        self._digest.update(step.payload)
        if len(step.payload) <= KEPT_STEP_BYTES:
            kept = _recalled(step)
            self._kept.append(replace(kept, payload=bytes(step.payload), digest=self._digest.digest()))

    def find(self, first: int, last: int) -> list[Recalled]:
        return [kept for kept in self._kept if first <= kept.step <= last]


def answer(question: Recall, log: StepLog, receipts: Receipts | None) -> Iterator[Recalled]:
    """The messages that answer a question; one without slices if what it is about is not known here."""
    found: Sequence[Recalled]
    if question.received:
        found = receipts.find(question.first, question.last) if receipts else ()
    else:
        found = _sent(log.between(question.first, question.last))
    for index, recalled in enumerate(found):
        yield replace(recalled, number=question.number, more=index + 1 < len(found))
    if not found:
        yield Recalled(question.number, False, 0, (), _NOTHING, b"")


def _sent(steps: Iterator[Step]) -> list[Recalled]:
    found: list[Recalled] = []
    nbytes = 0
    for step in islice(steps, MAX_STEPS):
        nbytes += len(step.payload)
        if found and nbytes > MAX_BYTES:
            break
        found.append(_recalled(step))
    return found


def _recalled(step: Step) -> Recalled:
    return Recalled(0, False, step.step, step.slices, step.tensor, step.payload, step.forks)
