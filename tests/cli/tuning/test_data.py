import json

import pytest
from tokenizers.processors import TemplateProcessing

from petal_swarm.cli.tuning.data import read_corpus
from petal_swarm.errors import ConfigError
from tests.cli.tokenizers_of_tests import characters

CHAT, PLAIN = characters(), characters(chat=False)
END = 256


def corpus(folder, content, *, name="data.jsonl", tokenizer=CHAT, max_length=100):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_corpus(path, tokenizer, max_length=max_length)


def lines(*records):
    return "\n".join(json.dumps(record) for record in records)


def shown(example, tokenizer=CHAT):
    """The text, with what is learned in <>."""
    text, learning = "", False
    for token, learned in zip(example.tokens.tolist(), example.learned.tolist(), strict=True):
        if learned != learning:
            text += "<" if learned else ">"
            learning = learned
        text += "$" if token == END else tokenizer.decode([token])
    return text + (">" if learning else "")


def test_a_text_is_cut_into_windows(tmp_path):
    found = corpus(tmp_path, "abcdefghij\n", name="data.txt", max_length=4)
    assert [shown(example) for example in found.examples] == ["<abcd>", "<efgh>", "<ij\n>"]
    assert not found.chats


def test_a_last_window_of_one_token_has_nothing_to_predict(tmp_path):
    found = corpus(tmp_path, "abcde", name="data.txt", max_length=4)
    assert [shown(example) for example in found.examples] == ["<abcd>"]


def test_texts_in_lines_end_and_are_cut_into_windows(tmp_path):
    found = corpus(tmp_path, lines({"text": "abc"}, {"text": "defgh"}), max_length=4)
    assert [shown(example) for example in found.examples] == ["<abc$>", "<defg>", "<h$>"]


def test_only_the_completion_is_learned(tmp_path):
    found = corpus(tmp_path, lines({"prompt": "2+2=", "completion": "4"}))
    assert [shown(example) for example in found.examples] == ["2+2=<4$>"]


def test_the_token_that_begins_a_text_comes_once_and_not_before_what_a_template_wrote(tmp_path):
    tokenizer = characters()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", END)]
    )
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    records = {"text": "abc"}, {"prompt": "a", "completion": "b"}, {"messages": messages}
    found = corpus(tmp_path, lines(*records), tokenizer=tokenizer)
    assert [shown(example) for example in found.examples] == [
        "<$abc$>",
        "$a<b$>",
        "[user]q[end][assistant]<a[end]>",
    ]
    assert not found.chats


def test_only_answers_are_learned_as_the_template_writes_them(tmp_path):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "never answered"},
    ]
    found = corpus(tmp_path, lines({"messages": messages}), max_length=200)
    expected = "[system]s[end][user]q[end][assistant]<a[end]>[user]r[end][assistant]<b[end]>"
    assert [shown(example) for example in found.examples] == [expected]
    assert found.chats


def test_without_a_template_a_conversation_is_written_as_chat_writes_it(tmp_path):
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b"},
    ]
    found = corpus(tmp_path, lines({"messages": messages}), tokenizer=PLAIN)
    expected = "User: q\nAssistant:< a>\nUser: r\nAssistant:< b$>"
    assert [shown(example) for example in found.examples] == [expected]


def test_what_is_too_long_loses_its_end_and_is_counted(tmp_path):
    records = {"prompt": "abc", "completion": "defgh"}, {"prompt": "a", "completion": "b"}
    found = corpus(tmp_path, lines(*records), max_length=5)
    assert [shown(example) for example in found.examples] == ["abc<de>", "a<b$>"]
    assert found.cut == 1


def test_empty_lines_a_byte_order_mark_and_strange_line_separators(tmp_path):
    found = corpus(tmp_path, b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\n\n  \n{"text": "c"}\r\n')
    assert [shown(example)[0:2] for example in found.examples] == ["<a", "<c"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "this is not JSON"),
        ("[" * 100_000, "this is not JSON"),
        ("[1]", "a JSON list, not an object"),
        ("{}", "it has the fields none; expected"),
        ('{"txt": "a"}', 'it has the fields txt; expected {"text"}'),
        ('{"text": 1}', '"text" is not a text'),
        ('{"text": " "}', "the text is empty"),
        ('{"text": "\\ud800"}', "half of a character"),
        ('{"prompt": "a"}', '"completion" is missing'),
        ('{"prompt": null, "completion": "a"}', '"prompt" is not a text'),
        ('{"prompt": "too long by far", "completion": "a"}', "starts after 15 tokens, and --max-length is 9"),
        ('{"messages": []}', "is not a list of"),
        ('{"messages": ["a"]}', 'message 1 is no {"role", "content"}'),
        ('{"messages": [{"role": "user"}]}', 'message 1 is no {"role", "content"}'),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "message 1 has the role 'robot'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "cannot begin with the assistant"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nobody has the role assistant"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, reason):
    with pytest.raises(ConfigError) as raised:
        corpus(tmp_path, '{"text": "good"}\n\n' + line, max_length=9)
    assert f"{tmp_path / 'data.jsonl'} line 3: " in str(raised.value)
    assert reason in str(raised.value)


def test_of_several_wrong_lines_the_first_is_named_and_the_others_are_counted(tmp_path):
    with pytest.raises(ConfigError, match=r"line 2: .* \(3 lines are wrong\)"):
        corpus(tmp_path, '{"text": "good"}\n{}\n{}\n{}\n')


def test_without_an_end_token_nothing_marks_an_empty_completion(tmp_path):
    tokenizer = characters()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="line 1: there is nothing to learn"):
        corpus(tmp_path, lines({"prompt": "a", "completion": ""}), tokenizer=tokenizer)


def test_a_template_that_takes_back_what_it_wrote_is_refused(tmp_path):
    tokenizer = characters()
    tokenizer.chat_template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ConfigError, match="writes earlier messages anew"):
        corpus(tmp_path, lines({"messages": messages}), tokenizer=tokenizer)


def test_a_template_that_refuses(tmp_path):
    tokenizer = characters()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ConfigError, match=r"line 1: .*roles must alternate"):
        corpus(tmp_path, lines({"messages": messages}), tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_files_with_nothing_to_learn(tmp_path, name):
    with pytest.raises(ConfigError, match=f"nothing to learn in .*{name}"):
        corpus(tmp_path, " \n", name=name)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_corpus(tmp_path / "nowhere", CHAT, max_length=9)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_corpus(tmp_path, CHAT, max_length=9)
    with pytest.raises(ConfigError, match="line 2: this is not UTF-8"):
        corpus(tmp_path, b"a\n\xff\n", name="data.txt")
