"""Blocks shared out over ranks against the whole ones: outputs, adapters, quantized weights, caches.

The ranks are threads here.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, error, make
from torch import Tensor

from petal_swarm.errors import ConfigError
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.block_cache import BlockCache
from petal_swarm.models.block_source import BlockSource
from petal_swarm.models.checkpoint import Checkpoint, open_checkpoint
from petal_swarm.models.packed_adapters import Segment, ServedAdapter
from petal_swarm.models.packing import PackedBatch, PackedSlice
from petal_swarm.models.quantization import Int8Rows, Quant, quantize
from petal_swarm.models.sharded_stack import ShardedStack
from petal_swarm.models.sharding import Shard, check_ranks
from petal_swarm.models.stack import BlockStack, load_blocks, read_blocks
from petal_swarm.span import Span
from tests.thread_group import Table, ThreadGroup

TOLERANCE = 1e-5
WHOLE = Span(0, 3)
NEVER = 1 << 30
KINDS = ["bloom", "bloom-6-heads", "bloom-post-norm", "llama3-biases", "mistral-window", "qwen2", "qwen3"]


class Ranks:
    """A checkpoint's blocks, each part in a thread."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ranks: int,
        quant: Quant = "none",
        spread_from: int = NEVER,
        cache: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        table = Table(ranks)
        self.groups = [ThreadGroup(table, rank, spread_from) for rank in range(ranks)]
        self.stacks = []
        for group in self.groups:
            kept = BlockCache.of(cache, checkpoint, quant, dtype, group.shard) if cache else None
            source = BlockSource(checkpoint, dtype, quant=quant, cache=kept, shard=group.shard)
            blocks = read_blocks(source, WHOLE)
            self.stacks.append(ShardedStack(checkpoint.config, WHOLE, blocks, dtype=dtype, group=group))
        self.pools = [stack.allocate(512, "auto") for stack in self.stacks]

    def each(self, function: Callable[[int], Tensor]) -> list[Tensor]:
        def guarded(rank: int) -> Tensor:
            with torch.inference_mode():
                return function(rank)

        with ThreadPoolExecutor(len(self.stacks)) as pool:
            return list(pool.map(guarded, range(len(self.stacks))))

    def run(self, hidden: Tensor, batch: Callable[[], PackedBatch]) -> Tensor:
        """What comes out, which must be the same at all ranks."""
        found = self.each(lambda rank: self.stacks[rank].forward(hidden, batch(), self.pools[rank], WHOLE))
        assert all(torch.equal(other, found[0]) for other in found)
        return found[0]


def prefill(count: int) -> PackedBatch:
    return PackedBatch.build([PackedSlice(0, count, 0, ((3, 3 + count),))])


def mixed() -> PackedBatch:
    """Decodes the sequence of `prefill(37)`, and begins another one."""
    return PackedBatch.build(
        [PackedSlice(0, 1, 37, ((3, 41),)), PackedSlice(1, 9, 0, ((100, 105), (200, 204)))]
    )


def rows(checkpoint: Checkpoint, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, checkpoint.config.hidden_size, generator=generator)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def get(kind: str) -> Checkpoint:
        if kind not in made:
            path = tmp_path_factory.mktemp(kind)
            make(kind).save_pretrained(path)
            made[kind] = open_checkpoint(str(path))
        return made[kind]

    return get


def compare(checkpoint: Checkpoint, ranks: Ranks, whole: BlockStack) -> None:
    pool = whole.allocate(512, "auto")
    with torch.inference_mode():
        for hidden, batch in ((rows(checkpoint, 37), lambda: prefill(37)), (rows(checkpoint, 10, 1), mixed)):
            expected = whole.forward(hidden, batch(), pool, WHOLE)
            assert error(ranks.run(hidden, batch), expected) < TOLERANCE


