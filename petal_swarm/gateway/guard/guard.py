"""The guard at the front door: everything that is asked before, and beside, an answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from starlette.middleware.cors import CORSMiddleware

from petal_swarm.gateway.guard.accounts import Accounts, Usage, Visitor
from petal_swarm.gateway.guard.bodies import Bodies
from petal_swarm.gateway.guard.config import GuardConfig
from petal_swarm.gateway.guard.connections import Connections
from petal_swarm.gateway.guard.entrance import Entrance, SecurityHeaders
from petal_swarm.gateway.guard.keys import KeyRing
from petal_swarm.gateway.refusals import App, OnRefusal

#: Response headers that pages of other sites may read.
_EXPOSED = ("x-swarm-route", "server-timing", "retry-after", "x-request-id")


class Guard:
    """Composed with an application like this::

        guard = Guard(config, on_refusal=metrics.refused)
        app = guard.wrap(app)
        uvicorn.Config(app, http=guard.connections.protocol, ws="none", proxy_headers=False,
                       access_log=False, server_header=False,
                       timeout_keep_alive=guard.connections.keep_alive_s)

    and in an endpoint, once the tokens of the prompt are counted::

        visitor = visitor_of(scope)
        with guard.reserve(visitor, request.max_tokens) as usage:
            async with line.enter(visitor.name, sequences, on_place=tell):
                ...
                usage.tokens = prompt_tokens + new_tokens

    Whatever is refused is a `RefusedError`. Those of `reserve` and `enter` are the endpoint's to answer, with
    `send_refusal` or by `error.status`, `error.body()` and `error.headers()`; the others are answered in
    here, and told to `on_refusal`.
    """

    def __init__(
        self,
        config: GuardConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_refusal: OnRefusal = lambda _: None,
    ) -> None:
        """Raises:
        ConfigError: the file of keys, or an address, cannot be used.
        """
        self._config = config
        self._on_refusal = on_refusal
        self._keys = None if config.keys_file is None else KeyRing(config.keys_file, config.limits)
        self._accounts = Accounts(clock)
        self._pages = Accounts(clock)
        self.connections = Connections(config.connections, config.trusted_proxies, on_refusal)

    @property
    def needs_key(self) -> bool:
        """Whether nobody is answered without a key."""
        return self._keys is not None and not self._config.allow_anonymous

    @property
    def takes_keys(self) -> bool:
        """Whether a key makes a difference."""
        return self._keys is not None

    def wrap(self, app: App) -> App:
        """`app` behind all checks of a request."""
        config = self._config
        app = Bodies(app, config, self._on_refusal)
        app = Entrance(app, config, self._keys, self._accounts, self._pages, self._on_refusal)
        if config.cors_origins:
            app = CORSMiddleware(
                app,
                allow_origins=config.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=_EXPOSED,
            )
        return SecurityHeaders(app)

    def reserve(self, visitor: Visitor, most_tokens: int) -> AbstractContextManager[Usage]:
        """Room on the visitor's account for a request that may use so many tokens, as long as the block
        lasts; `Usage.tokens` says what it did use. See `Accounts.reserve`.

        Raises (on entering):
            RateLimitError: the visitor has too much under way, or had too many tokens.
        """
        return self._accounts.reserve(visitor, most_tokens)

    def left(self, visitor: Visitor) -> tuple[float | None, float | None]:
        """Requests and tokens that this visitor may still have now; None where there is no limit."""
        return self._accounts.left(visitor)

    def reload_keys(self) -> int | None:
        """Read the file of keys again, as on SIGHUP: how many there are now, None without such a file.

        Raises:
            ConfigError: it cannot be understood; the keys are as before.
        """
        if self._keys is None:
            return None
        self._keys.reload()
        return len(self._keys)
