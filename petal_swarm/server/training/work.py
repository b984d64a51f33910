"""What the compute thread does for training: a pass forward or backward, from bytes to bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from petal_swarm.engine.training import Passes
from petal_swarm.engine.works import Pieces
from petal_swarm.errors import NotFiniteError
from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.server.training.ledger import Pass
from petal_swarm.span import Span
from petal_swarm.wire.frames import Buffer
from petal_swarm.wire.messages.parts import TensorMeta
from petal_swarm.wire.messages.tuning import Backward, Forward, Gradients
from petal_swarm.wire.tensors import DTYPES, decode_tensor, encode_tensor

T = TypeVar("T")

#: Numbers of an adapter's gradient in one message.
PART_NUMBERS = 1 << 20

#: The peer, the run and the number of a pass.
PassKey = tuple[str, bytes, int]
Adapter = tuple[AdapterLayout, Tensor]
Encoded = tuple[TensorMeta, Buffer]


class BackwardResult(NamedTuple):
    """Gradients of the rows that went in, and of the adapter's numbers."""

    rows: Encoded
    numbers: Tensor | None


def run_forward(
    passes: Passes, key: PassKey, held: Pass, message: Forward, blocks: Span, adapter: Adapter | None
) -> Pieces[Encoded | None]:
    """The output rows, in the dtype that the rows came in; None if the pass was finished meanwhile."""
    hidden = decode_tensor(message.tensor, message.payload)
    work = passes.forward(key, hidden, message.lengths, blocks, adapter, keep=message.keep, peer=key[0])
    rows = yield from _until_finished(held, work)
    return None if rows is None else _encoded(rows, message.tensor.dtype)


def run_backward(
    passes: Passes, key: PassKey, held: Pass, message: Backward
) -> Pieces[BackwardResult | None]:
    """The gradients; None if the pass was finished meanwhile."""
    gradient = decode_tensor(message.tensor, message.payload)
    result = yield from _until_finished(held, passes.backward(key, gradient))
    if result is None:
        return None
    rows, numbers = result
    if numbers is not None:
        numbers = numbers.detach().to("cpu", torch.float32).contiguous()
    passes.forget(key)
    return BackwardResult(_encoded(rows, message.tensor.dtype), numbers)


def _until_finished(held: Pass, work: Pieces[T]) -> Pieces[T | None]:
    try:
        while not held.finished:
            try:
                next(work)
            except StopIteration as done:
                result: T = done.value
                return result
            yield
        return None
    finally:
        work.close()  # here and now: other ranks are told what is not needed any more


def _encoded(rows: Tensor, dtype: str) -> Encoded:
    narrow = rows.detach().to(DTYPES[dtype])
    if dtype == "float16" and not bool(torch.isfinite(narrow).all()):
        raise NotFiniteError("the result does not fit into float16; send float32 or bfloat16")
    return encode_tensor(narrow)


def gradient_parts(number: int, gradient: Tensor) -> Iterator[Gradients]:
    """A flat gradient of an adapter's numbers, as messages."""
    total = gradient.numel()
    for first in range(0, total, PART_NUMBERS):
        meta, payload = encode_tensor(gradient[first : first + PART_NUMBERS].view(1, -1))
        yield Gradients(number, first, total, meta, payload)
