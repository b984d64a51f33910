"""Prefixes: whoever shares one gets what it would have computed; what is kept is bounded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from random import Random

import pytest
import torch

from petal_swarm.engine import kv_cache
from petal_swarm.engine.engine import Chunk, Engine
from petal_swarm.engine.kv_cache import KVCache
from petal_swarm.engine.pages import PageAllocator
from petal_swarm.engine.prefixes import PrefixIndex, PrefixScope, SequencePrefix, input_keys, scoped_key
from petal_swarm.engine.steps import StepRequest
from petal_swarm.errors import BadMessageError, CacheFullError, UnknownSessionError
from petal_swarm.span import Slice, Span
from petal_swarm.wire.messages.prefixes import PAGE_TOKENS, PageKeys

from .tiny import HIDDEN, WHOLE, Tiny, close, rows

HASHES = PrefixScope(b"first hop", hashes=True)
GIVEN = PrefixScope(b"peer", hashes=False)
PAGE = PAGE_TOKENS


def keys_of(count: int, seed: int = 0) -> list[bytes]:
    return input_keys(HASHES.scope, rows(count * PAGE, seed))


# -- keys ------------------------------------------------------------------------------------------


def test_a_key_stands_for_everything_before_it() -> None:
    first, second = rows(2 * PAGE), rows(2 * PAGE)
    second[0, 0] += 1e-6
    ours, theirs = input_keys(b"", first), input_keys(b"", second)
    assert len(ours) == 2
    assert set(ours).isdisjoint(theirs)
    assert input_keys(b"other", first) != ours
    assert input_keys(b"", first.double().float()) == ours
    assert input_keys(ours[0], first[PAGE:]) == ours[1:]


def test_the_dtype_belongs_to_the_key() -> None:
    zeros = torch.zeros(PAGE, HIDDEN, dtype=torch.float16)
    assert input_keys(b"", zeros) != input_keys(b"", zeros.bfloat16())


@pytest.mark.parametrize("seed", range(5))
def test_keys_do_not_depend_on_how_tokens_came(seed: int) -> None:
    hidden, random, prefix = rows(7 * PAGE + 5), Random(seed), SequencePrefix(HASHES)
    position = 0
    while position < len(hidden):
        count = min(random.choice([1, 2, PAGE, PAGE + 3, 3 * PAGE]), len(hidden) - position)
        prefix.append(position, hidden[position : position + count])
        position += count
    assert prefix.keys == input_keys(HASHES.scope, hidden)
    assert prefix.length == len(hidden)


@pytest.mark.parametrize("position", [0, PAGE, 2 * PAGE, 2 * PAGE + 3])
def test_rolled_back_where_the_inputs_are_known(position: int) -> None:
    hidden, other = rows(2 * PAGE + 7), rows(4 * PAGE, seed=9)
    prefix = SequencePrefix(HASHES)
    prefix.append(0, hidden)
    prefix.truncate(position)
    assert prefix.length == position
    prefix.append(position, other)
    assert prefix.keys == input_keys(HASHES.scope, torch.cat([hidden[:position], other]))


def test_rolled_back_into_a_page_whose_inputs_are_gone() -> None:
    hidden, prefix = rows(3 * PAGE), SequencePrefix(HASHES)
    prefix.append(0, hidden)
    prefix.truncate(PAGE + 3)
    prefix.append(PAGE + 3, hidden)
    assert prefix.keys == input_keys(HASHES.scope, hidden[:PAGE])
    prefix.append(PAGE, hidden[PAGE:])  # it starts again where a page does
    assert prefix.keys == input_keys(HASHES.scope, hidden)


def test_a_copy_goes_its_own_way() -> None:
    prefix = SequencePrefix(HASHES)
    prefix.append(0, rows(PAGE + 3))
    twin = prefix.copy()
    twin.append(PAGE + 3, rows(PAGE))
    assert len(prefix.keys) == 1
    assert prefix.length == PAGE + 3
    assert len(twin.keys) == 2


def test_given_keys_are_believed_of_one_peer_only() -> None:
    given = [bytes([number]) * 32 for number in range(3)]
    ours, theirs = SequencePrefix(GIVEN), SequencePrefix(PrefixScope(b"another peer", hashes=False))
    for prefix in (ours, theirs):
        prefix.accept(0, given[:2])
        prefix.accept(5, given)  # leaves a gap
        prefix.accept(2, given[2:])
    assert ours.keys == [scoped_key(GIVEN.scope, key) for key in given]
    assert set(ours.keys).isdisjoint(theirs.keys)


# -- pages -----------------------------------------------------------------------------------------


def test_the_longest_idle_pages_go_first_and_the_last_of_a_sequence_before_its_first() -> None:
    pages = PageAllocator(8)
    index = PrefixIndex(pages, max_idle_pages=8)
    one, two = pages.allocate(2), pages.allocate(2)
    for name, held in (("one", one), ("two", two)):
        for number, page in enumerate(held):
            assert index.file(f"{name} {number}".encode(), page) == page
    pages.release(two)
    pages.release(one)
    assert (pages.free, pages.idle) == (4, 4)
    found = index.match([b"two 0"])
    pages.share(found)
    pages.release(found)
    left = []
    while pages.idle:
        left.append(
            sum(len(index.match([f"{name} 0".encode(), f"{name} 1".encode()])) for name in ("two", "one"))
        )
        index.make_room(pages.free + 1)
    assert left == [4, 3, 2, 1]
    assert index.match([b"two 0"]) == []
    assert pages.free == 8


def test_idle_pages_are_bounded() -> None:
    cache = KVCache(20 * PAGE, prefix_tokens=3 * PAGE)
    for session in range(6):
        cache.open(session, 5 * PAGE, HASHES)
        cache.extend(session, Slice(0, 0, 2 * PAGE))
        cache.file_inputs(session, Slice(0, 0, 2 * PAGE), rows(2 * PAGE, seed=session))
        cache.close(session)
        assert cache._pages.idle <= 3
        assert cache.tokens_free == 20 * PAGE
    assert cache._pages.idle == 3


def test_two_that_compute_the_same_keep_one_copy() -> None:
    cache = KVCache(20 * PAGE, prefix_tokens=20 * PAGE)
    hidden, piece = rows(2 * PAGE), Slice(0, 0, 2 * PAGE)
    for session in ("a", "b"):
        cache.open(session, 3 * PAGE, HASHES)
        cache.extend(session, piece)
    assert cache.tokens_free == 16 * PAGE
    for session in ("a", "b"):
        assert cache.file_inputs(session, piece, hidden) == PageKeys(0, 0, tuple(keys_of(2)))
    assert cache.tokens_free == 18 * PAGE
    extents = [cache.extend(session, Slice(0, 2 * PAGE, 1)).extents for session in ("a", "b")]
    assert [row for a, b in extents[0] for row in range(a, b)][: 2 * PAGE] == [
        row for a, b in extents[1] for row in range(a, b)
    ][: 2 * PAGE]


def test_a_sequence_that_decodes_keeps_its_pages_together() -> None:
    cache, hidden = KVCache(20 * PAGE, prefix_tokens=20 * PAGE), rows(3 * PAGE)
    for session in ("a", "b"):
        cache.open(session, 5 * PAGE, HASHES)
        for position in range(3 * PAGE):
            placement = cache.extend(session, Slice(0, position, 1))
            cache.file_inputs(session, Slice(0, position, 1), hidden[position : position + 1])
        assert len(placement.extents) == 1
    assert cache.tokens_free == 14 * PAGE


def test_a_rewritten_page_behind_one_of_its_own_is_copied_if_others_read_it() -> None:
    """b's first page is a copy of a's, its second one is filed: both are rewritten by one step."""
    cache, hidden = KVCache(20 * PAGE, prefix_tokens=20 * PAGE), rows(2 * PAGE)
    for session, length in (("a", PAGE), ("b", 2 * PAGE)):
        cache.open(session, 5 * PAGE, HASHES)
        for position in range(length):
            cache.extend(session, Slice(0, position, 1))
            cache.file_inputs(session, Slice(0, position, 1), hidden[position : position + 1])
    (filed,) = cache._prefixes.match(keys_of(2))[1:]
    placement = cache.extend("b", Slice(0, 3, 2 * PAGE - 3))
    written = {row // PAGE for start, stop in placement.extents for row in range(start, stop)}
    assert filed not in written


def test_nobody_writes_into_a_page_that_is_kept() -> None:
    cache = KVCache(20 * PAGE, prefix_tokens=20 * PAGE)
    cache.open("a", 3 * PAGE, HASHES)
    before = cache.extend("a", Slice(0, 0, PAGE)).extents
    cache.file_inputs("a", Slice(0, 0, PAGE), rows(PAGE))
    after = cache.extend("a", Slice(0, 3, 1))
    assert after.copies == ((before[0][0], after.extents[0][0], 3),)


def test_without_room_nothing_is_shared() -> None:
    cache = KVCache(20 * PAGE, prefix_tokens=0)
    cache.open("a", 3 * PAGE, HASHES)
    cache.extend("a", Slice(0, 0, PAGE))
    assert cache.file_inputs("a", Slice(0, 0, PAGE), rows(PAGE)) is None
    assert cache.lookup("a", Slice(1, 0, PAGE), rows(PAGE)) == ()


def test_attaching_stays_within_the_session() -> None:
    cache = KVCache(20 * PAGE, prefix_tokens=20 * PAGE)
    cache.open("a", 4 * PAGE, HASHES)
    cache.extend("a", Slice(0, 0, 4 * PAGE))
    cache.file_inputs("a", Slice(0, 0, 4 * PAGE), rows(4 * PAGE))
    cache.open("b", 2 * PAGE + 5, HASHES)
    assert cache.attach("b", PageKeys(0, 0, tuple(keys_of(4)))) == 2
    assert cache.length("b", 0) == 2 * PAGE
    assert cache.attach("b", PageKeys(0, 3, tuple(keys_of(4)[3:]))) == 0  # would leave a gap
    with pytest.raises(UnknownSessionError):
        cache.attach("c", PageKeys(0, 0, tuple(keys_of(4))))


# -- the engine ------------------------------------------------------------------------------------


class Client:
    """One session of one sequence that shares prefixes, and what it was fed."""

    def __init__(self, engine: Engine, name: str, blocks: Span = WHOLE) -> None:
        self.engine, self.name, self.blocks = engine, name, blocks
        self.inputs = torch.empty(0, HIDDEN)
        engine.open_session(name, max_length=200, scope=HASHES)

    def feed(self, position: int, hidden: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The outputs of these tokens that had to be computed, and how many had not."""
        request = StepRequest(self.name, self.blocks, (Slice(0, position, len(hidden)),), hidden)
        (found,) = self.engine.attach(self.name, self.engine.find_prefixes(request, spare_last=True))
        known = len(found.keys) * PAGE
        rest = hidden[known:]
        request = StepRequest(self.name, self.blocks, (Slice(0, position + known, len(rest)),), rest)
        (result,) = self.engine.run([request])
        assert result.error is None, result.error
        assert result.hidden is not None
        self.inputs = torch.cat([self.inputs[:position], hidden])
        return result.hidden, known


