"""Steps on the device: nothing waits, the engine answers as on the CPU, and memory may run out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from petal_swarm.engine.engine import Engine
from petal_swarm.errors import RemoteError
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.stack import load_blocks
from petal_swarm.server.capacity import calibrate, capacity_key
from petal_swarm.wire.tensors import DTYPES, decode_tensor, encode_tensor
from tests.engine.test_engine import Oracle, random_step, step
from tests.engine.tiny import KINDS, WHOLE, Tiny, make, rows
from tests.models.tiny_models import CONFIGS
from tests.models.tiny_models import make as make_model

from .stacks import INT8_KV_TOLERANCE, MODES, Mode, Stack, distance, random_rows


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return make(request.param, folder), folder


def engine_on(device: torch.device, folder: Path, mode: Mode, kv_dtype: str = "auto", **sizes: int) -> Engine:
    options: dict[str, Any] = {} if mode.quant == "none" else {"quant": mode.quant}
    stack = load_blocks(open_checkpoint(str(folder)), WHOLE, dtype=mode.dtype, device=device, **options)
    sizes = {"kv_tokens": 2048, "max_batch_tokens": 256, **sizes}
    return Engine(stack, **sizes, kv_dtype=kv_dtype)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_any_interleaving(
    tiny: tuple[Tiny, Path], device: torch.device, name: str, kv_dtype: str, seed: int
) -> None:
    mode, sessions = MODES[name], [f"session-{n}" for n in range(8)]
    engine = engine_on(device, tiny[1], mode, kv_dtype)
    for session in sessions:
        engine.open_session(session, max_length=128)
    random, oracle = Random(seed), Oracle(tiny[0])
    errors = []
    for _ in range(30):
        chosen = random.sample(sessions, random.randint(1, len(sessions)))
        requests = [random_step(random, oracle, session, WHOLE) for session in chosen]
        for request, result in zip(requests, engine.run(requests), strict=True):
            assert result.error is None
            assert result.hidden is not None
            expected = oracle.answer(request)
            assert result.hidden.shape == expected.shape
            if len(expected):
                errors.append(distance(result.hidden, expected))
    # Short answers vary more than whole sequences: half of them, and all of them, have to be near.
    allowed = mode.tolerance + (INT8_KV_TOLERANCE if kv_dtype == "int8" else 0.0)
    assert sorted(errors)[len(errors) // 2] < allowed
    assert max(errors) < 3 * allowed


@contextmanager
def nothing_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("model", ["bloom", "mistral-window", "qwen3"])
def test_no_step_waits_for_the_device(
    cuda: torch.device, tmp_path: Path, model: str, name: str, kv_dtype: str
) -> None:
    with torch.inference_mode(False):
        assert model in CONFIGS
        make_model(model).save_pretrained(tmp_path)
    stack = Stack(tmp_path, MODES[name], cuda, kv_dtype=kv_dtype)
    hidden = random_rows(600, stack.blocks.config.hidden_size).to(stack.blocks.dtype).to(cuda)

    def steps() -> None:
        stack.run([(0, 300, ((0, 300),))], hidden[:300])
        stack.run([(300, 1, ((0, 301),))], hidden[300:301])
        stack.run([(0, 20, ((600, 620),)), (301, 1, ((0, 302),))], hidden[:21])
        stack.run([(302, 1, ((0, 303),)), (20, 1, ((600, 610), (620, 631)))], hidden[:2])

    steps()  # tables grow, kernels are loaded
    with nothing_waits():
        steps()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_this_would_notice_waiting(cuda: torch.device) -> None:
    value = torch.ones(1, device=cuda)
    with pytest.raises(RuntimeError, match="synchron"), nothing_waits():
        value.item()


def test_running_out_of_memory_costs_one_step(cuda: torch.device, tmp_path: Path) -> None:
    tiny = make("bloom", tmp_path)
    engine = engine_on(cuda, tmp_path, MODES["float32"], kv_tokens=16_384, max_batch_tokens=8192)
    for session in "ab":
        engine.open_session(session, max_length=8192)
    hidden = rows(8192)
    engine.run([step("a", hidden[:20])])
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(cuda)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(cuda) + (4 << 20)) / total, cuda)
    try:
        large, small = engine.run([step("b", hidden), step("a", hidden[20:30], 20)])
        assert type(large.error) is RemoteError
        assert "no memory left for a step of 8192 tokens" in str(large.error)
        assert small.hidden is not None
        assert distance(small.hidden, tiny.expected(hidden[:30])[20:]) < MODES["float32"].tolerance
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    (again,) = engine.run([step("b", hidden)])
    assert again.error is None


def test_results_come_off_the_device_as_they_are(device: torch.device) -> None:
    for dtype in DTYPES.values():
        matrix = random_rows(5).to(dtype)
        for found in (matrix.to(device), matrix.t().contiguous().to(device).t()):
            meta, payload = encode_tensor(found)
            assert torch.equal(decode_tensor(meta, bytes(payload)), matrix)


def test_capacity_is_that_of_the_device(tiny: tuple[Tiny, Path], device: torch.device) -> None:
    engine = engine_on(device, tiny[1], MODES["float32"])
    calibrate(engine, quant="none", kv_dtype="auto", kept=None)
    assert 0 < engine.stats().block_time_s < 0.1
    assert engine.stats().prefill_tokens_per_s > 100
    assert f'"device": "{device.type}"' in capacity_key(engine, quant="none", kv_dtype="auto", chunk=64)
