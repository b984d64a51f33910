"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): header and tensors.

The header is walked here rather than by `gguf.GGUFReader`, which makes several Python objects for every
token of the vocabulary and trusts the file's sizes: a server needs none of the vocabulary, and files come
from strangers. Every length is checked against the size of the file. `gguf` does the dequantization.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from petal_swarm.errors import CheckpointError
from petal_swarm.models.tensor_files import damaged

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
# Rows are dequantized this many numbers at a time, so that temporaries stay small.
_CHUNK_ELEMENTS = 1 << 19


class GGUFTensor(NamedTuple):
    """Where a tensor lies; `shape` is rows first, as in torch."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    row_bytes: int


class _Cursor:
    """Reads little-endian values, never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.offset = 0

    def skip(self, count: int) -> int:
        start = self.offset
        if count > len(self._data) - start:
            raise ValueError("it ends too early")
        self.offset = start + count
        return start

    def scalar(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack_from(self._data, self.skip(layout.size))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.skip(length)
        return self._data[start : start + length].decode()

    def skip_string(self) -> None:
        self.skip(self.scalar("Q"))

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip_string()
        elif kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner == _STRING:
                for _ in range(count):
                    self.skip_string()
            else:
                self.skip(count * struct.calcsize(_scalar_code(inner)))
        else:
            self.skip(struct.calcsize(_scalar_code(kind)))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_scalar_code(kind))
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner == _STRING:
            return [self.string() for _ in range(count)]
        layout = f"<{count}{_scalar_code(inner)}"
        return list(struct.unpack_from(layout, self._data, self.skip(struct.calcsize(layout))))


def _scalar_code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"unknown value type {kind}")
    return _SCALARS[kind]


class GGUFFile:
    """Metadata (decoded on access) and tensors of one file.

    Raises:
        CheckpointError: the file is truncated, damaged, or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fields: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._walk(_Cursor(self._data))
        except (ValueError, OSError, OverflowError, struct.error, KeyError) as error:
            raise damaged(path, error) from error

    def _walk(self, cursor: _Cursor) -> None:
        if self._data[:4] != _MAGIC:
            raise ValueError("it is not a GGUF file")
        cursor.skip(4)
        version = cursor.scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"GGUF version {version} is not supported")
        tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(field_count):
            name, kind = cursor.string(), cursor.scalar("I")
            self._fields[name] = (kind, cursor.offset)
            cursor.skip_value(kind)
        found = [self._tensor_info(cursor) for _ in range(tensor_count)]
        alignment = self.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"alignment {alignment!r}")
        base = -(-cursor.offset // alignment) * alignment
        for name, tensor in found:
            self._add(name, tensor._replace(offset=base + tensor.offset))

    def _tensor_info(self, cursor: _Cursor) -> tuple[str, GGUFTensor]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, dimensions = cursor.string(), cursor.scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        kind, offset = cursor.scalar("I"), cursor.scalar("Q")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if shape[-1] % block:
            raise ValueError(f"tensor {name!r} has rows of {shape[-1]}, not a multiple of {block}")
        return name, GGUFTensor(shape, kind, offset, shape[-1] // block * size)

    def _add(self, name: str, tensor: GGUFTensor) -> None:
        rows = 1
        for size in tensor.shape[:-1]:
            rows *= size
        if name in self.tensors:
            raise ValueError(f"tensor {name!r} is there twice")
        if tensor.offset + rows * tensor.row_bytes > len(self._data):
            raise ValueError(f"it ends before the data of tensor {name!r}")
        self.tensors[name] = tensor

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value of `key`."""
        if key not in self._fields:
            return default
        kind, offset = self._fields[key]
        cursor = _Cursor(self._data)
        cursor.offset = offset
        return cursor.value(kind)

    def scalars(self) -> dict[str, Any]:
        """All metadata except arrays (a vocabulary is large)."""
        return {key: self.get(key) for key, (kind, _) in self._fields.items() if kind != _ARRAY}

    @contextmanager
    def open(self) -> Iterator[GGUFFile]:
        yield self

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str, out: Tensor) -> None:
        """Dequantizes the tensor into `out`; only its first rows if `out` has fewer."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        rows = out.numel() // tensor.shape[-1]
        target = out.view(rows, tensor.shape[-1])
        stored = np.frombuffer(self._data, np.uint8, rows * tensor.row_bytes, tensor.offset)
        stored = stored.reshape(rows, tensor.row_bytes)
        step = max(1, _CHUNK_ELEMENTS // tensor.shape[-1])
        for first in range(0, rows, step):
            chunk = stored[first : first + step]
            kind = GGMLQuantizationType(tensor.kind)
            if kind is GGMLQuantizationType.F32:
                plain = chunk.view(np.float32).copy()
            else:
                try:
                    plain = dequantize(chunk, kind)
                except NotImplementedError as error:
                    raise CheckpointError(f"tensors of type {kind.name} are not supported") from error
            target[first : first + step].copy_(torch.from_numpy(plain))
