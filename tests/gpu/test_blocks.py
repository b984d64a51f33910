"""Every kind of block on the device, against the same on the CPU in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from petal_swarm.models import attention, ragged
from tests.models.tiny_models import CONFIGS, make

from .stacks import INT8_KV_TOLERANCE, MODES, Extents, Mode, Stack, distance, random_rows

CPU = MODES["float32"]


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    with torch.inference_mode(False):
        make(request.param).save_pretrained(path)
    return path


def hidden_size(folder: Path) -> int:
    return Stack(folder, CPU, "cpu").blocks.config.hidden_size


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return MODES[request.param]


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [13, 1, 13, 13]], ids=["prompt", "decoding", "chunks"])
def test_a_sequence(folder: Path, device: torch.device, mode: Mode, sizes: list[int]) -> None:
    hidden = random_rows(40, hidden_size(folder))
    expected = Stack(folder, CPU, "cpu").sequence(hidden, [40])
    found = Stack(folder, mode, device).sequence(hidden, sizes)
    assert found.dtype == mode.dtype
    assert found.device.type == device.type
    assert distance(found, expected) < mode.tolerance


@pytest.mark.parametrize("sizes", [[700], [290, 290, 120], [699, 1]], ids=str)
def test_a_long_prompt(
    folder: Path, device: torch.device, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = random_rows(700, hidden_size(folder))
    expected = Stack(folder, CPU, "cpu").sequence(hidden, [700])
    for kept in (0, 1 << 26):
        monkeypatch.setattr(attention, "_KEPT_MASK_NUMBERS", kept)
        assert distance(Stack(folder, CPU, device).sequence(hidden, sizes), expected) < CPU.tolerance


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_an_int8_kv_cache(folder: Path, device: torch.device, name: str) -> None:
    hidden = random_rows(40, hidden_size(folder))
    expected = Stack(folder, CPU, "cpu").sequence(hidden, [40])
    for sizes in ([40], [1] * 40, [13, 1, 26]):
        found = Stack(folder, MODES[name], device, kv_dtype="int8").sequence(hidden, sizes)
        assert distance(found, expected) < MODES[name].tolerance + INT8_KV_TOLERANCE
        on_cpu = Stack(folder, CPU, "cpu", kv_dtype="int8").sequence(hidden, sizes)
        assert distance(found, on_cpu) < MODES[name].tolerance + INT8_KV_TOLERANCE / 2


LENGTHS = (60, 12, 1, 40, 130, 129)


def extents(number: int, end: int) -> Extents:
    """Every other sequence lies in two ranges."""
    home = 200 * number
    return (
        ((home, home + end),) if number % 2 or end <= 8 else ((home, home + 8), (home + 16, home + 8 + end))
    )


def ragged_steps(stack: Stack, hidden: list[torch.Tensor]) -> torch.Tensor:
    """Five sequences decode beside a prompt, after all of them were filled, and then all six decode."""
    for number, rows in enumerate(hidden):
        if len(rows) > 1:
            stack.run([(0, len(rows) - 1, extents(number, len(rows) - 1))], rows[:-1])
    order = (4, 0, 3, 2, 1)
    pieces = [(LENGTHS[n] - 1, 1, extents(n, LENGTHS[n])) for n in order]
    pieces.insert(2, (100, 29, extents(5, 129)))
    parts = [hidden[n][-1:] for n in order]
    parts.insert(2, hidden[5][100:])
    beside = stack.run(pieces, torch.cat(parts))
    last = [(LENGTHS[n] - 1, 1, extents(n, LENGTHS[n])) for n in range(6)]
    return torch.cat([beside, stack.run(last, torch.cat([rows[-1:] for rows in hidden]))])


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_ragged_batches(
    folder: Path, device: torch.device, mode: Mode, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = hidden_size(folder)
    hidden = [random_rows(length, size, seed) for seed, length in enumerate(LENGTHS)]
    expected = ragged_steps(Stack(folder, CPU, "cpu"), hidden)
    allowed = mode.tolerance + (INT8_KV_TOLERANCE if kv_dtype == "int8" else 0.0)
    for group_numbers in (1 << 26, 2 * 60 * 2 * size):
        monkeypatch.setattr(ragged, "_GROUP_NUMBERS", group_numbers)
        found = ragged_steps(Stack(folder, mode, device, kv_dtype=kv_dtype), hidden)
        assert distance(found, expected) < allowed


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_forked_sequence(folder: Path, device: torch.device, kv_dtype: str) -> None:
    hidden = random_rows(40, hidden_size(folder))
    stack = Stack(folder, CPU, device, kv_dtype=kv_dtype)
    expected = stack.sequence(hidden, [40])[30:]
    stack.pool.copy_rows(3, 603, 30)
    stack.run([(20, 20, ((3, 43),))], -hidden[20:])  # the original goes another way
    found = stack.run([(30, 10, ((603, 643),))], hidden[30:])
    assert distance(found, expected) < INT8_KV_TOLERANCE
