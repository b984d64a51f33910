"""Bad input, and a swarm that fails: OpenAI's error objects with the right status."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from petal_swarm.errors import (
    BusyError,
    CacheFullError,
    ConfigError,
    DeadlineError,
    HopLostError,
    MissingBlocksError,
    NotFiniteError,
    PeerUnreachableError,
    SessionTooLongError,
    SilentBlocksError,
)
from petal_swarm.gateway.api.errors import ApiError, from_swarm
from petal_swarm.gateway.api.schemas import ChatBody
from petal_swarm.gateway.app import make_app
from petal_swarm.gateway.config import GatewayConfig
from petal_swarm.gateway.gateway import Gateway
from petal_swarm.gateway.guard import Guard, GuardConfig
from petal_swarm.gateway.line import Line
from petal_swarm.gateway.refusals import LineFullError
from tests.gateway.scripted import ScriptedSource, Step, app_around, client_of, events_of, post

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ASKED = {"model": "org/tiny", "messages": [{"role": "user", "content": "secret words"}]}


def deep(depth: int) -> bytes:
    return b'{"model": "org/tiny", "prompt": "a", "x": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"hello",
        b"[]",
        b"null",
        b'"x"',
        b'{"model": "org/tiny", "prompt": "\xff\xfe"}',
        b'{"model": "org/tiny", "prompt": "\\ud800"}',
        b'{"model": "org/tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "org/tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "org/tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "org/tiny", "prompt": "a"} and more',
        b'{"model": 5, "prompt": "a"}',
        b'{"model": "' + b"m" * 600 + b'", "prompt": "a"}',
        b'{"prompt": "a"}',
        b'{"model": "org/tiny"}',
        b"\x00\x01\x02",
        deep(100_000),
    ],
)
def test_bodies_that_are_none(body: bytes) -> None:
    source = ScriptedSource()
    answer = post(source, TEXT, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"]
    assert len(error["message"]) <= 500
    assert not source.started


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages: must not be empty"),
        ([{"role": "user", "content": "x"}] * 4097, "messages: must have at most 4096 items"),
        ([{"role": "user", "content": "x"}, {"role": "king", "content": "x"}], "messages[1].role: must be"),
        ([{"role": "user"}], "no content"),
        ([{"content": "x"}], "provide messages[0].role."),
        (["x"], "messages[0]: must be an object"),
        ("x", "messages: must be a valid array"),
        ([{"role": "user", "content": 5}], "messages[0].content: must be a text, or a list"),
        ([{"role": "tool", "content": "x"}], "Tools"),
        ([{"role": "assistant", "tool_calls": [{}]}], "Tools"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "content: must be a text"),
    ],
)
def test_messages_that_are_none(messages: Any, says: str) -> None:
    answer = post(ScriptedSource(), CHAT, {"model": "org/tiny", "messages": messages})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages")
    assert says in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"functions": [{}]},
        {"function_call": {"name": "f"}},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"prediction": {"type": "content"}},
        {"web_search_options": {}},
        {"top_logprobs": 5},
        {"logprobs": 5},
        {"max_tokens": 0},
        {"max_completion_tokens": 0},
    ],
)
def test_what_is_not_supported_is_said(fields: dict[str, Any]) -> None:
    answer = post(ScriptedSource(), CHAT, ASKED | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(fields)))


def mistakes(fields: bytes) -> int:
    with pytest.raises(ValidationError) as failure:
        ChatBody.model_validate_json(b'{"model": "org/tiny", ' + fields + b"}")
    return failure.value.error_count()


def test_a_million_mistakes_are_not_looked_for() -> None:
    """Each takes microseconds, in which nobody else is answered."""
    part = b'{"role": "user", "content": [' + b"1," * 200 + b"1]}"
    assert mistakes(b'"messages": [' + (part + b",") * 50 + part + b"]") < 5
    tools = b'"messages": [{"role": "user", "content": "a"}], "tools": [' + b"1," * 200 + b"1]"
    assert mistakes(tools) == 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"logit_bias": {f"x{n}": 1 for n in range(2000)}}, "More than 1000 things"),
        ({"x": [[]] * 70_000}, "more than 65536 lists"),
        ({"max_tokens": [{}] * 70_000}, "more than 65536 lists"),
    ],
)
def test_bodies_of_too_many_things(fields: dict[str, Any], says: str) -> None:
    refused = post(ScriptedSource(), CHAT, ASKED | fields)
    assert refused.status_code == 400
    assert says in refused.json()["error"]["message"]


def test_a_template_that_refuses() -> None:
    source = ScriptedSource()
    source.tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    answer = post(source, CHAT, ASKED)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert "no system here" in answer.json()["error"]["message"]
    source.tokenizer.chat_template = "{{ messages[7]['content'] + 1 }}"
    assert post(source, CHAT, ASKED).status_code == 400
    source.tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    assert post(source, CHAT, ASKED).status_code == 400


FAILURES = [
    (MissingBlocksError("nobody serves blocks 3 to 5; start a server", [3]), 503, "missing_blocks", True),
    (CacheFullError("full", retry_after_s=2.5), 503, "swarm_full", True),
    (CacheFullError("a cache of 512 tokens"), 503, "swarm_too_small", False),
    (BusyError("busy"), 503, "swarm_full", True),
    (DeadlineError("late"), 504, "timeout", True),
    (HopLostError("lost"), 503, "swarm_failed", True),
    (PeerUnreachableError("/ip4/10.1.2.3 does not answer"), 503, "swarm_failed", True),
    (NotFiniteError("nan"), 500, "not_finite", False),
    (SessionTooLongError("long"), 400, "context_length_exceeded", False),
    (ConfigError("seed is odd"), 400, None, False),
    (LineFullError("come later", retry_after_s=7), 429, "queue_full", True),
    (RuntimeError("a secret of the gateway"), 500, "internal_error", False),
]


@pytest.mark.parametrize(("failure", "status", "code", "retry"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at_start", [False, True])
def test_failures_before_the_first_token(
    failure: Exception, status: int, code: str | None, retry: bool, stream: bool, at_start: bool
) -> None:
    source = ScriptedSource(refuse=failure) if at_start else ScriptedSource((failure,))
    answer = post(source, CHAT, ASKED | {"stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], "retry-after" in answer.headers) == (status, code, retry)
    assert "10.1.2.3" not in error["message"]
    assert "secret of" not in error["message"]
    assert all(answers.closed for answers in source.started)


@pytest.mark.parametrize(
    ("failure", "says", "retry_s"),
    [
        (MissingBlocksError("secret", range(3, 6)), "Nobody in the swarm serves blocks 3-5 of", "15"),
        (MissingBlocksError("secret", [3], is_joining=True), "block 3 .* is still joining", "30"),
        (SilentBlocksError("secret", [3, 4]), "Who serves blocks 3-4 .* does not answer", "15"),
        (MissingBlocksError("secret"), "serves some blocks of", "15"),
    ],
)
def test_which_blocks_are_missing(failure: Exception, says: str, retry_s: str) -> None:
    answer = post(ScriptedSource(refuse=failure), CHAT, ASKED)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], answer.headers["retry-after"]) == (
        503,
        "missing_blocks",
        retry_s,
    )
    assert re.search(says, error["message"]), error["message"]
    assert "secret" not in error["message"]


def test_retry_after_is_in_whole_seconds() -> None:
    answer = post(ScriptedSource(refuse=CacheFullError("full", retry_after_s=2.5)), CHAT, ASKED)
    assert answer.headers["retry-after"] == "3"


@pytest.mark.parametrize("failure", [HopLostError("lost"), RuntimeError("a bug")])
def test_failures_after_the_first_token(failure: Exception) -> None:
    source = ScriptedSource(("Hello", failure))
    answer = post(source, CHAT, ASKED | {"stream": True})
    events = events_of(answer.text)
    assert answer.status_code == 200
    assert events[-2]["choices"][0]["delta"]["content"] == "Hello"
    assert events[-1]["error"]["type"] == "server_error"
    assert source.started[0].closed == 1
    assert post(source, CHAT, ASKED).status_code in (500, 503), "no half answer looks like a whole one"


def test_bugs_are_logged_and_prompts_are_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        script: tuple[Step, ...] = (RuntimeError("a bug"),)
        post(ScriptedSource(script), CHAT, ASKED)
        post(ScriptedSource(), CHAT, ASKED)
        post(ScriptedSource(), CHAT, ASKED | {"temperature": "secret words"})
        post(ScriptedSource(refuse=HopLostError("lost")), CHAT, ASKED)
    assert "a bug" in caplog.text
    assert "secret" not in caplog.text


def test_values_are_not_repeated() -> None:
    answer = post(ScriptedSource(), CHAT, ASKED | {"temperature": "secret words"})
    assert "secret" not in answer.text


async def get(path: str, method: str = "GET") -> httpx.Response:
    async with client_of(app_around(ScriptedSource())) as client:
        return await client.request(method, path)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/gpt-4", 404),
        ("GET", "/v1/models/%2e%2e/%00", 404),
    ],
)
def test_addresses_where_nothing_is(method: str, path: str, status: int) -> None:
    answer = asyncio.run(get(path, method))
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/embeddings", "there are /v1/chat/completions, /v1/completions, /v1/models."),
        ("/v1", "there are /v1/chat/completions,"),
        ("/chat/completions", "; /v1/chat/completions is."),
        ("/completions", "; /v1/completions is."),
        ("/favicon.png", "nothing at this address."),
    ],
)
def test_addresses_that_are_nearly_right(path: str, says: str) -> None:
    assert says in asyncio.run(get(path, "POST")).json()["error"]["message"]


def test_names_in_a_body_are_not_repeated() -> None:
    message = post(ScriptedSource(), CHAT, ASKED | {"logit_bias": {"secret": 1}}).json()["error"]["message"]
    assert message.startswith("logit_bias: must be a valid integer")


def test_the_list_of_models_may_end_in_a_slash() -> None:
    assert asyncio.run(get("/v1/models/")).json() == asyncio.run(get("/v1/models")).json()


def test_error_objects_are_one_short_line() -> None:
    error = ApiError(400, "a\nb " + "x" * 1000)
    message = error.body()["error"]["message"]
    assert (message[:5], len(message)) == ("a b x", 500)
    event = json.loads(error.event().removeprefix(b"data: "))
    assert event["error"] == error.body()["error"] | {"status": 400, "retry_after_s": None}
    assert from_swarm(ConfigError("no")).status == 400


def test_who_is_refused_at_the_door_has_a_request_id_too() -> None:
    async def ask() -> httpx.Response:
        guard = Guard(GuardConfig(allowed_hosts=("elsewhere",)))
        line = Line(room=1, max_waiting=1)
        gateway = Gateway(ScriptedSource(), GatewayConfig(model_name="org/tiny"), line=line, guard=guard)
        async with client_of(make_app(gateway, guard=guard)) as client:
            return await client.get("/v1/models")

    answer = asyncio.run(ask())
    assert answer.status_code == 403
    assert answer.headers["x-request-id"].startswith("req_")
