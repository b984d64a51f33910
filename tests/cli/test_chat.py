import io

import pytest
import torch

from petal_swarm.cli.chat import Chat, converse, rewind
from petal_swarm.errors import ConfigError, HopLostError, MissingBlocksError
from petal_swarm.models.prompts import context_length, encode_chat, encode_text, plain_chat
from tests.cli.fakes import FakeModel, FakeSession
from tests.cli.tokenizers_of_tests import characters

TEMPLATED, PLAIN = characters(), characters(chat=False)


def chat_with(model, tokenizer=TEMPLATED, **settings):
    defaults = {"options": {"do_sample": False}, "max_new_tokens": 50, "max_length": 500}
    return Chat(model, tokenizer, **(defaults | settings))


def test_a_turn_pays_for_its_new_tokens_only(capsys):
    model = FakeModel(TEMPLATED, "hello", "fine")
    chat = chat_with(model)
    chat.ask("hi")
    chat.ask("and you?")
    assert capsys.readouterr().out == "hello\nfine\n"
    # The answer's end token is not what the template writes, so the session goes back by that one.
    assert model.sent == ["[user]hi[end][assistant]", "[end][user]and you?[end][assistant]"]
    assert len(model.sessions) == 1


def test_the_session_is_told_what_the_model_does_not_say(capsys):
    model = FakeModel(TEMPLATED, "hello")
    chat_with(model).ask("hi")
    assert model.options == [
        {"do_sample": False, "max_new_tokens": 50, "eos_token_id": 256, "pad_token_id": 256}
    ]


def test_reset_starts_a_new_session(capsys):
    model = FakeModel(TEMPLATED, "hello", "hello")
    chat = chat_with(model, system="be kind")
    chat.ask("hi")
    chat.reset()
    assert model.sessions[0].closed
    chat.ask("hi")
    assert model.sent == ["[system]be kind[end][user]hi[end][assistant]"] * 2


def test_without_template_a_plain_format_ends_at_the_next_question(capsys):
    model = FakeModel(PLAIN, " Paris.\nUser: And Rome?", " Rome.\nUser:")
    chat = chat_with(model, PLAIN)
    chat.ask("Capital of France?")
    chat.ask("Of Italy?")
    assert capsys.readouterr().out == "Paris.\nRome.\n"
    assert model.sent[0] == "User: Capital of France?\nAssistant:"
    assert "Capital" not in model.sent[1]
    assert model.sent[1].endswith("Of Italy?\nAssistant:")


def test_a_session_lost_between_turns_is_replaced(capsys):
    model = FakeModel(TEMPLATED, "hello", HopLostError("gone"), "fine")
    chat = chat_with(model)
    chat.ask("hi")
    chat.ask("and you?")
    assert capsys.readouterr().out == "hello\nfine\n"
    assert len(model.sessions) == 2
    assert model.sent[2].startswith("[user]hi[end]")


def test_a_swarm_that_fails_loses_the_question_only(capsys):
    model = FakeModel(TEMPLATED, "hello", MissingBlocksError("nobody serves block 2"), "fine")
    chat = chat_with(model)
    chat.ask("hi")
    with pytest.raises(MissingBlocksError):
        chat.ask("lost")
    chat.ask("and you?")
    assert [message["content"] for message in chat.messages] == ["hi", "hello", "and you?", "fine"]


def test_an_interrupted_answer_is_kept_as_far_as_it_came(capsys):
    model = FakeModel(TEMPLATED, KeyboardInterrupt(), "fine")
    chat = chat_with(model)
    chat.ask("hi")
    assert model.sessions[0].closed
    chat.ask("again")
    assert len(model.sessions) == 2


def test_a_conversation_that_has_become_too_long_says_what_to_do(capsys):
    model = FakeModel(TEMPLATED, "x" * 100, context=60)
    chat = chat_with(model)
    chat.ask("hi")
    assert model.options[0]["max_new_tokens"] == 60 - len("[user]hi[end][assistant]")
    assert "see --max-new-tokens" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="/reset"):
        chat.ask("hi")


def test_converse(capsys, monkeypatch):
    model = FakeModel(TEMPLATED, "one", HopLostError("gone"), HopLostError("gone"), "two")
    chat = chat_with(model)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n/what\nhi\n/reset\nhi\n/quit\nnever\n"))
    converse(chat)
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\n"
    assert "error: gone" in captured.err
    assert "/quit leaves" in captured.err
    assert "forgotten" in captured.err


def test_the_end_of_stdin_leaves(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    converse(chat_with(FakeModel(TEMPLATED)))


@pytest.mark.parametrize(
    ("held", "wanted", "kept"),
    [
        (None, [1, 2, 3], 0),
        ([1, 2, 3], [1, 2, 3, 4, 5], 3),
        ([1, 2, 3], [1, 2, 9, 4], 2),
        ([1, 2, 3], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 1),
        ([1, 2, 3], [9, 2, 3], 0),
        ([1, 2, 3], [9], 0),
    ],
)
def test_rewind_keeps_what_both_have_in_common(held, wanted, kept):
    session = FakeSession(100)
    if held is not None:
        session.output_ids = torch.tensor([held])
        session.attention_mask = torch.ones_like(session.output_ids)
        session.in_cache = len(held) - 1
    assert rewind(session, torch.tensor([wanted])) == kept
    if kept:
        assert session.output_ids.tolist() == [wanted[:kept]]
        assert session.in_cache == kept - 1


def test_plain_format():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    assert plain_chat(messages) == "Be brief.\nUser: hi\nAssistant: hello\nUser: bye\nAssistant:"


def test_a_template_that_refuses_is_an_error_of_ours():
    tokenizer = characters()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="roles must alternate"):
        encode_chat(tokenizer, [{"role": "user", "content": "hi"}])


def test_an_empty_prompt():
    with pytest.raises(ConfigError, match="empty"):
        encode_text(PLAIN, "")


def test_context_length():
    assert context_length(FakeModel(PLAIN, context=60).config) == 60
    assert context_length(FakeModel(PLAIN).config) is None