def engine_of(tiny: Tiny, kv_tokens: int = 1024) -> Engine:
    return Engine(tiny.stack, kv_tokens=kv_tokens, max_batch_tokens=256, prefix_tokens=kv_tokens)


def test_a_session_starts_behind_what_another_left(tiny: Tiny) -> None:
    engine, prompt = engine_of(tiny), rows(5 * PAGE + 3)
    first = Client(engine, "a")
    _, known = first.feed(0, prompt)
    assert known == 0
    engine.close_session("a")
    again, known = Client(engine, "b").feed(0, prompt)
    assert known == 5 * PAGE
    assert close(again, tiny.expected(prompt)[known:])
    longer = torch.cat([prompt[: 3 * PAGE], rows(40, seed=3)])
    other, known = Client(engine, "c").feed(0, longer)
    assert known == 3 * PAGE
    assert close(other, tiny.expected(longer)[known:])


def test_the_last_token_is_always_computed(tiny: Tiny) -> None:
    engine, prompt = engine_of(tiny), rows(3 * PAGE)
    Client(engine, "a").feed(0, prompt)
    found, known = Client(engine, "b").feed(0, prompt)
    assert known == 2 * PAGE
    assert close(found, tiny.expected(prompt)[known:])


def test_what_was_decoded_is_shared_too(tiny: Tiny) -> None:
    engine, text = engine_of(tiny), rows(4 * PAGE)
    client = Client(engine, "a")
    client.feed(0, text[:20])
    for position in range(20, 4 * PAGE):
        client.feed(position, text[position : position + 1])
    found, known = Client(engine, "b").feed(0, torch.cat([text, rows(5, seed=1)]))
    assert known == 4 * PAGE
    assert close(found, tiny.expected(torch.cat([text, rows(5, seed=1)]))[known:])


