"""From what a person types to token ids: chat templates, and a plain format for models without one."""

from __future__ import annotations

from typing import Any

import torch

from petal_swarm.errors import ConfigError

#: Ends the answers of models without a template, which would go on with a question of their own.
PLAIN_STOP = "\nUser:"
Message = dict[str, str]


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def stop_text(tokenizer: Any) -> str:
    """What ends an answer besides the end-of-sequence token."""
    return "" if has_template(tokenizer) else PLAIN_STOP


def encode_text(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids `[1, tokens]` of a text as it stands.

    Raises:
        ConfigError: there is nothing in it.
    """
    return torch.tensor([text_tokens(tokenizer, text)])


def encode_chat(tokenizer: Any, messages: list[Message]) -> torch.Tensor:
    """Token ids `[1, tokens]` of a conversation, up to where the answer begins.

    Raises:
        ConfigError: the model's template refuses it.
    """
    return torch.tensor([chat_tokens(tokenizer, messages)])


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """As `encode_text`, a list."""
    return _tokens(tokenizer, text, special=True)


def chat_tokens(tokenizer: Any, messages: list[Message]) -> list[int]:
    """As `encode_chat`, a list."""
    if not has_template(tokenizer):
        return _tokens(tokenizer, plain_chat(messages), special=True)
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise ConfigError(f"the model's chat template refuses this conversation: {error}") from error
    return _tokens(tokenizer, text, special=False)


def plain_chat(messages: list[Message]) -> str:
    """The conversation as a base model may have read many."""
    lines = [
        message["content"]
        if message["role"] == "system"
        else f"{message['role'].title()}: {message['content']}"
        for message in messages
    ]
    return "\n".join([*lines, "Assistant:"])


def context_length(config: Any) -> int | None:
    """How many tokens the model was made for; None if it does not say (BLOOM's ALiBi has no end)."""
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def check_room(prompt_tokens: int, new_tokens: int, limit: int | None) -> None:
    """
    Raises:
        ConfigError: prompt and answer are longer than the model's context.
    """
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise ConfigError(
            f"{prompt_tokens} tokens of prompt and {new_tokens} new ones do not fit the model's context"
            f" of {limit}; shorten the prompt or lower --max-new-tokens"
        )


def _tokens(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not ids:
        raise ConfigError("the prompt is empty")
    return ids
