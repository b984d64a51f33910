"""The next token of each answer: penalties, temperature, top-k, top-p, one draw; for many answers at once.

What is drawn depends on nothing but an answer's own logits, tokens and seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from petal_swarm.client.generation.request import Sampling

#: The likeliest so many tokens are looked at for top_p, and where they are too few, so many times more. Of
#: BLOOM's 250,880 tokens 256 are found in 0.3 ms, where sorting all takes 18 ms [measured].
CANDIDATES = 256
MORE = 16
#: A lower temperature than this one chooses like it, and cannot be divided by.
MIN_TEMPERATURE = 1e-6


class Sampler:
    """How one answer chooses its tokens, and which it has; `number` tells answers of one request apart."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], number: int = 0) -> None:
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
        self.top_k = sampling.top_k
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._repetition = sampling.repetition_penalty
        self._bias = sampling.logit_bias
        self._random = random.Random(None if sampling.seed is None else f"{sampling.seed}/{number}")
        self._answer = Tally() if self._presence or self._frequency else None
        self._all = Tally(prompt) if self._repetition != 1 else None
        #: Whether logits are used as they are.
        self.is_plain = self._answer is None and self._all is None and not self._bias

    def adjust(self, logits: Tensor) -> None:
        """Penalties and biases, in place: `logits [vocab_size]` float32."""
        if self._all is not None:
            tokens, _ = self._all.entries(logits.device)
            scores = logits[tokens]
            logits[tokens] = torch.where(scores < 0, scores * self._repetition, scores / self._repetition)
        if self._answer is not None and len(self._answer):
            tokens, counts = self._answer.entries(logits.device)
            logits[tokens] -= self._presence + self._frequency * counts
        if self._bias:
            tokens = torch.tensor(list(self._bias), device=logits.device)
            logits[tokens] += torch.tensor(list(self._bias.values()), device=logits.device)

    def saw(self, token: int) -> None:
        """The answer goes on with this token."""
        for tally in (self._answer, self._all):
            if tally is not None:
                tally.add(token)

    def draw(self) -> float:
        """The next random number, `[0, 1)`."""
        return self._random.random()


class Tally:
    """Which tokens there were, and how often; as tensors that grow in place."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._place: dict[int, int] = {}
        self._tokens = torch.zeros(64, dtype=torch.int64)
        self._counts = torch.zeros(64)
        for token in tokens:
            self.add(token)

    def __len__(self) -> int:
        return len(self._place)

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._tokens):
            self._tokens = torch.cat([self._tokens, torch.zeros_like(self._tokens)])
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1

    def entries(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Different tokens, and the count of each."""
        count = len(self._place)
        return self._tokens[:count].to(device), self._counts[:count].to(device)


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each answer, for `logits [answers, vocab_size]` float32, which are changed."""
    for index, sampler in enumerate(samplers):
        if not sampler.is_plain:
            sampler.adjust(logits[index])
    chosen: list[int] = logits.argmax(-1).tolist()
    drawing = [index for index, sampler in enumerate(samplers) if sampler.temperature]
    if drawing:
        of_these = [samplers[index] for index in drawing]
        scores = logits if len(drawing) == len(samplers) else logits[drawing]
        for index, token in zip(drawing, _draw(scores, of_these), strict=True):
            chosen[index] = token
    return chosen


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """A token for each row of `logits`, by its sampler's next random number."""
    temperatures = [max(sampler.temperature, MIN_TEMPERATURE) for sampler in samplers]
    scores = logits - logits.amax(-1, keepdim=True)
    scores /= torch.tensor(temperatures, device=logits.device)[:, None]
    numbers = torch.tensor([sampler.draw() for sampler in samplers], dtype=torch.float64)
    numbers = numbers.to(logits.device)
    tokens = torch.zeros(len(samplers), dtype=torch.int64, device=logits.device)
    cut = [index for index, sampler in enumerate(samplers) if sampler.top_p < 1 or sampler.top_k]
    whole = [index for index in range(len(samplers)) if index not in set(cut)]
    if whole:
        tokens[whole] = _place(scores[whole].exp(), numbers[whole])
    wanted = max([CANDIDATES, *(samplers[index].top_k for index in cut)])
    while cut:
        found = _draw_cut(scores[cut], [samplers[index] for index in cut], numbers[cut], wanted)
        tokens[cut] = found
        cut = [index for index, place in zip(cut, found.tolist(), strict=True) if place < 0]
        wanted *= MORE
    drawn: list[int] = tokens.tolist()
    return drawn


def _draw_cut(scores: Tensor, samplers: Sequence[Sampler], numbers: Tensor, wanted: int) -> Tensor:
    """Of the likeliest tokens: `top_k` of them, and of these as few as have `top_p` together.

    -1 for a row of which `wanted` tokens are too few to know where that is. `scores` are at most 0.
    """
    vocabulary = scores.shape[-1]
    wanted = min(wanted, vocabulary)
    values, ids = scores.topk(wanted)
    top_k = torch.tensor([[s.top_k or vocabulary] for s in samplers], device=scores.device)
    top_p = torch.tensor([[s.top_p] for s in samplers], dtype=torch.float64, device=scores.device)
    places = torch.arange(wanted, device=scores.device)
    weights = values.double().exp().masked_fill(places >= top_k, 0.0)
    sums = weights.cumsum(-1)
    limited = top_k <= wanted
    total = torch.where(limited, sums[:, -1:], scores.double().logsumexp(-1, keepdim=True).exp())
    limit = top_p * total
    weights = weights.masked_fill(sums - weights >= limit, 0.0)
    tokens = ids.gather(-1, _place(weights, numbers)[:, None])
    if wanted < vocabulary:
        tokens = tokens.masked_fill((sums[:, -1:] < limit) & ~limited, -1)
    return tokens[:, 0]


def _place(weights: Tensor, numbers: Tensor) -> Tensor:
    """Where in its row of `weights [rows, n]` each of `numbers [rows]`, from 0 to 1, falls."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # else rounding may lead behind the last weight
    return torch.searchsorted(sums, torch.minimum(numbers[:, None] * total, below), right=True)[:, 0]