@pytest.mark.parametrize("seed", range(12))
def test_random_sessions_over_few_beginnings(tiny: Tiny, seed: int) -> None:
    """Prompts that share beginnings, rollbacks, decoding and closing, in a cache too small for all."""
    random, engine = Random(seed), engine_of(tiny, kv_tokens=512)
    text = [rows(120, seed=number) for number in range(3)]
    clients: list[Client] = []
    skipped = 0
    for number in range(60):
        if len(clients) < 2 or (
            len(clients) < 4 and engine.stats().kv_tokens_free >= 200 and random.random() < 0.3
        ):
            clients.append(Client(engine, str(number)))
        client = random.choice(clients)
        length = len(client.inputs)
        if length and random.random() < 0.2:
            clients.remove(client)
            engine.close_session(client.name)
            continue
        base = random.choice(text)
        if length == 0 or length > 70:
            position, hidden = 0, base[: random.randrange(1, 100)]
        elif random.random() < 0.3:
            position = random.randrange(length + 1)
            hidden = base[: random.randrange(1, 40)]
        else:
            position, hidden = length, rows(1, seed=number)
        if engine.stats().kv_tokens_free < len(hidden) + 2 * PAGE:
            continue
        found, known = client.feed(position, hidden)
        skipped += known
        assert close(found, tiny.expected(client.inputs)[position + known :])
    assert skipped
    for client in clients:
        engine.close_session(client.name)
    assert engine.stats().kv_tokens_free == 512


