"""The next token of each answer: penalties, temperature, top-k, top-p, one draw; for many answers at once.

What is drawn depends on nothing but an answer's own logits, tokens and seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from petal_swarm.client.generation.request import Sampling

#: The likeliest so many tokens are looked at for top_p: of BLOOM's 250,880 they are found in 0.3 ms, where
#: sorting all takes 18 ms and more [measured].
CANDIDATES = 256
#: Where they are too few, tokens are drawn from all until one is among those that have top_p together. It is
#: with a probability of at least top_p; where that is small, all are sorted after so many.
MAX_REJECTED = 32
#: So many logits are looked at together: more of them do not stay in a processor's cache.
GROUP = 1 << 16
#: Sums over so many weights are formed before any is looked at alone.
CHUNK = 512
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
        counts = Counter(tokens)  # not one by one: a long prompt of many answers would hold up all others
        self._place = {token: place for place, token in enumerate(counts)}
        room = torch.zeros(64)
        self._tokens = torch.cat([torch.tensor(list(counts), dtype=torch.int64), room.long()])
        self._counts = torch.cat([torch.tensor(list(counts.values()), dtype=torch.float32), room])

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
    group = max(1, GROUP // logits.shape[-1])
    for start in range(0, len(drawing), group):
        some = drawing[start : start + group]
        scores = logits if len(some) == len(samplers) else logits[some]
        for index, token in zip(some, _draw(scores, [samplers[index] for index in some]), strict=True):
            chosen[index] = token
    return chosen


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """A token for each row of `logits`, by its sampler's next random number."""
    temperatures = [max(sampler.temperature, MIN_TEMPERATURE) for sampler in samplers]
    weights = (logits / _column(temperatures, logits).float()).softmax(-1)
    cut = [index for index, sampler in enumerate(samplers) if sampler.top_p < 1 or sampler.top_k]
    if len(cut) == len(samplers):
        return _draw_cut(weights, samplers)
    numbers = [sampler.draw() for sampler in samplers if sampler.top_p == 1 and not sampler.top_k]
    if not cut:
        tokens: list[int] = _place(weights, _column(numbers, weights)).tolist()
        return tokens
    whole = [index for index in range(len(samplers)) if index not in set(cut)]
    drawn = _place(weights[whole], _column(numbers, weights)).tolist()
    found = dict(zip(whole, drawn, strict=True))
    found |= zip(cut, _draw_cut(weights[cut], [samplers[index] for index in cut]), strict=True)
    return [found[index] for index in range(len(samplers))]


def _draw_cut(weights: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Of the likeliest tokens: `top_k` of them, and of these as few as have `top_p` together."""
    tokens = [-1] * len(samplers)
    usual = [index for index, sampler in enumerate(samplers) if sampler.top_k <= CANDIDATES]
    if usual:
        some = weights if len(usual) == len(samplers) else weights[usual]
        those = [samplers[index] for index in usual]
        drawn = _draw_first(some, those, [sampler.draw() for sampler in those], CANDIDATES)
        for index, token in zip(usual, drawn, strict=True):
            tokens[index] = token
    # The rest alone: how many are looked at for others must not change what is drawn.
    for index, (token, sampler) in enumerate(zip(tokens, samplers, strict=True)):
        own = weights[index : index + 1]
        if sampler.top_k > CANDIDATES:
            tokens[index] = _draw_first(own, [sampler], [sampler.draw()], sampler.top_k)[0]
        elif token < 0:
            tokens[index] = _draw_until(own, sampler)
    return tokens


def _draw_until(weights: Tensor, sampler: Sampler) -> int:
    """By trial: a token of `weights [1, vocab_size]`, if all likelier ones together do not have `top_p`."""
    for _ in range(MAX_REJECTED):
        place = _place(weights, _column([sampler.draw()], weights))
        likelier = torch.where(weights > weights[0, place], weights, 0.0).sum()
        if float(likelier) < sampler.top_p:
            return int(place)
    return _draw_first(weights, [sampler], [sampler.draw()], weights.shape[-1])[0]


def _draw_first(
    weights: Tensor, samplers: Sequence[Sampler], numbers: Sequence[float], wanted: int
) -> list[int]:
    """See `_draw_cut`; -1 for a row of which `wanted` tokens are too few to know where to cut."""
    vocabulary = weights.shape[-1]
    wanted = min(wanted, vocabulary)
    values, ids = weights.topk(wanted)
    values = values.double()
    if any(sampler.top_k for sampler in samplers):
        limits = [sampler.top_k or vocabulary for sampler in samplers]
        places = torch.arange(wanted, device=weights.device)
        values = values.masked_fill(places >= _column(limits, weights), 0.0)
    sums = values.cumsum(-1)
    all_of_it = torch.tensor([[bool(s.top_k) or wanted == vocabulary] for s in samplers], device=sums.device)
    enough = _column([sampler.top_p for sampler in samplers], weights) * torch.where(
        all_of_it, sums[:, -1:], 1.0
    )
    kept = values.masked_fill(sums - values >= enough, 0.0)
    tokens = ids.gather(-1, _place(kept, _column(numbers, weights))[:, None])
    found: list[int] = tokens.masked_fill(sums[:, -1:] < enough, -1)[:, 0].tolist()
    return found


def _place(weights: Tensor, numbers: Tensor) -> Tensor:
    """Where in its row of `weights [rows, n]` each of `numbers [rows, 1]`, from 0 to 1, falls: `[rows]`."""
    count = weights.shape[-1]
    if count > 2 * CHUNK:
        padded = torch.nn.functional.pad(weights, (0, -count % CHUNK)).view(len(weights), -1, CHUNK)
        chunks, rest = _find(padded.sum(-1), numbers)
        inside = padded[torch.arange(len(padded), device=weights.device), chunks[:, 0]]
        return chunks[:, 0] * CHUNK + _find(inside, rest)[0][:, 0]
    return _find(weights, numbers)[0][:, 0]


def _find(weights: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The places, and where between the beginning and the end of its place each number falls."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    # Rounding must not lead behind the last weight.
    reached = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    places = torch.searchsorted(sums, reached, right=True)
    own = weights.gather(-1, places).double()
    return places, ((reached - sums.gather(-1, places) + own) / own).clamp(0.0, 1.0)


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """`[rows, 1]` in double precision."""
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)[:, None]
