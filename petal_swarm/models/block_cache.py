"""Quantized blocks on disk, so that a server's second start neither reads nor quantizes the checkpoint.

One safetensors file holds a block's tensors under their canonical names; the parts of a quantized one are
`NAME:PART`. A folder's name is a digest of everything that its files depend on. Nothing here is ever fatal:
what cannot be read is made again, what cannot be written costs a line in the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from petal_swarm.models.checkpoint import Checkpoint
from petal_swarm.models.family import Shape
from petal_swarm.models.quantization import PARTS, Quant, Weight, from_parts, part_shapes
from petal_swarm.models.sharding import Shard

logger = logging.getLogger(__name__)

#: To be raised whenever quantizing changes, so that files of before are not used again.
VERSION = 1
MAX_BYTES = 100_000_000_000
# Of the room that is free, with what the cache holds already, this part may be the cache's.
_DISK_SHARE = 0.5
_CHECKSUM = "crc32"
_PARTIAL = ".partial-"


class BlockCache:
    """Blocks of one checkpoint, quantized in one way, in `folder`; several processes may share it.

    After a write the files that were used least recently are removed until all have room in `max_bytes`.
    """

    def __init__(self, folder: Path, key: str, *, max_bytes: int = MAX_BYTES) -> None:
        self._root = folder
        self._folder = folder / key
        self._max_bytes = max_bytes
        self._writable = True

    @classmethod
    def of(
        cls,
        folder: Path,
        checkpoint: Checkpoint,
        quant: Quant,
        dtype: torch.dtype,
        shard: Shard | None = None,
    ) -> BlockCache | None:
        """The cache for blocks of `checkpoint`, or that part of them; None if edited files look the same."""
        try:
            identity = checkpoint.identity()
        except OSError:
            return None
        if identity is None:
            return None
        settings = f"{VERSION}\0{quant}\0{dtype}\0{identity}"
        if shard is not None:
            settings += f"\0{shard.rank}/{shard.ranks}"
        digest = hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()
        return cls(folder, f"{checkpoint.model_key}-{quant}-{digest}")

    def load(self, block: int, quant: Quant, shapes: Mapping[str, Shape]) -> dict[str, Weight] | None:
        """The tensors of `block` if they are there and whole; `shapes` are those of the plain ones."""
        path = self._path(block)
        try:
            if not path.is_file():
                return None
            found = _read(path, quant, shapes)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            logger.warning("%s is damaged (%s): the block is quantized again", path, _reason(error))
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def store(self, block: int, tensors: Mapping[str, Weight]) -> None:
        """Keeps a block for the next start, if there is room."""
        if not self._writable:
            return
        flat: dict[str, Tensor] = {}
        for name, weight in tensors.items():
            if isinstance(weight, Tensor):
                flat[name] = weight.cpu().contiguous()
            else:
                parts = zip(weight._fields, weight, strict=True)
                flat |= {f"{name}:{part}": tensor.cpu().contiguous() for part, tensor in parts}
        try:
            self._write(self._path(block), flat)
        except (SafetensorError, OSError) as error:
            self._writable = False
            logger.warning("cannot keep quantized blocks in %s: %s", self._root, _reason(error))

    def _path(self, block: int) -> Path:
        return self._folder / f"block-{block:05}.safetensors"

    def _write(self, path: Path, flat: dict[str, Tensor]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.nbytes for tensor in flat.values())
        if not self._make_room(size):
            raise OSError(f"{size >> 20} MiB more are over its limit")
        handle, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=self._folder)
        os.close(handle)
        try:
            save_file(flat, partial, {_CHECKSUM: str(_checksum(flat))})
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> bool:
        """Removes what was used least recently until `size` more bytes fit; False if they never will."""
        entries = []
        for path in self._root.glob("*/*"):
            with contextlib.suppress(OSError):  # another process may be doing the same
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        used = sum(entry[1] for entry in entries)
        limit = min(self._max_bytes, int((shutil.disk_usage(self._root).free + used) * _DISK_SHARE))
        if size > limit:
            return False
        for _, freed, path in sorted(entries):
            if used + size <= limit:
                break
            path.unlink(missing_ok=True)
            used -= freed
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # if that was its last file
        self._folder.mkdir(parents=True, exist_ok=True)
        return True


def _read(path: Path, quant: Quant, shapes: Mapping[str, Shape]) -> dict[str, Weight]:
    with safe_open(path, framework="pt") as file:
        # Copies: no mapping of a file should outlive the load.
        flat = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        stated = (file.metadata() or {}).get(_CHECKSUM)
    if stated != str(_checksum(flat)):
        raise ValueError("its checksum is wrong")
    found: dict[str, Weight] = {}
    for name, shape in shapes.items():
        if len(shape) < 2:
            found[name] = _checked(flat, name, shape)
            continue
        parts = part_shapes(quant, shape)
        found[name] = from_parts(
            quant, [_checked(flat, f"{name}:{part}", parts[part]) for part in PARTS[quant]]
        )
    return found


def _checked(flat: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
    tensor = flat[name]
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor


def _checksum(flat: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(flat):
        data = flat[name].reshape(-1).view(torch.uint8).numpy().data
        value = zlib.crc32(data, zlib.crc32(name.encode(), value))
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]}"
    return (str(error) or type(error).__name__).splitlines()[0][:200]
