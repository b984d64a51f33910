"""The store of adapters: whose they are, how many fit, and which go first."""

from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig

from petal_swarm.engine.adapters import EVERYBODY, AdapterLimits, AdapterStore, HeldAdapter, cost_bytes
from petal_swarm.errors import AdapterFullError, AdapterMissingError, BadAdapterError
from petal_swarm.models.adapter_digest import adapter_digest, adapter_id
from petal_swarm.models.adapters import AdapterLayout, LoraPlace
from petal_swarm.models.config import ModelConfig
from petal_swarm.span import Span

CONFIG = ModelConfig.from_hf(
    {
        **BloomConfig(vocab_size=50, hidden_size=32, n_layer=4, n_head=4).to_dict(),
        "architectures": ["BloomModel"],
    }
)
WHOLE = Span(0, 4)
LAYOUT = AdapterLayout(tuple(LoraPlace(block, "self_attention.dense", 2, 0.5) for block in range(4)), 3)
SIZE = LAYOUT.numbers(CONFIG, WHOLE)
COST = cost_bytes(SIZE)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def numbers(seed: int = 0) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def store(clock: Clock | None = None, **limits: int) -> AdapterStore:
    return AdapterStore(CONFIG, WHOLE, AdapterLimits(**limits), clock or Clock())


def add(held: AdapterStore, owner: str, adapter: str, seed: int = 0, *, ttl_s: float = 60.0) -> HeldAdapter:
    values = numbers(seed)
    digest = adapter_digest(LAYOUT, values, WHOLE)
    return held.add(owner, adapter, WHOLE, LAYOUT, values, digest=digest, ttl_s=ttl_s)


def test_nobody_gets_the_adapter_of_another() -> None:
    held = store()
    mine = add(held, "a", "x")
    add(held, "b", "x", 1)
    assert held.find("a", "x", WHOLE) is mine
    assert not torch.equal(held.find("b", "x", WHOLE).numbers, mine.numbers)
    with pytest.raises(AdapterMissingError):
        held.find("c", "x", WHOLE)
    assert held.numbers_for("c", "x", WHOLE) is None
    assert held.has("a", "x", WHOLE, mine.digest)
    assert not held.has("b", "x", WHOLE, mine.digest)


def test_what_the_server_offers_is_everybodys_after_ones_own() -> None:
    held = store()
    offered = add(held, EVERYBODY, "x")
    assert held.find("a", "x", WHOLE) is offered
    mine = add(held, "a", "x", 1)
    assert held.find("a", "x", WHOLE) is mine
    assert held.find("b", "x", WHOLE) is offered


def test_a_part_of_the_blocks() -> None:
    held = store()
    add(held, "a", "x")
    part = Span(1, 3)
    start, stop = LAYOUT.bounds(CONFIG, part)
    found = held.numbers_for("a", "x", part)
    assert found is not None
    assert found[0] == LAYOUT.of_span(part)
    assert torch.equal(found[1], numbers()[start:stop])
    assert held.has("a", "x", part, adapter_digest(LAYOUT.of_span(part), numbers()[start:stop], part))
    assert not held.has("a", "x", part, adapter_digest(LAYOUT, numbers(), WHOLE))


def test_the_least_recently_used_goes_first() -> None:
    held = store(max_bytes=3 * COST, max_bytes_of_peer=2 * COST)
    for adapter in "xy":
        add(held, "a", adapter)
    held.find("a", "x", WHOLE)
    add(held, "a", "z")
    assert held.numbers_for("a", "y", WHOLE) is None
    assert held.numbers_for("a", "x", WHOLE) is not None
    for owner in "bc":
        add(held, owner, "x")
    assert len(held) == 3
    assert held.nbytes == 3 * COST
    assert held.numbers_for("a", "z", WHOLE) is None


def test_what_is_in_use_stays() -> None:
    held = store(max_bytes=2 * COST, max_bytes_of_peer=2 * COST)
    with held.use(add(held, "a", "x")) as mine:
        with held.use(add(held, "b", "y")):
            with pytest.raises(AdapterFullError, match="no room"):
                add(held, "c", "z")
            with pytest.raises(BadAdapterError, match="in use"):
                add(held, "a", "x", 1)
        add(held, "c", "z")
        assert held.find("a", "x", WHOLE) is mine
    assert add(held, "a", "x", 1).digest != mine.digest


def test_a_peer_has_its_share() -> None:
    held = store(max_bytes=10 * COST, max_bytes_of_peer=2 * COST, max_adapters_of_peer=5)
    with held.use(add(held, "a", "x")), held.room_for("a", SIZE):
        with pytest.raises(AdapterFullError, match="one peer"), held.room_for("a", SIZE):
            pass
        add(held, "b", "x")
        assert held.nbytes == 3 * COST
    assert held.nbytes == 2 * COST
    with pytest.raises(AdapterFullError, match="over this server's limit"), held.room_for("a", 2 * SIZE + 1):
        pass
    counted = store(max_adapters_of_peer=1)
    with counted.use(add(counted, "a", "x")), pytest.raises(AdapterFullError):
        add(counted, "a", "y")


def test_what_is_offered_is_never_given_up() -> None:
    held = store(max_bytes=COST, max_bytes_of_peer=COST)
    add(held, EVERYBODY, "x", ttl_s=float("inf"))
    assert held.nbytes == 0, "nor does it take room from peers"
    for adapter in "yz":
        add(held, "a", adapter)
    assert held.find("b", "x", WHOLE)
    assert len(held) == 2


def test_unused_adapters_expire() -> None:
    clock = Clock()
    held = store(clock)
    mine = add(held, "a", "x", ttl_s=10.0)
    clock.now += 9
    held.find("a", "x", WHOLE)
    clock.now += 9
    with held.use(mine):
        clock.now += 60
        assert held.find("a", "x", WHOLE) is mine
    clock.now += 11
    assert held.numbers_for("a", "x", WHOLE) is None
    assert held.nbytes == 0
    add(held, "a", "x")
    held.forget("a", "x")
    assert not len(held)


def test_an_id_stands_for_shape_and_numbers() -> None:
    assert adapter_id(LAYOUT, numbers(), 4) == adapter_id(LAYOUT, numbers().clone(), 4)
    assert len(adapter_id(LAYOUT, numbers(), 4)) == 32
    other = AdapterLayout(tuple(LoraPlace(p.block, p.stem, p.rank, 0.25) for p in LAYOUT.places), 3)
    several = {
        adapter_id(LAYOUT, numbers(), 4),
        adapter_id(LAYOUT, numbers(1), 4),
        adapter_id(other, numbers(), 4),
    }
    assert len(several) == 3
