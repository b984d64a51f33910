"""Multiaddrs as text: the little that this project needs to know of them."""

from __future__ import annotations

import re

from petal_swarm.errors import ConfigError

#: Base58 of a multihash of 34 bytes (a hashed key) or more (an inlined one).
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{44,80}")


def split_address(address: str) -> tuple[str, str]:
    """`/ip4/1.2.3.4/tcp/31330/p2p/12D3Koo...` -> (`/ip4/1.2.3.4/tcp/31330`, `12D3Koo...`).

    Raises:
        ConfigError: it does not start with `/` or does not end in `/p2p/PEER_ID`.
    """
    base, separator, peer_id = address.strip().rpartition("/p2p/")
    if not separator or not base.startswith("/") or not is_peer_id(peer_id):
        raise ConfigError(
            f"a peer's address looks like /ip4/1.2.3.4/tcp/31330/p2p/PEER_ID, got {address!r:.200}"
        )
    return base, peer_id


def is_peer_id(text: str) -> bool:
    """Whether this may be a peer id, as far as its letters tell."""
    return _PEER_ID.fullmatch(text) is not None


def join_address(base: str, peer_id: str) -> str:
    """The inverse of `split_address`; a base that already ends in `/p2p/...` is left as it is."""
    ends_in_peer = base.rstrip("/").split("/")[-2:-1] == ["p2p"]
    return base if ends_in_peer else f"{base.rstrip('/')}/p2p/{peer_id}"


def is_loopback(address: str) -> bool:
    """Whether a multiaddr names this machine only."""
    parts = address.strip("/").split("/")
    if len(parts) < 2:
        return False
    return (parts[0] == "ip4" and parts[1].startswith("127.")) or parts[:2] == ["ip6", "::1"]
