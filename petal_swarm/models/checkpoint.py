"""Checkpoints: one interface to folders, Hub repositories and GGUF files.

Tensors go by their canonical names (see `family.Family`). Nothing is read before it is asked for, and
only the shard files that hold the wanted tensors are fetched.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from petal_swarm.errors import CheckpointError, UnknownModelError
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.families import family_of
from petal_swarm.models.family import Family, Shape
from petal_swarm.models.folders import open_folder, read_json
from petal_swarm.models.gguf_file import GGUFFile
from petal_swarm.models.stores import FolderStore, GGUFStore, gguf_configuration
from petal_swarm.models.tensor_files import OpenTensors

T = TypeVar("T")
Progress = Callable[[int, int], None]
_DEFAULT_THREADS = 2
_UNREADABLE = (CheckpointError, SafetensorError, RuntimeError, ValueError, OSError, LookupError, TypeError)


class TensorStore(Protocol):
    """The tensors of a checkpoint in one format."""

    format_key: str

    def identity(self) -> str | None:
        """Changes whenever the files do, without reading them; None if that cannot be told."""
        ...

    def locate(self) -> Mapping[str, tuple[str, str]]:
        """Canonical name -> (file, name stored in it)."""
        ...

    def open(self, file: str) -> AbstractContextManager[OpenTensors]: ...

    def peek(self, file: str) -> AbstractContextManager[OpenTensors]:
        """As `open`, where only a few rows will be read."""
        ...

    def restore(self, name: str, tensor: Tensor) -> Tensor:
        """The canonical form of a whole tensor as it was read."""
        ...


class Checkpoint:
    """A model's configuration and access to its tensors; made by `open_checkpoint`."""

    def __init__(
        self,
        *,
        source: str,
        name: str,
        hf: dict[str, Any],
        config: ModelConfig,
        store: TensorStore,
        generation: Callable[[], dict[str, Any] | None],
    ) -> None:
        self.source = source
        self.name = name
        self.config = config
        self.family: Family = family_of(config)
        self._hf = hf
        self._store = store
        self._generation = generation

    @cached_property
    def _where(self) -> Mapping[str, tuple[str, str]]:
        return self._store.locate()

    def names(self) -> set[str]:
        """Canonical names of all tensors."""
        return set(self._where)

    def identity(self) -> str | None:
        """Differs between these files and edited ones, and reads neither; None if that cannot be told."""
        return self._store.identity()

    @cached_property
    def model_key(self) -> str:
        """What peers agree on to be the same model, however its files are stored.

        Digests the mathematics of the configuration, the final norm, and the first rows of two matrices of
        the last block: fine-tuning with merged adapters leaves norms as they were.
        """
        config, family = self.config, self.family
        last = family.block_tensors(config, config.num_blocks - 1)
        prefix = family.block_prefix.format(config.num_blocks - 1)
        norm = f"{family.ends.final_norm}.weight"
        sample: dict[str, Shape] = {norm: (config.hidden_size,)}
        sample |= {prefix + local: (1, last[prefix + local][1]) for local in family.fingerprint}
        digested = self._store.format_key.encode()
        for tensor in self._load(sample, _moved_to("cpu"), leading=True).values():
            digested += tensor.numpy().astype("<f4").tobytes()
        return config.key(digested)

    def load(
        self,
        names: Iterable[str] | Mapping[str, Shape],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
        threads: int | None = None,
    ) -> dict[str, Tensor]:
        """Reads tensors, converting one by one; a mapping also states the shapes they must have.

        `progress(done, total)` counts bytes as converted.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or its file is damaged.
        """
        shapes = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names)
        return self._load(shapes, _moved_to(device), dtype=dtype, progress=progress, threads=threads)

    def load_converted(
        self,
        shapes: Mapping[str, Shape],
        convert: Callable[[str, Tensor], T],
        *,
        dtype: torch.dtype = torch.float32,
        progress: Progress | None = None,
        threads: int | None = None,
    ) -> dict[str, T]:
        """As `load`, but keeps what `convert(name, tensor)` makes of each tensor of `dtype`, not the tensor.

        So no more tensors are in memory at a time than there are threads, which call `convert`.
        `progress(done, total)` counts bytes of `dtype` that were converted.

        Raises:
            CheckpointError: as `load`.
        """
        return self._load(shapes, convert, dtype=dtype, progress=progress, threads=threads)

    def _load(
        self,
        shapes: Mapping[str, Shape | None],
        convert: Callable[[str, Tensor], T],
        *,
        dtype: torch.dtype = torch.float32,
        progress: Progress | None = None,
        threads: int | None = None,
        leading: bool = False,
    ) -> dict[str, T]:
        """As `load`; with `leading`, a stated shape may have fewer rows than the tensor: its first ones."""
        by_file = self._by_file(shapes)
        store_open = self._store.peek if leading else self._store.open
        sizes: dict[str, Shape] = {}
        for file, names in by_file.items():
            with store_open(file) as opened:
                sizes |= {name: self._shape(opened, name, shapes[name], leading) for name in names}
        elements = sum(math.prod(shape) for shape in sizes.values())
        counter = _Counter(progress, elements * dtype.itemsize)
        loaded: dict[str, T] = {}
        for file, names in by_file.items():
            # The pool inside: if one tensor fails, the others' threads end before the file is closed.
            with store_open(file) as opened, ThreadPoolExecutor(threads or _DEFAULT_THREADS) as pool:
                read = partial(self._read, opened, sizes, dtype, convert, counter, not leading)
                loaded |= zip(names, pool.map(read, names), strict=True)
        return {name: loaded[name] for name in shapes}

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self._where:
                raise CheckpointError(f"{self.source} has no tensor {name}")
            by_file.setdefault(self._where[name][0], []).append(name)
        return by_file

    def _shape(self, opened: OpenTensors, name: str, expected: Shape | None, leading: bool) -> Shape:
        file, stored = self._where[name]
        try:
            shape = opened.shape(stored)
        except (KeyError, SafetensorError) as error:
            raise CheckpointError(f"{file} has no tensor {stored}") from error
        wanted = shape if expected is None else expected
        fits = shape[1:] == wanted[1:] and shape[:1] >= wanted[:1] if leading else shape == wanted
        if not fits:
            raise CheckpointError(f"tensor {stored} of {file} has shape {shape}, not {wanted}")
        return wanted

    def _read(
        self,
        opened: OpenTensors,
        sizes: Mapping[str, Shape],
        dtype: torch.dtype,
        convert: Callable[[str, Tensor], T],
        counter: _Counter,
        whole: bool,
        name: str,
    ) -> T:
        file, stored = self._where[name]
        out = torch.empty(sizes[name], dtype=dtype)
        try:
            opened.read(stored, out)
        except _UNREADABLE as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"tensor {stored} of {file} cannot be read: {reason}") from error
        size = out.nbytes
        converted = convert(name, self._store.restore(name, out) if whole else out)
        counter.add(size)
        return converted

    def hf_config(self) -> Any:
        """A `transformers.PreTrainedConfig`; imports transformers."""
        from transformers import AutoConfig

        fields = dict(self._hf)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        config.name_or_path = self.source
        return config

    def generation_config(self) -> Any:
        """A `transformers.GenerationConfig`; imports transformers."""
        from transformers import GenerationConfig

        stated = self._generation()
        if stated is not None:
            return GenerationConfig.from_dict(stated)
        return GenerationConfig.from_model_config(self.hf_config())


