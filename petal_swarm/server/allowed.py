"""`--allow-peer`: sessions for some peers only."""

from __future__ import annotations

import logging
from collections.abc import Collection

from petal_swarm.errors import NotAllowedError
from petal_swarm.net.complaints import Complaints
from petal_swarm.net.refusal import refuse
from petal_swarm.net.transport import Stream, StreamHandler

logger = logging.getLogger(__name__)


def only_for(peer_ids: Collection[str], handler: StreamHandler) -> StreamHandler:
    """`handler` for streams of these peers, as the transport has authenticated them; others read why not.

    It is meant for the session protocol. A push needs a session that names its peer as upstream, which an
    allowed client has opened; and whoever may not compute may still ask who is there.
    """
    allowed = frozenset(peer_ids)
    complaints = Complaints(logger)

    async def handle(stream: Stream) -> None:
        if stream.peer_id in allowed:
            await handler(stream)
            return
        complaints.about(
            stream.peer_id, "refused a session of peer %s: no --allow-peer for it", stream.peer_id
        )
        await refuse(
            stream,
            NotAllowedError,
            f"this server computes for some peers only: ask its owner for --allow-peer {stream.peer_id}"
            " (a client keeps its peer id with --identity FILE)",
        )

    return handle
