"""Audits: fields that are none."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.audit import AuditMessage, Recall, Recalled
from petal_swarm.wire.messages.parts import MAX_SEQUENCES

from .damage import FLAGS, LISTS, STEP_NUMBERS, TENSORS, check_bad_fields

BAD: dict[type[Message], dict[str, list[Any]]] = {
    Recall: {
        "number": [*STEP_NUMBERS, ...],
        "received": FLAGS,
        "first": [*STEP_NUMBERS, ...],
        "last": [*STEP_NUMBERS, ...],
    },
    Recalled: {
        "number": [*STEP_NUMBERS, ...],
        "more": FLAGS,
        "step": [*STEP_NUMBERS, ...],
        "slices": [*LISTS, None, [[n, 0, 1] for n in range(MAX_SEQUENCES + 1)]],
        "tensor": TENSORS,
        "forks": [*LISTS, [], [0] * (MAX_SEQUENCES + 1)],
        "digest": [None, 5, "x" * 16, bytes(17)],
    },
}


@pytest.mark.parametrize("kind", get_args(AuditMessage), ids=lambda kind: kind.type)
def test_bad_fields_are_named(kind: type[Message]) -> None:
    check_bad_fields(kind, BAD[kind])
