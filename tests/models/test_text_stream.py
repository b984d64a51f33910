"""Text of an answer while its tokens come: all of it, nothing twice, and nothing that is not certain."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from petal_swarm.models.text_stream import AnswerText, StopScanner, TextStream
from petal_swarm.models.token_texts import TokenTexts
from tests.cli.tokenizers_of_tests import characters, words

BYTES = characters()
TEXT = "né 日本 🐝🐝 a🐝b ﷽ e\u0301\u200d👩\u200d👧 end"


def tokens_of(text: str) -> list[int]:
    ids: list[int] = BYTES(text, add_special_tokens=False)["input_ids"]
    return ids


class Backed:
    """A tokenizer of which only the fast part is needed."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend_tokenizer = backend

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        text: str = self.backend_tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.backend_tokenizer.id_to_token(token)


class Slow:
    """A tokenizer without a fast part."""

    def decode(self, tokens: list[int], **options: Any) -> str:
        text: str = BYTES.decode(tokens, **options)
        return text


@pytest.fixture(scope="module")
def sentences() -> Backed:
    """As sentencepiece: words begin with a mark that the first one loses, and bytes are tokens, too."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581Hello",
        "\u2581world",
        "s",
        "\u2581",
    ]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Backed(tokenizer)


@pytest.mark.parametrize("tokenizer", [BYTES, Slow()], ids=["fast", "slow"])
def test_characters_come_whole_and_once(tokenizer: Any) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.take(token) for token in tokens_of(TEXT)]
    assert "".join(pieces) == TEXT
    assert [piece for piece in pieces if piece] == list(TEXT)
    assert stream.finish() == ""


def test_half_a_character_is_shown_at_the_end() -> None:
    stream = TextStream(BYTES)
    assert [stream.take(token) for token in tokens_of("a🐝")[:3]] == ["a", "", ""]
    assert stream.finish() == "\ufffd"


def test_bytes_that_never_become_a_character_are_shown_some_time() -> None:
    half = tokens_of("🐝")[0]
    stream = TextStream(BYTES)
    shown = "".join(stream.take(token) for token in [half] * 60 + tokens_of("ok")) + stream.finish()
    assert shown == "\ufffd" * 60 + "ok"


def test_any_bytes_are_as_in_one_go() -> None:
    chance = random.Random(1)
    for _ in range(50):
        tokens = [chance.choice((chance.randrange(256), *tokens_of("日é "))) for _ in range(80)]
        stream = TextStream(BYTES)
        shown = "".join(map(stream.take, tokens)) + stream.finish()
        assert shown == BYTES.backend_tokenizer.decode(tokens)


def test_special_tokens_say_nothing() -> None:
    stream = TextStream(BYTES)
    given = [256, *tokens_of("é")[:1], 256, *tokens_of("é")[1:], *[256] * 40, *tokens_of("b"), 256]
    assert "".join(map(stream.take, given)) + stream.finish() == "éb"


def test_spaces_before_words_are_those_of_the_whole_text(sentences: Backed) -> None:
    hello, world, s, space = 257, 258, 259, 260
    stream = TextStream(sentences)
    assert [stream.take(token) for token in (hello, world, s, hello)] == ["Hello", " world", "s", " Hello"]
    behind = TextStream(sentences, [world, hello])
    assert [behind.take(token) for token in (world, s)] == [" world", "s"]
    assert TextStream(sentences, [world] * 50).take(space) == " "
    bee = [1 + byte for byte in "🐝".encode()]
    assert [behind.take(token) for token in bee] == ["", "", "", "🐝"]


def test_a_prompt_that_ends_in_half_a_character() -> None:
    first, *rest = tokens_of("é!")
    stream = TextStream(BYTES, [*tokens_of("abc"), first])
    assert [stream.take(token) for token in rest][-1].endswith("!")


def test_time_is_linear() -> None:
    stream, most = TextStream(BYTES), 0
    decode = stream._decode

    def counted(tokens: list[int]) -> str:
        nonlocal most
        most = max(most, len(tokens))
        return decode(tokens)

    stream._decode = counted  # type: ignore[method-assign]
    for token in tokens_of("some text that goes on " * 20):
        stream.take(token)
    assert most <= 4


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "rest"),
    [
        ((), ["a", "b"], ["a", "b"], ""),
        (("\nUser:",), ["a\nUse", "r", ": b"], ["a", "", ""], ""),
        (("\nUser:",), ["a\nUse", " it\n"], ["a", "\nUse it"], "\n"),
        (("bcd", "ab"), ["xa", "bcd"], ["x", ""], ""),
        (("abc", "b"), ["xab", "c"], ["xa", ""], ""),
        (("aab",), ["a", "a", "a", "b"], ["", "", "a", ""], ""),
        (("stop",), ["don't stop it"], ["don't "], ""),
        (("zz",), ["a", "z", "", "y"], ["a", "", "", "zy"], ""),
    ],
)
def test_stop_texts(stops: tuple[str, ...], pieces: list[str], shown: list[str], rest: str) -> None:
    scanner = StopScanner(stops)
    assert [scanner.take(piece) for piece in pieces] == shown
    assert scanner.finish() == rest
    assert scanner.stopped == any(stop in "".join(pieces) for stop in stops)
    assert scanner.take("more") == ("" if scanner.stopped else "more")


def test_stop_texts_are_found_as_in_the_whole_text() -> None:
    chance = random.Random(2)
    for _ in range(300):
        text = "".join(chance.choice("ab") for _ in range(30))
        stops = ["".join(chance.choice("ab") for _ in range(chance.randint(2, 7))) for _ in range(2)]
        scanner, shown, at = StopScanner(stops), "", 0
        while at < len(text):
            size = chance.randint(1, 4)
            shown += scanner.take(text[at : at + size])
            at += size
        # Which stop comes first is known only at its end: another that begins earlier may end later.
        found = [text.find(stop) for stop in stops if stop in text]
        shown += scanner.finish()
        assert (shown == text) if not found else shown in {text[:place] for place in found}


def test_a_stop_text_in_what_was_held_back() -> None:
    text = AnswerText(BYTES, stops=("\ufffd",))
    assert [text.take(token) for token in tokens_of("aé")[:2]] == ["a", ""]
    assert text.finish() == ""
    assert text.stopped


def test_tokens_alone_as_text_and_as_bytes(sentences: Backed) -> None:
    texts = TokenTexts(BYTES)
    bee = tokens_of("🐝")
    assert b"".join(map(texts.data, bee)).decode() == "🐝"
    assert texts.text(bee[0]) == "\ufffd"
    assert texts.text(256) == "<end>"
    assert texts.data(tokens_of(" ")[0]) == b" "
    pieces = TokenTexts(sentences)
    assert [pieces.data(token) for token in (1 + 0xF0, 258, 259)] == [b"\xf0", b" world", b"s"]
    assert TokenTexts(words(9)).text(5) == "w5"
    assert TokenTexts(words(9)).data(1) == b"</s>"
    assert TokenTexts(words(9)).data(70) == b""
