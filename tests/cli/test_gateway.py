"""Arguments of `petal-swarm gateway`, and what they mean for the guard."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from petal_swarm.cli.front_door import guard_config, missing_words
from petal_swarm.cli.gateway import parse
from petal_swarm.cli.main import main
from petal_swarm.errors import ConfigError
from petal_swarm.gateway.guard import PRIVATE, PUBLIC
from petal_swarm.wire.announcement import Announcement
from tests.routing.swarms import server

PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDasaFDPtTnvLvp8pUkS1sGWUHeN2cQTneTYkjJtEw2aZ"


def parsed(*words: str) -> Any:
    return parse(["m", *words, "--initial-peers", PEER])


def test_only_this_machine_has_no_limits() -> None:
    config = guard_config(parsed())
    assert config.limits == PRIVATE
    assert config.allowed_hosts == ("localhost", "127.0.0.1", "::1")
    assert (config.keys_file, config.cors_origins, config.max_body_bytes) == (None, (), 2 << 20)


@pytest.mark.parametrize("words", [("--host", "0.0.0.0"), ("--trusted-proxy", "127.0.0.1")])
def test_who_lets_others_in_has_limits(words: tuple[str, ...]) -> None:
    assert guard_config(parsed(*words)).limits == PUBLIC


def test_limits_that_are_given() -> None:
    words = ("--host", "0.0.0.0", "--requests-per-min", "5", "--tokens-per-min", "0", "--api-keys", "keys")
    config = guard_config(parsed(*words, "--allow-anonymous", "--cors", "https://a.example", "--cors", "*"))
    assert config.limits.requests_per_min == 5
    assert config.limits.tokens_per_min is None
    assert config.limits.max_requests == PUBLIC.max_requests
    assert (config.keys_file, config.allow_anonymous) == (Path("keys"), True)
    assert config.cors_origins == ("https://a.example", "*")
    assert config.allowed_hosts is None


@pytest.mark.parametrize(
    ("given", "name"), [("My.Box", "my.box"), ("my.box.", "my.box"), ("[::2]", "::2"), ("fe80::1", "fe80::1")]
)
def test_further_names(given: str, name: str) -> None:
    assert guard_config(parsed("--allow-host", given)).allowed_hosts[-1] == name


@pytest.mark.parametrize(
    "origin", ["https://example.org", "http://localhost:3000", "http://[::1]:80", "moz-extension://ab-c"]
)
def test_origins_of_pages(origin: str) -> None:
    assert guard_config(parsed("--cors", origin)).cors_origins == (origin,)
    assert guard_config(parsed("--cors", origin.upper() + "/")).cors_origins == (origin,)


@pytest.mark.parametrize(
    ("servers", "says"),
    [
        ([server("a", 0, 4), server("b", 4, 6)], ""),
        ([server("a", 0, 4)], "nobody serves blocks 4-5 now, .*; start servers of them"),
        ([], "nobody serves blocks 0-5 now"),
        ([server("a", 0, 4), server("b", 4, 6, state="joining")], "blocks 4-5 now, .* is still joining"),
        ([server("a", 0, 5), server("b", 0, 2, state="joining")], "block 5 now, .*; start servers"),
    ],
)
def test_blocks_that_are_missing_at_the_start_are_told(servers: list[Announcement], says: str) -> None:
    told = missing_words(servers, 6)
    assert re.search(says, told)
    assert told.count("\n") == bool(says)


@pytest.mark.parametrize("words", [("m",), ("--model", "m"), ("--model=m",)])
@pytest.mark.parametrize("others", [(), ("--port", "0")])
def test_the_model_has_a_place_and_an_option(words: tuple[str, ...], others: tuple[str, ...]) -> None:
    for argv in ((*words, *others), (*others, *words)):
        arguments = parse([*argv, "--initial-peers", PEER])
        assert (arguments.model, arguments.initial_peers) == ("m", [PEER])


def test_anonymous_visitors_need_keys_to_be_exceptions_from() -> None:
    with pytest.raises(ConfigError, match="--api-keys"):
        guard_config(parsed("--allow-anonymous"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--port", "65536"), "0 to 65535"),
        (("--cors", "example.org"), "https://example.org"),
        (("--cors", "https://example.org/page"), "expected an origin"),
        (("--cors", "https://a.example,https://b.example"), "expected an origin"),
        (("--allow-host", "http://foo"), "without http:// and port"),
        (("--allow-host", "foo:80"), "without http:// and port"),
        (("--model", "other"), "not both"),
        (("--port", "http"), "0 to 65535"),
        (("--adapter", "pirate"), "NAME=FOLDER"),
        (("--max-queue", "-1"), "at least 0"),
        (("--max-requests", "0"), "at least 1"),
        (("--requests-per-min", "many"), "at least 0"),
    ],
)
def test_arguments_that_cannot_be(words: tuple[str, ...], says: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(*words)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--host", "192.0.2.1"), "cannot listen at 192.0.2.1"),
        (("--host", "300.1.1.1"), "--host 300.1.1.1 is neither an address nor a known name"),
        (
            ("--api-keys", "/no/such/keys", "--port", "0"),
            "the keys in /no/such/keys: no such file",
        ),
        (("--trusted-proxy", "foo", "--port", "0"), "trusted proxy"),
        (("--port", "0"), "no-such-model"),
    ],
)
def test_what_goes_wrong_is_one_line(words: tuple[str, ...], says: str, capsys: Any) -> None:
    asked = ["--model", "./no-such-model", *words, "--initial-peers", PEER]
    assert main(["gateway", *asked]) == 2
    captured = capsys.readouterr()
    assert (captured.out, len(captured.err.splitlines())) == ("", 1), captured.err
    assert says in captured.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("m", "--modle-name", "x"), "no option --modle-name; did you mean --model-name?"),
        (("--initial-peer", PEER), "required: MODEL"),
        (("--initial-peers", PEER), "required: MODEL"),
        (("m",), "required: --initial-peers"),
        (("", "--initial-peers", PEER), "MODEL is empty"),
        (("--model", "", "--initial-peers", PEER), "MODEL is empty"),
    ],
)
def test_what_is_missing_or_misspelt(words: tuple[str, ...], says: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(list(words))
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_adapters_have_names() -> None:
    assert parsed("--adapter", "a=./x=y", "--adapter", "b=org/b").adapters == [("a", "./x=y"), ("b", "org/b")]
