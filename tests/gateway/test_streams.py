"""Streams on a virtual clock: what is sent when, heartbeats, visitors who leave, the end of the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from petal_swarm.client.generation.request import GenerationRequest
from petal_swarm.gateway.api.headers import swarm_state
from petal_swarm.gateway.app import make_app
from petal_swarm.gateway.config import GatewayConfig
from petal_swarm.gateway.gateway import Gateway
from petal_swarm.gateway.guard import Guard, GuardConfig, Limits, Visitor
from petal_swarm.gateway.line import Line
from petal_swarm.gateway.metrics import Metrics
from tests.gateway.scripted import ROUTE, ScriptedSource, Visit, app_around, on_virtual_clock, settle

CHAT = "/v1/chat/completions"
ASKED = {"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}]}
STREAM = ASKED | {"stream": True}
WATCHED = STREAM | {"stream_options": {"include_swarm": True}}


def virtual(scenario: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        on_virtual_clock(scenario())

    run.__name__ = scenario.__name__
    return run


def states(visit: Visit) -> list[str]:
    return [e["swarm"]["state"] for e in visit.events if isinstance(e, dict) and "swarm" in e]


@virtual
async def test_the_first_event_comes_with_the_first_token() -> None:
    first, rest = asyncio.Event(), asyncio.Event()
    visit = Visit(app_around(ScriptedSource((first, "Hello", rest, "!"))), CHAT, STREAM)
    await asyncio.sleep(60)
    assert visit.messages == [], "errors may still have a status of their own"
    first.set()
    await settle()
    assert visit.status == 200
    assert [e["choices"][0]["delta"].get("content") for e in visit.events] == ["", "Hello"]
    rest.set()
    await visit.task
    assert visit.is_whole
    assert visit.events[-1] == "[DONE]"


@virtual
async def test_a_stream_in_which_nothing_happens_has_heartbeats() -> None:
    rest = asyncio.Event()
    visit = Visit(app_around(ScriptedSource(("Hello", rest, "!"))), CHAT, STREAM)
    await asyncio.sleep(35)
    assert visit.events[2:] == [": ping"] * 3
    rest.set()
    await visit.task
    assert visit.events.count(": ping") == 3


@virtual
async def test_no_heartbeats_while_tokens_come() -> None:
    steps: list[Any] = []
    for _ in range(8):
        steps += [asyncio.Event(), "word "]
    visit = Visit(app_around(ScriptedSource(steps)), CHAT, STREAM)
    for step in steps[::2]:
        await asyncio.sleep(9)
        step.set()
    await visit.task
    assert ": ping" not in visit.events
    assert visit.is_whole


@virtual
async def test_a_page_sees_place_and_route() -> None:
    line = Line(room=1, max_waiting=4)
    source = ScriptedSource(("Hello", " you"))
    async with line.enter("somebody else"):
        visit = Visit(app_around(source, line=line), CHAT, WATCHED)
        await settle()
        assert visit.status == 200, "the stream begins at once"
        assert "x-swarm-route" not in visit.headers
        assert visit.events[-1]["choices"] == []
        assert visit.events[-1]["swarm"] == {"state": "queued", "place": 1, "of": 1, "expected_s": 10.0}
        await asyncio.sleep(25)
        assert visit.events.count(": ping") == 2
    await visit.task
    assert states(visit) == ["queued", "opening", "answering", "done"]
    done = visit.events[-2]["swarm"]
    assert done["route"][0] == {
        "peer_id": "ooWalice",
        "name": "alice",
        "blocks": [0, 12],
        "step_ms": 1.2,
        "total_ms": 12.0,
    }
    assert (done["new_tokens"], done["tokens_per_s"], done["first_token_s"], done["repairs"]) == (
        2,
        8,
        0.25,
        0,
    )
    assert visit.events[-1] == "[DONE]"


@virtual
async def test_a_page_sees_a_repair() -> None:
    repaired, rest = asyncio.Event(), asyncio.Event()
    source = ScriptedSource(("a", "b", repaired, "c", "d", rest))
    visit = Visit(app_around(source), CHAT, WATCHED)
    await settle()
    assert states(visit) == ["opening", "answering"], "not again while nothing is new"
    carol = replace(ROUTE[1], peer_id="12D3KooWcarol", name="carol")
    source.started[0].route, source.started[0].repairs = (ROUTE[0], carol), 1
    repaired.set()
    await settle()
    told = [e["swarm"] for e in visit.events if "swarm" in e][2:]
    assert [(each["route"][1]["name"], each["repairs"]) for each in told] == [("carol", 1)]
    rest.set()
    await visit.task


@virtual
async def test_errors_in_a_stream_that_was_opened_early_are_events() -> None:
    line = Line(room=1, max_waiting=4, max_wait_s=20)
    async with line.enter("somebody else"):
        visit = Visit(app_around(ScriptedSource(), line=line), CHAT, WATCHED)
        await visit.task
    assert visit.events[-1]["error"]["code"] == "queue_timeout"
    assert (visit.status, visit.is_whole) == (200, True)


@pytest.mark.parametrize("asked", [ASKED, STREAM, WATCHED], ids=["whole", "stream", "watched"])
def test_who_leaves_while_he_is_answered_frees_everything(asked: dict[str, Any]) -> None:
    async def scenario() -> None:
        line = Line(room=1, max_waiting=4)
        source = ScriptedSource(("Hello", asyncio.Event()))
        visit = Visit(app_around(source, line=line), CHAT, asked)
        await settle()
        assert line.stats.running == 1
        visit.leave()
        await settle()
        assert visit.task.done()
        assert visit.task.exception() is None
        assert (source.started[0].closed, line.stats.running) == (1, 0)
        assert not visit.is_whole

    on_virtual_clock(scenario())


@pytest.mark.parametrize("asked", [ASKED, STREAM, WATCHED], ids=["whole", "stream", "watched"])
def test_who_leaves_the_line_gives_up_his_place(asked: dict[str, Any]) -> None:
    async def scenario() -> None:
        line, source = Line(room=1, max_waiting=4), ScriptedSource()
        async with line.enter("somebody else"):
            visit = Visit(app_around(source, line=line), CHAT, asked)
            await settle()
            assert line.stats.waiting == 1
            visit.leave()
            await settle()
            assert (visit.task.done(), line.stats.waiting) == (True, 0)
        assert source.started == []

    on_virtual_clock(scenario())


@virtual
async def test_a_slow_reader_holds_back_the_answer() -> None:
    source = ScriptedSource(["word "] * 50)
    visit = Visit(app_around(source), CHAT, STREAM, may_read=False)
    await asyncio.sleep(20)
    assert source.started[0].new_tokens == 1
    visit.may_read.set()
    await visit.task
    assert visit.is_whole
    assert source.started[0].new_tokens == 50


@virtual
async def test_one_more_than_there_is_room_for() -> None:
    line = Line(room=1, max_waiting=0)
    async with line.enter("somebody else"):
        visit = Visit(app_around(ScriptedSource(), line=line), CHAT, ASKED)
        await visit.task
    assert (visit.status, visit.events[0]["error"]["type"]) == (429, "rate_limit_error")
    assert int(visit.headers["retry-after"]) >= 1


@virtual
async def test_the_end_of_the_gateway_is_told() -> None:
    line = Line(room=3, max_waiting=4)
    source = ScriptedSource(("Hello", asyncio.Event()))
    gateway = Gateway(source, GatewayConfig(model_name="org/tiny"), line=line)
    app = make_app(gateway)
    visits = [Visit(app, CHAT, asked) for asked in (ASKED, STREAM, WATCHED, ASKED)]
    await settle()
    assert gateway.num_running == 3
    gateway.end()
    await asyncio.gather(*(visit.task for visit in visits))
    assert [visit.status for visit in visits] == [503, 200, 200, 503]
    assert {visit.events[-1]["error"]["code"] for visit in visits} == {"shutting_down"}
    assert all(visit.is_whole for visit in visits)
    assert (line.stats.running, line.stats.waiting) == (0, 0)
    assert [answers.closed for answers in source.started] == [1, 1, 1]
    late = Visit(app, CHAT, ASKED)
    await late.task
    assert late.status == 503


@virtual
async def test_a_visitor_pays_for_what_was_generated() -> None:
    source = ScriptedSource(("Hello", " you"))
    limits = Limits(tokens_per_min=200, max_requests=1)
    guard = Guard(GuardConfig(limits=limits, allowed_hosts=None), clock=asyncio.get_running_loop().time)
    gateway = Gateway(
        source, GatewayConfig(model_name="org/tiny"), line=Line(room=8, max_waiting=0), guard=guard
    )
    app = make_app(gateway, guard=guard)
    visit = Visit(app, CHAT, ASKED | {"max_tokens": 100})
    await visit.task
    assert visit.status == 200
    prompt = source.started[0].request.prompt_tokens
    assert guard.left(Visitor("local", limits))[1] == 200 - prompt - 2
    second = Visit(app, CHAT, ASKED | {"max_tokens": 190})
    await second.task
    assert (second.status, second.events[0]["error"]["code"]) == (429, "rate_limit_exceeded")


@virtual
async def test_metrics_count_what_happened() -> None:
    metrics = Metrics()
    source = ScriptedSource(("Hello", " you"))
    gateway = Gateway(
        source, GatewayConfig(model_name="org/tiny"), line=Line(room=1, max_waiting=1), metrics=metrics
    )
    app = make_app(gateway)
    for asked in (ASKED, STREAM, ASKED | {"model": "x"}):
        await Visit(app, CHAT, asked).task
    source.script = ("Hello", asyncio.Event())
    staying, waiting = Visit(app, CHAT, ASKED), Visit(app, CHAT, ASKED)
    await settle()
    told = metrics.exposition().decode()
    assert "petal_gateway_running 1.0" in told
    assert "petal_gateway_queued 1.0" in told
    for visit in (waiting, staying):
        visit.leave()
        await visit.task
    told = metrics.exposition().decode()
    prompt = source.started[0].request.prompt_tokens
    for line in (
        f'petal_gateway_requests_total{{endpoint="{CHAT}",status="200"}} 2.0',
        f'petal_gateway_requests_total{{endpoint="{CHAT}",status="404"}} 1.0',
        'petal_gateway_refusals_total{reason="model_not_found"} 1.0',
        "petal_gateway_abandoned_total 2.0",
        "petal_gateway_running 0.0",
        "petal_gateway_queued 0.0",
        f"petal_gateway_prompt_tokens_total {3 * prompt:.1f}",
        "petal_gateway_new_tokens_total 5.0",
        "petal_gateway_first_token_seconds_count 3.0",
    ):
        assert line in told, line


def test_seconds_to_the_first_token_have_three_digits() -> None:
    request = GenerationRequest(prompts=((1,),), max_new_tokens=1)
    progress = replace(ScriptedSource().start(request).progress, first_token_s=0.14100000000325963)
    assert swarm_state("done", progress)["first_token_s"] == 0.141
