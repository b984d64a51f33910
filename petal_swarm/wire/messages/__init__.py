"""The messages of the stream protocols, each a frozen dataclass that checks what it reads.

A message is a frame: its header is the map made by `to_header`, its payload the `payload` of those that
have one. Reading ignores unknown fields and raises `RemoteProtocolError` for anything missing, mistyped or
out of range. Tensors stay bytes here; `tensors.py` decodes them.

Each subject has a module: its messages, the bounds on their fields, and the union of its messages. `parts`
holds what several subjects are made of. A new subject is a module, and its union in `Message` below; who
may send its messages, and when, is for the tables of `connection.py` to say.
"""

from __future__ import annotations

from typing import TypeAlias, get_args

from petal_swarm.errors import RemoteProtocolError
from petal_swarm.wire import fields
from petal_swarm.wire.frames import Buffer, Frame, encode_frame
from petal_swarm.wire.messages.adapters import AdapterMessage
from petal_swarm.wire.messages.audit import AuditMessage
from petal_swarm.wire.messages.directory import DirectoryMessage
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.opening import OpeningMessage
from petal_swarm.wire.messages.prefixes import PrefixMessage
from petal_swarm.wire.messages.repair import RepairMessage
from petal_swarm.wire.messages.steps import StepMessage
from petal_swarm.wire.messages.tuning import TuningMessage

Message: TypeAlias = (
    OpeningMessage
    | StepMessage
    | PrefixMessage
    | RepairMessage
    | AuditMessage
    | TuningMessage
    | AdapterMessage
    | DirectoryMessage
    | Error
)

_TYPES: dict[str, type[Message]] = {kind.type: kind for kind in get_args(Message)}


def encode(message: Message) -> list[Buffer]:
    """The buffers of one message, to be sent in order.

    Raises:
        LocalProtocolError: the message is over the protocol's bounds.
    """
    return encode_frame(message.to_header(), getattr(message, "payload", b""))


def decode(frame: Frame) -> Message:
    """The message in a frame.

    Raises:
        RemoteProtocolError: an unknown type, or fields that do not fit it.
    """
    kind = fields.text(frame.header, "type", limit=64)
    if kind not in _TYPES:
        raise RemoteProtocolError(f"unknown message type {kind!r}")
    return _TYPES[kind].from_frame(frame)
