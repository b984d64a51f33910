"""Where a prompt's beginning was computed last, by its pages of tokens."""

from __future__ import annotations

import random

from petal_swarm.client.conversations import FORGET_S, Conversations
from petal_swarm.routing import Held, Hop
from petal_swarm.span import Span
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS

A, B = (Hop("a", Span(0, 8)),), (Hop("b", Span(0, 8)),)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def tokens(count: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(1000) for _ in range(count)]


def test_the_next_turn_finds_the_last_one() -> None:
    known = Conversations(now=Clock())
    said = tokens(3 * PAGE_TOKENS + 5, seed=1)
    known.remember("m", said, A)
    assert known.recall("m", [*said, *tokens(40, seed=2)]) == Held(A, 3 * PAGE_TOKENS)
    assert known.recall("m", said[: 2 * PAGE_TOKENS + 1]) == Held(A, 2 * PAGE_TOKENS)
    assert known.recall("m", said[: PAGE_TOKENS - 1]) is None
    assert known.recall("other", said) is None
    assert known.recall("m", [1, *said]) is None
    assert known.recall("m", [*said[:20], said[20] + 1, *said[21:]]) == Held(A, PAGE_TOKENS)


def test_of_conversations_that_begin_alike_each_is_found() -> None:
    known = Conversations(now=Clock())
    system = tokens(2 * PAGE_TOKENS, seed=1)
    one, other = [*system, *tokens(PAGE_TOKENS, seed=2)], [*system, *tokens(PAGE_TOKENS, seed=3)]
    known.remember("m", one, A)
    known.remember("m", other, B)
    assert known.recall("m", one) == Held(A, 3 * PAGE_TOKENS)
    assert known.recall("m", other) == Held(B, 3 * PAGE_TOKENS)
    assert known.recall("m", [*system, *tokens(50, seed=4)]) == Held(B, 2 * PAGE_TOKENS)


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    known = Conversations(now=Clock(), max_pages=4)
    said = [tokens(2 * PAGE_TOKENS, seed) for seed in range(3)]
    for one in said[:2]:
        known.remember("m", one, A)
    known.remember("m", said[0], B)
    known.remember("m", said[2], A)
    found = [known.recall("m", one) for one in said]
    assert found == [Held(B, 2 * PAGE_TOKENS), None, Held(A, 2 * PAGE_TOKENS)]


def test_what_nobody_came_back_to_is_forgotten() -> None:
    clock = Clock()
    known = Conversations(now=clock)
    known.remember("m", tokens(PAGE_TOKENS, seed=1), A)
    clock.now_s = FORGET_S
    assert known.recall("m", tokens(PAGE_TOKENS, seed=1))
    clock.now_s += 1
    assert known.recall("m", tokens(PAGE_TOKENS, seed=1)) is None
