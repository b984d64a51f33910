"""Passes as the client knows them: what goes in, and what has come back along one lane so far."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from petal_swarm.client.training.adapters import TrainedAdapter
from petal_swarm.errors import PetalSwarmError, RemoteProtocolError
from petal_swarm.models.finite import all_finite
from petal_swarm.span import Span
from petal_swarm.wire.messages.tuning import Backward, Backwarded, Forward, Forwarded, Gradients
from petal_swarm.wire.tensors import decode_tensor

if TYPE_CHECKING:
    from petal_swarm.client.training.lane import Lane


@dataclass(eq=False, slots=True)
class Pass:
    """One microbatch: `rows [tokens, hidden]` on the CPU, which nobody changes, of sequences of `lengths`.

    `lane` and `number` say where its backward will find what the forward left, if anywhere.
    """

    rows: Tensor
    lengths: tuple[int, ...]
    blocks: Span
    adapter: TrainedAdapter | None
    lane: Lane | None = None
    number: int = -1

    @property
    def tokens(self) -> int:
        return self.rows.shape[0]

    def halves(self) -> list[Pass]:
        """The same as two passes, which have not gone anywhere; none if it is a single sequence."""
        middle = len(self.lengths) // 2
        row = sum(self.lengths[:middle])
        parts = (self.rows[:row], self.lengths[:middle]), (self.rows[row:], self.lengths[middle:])
        return [Pass(*part, self.blocks, self.adapter) for part in parts] if middle else []

    def drop(self) -> None:
        """The backward is not wanted any more, or must begin with the forward again."""
        if self.lane is not None:
            self.lane.finish(self.number)
            self.lane = None


@dataclass(eq=False, slots=True)
class Gradient:
    """What a backward gives: of the rows `[tokens, hidden]`, and of all the adapter's numbers that it saw."""

    rows: Tensor | None = None
    numbers: Tensor | None = None

    def joined(self, other: Gradient) -> Gradient:
        """That of both passes, the rows of `other` behind these."""
        rows, numbers = self.rows, self.numbers
        if rows is not None and other.rows is not None:
            rows = torch.cat([rows.float(), other.rows.float()])
        if numbers is not None and other.numbers is not None:
            numbers = numbers + other.numbers
        return Gradient(rows, numbers)


@dataclass(eq=False, slots=True)
class Course:
    """A pass on its way along one lane; `sent_s` is when its present direction began."""

    forward: Forward
    adapter: TrainedAdapter | None
    output: asyncio.Future[Tensor]
    sent_s: float
    is_forward_sent: bool = False
    backward: Backward | None = None
    gradient: asyncio.Future[Gradient] | None = None
    is_backward_sent: bool = False
    #: Why its forward has to be done again, although the answer had come.
    error: PetalSwarmError | None = None
    _collected: Gradient = field(default_factory=Gradient)
    _wants_rows: bool = True
    _missing: set[int] = field(default_factory=set)
    _received: dict[str, int] = field(default_factory=dict)
    _where: tuple[int, ...] = ()
    _there_s: float = 0.0

    @property
    def tokens(self) -> int:
        return self.forward.tensor.shape[0]

    @property
    def is_waited_for(self) -> bool:
        """Whether an answer is due."""
        return not self.output.done() or (self.gradient is not None and not self.gradient.done())

    def begin_backward(self, message: Backward, blocks: Span, sent_s: float) -> asyncio.Future[Gradient]:
        """From now on gradients are due: for `blocks`, where the adapter has numbers there."""
        self.backward, self.sent_s = message, sent_s
        self.gradient = asyncio.get_running_loop().create_future()
        self._collected = Gradient()
        self._wants_rows = True
        self._received = {}
        self._missing = set()
        if self.adapter is not None:
            self._collected.numbers = torch.zeros_like(self.adapter.numbers)
            self._missing = {block for block in blocks.blocks() if self._numbers_of(Span(block, block + 1))}
        return self.gradient

    def stood_s(self, where: tuple[int, ...], now: float) -> float:
        """For how long it has been seen at this place, which is a state at each hop."""
        if where != self._where:
            self._where, self._there_s = where, now
        return now - self._there_s

    def fail(self, error: PetalSwarmError) -> None:
        """Nothing more will come: whoever waits gets the error, or will when the backward begins."""
        waited_for = [answer for answer in (self.output, self.gradient) if answer and not answer.done()]
        for answer in waited_for:
            answer.set_exception(error)
            answer.exception()  # seen: the one who waits raises it, if there is one
        if not waited_for:
            self.error = error

    def take_output(self, message: Forwarded, peer_id: str) -> bool:
        """Whether the forward is done with this.

        Raises:
            RemoteProtocolError: rows of another shape, or that are not finite.
        """
        if self.output.done():
            return False  # sent again, to one that it was new to
        self.output.set_result(self._rows(message, peer_id))
        return True

    def take_rows(self, message: Backwarded, peer_id: str) -> bool:
        """Whether the backward is done with the gradient of the first hop's rows.

        Raises:
            RemoteProtocolError: a gradient of another shape, or that is not finite.
        """
        if self.backward is None or self.gradient is None or self.gradient.done():
            return False
        if self.backward.inputs:
            self._collected.rows = self._rows(message, peer_id)
        self._wants_rows = False
        return self._finish_if_complete()

    def take_numbers(self, message: Gradients, span: Span, peer_id: str) -> bool:
        """Whether the backward is done with these numbers of a hop's `span`; large ones come in parts.

        Raises:
            RemoteProtocolError: parts that do not fit the span or each other, or that are not finite.
        """
        if self.gradient is None or self.gradient.done():
            return False
        numbers = self._collected.numbers
        if numbers is None or self.adapter is None or message.total != self._numbers_of(span):
            raise RemoteProtocolError(f"peer {peer_id} sent gradients that nobody asked for")
        received = 0 if message.first == 0 else self._received.get(peer_id, 0)
        if message.first != received:
            raise RemoteProtocolError(f"peer {peer_id} sent a part of the gradients out of its turn")
        part = decode_tensor(message.tensor, message.payload).view(-1)
        if not all_finite(part):
            raise RemoteProtocolError(f"peer {peer_id} sent gradients that are not finite")
        begin = self.adapter.bounds(span)[0] + received
        numbers[begin : begin + len(part)] = part
        self._received[peer_id] = received + len(part)
        if self._received[peer_id] == message.total:
            self._missing -= set(span.blocks())
        return self._finish_if_complete()

    def _finish_if_complete(self) -> bool:
        assert self.gradient is not None
        if self._wants_rows or self._missing:
            return False
        self.gradient.set_result(self._collected)
        return True

    def _numbers_of(self, blocks: Span) -> int:
        if self.adapter is None:
            return 0
        begin, end = self.adapter.bounds(blocks)
        return end - begin

    def _rows(self, message: Forwarded | Backwarded, peer_id: str) -> Tensor:
        if message.tensor.shape != self.forward.tensor.shape:
            raise RemoteProtocolError(
                f"peer {peer_id} answered with shape {list(message.tensor.shape)},"
                f" expected {list(self.forward.tensor.shape)}"
            )
        rows = decode_tensor(message.tensor, message.payload)
        if not all_finite(rows):
            raise RemoteProtocolError(f"peer {peer_id} answered with numbers that are not finite")
        return rows
