"""`petal-swarm gateway`: a swarm behind OpenAI's HTTP API, for programs and for people with a browser."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import sys

from petal_swarm.cli.common import (
    Parser,
    add_swarm_options,
    add_threads_option,
    new_parser,
    not_negative,
    positive,
    quiet_transformers,
    run_program,
)

EXAMPLES = """\
  petal-swarm gateway bigscience/bloom-560m --initial-peers ADDR
      prints `ready http://127.0.0.1:8080`: an address for the openai package, and for a browser
  petal-swarm gateway MODEL --host 0.0.0.0 --api-keys keys.txt --initial-peers ADDR
      for other machines, and only for those who have a key
  petal-swarm gateway MODEL --adapter pirate=./pirate-lora --initial-peers ADDR
      also as the model `pirate`

in Python:
  client = openai.OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="none")"""


#: Scheme, name or address, port: no path, which no browser sends.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/:?#@\[\],]+)(:\d{1,5})?")
_HOST = re.compile(r"[^\s/:?#@\[\],]+|[0-9a-f]*:[0-9a-f.]*:[0-9a-f:.]*")


def build_parser(prog: str = "petal-swarm gateway") -> Parser:
    parser = new_parser(prog, "Let programs and browsers use a swarm by HTTP.", EXAMPLES)
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="Hugging Face id, local folder, or GGUF file"
    )
    parser.add_argument("--model", metavar="MODEL", dest="model_option", help="the same as an option")
    parser.add_argument(
        "--model-name", metavar="NAME", help="what visitors call it (default: as the checkpoint)"
    )
    parser.add_argument(
        "--adapter",
        dest="adapters",
        metavar="NAME=FOLDER",
        action="append",
        default=[],
        type=named_folder,
        help="offer this adapter, in PEFT's format, as a model of this name; may be given again. Those that"
        " servers offer are models in any case",
    )
    _add_swarm_options(parser)
    _add_http_options(parser)
    _add_limits(parser)
    return parser


def _add_swarm_options(parser: Parser) -> None:
    swarm = add_swarm_options(parser)
    swarm.add_argument(
        "--wait",
        dest="wait_s",
        type=not_negative,
        default=5.0,
        metavar="SECONDS",
        help="how long a request waits for blocks that nobody serves (default: %(default)g)",
    )
    swarm.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of embeddings and LM head (default: %(default)s)",
    )
    add_threads_option(swarm)


def _add_http_options(parser: Parser) -> None:
    http = parser.add_argument_group("HTTP")
    http.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 is all of this machine's (default: %(default)s, for this"
        " machine alone)",
    )
    http.add_argument("--port", type=port, default=8080, help="0 is any that is free (default: %(default)s)")
    http.add_argument(
        "--api-keys",
        metavar="FILE",
        help="answer only who has a key of this file: in each line KEY [NAME [REQUESTS/MIN [TOKENS/MIN]]],"
        " read again on SIGHUP",
    )
    http.add_argument(
        "--allow-anonymous", action="store_true", help="answer others as well, within the limits of visitors"
    )
    http.add_argument(
        "--cors",
        metavar="ORIGIN",
        type=origin,
        action="append",
        default=[],
        help="let pages of this site ask, such as https://example.org, or * for all; may be given again",
    )
    http.add_argument(
        "--allow-host",
        metavar="NAME",
        type=host_name,
        action="append",
        default=[],
        help="a further name under which a gateway on this machine's own address answers; may be given again",
    )
    http.add_argument(
        "--trusted-proxy",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="believe what this address or network says of visitors' addresses in X-Forwarded-For; may be"
        " given again",
    )
    http.add_argument(
        "--drain-timeout",
        type=not_negative,
        default=10.0,
        metavar="SECONDS",
        help="how long running answers may go on after Ctrl-C or SIGTERM (default: %(default)g)",
    )


def _add_limits(parser: Parser) -> None:
    """Those of all visitors together, and of each."""
    limits = parser.add_argument_group("limits")
    for name, default, what in (
        ("--max-tokens", 2048, "the longest answer"),
        ("--max-requests", 32, "answers at once, of all visitors"),
        ("--max-body-kib", 2048, "the largest request"),
    ):
        limits.add_argument(
            name, type=positive, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    limits.add_argument(
        "--max-queue",
        type=count,
        default=256,
        metavar="N",
        help="requests that may wait for room (default: %(default)s); who comes then is told 429, and when to"
        " come again",
    )
    each = parser.add_argument_group(
        "limits of each visitor",
        "for keys and addresses; 0 is none. A gateway that only this machine reaches has none",
    )
    for name, default, what in (
        ("--requests-per-min", 60, "requests in a minute"),
        ("--tokens-per-min", 60_000, "tokens of prompts and answers in a minute"),
        ("--requests-at-once", 8, "requests under way or waiting"),
    ):
        each.add_argument(name, type=count, metavar="N", help=f"{what} (default: {default})")


def parse(argv: list[str] | None = None, prog: str = "petal-swarm gateway") -> argparse.Namespace:
    """The arguments; `model` is what either form of it says."""
    parser = build_parser(prog)
    arguments = parser.parse_intermixed_args(argv)
    named = [name for name in (arguments.model, arguments.model_option) if name is not None]
    if not named:
        parser.error("the following arguments are required: MODEL")
    if len(named) > 1:
        parser.error(f"either MODEL or --model, not both: {named[0]!r} and {named[1]!r}")
    if not named[0].strip():
        parser.error("MODEL is empty: a Hugging Face id, a local folder or a GGUF file is expected")
    arguments.model = named[0]
    return arguments


def main(argv: list[str] | None = None, prog: str = "petal-swarm gateway") -> int:
    return run_program(run, parse(argv, prog))


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to leave."""
    import torch

    torch.set_num_threads(arguments.threads)
    quiet_transformers(arguments.log_level)
    from petal_swarm.cli.front_door import serve

    with contextlib.suppress(ImportError):
        import uvloop

        return int(uvloop.run(serve(arguments)))
    return asyncio.run(serve(arguments))


def port(text: str) -> int:
    """A TCP port, for argparse."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port, 0 to 65535, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    if not text.isdecimal() or len(text) > 15:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def origin(text: str) -> str:
    """What a browser sends as `Origin`, or `*`, for argparse; a slash at the end is none of it."""
    if text == "*":
        return text
    bare = text.removesuffix("/").lower()
    if not _ORIGIN.fullmatch(bare):
        raise argparse.ArgumentTypeError(
            f"expected an origin such as https://example.org or http://localhost:3000, or *, got {text!r}"
        )
    return bare


def host_name(text: str) -> str:
    """What stands in `Host` without its port, for argparse."""
    bare = text.removeprefix("[").removesuffix("]").removesuffix(".").lower()
    if not _HOST.fullmatch(bare):
        raise argparse.ArgumentTypeError(
            f"expected a name such as swarm.example.org, without http:// and port, got {text!r}"
        )
    return bare


def named_folder(text: str) -> tuple[str, str]:
    """NAME=FOLDER, for argparse."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, got {text!r}")
    return name, folder


if __name__ == "__main__":
    sys.exit(main())
