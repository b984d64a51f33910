"""Shared prefixes: keys of pages that are none."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.wire.messages import Message, decode
from petal_swarm.wire.messages.parts import MAX_POSITION, MAX_SEQUENCES
from petal_swarm.wire.messages.prefixes import MAX_PAGES, FindPrefix, PrefixFound, PrefixMessage
from petal_swarm.wire.messages.steps import Step

from .damage import LISTS, STEP_NUMBERS, altered, check_bad_fields

BAD: dict[type[Message], dict[str, list[Any]]] = {
    FindPrefix: {
        "step": [*STEP_NUMBERS, ...],
        "epoch": [*STEP_NUMBERS, ...],
        "keys": [*LISTS, None, [], [[0, 0, bytes(32 * (MAX_PAGES + 1))]], ...],
    },
    PrefixFound: {
        "step": [*STEP_NUMBERS, ...],
        "pages": [*LISTS, None, [], [-1], [MAX_PAGES + 1], [1.0], [True], ...],
    },
}


@pytest.mark.parametrize("kind", get_args(PrefixMessage), ids=lambda kind: kind.type)
def test_bad_fields_are_named(kind: type[Message]) -> None:
    check_bad_fields(kind, BAD[kind])


@pytest.mark.parametrize("kind", [Step, FindPrefix])
def test_a_sequence_has_keys_once(kind: type[Message]) -> None:
    with pytest.raises(RemoteProtocolError, match=r"'keys'.*twice"):
        decode(altered(kind, keys=[[0, 0, bytes(32)], [1, 0, b""], [0, 1, bytes(32)]]))


@pytest.mark.parametrize("kind", [Step, FindPrefix])
@pytest.mark.parametrize(
    "entry", [[-1, 0], [MAX_SEQUENCES, 0], [0, -1], [0, MAX_POSITION], [True, 0]], ids=repr
)
def test_page_keys_that_are_none(kind: type[Message], entry: list[Any]) -> None:
    with pytest.raises(RemoteProtocolError, match=r"'sequence'|'first_page'"):
        decode(altered(kind, keys=[[*entry, bytes(32)]]))
