"""The gateway as an ASGI application: all routes, what stands before them, and errors as JSON."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from petal_swarm.client.watch import SwarmWatch
from petal_swarm.errors import PetalSwarmError
from petal_swarm.gateway.api.endpoints import api_routes, as_api_error
from petal_swarm.gateway.api.errors import ApiError
from petal_swarm.gateway.api.request_ids import RequestIds, request_id_of
from petal_swarm.gateway.gateway import Gateway
from petal_swarm.gateway.guard import Guard
from petal_swarm.gateway.metrics import CONTENT_TYPE
from petal_swarm.gateway.pages import page_routes
from petal_swarm.gateway.swarm_api import swarm_routes
from petal_swarm.models.prompts import has_template
from petal_swarm.routing.blocks import format_blocks
from petal_swarm.version import __version__

#: The longest first: one ends in another.
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models")
#: `/health` is as old as this at most, and asked for by machines, often.
HEALTH_AGE_S = 2.0
#: A look that takes longer has found nobody yet.
HEALTH_TIMEOUT_S = 5.0


def make_app(
    gateway: Gateway,
    *,
    guard: Guard | None = None,
    watch: SwarmWatch | None = None,
) -> ASGIApp:
    """The application with its pages, behind the guard if there is one; with the map, if there is a watch."""
    starlette = Starlette(
        routes=[
            *api_routes(gateway),
            *_own_routes(gateway, watch, guard),
            *(swarm_routes(watch) if watch is not None else ()),
            *page_routes(),
        ],
        exception_handlers={
            HTTPException: _on_http_error,
            ApiError: _on_error,
            PetalSwarmError: _on_error,
            Exception: _on_error,
        },
    )
    return RequestIds(starlette if guard is None else guard.wrap(starlette))


def _own_routes(gateway: Gateway, watch: SwarmWatch | None, guard: Guard | None) -> list[Route]:
    async def health(request: Request) -> Response:
        reason = await _ailment(watch) if watch is not None else None
        if reason is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable", "reason": reason}, 503, {"Retry-After": "5"})

    async def metrics(request: Request) -> Response:
        return Response(gateway.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    async def about(request: Request) -> Response:
        names = await gateway.models()
        source, config = gateway.source, gateway.config
        return JSONResponse(
            {
                "version": __version__,
                "needs_key": guard is not None and guard.needs_key,
                "takes_keys": guard is not None and guard.takes_keys,
                "limits": {"max_tokens": config.max_tokens, "max_choices": config.max_choices},
                "models": [
                    {
                        "id": name,
                        "has_chat_template": has_template(source.tokenizer),
                        "context_tokens": source.context_tokens,
                        "is_adapter": name != config.model_name,
                    }
                    for name in names
                ],
            }
        )

    return [Route("/health", health), Route("/metrics", metrics), Route("/api/gateway", about)]


async def _ailment(watch: SwarmWatch) -> str | None:
    """Why nobody can be answered now."""
    status = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            status = await watch.fresh(HEALTH_AGE_S)
    if watch.trouble is not None or status is None:
        return "the swarm cannot be reached"
    return f"nobody serves {format_blocks(status.missing)}" if status.missing else None


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {404: _nothing_at(request.url.path), 405: "This address takes other methods."}
    message = told.get(error.status_code, error.detail)
    response = ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None)
    made = response.response()
    made.headers.update(error.headers or {})
    return made


def _nothing_at(path: str) -> str:
    """For programs that look for an endpoint, which ones there are."""
    ours = tuple(route for route in ENDPOINTS if path.rstrip("/").endswith(route.removeprefix("/v1")))
    if ours:
        return f"There is nothing at this address; {ours[0]} is."
    asks = path.startswith("/v1/") or path in ("/v1", "/embeddings", "/responses")
    return "There is nothing at this address" + (f"; there are {', '.join(ENDPOINTS)}." if asks else ".")


async def _on_error(request: Request, error: Exception) -> Response:
    return as_api_error(error, request_id_of(request.scope)).response()
