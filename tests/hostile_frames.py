"""Conversations as an honest peer has them, and what a hostile one makes of them. Seeded; no I/O.

Used by the suite, over the memory transport, and by `benchmarks/fuzz.py`, against server processes.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from petal_swarm.span import Slice, Span
from petal_swarm.wire.frames import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, PREFIX
from petal_swarm.wire.messages import Message, encode
from petal_swarm.wire.messages.adapters import AdapterOffer, AdapterPart, Place
from petal_swarm.wire.messages.directory import ListRequest, Ping
from petal_swarm.wire.messages.opening import Open, PushOpen
from petal_swarm.wire.messages.parts import Neighbour, TensorMeta
from petal_swarm.wire.messages.prefixes import FindPrefix, PageKeys
from petal_swarm.wire.messages.repair import Probe
from petal_swarm.wire.messages.steps import Step
from petal_swarm.wire.messages.tuning import Backward, Finish, Forward, Relink, TrainOpen
from petal_swarm.wire.protocols import ADAPTER, DIRECTORY, PUSH, SESSION, TRAIN, TRAIN_PUSH

MAX_LENGTH = 64
#: How a stream may end; a held one is neither written nor read any more, and not ended.
ENDINGS = ("close", "abort", "hold")


@dataclass(frozen=True, slots=True)
class Target:
    """A server to be talked to: what an honest client would know of it."""

    peer_id: str
    addresses: tuple[str, ...]
    span: Span
    model: str
    hidden_size: int


@dataclass(slots=True)
class Attack:
    """Frames for one stream. After the first one an answer is waited for, briefly, as an honest peer would.

    `companion` is to be sent first, on a stream of its own for the protocol that a push belongs to, and that
    kept open meanwhile.
    """

    protocol: str
    frames: list[bytes]
    ending: str
    companion: bytes | None = None
    reads: bool = True
    damage: list[str] = field(default_factory=list)


class Hostile:
    """Makes attacks, always the same ones from the same seed. `own_id` is the attacker's peer id."""

    def __init__(self, seed: int, own_id: str, *, held_share: float = 0.005) -> None:
        self._rng = random.Random(seed)
        self._own_id = own_id
        self._held_share = held_share

    def attack(self, target: Target, following: Target | None = None) -> Attack:
        """One stream's worth. `following` is a server that could be the next hop of a session there."""
        rng = self._rng
        ring = 1 if following else 0
        kinds = ("session", "push", "directory", "adapter", "ring", "train", "train-push", "chain")
        kind = rng.choices(kinds, (4, 3, 2, 2, ring, 2, 2, ring))[0]
        companion = None
        if kind == "push":
            opening = self._open(target, upstream=self._own_id)
            companion = _bytes(opening)
            frames = [_bytes(message) for message in self._pushes(target, opening.session)]
            protocol = PUSH
        elif kind == "train-push":
            train = self._train_open(target, upstream=self._own_id)
            companion = _bytes(train)
            frames = [_bytes(PushOpen(train.run, 0)), *map(_bytes, self._rows(target, back=False))]
            protocol = TRAIN_PUSH
        elif kind in ("train", "chain"):
            train = self._train_open(target, following=following if kind == "chain" else None)
            frames = [_bytes(train), *map(_bytes, self._rows(target, back=kind == "train"))]
            protocol = TRAIN
        elif kind == "directory":
            frames = [
                _bytes(rng.choice((Ping(), ListRequest(target.model)))) for _ in range(rng.randint(1, 6))
            ]
            protocol = DIRECTORY
        elif kind == "adapter":
            frames = [_bytes(message) for message in self._upload(target)]
            protocol = ADAPTER
        else:
            hop = following if kind == "ring" else None
            opening = self._open(target, following=hop)
            frames = [_bytes(opening), *(_bytes(step) for step in self._steps(target))]
            protocol = SESSION
        attack = Attack(protocol, frames, "close", companion)
        self._spoil(attack)
        if rng.random() < 0.1:
            attack.ending = "abort"
        if rng.random() < self._held_share:
            attack.ending = "hold"
        attack.reads = attack.ending != "hold" and rng.random() < 0.9
        return attack

    def noise(self, limit: int) -> bytes:
        return self._rng.randbytes(self._rng.randint(0, limit))

    def _open(self, target: Target, *, upstream: str | None = None, following: Target | None = None) -> Open:
        return Open(
            session=self._rng.randbytes(16),
            epoch=0,
            model=target.model,
            span=target.span,
            max_length=MAX_LENGTH,
            upstream=upstream,
            next=Neighbour(following.peer_id, following.addresses) if following else None,
            share_prefixes=self._rng.random() < 0.5,
        )

    def _train_open(
        self, target: Target, *, upstream: str | None = None, following: Target | None = None
    ) -> TrainOpen:
        return TrainOpen(
            run=self._rng.randbytes(16),
            epoch=0,
            model=target.model,
            span=target.span,
            upstream=upstream,
            next=Neighbour(following.peer_id, following.addresses) if following else None,
        )

    def _rows(self, target: Target, *, back: bool) -> list[Message]:
        """Some passes, their gradients, and what is said about them."""
        rng = self._rng
        messages: list[Message] = []
        for number in range(rng.randint(1, 3)):
            lengths = tuple(rng.randint(1, 12) for _ in range(rng.randint(1, 3)))
            meta, payload = self._matrix(target, sum(lengths))
            adapter = "nobody's" if rng.random() < 0.1 else None
            messages.append(Forward(number, lengths, meta, payload, rng.random() < 0.8, adapter))
            if back and rng.random() < 0.8:
                messages.append(Backward(number, meta, payload, rng.random() < 0.5))
                messages.append(rng.choice((Probe(number), Finish((number,)), Finish((number + 1,)))))
        if back and rng.random() < 0.1:
            messages.append(Relink(1, next=Neighbour(target.peer_id), passes=(0,)))
        return messages

    def _matrix(self, target: Target, rows: int) -> tuple[TensorMeta, bytes]:
        meta = TensorMeta("float32", (rows, target.hidden_size))
        values = [self._rng.gauss(0, 1) for _ in range(8)]
        payload = struct.pack("<8f", *values) * (meta.nbytes // 32)
        return meta, payload + bytes(meta.nbytes - len(payload))

    def _steps(self, target: Target) -> list[Message]:
        """A prompt, some decode steps, a roll-back, a fork."""
        rng = self._rng
        prompt = rng.randint(1, 40)
        steps = [self._step(target, 0, (Slice(0, 0, prompt),))]
        for number in range(1, rng.randint(1, 5)):
            steps.append(self._step(target, number, (Slice(0, prompt + number - 1, 1),)))
        if rng.random() < 0.3:
            steps.append(self._step(target, 20, (Slice(0, prompt // 2, 2),), rows="all"))
        if rng.random() < 0.3:
            pair = (Slice(0, prompt // 2, 1), Slice(1, prompt // 2, 1))
            steps.append(self._step(target, 21, pair, forks=(0, 0)))
        return list(steps)

    def _pushes(self, target: Target, session: bytes) -> list[Message]:
        keys = (PageKeys(0, 0, tuple(self._rng.randbytes(32) for _ in range(2))),)
        pushes: list[Message] = [PushOpen(session, 0), *self._steps(target)]
        if self._rng.random() < 0.5:
            pushes.insert(1, FindPrefix(0, 0, keys))
        if self._rng.random() < 0.5:
            pushes.append(self._step(target, 30, (Slice(0, 0, 32),), keys=keys))
        return pushes

    def _upload(self, target: Target) -> list[Message]:
        """LoRA of rank 1 on one layer of a BLOOM, digested as the protocol's text says."""
        span, width = target.span, target.hidden_size
        place = Place(span.start, "self_attention.dense", 1, self._rng.choice((0.5, 2.0)))
        numbers = struct.pack("<f", self._rng.gauss(0, 1)) * (2 * width)
        shape = [span.start, span.end, 0, [list(place)]]
        text = "petal-swarm/1/adapter\n" + json.dumps(shape, separators=(",", ":")) + "\n"
        offer = AdapterOffer(
            model=target.model,
            span=span,
            adapter=f"{self._rng.randrange(99)}",
            numbers=2 * width,
            digest=hashlib.sha256(text.encode() + numbers).digest(),
            places=(place,),
            eager=True,
        )
        cut = self._rng.randrange(1, len(numbers))
        return [offer, AdapterPart(numbers[:cut]), AdapterPart(numbers[cut:])]

    def _step(self, target: Target, number: int, slices: tuple[Slice, ...], **fields: Any) -> Step:
        rows = sum(piece.length for piece in slices)
        return Step(number, 0, slices, *self._matrix(target, rows), **fields)

    def _spoil(self, attack: Attack) -> None:
        """Damage one frame or a few, the first as often as all others together; sometimes none."""
        rng, frames = self._rng, attack.frames
        if rng.random() < 0.05:
            attack.damage.append("none")
            return
        for _ in range(1 + (rng.random() < 0.2)):
            # A spoilt first frame ends most streams at once, so most attacks begin well.
            which = 0 if rng.random() < 0.2 else rng.randrange(len(frames))
            damage = rng.choice(_DAMAGES)
            damage(rng, frames, min(which, len(frames) - 1))
            attack.damage.append(damage.__name__)


Damage = Callable[[random.Random, list[bytes], int], None]


def flip_bytes(rng: random.Random, frames: list[bytes], which: int) -> None:
    data = bytearray(frames[which])
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    frames[which] = bytes(data)


def flip_header_bytes(rng: random.Random, frames: list[bytes], which: int) -> None:
    data = bytearray(frames[which])
    end = PREFIX.size + PREFIX.unpack_from(data)[0] if len(data) > PREFIX.size else len(data)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(min(max(end, 1), len(data)))] = rng.randrange(256)
    frames[which] = bytes(data)


def truncate(rng: random.Random, frames: list[bytes], which: int) -> None:
    """And nothing after it."""
    frames[which:] = [frames[which][: rng.randrange(len(frames[which]))] or b"\0"]


def lie_about_lengths(rng: random.Random, frames: list[bytes], which: int) -> None:
    header = rng.choice((0, 1, 5, 100, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 2**32 - 1))
    payload = rng.choice((0, 1, 100, MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES + 1, 2**32 - 1))
    true = PREFIX.unpack_from(frames[which].ljust(PREFIX.size, b"\0"))
    kept = rng.random()
    lengths = (true[0] if kept < 0.4 else header, true[1] if kept > 0.7 else payload)
    frames[which] = PREFIX.pack(*lengths) + frames[which][PREFIX.size :]


def random_bytes(rng: random.Random, frames: list[bytes], which: int) -> None:
    frames[which] = rng.randbytes(rng.choice((1, 8, 9, 100, 5000)))


def random_header(rng: random.Random, frames: list[bytes], which: int) -> None:
    """Random bytes, framed well."""
    header, payload = rng.randbytes(rng.randint(1, 200)), rng.randbytes(rng.choice((0, 0, 64)))
    frames[which] = PREFIX.pack(len(header), len(payload)) + header + payload


def change_field(rng: random.Random, frames: list[bytes], which: int) -> None:
    """A well-formed frame with a field that is not what it should be."""
    header, payload = _split(frames[which])
    if not header:
        return
    place: dict[str, Any] = header
    name = rng.choice(sorted(place))
    if isinstance(place[name], dict) and place[name] and rng.random() < 0.8:
        place = place[name]
        name = rng.choice(sorted(place))
    if rng.random() < 0.15:
        del place[name]
    else:
        place[name] = rng.choice(_VALUES)(rng)
    frames[which] = _join(header, payload)


def change_slices(rng: random.Random, frames: list[bytes], which: int) -> None:
    header, payload = _split(frames[which])
    if not isinstance(header.get("slices"), list) or not header["slices"]:
        return change_field(rng, frames, which)
    piece = rng.choice(header["slices"])
    if isinstance(piece, list) and piece:
        piece[rng.randrange(len(piece))] = rng.choice((-1, 0, 1, 63, 64, 65, 1023, 1024, 2**30, 2**31, 2**63))
    frames[which] = _join(header, payload)
    return None


def change_payload(rng: random.Random, frames: list[bytes], which: int) -> None:
    """Other numbers: not finite, huge, or of another length."""
    header, payload = _split(frames[which])
    number = rng.choice((float("nan"), float("inf"), -3e38, 1e-45))
    spoilt = rng.choice(
        (
            payload[:-1],
            payload + b"\0",
            struct.pack("<f", number) * (len(payload) // 4),
            payload[: len(payload) // 2 * 2],
            rng.randbytes(len(payload)),
        )
    )
    if header:
        frames[which] = _join(header, spoilt)


def repeat(rng: random.Random, frames: list[bytes], which: int) -> None:
    frames[which:which] = [frames[which]] * rng.randint(1, 8)


def leave_out(rng: random.Random, frames: list[bytes], which: int) -> None:
    if len(frames) > 1:
        del frames[which]


def swap(rng: random.Random, frames: list[bytes], which: int) -> None:
    other = rng.randrange(len(frames))
    frames[which], frames[other] = frames[other], frames[which]


def say_it_elsewhere(rng: random.Random, frames: list[bytes], which: int) -> None:
    """A message of another protocol, or of the other side."""
    kind = rng.choice(
        ("open", "push-open", "opened", "output", "error", "ping", "pong", "list", "listing", "failed", "?")
    )
    frames.insert(which, _join({"type": kind, "step": 0, "epoch": 0, "version": 1}, b""))


def nest(rng: random.Random, frames: list[bytes], which: int) -> None:
    """Lists in lists, deep enough for a careless decoder's stack."""
    depth = rng.choice((10, 500, 1000, 5000))
    packed = msgpack.packb({"type": "step"})[:-4] + b"\xa4step" + b""
    body = bytes([packed[0] + 1]) + packed[1:] + msgpack.packb("slices") + b"\x91" * depth + b"\xc0"
    frames[which] = PREFIX.pack(len(body), 0) + body


_DAMAGES: tuple[Damage, ...] = (
    flip_bytes,
    flip_header_bytes,
    truncate,
    lie_about_lengths,
    random_bytes,
    random_header,
    change_field,
    change_field,
    change_field,
    change_slices,
    change_slices,
    change_payload,
    repeat,
    leave_out,
    swap,
    say_it_elsewhere,
    nest,
)

_VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda rng: None,
    lambda rng: rng.choice((True, False)),
    lambda rng: rng.choice((-1, 0, 1, 2**31, 2**53, 2**53 + 1, 2**63, 2**64 - 1, -(2**63))),
    lambda rng: rng.choice((0.5, -1.0, float("nan"), float("inf"), 1e308)),
    lambda rng: "x" * rng.choice((0, 1, 64, 128, 1025, 100_000)),
    lambda rng: rng.randbytes(rng.choice((0, 1, 15, 16, 17, 32, 1000))),
    lambda rng: [],
    lambda rng: [rng.randint(-1, 5) for _ in range(rng.choice((1, 2, 3, 1025)))],
    lambda rng: [
        [rng.randint(0, 3), rng.randint(0, 70), rng.randint(0, 70)] for _ in range(rng.randint(1, 4))
    ],
    lambda rng: {},
    lambda rng: {"peer_id": "x", "addresses": ["/ip4/127.0.0.1/tcp/1/p2p/x"]},
    lambda rng: {"dtype": "bfloat16", "shape": [1, 2**31], "codec": "raw"},
    lambda rng: rng.choice(("float64", "last", "all", "none", "raw", "\x00", "é" * 500)),
)


def _bytes(message: Message) -> bytes:
    return b"".join(bytes(buffer) for buffer in encode(message))


def _split(frame: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload; an empty header for what is no frame any more."""
    if len(frame) < PREFIX.size:
        return {}, b""
    header_bytes, _ = PREFIX.unpack_from(frame)
    end = PREFIX.size + header_bytes
    try:
        header = msgpack.unpackb(frame[PREFIX.size : end], raw=False, strict_map_key=False)
    except Exception:
        return {}, b""
    if not isinstance(header, dict) or not all(isinstance(name, str) for name in header):
        return {}, b""
    return header, frame[end:]


def _join(header: dict[str, Any], payload: bytes) -> bytes:
    packed = msgpack.packb(header, use_bin_type=True)
    return PREFIX.pack(len(packed), len(payload)) + packed + payload
