"""Audits of a session's hops: some steps are computed again by another server, and compared.

A hop cannot tell which: the rows that went in come from the hop before it (or the client's own log), those
that came out from the hop behind it (or the client's own answer), and the other server sees an ordinary
session. Everything runs beside the session, and no step waits for it. docs/decisions/0020-audits.md
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import secrets
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from petal_swarm.client.adapters import Adapter, NamedAdapter, ensure_adapter, name_at
from petal_swarm.client.audit import Precision, Verdict, compare
from petal_swarm.client.audit_ledger import Audit, AuditLedger, AuditSampler, order_auditors
from petal_swarm.client.members import Member, open_hop
from petal_swarm.client.ring import Ring
from petal_swarm.client.view import ModelRef, View, offering
from petal_swarm.errors import ConfigError, HopLostError, PetalSwarmError, RemoteProtocolError
from petal_swarm.net.transport import Transport
from petal_swarm.routing.route import Hop
from petal_swarm.span import Slice
from petal_swarm.wire.messages.audit import DIGEST_BYTES, Recall, Recalled
from petal_swarm.wire.messages.opening import SESSION_ID_BYTES, Open
from petal_swarm.wire.messages.parts import NO_STEP
from petal_swarm.wire.messages.steps import Output, Rows, Step
from petal_swarm.wire.step_log import join_steps
from petal_swarm.wire.tensors import decode_tensor

logger = logging.getLogger(__name__)

RECALL_TIMEOUT_S = 10.0
OPEN_TIMEOUT_S = 10.0
RECOMPUTE_TIMEOUT_S = 120.0
#: Rows of so many steps are compared together: a typical row is judged more strictly than one alone.
WINDOW = 8
#: Steps larger than this are not kept by who received them.
MAX_STEP_BYTES = 256 << 10
#: Audits of one session that wait for their turn.
MAX_WAITING = 64


@dataclass(frozen=True, slots=True)
class _Testimony:
    """What came out of a hop for some steps in a row, by number, and the hop's own word on what went in."""

    claimed: dict[int, torch.Tensor]
    received_digest: bytes
    sources: frozenset[str]


class _Bench:
    """A session at one auditor, which has computed the audited hop's inputs up to step `up_to`.

    It numbers its steps itself: it may be asked for rows again.
    """

    def __init__(self, member: Member, precision: Precision) -> None:
        self.member = member
        self.precision = precision
        self.up_to = NO_STEP
        self.next_number = 0

    @property
    def peer_id(self) -> str:
        return self.member.peer_id


