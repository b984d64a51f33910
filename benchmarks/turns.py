"""Time to the first token of each turn of a chat, through two servers; the tenth against the first.

    python -m benchmarks.turns MODEL [--turns 10] [--chats 5] [--answer 40] [--threads 1]

MODEL has a chat template: a GGUF file of SmolLM2, say. A turn is what somebody waits for: the template and
the tokens of the whole conversation, a session that is opened, the prompt, the first token. Then the answer
goes on to its end, and becomes a part of the next turn's prompt. All chats have the same system prompt,
which first turns find in the servers' caches, too. As a control, the same turns with a client that shares
no prefixes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.harness import median_ratio, servers
from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.models.tokenizer import load_tokenizer

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


class Chat:
    """One conversation; `ask` is a turn of it."""

    def __init__(self, model: Any, tokenizer: Any, name: str, answer_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._answer_tokens = answer_tokens
        self._messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"I am {name}. "},
        ]
        self.prompt_tokens = 0

    @torch.inference_mode()
    def ask(self, question: str) -> float:
        """Seconds to the first token of the answer."""
        if self._messages[-1]["role"] == "user":
            question = self._messages.pop()["content"] + question
        self._messages.append({"role": "user", "content": question})
        started = time.perf_counter()
        text = self._tokenizer.apply_chat_template(self._messages, add_generation_prompt=True, tokenize=False)
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
        said = self._tokenizer.decode(answer, skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": said})
        return first_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--chats", type=int, default=5)
    parser.add_argument("--answer", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(arguments.model)
    with servers(
        arguments.model, ["0:15", "15:30"], "--threads", str(arguments.threads), "--kv-tokens", "16384"
    ) as running:

        def connect(**settings: Any) -> Any:
            return AutoSwarmModelForCausalLM.from_pretrained(
                arguments.model, initial_peers=[running[0].address], progress=False, **settings
            )

        with connect() as model, connect(share_prefixes=False) as control:
            Chat(model, tokenizer, "nobody", arguments.answer).ask(QUESTIONS[0])
            times: dict[str, list[list[float]]] = {"shared": [], "control": []}
            for number in range(arguments.chats):
                for kind, client in (("shared", model), ("control", control)):
                    chat = Chat(client, tokenizer, f"visitor {number}", arguments.answer)
                    turns = [chat.ask(QUESTIONS[turn % len(QUESTIONS)]) for turn in range(arguments.turns)]
                    times[kind].append(turns)
    print(f"{chat.prompt_tokens} tokens in the last turn's prompt")
    for kind, chats in times.items():
        medians = [statistics.median(turn) for turn in zip(*chats, strict=True)]
        print(f"{kind}, ms to the first token by turn: " + " ".join(f"{m * 1e3:.0f}" for m in medians))
        ratio = median_ratio([turns[-1] for turns in chats], [turns[0] for turns in chats])
        print(f"{kind}, the last turn against the first, median of {len(chats)} chats: {ratio:.2f}")


if __name__ == "__main__":
    main()
