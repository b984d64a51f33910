"""Visitors of a gateway in front of a whole swarm in memory, on its virtual clock: what is lost and freed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from petal_swarm.client.generation.generator import Generator
from petal_swarm.client.watch import SwarmWatch
from petal_swarm.gateway.app import make_app
from petal_swarm.gateway.config import GatewayConfig
from petal_swarm.gateway.gateway import Gateway
from petal_swarm.gateway.line import Line
from tests.checkpoints import assert_lively
from tests.gateway.scripted import Visit, client_of
from tests.swarm.local import LocalSwarm
from tests.swarm.test_generation import assert_all_freed, expected, generator_of, held, prompt

IDS = prompt(16)
ASKED: dict[str, Any] = {"model": "tiny", "prompt": list(IDS), "temperature": 0, "max_tokens": 60}
PATH = "/v1/completions"


@dataclass
class Door:
    swarm: LocalSwarm
    gateway: Gateway
    app: Any

    def visit(self, **fields: Any) -> Visit:
        return Visit(self.app, PATH, ASKED | fields)


def at_the_door(
    swarm: LocalSwarm, scenario: Callable[[Door], Coroutine[Any, Any, None]], *, room: int = 8
) -> None:
    generator = generator_of(swarm)

    async def work() -> None:
        watch = SwarmWatch(generator.swarm, generator.ref, "tiny", now=swarm.loop.time)
        line = Line(room=room, max_waiting=64)
        gateway = Gateway(generator, GatewayConfig(model_name="tiny"), line=line)
        await scenario(Door(swarm, gateway, make_app(gateway, watch=watch)))
        await watch.close()

    swarm.run(work())


def text_of(tokens: list[int]) -> str:
    return "".join(f" w{token}" for token in tokens)


def told(visit: Visit) -> str:
    """The text so far."""
    return "".join(e["choices"][0]["text"] for e in visit.events if isinstance(e, dict) and e.get("choices"))


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_the_models(checkpoint: Path, stream: bool) -> None:
    theirs = expected(checkpoint, IDS, 60)
    assert_lively(torch.tensor([theirs]), 0)

    async def scenario(door: Door) -> None:
        visit = door.visit(stream=stream)
        await visit.task
        assert (visit.status, told(visit)) == (200, text_of(theirs))
        assert visit.headers["x-swarm-route"].count(" -> ") == 3

    with LocalSwarm(checkpoint, ["0:4", "4:8"]) as swarm:
        at_the_door(swarm, scenario)
        assert_all_freed(swarm)


def test_a_server_killed_in_mid_answer_shows_in_the_route_alone(bloom: Path) -> None:
    theirs = text_of(expected(bloom, IDS, 60))

    async def scenario(door: Door) -> None:
        visit = door.visit(stream=True, stream_options={"include_swarm": True})
        while len(told(visit).split()) < 10:  # noqa: ASYNC110 - the clock is virtual
            await asyncio.sleep(0.01)
        before = next(e["swarm"] for e in visit.events if e.get("swarm", {}).get("route"))
        killed = before["route"][1]["peer_id"]
        peers = [server.announcement().peer_id for server in door.swarm.servers]
        door.swarm.network.kill(next(peer for peer in peers if peer.endswith(killed)))
        await visit.task
        assert told(visit) == theirs
        done = visit.events[-2]["swarm"]
        assert (done["state"], done["repairs"]) == ("done", 1)
        assert killed not in [hop["peer_id"] for hop in done["route"]]
        assert b"petal_gateway_repairs_total 1.0" in door.gateway.metrics.exposition()

    with LocalSwarm(bloom, ["0:2", "2:4", "2:4"]) as swarm:
        at_the_door(swarm, scenario)


def test_blocks_that_nobody_serves(bloom: Path) -> None:
    async def scenario(door: Door) -> None:
        visit = door.visit(stream=True)
        await visit.task
        assert (visit.status, visit.events[0]["error"]["code"]) == (503, "missing_blocks")
        assert "blocks 2-3" in visit.events[0]["error"]["message"]
        assert visit.headers["retry-after"] == "15"
        async with client_of(door.app) as client:
            health = await client.get("/health")
            assert (health.status_code, health.json()["reason"]) == (503, "nobody serves blocks 2-3")
            await door.swarm.start_server("2:4")
            await asyncio.sleep(10)
            assert (await client.get("/health")).status_code == 200
        visit = door.visit()
        await visit.task
        assert visit.status == 200

    with LocalSwarm(bloom, ["0:2"]) as swarm:
        at_the_door(swarm, scenario)


def test_an_answer_that_no_server_has_room_for(bloom: Path) -> None:
    async def scenario(door: Door) -> None:
        visit = door.visit(max_tokens=2000)
        await visit.task
        assert (visit.status, visit.events[0]["error"]["code"]) == (503, "swarm_too_small")

    with LocalSwarm(bloom, ["0:4"], kv_tokens=512) as swarm:
        at_the_door(swarm, scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_servers_within_a_second(bloom: Path, stream: bool) -> None:
    async def scenario(door: Door) -> None:
        visits = [door.visit(stream=stream, max_tokens=2000) for _ in range(6)]
        await asyncio.sleep(1)
        assert held(door.swarm)
        for visit in visits:
            visit.leave()
        await asyncio.sleep(1)
        assert held(door.swarm) == []
        assert all(visit.task.done() for visit in visits)
        assert door.gateway.is_idle()

    with LocalSwarm(bloom, ["0:2", "2:4"], kv_tokens=16384) as swarm:
        at_the_door(swarm, scenario, room=4)


def test_a_crowd_is_answered_each_his_own(bloom: Path) -> None:
    prompts = [prompt(3 + number % 5, seed=number) for number in range(12)]
    theirs = [text_of(expected(bloom, ids, 8)) for ids in prompts]

    async def scenario(door: Door) -> None:
        visits = [
            door.visit(prompt=list(ids), max_tokens=8, stream=number % 2 == 0)
            for number, ids in enumerate(prompts)
        ]
        await asyncio.gather(*(visit.task for visit in visits))
        assert [told(visit) for visit in visits] == theirs

    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        at_the_door(swarm, scenario, room=4)
        assert_all_freed(swarm)


def test_a_directory_that_says_nothing_is_not_waited_for_long(
    bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(door: Door) -> None:
        await asyncio.sleep(1)
        generator = door.gateway.source
        assert isinstance(generator, Generator)
        monkeypatch.setattr(generator.swarm.view, "announcements", lambda _: asyncio.Event().wait())
        await asyncio.sleep(10)
        began_s = door.swarm.loop.time()
        async with client_of(door.app) as client:
            asked = ("/health", "/v1/models", "/api/gateway", "/v1/models/other", "/api/swarm")
            answers = await asyncio.gather(*map(client.get, asked))
        assert [answer.status_code for answer in answers] == [503, 200, 200, 504, 200]
        assert answers[0].json()["reason"] == "the swarm cannot be reached"
        assert [model["id"] for model in answers[1].json()["data"]] == ["tiny"]
        assert door.swarm.loop.time() - began_s < 6

    with LocalSwarm(bloom, ["0:4"]) as swarm:
        at_the_door(swarm, scenario)
