"""`petal-swarm key`: make and check the keys of private swarms, and tell peer ids."""

from __future__ import annotations

import argparse
import sys

from petal_swarm.cli.common import HelpFormatter, new_parser, run_program

EXAMPLES = """\
  petal-swarm key new swarm.key
      make a key; copy it to every server and client of your swarm, and start them with --swarm-key swarm.key
  petal-swarm key check swarm.key
      whether it is whole and only yours to read, and eight digits to compare with other machines
  petal-swarm key peer-id client.identity
      the peer id of --identity client.identity, made if missing: what a server takes as --allow-peer"""


def build_parser(prog: str = "petal-swarm key") -> argparse.ArgumentParser:
    parser = new_parser(prog, "Keys of private swarms: whoever has the file is in.", EXAMPLES)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, function, file, text in (
        ("new", new, "swarm.key", "write a new key to FILE (default: %(default)s), never over another one"),
        ("check", check, "swarm.key", "read FILE (default: %(default)s) and print its fingerprint"),
        ("peer-id", peer_id, None, "print the peer id of the identity in FILE, which is made if missing"),
    ):
        action = actions.add_parser(name, help=text.partition(" (")[0], formatter_class=HelpFormatter)
        action.add_argument("file", metavar="FILE", nargs="?" if file else None, default=file, help=text)
        action.set_defaults(run=function)
    return parser


def main(argv: list[str] | None = None, prog: str = "petal-swarm key") -> int:
    return run_program(run, build_parser(prog).parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    arguments.run(arguments.file)
    return 0


def new(file: str) -> None:
    from petal_swarm.net.swarm_key import SwarmKey

    key = SwarmKey.generate()
    key.save(file)
    print(
        f"wrote {file} (fingerprint {key.fingerprint}): whoever has this file is in the swarm\n"
        "next, copy it to every machine that takes part, for example by scp -p, and start there\n"
        f"  run_server MODEL --swarm-key {file} --new-swarm\n"
        f"  petal-swarm chat MODEL --swarm-key {file} --initial-peers ADDR"
    )


def check(file: str) -> None:
    from petal_swarm.net.swarm_key import SwarmKey

    print(f"{file} is a swarm key, fingerprint {SwarmKey.load(file).fingerprint}")


def peer_id(file: str) -> None:
    from petal_swarm.net.identity import Identity

    print(Identity.load_or_create(file).peer_id)


if __name__ == "__main__":
    sys.exit(main())
