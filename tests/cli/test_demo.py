"""The demo as a page: what it asks of the gateway. Servers and gateway have tests of their own."""

from __future__ import annotations

import argparse
import socket

import pytest

from petal_swarm.cli import demo, gateway

ADDRESS = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDasaFDPtTnvLvp8pUkS1sGWUHeN2cQTneTYkjJtEw2aZ"


def test_the_page_is_a_gateway_to_the_demos_own_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[argparse.Namespace] = []
    monkeypatch.setattr(gateway, "run", lambda arguments: given.append(arguments) or 0)
    words = ["--web", "--model", "some/model", "--port", "0", "--threads", "3", "--log-level", "info"]
    assert demo.serve_page(ADDRESS, demo.build_parser().parse_args(words)) == 0
    (asked,) = given
    assert (asked.model, asked.initial_peers) == ("some/model", [ADDRESS])
    assert (asked.host, asked.port, asked.threads, asked.log_level) == ("127.0.0.1", 0, 3, "info")


def test_a_port_in_use_is_told_before_any_server_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert demo.main(["--web", "--port", str(port), "--model", "/no/such/model"]) == 2
    assert f"cannot listen at 127.0.0.1 port {port}" in capsys.readouterr().err
