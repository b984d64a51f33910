"""`petal-swarm status`: who serves which blocks of a model, how fast, and how busy."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from petal_swarm.cli.common import add_client_options, new_parser, run_program

if TYPE_CHECKING:
    from petal_swarm.client.status import Status
    from petal_swarm.client.swarm import Swarm
    from petal_swarm.client.watch import SwarmWatch
    from petal_swarm.models.checkpoint import Checkpoint
    from petal_swarm.wire.announcement import Announcement

EXAMPLES = """\
  petal-swarm status bigscience/bloom-560m --initial-peers ADDR
  petal-swarm status MODEL --initial-peers ADDR --json | jq .missing_blocks

  petal-swarm status MODEL --initial-peers ADDR --watch      live, until q or Ctrl-C

exit status: 0 if every block is served, 1 if some are not, 2 if the swarm could not be asked."""
PIPED_WIDTH = 120


def build_parser(prog: str = "petal-swarm status") -> argparse.ArgumentParser:
    parser = new_parser(prog, "Show who serves which blocks of a model.", EXAMPLES)
    add_client_options(parser)
    parser.add_argument(
        "--json", action="store_true", help="for programs; with --watch a line for each event"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="go on looking, and show what happens; a line for each event where the output is no terminal",
    )
    return parser


def main(argv: list[str] | None = None, prog: str = "petal-swarm status") -> int:
    return run_program(run, build_parser(prog).parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    from petal_swarm.client.status import to_json

    if arguments.watch:
        from petal_swarm.cli.live_status import live_status

        return 1 if asyncio.run(watch(arguments, live_status)).missing else 0
    status = asyncio.run(ask(arguments))
    if arguments.json:
        print(json.dumps(to_json(status), indent=2))
    else:
        show(status)
    return 1 if status.missing else 0


async def ask(arguments: argparse.Namespace) -> Status:
    """Join as a client, ask, and leave."""
    from petal_swarm.client.status import Status, in_order

    checkpoint, swarm = await _join(arguments)
    try:
        announcements = await swarm.view.announcements(checkpoint.model_key)
        rtts_s = await swarm.view.measure(announcements)
    finally:
        await swarm.close()
    num_blocks = checkpoint.config.num_blocks
    return Status(checkpoint.name, checkpoint.model_key, num_blocks, in_order(announcements), rtts_s)


async def watch(
    arguments: argparse.Namespace, live: Callable[[SwarmWatch, bool], Awaitable[Status]]
) -> Status:
    """Join as a client, show what happens until somebody has seen enough, leave; the last status."""
    from petal_swarm.client.view import ModelRef
    from petal_swarm.client.watch import SwarmWatch

    checkpoint, swarm = await _join(arguments)
    shape = checkpoint.config
    model = ModelRef(checkpoint.model_key, shape.num_blocks, shape.hidden_size)
    try:
        watch = SwarmWatch(swarm, model, checkpoint.name)
        try:
            return await live(watch, arguments.json)
        finally:
            await watch.close()
    finally:
        await swarm.close()


async def _join(arguments: argparse.Namespace) -> tuple[Checkpoint, Swarm]:
    from petal_swarm.client.config import ClientConfig
    from petal_swarm.client.swarm import Swarm
    from petal_swarm.models.checkpoint import open_checkpoint

    config = ClientConfig(
        initial_peers=tuple(arguments.initial_peers),
        transport=arguments.transport,
        swarm_key=arguments.swarm_key,
        identity=arguments.identity,
    )
    return open_checkpoint(arguments.model), await Swarm.connect(config)


def show(status: Status) -> None:
    """The table, and one line that says whether the model can be used."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from petal_swarm.routing import format_blocks

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=None)
    for title in ("peer", "blocks", "state", "dtype"):
        table.add_column(title, no_wrap=title == "blocks")
    for title in ("tokens/s", "queue", "KV tokens free", "round trip", "upload", "version"):
        table.add_column(title, justify="right")
    for peer in status.announcements:
        table.add_row(*(Text(cell) for cell in row(status, peer)))
    console.print(
        Text(f"{status.name}: {status.num_blocks} blocks, {count_peers(len(status.announcements))}")
    )
    if status.announcements:
        console.print(table)
    for name, adapter, missing in status.adapters:
        where = f"; nobody has it for {format_blocks(missing)}" if missing else ""
        console.print(Text(printable(f"adapter {name} ({adapter}){where}")))
    if status.missing:
        console.print(Text(f"nobody serves {format_blocks(status.missing)}", style="bold red"))
    else:
        console.print(Text(f"all {status.num_blocks} blocks are served", style="green"))


def row(status: Status, peer: Announcement) -> Sequence[str]:
    """One peer's cells. What other people wrote is stripped of what a terminal would obey."""
    from petal_swarm.client.status import tokens_per_s
    from petal_swarm.directory.upload import shown

    rtt_s = status.rtts_s.get(peer.peer_id)
    serving = peer.state == "serving"
    dtype = peer.dtype if peer.quant == "none" else f"{peer.dtype} {peer.quant}"
    cells = (
        peer.name or f"..{peer.peer_id[-8:]}",
        str(peer.span),
        status.state(peer),
        dtype,
        f"{tokens_per_s(peer):,.0f}" if serving else "",
        duration(peer.queue_s) if serving else "",
        f"{peer.kv_tokens_free:,} of {peer.kv_tokens:,}" if serving else "",
        "" if rtt_s is None else duration(rtt_s),
        shown(peer.bandwidth_bytes_per_s) if peer.bandwidth_bytes_per_s else "",
        peer.version,
    )
    return [printable(cell) for cell in cells]


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return (
        "0 ms" if seconds == 0 else f"{seconds * 1e3:.2g} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"
    )


def count_peers(count: int) -> str:
    return f"{count or 'no'} peer{'' if count == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