@pytest.mark.parametrize("spread_from", [NEVER, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_compute_what_one_does(
    saved: Callable[[str], Checkpoint], kind: str, spread_from: int
) -> None:
    checkpoint = saved(kind)
    compare(checkpoint, Ranks(checkpoint, 2, spread_from=spread_from), whole(checkpoint))


def whole(checkpoint: Checkpoint, quant: Quant = "none") -> BlockStack:
    return load_blocks(checkpoint, WHOLE, dtype=torch.float32, quant=quant)


@pytest.mark.parametrize(("kind", "ranks"), [("bloom-6-heads", 3), ("qwen2", 4), ("llama3-biases", 8)])
def test_more_ranks_even_than_key_value_heads(
    saved: Callable[[str], Checkpoint], kind: str, ranks: int
) -> None:
    checkpoint = saved(kind)
    compare(checkpoint, Ranks(checkpoint, ranks, spread_from=8), whole(checkpoint))


def test_ranks_meet_twice_a_block(saved: Callable[[str], Checkpoint]) -> None:
    ranks = Ranks(saved("qwen2"), 2)
    ranks.run(rows(saved("qwen2"), 5), lambda: prefill(5))
    assert [group.sums for group in ranks.groups] == [6, 6]


def test_each_rank_has_its_share_of_weights_and_cache(saved: Callable[[str], Checkpoint]) -> None:
    checkpoint = saved("bloom")
    full = whole(checkpoint)
    ranks = Ranks(checkpoint, 4)
    for stack, pool in zip(ranks.stacks, ranks.pools, strict=True):
        assert 0.25 * full.nbytes <= stack.nbytes < 0.29 * full.nbytes
        assert pool.nbytes == full.allocate(512, "auto").nbytes / 4


def test_interrupted_prefill_goes_on_as_it_was(saved: Callable[[str], Checkpoint]) -> None:
    """A spread batch, and one that is not, block by block in turn."""
    checkpoint = saved("qwen3")
    ranks, full = Ranks(checkpoint, 2, spread_from=8), whole(checkpoint)
    pool = full.allocate(512, "auto")
    long, short = rows(checkpoint, 37), rows(checkpoint, 2, 1)
    other = [PackedSlice(0, 2, 0, ((300, 302),))]
    with torch.inference_mode():
        expected = [
            full.forward(long, prefill(37), pool, WHOLE),
            full.forward(short, PackedBatch.build(other), pool, WHOLE),
        ]

    def run(rank: int) -> Tensor:
        stack, own = ranks.stacks[rank], ranks.pools[rank]
        forward = stack.forward_by_block(long, prefill(37), own, WHOLE)
        next(forward)
        between = stack.forward(short, PackedBatch.build(other), own, WHOLE)
        *_, last = forward
        return torch.cat([last, between])

    for found in ranks.each(run):
        assert error(found[:37], expected[0]) < TOLERANCE
        assert error(found[37:], expected[1]) < TOLERANCE


@pytest.mark.parametrize("spread_from", [NEVER, 8])
@pytest.mark.parametrize("kind", ["bloom", "qwen2"])
def test_adapters_are_shared_out_too(saved: Callable[[str], Checkpoint], kind: str, spread_from: int) -> None:
    checkpoint = saved(kind)
    ranks, full = Ranks(checkpoint, 2, spread_from=spread_from), whole(checkpoint)
    stems = [name.removesuffix(".weight") for name in checkpoint.family.splits]
    layout = AdapterLayout(tuple(LoraPlace(1, stem, 4, 0.5) for stem in stems), prefix_tokens=3)
    count = layout.numbers(checkpoint.config, WHOLE)
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(2)) * 0.3
    hidden = rows(checkpoint, 30)

    def run(stack: BlockStack, stop: int) -> Tensor:
        pool = stack.allocate(512, "auto")
        adapter: ServedAdapter = stack.serve_adapter(layout, numbers, WHOLE)
        pool.write_prefix(adapter, ((200, 203),))
        batch = PackedBatch.build([PackedSlice(0, 30, 3, ((200, 203), (3, 33)))])
        assert adapter.deltas is not None
        batch.lora = (Segment(4, stop, adapter.deltas),)
        return stack.forward(hidden, batch, pool, WHOLE)

    with torch.inference_mode():
        expected, without = run(full, 20), run(full, 4)
    assert error(without, expected) > 0.1
    for found in ranks.each(lambda rank: run(ranks.stacks[rank], 20)):
        assert error(found, expected) < TOLERANCE


@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.parametrize("kind", ["bloom-wide", "qwen2-wide"])
def test_quantized_weights_are_the_same_numbers(
    saved: Callable[[str], Checkpoint], kind: str, quant: Quant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With activations left as they are the results are equal; rounded ones are rounded elsewhere."""
    if quant == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("petal_swarm.models.int8.packing_works", lambda: False)
    monkeypatch.setattr("petal_swarm.models.int8._fused_works", lambda values: False)
    monkeypatch.setattr("petal_swarm.models.nf4.packing_works", lambda size: False)
    checkpoint = saved(kind)
    compare(checkpoint, Ranks(checkpoint, 2, quant), whole(checkpoint, quant))


def test_packed_int8_is_as_exact_in_parts_as_whole(saved: Callable[[str], Checkpoint]) -> None:
    checkpoint = saved("bloom")
    hidden, pool = rows(checkpoint, 37), whole(checkpoint).allocate(512, "auto")
    with torch.inference_mode():
        plain = whole(checkpoint).forward(hidden, prefill(37), pool, WHOLE)
        own = error(whole(checkpoint, "int8").forward(hidden, prefill(37), pool, WHOLE), plain)
    found = Ranks(checkpoint, 2, "int8").run(hidden, lambda: prefill(37))
    assert error(found, plain) < 1.3 * own


def test_columns_of_quantized_rows_keep_their_scales(saved: Callable[[str], Checkpoint]) -> None:
    checkpoint = saved("bloom")
    family, config = checkpoint.family, checkpoint.config
    name = "mlp.dense_4h_to_h.weight"
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    matrix[:, :128] *= 10
    rounded = quantize(name, matrix, "int8")
    parts = [Shard(rank, 2).second_cut(family, config, name, rounded) for rank in range(2)]
    assert isinstance(rounded, Int8Rows)
    for part in parts:
        assert isinstance(part, Int8Rows)
        assert torch.equal(part.scales, rounded.scales)
    assert torch.equal(torch.cat([part.values for part in parts], dim=1), rounded.values)  # type: ignore[union-attr]


def test_quantized_parts_are_kept_on_disk(saved: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    checkpoint = saved("qwen2")
    hidden = rows(checkpoint, 5)
    first = Ranks(checkpoint, 2, "int8", cache=tmp_path).run(hidden, lambda: prefill(5))
    files = sorted(tmp_path.glob("*/*.safetensors"))
    assert len(files) == 2 * len(WHOLE)
    times = [file.stat().st_ino for file in files]
    again = Ranks(checkpoint, 2, "int8", cache=tmp_path).run(hidden, lambda: prefill(5))
    assert torch.equal(again, first)
    assert [file.stat().st_ino for file in files] == times


LENGTHS = (11, 7, 7, 15)


@pytest.mark.parametrize(
    ("kind", "ranks"), [*((kind, 2) for kind in KINDS), ("bloom-6-heads", 3), ("qwen2", 4), ("qwen3", 4)]
)
def test_gradients_are_those_of_whole_blocks(
    saved: Callable[[str], Checkpoint], kind: str, ranks: int
) -> None:
    check_gradients(saved(kind), ranks)


@pytest.mark.parametrize("kind", ["bloom", "qwen2"])
def test_gradients_through_plain_int8_are_those_of_whole_blocks(
    saved: Callable[[str], Checkpoint], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petal_swarm.models.int8.packing_works", lambda: False)
    monkeypatch.setattr("petal_swarm.models.int8._fused_works", lambda values: False)
    check_gradients(saved(kind), 2, "int8")


def check_gradients(checkpoint: Checkpoint, count: int, quant: Quant = "none") -> None:
    """Each rank has the gradient of the rows; those of an adapter's numbers add up. Batches that are spread
    may have been there before.
    """
    ranks, full = Ranks(checkpoint, count, quant, spread_from=8), whole(checkpoint, quant)
    ranks.run(rows(checkpoint, 9), lambda: prefill(9))
    stems = [name.removesuffix(".weight") for name in checkpoint.family.splits]
    layout = AdapterLayout(tuple(LoraPlace(block, stem, 3, 0.5) for block in (0, 2) for stem in stems), 3)
    size = layout.numbers(checkpoint.config, WHOLE)
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(2)) * 0.3
    expected = trained(full, layout, numbers)
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda stack: trained(stack, layout, numbers), ranks.stacks))
    for out, hidden, _ in found:
        assert torch.equal(out, found[0][0])
        assert torch.equal(hidden, found[0][1])
        assert error(out, expected[0]) < TOLERANCE
        assert error(hidden, expected[1]) < TOLERANCE
    summed = torch.stack([own for *_, own in found]).sum(0)
    for block, own in layout.split(checkpoint.config, summed, WHOLE).items():
        other = layout.split(checkpoint.config, expected[2], WHOLE)[block]
        assert error(own.prefix, other.prefix) < TOLERANCE  # type: ignore[arg-type]
        for stem, matrices in own.lora.items():
            assert error(matrices.a, other.lora[stem].a) < TOLERANCE, (block, stem, "a")
            assert error(matrices.b, other.lora[stem].b) < TOLERANCE, (block, stem, "b")


def trained(stack: BlockStack, layout: AdapterLayout, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What comes out, and the gradients of the rows and of the adapter."""
    generator = torch.Generator().manual_seed(4)
    shape = (sum(LENGTHS), stack.config.hidden_size)
    hidden, weights = (torch.randn(shape, generator=generator) for _ in range(2))
    hidden.requires_grad_()
    numbers = numbers.clone().requires_grad_()
    sequences = stack.sequences(LENGTHS, layout.prefix_tokens)
    adapters = layout.split(stack.config, numbers, WHOLE)
    out = hidden
    for block, adapter in adapters.items():
        out = stack.forward_trained(block, out, sequences, stack.part_of(adapter))
    without = hidden.detach()
    with torch.no_grad():
        for block, adapter in adapters.items():
            without = stack.forward_trained(block, without, sequences, stack.part_of(adapter))
    assert error(without, out.detach()) < TOLERANCE
    return out.detach(), *torch.autograd.grad(out, [hidden, numbers], weights)


def test_mlp_of_odd_size_is_cut_in_whole_units() -> None:
    from petal_swarm.models.config import ModelConfig

    hf = {**CONFIGS["qwen2"]().to_dict(), "architectures": ["Qwen2ForCausalLM"], "intermediate_size": 192}
    config = ModelConfig.from_hf(hf)
    parts = [Shard(rank, 2).inner(config).of(192) for rank in range(2)]
    assert parts == [slice(0, 64), slice(64, 192)]


@pytest.mark.parametrize(
    ("kind", "ranks", "quant", "message"),
    [
        ("bloom-6-heads", 4, "none", "does not divide this model's 6 heads; it may be 2, 3, 6"),
        ("qwen2", 3, "none", "4 heads (2 of keys and values); it may be 2, 4"),
        ("bloom", 4, "nf4", "--tensor-parallel 4 cuts rows of self_attention.dense.weight"),
    ],
)
def test_counts_that_do_not_fit_are_named(
    saved: Callable[[str], Checkpoint], kind: str, ranks: int, quant: Quant, message: str
) -> None:
    checkpoint = saved(kind)
    with pytest.raises(ConfigError) as raised:
        check_ranks(ranks, checkpoint.family, checkpoint.config, quant)
    assert message in str(raised.value)
