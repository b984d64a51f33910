"""Time to the first token of each turn of a chat; the tenth against the first.

    python -m benchmarks.turns MODEL [--turns 10] [--chats 5] [--answer 40] [--threads 1] [--copies 1]

MODEL has a chat template: a GGUF file of SmolLM2, say. A turn is what somebody waits for: the template
and the tokens of the whole conversation, a session that is opened, the prompt, the first token. Then the
answer goes on to its end, and becomes a part of the next turn's prompt. All chats have the same system
prompt, which first turns find in the servers' caches, too. Two servers, or `--copies` of both. By way of
a gateway, by sessions of the Python client, and, as a control, by sessions that share no prefixes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import torch

from benchmarks.harness import READY_TIMEOUT_S, median_ratio, servers
from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.cli.local_swarm import TETHERED, LocalSwarm
from petal_swarm.models.tokenizer import load_tokenizer

MODEL_NAME = "model"
SYSTEM = "You are a patient assistant who answers in plain words."
#: About twenty tokens each, so that turns differ by what went before them alone.
QUESTIONS = (
    "I would like to grow tomatoes on a small balcony that has sun until noon. Where do I start?",
    "Which soil would you take for that, and how often should I water them in a hot summer?",
    "A neighbour told me that basil keeps insects away from tomatoes. Is there any truth in it?",
    "The lower leaves have become yellow since last week. What may be the reason, and what helps?",
    "How do I know when they are ripe, and is it better to pick them a little before that?",
    "Suppose I get more than we can eat. What are simple ways to keep them over the winter?",
    "My daughter does not like raw tomatoes at all. Can you suggest a dish that she may enjoy?",
    "Could I take seeds of this year's plants for the next year, and how would I store them?",
    "What else could grow in the same pots during the winter, without much light or any heating?",
    "Please sum up in three short sentences what I should remember of all this for next year.",
)


class Chat(ABC):
    """One conversation; `ask` is a turn of it."""

    def __init__(self, name: str) -> None:
        self._messages = [{"role": "system", "content": SYSTEM}]
        self._greeting = f"I am {name}. "
        self.prompt_tokens = 0

    def ask(self, question: str) -> float:
        """Seconds to the first token of the answer."""
        self._messages.append({"role": "user", "content": self._greeting + question})
        self._greeting = ""
        first_s, said = self._answer(self._messages)
        self._messages.append({"role": "assistant", "content": said})
        return first_s

    @abstractmethod
    def _answer(self, messages: list[dict[str, str]]) -> tuple[float, str]:
        """Seconds to the first token, and what was said."""


class SessionChat(Chat):
    """A session of the Python client for each turn."""

    def __init__(self, model: Any, tokenizer: Any, answer_tokens: int, name: str) -> None:
        super().__init__(name)
        self._model = model
        self._tokenizer = tokenizer
        self._answer_tokens = answer_tokens

    @torch.inference_mode()
    def _answer(self, messages: list[dict[str, str]]) -> tuple[float, str]:
        started = time.perf_counter()
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self._tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        self.prompt_tokens = len(ids)
        answer: list[int] = []
        with self._model.open_session(max_length=len(ids) + self._answer_tokens) as session:
            while len(answer) < self._answer_tokens:
                rows = session.step(self._model.ends.embed(ids), [len(ids)])
                ids = self._model.ends.logits(rows).argmax(-1)
                if not answer:
                    first_s = time.perf_counter() - started
                answer.append(int(ids))
                if answer[-1] == self._tokenizer.eos_token_id:
                    break
        return first_s, self._tokenizer.decode(answer, skip_special_tokens=True)


class GatewayChat(Chat):
    """A request to the gateway for each turn."""

    def __init__(self, url: str, answer_tokens: int, name: str) -> None:
        super().__init__(name)
        self._url = url
        self._answer_tokens = answer_tokens

    def _answer(self, messages: list[dict[str, str]]) -> tuple[float, str]:
        body = {
            "model": MODEL_NAME,
            "messages": messages,
            "max_tokens": self._answer_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        first_s, said = 0.0, ""
        started = time.perf_counter()
        with httpx.stream("POST", f"{self._url}/v1/chat/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if chunk["choices"] and (text := chunk["choices"][0]["delta"].get("content")):
                    first_s = first_s or time.perf_counter() - started
                    said += text
                if chunk.get("usage"):
                    self.prompt_tokens = chunk["usage"]["prompt_tokens"]
        return first_s, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--chats", type=int, default=5)
    parser.add_argument("--answer", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--copies", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spans = ["0:15", "15:30"] * arguments.copies
    with servers(
        arguments.model, spans, "--threads", str(arguments.threads), "--kv-tokens", "16384"
    ) as running:
        report(measure(arguments, running[0].address))


def measure(arguments: argparse.Namespace, address: str) -> dict[str, list[list[float]]]:
    """Seconds to the first token of each turn, by kind and chat; chats of all kinds take turns."""
    tokenizer = load_tokenizer(arguments.model)
    options = ["--model", arguments.model, "--model-name", MODEL_NAME, "--port", "0", "--threads", "1"]

    def connect(**settings: Any) -> Any:
        return AutoSwarmModelForCausalLM.from_pretrained(
            arguments.model, initial_peers=[address], progress=False, **settings
        )

    with (
        connect() as model,
        connect(share_prefixes=False) as control,
        LocalSwarm(command=(*TETHERED, "gateway")) as gateways,
    ):
        gateway = gateways.start("gateway", [*options, "--initial-peers", address])
        url = gateway.address.result(READY_TIMEOUT_S)
        kinds: dict[str, Callable[[str], Chat]] = {
            "gateway": partial(GatewayChat, url, arguments.answer),
            "sessions": partial(SessionChat, model, tokenizer, arguments.answer),
            "control": partial(SessionChat, control, tokenizer, arguments.answer),
        }
        times: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
        for new_chat in kinds.values():
            new_chat("nobody").ask(QUESTIONS[0])
        for number in range(arguments.chats):
            for kind, new_chat in kinds.items():
                chat = new_chat(f"visitor {number} of the {kind}")
                times[kind].append([chat.ask(QUESTIONS[t % len(QUESTIONS)]) for t in range(arguments.turns)])
        print(f"{chat.prompt_tokens} tokens in the last turn's prompt")
    return times


def report(times: dict[str, list[list[float]]]) -> None:
    for kind, chats in times.items():
        medians = [statistics.median(turn) for turn in zip(*chats, strict=True)]
        ratio = median_ratio([turns[-1] for turns in chats], [turns[0] for turns in chats])
        print(
            f"{kind}: ms to the first token by turn: {' '.join(f'{m * 1e3:.0f}' for m in medians)};"
            f" the last against the first: {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
