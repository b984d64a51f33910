"""Adapters: fields that are none, and parts of no size."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.wire.frames import Frame
from petal_swarm.wire.messages import Message, decode
from petal_swarm.wire.messages.adapters import (
    MAX_NUMBERS,
    MAX_PART_BYTES,
    MAX_PLACES,
    MAX_PREFIX_TOKENS,
    MAX_RANK,
    MAX_TTL_S,
    AdapterMessage,
    AdapterOffer,
    AdapterPart,
    AdapterReady,
    AdapterWanted,
)

from .damage import FLAGS, LISTS, TEXTS, check_bad_fields

PLACE = [0, "mlp.down_proj", 4, 1.0]
BAD_PLACES = [
    [-1, *PLACE[1:]],
    [0, "x" * 65, 4, 1.0],
    [0, "mlp.down_proj", 0, 1.0],
    [0, "mlp.down_proj", MAX_RANK + 1, 1.0],
    [0, "mlp.down_proj", 4, float("nan")],
    [0, "mlp.down_proj", 4, 1e7],
    PLACE[:3],
    [*PLACE, 1],
]

BAD: dict[type[Message], dict[str, list[Any]]] = {
    AdapterOffer: {
        "model": [*TEXTS, "x" * 257, ...],
        "adapter": [*TEXTS, "", "x" * 65, "two words", "ä", ...],
        "numbers": [0, MAX_NUMBERS + 1, True, 1.0, "1", None, ...],
        "digest": [b"", bytes(31), bytes(33), "0" * 32, None, ...],
        "places": [*LISTS, [PLACE] * (MAX_PLACES + 1)],
        "prefix_tokens": [-1, MAX_PREFIX_TOKENS + 1, True, 1.0, "1", None],
        "dtype": [None, 5, [], "int8", "float64"],
        "eager": FLAGS,
        "ttl_s": [-1.0, MAX_TTL_S + 1, True, "1", None, [], float("nan")],
    },
    AdapterWanted: {},
    AdapterPart: {},
    AdapterReady: {},
}


@pytest.mark.parametrize("kind", get_args(AdapterMessage), ids=lambda kind: kind.type)
def test_bad_fields_are_named(kind: type[Message]) -> None:
    check_bad_fields(kind, BAD[kind])


@pytest.mark.parametrize("place", BAD_PLACES, ids=repr)
def test_places_that_are_none(place: list[Any]) -> None:
    from .damage import altered

    with pytest.raises(RemoteProtocolError):
        decode(altered(AdapterOffer, places=[place]))


@pytest.mark.parametrize("size", [0, MAX_PART_BYTES + 1])
def test_parts_are_neither_empty_nor_large(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match="part"):
        decode(Frame({"type": "adapter-part"}, memoryview(bytes(size))))
