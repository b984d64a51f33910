"""What a client knows of a swarm: who serves what, how far away, and who is to be avoided."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import product

from petal_swarm.client.avoidance import Avoidance
from petal_swarm.client.config import ClientConfig
from petal_swarm.client.traffic import Traffic
from petal_swarm.directory.directory import Directory
from petal_swarm.directory.remote import Pinger, measure_rtt
from petal_swarm.errors import BusyError, CacheFullError, IdleError, MissingBlocksError, PetalSwarmError
from petal_swarm.net.transport import Transport
from petal_swarm.routing.affinity import Held, goes_back
from petal_swarm.routing.blocks import format_blocks
from petal_swarm.routing.links import Measurements
from petal_swarm.routing.route import Hop, Route, find_route, price_route
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

logger = logging.getLogger(__name__)

RETRY_LOOKUP_S = 0.5
#: Of lines that nobody measured: clients', and new servers'. A token of BLOOM-176B takes 5 ms.
ASSUMED_BANDWIDTH_BYTES_PER_S = 12.5e6
#: In a hurry, what was heard of the swarm so long ago is good enough for a first try.
RECENT_S = 60.0
#: Servers announce new figures once a second: what was heard so long ago is as good as new, until it fails.
FRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class ModelRef:
    """What routing must know of a model; `offered` is the id of an adapter that its servers must offer."""

    key: str
    num_blocks: int
    hidden_size: int
    offered: str | None = None


class View:
    """Lives in one event loop; closes nothing that it was given."""

    def __init__(self, config: ClientConfig, transport: Transport, directory: Directory) -> None:
        self.config = config
        self._transport = transport
        self._directory = directory
        self._pinger = Pinger(transport)
        self._heard: dict[str, tuple[list[Announcement], float]] = {}
        self._lookups: dict[str, asyncio.Task[list[Announcement]]] = {}
        self.avoidance = Avoidance(now=_now)
        self.traffic = Traffic()
        #: Called with every peer that failed, and how; they must not wait.
        self.listeners: list[Callable[[str, PetalSwarmError], None]] = []
        #: Called with every peer that has opened its part of a session; they must not wait either.
        self.witnesses: list[Callable[[str], None]] = []

    async def announcements(self, model: str) -> list[Announcement]:
        """Who serves the model now. Whoever asks meanwhile gets the same answer."""
        lookup = self._lookups.get(model)
        if lookup is None or lookup.done():
            lookup = self._lookups[model] = asyncio.create_task(self._look_up(model))
            lookup.add_done_callback(_seen)  # all who wait may be cancelled
        return await asyncio.shield(lookup)

    async def _look_up(self, model: str) -> list[Announcement]:
        found = await self._directory.lookup(model)
        self._heard[model] = (found, _now())
        return found

    async def _lately(self, model: str, max_age_s: float) -> list[Announcement]:
        heard, heard_s = self._heard.get(model, ([], 0.0))
        return heard if heard and _now() - heard_s <= max_age_s else await self.announcements(model)

    async def measure(self, announcements: list[Announcement]) -> dict[str, float]:
        """Round trips to these peers in seconds, by peer id; those that do not answer are left out."""
        return dict(await self._pinger.measure(announcements))

    def blame(self, peer_id: str, error: PetalSwarmError) -> None:
        """Remember to avoid a peer that failed or refused."""
        if isinstance(error, (CacheFullError, BusyError)):
            self.avoidance.busy(peer_id, error.retry_after_s or self.config.retry_busy_s)
        elif not isinstance(error, IdleError):
            self.avoidance.failed(peer_id)
            for listener in tuple(self.listeners):
                listener(peer_id, error)

    def vouch(self, peer_id: str) -> None:
        """Tell that a peer does what it was asked for."""
        for witness in tuple(self.witnesses):
            witness(peer_id)

    async def is_there(self, hop: Hop, timeout_s: float) -> bool:
        """Whether a server answers a ping in time; whatever else it is busy with."""
        try:
            async with asyncio.timeout(timeout_s):
                await measure_rtt(self._transport, hop.peer_id, hop.addresses, timeout_s=timeout_s)
        except (PetalSwarmError, TimeoutError):
            return False
        return True

    async def find_route(
        self,
        model: ModelRef,
        *,
        kv_tokens: int,
        avoid: frozenset[str],
        span: Span | None = None,
        trains: bool = False,
        min_batch_tokens: int = 0,
        held: Held | None = None,
    ) -> Route:
        """The fastest route, or that of `held` where it `goes_back`.

        Waits up to `wait_for_blocks_s` for blocks that nobody serves yet. What was heard of the swarm within
        the last second is good enough for a session's first attempt, which is the one that avoids nobody.
        Peers that failed lately are used only where nobody else is left, those in `avoid` never. The route
        is through the whole model, or `span`. If it `trains`, it is of servers that take part in training.
        Those that take less than `min_batch_tokens` at once are used only where nobody else is left, too.

        Raises:
            MissingBlocksError: still nobody does.
        """
        deadline = _now() + self.config.wait_for_blocks_s
        waiting = False
        max_age_s = 0.0 if avoid else FRESH_S
        while True:
            heard = await self._lately(model.key, max_age_s)
            known = _able(offering(model, heard), trains)
            usable = self._without(known, avoid | self.avoidance.banned)
            rtts = await self.measure(usable)
            wide = [a for a in usable if a.max_batch_tokens >= min_batch_tokens]
            try:
                for those in (self._without(wide, self.avoidance.peers()), wide):
                    with contextlib.suppress(MissingBlocksError):
                        route = self._fastest(model, those, rtts, kv_tokens=kv_tokens, span=span)
                        return self._back(held, route, model, those, rtts, kv_tokens)
                return self._fastest(model, usable, rtts, kv_tokens=kv_tokens, span=span)
            except MissingBlocksError as error:
                if max_age_s:
                    max_age_s = 0.0
                    continue
                told = _why(error, model, heard, trains)
                if avoid or _now() >= deadline:
                    raise MissingBlocksError(
                        f"{told} (waited {self.config.wait_for_blocks_s:g} s)",
                        error.blocks,
                        is_joining=error.is_joining,
                    ) from None
                if not waiting:
                    logger.warning("%s; waiting up to %g s", told, self.config.wait_for_blocks_s)
                waiting = True
            await asyncio.sleep(RETRY_LOOKUP_S)

    async def find_part(
        self,
        model: ModelRef,
        span: Span,
        *,
        kv_tokens: int,
        avoid: frozenset[str],
        like: Collection[Hop],
        min_batch_tokens: int,
        fresh: bool,
        before: str | None = None,
        after: str | None = None,
        trains: bool = False,
    ) -> Route:
        """Who could compute the blocks of `span` in place of others, between the hops `before` and `after`.

        Servers that compute in the dtype and quantization of one in `like` are preferred, since their
        results are the same. Does not wait; unless `fresh`, what was heard lately may do.

        Raises:
            MissingBlocksError: nobody could.
        """
        heard = await self._lately(model.key, 0.0 if fresh else RECENT_S)
        able = [a for a in _able(offering(model, heard), trains) if a.max_batch_tokens >= min_batch_tokens]
        kinds = {(hop.dtype, hop.quant) for hop in like}
        alike = [a for a in able if (a.dtype, a.quant) in kinds]
        rtts = self._pinger.known(a.peer_id for a in able)
        failure: MissingBlocksError | None = None
        for those, avoided in product((alike, able), (self.avoidance.peers(), self.avoidance.banned)):
            try:
                route = self._fastest(
                    model,
                    self._without(those, avoid | avoided),
                    rtts,
                    kv_tokens=kv_tokens,
                    span=span,
                    before=before,
                    after=after,
                )
            except MissingBlocksError as error:
                failure = failure or error
                continue
            if those is able and alike != able:
                logger.warning(
                    "blocks %s are now computed in another precision than before: answers may differ", span
                )
            return route
        assert failure is not None
        raise failure

    def _fastest(
        self,
        model: ModelRef,
        usable: list[Announcement],
        rtts_s: dict[str, float],
        *,
        kv_tokens: int,
        span: Span | None = None,
        before: str | None = None,
        after: str | None = None,
    ) -> Route:
        return find_route(
            usable,
            span or model.num_blocks,
            measurements=self._measurements(rtts_s),
            step_bytes=4 * model.hidden_size,
            kv_tokens=kv_tokens,
            before=before,
            after=after,
        )

    def _back(
        self,
        held: Held | None,
        fastest: Route,
        model: ModelRef,
        usable: list[Announcement],
        rtts_s: dict[str, float],
        kv_tokens: int,
    ) -> Route:
        """The route of `held` if that pays, else the fastest."""
        again = held and price_route(
            held.hops,
            usable,
            measurements=self._measurements(rtts_s),
            step_bytes=4 * model.hidden_size,
            kv_tokens=kv_tokens,
        )
        return again if held and again and goes_back(held.tokens, again, fastest) else fastest

    def _measurements(self, rtts_s: dict[str, float]) -> Measurements:
        return Measurements(
            client_rtts_s=rtts_s,
            default_bandwidth_bytes_per_s=ASSUMED_BANDWIDTH_BYTES_PER_S,
            client_load_s=self.traffic.load_s(),
        )

    def _without(self, known: list[Announcement], avoided: frozenset[str]) -> list[Announcement]:
        return [announcement for announcement in known if announcement.peer_id not in avoided]


def offering(model: ModelRef, known: list[Announcement]) -> list[Announcement]:
    """Those that offer the adapter that is asked for, if one is."""
    if model.offered is None:
        return known
    return [one for one in known if any(adapter == model.offered for _, adapter in one.adapters)]


def _able(known: list[Announcement], trains: bool) -> list[Announcement]:
    return [announcement for announcement in known if announcement.trains] if trains else known


def _why(error: MissingBlocksError, model: ModelRef, heard: list[Announcement], trains: bool) -> str:
    """What is missing; where others serve the blocks, that is that they train, or offer the adapter."""
    blocks = format_blocks(error.blocks)
    offered = offering(model, heard)
    if trains and _serve(offered, error.blocks):
        return f"nobody trains {blocks}: who serves them was started with --training-mib 0"
    if model.offered is not None and _serve(heard, error.blocks):
        named = (name for one in offered for name, adapter in one.adapters if adapter == model.offered)
        called = min(named, default=model.offered)
        return f"nobody offers the adapter {called} for {blocks}: start a server of them with --adapters"
    return str(error)


def _serve(known: list[Announcement], blocks: Iterable[int]) -> bool:
    return all(any(block in one.span for one in known) for block in blocks)


def _seen(lookup: asyncio.Task[list[Announcement]]) -> None:
    if not lookup.cancelled():
        lookup.exception()


def _now() -> float:
    return asyncio.get_running_loop().time()
