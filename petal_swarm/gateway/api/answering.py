"""One request of a visitor, from its checked form to the last byte of its answer."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from petal_swarm.client.generation.pieces import Piece, Progress
from petal_swarm.gateway.api.asked import Asked
from petal_swarm.gateway.api.connection import Connection
from petal_swarm.gateway.api.headers import swarm_headers, swarm_state
from petal_swarm.gateway.api.sse import DONE, EventStream
from petal_swarm.gateway.gateway import Gateway
from petal_swarm.gateway.guard import Visitor
from petal_swarm.gateway.line import Place

#: A page is told of the route when it changes, and else this often.
SWARM_INTERVAL_S = 0.5
#: More probabilities than this, at about 2 us each, are written in a thread.
WRITE_NOW = 1000


async def answer(gateway: Gateway, asked: Asked, visitor: Visitor, connection: Connection) -> None:
    """Answer, in the form that was asked for. Cancelling frees everything.

    Raises:
        PetalSwarmError: the swarm failed, or has no room; the response may have begun.
        ClientDisconnect: the visitor is gone.
    """
    if asked.stream:
        await _Stream(gateway, asked, visitor, connection).run()
    else:
        await _whole(gateway, asked, visitor, connection)


async def _whole(gateway: Gateway, asked: Asked, visitor: Visitor, connection: Connection) -> None:
    pieces: list[list[Piece]] = [[] for _ in range(asked.num_choices)]
    async with gateway.answers(asked, visitor) as (answers, queued_s):
        async for piece in answers:
            pieces[piece.choice].append(piece)
        progress = answers.progress
    body = _frame(gateway, asked, asked.shape.kind)

    def written(encode: Callable[[Any], bytes]) -> bytes:
        body["choices"] = [asked.shape.whole(choice, those) for choice, those in enumerate(pieces)]
        body["usage"] = _usage(progress)
        return encode(body)

    probabilities = sum(_probabilities(piece) for those in pieces for piece in those)
    data = await _write(probabilities, written)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
    await connection.start(200, headers | swarm_headers(progress, queued_s))
    await connection.write(data, more=False)


class _Stream:
    """An answer as events. The status line goes with the first token, unless the visitor wants to watch."""

    def __init__(self, gateway: Gateway, asked: Asked, visitor: Visitor, connection: Connection) -> None:
        self._gateway = gateway
        self._asked = asked
        self._visitor = visitor
        self._events = EventStream(connection, gateway.config.heartbeat_s)
        frame = _frame(gateway, asked, asked.shape.chunk_kind)
        self._head = b"data: " + _json(frame)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if asked.include_usage else b"]}\n\n"
        self._begun: set[int] = set()
        self._route: tuple[tuple[str, int, int], ...] = ()
        self._told_s = 0.0

    async def run(self) -> None:
        async with self._events:
            await self._run()

    async def _run(self) -> None:
        watched = self._asked.include_swarm
        if watched:
            await self._events.open({})
        on_place = self._tell_place if watched else None
        async with self._gateway.answers(self._asked, self._visitor, on_place=on_place) as (
            answers,
            queued_s,
        ):
            if watched:
                self._events.withdraw()
                await self._events.write(self._chunk(swarm={"state": "opening"}))
            async for piece in answers:
                events = await _write(_probabilities(piece), partial(self._events_of, piece))
                if watched:
                    events = self._watch(answers.progress) + events
                if not self._events.is_open and (events or piece.tokens):
                    await self._events.open(swarm_headers(answers.progress, queued_s))
                if events:
                    await self._events.write(events)
            progress = answers.progress
        await self._events.close(self._ending(progress))

    def _events_of(self, piece: Piece, encode: Callable[[Any], bytes]) -> bytes:
        entries = self._asked.shape.chunks(piece)
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            opening = self._asked.shape.opening(piece.choice)
            if opening is not None:
                entries.insert(0, opening)
        return b"".join([self._head + encode(entry) + self._tail for entry in entries])

    def _ending(self, progress: Progress) -> bytes:
        events = b""
        if self._asked.include_swarm:
            events = self._chunk(swarm=swarm_state("done", progress))
        if self._asked.include_usage:
            events += self._chunk(usage=_usage(progress))
        return events + DONE

    def _watch(self, progress: Progress) -> bytes:
        """News of the route, if there are any or it is time."""
        route = tuple((hop.peer_id, hop.start, hop.end) for hop in progress.route)
        now_s = time.monotonic()
        if not route or (route == self._route and now_s - self._told_s < SWARM_INTERVAL_S):
            return b""
        self._route, self._told_s = route, now_s
        return self._chunk(swarm=swarm_state("answering", progress))

    def _tell_place(self, place: Place) -> None:
        told = {"place": place.place, "of": place.of, "expected_s": round(place.expected_s, 1)}
        self._events.offer(self._chunk(swarm={"state": "queued", **told}))

    def _chunk(self, **fields: Any) -> bytes:
        """A chunk of no choices."""
        return self._head + b"]," + _json(fields)[1:] + b"\n\n"


def _frame(gateway: Gateway, asked: Asked, kind: str) -> dict[str, Any]:
    """What the response, or each chunk of it, begins with."""
    return {
        "id": asked.shape.id_prefix + secrets.token_hex(12),
        "object": kind,
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": gateway.fingerprint,
    }


def _usage(progress: Progress) -> dict[str, int]:
    total = progress.prompt_tokens + progress.new_tokens
    return {
        "prompt_tokens": progress.prompt_tokens,
        "completion_tokens": progress.new_tokens,
        "total_tokens": total,
    }


def _probabilities(piece: Piece) -> int:
    return sum(1 + len(token.top) for token in piece.logprobs)


async def _write(probabilities: int, written: Callable[[Callable[[Any], bytes]], bytes]) -> bytes:
    """What `written` makes by the encoder that it is given, without holding up others."""
    if probabilities <= WRITE_NOW:
        return written(_json)
    return await asyncio.to_thread(written, _json_in_steps)


def _json_in_steps(value: Any) -> bytes:
    """As `_json`, but in Python, which lets other threads run meanwhile."""
    return "".join(_ENCODER.iterencode(value)).encode("utf-8", "replace")


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
