"""The lean blocks against transformers, and against themselves cut up in every way the engine may."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import BLOCKS, CONFIGS, TOLERANCE, Local, error, make, tokens

from petal_swarm.models import attention
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.stack import load_blocks
from petal_swarm.span import Span

LENGTH = 40
IDS = tokens(LENGTH)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    """A model in transformers, and the same one here."""
    path = tmp_path_factory.mktemp(request.param)
    model = make(request.param)
    model.save_pretrained(path)
    return model, Local(path)


def reference(model, ids):
    return model(ids[None]).logits[0]


def test_whole_prefill_matches_transformers(case):
    model, local = case
    assert error(local.step(IDS, 0), reference(model, IDS)) < TOLERANCE


def test_decoding_matches_transformers(case):
    model, local = case
    assert error(local.in_chunks(IDS, 1), reference(model, IDS)) < TOLERANCE


@pytest.mark.parametrize("size", [2, 13, 39])
def test_chunked_prefill_matches_transformers(case, size):
    model, local = case
    assert error(local.in_chunks(IDS, size), reference(model, IDS)) < TOLERANCE


def test_prefill_longer_than_a_chunk_of_queries(case):
    model, local = case
    ids = tokens(300)
    expected = reference(model, ids)
    assert error(local.step(ids, 0), expected) < TOLERANCE
    assert error(local.in_chunks(ids, 290), expected) < TOLERANCE


def test_blocks_are_far_from_identity(case):
    _, local = case
    hidden = local.ends.embed(IDS)
    batch = PackedBatch.build([PackedSlice(0, LENGTH, 0, ((0, LENGTH),))])
    for block in range(BLOCKS):
        out = local.stack.forward(hidden, batch, local.pool, Span(block, block + 1))
        assert (out - hidden).norm() > 0.3 * hidden.norm()


def test_input_is_not_changed(case):
    _, local = case
    hidden = local.ends.embed(IDS)
    before = hidden.clone()
    batch = PackedBatch.build([PackedSlice(0, LENGTH, 0, ((0, LENGTH),))])
    local.stack.forward(hidden, batch, local.pool, local.stack.span)
    assert torch.equal(hidden, before)


def test_packed_sequences_match_each_alone(case):
    model, local = case
    first, second, third = tokens(20, 2), tokens(12, 3), tokens(9, 4)
    homes = (100, 200, 300)

    def extents(index, end):
        return ((homes[index], homes[index] + end),)

    local.step(first[:19], 0, extents(0, 19))
    local.step(second[:5], 0, extents(1, 5))
    batch = PackedBatch.build(
        [
            PackedSlice(0, 1, 19, extents(0, 20)),
            PackedSlice(1, 7, 5, extents(1, 12)),
            PackedSlice(8, 9, 0, extents(2, 9)),
        ]
    )
    found = local.run(batch, torch.cat([first[19:], second[5:], third]))
    assert error(found[:1], reference(model, first)[19:]) < TOLERANCE
    assert error(found[1:8], reference(model, second)[5:]) < TOLERANCE
    assert error(found[8:], reference(model, third)) < TOLERANCE


@pytest.mark.parametrize("long_range", [1, 64])
@pytest.mark.parametrize("page", [2, 16])
def test_fragmented_extents_match_one_range(case, page, long_range, monkeypatch):
    """Few ranges and many ranges, in falling order, so that no two can be joined."""
    monkeypatch.setattr(attention, "_LONG_RANGE", long_range)
    model, local = case
    rows = [(start, start + page) for start in range(400 - page, 0, -2 * page)]

    def extents(end):
        whole, rest = divmod(end, page)
        last = [(rows[whole][0], rows[whole][0] + rest)] if rest else []
        return tuple(rows[:whole] + last)

    expected = reference(model, IDS)
    found = [local.step(IDS[:25], 0, extents(25)), local.step(IDS[25:39], 25, extents(39))]
    found.append(local.step(IDS[39:], 39, extents(40)))
    assert error(torch.cat(found), expected) < TOLERANCE


def test_a_step_back_replaces_what_came_after(case):
    model, local = case
    local.step(tokens(30, 7), 0)
    ids = torch.cat([tokens(30, 7)[:11], tokens(8, 8)])
    assert error(local.step(ids[11:], 11), reference(model, ids)[11:]) < TOLERANCE


def test_sub_spans_and_separate_stacks_match_the_whole(case):
    _, local = case
    batch = PackedBatch.build([PackedSlice(0, LENGTH, 0, ((0, LENGTH),))])
    hidden = local.ends.embed(IDS)
    whole = local.stack.forward(hidden, batch, local.pool, local.stack.span)
    half = local.stack.forward(hidden, batch, local.pool, Span(0, 1))
    assert torch.equal(local.stack.forward(half, batch, local.pool, Span(1, BLOCKS)), whole)

    tail = load_blocks(local.checkpoint, Span(1, BLOCKS), dtype=torch.float32)
    pool = KVPool.allocate(tail.config, tail.span, LENGTH, torch.float32, "cpu")
    assert torch.equal(tail.forward(half, batch, pool, Span(1, BLOCKS)), whole)
    assert tail.nbytes < local.stack.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_in_transformers(case, tmp_path, dtype):
    model, _ = case
    model.save_pretrained(tmp_path)
    local = Local(tmp_path, dtype)
    expected = reference(model, IDS)

    def distance(logits):
        return (logits.float() - expected).norm() / expected.norm()

    theirs = distance(
        reference(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), IDS)
    )
    assert theirs < 0.1
    assert distance(local.step(IDS, 0)) < 1.3 * theirs
    assert distance(local.in_chunks(IDS, 1)) < 1.3 * theirs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(
    "extents",
    [((0, 300),), ((500, 700), (0, 100)), tuple((start, start + 10) for start in range(590, 0, -20))],
)
def test_decoding_in_16_bits_is_exact_but_for_the_last_rounding(dtype, alibi, extents):
    """Each way of reading the pool, against float64."""
    heads = attention.Heads(4, 2, 16)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if alibi else torch.zeros(1)
    generator = torch.Generator().manual_seed(1)
    pair = torch.randn(2, 2, 800, 16, generator=generator).to(dtype)
    qkv = (3 * torch.randn(1, heads.width, generator=generator)).to(dtype)
    count = sum(stop - start for start, stop in extents)
    batch = PackedBatch.build([PackedSlice(0, 1, count - 1, extents)])
    plan = attention.AttentionPlan(batch, heads, attention.MaskTable(slopes, None, dtype), None, alibi)
    found = plan.attend(qkv, pair)
    keys, values = torch.cat([pair[:, :, a:b] for a, b in extents], dim=2).double()
    scores = qkv[:, :64].double().view(2, 2, 16) @ keys.mT / 4
    if alibi:
        scores += slopes.view(2, 2, 1) * torch.arange(1 - count, 1)
    expected = (scores.softmax(-1) @ values).view(1, -1)
    assert found.dtype is dtype
    assert (found - expected).norm() < torch.finfo(dtype).eps * expected.norm()


def test_dynamic_ntk_decodes_as_transformers_and_does_not_depend_on_chunks(tmp_path):
    config = CONFIGS["llama"]()
    config.max_position_embeddings = 16
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    model.save_pretrained(tmp_path)
    local = Local(tmp_path)
    cache = transformers.DynamicCache(config=config)
    expected = torch.cat(
        [model(IDS[None, i : i + 1], past_key_values=cache).logits[0] for i in range(LENGTH)]
    )
    assert error(local.in_chunks(IDS, 1), expected) < TOLERANCE
    assert error(local.step(IDS, 0), expected) < TOLERANCE
