"""Knocking at a port, against the answering side of the Noise handshake, written here once more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from petal_swarm.net.identity import Identity
from petal_swarm.net.knock import knock

ALICE, MALLORY = Identity.from_seed(bytes(31) + b"a"), Identity.from_seed(bytes(31) + b"m")
GREETING = b"\x13/multistream/1.0.0\n\x07/noise\n"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def sha256(*data: bytes) -> bytes:
    digest = Hash(SHA256())
    for part in data:
        digest.update(part)
    return digest.finalize()


def stretch(chaining_key: bytes, shared: bytes) -> tuple[bytes, bytes]:
    both = HKDF(SHA256(), length=64, salt=chaining_key, info=b"").derive(shared)
    return both[:32], both[32:]


def answers_as(identity: Identity, *, proof: bytes | None = None) -> Handler:
    """A responder that signs with this identity, or shows another `proof`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(len(GREETING)) == GREETING
        writer.write(GREETING)
        assert await reader.readexactly(2) == b"\x00\x20"
        theirs = await reader.readexactly(32)
        ephemeral, static = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        static_public = static.public_key().public_bytes_raw()
        signature = proof or identity.sign(b"noise-libp2p-static-key:" + static_public)
        payload = b"\x0a\x24" + bytes(36) + b"\x12" + bytes([len(signature)]) + signature

        name = b"Noise_XX_25519_ChaChaPoly_SHA256"
        message = ephemeral.public_key().public_bytes_raw()
        transcript = sha256(sha256(sha256(sha256(name), theirs)), message)
        chaining_key, key = stretch(name, ephemeral.exchange(X25519PublicKey.from_public_bytes(theirs)))
        for data in (static_public, payload):
            sealed = ChaCha20Poly1305(key).encrypt(bytes(12), data, transcript)
            transcript = sha256(transcript, sealed)
            message += sealed
            chaining_key, key = stretch(
                chaining_key, static.exchange(X25519PublicKey.from_public_bytes(theirs))
            )
        writer.write(len(message).to_bytes(2, "big") + message)
        await reader.read()  # until the other side leaves

    return handle


def says(data: bytes) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await reader.read()

    return handle


def knock_at(handler: Handler, identity: Identity = ALICE, *, timeout_s: float = 5.0) -> bool:
    async def run() -> bool:
        left = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                await handler(reader, writer)
            writer.transport.abort()
            left.set()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            answered = await knock("127.0.0.1", port, identity.peer_id, timeout_s=timeout_s)
            await left.wait()
        return answered

    return asyncio.run(run())


def test_the_peer_itself() -> None:
    assert knock_at(answers_as(ALICE))


def test_another_peer() -> None:
    assert not knock_at(answers_as(MALLORY))


def test_a_proof_that_is_none() -> None:
    assert not knock_at(answers_as(ALICE, proof=bytes(64)))
    assert not knock_at(answers_as(ALICE, proof=b"\x01"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(64),
        b"\x13/multistream/1.0.0\n\x03na\n" + bytes(64),
        GREETING + b"\x00\x10" + bytes(16),
        GREETING + b"\xff\xff" + bytes(70000),
        GREETING + b"\x00\xc8" + bytes(200),
        GREETING + b"\x00\xc8" + b"\x09" * 200,
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_others_that_answer(data: bytes) -> None:
    assert not knock_at(says(data), timeout_s=5.0 if data else 0.01)


def test_nobody() -> None:
    assert not asyncio.run(knock("127.0.0.1", 1, ALICE.peer_id, timeout_s=1))
