"""The swarm for everybody's eyes: `/api/swarm` as one document, `/api/swarm/events` as a stream.

The stream begins with the whole (`event: swarm`), then tells what changes (`event: change`). `id:` is where
a reader is; one who comes back with it in `Last-Event-ID` gets what it has missed, or the whole again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from petal_swarm.client.status import Status, public_peer, short_id
from petal_swarm.client.watch import Change, Happening, SwarmWatch

#: What was seen so long ago is good enough for one document.
FRESH_S = 5.0
#: The page takes a stream for lost in which nothing has come for two of these.
BEAT_S = 10.0
#: A reader that takes nothing for so long is let go.
SEND_TIMEOUT_S = 30.0
MAX_READERS = 512
RETRY_AFTER_S = 15
#: Events that come with the whole.
RECENT = 50
#: Nearly all readers are at the newest version or the one before it.
KEPT_CHANGES = 32


def swarm_routes(watch: SwarmWatch, *, max_readers: int = MAX_READERS) -> list[BaseRoute]:
    """`/api/swarm` and `/api/swarm/events`; at most so many read the stream at once."""
    swarm = _SwarmApi(watch, max_readers)
    return [Route("/api/swarm", swarm.document), Route("/api/swarm/events", swarm.events)]


def swarm_to_json(watch: SwarmWatch) -> dict[str, Any] | None:
    """What is known now; None before the first look."""
    status = watch.status
    if status is None:
        return None
    return {
        "watch": watch.id,
        "model": status.name,
        "num_blocks": status.num_blocks,
        **_state(status, watch.trouble),
        "peers": [public_peer(status, peer) for peer in status.announcements],
        "events": [_happening_to_json(each) for each in list(watch.happenings)[-RECENT:]],
    }


def change_to_json(change: Change) -> dict[str, Any]:
    """What a reader of the version before it must know."""
    status = change.status
    return {
        **_state(status, change.trouble),
        "peers": [
            public_peer(status, peer) for peer in status.announcements if peer.peer_id in change.different
        ],
        "gone": sorted(map(short_id, change.gone)),
        "events": [_happening_to_json(each) for each in change.happenings],
    }


class _SwarmApi:
    def __init__(self, watch: SwarmWatch, max_readers: int) -> None:
        self._watch = watch
        self._max_readers = max_readers
        self._readers = 0
        #: Each change is encoded once, and the whole once for each version, for all readers.
        self._changes: dict[int, bytes] = {}
        self._whole = (0, b"")

    async def document(self, request: Request) -> Response:
        with contextlib.suppress(TimeoutError):  # then what was seen before
            async with asyncio.timeout(FRESH_S):
                await self._watch.fresh(FRESH_S)
        headers = {"Cache-Control": "no-store"}
        if not (whole := self._encode_whole()):
            return _refuse("nothing is known of the swarm at the moment", headers)
        return Response(whole, media_type="application/json", headers=headers)

    async def events(self, request: Request) -> Response:
        if self._readers >= self._max_readers:
            return _refuse(
                f"{self._readers} others watch already; try again later",
                {"Retry-After": str(RETRY_AFTER_S), "Cache-Control": "no-store"},
            )
        return _EventStream(self, self._version_of(request.headers.get("last-event-id", "")))

    async def read(self, version: int | None) -> AsyncIterator[bytes]:
        """The stream, from the whole on, or from a version that its reader knows."""
        yield b"retry: 2000\n\n"
        while True:
            changes = None if version is None else self._watch.since(version)
            if changes is None:
                version = self._watch.version or None
                if version:
                    yield self._event("swarm", version, self._encode_whole())
            for change in changes or ():
                version = change.version
                yield self._event("change", version, self._encode(change))
            if not await self._watch.later_than(version or 0, timeout_s=BEAT_S):
                yield b"event: beat\ndata:\n\n"

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While somebody does."""
        self._readers += 1
        try:
            with self._watch.watching():
                yield
        finally:
            self._readers -= 1

    def _encode_whole(self) -> bytes:
        """Empty before the first look."""
        if self._whole[0] != self._watch.version and (document := swarm_to_json(self._watch)) is not None:
            self._whole = (self._watch.version, _encode(document))
        return self._whole[1]

    def _encode(self, change: Change) -> bytes:
        encoded = self._changes.get(change.version)
        if encoded is None:
            encoded = self._changes[change.version] = _encode(change_to_json(change))
            if len(self._changes) > KEPT_CHANGES:
                del self._changes[next(iter(self._changes))]
        return encoded

    def _event(self, kind: str, version: int, data: bytes) -> bytes:
        return b"id: %s-%d\nevent: %s\ndata: %s\n\n" % (self._watch.id.encode(), version, kind.encode(), data)

    def _version_of(self, event_id: str) -> int | None:
        watch, _, version = event_id.partition("-")
        is_ours = watch == self._watch.id and version.isascii() and version.isdecimal() and len(version) < 16
        return int(version) if is_ours else None


class _EventStream(StreamingResponse):
    """Counts its reader while it is there, and lets go of one that does not read."""

    def __init__(self, swarm: _SwarmApi, version: int | None) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(swarm.read(version), headers=headers, media_type="text/event-stream")
        self._swarm = swarm

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Any) -> None:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send(message)

        # Where a server says that `send` fails for those who have left, nobody would listen for it, and the
        # next thing to send may be far.
        scope = {**scope, "asgi": {"spec_version": "2.3"}}
        with self._swarm.reading(), contextlib.suppress(TimeoutError):
            await super().__call__(scope, receive, send_in_time)


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _state(status: Status, trouble: str | None) -> dict[str, Any]:
    return {
        "is_reachable": trouble is None,
        "missing_blocks": list(status.missing),
        "adapters": [{"name": name, "missing_blocks": list(missing)} for name, _, missing in status.adapters],
    }


def _happening_to_json(happening: Happening) -> dict[str, Any]:
    event = happening.event
    return {
        "number": happening.number,
        "at": round(happening.at_s, 3),
        "kind": event.kind,
        "id": short_id(event.peer_id),
        "name": event.name,
        "words": event.words,
        "blocks": [event.blocks[0], event.blocks[-1] + 1] if event.blocks else None,
    }


def _refuse(message: str, headers: dict[str, str]) -> Response:
    error = {"message": message, "type": "overloaded_error", "param": None, "code": None}
    return JSONResponse({"error": error}, 503, headers)
