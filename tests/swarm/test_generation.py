"""Answers as streams, in the event loop of a whole swarm: the tokens are those of `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from petal_swarm.client.config import ClientConfig
from petal_swarm.client.generation.generation import Generation
from petal_swarm.client.generation.generator import Generator
from petal_swarm.client.generation.pieces import Piece
from petal_swarm.client.generation.request import GenerationRequest, Sampling
from petal_swarm.client.swarm import Swarm
from petal_swarm.client.view import ModelRef
from petal_swarm.directory.memory import MemoryDirectory
from petal_swarm.models.ends import load_ends
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


def test_greedy_tokens_are_those_of_generate(checkpoint: Path) -> None:
    ids = prompt(16)
    with LocalSwarm(checkpoint, SPANS) as swarm:
        request = GenerationRequest(prompts=(ids,), max_new_tokens=60, sampling=GREEDY)
        (pieces,) = answers(swarm, generator_of(swarm), request).values()
    theirs = expected(checkpoint, ids, 60)
    assert_lively(torch.tensor([theirs]), 0)
    assert tokens_of(pieces) == theirs
    assert [piece.finish_reason for piece in pieces] == [None] * 59 + ["length"]
