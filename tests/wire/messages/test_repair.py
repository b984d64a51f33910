"""Repair of a ring: fields that are none."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from petal_swarm.wire.fields import MAX_TEXT
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.parts import MAX_STEP
from petal_swarm.wire.messages.repair import Leaving, Lost, Probe, Progress, RepairMessage, Reroute, Rerouted

from .damage import FLAGS, STEP_NUMBERS, TEXTS, check_bad_fields

BAD: dict[type[Message], dict[str, list[Any]]] = {
    Reroute: {
        "epoch": [*STEP_NUMBERS, ...],
        "upstream": [5, b"peer", ["peer"], "x" * 129],
        "next": [5, "peer", []],
        "next__peer_id": [*TEXTS, "x" * 129, ...],
        "also": FLAGS,
        "answered": [-2, MAX_STEP + 1, True, 1.0, "1"],
    },
    Rerouted: {"epoch": [*STEP_NUMBERS, ...]},
    Lost: {
        "epoch": [*STEP_NUMBERS, ...],
        "upstream": FLAGS,
        "replayable": FLAGS,
        "reason": [*TEXTS, "x" * (MAX_TEXT + 1)],
    },
    Leaving: {},
    Probe: {"number": [*STEP_NUMBERS, ...]},
    Progress: {
        "number": [*STEP_NUMBERS, ...],
        "arrived": [-2, MAX_STEP + 1, True, 1.0, "1", None, ...],
        "done": [-2, MAX_STEP + 1, True, 1.0, "1", None, ...],
    },
}


@pytest.mark.parametrize("kind", get_args(RepairMessage), ids=lambda kind: kind.type)
def test_bad_fields_are_named(kind: type[Message]) -> None:
    check_bad_fields(kind, BAD[kind])
