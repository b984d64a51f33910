"""What is done to a gateway that anybody can reach: the whole application, guarded, over a scripted model."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from petal_swarm.errors import CacheFullError, MissingBlocksError
from petal_swarm.gateway.app import make_app
from petal_swarm.gateway.config import GatewayConfig
from petal_swarm.gateway.gateway import Gateway
from petal_swarm.gateway.guard import Guard, GuardConfig, Limits
from petal_swarm.gateway.line import Line
from petal_swarm.net.memory import VirtualClockLoop
from tests.gateway.guard.asking import Answer, ask
from tests.gateway.scripted import ScriptedSource, Step

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
#: Nothing else has this in it: where it turns up, a prompt was shown.
SECRET = "xyzzy-prompt-of-somebody"


class House:
    """A guarded gateway in a running loop, whose answers wait for `release` after a first word."""

    def __init__(self, *, room: int = 2, max_waiting: int = 2, waits: bool = False, **guard: Any) -> None:
        loop = asyncio.get_running_loop()
        self.release = asyncio.Event()
        script: tuple[Step, ...] = ("Hello", self.release, ".") if waits else ("Hello", ".")
        self.source = ScriptedSource(script)
        self.line = Line(room=room, max_waiting=max_waiting)
        self.guard = Guard(GuardConfig(**guard), clock=loop.time)
        config = GatewayConfig(model_name="tiny", max_tokens=100)
        gateway = Gateway(self.source, config, line=self.line, guard=self.guard)
        self.app = make_app(gateway, guard=self.guard)

    async def complete(self, *, client: str = "203.0.113.7", body: Any = None, **fields: Any) -> Answer:
        data = json.dumps({"model": "tiny", "prompt": "Hi", **fields}).encode() if body is None else body
        return await self.post(COMPLETIONS, data, client=client)

    async def post(self, path: str, data: bytes, **options: Any) -> Answer:
        return await ask(self.app, "POST", path, parts=(data,), **options)  # type: ignore[arg-type]

    def start(self, **options: Any) -> asyncio.Task[Answer]:
        return asyncio.get_running_loop().create_task(self.complete(**options))


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(work())


def nested(depth: int) -> bytes:
    return b'{"model": "tiny", "prompt": ' + b"[" * depth + b"]" * depth + b"}"


JUNK = [
    b"",
    b"{",
    b"\xff\xfe\x00",
    b"[]",
    b"null",
    b'"' + SECRET.encode() + b'"',
    b'{"prompt": "' + SECRET.encode() + b'\xff", "model": "tiny"}',
    b'{"model": "tiny", "prompt": "' + SECRET.encode(),
    b'{"model": "tiny", "prompt": {"' + SECRET.encode() + b'": 1}}',
    b'{"model": "' + SECRET.encode() + b'" , "prompt": 5}',
    b'{"model": "tiny", "prompt": "\\ud800' + SECRET.encode() + b'"}',
    b'{"model": "tiny", "prompt": "' + SECRET.encode() + b'", "temperature": NaN}',
    b'{"model": "tiny", "prompt": "' + SECRET.encode() + b'", "n": 1e400}',
    b'{"model": "tiny", "prompt": "' + SECRET.encode() + b'", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"model": "tiny", "prompt": "' + SECRET.encode() + b'", "stop": ["' + SECRET.encode() * 99 + b'"]}',
    b'{"model": "tiny", "prompt": [1, 99999999]}',
    b'{"model": "tiny", "prompt": "' + b"a " * 2000 + b'"}',
    nested(100_000),
    b'{"a":' * 50_000,
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_junk_is_a_bad_request_and_no_prompt_is_logged(path: str, caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        house = House()
        for junk in JUNK:
            with caplog.at_level(logging.DEBUG):
                answer = await house.post(path, junk)
            assert answer.status == 400, junk[:80]
            assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}
            assert len(answer.body) < 2000
        assert (await house.complete()).status == 200
        assert house.line.stats.running == 0

    run(check)
    assert SECRET not in caplog.text


def _errors() -> list[Exception]:
    return [
        ValueError("a bug"),
        MissingBlocksError("nobody serves 0:4", [0]),
        CacheFullError("full", retry_after_s=7.0),
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", _errors(), ids=lambda error: type(error).__name__)
def test_no_prompt_is_logged_when_an_answer_fails(
    error: Exception, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        house = House()
        house.source.script = ("Hello", error)
        with caplog.at_level(logging.DEBUG):
            answer = await house.complete(prompt=SECRET, stream=stream, user=SECRET)
        assert SECRET.encode() not in answer.body
        assert b'"error"' in answer.body
        assert house.line.stats.running == 0
        assert house.source.started[0].closed

    run(check)
    assert SECRET not in caplog.text


def test_a_prompt_of_ten_megabytes_is_refused_unread() -> None:
    async def check() -> None:
        house = House()
        answer = await house.complete(prompt="a" * 10_000_000)
        assert (answer.status, answer.code) == (413, "request_too_large")
        answer = await house.complete(prompt="a" * 1_000_000)
        assert (answer.status, answer.code) == (400, "context_length_exceeded")
        assert not house.source.started

    run(check)


def test_a_crowd_is_answered_or_told_when_to_come_again() -> None:
    async def check() -> None:
        house = House(room=3, max_waiting=10, waits=True)
        visitors = [house.start(client=f"203.0.113.{n}") for n in range(50)]
        await asyncio.sleep(1)
        assert house.line.stats.running == 3
        assert house.line.stats.waiting == 10
        house.release.set()
        answers = [await each for each in visitors]
        assert sorted(each.status for each in answers) == [200] * 13 + [429] * 37
        for answer in answers:
            if answer.status == 429:
                assert answer.code == "queue_full"
                assert 1 <= int(answer.headers["retry-after"]) <= 60

    run(check)


def test_one_visitor_cannot_keep_others_out() -> None:
    async def check() -> None:
        house = House(room=2, max_waiting=8, waits=True)
        greedy = [house.start(client="203.0.113.1") for _ in range(30)]
        await asyncio.sleep(1)
        others = [house.start(client=f"203.0.113.{n}") for n in range(2, 6)]
        await asyncio.sleep(1)
        house.release.set()
        assert [(await each).status for each in others] == [200] * 4
        statuses = [(await each).status for each in greedy]
        assert statuses.count(200) >= 2
        assert set(statuses) == {200, 429}

    run(check)


def test_requests_at_once_of_one_visitor_are_bounded_and_given_back() -> None:
    async def check() -> None:
        house = House(room=8, waits=True, limits=Limits(max_requests=3))
        first = [house.start() for _ in range(3)]
        await asyncio.sleep(1)
        answer = await house.complete()
        assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
        other = house.start(client="203.0.113.8")
        await asyncio.sleep(1)
        assert house.line.stats.running == 4
        for each in first:
            each.cancel()
        await asyncio.wait(first)
        house.release.set()
        assert (await house.complete()).status == 200
        assert (await other).status == 200

    run(check)


def test_tokens_are_charged_by_what_was_generated() -> None:
    async def check() -> None:
        house = House(limits=Limits(tokens_per_min=120))
        for _ in range(4):  # each might need 102, and takes 2 of prompt and 2 of answer
            assert (await house.complete(max_tokens=100)).status == 200
        answer = await house.complete(prompt="a" * 100, max_tokens=20)
        assert answer.status == 429
        assert int(answer.headers["retry-after"]) >= 7
        await asyncio.sleep(10)
        assert (await house.complete(prompt="a" * 100, max_tokens=20)).status == 200

    run(check)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_room_account_and_session(stream: bool) -> None:
    async def check() -> None:
        house = House(room=1, waits=True, limits=Limits(max_requests=2, tokens_per_min=1000))
        data = json.dumps({"model": "tiny", "prompt": "Hi", "stream": stream}).encode()
        loop = asyncio.get_running_loop()
        answered = loop.create_task(ask(house.app, "POST", COMPLETIONS, parts=(data, 5.0, None)))
        waiting = loop.create_task(ask(house.app, "POST", COMPLETIONS, parts=(data, 3.0, None)))
        await asyncio.sleep(1)
        assert (house.line.stats.running, house.line.stats.waiting) == (1, 1)
        await asyncio.sleep(3)
        assert waiting.done()
        assert (house.line.stats.running, house.line.stats.waiting) == (1, 0)
        await asyncio.sleep(2)
        assert answered.done()
        assert house.line.stats.running == 0
        assert [each.closed for each in house.source.started] == [1]
        house.release.set()
        assert (await house.complete()).status == 200

    run(check)


def test_slow_bodies_do_no_harm() -> None:
    async def check() -> None:
        house = House(body_timeout_s=20.0)
        drip: list[bytes | float] = [part for _ in range(100) for part in (b" ", 1.0)]
        loop = asyncio.get_running_loop()
        slow = [loop.create_task(ask(house.app, "POST", COMPLETIONS, parts=drip)) for _ in range(50)]
        await asyncio.sleep(1)
        assert (await house.complete()).status == 200
        assert {(await each).status for each in slow} == {408}

    run(check)


def test_keys_are_never_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, guess = "sk-alice-0123456789abcdef", "sk-guess-0123456789abcdef"
    path = tmp_path / "keys"
    path.write_text(f"{key} alice\n")

    async def check() -> None:
        house = House(keys_file=path)
        for each, status in ((key, 200), (guess, 401)):
            answer = await house.post(
                COMPLETIONS,
                b'{"model": "tiny", "prompt": "Hi"}',
                headers={"authorization": f"Bearer {each}"},
            )
            assert answer.status == status
            assert each.encode() not in answer.body

    with caplog.at_level(logging.DEBUG):
        run(check)
    assert key not in caplog.text
    assert guess not in caplog.text
