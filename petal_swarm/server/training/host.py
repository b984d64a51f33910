"""The `train` and `train-push` protocols of a server: opening runs, finding them, ending them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from petal_swarm.engine.compute import Compute
from petal_swarm.engine.training import Passes
from petal_swarm.errors import (
    BadMessageError,
    BusyError,
    PetalSwarmError,
    UnknownSessionError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.net.transport import Stream, Transport
from petal_swarm.server import slow_peers
from petal_swarm.server.config import SessionLimits
from petal_swarm.server.gate import Shares, StreamGate
from petal_swarm.server.quotas import Quotas
from petal_swarm.server.results import answering_errors
from petal_swarm.server.streams import (
    MAX_OPENING_PAYLOAD_BYTES,
    Arrivals,
    check_hosted,
    dial_next,
    until_one_ends,
    while_there,
)
from petal_swarm.server.training.ledger import Retained
from petal_swarm.server.training.limits import TrainingLimits
from petal_swarm.server.training.passes import AdapterOf, Trainer
from petal_swarm.server.training.run import HostedRun
from petal_swarm.wire.connection import TRAIN_PUSH_TABLE, TRAIN_TABLE, Role
from petal_swarm.wire.frames import MAX_PAYLOAD_BYTES
from petal_swarm.wire.messages.opening import PushOpen
from petal_swarm.wire.messages.parts import DTYPE_BYTES, Neighbour
from petal_swarm.wire.messages.tuning import TrainOpen, TrainOpened
from petal_swarm.wire.protocols import TRAIN_PUSH
from petal_swarm.wire.tensors import dtype_name

#: Runs are long: who finds none free need not ask again soon.
RETRY_AFTER_S = 30.0


class TrainingHost:
    """All runs of one server. `passes` are computed by `compute`; `adapter_of` finds what they name."""

    def __init__(
        self,
        compute: Compute,
        passes: Passes,
        transport: Transport,
        *,
        model_key: str,
        limits: SessionLimits,
        training: TrainingLimits,
        gate: StreamGate,
        adapter_of: AdapterOf,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._model_key = model_key
        self._gate = gate
        self._runs: dict[bytes, HostedRun] = {}
        self._arrivals = Arrivals()
        self._changed = asyncio.Event()
        self._places = Shares(training.max_runs, training.max_runs_of_peer)
        self._looks: asyncio.TimerHandle | None = None
        hidden_size = compute.engine.stack.config.hidden_size
        self._trainer = Trainer(
            compute,
            passes,
            adapter_of,
            limits,
            training,
            Quotas(limits, self._loop.time),
            Retained(training.retained_bytes),
            max_pass_tokens=training.rows_of_pass(hidden_size),
        )
        largest_bytes = self._trainer.max_pass_tokens * hidden_size * max(DTYPE_BYTES.values())
        # Who sends a little too much is told what the limit is.
        self._max_payload_bytes = min(max(2 * largest_bytes, 1 << 20), MAX_PAYLOAD_BYTES)
        self.draining = False

    @property
    def num_runs(self) -> int:
        return len(self._runs)

    async def drained(self) -> None:
        """Ask all clients to go elsewhere, and wait until no run is left. Set `draining` first."""
        for run in self._runs.values():
            run.announce_leaving()
        while self._runs:
            self._changed.clear()
            await self._changed.wait()

    def end_all(self, error: PetalSwarmError) -> None:
        """End the runs that are left with `error`, let nobody in, and look after nothing any more."""
        self.draining = True
        for run in self._runs.values():
            run.fail(error)
        if self._looks is not None:
            self._looks.cancel()

    async def handle_train(self, stream: Stream) -> None:
        """One client's run, from its `train-open` to the end of the stream."""
        channel = Channel(stream, TRAIN_TABLE, Role.LISTENER)
        channel.incoming.max_payload_bytes = MAX_OPENING_PAYLOAD_BYTES
        async with answering_errors(channel):
            with self._gate.being_opened(channel.peer_id):
                opening = await channel.expect(TrainOpen, timeout_s=self._trainer.limits.open_timeout_s)
            async with self._open(opening, channel) as run:
                if opening.upstream is None or opening.next is None:
                    channel.incoming.max_payload_bytes = self._max_payload_bytes
                channel.send(self._opened())
                await self._serve(run)

    async def handle_push(self, stream: Stream) -> None:
        """The rows that a previous hop pushes into one run, and the gradients that go back there."""
        channel = Channel(stream, TRAIN_PUSH_TABLE, Role.LISTENER)
        channel.incoming.max_payload_bytes = MAX_OPENING_PAYLOAD_BYTES
        async with answering_errors(channel):
            with self._gate.being_opened(channel.peer_id):
                opening = await channel.expect(PushOpen, timeout_s=self._trainer.limits.open_timeout_s)
                channel.pause()  # or what it sends already would pile up meanwhile
                run = await self._find(opening, channel.peer_id)
            channel.incoming.max_payload_bytes = self._max_payload_bytes
            channel.resume()
            channel.send(self._opened())
            await run.take_rows(channel)

    @contextlib.asynccontextmanager
    async def _open(self, opening: TrainOpen, channel: Channel) -> AsyncIterator[HostedRun]:
        """A run from admission to its end, connected to its next hop."""
        self._check(opening)
        if not self._places.take(channel.peer_id):
            raise BusyError("too many runs of training are open here", retry_after_s=RETRY_AFTER_S)

        async def dial(following: Neighbour, epoch: int) -> Channel:
            return await self._dial_next(PushOpen(opening.run, epoch), following)

        def announce() -> None:
            self._arrivals.announce(opening.run, run.rows.epoch)

        run = HostedRun(opening, channel, self._trainer, dial=dial, on_relink=announce)
        self._runs[opening.run] = run
        announce()
        if self._looks is None:
            self._looks = self._loop.call_later(slow_peers.LOOK_S, self._look)
        try:
            await while_there(channel, run.connect_next())
            yield run
        finally:
            await run.close()
            del self._runs[opening.run]
            self._places.give_back(channel.peer_id)
            self._changed.set()

    async def _serve(self, run: HostedRun) -> None:
        """Until the client leaves or something fails."""
        if self.draining:  # it has come while that was said to the others
            run.announce_leaving()
        await until_one_ends(run.serve_client(), run.wait_ended())

    def _check(self, opening: TrainOpen) -> None:
        check_hosted(
            opening.model,
            opening.span,
            hosted_model=self._model_key,
            hosted_blocks=self._trainer.compute.engine.stack.span,
            draining=self.draining,
        )
        if opening.run in self._runs:
            raise BadMessageError("a run of this id is open already")

    def _opened(self) -> TrainOpened:
        trainer = self._trainer
        dtype = dtype_name(trainer.compute.engine.stack.dtype)
        return TrainOpened(dtype, trainer.max_pass_tokens, trainer.training.max_passes)

    async def _dial_next(self, opening: PushOpen, following: Neighbour) -> Channel:
        limits = self._trainer.limits
        channel, _ = await dial_next(
            self._transport,
            following,
            opening,
            TrainOpened,
            protocol=TRAIN_PUSH,
            table=TRAIN_PUSH_TABLE,
            dial_timeout_s=limits.dial_timeout_s,
            answer_timeout_s=limits.open_timeout_s,
        )
        channel.incoming.max_payload_bytes = self._max_payload_bytes
        return channel

    async def _find(self, opening: PushOpen, peer_id: str) -> HostedRun:
        """The run of a push stream, which may arrive before the client's `train-open` or `relink`."""

        def expecting() -> HostedRun | None:
            run = self._runs.get(opening.session)
            expected = run is not None and (run.rows.peer_id, run.rows.epoch) == (peer_id, opening.epoch)
            return run if expected else None

        if expecting() is None:
            timeout_s = self._trainer.limits.open_timeout_s
            await self._arrivals.wait(opening.session, opening.epoch, timeout_s)
        run = expecting()
        if run is None or run.ended:
            # One answer for all, so that nobody learns of others' runs.
            raise UnknownSessionError("no run of this id expects rows from you")
        return run

    def _look(self) -> None:
        """While there are runs: look after what has no end."""
        self._looks = None
        if self._runs:
            now = self._loop.time()
            for run in list(self._runs.values()):
                run.look_after(now)
            self._looks = self._loop.call_later(slow_peers.LOOK_S, self._look)
