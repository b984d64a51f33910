"""Messages: what is written is read back; everything else is the peer's fault, said by name."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import MISSING
from dataclasses import fields as dataclass_fields
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.errors import LocalProtocolError, RemoteProtocolError, UnknownVersionError
from petal_swarm.span import Slice
from petal_swarm.wire.announcement import MAX_ADDRESSES, MAX_BLOCKS
from petal_swarm.wire.fields import MAX_TEXT
from petal_swarm.wire.frames import PREFIX, Frame, FrameDecoder
from petal_swarm.wire.messages import (
    MAX_ANNOUNCEMENTS,
    MAX_EXTENT,
    MAX_HOPS,
    MAX_PAGES,
    MAX_POSITION,
    MAX_RECORD_BYTES,
    MAX_RETRY_AFTER_S,
    MAX_SEQUENCES,
    MAX_STEP,
    MAX_WAIT_S,
    DialBack,
    DialedBack,
    Error,
    FindPrefix,
    Listing,
    ListRequest,
    Lost,
    Message,
    Open,
    Opened,
    Output,
    Ping,
    Pong,
    PrefixFound,
    Probe,
    Progress,
    PushOpen,
    Recall,
    Recalled,
    Reroute,
    Rerouted,
    Step,
    TensorMeta,
    decode,
    encode,
)

from .samples import BY_TYPE, EXAMPLES, contents, joined, messages, same_every_time


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


STEP_NUMBERS = [-1, MAX_STEP + 1, True, False, 1.0, "1", None, [], b"1", {}]
SESSIONS = [b"", bytes(15), bytes(17), "0" * 16, None, 16, list(bytes(16))]
TEXTS = [None, 5, b"text", ["text"], {}]
TENSORS = [None, [], "float32", 3, ...]
LISTS = [5, "ab", {}, b"ab"]
PORTS = [*LISTS, [1] * 5]

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
        "share_prefixes": [None, 0, 1, "true", []],
        "wait_s": [-1.0, MAX_WAIT_S + 1, True, "1", None, [], float("nan")],
        "answered": [-2, MAX_STEP + 1, True, 1.0, "1", None],
        "spare": [None, 0, 1, "true", []],
        "receipts": [None, 0, 1, "true", []],
    },
    PushOpen: {"session": [*SESSIONS, ...], "epoch": [*STEP_NUMBERS, ...]},
    Opened: {
        "dtype": [None, 5, [], "int8", "float64"],
        "max_batch_tokens": [0, (1 << 40) + 1, True, 1.0, "1", None],
        "kv_tokens_free": [-1, (1 << 40) + 1, True, 1.0, "1", None],
        "last_step": [-2, MAX_STEP + 1, True, 1.0, "1", None],
    },
    Reroute: {
        "epoch": [*STEP_NUMBERS, ...],
        "upstream": [5, b"peer", ["peer"], "x" * 129],
        "next": [5, "peer", []],
        "next__peer_id": [*TEXTS, "x" * 129, ...],
        "also": [None, 0, 1, "true", []],
        "answered": [-2, MAX_STEP + 1, True, 1.0, "1"],
    },
    Rerouted: {"epoch": [*STEP_NUMBERS, ...]},
    Lost: {
        "epoch": [*STEP_NUMBERS, ...],
        "upstream": [None, 0, 1, "true", []],
        "replayable": [None, 0, 1, "true", []],
        "reason": [*TEXTS, "x" * (MAX_TEXT + 1)],
    },
    Probe: {"number": [*STEP_NUMBERS, ...]},
    Recall: {
        "number": [*STEP_NUMBERS, ...],
        "received": [None, 0, 1, "true", []],
        "first": [*STEP_NUMBERS, ...],
        "last": [*STEP_NUMBERS, ...],
    },
    Recalled: {
        "number": [*STEP_NUMBERS, ...],
        "more": [None, 0, 1, "true", []],
        "step": [*STEP_NUMBERS, ...],
        "slices": [*LISTS, None, [[n, 0, 1] for n in range(MAX_SEQUENCES + 1)]],
        "tensor": TENSORS,
        "forks": [*LISTS, [], [0] * (MAX_SEQUENCES + 1)],
        "digest": [None, 5, "x" * 16, bytes(17)],
    },
    Progress: {
        "number": [*STEP_NUMBERS, ...],
        "arrived": [-2, MAX_STEP + 1, True, 1.0, "1", None, ...],
        "done": [-2, MAX_STEP + 1, True, 1.0, "1", None, ...],
    },
    Step: {
        "step": [*STEP_NUMBERS, ...],
        "epoch": [*STEP_NUMBERS, ...],
        "slices": [*LISTS, None, [], [[n, 0, 1] for n in range(MAX_SEQUENCES + 1)], ...],
        "rows": ["", "first", "LAST", None, 5, [], ...],
        "tensor": TENSORS,
        "tensor__dtype": [None, 5, [], {}, "int8", "float64", ...],
        "tensor__codec": [None, 5, [], "zip", ...],
        "tensor__shape": [
            None,
            5,
            [],
            [3],
            [3, 2, 1],
            [3, -2],
            [3, 2.0],
            [True, 6],
            [3, MAX_EXTENT + 1],
            ...,
        ],
        "forks": [*LISTS, [], [0] * (MAX_SEQUENCES + 1)],
        "trace": [*LISTS, None, [0.0] * (MAX_HOPS + 1)],
        "keys": [*LISTS, None, [None], [[0, 0]], [[0, 0, bytes(31)]], [[0, 0, "x" * 32]]],
    },
    FindPrefix: {
        "step": [*STEP_NUMBERS, ...],
        "epoch": [*STEP_NUMBERS, ...],
        "keys": [*LISTS, None, [], [[0, 0, bytes(32 * (MAX_PAGES + 1))]], ...],
    },
    PrefixFound: {
        "step": [*STEP_NUMBERS, ...],
        "pages": [*LISTS, None, [], [-1], [MAX_PAGES + 1], [1.0], [True], ...],
    },
    Output: {
        "step": [*STEP_NUMBERS, ...],
        "epoch": [*STEP_NUMBERS, ...],
        "tensor": TENSORS,
        "tensor__codec": ["zip", ...],
        "trace": [*LISTS, None, [0.0] * (MAX_HOPS + 1)],
    },
    Error: {
        "code": [*TEXTS, "x" * 65, ...],
        "message": [*TEXTS, "x" * (MAX_TEXT + 1), ...],
        "step": [number for number in STEP_NUMBERS if number is not None],
        "retry_after_s": [-0.1, MAX_RETRY_AFTER_S + 1, True, "1", [], float("nan"), float("inf")],
    },
    Ping: {},
    Pong: {},
    ListRequest: {"model": [*TEXTS, "x" * 257, ...]},
    Listing: {"count": [-1, MAX_ANNOUNCEMENTS + 1, True, 2.0, "2", None, ...]},
    DialBack: {"ports": PORTS},
    DialedBack: {
        "observed": [*TEXTS, "x" * (MAX_TEXT + 1)],
        "tried": PORTS,
        "reached": PORTS,
        "time_s": [-1, float("nan"), float("inf"), 1e13, "1", True],
    },
}


@pytest.mark.parametrize("kind", BAD, ids=lambda kind: kind.type)
def test_bad_fields_are_named(kind: type[Message]) -> None:
    for name, values in BAD[kind].items():
        for value in values:
            with pytest.raises(RemoteProtocolError) as caught:
                decode(altered(kind, **{name: value}))
            assert repr(name.split("__")[-1]) in str(caught.value), (name, value)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", BAD, ids=lambda kind: kind.type)
def test_every_field_is_checked(kind: type[Message]) -> None:
    """So that a new field without a line in the table above fails here."""
    known = {"version", "payload", "records", "span"}
    assert {field.name for field in dataclass_fields(kind)} - known == {
        name for name in BAD[kind] if "__" not in name and name != "count"
    }


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


@pytest.mark.parametrize(
    "piece",
    [
        None,
        5,
        [],
        [0, 0],
        [0, 0, 3, 0],
        [MAX_SEQUENCES, 0, 3],
        [-1, 0, 3],
        [0, MAX_POSITION + 1, 3],
        [0, -1, 3],
        [0, 0, 0],
        [0, 0, -3],
        [0, 0, MAX_POSITION + 1],
        [0, 0, 3.0],
        [False, 0, 3],
        [0, True, 3],
        [0, "0", 3],
        {"0": 0},
    ],
    ids=repr,
)
def test_slices_that_are_none(piece: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="slice"):
        decode(altered(Step, slices=[piece]))


@pytest.mark.parametrize(
    "slices", [[[0, 0, 2]], [[0, 0, 4]], [[0, 0, 3], [1, 0, 1]], [[0, 0, MAX_POSITION]]], ids=repr
)
def test_slices_that_lie_about_the_rows(slices: list[list[int]]) -> None:
    with pytest.raises(RemoteProtocolError, match="'slices'"):
        decode(altered(Step, slices=slices))


def test_a_sequence_may_appear_once() -> None:
    with pytest.raises(RemoteProtocolError, match=r"'slices'.*twice"):
        decode(altered(Step, slices=[[0, 0, 1], [1, 0, 1], [0, 1, 1]]))


@pytest.mark.parametrize("kind", [Step, Output])
@pytest.mark.parametrize("shape", [[3, 3], [0, 0], [1, 6], [MAX_EXTENT, MAX_EXTENT]], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensors_that_lie_about_their_size(kind: type[Message], shape: list[int], dtype: str) -> None:
    size = shape[0] * shape[1] * (4 if dtype == "float32" else 2)
    frame = altered(kind, tensor__shape=shape, tensor__dtype=dtype)
    if size == frame.payload.nbytes and kind is Output:
        assert decode(frame).tensor == TensorMeta(dtype, (shape[0], shape[1]))  # type: ignore[union-attr]
        return
    with pytest.raises(RemoteProtocolError):
        decode(frame)


@pytest.mark.parametrize("forks", [[0, MAX_SEQUENCES], [-1], [None], [0.0], [True], [[0]]], ids=repr)
def test_forks_that_are_none(forks: list[Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="'sequence'"):
        decode(altered(Step, forks=forks))


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


@pytest.mark.parametrize(
    "trace", [[-1.0], [float("nan")], [float("inf")], [2e9], ["1"], [None], [True], [[]]], ids=repr
)
def test_traces_that_are_none(trace: list[Any]) -> None:
    for kind in (Step, Output):
        with pytest.raises(RemoteProtocolError, match="'seconds'"):
            decode(altered(kind, trace=trace))


@pytest.mark.parametrize("entry", [0, 1 << 16, -1, True, "1", 1.0, None], ids=repr)
def test_ports_that_are_none(entry: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="'port'"):
        decode(altered(DialBack, ports=[1, entry]))


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


@pytest.mark.parametrize(
    ("count", "payload"),
    [
        (1, b""),
        (1, b"\0\0\0"),
        (1, b"\0\0\0\0"),
        (1, b"\0\0\0\2a"),
        (1, b"\0\0\0\1ab"),
        (0, b"\0\0\0\1a"),
        (2, b"\0\0\0\1a"),
        (1, b"\0\0\0\1a\0\0\0\1b"),
        (1, b"\xff\xff\xff\xffa"),
        (1, (MAX_RECORD_BYTES + 1).to_bytes(4, "big") + bytes(MAX_RECORD_BYTES + 1)),
    ],
    ids=repr,
)
def test_listings_that_do_not_add_up(count: int, payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="records"):
        decode(Frame({"type": "listing", "count": count}, memoryview(payload)))


def test_a_listing_over_the_bounds_is_not_sent() -> None:
    """The peer would take it for an attack, and end the stream."""
    full = Listing((b"x",) * MAX_ANNOUNCEMENTS)
    assert decode(transmitted(full)) == full
    for records in [(b"x",) * (MAX_ANNOUNCEMENTS + 1), (bytes(MAX_RECORD_BYTES + 1),), (b"",)]:
        with pytest.raises(LocalProtocolError, match="bounds"):
            encode(Listing(records))


def test_a_long_error_message_is_cut_not_refused() -> None:
    message = decode(transmitted(Error("internal", "x" * 5000)))
    assert isinstance(message, Error)
    assert message.message == "x" * MAX_TEXT


def test_a_step_stays_small() -> None:
    """One token of one sequence: what is not needed is not sent."""
    step = Step(1 << 20, 1, (Slice(0, 1 << 20, 1),), TensorMeta("bfloat16", (1, 1)), bytes(2))
    assert {"forks", "trace"}.isdisjoint(step.to_header())
    assert len(encode(step)[0]) < 120


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
