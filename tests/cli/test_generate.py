import argparse
import io

import pytest

from petal_swarm.cli.common import sampling
from petal_swarm.cli.generate import answer, build_parser, end_tokens, read_prompt
from petal_swarm.errors import ConfigError
from petal_swarm.models.prompts import encode_text
from tests.cli.fakes import FakeModel
from tests.cli.tokenizers_of_tests import characters

TOKENIZER = characters()
PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDasaFDPtTnvLvp8pUkS1sGWUHeN2cQTneTYkjJtEw2aZ"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def arguments(*more: str) -> argparse.Namespace:
    return build_parser().parse_intermixed_args(["m", "hi", *more, "--initial-peers", PEER])


def test_the_answer_goes_to_stdout_and_what_is_about_it_to_stderr(capsys):
    model = FakeModel(TOKENIZER, "hello")
    answer(model, TOKENIZER, encode_text(TOKENIZER, "hi"), arguments())
    captured = capsys.readouterr()
    assert captured.out == "hello\n"
    route, speed = captured.err.splitlines()
    assert route == "you -> someone 0:4 -> you"
    assert speed.startswith("6 tokens, ")


def test_beams_are_printed_at_the_end(capsys):
    model = FakeModel(TOKENIZER, "hello")
    answer(model, TOKENIZER, encode_text(TOKENIZER, "hi"), arguments("--num-beams", "2"))
    captured = capsys.readouterr()
    assert captured.out == "hello\n"
    assert model.options[0]["num_beams"] == 2
    assert captured.err.splitlines()[1].startswith("6 tokens, ")


def test_the_line_is_ended_even_if_the_swarm_fails(capsys):
    with pytest.raises(ConfigError, match="broken"):
        answer(
            FakeModel(TOKENIZER, ConfigError("broken")), TOKENIZER, encode_text(TOKENIZER, "hi"), arguments()
        )
    assert capsys.readouterr().out == "\n"


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_sent():
    model = FakeModel(TOKENIZER, context=100)
    with pytest.raises(ConfigError, match=r"90 tokens of prompt and 20 new ones .* context of 100"):
        answer(model, TOKENIZER, encode_text(TOKENIZER, "x" * 90), arguments("--max-new-tokens", "20"))
    assert model.sent == []


def test_sampling():
    assert sampling(arguments()) == {"do_sample": False}
    assert sampling(arguments("--top-p", "0.5")) == {"do_sample": False}
    chosen = sampling(arguments("--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--seed", "3"))
    assert chosen == {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 7}


def test_what_the_model_says_about_its_end_counts_first():
    model = FakeModel(TOKENIZER)
    assert end_tokens(model, TOKENIZER) == {"eos_token_id": 256, "pad_token_id": 256}
    model.generation_config.eos_token_id = [1, 2]
    model.generation_config.pad_token_id = 3
    assert end_tokens(model, TOKENIZER) == {}


def test_the_prompt_comes_from_the_command_line_or_a_pipe(monkeypatch):
    assert read_prompt("hi") == "hi"
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert read_prompt("-") == "two\nlines"
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert read_prompt(None) == "two\nlines"


@pytest.mark.parametrize("stdin", [Terminal(), io.StringIO(""), io.StringIO("\n")])
def test_no_prompt_at_all(monkeypatch, stdin):
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(ConfigError, match="prompt"):
        read_prompt(None)
