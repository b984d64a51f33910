"""The formats of checkpoints behind `checkpoint.TensorStore`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from petal_swarm.errors import CheckpointError, UnknownModelError
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of, family_of_gguf
from petal_swarm.models.family import Family
from petal_swarm.models.folders import Folder, file_identity, read_json
from petal_swarm.models.gguf_file import GGUFFile
from petal_swarm.models.tensor_files import OpenTensors, StreamedSafetensors, damaged, open_tensors

# `general.file_type` of files that are not quantized.
_FILE_DTYPES = {1: "float16", 32: "bfloat16"}
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


class FolderStore:
    """Safetensors if there are any, else `.bin`; in one file, or in shards with an index."""

    format_key = ""

    def __init__(self, folder: Folder, family: Family) -> None:
        self._folder = folder
        self._family = family

    def identity(self) -> str | None:
        return self._folder.identity()

    def locate(self) -> Mapping[str, tuple[str, str]]:
        """Canonical name -> (file, stored name).

        Raises:
            UnknownModelError: there are no weights.
            CheckpointError: the index or the file is damaged.
        """
        for single in _SINGLE_FILES:
            index = read_json(self._folder, f"{single}.index.json")
            if index is not None:
                stored = self._checked_index(index, f"{single}.index.json")
                return {self._family.canonical(name): (file, name) for name, file in stored.items()}
            if self._folder.find(single) is not None:
                with self.open(single) as opened:
                    return {self._family.canonical(name): (single, name) for name in opened.names()}
        raise UnknownModelError(
            f"{self._folder.source} holds no weights: neither {' nor '.join(_SINGLE_FILES)} (or their shards)"
        )

    def _checked_index(self, index: dict[str, Any], filename: str) -> dict[str, str]:
        stored = index.get("weight_map")
        if not isinstance(stored, dict) or not all(_is_plain_name(file) for file in stored.values()):
            raise CheckpointError(f"{filename} of {self._folder.source} has no usable weight_map")
        return stored

    def open(self, file: str) -> AbstractContextManager[OpenTensors]:
        path = self._folder.find(file)
        if path is None:
            raise CheckpointError(f"{self._folder.source} lacks the file {file} that its index names")
        return open_tensors(path)

    @contextmanager
    def peek(self, file: str) -> Iterator[OpenTensors]:
        """As `open`, for a few rows: does not download a shard for them where ranges of it can be read."""
        streamed = None
        if file.endswith(".safetensors"):
            with suppress(OSError, ValueError, KeyError):
                streamed = self._folder.stream(file)
        if streamed is None:
            with self.open(file) as opened:
                yield opened
            return
        with streamed:
            try:
                yield StreamedSafetensors(streamed)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file} of {self._folder.source} cannot be read: {error}") from error

    def restore(self, name: str, tensor: Tensor) -> Tensor:
        return tensor


def _is_plain_name(file: object) -> bool:
    return isinstance(file, str) and file == Path(file).name and file.endswith((".safetensors", ".bin"))


class GGUFStore:
    """One `.gguf` file; quantized tensors are dequantized as they are read."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.format_key = f"gguf-{file.get('general.file_type', 0)}"
        self._file = file
        self._config = config
        self._family = family_of(config)

    def identity(self) -> str | None:
        return file_identity(self._file.path)

    def locate(self) -> Mapping[str, tuple[str, str]]:
        config, family = self._config, self._family
        names = list(family.end_tensors(config))
        for block in range(config.num_blocks):
            names += family.block_tensors(config, block)
        stored = {name: family.gguf_name(name) for name in names}
        file = self._file.path.name
        return {name: (file, own) for name, own in stored.items() if own in self._file.tensors}

    def open(self, file: str) -> AbstractContextManager[OpenTensors]:
        return self._file.open()

    def peek(self, file: str) -> AbstractContextManager[OpenTensors]:
        return self._file.open()

    def restore(self, name: str, tensor: Tensor) -> Tensor:
        if self._family.gguf_restore is None:
            return tensor
        return self._family.gguf_restore(self._config, name, tensor)


def gguf_configuration(file: GGUFFile) -> tuple[dict[str, Any], ModelConfig]:
    """The `config.json` that the metadata of a GGUF file amounts to, and the configuration it makes.

    Raises:
        UnsupportedArchitectureError: no family here has blocks for it.
        CheckpointError: metadata is missing or impossible.
    """
    try:
        metadata = file.scalars()
        family, architecture = family_of_gguf(str(metadata.get("general.architecture")))
        assert family.gguf_to_hf is not None, "a family with GGUF architectures reads GGUF metadata"
        hf = family.gguf_to_hf(metadata, architecture)
        names = family.gguf_ends
        hf["vocab_size"] = file.shape(f"{names[family.ends.embedding]}.weight")[0]
    except (KeyError, TypeError, ZeroDivisionError, ValueError) as error:
        detail = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise damaged(file.path, ValueError(detail)) from error
    hf["tie_word_embeddings"] = f"{names[family.ends.head]}.weight" not in file.tensors
    hf["torch_dtype"] = _FILE_DTYPES.get(file.get("general.file_type", 0), "float32")
    hf |= _token_ids(file)
    hf["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    hf["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    config = ModelConfig.from_hf(hf | {"rope_parameters": _with_factors(file, hf)})
    return hf, config


def _with_factors(file: GGUFFile, hf: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1 and later: GGUF files hold the frequencies' divisors as a tensor."""
    rope: dict[str, Any] = dict(hf.get("rope_parameters") or {})
    if "rope_freqs.weight" in file.tensors:
        import torch

        factors = torch.empty(file.shape("rope_freqs.weight"))
        file.read("rope_freqs.weight", factors)
        rope["frequency_factors"] = factors.tolist()
    return rope


def _token_ids(file: GGUFFile) -> dict[str, Any]:
    """Special tokens as transformers names them; a chat model may end its turns with a token of their own."""
    ids = {name: file.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    ends = list(dict.fromkeys(i for i in (ids["eos"], ids["eot"]) if i is not None))
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
    }
