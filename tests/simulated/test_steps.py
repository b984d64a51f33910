"""Steps on a device: the same as on the host, and nobody waits within one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from petal_swarm.engine.engine import Engine
from petal_swarm.errors import RemoteError
from petal_swarm.models.stack import BlockStack
from petal_swarm.wire.tensors import encode_tensor

from .device import NAME, Simulation
from .stacks import KINDS, Folders, Kind, Script, engine_of, far, load, on_the_host, waits_of

# What the host tells the device: hidden states; slots and positions; which rows sequences that decode have.
HIDDEN = "engine.engine:Engine._pack"
PLACES = "models.packing:PackedBatch._on_device"
GATHERED = "models.ragged:Group.__init__"
ROTATIONS = "models.rope:RotaryTable._reach"


def opened(engine: Engine) -> Engine:
    for session in "abcd":
        engine.open_session(session, max_length=128)
    return engine


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_steps_of_all_kinds(
    kind: Kind, folders: Folders, device: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits for a step's end, and for nothing before; what it has to tell goes without waiting."""

    def on_host(stack: BlockStack) -> list[Tensor]:
        return Script(opened(engine_of(stack, kind.kv_dtype))).everything()

    sent: dict[str, list[str]] = {}

    def after(what: str) -> None:
        assert device.waits == waits_of(what), what
        sent[what] = list(device.sent)
        device.clear()

    engine = opened(engine_of(load(folders(kind.model), NAME, kind), kind.kv_dtype))
    device.clear()
    found = Script(engine, after).everything()
    assert sent["decode alone"] == sent["begin a chunk"] == [HIDDEN]
    assert sent["a block of a chunk"] == []
    windows = 2 if kind.model == "qwen2-window" else 1
    assert Counter(sent["decode"]) == {HIDDEN: 1, PLACES: 1, GATHERED: windows}
    assert {place for places in sent.values() for place in places} - {ROTATIONS} == {HIDDEN, PLACES, GATHERED}
    for own in found:
        encode_tensor(own)
    copies = [("copy to the host", "wire.tensors:encode_tensor")]
    assert device.waits == copies * sum(own.device.type == NAME for own in found)
    assert not far(found, on_the_host(folders(kind.model), kind, monkeypatch, on_host))


def test_tables_of_positions_grow_without_waiting(folders: Folders, device: Simulation) -> None:
    for model, grown in (("bloom", []), ("qwen3", [ROTATIONS])):
        engine = engine_of(load(folders(model), NAME, Kind(model)), max_batch_tokens=1024)
        engine.open_session("a", max_length=1000)
        script = Script(engine)
        for position, length in ((0, 10), (10, 600), (610, 1)):
            device.clear()
            script.run("a step", script.step("a", (0, position, length)))
            assert device.waits == waits_of("a step")
            assert device.sent == [HIDDEN, *(grown if length > 1 else [])]


def test_without_memory_for_a_batch_steps_run_alone(
    folders: Folders, device: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their results join those that come from the device."""
    room = 100
    forward: Callable[..., Tensor] = BlockStack.forward

    def limited(stack: BlockStack, hidden: Tensor, *rest: object) -> Tensor:
        if len(hidden) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(stack, hidden, *rest)

    def work(place: str) -> list[Tensor]:
        script = Script(opened(engine_of(load(folders("bloom"), place, Kind("bloom")))))
        script.run("prompts", script.step("a", (0, 0, 40)), script.step("b", (0, 0, 9), rows="last"))
        return script.found

    monkeypatch.setattr(BlockStack, "forward", limited)
    expected, room = work("cpu"), 17
    assert not far(work(NAME), expected)
    room = 0
    engine = opened(engine_of(load(folders("bloom"), NAME, Kind("bloom"))))
    (result,) = engine.run([Script(engine).step("a", (0, 0, 9))])
    assert type(result.error) is RemoteError
