"""`petal-swarm status`: who serves which blocks of a model, how fast, and how busy."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from petal_swarm.cli.common import add_client_options, new_parser, run_program

if TYPE_CHECKING:
    from petal_swarm.wire.announcement import Announcement

EXAMPLES = """\
  petal-swarm status bigscience/bloom-560m --initial-peers ADDR
  petal-swarm status MODEL --initial-peers ADDR --json | jq .missing_blocks

exit status: 0 if every block is served, 1 if some are not, 2 if the swarm could not be asked."""
PIPED_WIDTH = 120


def build_parser(prog: str = "petal-swarm status") -> argparse.ArgumentParser:
    parser = new_parser(prog, "Show who serves which blocks of a model.", EXAMPLES)
    add_client_options(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def main(argv: list[str] | None = None, prog: str = "petal-swarm status") -> int:
    return run_program(run, build_parser(prog).parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    status = asyncio.run(ask(arguments))
    if arguments.json:
        print(json.dumps(to_json(status), indent=2))
    else:
        show(status)
    return 1 if status.missing else 0


@dataclass(frozen=True, slots=True)
class Status:
    """What the swarm says of a model. `rtts_s` has those who answer, by peer id."""

    name: str
    model_key: str
    num_blocks: int
    announcements: tuple[Announcement, ...]
    rtts_s: Mapping[str, float]

    @property
    def missing(self) -> tuple[int, ...]:
        """Blocks that nobody serves. Whoever does not answer does not count: its record outlives it."""
        from petal_swarm.routing import missing_blocks

        return missing_blocks([a for a in self.announcements if a.peer_id in self.rtts_s], self.num_blocks)

    @property
    def adapters(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name and id of each that is offered to everybody, and the blocks that nobody serves with it."""
        from petal_swarm.routing import missing_blocks

        there = [a for a in self.announcements if a.peer_id in self.rtts_s]
        offered = sorted({adapter for announcement in there for adapter in announcement.adapters})
        return [
            (*adapter, missing_blocks([a for a in there if adapter in a.adapters], self.num_blocks))
            for adapter in offered
        ]

    def state(self, announcement: Announcement) -> str:
        return announcement.state if announcement.peer_id in self.rtts_s else "no answer"


async def ask(arguments: argparse.Namespace) -> Status:
    """Join as a client, ask, and leave."""
    from petal_swarm.client.config import ClientConfig
    from petal_swarm.client.swarm import Swarm
    from petal_swarm.models.checkpoint import open_checkpoint

    config = ClientConfig(
        initial_peers=tuple(arguments.initial_peers),
        transport=arguments.transport,
        swarm_key=arguments.swarm_key,
        identity=arguments.identity,
    )
    checkpoint = open_checkpoint(arguments.model)
    swarm = await Swarm.connect(config)
    try:
        announcements = await swarm.view.announcements(checkpoint.model_key)
        rtts_s = await swarm.view.measure(announcements)
    finally:
        await swarm.close()
    announcements.sort(key=lambda a: (a.span, a.name, a.peer_id))
    return Status(
        checkpoint.name, checkpoint.model_key, checkpoint.config.num_blocks, tuple(announcements), rtts_s
    )


def to_json(status: Status) -> dict[str, Any]:
    """The document of `--json`."""
    return {
        "model": status.name,
        "model_key": status.model_key,
        "num_blocks": status.num_blocks,
        "missing_blocks": list(status.missing),
        "adapters": [
            {"name": name, "id": adapter, "missing_blocks": list(missing)}
            for name, adapter, missing in status.adapters
        ],
        "peers": [peer_to_json(status, announcement) for announcement in status.announcements],
    }


def peer_to_json(status: Status, peer: Announcement) -> dict[str, Any]:
    return {
        "peer_id": peer.peer_id,
        "name": peer.name,
        "span": [peer.span.start, peer.span.end],
        "state": status.state(peer),
        "dtype": peer.dtype,
        "quant": peer.quant,
        "tokens_per_s": round(tokens_per_s(peer), 2),
        "queue_s": peer.queue_s,
        "kv_tokens": peer.kv_tokens,
        "kv_tokens_free": peer.kv_tokens_free,
        "rtt_s": status.rtts_s.get(peer.peer_id),
        "version": peer.version,
        "addresses": list(peer.addresses),
    }


def tokens_per_s(peer: Announcement) -> float:
    """How many tokens of one session the peer's span decodes in a second, by its own measurement."""
    return 1 / max(peer.step_time_s + len(peer.span) * peer.block_time_s, 1e-9)


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
    for title in ("tokens/s", "queue", "KV tokens free", "round trip", "version"):
        table.add_column(title, justify="right")
    for peer in status.announcements:
        table.add_row(*(Text(cell) for cell in row(status, peer)))
    console.print(Text(f"{status.name}: {status.num_blocks} blocks, {_peers(len(status.announcements))}"))
    if status.announcements:
        console.print(table)
    for name, adapter, missing in status.adapters:
        where = f"; nobody has it for {format_blocks(missing)}" if missing else ""
        console.print(Text(_printable(f"adapter {name} ({adapter}){where}")))
    if status.missing:
        console.print(Text(f"nobody serves {format_blocks(status.missing)}", style="bold red"))
    else:
        console.print(Text(f"all {status.num_blocks} blocks are served", style="green"))


def row(status: Status, peer: Announcement) -> Sequence[str]:
    """One peer's cells. What other people wrote is stripped of what a terminal would obey."""
    rtt_s = status.rtts_s.get(peer.peer_id)
    serving = peer.state == "serving"
    dtype = peer.dtype if peer.quant == "none" else f"{peer.dtype} {peer.quant}"
    cells = (
        peer.name or f"..{peer.peer_id[-8:]}",
        str(peer.span),
        status.state(peer),
        dtype,
        f"{tokens_per_s(peer):,.0f}" if serving else "",
        _time(peer.queue_s) if serving else "",
        f"{peer.kv_tokens_free:,} of {peer.kv_tokens:,}" if serving else "",
        "" if rtt_s is None else _time(rtt_s),
        peer.version,
    )
    return [_printable(cell) for cell in cells]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return (
        "0 ms" if seconds == 0 else f"{seconds * 1e3:.2g} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"
    )


def _peers(count: int) -> str:
    return f"{count or 'no'} peer{'' if count == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
