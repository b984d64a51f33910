"""`/v1/completions`, as the official package and lm-evaluation-harness see it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from petal_swarm.client.generation.pieces import TokenLogprob
from petal_swarm.gateway.api.shapes import CompletionShape
from tests.gateway.scripted import ScriptedSource, app_around, events_of, openai_of, post

PATH = "/v1/completions"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "org/tiny", "prompt": "once", **fields}


def ids(text: str) -> list[int]:
    return list(ScriptedSource().tokenizer(text)["input_ids"])


def test_an_answer() -> None:
    async def scenario() -> None:
        client = openai_of(app_around(source := ScriptedSource()))
        answer = await client.completions.create(model="org/tiny", prompt="once")
        assert (answer.object, answer.id[:5]) == ("text_completion", "cmpl-")
        choice = answer.choices[0]
        assert (choice.text, choice.finish_reason, choice.logprobs) == ("Hello there.", "stop", None)
        request = source.started[0].request
        assert (request.prompts, request.max_new_tokens) == ((tuple(ids("once")),), 16)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        (ids("ab"), ["ab"]),
        ([ids("ab"), ids("c")], ["ab", "c"]),
    ],
)
def test_prompts_of_all_forms(prompt: Any, expected: list[str]) -> None:
    source = ScriptedSource()
    answer = post(source, PATH, body(prompt=prompt, n=2, best_of=2, echo=True)).json()
    assert source.started[0].request.prompts == tuple(tuple(ids(text)) for text in expected)
    texts = [text + "Hello there." for text in expected for _ in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_a_stream_with_echo() -> None:
    async def scenario() -> None:
        client = openai_of(app_around(ScriptedSource()))
        stream = await client.completions.create(
            model="org/tiny", prompt="once ", echo=True, stream=True, max_tokens=2
        )
        chunks = [chunk async for chunk in stream]
        assert [chunk.choices[0].text for chunk in chunks] == ["once ", "Hello", " there"]
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "length"]

    asyncio.run(scenario())


def test_logprobs_of_prompt_and_answer() -> None:
    """What lm-evaluation-harness sends, and how it reads the answer."""
    source = ScriptedSource(("!",))
    asked = body(prompt=[ids("once")], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234)
    choice = post(source, PATH, asked).json()["choices"][0]
    request = source.started[0].request
    assert (request.prompt_logprobs, request.top_logprobs) == (True, 1)
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][-1] == {"alt0": -1.0, "!": -0.5}
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    continuation = logprobs["token_logprobs"][2:-1]
    assert sum(continuation) == -1.0


@pytest.mark.parametrize("logprobs", [None, 0])
def test_only_the_prompt_can_be_scored(logprobs: int | None) -> None:
    source = ScriptedSource()
    answer = post(source, PATH, body(echo=True, max_tokens=0, logprobs=logprobs)).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("once", "length")
    assert (choice["logprobs"] is None) == (logprobs is None)
    assert answer["usage"]["completion_tokens"] == 0


def test_logprobs_in_a_stream_go_on_where_they_were() -> None:
    events = events_of(post(ScriptedSource(), PATH, body(stream=True, logprobs=0)).text)[:-1]
    told = [event["choices"][0]["logprobs"] for event in events]
    assert [each["text_offset"] for each in told] == [[0], [5], [11], [12]]
    assert [each["tokens"] for each in told] == [["Hello"], [" there"], ["."], ["<end>"]]


def test_a_token_that_is_half_a_character() -> None:
    shape = CompletionShape(logprobs=True)
    half = TokenLogprob(1, "\ufffd", b"\xe2\x80", float("-inf"))
    told = shape._list_logprobs(0, [half])
    assert told is not None
    assert (told["tokens"], told["token_logprobs"]) == (["bytes:\\xe2\\x80"], [-9999.0])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [257], "echo": True}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 600}, "stop"),
        ({"stop": 5}, "stop"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"seed": 1 << 64}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": True}, "temperature"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    source = ScriptedSource()
    answer = post(source, PATH, body(**fields))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert not source.started


def test_the_package_raises() -> None:
    async def scenario() -> None:
        client = openai_of(app_around(ScriptedSource(context_tokens=8)))
        with pytest.raises(openai.BadRequestError, match="context has 8 tokens; 4 of prompt"):
            await client.completions.create(model="org/tiny", prompt="once", max_tokens=5)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "context", "says"),
    [
        ({"prompt": "a" * 300_000}, None, "context has 16384 tokens"),
        ({"prompt": [1] * 20_000, "echo": True}, None, "context has 16384 tokens"),
        ({"prompt": "a" * 300}, 10, "context has 10 tokens"),
        ({"prompt": ["a", "a" * 300]}, 10, "context has 10 tokens"),
        ({"prompt": [[1] * 10, [1]], "echo": True}, 10, "context has 10 tokens"),
        ({"prompt": ["a" * 4000] * 17}, None, "At most 16 answers"),
        ({"prompt": ["a" * 4000] * 2, "n": 9}, None, "At most 16 answers"),
    ],
)
def test_what_never_fits_is_not_cut_into_tokens(
    fields: dict[str, Any], context: int | None, says: str
) -> None:
    class Untouched:
        chat_template = None

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            assert len(text) < 10
            return {"input_ids": [1]}

    source = ScriptedSource(context_tokens=context, tokenizer=Untouched())
    answer = post(source, PATH, body(**fields))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "n" if "At most" in says else "prompt")
    assert says in error["message"]
    assert not source.started


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("stream", [False, True])
def test_many_probabilities_are_written_elsewhere(tokens: int, stream: bool) -> None:
    """And say the same."""
    threads: set[int] = set()

    class Noted(CompletionShape):
        def _list_logprobs(self, choice: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
            threads.add(threading.get_ident())
            return super()._list_logprobs(choice, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("petal_swarm.gateway.api.asked.CompletionShape", Noted)
        asked = body(prompt=[5] * tokens, echo=True, logprobs=20, max_tokens=1, stream=stream)
        answer = post(ScriptedSource(("é",)), PATH, asked)
    if stream:
        told = [e["choices"][0]["logprobs"] for e in events_of(answer.text)[:-1]]
        logprobs = [token for each in told if each for token in each["tokens"]]
    else:
        logprobs = answer.json()["choices"][0]["logprobs"]["tokens"]
    assert logprobs == ["\x05"] * tokens + ["é"]
    assert (threads == {threading.get_ident()}) is (tokens == 1)
