"""Attention of decode batches by Triton kernels, interpreted, against the plan of the CPU."""

from __future__ import annotations

import pytest
import torch

from tests import kernel_interpreter

kernel_interpreter.require()

from tiny_models import error  # noqa: E402

from petal_swarm.models.attention import AttentionPlan, Heads, MaskTable  # noqa: E402
from petal_swarm.models.int8_kv import Int8Pool  # noqa: E402
from petal_swarm.models.kernels import paged, rms  # noqa: E402
from petal_swarm.models.kernels.paged import PagedPlan, Positions  # noqa: E402
from petal_swarm.models.kernels.tables import Tables, lay_out  # noqa: E402
from petal_swarm.models.norms import RMSNorm  # noqa: E402
from petal_swarm.models.packing import PackedBatch, PackedSlice  # noqa: E402

LENGTHS = (60, 90, 1, 17)
ROWS = 5  # one of which is nobody's
POOL_TOKENS = 640


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def piece(row: int, length: int) -> PackedSlice:
    """Every other sequence lies in two ranges."""
    home = 160 * row
    whole = row % 2 or length <= 16
    extents = ((home, home + length),) if whole else ((home, home + 16), (home + 32, home + 16 + length))
    return PackedSlice(row, 1, length - 1, extents)


class Case:
    """The same step in both ways, over copies of a pool of which the rest is NaN."""

    def __init__(self, heads: Heads, dtype: torch.dtype, int8: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.heads, self.dtype = heads, dtype
        self.packer = Int8Pool(heads.size, dtype, "cpu") if int8 else None
        self.pieces = [piece(row, length) for row, length in enumerate(LENGTHS)]
        self.qkv = torch.randn(ROWS, heads.width, generator=generator).to(dtype)
        self.pair = torch.full((2, heads.kv, POOL_TOKENS, heads.size), torch.nan, dtype=dtype)
        if self.packer is not None:
            self.pair = self.packer.pack(self.pair.fill_(1e4))
        for start, stop in (extent for own in self.pieces for extent in own.extents):
            rows = torch.randn(2, heads.kv, stop - start, heads.size, generator=generator).to(dtype)
            self.pair[:, :, start:stop] = rows if self.packer is None else self.packer.pack(rows)

    def both(
        self, slopes=None, window=None, rotation=None, norm=None
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Results of the kernels and of the plan, and how far the pools then are from each other."""
        batch = PackedBatch.build(self.pieces)
        masks = MaskTable(torch.zeros(1) if slopes is None else slopes, window, self.dtype)
        plan = AttentionPlan(batch, self.heads, masks, window, slopes is not None, self.packer)
        own, given = self.pair.clone(), self.qkv[: len(LENGTHS)].clone()
        if rotation is not None:
            plan.rotation = rotation[torch.tensor(LENGTHS) - 1].unsqueeze(1)
            given = plan.rotate(given, norm)
        expected = plan.attend(given, own)
        quick = PagedPlan(
            Tables.of(lay_out(self.pieces, ROWS), ROWS),
            self.heads,
            Positions(slopes, rotation),
            window,
            POOL_TOKENS,
            None if self.packer is None else self.packer.width,
        )
        given, pair = self.qkv.clone(), self.pair.clone()
        found = quick.attend(quick.rotate(given, norm), pair)
        written = (pair.float() - own.float()).nan_to_num().abs().max()
        assert torch.equal(pair.isnan(), own.isnan())
        return found, expected, float(written)


@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("shape", [(2, 2, 16), (3, 1, 24)], ids=str)
@pytest.mark.parametrize(
    ("alibi", "window", "dtype"),
    [(True, None, torch.float32), (False, 9, torch.float32), (True, None, torch.float16)],
)
def test_a_ragged_batch(shape, int8, alibi, window, dtype):
    case = Case(Heads(*shape), dtype, int8)
    slopes = torch.linspace(0.05, 1, shape[0]) if alibi else None
    found, expected, written = case.both(slopes, window)
    assert found.dtype == dtype
    assert written == 0
    assert error(found[: len(LENGTHS)], expected) < (1e-5 if dtype == torch.float32 else 2e-3)
    assert torch.equal(found[len(LENGTHS) :], torch.zeros_like(found[len(LENGTHS) :]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
def test_rotation_and_norms_of_heads(dtype, normed):
    case = Case(Heads(2, 2, 12), dtype, False)
    rotation = torch.polar(torch.full((200, 6), 1.25), torch.arange(1200.0).view(200, 6))
    weight = torch.linspace(0.5, 1.5, 48).view(4, 12).to(dtype)
    found, expected, written = case.both(rotation=rotation, norm=RMSNorm(weight, 1e-5) if normed else None)
    allowed = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert written < allowed * 4
    assert error(found[: len(LENGTHS)], expected) < allowed


def test_a_single_part_and_many(monkeypatch):
    """However many programs share a sequence's keys, the same comes out."""
    case = Case(Heads(4, 2, 16), torch.float32, False)
    slopes = torch.linspace(0.05, 1, 4)
    found = []
    for count in (1, 1000):
        monkeypatch.setattr(paged, "processors", lambda device, count=count: count)
        found.append(case.both(slopes)[0])
    assert error(found[0], found[1]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rms_norm(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1500, generator=generator).to(dtype) * 5
    plain = RMSNorm(torch.rand(1500, generator=generator).to(dtype) + 0.5, 1e-5)
    quick = rms._norm(plain.weight, plain.eps)
    assert error(quick(x), plain(x)) < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert rms._gives_the_same(plain.weight, plain.eps, plain)
    assert not rms._gives_the_same(plain.weight, plain.eps, lambda x: plain(x) * 1.1)
    assert plain._quick is None  # no device, no kernel
