"""Tokens are drawn as transformers' processors have it, and as a seed decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from petal_swarm.client.generation import sampling as sampling_module
from petal_swarm.client.generation.request import Sampling
from petal_swarm.client.generation.sampling import Sampler, Tally, choose
from petal_swarm.errors import ConfigError

DRAWS = 2000


def logits_of(vocabulary: int, *, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


class Evenly(Sampler):
    """Draws a number that is given."""

    def __init__(self, sampling: Sampling, number: float) -> None:
        super().__init__(sampling, ())
        self._number = number

    def draw(self) -> float:
        return self._number


def shares(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """How often each token is chosen where the random numbers are spread evenly."""
    samplers = [Evenly(sampling, (number + 0.5) / DRAWS) for number in range(DRAWS)]
    chosen = choose(logits.expand(DRAWS, -1).clone(), samplers)
    return torch.bincount(torch.tensor(chosen), minlength=len(logits)) / DRAWS


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.3, "top_p": 0.8},
    {"top_p": 0.3},
    {"top_p": 1e-6},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 10_000},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8},
    {"top_k": 3, "top_p": 0.999},
]


@pytest.mark.parametrize("vocabulary", [50, 3000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_distribution_is_that_of_transformers(vocabulary: int, case: dict[str, Any]) -> None:
    logits, given = logits_of(vocabulary), Sampling(**case)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(given.temperature)])
    if given.top_k:
        warpers.append(TopKLogitsWarper(given.top_k))
    if given.top_p < 1:
        warpers.append(TopPLogitsWarper(given.top_p))
    expected = warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None])[0].softmax(-1)
    found = shares(logits, given)
    assert (found - expected).abs().max() <= 1.01 / DRAWS
    assert found[expected == 0].sum() == 0


@pytest.mark.parametrize("rejected", [0, 1, 32])
def test_tokens_beyond_the_likeliest_are_drawn_by_trial(
    monkeypatch: pytest.MonkeyPatch, rejected: int
) -> None:
    monkeypatch.setattr(sampling_module, "CANDIDATES", 4)
    monkeypatch.setattr(sampling_module, "MAX_REJECTED", rejected)
    logits = logits_of(40, scale=0.7)
    samplers = [Sampler(Sampling(top_p=0.6, seed=seed), ()) for seed in range(2000)]
    chosen = choose(logits.expand(2000, -1).clone(), samplers)
    found = torch.bincount(torch.tensor(chosen), minlength=40) / 2000
    expected = TopPLogitsWarper(0.6)(torch.zeros(1, 1, dtype=torch.int64), logits[None])[0].softmax(-1)
    assert found[expected == 0].sum() == 0
    assert ((found - expected).abs() <= 4 * (expected / 2000).sqrt()).all()


def test_each_row_has_its_own_way() -> None:
    logits = logits_of(400)
    ways = [
        Sampling(temperature=0),
        Sampling(top_k=1),
        Sampling(temperature=1e-30),
        Sampling(top_p=1e-9, temperature=3),
        Sampling(logit_bias={7: 100}),
        Sampling(temperature=0, logit_bias={int(logits.argmax()): -100}),
    ]
    best, second = logits.topk(2).indices.tolist()
    chosen = choose(logits.expand(len(ways), -1).clone(), [Sampler(way, ()) for way in ways])
    assert chosen == [best, best, best, best, 7, second]


def test_the_largest_random_number_draws_a_token_that_is_left() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -200.0, -200.0]])
    for given, last in ((Sampling(top_k=2), 1), (Sampling(), 2), (Sampling(top_p=0.5), 2)):
        assert choose(logits.clone(), [Evenly(given, 1 - 2**-53)]) == [last]


def test_repetition_penalty_is_that_of_transformers() -> None:
    prompt, answer = [3, 9, 3, 14], [9, 20, 1]
    sampler = Sampler(Sampling(repetition_penalty=1.7), prompt)
    for token in answer:
        sampler.saw(token)
    logits = logits_of(50)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + answer]), logits[None].clone())
    sampler.adjust(logits)
    assert torch.equal(logits, expected[0])


def test_presence_and_frequency_penalties_and_bias() -> None:
    given = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 2.0, 5: -3.0})
    sampler = Sampler(given, [1, 1, 2])
    for token in (3, 4, 3, 3):
        sampler.saw(token)
    logits = torch.zeros(8)
    sampler.adjust(logits)
    assert logits.tolist() == [0, 0, 0, -1.25, 1.25, -3, 0, 0]


def test_a_seed_decides_and_choices_differ() -> None:
    logits = torch.zeros(1, 1000)

    def drawn(seed: int | None, number: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), (), number)
        return [choose(logits.clone(), [sampler])[0] for _ in range(8)]

    assert drawn(1, 0) == drawn(1, 0)
    assert len({tuple(drawn(*way)) for way in ((1, 0), (1, 1), (2, 0), (-1, 0), (None, 0), (None, 0))}) == 6


def test_a_tally_of_many_tokens() -> None:
    tally = Tally([token for token in range(150) for _ in range(token % 3 + 1)])
    tokens, counts = tally.entries(torch.device("cpu"))
    assert tokens.tolist() == list(range(150))
    assert counts.tolist() == [token % 3 + 1 for token in range(150)]


@pytest.mark.parametrize("mate", [{"top_k": 4000}, {"top_k": 5}, {"top_p": 0.1}, {"temperature": 0}, {}])
def test_who_is_drawn_for_beside_it_changes_no_answer(mate: dict[str, Any]) -> None:
    logits = logits_of(5000, scale=0.5)  # the likeliest few hundred do not have top_p together
    for seed in range(10):
        asked = Sampling(top_p=0.9, seed=seed)
        alone = choose(logits[None].clone(), [Sampler(asked, ())])
        beside = choose(logits.repeat(2, 1), [Sampler(asked, ()), Sampler(Sampling(**mate, seed=7), ())])
        assert beside[0] == alone[0]


def test_a_tally_of_a_prompt_goes_on() -> None:
    tokens = [*range(100), *range(50), *range(90, 300)]
    at_once, one_by_one = Tally(tokens), Tally()
    for token in tokens:
        one_by_one.add(token)
    for token in (7, 1000, 7):
        at_once.add(token)
        one_by_one.add(token)
    cpu = torch.device("cpu")
    for mine, other in zip(at_once.entries(cpu), one_by_one.entries(cpu), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_strongest_penalties_leave_numbers(penalty: float) -> None:
    given = Sampling(repetition_penalty=penalty, temperature=1e-30)
    assert 0 <= choose(logits_of(1000, scale=1000.0)[None], [Sampler(given, [1, 2, 3])])[0] < 1000


def test_a_penalty_that_would_leave_none() -> None:
    with pytest.raises(ConfigError, match="repetition_penalty"):
        Sampling(repetition_penalty=1e-38)
