import signal

import pytest
import torch

from petal_swarm.cli.answer import Answer, stopped_by_ctrl_c
from tests.cli.tokenizers_of_tests import characters

TOKENIZER = characters()
PROMPT = [1, 2, 3]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def feed(answer, text, *, clock=None, step_s=0.0):
    """Give the answer one token after the other, as `generate` does; the tokens taken."""
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    for count in range(1, len(tokens) + 1):
        if clock:
            clock.now += step_s
        if answer(torch.tensor([PROMPT + tokens[:count]]), None).all():
            return count
    answer.finish()
    return len(tokens)


def test_pieces_come_as_the_tokens_do():
    pieces = []
    feed(Answer(TOKENIZER, pieces.append), "two words")
    assert pieces == list("two words")


@pytest.mark.parametrize("text", ["né", "日本", "🐝🐝", "a🐝b"])
def test_no_half_of_a_character_is_printed(text):
    pieces = []
    feed(Answer(TOKENIZER, pieces.append), text)
    assert pieces == list(text)


def test_an_answer_cut_within_a_character_shows_that():
    pieces = []
    answer = Answer(TOKENIZER, pieces.append)
    answer(torch.tensor([PROMPT + TOKENIZER("é", add_special_tokens=False)["input_ids"][:1]]), None)
    assert pieces == []
    answer.finish()
    assert pieces == ["\ufffd"]


def test_a_stop_text_ends_the_answer_and_is_not_printed():
    pieces = []
    answer = Answer(TOKENIZER, pieces.append, stop="\nUser:")
    assert feed(answer, "Yes.\nUser: and") == len("Yes.\nUser:")
    assert "".join(pieces) == answer.text == "Yes."
    answer.finish()
    assert "".join(pieces) == "Yes."


def test_what_only_began_like_the_stop_text_is_printed():
    pieces = []
    feed(Answer(TOKENIZER, pieces.append, stop="\nUser:"), "a\nUse it\n")
    assert pieces == ["a", "\nUse ", "i", "t", "\n"]


def test_special_tokens_count_and_are_not_printed():
    pieces = []
    answer = Answer(TOKENIZER, pieces.append)
    answer(torch.tensor([[*PROMPT, 256]]), None)
    assert (pieces, answer.num_tokens) == ([], 1)


def test_the_speed_is_that_after_the_first_token():
    clock = Clock()
    answer = Answer(TOKENIZER, lambda text: None, clock=clock)
    clock.now += 2.0
    feed(answer, "12345", clock=clock, step_s=0.5)
    assert answer.first_token_s == 2.5
    assert answer.tokens_per_s == pytest.approx(2.0)
    assert answer.summary() == "5 tokens, 2.0 tokens/s, the first after 2.50 s"


def test_an_answer_of_one_token_and_of_none():
    clock = Clock()
    answer = Answer(TOKENIZER, lambda text: None, clock=clock)
    assert "0 tokens" in answer.summary()
    feed(answer, "1", clock=clock, step_s=0.5)
    assert answer.summary() == "1 token, 2.0 tokens/s, the first after 0.50 s"


def test_ctrl_c_ends_the_answer_first_and_the_program_second():
    answer = Answer(TOKENIZER, lambda text: None)
    handler = signal.getsignal(signal.SIGINT)
    with stopped_by_ctrl_c(answer):
        assert feed(answer, "on") == 2
        signal.raise_signal(signal.SIGINT)
        assert feed(answer, "and on") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler
