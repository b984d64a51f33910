"""Two connections back to back, and every message where it does not belong."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.errors import LocalProtocolError, RemoteProtocolError
from petal_swarm.wire.connection import (
    DIRECTORY_TABLE,
    PUSH_TABLE,
    SESSION_TABLE,
    TRAIN_PUSH_TABLE,
    TRAIN_TABLE,
    Connection,
    Event,
    Role,
    State,
    StreamEnded,
    Table,
)
from petal_swarm.wire.messages import Message, encode
from petal_swarm.wire.messages.audit import Recall, Recalled
from petal_swarm.wire.messages.directory import (
    DialBack,
    DialedBack,
    Listing,
    ListRequest,
    Ping,
    Pong,
    Upload,
    Uploaded,
    UploadPart,
)
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.opening import Open, Opened, PushOpen
from petal_swarm.wire.messages.prefixes import FindPrefix, PrefixFound
from petal_swarm.wire.messages.repair import Leaving, Lost, Probe, Progress, Reroute, Rerouted
from petal_swarm.wire.messages.steps import Output, Step
from petal_swarm.wire.messages.tuning import (
    Backward,
    Backwarded,
    Failed,
    Finish,
    Forward,
    Forwarded,
    Gradients,
    PassStates,
    Relink,
    TrainOpen,
    TrainOpened,
)

from .samples import BY_TYPE, EXAMPLES, contents, joined, same_every_time

TABLES = {
    "session": SESSION_TABLE,
    "push": PUSH_TABLE,
    "train": TRAIN_TABLE,
    "train-push": TRAIN_PUSH_TABLE,
    "directory": DIRECTORY_TABLE,
}
D, L = Role.DIALER, Role.LISTENER
Flow = Sequence[tuple[Role, type[Message]]]

#: How each protocol runs when all goes well, and where it may be refused.
FLOWS: list[tuple[str, Flow]] = [
    (
        "session",
        [(D, Open), (L, Opened), (D, Step), (D, Step), (L, Output), (D, Step), (L, Output), (L, Error)],
    ),
    (
        "session",
        [
            (D, Open),
            (L, Opened),
            (L, Leaving),
            (L, Lost),
            (D, Reroute),
            (L, Rerouted),
            (D, Probe),
            (L, Progress),
            (D, Recall),
            (L, Recalled),
        ],
    ),
    ("session", [(D, Open), (L, Error)]),
    ("session", [(L, Error)]),
    ("push", [(D, PushOpen), (L, Opened), (D, Step), (D, Step), (L, Error)]),
    ("push", [(D, PushOpen), (L, Opened), (D, FindPrefix), (L, PrefixFound), (D, Step), (L, Error)]),
    ("push", [(D, PushOpen), (L, Error)]),
    ("push", [(L, Error)]),
    (
        "train",
        [
            (D, TrainOpen),
            (L, TrainOpened),
            (D, Forward),
            (D, Forward),
            (L, Forwarded),
            (D, Backward),
            (L, Gradients),
            (L, Backwarded),
            (L, Failed),
            (D, Finish),
            (L, Error),
        ],
    ),
    (
        "train",
        [
            (D, TrainOpen),
            (L, TrainOpened),
            (L, Lost),
            (L, Leaving),
            (D, Relink),
            (L, Rerouted),
            (D, Probe),
            (L, PassStates),
        ],
    ),
    ("train", [(D, TrainOpen), (L, Error)]),
    ("train", [(L, Error)]),
    ("train-push", [(D, PushOpen), (L, TrainOpened), (D, Forward), (L, Backward), (D, Forward), (L, Error)]),
    ("train-push", [(D, PushOpen), (L, Error)]),
    ("train-push", [(L, Error)]),
    ("directory", [(D, Ping), (L, Pong), (D, ListRequest), (L, Listing), (D, Ping), (L, Pong), (L, Error)]),
    ("directory", [(D, DialBack), (L, DialedBack), (D, Ping), (L, Error)]),
    ("directory", [(D, ListRequest), (L, Error)]),
    ("directory", [(D, Upload), (D, UploadPart), (D, UploadPart), (L, Uploaded), (D, Ping), (L, Pong)]),
    ("directory", [(D, Upload), (D, UploadPart), (L, Error)]),
]

#: A way into each state that can be reached.
WAYS: dict[tuple[str, State], Flow] = {
    ("session", State.IDLE): [],
    ("session", State.OPENING): [(D, Open)],
    ("session", State.OPEN): [(D, Open), (L, Opened)],
    ("session", State.ENDED): [(D, Open), (L, Error)],
    ("push", State.IDLE): [],
    ("push", State.OPENING): [(D, PushOpen)],
    ("push", State.OPEN): [(D, PushOpen), (L, Opened)],
    ("push", State.ENDED): [(D, PushOpen), (L, Error)],
    ("train", State.IDLE): [],
    ("train", State.OPENING): [(D, TrainOpen)],
    ("train", State.OPEN): [(D, TrainOpen), (L, TrainOpened)],
    ("train", State.ENDED): [(D, TrainOpen), (L, Error)],
    ("train-push", State.IDLE): [],
    ("train-push", State.OPENING): [(D, PushOpen)],
    ("train-push", State.OPEN): [(D, PushOpen), (L, TrainOpened)],
    ("train-push", State.ENDED): [(D, PushOpen), (L, Error)],
    ("directory", State.IDLE): [],
    ("directory", State.OPENING): [(D, Ping)],
    ("directory", State.OPEN): [(D, Upload)],
    ("directory", State.ENDED): [(D, Ping), (L, Error)],
}


def pair(table: Table) -> dict[Role, Connection]:
    return {role: Connection(table, role) for role in Role}


def events(connection: Connection) -> list[Event]:
    found = []
    while (event := connection.next_event()) is not None:
        found.append(event)
    return found


def run(ends: dict[Role, Connection], flow: Flow, cuts: Sequence[int] = ()) -> None:
    """Send the messages of a flow, each arriving in pieces cut at `cuts`."""
    for sender, kind in flow:
        data = joined(ends[sender].send(EXAMPLES[kind]))
        places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        for start, stop in pairwise(places):
            if start < stop:
                ends[sender.other].receive_data(data[start:stop])
        (event,) = events(ends[sender.other])
        assert contents(event) == contents(EXAMPLES[kind])
        assert ends[D].state is ends[L].state


@pytest.mark.parametrize(("name", "flow"), FLOWS)
def test_every_message_cut_anywhere(name: str, flow: Flow) -> None:
    for cut in range(1, max(len(joined(encode(EXAMPLES[kind]))) for _, kind in flow)):
        run(pair(TABLES[name]), flow, [cut])


@same_every_time
@given(case=st.sampled_from(FLOWS), cuts=st.lists(st.integers(1, 400), max_size=6))
def test_every_message_in_pieces(case: tuple[str, Flow], cuts: list[int]) -> None:
    run(pair(TABLES[case[0]]), case[1], cuts)


@same_every_time
@given(data=st.data(), count=st.integers(0, 6), cut=st.integers(1, 2000))
def test_what_is_sent_ahead_arrives_in_order(data: st.DataObject, count: int, cut: int) -> None:
    """Several steps in flight, cut without regard to where one ends."""
    ends = pair(SESSION_TABLE)
    run(ends, WAYS["session", State.OPEN])
    sent = [data.draw(BY_TYPE[Step]) for _ in range(count)]
    stream = b"".join(joined(ends[D].send(step)) for step in sent)
    for start in range(0, len(stream), cut):
        ends[L].receive_data(stream[start : start + cut])
    assert list(map(contents, events(ends[L]))) == list(map(contents, sent))


def test_both_sides_talk_at_once() -> None:
    """Outputs cross steps on the way, and the last error crosses a step."""
    ends = pair(SESSION_TABLE)
    run(ends, WAYS["session", State.OPEN])
    steps = [ends[D].send(EXAMPLES[Step]) for _ in range(3)]
    outputs = [ends[L].send(EXAMPLES[Output]) for _ in range(2)]
    for buffers in outputs:
        ends[D].receive_data(joined(buffers))
    for buffers in steps:
        ends[L].receive_data(joined(buffers))
    assert [type(event) for event in events(ends[D])] == [Output, Output]
    assert [type(event) for event in events(ends[L])] == [Step, Step, Step]


def test_the_flows_use_every_line_of_the_tables() -> None:
    for name, table in TABLES.items():
        used = set()
        for flow_name, flow in FLOWS:
            if flow_name == name:
                state = State.IDLE
                for sender, kind in flow:
                    used.add((state, sender, kind))
                    state = table[state, sender, kind]
        assert used == set(table), name


def test_the_ways_reach_every_state_of_the_tables() -> None:
    for name, table in TABLES.items():
        states = {State.IDLE, *table.values()}
        assert states == {state for way_name, state in WAYS if way_name == name}


CASES = [
    (name, state, sender, kind)
    for (name, state), (sender, kind) in product(WAYS, product(Role, BY_TYPE))
    if (state, sender, kind) not in TABLES[name]
]


def test_most_combinations_are_illegal() -> None:
    assert len(CASES) == len(WAYS) * 2 * len(BY_TYPE) - sum(len(table) for table in TABLES.values())


@pytest.mark.parametrize(("name", "state"), WAYS)
def test_illegal_messages_are_blamed_on_their_sender(name: str, state: State) -> None:
    for _, _, sender, kind in (case for case in CASES if case[:2] == (name, state)):
        ends = pair(TABLES[name])
        run(ends, WAYS[name, state])
        assert ends[sender].state is state
        with pytest.raises(LocalProtocolError, match=f"'{kind.type}'.*{sender.value}.*{state.value}"):
            ends[sender].send(EXAMPLES[kind])
        with pytest.raises(RemoteProtocolError, match=f"'{kind.type}'.*{sender.value}.*{state.value}"):
            ends[sender.other].receive_data(joined(encode(EXAMPLES[kind])))
        assert ends[sender].state is ends[sender.other].state is state
        assert events(ends[sender.other]) == []


@pytest.mark.parametrize("name", TABLES)
def test_nothing_is_allowed_after_the_end(name: str) -> None:
    assert not any(state is State.ENDED for state, _, _ in TABLES[name])


def test_what_came_before_an_illegal_message_is_not_lost() -> None:
    ends = pair(SESSION_TABLE)
    run(ends, WAYS["session", State.OPEN])
    stream = joined(ends[D].send(EXAMPLES[Step])) + joined(encode(EXAMPLES[Ping]))
    with pytest.raises(RemoteProtocolError):
        ends[L].receive_data(stream)
    assert [type(event) for event in events(ends[L])] == [Step]


def test_a_message_over_the_bounds_leaves_the_state_alone() -> None:
    dialer = Connection(DIRECTORY_TABLE, D)
    with pytest.raises(LocalProtocolError):
        dialer.send(ListRequest("x" * (1 << 20)))
    assert dialer.state is State.IDLE
    dialer.send(Ping())


@pytest.mark.parametrize("kind", BY_TYPE, ids=lambda kind: kind.type)
def test_the_end_of_the_stream_inside_a_frame(kind: type[Message]) -> None:
    data = joined(encode(EXAMPLES[kind]))
    for cut in range(1, len(data)):
        listener = Connection({}, L)
        listener.receive_data(data[:cut])
        with pytest.raises(RemoteProtocolError, match="inside a frame"):
            listener.receive_data(b"")


def test_the_end_of_the_stream_between_frames() -> None:
    ends = pair(PUSH_TABLE)
    run(ends, WAYS["push", State.OPEN])
    ends[L].receive_data(joined(ends[D].send(EXAMPLES[Step])))
    ends[L].receive_data(b"")
    first, second = events(ends[L])
    assert (type(first), second) == (Step, StreamEnded())
    assert ends[L].next_event() is None


def test_the_end_of_a_stream_that_never_began() -> None:
    listener = Connection(SESSION_TABLE, L)
    listener.receive_data(memoryview(b""))
    assert listener.next_event() == StreamEnded()


def test_roles() -> None:
    assert (D.other, L.other) == (L, D)
