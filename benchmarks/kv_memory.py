"""Memory of a session's KV cache that uses a quarter of its `max_length`, against room for all of it.

Blocks of bloom-560m's shape in this process; the resident memory of the process is what counts.

python -m benchmarks.kv_memory [--max-length 4096] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse

import psutil
import torch

from benchmarks.harness import checkpoint, workspace
from petal_swarm.engine.engine import Engine
from petal_swarm.engine.steps import StepRequest
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.stack import load_blocks
from petal_swarm.span import Slice, Span
from petal_swarm.wire.tensors import DTYPES

BLOCKS = Span(0, 12)
CHUNK = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    arguments = parser.parse_args()
    dtype, length = DTYPES[arguments.dtype], arguments.max_length
    with workspace() as folder:
        source = open_checkpoint(str(checkpoint("bloom-560m", folder)))
        stack = load_blocks(source, BLOCKS, dtype=dtype)
        engine = Engine(stack, kv_tokens=8 * length, max_batch_tokens=CHUNK)
        hidden = torch.randn(CHUNK, source.config.hidden_size, dtype=dtype)
        engine.open_session("warm", max_length=length)
        engine.run([StepRequest("warm", BLOCKS, (Slice(0, 0, CHUNK),), hidden, rows="none")])
        engine.open_session("measured", max_length=length)
        before = psutil.Process().memory_info().rss
        for position in range(0, length // 4, CHUNK):
            piece = (Slice(0, position, CHUNK),)
            (result,) = engine.run([StepRequest("measured", BLOCKS, piece, hidden, rows="none")])
            assert result.error is None, result.error
        used = psutil.Process().memory_info().rss - before
        whole = 2 * source.config.hidden_size * dtype.itemsize * len(BLOCKS) * length
    print(f"a quarter of {length} tokens, {len(BLOCKS)} blocks: {used / 1e6:.1f} MB of resident memory")
    print(f"room for all of them: {whole / 1e6:.1f} MB; ratio {used / whole:.3f}")


if __name__ == "__main__":
    main()
