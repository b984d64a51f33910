"""A model and its session without a swarm, which write down what they were given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from petal_swarm.errors import ConfigError


class FakeSession:
    """Holds tokens as an `InferenceSession` does: the last one is known, not yet in the KV cache."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.output_ids: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None
        self.in_cache = 0
        self.closed = False

    def truncate(self, lengths: list[int]) -> None:
        if not 0 <= lengths[0] <= self.in_cache:
            raise ConfigError("cannot truncate")
        self.in_cache = lengths[0]

    def close(self) -> None:
        self.closed = True


class FakeModel:
    """Answers with the texts it was given, one for each call, or raises the errors among them."""

    def __init__(self, tokenizer: Any, *answers: str | BaseException, context: int | None = None) -> None:
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.generation_config = SimpleNamespace(eos_token_id=None, pad_token_id=None)
        self.last_route = "you -> someone 0:4 -> you"
        self.sessions: list[FakeSession] = []
        self.sent: list[str] = []
        self.options: list[dict[str, Any]] = []
        self._tokenizer = tokenizer
        self._answers = list(answers)

    def open_session(self, *, max_length: int) -> FakeSession:
        self.sessions.append(FakeSession(max_length))
        return self.sessions[-1]

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int,
        session: FakeSession | None = None,
        stopping_criteria: Any = (),
        **options: Any,
    ) -> torch.Tensor:
        self.sent.append(self._tokenizer.decode(input_ids[0]))
        self.options.append(options | {"max_new_tokens": max_new_tokens})
        answer = self._answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        session = session or FakeSession(1 << 20)
        assert not session.closed
        ids = input_ids if session.output_ids is None else torch.cat([session.output_ids, input_ids], 1)
        wanted = [*self._tokenizer(answer, add_special_tokens=False)["input_ids"], options["eos_token_id"]]
        for token in wanted[:max_new_tokens]:
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            if any(bool(criterion(ids, None).all()) for criterion in stopping_criteria):
                break
        session.output_ids, session.attention_mask = ids, torch.ones_like(ids)
        session.in_cache = ids.shape[1] - 1
        return ids
