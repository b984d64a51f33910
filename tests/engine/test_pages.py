"""The page allocator: counts that add up, and runs as long as can be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petal_swarm.engine.pages import OutOfPagesError, PageAllocator


def is_run(pages: list[int]) -> bool:
    return pages == list(range(pages[0], pages[0] + len(pages)))


def grow(allocator: PageAllocator, pages: list[int], count: int = 1) -> None:
    pages += allocator.allocate(count, after=pages[-1] if pages else None)


def test_one_sequence_fills_the_pool_in_one_run() -> None:
    allocator, pages = PageAllocator(50), []
    for _ in range(50):
        grow(allocator, pages)
    assert is_run(pages)
    assert allocator.free == 0


@pytest.mark.parametrize("prompt", [1, 5, 20])
def test_two_that_grow_in_turn_stay_in_one_run_each(prompt: int) -> None:
    allocator = PageAllocator(64)
    both: tuple[list[int], list[int]] = ([], [])
    for pages in both:
        grow(allocator, pages, prompt)
    for turn in range(2 * (22 - prompt)):
        grow(allocator, both[turn % 2])
    assert is_run(both[0])
    assert is_run(both[1])


def test_a_sequence_that_cannot_grow_in_place_goes_on_elsewhere() -> None:
    allocator = PageAllocator(8)
    first = allocator.allocate(2)
    assert allocator.allocate(6) == [2, 3, 4, 5, 6, 7]
    allocator.release([6, 7])
    assert allocator.allocate(2, after=first[-1]) == [6, 7]


def test_a_long_prompt_takes_the_largest_gap() -> None:
    allocator = PageAllocator(20)
    everything = allocator.allocate(20)
    allocator.release([2, 3, *range(8, 15), 17])
    assert allocator.allocate(7) == list(range(8, 15))
    assert len(everything) == 20


def test_out_of_pages_takes_nothing() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(3)
    with pytest.raises(OutOfPagesError):
        allocator.allocate(2)
    assert allocator.free == 1
    assert len(allocator.allocate(1)) == 1


def test_no_pages_at_all() -> None:
    allocator = PageAllocator(0)
    assert allocator.allocate(0) == []
    with pytest.raises(OutOfPagesError):
        allocator.allocate(1)


@settings(deadline=None, derandomize=True)
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 9), st.booleans()),
        max_size=60,
    )
)
def test_every_page_has_its_users(moves: list[tuple[str, int, bool]]) -> None:
    allocator, holders = PageAllocator(12), []
    for move, number, behind in moves:
        if move == "allocate":
            last = holders[-1][-1] if behind and holders and holders[-1] else None
            used = {page for pages in holders for page in pages}
            try:
                pages = allocator.allocate(number, after=last)
            except OutOfPagesError:
                assert number > allocator.free
                continue
            assert len(set(pages)) == number
            assert used.isdisjoint(pages)
            assert set(pages) <= set(range(12))
            if number and last is not None and last + 1 < 12 and last + 1 not in used:
                assert pages[0] == last + 1
            holders.append(pages)
        elif holders:
            pages = holders[number % len(holders)]
            if move == "share":
                allocator.share(pages)
                holders.append(list(pages))
            else:
                allocator.release(pages)
                holders.remove(pages)
        users = [sum(page in pages for pages in holders) for page in range(12)]
        assert allocator.free == users.count(0)
        assert [allocator.shared(page) for page in range(12)] == [count > 1 for count in users]
    for pages in holders:
        allocator.release(pages)
    assert allocator.free == 12
