"""Which parts of a conversation are the assistant's, as the model's chat template writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from petal_swarm.errors import ConfigError
from petal_swarm.models.prompts import Message, has_template, plain_chat

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an example. `ends`: the end-of-sequence token follows; `templated`: it has all special
    tokens already."""

    text: str
    learned: bool
    ends: bool = False
    templated: bool = False


def pieces_of_chat(tokenizer: Any, messages: Any) -> list[Piece]:
    """The conversation up to the last answer, in pieces that are learned (answers) or not (all else).

    Raises:
        ConfigError: these are no messages, nobody answers, or the template refuses them.
    """
    checked = _checked(messages)
    answers = [number for number, message in enumerate(checked) if message["role"] == "assistant"]
    if not answers:
        raise ConfigError("nobody has the role assistant, so there is nothing to learn")
    if has_template(tokenizer):
        if answers[0] == 0:
            raise ConfigError("a conversation cannot begin with the assistant")
        return _templated(tokenizer, checked, answers)
    return _plain(checked, answers)


def _checked(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise ConfigError('"messages" is not a list of {"role", "content"}')
    for number, message in enumerate(messages, 1):
        fields = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else []
        if not fields or not all(isinstance(field, str) for field in fields):
            raise ConfigError(f'message {number} is no {{"role", "content"}} of two texts')
        if fields[0] not in ROLES:
            raise ConfigError(f"message {number} has the role {fields[0]!r}, not one of {', '.join(ROLES)}")
    return messages


def _templated(tokenizer: Any, messages: list[Message], answers: list[int]) -> list[Piece]:
    pieces: list[Piece] = []
    written = ""
    for number in answers:
        before = _render(tokenizer, messages[:number], asked=True)
        after = _render(tokenizer, messages[: number + 1], asked=False)
        if not before.startswith(written) or not after.startswith(before):
            raise ConfigError("the model's chat template writes earlier messages anew when more follow")
        pieces.append(Piece(before[len(written) :], learned=False, templated=True))
        pieces.append(Piece(after[len(before) :], learned=True, templated=True))
        written = after
    return pieces


def _render(tokenizer: Any, messages: list[Message], *, asked: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked))
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(f"the model's chat template refuses this conversation: {error}") from error


def _plain(messages: list[Message], answers: list[int]) -> list[Piece]:
    """As `petal-swarm chat` writes it for a model without a template."""
    pieces: list[Piece] = []
    written = ""
    for number in answers:
        before = plain_chat(messages[:number]) if number else "Assistant:"
        answer = f" {messages[number]['content']}"
        pieces.append(Piece(before[len(written) :], learned=False))
        pieces.append(Piece(answer, learned=True, ends=number == answers[-1]))
        written = before + answer
    return pieces
