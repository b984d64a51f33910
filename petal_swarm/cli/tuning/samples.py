"""What the model makes of one prompt, before and after."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from petal_swarm.cli.generate import end_tokens
from petal_swarm.cli.tuning.plan import Material
from petal_swarm.models.prompts import encode_chat, encode_text, has_template

NEW_TOKENS = 40
#: Where an example has no prompt, so many of its tokens are one.
PROMPT_TOKENS = 12


def sample_prompt(tokenizer: Any, material: Material, given: str | None) -> Tensor | None:
    """Token ids `[1, tokens]`: of `given`, or of how an example begins; None for an empty text.

    A given text is put as a question where conversations are learned, else as it stands.
    """
    if given is not None and not given.strip():
        return None
    if given is not None:
        chats = material.chats and has_template(tokenizer)
        return (
            encode_chat(tokenizer, [{"role": "user", "content": given}])
            if chats
            else encode_text(tokenizer, given)
        )
    example = (material.held_out or material.learned)[0]
    unlearned = int(example.learned.nonzero()[0])
    return example.tokens[None, : unlearned or min(PROMPT_TOKENS, len(example.tokens) - 1)]


def continuation(model: Any, tokenizer: Any, prompt: Tensor) -> str:
    """The likeliest text after the prompt."""
    answer = model.generate(
        prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **end_tokens(model, tokenizer)
    )
    text: str = tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True)
    return text