def test_a_later_hop_shares_by_the_keys_that_it_was_given(tiny: Tiny) -> None:
    engine, prompt = engine_of(tiny), rows(3 * PAGE + 4)
    names = tuple(bytes([number]) * 32 for number in range(3))
    piece = (Slice(0, 0, len(prompt)),)
    engine.open_session("a", max_length=100, scope=GIVEN)
    (result,) = engine.run([StepRequest("a", WHOLE, piece, prompt, keys=(PageKeys(0, 0, names),))])
    own = tuple(scoped_key(GIVEN.scope, key) for key in names)
    assert result.keys == (PageKeys(0, 0, own),)
    for name, scope, expected in (("b", GIVEN, own), ("c", PrefixScope(b"liar", hashes=False), ())):
        engine.open_session(name, max_length=100, scope=scope)
        asked = engine.scoped_keys(name, [PageKeys(0, 0, names)])
        assert engine.attach(name, asked) == [PageKeys(0, 0, expected)]
    rest = prompt[3 * PAGE :]
    (result,) = engine.run([StepRequest("b", WHOLE, (Slice(0, 3 * PAGE, 4),), rest)])
    assert close(result.hidden, tiny.expected(prompt)[3 * PAGE :])


def test_keys_of_pages_that_do_not_exist_are_ignored(tiny: Tiny) -> None:
    engine, names = engine_of(tiny), tuple(bytes([number]) * 32 for number in range(3))
    engine.open_session("a", max_length=100, scope=GIVEN)
    step = StepRequest(
        "a", WHOLE, (Slice(0, 0, PAGE),), rows(PAGE), keys=(PageKeys(0, 0, names), PageKeys(7, 0, names))
    )
    (result,) = engine.run([step])
    assert result.error is None
    assert result.keys == ()


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ZeroDivisionError])
def test_what_was_not_computed_is_not_shared(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, paused: bool, error: type[Exception]
) -> None:
    """A step fails for want of memory, or of a bug; the next one, sent before that was known, runs."""
    engine, hidden = engine_of(tiny), rows(2 * PAGE)
    names = (bytes([1]) * 32, bytes([2]) * 32)
    engine.open_session("a", max_length=100, scope=GIVEN)
    step = StepRequest("a", WHOLE, (Slice(0, 0, 8),), hidden[:8])
    with monkeypatch.context() as patch:

        def fail(*_: object) -> Iterator[torch.Tensor]:
            raise error
            yield

        patch.setattr(type(engine.stack), "forward_by_block", fail)
        with contextlib.suppress(ZeroDivisionError):
            if paused:
                engine.begin([Chunk(engine.place(step), 8)]).advance()
            else:
                engine.run([step])
    rest = StepRequest("a", WHOLE, (Slice(0, 8, 2 * PAGE - 8),), hidden[8:], keys=(PageKeys(0, 0, names),))
    (result,) = engine.run([rest])
    assert result.error is None
    assert result.keys == ()
    engine.open_session("b", max_length=100, scope=GIVEN)
    assert engine.attach("b", engine.scoped_keys("b", [PageKeys(0, 0, names)])) == [PageKeys(0, 0, ())]


