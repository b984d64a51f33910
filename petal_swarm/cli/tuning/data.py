"""From a file of the user to examples: a text, or JSON lines of texts, of prompts or of conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petal_swarm.cli.tuning.conversations import Piece, pieces_of_chat
from petal_swarm.errors import ConfigError

LINES = (".jsonl", ".ndjson", ".json")
FIELDS = 'expected {"text"}, {"prompt", "completion"} or {"messages"}'


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Token ids `[tokens]`, and which of them count in the loss. The first one is never predicted."""

    tokens: Tensor
    learned: Tensor


@dataclass(frozen=True, slots=True)
class Corpus:
    """Examples in the order of the file; `cut` of them have lost their end to the greatest length.
    `chats`: all are conversations.
    """

    examples: Sequence[Example]
    cut: int = 0
    chats: bool = False


def read_corpus(path: Path, tokenizer: Any, *, max_length: int) -> Corpus:
    """The examples of a file, none longer than `max_length` tokens.

    A file that ends in `.jsonl` has one JSON object a line. `{"text"}` is learned as a whole,
    `{"prompt", "completion"}` from where the completion starts, `{"messages"}` where the assistant speaks.
    Any other file is one text. Texts that are too long become several examples; prompts and conversations
    lose what is too much.

    Raises:
        ConfigError: the file cannot be read, has nothing in it, or a line is wrong, which is then named.
    """
    text = _read(path)
    if path.suffix.lower() in LINES:
        corpus = _of_lines(path, text, tokenizer, max_length)
    else:
        windows = _windows(_encode(tokenizer, text, special=True), max_length) if text.strip() else []
        corpus = Corpus(windows)
    if not corpus.examples:
        raise ConfigError(f"there is nothing to learn in {path}")
    return corpus


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} line {line}: this is not UTF-8") from error


def _of_lines(path: Path, text: str, tokenizer: Any, max_length: int) -> Corpus:
    examples: list[Example] = []
    wrong: list[str] = []
    cut, chats = 0, True
    # Not `splitlines`: a JSON string may hold other line separators as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = _parse(line)
            found, was_cut = _of_record(record, tokenizer, max_length)
        except ConfigError as error:
            wrong.append(f"{path} line {number}: {error}")
            continue
        examples += found
        cut += was_cut
        chats = chats and "messages" in record
    if wrong:
        others = f" ({len(wrong)} lines are wrong)" if len(wrong) > 1 else ""
        raise ConfigError(wrong[0] + others)
    return Corpus(examples, cut, chats)


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"this is not JSON ({error}); one object a line is expected") from error
    if not isinstance(record, dict):
        raise ConfigError(f"this is a JSON {type(record).__name__}, not an object; {FIELDS}")
    return record


def _of_record(record: dict[str, Any], tokenizer: Any, max_length: int) -> tuple[list[Example], bool]:
    """The examples of one line, and whether something was cut off."""
    if "messages" in record:
        pieces = pieces_of_chat(tokenizer, record["messages"])
    elif "prompt" in record or "completion" in record:
        prompt, completion = _text(record, "prompt"), _text(record, "completion")
        pieces = [Piece(prompt, learned=False), Piece(completion, learned=True, ends=True)]
    elif "text" in record:
        text = _text(record, "text")
        if not text.strip():
            raise ConfigError("the text is empty")
        tokens = _joined(tokenizer, [Piece(text, learned=True, ends=True)]).tokens
        return _windows(tokens, max_length), False
    else:
        raise ConfigError(f"it has the fields {', '.join(sorted(record)) or 'none'}; {FIELDS}")
    whole = _joined(tokenizer, pieces)
    example = Example(whole.tokens[:max_length], whole.learned[:max_length])
    if not whole.learned[1:].any():
        raise ConfigError("there is nothing to learn: the completion or the answers are empty")
    if not example.learned[1:].any():
        first = int(whole.learned.nonzero()[0])
        raise ConfigError(
            f"what is to be learned starts after {first} tokens, and --max-length is {max_length}"
        )
    return [example], len(whole.tokens) > max_length


def _text(record: dict[str, Any], name: str) -> str:
    text = record.get(name)
    if not isinstance(text, str):
        raise ConfigError(f'"{name}" is {"missing" if name not in record else "not a text"}; {FIELDS}')
    return text


def _joined(tokenizer: Any, pieces: Sequence[Piece]) -> Example:
    """Each piece has tokens of its own, as a prompt has when it is answered."""
    tokens: list[Tensor] = []
    learned: list[Tensor] = []
    for number, piece in enumerate(pieces):
        found = _encode(tokenizer, piece.text, special=number == 0 and not piece.templated)
        if (
            piece.ends
            and tokenizer.eos_token_id is not None
            and found[-1:].tolist() != [tokenizer.eos_token_id]
        ):
            found = torch.cat([found, found.new_tensor([tokenizer.eos_token_id])])
        tokens.append(found)
        learned.append(torch.full(found.shape, piece.learned))
    return Example(torch.cat(tokens), torch.cat(learned))


def _windows(tokens: Tensor, max_length: int) -> list[Example]:
    """A long text in parts of `max_length`; a last part of one token has nothing to predict."""
    starts = range(0, len(tokens) - 1, max_length)
    parts = [tokens[start : start + max_length] for start in starts]
    return [Example(part, torch.ones_like(part, dtype=torch.bool)) for part in parts]


def _encode(tokenizer: Any, text: str, *, special: bool) -> Tensor:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the text has half of a character (a lone surrogate)") from error
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
