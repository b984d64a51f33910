"""One run of training at one hop: rows in and on, gradients in and back, each pass for itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from petal_swarm.errors import (
    BadMessageError,
    IdleError,
    NetworkError,
    ProtocolError,
    TooSlowError,
)
from petal_swarm.net.channel import Channel
from petal_swarm.server.results import error_message
from petal_swarm.server.slow_peers import SlowReader, SlowWriter
from petal_swarm.server.streams import ends
from petal_swarm.server.training.onward import Dial, Onward
from petal_swarm.server.training.passes import RunPasses, Trainer, Ways
from petal_swarm.server.training.ways import Outputs, Way
from petal_swarm.server.upstream import Upstream
from petal_swarm.wire.messages import Message
from petal_swarm.wire.messages.repair import Leaving, Lost, Probe, Rerouted
from petal_swarm.wire.messages.tuning import (
    Backward,
    Finish,
    Forward,
    Relink,
    TrainOpen,
)


class HostedRun:
    """The hop's side of a run. Lives in the event loop; passes are computed in another thread.

    Its neighbours may be lost and replaced; it ends with the client's stream, with an error of its own, or
    when nobody has replaced a lost neighbour for too long.
    """

    def __init__(
        self,
        opening: TrainOpen,
        client: Channel,
        trainer: Trainer,
        *,
        dial: Dial,
        on_relink: Callable[[], None],
    ) -> None:
        self.opening = opening
        self._client = client
        self._trainer = trainer
        self._on_relink = on_relink
        self._loop = asyncio.get_running_loop()
        self._epoch = opening.epoch
        self._last_active = self._loop.time()
        self._unrepaired: asyncio.TimerHandle | None = None
        self._client_ended: asyncio.Future[None] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._hushed: asyncio.Task[None] | None = None
        #: What there is to say before the client has its answer to `train-open`.
        self._unsaid: list[Message] | None = []
        self._sent_bytes = 0
        limits = trainer.limits
        self._slow_client = SlowWriter(limits)
        self._slow_answers = SlowReader(limits)
        self._slow_upstream = SlowReader(limits)
        self._usages = [trainer.quotas.open(client.peer_id) for _ in range(2)]
        self._passes = RunPasses(opening, client.peer_id, trainer, self._tell)
        self._connect_ways(dial)

    def _connect_ways(self, dial: Dial) -> None:
        """Who sends what, and where to; see section 12 of the protocol."""
        opening, client, limits, passes = self.opening, self._client, self._trainer.limits, self._passes
        is_first, is_last = opening.upstream is None, opening.next is None
        self._up = Way(passes.gradient_of)
        self._down = Way(passes.output_of)
        self.rows = self._gradients = Upstream(
            opening.upstream,
            opening.epoch,
            limits,
            self._usages[0],
            output=client if is_last else Outputs(client, self._down),
            on_stuck=_let_be,
        )
        if not (is_first and is_last):  # else all comes by the one stream of the client
            self._gradients = Upstream(
                None if opening.next is None else opening.next.peer_id,
                opening.epoch,
                limits,
                self._usages[1],
                output=client if is_first else Outputs(client, self._up),
                on_stuck=_let_be,
            )
        self._onward: Onward | None = None
        if not is_last:
            self._onward = Onward(
                dial,
                self._down,
                self._gradients,
                tell=self._tell,
                on_change=self._links_changed,
                hear=self._gradient_came,
                slow=SlowReader(limits),
            )
        up, down = None if is_first else self._up, None if is_last else self._down
        passes.attach(Ways(self.rows, self._gradients, down, up))

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    async def connect_next(self) -> None:
        """Connect to the next hop, if one follows.

        Raises:
            HopLostError: it cannot be reached, or refuses.
        """
        if self._onward is not None and self.opening.next is not None:
            await self._onward.connect(self.opening.next, self.opening.epoch)

    async def serve_client(self) -> None:
        """Take what the client says until it leaves.

        Raises:
            RemoteProtocolError, RemoteError: a message that is not valid.
        """
        unsaid, self._unsaid = self._unsaid or [], None
        for message in unsaid:
            self._tell(message)
        ended, on_part = self._client_ended, None
        for way_in in (self.rows, self._gradients):
            if way_in.peer_id is None:
                way_in.source, on_part = self._client, way_in.part_came

        def on_message(message: Message) -> None:
            if not self.ended:
                self._hear(message)

        self._client.subscribe(on_message, ends(ended), on_part)
        await ended

    def _hear(self, message: Message) -> None:
        """One message of the client."""
        self._last_active = self._loop.time()
        if isinstance(message, Forward):
            if self.rows.source is not self._client:
                raise BadMessageError("rows of this run come from its upstream hop")
            self._passes.take_forward(message)
            self.rows.throttle()
        elif isinstance(message, Backward):
            if self._gradients.source is not self._client:
                raise BadMessageError("gradients of this run come from its next hop")
            self._passes.take_backward(message)
            self._gradients.throttle()
        elif isinstance(message, Finish):
            self._passes.finish(message.numbers)
        elif isinstance(message, Relink):
            self._relink(message)
        elif isinstance(message, Probe):
            self._tell(self._passes.states(message.number))
        else:
            raise BadMessageError(f"expected a pass, got {message.type!r}")
        if self._client.congested and self._hushed is None and not self.ended:
            self._client.pause()
            self._hushed = self._loop.create_task(self._listen_again())

    async def _listen_again(self) -> None:
        """Who takes no answers is asked no questions."""
        with contextlib.suppress(NetworkError):  # whoever reads from it hears of it too
            await self._client.drain()
        self._hushed = None
        if not self._waits_for_us:
            self._client.resume()

    @property
    def _waits_for_us(self) -> bool:
        """Whether the client has to wait with rows, or gradients, until others are computed."""
        ways_in = (self.rows, self._gradients)
        return any(way_in.source is self._client and way_in.is_throttled for way_in in ways_in)

    def _relink(self, told: Relink) -> None:
        if told.epoch <= self._epoch:
            raise BadMessageError(f"epoch {told.epoch} comes after epoch {self._epoch}")
        if told.upstream is not None and self.opening.upstream is None:
            raise BadMessageError("the first hop gets its rows from the client")
        if told.next is not None and self._onward is None:
            raise BadMessageError("the last hop has no next one")
        self._epoch = told.epoch
        self._passes.tell_failed_of(told.passes)
        passes = self._passes.known(told.passes)  # others are sent on when they are computed
        if told.upstream is not None:
            self._up.disconnect()
            self._up.owe(passes)
            self.rows.reroute(told.upstream, told.epoch)
            self._on_relink()
            self._links_changed()
        if told.next is None:
            self._tell(Rerouted(told.epoch))
        else:
            assert self._onward is not None
            self._down.owe(passes)
            self._onward.relink(told.next, told.epoch)

    async def take_rows(self, source: Channel) -> None:
        """Take the rows that the hop before this one pushes, and push gradients back, until either ends.

        Raises:
            RemoteProtocolError, RemoteError: a message that is not valid. The link is lost.
        """
        if self.ended:
            return
        epoch = self.rows.epoch

        def on_message(message: Message) -> None:
            if not self.ended:
                assert isinstance(message, Forward), "the table allows nothing else"
                self._last_active = self._loop.time()
                self._passes.take_forward(message)
                self.rows.throttle()

        self._up.connect(source)
        self._links_changed()
        lost = True
        try:
            lost = await self.rows.take_from(source, on_message)
        finally:
            if self._up.channel is source:
                self._up.disconnect()
            if lost and not self.ended:
                self._tell(Lost(epoch, upstream=True, reason=f"no more rows from {source.peer_id}"))
                self._links_changed()

    def _gradient_came(self, message: Backward) -> None:
        if not self.ended:
            self._last_active = self._loop.time()
            self._passes.take_backward(message)

    def _links_changed(self) -> None:
        """A neighbour is lost, or there is a new one."""
        if self._unrepaired is not None:
            self._unrepaired.cancel()
            self._unrepaired = None
        no_next = self._onward is not None and not self._onward.is_connected
        no_upstream = self.opening.upstream is not None and self._up.channel is None
        if self.ended or not (no_next or no_upstream):
            return
        limit_s = self._trainer.training.repair_timeout_s
        idle = IdleError(f"a neighbour in the run was lost, and not replaced for {limit_s:g} s")
        self._unrepaired = self._loop.call_later(limit_s, self.fail, idle)

    def announce_leaving(self) -> None:
        """Ask the client to let another server take this one's place."""
        self._tell(Leaving())

    def _tell(self, message: Message) -> None:
        """Say something to the client, who may have just ended the run."""
        if self._unsaid is not None:
            self._unsaid.append(message)
        elif not self.ended:
            self._sent_bytes += len(getattr(message, "payload", b""))
            with contextlib.suppress(ProtocolError):
                self._client.send(message)

    def look_after(self, now: float) -> None:
        """End what has no end: half a message, results that nobody takes, passes and runs left alone."""
        if self.ended:
            return
        self._passes.expire()
        training = self._trainer.training
        if not self._passes.computing and now - self._last_active > training.idle_timeout_s:
            self.fail(IdleError(f"the run was idle for {training.idle_timeout_s:g} s"))
            return
        excused = self._hushed is not None or self._waits_for_us
        if self._slow_client.is_too_slow(now, self._client.incoming, excused=excused):
            self.fail(TooSlowError("a part of a message came, and its rest did not come in time"))
            return
        unsent_bytes = self._client.unsent_bytes
        if self._slow_answers.is_too_slow(now, sent_bytes=self._sent_bytes, unsent_bytes=unsent_bytes):
            self.fail(TooSlowError("results were not read in time"))
            return
        if self._onward is not None:
            self._onward.cut_off_if_slow(now)
        if self._up.channel is not None:
            self._cut_off_slow_upstream(now)

    def _cut_off_slow_upstream(self, now: float) -> None:
        up = self._up
        if self.rows.is_too_slow(now):
            self._lose_upstream("the hop before sent a part of its rows and not the rest")
        elif self._slow_upstream.is_too_slow(now, sent_bytes=up.sent_bytes, unsent_bytes=up.unsent_bytes):
            self._lose_upstream("the hop before took nothing for too long")

    def _lose_upstream(self, reason: str) -> None:
        if self._up.channel is not None:
            self._up.disconnect()
            self.rows.leave()
            self._tell(Lost(self.rows.epoch, upstream=True, reason=reason))
            self._links_changed()

    def fail(self, error: Exception) -> None:
        """End the run with an error to the client."""
        if self.ended:
            return
        self._end()
        with contextlib.suppress(ProtocolError):
            self._client.send(error_message(error))

    async def close(self) -> None:
        """End the run, drop its passes and close the streams to its neighbours. Idempotent."""
        self._end()
        for usage in self._usages:
            usage.close()
        for timer in (self._unrepaired, self._hushed):
            if timer is not None:
                timer.cancel()
        self._up.disconnect()
        if self._onward is not None:
            await self._onward.close()

    async def wait_ended(self) -> None:
        await self._ended.wait()

    def _end(self) -> None:
        if not self.ended:
            self._ended.set()
            for way_in in (self.rows, self._gradients):
                way_in.close()
            if not self._client_ended.done():
                self._client_ended.set_result(None)
            self._passes.close()


def _let_be(_: NetworkError | TimeoutError) -> None:
    """Results may be large and links slow: who takes nothing at all is found by looking."""
