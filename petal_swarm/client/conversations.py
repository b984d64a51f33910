"""Which servers computed what a prompt begins with: where its conversation went last. Pure."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from hashlib import blake2b

from petal_swarm.routing.affinity import Held
from petal_swarm.routing.route import Hop
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS

#: So many pages are remembered, a million tokens: some 20 MB.
MAX_PAGES = 65_536
#: Servers that are in use have given up by then what nobody came back to.
FORGET_S = 1800.0
_KEY_BYTES = 16


class Conversations:
    """Remembers hops by the hash of each page of tokens that went through them, chained from the first.

    So the longest common beginning is found, whatever comes after it. Pages that many conversations begin
    with, a system prompt, are remembered where they went last.
    """

    def __init__(
        self, *, now: Callable[[], float], max_pages: int = MAX_PAGES, forget_s: float = FORGET_S
    ) -> None:
        self._now = now
        self._max_pages = max_pages
        self._forget_s = forget_s
        self._known: OrderedDict[bytes, tuple[tuple[Hop, ...], float]] = OrderedDict()

    def remember(self, scope: Hashable, tokens: Sequence[int], hops: tuple[Hop, ...]) -> None:
        """`tokens` are in the caches of `hops`. `scope` tells those of other models and adapters apart."""
        seen = hops, self._now()
        for key in _page_keys(scope, tokens):
            self._known[key] = seen
            self._known.move_to_end(key)
        while len(self._known) > self._max_pages:
            self._known.popitem(last=False)

    def recall(self, scope: Hashable, tokens: Sequence[int]) -> Held | None:
        """Who probably holds the longest beginning of `tokens`."""
        held, oldest = None, self._now() - self._forget_s
        for number, key in enumerate(_page_keys(scope, tokens), 1):
            seen = self._known.get(key)
            if seen is None or seen[1] < oldest:
                break
            held = Held(seen[0], number * PAGE_TOKENS)
        return held


def _page_keys(scope: Hashable, tokens: Sequence[int]) -> Iterator[bytes]:
    key = blake2b(repr(scope).encode(), digest_size=_KEY_BYTES).digest()
    for end in range(PAGE_TOKENS, len(tokens) + 1, PAGE_TOKENS):
        page = array("q", tokens[end - PAGE_TOKENS : end]).tobytes()
        key = blake2b(key + page, digest_size=_KEY_BYTES).digest()
        yield key
