"""Multiaddrs as the daemon writes them in bytes.

Not by hivemind's `Multiaddr` alone: it writes the id of a peer with an Ed25519 key as a CID, which the daemon
does not accept inside an address, as in `/ip4/.../p2p/RELAY/p2p-circuit`.
"""

from __future__ import annotations

import base58

_P2P = b"\xa5\x03"


def address_to_bytes(address: str) -> bytes:
    """A multiaddr, which may have peer ids inside, in bytes.

    Raises:
        ValueError: it is none.
    """
    from hivemind.utils.multiaddr import Multiaddr

    parts = address.split("/p2p/")
    encoded = Multiaddr(parts[0]).to_bytes() if parts[0] else b""
    for part in parts[1:]:
        peer_id, slash, rest = part.partition("/")
        multihash = base58.b58decode(peer_id)
        if not 0 < len(multihash) < 0x80:
            raise ValueError(f"not a peer id: {peer_id}")
        encoded += _P2P + bytes([len(multihash)]) + multihash
        if slash:
            encoded += Multiaddr(f"/{rest}").to_bytes()
    return encoded


def address_from_bytes(data: bytes) -> str:
    """The inverse.

    Raises:
        ValueError: not a multiaddr.
    """
    from hivemind.utils.multiaddr.transforms import bytes_iter

    text = ""
    for _, protocol, codec, value in bytes_iter(data):
        text += f"/{protocol.name}"
        if protocol.name == "p2p":
            text += f"/{base58.b58encode(value).decode()}"
        elif codec.SIZE:
            text += f"/{codec.to_string(protocol, value).lstrip('/')}"
    return text
