"""Everything petal_swarm raises on purpose.

The tree follows who is to blame: the caller (`ConfigError`), the checkpoint (`ModelError`), this
process (`LocalProtocolError`), the other side (`RemoteProtocolError`, `RemoteError`), or the network
between (`NetworkError`). Messages are one line and say what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class PetalSwarmError(Exception):
    """Base of all errors raised by this package."""


class ConfigError(PetalSwarmError, ValueError):
    """An argument that cannot be used."""


class ModelError(PetalSwarmError):
    """The checkpoint cannot be used."""


class UnknownModelError(ModelError):
    """There is no checkpoint at this path or Hub id."""


class UnsupportedArchitectureError(ModelError):
    """A checkpoint of an architecture that has no lean blocks here."""


class CheckpointError(ModelError):
    """The checkpoint is damaged or lacks a tensor."""


class AdapterError(ModelError):
    """An adapter that is damaged, does not fit the model, or is of a kind that is not supported."""


class ProtocolError(PetalSwarmError):
    """The rules of `docs/protocol.md` were broken."""


class LocalProtocolError(ProtocolError):
    """By this process: a bug here."""


class RemoteProtocolError(ProtocolError):
    """By the peer: bytes or messages that are not allowed."""


class BadRecordError(RemoteProtocolError):
    """By the peer `peer_id`, who signed it: a record that says what it may not."""

    def __init__(self, message: str, peer_id: str) -> None:
        super().__init__(message)
        self.peer_id = peer_id


class StaleRecordError(BadRecordError):
    """A record from another time than now: expired `late_s` ago; if negative, that much too far ahead."""

    def __init__(self, message: str, peer_id: str, late_s: float) -> None:
        super().__init__(message, peer_id)
        self.late_s = late_s


class UnknownVersionError(RemoteProtocolError):
    """By the peer: a message of a protocol version that is not spoken here."""


class NetworkError(PetalSwarmError):
    """The network failed, or the peer went away."""


class PeerUnreachableError(NetworkError):
    """No connection to the peer could be made in time."""


class UnsupportedProtocolError(NetworkError):
    """The peer is there, and does not speak this protocol version."""


class StreamClosedError(NetworkError):
    """The stream ended while something was still expected on it."""


class CutOffError(RemoteProtocolError, StreamClosedError):
    """The stream ended inside a message: the peer died, or broke the protocol."""


class StrangerError(NetworkError):
    """The peer is there, and has not shown that it has the key of this private swarm."""


class DeadlineError(NetworkError, TimeoutError):
    """Nothing came within the stated time."""


class SwarmError(PetalSwarmError):
    """The swarm as a whole cannot do what was asked."""


class MissingBlocksError(SwarmError):
    """Nobody serves some blocks of the model; `is_joining` if a server of some of them is still loading."""

    def __init__(self, message: str, blocks: Iterable[int] = (), *, is_joining: bool = False) -> None:
        super().__init__(message)
        self.blocks = tuple(blocks)
        self.is_joining = is_joining


class SilentBlocksError(MissingBlocksError, NetworkError):
    """Those who serve some blocks of the model, by what they announced, cannot be reached."""


class RemoteError(PetalSwarmError):
    """A peer answered a request with an error; `code` is its name on the wire.

    `retry_after_s` is in how many seconds it may be worth to ask again; None if the peer did not say.
    """

    code: ClassVar[str] = "internal"

    def __init__(
        self, message: str, *, peer_id: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.peer_id = peer_id
        self.retry_after_s = retry_after_s


class BadMessageError(RemoteError):
    """The peer could not accept a frame or message of ours."""

    code = "bad-message"


class VersionMismatchError(RemoteError):
    """The peer speaks another protocol version."""

    code = "version"


class WrongModelError(RemoteError):
    """The peer serves another model."""

    code = "wrong-model"


class WrongSpanError(RemoteError):
    """The peer does not serve these blocks."""

    code = "wrong-span"


class UnknownSessionError(RemoteError):
    """The peer knows no session of this id, or it has ended."""

    code = "unknown-session"


class BadTensorError(RemoteError):
    """A tensor of the wrong shape, dtype or size."""

    code = "bad-tensor"


class SessionTooLongError(RemoteError):
    """A step reaches past the session's `max_length`."""

    code = "too-long"


class CacheFullError(RemoteError):
    """The KV cache has no room for this."""

    code = "cache-full"


class AdapterMissingError(RemoteError):
    """The peer does not have the adapter that was named, or not any more: it is to be uploaded again."""

    code = "adapter-missing"


class BadAdapterError(RemoteError):
    """An adapter that does not fit the peer's model, or whose numbers are not what was offered."""

    code = "bad-adapter"


class BusyError(RemoteError):
    """The peer has reached a limit; try again later or elsewhere."""

    code = "busy"


class AdapterFullError(BusyError):
    """The peer has no room for another adapter, or for more of ours."""

    code = "adapter-full"


class IdleError(RemoteError):
    """The session was not used for too long."""

    code = "idle"


class TooSlowError(RemoteError):
    """The peer waited for us for too long."""

    code = "timeout"


class PassGoneError(RemoteError):
    """The peer no longer keeps what the backward of this training pass needs: do the forward again."""

    code = "pass-gone"


class NotFiniteError(RemoteError):
    """Numbers became infinite or undefined in a block, which the message names."""

    code = "not-finite"


class HopLostError(RemoteError):
    """A server lost its next hop."""

    code = "hop-lost"


class PrivateSwarmError(RemoteError):
    """The peer is in a private swarm, and we have not shown that we have its key."""

    code = "private-swarm"


class NotAllowedError(RemoteError):
    """The peer serves only those that its owner has named, and we are not one."""

    code = "not-allowed"


_BY_CODE: dict[str, type[RemoteError]] = {
    cls.code: cls
    for cls in (
        RemoteError,
        BadMessageError,
        VersionMismatchError,
        WrongModelError,
        WrongSpanError,
        UnknownSessionError,
        BadTensorError,
        SessionTooLongError,
        CacheFullError,
        AdapterMissingError,
        BadAdapterError,
        AdapterFullError,
        BusyError,
        IdleError,
        TooSlowError,
        PassGoneError,
        NotFiniteError,
        HopLostError,
        PrivateSwarmError,
        NotAllowedError,
    )
}


def remote_error(
    code: str, message: str, *, peer_id: str | None = None, retry_after_s: float | None = None
) -> RemoteError:
    """The exception for an `error` message; codes from newer peers become a plain `RemoteError`."""
    return _BY_CODE.get(code, RemoteError)(message, peer_id=peer_id, retry_after_s=retry_after_s)
