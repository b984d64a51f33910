"""The demo as a page: what it asks of the gateway. Servers and gateway have tests of their own."""

from __future__ import annotations

import argparse
import socket

import pytest

from petal_swarm.cli import demo, gateway

ADDRESS = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDasaFDPtTnvLvp8pUkS1sGWUHeN2cQTneTYkjJtEw2aZ"


def test_the_page_is_a_gateway_to_the_demos_own_servers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[argparse.Namespace] = []
    monkeypatch.setattr(gateway, "run", lambda arguments: given.append(arguments) or 0)
    words = ["--web", "--model", "some/model", "--port", "0", "--threads", "3", "--log-level", "info"]
    assert demo.serve_page(ADDRESS, demo.parse(words)) == 0
    assert f"status some/model --watch --initial-peers {ADDRESS}\n" in capsys.readouterr().out
    (asked,) = given
    assert (asked.model, asked.initial_peers) == ("some/model", [ADDRESS])
    assert (asked.host, asked.port, asked.threads, asked.log_level) == ("127.0.0.1", 0, 3, "info")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--web", "Why?"], "leave out the question"),
        (["--port", "8199"], "--port is of the page: add --web"),
        (["--host", "0.0.0.0", "Why?"], "--host is of the page: add --web"),
    ],
)
def test_what_would_be_ignored_is_refused(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(words)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_questions_and_the_page_have_defaults() -> None:
    assert demo.parse([]).question == demo.DEFAULT_QUESTION
    assert demo.parse(["Why?"]).question == "Why?"
    page = demo.parse(["--web"])
    assert (page.host, page.port) == ("127.0.0.1", 8080)


def test_a_port_in_use_is_told_before_any_server_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert demo.main(["--web", "--port", str(port), "--model", "/no/such/model"]) == 2
    assert f"cannot listen at 127.0.0.1 port {port}" in capsys.readouterr().err
