"""The adapters that a server holds for its span, by whom they were uploaded, within bounds.

A peer's adapters are its own: nobody else can name or replace them. Those that the server offers belong to
everybody. What nobody uses goes when others need the room, the least recently used first. Lives in the
server's event loop; the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from petal_swarm.errors import AdapterFullError, AdapterMissingError, BadAdapterError
from petal_swarm.models.adapter_digest import adapter_digest
from petal_swarm.models.adapters import AdapterLayout
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.packed_adapters import ServedAdapter
from petal_swarm.span import Span

#: Whose adapters those are that a server offers.
EVERYBODY = ""
#: Beside the numbers there is what sessions multiply by, and that is as large.
_COPIES = 2
#: To whom there is no room: uploads come and go.
_RETRY_AFTER_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """How much a store may hold for peers: bytes in all, and bytes and adapters of one of them."""

    max_bytes: int = 512 << 20
    max_bytes_of_peer: int = 256 << 20
    max_adapters_of_peer: int = 32


class HeldAdapter:
    """Numbers of an adapter for the blocks of `span`: float32 `[n]`, on the host. They never change.

    `digest` is that of `adapter_digest`. Who needs it for longer than a moment says so: `AdapterStore.use`.
    """

    __slots__ = ("digest", "expires_s", "id", "layout", "numbers", "owner", "served", "span", "ttl_s", "uses")

    def __init__(
        self, owner: str, adapter: str, span: Span, layout: AdapterLayout, numbers: Tensor, digest: bytes
    ) -> None:
        self.owner = owner
        self.id = adapter
        self.span = span
        self.layout = layout
        self.numbers = numbers
        self.digest = digest
        #: What sessions multiply by, once the first has begun.
        self.served: ServedAdapter | None = None
        self.uses = 0
        self.ttl_s = 0.0
        self.expires_s = 0.0

    @property
    def nbytes(self) -> int:
        """Memory that it is charged with."""
        return cost_bytes(self.numbers.numel())


def cost_bytes(numbers: int) -> int:
    """Memory that an adapter of so many numbers is charged with."""
    return _COPIES * 4 * numbers


class AdapterStore:
    """The adapters for the blocks of `span` of a model."""

    def __init__(
        self, config: ModelConfig, span: Span, limits: AdapterLimits, clock: Callable[[], float]
    ) -> None:
        self.config = config
        self.span = span
        self._limits = limits
        self._clock = clock
        #: The least recently used first.
        self._held: dict[tuple[str, str, Span], HeldAdapter] = {}
        self._reserved: dict[str, tuple[int, int]] = {}
        #: Of peers' adapters, those that are coming included.
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def has(self, owner: str, adapter: str, span: Span, digest: bytes) -> bool:
        """Whether that peer may use an adapter of that name that has these very numbers for `span`."""
        held = self._find(owner, adapter, span)
        if held is None:
            return False
        own = held.digest
        if held.span != span:
            start, stop = self._bounds(held, span)
            own = adapter_digest(held.layout, held.numbers[start:stop], span)
        if own == digest:
            self._touch(held)
        return own == digest

    @contextmanager
    def room_for(self, owner: str, numbers: int) -> Iterator[None]:
        """Keep room for an adapter of so many numbers while they come.

        Raises:
            AdapterFullError: there is none, or the peer has its share.
        """
        nbytes = cost_bytes(numbers)
        self._make_room(owner, nbytes)
        self._charge(owner, nbytes, 1)
        try:
            yield
        finally:
            self._charge(owner, -nbytes, -1)

    def add(
        self,
        owner: str,
        adapter: str,
        span: Span,
        layout: AdapterLayout,
        numbers: Tensor,
        *,
        digest: bytes,
        ttl_s: float = float("inf"),
    ) -> HeldAdapter:
        """Hold an adapter whose layout fits the model; called when `room_for` it was kept, and given back.

        Raises:
            AdapterFullError: no room.
            BadAdapterError: sessions use another one of that name.
        """
        key = (owner, adapter, span)
        before = self._held.get(key)
        if before is not None and before.digest == digest:
            self._touch(before)
            return before
        if before is not None and before.uses:
            raise BadAdapterError(
                f"an adapter {adapter!r} with other numbers is in use; give it another name"
            )
        if before is not None:
            self._drop(before)
        held = HeldAdapter(owner, adapter, span, layout, numbers, digest)
        if owner != EVERYBODY:
            self._make_room(owner, held.nbytes)
            self.nbytes += held.nbytes
        held.ttl_s = ttl_s
        self._held[key] = held
        self._touch(held)
        return held

    def find(self, peer: str, adapter: str, span: Span) -> HeldAdapter:
        """The peer's own adapter of that name, or one that everybody may use, with numbers for all of `span`.

        Raises:
            AdapterMissingError: there is none, or not any more.
        """
        held = self._find(peer, adapter, span)
        if held is None:
            raise AdapterMissingError(f"there is no adapter {adapter!r} of yours here for blocks {span}")
        self._touch(held)
        return held

    @contextmanager
    def use(self, held: HeldAdapter) -> Iterator[HeldAdapter]:
        """While the block runs the adapter stays."""
        held.uses += 1
        try:
            yield held
        finally:
            held.uses -= 1
            self._touch(held)

    def numbers_for(self, peer: str, adapter: str, span: Span) -> tuple[AdapterLayout, Tensor] | None:
        """Layout and flat vector for the blocks of `span`, for a training pass; None if there is none."""
        held = self._find(peer, adapter, span)
        if held is None:
            return None
        self._touch(held)
        start, stop = self._bounds(held, span)
        return held.layout.of_span(span), held.numbers[start:stop]

    def forget(self, owner: str, adapter: str) -> None:
        """The peer needs this adapter no more; where it is in use it stays until it is not."""
        for held in [held for held in self._held.values() if (held.owner, held.id) == (owner, adapter)]:
            held.expires_s = self._clock()
            held.ttl_s = 0.0
        self.expire()

    def expire(self) -> None:
        """Give up what nobody has used for as long as its owner wanted it kept."""
        now = self._clock()
        for held in [held for held in self._held.values() if not held.uses and held.expires_s <= now]:
            self._drop(held)

    def _find(self, peer: str, adapter: str, span: Span) -> HeldAdapter | None:
        self.expire()
        for owner in (peer, EVERYBODY):
            exact = self._held.get((owner, adapter, span))
            if exact is not None:
                return exact
        for held in self._held.values():
            if held.id == adapter and held.owner in (peer, EVERYBODY) and held.span.covers(span):
                return held
        return None

    def _bounds(self, held: HeldAdapter, span: Span) -> tuple[int, int]:
        """Where the numbers of `span` lie in those that are held."""
        start = held.layout.bounds(self.config, held.span)[0]
        first, last = held.layout.bounds(self.config, span)
        return first - start, last - start

    def _touch(self, held: HeldAdapter) -> None:
        key = (held.owner, held.id, held.span)
        if self._held.get(key) is held:
            self._held[key] = self._held.pop(key)
        held.expires_s = self._clock() + held.ttl_s

    def _make_room(self, owner: str, nbytes: int) -> None:
        limits = self._limits
        self.expire()
        if nbytes > min(limits.max_bytes, limits.max_bytes_of_peer):
            raise AdapterFullError(
                f"an adapter of {nbytes >> 20} MiB is over this server's limit of"
                f" {min(limits.max_bytes, limits.max_bytes_of_peer) >> 20} MiB"
            )
        own_bytes, own_count = self._of_peer(owner)
        for held in list(self._held.values()):
            fits = own_bytes + nbytes <= limits.max_bytes_of_peer and own_count < limits.max_adapters_of_peer
            if fits:
                break
            if held.owner == owner and not held.uses:
                self._drop(held)
                own_bytes, own_count = self._of_peer(owner)
        if own_bytes + nbytes > limits.max_bytes_of_peer or own_count >= limits.max_adapters_of_peer:
            raise AdapterFullError(
                "your adapters here have all the room that one peer gets, and all are in use",
                retry_after_s=_RETRY_AFTER_S,
            )
        for held in list(self._held.values()):
            if self.nbytes + nbytes <= limits.max_bytes:
                return
            if held.owner != EVERYBODY and not held.uses:
                self._drop(held)
        if self.nbytes + nbytes > limits.max_bytes:
            raise AdapterFullError(
                "this server has no room for another adapter now", retry_after_s=_RETRY_AFTER_S
            )

    def _of_peer(self, owner: str) -> tuple[int, int]:
        """Bytes and adapters of a peer, those that are coming included."""
        nbytes, count = self._reserved.get(owner, (0, 0))
        own = [held.nbytes for held in self._held.values() if held.owner == owner]
        return nbytes + sum(own), count + len(own)

    def _charge(self, owner: str, nbytes: int, count: int) -> None:
        self.nbytes += nbytes
        before = self._reserved.get(owner, (0, 0))
        after = (before[0] + nbytes, before[1] + count)
        if after[1]:
            self._reserved[owner] = after
        else:
            self._reserved.pop(owner, None)

    def _drop(self, held: HeldAdapter) -> None:
        del self._held[held.owner, held.id, held.span]
        if held.owner != EVERYBODY:
            self.nbytes -= held.nbytes
