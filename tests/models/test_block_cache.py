"""Quantized blocks on disk: found again, told from others, and never the reason for a failure."""

from __future__ import annotations

import errno
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make

from petal_swarm.models import block_cache
from petal_swarm.models.block_cache import BlockCache
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.stack import load_blocks
from petal_swarm.span import Span

WHOLE = Span(0, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bloom")
    make("bloom").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def checkpoint(folder):
    return open_checkpoint(str(folder))


@pytest.fixture
def cache_folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """Names of the tensors that were read from the checkpoint."""
    from petal_swarm.models.checkpoint import Checkpoint

    names = []
    inner = Checkpoint.load_converted

    def load_converted(self, shapes, convert, **options):
        names.extend(shapes)
        return inner(self, shapes, convert, **options)

    monkeypatch.setattr(Checkpoint, "load_converted", load_converted)
    return names


def load(checkpoint, cache, quant="int8", dtype=torch.float32, span=WHOLE, progress=None):
    return load_blocks(checkpoint, span, dtype=dtype, quant=quant, cache=cache, progress=progress)


def cache_of(cache_folder, checkpoint, quant="int8", dtype=torch.float32):
    cache = BlockCache.of(cache_folder, checkpoint, quant, dtype)
    assert cache is not None
    return cache


@torch.inference_mode()
def output(stack):
    hidden = torch.randn(7, stack.config.hidden_size, generator=torch.Generator().manual_seed(0))
    pool = KVPool.allocate(stack.config, stack.span, 7, stack.dtype, "cpu")
    batch = PackedBatch.build([PackedSlice(0, 7, 0, ((0, 7),))])
    return stack.forward(hidden.to(stack.dtype), batch, pool, stack.span)


def files(cache_folder):
    return sorted(cache_folder.glob("*/*"))


@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_start_reads_no_checkpoint(checkpoint, cache_folder, reads, quant, dtype):
    cache = cache_of(cache_folder, checkpoint, quant, dtype)
    first = load(checkpoint, cache, quant, dtype)
    assert len(reads) == 3 * 12
    reads.clear()
    second = load(checkpoint, cache_of(cache_folder, checkpoint, quant, dtype), quant, dtype)
    assert not reads
    assert torch.equal(output(first), output(second))
    assert [file.name for file in files(cache_folder)] == [f"block-0000{n}.safetensors" for n in range(3)]


def test_blocks_are_found_one_by_one(checkpoint, cache_folder, reads):
    load(checkpoint, cache_of(cache_folder, checkpoint), span=Span(1, 2))
    reads.clear()
    load(checkpoint, cache_of(cache_folder, checkpoint))
    assert {name.split(".")[2] for name in reads} == {"0", "2"}


def test_progress_is_the_same_from_the_cache(checkpoint, cache_folder):
    ends = []
    for _ in range(2):
        calls = []
        load(
            checkpoint,
            cache_of(cache_folder, checkpoint),
            progress=lambda done, total, calls=calls: calls.append((done, total)),
        )
        assert calls == sorted(calls)
        ends.append(calls[-1])
    assert ends[0] == ends[1]


def test_settings_and_edited_files_are_told_apart(folder, checkpoint, cache_folder):
    paths = {cache_of(cache_folder, checkpoint)._folder}
    paths.add(cache_of(cache_folder, checkpoint, "nf4")._folder)
    paths.add(cache_of(cache_folder, checkpoint, dtype=torch.bfloat16)._folder)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.mlp.dense_4h_to_h.weight"][0, 0] += 1  # the model key does not see this one
    save_file(weights, folder / "model.safetensors")
    edited = open_checkpoint(str(folder))
    assert edited.model_key == checkpoint.model_key
    paths.add(cache_of(cache_folder, edited)._folder)
    assert len(paths) == 4
    assert cache_of(cache_folder, open_checkpoint(str(folder)))._folder in paths


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 16
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def other_tensors(path):
    save_file({"a": torch.zeros(3)}, path, {"crc32": str(block_cache._checksum({"a": torch.zeros(3)}))})


def other_shape(path):
    flat = load_file(path)
    name = next(name for name in flat if name.endswith(":scales"))
    flat[name] = flat[name][:-1].clone()
    save_file(flat, path, {"crc32": str(block_cache._checksum(flat))})


@pytest.mark.parametrize("harm", [truncate, flip, empty, other_tensors, other_shape])
def test_damaged_files_are_made_again(checkpoint, cache_folder, reads, caplog, harm):
    expected = output(load(checkpoint, cache_of(cache_folder, checkpoint)))
    reads.clear()
    damaged = files(cache_folder)[1]
    harm(damaged)
    with caplog.at_level(logging.WARNING):
        found = output(load(checkpoint, cache_of(cache_folder, checkpoint)))
    assert torch.equal(found, expected)
    assert {name.split(".")[2] for name in reads} == {"1"}
    (record,) = caplog.records
    assert str(damaged) in record.getMessage()
    assert "\n" not in record.getMessage()
    reads.clear()
    load(checkpoint, cache_of(cache_folder, checkpoint))
    assert not reads, "it was written again"


def test_a_folder_that_cannot_be_made(checkpoint, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        load(checkpoint, cache_of(tmp_path / "file" / "cache", checkpoint))
    (record,) = caplog.records
    assert "cannot keep quantized blocks" in record.getMessage()


def test_a_full_disk(checkpoint, cache_folder, caplog, monkeypatch):
    def save(flat, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(block_cache, "save_file", save)
    with caplog.at_level(logging.WARNING):
        load(checkpoint, cache_of(cache_folder, checkpoint))
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()
    assert not files(cache_folder), "nothing half-written stays"


def test_a_disk_with_little_room(checkpoint, cache_folder, caplog, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with caplog.at_level(logging.WARNING):
        load(checkpoint, cache_of(cache_folder, checkpoint))
    assert "over its limit" in caplog.text
    assert not files(cache_folder)


def test_the_oldest_make_room(checkpoint, cache_folder):
    cache = cache_of(cache_folder, checkpoint)
    load(checkpoint, cache)
    size = files(cache_folder)[0].stat().st_size
    for age, file in zip((30, 20, 10), files(cache_folder), strict=True):
        os.utime(file, (1e9 - age, 1e9 - age))
    shapes = checkpoint.family.block_tensors(checkpoint.config, 0)
    first = cache.load(0, "int8", shapes)  # now it is the one that was used last
    assert first is not None
    small = BlockCache(cache_folder, "another-model", max_bytes=int(2.9 * size))
    small.store(7, first)
    assert [file.name for file in files(cache_folder)] == [
        "block-00007.safetensors",
        "block-00000.safetensors",
    ]
    tiny = BlockCache(cache_folder, "another-model", max_bytes=size // 2)
    tiny.store(8, first)
    assert len(files(cache_folder)) == 2


def test_the_last_file_of_a_model_takes_its_folder_along(checkpoint, cache_folder):
    cache = cache_of(cache_folder, checkpoint)
    load(checkpoint, cache, span=Span(0, 1))
    (file,) = files(cache_folder)
    shapes = checkpoint.family.block_tensors(checkpoint.config, 0)
    tensors = cache.load(0, "int8", shapes)
    BlockCache(cache_folder, "another", max_bytes=int(1.5 * file.stat().st_size)).store(0, tensors)
    assert [path.name for path in cache_folder.iterdir()] == ["another"]
