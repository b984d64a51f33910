"""What each peer may have under way at a server. Pure: no asyncio, no engine; the clock is an argument.

A step goes on the account of its session's *client*, also where another hop pushes it: a hop pushes for
many clients, and a limit on what it pushes would let the busiest of them starve all others.

Nobody is cut off for being over a limit here: who is gets read no further until it is below again.
"""

from __future__ import annotations

from collections.abc import Callable

from petal_swarm.server.config import SessionLimits

#: Sessions that wait are woken when so much of a limit is free again. All of a peer's are woken at once: were
#: it for each step that is done, a peer with hundreds of sessions would make everybody's steps expensive.
FREE_AGAIN = 0.5
#: A shorter debt is forgiven: no timer is that exact.
SHORTEST_WAIT_S = 0.001


class Account:
    """What one peer has under way, over all its sessions. Made by `Quotas`."""

    __slots__ = ("credit_bytes", "nbytes", "refilled_s", "rows", "sessions", "waiting")

    def __init__(self, credit_bytes: float, now: float) -> None:
        self.sessions = 0
        #: Rows and bytes of steps that are not done, and the bytes of steps of which a part has come.
        self.rows = 0
        self.nbytes = 0
        #: What the peer may move now. It may become negative: then the peer waits until it is not.
        self.credit_bytes = credit_bytes
        self.refilled_s = now
        self.waiting: dict[Callable[[], None], None] = {}

    def wake(self) -> None:
        waiting, self.waiting = self.waiting, {}
        for wake in waiting:
            wake()


class Quotas:
    """The accounts of all peers that have a session here. Each is forgotten with its last session.

    `max_bytes_in_flight_of_all` is shared: while it is used up, a peer that has more than an equal part of
    it waits, and one that has less does not.
    """

    def __init__(self, limits: SessionLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self.nbytes = 0
        #: Whether somebody had to wait since the bytes of all were at their limit.
        self.was_scarce = False

    def __len__(self) -> int:
        """Peers with an account."""
        return len(self._accounts)

    def open(self, peer_id: str) -> Usage:
        """A session of this peer begins; it ends with `Usage.close`."""
        account = self._accounts.get(peer_id)
        if account is None:
            account = self._accounts[peer_id] = Account(self._limits.max_bytes_per_s_of_peer, self._clock())
        account.sessions += 1
        return Usage(self, peer_id, account)

    def is_full(self, account: Account) -> bool:
        """Whether a peer has to wait before it may have more under way."""
        limits = self._limits
        if (
            account.nbytes >= limits.max_bytes_in_flight_of_peer
            or account.rows >= limits.max_queued_tokens_of_peer
        ):
            return True
        if account.credit_bytes < 0.0 and self.debt_s(account):
            return True
        if self.nbytes < limits.max_bytes_in_flight_of_all:
            return False
        self.was_scarce = True
        holders = sum(each.nbytes > 0 for each in self._accounts.values())
        return account.nbytes * holders >= limits.max_bytes_in_flight_of_all

    def debt_s(self, account: Account) -> float:
        """Seconds until the peer may move bytes again; 0 if it may now."""
        now, rate = self._clock(), self._limits.max_bytes_per_s_of_peer
        credit = account.credit_bytes + (now - account.refilled_s) * rate
        account.credit_bytes = min(credit, rate)
        account.refilled_s = now
        debt_s = -account.credit_bytes / rate
        return debt_s if debt_s > SHORTEST_WAIT_S else 0.0

    def wake(self, account: Account) -> None:
        """Something was given back: wake who waits for that, once it is enough."""
        if account.waiting and self._has_room_again(account):
            account.wake()
        if self.was_scarce and self.nbytes < FREE_AGAIN * self._limits.max_bytes_in_flight_of_all:
            self.was_scarce = False
            for each in self._accounts.values():
                each.wake()

    def forget(self, peer_id: str, account: Account) -> None:
        """A session of the peer has ended."""
        account.sessions -= 1
        if not account.sessions:
            del self._accounts[peer_id]

    def _has_room_again(self, account: Account) -> bool:
        limits = self._limits
        return (
            account.nbytes < FREE_AGAIN * limits.max_bytes_in_flight_of_peer
            and account.rows < FREE_AGAIN * limits.max_queued_tokens_of_peer
            and not self.is_full(account)
        )


class Usage:
    """What one session has under way. A step costs three calls here, a microsecond together.

    A step that comes in several reads is charged from when its size is known: else many sessions, each
    with nearly all of a large step, would hold what nobody has counted.
    """

    __slots__ = (
        "_account",
        "_closed",
        "_peer_id",
        "_quotas",
        "nbytes",
        "reserved_bytes",
        "rows",
        "sent_bytes",
    )

    def __init__(self, quotas: Quotas, peer_id: str, account: Account) -> None:
        self._quotas = quotas
        self._peer_id = peer_id
        self._account = account
        self._closed = False
        self.rows = 0
        self.nbytes = 0
        #: Of a step of which a part has come; counted in `nbytes`.
        self.reserved_bytes = 0
        #: Bytes of results so far.
        self.sent_bytes = 0

    @property
    def must_wait(self) -> bool:
        """Whether the session's peer has to wait before this session reads on.

        Not in the middle of a step that is charged already: steps that wait for each other's ends, each
        half read, would wait for ever.
        """
        return not self.reserved_bytes and self._quotas.is_full(self._account)

    @property
    def debt_s(self) -> float:
        """Seconds until the peer may move bytes again; 0 if it may now."""
        return self._quotas.debt_s(self._account)

    def wake_when_free(self, wake: Callable[[], None]) -> None:
        """Call `wake` once, when the peer has room for more again; for `debt_s` the caller keeps a clock."""
        self._account.waiting[wake] = None

    def reserve(self, nbytes: int) -> None:
        """A step of so many bytes has begun to come."""
        if not self._closed:
            self._add(0, nbytes - self.reserved_bytes)
            self.reserved_bytes = nbytes

    def take(self, rows: int, nbytes: int) -> None:
        """A step has come."""
        if self._closed:
            return
        self._account.credit_bytes -= nbytes
        if self.reserved_bytes:
            nbytes -= self.reserved_bytes
            self.reserved_bytes = 0
        self._add(rows, nbytes)

    def give_back(self, rows: int, nbytes: int, *, sent_bytes: int = 0) -> None:
        """A step, or a part of one, is done, with a result of `sent_bytes`."""
        if self._closed:
            return
        self.sent_bytes += sent_bytes
        account = self._account
        account.credit_bytes -= sent_bytes
        self._add(-rows, -nbytes)
        if account.waiting or self._quotas.was_scarce:
            self._quotas.wake(account)

    def close(self) -> None:
        """The session has ended, with all that it had under way. Idempotent."""
        if not self._closed:
            self.give_back(self.rows, self.nbytes)
            self._closed = True
            self._quotas.forget(self._peer_id, self._account)

    def _add(self, rows: int, nbytes: int) -> None:
        account = self._account
        self.rows += rows
        self.nbytes += nbytes
        account.rows += rows
        account.nbytes += nbytes
        self._quotas.nbytes += nbytes
