"""Kernels compile for GPUs that are not there, in a process of its own: here they are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from petal_swarm.models.kernels import triton_attention, triton_products

ROOT = Path(__file__).parents[2]
#: Others are parts of these.
NAMES = [
    name
    for module in (triton_attention, triton_products)
    for name, made in vars(module).items()
    if hasattr(made, "arg_names") and not name.startswith("_")
]


def test_each_compiles_and_keeps_its_numbers_in_registers(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_builds", "--brief", "--kinds", "bf16"],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    built = {(row[0], row[2].partition(",")[0]) for row in rows}
    assert built == {(capability, name) for capability in ("80", "90") for name in NAMES}
    assert [row for row in rows if row[4] != "0"] == []  # bytes of stack, where spilled registers go
