"""The int8 KV cache: what rounding costs, and that nothing but rounding was added."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CONFIGS, Local, error, make, tokens

from petal_swarm.models import int8_kv
from petal_swarm.models.attention import AttentionPlan, Heads, MaskTable
from petal_swarm.models.int8_kv import Int8Pool, row_bytes
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.span import Span

LENGTH = 40
IDS = tokens(LENGTH)
POOL = 360
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [6, 64, 80])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 300.0])
def test_no_number_is_off_by_more_than_half_a_step(dtype, size, magnitude):
    rows = (random(2, 3, 50, size) * magnitude * random(2, 3, 50, 1).exp()).to(dtype)
    int8 = Int8Pool(size, dtype, "cpu")
    packed = int8.pack(rows)
    assert packed.shape == (2, 3, 50, int8.width)
    found = int8.unpack(packed, ((0, 20), (20, 50)))
    largest = rows.float().abs().amax(-1, keepdim=True)
    rounding = torch.finfo(dtype).eps * largest
    assert ((found.float() - rows.float()).abs() <= largest / 254 * 1.001 + rounding).all()


def test_rows_of_zeros_stay_zero_and_damage_stays_where_it_is():
    rows = random(2, 1, 4, 8)
    rows[:, :, 1] = 0
    rows[:, :, 2, 3] = torch.nan
    found = (int8 := Int8Pool(8, torch.float32, "cpu")).unpack(int8.pack(rows), ((0, 4),))
    assert found[:, :, 1].eq(0).all()
    assert found[:, :, 2].isnan().all()
    assert found[:, :, [0, 3]].isfinite().all()


def test_a_row_is_a_good_quarter_of_float32_and_half_of_16_bits():
    assert row_bytes(64) == 68
    assert row_bytes(128) == 132
    assert row_bytes(5) % 4 == 0  # scales are aligned


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=8))
def test_strips_are_the_ranges_in_order(gaps_and_sizes):
    ranges, row = [], 0
    for gap, size in gaps_and_sizes:
        ranges.append((row + gap, row + gap + size))
        row += gap + size
    strips = list(int8_kv._strips(tuple(ranges), 16))
    sizes = [sum(stop - start for start, stop in strip) for strip in strips]
    assert all(size == 16 for size in sizes[:-1])
    assert 0 < sizes[-1] <= 16
    found = [row for strip in strips for start, stop in strip for row in range(start, stop)]
    assert found == [row for start, stop in ranges for row in range(start, stop)]


class Sequence:
    """One sequence of random queries, keys and values, to be attended to in steps of any size."""

    def __init__(self, heads: Heads, window: int | None, alibi: bool, extents: tuple[tuple[int, int], ...]):
        self.heads = heads
        self.window = window
        self.alibi = alibi
        self.extents = extents
        self.masks = MaskTable(SLOPES if alibi else torch.zeros(1), window, torch.float32)
        self.qkv = random(sum(stop - start for start, stop in extents), heads.width)

    def attend(self, int8: Int8Pool | None, sizes: list[int]) -> torch.Tensor:
        width = self.heads.size if int8 is None else int8.width
        kept = torch.float32 if int8 is None else torch.int8
        pair = torch.empty(2, self.heads.kv, POOL, width, dtype=kept)
        outs, position = [], 0
        for size in sizes:
            left, extents = position + size, []
            for start, stop in self.extents:
                if left > 0:
                    extents.append((start, min(stop, start + left)))
                left -= stop - start
            batch = PackedBatch.build([PackedSlice(0, size, position, tuple(extents))])
            plan = AttentionPlan(batch, self.heads, self.masks, self.window, self.alibi, int8)
            outs.append(plan.attend(self.qkv[position : position + size].contiguous(), pair))
            position += size
        return torch.cat(outs)

    def exact(self, rounded: bool) -> torch.Tensor:
        """The definition, in float64; of keys and values that went through int8 and back if `rounded`."""
        heads = self.heads
        query, rows = self.qkv.double().split([heads.query * heads.size, 2 * heads.kv * heads.size], dim=1)
        query = query.view(-1, heads.query, heads.size).transpose(0, 1)
        pair = rows.view(-1, 2, heads.kv, heads.size).permute(1, 2, 0, 3)
        if rounded:
            int8 = Int8Pool(heads.size, torch.float32, "cpu")
            packed = int8.pack(pair.float())
            pair = packed[..., : heads.size].double() * packed[..., -4:].view(torch.float32).double()
        keys, values = (half.repeat_interleave(heads.group, dim=0) for half in pair)
        places = torch.arange(query.shape[1])
        distance = places[None, :] - places[:, None]
        scores = query @ keys.mT * heads.scale
        if self.alibi:
            scores += SLOPES.double()[:, None, None] * distance
        hidden = distance > 0
        if self.window is not None:
            hidden |= distance <= -self.window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ values).transpose(0, 1).flatten(1)


KINDS = {
    "bloom": (Heads(4, 4, 64), None, True),
    "llama": (Heads(4, 4, 64), None, False),
    "grouped": (Heads(8, 2, 32), None, False),
    "grouped-window": (Heads(8, 2, 32), 37, False),
    "odd-size": (Heads(4, 2, 6), None, True),
}
EXTENTS = {
    "one range": ((5, 165),),
    "three ranges": ((200, 250), (20, 36), (260, 354)),
}
STEPS = {
    "decode": [1] * 160,
    "prefill": [160],
    "prefill and decode": [140] + [1] * 20,
    "chunks": [35, 1, 50, 1, 1, 72],
}


@pytest.fixture(params=[32, 1024], ids=["strips of 32", "one strip"])
def strip_rows(request, monkeypatch):
    monkeypatch.setattr(int8_kv, "_STRIP_ROWS_CPU", request.param)


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("extents", EXTENTS.values(), ids=EXTENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_exact_but_for_the_rounding(kind, extents, steps, strip_rows):
    heads, window, alibi = KINDS[kind]
    sequence = Sequence(heads, window, alibi, extents)
    found = sequence.attend(Int8Pool(heads.size, torch.float32, "cpu"), steps).double()
    assert error(found, sequence.exact(rounded=True)) < 1e-5
    by_head = (found - sequence.exact(rounded=False)).view(-1, heads.query, heads.size).norm(dim=(0, 2))
    expected = sequence.exact(rounded=False).view(-1, heads.query, heads.size).norm(dim=(0, 2))
    assert (by_head < 0.012 * expected).all()
    assert (by_head > 0.0005 * expected).all()  # or nothing was rounded


def test_the_float_pool_is_the_definition_too():
    sequence = Sequence(*KINDS["grouped-window"], EXTENTS["three ranges"])
    assert error(sequence.attend(None, STEPS["chunks"]), sequence.exact(rounded=False)) < 1e-5


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    make(request.param).save_pretrained(path)
    return path


def local(folder, dtype=torch.float32, kv_dtype="int8"):
    made = Local(folder, dtype)
    made.pool = KVPool.allocate(made.checkpoint.config, made.stack.span, 512, dtype, "cpu", kv_dtype)
    return made


def distance(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_logits_of_a_model_are_close(folder):
    expected = local(folder, kv_dtype="auto").step(IDS, 0)
    int8 = local(folder)
    for size in (LENGTH, 1, 13):
        assert 1e-4 < distance(int8.in_chunks(IDS, size), expected) < 0.03


def test_16_bit_models_lose_no_more_than_by_being_16_bit(folder):
    expected = local(folder, kv_dtype="auto").step(IDS, 0)
    for dtype in (torch.bfloat16, torch.float16):
        theirs = distance(local(folder, dtype, "auto").in_chunks(IDS, 1), expected)
        assert distance(local(folder, dtype).in_chunks(IDS, 1), expected) < theirs + 0.03


def test_how_a_prompt_was_cut_up_hardly_shows(folder):
    """A sum in another order may round one number the other way; nothing else differs."""
    int8 = local(folder)
    whole = int8.step(IDS, 0)
    for size in (1, 13):
        assert distance(int8.in_chunks(IDS, size), whole) < 0.01


def test_packed_sequences_and_copied_rows_match_each_alone(folder):
    int8 = local(folder)
    first, second = tokens(20, 2), tokens(12, 3)
    alone = int8.step(first, 0, ((100, 120),))[-1:], int8.step(second, 0, ((200, 212),))[5:]
    int8.pool.copy_rows(100, 300, 19)
    batch = PackedBatch.build(
        [PackedSlice(0, 1, 19, ((300, 320),)), PackedSlice(1, 7, 5, ((200, 206), (206, 212)))]
    )
    found = int8.run(batch, torch.cat([first[19:], second[5:]]))
    assert distance(found[:1], alone[0]) < 0.01
    assert distance(found[1:], alone[1]) < 0.01


def test_memory_of_a_pool(folder):
    config = local(folder).checkpoint.config
    span = Span(0, 2)
    full = KVPool.allocate(config, span, 64, torch.float32, "cpu")
    int8 = KVPool.allocate(config, span, 64, torch.float32, "cpu", "int8")
    assert int8.tokens == full.tokens == 64
    assert int8.nbytes / full.nbytes == row_bytes(config.head_dim) / (4 * config.head_dim)
