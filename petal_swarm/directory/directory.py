"""What the layers above may ask of a directory, whichever way it finds out."""

from __future__ import annotations

from typing import Protocol

from petal_swarm.wire.announcement import Announcement


class Directory(Protocol):
    """Announcements by model. Made for one event loop; closed explicitly, before the transport."""

    async def announce(self, announcement: Announcement, *, ttl_s: float) -> None:
        """Make others see this peer's announcement for `ttl_s`, in place of the one before it.

        With state "left" the peer disappears from lookups at once. Cancelling may leave the
        announcement in some places and not in others; the next one mends it.

        Raises:
            ConfigError: this directory can only be asked; or `ttl_s`, or the size, is out of range.
            LocalProtocolError: the announcement is of another peer, or others would refuse it.
            NetworkError: nobody took it.
        """
        ...

    async def lookup(self, model: str) -> list[Announcement]:
        """Who serves `model` now: verified, one for each peer, sorted by peer id, without those who left.

        Raises:
            PeerUnreachableError: there is nobody left to ask.
            PrivateSwarmError, StrangerError: those who could be asked are of another swarm.
        """
        ...

    async def records(self, model: str) -> list[bytes]:
        """The signed records behind `lookup`; those of peers that left come last (state "left").

        They are part of it so that whoever merges the listings of several servers, some of which
        are late, does not bring back a peer that has gone.

        Raises:
            PeerUnreachableError: there is nobody left to ask.
            PrivateSwarmError, StrangerError: those who could be asked are of another swarm.
        """
        ...

    async def close(self) -> None:
        """Stop taking part. Idempotent; never raises."""
        ...