def _moved_to(device: torch.device | str) -> Callable[[str, Tensor], Tensor]:
    return lambda _, tensor: tensor.to(device)


class _Counter:
    """Bytes done, over threads."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._lock = threading.Lock()
        self._done = 0

    def add(self, count: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done += count
            self._progress(self._done, self._total)


def open_checkpoint(
    model: str, *, revision: str | None = None, cache_dir: str | None = None, token: str | None = None
) -> Checkpoint:
    """Opens a local folder, a `.gguf` file, or (from the cache or the network) a Hugging Face Hub id.

    `revision`, `cache_dir` and `token` are for the Hub.

    Raises:
        UnknownModelError: nothing is there, or nothing that is a checkpoint.
        UnsupportedArchitectureError: no family here has blocks for it.
        CheckpointError: its configuration is damaged.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path)
    folder = open_folder(model, revision=revision, cache_dir=cache_dir, token=token)
    hf = read_json(folder, "config.json")
    if hf is None:
        raise UnknownModelError(f"{folder.source} has no config.json, so it is not a checkpoint")
    config = ModelConfig.from_hf(hf)
    return Checkpoint(
        source=folder.source,
        name=folder.name,
        hf=hf,
        config=config,
        store=FolderStore(folder, family_of(config)),
        generation=partial(read_json, folder, "generation_config.json"),
    )


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    hf, config = gguf_configuration(file)
    return Checkpoint(
        source=str(path),
        name=path.stem,
        hf=hf,
        config=config,
        store=GGUFStore(file, config),
        generation=lambda: None,
    )
