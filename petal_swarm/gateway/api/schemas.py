"""What bodies may contain. Fields that are not known are ignored, as all servers of this API do."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NotRequired, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator, with_config
from typing_extensions import TypedDict

from petal_swarm.client.generation.request import MAX_TOP_LOGPROBS
from petal_swarm.gateway.api.errors import bad_request

MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_PROMPTS = 128
MAX_BIASES = 1024
MAX_INTEGER = (1 << 63) - 1

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Name = Annotated[str, Field(max_length=512)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Texts = Annotated[list[str], Field(max_length=64, fail_fast=True)]
Tokens = Annotated[list[Count], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenPrompts = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


#: Lists that must be empty where they are given: what would be in them is not even read.
Nothing = Annotated[list[None], Field(max_length=0, fail_fast=True)] | None


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class StreamOptions(_Body):
    """`include_swarm` is ours: chunks without choices that tell the place in the queue and the route."""

    include_usage: bool | None = None
    include_swarm: bool | None = None


class Body(_Body):
    """What both kinds of completion share.

    `top_k`, `repetition_penalty` and `ignore_eos` are not OpenAI's, but common: the `openai` package sends
    them by `extra_body`.
    """

    #: Parameters that change what an answer must be, and that nothing here heeds. Their types are the values
    #: that mean nothing: whatever else is refused unread, since to read it may take a second.
    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset()

    model: Name
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | Texts | None = None
    seed: Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[Count, Bias], Field(max_length=MAX_BIASES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INTEGER)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only for streams.", "stream_options", "invalid_value")
        return self

    @property
    def answer_tokens(self) -> int | None:
        """The longest answer that was asked for."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts; empty ones mean none."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class CompletionBody(Body):
    """Of `/v1/completions`."""

    UNSUPPORTED = frozenset({"suffix"})

    prompt: str | Prompts | Tokens | TokenPrompts
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise bad_request("best_of must equal n here.", "best_of", "unsupported_parameter")
        return self


@with_config(ConfigDict(strict=True, extra="ignore"))
class TextPart(TypedDict):
    """No model: there may be a hundred thousand of them."""

    type: Name
    text: NotRequired[str | None]


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_calls: Nothing = None
    function_call: None = None

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.role in ("tool", "function"):
            raise bad_request("Tools are not supported here.", "messages", "unsupported_parameter")
        if self.content is None and self.role != "assistant":
            raise bad_request(f"A message of the {self.role} has no content.", "messages", "invalid_value")
        for part in self.content if isinstance(self.content, list) else ():
            if part["type"] not in ("text", "refusal"):
                raise bad_request(
                    f"Content of type {part['type'][:40]!r} is not supported here, only text.",
                    "messages",
                    "unsupported_parameter",
                )
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.get("text") or "" for part in self.content)
        return self.content or ""


NoTool = Literal["none", "auto"]


class PlainText(_Body):
    """The response format that all answers have."""

    type: Literal["text"]


class ChatBody(Body):
    """Of `/v1/chat/completions`."""

    UNSUPPORTED = frozenset(
        {
            "tools",
            "tool_choice",
            "functions",
            "function_call",
            "response_format",
            "modalities",
            "audio",
            "prediction",
            "web_search_options",
            "moderation",
        }
    )

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Nothing = None
    tool_choice: NoTool | None = None
    functions: Nothing = None
    function_call: NoTool | None = None
    response_format: PlainText | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    moderation: None = None

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs.", "top_logprobs", "invalid_value")
        if self.max_tokens == 0:
            raise bad_request("max_tokens must be at least 1.", "max_tokens", "invalid_value")
        return self
