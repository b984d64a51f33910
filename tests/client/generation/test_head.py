"""One product for all rows that have arrived: each gets its own token, in the loop or from the thread."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from petal_swarm.client.generation import head as head_module
from petal_swarm.client.generation.head import Head, Scored
from petal_swarm.client.generation.request import Sampling
from petal_swarm.client.generation.sampling import Sampler
from petal_swarm.errors import NotFiniteError
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.ends import Ends, load_ends
from tests.checkpoints import save_bloom

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    folder = save_bloom(tmp_path_factory.mktemp("bloom"), blocks=1, hidden=32)
    return load_ends(open_checkpoint(str(folder)), dtype=torch.float32)


class Watched:
    """The ends of a model, and which threads asked them for how many rows."""

    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self.batches: list[tuple[int, bool]] = []

    def lm_head(self) -> Any:
        return self._ends.lm_head()

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        self.batches.append((len(rows), threading.current_thread() is threading.main_thread()))
        return self._ends.logits(rows)


@pytest.fixture
def watched(ends: Ends) -> Watched:
    return Watched(ends)


@pytest.fixture(params=["in the loop", "in the thread"])
def in_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    inside = request.param == "in the loop"
    monkeypatch.setattr(head_module, "RUN_NOW_S", 1e9 if inside else 0.0)
    monkeypatch.setattr(head_module, "_FIRST_S", 0.0)
    return inside


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def greedy(count: int) -> list[Sampler]:
    return [Sampler(GREEDY, ()) for _ in range(count)]


def test_what_arrives_together_is_one_product(ends: Ends, watched: Watched, in_loop: bool) -> None:
    async def work() -> list[list[Scored]]:
        head = Head(watched)  # type: ignore[arg-type]
        try:
            return await asyncio.gather(
                *(head.choose(rows(count, count), greedy(count), top=None) for count in (1, 2, 5))
            )
        finally:
            await head.close()

    found = asyncio.run(work())
    assert watched.batches == [(8, in_loop)]
    for count, scored in zip((1, 2, 5), found, strict=True):
        expected = ends.logits(rows(count, count)).argmax(-1).tolist()
        assert scored == [Scored(token) for token in expected]


def test_what_arrives_meanwhile_is_the_next(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "RUN_NOW_S", 0.0)
    let_go = threading.Event()
    honest = watched.logits

    def slow(given: torch.Tensor) -> torch.Tensor:
        let_go.wait(60)
        return honest(given)

    monkeypatch.setattr(watched, "logits", slow)

    async def work() -> None:
        head = Head(watched)  # type: ignore[arg-type]
        first = asyncio.ensure_future(head.choose(rows(1), greedy(1), top=None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        others = [asyncio.ensure_future(head.choose(rows(1), greedy(1), top=None)) for _ in range(3)]
        gone = asyncio.ensure_future(head.choose(rows(1), greedy(1), top=None))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        let_go.set()
        await asyncio.gather(first, *others)
        await head.close()

    asyncio.run(work())
    assert [count for count, _ in watched.batches] == [1, 3]


def test_a_batch_has_bounds(watched: Watched, in_loop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "MAX_LOGIT_BYTES", 5 * 4000)
    monkeypatch.setattr(head_module, "MAX_PIECE_BYTES", 2 * 4000)

    async def work() -> tuple[list[Scored], list[Scored]]:
        head = Head(watched)  # type: ignore[arg-type]
        given = list(range(7))
        both = await asyncio.gather(
            head.score(rows(7), given, top=0), head.choose(rows(9), greedy(9), top=None)
        )
        await head.close()
        return both

    scored, chosen = asyncio.run(work())
    assert [one.token for one in scored] == list(range(7))
    assert len(chosen) == 9
    assert sorted(count for count, _ in watched.batches) == [1, 2, 2, 2, 9]


def test_probabilities_are_of_the_logits_as_they_are(ends: Ends, in_loop: bool) -> None:
    given = Sampling(temperature=0, logit_bias={3: 100}, presence_penalty=2)

    async def work() -> tuple[list[Scored], list[Scored]]:
        head = Head(ends)
        both = await asyncio.gather(
            head.choose(rows(2), [Sampler(given, ()), Sampler(GREEDY, ())], top=2),
            head.score(rows(2), [5, 6], top=1),
        )
        await head.close()
        return both

    chosen, scored = asyncio.run(work())
    theirs = ends.logits(rows(2)).log_softmax(-1)
    assert [one.token for one in chosen] == [3, int(theirs[1].argmax())]
    for one, row in zip((*chosen, *scored), (*theirs, *theirs), strict=True):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
    assert [[token for token, _ in one.top] for one in chosen] == theirs.topk(2).indices.tolist()
    assert [len(one.top) for one in scored] == [1, 1]
    assert chosen[1].top[0][1] == pytest.approx(float(theirs[1].max()), abs=1e-4)


def test_who_sends_numbers_that_are_none_fails_alone(ends: Ends, in_loop: bool) -> None:
    async def work() -> list[Any]:
        head = Head(ends)
        given = (rows(2), rows(1) / 0, rows(1))
        found = await asyncio.gather(
            *(head.choose(some, greedy(len(some)), top=None) for some in given), return_exceptions=True
        )
        await head.close()
        return found

    fine, failed, also_fine = asyncio.run(work())
    assert isinstance(failed, NotFiniteError)
    assert fine[0] == also_fine[0]


def test_short_batches_come_back_into_the_loop(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "RUN_NOW_S", 1.0)
    monkeypatch.setattr(head_module, "_FIRST_S", 2.0)

    async def work() -> None:
        head = Head(watched)  # type: ignore[arg-type]
        for _ in range(9):
            await head.choose(rows(1), greedy(1), top=None)
        await head.close()

    asyncio.run(work())
    assert watched.batches[0] == (1, False), "how long it takes is not known before"
    assert watched.batches[-1] == (1, True)


@pytest.mark.parametrize(("company", "batches"), [(4.0, [2]), (1.0, [1, 1])])
def test_rows_that_usually_come_together_wait_for_each_other(
    watched: Watched, company: float, batches: list[int]
) -> None:
    head = Head(watched)  # type: ignore[arg-type]
    head._batch_s, head._company = 0.2, company

    async def run() -> None:
        first = asyncio.ensure_future(head.choose(rows(1), [Sampler(GREEDY, ())], top=None))
        for _ in range(5):
            await asyncio.sleep(0)
        await asyncio.gather(first, head.choose(rows(1), [Sampler(GREEDY, ())], top=None))
        await head.close()

    asyncio.run(run())
    assert [count for count, _ in watched.batches] == batches


def test_a_large_piece_of_a_prompt_is_not_for_the_loop(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "RUN_NOW_S", 1e9)

    async def work() -> None:
        head = Head(watched)  # type: ignore[arg-type]
        count = head_module.RUN_NOW_ROWS + 1
        await head.score(rows(count), [1] * count, top=0)
        await head.choose(rows(1), greedy(1), top=None)
        await head.close()

    asyncio.run(work())
    assert [inside for _, inside in watched.batches] == [False, True]
