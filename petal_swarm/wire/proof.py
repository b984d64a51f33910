"""`member`, the first frame in either direction of a stream of a private swarm: 61 bytes, always alike.

Its bytes are fixed but for the proof, so whoever waits for it knows by the first byte that differs that it
is something else, and reads no more.
"""

from __future__ import annotations

from typing import Final

from petal_swarm.wire.frames import encode_frame

_PROOF_BYTES = 32

#: What every such frame starts with: lengths, and the header up to the proof.
HEAD: Final = b"".join(encode_frame({"type": "member", "proof": bytes(_PROOF_BYTES)}))[:-_PROOF_BYTES]


def member_frame(proof: bytes) -> bytes:
    """The frame that carries these 32 bytes."""
    assert len(proof) == _PROOF_BYTES
    return HEAD + proof
