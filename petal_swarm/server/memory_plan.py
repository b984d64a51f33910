"""How a server counts what it may host: blocks, KV cache and working space within the memory that is free.

Pure: what is free and what was told are arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from petal_swarm.errors import ConfigError
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.offload import Offload
from petal_swarm.models.quantization import Quant
from petal_swarm.models.streaming import SLOTS

#: Of the memory that is free this part is left to other programs and to training: on the host, and on a
#: device beside it, where hardly anybody else is.
_LEFT = {"cpu": 0.3}
_LEFT_ON_DEVICE = 0.1
#: Of what blocks and KV cache have together; on a device the KV cache also gets what no block needs.
_KV_SHARE = 0.2
_MAX_DEFAULT_KV_TOKENS = 65_536
_MIN_DEFAULT_KV_TOKENS = 2_048
#: A device's libraries take memory for their kernels and scratch when they first run.
_LIBRARY_BYTES = {"cuda": 512 << 20}
# Attention on a device: masks that are written out and kept, keys and values gathered, in the model's dtype.
_DEVICE_ATTENTION_NUMBERS = (1 << 25) + (1 << 26) + 2 * (1 << 26)
# Weights that are dequantized a piece at a time, first to float32, then to the model's dtype.
_PIECE_NUMBERS = {"cpu": 1 << 21}
_DEVICE_PIECE_NUMBERS = 1 << 26
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a model takes, in bytes: a block's weights, its keys and values of a token, and besides all blocks
    the working space of a batch and the adapters of clients.
    """

    block_bytes: int
    kv_bytes_per_token: int
    working_bytes: int
    adapter_bytes: int
    model_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What there is. `told_bytes` is for blocks and KV cache; None: a share of what is free.

    `away_bytes` can hold blocks that do not fit the device.
    """

    device: str
    free_bytes: int
    told_bytes: int | None = None
    offload: Offload = "none"
    away_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What is hosted, and how that was counted. `weight_bytes` of the device are for `kept` blocks that stay,
    and for `slots` that the others come to by turns.
    """

    needs: Needs
    room: Room
    num_blocks: int
    kv_tokens: int
    kept: int
    slots: int

    @property
    def weight_bytes(self) -> int:
        return (self.kept + self.slots) * self.needs.block_bytes

    @property
    def kv_bytes(self) -> int:
        return self.kv_tokens * self.num_blocks * self.needs.kv_bytes_per_token

    def lines(self) -> Iterator[str]:
        """A short table, in MiB."""
        room, needs = self.room, self.needs
        told = room.told_bytes
        limit = "" if told is None else f"; {told // _MIB:,} of it for blocks and KV cache, as told"
        yield f"{room.device} has {room.free_bytes // _MIB:,} MiB free{limit}. Of these"
        streamed = self.num_blocks - self.kept
        size = f"{needs.block_bytes / _MIB:,.3g} MiB each"
        where = {"cpu": "the host's memory", "disk": "the disk", "none": ""}[room.offload]
        what = f"blocks: {self.num_blocks} of {needs.model_blocks}, {size}"
        if streamed:
            what = (
                f"{self.kept} blocks that stay, and {self.slots} at a time of {streamed} from {where}, {size}"
            )
        yield _line(self.weight_bytes, what)
        yield _line(self.kv_bytes, f"KV cache of {self.kv_tokens:,} tokens")
        yield _line(needs.working_bytes, "working space of the largest batch")
        yield _line(needs.adapter_bytes, "adapters of clients")
        taken = self.weight_bytes + self.kv_bytes + needs.working_bytes + needs.adapter_bytes
        yield _line(room.free_bytes - taken, "left to training and other programs")


def _line(count: int, what: str) -> str:
    return f"{count // _MIB:>9,} MiB  {what}"


def plan_memory(
    needs: Needs, room: Room, *, num_blocks: int | None = None, kv_tokens: int | None = None
) -> MemoryPlan:
    """As many blocks as fit beside their KV cache, or `num_blocks`; with offload as many as have room away.

    Raises:
        ConfigError: not one block fits, or not as many as were asked for.
    """
    usable = _usable_bytes(needs, room)
    if num_blocks is not None:
        plan = _plan(needs, room, usable, num_blocks, kv_tokens)
        # Without a limit it is only an estimate of what others need: who asks for more may know better.
        if plan is None and room.told_bytes is None and room.offload == "none":
            plan = _plan(needs, room, room.free_bytes, num_blocks, kv_tokens or _MIN_DEFAULT_KV_TOKENS)
        if plan is None:
            raise ConfigError(_too_little(needs, room, usable, num_blocks, kv_tokens))
        return plan
    for count in range(needs.model_blocks, 0, -1):
        plan = _plan(needs, room, usable, count, kv_tokens)
        if plan is not None:
            return plan
    raise ConfigError(_too_little(needs, room, usable, 1, kv_tokens))


