"""What servers do on a device besides plain steps: the same as on the host, and who waits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.engine import Engine
from petal_swarm.engine.prefixes import PrefixScope
from petal_swarm.engine.training import Passes
from petal_swarm.models.block_source import BlockSource
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.offload import Residence
from petal_swarm.models.sharded_stack import ShardedStack
from petal_swarm.models.stack import BlockStack, read_blocks
from petal_swarm.models.transfers import ReadingTransfer, StreamTransfer
from petal_swarm.server import loader
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.loader import Loader
from tests.models.tiny_models import BLOCKS
from tests.thread_group import Table, ThreadGroup

from .device import NAME, Simulation
from .stacks import (
    WHOLE,
    Folders,
    Kind,
    Script,
    adapter_of,
    engine_of,
    far,
    load,
    on_the_host,
    rows,
    waits_of,
)
from .streams import Event, RaceError, Stream

T = TypeVar("T")


@pytest.mark.parametrize("model", ["bloom", "qwen2-window"])
def test_sessions_with_adapters(model: str, folders: Folders, device: Simulation) -> None:
    """LoRA and prefixes, of some sessions of a batch."""

    def work(stack: BlockStack) -> list[Tensor]:
        engine = engine_of(stack, prefix_tokens=256)
        adapters = {"a": (1, 5), "b": (2, 0), "c": (1, 3)}
        for seed, (session, (every, prefix)) in enumerate(adapters.items()):
            layout, numbers = adapter_of(stack, every=every, prefix=prefix, seed=seed)
            served = stack.serve_adapter(layout, numbers, WHOLE)
            engine.open_session(session, max_length=128, adapter=served)
        engine.open_session("d", max_length=128)
        device.clear()
        return Script(engine, lambda what: check_waits(stack, device, what)).everything()

    check_both(folders(model), work)


def check_waits(stack: BlockStack, device: Simulation, what: str) -> None:
    if stack.device.type == NAME:
        assert device.waits == waits_of(what), what
    device.clear()


def check_both(folder: Path, work: Any) -> None:
    """`work` on the device gives what it gives on the host."""
    found, expected = (work(load(folder, place, Kind("any"))) for place in (NAME, "cpu"))
    assert not far(found, expected)


def test_what_an_adapter_waits_for(folders: Folders, device: Simulation) -> None:
    """For its numbers' way there, in a thread that nobody waits for; its prefix is moved on the device."""
    stack = load(folders("qwen3"), NAME, Kind("qwen3"))
    layout, numbers = adapter_of(stack, every=1, prefix=4, seed=1)
    engine = engine_of(stack)
    device.clear()
    served = stack.serve_adapter(layout, numbers, WHOLE)
    assert device.waits == [("copy to the device", "models.stack:BlockStack.serve_adapter")]
    device.clear()
    engine.open_session("a", max_length=64, adapter=served)
    assert device.waits == []


def test_a_shared_prefix(folders: Folders, device: Simulation) -> None:
    def work(stack: BlockStack) -> list[Tensor]:
        engine = engine_of(stack, prefix_tokens=512)
        for session in "ab":
            engine.open_session(session, max_length=128, scope=PrefixScope(b"first hop", hashes=True))
        script = Script(engine)
        script.run("prompt", script.step("a", (0, 0, 40)))
        script = Script(engine)
        request = script.step("b", (0, 0, 40))
        (known,) = engine.attach("b", engine.find_prefixes(request, spare_last=True))
        assert len(known.keys) == 2
        script.run("the rest", script.step("b", (0, 32, 8)), script.step("a", (0, 40, 1)))
        script.run("decode", script.step("b", (0, 38, 1)), script.step("a", (0, 41, 1)))
        return script.found

    check_both(folders("qwen3"), work)


def run(pieces: Generator[None, None, T]) -> T:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


LENGTHS = (20, 20, 31, 1)
#: The end of each block, which makes way for decoding; then one look at the sums of all.
END_OF_BLOCK = ("synchronize", "engine.training:Passes._synchronize")
PASS = [*[END_OF_BLOCK] * BLOCKS, ("_local_scalar_dense", "engine.training:_check_sums")]


