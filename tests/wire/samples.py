"""Strategies for everything that travels, and a few ways to damage it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st

from petal_swarm.span import Slice, Span
from petal_swarm.wire.announcement import MAX_ADAPTERS, MAX_ADDRESSES, MAX_BLOCKS, STATES, Announcement
from petal_swarm.wire.fields import MAX_TEXT
from petal_swarm.wire.frames import Buffer
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.adapters import (
    ADAPTER_DIGEST_BYTES,
    MAX_NUMBERS,
    MAX_PREFIX_TOKENS,
    MAX_RANK,
    MAX_STEM,
    MAX_TTL_S,
    AdapterOffer,
    AdapterPart,
    AdapterReady,
    AdapterWanted,
    Place,
)
from petal_swarm.wire.messages.audit import Recall, Recalled
from petal_swarm.wire.messages.directory import (
    MAX_DIALED_PORTS,
    MAX_RECORD_BYTES,
    MAX_UPLOAD_PARTS,
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
from petal_swarm.wire.messages.error import MAX_RETRY_AFTER_S, Error
from petal_swarm.wire.messages.opening import MAX_WAIT_S, SESSION_ID_BYTES, Open, Opened, PushOpen
from petal_swarm.wire.messages.parts import (
    DTYPE_BYTES,
    MAX_POSITION,
    MAX_SEQUENCES,
    MAX_STEP,
    NO_STEP,
    Neighbour,
    TensorMeta,
)
from petal_swarm.wire.messages.prefixes import (
    MAX_PAGES,
    PAGE_KEY_BYTES,
    PAGE_TOKENS,
    FindPrefix,
    PageKeys,
    PrefixFound,
)
from petal_swarm.wire.messages.repair import Leaving, Lost, Probe, Progress, Reroute, Rerouted
from petal_swarm.wire.messages.steps import ROWS, Output, Step
from petal_swarm.wire.messages.tuning import (
    ARRIVED,
    GONE,
    MAX_ADAPTER_ID,
    MAX_PASSES,
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
from petal_swarm.wire.messages.tuning import (
    MAX_NUMBERS as MAX_GRADIENTS,
)

same_every_time = settings(deadline=None, derandomize=True)


def joined(buffers: Sequence[Buffer]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


def texts(limit: int) -> st.SearchStrategy[str]:
    return st.text(max_size=8) | st.sampled_from(["", "x" * limit])


def integers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high) | st.sampled_from([low, high])


steps = integers(0, MAX_STEP)
last_steps = integers(NO_STEP, MAX_STEP)
sessions = st.binary(min_size=SESSION_ID_BYTES, max_size=SESSION_ID_BYTES)
address_lists = st.lists(texts(MAX_TEXT), max_size=3).map(tuple) | st.just(("/ip4/::",) * MAX_ADDRESSES)
traces = st.lists(st.floats(0, 1e9), max_size=4).map(tuple)
floats = st.floats(0, 1e4)


@st.composite
def spans(draw: st.DrawFn) -> Span:
    start = draw(integers(0, MAX_BLOCKS - 1))
    return Span(start, draw(integers(start + 1, MAX_BLOCKS)))


@st.composite
def tensors(draw: st.DrawFn, rows: int | None = None) -> tuple[TensorMeta, bytes]:
    meta = TensorMeta(
        draw(st.sampled_from(sorted(DTYPE_BYTES))),
        (draw(st.integers(0, 5)) if rows is None else rows, draw(st.integers(0, 5))),
    )
    return meta, draw(st.binary(min_size=meta.nbytes, max_size=meta.nbytes))


page_keys = st.builds(
    PageKeys,
    sequence=integers(0, MAX_SEQUENCES - 1),
    first_page=integers(0, MAX_POSITION // PAGE_TOKENS),
    keys=st.lists(st.binary(min_size=PAGE_KEY_BYTES, max_size=PAGE_KEY_BYTES), max_size=3).map(tuple),
)
page_key_lists = st.lists(page_keys, min_size=1, max_size=3, unique_by=lambda keys: keys[0]).map(tuple)


@st.composite
def step_messages(draw: st.DrawFn) -> Step:
    sequences = draw(st.lists(integers(0, MAX_SEQUENCES - 1), min_size=1, max_size=4, unique=True))
    slices = tuple(
        Slice(sequence, draw(integers(0, MAX_POSITION)), draw(st.integers(1, 3))) for sequence in sequences
    )
    meta, payload = draw(tensors(sum(piece.length for piece in slices)))
    return Step(
        step=draw(steps),
        epoch=draw(steps),
        slices=slices,
        tensor=meta,
        payload=payload,
        rows=draw(st.sampled_from(ROWS)),
        forks=draw(st.none() | st.lists(integers(0, MAX_SEQUENCES - 1), min_size=1, max_size=4).map(tuple)),
        trace=draw(traces),
        keys=draw(st.just(()) | page_key_lists),
    )


neighbours = st.builds(Neighbour, texts(128), address_lists)
adapter_ids = st.sampled_from(["a", "ff" * 16, "run:7", "~" * 64])
offers = st.builds(
    AdapterOffer,
    model=texts(256),
    span=spans(),
    adapter=adapter_ids,
    numbers=integers(1, MAX_NUMBERS),
    digest=st.binary(min_size=ADAPTER_DIGEST_BYTES, max_size=ADAPTER_DIGEST_BYTES),
    places=st.lists(
        st.builds(
            Place, integers(0, MAX_BLOCKS), texts(MAX_STEM), integers(1, MAX_RANK), st.floats(-1e6, 1e6)
        ),
        max_size=3,
    ).map(tuple),
    prefix_tokens=integers(0, MAX_PREFIX_TOKENS),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    eager=st.booleans(),
    ttl_s=st.floats(0, MAX_TTL_S),
)
opens = st.builds(
    Open,
    session=sessions,
    epoch=steps,
    model=texts(256),
    span=spans(),
    max_length=integers(1, MAX_POSITION),
    upstream=st.none() | texts(128),
    next=st.none() | neighbours,
    share_prefixes=st.booleans(),
    wait_s=st.floats(0, MAX_WAIT_S),
    answered=last_steps,
    spare=st.booleans(),
    receipts=st.booleans(),
    adapter=st.none() | adapter_ids,
)
push_opens = st.builds(PushOpen, session=sessions, epoch=steps)
openeds = st.builds(
    Opened,
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    max_batch_tokens=integers(1, 1 << 40),
    kv_tokens_free=integers(0, 1 << 40),
    last_step=last_steps,
)
reroutes = st.builds(
    Reroute,
    epoch=steps,
    upstream=st.none() | texts(128),
    next=st.none() | neighbours,
    also=st.booleans(),
    answered=st.none() | last_steps,
)
losses = st.builds(
    Lost, epoch=steps, upstream=st.booleans(), replayable=st.booleans(), reason=texts(MAX_TEXT)
)
outputs = st.builds(
    lambda step, epoch, tensor, trace: Output(step, epoch, *tensor, trace), steps, steps, tensors(), traces
)
questions = st.builds(FindPrefix, step=steps, epoch=steps, keys=page_key_lists)
answers = st.builds(
    PrefixFound, step=steps, pages=st.lists(integers(0, MAX_PAGES), min_size=1, max_size=3).map(tuple)
)
train_opens = st.builds(
    TrainOpen,
    run=sessions,
    epoch=steps,
    model=texts(256),
    span=spans(),
    upstream=st.none() | texts(128),
    next=st.none() | neighbours,
)
train_openeds = st.builds(
    TrainOpened,
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    max_pass_tokens=integers(1, 1 << 40),
    max_passes=integers(1, MAX_PASSES),
)
pass_lists = st.lists(steps, max_size=4).map(tuple) | st.just(tuple(range(MAX_PASSES)))


@st.composite
def forwards(draw: st.DrawFn) -> Forward:
    lengths = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    return Forward(
        draw(steps),
        lengths,
        *draw(tensors(sum(lengths))),
        keep=draw(st.booleans()),
        adapter=draw(st.none() | texts(MAX_ADAPTER_ID)),
        trace=draw(traces),
    )


@st.composite
def gradients(draw: st.DrawFn) -> Gradients:
    count = draw(st.integers(1, 5))
    first = draw(integers(0, MAX_GRADIENTS - count))
    meta = TensorMeta("float32", (1, count))
    payload = draw(st.binary(min_size=meta.nbytes, max_size=meta.nbytes))
    return Gradients(draw(steps), first, draw(integers(first + count, MAX_GRADIENTS)), meta, payload)


forwardeds = st.builds(lambda number, rows, trace: Forwarded(number, *rows, trace), steps, tensors(), traces)
backwards = st.builds(
    lambda number, rows, inputs, trace: Backward(number, *rows, inputs, trace),
    steps,
    tensors(),
    st.booleans(),
    traces,
)
backwardeds = st.builds(
    lambda number, rows, trace: Backwarded(number, *rows, trace), steps, tensors(), traces
)
relinks = st.builds(
    Relink, epoch=steps, upstream=st.none() | texts(128), next=st.none() | neighbours, passes=pass_lists
)
failures = st.builds(
    Failed,
    number=steps,
    code=texts(64),
    message=texts(MAX_TEXT),
    backward=st.booleans(),
    retry_after_s=st.none() | st.floats(0, MAX_RETRY_AFTER_S),
)
pass_states = st.builds(
    PassStates, steps, st.lists(st.tuples(steps, integers(ARRIVED, GONE)), max_size=4).map(tuple)
)
errors = st.builds(
    Error,
    code=texts(64),
    message=texts(MAX_TEXT),
    step=st.none() | steps,
    retry_after_s=st.none() | st.floats(0, MAX_RETRY_AFTER_S),
)
records = st.binary(min_size=1, max_size=20) | st.just(bytes(MAX_RECORD_BYTES))
listings = st.builds(Listing, st.lists(records, max_size=4).map(tuple))
port_lists = st.lists(integers(1, 65535), max_size=MAX_DIALED_PORTS).map(tuple)

BY_TYPE: dict[type[Message], st.SearchStrategy[Message]] = {
    Open: opens,
    PushOpen: push_opens,
    FindPrefix: questions,
    PrefixFound: answers,
    Opened: openeds,
    Step: step_messages(),
    Reroute: reroutes,
    Rerouted: st.builds(Rerouted, steps),
    Lost: losses,
    Leaving: st.just(Leaving()),
    Probe: st.builds(Probe, steps),
    Progress: st.builds(Progress, steps, last_steps, last_steps),
    Recall: st.builds(Recall, steps, st.booleans(), steps, steps),
    Recalled: step_messages().map(
        lambda step: Recalled(
            step.epoch,
            step.rows == "all",
            step.step,
            step.slices,
            step.tensor,
            step.payload,
            step.forks,
            b"d" * 16,
        )
    ),
    AdapterOffer: offers,
    AdapterWanted: st.just(AdapterWanted()),
    AdapterPart: st.builds(AdapterPart, st.binary(min_size=1, max_size=9)),
    AdapterReady: st.just(AdapterReady()),
    Output: outputs,
    TrainOpen: train_opens,
    TrainOpened: train_openeds,
    Forward: forwards(),
    Forwarded: forwardeds,
    Backward: backwards,
    Backwarded: backwardeds,
    Gradients: gradients(),
    Finish: st.builds(Finish, pass_lists.filter(bool)),
    Relink: relinks,
    Failed: failures,
    PassStates: pass_states,
    Error: errors,
    Ping: st.just(Ping()),
    Pong: st.just(Pong()),
    ListRequest: st.builds(ListRequest, texts(256)),
    Listing: listings,
    DialBack: st.builds(DialBack, port_lists),
    DialedBack: st.builds(
        lambda observed, ports, time_s: DialedBack(observed, ports, ports[1:], time_s),
        texts(MAX_TEXT),
        port_lists,
        st.floats(0, 1e12),
    ),
    Upload: st.builds(Upload, st.integers(2, MAX_UPLOAD_PARTS)),
    UploadPart: st.just(UploadPart()),
    Uploaded: st.builds(Uploaded, st.floats(0, 3600)),
}
messages: st.SearchStrategy[Message] = st.one_of(list(BY_TYPE.values()))

_claims = st.builds(
    Announcement,
    peer_id=texts(128),
    model=texts(256),
    span=spans(),
    name=texts(64),
    state=st.sampled_from(STATES),
    dtype=texts(32),
    quant=texts(32),
    kv_dtype=texts(32),
    block_time_s=st.floats(1e-9, 1e4),
    step_time_s=floats,
    prefill_tokens_per_s=st.floats(0, 1e12),
    queue_s=st.floats(0, 1e6),
    kv_tokens=integers(0, 1 << 40),
    max_batch_tokens=integers(0, 1 << 40),
    bandwidth_bytes_per_s=st.just(0.0) | st.floats(1, 1e15),
    next_rtts_s=st.dictionaries(st.text(max_size=8), floats, max_size=4),
    version=texts(64),
    movable=st.booleans(),
    moving_to=st.none() | spans(),
    trains=st.booleans(),
    adapters=st.lists(st.just(("tone", "0f" * 16)), max_size=MAX_ADAPTERS).map(tuple),
)


@st.composite
def _announcements(draw: st.DrawFn) -> Announcement:
    """With what must fit together: addresses of the peer itself, and no more tokens free than there are."""
    claim = draw(_claims)
    bases = draw(st.lists(st.sampled_from(["/ip4/::", "/memory"]), max_size=MAX_ADDRESSES))
    addresses = tuple(f"{base}/p2p/{claim.peer_id}" for base in bases)
    sound = claim.peer_id.isascii() and claim.peer_id.isprintable() and " " not in claim.peer_id
    return replace(
        claim,
        addresses=addresses if sound else (),
        kv_tokens_free=draw(integers(0, claim.kv_tokens)),
    )


announcements = _announcements()

#: One message of every type, small enough that every split of its bytes can be tried.
EXAMPLES: dict[type[Message], Message] = {
    Open: Open(
        session=bytes(range(16)),
        epoch=2,
        model="m" * 8,
        span=Span(3, 7),
        max_length=99,
        upstream="peer-1",
        next=Neighbour("peer-3", ("/ip4/127.0.0.1/tcp/4",)),
        share_prefixes=True,
    ),
    PushOpen: PushOpen(session=bytes(16), epoch=1),
    Reroute: Reroute(3, upstream="peer-1", next=Neighbour("peer-3", ("/ip4/127.0.0.1/tcp/4",)), answered=4),
    Rerouted: Rerouted(3),
    Lost: Lost(2, upstream=True, replayable=False, reason="gone"),
    Leaving: Leaving(),
    Probe: Probe(7),
    Progress: Progress(7, 12, -1),
    Recall: Recall(2, received=True, first=3, last=9),
    Recalled: Recalled(
        2,
        False,
        9,
        (Slice(1, 10, 2), Slice(0, 0, 1)),
        TensorMeta("float16", (3, 2)),
        bytes(range(12)),
        (1, 1),
    ),
    Opened: Opened("float16", 512, 4096),
    Step: Step(
        step=5,
        epoch=1,
        slices=(Slice(1, 10, 2), Slice(0, 0, 1)),
        tensor=TensorMeta("float16", (3, 2)),
        payload=bytes(range(12)),
        rows="all",
        forks=(1, 1),
        trace=(0.25,),
        keys=(PageKeys(1, 0, (bytes(32),)),),
    ),
    FindPrefix: FindPrefix(6, 1, (PageKeys(1, 2, (bytes(range(32)), bytes(32))),)),
    PrefixFound: PrefixFound(6, (1, 0)),
    AdapterOffer: AdapterOffer(
        "m" * 8,
        Span(3, 7),
        "0f" * 16,
        96,
        bytes(range(32)),
        places=(Place(3, "self_attention.dense", 4, 0.5),),
        prefix_tokens=5,
    ),
    AdapterWanted: AdapterWanted(),
    AdapterPart: AdapterPart(bytes(range(8))),
    AdapterReady: AdapterReady(),
    Output: Output(5, 1, TensorMeta("float32", (1, 2)), bytes(8), (0.5, 0.25)),
    TrainOpen: TrainOpen(
        run=bytes(range(16)),
        epoch=2,
        model="m" * 8,
        span=Span(3, 7),
        upstream="peer-1",
        next=Neighbour("peer-3", ("/ip4/127.0.0.1/tcp/4",)),
    ),
    TrainOpened: TrainOpened("float16", 512, 64),
    Forward: Forward(
        5, (2, 1), TensorMeta("float16", (3, 2)), bytes(range(12)), keep=True, adapter="a:1", trace=(0.25,)
    ),
    Forwarded: Forwarded(5, TensorMeta("float32", (1, 2)), bytes(8), (0.5, 0.25)),
    Backward: Backward(5, TensorMeta("float32", (1, 2)), bytes(8), False, (0.5,)),
    Backwarded: Backwarded(5, TensorMeta("float32", (1, 2)), bytes(8), (0.5, 0.25)),
    Gradients: Gradients(5, 4, 9, TensorMeta("float32", (1, 2)), bytes(8)),
    Finish: Finish((5, 6)),
    Relink: Relink(3, upstream="peer-1", next=Neighbour("peer-3", ()), passes=(5, 6)),
    Failed: Failed(5, "pass-gone", "dropped", True, 2.5),
    PassStates: PassStates(7, ((5, 1), (6, 4))),
    Error: Error("busy", "try again later", 5, 2.5),
    Ping: Ping(),
    Pong: Pong(),
    ListRequest: ListRequest("m" * 8),
    Listing: Listing((b"one", b"two")),
    DialBack: DialBack((31330, 1)),
    DialedBack: DialedBack("/ip4/203.0.113.7/tcp/5", (31330, 1), (1,), 1.5),
    Upload: Upload(5),
    UploadPart: UploadPart(),
    Uploaded: Uploaded(0.25),
}


def contents(message: object) -> object:
    """Equal for equal messages: steps and outputs are compared by identity otherwise."""
    names = type(message).__slots__  # type: ignore[attr-defined]
    values = {name: getattr(message, name) for name in names}
    if "payload" in values:
        values["payload"] = bytes(values["payload"])
    return type(message), values
