"""All messages: what is written is read back; everything else is the peer's fault."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import MISSING
from dataclasses import fields as dataclass_fields
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.wire.frames import PREFIX, Frame, FrameDecoder
from petal_swarm.wire.messages import Message, decode

from ..samples import BY_TYPE, EXAMPLES, contents, messages, same_every_time
from .damage import altered, transmitted


def test_every_type_has_samples() -> None:
    """So that the tests below try a new type."""
    assert set(BY_TYPE) == set(EXAMPLES) == set(get_args(Message))


@pytest.mark.parametrize("kind", BY_TYPE, ids=lambda kind: kind.type)
def test_there_and_back(kind: type[Message]) -> None:
    @same_every_time
    @given(message=BY_TYPE[kind])
    def check(message: Message) -> None:
        assert contents(decode(transmitted(message))) == contents(message)

    check()
    assert contents(decode(transmitted(EXAMPLES[kind]))) == contents(EXAMPLES[kind])


@same_every_time
@given(message=messages, name=st.text(min_size=9, max_size=12), value=st.integers() | st.lists(st.booleans()))
def test_unknown_fields_are_ignored(message: Message, name: str, value: Any) -> None:
    frame = transmitted(message)
    frame.header[name] = value
    if "tensor" in frame.header:
        frame.header["tensor"][name] = value
    assert contents(decode(frame)) == contents(message)


@pytest.mark.parametrize("kind", ["unknown", "", "Step", None, 7, b"step", ["step"], "x" * 65, ...], ids=repr)
def test_unknown_types(kind: Any) -> None:
    header = {} if kind is ... else {"type": kind}
    with pytest.raises(RemoteProtocolError, match="type"):
        decode(Frame(header, memoryview(b"")))


OPTIONAL = [
    (kind, field.name, field.default)
    for kind in BY_TYPE
    for field in dataclass_fields(kind)
    if field.default is not MISSING and field.name not in ("rows", "version", "records")
]


@pytest.mark.parametrize(("kind", "name", "default"), OPTIONAL, ids=str)
def test_a_field_with_a_default_may_be_missing(kind: type[Message], name: str, default: Any) -> None:
    """Those of older peers are: how the protocol grows."""
    assert getattr(decode(altered(kind, **{name: ...})), name) == default


@pytest.mark.parametrize("kind", BY_TYPE, ids=lambda kind: kind.type)
def test_values_nested_too_deep_to_print(kind: type[Message]) -> None:
    """msgpack takes a thousand levels; Python's `repr` does not."""
    levels = 1000
    packed = b"\x81\xa1a" + b"\x91" * levels + b"\x01"
    (bomb,) = FrameDecoder().feed(PREFIX.pack(len(packed), 0) + packed)
    for name in transmitted(EXAMPLES[kind]).header:
        frame = transmitted(EXAMPLES[kind])
        frame.header[name] = bomb.header["a"]
        with pytest.raises(RemoteProtocolError):
            decode(frame)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 5)
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=17),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@same_every_time
@given(message=messages, data=st.data())
def test_mutated_fields_raise_nothing_else(message: Message, data: st.DataObject) -> None:
    frame = transmitted(message)
    header = frame.header
    if isinstance(header.get("tensor"), dict) and data.draw(st.booleans()):
        header = header["tensor"]
    name = data.draw(st.sampled_from(sorted(header)))
    header[name] = data.draw(values)
    with suppress(RemoteProtocolError):
        decode(frame)


@same_every_time
@given(
    kind=st.sampled_from([kind.type for kind in BY_TYPE]),
    header=st.dictionaries(st.sampled_from(["step", "epoch", "slices", "tensor", "count", "code"]), values),
    payload=st.binary(max_size=12),
)
def test_noise_raises_nothing_else(kind: str, header: dict[str, Any], payload: bytes) -> None:
    with suppress(RemoteProtocolError):
        decode(Frame({**header, "type": kind}, memoryview(payload)))
