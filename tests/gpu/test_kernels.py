"""Triton kernels and CUDA graphs on a device: the numbers of the plain ways, without waiting."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from random import Random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it comes with CUDA builds of torch")

from petal_swarm.engine.engine import Engine
from petal_swarm.engine.steps import StepRequest
from petal_swarm.models import kernels
from petal_swarm.models.attention import AttentionPlan, Heads, MaskTable
from petal_swarm.models.int8 import quantize_int8
from petal_swarm.models.int8_kv import Int8Pool
from petal_swarm.models.kernels import linears
from petal_swarm.models.kernels.decoding import SIZES
from petal_swarm.models.kernels.paged import PagedPlan, Positions
from petal_swarm.models.kernels.tables import Tables, lay_out
from petal_swarm.models.kernels.trials import ROWS
from petal_swarm.models.nf4 import quantize_nf4
from petal_swarm.models.packing import PackedBatch, PackedSlice
from petal_swarm.span import Slice
from tests.engine.test_engine import Oracle
from tests.engine.tiny import KINDS, WHOLE, Tiny, make, rows
from tests.models.tiny_models import make as make_model

from .stacks import INT8_KV_TOLERANCE, MODES, Stack, distance, random_rows
from .test_steps import engine_on, nothing_waits

KERNEL_TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1e-2}
SESSIONS = tuple(f"session-{n}" for n in range(5))


@pytest.fixture(autouse=True)
def _on_cuda(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this needs a real device."""
    monkeypatch.setattr(kernels, "_permitted", True)


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(200, 72), (4096, 1024), (1024, 3072)], ids=str)
@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_every_way_to_multiply(
    cuda: torch.device,
    quant: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inner, outer = shape[0] // 32 * 32, shape[1]
    weight = random_rows(outer, inner)
    kept = quantize_int8(weight.to(cuda)) if quant == "int8" else quantize_nf4(weight.to(cuda))
    bias = random_rows(1, outer, 1)[0].to(dtype).to(cuda)
    projection = linears.quick_linear(kept, bias)
    assert isinstance(projection, linears.QuickInt8Linear | linears.QuickNf4Linear)
    for way in projection._quick._ways:
        for count in (1, 2, 3, 4, 7, 16, 33, 100, 512, 700):
            if count < way.least_rows or way.most_rows < min(count, ROWS[-1]):
                continue
            x = random_rows(count, inner, 2)
            x[:, 5] *= 40
            x, residual = x.to(dtype).to(cuda), random_rows(count, outer, 3).to(dtype).to(cuda)
            expected = x.float() @ kept.dequantized().t() + bias.float() + residual.float()
            found = way.product(x, residual)
            assert distance(found, expected) < KERNEL_TOLERANCES[dtype] + way.tolerance, (way.name, count)


@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("dtype", KERNEL_TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(4, 4, 64), (8, 2, 80), (8, 1, 128), (2, 2, 16)], ids=str)
@pytest.mark.parametrize(("alibi", "window"), [(True, None), (False, 100), (False, None)])
def test_attention_of_a_ragged_batch(
    cuda: torch.device,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    int8: bool,
    alibi: bool,
    window: int | None,
) -> None:
    heads, lengths = Heads(*shape), (700, 1, 17, 300, 64)
    slopes = torch.linspace(0.01, 0.5, heads.query) if alibi else None
    pieces = [PackedSlice(n, 1, own - 1, ((n * 704, n * 704 + own),)) for n, own in enumerate(lengths)]
    pool = random_rows(2 * heads.kv * 4096, heads.size).view(2, heads.kv, 4096, heads.size).to(dtype)
    qkv = random_rows(len(lengths), heads.width, 1).to(dtype)
    on_cpu = Int8Pool(heads.size, torch.float32, "cpu") if int8 else None
    kept = pool.float() if on_cpu is None else on_cpu.pack(pool)
    masks = MaskTable(torch.zeros(1) if slopes is None else slopes, window, torch.float32)
    plan = AttentionPlan(PackedBatch.build(pieces), heads, masks, window, alibi, on_cpu)
    expected = plan.attend(qkv.float(), kept.clone())
    laid = lay_out(pieces, 8)
    assert laid is not None
    tables = Tables.of(laid.to(cuda), 8)
    positions = Positions(None if slopes is None else slopes.to(cuda), None)
    quick = PagedPlan(tables, heads, positions, window, 4096, None if on_cpu is None else on_cpu.width)
    given = torch.cat([qkv, qkv[:3]]).to(cuda)
    found = quick.attend(given, (pool if on_cpu is None else kept).to(cuda))
    assert distance(found[: len(lengths)], expected) < KERNEL_TOLERANCES[dtype]
    assert not found[len(lengths) :].any()


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return make(request.param, folder), folder


