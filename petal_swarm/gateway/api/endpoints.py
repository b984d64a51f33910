"""`/v1/...`: each endpoint as an ASGI application, with its errors as OpenAI words them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from petal_swarm.errors import PetalSwarmError
from petal_swarm.gateway.api.answering import answer
from petal_swarm.gateway.api.asked import Asked, parse
from petal_swarm.gateway.api.connection import Connection
from petal_swarm.gateway.api.errors import ApiError, from_swarm, internal
from petal_swarm.gateway.api.request_ids import request_id_of
from petal_swarm.gateway.api.schemas import ChatBody, CompletionBody
from petal_swarm.gateway.gateway import Gateway
from petal_swarm.gateway.guard import PRIVATE, Visitor

logger = logging.getLogger(__name__)

#: Read one body, understand it.
Understand = Callable[[Gateway, bytes], Awaitable[Asked]]
#: Where no guard tells visitors apart.
ANYBODY = Visitor("anybody", PRIVATE)


async def understand_chat(gateway: Gateway, data: bytes) -> Asked:
    """
    Raises:
        ApiError: it cannot be answered.
    """
    body = parse(ChatBody, data)
    return await gateway.reader.chat(body, await gateway.adapter_of(body.model))


async def understand_completion(gateway: Gateway, data: bytes) -> Asked:
    """
    Raises:
        ApiError: it cannot be answered.
    """
    body = parse(CompletionBody, data)
    return await gateway.reader.completion(body, await gateway.adapter_of(body.model))


class Answering:
    """An endpoint that answers with text from the swarm. Whoever leaves is worked for no longer."""

    def __init__(self, gateway: Gateway, name: str, understand: Understand) -> None:
        self._gateway = gateway
        self._name = name
        self._understand = understand

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, metrics = self._gateway, self._gateway.metrics
        connection = Connection(receive, send, request_id_of(scope))
        try:
            try:
                data = await Request(scope, receive).body()
                asked = await self._understand(gateway, data)
                visitor = scope.get("state", {}).get("visitor", ANYBODY)
                work = answer(gateway, asked, visitor, connection)
                await connection.while_there(work, unless=gateway.ending)
                metrics.answered(self._name, 200)
            except ClientDisconnect:
                raise
            except Exception as error:
                await self._tell(as_api_error(error, connection.request_id), connection)
        except ClientDisconnect:
            metrics.abandoned()

    async def _tell(self, error: ApiError, connection: Connection) -> None:
        """An error response, or the last event of a stream that has begun."""
        self._gateway.metrics.answered(self._name, 200 if connection.started else error.status)
        self._gateway.metrics.refused(error.code or "invalid_request")
        if connection.started:
            await connection.write(error.event(), more=False)
            return
        response = error.response()
        await connection.start(response.status_code, dict(response.headers))
        await connection.write(bytes(response.body), more=False)


def as_api_error(error: Exception, request_id: str = "a request") -> ApiError:
    """What a visitor is told of an exception; who runs the gateway finds more in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PetalSwarmError):
        logger.info("%s: %s: %s", request_id, type(error).__name__, error)
        return from_swarm(error)
    logger.error("%s failed", request_id, exc_info=error)
    return internal()


def api_routes(gateway: Gateway) -> list[Route]:
    """All of `/v1`."""

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": gateway.created_s, "owned_by": "petal-swarm"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described(name) for name in await gateway.models()]})

    async def model(request: Request) -> Response:
        name = request.path_params["model"]
        if not name:
            return await models(request)
        await gateway.adapter_of(name)
        return JSONResponse(described(name))

    chat = Answering(gateway, "/v1/chat/completions", understand_chat)
    completion = Answering(gateway, "/v1/completions", understand_completion)
    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
    ]
