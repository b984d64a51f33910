"""Who a visitor is by address, also behind proxies. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from petal_swarm.errors import ConfigError
from petal_swarm.gateway.refusals import Scope

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Who connects without an address, as by a Unix socket.
LOCAL = "local"
#: Longer chains are of nobody's making but a liar's.
_MAX_HOPS = 16


class Proxies:
    """Finds the visitor's address; only what trusted proxies say of it is believed.

    uvicorn's own handling of these headers must be off (`proxy_headers=False`): it would hide who connects.
    """

    def __init__(self, trusted: Iterable[str]) -> None:
        """Raises:
        ConfigError: that is neither an address nor a network.
        """
        try:
            self._trusted = tuple(ipaddress.ip_network(each, strict=False) for each in trusted)
        except ValueError as error:
            raise ConfigError(f"a trusted proxy must be an address or a network: {error}") from None

    def is_trusted(self, address: Address) -> bool:
        """Whether this is one of our proxies."""
        return any(address in network for network in self._trusted)

    def group_of(self, scope: Scope) -> str:
        """Whose account a request goes on: an IPv4 address, or a /64 of IPv6, which one household has."""
        client = scope.get("client")
        address = parse(client[0]) if client else None
        if address is None:
            return LOCAL
        if self.is_trusted(address):
            for said in _forwarded(scope):
                before = parse(said)
                if before is None:
                    break
                address = before
                if not self.is_trusted(address):
                    break
        return group(address)


def parse(text: str) -> Address | None:
    """An address as proxies and sockets write it, perhaps with a port or a zone; None if it is none."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def group(address: Address) -> str:
    """The part of an address that tells visitors apart."""
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((int(address), 64), strict=False))


def _forwarded(scope: Scope) -> Iterator[str]:
    """What `X-Forwarded-For` says, the nearest first."""
    values = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    chain = b",".join(values).decode("latin-1").rsplit(",", _MAX_HOPS)
    for said in reversed(chain[-_MAX_HOPS:]):
        if said.strip():
            yield said
