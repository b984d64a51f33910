"""What all programs share: parsers, logging, errors as one line and exit status 2, options of clients."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from petal_swarm.errors import PetalSwarmError
from petal_swarm.version import __version__

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as they are written, and does not spread options over two columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: whoever wants the whole usage asks for it."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Options that do not exist are named before those that are missing: one may be the other."""
        words = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:  # else they may be an action's
            self._check_options(words)
        return super().parse_known_args(words, namespace)

    def _check_options(self, words: Sequence[str]) -> None:
        options = [option for option in self._option_string_actions if option.startswith("--")]
        for word in takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            is_option = name.startswith("--") and " " not in word
            if is_option and not any(option.startswith(name) for option in options):
                near = difflib.get_close_matches(name, options, n=1)
                self.error(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else ""))

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message} (try {self.prog} --help)\n")


def new_parser(prog: str, description: str, examples: str) -> Parser:
    """A parser with examples under its help, `--version` and `--log-level`."""
    parser = Parser(
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
    add_swarm_options(parser)


def add_swarm_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options by which a client finds its swarm, in a group that can have more."""
    swarm = parser.add_argument_group("the swarm")
    swarm.add_argument(
        "--initial-peers",
        metavar="ADDR",
        nargs="+",
        type=peer_address,
        required=True,
        help="addresses of servers, as they print them after `ready`",
    )
    add_key_option(swarm)
    swarm.add_argument(
        "--identity",
        metavar="FILE",
        help="keep the peer id in FILE, for servers with --allow-peer; made if missing (default: a new one"
        " each time)",
    )
    swarm.add_argument(
        "--transport",
        default="auto",
        choices=("auto", "p2pd", "libp2p"),
        help="p2pd: the Go libp2p daemon (Linux x86-64); libp2p: pure Python, anywhere (default: auto)",
    )
    return swarm


def add_key_option(swarm: argparse._ActionsContainer) -> None:
    """`--swarm-key`, alike for servers and clients."""
    swarm.add_argument(
        "--swarm-key",
        metavar="FILE",
        help="take part in the private swarm of this key (petal-swarm key new makes one); nobody without"
        " it can use the swarm, join it or ask it anything",
    )


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Options of the programs that load a client's part of a model."""
    parser.add_argument(
        "--wait",
        dest="wait_s",
        type=not_negative,
        default=20.0,
        metavar="SECONDS",
        help="how long to wait for blocks that nobody serves yet (default: %(default)g)",
    )
    add_threads_option(parser)


def add_threads_option(parser: argparse._ActionsContainer) -> None:
    """`--threads`, alike for all clients."""
    parser.add_argument(
        "--threads",
        type=positive,
        default=default_threads(),
        metavar="N",
        help="CPU threads for embeddings and LM head (default: half of the cores, %(default)s here)",
    )


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """`--adapter`, for programs that use one as it is."""
    parser.add_argument(
        "--adapter",
        metavar="FOLDER|NAME",
        help="use this adapter: a folder or Hugging Face id in PEFT's format, which is uploaded to the"
        " servers, or the name of one that they offer (petal-swarm status lists those)",
    )


def add_sampling_options(parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int) -> None:
    """How the next token is chosen, and how many there may be."""
    options = parser.add_argument_group("the answer")
    options.add_argument(
        "--max-new-tokens",
        type=positive,
        default=max_new_tokens,
        metavar="N",
        help="the longest answer (default: %(default)s)",
    )
    options.add_argument(
        "--temperature",
        type=not_negative,
        default=temperature,
        metavar="T",
        help="0 takes the likeliest token each time; higher is more varied (default: %(default)g)",
    )
    options.add_argument(
        "--top-p", type=share, metavar="P", help="draw from the likeliest tokens that make up P (0 to 1)"
    )
    options.add_argument("--top-k", type=positive, metavar="K", help="draw from the K likeliest tokens")
    options.add_argument("--seed", type=int, metavar="N", help="the same draws every time")


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` that the options of `add_sampling_options` mean; seeds torch."""
    if arguments.seed is not None:
        import torch

        torch.manual_seed(arguments.seed)
    chosen: dict[str, Any] = {"do_sample": arguments.temperature > 0}
    if arguments.temperature > 0:
        given = {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": arguments.top_k}
        chosen |= {name: value for name, value in given.items() if value is not None}
    return chosen


def load_tokenizer(arguments: argparse.Namespace) -> Any:
    """The tokenizer of a model that can be used here; says first what else is wrong with the model."""
    from petal_swarm.models.checkpoint import open_checkpoint
    from petal_swarm.models.tokenizer import load_tokenizer

    open_checkpoint(arguments.model)
    return load_tokenizer(arguments.model)


def load_client(arguments: argparse.Namespace) -> Any:
    """The swarm model that the options of `add_client_options` and `add_loading_options` describe."""
    import torch

    from petal_swarm.client.auto import AutoSwarmModelForCausalLM

    torch.set_num_threads(arguments.threads)
    quiet_transformers(arguments.log_level)
    return AutoSwarmModelForCausalLM.from_pretrained(
        arguments.model,
        initial_peers=arguments.initial_peers,
        transport=arguments.transport,
        swarm_key=arguments.swarm_key,
        identity=arguments.identity,
        wait_for_blocks_s=arguments.wait_s,
        adapter=arguments.adapter,
        progress=sys.stderr.isatty(),
    )


def peer_address(text: str) -> str:
    """An address, for argparse; catches what `--initial-peers A B ...` took by mistake."""
    if not text.startswith("/") or "/p2p/" not in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an address such as /ip4/127.0.0.1/tcp/31330/p2p/12D3Koo..."
            " (other arguments go before --initial-peers)"
        )
    return text


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def not_negative(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def share(text: str) -> float:
    """A number in (0, 1], for argparse."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def default_threads() -> int:
    """Half of the cores: torch's idle threads spin, and servers on the same machine need theirs."""
    return max(1, (os.cpu_count() or 1) // 2)


def run_program(work: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Set up logging, do the work, and turn our own errors into one line on stderr and status 2."""
    configure_logging(arguments.log_level)
    try:
        return work(arguments)
    except PetalSwarmError as error:
        if arguments.log_level == "debug":
            logging.getLogger("petal_swarm").exception("failed")
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left (`| head`); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
        # Says twice for each of its retries that a host cannot be reached; the error at the end says it once.
        logging.getLogger("huggingface_hub.utils._http").setLevel("ERROR")
        # The daemon calls it an error that its socket closes as it ends. What matters, our calls raise.
        logging.getLogger("hivemind.p2p.p2p_daemon").setLevel("CRITICAL")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)


def quiet_transformers(level: str) -> None:
    """transformers gives advice to programmers at warning level; users of a program cannot follow it."""
    if level != "debug":
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
