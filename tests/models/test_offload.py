"""Spans of which some blocks are streamed give what they give when all of them stay."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import error, make

from petal_swarm.errors import ConfigError
from petal_swarm.models import chunk_files, devices, offload, transfers
from petal_swarm.models.block_cache import BlockCache
from petal_swarm.models.block_source import BlockSource
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.chunks import PAGE_BYTES, ChunkLayout
from petal_swarm.models.offload import Residence, house
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.stack import BlockStack, load_blocks
from petal_swarm.models.transfers import MappedTransfer, ReadingTransfer
from petal_swarm.span import Span

BLOCKS = 6
WHOLE = Span(0, BLOCKS)
KINDS = ["bloom-6-heads", "llama3-biases", "qwen3", "qwen2-window"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of six blocks, each a variant of the other three."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            make(name).save_pretrained(folder)
            tensors = load_file(folder / "model.safetensors")
            prefix = open_checkpoint(str(folder)).family.block_prefix
            for number in range(3):
                own = {key: value for key, value in tensors.items() if key.startswith(prefix.format(number))}
                for key, value in own.items():
                    tensors[key.replace(prefix.format(number), prefix.format(number + 3))] = value * 0.8
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            text = (folder / "config.json").read_text()
            for field in ("n_layer", "num_hidden_layers"):
                text = text.replace(f'"{field}": 3', f'"{field}": {BLOCKS}')
            (folder / "config.json").write_text(text.replace('"layer_types"', '"_layer_types"'))
            made[name] = open_checkpoint(str(folder))
        return made[name]

    return of


@pytest.fixture
def bloom(checkpoints):
    return checkpoints("bloom-6-heads")


@pytest.fixture(params=["cpu", "disk"])
def house_of(request, tmp_path):
    """A residence with room for so many blocks."""
    return lambda fitting: Residence(request.param, fitting, tmp_path / "chunks")


def chunk_bytes(checkpoint, dtype=torch.float32, quant="none"):
    source = BlockSource(checkpoint, dtype, "cpu", quant)
    return ChunkLayout(offload._build(source, offload._zeros(source))).nbytes


def loaded(checkpoint, residence, **options):
    return load_blocks(
        checkpoint, WHOLE, **{"dtype": torch.float32, "threads": 1, **options}, residence=residence
    )


class Sequence:
    """One sequence in its own rows of a pool; `walk` runs a part of it block by block."""

    def __init__(self, stack, pool, first):
        self._stack, self._pool, self._first = stack, pool, first

    def walk(self, hidden, position, blocks=WHOLE):
        end = position + len(hidden)
        batch = PackedBatch.build(
            [PackedSlice(0, len(hidden), position, ((self._first, self._first + end),))]
        )
        return self._stack.forward_by_block(hidden, batch, self._pool, blocks)

    def run(self, hidden, position, blocks=WHOLE):
        return list(self.walk(hidden, position, blocks))[-1]


def rows(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def outputs(stack, blocks=WHOLE):
    """A prompt, and four tokens that follow it one by one."""
    hidden = rows(20, stack.config.hidden_size).to(stack.dtype)
    sequence = Sequence(stack, KVPool.allocate(stack.config, stack.span, 20, stack.dtype, CPU), 0)
    pieces = [(0, 16), *((at, at + 1) for at in range(16, 20))]
    return torch.cat([sequence.run(hidden[start:stop], start, blocks) for start, stop in pieces])


@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_those_of_the_plain_path(checkpoints, house_of, name):
    checkpoint = checkpoints(name)
    expected = outputs(loaded(checkpoint, None))
    part = outputs(loaded(checkpoint, None), Span(1, 5))
    for fitting in (1, 2, 3, 5):
        stack = loaded(checkpoint, house_of(fitting))
        assert error(outputs(stack), expected) <= 1e-5
        assert error(outputs(stack, Span(1, 5)), part) <= 1e-5
        assert stack.nbytes <= fitting * chunk_bytes(checkpoint)
        assert len(stack._streaming.places) == BLOCKS - fitting + min(fitting, 2)


@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["bloom-6-heads", "qwen3"])
def test_quantized_blocks(checkpoints, house_of, name, quant):
    checkpoint = checkpoints(name)
    expected = outputs(loaded(checkpoint, None, quant=quant))
    residence = house_of(3)
    assert error(outputs(loaded(checkpoint, residence, quant=quant)), expected) <= 1e-5
    assert error(expected, outputs(loaded(checkpoint, None))) > 1e-3, "or nothing was quantized"


def test_int8_that_would_be_packed(bloom, house_of, monkeypatch):
    """Streamed blocks keep activations in floating point, which rounds otherwise."""
    monkeypatch.setattr("petal_swarm.models.int8._SMALL_WEIGHT", 0)
    expected = outputs(loaded(bloom, None, quant="int8"))
    found = outputs(loaded(bloom, house_of(3), quant="int8"))
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_16_bits(bloom, house_of):
    expected = outputs(loaded(bloom, None, dtype=torch.bfloat16))
    residence = house_of(2)
    assert error(outputs(loaded(bloom, residence, dtype=torch.bfloat16)), expected) <= 1e-5


def test_all_that_fit_stay(bloom, house_of):
    stack = loaded(bloom, house_of(BLOCKS))
    assert stack._streaming is None
    assert torch.equal(outputs(stack), outputs(loaded(bloom, None)))


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(3))
def test_passes_that_interrupt_each_other_between_blocks(bloom, house_of, seed):
    """As prefill that is interrupted by decoding: what is at a block finds that block."""
    rng = Random(seed)
    stacks = [loaded(bloom, None), loaded(bloom, house_of(rng.choice([1, 2, 3])))]
    width = bloom.config.hidden_size
    pools = [KVPool.allocate(bloom.config, WHOLE, 200, torch.float32, CPU) for _ in stacks]
    walks, lengths = [], [0] * 5
    for turn in range(60):
        number = rng.randrange(5)
        if all(walk[0] != number for walk in walks):
            hidden = rows(rng.choice([1, 1, 7]), width, turn)
            pairs = zip(stacks, pools, strict=True)
            both = [Sequence(stack, pool, 40 * number).walk(hidden, lengths[number]) for stack, pool in pairs]
            lengths[number] += len(hidden)
            if lengths[number] < 30:
                walks.append((number, both))
        for _ in range(rng.randrange(4)):
            if walks:
                walk = rng.choice(walks)
                expected, found = (next(own, None) for own in walk[1])
                if expected is None:
                    walks.remove(walk)
                else:
                    assert error(found, expected) <= 1e-5


def test_progress_counts_every_block_once(bloom, house_of):
    for _ in range(2):  # the second time from the files
        seen = []
        loaded(bloom, house_of(2), progress=lambda *told, seen=seen: seen.append(told))
        assert seen == sorted(seen)
        assert len({total for _, total in seen}) == 1
        assert seen[-1][0] == seen[-1][1]


def test_blocks_that_are_streamed_are_not_trained_through(bloom, house_of):
    stack = loaded(bloom, house_of(2))
    with pytest.raises(AssertionError, match="not trained"):
        stack.forward_trained(0, rows(2, bloom.config.hidden_size), stack.sequences([2]), None)


def test_host_memory_that_is_too_small(bloom, tmp_path, monkeypatch):
    class Memory:
        available = 3 * chunk_bytes(bloom)

    monkeypatch.setattr(offload.psutil, "virtual_memory", Memory)
    with pytest.raises(ConfigError, match="--offload cpu: 6 blocks of 0 MiB do not fit the 1 MiB"):
        loaded(bloom, Residence("cpu", 2))
    assert loaded(bloom, Residence("disk", 2, tmp_path)).nbytes


class Disk:
    """A folder of chunks, and how often blocks were read from the checkpoint."""

    def __init__(self, checkpoint, folder, monkeypatch):
        self.folder = folder
        self.reads = []
        self._checkpoint = checkpoint
        read = BlockSource.read
        monkeypatch.setattr(
            BlockSource, "read", lambda source, *rest: self.reads.append(rest[0]) or read(source, *rest)
        )

    def load(self, fitting=2, **options):
        self.reads.clear()
        return loaded(self._checkpoint, Residence("disk", fitting, self.folder), **options)

    @property
    def files(self):
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def disk(bloom, tmp_path, monkeypatch):
    return Disk(bloom, tmp_path / "chunks", monkeypatch)


def test_files_serve_the_next_start(bloom, disk):
    expected = outputs(disk.load())
    assert sorted(disk.reads) == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in disk.files] == [f"block-{n:05}.chunk" for n in range(6)]
    assert torch.equal(outputs(disk.load()), expected)
    assert disk.reads == []
    stack = disk.load(3)
    assert len(disk.reads) == 1
    assert error(outputs(stack), expected) <= 1e-5


def test_files_are_for_one_checkpoint_and_dtype(bloom, disk, tmp_path):
    disk.load()
    disk.load(dtype=torch.bfloat16)
    assert len(disk.reads) == 6
    copy = tmp_path / "copy"
    shutil.copytree(bloom.source, copy)
    stored = load_file(copy / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in stored.items()}, copy / "model.safetensors")
    disk._checkpoint = open_checkpoint(str(copy))
    disk.load()
    assert len(disk.reads) == 6


@pytest.mark.parametrize("how", ["flipped", "cut", "mark"])
def test_a_damaged_file_is_made_again(disk, how, caplog):
    expected = outputs(disk.load())
    path = disk.files[2]
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[-100:]
    else:
        data[1000 if how == "flipped" else -16] ^= 1
    path.write_bytes(data)
    assert torch.equal(outputs(disk.load()), expected)
    assert disk.reads == [2]
    assert outputs(disk.load()) is not None
    assert disk.reads == []


def test_files_that_go_while_they_are_used(disk):
    stack = disk.load()
    expected = outputs(stack)
    for path in disk.files:
        path.unlink()
    assert torch.equal(outputs(stack), expected)


def test_without_an_identity_nothing_is_left(disk, monkeypatch):
    expected = outputs(disk.load())
    for path in disk.files:
        path.unlink()
    monkeypatch.setattr(type(disk._checkpoint), "identity", lambda checkpoint: None)
    assert torch.equal(outputs(disk.load()), expected)
    assert disk.files == []


@pytest.mark.parametrize("how", ["no room", "it fills up", "read only"])
def test_a_disk_that_is_full(disk, monkeypatch, how):
    """One line that says what to do, and nothing half written."""
    usage = shutil.disk_usage(".")
    if how == "no room":
        monkeypatch.setattr(chunk_files.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    else:
        number = errno.ENOSPC if how == "it fills up" else errno.EROFS
        real = chunk_files._end_of

        def fail(chunk):
            raise OSError(number, "No space left on device" if number == errno.ENOSPC else "Read-only")

        monkeypatch.setattr(chunk_files, "_end_of", fail)
    with pytest.raises(
        ConfigError, match=r"--offload disk cannot keep blocks in .*: .*free some room"
    ) as caught:
        disk.load()
    assert "\n" not in str(caught.value)
    assert disk.files == []
    if how != "no room":
        monkeypatch.setattr(chunk_files, "_end_of", real)
        disk.load()
        assert len(disk.files) == 6


def test_room_is_made_at_the_expense_of_other_checkpoints(disk, monkeypatch):
    disk.load(5)
    own = disk.files
    for path in own:
        os.utime(path, (0, 0))
    disk.load(dtype=torch.bfloat16)
    others = [path for path in disk.files if path not in own]
    usage = shutil.disk_usage(".")

    def free(path):
        return usage._replace(free=1 << 40 if len(disk.files) < 9 else 0)

    monkeypatch.setattr(chunk_files.shutil, "disk_usage", free)
    disk.load()
    assert set(own) <= set(disk.files)
    assert set(others) - set(disk.files) == set(others[:3])
    assert len(disk.files) == 9


def test_quantized_blocks_are_kept_once(bloom, disk, tmp_path):
    cache = BlockCache.of(tmp_path / "quantized", bloom, "int8", torch.float32)
    disk.load(3, quant="int8", cache=cache)
    kept = [path.stem for path in (tmp_path / "quantized").rglob("*.safetensors")]
    away = [path.stem for path in disk.files]
    assert sorted(kept + away) == [f"block-{n:05}" for n in range(6)]
    assert not set(kept) & set(away)


def test_a_file_that_cannot_be_read_fails_the_pass_and_no_other(disk, monkeypatch):
    stack = disk.load()
    expected = outputs(stack)
    monkeypatch.setattr(
        transfers, "bring_ahead", lambda chunk: (_ for _ in ()).throw(OSError(5, "unreadable"))
    )
    with pytest.raises(OSError, match="unreadable"):
        outputs(stack)
    monkeypatch.undo()
    assert torch.equal(outputs(stack), expected)


def test_what_was_to_come_ahead_is_tried_again_as_well(disk, monkeypatch):
    stack = disk.load()
    with monkeypatch.context() as patch:
        patch.setattr(transfers, "bring_ahead", lambda chunk: (_ for _ in ()).throw(OSError(5, "unreadable")))
        with pytest.raises(OSError, match="unreadable"):
            outputs(stack)
        stack._streaming._transfer._reader._thread.submit(lambda: None).result()  # the next block failed, too
    assert torch.equal(outputs(stack), outputs(stack))


def test_pages_are_brought_and_given_back(tmp_path):
    path = tmp_path / "pages"
    path.write_bytes(bytes(range(256)) * 64)
    chunk = torch.from_file(str(path), shared=False, size=256 * 64, dtype=torch.uint8)
    expected = torch.arange(256).repeat(64)
    for _ in range(2):
        transfers.bring_ahead(chunk)
        assert torch.equal(chunk.long(), expected)
        transfers.give_back(chunk)
    assert torch.equal(chunk.long(), expected), "they come by themselves, too"


def test_a_system_without_advice(bloom, tmp_path, monkeypatch):
    monkeypatch.setattr(transfers, "_advise", lambda chunk, advice: False)
    expected = outputs(loaded(bloom, None))
    found = outputs(loaded(bloom, Residence("disk", 2, tmp_path)))
    assert error(found, expected) <= 1e-5


def test_files_for_a_device_beside_the_host(bloom, tmp_path, monkeypatch):
    """A thread reads them into slots, by way of pinned memory: here both are plain memory."""
    monkeypatch.setattr(devices, "on_host", lambda device: False)
    stack = loaded(bloom, Residence("disk", 3, tmp_path))
    transfer = stack._streaming._transfer
    assert isinstance(transfer, ReadingTransfer)
    assert len(transfer._staging) == 2
    assert error(outputs(stack), outputs(loaded(bloom, None))) <= 1e-5


def test_what_a_cpu_does(bloom, tmp_path):
    source = BlockSource(bloom, torch.float32)
    for kind, transfer in (("cpu", ReadingTransfer), ("disk", MappedTransfer)):
        residence = Residence(kind, 2, tmp_path)
        housed = house(source, WHOLE, residence, lambda place: None)
        assert type(housed.streaming._transfer) is transfer
        assert housed.streaming.nbytes == 2 * chunk_bytes(bloom)
        assert chunk_bytes(bloom) % PAGE_BYTES == 0


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
def test_a_block_of_views_is_whichever_was_written_last(checkpoints, name, quant):
    checkpoint = checkpoints(name)
    source = BlockSource(checkpoint, torch.float32, "cpu", quant)
    layout = ChunkLayout(offload._build(source, offload._zeros(source)))
    chunk = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
    of_views = BlockStack(checkpoint.config, Span(0, 1), [layout.block(chunk)], dtype=torch.float32)
    for number in (1, 2):
        twin = offload._build(source, source.read(number, None))
        layout.write(twin, chunk)
        assert of_views.nbytes == twin.nbytes
        expected = BlockStack(checkpoint.config, Span(0, 1), [twin], dtype=torch.float32)
        assert error(outputs(of_views, Span(0, 1)), outputs(expected, Span(0, 1))) <= 1e-5


class Cuda:
    """What `StreamTransfer` asks of CUDA, in the order it was asked; copies happen at once."""

    def __init__(self, monkeypatch):
        self.log = []
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.log.append("kept"))
        monkeypatch.setattr(devices, "streams", lambda device: self)

    def Stream(self, device):  # noqa: N802 - as torch calls it
        return Stream(self, "side")

    def current_stream(self, device):
        return Stream(self, "main")

    def stream(self, stream):
        return contextlib.nullcontext()

    def Event(self):  # noqa: N802
        return Event(self)


class Stream:
    def __init__(self, cuda, name):
        self._cuda, self.name = cuda, name

    def record_event(self):
        event = Event(self._cuda)
        event.record(self)
        return event

    def wait_event(self, event):
        assert event.of is not None, "what is waited for was recorded"
        self._cuda.log.append(f"{self.name} waits for {event.of}")


class Event:
    def __init__(self, cuda):
        self._cuda, self.of = cuda, None

    def record(self, stream):
        self.of = stream.name
        self._cuda.log.append(f"{stream.name} recorded")


def test_what_is_asked_of_cuda(bloom, monkeypatch):
    """A copy begins behind what was launched before, and what is launched later begins behind the copy."""
    expected = outputs(loaded(bloom, None))
    cuda = Cuda(monkeypatch)
    monkeypatch.setattr(offload, "pinned", lambda nbytes, device: torch.empty(nbytes, dtype=torch.uint8))
    stack = loaded(bloom, Residence("cpu", 3))
    assert cuda.log == ["kept", "kept"]
    cuda.log.clear()
    assert error(outputs(stack), expected) <= 1e-5
    begun = ["main recorded", "side waits for main", "side recorded"]
    assert cuda.log[:9] == [*begun, *begun, "main waits for side", *begun[:2]]
    assert cuda.log.count("main recorded") == cuda.log.count("side recorded")
