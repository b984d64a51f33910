"""Multiaddrs to and from what a TCP socket wants, for the transport without a daemon."""

from __future__ import annotations

import ipaddress

import base58

from petal_swarm.errors import ConfigError

_IP = {"ip4": 4, "ip6": 6}
_NAMES = ("dns", "dns4", "dns6")


def endpoint_of(base: str) -> tuple[str, int] | None:
    """`/ip4/1.2.3.4/tcp/31330` -> (`1.2.3.4`, 31330); None for an address of another kind: QUIC, a relay.

    Raises:
        ConfigError: not an address.
    """
    parts = base.strip("/").split("/")
    if len(parts) != 4 or parts[2] != "tcp":
        if len(parts) >= 2 and parts[0] in (*_IP, *_NAMES, "dnsaddr"):
            return None
        raise ConfigError(f"an address looks like /ip4/1.2.3.4/tcp/31330, got {base!r:.200}")
    kind, host, _, port = parts
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(f"the port of {base!r:.200} is not one")
    if kind in _NAMES and host:
        return host, int(port)
    try:
        if ipaddress.ip_address(host).version == _IP[kind]:
            return host, int(port)
    except (ValueError, KeyError):
        pass
    raise ConfigError(f"the host of {base!r:.200} is not one")


def multiaddr_of(host: str, port: int) -> str:
    """The inverse of `endpoint_of`, for a numeric host."""
    return f"/ip{ipaddress.ip_address(host).version}/{host}/tcp/{port}"


def require_peer_id(peer_id: str) -> str:
    """
    Raises:
        ConfigError: not a peer id in base58.
    """
    try:
        decoded = base58.b58decode(peer_id)
    except ValueError:
        decoded = b""
    # A multihash: the key itself (Ed25519), or the SHA-256 of it (RSA).
    if not (decoded[:2] == b"\x00\x24" and len(decoded) == 38) and not (
        decoded[:2] == b"\x12\x20" and len(decoded) == 34
    ):
        raise ConfigError(f"not a peer id: {peer_id!r:.100}; it looks like 12D3KooW...")
    return peer_id
