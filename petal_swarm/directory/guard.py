"""The DHT's calls, between members only: what `PrivateTransport` does for streams, for hivemind's calls.

hivemind has a hook for this, `AuthorizerBase`, which is told neither who calls nor who is called: a
request that a member sends to a stranger could be sent on to other members. So the proof is made and checked
one layer below, where the daemon says who is at the other end. It travels in hivemind's own field for it,
`auth.signature`, so nodes that do not know of it still read the messages.

An open swarm has a guard, too: it refuses those who bring a proof, so that swarms do not mix.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError

from petal_swarm.errors import StrangerError
from petal_swarm.net.complaints import Complaints
from petal_swarm.net.private import IN_OPEN_SWARM, IN_OTHER_SWARM, NO_KEY
from petal_swarm.net.swarm_key import Side, SwarmKey

logger = logging.getLogger(__name__)

#: Whose call is being answered; hivemind does not tell those who check the records in it.
CALLER: ContextVar[str] = ContextVar("petal_swarm_dht_caller", default="nobody")
MAX_REMEMBERED_PEERS = 256
#: What a refused caller reads in the error; the rest of it is for people.
_PRIVATE = "private-swarm"
_OPEN = "open-swarm"


class GuardedP2P:
    """hivemind's `P2P`, as far as `DHTProtocol` uses it; `key` is None in an open swarm.

    `refusals` says of peers that would not talk to this one, or are not believed, why. `clock_offsets_s`
    says how far the clocks of those who answered a ping are ahead of this machine's.
    """

    def __init__(self, p2p: Any, key: SwarmKey | None, *, now: Callable[[], float] = time.time) -> None:
        self.peer_id = p2p.peer_id
        self.refusals: dict[str, str] = {}
        self.clock_offsets_s: dict[str, float] = {}
        self._p2p = p2p
        self._key = key
        self._now = now
        self._own_id = str(p2p.peer_id)
        self._complaints = Complaints(logger)

    async def add_protobuf_handler(
        self, name: str, handler: Callable[[Any, Any], Awaitable[Any]], kind: Any, **options: Any
    ) -> None:
        async def guarded(request: Any, context: Any) -> Any:
            caller = str(context.remote_id)
            self._admit(name, caller, request.auth.signature)
            CALLER.set(caller)
            response = await handler(request, context)
            if self._key is not None:
                response.auth.signature = self._key.proof(Side.LISTENER, name, caller, self._own_id)
            return response

        await self._p2p.add_protobuf_handler(name, guarded, kind, **options)

    async def remove_protobuf_handler(self, name: str, **options: Any) -> None:
        await self._p2p.remove_protobuf_handler(name, **options)

    async def call_protobuf_handler(self, peer_id: Any, name: str, request: Any, kind: Any) -> Any:
        """hivemind's call.

        Raises:
            StrangerError: the peer is not of this swarm; and whatever hivemind raises.
        """
        called = str(peer_id)
        if self._key is not None:
            request.auth.signature = self._key.proof(Side.DIALER, name, self._own_id, called)
        asked_at = self._now()
        try:
            response = await self._p2p.call_protobuf_handler(peer_id, name, request, kind)
        except P2PHandlerError as error:
            reason = self._refusal(called, str(error))
            if reason is None:
                raise
            _remember(self.refusals, called, reason)
            raise StrangerError(reason) from None
        if self._key is not None:
            expected = self._key.proof(Side.LISTENER, name, self._own_id, called)
            if not hmac.compare_digest(response.auth.signature, expected):
                reason = IN_OPEN_SWARM.format(called)
                _remember(self.refusals, called, reason)
                raise StrangerError(reason)
        self.refusals.pop(called, None)
        self._note_clock(called, asked_at, response)
        return response

    def _admit(self, name: str, caller: str, proof: bytes) -> None:
        """
        Raises:
            StrangerError: the caller is not of this swarm. hivemind sends its text to the caller.
        """
        if self._key is None:
            if proof:
                self._complaints.about(caller, "refused peer %s: it has a swarm key, we have none", caller)
                raise StrangerError(f"{_OPEN}: this is no private swarm")
            return
        if not hmac.compare_digest(proof, self._key.proof(Side.DIALER, name, caller, self._own_id)):
            which = "another swarm key" if proof else "no swarm key"
            self._complaints.about(caller, "refused peer %s: it has %s", caller, which)
            raise StrangerError(f"{_PRIVATE}: {NO_KEY}")

    def _refusal(self, peer_id: str, told: str) -> str | None:
        """What a peer's error means to people here, if it is one of a guard."""
        if _PRIVATE in told:
            return f"peer {peer_id}: {NO_KEY}" if self._key is None else IN_OTHER_SWARM.format(peer_id)
        if _OPEN in told:
            return IN_OPEN_SWARM.format(peer_id)
        return None

    def _note_clock(self, peer_id: str, asked_at: float, response: Any) -> None:
        """A ping's answer says what time it is there, at some moment between question and answer."""
        told = getattr(response, "dht_time", 0.0)
        if told:
            _remember(self.clock_offsets_s, peer_id, told - (asked_at + self._now()) / 2)


def _remember(notes: dict[str, Any], peer_id: str, note: Any) -> None:
    notes.pop(peer_id, None)
    notes[peer_id] = note
    while len(notes) > MAX_REMEMBERED_PEERS:
        del notes[next(iter(notes))]
