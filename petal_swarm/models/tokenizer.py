"""Tokenizers: transformers' own for folders and Hub ids, one built from the metadata for GGUF files.

transformers can convert GGUF vocabularies too, but for byte-level BPE it ignores `tokenizer.ggml.pre`,
which says how text is cut before merging: "a  12" then becomes other tokens than those the model was
trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from petal_swarm.errors import CheckpointError, UnknownModelError, UnsupportedArchitectureError
from petal_swarm.models.gguf_file import GGUFFile
from petal_swarm.models.tensor_files import damaged

_CONTROL, _USER_DEFINED = 3, 4
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def load_tokenizer(
    model: str, *, revision: str | None = None, cache_dir: str | None = None, token: str | None = None
) -> Any:
    """A transformers fast tokenizer for a folder, a Hub id or a `.gguf` file; imports transformers.

    Raises:
        UnknownModelError: nothing is there, or no tokenizer.
        UnsupportedArchitectureError: a GGUF vocabulary of a kind that is not known here.
        CheckpointError: the GGUF file is damaged.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(path) if path.is_dir() else model, revision=revision, cache_dir=cache_dir, token=token
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UnknownModelError(f"{model} has no tokenizer that can be loaded: {reason}") from error


def _from_gguf(path: Path) -> Any:
    file = GGUFFile(path)
    kind = file.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            return _byte_level(file)
        if kind == "llama":
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
        raise damaged(path, error) from error
    raise UnsupportedArchitectureError(f"{path.name} has a tokenizer of kind {kind!r}: not supported here")


def _byte_level(file: GGUFFile) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = file.get("tokenizer.ggml.tokens")
    kinds: list[int] = file.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges")]
    pre = file.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise UnsupportedArchitectureError(f"pre-tokenizer {pre!r} is not supported here")
    vocabulary = {text: number for number, text in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    _PRE_TOKENIZERS[pre](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    for text, kind in zip(tokens, kinds, strict=True):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    named = _named_tokens(file, tokens)
    if named["bos_token"] is not None and file.get("tokenizer.ggml.add_bos_token", pre in _BOS_FIRST):
        _put_first(tokenizer, named["bos_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _named_tokens(file: GGUFFile, tokens: list[str]) -> dict[str, str | None]:
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: file.get(f"tokenizer.ggml.{own}_token_id") for name, own in names.items()}
    if any(number is not None and not 0 <= number < len(tokens) for number in ids.values()):
        raise CheckpointError(f"{file.path.name} names special tokens beyond its vocabulary")
    return {name: None if number is None else tokens[number] for name, number in ids.items()}


def _put_first(tokenizer: Any, bos: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _plain(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _words(pattern: str, *, nfc: bool = False) -> Callable[[Any], None]:
    def configure(tokenizer: Any) -> None:
        from tokenizers import Regex, normalizers, pre_tokenizers

        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        if nfc:
            tokenizer.normalizer = normalizers.NFC()

    return configure


_LLAMA3 = _words(_WORDS % r"\p{N}{1,3}")
_PRE_TOKENIZERS: dict[str, Callable[[Any], None]] = {
    "default": _plain,
    "gpt-2": _plain,
    "smollm": _single_digits,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _words(_WORDS % r"\p{N}", nfc=True),
    "bloom": _words(_BLOOM_WORDS),
}
_WHOLE_WORDS_FIRST = _BOS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3"})
