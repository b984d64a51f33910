"""`/v1/chat/completions`, as the official package sees it."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.cli.tokenizers_of_tests import characters
from tests.gateway.scripted import ScriptedSource, app_around, events_of, openai_of, post

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "org/tiny", "messages": HELLO, **fields}


def prompt_of(source: ScriptedSource) -> str:
    return source.tokenizer.decode(source.started[0].request.prompts[0])


def test_an_answer() -> None:
    async def scenario() -> None:
        client = openai_of(app_around(source := ScriptedSource()))
        raw = await client.chat.completions.with_raw_response.create(model="org/tiny", messages=HELLO)
        answer = raw.parse()
        choice = answer.choices[0]
        assert (choice.message.role, choice.message.content) == ("assistant", "Hello there.")
        assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
        assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "org/tiny", "chatcmpl-")
        assert prompt_of(source) == "[user]hello[end][assistant]"
        assert answer.usage.model_dump(exclude_none=True) == {
            "prompt_tokens": len(prompt_of(source)),
            "completion_tokens": 3,
            "total_tokens": len(prompt_of(source)) + 3,
        }
        assert raw.headers["x-swarm-route"] == "you -> alice 0:12 -> bob 12:24 -> you"
        assert 'first;dur=250.0, hop0;desc="alice 0:12";dur=12.0' in raw.headers["server-timing"]
        assert source.started[0].closed

    asyncio.run(scenario())


def test_a_stream_with_usage() -> None:
    async def scenario() -> None:
        client = openai_of(app_around(source := ScriptedSource()))
        stream = await client.chat.completions.create(
            model="org/tiny", messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert stream.response.headers["x-swarm-route"].startswith("you -> alice")
        assert {(c.object, c.id) for c in chunks} == {("chat.completion.chunk", chunks[0].id)}
        for index in range(2):
            own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
            assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
            assert [c.delta.content for c in own[1:-1]] == ["Hello", " there", "."]
            assert [c.finish_reason for c in own] == [None] * 4 + ["stop"]
            assert own[-1].delta.content is None
        assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 6)
        assert source.started[0].request.choices == 2

    asyncio.run(scenario())


def test_a_stream_without_usage_ends_with_done() -> None:
    events = events_of(post(ScriptedSource(), PATH, body(stream=True)).text)
    assert events[-1] == "[DONE]"
    assert not any("usage" in event for event in events[:-1])
    assert not any("swarm" in event for event in events[:-1])


def test_logprobs() -> None:
    async def scenario() -> None:
        client = openai_of(app_around(ScriptedSource(("é", "x"))))
        answer = await client.chat.completions.create(
            model="org/tiny", messages=HELLO, logprobs=True, top_logprobs=2
        )
        first, second = answer.choices[0].logprobs.content
        assert (first.token, first.bytes, first.logprob) == ("é", [0xC3, 0xA9], -0.5)
        assert [(top.token, top.logprob) for top in second.top_logprobs] == [("alt0", -1.0), ("alt1", -2.0)]
        stream = await client.chat.completions.create(
            model="org/tiny", messages=HELLO, logprobs=True, stream=True
        )
        told = [c.choices[0].logprobs async for c in stream]
        assert [logprobs.content[0].token for logprobs in told if logprobs] == ["é", "x"]
        assert told[1].content[0].top_logprobs == []

    asyncio.run(scenario())


def test_messages_of_all_kinds() -> None:
    source = ScriptedSource()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "c"},
    ]
    assert post(source, PATH, body(messages=messages)).status_code == 200
    assert prompt_of(source) == "[system]be kind[end][user]ab[end][assistant][end][user]c[end][assistant]"


def test_a_base_model_gets_a_plain_format() -> None:
    source = ScriptedSource((" ", " Hi", " you"), tokenizer=characters(chat=False))
    answer = post(source, PATH, body(stop=["x", ""])).json()
    assert prompt_of(source) == "User: hello\nAssistant:"
    assert source.started[0].request.stops == ("x", "\nUser:")
    assert answer["choices"][0]["message"]["content"] == "Hi you"
    events = events_of(post(source, PATH, body(stream=True)).text)[:-1]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == "Hi you"


def test_what_is_asked_arrives() -> None:
    source = ScriptedSource()
    asked = body(
        temperature=0.5,
        top_p=0.9,
        seed=-5,
        presence_penalty=1,
        frequency_penalty=-1.5,
        logit_bias={"7": -100},
        top_k=5,
        repetition_penalty=1.2,
        ignore_eos=True,
        max_completion_tokens=9,
        max_tokens=3,
        stop="end",
        user="me",
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        no_such_field=[[1]],
    )
    assert post(source, PATH, asked).status_code == 200
    request = source.started[0].request
    assert (request.max_new_tokens, request.stops, request.ignore_eos) == (9, ("end",), True)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 5, -5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1.5)
    assert (sampling.repetition_penalty, dict(sampling.logit_bias)) == (1.2, {7: -100})


def test_defaults() -> None:
    source = ScriptedSource()
    post(source, PATH, body(temperature=None, top_p=0, top_k=-1, seed=None))
    request = source.started[0].request
    assert (request.choices, request.stops, request.top_logprobs, request.adapter) == (1, (), None, None)
    assert request.sampling.temperature == 0, "top_p 0 is the likeliest token"
    assert (request.sampling.top_p, request.sampling.top_k) == (1, 0)
    post(source, PATH, body())
    assert source.started[1].request.sampling.temperature == 1


@pytest.mark.parametrize(("context", "expected"), [(None, 100), (1000, 100), (60, 33)])
def test_an_answer_is_as_long_as_fits(context: int | None, expected: int) -> None:
    source = ScriptedSource(context_tokens=context)
    assert post(source, PATH, body()).status_code == 200
    assert len(source.started[0].request.prompts[0]) == 27
    assert source.started[0].request.max_new_tokens == expected


def test_an_adapter_is_a_model() -> None:
    source = ScriptedSource()
    assert post(source, PATH, body(model="pirate")).json()["model"] == "pirate"
    assert source.started[0].request.adapter == "pirate"


def test_errors_of_the_package() -> None:
    async def scenario() -> None:
        client = openai_of(app_around(ScriptedSource(context_tokens=30)))

        def ask(model: str = "org/tiny", **fields: Any) -> Any:
            return client.chat.completions.create(model=model, messages=HELLO, **fields)

        with pytest.raises(openai.NotFoundError) as missing:
            await ask("gpt-4")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as long:
            await ask(max_tokens=10)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as tools:
            await ask(tools=[{"type": "function", "function": {"name": "f"}}])
        assert (tools.value.param, tools.value.code) == ("tools", "unsupported_parameter")
        with pytest.raises(openai.BadRequestError) as hot:
            await ask(temperature=3)
        assert (hot.value.param, hot.value.type) == ("temperature", "invalid_request_error")

    asyncio.run(scenario())
