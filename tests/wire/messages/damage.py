"""Frames of messages with a field changed, and values that no field of a kind may have."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from typing import Any

import msgpack
import pytest

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.wire.frames import Frame, FrameDecoder
from petal_swarm.wire.messages import Message, decode, encode
from petal_swarm.wire.messages.parts import MAX_STEP

from ..samples import EXAMPLES, joined

STEP_NUMBERS = [-1, MAX_STEP + 1, True, False, 1.0, "1", None, [], b"1", {}]
TEXTS = [None, 5, b"text", ["text"], {}]
TENSORS = [None, [], "float32", 3, ...]
LISTS = [5, "ab", {}, b"ab"]
FLAGS = [None, 0, 1, "true", []]


def transmitted(message: Message) -> Frame:
    (frame,) = FrameDecoder().feed(joined(encode(message)))
    return frame


def altered(kind: type[Message], **changes: Any) -> Frame:
    """A valid frame of this type with other fields; `...` takes one away, `tensor__x` is inside `tensor`."""
    frame = transmitted(EXAMPLES[kind])
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        header, name = (frame.header[outer], inner) if inner else (frame.header, name)
        if value is ...:
            del header[name]
        else:
            header[name] = value
    return Frame(msgpack.unpackb(msgpack.packb(frame.header), raw=False), frame.payload)


def check_bad_fields(kind: type[Message], bad: dict[str, list[Any]]) -> None:
    """Each of the values is refused by the name of its field; no field of the message is left out."""
    unlisted = {"version", "payload", "records", "span"}
    assert {field.name for field in dataclass_fields(kind)} - unlisted == {
        name for name in bad if "__" not in name and name != "count"
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(RemoteProtocolError) as caught:
                decode(altered(kind, **{name: value}))
            assert repr(name.split("__")[-1]) in str(caught.value), (name, value)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 300
