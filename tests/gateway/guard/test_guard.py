"""The whole of the middleware, without a server: who is let through, and what others are told."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from petal_swarm.gateway.guard import Guard, GuardConfig, Limits, hosts_of
from petal_swarm.gateway.refusals import App, Message, RefusedError
from petal_swarm.net.memory import VirtualClockLoop
from tests.gateway.guard.asking import Answer, Echo, ask

KEY = "sk-alice-0123456789abcdef"
V1 = "/v1/completions"


def run(work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(work)


class Door:
    """A guarded `Echo` and what was refused before it, on a clock that stands still."""

    def __init__(self, app: App | None = None, **config: Any) -> None:
        self.refused: list[str] = []
        self.now = 0.0
        self.echo = Echo()
        self.guard = Guard(GuardConfig(**config), clock=lambda: self.now, on_refusal=self._note)
        self.app = self.guard.wrap(app or self.echo)

    def _note(self, error: RefusedError) -> None:
        self.refused.append(error.reason)

    def ask(self, *arguments: Any, **options: Any) -> Answer:
        answer: Answer = run(ask(self.app, *arguments, **options))
        return answer


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"{KEY} alice 2\n")
    path.chmod(0o600)
    return path


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_request_comes_through_with_its_visitor_and_whole() -> None:
    door = Door()
    answer = door.ask("POST", V1, parts=(b"ab", b"", b"cde"))
    assert (answer.status, answer.body) == (200, b"203.0.113.7 5")
    assert door.echo.bodies == [b"abcde"]
    assert not door.refused


def test_every_response_has_security_headers() -> None:
    door = Door(allowed_hosts=("here",))
    for answer in (door.ask(headers={"host": "here"}), door.ask(headers={"host": "there"})):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "cache-control" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers


def test_answers_are_not_cached_and_headers_of_the_app_win() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        headers = [(b"cache-control", b"max-age=1"), (b"X-Frame-Options", b"SAMEORIGIN")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    assert Door().ask("POST", V1).headers["cache-control"] == "no-store"
    answer = Door(app).ask("GET", "/api/swarm")
    assert answer.headers["cache-control"] == "max-age=1"
    assert answer.headers["X-Frame-Options"] == "SAMEORIGIN"
    assert "x-frame-options" not in answer.headers


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "LOCALHOST.:80", "[::1]:8080", "127.0.0.1"])
def test_names_of_loopback_are_answered(host: str) -> None:
    assert Door(allowed_hosts=hosts_of("127.0.0.1")).ask(headers={"host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example:8080", "", "127.0.0.1.evil.example", "localhost@evil", "[::1", None]
)
def test_a_name_that_somebody_points_at_loopback_is_not(host: str | None) -> None:
    door = Door(allowed_hosts=("localhost", "127.0.0.1"))
    answer = door.ask("POST", V1, headers={} if host is None else {"host": host})
    assert (answer.status, answer.code) == (403, "host_not_allowed")
    assert door.refused == ["host"]
    assert not door.echo.bodies


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"origin": "http://here:8080"}, 200),
        ({"origin": "https://here:8080"}, 200),  # a proxy speaks TLS for us
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"origin": "https://chat.example", "sec-fetch-site": "same-origin"}, 200),  # the proxy changed Host
        ({"origin": "http://here:8080", "sec-fetch-site": "cross-site"}, 403),
        ({"origin": "http://here:9090", "sec-fetch-site": "same-site"}, 403),
    ],
)
def test_pages_of_other_sites_may_not_ask(headers: dict[str, str], status: int) -> None:
    door = Door()
    assert door.ask("POST", V1, headers={"host": "here:8080", **headers}).status == status
    assert bool(door.echo.bodies) == (status == 200)


def test_cors_for_the_sites_that_were_named() -> None:
    door = Door(cors_origins=("https://app.example",))
    origin = {"origin": "https://app.example", "host": "here"}
    answer = door.ask("POST", V1, headers=origin)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-swarm-route" in answer.headers["access-control-expose-headers"]
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-stainless",
    }
    answer = door.ask("OPTIONS", V1, headers={**origin, **preflight})
    assert answer.status == 200
    assert "authorization" in answer.headers["access-control-allow-headers"]
    evil = door.ask("POST", V1, headers={"origin": "https://evil.example", "host": "here"})
    assert evil.status == 403
    assert "access-control-allow-origin" not in evil.headers


def test_cors_for_all_sites() -> None:
    answer = Door(cors_origins=("*",)).ask(
        "POST", V1, headers={"origin": "https://x.example", "host": "here"}
    )
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "*"


def test_without_a_file_of_keys_any_key_will_do() -> None:
    door = Door()
    assert not door.guard.needs_key
    assert door.ask("POST", V1, headers=bearer("anything")).body == b"203.0.113.7 0"


def test_with_a_file_of_keys_one_of_them_is_needed_for_the_api(keys: Path) -> None:
    door = Door(keys_file=keys)
    assert door.guard.needs_key
    for headers in ({}, bearer("wrong-key-0123456789"), bearer(""), {"authorization": f"Basic {KEY}"}):
        answer = door.ask("POST", V1, headers=headers)
        assert (answer.status, answer.code) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert door.ask("GET", "/v1/models").status == 401
    assert not door.echo.bodies
    for path in ("/", "/health", "/api/gateway", "/static/chat.js"):
        assert door.ask("GET", path).status == 200
    assert door.ask("POST", V1, headers=bearer(KEY)).body == b"key:alice 0"
    assert door.refused == ["key"] * 5


def test_strangers_may_be_allowed_beside_keys_but_wrong_keys_are_not(keys: Path) -> None:
    door = Door(keys_file=keys, allow_anonymous=True)
    assert not door.guard.needs_key
    assert door.ask("POST", V1).body == b"203.0.113.7 0"
    assert door.ask("POST", V1, headers=bearer(KEY)).body == b"key:alice 0"
    assert door.ask("POST", V1, headers=bearer("wrong-key-0123456789")).status == 401


def test_limits_of_a_key_hold_wherever_it_comes_from(keys: Path) -> None:
    door = Door(keys_file=keys, limits=Limits(requests_per_min=100))
    assert [door.ask("POST", V1, headers=bearer(KEY), client=f"10.0.0.{n}").status for n in range(3)] == [
        200,
        200,
        429,
    ]
    door.now += 60
    assert door.ask("POST", V1, headers=bearer(KEY)).status == 200


def test_who_guesses_keys_is_told_to_wait(keys: Path) -> None:
    door = Door(keys_file=keys)
    statuses = [door.ask("POST", V1, headers=bearer(f"wrong-key-{n:010}")).status for n in range(40)]
    assert statuses == [401] * 30 + [429] * 10
    assert door.ask("POST", V1, headers=bearer(KEY)).status == 200


def test_keys_are_read_again(keys: Path) -> None:
    door = Door(keys_file=keys)
    keys.write_text("sk-bob-0123456789abcdef bob\n")
    assert door.guard.reload_keys() == 1
    assert door.ask("POST", V1, headers=bearer(KEY)).status == 401
    assert door.ask("POST", V1, headers=bearer("sk-bob-0123456789abcdef")).status == 200
    assert Door().guard.reload_keys() is None


def test_requests_of_an_address_are_limited_before_their_body_is_read() -> None:
    door = Door(limits=Limits(requests_per_min=2))

    def post(client: str) -> Answer:
        return door.ask("POST", V1, client=client)

    assert [post("203.0.113.7").status for _ in range(3)] == [200, 200, 429]
    assert post("203.0.113.8").status == 200
    answer = post("203.0.113.7")
    assert answer.code == "rate_limit_exceeded"
    assert answer.headers["retry-after"] == "30"
    assert len(door.echo.bodies) == 3
    assert door.ask("GET", "/v1/models").status == 200


def test_addresses_of_one_household_share_a_limit_and_proxies_do_not() -> None:
    door = Door(limits=Limits(requests_per_min=1), trusted_proxies=("10.0.0.1",))
    assert door.ask("POST", V1, client="2001:db8::1").status == 200
    assert door.ask("POST", V1, client="2001:db8::2").status == 429
    for number in range(5):
        headers = {"x-forwarded-for": f"198.51.100.{number}"}
        assert door.ask("POST", V1, client="10.0.0.1", headers=headers).status == 200
        assert door.ask("POST", V1, client="203.0.113.7", headers=headers).status == (429 if number else 200)


def test_pages_have_a_rate_of_their_own() -> None:
    door = Door(page_requests_per_min=3, limits=Limits(requests_per_min=1))
    assert [door.ask("GET", "/").status for _ in range(4)] == [200, 200, 200, 429]
    assert door.ask("POST", V1).status == 200


def test_heads_are_bounded() -> None:
    door = Door()
    assert door.ask(headers={"x": "y" * 33_000}).status == 431
    assert door.ask(headers={f"x{n}": "y" for n in range(101)}).status == 431
    answer = door.ask("GET", "/" + "a" * 33_000)
    assert (answer.status, answer.code) == (431, "headers_too_large")
    assert not door.echo.bodies


def test_a_large_body_is_refused_unread() -> None:
    door = Door(max_body_bytes=1024)
    answer = door.ask("POST", V1, headers={"content-length": "1025"}, parts=())
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert b"at most 1 KiB is" in answer.body
    assert door.ask("POST", V1, headers={"content-length": "9" * 5000}, parts=()).status == 413
    assert door.ask("POST", V1, headers={"content-length": "1024"}, parts=(b"x" * 1024,)).status == 200
    assert door.refused == ["body", "body"]


def test_a_large_body_without_a_length_is_refused_where_it_becomes_too_large() -> None:
    door = Door(max_body_bytes=100)
    assert door.ask("POST", V1, parts=(b"x" * 60, b"x" * 41, b"never read")).status == 413
    assert not door.echo.bodies


def test_a_slow_body_is_refused() -> None:
    door = Door(body_timeout_s=10.0)
    drip = [part for _ in range(20) for part in (b"x", 1.0)]
    answer = door.ask("POST", V1, parts=(*drip, b"end"))
    assert (answer.status, answer.code) == (408, "request_timeout")
    assert door.refused == ["slow"]


def test_a_visitor_who_leaves_in_the_body_is_answered_nothing() -> None:
    door = Door()
    assert door.ask("POST", V1, parts=(b"x", None, b"y")).status == 0
    assert not door.echo.bodies
    assert not door.refused


def test_bodies_of_all_are_bounded_until_they_are_answered() -> None:
    async def check() -> None:
        release = asyncio.Event()

        async def slow(_scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        door = Door(slow, max_bodies_bytes=100)
        held = [asyncio.create_task(ask(door.app, "POST", V1, parts=(b"x" * 45,))) for _ in range(2)]
        await asyncio.sleep(1)
        answer = await ask(door.app, "POST", V1, parts=(b"x" * 5, b"x" * 6))
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        abandoned = asyncio.create_task(ask(door.app, "POST", V1, parts=(b"x" * 10,)))
        await asyncio.sleep(1)
        abandoned.cancel()
        await asyncio.wait([abandoned])
        broken = ask(door.app, "POST", V1, parts=(b"x" * 10, None, b"x"))
        assert (await broken).status == 0
        release.set()
        assert [(await each).status for each in held] == [200, 200]
        assert (await ask(door.app, "POST", V1, parts=(b"x" * 100,))).status == 200

    run(check())


def test_after_the_body_the_app_hears_when_the_visitor_leaves() -> None:
    heard: list[Message] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        heard.extend([await receive(), await receive()])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    Door(app).ask("POST", V1, parts=(b"x", None))
    assert [each["type"] for each in heard] == ["http.request", "http.disconnect"]


def test_web_sockets_are_refused_and_lifespan_passes() -> None:
    passed: list[str] = []
    sent: list[Message] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        passed.append(scope["type"])

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    door = Door(app)
    run(door.app({"type": "lifespan"}, receive, send))  # type: ignore[arg-type]
    run(door.app({"type": "websocket", "path": "/", "headers": []}, receive, send))  # type: ignore[arg-type]
    assert passed == ["lifespan"]
    assert sent == [{"type": "websocket.close", "code": 1008}]
