"""`run_server`: donate a GPU, or a CPU, by hosting some blocks of a model."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from pathlib import Path

from petal_swarm.cli.common import (
    add_key_option,
    new_parser,
    not_negative,
    peer_address,
    positive,
    run_program,
)

#: Twice the streams that a server allows (`SessionLimits.max_streams`), and some for everything else.
MAX_OPEN_FILES = 20_000

EXAMPLES = """\
  run_server bigscience/bloom-560m --new-swarm
      start a swarm on this machine, hosting as many blocks as fit
  run_server bigscience/bloom-560m --new-swarm --listen /ip4/0.0.0.0/tcp/31330
      the same, open to other machines
  run_server bigscience/bloom-560m --initial-peers /ip4/203.0.113.7/tcp/31330/p2p/12D3Koo...
      join a swarm, taking the blocks that it needs most
  run_server ./my-model --initial-peers ADDR --blocks 0:12 --device cuda --name my-gpu
      host given blocks of a local checkpoint
  petal-swarm key new swarm.key; run_server MODEL --new-swarm --swarm-key swarm.key
      a private swarm: only who has the key can use it, or join it

When it serves, it prints `ready ADDRESS` on stdout: give that address to others.
Ctrl-C or SIGTERM lets running sessions end, then leaves; a second one leaves at once."""


def build_parser(prog: str = "run_server") -> argparse.ArgumentParser:
    examples = EXAMPLES.replace("run_server", prog)
    parser = new_parser(prog, "Host some blocks of a model for everybody in a swarm.", examples)
    parser.add_argument(
        "model", metavar="MODEL", help="Hugging Face id, local folder (safetensors or old .bin), or GGUF file"
    )
    _add_swarm_options(parser.add_argument_group("the swarm"))
    blocks = parser.add_argument_group("the blocks")
    _add_block_options(blocks)
    _add_cache_options(blocks)
    _add_adapter_options(blocks)
    _add_memory_options(blocks)
    parser.add_argument(
        "--drain-timeout",
        type=not_negative,
        default=60.0,
        metavar="SECONDS",
        help="how long to let sessions end after Ctrl-C or SIGTERM (default: %(default)g)",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="FOLDER|none",
        help="keep quantized blocks (up to 100 GB) and what was measured of this machine in FOLDER, for a"
        " faster start next time (default: petal_swarm in your cache folder, such as ~/.cache)",
    )
    return parser


def _add_swarm_options(swarm: argparse._ArgumentGroup) -> None:
    swarm.add_argument("--new-swarm", action="store_true", help="start a swarm instead of joining one")
    swarm.add_argument(
        "--initial-peers",
        metavar="ADDR",
        nargs="+",
        type=peer_address,
        default=[],
        help="addresses of servers to join",
    )
    add_key_option(swarm)
    swarm.add_argument(
        "--allow-peer",
        metavar="PEER_ID",
        action="append",
        default=[],
        help="open sessions for this peer only, and for others so named (repeatable; a client keeps its"
        " peer id with --identity, and `petal-swarm key peer-id` tells it). Sessions that these peers run"
        " through several servers work if all of them allow it. Others still see that the server is there",
    )
    swarm.add_argument("--name", default="", help="what others see in `petal-swarm status`")
    swarm.add_argument(
        "--identity",
        metavar="FILE",
        help="keep the peer id in FILE over restarts; made if missing (default: a new one each time)",
    )
    swarm.add_argument(
        "--listen",
        metavar="MULTIADDR",
        nargs="+",
        default=[],
        help="where to listen, such as /ip4/0.0.0.0/tcp/31330, or none (default: this machine only while"
        " the swarm is on it, else every interface, at a free port)",
    )
    swarm.add_argument(
        "--max-mbit-per-peer",
        type=float,
        default=2000.0,
        metavar="MBIT",
        help="steps and results of one client, there and back, in Mbit/s; what is more has to wait"
        " (default: %(default)g)",
    )
    swarm.add_argument(
        "--upload-mbit",
        type=float,
        metavar="MBIT",
        help="how fast your line sends, in Mbit/s, for clients to find routes by (default: it is measured"
        " against up to three other servers, once an hour, with at most 5 MB for each)",
    )
    swarm.add_argument(
        "--announce",
        metavar="MULTIADDR",
        nargs="+",
        default=[],
        help="what others are told to dial, for a forwarded port or a container (default: --listen)",
    )
    swarm.add_argument(
        "--reachability",
        default="auto",
        choices=("auto", "public", "private"),
        help="public: others can dial this machine, and it relays for those that nobody can; private: nobody"
        " can, so be reached through relays (default: auto, others are asked; see petal-swarm doctor)",
    )


def _add_block_options(blocks: argparse._ArgumentGroup) -> None:
    blocks.add_argument("--blocks", metavar="START:END", help="host blocks START up to, not including, END")
    blocks.add_argument(
        "--num-blocks",
        type=int,
        metavar="N",
        help="host N blocks, those that the swarm needs most (default: as many as fit)",
    )
    blocks.add_argument(
        "--rebalance",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="move to other blocks when the swarm needs them more (default: yes, except with --blocks)",
    )
    blocks.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    blocks.add_argument(
        "--tensor-parallel",
        type=positive,
        default=1,
        metavar="N",
        help="share each block out over N GPUs, or N processes on a CPU; N must divide the model's attention"
        " heads (default: 1)",
    )
    blocks.add_argument(
        "--kernels",
        action="store_true",
        help="on an NVIDIA GPU: try kernels of our own and CUDA graphs at the start, and use those that are"
        " right and faster there (new: not yet timed on a device)",
    )
    blocks.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of arithmetic and plain weights (default: float32 on a CPU, else 16 bits as in the checkpoint)",
    )
    blocks.add_argument(
        "--quant",
        default="auto",
        choices=("auto", "none", "int8", "nf4"),
        help="quantization of the weights: int8 takes a quarter of float32's memory, nf4 a seventh"
        " (default: int8 for BLOOM, else none)",
    )


def _add_cache_options(blocks: argparse._ArgumentGroup) -> None:
    blocks.add_argument(
        "--kv-tokens", type=int, metavar="N", help="room of the KV cache (default: from the free memory)"
    )
    blocks.add_argument(
        "--prefix-tokens",
        type=int,
        metavar="N",
        help="keep up to N tokens of finished prompts in the KV cache, for later ones that start alike"
        " (default: half of --kv-tokens; 0: share nothing)",
    )
    blocks.add_argument(
        "--kv-dtype",
        default="auto",
        choices=("auto", "int8"),
        help="of the KV cache; int8, rounded, holds twice the tokens of 16 bits (default: auto, as --dtype)",
    )
    blocks.add_argument(
        "--max-batch-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="most tokens to compute at once (default: %(default)s)",
    )


def _add_adapter_options(blocks: argparse._ArgumentGroup) -> None:
    blocks.add_argument(
        "--adapters",
        metavar="FOLDER",
        nargs="+",
        default=[],
        help="offer these adapters to everybody: folders or Hugging Face ids in PEFT's format, known by the"
        " last part of their path, or as NAME=FOLDER",
    )
    blocks.add_argument(
        "--adapter-mib",
        type=int,
        default=512,
        metavar="MIB",
        help="memory for adapters that clients upload, half of it for one client at most (default:"
        " %(default)s; 0: take none)",
    )
    blocks.add_argument(
        "--training-mib",
        type=int,
        metavar="MIB",
        help="memory for what clients that train leave between a pass forward and its gradient; what is"
        " dropped is computed again (default: a quarter of what is free; 0: do not train)",
    )


def _add_memory_options(blocks: argparse._ArgumentGroup) -> None:
    blocks.add_argument(
        "--offload",
        default="none",
        choices=("none", "cpu", "disk"),
        help="host blocks that do not fit the device as well: in the host's memory, or files in --cache-dir;"
        " they are brought to the device ahead of use (default: %(default)s; no training with it)",
    )
    blocks.add_argument(
        "--device-memory",
        type=int,
        metavar="MIB",
        help="memory of the device for blocks and KV cache (default: most of what is free now)",
    )
    blocks.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="CPU threads for arithmetic, shared out with --tensor-parallel (default: one for each core)",
    )


def main(argv: list[str] | None = None, prog: str = "run_server") -> int:
    return run_program(run, build_parser(prog).parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to leave."""
    from petal_swarm.server.config import ServerConfig, default_cache_dir
    from petal_swarm.span import Span

    default = str(default_cache_dir(os.environ, Path.home()))
    config = ServerConfig(
        model=arguments.model,
        initial_peers=tuple(arguments.initial_peers),
        new_swarm=arguments.new_swarm,
        blocks=Span.parse(arguments.blocks) if arguments.blocks else None,
        num_blocks=arguments.num_blocks,
        rebalance=arguments.rebalance,
        listen=tuple(arguments.listen),
        announce=tuple(arguments.announce),
        reachability=arguments.reachability,
        identity=arguments.identity,
        swarm_key=arguments.swarm_key,
        allow_peers=tuple(arguments.allow_peer),
        device=arguments.device,
        tensor_parallel=arguments.tensor_parallel,
        kernels=arguments.kernels,
        dtype=arguments.dtype,
        quant=arguments.quant,
        kv_dtype=arguments.kv_dtype,
        kv_tokens=arguments.kv_tokens,
        prefix_tokens=arguments.prefix_tokens,
        max_batch_tokens=arguments.max_batch_tokens,
        max_mbit_per_peer=arguments.max_mbit_per_peer,
        upload_mbit=arguments.upload_mbit,
        name=arguments.name[:64],
        drain_timeout_s=arguments.drain_timeout,
        adapters=tuple(arguments.adapters),
        adapter_mib=arguments.adapter_mib,
        training_mib=arguments.training_mib,
        offload=arguments.offload,
        device_memory_mib=arguments.device_memory,
        cache_dir=None if arguments.cache_dir == "none" else arguments.cache_dir or default,
    )
    _allow_many_files()
    if arguments.threads is not None:
        import torch

        torch.set_num_threads(arguments.threads)

    from petal_swarm.cli.serve import serve

    with contextlib.suppress(ImportError):
        import uvloop

        return int(uvloop.run(serve(config)))
    return asyncio.run(serve(config))


def _allow_many_files() -> None:
    """Each stream is two open files. A shell's usual 1024 would let one peer use them up."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows; a system that forbids it
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
