"""A transport among those who have one swarm key: nobody else can open a stream, or answer one.

Transports authenticate peers and encrypt, so membership can be proved by a token that names both: it is
worth nothing to anybody else. The dialler sends its proof ahead of everything, and waits for nothing. The
listener hands a stream to its handler only once that proof is good, and answers with its own, which the
dialler checks before it passes on a byte. That costs no round trip, and after the first bytes nothing at
all: what is read and subscribed to is the inner stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Sequence

from petal_swarm.errors import PrivateSwarmError, RemoteProtocolError, StrangerError, StreamClosedError
from petal_swarm.net.complaints import Complaints
from petal_swarm.net.refusal import refuse
from petal_swarm.net.swarm_key import Side, SwarmKey
from petal_swarm.net.transport import Buffer, Receiver, Stream, StreamHandler, Transport
from petal_swarm.wire.frames import PREFIX, FrameDecoder
from petal_swarm.wire.messages import Message, decode
from petal_swarm.wire.messages.error import Error
from petal_swarm.wire.proof import HEAD, member_frame

logger = logging.getLogger(__name__)

#: Members send their proof with the first packet of a stream.
PROOF_TIMEOUT_S = 10.0
#: Streams whose proof is waited for; further ones are reset.
MAX_UNPROVED = 1024
#: What a refusal may take, to be looked at for its reason.
_MAX_REASON_BYTES = 4096

NO_KEY = (
    "this swarm is private: ask its owner for the key, and give it with --swarm-key FILE"
    " (in Python: swarm_key=FILE)"
)
OTHER_KEY = "this swarm is private, and your --swarm-key is not its key"
IN_OPEN_SWARM = (
    "peer {} is in no private swarm: leave out --swarm-key to join an open one,"
    " or give the address of a server that was started with your key"
)
IN_OTHER_SWARM = (
    "peer {} is in a private swarm with another key than your --swarm-key: which is the right one?"
)


class PrivateTransport:
    """A `Transport` of one private swarm around any other; closing it closes the other."""

    def __init__(self, transport: Transport, key: SwarmKey) -> None:
        self._transport = transport
        self._key = key
        self._unproved = 0
        self._complaints = Complaints(logger)

    @property
    def peer_id(self) -> str:
        return self._transport.peer_id

    def addresses(self) -> tuple[str, ...]:
        return self._transport.addresses()

    async def connect(self, address: str, *, timeout_s: float) -> str:
        return await self._transport.connect(address, timeout_s=timeout_s)

    async def open_stream(
        self, peer_id: str, protocol: str, *, addresses: Sequence[str] = (), timeout_s: float
    ) -> PrivateStream:
        """See `Transport.open_stream`. Its reads raise `StrangerError` if the peer is not of this swarm."""
        stream = await self._transport.open_stream(
            peer_id, protocol, addresses=addresses, timeout_s=timeout_s
        )
        ends = (protocol, self.peer_id, stream.peer_id)
        stream.write(member_frame(self._key.proof(Side.DIALER, *ends)))
        return PrivateStream(stream, member_frame(self._key.proof(Side.LISTENER, *ends)))

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """See `Transport.serve`; strangers are told so, and never reach the handler."""

        async def admit(stream: Stream) -> None:
            await self._admit(protocol, handler, stream)

        await self._transport.serve(protocol, admit)

    async def close(self) -> None:
        await self._transport.close()

    async def _admit(self, protocol: str, handler: StreamHandler, stream: Stream) -> None:
        if self._unproved >= MAX_UNPROVED:
            stream.abort()
            return
        ends = (protocol, stream.peer_id, self.peer_id)
        private = PrivateStream(stream, member_frame(self._key.proof(Side.DIALER, *ends)))
        self._unproved += 1
        try:
            async with asyncio.timeout(PROOF_TIMEOUT_S):
                await private.prove()
        except StrangerError:
            had_one = private.arrived.startswith(HEAD)
            which = "another swarm key" if had_one else "no swarm key"
            self._complaints.about(stream.peer_id, "refused peer %s: it has %s", stream.peer_id, which)
            await refuse(stream, PrivateSwarmError, OTHER_KEY if had_one else NO_KEY)
            return
        except (TimeoutError, StreamClosedError) as error:
            logger.debug("stream from %s ended without proof: %s", stream.peer_id, error or "timeout")
            stream.abort()
            return
        finally:
            self._unproved -= 1
        stream.write(member_frame(self._key.proof(Side.LISTENER, *ends)))
        await handler(private)


class PrivateStream:
    """A stream whose peer has proved its membership with the first bytes it sent, or is not believed."""

    def __init__(self, stream: Stream, expected: bytes) -> None:
        self.peer_id = stream.peer_id
        self._stream = stream
        self._expected: bytes | None = expected
        #: What has come while the proof was not complete.
        self.arrived = b""
        self._rest = b""

    @property
    def remote_address(self) -> str:
        return self._stream.remote_address

    async def prove(self) -> None:
        """Return once the peer's proof has come and is good. Cancelling loses nothing.

        Raises:
            StrangerError: something else has come.
            StreamClosedError: the stream has ended before.
        """
        while self._expected is not None:
            data = await self._stream.read()
            if not data:
                raise StreamClosedError(f"peer {self.peer_id} ended the stream before it proved who it is")
            self._take(data)

    async def read(self) -> bytes:
        """See `Stream.read`.

        Raises:
            StrangerError: the peer is not of this swarm; the stream is reset.
        """
        if self._expected is not None:
            try:
                self._take(b"")
                await self.prove()
            except StrangerError:
                self._stream.abort()
                raise
        if self._rest:
            rest, self._rest = self._rest, b""
            return rest
        return await self._stream.read()

    def subscribe(self, receiver: Receiver) -> None:
        """See `Stream.subscribe`. A stranger's stream ends at once, and the log says why."""
        if self._expected is not None:
            self._stream.subscribe(self._gate(receiver))
            return
        rest, self._rest = self._rest, b""
        if rest:
            receiver(rest)
        self._stream.subscribe(receiver)

    def pause(self) -> None:
        self._stream.pause()

    def resume(self) -> None:
        self._stream.resume()

    def write(self, *buffers: Buffer) -> None:
        self._stream.write(*buffers)

    @property
    def unsent_bytes(self) -> int:
        return self._stream.unsent_bytes

    async def drain(self) -> None:
        await self._stream.drain()

    async def close(self) -> None:
        await self._stream.close()

    def abort(self) -> None:
        self._stream.abort()

    def _gate(self, receiver: Receiver) -> Receiver:
        """A receiver for the inner stream that lets nothing through before the proof."""
        ended = False

        def on_data(data: bytes) -> None:
            nonlocal ended
            if self._expected is None:
                receiver(data)
                return
            if ended:
                return
            try:
                if data:
                    self._take(data)
                    data, self._rest = self._rest, b""
                    if not data:
                        return
            except StrangerError as error:
                logger.warning("%s", error)
                ended = True
                self._stream.abort()
                data = b""
            ended = ended or not data
            receiver(data)

        return on_data

    def _take(self, data: bytes) -> None:
        """Compare what has come so far with the proof; what follows it goes to `_rest`.

        Raises:
            StrangerError: it is not the proof.
        """
        expected = self._expected
        assert expected is not None
        self.arrived += data
        begun = self.arrived[: len(expected)]
        if begun[: len(HEAD)] == HEAD[: len(begun)]:
            if len(begun) < len(expected):
                return
            if hmac.compare_digest(begun, expected):
                self._expected = None
                self._rest, self.arrived = self.arrived[len(expected) :], b""
                return
        raise StrangerError(_told(self.arrived).format(self.peer_id))


def _told(arrived: bytes) -> str:
    """What to say of a listener that answers with something else: perhaps it says itself."""
    if arrived.startswith(HEAD):
        return IN_OTHER_SWARM
    answers: list[Message] = []
    # An error has no payload; for one that is announced, memory would be taken.
    if arrived[4 : PREFIX.size] == bytes(4):
        with contextlib.suppress(RemoteProtocolError):
            answers = [decode(frame) for frame in FrameDecoder().feed(arrived[:_MAX_REASON_BYTES])][:1]
    private = any(isinstance(answer, Error) and answer.code == PrivateSwarmError.code for answer in answers)
    return IN_OTHER_SWARM if private else IN_OPEN_SWARM
