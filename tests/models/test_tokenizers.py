"""Tokenizers: from folders, and built from GGUF metadata."""

from __future__ import annotations

import pytest
from gguf_files import write_gguf
from tiny_models import make
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from petal_swarm.errors import CheckpointError, UnknownModelError, UnsupportedArchitectureError
from petal_swarm.models.tokenizer import load_tokenizer

TEXTS = ["Hello world", "in 12345 years", "a  12", " two  spaces\n\nnew", "naïve café 日本語 🙂", ""]
SPECIALS = ["<|end|>", "<|start|>", "<think>"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"


def trained():
    """Merges from a little text: byte-level BPE that knows runs of spaces and of digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(["Hello world in 12345 years  and  12 don't do      it"] * 3, trainer)
    return tokenizer


VOCABULARY = trained().get_vocab()


def write(path, pre="smollm", **fields):
    import json

    merges = [tuple(merge) for merge in json.loads(trained().to_str())["model"]["merges"]]
    texts = [*SPECIALS, *sorted(VOCABULARY, key=VOCABULARY.get)]

    def add(writer):
        writer.add_tokenizer_model(fields.get("model", "gpt2"))
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(texts)
        writer.add_token_types([3, 3, 4] + [1] * len(VOCABULARY))
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_pad_token_id(fields.get("pad", 0))
        writer.add_chat_template(TEMPLATE)
        if "add_bos" in fields:
            writer.add_add_bos_token(fields["add_bos"])

    return str(write_gguf(path / "model.gguf", make("llama"), extra=add))


@pytest.mark.parametrize("pre", ["smollm", "default", "gpt-2", "llama-bpe", "qwen2", "bloom"])
def test_round_trip(tmp_path, pre):
    tokenizer = load_tokenizer(write(tmp_path, pre, add_bos=False))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_digits_are_cut_as_the_model_was_trained(tmp_path):
    assert "Ġ12" in VOCABULARY, "the merges must be able to join digits"
    assert pieces(load_tokenizer(write(tmp_path, "default")), "a 12")[-1] == "Ġ12"
    assert pieces(load_tokenizer(write(tmp_path, "smollm")), "a 12")[-3:] == ["Ġ", "1", "2"]


def test_spaces_before_digits_stay_together(tmp_path):
    """Where transformers' own conversion errs: it cuts "a  12" as if digits were letters."""
    assert "ĠĠ" in VOCABULARY
    assert pieces(load_tokenizer(write(tmp_path, "smollm")), "a  12") == ["a", "ĠĠ", "1", "2"]


def test_special_tokens(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path))
    ids = tokenizer("<|start|><think>do<|end|>")["input_ids"]
    assert ids[:2] == [1, 2]
    assert ids[-1] == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>do"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "do"}], tokenize=False)
    assert chat == "<|start|>do<|end|>"


@pytest.mark.parametrize(("pre", "stated", "expected"), [("smollm", True, 1), ("llama-bpe", None, 1)])
def test_bos_is_put_first(tmp_path, pre, stated, expected):
    fields = {} if stated is None else {"add_bos": stated}
    assert load_tokenizer(write(tmp_path, pre, **fields))("do")["input_ids"][0] == expected


def test_bos_is_left_out(tmp_path):
    assert load_tokenizer(write(tmp_path, "llama-bpe", add_bos=False))("do")["input_ids"][0] > 2


def test_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match="pre-tokenizer 'x-bpe'"):
        load_tokenizer(write(tmp_path, "x-bpe"))
    with pytest.raises(UnsupportedArchitectureError, match="kind 'bert'"):
        load_tokenizer(write(tmp_path, model="bert"))


def test_special_token_beyond_the_vocabulary(tmp_path):
    with pytest.raises(CheckpointError, match="beyond its vocabulary"):
        load_tokenizer(write(tmp_path, pad=100_000))


def test_file_without_a_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make("llama"))
    with pytest.raises(UnsupportedArchitectureError, match="kind None"):
        load_tokenizer(str(path))


def test_folder(tmp_path):
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(UnknownModelError, match="has no tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    PreTrainedTokenizerFast(tokenizer_object=trained()).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("do")["input_ids"]
