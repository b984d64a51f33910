"""What is asked of a model: prompts as tokens, and how the tokens that follow are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from petal_swarm.errors import ConfigError

MAX_SEQUENCES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 512


def _within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # NaN is not either
        raise ConfigError(f"{name} must be {least} to {most}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    A `temperature` of 0 takes the likeliest token each time. `top_k` 0 is no limit. Presence and frequency
    penalties are OpenAI's: what is taken from the logits of tokens that the answer has already, once and for
    each time. `repetition_penalty` is that of CTRL (arXiv:1909.05858), over prompt and answer; 1 is none.
    `logit_bias` is added to the logits of tokens. The same `seed` draws the same tokens from the same logits.

    Raises:
        ConfigError: a number is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, 100)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must not be negative, got {self.top_k}")
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100)  # logits must stay finite
        for bias in self.logit_bias.values():
            _within("logit_bias", bias, -100, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """`choices` answers to each of `prompts`, which are token ids; choice i is the (i % choices)th of prompt
    i // choices.

    An answer ends at an end-of-sequence token (unless `ignore_eos`), at one of the texts in `stops`, which is
    no part of it, or after `max_new_tokens`. `top_logprobs` asks for the logarithm of each token's
    probability, as the model has it before temperature and penalties, and for those of so many likeliest
    others; `prompt_logprobs` asks the same for the prompt's tokens. `adapter` is a name of
    `Generator.adapters`.

    Raises:
        ConfigError: a number is out of range.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    choices: int = 1
    stops: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise ConfigError("there is no prompt, or one of them is empty")
        if self.choices < 1 or len(self.prompts) * self.choices > MAX_SEQUENCES:
            raise ConfigError(f"at least one answer and at most {MAX_SEQUENCES} can be asked for at once")
        least = 0 if self.prompt_logprobs else 1
        if self.max_new_tokens < least:
            raise ConfigError(f"max_new_tokens must be at least {least}, got {self.max_new_tokens}")
        if len(self.stops) > MAX_STOPS or any(not 0 < len(s) <= MAX_STOP_CHARACTERS for s in self.stops):
            raise ConfigError(
                f"at most {MAX_STOPS} stop texts of 1 to {MAX_STOP_CHARACTERS} characters can be given"
            )
        if self.top_logprobs is not None:
            _within("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if self.prompt_logprobs and self.top_logprobs is None:
            raise ConfigError("prompt_logprobs needs top_logprobs")

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def max_tokens(self) -> int:
        """The most tokens that the KV caches of all answers together may take."""
        return sum((len(prompt) + self.max_new_tokens) * self.choices for prompt in self.prompts)
