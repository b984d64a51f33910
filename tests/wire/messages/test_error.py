"""Errors: fields that are none, and a message that is too long."""

from __future__ import annotations

from typing import Any

from petal_swarm.wire.fields import MAX_TEXT
from petal_swarm.wire.messages import decode
from petal_swarm.wire.messages.error import MAX_RETRY_AFTER_S, Error

from .damage import STEP_NUMBERS, TEXTS, check_bad_fields, transmitted

BAD: dict[str, list[Any]] = {
    "code": [*TEXTS, "x" * 65, ...],
    "message": [*TEXTS, "x" * (MAX_TEXT + 1), ...],
    "step": [number for number in STEP_NUMBERS if number is not None],
    "retry_after_s": [-0.1, MAX_RETRY_AFTER_S + 1, True, "1", [], float("nan"), float("inf")],
}


def test_bad_fields_are_named() -> None:
    check_bad_fields(Error, BAD)


def test_a_long_error_message_is_cut_not_refused() -> None:
    message = decode(transmitted(Error("internal", "x" * 5000)))
    assert isinstance(message, Error)
    assert message.message == "x" * MAX_TEXT
