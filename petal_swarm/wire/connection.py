"""One stream's protocol as a state machine without I/O, in the manner of h11.

Feed it the bytes that arrived, ask it for the next event, hand it the messages to send and transmit
the buffers it returns. It must not know transports, tensors or the engine. Which message is allowed
in which state, and from whom, is the table; anything else is an error of whoever sent it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from petal_swarm.errors import CutOffError, LocalProtocolError, RemoteProtocolError
from petal_swarm.wire.frames import Buffer, FrameDecoder
from petal_swarm.wire.messages import Message, decode, encode
from petal_swarm.wire.messages.adapters import AdapterOffer, AdapterPart, AdapterReady, AdapterWanted
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


class Role(Enum):
    """Who opened the stream."""

    DIALER = "dialer"
    LISTENER = "listener"

    @property
    def other(self) -> Role:
        return Role.LISTENER if self is Role.DIALER else Role.DIALER


class State(Enum):
    IDLE = "idle"
    OPENING = "opening"
    OPEN = "open"
    ENDED = "ended"


Table: TypeAlias = dict[tuple[State, Role, type[Message]], State]

SESSION_TABLE: Final[Table] = {
    (State.IDLE, Role.DIALER, Open): State.OPENING,
    (State.IDLE, Role.LISTENER, Error): State.ENDED,
    (State.OPENING, Role.LISTENER, Opened): State.OPEN,
    (State.OPENING, Role.LISTENER, Error): State.ENDED,
    (State.OPEN, Role.DIALER, Step): State.OPEN,
    (State.OPEN, Role.DIALER, Reroute): State.OPEN,
    (State.OPEN, Role.DIALER, Probe): State.OPEN,
    (State.OPEN, Role.LISTENER, Output): State.OPEN,
    (State.OPEN, Role.LISTENER, Rerouted): State.OPEN,
    (State.OPEN, Role.LISTENER, Lost): State.OPEN,
    (State.OPEN, Role.LISTENER, Leaving): State.OPEN,
    (State.OPEN, Role.LISTENER, Progress): State.OPEN,
    (State.OPEN, Role.DIALER, Recall): State.OPEN,
    (State.OPEN, Role.LISTENER, Recalled): State.OPEN,
    (State.OPEN, Role.LISTENER, Error): State.ENDED,
}

PUSH_TABLE: Final[Table] = {
    (State.IDLE, Role.DIALER, PushOpen): State.OPENING,
    (State.IDLE, Role.LISTENER, Error): State.ENDED,
    (State.OPENING, Role.LISTENER, Opened): State.OPEN,
    (State.OPENING, Role.LISTENER, Error): State.ENDED,
    (State.OPEN, Role.DIALER, Step): State.OPEN,
    (State.OPEN, Role.DIALER, FindPrefix): State.OPEN,
    (State.OPEN, Role.LISTENER, PrefixFound): State.OPEN,
    (State.OPEN, Role.LISTENER, Error): State.ENDED,
}

TRAIN_TABLE: Final[Table] = {
    (State.IDLE, Role.DIALER, TrainOpen): State.OPENING,
    (State.IDLE, Role.LISTENER, Error): State.ENDED,
    (State.OPENING, Role.LISTENER, TrainOpened): State.OPEN,
    (State.OPENING, Role.LISTENER, Error): State.ENDED,
    (State.OPEN, Role.DIALER, Forward): State.OPEN,
    (State.OPEN, Role.DIALER, Backward): State.OPEN,
    (State.OPEN, Role.DIALER, Finish): State.OPEN,
    (State.OPEN, Role.DIALER, Relink): State.OPEN,
    (State.OPEN, Role.DIALER, Probe): State.OPEN,
    (State.OPEN, Role.LISTENER, Forwarded): State.OPEN,
    (State.OPEN, Role.LISTENER, Gradients): State.OPEN,
    (State.OPEN, Role.LISTENER, Backwarded): State.OPEN,
    (State.OPEN, Role.LISTENER, Failed): State.OPEN,
    (State.OPEN, Role.LISTENER, Rerouted): State.OPEN,
    (State.OPEN, Role.LISTENER, Lost): State.OPEN,
    (State.OPEN, Role.LISTENER, Leaving): State.OPEN,
    (State.OPEN, Role.LISTENER, PassStates): State.OPEN,
    (State.OPEN, Role.LISTENER, Error): State.ENDED,
}

#: Gradients go against the direction in which the stream was opened.
TRAIN_PUSH_TABLE: Final[Table] = {
    (State.IDLE, Role.DIALER, PushOpen): State.OPENING,
    (State.IDLE, Role.LISTENER, Error): State.ENDED,
    (State.OPENING, Role.LISTENER, TrainOpened): State.OPEN,
    (State.OPENING, Role.LISTENER, Error): State.ENDED,
    (State.OPEN, Role.DIALER, Forward): State.OPEN,
    (State.OPEN, Role.LISTENER, Backward): State.OPEN,
    (State.OPEN, Role.LISTENER, Error): State.ENDED,
}

DIRECTORY_TABLE: Final[Table] = {
    (State.IDLE, Role.DIALER, Ping): State.OPENING,
    (State.OPENING, Role.LISTENER, Pong): State.IDLE,
    (State.IDLE, Role.DIALER, ListRequest): State.OPENING,
    (State.OPENING, Role.LISTENER, Listing): State.IDLE,
    (State.IDLE, Role.DIALER, DialBack): State.OPENING,
    (State.OPENING, Role.LISTENER, DialedBack): State.IDLE,
    (State.IDLE, Role.DIALER, Upload): State.OPEN,
    (State.OPEN, Role.DIALER, UploadPart): State.OPEN,
    (State.OPEN, Role.LISTENER, Uploaded): State.IDLE,
    (State.OPEN, Role.LISTENER, Error): State.ENDED,
    (State.IDLE, Role.LISTENER, Error): State.ENDED,
    (State.OPENING, Role.LISTENER, Error): State.ENDED,
}

#: A stream may carry several adapters, one after the other.
ADAPTER_TABLE: Final[Table] = {
    (State.IDLE, Role.DIALER, AdapterOffer): State.OPENING,
    (State.OPENING, Role.DIALER, AdapterPart): State.OPENING,
    (State.OPENING, Role.LISTENER, AdapterWanted): State.OPEN,
    (State.OPENING, Role.LISTENER, AdapterReady): State.IDLE,
    (State.OPEN, Role.DIALER, AdapterPart): State.OPEN,
    (State.OPEN, Role.LISTENER, AdapterReady): State.IDLE,
    (State.IDLE, Role.LISTENER, Error): State.ENDED,
    (State.OPENING, Role.LISTENER, Error): State.ENDED,
    (State.OPEN, Role.LISTENER, Error): State.ENDED,
}


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The peer has ended its side; nothing more will come."""


