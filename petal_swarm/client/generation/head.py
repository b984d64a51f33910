"""The LM head for all answers at once: one product for the rows that have arrived, then one choice each.

Where that is short it runs in the event loop, right after what came in the same moment. Where it is
long, as for a large vocabulary, it runs in a thread, and what arrives meanwhile makes up the next batch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from petal_swarm.client.generation.sampling import Sampler, choose
from petal_swarm.errors import NotFiniteError, StreamClosedError
from petal_swarm.models.ends import Ends
from petal_swarm.models.finite import all_finite

#: A batch that should take less than this runs in the event loop: two hand-overs between threads cost
#: about as much on a busy machine, and a loop may well be held up for that long.
RUN_NOW_S = 0.0005
#: Nor does one of more rows: it is not like those that were measured, but a piece of a long prompt.
RUN_NOW_ROWS = 64
#: Logits of one batch, and of one piece of a prompt.
MAX_LOGIT_BYTES = 128 << 20
MAX_PIECE_BYTES = 16 << 20
_SMOOTHING = 0.2
#: Rows of sessions that decode together arrive one after the other. If the first of them went alone, the
#: servers would get them apart as well, and compute them so: a batch in the thread waits for this part of
#: what one takes, if batches are mostly of several.
LINGER = 1 / 4
_FIRST_S = 1e-3


class Scored(NamedTuple):
    """A token, the logarithm of its probability where it was asked for, and the likeliest in its place."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class _Job(NamedTuple):
    """Rows that arrived together, and what is wanted for each: a choice, or the probability of a token.

    `top` is how many likeliest tokens to tell, None if no probabilities are wanted.
    """

    rows: Tensor
    wanted: Sequence[Sampler | int]
    top: int | None
    result: asyncio.Future[list[Scored]]


class Head:
    """Lives in one event loop; `close` ends its thread."""

    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self._row_bytes = 4 * ends.lm_head().shape[0]
        self._waiting: list[_Job] = []
        self._scheduled = False
        self._closed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="petal-swarm-head")
        #: Running mean of what a batch takes; the first one may be long.
        self._batch_s = _FIRST_S
        #: Running mean of how many came together.
        self._company = 1.0

    async def choose(self, rows: Tensor, samplers: Sequence[Sampler], *, top: int | None) -> list[Scored]:
        """What follows each of `rows [answers, hidden_size]`, by its sampler.

        Raises:
            NotFiniteError: a row is infinite or undefined somewhere.
        """
        return await self._add(rows, samplers, top)

    async def score(self, rows: Tensor, given: Sequence[int], *, top: int) -> list[Scored]:
        """How probable the tokens `given` were after `rows [tokens, hidden_size]`, in pieces.

        Raises:
            NotFiniteError: a row is infinite or undefined somewhere.
        """
        piece = max(1, MAX_PIECE_BYTES // self._row_bytes)
        scored: list[Scored] = []
        for start in range(0, len(given), piece):
            some = slice(start, start + piece)
            scored += await self._add(rows[some], given[some], top)
        return scored

    async def close(self) -> None:
        """Wait for the batch that is being computed, and refuse the rest. Idempotent."""
        self._closed = True
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            if not job.result.done():
                job.result.set_exception(_closed())
        await asyncio.to_thread(self._pool.shutdown)

    def _add(
        self, rows: Tensor, wanted: Sequence[Sampler | int], top: int | None
    ) -> asyncio.Future[list[Scored]]:
        if self._closed:
            raise _closed()
        loop = asyncio.get_running_loop()
        result: asyncio.Future[list[Scored]] = loop.create_future()
        self._waiting.append(_Job(rows, wanted, top, result))
        if not self._scheduled:
            self._scheduled = True
            if self._batch_s < RUN_NOW_S or self._company < 2:
                loop.call_soon(self._begin)
            else:
                loop.call_later(self._batch_s * LINGER, self._begin)
        return result

    def _begin(self) -> None:
        """Compute a batch of what waits, here or in the thread."""
        jobs = self._take()
        if not jobs:
            self._scheduled = False
        elif self._batch_s < RUN_NOW_S and sum(len(job.wanted) for job in jobs) <= RUN_NOW_ROWS:
            self._finish(jobs, _guarded(self._ends, jobs))
        else:
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._pool, _guarded, self._ends, jobs)
            work.add_done_callback(lambda done: self._finish(jobs, done.result()))

    def _take(self) -> list[_Job]:
        waiting = [job for job in self._waiting if not job.result.done()]
        taken, room = 0, MAX_LOGIT_BYTES // self._row_bytes
        for job in waiting:
            room -= job.rows.shape[0]
            if taken and room < 0:
                break
            taken += 1
        self._waiting = waiting[taken:]
        return waiting[:taken]

    def _finish(self, jobs: Sequence[_Job], outcome: tuple[list[list[Scored] | Exception], float]) -> None:
        results, took_s = outcome
        self._batch_s += (took_s - self._batch_s) * _SMOOTHING
        self._company += (len(jobs) - self._company) * _SMOOTHING
        for job, result in zip(jobs, results, strict=True):
            if job.result.done():
                continue
            if isinstance(result, Exception):
                job.result.set_exception(result)
            else:
                job.result.set_result(result)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._begin)
        else:
            self._scheduled = False


