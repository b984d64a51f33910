"""Compiles every Triton kernel for GPUs that need not be there: what Triton refuses, and what spills.

    python -m benchmarks.kernel_builds [--capabilities 80 90] [--brief]

Needs Triton (`pip install triton`), and no device. It shows that the kernels compile, and how many registers
and how much shared memory they take; not that they are right, which tests/models and tests/gpu are for.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from petal_swarm.models.kernels import products, triton_attention, triton_products

NUMBERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


class Build(NamedTuple):
    """A kernel, the types of its pointers, and its constants; other arguments are 32-bit integers."""

    name: str
    kernel: Any
    types: Mapping[str, str | None]
    constants: dict[str, int]
    options: dict[str, int]


def builds(kind: str) -> Iterator[Build]:
    """Of activations of `kind`."""
    x = NUMBERS[kind]
    linear: dict[str, str | None] = {
        "x": x, "values": "*i8", "codes": "*u8", "levels": "*fp32", "scales": "*fp32", "bias": x,
        "residual": x, "out": x, "partial": None,
    }  # fmt: skip
    split = {**linear, "partial": "*fp32"}
    for rows in (1, 2, 4):
        few = {"block_rows": rows, "block_outer": 16, "block_inner": 512 // rows}
        for types in (linear, split):
            yield Build(f"int8_few, {rows}", triton_products.int8_few, types, few, {"num_warps": 4})
        few = {**few, "block_inner": 256 // rows, "group_bytes": 32}
        yield Build(f"nf4_few, {rows}", triton_products.nf4_few, linear, few, {"num_warps": 4})
    for tile in products._TILES:
        sizes = {"block_rows": tile.rows, "block_outer": tile.outer, "block_inner": tile.inner}
        options = {"num_warps": tile.warps, "num_stages": tile.stages if kind != "fp32" else 2}
        for types in (linear, split):
            yield Build(f"int8_tiles, {tile.rows}", triton_products.int8_tiles, types, sizes, options)
    yield Build("finish", triton_products.finish, split, {"block_outer": 1024}, {})
    rounding = {"x": x, "dropped": "*u8", "quantized": "*i8", "steps": "*fp32"}
    yield Build("quantize_rows", triton_products.quantize_rows, rounding, {"block": 1024}, {})
    sums = {**linear, "sums": "*i32", "steps": "*fp32", "outliers": x}
    yield Build("finish_int8", triton_products.finish_int8, sums, {"block": 1024}, {})
    yield from attention(x)


def attention(x: str) -> Iterator[Build]:
    tables = dict.fromkeys(("lengths", "slots", "starts", "pages"), "*i32")
    floats = dict.fromkeys(("slopes", "sums", "tops", "totals", "rotation"), "*fp32")
    for pool, packed in ((x, None), ("*i8", "*fp32")):
        types = {**tables, **floats, "qkv": x, "out": x, "norm": x, "pair": pool, "pair_scales": packed}
        kept = "int8" if packed else "plain"
        options = {"num_warps": 1}
        yield Build(f"place, {kept}", triton_attention.place, types, {"half_block": 64}, options)
        for group, tile in ((1, 1), (8, 16)):
            constants = {
                "group": group, "group_block": tile, "size_block": 128, "page_tokens": 16, "block_keys": 64
            }  # fmt: skip
            options = {"num_warps": 4, "num_stages": 2}
            for parts in ("several parts", "one part"):
                own = types if parts == "several parts" else {**types, "sums": None}
                name = f"decode, {kept}, {group} heads a key, {parts}"
                yield Build(name, triton_attention.decode, own, constants, options)
    combined = {**floats, "out": x}
    constants = {"part_block": 32, "size_block": 128}
    yield Build("combine", triton_attention.combine, combined, constants, {"num_warps": 1})
    normed: dict[str, str | None] = {"x": x, "weight": x, "out": x}
    yield Build("rms_norm", triton_attention.rms_norm, normed, {"block": 1024}, {})


def brief(kind: str) -> Iterator[Build]:
    """One of each kernel: the last, which has most to do."""
    yield from {build.kernel.__name__: build for build in builds(kind)}.values()


def compile_for(build: Build, capability: int) -> Any:
    constants: dict[str, Any] = dict(build.constants)
    signature: dict[str, str] = {}
    for name in build.kernel.arg_names:
        kind = build.types.get(name, "fp32" if name in ("eps", "scale") else "i32")
        if kind is None or name in constants:
            constants.setdefault(name, None)
            kind = "constexpr"
        signature[name] = kind
    # Tensors begin at multiples of 16 bytes, and sizes of models are multiples of 16.
    sizes = ("inner", "outer", "part", "size", "plane", "strip", "step")
    divisible = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(build.kernel.arg_names)
        if signature[name].startswith("*") or name in sizes
    }
    source = ASTSource(build.kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=build.options)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack and of shared memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True)
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED):(\d+)", text.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--kinds", nargs="+", default=["bf16", "fp32"], choices=NUMBERS)
    parser.add_argument("--brief", action="store_true", help="one build of each kernel")
    arguments = parser.parse_args()
    print("| capability | activations | kernel | registers | stack, bytes | shared memory, KiB |")
    print("|---|---|---|---|---|---|")
    for capability in arguments.capabilities:
        for kind in arguments.kinds:
            for build in brief(kind) if arguments.brief else builds(kind):
                compiled = compile_for(build, capability)
                found = usage(compiled.asm["cubin"])
                print(
                    f"| {capability} | {kind} | {build.name} | {found['REG']} | {found['STACK']}"
                    f" | {compiled.metadata.shared / 1024:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
