"""The engine on a stack of which blocks are streamed: the same as on one where all of them stay."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.engine import Chunk, Engine
from petal_swarm.errors import RemoteError
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.offload import Residence
from petal_swarm.models.stack import load_blocks

from . import test_engine, test_executor
from .test_adapted_sessions import layout_of, outputs, served, step
from .tiny import WHOLE, Tiny, close, make, rows


@pytest.fixture(params=[("disk", 2), ("cpu", 3), ("cpu", 1)], ids=lambda param: f"{param[0]}-{param[1]}")
def offloaded(request: Any, bloom_folder: Path, bloom: Tiny, tmp_path: Path) -> Tiny:
    offload, fitting = request.param
    stack = load_blocks(
        open_checkpoint(str(bloom_folder)),
        WHOLE,
        dtype=torch.float32,
        residence=Residence(offload, fitting, tmp_path),
    )
    return Tiny(stack, bloom.model)


@pytest.fixture(scope="module")
def bloom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bloom")
    make("bloom", folder)
    return folder


@pytest.mark.parametrize("seed", range(2))
def test_any_interleaving_is_a_plain_forward(offloaded: Tiny, seed: int) -> None:
    test_engine.test_any_interleaving_is_a_plain_forward(offloaded, seed)


def test_spans_one_after_the_other_are_the_whole(offloaded: Tiny) -> None:
    test_engine.test_spans_one_after_the_other_are_the_whole(offloaded)


def test_a_pause_at_every_block_changes_nothing(offloaded: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    test_executor.test_a_pause_at_every_block_changes_nothing(offloaded, monkeypatch)


def test_sessions_with_lora_beside_others_and_in_between(offloaded: Tiny, bloom: Tiny) -> None:
    """A prefill that is interrupted at every block by decoding of two others."""
    found = [run_adapted(tiny) for tiny in (offloaded, bloom)]
    for own, expected in zip(*found, strict=True):
        assert close(own, expected)
    assert not close(found[1][0], found[1][1]), "or adapters changed nothing"


def run_adapted(tiny: Tiny) -> list[Tensor]:
    engine, hidden = tiny.engine(), rows(24)
    layouts = {"a": 1, "b": 2, "none": None}
    for seed, (name, every) in enumerate(layouts.items()):
        adapter = None if every is None else served(tiny, layout_of(tiny, every=every), seed)
        engine.open_session(name, max_length=64, adapter=adapter)
    found = outputs(engine, *(step(name, 0, hidden[:12]) for name in layouts))
    placed = engine.place(step("a", 12, hidden[12:20]))
    batch = engine.begin([Chunk(placed, 8)])
    position = 12
    while not batch.done:
        batch.advance()
        found += outputs(
            engine,
            *(step(name, position, hidden[position : position + 1]) for name in layouts if name != "a"),
        )
        position += 1
    return [*found, placed.result()]


def test_a_block_that_cannot_be_read_fails_the_step_and_the_server_lives(
    offloaded: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, hidden = offloaded.engine(), rows(8)
    engine.open_session("a", max_length=64)
    assert offloaded.stack._streaming is not None
    with monkeypatch.context() as patch:

        def fail(slot: int) -> None:
            raise OSError(5, "a block cannot be read from the disk")

        patch.setattr(offloaded.stack._streaming._transfer, "wait", fail)
        executor = test_executor.Executor(engine, clock=lambda: 0.0)
        executor.add(test_executor.Job(step("a", 0, hidden), "a", 0.0))
        (ended,) = executor.advance(lambda: False)
        assert type(ended.result.error) is RemoteError
    assert close(outputs(engine, step("a", 0, hidden))[0], offloaded.expected(hidden))


def test_the_reading_thread_ends_with_its_stack(bloom_folder: Path, tmp_path: Path) -> None:
    """A server that moves to other blocks leaves none behind."""

    def readers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("petal-swarm-blocks")}

    before = readers()
    stack = load_blocks(
        open_checkpoint(str(bloom_folder)),
        WHOLE,
        dtype=torch.float32,
        residence=Residence("disk", 2, tmp_path),
    )
    engine = Engine(stack, kv_tokens=64, max_batch_tokens=64)
    engine.open_session("a", max_length=8)
    outputs(engine, step("a", 0, rows(3)))
    (own,) = readers() - before
    del stack, engine
    gc.collect()
    own.join(10)
    assert not own.is_alive()
