"""`petal-swarm doctor`: would a server work on this machine, and could others reach it?"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from petal_swarm.cli.checkup import Check, examine
from petal_swarm.cli.common import add_key_option, new_parser, peer_address, run_program

EXAMPLES = """\
  petal-swarm doctor --initial-peers ADDR
      what a server started here with these --initial-peers would be like
  petal-swarm doctor MODEL --listen /ip4/0.0.0.0/tcp/31330 --initial-peers ADDR
      the same with a fixed port, and how many blocks of MODEL would fit

Others are asked to dial this machine back: without --initial-peers nobody can tell.
exit status: 0 if others could reach a server here, 1 if not, 2 for arguments that cannot be used."""

_MARKS = {"ok": "ok  ", "warning": "hm  ", "problem": "BAD "}


def build_parser(prog: str = "petal-swarm doctor") -> argparse.ArgumentParser:
    parser = new_parser(
        prog, "Say whether a server would work here, and whether others can reach it.", EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="how many of its blocks fit, who serves it")
    parser.add_argument(
        "--initial-peers",
        metavar="ADDR",
        nargs="+",
        type=peer_address,
        default=[],
        help="addresses of servers, as they print them after `ready`",
    )
    parser.add_argument("--listen", metavar="MULTIADDR", nargs="+", default=[], help="as for run-server")
    parser.add_argument("--announce", metavar="MULTIADDR", nargs="+", default=[], help="as for run-server")
    parser.add_argument(
        "--reachability", default="auto", choices=("auto", "public", "private"), help="as for run-server"
    )
    add_key_option(parser)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--cache-dir", metavar="FOLDER", help="as for run-server")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def main(argv: list[str] | None = None, prog: str = "petal-swarm doctor") -> int:
    return run_program(run, build_parser(prog).parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    from petal_swarm.server.config import ServerConfig, default_cache_dir

    config = ServerConfig(
        model=arguments.model or "",
        initial_peers=tuple(arguments.initial_peers),
        new_swarm=not arguments.initial_peers,
        listen=tuple(arguments.listen),
        announce=tuple(arguments.announce),
        reachability=arguments.reachability,
        swarm_key=arguments.swarm_key,
        device=arguments.device,
        cache_dir=arguments.cache_dir or str(default_cache_dir(os.environ, Path.home())),
    )
    show = (lambda check: None) if arguments.json else show_check
    checks, verdict = asyncio.run(examine(config, show))
    reachable = verdict is not None and verdict.reachable
    if arguments.json:
        document: dict[str, Any] = {
            "reachable": reachable,
            "reachability": None if verdict is None else dataclasses.asdict(verdict),
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        print(json.dumps(document, indent=2))
    return 0 if reachable else 1


def show_check(check: Check) -> None:
    """One line, how it was found, and another where something is to be done."""
    print(_printable(f"{_MARKS[check.state]} {check.name}: {check.text}"), flush=True)
    for line in check.details:
        print(_printable(f"     {line}"), flush=True)
    if check.advice:
        print(_printable(f"     -> {check.advice}"), flush=True)


def _printable(text: str) -> str:
    """What other people wrote is stripped of what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


if __name__ == "__main__":
    sys.exit(main())
