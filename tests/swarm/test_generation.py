"""Answers as streams, in the event loop of a whole swarm: the tokens are those of `generate`."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from petal_swarm.client import async_session, steps
from petal_swarm.client.config import ClientConfig
from petal_swarm.client.generation.generation import Generation
from petal_swarm.client.generation.generator import Generator
from petal_swarm.client.generation.pieces import Piece
from petal_swarm.client.generation.request import GenerationRequest, Sampling
from petal_swarm.client.packing import Chunk
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.directory.memory import MemoryDirectory
from petal_swarm.errors import (
    ConfigError,
    HopLostError,
    MissingBlocksError,
    NotFiniteError,
    StreamClosedError,
)
from petal_swarm.models.ends import load_ends
from petal_swarm.wire.messages.steps import Output, Rows
from tests.checkpoints import VOCABULARY, assert_lively, reference
from tests.cli.tokenizers_of_tests import words
from tests.swarm.local import LocalSwarm

GREEDY = Sampling(temperature=0)
SPANS = ["0:4", "4:8"]
TOKENIZER = words(VOCABULARY)


def prompt(tokens: int, seed: int = 1) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, VOCABULARY, (tokens,), generator=generator).tolist())


def generator_of(swarm: LocalSwarm, **settings: Any) -> Generator:
    """A generator on a client of its own, in the loop of the swarm."""
    client = Swarm(
        ClientConfig(initial_peers=("unused",)), swarm.transport(), MemoryDirectory(swarm.registry)
    )
    shape = swarm.checkpoint.config
    ref = ModelRef(swarm.checkpoint.model_key, shape.num_blocks, shape.hidden_size)
    ends = load_ends(swarm.checkpoint, dtype=torch.float32)
    given = {"end_tokens": frozenset(), "context_tokens": None, **settings}

    async def make() -> Generator:
        return Generator(client, ref, ends, TOKENIZER, **given)

    return swarm.run(make())


async def collect(generation: Generation) -> dict[int, list[Piece]]:
    """All pieces, by choice."""
    found: dict[int, list[Piece]] = {}
    async for piece in generation:
        found.setdefault(piece.choice, []).append(piece)
    return found


def answers(swarm: LocalSwarm, generator: Generator, request: GenerationRequest) -> dict[int, list[Piece]]:
    async def work() -> dict[int, list[Piece]]:
        return await collect(generator.start(request))

    return swarm.run(work())


def tokens_of(pieces: list[Piece]) -> list[int]:
    """The words of the test's tokenizer say which tokens they are."""
    return [int(word[1:]) for word in "".join(piece.text for piece in pieces).split()]


def expected(folder: Path, ids: tuple[int, ...], count: int, **options: Any) -> list[int]:
    model = reference(folder)
    made = model.generate(
        torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, **options
    )
    return made[0, len(ids) :].tolist()


def held(swarm: LocalSwarm) -> list[int]:
    """Sessions that servers still hold."""
    engines = [server._compute.engine.stats().sessions for server in swarm.servers]  # type: ignore[union-attr]
    return [count for count in (*engines, *(server.num_sessions for server in swarm.servers)) if count]


def assert_all_freed(swarm: LocalSwarm) -> None:
    swarm.run(asyncio.sleep(0.5))
    assert held(swarm) == []


def test_greedy_tokens_are_those_of_generate(checkpoint: Path) -> None:
    ids = prompt(16)
    with LocalSwarm(checkpoint, SPANS) as swarm:
        request = GenerationRequest(prompts=(ids,), max_new_tokens=60, sampling=GREEDY)
        (pieces,) = answers(swarm, generator_of(swarm), request).values()
    theirs = expected(checkpoint, ids, 60)
    assert_lively(torch.tensor([theirs]), 0)
    assert tokens_of(pieces) == theirs
    assert [piece.finish_reason for piece in pieces] == [None] * 59 + ["length"]


