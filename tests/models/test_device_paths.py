"""The ways through attention that a device takes, taken on the CPU: the same numbers as by the CPU's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import CONFIGS, TOLERANCE, Local, error, make, tokens

from petal_swarm.models import attention, devices, ragged
from petal_swarm.models.attention import Heads, MaskTable
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.ragged import Decoding, in_groups

HOMES = {0: 0, 1: 100, 2: 300, 3: 420}
LENGTHS = {0: 60, 1: 12, 2: 1, 3: 40}
SEQUENCES = {number: tokens(length, number) for number, length in LENGTHS.items()}


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=CONFIGS)
def local(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    make(request.param).save_pretrained(path)
    return Local(path)


@pytest.fixture(params=["auto", "int8"])
def both(request, local, monkeypatch) -> Callable[[Callable[[], torch.Tensor]], None]:
    """Runs a function as on the CPU and as on a device, on a pool of which only what is written counts."""

    def compare(work: Callable[[], torch.Tensor]) -> None:
        found = []
        for on_host in (True, False):
            pool = KVPool.allocate(
                local.checkpoint.config, local.stack.span, 512, torch.float32, "cpu", request.param
            )
            for pair in pool.pairs:
                pair.fill_(-1 if request.param == "int8" else torch.nan)  # scales of bytes 255 are NaN, too
            monkeypatch.setattr(local, "pool", pool)
            monkeypatch.setattr(devices, "on_host", lambda device, answer=on_host: answer)
            found.append(work())
        # Sums in another order may round a number in int8 the other way.
        tolerance = TOLERANCE if request.param == "auto" else 0.02
        assert error(found[1], found[0]) < tolerance

    return compare


def extents(number: int, end: int) -> tuple[tuple[int, int], ...]:
    """Sequences 0 and 3 lie in two ranges each, the others in one."""
    home = HOMES[number]
    if number in (1, 2) or end <= 8:
        return ((home, home + end),)
    return ((home, home + 8), (home + 20, home + 12 + end))


def filled(local: Local) -> None:
    for number, ids in SEQUENCES.items():
        if len(ids) > 1:
            local.step(ids[:-1], 0, extents(number, len(ids) - 1))


def batch_of(*pieces: tuple[int, int, int]) -> PackedBatch:
    """Of (sequence, position, length)."""
    slices, row = [], 0
    for number, position, length in pieces:
        slices.append(PackedSlice(row, length, position, extents(number, position + length)))
        row += length
    return PackedBatch.build(slices)


def last(*numbers: int) -> tuple[PackedBatch, torch.Tensor]:
    pieces = [(number, LENGTHS[number] - 1, 1) for number in numbers]
    return batch_of(*pieces), torch.cat([SEQUENCES[number][-1:] for number in numbers])


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (3, 0), (2, 1)], ids=str)
def test_decoding_together(local, both, numbers):
    def work():
        filled(local)
        return local.run(*last(*numbers))

    both(work)


def test_decoding_beside_a_prompt(local, both):
    def work():
        filled(local)
        batch = batch_of((1, 11, 1), (3, 20, 7), (0, 59, 1), (2, 0, 1))
        parts = (SEQUENCES[1][11:], SEQUENCES[3][20:27], SEQUENCES[0][59:], SEQUENCES[2])
        return local.run(batch, torch.cat(parts))

    both(work)


def test_groups_of_two_and_one_alone(local, both, monkeypatch):
    config = local.checkpoint.config
    numbers_per_row = 2 * config.num_kv_heads * config.head_dim
    monkeypatch.setattr(ragged, "_GROUP_NUMBERS", 2 * 40 * numbers_per_row)

    def work():
        filled(local)
        return local.run(*last(0, 1, 2, 3))

    both(work)


@pytest.mark.parametrize("kept", [0, 1 << 26])
@pytest.mark.parametrize("at_once", [40, 1 << 25])
def test_prompts_in_chunks(local, both, monkeypatch, kept, at_once):
    monkeypatch.setattr(attention, "_KEPT_MASK_NUMBERS", kept)
    monkeypatch.setattr(attention, "_MASK_NUMBERS", at_once * 60)
    ids = SEQUENCES[0]
    both(lambda: torch.cat([local.step(ids[:25], 0), local.step(ids[25:26], 25), local.step(ids[26:], 26)]))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("heads", [1, 4])
def test_a_mask_that_is_written_out_is_the_view_turned_round(heads, window):
    table = MaskTable(torch.rand(heads) if heads > 1 else torch.zeros(1), window, torch.float32)
    shape = Heads(4, 2, 8)
    for queries, keys in ((1, 1), (5, 5), (7, 30), (16, 16), (200, 512)):
        mask = table.written_out(shape, queries, keys)
        assert torch.equal(mask, table.reversed_queries(shape, queries, keys).flip(2))
        assert mask.stride(-1) == 1
        assert all(stride % 16 == 0 for stride in mask.stride()[:-1])


def test_masks_are_written_once_for_all_blocks(local, monkeypatch):
    calls = []
    written_out = MaskTable.written_out
    monkeypatch.setattr(devices, "on_host", lambda device: False)
    monkeypatch.setattr(
        MaskTable, "written_out", lambda self, *shape: calls.append(self) or written_out(self, *shape)
    )
    local.step(SEQUENCES[0][:20], 0)
    calls.clear()
    local.step(SEQUENCES[0][20:40], 20)
    assert len(calls) == len(set(calls)) == len(local.stack._masks)


def test_slots_and_positions_travel_together(monkeypatch):
    copies = []
    monkeypatch.setattr(devices, "on_host", lambda device: False)
    monkeypatch.setattr(devices, "to_device", lambda host, device: copies.append(host) or host)
    batch = batch_of((0, 3, 2), (3, 5, 9))
    assert batch.slots.tolist() == [3, 4, 425, 426, 427, *range(440, 446)]
    assert batch.positions.tolist() == [3, 4, *range(5, 14)]
    assert len(copies) == 1


def test_groups_hold_what_is_alike_and_no_more_than_they_may(monkeypatch):
    monkeypatch.setattr(ragged, "_GROUP_NUMBERS", 100 * 8)
    lengths = [3, 90, 20, 101, 30, 40, 2, 55, 50]
    pieces = [Decoding(place, place, ((0, keys),), keys) for place, keys in enumerate(lengths)]
    groups = in_groups(pieces, 8)
    assert [[piece.keys for piece in group] for group in groups] == [[50, 40], [30, 20, 3]]
