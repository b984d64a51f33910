from __future__ import annotations

from petal_swarm.models.kernels.tables import Tables, lay_out
from petal_swarm.models.packing import PackedSlice


def decoding(row: int, length: int, *extents: tuple[int, int]) -> PackedSlice:
    return PackedSlice(row, 1, length - 1, extents)


def test_tables_of_a_batch():
    slices = [
        decoding(0, 33, (32, 48), (96, 113)),
        decoding(1, 1, (0, 1)),
        decoding(2, 48, (128, 176)),
    ]
    numbers = lay_out(slices, 4)
    assert numbers is not None
    lengths, slots, starts, pages = Tables.of(numbers, 4)
    assert lengths.tolist() == [33, 1, 48, 0]
    assert slots.tolist() == [112, 0, 175, -1]
    assert starts.tolist() == [0, 3, 4, 0]
    assert pages.tolist() == [2, 6, 7, 0, 8, 9, 10]


def test_no_tables_of_prompts_or_of_parts_of_pages():
    assert lay_out([PackedSlice(0, 2, 0, ((0, 2),))], 1) is None
    assert lay_out([decoding(0, 5, (3, 8))], 1) is None
    assert lay_out([decoding(0, 12, (0, 8), (16, 20))], 1) is None
