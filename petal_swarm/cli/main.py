"""`petal-swarm`: all programs under one name. A command's module is imported when it is called for."""

from __future__ import annotations

import difflib
import importlib
import sys

from petal_swarm.version import __version__

#: Command -> (module, what it does).
COMMANDS = {
    "demo": ("demo", "three servers on this machine answer a question: nothing to set up"),
    "run-server": ("run_server", "host some blocks of a model for everybody"),
    "generate": ("generate", "answer one prompt with the swarm"),
    "chat": ("chat", "talk with the swarm"),
    "tune": ("tune", "teach the model something, from a file of yours: LoRA"),
    "gateway": ("gateway", "an OpenAI-compatible API and a page for a swarm"),
    "key": ("key", "make the key of a private swarm"),
    "doctor": ("doctor", "would a server work on this machine, and could others reach it"),
    "status": ("status", "who serves which blocks, how fast, how busy"),
}
HELP = """\
usage: petal-swarm COMMAND ...

Run large language models together: every server hosts some of the blocks, and a client sends each
token through all of them.

commands:
{commands}

a swarm in three steps:
  petal-swarm run-server MODEL --new-swarm              prints `ready ADDR`
  petal-swarm run-server MODEL --initial-peers ADDR     on other machines: each takes the blocks
                                                        that are needed most
  petal-swarm chat MODEL --initial-peers ADDR           ADDR of any of them

MODEL is a Hugging Face id, a local folder, or a GGUF file.
petal-swarm COMMAND --help has the options of a command, with examples."""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if len(arguments) > 1 and arguments[1] in COMMANDS:
            return main([arguments[1], "--help"])
        print(HELP.format(commands="\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())))
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"petal_swarm {__version__}")
        return 0
    name = arguments[0].replace("_", "-")
    if name not in COMMANDS:
        print(f"error: {_unknown(name)} (try petal-swarm --help)", file=sys.stderr)
        return 2
    command = importlib.import_module(f"petal_swarm.cli.{COMMANDS[name][0]}")
    return int(command.main(arguments[1:], prog=f"petal-swarm {name}"))


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"there is no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


if __name__ == "__main__":
    sys.exit(main())
