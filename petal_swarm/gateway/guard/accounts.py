"""What each visitor has asked for lately, and may still ask for. No I/O; the clock is an argument."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from petal_swarm.gateway.guard.config import Limits
from petal_swarm.gateway.refusals import RateLimitError

MAX_VISITORS = 10_000
#: So many of the oldest are looked at when a new one comes: more are forgotten than come.
_LOOK_AT = 4
#: When to come again for who has too many requests under way: nobody knows when one ends.
_RETRY_S = 2.0


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks: a key's holder or an address. `name` is what fairness goes by; it may be logged."""

    name: str
    limits: Limits


class Bucket:
    """A token bucket: `per_min` a minute, and at most a minute's worth of them at once."""

    __slots__ = ("_filled_s", "_left", "per_min")

    def __init__(self, per_min: float, now: float) -> None:
        self.per_min = per_min
        self._left = per_min
        self._filled_s = now

    def left(self, now: float) -> float:
        """What may be taken now; negative where more was taken than reserved."""
        self._left = min(self.per_min, self._left + (now - self._filled_s) * self.per_min / 60)
        self._filled_s = now
        return self._left

    def take(self, amount: float) -> None:
        """Take, as of the last call of `left`; a negative amount gives back."""
        self._left -= amount

    def wait_s(self, amount: float) -> float:
        """Seconds until so much may be taken, as of the last call of `left`."""
        return max(0.0, (min(amount, self.per_min) - self._left) * 60 / self.per_min)


class Account:
    """One visitor's; made by `Accounts`."""

    __slots__ = ("limits", "requests", "tokens", "under_way")

    def __init__(self, limits: Limits, now: float) -> None:
        self.under_way = 0
        self.limit(limits, now)

    def limit(self, limits: Limits, now: float) -> None:
        """Begin anew with these limits."""
        self.limits = limits
        self.requests = None if limits.requests_per_min is None else Bucket(limits.requests_per_min, now)
        self.tokens = None if limits.tokens_per_min is None else Bucket(limits.tokens_per_min, now)

    def is_idle(self, now: float) -> bool:
        """Whether forgetting it changes nothing."""
        buckets = (self.requests, self.tokens)
        return not self.under_way and all(b is None or b.left(now) >= b.per_min for b in buckets)


class Usage:
    """What one request may use; set `tokens` to what it did use, any time until it is over."""

    __slots__ = ("tokens",)

    def __init__(self) -> None:
        self.tokens = 0


class Accounts:
    """The accounts of the `max_visitors` who came last; others begin anew, which does them no harm.

    Those with a request under way are never forgotten.
    """

    def __init__(self, clock: Callable[[], float], *, max_visitors: int = MAX_VISITORS) -> None:
        self._clock = clock
        self._max_visitors = max_visitors
        self._accounts: OrderedDict[str, Account] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def ask(self, visitor: Visitor) -> None:
        """One more request of this visitor.

        Raises:
            RateLimitError: there were too many; this one is not counted.
        """
        bucket = self._account(visitor).requests
        if bucket is None:
            return
        if bucket.left(self._clock()) < 1:
            raise RateLimitError(
                f"more than {bucket.per_min:g} requests a minute; try again later",
                retry_after_s=bucket.wait_s(1),
            )
        bucket.take(1)

    @contextmanager
    def reserve(self, visitor: Visitor, most_tokens: int) -> Iterator[Usage]:
        """A request that may use so many tokens is under way, as long as the block lasts.

        What was reserved and not used is given back. A request of more than a minute's worth of tokens
        needs them all.

        Raises:
            RateLimitError: there are too many under way, or not so many tokens left.
        """
        account = self._account(visitor)
        limit, bucket = visitor.limits.max_requests, account.tokens
        if limit is not None and account.under_way >= limit:
            raise RateLimitError(
                f"{account.under_way} requests of yours are under way; at most {limit} may be at once",
                retry_after_s=_RETRY_S,
            )
        if bucket is not None:
            bucket.left(self._clock())
            wait_s = bucket.wait_s(most_tokens)
            if wait_s > 0:
                raise RateLimitError(
                    f"more than {bucket.per_min:g} tokens a minute: this request may need {most_tokens};"
                    " try again later, or ask for a shorter answer",
                    retry_after_s=wait_s,
                )
            bucket.take(most_tokens)
        account.under_way += 1
        usage = Usage()
        try:
            yield usage
        finally:
            account.under_way -= 1
            if bucket is not None:
                bucket.left(self._clock())
                bucket.take(usage.tokens - most_tokens)

    def left(self, visitor: Visitor) -> tuple[float | None, float | None]:
        """Requests and tokens that this visitor may still have now; None where there is no limit."""
        now, account = self._clock(), self._account(visitor)
        return (
            None if account.requests is None else max(0.0, account.requests.left(now)),
            None if account.tokens is None else max(0.0, account.tokens.left(now)),
        )

    def _account(self, visitor: Visitor) -> Account:
        account = self._accounts.get(visitor.name)
        if account is None:
            self._forget_some()
            account = self._accounts[visitor.name] = Account(visitor.limits, self._clock())
        else:
            self._accounts.move_to_end(visitor.name)
            if account.limits != visitor.limits:  # the file of keys was changed
                account.limit(visitor.limits, self._clock())
        return account

    def _forget_some(self) -> None:
        now = self._clock()
        idle = [name for name, account in islice(self._accounts.items(), _LOOK_AT) if account.is_idle(now)]
        if not idle and len(self._accounts) >= self._max_visitors:
            idle = [name for name, account in self._accounts.items() if not account.under_way][:1]
        for name in idle:
            del self._accounts[name]
