"""Whether a certain peer answers at a TCP port, proven by its key, without becoming connected to it.

A libp2p host that has a connection to a peer does not dial it again, so the daemon cannot answer the
question "can you dial me?" for a peer that has just asked it. This dials by hand, and goes as far as it has
to: multistream-select, then two of the three messages of libp2p's Noise handshake (XX, 25519, ChaChaPoly,
SHA256). The second proves who answers; the third, by which this side would say who it is, is never sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from petal_swarm.net.identity import verify

_MULTISTREAM = b"\x13/multistream/1.0.0\n"
_NOISE = b"\x07/noise\n"
_PROTOCOL = b"Noise_XX_25519_ChaChaPoly_SHA256"
_SIGNED = b"noise-libp2p-static-key:"
_KEY_BYTES, _TAG_BYTES = 32, 16
_MAX_HANDSHAKE_BYTES = 4096


async def knock(ip: str, port: int, peer_id: str, *, timeout_s: float) -> bool:
    """Whether `peer_id` accepts connections at this address; no other reason for an answer counts."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(ip, port, limit=_MAX_HANDSHAKE_BYTES)
            return await _is_answered_by(peer_id, reader, writer)
    except (TimeoutError, OSError, EOFError, ValueError, InvalidTag):
        return False
    finally:
        if writer is not None:
            writer.transport.abort()


async def _is_answered_by(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """
    Raises:
        ValueError, EOFError, InvalidTag: whoever answers does not speak this.
    """
    ephemeral = X25519PrivateKey.generate()
    public = ephemeral.public_key().public_bytes_raw()
    writer.write(_MULTISTREAM + _NOISE)
    for expected in (_MULTISTREAM, _NOISE):
        if await reader.readexactly(len(expected)) != expected:
            return False
    writer.write(len(public).to_bytes(2, "big") + public)
    size = int.from_bytes(await reader.readexactly(2), "big")
    if not 2 * _KEY_BYTES + 2 * _TAG_BYTES <= size <= _MAX_HANDSHAKE_BYTES:
        return False
    static_key, payload = _read_second_message(ephemeral, await reader.readexactly(size))
    signature = _signature_in(payload)
    return verify(peer_id, _SIGNED + static_key, signature)


def _read_second_message(ephemeral: X25519PrivateKey, message: bytes) -> tuple[bytes, bytes]:
    """The other side's static key and payload, from `e, ee, s, es` and the payload."""
    state = _Symmetric()
    state.mix_hash(b"")  # no prologue
    state.mix_hash(ephemeral.public_key().public_bytes_raw())
    state.mix_hash(b"")  # the first message's payload
    theirs, sealed_key, sealed = (
        message[:_KEY_BYTES],
        message[_KEY_BYTES : 2 * _KEY_BYTES + _TAG_BYTES],
        message[2 * _KEY_BYTES + _TAG_BYTES :],
    )
    state.mix_hash(theirs)
    state.mix_key(ephemeral.exchange(X25519PublicKey.from_public_bytes(theirs)))
    static_key = state.open(sealed_key)
    state.mix_key(ephemeral.exchange(X25519PublicKey.from_public_bytes(static_key)))
    return static_key, state.open(sealed)


class _Symmetric:
    """Noise's symmetric state: each key opens one message here, so the nonce stays 0."""

    def __init__(self) -> None:
        self._hash = self._chaining_key = _PROTOCOL  # of 32 bytes: taken as it is
        self._key = b""

    def mix_hash(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def mix_key(self, shared: bytes) -> None:
        secret = hmac.digest(self._chaining_key, shared, "sha256")
        self._chaining_key = hmac.digest(secret, b"\x01", "sha256")
        self._key = hmac.digest(secret, self._chaining_key + b"\x02", "sha256")

    def open(self, sealed: bytes) -> bytes:
        opened = ChaCha20Poly1305(self._key).decrypt(bytes(12), sealed, self._hash)
        self.mix_hash(sealed)
        return opened


def _signature_in(payload: bytes) -> bytes:
    """Field 2 of the payload: `{1: identity_key, 2: identity_sig}`; the key is that in the peer id."""
    position = 0
    with contextlib.suppress(IndexError):
        while position < len(payload):
            tag, size = payload[position], payload[position + 1]
            position += 2
            if size >= 0x80:
                size += (payload[position] - 1) << 7
                position += 1
            if tag == 0x12:
                return payload[position : position + size]
            position += size
    return b""
