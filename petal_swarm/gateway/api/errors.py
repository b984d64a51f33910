"""Errors as OpenAI words them: an object, an HTTP status, and what our own errors become."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from petal_swarm.errors import (
    BusyError,
    CacheFullError,
    ConfigError,
    DeadlineError,
    MissingBlocksError,
    NetworkError,
    NotFiniteError,
    PetalSwarmError,
    RemoteError,
    SessionTooLongError,
    SilentBlocksError,
    SwarmError,
    TooSlowError,
)
from petal_swarm.gateway.refusals import RefusedError
from petal_swarm.routing.blocks import format_blocks

MAX_MESSAGE_CHARACTERS = 500
#: How long to wait before trying again what is missing now: servers announce themselves every 4 s.
RETRY_S = 5.0
#: Somebody has to start a server, or it has to start again.
RETRY_MISSING_S = 15.0
#: A server that joins reads its blocks first.
RETRY_JOINING_S = 30.0

#: To tell of them takes microseconds each, and bodies have room for a million.
MAX_MISTAKES = 1000

#: Parts of messages that are not supported.
_OF_TOOLS = (("tool_calls",), ("function_call",))
#: Where pydantic would tell of the first of several forms only.
_FORMS = {
    "prompt": "must be a text, a list of token ids, or a list of these; none empty",
    "stop": "must be a text or a list of texts",
    "messages[].content": "must be a text, or a list of parts with a text each",
}
#: What a place inside of a parameter may be called; other names are the visitor's own words.
_FIELDS = frozenset({"role", "content", "type", "text", "include_usage", "include_swarm"})
_NUMBER = re.compile(r"(?<=\[)\d+(?=\])")
_MOST = re.compile(r"at most (\d+)")
_SHOULD = re.compile(r"^[A-Z][a-z]+ should ")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
}


class ApiError(Exception):
    """What a visitor is told instead of an answer: an HTTP status and OpenAI's error object.

    `param` names the parameter that is to blame, `code` the error for programs; `retry_after_s` says when it
    may be worth to ask again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error object; the same in a response and in a stream that has begun."""
        message = " ".join(str(self).split())[:MAX_MESSAGE_CHARACTERS]
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def event(self) -> bytes:
        """As an event of a stream, which it ends; with what the status line and headers would have said."""
        body = self.body()
        body["error"] |= {"status": self.status, "retry_after_s": self.retry_after_s}
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse(self.body(), self.status, headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def too_long(prompt_tokens: int, new_tokens: int, limit: int, param: str) -> ApiError:
    """Prompt and answer are longer than the model's context; `param` is where the prompt was."""
    return bad_request(
        f"This model's context has {limit} tokens; {prompt_tokens} of prompt and {new_tokens} of answer were"
        " asked for. Shorten the prompt or the answer.",
        param,
        "context_length_exceeded",
    )


def from_validation(error: ValidationError, unsupported: Collection[str] = ()) -> ApiError:
    """The first thing that is wrong with a body; never what was in it."""
    if error.error_count() > MAX_MISTAKES:
        return bad_request(f"More than {MAX_MISTAKES} things are wrong with the body.")
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return bad_request(f"The body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    param = str(first["loc"][0])[:64] if first["loc"] else None
    if param in unsupported:
        return bad_request(f"{param} is not supported here.", param, "unsupported_parameter")
    if first["loc"][-1:] in _OF_TOOLS:
        return bad_request("Tools are not supported here.", param, "unsupported_parameter")
    place = _place(first["loc"])
    if first["type"] == "missing":
        return bad_request(f"You must provide {place}.", param, "missing_required_parameter")
    told = _FORMS.get(_NUMBER.sub("", place)) or _told(first["type"], first["msg"])
    return bad_request(f"{place}: {told}" if place else told, param, "invalid_value")


def _place(loc: tuple[int | str, ...]) -> str:
    """Where in a body, such as `messages[3].role`; of names inside of parameters only ours."""
    place = str(loc[0])[:64] if loc else ""
    for part in loc[1:]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part in _FIELDS:
            place += f".{part}"
        else:
            break
    return place


def _told(kind: str, message: str) -> str:
    """What pydantic says of a value, as one would say it of JSON."""
    if kind == "too_short":
        return "must not be empty"
    most = _MOST.search(message) if kind == "too_long" else None
    if most:
        return f"must have at most {most[1]} items"
    return _SHOULD.sub("must ", message)


def from_swarm(error: PetalSwarmError) -> ApiError:
    """What becomes of an error of the client library.

    Messages of the swarm's own errors name servers and what to do as a client of the swarm, and are for
    whoever runs the gateway; visitors get their own words.
    """
    if isinstance(error, RefusedError):
        return ApiError(error.status, str(error), code=error.code, retry_after_s=error.retry_after_s)
    if isinstance(error, ConfigError):
        return bad_request(str(error))
    if isinstance(error, MissingBlocksError):
        return _missing(error)
    if isinstance(error, SessionTooLongError):
        return bad_request(
            "This is longer than the swarm can hold; shorten the prompt or the answer.",
            code="context_length_exceeded",
        )
    if isinstance(error, CacheFullError) and error.retry_after_s is None:
        # Servers say when to come again, unless it would never fit.
        told = "No server of the swarm has room for this; ask for a shorter answer, or fewer of them."
        return ApiError(503, told, code="swarm_too_small")
    if isinstance(error, (CacheFullError, BusyError)):
        retry_s = error.retry_after_s if error.retry_after_s is not None else RETRY_S
        return ApiError(503, "The swarm is full at the moment.", code="swarm_full", retry_after_s=retry_s)
    if isinstance(error, (DeadlineError, TooSlowError)):
        return ApiError(504, "The swarm did not answer in time.", code="timeout", retry_after_s=RETRY_S)
    if isinstance(error, NotFiniteError):
        return ApiError(500, "The model computed no numbers for this.", code="not_finite")
    if isinstance(error, (NetworkError, RemoteError, SwarmError)):
        return ApiError(503, "The swarm lost this answer; try again.", code="swarm_failed", retry_after_s=1.0)
    return internal()


def _missing(error: MissingBlocksError) -> ApiError:
    blocks = format_blocks(error.blocks) if error.blocks else "some blocks"
    told = f"Nobody in the swarm serves {blocks} of the model at the moment"
    if isinstance(error, SilentBlocksError):
        told = f"Who serves {blocks} of the model in the swarm does not answer at the moment"
    retry_s = RETRY_MISSING_S
    if error.is_joining:
        told += "; a server of some of them is still joining"
        retry_s = RETRY_JOINING_S
    return ApiError(503, f"{told}.", code="missing_blocks", retry_after_s=retry_s)


def internal() -> ApiError:
    """Our own mistake, without details."""
    return ApiError(500, "The gateway failed to answer this; try again.", code="internal_error")
