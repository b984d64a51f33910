"""How every protocol refuses: the one message that ends a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from petal_swarm.wire import fields
from petal_swarm.wire.frames import Frame
from petal_swarm.wire.messages.parts import MAX_STEP

MAX_RETRY_AFTER_S = 3600


@dataclass(frozen=True, slots=True)
class Error:
    """Why a message was refused; `step` names the step at fault, if it was one. The stream ends after it.

    `retry_after_s`, where the listener can tell: in how many seconds it may be worth to ask it again.
    """

    type: ClassVar[str] = "error"
    code: str
    message: str
    step: int | None = None
    retry_after_s: float | None = None

    def to_header(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "code": self.code,
            "message": self.message[: fields.MAX_TEXT],
            "step": self.step,
            "retry_after_s": self.retry_after_s,
        }

    @classmethod
    def from_frame(cls, frame: Frame) -> Error:
        return cls(
            code=fields.text(frame.header, "code", limit=64),
            message=fields.text(frame.header, "message"),
            step=fields.integer(frame.header, "step", 0, MAX_STEP)
            if frame.header.get("step") is not None
            else None,
            retry_after_s=fields.number(frame.header, "retry_after_s", 0, MAX_RETRY_AFTER_S)
            if frame.header.get("retry_after_s") is not None
            else None,
        )
