"""Multiaddrs as text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petal_swarm.errors import ConfigError
from petal_swarm.net.addresses import (
    circuit_address,
    ip_address,
    is_circuit,
    is_loopback,
    join_address,
    scope_of,
    split_address,
    tcp_port,
)

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
RELAY = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"


@pytest.mark.parametrize(
    "base",
    [
        "/ip4/1.2.3.4/tcp/31330",
        "/ip6/::1/tcp/31330",
        "/ip4/1.2.3.4/udp/31330/quic-v1",
        "/dns4/example.org/tcp/443/wss",
        "/memory",
        f"/ip4/1.2.3.4/tcp/31330/p2p/{RELAY}/p2p-circuit",
    ],
)
def test_splitting(base: str) -> None:
    assert split_address(f"{base}/p2p/{PEER}") == (base, PEER)
    assert split_address(f"  {base}/p2p/{PEER}\n") == (base, PEER)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/",
        PEER,
        f"/p2p/{PEER}",
        "/ip4/1.2.3.4/tcp/31330",
        "/ip4/1.2.3.4/tcp/31330/p2p/",
        "/ip4/1.2.3.4/tcp/31330/p2p",
        f"ip4/1.2.3.4/tcp/31330/p2p/{PEER}",
        f"/ip4/1.2.3.4/tcp/31330/p2p/{PEER}/p2p-circuit",
        f"http://1.2.3.4/p2p/{PEER}",
        f"/ip4/1.2.3.4/tcp/31330/ipfs/{PEER}",
        "x" * 5000,
    ],
)
def test_what_is_no_address_of_a_peer(address: str) -> None:
    with pytest.raises(ConfigError, match="looks like") as caught:
        split_address(address)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("peer_id", [PEER[:4] + "...", PEER[-8:], PEER[:40], PEER[:12] + "…"])
def test_a_peer_id_that_is_cut_short_is_told_so(peer_id: str) -> None:
    with pytest.raises(ConfigError, match="is cut short: the whole address is needed"):
        split_address(f"/ip4/1.2.3.4/tcp/31330/p2p/{peer_id}")


parts = st.text(st.characters(exclude_characters="/", exclude_categories=["Z", "C"]), min_size=1, max_size=5)

peer_ids = st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", min_size=46, max_size=60)


@settings(deadline=None, derandomize=True)
@given(
    base=st.lists(parts, min_size=1, max_size=4).map(lambda names: "/" + "/".join(names)), peer_id=peer_ids
)
def test_joining_undoes_splitting(base: str, peer_id: str) -> None:
    assert split_address(join_address(base, peer_id)) == (base, peer_id)


def test_joining() -> None:
    assert join_address("/ip4/1.2.3.4/tcp/1/", PEER) == f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}"
    whole = f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}"
    assert join_address(whole, PEER) == whole


def test_joining_behind_a_relay() -> None:
    base = f"/ip4/1.2.3.4/tcp/1/p2p/{RELAY}/p2p-circuit"
    assert split_address(join_address(base, PEER)) == (base, PEER)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/ip4/127.0.0.1/tcp/0", True),
        ("/ip4/127.8.9.10/tcp/1", True),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}", True),
        ("/ip6/::1/tcp/0", True),
        ("/ip4/0.0.0.0/tcp/0", False),
        ("/ip4/12.7.0.0/tcp/0", False),
        ("/ip4/10.0.0.127/tcp/0", False),
        ("/ip6/::/tcp/0", False),
        ("/ip6/::1:2/tcp/0", False),
        ("/dns4/127.example.org/tcp/0", False),
        ("/ip4", False),
        ("", False),
        ("/", False),
    ],
)
def test_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


@pytest.mark.parametrize(
    ("address", "ip", "port"),
    [
        (f"/ip4/1.2.3.4/tcp/31330/p2p/{PEER}", "1.2.3.4", 31330),
        ("/ip4/1.2.3.4/tcp/31330", "1.2.3.4", 31330),
        ("/ip6/2001:db8::1/tcp/1", "2001:db8::1", 1),
        ("/ip4/1.2.3.4/udp/31330/quic-v1", "1.2.3.4", None),
        ("/dns4/example.org/tcp/443/wss", None, 443),
        ("/ip4/1.2.3.4/tcp/0", "1.2.3.4", None),
        ("/ip4/1.2.3.4/tcp/65536", "1.2.3.4", None),
        ("/ip4/1.2.3/tcp/x", None, None),
        ("/ip4/1.2.3.4", "1.2.3.4", None),
        (f"/ip4/1.2.3.4/tcp/31330/p2p/{RELAY}/p2p-circuit", None, None),
        ("", None, None),
    ],
)
def test_where_a_connection_goes(address: str, ip: str | None, port: int | None) -> None:
    assert ip_address(address) == ip
    assert tcp_port(address) == port


def test_circuits() -> None:
    relay = f"/ip4/1.2.3.4/tcp/31330/p2p/{RELAY}"
    address = circuit_address(relay, PEER)
    assert is_circuit(address)
    assert not is_circuit(relay)
    assert split_address(address) == (f"{relay}/p2p-circuit", PEER)
    assert join_address(f"{relay}/p2p-circuit", PEER) == address


@pytest.mark.parametrize(
    ("ip", "scope"),
    [
        ("127.0.0.1", "machine"),
        ("::1", "machine"),
        ("192.168.1.2", "network"),
        ("10.0.0.1", "network"),
        ("100.64.0.1", "network"),
        ("fe80::1", "network"),
        ("8.8.8.8", "internet"),
        ("2600::1", "internet"),
    ],
)
def test_scopes(ip: str, scope: str) -> None:
    assert scope_of(ip) == scope