def _closed() -> StreamClosedError:
    return StreamClosedError("the generator is closed")


@torch.inference_mode()
def _guarded(ends: Ends, jobs: Sequence[_Job]) -> tuple[list[list[Scored] | Exception], float]:
    """What becomes of each job, and how long that took."""
    started_s = time.thread_time()  # not the time in which others had the processor
    results: list[list[Scored] | Exception]
    try:
        results = [*_run(ends, jobs)]
    except Exception as error:
        results = [error] if len(jobs) == 1 else [_guarded(ends, [job])[0][0] for job in jobs]
    return results, time.thread_time() - started_s


def _run(ends: Ends, jobs: Sequence[_Job]) -> list[list[Scored]]:
    rows = jobs[0].rows if len(jobs) == 1 else torch.cat([job.rows for job in jobs])
    if not all_finite(rows):
        raise NotFiniteError("the last hop answered with numbers that are infinite or undefined")
    logits = ends.logits(rows).float()
    wanted = [each for job in jobs for each in job.wanted]
    tops = [job.top for job in jobs for _ in job.wanted]
    told = [row for row, top in enumerate(tops) if top is not None]
    raw = logits[told] if told else None  # a copy, from before the penalties
    tokens = _tokens(logits, wanted)
    scored = [Scored(token) for token in tokens]
    if raw is not None:
        of_told = _probabilities(raw, [tokens[row] for row in told], [tops[row] or 0 for row in told])
        for row, one in zip(told, of_told, strict=True):
            scored[row] = one
    rest = iter(scored)
    return [list(islice(rest, len(job.wanted))) for job in jobs]


def _tokens(logits: Tensor, wanted: Sequence[Sampler | int]) -> list[int]:
    """Those that were given, and for the other rows what their samplers choose."""
    samplers = [each for each in wanted if not isinstance(each, int)]
    if len(samplers) == len(wanted):
        return choose(logits, samplers)
    tokens = [each if isinstance(each, int) else -1 for each in wanted]
    free = [row for row, token in enumerate(tokens) if token < 0]
    if free:
        for row, token in zip(free, choose(logits[free], samplers), strict=True):
            tokens[row] = token
    return tokens


def _probabilities(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Scored]:
    """Of `logits [rows, vocab_size]` as the model has them."""
    total = logits.logsumexp(-1, keepdim=True)
    index = torch.tensor(tokens, device=logits.device)[:, None]
    own: list[float] = (logits.gather(-1, index) - total)[:, 0].tolist()
    values, ids = logits.topk(min(max(tops), logits.shape[-1]))
    likeliest = zip(ids.tolist(), (values - total).tolist(), strict=True)
    return [
        Scored(token, logprob, tuple(zip(its[:top], their[:top], strict=True)))
        for token, logprob, top, (its, their) in zip(tokens, own, tops, likeliest, strict=True)
    ]
