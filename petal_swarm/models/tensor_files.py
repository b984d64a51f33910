"""Files that hold tensors: safetensors, and the old `pytorch_model.bin`. GGUF is in `gguf_file`.

A reader copies one tensor at a time into memory the caller owns, so that loading a span needs no second
copy of it, and no mapping of a file outlives the load.
"""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from petal_swarm.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
_STREAMED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class OpenTensors(Protocol):
    """An open file of tensors, by the names stored in it."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, out: Tensor) -> None:
        """Copies the tensor into `out`, converting; only its first rows if `out` has fewer."""
        ...


class _Safetensors:
    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._lock = threading.Lock()  # the handle refuses two calls at a time; copying is outside

    def names(self) -> list[str]:
        return list(self._handle.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle.get_slice(name).get_shape())

    def read(self, name: str, out: Tensor) -> None:
        with self._lock:
            stored = self._handle.get_tensor(name)
        _copy(stored, out)


class StreamedSafetensors:
    """A safetensors file that is read through `seek` and `read`: for a few rows of a file far away.

    Raises:
        ValueError: the header makes no sense.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lock = threading.Lock()
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        self._header: dict[str, Any] = json.loads(file.read(length))
        self._start = 8 + length

    def names(self) -> list[str]:
        return [name for name in self._header if name != "__metadata__"]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def read(self, name: str, out: Tensor) -> None:
        entry = self._header[name]
        dtype = _STREAMED_DTYPES[entry["dtype"]]
        with self._lock:
            self._file.seek(self._start + entry["data_offsets"][0])
            data = bytearray(self._file.read(out.numel() * dtype.itemsize))
        out.copy_(torch.frombuffer(data, dtype=dtype).view(out.shape))


class _TorchTensors:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, out: Tensor) -> None:
        _copy(self._tensors[name], out)


def _copy(stored: Tensor, out: Tensor) -> None:
    if not stored.is_floating_point():
        raise CheckpointError(f"its dtype is {stored.dtype}: quantized checkpoints are not supported")
    out.copy_(stored[: out.shape[0]])


@contextmanager
def open_tensors(path: Path) -> Iterator[OpenTensors]:
    """Opens a `.safetensors` or `.bin` file.

    Raises:
        CheckpointError: the file is damaged, truncated, or not what its name says.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as handle:
                yield _Safetensors(handle)
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged(path, error) from error
    else:
        yield _TorchTensors(_load_mapped(path))


def _load_mapped(path: Path) -> dict[str, Tensor]:
    """Maps a `.bin` file: only the tensors that are read enter memory."""
    try:
        loaded = _torch_load(path)
    except (RuntimeError, OSError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise damaged(path, error) from error
    if not isinstance(loaded, dict):
        raise damaged(path, ValueError("it holds no dictionary of tensors"))
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "_use_new_zipfile_serialization" not in str(error):
            raise
        # Files from before torch 1.6 cannot be mapped; the shard is read whole.
        return torch.load(path, map_location="cpu", weights_only=True)


def damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return CheckpointError(f"{path.name} is damaged: {reason}")
