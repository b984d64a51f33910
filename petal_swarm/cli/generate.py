"""`petal-swarm generate`: one prompt, one answer, on stdout as it comes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from petal_swarm.cli.common import (
    add_adapter_option,
    add_client_options,
    add_loading_options,
    add_sampling_options,
    load_client,
    load_tokenizer,
    new_parser,
    positive,
    run_program,
    sampling,
)
from petal_swarm.errors import ConfigError

EXAMPLES = """\
  petal-swarm generate bigscience/bloom-560m "The sky is blue because" --initial-peers ADDR
      the likeliest continuation, word by word
  petal-swarm generate MODEL "Write a haiku about bees." --temperature 0.8 --seed 1 --initial-peers ADDR
      varied, and the same each time
  petal-swarm generate MODEL --no-chat "def fibonacci(n):" --num-beams 4 --initial-peers ADDR
      the prompt as it stands, without the model's chat template; the best of four beams
  petal-swarm generate MODEL --initial-peers ADDR < question.txt > answer.txt
      prompt from stdin; the route taken and the speed go to stderr"""


def build_parser(prog: str = "petal-swarm generate") -> argparse.ArgumentParser:
    parser = new_parser(prog, "Answer a prompt with a model whose blocks are in a swarm.", EXAMPLES)
    add_client_options(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt; `-` or nothing: stdin")
    add_loading_options(parser)
    add_adapter_option(parser)
    add_sampling_options(parser, temperature=0.0, max_new_tokens=128)
    parser.add_argument(
        "--num-beams", type=positive, default=1, metavar="N", help="search with N beams (default: 1)"
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="put the prompt into the model's chat template (default: if it has one)",
    )
    return parser


def main(argv: list[str] | None = None, prog: str = "petal-swarm generate") -> int:
    parser = build_parser(prog)
    # Intermixed: PROMPT may follow options. That mode forgets to ask for MODEL.
    return run_program(run, parser.parse_intermixed_args(argv) if argv else parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    prompt = read_prompt(arguments.prompt)

    from petal_swarm.models.prompts import encode_chat, encode_text, has_template

    tokenizer = load_tokenizer(arguments)
    if arguments.chat and not has_template(tokenizer):
        raise ConfigError(f"{arguments.model} has no chat template; leave out --chat")
    if arguments.chat or (arguments.chat is None and has_template(tokenizer)):
        input_ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    else:
        input_ids = encode_text(tokenizer, prompt)
    with load_client(arguments) as model:
        answer(model, tokenizer, input_ids, arguments)
    return 0


def read_prompt(given: str | None) -> str:
    """The prompt of the command line, or what is piped in.

    Raises:
        ConfigError: there is neither.
    """
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise ConfigError('there is no prompt: give one, such as "The sky is blue because", or pipe it in')
    prompt = sys.stdin.read().rstrip("\n")
    if not prompt:
        raise ConfigError("the prompt is empty: nothing came from stdin")
    return prompt


def answer(model: Any, tokenizer: Any, input_ids: Any, arguments: argparse.Namespace) -> None:
    """Print the answer on stdout, then the route and the speed on stderr."""
    from petal_swarm.cli.answer import Answer
    from petal_swarm.models.prompts import check_room, context_length

    check_room(input_ids.shape[1], arguments.max_new_tokens, context_length(model.config))
    options = sampling(arguments) | end_tokens(model, tokenizer)
    options |= {"max_new_tokens": arguments.max_new_tokens, "num_beams": arguments.num_beams}
    shown = Answer(tokenizer, write)
    try:
        if arguments.num_beams > 1:  # which beam wins is known at the end only
            shown.whole(model.generate(input_ids, **options)[0, input_ids.shape[1] :])
        else:
            model.generate(input_ids, stopping_criteria=[shown], **options)
            shown.finish()
    finally:
        write("\n")
    print(f"{model.last_route}\n{shown.summary()}", file=sys.stderr)


def end_tokens(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What `generate` must be told where the model's own generation settings are silent."""
    settings, found = model.generation_config, {}
    if settings.eos_token_id is None and tokenizer.eos_token_id is not None:
        found["eos_token_id"] = tokenizer.eos_token_id
    if settings.pad_token_id is None:
        pad = tokenizer.pad_token_id
        found["pad_token_id"] = pad if pad is not None else tokenizer.eos_token_id
    return found


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