@pytest.mark.parametrize(
    "kind",
    [
        Kind("bloom"),
        Kind("llama3-biases", quant="int8"),
        Kind("mistral-window", dtype=torch.bfloat16),
        Kind("qwen3", dtype=torch.float16),
    ],
    ids=str,
)
def test_training(kind: Kind, folders: Folders, device: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(stack: BlockStack) -> list[Tensor]:
        passes, found = Passes(stack), []
        for prefix in (0, 5):
            layout, numbers = adapter_of(stack, every=1, prefix=prefix, seed=3)
            hidden = rows(sum(LENGTHS), 64)
            device.clear()
            found.append(run(passes.forward("a", hidden, LENGTHS, WHOLE, (layout, numbers), keep=True)))
            if stack.device.type == NAME:
                numbers_come = ("copy to the device", "engine.graphs:AdapterState.__init__")
                assert device.waits == [numbers_come, *PASS]
            assert passes.stats().activation_bytes > 0
            device.clear()
            found += run(passes.backward("a", hidden.flip(0)))
            if stack.device.type == NAME:
                assert device.waits == PASS
        return found

    expected = on_the_host(folders(kind.model), kind, monkeypatch, work)
    assert not far(work(load(folders(kind.model), NAME, kind)), expected)


@pytest.mark.parametrize(
    ("quant", "offload", "fitting"), [("none", "cpu", 2), ("int8", "cpu", 1), ("none", "disk", 2)]
)
def test_blocks_that_come_by_turns(
    quant: str, offload: Any, fitting: int, folders: Folders, device: Simulation, tmp_path: Path
) -> None:
    """In the order of streams and events, of which the simulation knows if one is missing."""

    def work(residence: Residence | None) -> list[Tensor]:
        stack = load(folders("bloom"), NAME, Kind("bloom", quant), residence)
        if residence is not None:
            kind = StreamTransfer if offload == "cpu" else ReadingTransfer
            assert isinstance(stack._streaming._transfer, kind)  # type: ignore[union-attr]
        engine = engine_of(stack)
        for session in "abcd":
            engine.open_session(session, max_length=128)
        device.clear()
        return Script(engine, lambda what: check_streamed_waits(device, offload, what)).everything()

    found, expected = work(Residence(offload, fitting, tmp_path)), work(None)
    assert all(torch.equal(own.cpu(), other.cpu()) for own, other in zip(found, expected, strict=True))


def check_streamed_waits(device: Simulation, offload: str, what: str) -> None:
    readers = [wait for wait in device.waits if wait.place.startswith("models.transfers:ReadingTransfer")]
    assert not readers or offload == "disk"
    assert [wait for wait in device.waits if wait not in readers] == waits_of(what)
    device.clear()


@pytest.mark.parametrize("lost", ["wait_event", "record"])
def test_a_copy_out_of_order_would_be_noticed(
    lost: str, folders: Folders, device: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = load(folders("bloom"), NAME, Kind("bloom"), Residence("cpu", 1, None))
    engine = engine_of(stack)
    engine.open_session("a", max_length=128)
    monkeypatch.setattr(Stream if lost == "wait_event" else Event, lost, lambda *_: None)
    script = Script(engine)
    with pytest.raises(RaceError):
        script.run("prompt", script.step("a", (0, 0, 9)))


def test_a_server_on_a_device(
    folders: Folders, device: Simulation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Counts its memory, loads, keeps quantized blocks for the next start, and measures itself."""
    monkeypatch.setattr(loader, "resolve_device", lambda name: torch.device(NAME, 0))
    config = ServerConfig(
        model=str(folders("bloom")),
        new_swarm=True,
        dtype="float32",
        quant="int8",
        kv_tokens=2048,
        max_batch_tokens=64,
        cache_dir=str(tmp_path),
        device_memory_mib=64,
    )
    checkpoint = open_checkpoint(str(folders("bloom")))
    found: list[Engine] = []
    for _ in range(2):
        own = Loader(config, checkpoint)
        assert own.capacity() == WHOLE.end
        found.append(own.load(WHOLE))
        assert own.memory is not None
        assert own.memory.room.device == NAME
        assert found[-1].stats().block_time_s > 0
    answers = []
    for engine in found:
        engine.open_session("a", max_length=64)
        script = Script(engine)
        script.run("prompt", script.step("a", (0, 0, 20)))
        answers += script.found
    assert torch.equal(answers[0].cpu(), answers[1].cpu())


@pytest.mark.parametrize("model", ["bloom", "qwen3"])
def test_ranks_that_share_blocks_out(model: str, folders: Folders, device: Simulation) -> None:
    checkpoint = open_checkpoint(str(folders(model)))
    table = Table(2)

    def work(rank: int) -> list[Tensor]:
        group = ThreadGroup(table, rank, spread_from=8)
        blocks = read_blocks(BlockSource(checkpoint, torch.float32, NAME, shard=group.shard), WHOLE)
        own = ShardedStack(checkpoint.config, WHOLE, blocks, dtype=torch.float32, device=NAME, group=group)
        return together(own)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(work, range(2)))
    expected = together(load(folders(model), "cpu", Kind(model)))
    assert not far(found[0], expected)
    assert not far(found[1], expected)
    of_steps = Counter(wait for wait in device.waits if wait.place.startswith("engine."))
    assert of_steps == Counter(4 * waits_of("decode"))
    assert not any("sharded" in wait.place for wait in device.waits)


def together(stack: BlockStack) -> list[Tensor]:
    engine = engine_of(stack)
    for session in "ab":
        engine.open_session(session, max_length=64)
    script = Script(engine)
    script.run("prompts", script.step("a", (0, 0, 21)), script.step("b", (0, 0, 10)))
    script.run("decode", script.step("a", (0, 21, 1)), script.step("b", (0, 10, 1)))
    return script.found