def test_a_few_rows_do_not_keep_a_large_message() -> None:
    prefix, message = SequencePrefix(HASHES), rows(1000)
    prefix.append(0, message[:3])
    assert sum(part.untyped_storage().nbytes() for part in prefix._rows) == 3 * HIDDEN * 4
    prefix.append(3, message[3 : 2 * PAGE + 5])
    assert sum(part.untyped_storage().nbytes() for part in prefix._rows) == 5 * HIDDEN * 4
    assert prefix.keys == input_keys(HASHES.scope, message[: 2 * PAGE])


def test_a_step_that_finds_no_room_gives_back_the_prefixes_it_took() -> None:
    cache = KVCache(6 * PAGE, prefix_tokens=6 * PAGE)
    cache.open("a", 6 * PAGE, HASHES)
    cache.extend("a", Slice(0, 0, 4 * PAGE))
    cache.file_inputs("a", Slice(0, 0, 4 * PAGE), rows(4 * PAGE))
    cache.close("a")
    cache.open("b", 6 * PAGE, HASHES)
    with pytest.raises(CacheFullError):
        cache.place("b", [Slice(0, 0, 4 * PAGE), Slice(1, 0, 3 * PAGE)])
    assert cache.attach("b", PageKeys(0, 0, tuple(keys_of(4)))) == 4
    cache.close("b")
    cache.open("c", 6 * PAGE)
    cache.place("c", [Slice(0, 0, 6 * PAGE)])
    assert cache.tokens_free == 0


def test_page_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "MAX_SESSION_PAGES", 6)
    cache = KVCache(20 * PAGE, prefix_tokens=20 * PAGE)
    cache.open("a", 6 * PAGE, HASHES)
    cache.extend("a", Slice(0, 0, 3 * PAGE))
    cache.file_inputs("a", Slice(0, 0, 3 * PAGE), rows(3 * PAGE))
    cache.fork("a", [0, 0])
    with pytest.raises(BadMessageError, match="6 pages"):
        cache.fork("a", [0, 0, 0])
    assert cache.attach("a", PageKeys(2, 0, tuple(keys_of(3)))) == 0
