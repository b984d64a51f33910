"""Blocks on disk as they are computed with: for blocks that do not fit memory, and for the next start.

A file is a block's chunk and 16 bytes, a mark and a checksum, that say it is whole. A folder's name is a
digest of everything that its files depend on. A running server has its files mapped: others may remove them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import struct
import tempfile
import uuid
import zlib
from pathlib import Path

import torch
from torch import Tensor

from petal_swarm.errors import ConfigError
from petal_swarm.models.checkpoint import Checkpoint
from petal_swarm.models.chunks import ChunkLayout
from petal_swarm.models.quantization import Quant

logger = logging.getLogger(__name__)

#: To be raised whenever blocks are built or laid out in another way.
VERSION = 1
#: What is left free on the disk.
SPARE_BYTES = 256 << 20
_MARK = b"petalswm"
_END = struct.Struct("<8sQ")
_PARTIAL = ".partial-"


class ChunkFolder:
    """Chunks of `layout` in `folder`/`key`; several servers may share it.

    If `is_kept` is False, as where files cannot be told from those of an edited checkpoint, they are removed
    as soon as they are mapped.
    """

    def __init__(self, folder: Path, key: str, layout: ChunkLayout, *, is_kept: bool = True) -> None:
        self._root = folder
        self._folder = folder / key
        self._layout = layout
        self._is_kept = is_kept

    @classmethod
    def of(
        cls, folder: Path, checkpoint: Checkpoint, quant: Quant, dtype: torch.dtype, layout: ChunkLayout
    ) -> ChunkFolder:
        """The folder for blocks of `checkpoint`, built alike."""
        try:
            identity = checkpoint.identity()
        except OSError:
            identity = None
        if identity is None:
            return cls(folder, uuid.uuid4().hex, layout, is_kept=False)
        facts = f"{VERSION}\0{quant}\0{dtype}\0{layout.digest}\0{identity}"
        digest = hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
        return cls(folder, f"{checkpoint.model_key}-{quant}-{digest}", layout)

    def open(self, block: int) -> Tensor | None:
        """The chunk of `block`, mapped; None if it is not there, or not whole."""
        path = self._path(block)
        try:
            if path.stat().st_size != self._layout.nbytes + _END.size:
                return None
            chunk = self._map(path)
            with open(path, "rb") as file:
                file.seek(self._layout.nbytes)
                end = file.read()
            if end != _end_of(chunk):
                logger.warning("%s is damaged: the block is made again", path)
                return None
            os.utime(path)  # the least recently used go first
        except (OSError, RuntimeError):
            return None
        return chunk

    def store(self, block: int, chunk: Tensor) -> Tensor:
        """Writes the chunk of `block`, and returns it mapped. All of it is there, or nothing.

        Raises:
            ConfigError: it cannot be written, or there is no room.
        """
        path = self._path(block)
        try:
            self._make_room()
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=self._folder)
            try:
                with open(handle, "wb") as file:
                    file.write(chunk.numpy().data)
                    file.write(_end_of(chunk))
                os.replace(partial, path)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise
            mapped = self._map(path)
            if not self._is_kept:
                path.unlink()
                with contextlib.suppress(OSError):
                    self._folder.rmdir()
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"--offload disk cannot keep blocks in {self._root}: {reason}; free some room there,"
                " name another --cache-dir, or host fewer blocks"
            ) from error
        return mapped

    def _path(self, block: int) -> Path:
        return self._folder / f"block-{block:05}.chunk"

    def _map(self, path: Path) -> Tensor:
        return torch.from_file(str(path), shared=False, size=self._layout.nbytes, dtype=torch.uint8)

    def _make_room(self) -> None:
        """Removes what was used least recently of other checkpoints, until the next chunk fits."""
        needed = self._layout.nbytes + SPARE_BYTES
        self._root.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self._root).free >= needed:
            return
        others = []
        for path in self._root.glob("*/*"):
            if path.parent != self._folder:
                with contextlib.suppress(OSError):
                    others.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(others):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # if that was its last file
            if shutil.disk_usage(self._root).free >= needed:
                return
        raise OSError(f"no room for a block of {self._layout.nbytes >> 20} MiB")


def free_for_chunks(folder: Path) -> int:
    """Bytes on the disk of `folder` for chunks: free ones, and those that other chunks there take now."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    taken = 0
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):
            taken += path.stat().st_size
    return max(0, shutil.disk_usage(existing).free + taken - SPARE_BYTES)


def _end_of(chunk: Tensor) -> bytes:
    return _END.pack(_MARK, zlib.crc32(chunk.numpy().data))
