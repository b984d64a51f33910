"""The KV cache against lists of tokens: what is read back is what was written, whoever shares pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count, pairwise
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from petal_swarm.engine.kv_cache import KVCache, Placement
from petal_swarm.errors import BadMessageError, CacheFullError, SessionTooLongError, UnknownSessionError
from petal_swarm.span import Slice
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS

POOL_TOKENS = 10 * PAGE_TOKENS
KEYS = ["a", "b", "c"]


def rows_of(extents: Sequence[tuple[int, int]]) -> list[int]:
    return [row for start, stop in extents for row in range(start, stop)]


def pages(length: int) -> int:
    return -(-length // PAGE_TOKENS)


class Held:
    """What a sequence should hold, and the rows that it was told to hold it in."""

    def __init__(self, tokens: list[int], rows: list[int]) -> None:
        self.tokens = tokens
        self.rows = rows

    @property
    def pages(self) -> list[int]:
        return list(dict.fromkeys(row // PAGE_TOKENS for row in self.rows))


class Model:
    """A cache beside the obvious one: a list of tokens for each sequence, and rows as a list."""

    def __init__(self, tokens: int = POOL_TOKENS) -> None:
        self.cache = KVCache(tokens)
        self.rows: list[int | None] = [None] * tokens
        self.sessions: dict[str, dict[int, Held]] = {}
        self.limits: dict[str, int] = {}
        self._tokens = count()

    def open(self, key: str, max_length: int) -> None:
        if max_length > self.cache.tokens:
            with pytest.raises(CacheFullError):
                self.cache.open(key, max_length)
            return
        self.cache.open(key, max_length)
        self.sessions[key], self.limits[key] = {}, max_length

    def close(self, key: str) -> None:
        self.cache.close(key)
        self.sessions.pop(key, None)

    def fork(self, key: str, sources: list[int]) -> None:
        if key not in self.sessions:
            with pytest.raises(UnknownSessionError):
                self.cache.fork(key, sources)
        elif not set(sources) <= set(self.sessions[key]):
            with pytest.raises(BadMessageError):
                self.cache.fork(key, sources)
        else:
            self.cache.fork(key, sources)
            old = self.sessions[key]
            self.sessions[key] = {
                index: Held(list(old[source].tokens), list(old[source].rows))
                for index, source in enumerate(sources)
            }

    def extend(self, key: str, sequence: int, position: int, length: int) -> Placement | None:
        """Returns None where the cache refused, as it had to."""
        piece = Slice(sequence, position, length)
        session = self.sessions.get(key)
        expected = self._refusal(key, piece)
        if expected is not None:
            with pytest.raises(expected):
                self.cache.extend(key, piece)
            return None
        assert session is not None
        placement = self.cache.extend(key, piece)
        for source, target, number in placement.copies:
            self.rows[target : target + number] = self.rows[source : source + number]
        rows = rows_of(placement.extents)
        assert len(rows) == piece.end
        assert all(a != b for (_, a), (b, _) in pairwise(placement.extents)), "neighbours are joined"
        fresh = [next(self._tokens) for _ in range(length)]
        for row, token in zip(rows[position:], fresh, strict=True):
            self.rows[row] = token
        before = session[sequence].tokens[:position] if sequence in session else []
        session[sequence] = Held(before + fresh, rows)
        return placement

    def _refusal(self, key: str, piece: Slice) -> type[Exception] | None:
        session = self.sessions.get(key)
        if session is None:
            return UnknownSessionError
        if piece.end > self.limits[key]:
            return SessionTooLongError
        found = session.get(piece.sequence)
        if piece.position > (len(found.tokens) if found else 0):
            return BadMessageError
        users = self.users()
        own = found.pages if found else []
        kept = pages(piece.position)
        writable = kept
        if piece.position % PAGE_TOKENS and users[own[kept - 1]] > 1:
            writable -= 1
        given_back = sum(users[page] == 1 for page in own[kept:])
        free = POOL_TOKENS // PAGE_TOKENS - len(users)
        return CacheFullError if pages(piece.end) - writable > free + given_back else None

    def users(self) -> Counter[int]:
        return Counter(
            page for session in self.sessions.values() for found in session.values() for page in found.pages
        )

    def check(self) -> None:
        for key, session in self.sessions.items():
            for number, found in session.items():
                assert [self.rows[row] for row in found.rows] == found.tokens
                assert self.cache.length(key, number) == len(found.tokens)
            assert self.cache.length(key, 999) == 0
        assert self.cache.tokens_free == POOL_TOKENS - PAGE_TOKENS * len(self.users())
        assert self.cache.num_sessions == len(self.sessions)


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    keys = st.sampled_from(KEYS)
    sequences = st.integers(0, 3)
    lengths = st.integers(1, 40) | st.sampled_from([1, PAGE_TOKENS, 2 * PAGE_TOKENS])

    @rule(key=keys, max_length=st.integers(1, 200))
    def open(self, key: str, max_length: int) -> None:
        if key not in self.model.sessions:
            self.model.open(key, max_length)

    @rule(key=keys)
    def close(self, key: str) -> None:
        self.model.close(key)

    @rule(key=keys, sequence=sequences, length=lengths)
    def append(self, key: str, sequence: int, length: int) -> None:
        found = self.model.sessions.get(key, {}).get(sequence)
        self.model.extend(key, sequence, len(found.tokens) if found else 0, length)

    @rule(key=keys, sequence=sequences, length=lengths, back=st.integers(0, 40) | st.just(PAGE_TOKENS))
    def roll_back(self, key: str, sequence: int, length: int, back: int) -> None:
        found = self.model.sessions.get(key, {}).get(sequence)
        self.model.extend(key, sequence, max(0, len(found.tokens) - back if found else 0), length)

    @rule(key=keys, sequence=sequences, page=st.integers(0, 3), length=lengths)
    def roll_back_to_a_page(self, key: str, sequence: int, page: int, length: int) -> None:
        self.model.extend(key, sequence, page * PAGE_TOKENS, length)

    @rule(key=keys, sequence=sequences, position=st.integers(0, 60), length=lengths)
    def extend_anywhere(self, key: str, sequence: int, position: int, length: int) -> None:
        self.model.extend(key, sequence, position, length)

    @rule(key=keys, sources=st.lists(sequences, min_size=1, max_size=4))
    def fork(self, key: str, sources: list[int]) -> None:
        self.model.fork(key, sources)

    @precondition(lambda self: any(self.model.sessions.values()))
    @rule(data=st.data())
    def fork_those_that_exist(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([key for key in KEYS if self.model.sessions.get(key)]))
        existing = st.sampled_from(sorted(self.model.sessions[key]))
        self.model.fork(key, data.draw(st.lists(existing, min_size=1, max_size=4)))

    @invariant()
    def holds_what_was_written(self) -> None:
        self.model.check()

    def teardown(self) -> None:
        for key in KEYS:
            self.model.close(key)
        assert self.model.cache.tokens_free == POOL_TOKENS


TestCache = CacheMachine.TestCase
TestCache.settings = settings(deadline=None, derandomize=True, max_examples=150, stateful_step_count=30)


@pytest.fixture
def model() -> Model:
    model = Model()
    model.open("a", POOL_TOKENS)
    return model


@pytest.mark.parametrize("position", [0, 5, PAGE_TOKENS, PAGE_TOKENS + 5])
def test_a_fork_is_not_written_over_from_any_position(model: Model, position: int) -> None:
    """At a page's first row there is nothing to copy, and yet the page is not ours to write to."""
    model.extend("a", 0, 0, 2 * PAGE_TOKENS)
    model.fork("a", [0, 0])
    model.extend("a", 0, position, 2 * PAGE_TOKENS - position)
    model.check()


