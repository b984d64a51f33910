"""How a session begins: versions, spans, and fields that are none."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from petal_swarm.errors import RemoteProtocolError, UnknownVersionError
from petal_swarm.wire.announcement import MAX_ADDRESSES, MAX_BLOCKS
from petal_swarm.wire.frames import Frame
from petal_swarm.wire.messages import Message, decode
from petal_swarm.wire.messages.opening import MAX_WAIT_S, Open, Opened, OpeningMessage, PushOpen
from petal_swarm.wire.messages.parts import MAX_POSITION, MAX_STEP

from .damage import FLAGS, LISTS, STEP_NUMBERS, TEXTS, altered, check_bad_fields

SESSIONS = [b"", bytes(15), bytes(17), "0" * 16, None, 16, list(bytes(16))]

BAD: dict[type[Message], dict[str, list[Any]]] = {
    Open: {
        "session": [*SESSIONS, ...],
        "epoch": [*STEP_NUMBERS, ...],
        "model": [*TEXTS, "x" * 257, ...],
        "max_length": [0, MAX_POSITION + 1, *STEP_NUMBERS, ...],
        "upstream": [5, b"peer", ["peer"], "x" * 129],
        "next": [5, "peer", []],
        "next__peer_id": [*TEXTS, "x" * 129, ...],
        "next__addresses": [*LISTS, [""] * (MAX_ADDRESSES + 1)],
        "share_prefixes": FLAGS,
        "wait_s": [-1.0, MAX_WAIT_S + 1, True, "1", None, [], float("nan")],
        "answered": [-2, MAX_STEP + 1, True, 1.0, "1", None],
        "spare": FLAGS,
        "receipts": FLAGS,
        "adapter": [5, b"id", "", "x" * 65, "two words", "ä", "a\n"],
    },
    PushOpen: {"session": [*SESSIONS, ...], "epoch": [*STEP_NUMBERS, ...]},
    Opened: {
        "dtype": [None, 5, [], "int8", "float64"],
        "max_batch_tokens": [0, (1 << 40) + 1, True, 1.0, "1", None],
        "kv_tokens_free": [-1, (1 << 40) + 1, True, 1.0, "1", None],
        "last_step": [-2, MAX_STEP + 1, True, 1.0, "1", None],
    },
}


@pytest.mark.parametrize("kind", get_args(OpeningMessage), ids=lambda kind: kind.type)
def test_bad_fields_are_named(kind: type[Message]) -> None:
    check_bad_fields(kind, BAD[kind])


@pytest.mark.parametrize("kind", [Open, PushOpen])
@pytest.mark.parametrize("version", [0, 2, 1 << 31])
def test_other_versions_are_refused_before_their_fields_are_read(kind: type[Message], version: int) -> None:
    frame = Frame({"type": kind.type, "version": version}, memoryview(b""))
    with pytest.raises(UnknownVersionError, match=str(version)):
        decode(frame)


@pytest.mark.parametrize("kind", [Open, PushOpen])
@pytest.mark.parametrize("version", [True, 1.0, "1", None, -1, (1 << 31) + 1, ...], ids=repr)
def test_a_version_that_is_none(kind: type[Message], version: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="'version'") as caught:
        decode(altered(kind, version=version))
    assert type(caught.value) is RemoteProtocolError


@pytest.mark.parametrize(
    "span",
    [
        None,
        5,
        "0:4",
        [],
        [1],
        [1, 2, 3],
        [2, 2],
        [3, 1],
        [-1, 2],
        [0, MAX_BLOCKS + 1],
        [0.0, 2],
        [False, True],
    ],
    ids=repr,
)
def test_spans_that_are_none(span: Any) -> None:
    with pytest.raises(RemoteProtocolError, match=r"'span'|'block'"):
        decode(altered(Open, span=span))
    with pytest.raises(RemoteProtocolError, match="'span'"):
        decode(altered(Open, span=...))