Event: TypeAlias = Message | StreamEnded


class Connection:
    """One end of one stream. Not thread-safe; owned by whoever does the I/O."""

    def __init__(self, table: Table, role: Role) -> None:
        self._table = table
        self._role = role
        self._decoder = FrameDecoder()
        self._events: deque[Event] = deque()
        self.state = State.IDLE

    @property
    def mid_frame(self) -> bool:
        """Whether a part of a message has arrived, and its rest has not."""
        return self._decoder.mid_frame

    @property
    def decoder(self) -> FrameDecoder:
        """How far the peer's bytes have been read."""
        return self._decoder

    def receive_data(self, data: Buffer) -> None:
        """Take bytes from the peer, or `b""` for the end of its side.

        Raises:
            RemoteProtocolError: bytes or messages that the peer may not send now. The stream is then
                unusable: send an `Error` if you may, and end it.
        """
        if not len(data):
            if self._decoder.mid_frame:
                raise CutOffError("the stream ended inside a frame")
            self._events.append(StreamEnded())
            return
        for frame in self._decoder.feed(data):
            message = decode(frame)
            self._advance(self._role.other, message, RemoteProtocolError)
            self._events.append(message)

    def next_event(self) -> Event | None:
        """The oldest event not yet taken; None when more data is needed."""
        return self._events.popleft() if self._events else None

    def send(self, message: Message) -> list[Buffer]:
        """The buffers that transmit `message`.

        Raises:
            LocalProtocolError: this side may not send it now, or it is over the protocol's bounds.
        """
        buffers = encode(message)
        self._advance(self._role, message, LocalProtocolError)
        return buffers

    def _advance(
        self, sender: Role, message: Message, blame: type[RemoteProtocolError] | type[LocalProtocolError]
    ) -> None:
        following = self._table.get((self.state, sender, type(message)))
        if following is None:
            raise blame(
                f"message {message.type!r} is not allowed from the {sender.value} in state {self.state.value}"
            )
        self.state = following
