"""`petal-swarm demo`: a whole swarm on this machine, from nothing to an answer, or to a page to ask on."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from petal_swarm.cli.common import default_threads, load_client, new_parser, positive, run_program
from petal_swarm.cli.gateway import port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from petal_swarm.cli.local_swarm import LocalSwarm, ServerProcess
    from petal_swarm.span import Span

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_QUESTION = "Explain in one sentence why bees live in swarms."
EXAMPLES = """\
  petal-swarm demo
  petal-swarm demo "What is the capital of France?"
  petal-swarm demo --web
  petal-swarm demo --model ./SmolLM2-135M-Instruct.Q4_1.gguf --servers 5 "Why is the sky blue?"

Nobody else can reach these servers, nor, without --host, the page. All of it ends with the demo."""


def build_parser(prog: str = "petal-swarm demo") -> argparse.ArgumentParser:
    parser = new_parser(
        prog,
        "Start servers on this machine that share a model's blocks, and ask them, or serve a page for that.",
        EXAMPLES,
    )
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="default: one about bees")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="Hugging Face id, folder, or GGUF file (default: %(default)s)"
    )
    parser.add_argument(
        "--web", action="store_true", help="serve a page, a map of the swarm and an OpenAI-compatible API"
    )
    parser.add_argument(
        "--host",
        help="address that the page is served at; 0.0.0.0 lets other machines in (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--port", type=port, metavar="PORT", help="of the page; 0 is any that is free (default: 8080)"
    )
    parser.add_argument(
        "--servers", type=positive, default=3, metavar="N", help="how many servers (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=160, metavar="N", help="the longest answer (default: 160)"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=default_threads(),
        metavar="N",
        help="CPU threads of each server and of the client; only one of them computes at a time"
        " (default: half of the cores, %(default)s here)",
    )
    parser.add_argument(
        "--start-timeout",
        dest="start_timeout_s",
        type=positive,
        default=300,
        metavar="SECONDS",
        help="how long the servers may take to load their blocks (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None, prog: str = "petal-swarm demo") -> int:
    return run_program(run, parse(argv, prog))


def parse(argv: list[str] | None = None, prog: str = "petal-swarm demo") -> argparse.Namespace:
    """The arguments; those of the page are refused where there is none, and a question where there is."""
    parser = build_parser(prog)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.web and arguments.question is not None:
        parser.error("--web serves a page to ask on: leave out the question, or --web")
    for name, value in (("--host", arguments.host), ("--port", arguments.port)):
        if value is not None and not arguments.web:
            parser.error(f"{name} is of the page: add --web")
    arguments.host = "127.0.0.1" if arguments.host is None else arguments.host
    arguments.port = 8080 if arguments.port is None else arguments.port
    arguments.question = DEFAULT_QUESTION if arguments.question is None else arguments.question
    return arguments


def run(arguments: argparse.Namespace) -> int:
    from petal_swarm.cli.local_swarm import LocalSwarm, ended_by_signals, split_evenly
    from petal_swarm.models.checkpoint import open_checkpoint
    from petal_swarm.models.tokenizer import load_tokenizer

    if arguments.web:
        check_address(arguments)
    started_s = time.monotonic()
    checkpoint = open_checkpoint(arguments.model)
    spans = split_evenly(checkpoint.config.num_blocks, arguments.servers)
    print(
        f"{checkpoint.name}: {checkpoint.config.num_blocks} blocks,"
        f" shared by {len(spans)} servers on this machine"
    )
    with ended_by_signals(), LocalSwarm() as swarm:
        first = start(swarm, 1, spans[0], None, arguments)
        tokenizer = load_tokenizer(arguments.model)  # meanwhile
        address = await_servers([(first, spans[0])], started_s, arguments)
        others = [(start(swarm, i, span, address, arguments), span) for i, span in enumerate(spans[1:], 2)]
        await_servers(others, started_s, arguments)
        if arguments.web:
            return serve_page(address, arguments)
        with load_client(client_arguments(arguments, address)) as model:
            ask(model, tokenizer, arguments)
    return 0


def start(
    swarm: LocalSwarm, number: int, span: Span, address: str | None, arguments: argparse.Namespace
) -> ServerProcess:
    """Start one server, which joins that at `address`."""
    from petal_swarm.cli.local_swarm import server_arguments

    name, threads = f"demo-{number}", arguments.threads
    words = server_arguments(arguments.model, span, name=name, threads=threads, address=address)
    return swarm.start(name, words)


def await_servers(
    servers: list[tuple[ServerProcess, Span]], started_s: float, arguments: argparse.Namespace
) -> str:
    """Wait until these serve, and say so; returns the address of one of them."""
    from petal_swarm.cli.local_swarm import wait_ready

    spans = {server.name: span for server, span in servers}

    def on_ready(server: ServerProcess) -> None:
        after_s = time.monotonic() - started_s
        print(f"  {server.name}  blocks {spans[server.name]!s:<7} ready after {after_s:4.1f} s", flush=True)

    with waiting(f"  {', '.join(spans)} starting"):
        wait_ready([server for server, _ in servers], timeout_s=arguments.start_timeout_s, on_ready=on_ready)
    return servers[0][0].address.result() if servers else ""


def check_address(arguments: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: the page cannot be served there; better said before the servers load their blocks.
    """
    from petal_swarm.gateway.serving import listen

    listen(arguments.host, arguments.port).close()


def serve_page(address: str, arguments: argparse.Namespace) -> int:
    """A gateway in this process, until Ctrl-C."""
    from petal_swarm.cli import gateway

    words = ["--model", arguments.model, "--host", arguments.host, "--port", str(arguments.port)]
    words += ["--threads", str(arguments.threads), "--log-level", arguments.log_level, "--drain-timeout", "0"]
    print(f"\nthe swarm in a terminal: petal-swarm status {shlex.quote(arguments.model)} --watch", end="")
    print(f" --initial-peers {address}")
    print("starting the gateway; Ctrl-C ends all of it", flush=True)
    return gateway.run(gateway.parse([*words, "--initial-peers", address]))


def client_arguments(arguments: argparse.Namespace, address: str) -> argparse.Namespace:
    """What `load_client` wants to know."""
    return argparse.Namespace(
        model=arguments.model,
        initial_peers=[address],
        transport="auto",
        swarm_key=None,
        identity=None,
        wait_s=20.0,
        adapter=None,
        threads=arguments.threads,
        log_level=arguments.log_level,
    )


def ask(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Print question and answer, the route and the speed."""
    from petal_swarm.cli.answer import Answer
    from petal_swarm.cli.generate import end_tokens, write
    from petal_swarm.models.prompts import check_room, context_length, encode_chat, stop_text

    input_ids = encode_chat(tokenizer, [{"role": "user", "content": arguments.question}])
    check_room(input_ids.shape[1], arguments.max_new_tokens, context_length(model.config))
    print(f"\n> {arguments.question}\n")
    answer = Answer(tokenizer, write, stop=stop_text(tokenizer))
    try:
        model.generate(
            input_ids,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            stopping_criteria=[answer],
            **end_tokens(model, tokenizer),
        )
        answer.finish()
    finally:
        write("\n\n")
    print(f"every token went {model.last_route}")
    print(answer.summary())


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner while something takes long; nothing where there is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


if __name__ == "__main__":
    sys.exit(main())
