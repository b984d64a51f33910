"""What visitors may do: numbers, and nothing that acts on them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from petal_swarm.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one visitor may have; None is no limit.

    `tokens_per_min` counts those of prompts and those that were generated. `max_requests` is how many may be
    under way or waiting at once.

    Raises:
        ConfigError: a limit is not positive.
    """

    requests_per_min: float | None = None
    tokens_per_min: float | None = None
    max_requests: int | None = None

    def __post_init__(self) -> None:
        for limit in (self.requests_per_min, self.tokens_per_min, self.max_requests):
            if limit is not None and not limit > 0:
                raise ConfigError(f"a limit must be above 0, got {limit}")


#: For a gateway that anybody can reach, where its owner says nothing else.
PUBLIC = Limits(requests_per_min=60, tokens_per_min=60_000, max_requests=8)
#: For one that only this machine can reach.
PRIVATE = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Bounds for connections, in all and of one address.

    A connection waits `head_timeout_s` at most for the head of its first request, from its first byte to the
    last, and `idle_timeout_s` for the next one to begin. One whose peer takes nothing of what was written
    for it ends after `write_timeout_s`. `max_request_bytes` is what a request may take on the wire, with all
    that is thrown away of it.
    """

    max_connections: int = 2048
    max_of_address: int = 64
    head_timeout_s: float = 10.0
    idle_timeout_s: float = 75.0
    write_timeout_s: float = 30.0
    max_head_bytes: int = 32 << 10
    max_headers: int = 100
    max_request_bytes: int = 32 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """The door's rules.

    `limits` are those of visitors who have no others by their key. `trusted_proxies` are addresses or
    networks whose `X-Forwarded-For` is believed. `allowed_hosts` are the names under which the gateway
    answers; None is any. `cors_origins` are sites whose pages may ask; `*` is any. `max_bodies_bytes` bounds
    the bodies of all requests under way. `page_requests_per_min` is for everything that generates nothing.
    """

    limits: Limits = PRIVATE
    keys_file: Path | None = None
    allow_anonymous: bool = False
    trusted_proxies: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 2 * MIB
    max_bodies_bytes: int = 64 * MIB
    body_timeout_s: float = 30.0
    page_requests_per_min: float | None = 1200.0
    connections: ConnectionLimits = ConnectionLimits()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def hosts_of(host: str) -> tuple[str, ...] | None:
    """`allowed_hosts` of a gateway that listens at `host`: any name, unless only this machine reaches it.

    A page on the web can point a name of its own at 127.0.0.1 (DNS rebinding) and would then be of the same
    origin as the gateway.
    """
    if not is_loopback(host):
        return None
    return tuple(dict.fromkeys(("localhost", "127.0.0.1", "::1", host.strip("[]").lower())))