def test_forks_share_pages_until_they_part(model: Model) -> None:
    model.extend("a", 0, 0, 3 * PAGE_TOKENS + 4)
    model.fork("a", [0] * 4)
    assert len(model.users()) == 4
    for sequence in range(4):
        placement = model.extend("a", sequence, 3 * PAGE_TOKENS + 4, 1)
        assert placement is not None
        copied = [rows for _, _, rows in placement.copies]
        assert copied == ([4] if sequence < 3 else []), "the last one has the page to itself"
    assert len(model.users()) == 3 + 4
    model.check()


def test_a_refused_slice_leaves_no_sequence_behind(model: Model) -> None:
    """Or else it could be forked from then on."""
    model.extend("a", 0, 0, POOL_TOKENS)
    assert model.extend("a", 1, 0, 1) is None
    model.fork("a", [1])
    model.check()


def test_a_refused_rollback_keeps_what_it_would_have_dropped(model: Model) -> None:
    model.open("b", POOL_TOKENS - PAGE_TOKENS)
    model.extend("a", 0, 0, 4 * PAGE_TOKENS)
    model.fork("a", [0, 0])
    model.extend("b", 0, 0, 5 * PAGE_TOKENS)
    assert model.extend("a", 0, 1, 4 * PAGE_TOKENS) is None
    model.check()
    model.extend("a", 0, 4 * PAGE_TOKENS, 1)
    model.check()


