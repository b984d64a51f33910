"""`/api/swarm` and its stream, by ASGI alone, on a virtual clock over a swarm in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from petal_swarm.client import changes
from petal_swarm.client.config import ClientConfig
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.client.watch import SwarmWatch
from petal_swarm.directory.memory import MemoryDirectory
from petal_swarm.gateway import swarm_api
from petal_swarm.gateway.swarm_api import swarm_routes
from tests.checkpoints import save_bloom
from tests.swarm.local import LocalSwarm


class Visitor:
    """One request; collects what is answered until it leaves."""

    def __init__(self, app: Starlette, path: str, **headers: str) -> None:
        self._app = app
        self._left = asyncio.Event()
        self._sent_request = False
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": raw}
        scope["asgi"] = {"version": "3.0", "spec_version": "2.4"}
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._sent_request:
            await self._left.wait()
            return {"type": "http.disconnect"}
        self._sent_request = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message: Any) -> None:
        await self.may_read.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message["body"]

    async def leave(self) -> None:
        self._left.set()
        await self.task

    @property
    def events(self) -> list[tuple[str, str, Any]]:
        """Kind, id and document of each event so far."""
        found = []
        for part in self.body.decode().split("\n\n")[:-1]:
            lines = dict(line.split(": ", 1) for line in part.split("\n") if ": " in line)
            if "event" in lines:
                found.append((lines["event"], lines.get("id", ""), json.loads(lines.get("data", "null"))))
        return found


class Site:
    def __init__(self, local: LocalSwarm) -> None:
        self.local = local
        local.run(self._start())

    async def _start(self) -> None:
        shape = self.local.checkpoint.config
        ref = ModelRef(self.local.checkpoint.model_key, shape.num_blocks, shape.hidden_size)
        directory = MemoryDirectory(self.local.registry)
        swarm = Swarm(ClientConfig(initial_peers=("unused",)), self.local.transport(), directory)
        self.watch = SwarmWatch(swarm, ref, "bloom-tiny", now=self.local.loop.time)
        self.app = Starlette(routes=swarm_routes(self.watch, max_readers=2))

    def visit(self, path: str, **headers: str) -> Visitor:
        async def go() -> Visitor:
            visitor = Visitor(self.app, path, **headers)
            await asyncio.sleep(1.0)
            return visitor

        return self.local.run(go())

    def wait(self, seconds: float) -> None:
        self.local.run(asyncio.sleep(seconds))

    def kill(self, number: int) -> None:
        self.local.network.kill(self.local.servers[number].announcement().peer_id)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bloom(tmp_path_factory.mktemp("bloom"), blocks=4, hidden=32)


@pytest.fixture
def site(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # Round trips are measured in real time, and a busy machine's are not those of a moment ago.
    monkeypatch.setattr(changes, "SAME_RTT_S", 100.0)
    with LocalSwarm(bloom, ["0:2", "2:4"], name="<b>alice</b>") as local:
        site = Site(local)
        yield site
        local.run(site.watch.close())


def test_the_document_says_who_serves_what_and_not_where(site: Site) -> None:
    visitor = site.visit("/api/swarm")
    assert visitor.status == 200
    assert visitor.headers["cache-control"] == "no-store"
    document = json.loads(visitor.body)
    assert (document["model"], document["num_blocks"], document["missing_blocks"]) == ("bloom-tiny", 4, [])
    assert document["is_reachable"] is True
    assert [peer["span"] for peer in document["peers"]] == [[0, 2], [2, 4]]
    peer_ids = [server.announcement().peer_id for server in site.local.servers]
    for peer, peer_id in zip(document["peers"], peer_ids, strict=True):
        assert peer["name"] == "<b>alice</b>"
        assert peer["id"] == peer_id[-8:]
        assert peer["rtt_s"] >= 0
        assert peer_id.encode() not in visitor.body
    for address in site.local.servers[0].announcement().addresses:
        assert address.encode() not in visitor.body


def test_the_document_is_of_now(site: Site) -> None:
    site.visit("/api/swarm")
    site.kill(1)
    site.wait(10)
    document = json.loads(site.visit("/api/swarm").body)
    assert document["missing_blocks"] == [2, 3]
    assert [event["kind"] for event in document["events"]] == ["failed", "gap_opened"]


def test_the_stream_begins_with_the_whole_and_goes_on_with_changes(site: Site) -> None:
    visitor = site.visit("/api/swarm/events")
    assert visitor.headers["content-type"].startswith("text/event-stream")
    [(kind, first_id, whole)] = visitor.events
    assert kind == "swarm"
    assert whole == json.loads(site.visit("/api/swarm").body)
    site.kill(0)
    site.wait(6)
    kind, last_id, change = visitor.events[-1]
    assert kind == "change"
    assert last_id != first_id
    assert change["missing_blocks"] == [0, 1]
    assert [peer["state"] for peer in change["peers"]] == ["no answer"]
    assert [event["words"] for event in change["events"]] == [
        "does not answer; it served blocks 0-1",
        "nobody serves blocks 0-1",
    ]
    site.local.run(visitor.leave())
    assert site.watch.watchers == 0


def test_who_comes_back_gets_what_it_missed(site: Site) -> None:
    visitor = site.visit("/api/swarm/events")
    first_id = visitor.events[-1][1]
    site.local.run(visitor.leave())
    site.kill(0)
    site.wait(40)
    again = site.visit("/api/swarm/events", last_event_id=first_id)
    assert {kind for kind, _, _ in again.events} == {"change"}
    assert again.events[0][2]["missing_blocks"] == [0, 1]
    site.local.run(again.leave())


@pytest.mark.parametrize(
    "event_id", ["", "x", "-1", "00000000-1", "{watch}-", "{watch}-999", "{watch}-²", "{watch}-" + "9" * 5000]
)
def test_any_other_id_gets_the_whole(site: Site, event_id: str) -> None:
    visitor = site.visit("/api/swarm/events", last_event_id=event_id.replace("{watch}", site.watch.id))
    assert [kind for kind, _, _ in visitor.events] == ["swarm"]
    site.local.run(visitor.leave())


def test_a_quiet_stream_beats(site: Site) -> None:
    visitor = site.visit("/api/swarm/events")
    site.wait(35)
    beats = [kind for kind, _, _ in visitor.events if kind == "beat"]
    assert len(beats) == 3
    site.local.run(visitor.leave())


def test_too_many_readers_are_told_when_to_come_again(site: Site) -> None:
    readers = [site.visit("/api/swarm/events") for _ in range(2)]
    refused = site.visit("/api/swarm/events")
    assert refused.status == 503
    assert refused.headers["retry-after"] == "15"
    assert json.loads(refused.body)["error"]["type"] == "overloaded_error"
    site.local.run(readers[0].leave())
    welcome = site.visit("/api/swarm/events")
    assert welcome.status == 200
    for reader in (readers[1], welcome):
        site.local.run(reader.leave())


def test_a_reader_that_takes_nothing_is_let_go(site: Site) -> None:
    visitor = site.visit("/api/swarm/events")
    assert site.watch.watchers == 1
    visitor.may_read.clear()
    site.wait(swarm_api.BEAT_S + swarm_api.SEND_TIMEOUT_S + 5)
    assert visitor.task.done()
    assert site.watch.watchers == 0


def test_a_change_is_encoded_once_for_all(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    to_json: Callable[..., Any] = swarm_api.change_to_json

    def counted(change: Any) -> Any:
        encoded.append(change.version)
        return to_json(change)

    monkeypatch.setattr(swarm_api, "change_to_json", counted)
    readers = [site.visit("/api/swarm/events") for _ in range(2)]
    site.kill(0)
    site.wait(8)
    assert readers[0].events[-1] == readers[1].events[-1]
    assert encoded == sorted(set(encoded))
    assert encoded
    for reader in readers:
        site.local.run(reader.leave())


def test_a_swarm_that_is_gone_is_said_to_be_without_its_addresses(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from petal_swarm.errors import PeerUnreachableError

    async def unreachable(model: str) -> Any:
        raise PeerUnreachableError("nobody answers at /ip4/203.0.113.9")

    monkeypatch.setattr(site.watch._view, "announcements", unreachable)
    site.wait(31)
    visitor = site.visit("/api/swarm")
    document = json.loads(visitor.body)
    assert document["is_reachable"] is False
    assert document["missing_blocks"] == [0, 1, 2, 3]
    assert b"203.0.113.9" not in visitor.body
