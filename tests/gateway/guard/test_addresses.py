"""Whose account a request goes on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petal_swarm.errors import ConfigError
from petal_swarm.gateway.guard.addresses import Proxies, parse
from petal_swarm.gateway.guard.config import hosts_of, is_loopback


def scope(client: str | None, *forwarded: str) -> dict[str, Any]:
    headers = [(b"x-forwarded-for", each.encode("latin-1")) for each in forwarded]
    return {"client": (client, 1234) if client else None, "headers": headers}


@pytest.mark.parametrize(
    ("client", "forwarded", "group"),
    [
        ("203.0.113.7", [], "203.0.113.7"),
        ("203.0.113.7", ["198.51.100.1"], "203.0.113.7"),  # not one of ours: it may say what it likes
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6, 198.51.100.1"], "198.51.100.1"),  # the visitor's own lie comes first
        ("10.0.0.1", ["6.6.6.6", "198.51.100.1, 10.0.0.9"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1:5555"], "198.51.100.1"),
        ("10.0.0.1", ["[2001:db8:1:2:3::4]:443"], "2001:db8:1:2::/64"),
        ("10.0.0.1", ["nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["6.6.6.6, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("2001:db8::1", [], "2001:db8::/64"),
        ("2001:db8::ffff:1", [], "2001:db8::/64"),
        ("::ffff:203.0.113.7", [], "203.0.113.7"),
        ("fe80::1%eth0", [], "fe80::/64"),
        ("::1", ["198.51.100.1"], "198.51.100.1"),
        (None, ["198.51.100.1"], "local"),
    ],
)
def test_visitor_is_the_nearest_address_that_is_no_proxy_of_ours(
    client: str | None, forwarded: list[str], group: str
) -> None:
    assert Proxies(["10.0.0.0/8", "::1"]).group_of(scope(client, *forwarded)) == group


def test_long_chains_are_read_from_their_end_only() -> None:
    chain = ", ".join(["6.6.6.6"] * 1000 + ["198.51.100.1"] + ["10.0.0.2"] * 3)
    assert Proxies(["10.0.0.0/8"]).group_of(scope("10.0.0.1", chain)) == "198.51.100.1"
    assert Proxies(["10.0.0.0/8"]).group_of(scope("10.0.0.1", ", ".join(["10.0.0.2"] * 1000))) == "10.0.0.2"


@given(st.text(alphabet=st.characters(max_codepoint=255), max_size=60))
def test_nothing_that_a_proxy_says_breaks_it(said: str) -> None:
    assert Proxies(["10.0.0.1"]).group_of(scope("10.0.0.1", said))
    parse(said)


def test_a_proxy_that_is_no_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="trusted proxy"):
        Proxies(["proxy.example"])


def test_names_of_a_gateway_that_only_this_machine_reaches() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("gateway.example")
    assert hosts_of("0.0.0.0") is None
    assert set(hosts_of("127.0.0.2") or ()) == {"localhost", "127.0.0.1", "::1", "127.0.0.2"}