def _usable_bytes(needs: Needs, room: Room) -> int:
    """For blocks and KV cache."""
    if room.told_bytes is not None:
        if room.told_bytes > room.free_bytes:
            raise ConfigError(
                f"--device-memory {room.told_bytes // _MIB}: {room.free_bytes // _MIB} MiB are free"
                f" on {room.device}"
            )
        return room.told_bytes
    left = int(room.free_bytes * _LEFT.get(room.device, _LEFT_ON_DEVICE))
    return room.free_bytes - left - needs.working_bytes - needs.adapter_bytes


def _plan(needs: Needs, room: Room, usable: int, count: int, kv_tokens: int | None) -> MemoryPlan | None:
    """For `count` blocks; None if they do not fit."""
    per_token = needs.kv_bytes_per_token * count
    tokens = kv_tokens
    if tokens is None:
        share = int(usable * _KV_SHARE) // per_token
        tokens = max(_MIN_DEFAULT_KV_TOKENS, min(share, _MAX_DEFAULT_KV_TOKENS))
    fitting = (usable - tokens * per_token) // needs.block_bytes
    kept, slots = count, 0
    if fitting < count:
        slots = min(SLOTS, fitting)
        kept = fitting - slots
        if room.offload == "none" or slots < 1 or (count - kept) * needs.block_bytes > room.away_bytes:
            return None
    if kv_tokens is None and room.device != "cpu":
        spare = (usable - (kept + slots) * needs.block_bytes) // per_token
        tokens = max(tokens, min(spare, _MAX_DEFAULT_KV_TOKENS))
    return MemoryPlan(needs=needs, room=room, num_blocks=count, kv_tokens=tokens, kept=kept, slots=slots)


def _too_little(needs: Needs, room: Room, usable: int, count: int, kv_tokens: int | None) -> str:
    tokens = kv_tokens or _MIN_DEFAULT_KV_TOKENS
    kv = tokens * needs.kv_bytes_per_token * count // _MIB
    what = "one block of this model needs" if count == 1 else f"{count} blocks of this model need"
    advice = "--quant int8, --offload disk" if room.offload == "none" else "a smaller --kv-tokens"
    fewer = "fewer blocks, " if count > 1 else ""
    away = ""
    if room.offload != "none" and usable > tokens * needs.kv_bytes_per_token * count + needs.block_bytes:
        kept = max(0, usable // needs.block_bytes - SLOTS)
        where = "the host" if room.offload == "cpu" else "the disk"
        away = (
            f", and {where} has room for {room.away_bytes // needs.block_bytes} of the {count - kept} others"
        )
    return (
        f"{what} {needs.block_bytes * count // _MIB} MiB, and {kv} MiB for a KV cache of {tokens} tokens;"
        f" {max(0, usable) // _MIB} MiB of the {room.free_bytes // _MIB} that are free on {room.device} are"
        f" for that{away}: take {fewer}{advice}, or close other programs"
    )


def working_bytes(
    config: ModelConfig, dtype: torch.dtype, quant: Quant, device: str, max_batch_tokens: int
) -> int:
    """What computing takes besides weights and KV cache, for a batch of `max_batch_tokens` rows, at most."""
    heads = config.num_heads + 2 * config.num_kv_heads
    # In one block at a time: what came in and went out, norms between; queries, keys, values and what was
    # attended to, or what the MLP widens, twice where it is gated, and the activation of that.
    attention = (heads + config.num_heads) * config.head_dim
    row = 5 * config.hidden_size + max(attention, 3 * config.intermediate_size)
    found = max_batch_tokens * row * dtype.itemsize
    if device != "cpu":
        found += _DEVICE_ATTENTION_NUMBERS * dtype.itemsize + _LIBRARY_BYTES.get(device, 0)
    if quant != "none":
        largest = config.hidden_size * max(config.intermediate_size, heads * config.head_dim)
        found += min(_PIECE_NUMBERS.get(device, _DEVICE_PIECE_NUMBERS), largest) * (4 + dtype.itemsize)
    return found
