"""Who comes in: pure ASGI middleware for hosts, origins, keys and rates, before any body is read."""

from __future__ import annotations

from urllib.parse import urlsplit

from petal_swarm.gateway.guard.accounts import Accounts, Visitor
from petal_swarm.gateway.guard.addresses import Proxies
from petal_swarm.gateway.guard.config import GuardConfig, Limits
from petal_swarm.gateway.guard.keys import KeyRing
from petal_swarm.gateway.refusals import (
    App,
    CrossSiteError,
    HeadTooLargeError,
    KeyRefusedError,
    Message,
    OnRefusal,
    Receive,
    RefusedError,
    Scope,
    Send,
    SocketRefusedError,
    WrongHostError,
    send_refusal,
)

_API = "/v1/"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this name, which is in lower case."""
    return next((value for each, value in scope["headers"] if each == name), None)


def visitor_of(scope: Scope) -> Visitor:
    """Who asks, as `Entrance` has found out. In Starlette: `request.state.visitor`."""
    visitor: Visitor = scope["state"]["visitor"]
    return visitor


class Entrance:
    """Lets a request through to `app` if its host, origin, key and rate are allowed, and notes its visitor.

    Everything under `/v1/` needs a key where there are keys; the rest is open to all, at a rate of its own.
    """

    def __init__(
        self,
        app: App,
        config: GuardConfig,
        keys: KeyRing | None,
        accounts: Accounts,
        pages: Accounts,
        on_refusal: OnRefusal,
    ) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._accounts = accounts
        self._pages = pages
        self._page_limits = Limits(requests_per_min=config.page_requests_per_min)
        self._proxies = Proxies(config.trusted_proxies)
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            if scope["type"] != "http":
                raise SocketRefusedError("there are no web sockets here")
            self._check_head(scope)
            self._check_host(scope)
            self._check_origin(scope)
            self._identify(scope)
        except RefusedError as error:
            self._on_refusal(error)
            if scope["type"] == "http":
                await send_refusal(send, error)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        await self._app(scope, receive, send)

    def _check_head(self, scope: Scope) -> None:
        limits = self._config.connections
        headers = scope["headers"]
        nbytes = sum(len(name) + len(value) + 4 for name, value in headers) + len(
            scope.get("raw_path") or b""
        )
        if len(headers) > limits.max_headers or nbytes > limits.max_head_bytes:
            raise HeadTooLargeError(
                f"at most {limits.max_headers} headers of {limits.max_head_bytes} bytes in all are taken"
            )

    def _check_host(self, scope: Scope) -> None:
        allowed = self._config.allowed_hosts
        if allowed is None:
            return
        said = header(scope, b"host") or b""
        name = _hostname(said.decode("latin-1"))
        if name not in allowed:
            raise WrongHostError(
                f"this gateway answers as {', '.join(allowed)} only; see its option --allow-host"
            )

    def _check_origin(self, scope: Scope) -> None:
        """A browser lets any page post to any address, and only hides the answer from it."""
        allowed = self._config.cors_origins
        if scope["method"] in _SAFE_METHODS or "*" in allowed:
            return
        origin = header(scope, b"origin")
        if origin is None or origin.decode("latin-1") in allowed:
            return
        site = header(scope, b"sec-fetch-site")
        if site is not None:
            same = site == b"same-origin"
        else:
            same = _netloc(origin) == (header(scope, b"host") or b"").decode("latin-1").lower()
        if not same:
            raise CrossSiteError("pages of other sites may not ask here; see the option --cors")

    def _identify(self, scope: Scope) -> None:
        address = self._proxies.group_of(scope)
        visitor = Visitor(address, self._config.limits)
        asks = scope["path"].startswith(_API)
        if not asks:
            self._pages.ask(Visitor(address, self._page_limits))
        elif self._keys is not None:
            visitor = self._holder(scope, self._keys, visitor)
        if asks and scope["method"] == "POST":
            self._accounts.ask(visitor)
        elif asks:
            self._pages.ask(Visitor(address, self._page_limits))
        scope.setdefault("state", {})["visitor"] = visitor

    def _holder(self, scope: Scope, keys: KeyRing, stranger: Visitor) -> Visitor:
        scheme, _, key = (header(scope, b"authorization") or b"").partition(b" ")
        if not key.strip():
            if self._config.allow_anonymous:
                return stranger
            raise KeyRefusedError("a key is needed here: Authorization: Bearer KEY")
        holder = keys.find(key.strip()) if scheme.lower() == b"bearer" else None
        if holder is None:
            # Guessing is asking too: whoever has guessed for a minute is told to wait instead.
            self._pages.ask(Visitor(f"wrong keys of {stranger.name}", _WRONG_KEYS))
            raise KeyRefusedError("this key is not known here")
        return Visitor(f"key:{holder.name}", holder.limits)


_WRONG_KEYS = Limits(requests_per_min=30)


class SecurityHeaders:
    """Adds to each response what keeps a page of ours to itself, and answers out of shared caches."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        private = scope["path"].startswith((_API, "/api/"))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                has = {name.lower() for name, _ in headers}
                headers += [each for each in _SECURITY if each[0] not in has]
                if private and b"cache-control" not in has:
                    headers.append((b"cache-control", b"no-store"))
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_headers)


_SECURITY = (
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none';"
        b" frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)


def _hostname(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _netloc(origin: bytes) -> str | None:
    try:
        return urlsplit(origin.decode("latin-1")).netloc.lower() or None
    except ValueError:
        return None