def test_prompts_of_other_lengths_and_choices_go_on_together(checkpoint: Path) -> None:
    prompts = (prompt(16), prompt(3, seed=2), prompt(40, seed=3))
    alone = [expected(checkpoint, ids, 24) for ids in prompts]
    end = alone[0][9]
    assert end not in alone[0][:9]
    with LocalSwarm(checkpoint, SPANS) as swarm:
        generator = generator_of(swarm, end_tokens=frozenset({end}))
        request = GenerationRequest(prompts=prompts, max_new_tokens=24, choices=2, sampling=GREEDY)
        found = answers(swarm, generator, request)
        unended = answers(swarm, generator, replace(request, ignore_eos=True))
        assert_all_freed(swarm)
    for choice, pieces in found.items():
        tokens = alone[choice // 2]
        until = tokens.index(end) if end in tokens else None
        assert tokens_of(pieces) == tokens[:until]
        assert sum(piece.tokens for piece in pieces) == len(tokens[:until])
        assert pieces[-1].finish_reason == ("length" if until is None else "stop")
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    assert {choice: tokens_of(pieces) for choice, pieces in unended.items()} == {
        choice: alone[choice // 2] for choice in found
    }


def test_a_stop_text_ends_its_answer_alone(bloom: Path) -> None:
    prompts = (prompt(9), prompt(5, seed=2))
    first, second = (expected(bloom, ids, 20) for ids in prompts)
    at = next(i for i in range(2, 19) if first.index(first[i]) == i and first[i] not in second)
    stop = f" w{first[at]} "
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        request = GenerationRequest(prompts=prompts, max_new_tokens=20, stops=(stop,), sampling=GREEDY)
        found = answers(swarm, generator_of(swarm), request)
        assert_all_freed(swarm)
    assert tokens_of(found[0]) == first[:at]
    assert found[0][-1].finish_reason == "stop"
    assert sum(piece.tokens for piece in found[0]) == at + 2
    assert tokens_of(found[1]) == second


def test_penalties_are_those_of_generate(bloom: Path) -> None:
    ids = prompt(9)
    with LocalSwarm(bloom, ["0:4"]) as swarm:
        sampling = Sampling(temperature=0, repetition_penalty=1.5)
        request = GenerationRequest(prompts=(ids,), max_new_tokens=20, sampling=sampling)
        found = answers(swarm, generator_of(swarm), request)
    penalized = expected(bloom, ids, 20, repetition_penalty=1.5)
    assert tokens_of(found[0]) == penalized != expected(bloom, ids, 20)


def test_a_seed_draws_the_same_whoever_else_is_there(bloom: Path) -> None:
    sampling = Sampling(temperature=1.2, top_p=0.9, seed=5)
    request = GenerationRequest(prompts=(prompt(9),), max_new_tokens=20, choices=3, sampling=sampling)
    other = GenerationRequest(prompts=(prompt(7, seed=2),), max_new_tokens=30)
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        generator = generator_of(swarm)

        async def beside_others() -> dict[int, list[Piece]]:
            generations = [generator.start(each) for each in (other, request, other)]
            return (await asyncio.gather(*map(collect, generations)))[1]

        alone = {choice: tokens_of(p) for choice, p in answers(swarm, generator, request).items()}
        crowded = {choice: tokens_of(p) for choice, p in swarm.run(beside_others()).items()}
    assert alone == crowded
    assert len({tuple(tokens) for tokens in alone.values()}) == 3


def test_logarithms_of_probabilities_are_the_models(checkpoint: Path) -> None:
    ids, count = prompt(12), 10
    sampling = Sampling(temperature=0.7, presence_penalty=1.0, seed=1)
    with LocalSwarm(checkpoint, SPANS) as swarm:
        request = GenerationRequest(
            prompts=(ids, ids[:1]),
            max_new_tokens=count,
            sampling=sampling,
            top_logprobs=3,
            prompt_logprobs=True,
        )
        found = answers(swarm, generator_of(swarm), request)
    before, *pieces = found[0]
    assert (before.text, before.tokens, before.finish_reason) == ("", 0, None)
    told = [*before.logprobs, *(one for piece in pieces for one in piece.logprobs)]
    assert [one.token for one in told] == [*ids, *tokens_of(pieces)]
    assert [one.text for one in told] == [f"w{one.token}" for one in told]
    assert told[0].logprob is None
    assert not told[0].top
    with torch.no_grad():
        logits = reference(checkpoint)(torch.tensor([[one.token for one in told]])).logits[0]
    theirs = logits.log_softmax(-1)
    for place, one in enumerate(told[1:]):
        assert one.logprob == pytest.approx(float(theirs[place, one.token]), abs=1e-3)
        values, _ = theirs[place].topk(3)
        assert [top.logprob for top in one.top] == pytest.approx(values.tolist(), abs=1e-3)
    assert [one.logprob for one in found[1][0].logprobs] == [None]


def test_a_prompt_is_scored_without_an_answer(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:4"]) as swarm:
        request = GenerationRequest(
            prompts=(prompt(5),), max_new_tokens=0, top_logprobs=0, prompt_logprobs=True
        )
        ((piece,),) = answers(swarm, generator_of(swarm), request).values()
    assert (piece.tokens, piece.finish_reason, len(piece.logprobs)) == (0, "length", 5)


def test_a_server_killed_in_mid_answer_is_not_noticed(checkpoint: Path) -> None:
    ids = prompt(16)
    with LocalSwarm(checkpoint, ["0:4", "4:8", "0:4", "4:8"]) as swarm:
        generator = generator_of(swarm)

        async def work() -> tuple[list[Piece], Generation, list[str]]:
            request = GenerationRequest(prompts=(ids,), max_new_tokens=40, sampling=GREEDY, choices=2)
            generation, pieces, killed = generator.start(request), [], []
            totals: dict[str, float] = {}
            async for piece in generation:
                if piece.choice == 0:
                    pieces.append(piece)
                    for hop in generation.progress.route:
                        assert hop.total_s >= totals.get(hop.peer_id, 0.0), "who stays keeps its sum"
                        totals[hop.peer_id] = hop.total_s
                    if len(pieces) in (10, 25):
                        victim = generation.progress.route[len(pieces) == 25].peer_id
                        killed.append(victim)
                        swarm.network.kill(victim)
            return pieces, generation, killed

        async def after() -> Any:
            pieces, generation, killed = await work()
            return pieces, generation.progress, killed

        pieces, progress, killed = swarm.run(after())
    assert tokens_of(pieces) == expected(checkpoint, ids, 40)
    assert progress.repairs == 2
    assert len(set(killed)) == 2
    assert not {hop.peer_id for hop in progress.route} & set(killed)
    assert [(hop.start, hop.end) for hop in progress.route] == [(0, 4), (4, 8)]


def test_progress_tells_route_and_times(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        generator = generator_of(swarm)

        async def work() -> None:
            generation = generator.start(
                GenerationRequest(prompts=(prompt(9),), max_new_tokens=12, sampling=GREEDY)
            )
            before = generation.progress
            assert (before.route, before.new_tokens, before.first_token_s) == ((), 0, None)
            assert before.tokens_per_s == 0
            seen = []
            async for _ in generation:
                seen.append(generation.progress)
            assert [each.new_tokens for each in seen] == list(range(1, 13))
            assert {each.prompt_tokens for each in seen} == {9}
            assert len({each.first_token_s for each in seen}) == 1
            last = seen[-1]
            assert last.first_token_s is not None
            assert last.elapsed_s > last.first_token_s > 0.015
            assert 20 < last.tokens_per_s < 70, "a step takes three trips of 5 to 7 ms"
            assert [(hop.start, hop.end) for hop in last.route] == [(0, 2), (2, 4)]
            assert all(hop.total_s > hop.step_s > 0 for hop in last.route)

        swarm.run(work())


@pytest.mark.parametrize("moment_s", [0.0, 0.004, 0.011, 0.017, 0.023, 0.031, 0.042, 0.06, 0.1, 0.2])
@pytest.mark.parametrize("way", ["cancelled", "closed", "cancelled twice"])
def test_who_goes_away_frees_the_session(bloom: Path, moment_s: float, way: str) -> None:
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        generator = generator_of(swarm)

        async def work() -> None:
            request = GenerationRequest(prompts=(prompt(40),), max_new_tokens=800, choices=2)
            generation = generator.start(request)
            reading = asyncio.ensure_future(collect(generation))
            await asyncio.sleep(moment_s)
            if way == "closed":
                await generation.aclose()
                await generation.aclose()
                with pytest.raises(StreamClosedError):
                    await reading
            else:
                reading.cancel()
                if way == "cancelled twice":
                    await asyncio.sleep(0)
                    reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
            await asyncio.sleep(0.5)
            assert held(swarm) == []

        swarm.run(work())


def test_who_goes_away_while_blocks_are_waited_for(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2"]) as swarm:
        generator = generator_of(swarm)

        async def work() -> None:
            generation = generator.start(GenerationRequest(prompts=(prompt(9),), max_new_tokens=5))
            reading = asyncio.ensure_future(collect(generation))
            await asyncio.sleep(1)
            before = swarm.loop.time()
            await generation.aclose()
            assert swarm.loop.time() - before < 0.1
            with pytest.raises(StreamClosedError):
                await reading
            names = [getattr(task.get_coro(), "__name__", "") for task in asyncio.all_tasks()]
            assert "open_ring" not in names

        swarm.run(work())


def test_who_stops_reading_closes(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        generator = generator_of(swarm)

        async def work() -> None:
            generation = generator.start(GenerationRequest(prompts=(prompt(9),), max_new_tokens=100))
            async for _ in generation:
                break
            await generation.aclose()
            await asyncio.sleep(0.5)
            assert held(swarm) == []
            unread = generator.start(GenerationRequest(prompts=(prompt(9),), max_new_tokens=100))
            await unread.aclose()
            assert [piece async for piece in unread] == []

        swarm.run(work())


def test_closing_ends_what_runs(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        generator = generator_of(swarm)

        async def work() -> None:
            request = GenerationRequest(prompts=(prompt(9),), max_new_tokens=500)
            reading = [asyncio.ensure_future(collect(generator.start(request))) for _ in range(3)]
            await asyncio.sleep(0.1)
            late = generator.start(request)
            await generator.close()
            await generator.close()
            for one in reading:
                with pytest.raises(StreamClosedError):
                    await one
            assert [piece async for piece in late] == []
            with pytest.raises(StreamClosedError):
                await collect(generator.start(request))

        swarm.run(work())
        assert_all_freed(swarm)


def test_a_session_that_is_lost_is_an_error(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2", "2:4"]) as swarm:
        generator = generator_of(swarm)

        async def work() -> None:
            generation = generator.start(GenerationRequest(prompts=(prompt(9),), max_new_tokens=100))
            async for _ in generation:
                swarm.network.kill(generation.progress.route[1].peer_id)

        with pytest.raises(HopLostError):
            swarm.run(work())


def test_blocks_that_nobody_serves_are_an_error(bloom: Path) -> None:
    with LocalSwarm(bloom, ["0:2"]) as swarm, pytest.raises(MissingBlocksError):
        answers(swarm, generator_of(swarm), GenerationRequest(prompts=(prompt(9),), max_new_tokens=3))


def test_numbers_that_are_none_are_an_error(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalSwarm(bloom, ["0:4"]) as swarm:
        generator = generator_of(swarm)
        honest = steps.rows_of
        good, bad = prompt(9), prompt(7, seed=2)

        def lie(chunk: Chunk, output: Output, rows: Rows) -> torch.Tensor:
            tensor = honest(chunk, output, rows)
            return tensor if chunk.slices[0].end < 10 else tensor / 0

        monkeypatch.setattr(async_session, "rows_of", lie)

        async def work() -> list[Any]:
            requests = [
                GenerationRequest(prompts=(ids,), max_new_tokens=count, sampling=GREEDY)
                for ids, count in ((good, 1), (bad, 9))
            ]
            return await asyncio.gather(
                *(collect(generator.start(request)) for request in requests), return_exceptions=True
            )

        fine, failed = swarm.run(work())
        assert tokens_of(fine[0]) == expected(bloom, good, 1)
        assert isinstance(failed, NotFiniteError)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": ((VOCABULARY,),)},
        {"prompts": ((-1,),)},
        {"max_new_tokens": 61},
        {"sampling": Sampling(logit_bias={VOCABULARY: 1.0})},
        {"adapter": "unheard"},
    ],
    ids=str,
)
def test_what_cannot_be_asked(bloom: Path, changes: dict[str, Any]) -> None:
    with LocalSwarm(bloom, ["0:4"]) as swarm:
        generator = generator_of(swarm, context_tokens=64)
        request = replace(GenerationRequest(prompts=(prompt(4),), max_new_tokens=2), **changes)

        async def work() -> None:
            assert await generator.adapters() == ()
            with pytest.raises(ConfigError):
                generator.start(request)

        swarm.run(work())
        if "adapter" in changes:
            with pytest.raises(ConfigError, match="unheard"):
                answers(swarm, generator_of(swarm), request)
