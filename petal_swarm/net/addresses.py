"""Multiaddrs as text: the little that this project needs to know of them."""

from __future__ import annotations

import ipaddress
import re

from petal_swarm.errors import ConfigError

#: Base58 of a multihash of 34 bytes (a hashed key) or more (an inlined one).
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{44,80}")
#: As tables and logs show it; with dots where the rest was.
_SHORT_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{1,43}(\.{2,3}|…)?")


def split_address(address: str) -> tuple[str, str]:
    """`/ip4/1.2.3.4/tcp/31330/p2p/12D3Koo...` -> (`/ip4/1.2.3.4/tcp/31330`, `12D3Koo...`).

    Raises:
        ConfigError: it does not start with `/` or does not end in `/p2p/PEER_ID`.
    """
    base, separator, peer_id = address.strip().rpartition("/p2p/")
    if separator and base.startswith("/") and _SHORT_ID.fullmatch(peer_id):
        raise ConfigError(
            f"the peer id in {address!r:.200} is cut short: the whole address is needed, as a server prints"
            " it after `ready`"
        )
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
    ends_in_peer = base.rstrip("/").split("/")[-2:-1] == ["p2p"]  # not so behind a relay: /p2p/R/p2p-circuit
    return base if ends_in_peer else f"{base.rstrip('/')}/p2p/{peer_id}"


def is_loopback(address: str) -> bool:
    """Whether a multiaddr names this machine only."""
    parts = address.strip("/").split("/")
    if len(parts) < 2:
        return False
    return (parts[0] == "ip4" and parts[1].startswith("127.")) or parts[:2] == ["ip6", "::1"]


def is_circuit(address: str) -> bool:
    """Whether a multiaddr leads through a relay: `/ip4/.../p2p/RELAY/p2p-circuit/p2p/PEER_ID`."""
    return "p2p-circuit" in address.split("/")


def circuit_address(relay_address: str, peer_id: str) -> str:
    """Where `peer_id` is dialled through the relay at `relay_address`, which ends in `/p2p/RELAY`."""
    return f"{relay_address}/p2p-circuit/p2p/{peer_id}"


def ip_address(address: str) -> str | None:
    """The IP address that is dialled directly; None for names, circuits and other networks."""
    parts = address.strip("/").split("/")
    if is_circuit(address) or len(parts) < 2 or parts[0] not in ("ip4", "ip6"):
        return None
    try:
        ip = ipaddress.ip_address(parts[1])
    except ValueError:
        return None
    return str(ip)


def tcp_port(address: str) -> int | None:
    """The TCP port that is dialled directly; None for circuits and other transports."""
    parts = address.strip("/").split("/")
    if is_circuit(address) or len(parts) < 4 or parts[2] != "tcp" or not parts[3].isdecimal():
        return None
    port = int(parts[3])
    return port if 0 < port < 1 << 16 else None


def scope_of(ip: str) -> str:
    """From where an IP address can be dialled: `machine`, `network` (the local one) or `internet`."""
    parsed = ipaddress.ip_address(ip)
    if parsed.is_loopback:
        return "machine"
    return "internet" if parsed.is_global else "network"
