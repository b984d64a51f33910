"""What all programs share: logging, errors as one line and exit status 2, options of clients."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from petal_swarm.errors import PetalSwarmError
from petal_swarm.version import __version__

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as they are written, and does not spread options over two columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


def new_parser(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser with examples under its help, `--version` and `--log-level`."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, epilog=f"examples:\n{examples}", formatter_class=HelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"petal_swarm {__version__}")
    parser.add_argument(
        "--log-level",
        default="warning",
        choices=("debug", "info", "warning", "error"),
        help="how much to log to stderr (default: %(default)s)",
    )
    return parser


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and the options by which a client finds its swarm."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id, local folder, or GGUF file")
    parser.add_argument(
        "--initial-peers",
        metavar="ADDR",
        nargs="+",
        required=True,
        help="addresses of servers, as they print them after `ready`",
    )
    parser.add_argument(
        "--transport",
        default="auto",
        choices=("auto", "p2pd", "libp2p"),
        help="p2pd: the Go libp2p daemon (Linux x86-64); libp2p: pure Python, anywhere (default: auto)",
    )
    parser.add_argument(
        "--wait",
        dest="wait_s",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="how long to wait for blocks that nobody serves yet (default: %(default)g)",
    )


def load_client(arguments: argparse.Namespace) -> Any:
    """The swarm model that the options of `add_client_options` describe."""
    from petal_swarm.client.auto import AutoSwarmModelForCausalLM

    return AutoSwarmModelForCausalLM.from_pretrained(
        arguments.model,
        initial_peers=arguments.initial_peers,
        transport=arguments.transport,
        wait_for_blocks_s=arguments.wait_s,
        progress=sys.stderr.isatty(),
    )


def run_program(work: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Set up logging, do the work, and turn our own errors into one line on stderr and status 2."""
    configure_logging(arguments.log_level)
    try:
        return work(arguments)
    except PetalSwarmError as error:
        if arguments.log_level == "debug":
            logging.getLogger("petal_swarm").exception("failed")
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def configure_logging(level: str) -> None:
    """Our own log to stderr; that of the libraries below only from warnings up, unless debugging."""
    logging.basicConfig(
        level="DEBUG" if level == "debug" else "WARNING",
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("petal_swarm").setLevel(level.upper())
    if level != "debug":
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