def quickened(engine: Engine) -> Engine:
    """Takes kernels and graphs whether or not they are faster for something so small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("petal_swarm.models.kernels.start.prove", lambda *arguments: True)
        engine.quicken()
    assert engine.stack.decoder is not None
    return engine


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("name", MODES)
def test_decoding_by_graphs(tiny: tuple[Tiny, Path], cuda: torch.device, name: str, kv_dtype: str) -> None:
    mode, random, oracle = MODES[name], Random(0), Oracle(tiny[0])
    engine = quickened(engine_on(cuda, tiny[1], mode, kv_dtype))
    for number, session in enumerate(SESSIONS):
        engine.open_session(session, max_length=128)
        prompt = StepRequest(session, WHOLE, (Slice(0, 0, 15 + number),), rows(15 + number, number))
        engine.run([prompt])
        oracle.answer(prompt)
    errors = []
    for _ in range(20):
        batch = [
            StepRequest(s, WHOLE, (Slice(0, oracle.length(s, 0), 1),), rows(1, random.randrange(1 << 30)))
            for s in random.sample(SESSIONS, random.randint(1, len(SESSIONS)))
        ]
        for request, result in zip(batch, engine.run(batch), strict=True):
            assert result.hidden is not None
            errors.append(distance(result.hidden, oracle.answer(request)))
    allowed = mode.tolerance + (INT8_KV_TOLERANCE if kv_dtype == "int8" else 0.0)
    assert sorted(errors)[len(errors) // 2] < allowed
    assert max(errors) < 3 * allowed
    assert engine.stack.decoder is not None
    assert 0 < engine.stack.decoder.num_graphs <= len(SIZES)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("model", ["bloom", "mistral-window", "qwen3"])
def test_no_recorded_step_waits(cuda: torch.device, tmp_path: Path, model: str, name: str) -> None:
    with torch.inference_mode(False):
        make_model(model).save_pretrained(tmp_path)
    stack = Stack(tmp_path, MODES[name], cuda)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("petal_swarm.models.kernels.start.prove", lambda *arguments: True)
        stack.blocks.quicken(stack.pool)
    hidden = random_rows(40, stack.blocks.config.hidden_size).to(stack.blocks.dtype).to(cuda)

    def steps(position: int) -> None:
        stack.run([(position, 1, ((0, position + 1),)), (2, 1, ((64, 67),))], hidden[:2])
        many = [(3, 1, ((16 * n, 16 * n + 4),)) for n in range(40)]  # more than a graph is made for
        stack.run(many, hidden)

    steps(20)  # ways are tried, graphs are recorded
    with nothing_waits():
        steps(21)


def test_a_server_proves_it_at_its_start(
    tiny: tuple[Tiny, Path], cuda: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_on(cuda, tiny[1], MODES["bfloat16"])
    with caplog.at_level(logging.INFO, "petal_swarm.models.kernels"):
        engine.quicken()
    told = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("ms of a decode step by size: plain, by graph") for line in told), told
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_graphs_go_with_their_engine(tiny: tuple[Tiny, Path], cuda: torch.device) -> None:
    def once() -> None:
        engine = quickened(engine_on(cuda, tiny[1], MODES["bfloat16"]))
        engine.open_session("a", max_length=64)
        for position in range(3):
            engine.run([StepRequest("a", WHOLE, (Slice(0, position, 1),), rows(1))])

    found = []
    for _ in range(3):
        once()
        gc.collect()
        torch.cuda.synchronize()
        found.append(torch.cuda.memory_allocated(cuda))
    assert found[2] <= found[1]
