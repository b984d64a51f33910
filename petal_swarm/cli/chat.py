"""`petal-swarm chat`: a conversation over one session, in which each turn pays for its new tokens only."""

from __future__ import annotations

import argparse
import contextlib
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
from petal_swarm.errors import ConfigError, NetworkError, PetalSwarmError, RemoteError

EXAMPLES = """\
  petal-swarm chat HuggingFaceTB/SmolLM2-135M-Instruct --initial-peers ADDR
  petal-swarm chat MODEL --system "Answer in French." --temperature 0 --initial-peers ADDR

in the chat:
  /reset    forget the conversation          Ctrl-C    stop the answer
  /quit     leave                            Ctrl-D    leave"""
COMMANDS = "/reset forgets the conversation, /quit leaves (as does Ctrl-D); Ctrl-C stops an answer"
DEFAULT_MAX_LENGTH = 2048


def build_parser(prog: str = "petal-swarm chat") -> argparse.ArgumentParser:
    parser = new_parser(prog, "Talk with a model whose blocks are in a swarm.", EXAMPLES)
    add_client_options(parser)
    add_loading_options(parser)
    add_adapter_option(parser)
    add_sampling_options(parser, temperature=0.7, max_new_tokens=512)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument(
        "--max-length",
        type=positive,
        default=DEFAULT_MAX_LENGTH,
        metavar="N",
        help="room for the whole conversation, in tokens (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None, prog: str = "petal-swarm chat") -> int:
    return run_program(run, build_parser(prog).parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(arguments)
    with load_client(arguments) as model:
        chat = Chat(
            model,
            tokenizer,
            options=sampling(arguments),
            max_new_tokens=arguments.max_new_tokens,
            max_length=arguments.max_length,
            system=arguments.system,
        )
        with contextlib.closing(chat):
            converse(chat)
    return 0


def converse(chat: Chat) -> None:
    """Read, answer, repeat; until /quit or the end of stdin."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` its line editing

        say(COMMANDS)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            say(COMMANDS)
            continue
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            chat.reset()
            say("forgotten")
        elif line.startswith("/"):
            say(COMMANDS)
        elif line:
            try:
                chat.ask(line)
            except PetalSwarmError as error:
                say(f"error: {error}")


class Chat:
    """A conversation and the session that holds it. `reset` and `close` end the session."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        options: dict[str, Any],
        max_new_tokens: int,
        max_length: int,
        system: str | None = None,
    ) -> None:
        from petal_swarm.cli.generate import end_tokens
        from petal_swarm.models.prompts import context_length

        self._model = model
        self._tokenizer = tokenizer
        self._options = options | end_tokens(model, tokenizer)
        self._max_new_tokens = max_new_tokens
        self._max_length = min(max_length, context_length(model.config) or max_length)
        self._system = [{"role": "system", "content": system}] if system else []
        self._session: Any = None
        self._route = ""
        self.messages = list(self._system)

    def ask(self, text: str) -> None:
        """Print the answer, and remember both.

        Raises:
            ConfigError: the conversation has become too long.
            PetalSwarmError: the swarm failed; the question is forgotten, what came before is not.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._answer()
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer})

    def reset(self) -> None:
        """Forget the conversation."""
        self.close()
        self.messages = list(self._system)

    def close(self) -> None:
        """End the session, if there is one."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _answer(self) -> str:
        from petal_swarm.cli.answer import Answer, stopped_by_ctrl_c
        from petal_swarm.models.prompts import encode_chat, stop_text

        input_ids = encode_chat(self._tokenizer, self.messages)
        room = self._max_length - input_ids.shape[1]
        if room < 1:
            raise ConfigError(
                f"the conversation has {input_ids.shape[1]} tokens and room for {self._max_length};"
                " /reset starts a new one"
            )
        answer = Answer(self._tokenizer, _write_from_first_word(), stop=stop_text(self._tokenizer))
        limit = min(room, self._max_new_tokens)
        try:
            with stopped_by_ctrl_c(answer):
                self._generate(input_ids, answer, limit)
            answer.finish()
        except KeyboardInterrupt:
            self.close()
        except BaseException:
            self.close()
            if answer.num_tokens:
                print()
            raise
        print()
        self._report(answer, limit)
        return answer.text.strip()

    def _generate(self, input_ids: Any, answer: Any, limit: int) -> None:
        """Send what the session does not hold; once more to a new one if the old was lost meanwhile."""
        reused = self._session is not None
        try:
            self._generate_once(input_ids, answer, limit)
        except (NetworkError, RemoteError):
            if not reused or answer.num_tokens:
                raise
            self.close()
            self._generate_once(input_ids, answer, limit)

    def _generate_once(self, input_ids: Any, answer: Any, limit: int) -> None:
        if self._session is None:
            self._session = self._model.open_session(max_length=self._max_length)
        held = rewind(self._session, input_ids)
        self._model.generate(
            input_ids[:, held:],
            session=self._session,
            max_new_tokens=limit,
            stopping_criteria=[answer],
            **self._options,
        )

    def _report(self, answer: Any, limit: int) -> None:
        route = str(self._model.last_route)
        if route != self._route:
            say(route)
            self._route = route
        cut = answer.num_tokens >= limit and not answer.stopped
        say(answer.summary() + (f"; stopped after {limit} tokens, see --max-new-tokens" if cut else ""))


def rewind(session: Any, input_ids: Any) -> int:
    """Make the session hold only tokens with which `input_ids [1, tokens]` begin; how many these are.

    They are fewer than it held if an answer was cut at a stop text, or if its tokens are not those that
    its text is made of when it is read again. At least one token is left to be sent.
    """
    held = session.output_ids
    if held is None:
        return 0
    shared = min(held.shape[1], input_ids.shape[1] - 1)
    differing = (held[0, :shared] != input_ids[0, :shared]).nonzero()
    kept = int(differing[0]) if len(differing) else shared
    if kept == 0:
        session.truncate([0])
        session.output_ids = session.attention_mask = None
    elif kept < held.shape[1]:
        session.truncate([kept - 1])  # the last token is held here, and sent with those that follow it
        session.output_ids, session.attention_mask = held[:, :kept], session.attention_mask[:, :kept]
    return kept


def _write_from_first_word() -> Any:
    """Print without the white space that some models begin with."""
    begun = False

    def write(text: str) -> None:
        nonlocal begun
        text = text if begun else text.lstrip()
        begun = begun or bool(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    return write


def say(text: str) -> None:
    """A line that is not the model's: to stderr, and dim on a terminal."""
    if sys.stderr.isatty():
        text = f"\033[2m{text}\033[0m"
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
