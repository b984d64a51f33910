"""What a hop sends when a step is done: its result as bytes, or why there is none."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

from petal_swarm.engine.steps import StepResult
from petal_swarm.errors import (
    BadMessageError,
    HopLostError,
    NetworkError,
    PetalSwarmError,
    ProtocolError,
    RemoteError,
    TooSlowError,
    UnknownVersionError,
    VersionMismatchError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.wire.frames import Buffer
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.messages.parts import TensorMeta
from petal_swarm.wire.messages.steps import Step
from petal_swarm.wire.tensors import DTYPES, encode_tensor

logger = logging.getLogger(__name__)

#: A step of more tokens is part of a prompt.
OVERHEAD_TOKENS = 4
#: How much one new measurement moves the running mean of a hop's own overhead.
_SMOOTHING = 0.1


class Overhead:
    """A running mean of what a step costs here besides computing, in seconds."""

    def __init__(self) -> None:
        self.mean_s = 0.0

    def add(self, value_s: float) -> None:
        self.mean_s += (value_s - self.mean_s) * (_SMOOTHING if self.mean_s else 1.0)


def error_message(error: BaseException, step: int | None = None) -> Error:
    """What a peer is told of an error: its own mistakes as they are, everything else without details."""
    if isinstance(error, RemoteError):
        return Error(error.code, str(error), step, error.retry_after_s)
    if isinstance(error, UnknownVersionError):
        return Error(VersionMismatchError.code, str(error), step)
    if isinstance(error, ProtocolError):
        return Error(BadMessageError.code, str(error), step)
    if isinstance(error, TimeoutError):
        return Error(TooSlowError.code, "nothing came in time", step)
    if isinstance(error, NetworkError):
        return Error(HopLostError.code, str(error), step)
    return Error(RemoteError.code, "internal error", step)


@contextlib.asynccontextmanager
async def answering_errors(channel: Channel) -> AsyncIterator[None]:
    """Tell the peer of an error where that is still possible; nothing of it reaches other sessions."""
    try:
        yield
    except (PetalSwarmError, TimeoutError) as error:
        level = logging.DEBUG if isinstance(error, NetworkError) else logging.INFO
        logger.log(level, "stream from %s ended: %s", channel.peer_id, error)
        with contextlib.suppress(PetalSwarmError):
            channel.send(error_message(error))
    except Exception:
        logger.exception("stream from %s failed", channel.peer_id)
        with contextlib.suppress(PetalSwarmError):
            channel.send(error_message(RuntimeError()))


def encode_result(step: Step, result: StepResult) -> tuple[StepResult, tuple[TensorMeta, Buffer] | None]:
    """The result in the dtype that the step came in. A device that fails late fails here, for one step."""
    if result.hidden is None:
        return result, None
    try:
        hidden = result.hidden.to(DTYPES[step.tensor.dtype])
        if hidden.untyped_storage().nbytes() > hidden.nbytes:
            hidden = hidden.clone()  # it is kept for a while, and the rest of its batch should not be
        return result, encode_tensor(hidden)
    except Exception as error:
        logger.exception("the result of a step cannot be sent")
        failure = RemoteError(f"the server failed to compute: {type(error).__name__}")
        return StepResult(None, failure, result.compute_s), None
