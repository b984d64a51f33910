"""How many blocks a server hosts, and how it says that it counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from petal_swarm.errors import ConfigError
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.packing import KVPool, PackedBatch, PackedSlice
from petal_swarm.models.stack import BlockStack
from petal_swarm.server.memory_plan import MemoryPlan, Needs, Room, plan_memory, working_bytes
from petal_swarm.span import Span

MIB = 1 << 20
#: 20 blocks; 2048 tokens of KV cache are a MiB a block.
NEEDS = Needs(
    block_bytes=10 * MIB,
    kv_bytes_per_token=512,
    working_bytes=30 * MIB,
    adapter_bytes=20 * MIB,
    model_blocks=20,
)


def plan(free_mib: int, told_mib: int | None = None, device: str = "cpu", **more: Any) -> MemoryPlan:
    room_fields = {name: more.pop(name) for name in ("offload", "away_bytes") if name in more}
    told_bytes = None if told_mib is None else told_mib * MIB
    room = Room(device=device, free_bytes=free_mib * MIB, told_bytes=told_bytes, **room_fields)
    return plan_memory(NEEDS, room, **more)


def test_as_many_blocks_as_fit_beside_their_cache() -> None:
    """Of 200 MiB 60 are left to others, 50 are for work and adapters; of 90 a fifth is for the cache."""
    found = plan(200)
    assert found.num_blocks == found.kept == 7
    assert found.weight_bytes == 70 * MIB
    assert 17.5 * MIB <= found.kv_bytes <= 18 * MIB
    assert plan(2000).num_blocks == 20
    assert plan(300, device="cuda").num_blocks > plan(300).num_blocks


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_block_more_would_not_fit(device: str) -> None:
    for free_mib in range(120, 400, 7):
        found = plan(free_mib, device=device)
        usable = free_mib * MIB * (0.7 if device == "cpu" else 0.9) - 50 * MIB
        assert found.weight_bytes + found.kv_bytes <= usable
        more = (found.num_blocks + 1) * (10 * MIB + 2048 * 512)
        assert found.num_blocks == 20 or more > usable * 0.8


def test_a_device_gives_its_cache_what_no_block_needs() -> None:
    assert plan(600).kv_tokens < plan(600, device="cuda").kv_tokens
    assert plan(10_000, device="cuda").kv_tokens == 65_536


def test_what_was_asked_for() -> None:
    assert plan(2000, num_blocks=3).num_blocks == 3
    assert plan(2000, kv_tokens=100).kv_tokens == 100
    assert plan(200, kv_tokens=20_000).num_blocks < plan(200, kv_tokens=100).num_blocks
    assert plan(2000, told_mib=55).num_blocks == 4
    assert plan(100, num_blocks=9).num_blocks == 9, "an estimate of what others need does not stop anybody"


def test_offload_hosts_all_blocks() -> None:
    found = plan(2000, told_mib=130, offload="disk", away_bytes=200 * MIB)
    assert (found.num_blocks, found.slots) == (20, 2)
    assert found.kept == (130 * MIB - found.kv_bytes) // (10 * MIB) - 2
    assert plan(2000, offload="disk").kept == 20
    one = plan(2000, told_mib=31, offload="cpu", away_bytes=200 * MIB)
    assert (one.num_blocks, one.kept, one.slots) == (20, 0, 1)


def test_offload_is_bounded_by_where_blocks_wait() -> None:
    found = plan(2000, told_mib=60, offload="cpu", away_bytes=70 * MIB)
    assert found.num_blocks - found.kept == 7
    assert found.num_blocks < 20
    with pytest.raises(ConfigError, match="the host has room for 7 of the"):
        plan(2000, told_mib=60, offload="cpu", away_bytes=70 * MIB, num_blocks=20)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"free_mib": 80}, "one block of this model needs 10 MiB, and 1 MiB for a KV cache of 2048 tokens"),
        ({"free_mib": 80}, "6 MiB of the 80 that are free on cpu"),
        ({"free_mib": 500, "told_mib": 9}, "9 MiB of the 500 that are free"),
        ({"free_mib": 500, "told_mib": 501}, "--device-memory 501: 500 MiB are free on cpu"),
        ({"free_mib": 100, "num_blocks": 10}, "10 blocks of this model need 100 MiB, and 10 MiB for"),
        ({"free_mib": 500, "told_mib": 100, "num_blocks": 10}, "take fewer blocks, --quant int8, --offload"),
        ({"free_mib": 500, "told_mib": 9, "offload": "disk"}, "take a smaller --kv-tokens"),
    ],
)
def test_too_little_memory_is_one_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_table_adds_up() -> None:
    for found in (plan(700), plan(900, told_mib=130, offload="disk", away_bytes=1 << 40)):
        first, *lines = found.lines()
        assert first.startswith(f"cpu has {found.room.free_bytes // MIB} MiB free")
        counted = [int(line.split(" MiB ")[0].replace(",", "")) for line in lines]
        assert sum(counted) == pytest.approx(found.room.free_bytes // MIB, abs=len(lines))
    assert "130 of it for blocks and KV cache, as told" in first
    assert lines[0].endswith(
        f"{found.kept} blocks that stay, and 2 at a time of {20 - found.kept} from the disk, 10 MiB each"
    )
    assert any("blocks: 20 of 20, 10 MiB each" in line for line in plan(700).lines())


def test_offload_without_need_streams_nothing() -> None:
    found = plan(2000, offload="disk", away_bytes=0)
    assert (found.kept, found.slots) == (20, 0)
    assert found == replace(plan(2000), room=found.room)


@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_working_space_is_enough_for_a_batch(family: str) -> None:
    """Against what torch says that it allocated at most beyond the batch itself."""
    hf: dict[str, Any] = {"vocab_size": 50, "num_attention_heads": 4, "hidden_size": 256}
    hf |= (
        {"architectures": ["BloomForCausalLM"], "n_layer": 2, "n_head": 4}
        if family == "bloom"
        else {
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 700,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512,
        }
    )
    config = ModelConfig.from_hf(hf)
    tokens, span = 512, Span(0, 2)
    found = peak_bytes(config, span, tokens)
    estimate = working_bytes(config, torch.float32, "none", "cpu", tokens)
    assert found <= estimate <= 3 * found


def peak_bytes(config: ModelConfig, span: Span, tokens: int) -> int:
    from petal_swarm.models.families import family_of

    family = family_of(config)
    shapes = family.block_shapes(config)
    blocks = [
        family.build_block(config, {name: torch.zeros(shape) for name, shape in shapes.items()})
        for _ in span.blocks()
    ]
    stack = BlockStack(config, span, blocks, dtype=torch.float32)
    pool = KVPool.allocate(config, span, tokens, torch.float32, "cpu")
    hidden = torch.zeros(tokens, config.hidden_size)
    with torch.inference_mode():
        for _ in range(2):  # the tables of positions grow once
            batch = PackedBatch.build([PackedSlice(0, tokens, 0, ((0, tokens),))])
            with torch.profiler.profile(profile_memory=True) as profile:
                stack.forward(hidden, batch, pool, span)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