def test_room_that_a_rollback_gives_back_counts(model: Model) -> None:
    model.extend("a", 0, 0, POOL_TOKENS)
    assert model.cache.tokens_free == 0
    assert model.extend("a", 0, 0, POOL_TOKENS) is not None
    assert model.extend("a", 0, 3, POOL_TOKENS - 3) is not None
    assert model.extend("a", 0, 3, 4) is not None
    assert model.cache.tokens_free == POOL_TOKENS - PAGE_TOKENS
    model.check()


def test_a_growing_sequence_lies_in_one_run(model: Model) -> None:
    for position in range(POOL_TOKENS):
        placement = model.extend("a", 0, position, 1)
        assert placement == Placement(((0, position + 1),), ())


def test_two_that_grow_in_turn_lie_in_one_run_each(model: Model) -> None:
    model.open("b", POOL_TOKENS)
    for position in range(POOL_TOKENS // 2):
        for key in ("a", "b"):
            placement = model.extend(key, 0, position, 1)
            assert placement is not None
            assert len(placement.extents) == 1
    model.check()


def test_sessions_take_no_memory_before_their_first_token() -> None:
    cache = KVCache(POOL_TOKENS + 7)
    assert cache.tokens == cache.tokens_free == POOL_TOKENS
    for number in range(100):
        cache.open(number, POOL_TOKENS)
    assert cache.tokens_free == POOL_TOKENS
    with pytest.raises(CacheFullError, match=f"wants {POOL_TOKENS + 1}"):
        cache.open("larger", POOL_TOKENS + 1)


def test_a_session_is_opened_once(model: Model) -> None:
    """A second one under its key would lose the pages of the first."""
    model.extend("a", 0, 0, 1)
    with pytest.raises(AssertionError):
        model.cache.open("a", 1)
    model.check()


def test_closing_what_is_not_open_is_no_error(model: Model) -> None:
    model.cache.close("b")
    model.cache.close("a")
    model.cache.close("a")
    for call in (lambda: model.cache.length("a", 0), lambda: model.cache.fork("a", [0])):
        with pytest.raises(UnknownSessionError):
            call()


def test_a_cache_smaller_than_a_page_holds_nothing() -> None:
    cache = KVCache(PAGE_TOKENS - 1)
    assert cache.tokens == 0
    with pytest.raises(CacheFullError):
        cache.open("a", 1)


def test_errors_say_what_to_do(model: Model) -> None:
    with pytest.raises(SessionTooLongError, match=f"max_length of {POOL_TOKENS}"):
        model.cache.extend("a", Slice(0, 0, POOL_TOKENS + 1))
    with pytest.raises(BadMessageError, match="cannot start at position 1"):
        model.cache.extend("a", Slice(0, 1, 1))
    model.extend("a", 0, 0, POOL_TOKENS)
    with pytest.raises(CacheFullError, match=f"0 of {POOL_TOKENS} tokens free.*needs {PAGE_TOKENS}"):
        model.cache.extend("a", Slice(1, 0, 1))


def state(cache: KVCache) -> object:
    """All that a cache knows, to compare with."""
    sessions = {
        key: {
            number: (list(held.pages), list(held.runs), held.length) for number, held in s.sequences.items()
        }
        for key, s in cache._sessions.items()
    }
    return sessions, cache._pages.state()


@pytest.mark.parametrize("seed", range(20))
def test_a_step_is_placed_whole_or_not_at_all(seed: int) -> None:
    """Beside a cache whose sessions are forked and extended one call at a time."""
    random = Random(seed)
    whole, piecewise = KVCache(POOL_TOKENS), KVCache(POOL_TOKENS)
    for key in KEYS:
        whole.open(key, 90)
        piecewise.open(key, 90)
    outcomes = Counter[str]()
    for _ in range(200):
        key = random.choice(KEYS)
        existing = list(whole._sessions[key].sequences)
        forks = (
            random.choices(existing, k=random.randint(1, 3)) if existing and random.random() < 0.3 else None
        )
        lengths = [whole.length(key, source) for source in forks] if forks else None
        slices = []
        for sequence in random.sample(range(3), random.randint(1, 3)):
            length = whole.length(key, sequence)
            if lengths is not None:
                length = lengths[sequence] if sequence < len(lengths) else 0
            position = max(0, length - random.choice([0, 0, 5, 40, -1]))
            slices.append(Slice(sequence, position, random.choice([1, 3, 16, 40])))
        before = state(whole)
        try:
            placements = whole.place(key, slices, forks)
        except (CacheFullError, BadMessageError, SessionTooLongError) as error:
            assert state(whole) == before
            outcomes[error.code] += 1
        else:
            if forks is not None:
                piecewise.fork(key, forks)
            assert placements == [piecewise.extend(key, piece) for piece in slices]
            outcomes["placed"] += 1
        assert state(whole) == state(piecewise)
    assert {"placed", "cache-full", "bad-message"} <= set(outcomes)
    for key in KEYS:
        whole.close(key)
    assert whole.tokens_free == POOL_TOKENS


def test_what_could_never_be_placed() -> None:
    cache = KVCache(4 * PAGE_TOKENS)
    for key in "ab":
        cache.open(key, 4 * PAGE_TOKENS)
    cache.place("a", [Slice(0, 0, 20)])
    cache.place("b", [Slice(0, 0, 20)])
    for slices, forks, could in [
        ([Slice(0, 20, 44)], None, True),
        ([Slice(0, 20, 12), Slice(1, 0, 32)], None, True),
        ([Slice(0, 20, 13), Slice(1, 0, 32)], None, False),
        ([Slice(1, 0, 33)], None, False),
        ([Slice(0, 0, 16), Slice(1, 0, 48)], None, True),
        ([Slice(0, 20, 28), Slice(1, 20, 44)], (0, 0), False),
        ([Slice(0, 16, 16), Slice(1, 16, 32)], (0, 0), True),
    ]:
        with pytest.raises(CacheFullError):
            cache.place("a", slices, forks)
        assert cache.could_place("a", slices, forks) == could
    cache.close("b")
    cache.place("a", [Slice(0, 20, 12), Slice(1, 0, 32)])


def test_a_session_goes_on_under_another_key() -> None:
    cache = KVCache(POOL_TOKENS)
    cache.open("a", 40)
    cache.extend("a", Slice(0, 0, 20))
    cache.rename("a", "b")
    cache.open("a", 40)
    assert (cache.length("b", 0), cache.length("a", 0), cache.num_sessions) == (20, 0, 2)
    cache.close("b")
    assert cache.tokens_free == POOL_TOKENS
