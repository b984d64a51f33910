"""Comparing what two servers computed: honest ones of every mix pass, every kind of fault is seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from petal_swarm.client.audit import Precision, Tolerance, Verdict, compare, relative_differences
from petal_swarm.errors import ConfigError
from petal_swarm.models.bloom import FAMILY, BloomBlock
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.quantization import Quant, Weight, quantize
from petal_swarm.models.stack import BlockStack
from petal_swarm.span import Span
from petal_swarm.wire.announcement import Announcement

HIDDEN, BLOCKS, ROWS = 128, 4, 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Rows that are compared: the last, as of so many decode steps.
LAST = slice(ROWS - 8, ROWS)
OUTLIERS = [3, 77]

same_every_time = settings(deadline=None, derandomize=True)
precisions = st.builds(
    Precision,
    st.sampled_from(list(DTYPES)),
    st.sampled_from(["none", "int8", "nf4"]),
    st.sampled_from(["auto", "int8"]),
)


@cache
def config() -> ModelConfig:
    fields = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": 50}
    return ModelConfig.from_hf({**fields, "hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": 4})


@cache
def inputs() -> Tensor:
    rows = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(0))
    rows[:, OUTLIERS] *= 100
    return rows.bfloat16().float()


def tensors(block: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 + block)
    made = {}
    for name, shape in FAMILY.block_shapes(config()).items():
        made[name] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        if "layernorm.weight" in name:
            made[name] += 1
    return made


def build(block: int, dtype: torch.dtype, quant: Quant, noise: float = 0.0) -> BloomBlock:
    generator = torch.Generator().manual_seed(99)
    weights: dict[str, Weight] = {}
    for name, tensor in tensors(block).items():
        moved = tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        matrix = quant != "none" and tensor.dim() > 1
        weights[name] = quantize(name, moved, quant) if matrix else moved.to(dtype)
    return BloomBlock(config(), weights)


@cache
def server(dtype: str, quant: Quant) -> tuple[BloomBlock, ...]:
    return tuple(build(block, DTYPES[dtype], quant) for block in range(BLOCKS))


def run(
    precision: Precision, rows: Tensor, blocks: tuple[BloomBlock, ...] | None = None, step: int = 0
) -> Tensor:
    """All rows through the blocks, in steps of so many rows."""
    dtype = DTYPES[precision.dtype]
    blocks = server(precision.dtype, precision.quant) if blocks is None else blocks  # type: ignore[arg-type]
    span = Span(0, len(blocks))
    stack = BlockStack(config(), span, blocks, dtype=dtype)
    pool = KVPool.allocate(config(), span, len(rows), dtype, "cpu", precision.kv_dtype)
    found, step = [], step or len(rows)
    with torch.inference_mode():
        for start in range(0, len(rows), step):
            part = rows[start : start + step].to(dtype)
            stop = start + len(part)
            batch = PackedBatch.build([PackedSlice(0, len(part), start, ((0, stop),))])
            found.append(stack.forward(part, batch, pool, span).float())
    return torch.cat(found)


def judge(
    claimed: Tensor, recomputed: Tensor, one: Precision, other: Precision, part: slice = LAST
) -> Verdict:
    return compare(
        inputs()[part],
        claimed[part],
        recomputed[part],
        one,
        other,
        blocks=BLOCKS,
        position=part.start,
    )


EVERY = [Precision(d, q, kv) for d, q, kv in product(DTYPES, ("none", "int8", "nf4"), ("auto", "int8"))]


@cache
def answer(precision: Precision, step: int = 0) -> Tensor:
    return run(precision, inputs(), step=step)


@pytest.mark.parametrize("audited", EVERY, ids=str)
def test_honest_servers_of_every_mix_agree(audited: Precision) -> None:
    for auditor in EVERY:
        for part in (LAST, slice(0, ROWS)):
            verdict = judge(answer(audited, 5), answer(auditor), audited, auditor, part)
            assert verdict.ok, verdict.difference
            assert verdict.ratio <= 1
            assert not verdict.suspects


@pytest.mark.parametrize("travelled", list(DTYPES.values()))
def test_rows_are_rounded_where_they_travel(travelled: torch.dtype) -> None:
    precision = Precision()
    claimed, again = (answer(precision, step).to(travelled) for step in (5, 0))
    assert judge(claimed, again.float(), precision, precision).ok


PLAIN = Precision("bfloat16")


def skipped() -> Tensor:
    return run(PLAIN, inputs(), server("bfloat16", "none")[:1] + server("bfloat16", "none")[2:])


def swapped() -> Tensor:
    """Not neighbours: of these what one adds hardly changes what the other does."""
    first, second, third, last = server("bfloat16", "none")
    return run(PLAIN, inputs(), (third, second, first, last))


def stale(noise: float) -> Tensor:
    changed = build(2, torch.bfloat16, "none", noise)
    return run(PLAIN, inputs(), (*server("bfloat16", "none")[:2], changed, server("bfloat16", "none")[3]))


def filled(value: float) -> Tensor:
    return torch.full_like(answer(PLAIN), value)


def noisy(size: float) -> Tensor:
    rows = answer(PLAIN)
    deviation = (rows - inputs()).abs().median(-1, keepdim=True).values
    return rows + size * deviation * torch.randn(rows.shape, generator=torch.Generator().manual_seed(7))


def large_channels_lost() -> Tensor:
    rows = answer(PLAIN).clone()
    rows[:, OUTLIERS] = 0
    return rows


def one_infinite() -> Tensor:
    rows = answer(PLAIN).clone()
    rows[-1, 5] = torch.inf
    return rows


def without_the_last_token() -> Tensor:
    rows = answer(PLAIN).clone()
    for last in range(ROWS - 8, ROWS):
        rows[last] = run(PLAIN, torch.cat([inputs()[: last - 1], inputs()[last : last + 1]]))[-1]
    return rows


FAULTS: dict[str, Callable[[], Tensor]] = {
    "a skipped block": skipped,
    "two blocks swapped": swapped,
    "another finetune's block": lambda: stale(0.5),
    "int4 for bfloat16": lambda: answer(Precision("bfloat16", "nf4")),
    "noise of half the change": lambda: noisy(0.5),
    "noise of a fifth of the change": lambda: noisy(0.2),
    "zeros": lambda: filled(0.0),
    "NaN": lambda: filled(torch.nan),
    "one infinite number": one_infinite,
    "nothing computed": inputs,
    "the large channels lost": large_channels_lost,
    "the previous step's rows": lambda: answer(PLAIN).roll(1, 0),
    "a token missing from the KV cache": without_the_last_token,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("auditor", [PLAIN, Precision("float32", "int8")], ids=str)
def test_every_fault_of_a_server_of_bfloat16_is_seen(fault: str, auditor: Precision) -> None:
    verdict = judge(FAULTS[fault](), answer(auditor), PLAIN, auditor)
    assert not verdict.ok
    assert verdict.ratio > 1
    assert verdict.difference
    assert "claimed" in verdict.suspects


def test_a_block_skipped_by_a_server_of_nf4_is_seen_by_its_equals() -> None:
    nf4 = Precision("bfloat16", "nf4")
    claimed = run(nf4, inputs(), server("bfloat16", "nf4")[:-1])
    assert not judge(claimed, answer(Precision("float32", "nf4")), nf4, Precision("float32", "nf4")).ok


@pytest.mark.parametrize("side", [0, 1])
def test_who_sends_numbers_that_are_none_is_wrong_alone(side: int) -> None:
    rows = [answer(PLAIN), answer(PLAIN)]
    rows[side] = one_infinite()
    verdict = judge(*rows, PLAIN, PLAIN)
    assert verdict.suspects == (("claimed", "recomputed")[side],)
    assert f"position {ROWS - 1}" in verdict.difference


def test_rows_of_another_shape_or_kind_are_wrong() -> None:
    rows = answer(PLAIN)
    for wrong in (rows[:-1], rows[:, :-1], rows.long()):
        verdict = compare(inputs(), wrong, rows, PLAIN, PLAIN, blocks=BLOCKS, position=0)
        assert verdict.suspects == ("claimed",)


def test_the_difference_is_told_in_words() -> None:
    other = Precision("float32", "int8", "int8")
    verdict = judge(skipped(), answer(Precision()), PLAIN, other)
    assert verdict.suspects == ("claimed", "recomputed")
    for words in ("typical of 8 rows", "allowed", "4 blocks", "bfloat16", "int8 weights", "int8 KV cache"):
        assert words in verdict.difference
    row = judge(noisy(1.5), answer(PLAIN), PLAIN, PLAIN, slice(9, 10))
    assert "the row at position 9 differs by" in row.difference
    large = judge(large_channels_lost(), answer(PLAIN), PLAIN, PLAIN)
    assert "the typical of 8 rows differs in its largest channels" in large.difference


def test_few_wrong_rows_among_many_fail() -> None:
    rows = answer(PLAIN).clone()
    rows[ROWS // 2] = 0
    verdict = judge(rows, answer(Precision()), PLAIN, Precision(), slice(0, ROWS))
    assert f"position {ROWS // 2} " in verdict.difference


def test_many_rows_are_judged_by_the_typical_one_too() -> None:
    claimed, again = noisy(0.06), answer(PLAIN)
    alone = [judge(claimed, again, PLAIN, PLAIN, slice(row, row + 1)) for row in range(ROWS - 8, ROWS)]
    assert all(verdict.ok for verdict in alone)
    together = judge(claimed, again, PLAIN, PLAIN)
    assert "typical of 8 rows" in together.difference


def test_nothing_to_compare() -> None:
    none = torch.empty(0, HIDDEN)
    assert compare(none, none, none, PLAIN, PLAIN, blocks=1, position=3).ok


def test_names_without_a_tolerance_are_refused() -> None:
    for fields in ({"dtype": "float8"}, {"quant": "int2"}, {"kv_dtype": "int1"}):
        with pytest.raises(ConfigError, match="no tolerance"):
            Precision(**fields)


def test_precision_is_what_a_server_announces() -> None:
    said = Announcement("peer", "model", Span(0, 4), dtype="float16", quant="int8", kv_dtype="int8")
    assert Precision.of(said) == Precision("float16", "int8", "int8")
    assert Precision.of(Announcement("peer", "model", Span(0, 4))) == Precision()


def test_equal_weights_leave_what_activations_are_rounded_by() -> None:
    """Kernels for quantized weights compute in bfloat16 at times, whatever the dtype."""
    for quant in ("int8", "nf4"):
        quantized = Precision("float32", quant)
        equal = Tolerance.between(quantized, quantized, 1).of_change
        assert Tolerance.between(PLAIN, Precision(), 1).of_change < equal
        assert equal < Tolerance.between(quantized, Precision(), 1).of_change


def test_an_int8_kv_cache_counts_about_as_much_as_int8_weights() -> None:
    kv = Tolerance.between(Precision(kv_dtype="int8"), Precision(), 1).of_change
    weights = Tolerance.between(Precision(quant="int8"), Precision(), 1).of_change
    assert 0.6 * weights < kv < weights


def test_the_first_token_may_differ_more() -> None:
    claimed, again = noisy(1.5), answer(PLAIN)
    rows = inputs()[LAST][:1], claimed[LAST][:1], again[LAST][:1]
    later, first = (compare(*rows, PLAIN, PLAIN, blocks=BLOCKS, position=position) for position in (1, 0))
    assert not later.ok
    assert first.ratio == pytest.approx(later.ratio / 2, rel=1e-5)


@same_every_time
@given(one=precisions, other=precisions, blocks=st.integers(1, 80))
def test_tolerance_knows_no_sides_and_grows(one: Precision, other: Precision, blocks: int) -> None:
    tolerance = Tolerance.between(one, other, blocks)
    assert tolerance == Tolerance.between(other, one, blocks)
    more = Tolerance.between(one, other, blocks + 1)
    assert more.of_change > tolerance.of_change > 0
    assert more.of_row > tolerance.of_row > 0


@same_every_time
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_a_model_of_another_scale_is_judged_alike(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, change, error = torch.randn(3, 6, 64, generator=generator)
    after = before + change
    tolerance = Tolerance.between(PLAIN, PLAIN, 3)
    usual = relative_differences(before, after + 0.1 * error, after, tolerance)
    scaled = relative_differences(scale * before, scale * (after + 0.1 * error), scale * after, tolerance)
    for one, other in zip(usual, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@same_every_time
@given(size=st.floats(1, 1e30), seed=st.integers(0, 1000))
def test_a_claim_cannot_widen_what_is_allowed(size: float, seed: int) -> None:
    """However large, a claim that is wrong everywhere fails."""
    generator = torch.Generator().manual_seed(seed)
    claimed = size * (1 + torch.rand(8, HIDDEN, generator=generator)) * 1e4
    verdict = compare(
        inputs()[LAST], claimed, answer(PLAIN)[LAST], PLAIN, PLAIN, blocks=BLOCKS, position=LAST.start
    )
    assert not verdict.ok