class Auditor:
    """Audits one ring; `observe` its outputs, `close` it with the ring. Lives in the event loop."""

    def __init__(
        self,
        view: View,
        transport: Transport,
        model: ModelRef,
        ledger: AuditLedger,
        *,
        max_length: int,
        rate: float,
        rng: random.Random | None = None,
        adapter: Adapter | NamedAdapter | None = None,
    ) -> None:
        self._adapter = adapter
        self._view = view
        self._transport = transport
        self._model = model
        self._ledger = ledger
        self._max_length = max_length
        self._rng = rng or random.SystemRandom()
        self._sampler = AuditSampler(rate, self._rng)
        self._numbers = count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._benches: dict[str, list[_Bench]] = {}
        self._outputs: deque[Output] = deque(maxlen=WINDOW)
        self._members: tuple[Member, ...] = ()
        #: The last step that may have been computed by others than the members of now.
        self._since = NO_STEP

    def observe(self, ring: Ring, output: Output) -> None:
        """An answer has come: perhaps audit what hops did for it."""
        if self._members != tuple(ring.members):
            # What others computed before is not to be held against those who took their place.
            self._since = ring.last_sent if self._members else NO_STEP
            self._members = tuple(ring.members)
            self._outputs.clear()
        if output.step <= self._since:
            return
        self._outputs.append(output)
        for index in range(len(ring.members)):
            if self._sampler.picks():
                self._begin(ring, index, output)

    def _begin(self, ring: Ring, index: int, output: Output) -> None:
        steps = ring.log.between(max(self._since + 1, output.step - WINDOW + 1), output.step)
        window = _window([step for step in steps if _decodes(step)])
        if not window or window[-1].step != output.step or ring.is_broken:
            return
        if len(self._tasks) >= MAX_WAITING:
            logger.debug("more audits are due than can be done")
            return
        numbers = [step.step for step in window]
        task = asyncio.get_running_loop().create_task(self._audit(ring, index, numbers, list(self._outputs)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Drop what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        benches = [bench for benches in self._benches.values() for bench in benches]
        self._benches.clear()
        await asyncio.gather(*(bench.member.channel.close() for bench in benches))

    async def _audit(self, ring: Ring, index: int, numbers: list[int], outputs: list[Output]) -> None:
        members = list(ring.members)
        audited = members[index]
        before = members[index - 1] if index else None
        after = members[index + 1] if index + 1 < len(members) else None
        try:
            told = await self._hear(audited, after, numbers, outputs)
            async with self._turn:
                if audited in ring.members:
                    await self._judge(ring, audited, before, told)
        except ConfigError as error:
            logger.info("cannot audit %s: %s", audited.peer_id, error)
        except (PetalSwarmError, TimeoutError) as error:
            logger.debug("an audit of %s came to nothing: %s", audited.peer_id, error or "timeout")

    async def _hear(
        self, audited: Member, after: Member | None, numbers: list[int], outputs: list[Output]
    ) -> _Testimony:
        """What came out of the hop for these steps, or the last of them.

        Raises:
            HopLostError: it is not known any more.
        """
        received = await self._recall(audited, numbers, received=True)
        if not received or received[-1].step != numbers[-1]:
            raise HopLostError("what the hop received is not known any more")
        claimed: dict[int, torch.Tensor]
        sources: frozenset[str] = frozenset()
        if after is None:
            claimed = {
                output.step: decode_tensor(output.tensor, output.payload)
                for output in outputs
                if output.step in numbers
            }
        else:
            got = await self._recall(after, numbers, received=True)
            sent = await self._recall(audited, numbers, received=False)
            # What it says itself that it sent rests on nobody else's word.
            if [bytes(each.payload) for each in sent] != [bytes(each.payload) for each in got]:
                sources = frozenset((after.peer_id,))
            claimed = {each.step: decode_tensor(each.tensor, each.payload) for each in got}
        return _Testimony(claimed, received[-1].digest, sources)

    async def _recall(self, member: Member, numbers: list[int], *, received: bool) -> list[Recalled]:
        question = Recall(next(self._numbers), received=received, first=numbers[0], last=numbers[-1])
        found = await member.recall(question, RECALL_TIMEOUT_S)
        return [recalled for recalled in found if recalled.step in numbers]

    async def _judge(self, ring: Ring, audited: Member, before: Member | None, told: _Testimony) -> None:
        """Have the steps computed again, and draw the consequences.

        Raises:
            PetalSwarmError: somebody who is needed for it failed.
        """
        hop = audited.hop
        precision = Precision(hop.dtype, hop.quant, hop.kv_dtype)
        benches = await self._open_benches(ring, audited, precision)
        if not benches:
            logger.debug("nobody else serves %s: no audit of %s", hop.span, audited.peer_id)
            return
        last = max(told.claimed, default=NO_STEP)
        steps = [step async for step in self._history(ring, before, last)]
        window = _window([step for step in steps if step.step in told.claimed and _decodes(step)])
        if not window or window[-1].step != last:
            raise HopLostError("the steps are not known any more one by one")
        sources = set(told.sources)
        if before is not None and _digest(steps) != told.received_digest:
            sources.add(before.peer_id)
        earlier = [step for step in steps if step.step < window[0].step]
        first = await self._recompute(benches[0], earlier, window)
        verdict = _compare(window, told.claimed, first, precision, benches[0].precision, len(hop.span))
        if verdict.ok:
            self._ledger.record_pass()
            return
        audit = Audit(audited.peer_id, benches[0].peer_id, frozenset(sources))
        suspects = audit.suspects(verdict)
        if len(benches) > 1:
            other = benches[1]
            third = await self._recompute(other, earlier, window)
            suspects = audit.settled(
                verdict,
                other.peer_id,
                _compare(window, told.claimed, third, precision, other.precision, len(hop.span)),
                _compare(window, first, third, benches[0].precision, other.precision, len(hop.span)),
            )
        self._accuse(ring, suspects, f"{audited.peer_id}: {verdict.difference}", (ring.session, last))

    def _accuse(self, ring: Ring, suspects: frozenset[str], what: str, audit: tuple[bytes, int]) -> None:
        logger.warning("an audit failed: %s", what)
        ban = self._ledger.record(suspects, what, now_s=asyncio.get_running_loop().time(), audit=audit)
        if ban is None:
            return
        logger.warning("%s", ban)
        self._view.avoidance.ban(ban.peer_id, str(ban))
        for member in ring.members:
            if member.peer_id == ban.peer_id:
                logger.warning(
                    "%s took part in this session: what it answered so far may be wrong", ban.peer_id
                )
                ring.distrust(member, HopLostError(f"{ban.peer_id} is banned", peer_id=ban.peer_id))

    async def _open_benches(self, ring: Ring, audited: Member, precision: Precision) -> list[_Bench]:
        """Up to two servers that can compute the hop's blocks again."""
        benches = self._benches.setdefault(audited.peer_id, [])
        benches[:] = [bench for bench in benches if bench.member.error is None]
        busy = {member.peer_id for member in ring.members} | {bench.peer_id for bench in benches}
        known = {
            announcement.peer_id: announcement
            for announcement in offering(self._model, await self._view.announcements(self._model.key))
            if announcement.span.covers(audited.hop.span)
            and announcement.state == "serving"
            and announcement.peer_id not in busy | self._view.avoidance.peers()
        }
        precisions = {}
        for peer_id, announcement in known.items():
            with contextlib.suppress(ConfigError):
                precisions[peer_id] = Precision.of(announcement)
        ordered = order_auditors(precision, precisions, blocks=len(audited.hop.span), rng=self._rng)
        for peer_id in ordered:
            if len(benches) >= 2:
                break
            hop = Hop(peer_id, audited.hop.span, known[peer_id].addresses)
            with contextlib.suppress(PetalSwarmError):
                benches.append(_Bench(await self._open(hop), precisions[peer_id]))
        return list(benches)

    async def _open(self, hop: Hop) -> Member:
        opening = Open(
            session=secrets.token_bytes(SESSION_ID_BYTES),
            epoch=0,
            model=self._model.key,
            span=hop.span,
            max_length=self._max_length,
            adapter=None if self._adapter is None else name_at(self._adapter, hop.span),
        )
        if self._adapter is not None and not isinstance(self._adapter, NamedAdapter):
            await ensure_adapter(self._transport, hop, self._model.key, self._adapter, OPEN_TIMEOUT_S)
        return await open_hop(
            self._transport,
            hop,
            opening,
            OPEN_TIMEOUT_S,
            lambda hop: self._view.is_there(hop, OPEN_TIMEOUT_S),
        )

    async def _history(self, ring: Ring, before: Member | None, last: int) -> AsyncIterator[Step]:
        """All that went into a hop, from the beginning up to step `last`.

        Raises:
            HopLostError: it is not known any more.
        """
        number = NO_STEP
        while number < last:
            if before is None:
                steps = [step for step in ring.log.after(number) or () if step.step <= last]
            else:
                question = Recall(next(self._numbers), received=False, first=number + 1, last=last)
                steps = [_step(recalled) for recalled in await before.recall(question, RECALL_TIMEOUT_S)]
            if not steps or steps[0].step <= number:
                raise HopLostError("what went into the hop is not known any more")
            for step in steps:
                yield step
            number = steps[-1].step

    async def _recompute(
        self, bench: _Bench, earlier: Sequence[Step], window: Sequence[Step]
    ) -> dict[int, torch.Tensor]:
        """The rows of the steps of `window`, by number, as the bench's server computes them.

        Raises:
            PetalSwarmError: it fails, and is not used again.
        """
        channel = bench.member.channel
        missing = [step for step in earlier if step.step > bench.up_to]
        rows: dict[int, torch.Tensor] = {}
        try:
            for step in join_steps(missing, bench.member.opened.max_batch_tokens):
                channel.send(_bench_step(bench, step, "none"))
            asked = [_bench_step(bench, step, "all") for step in window]
            for step in asked:
                channel.send(step)
            for step, own in zip(window, asked, strict=True):
                output = await channel.expect(Output, timeout_s=RECOMPUTE_TIMEOUT_S)
                if output.step != own.step:
                    raise RemoteProtocolError(f"peer {bench.peer_id} answered another step")
                rows[step.step] = decode_tensor(output.tensor, output.payload)
        except BaseException as error:
            if isinstance(error, PetalSwarmError):
                bench.member.lose(error)
            channel.abort()
            raise
        bench.up_to = window[-1].step
        return rows


def _bench_step(bench: _Bench, step: Step, rows: Rows) -> Step:
    """A step of the bench's session with the same contents."""
    number = bench.next_number
    bench.next_number += 1
    return Step(number, 0, step.slices, step.tensor, step.payload, rows, step.forks)


def _decodes(step: Step) -> bool:
    """Whether each sequence gets one token: then all rows are answered, and the step is small."""
    return len(step.slices) == step.tensor.shape[0] and step.tensor.nbytes <= MAX_STEP_BYTES


def _window(steps: Sequence[Step]) -> list[Step]:
    """The last steps that each append one token to the same sequences."""
    window: list[Step] = []
    for step in reversed(steps):
        following = window[0] if window else None
        if following is not None and (
            following.forks is not None
            or [(piece.sequence, piece.end) for piece in step.slices]
            != [(piece.sequence, piece.position) for piece in following.slices]
        ):
            break
        window.insert(0, step)
    return window


def _compare(
    window: Sequence[Step],
    claimed: Mapping[int, torch.Tensor],
    recomputed: Mapping[int, torch.Tensor],
    audited: Precision,
    auditor: Precision,
    blocks: int,
) -> Verdict:
    """The worst verdict over the sequences, each with its rows of all steps."""
    worst = Verdict(0.0)
    inputs = [decode_tensor(step.tensor, step.payload) for step in window]
    for row, piece in enumerate(window[0].slices):
        verdict = compare(
            torch.stack([rows[row] for rows in inputs]),
            _of_sequence(claimed, window, row),
            _of_sequence(recomputed, window, row),
            audited,
            auditor,
            blocks=blocks,
            position=piece.position,
        )
        if worst.ok and (not verdict.ok or verdict.ratio > worst.ratio):
            worst = verdict
    return worst


def _of_sequence(rows: Mapping[int, torch.Tensor], window: Sequence[Step], row: int) -> torch.Tensor:
    parts = [rows[step.step] for step in window]
    if any(part.shape[0] <= row for part in parts):
        return parts[0][:0]  # of a wrong shape: whoever compares says so
    return torch.stack([part[row] for part in parts])


def _digest(steps: Sequence[Step]) -> bytes:
    """As a hop makes it of what it receives."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for step in steps:
        digest.update(step.payload)
    return digest.digest()


def _step(recalled: Recalled) -> Step:
    slices = tuple(Slice(*piece) for piece in recalled.slices)
    return Step(recalled.step, 0, slices, recalled.tensor, recalled.payload, "none", recalled.forks)
