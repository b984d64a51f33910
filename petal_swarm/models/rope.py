"""Rotary position embeddings (RoFormer, arXiv:2104.09864) and the ways to stretch them.

A `RotaryTable` holds one complex number for each (position, frequency): rotating a head is one complex
multiplication. Heads are therefore kept with the two numbers of a frequency next to each other, while
checkpoints keep them half a head apart; `interleave_heads` converts the rows of a projection. Scores are
sums over a head, so they do not notice the order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from petal_swarm.models.devices import to_device

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeParameters:
    """How positions become angles; fields that a kind does not use keep their defaults.

    `original_positions` is the context length before stretching (for "dynamic", the length from which
    stretching starts). `frequency_factors` divides the frequencies one by one (GGUF files store llama3
    scaling that way).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0
    frequency_factors: tuple[float, ...] = ()


def yarn_amplitude(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """The factor on cos and sin that YaRN (arXiv:2309.00071) infers from the stretching factor."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def inverse_frequencies(rope: RopeParameters, head_dim: int) -> Tensor:
    """Radians a position for each pair of a head: float32 `[head_dim / 2]`."""
    plain = _plain_frequencies(rope.theta, head_dim)
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "llama3":
        plain = _llama3_frequencies(rope, plain)
    elif rope.kind == "yarn":
        plain = _yarn_frequencies(rope, head_dim)
    if rope.frequency_factors:
        plain = plain / torch.tensor(rope.frequency_factors)
    return plain


def _plain_frequencies(theta: float, head_dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


def _llama3_frequencies(rope: RopeParameters, plain: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = ((rope.original_positions / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * plain / rope.factor + keep * plain


def _yarn_frequencies(rope: RopeParameters, head_dim: int) -> Tensor:
    def dimension(rotations: float) -> float:
        ratio = rope.original_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    plain = _plain_frequencies(rope.theta, head_dim)
    return plain / rope.factor * stretch + plain * (1 - stretch)


def angles(rope: RopeParameters, head_dim: int, start: int, stop: int) -> Tensor:
    """Angles at the positions `[start, stop)`: float32 `[stop - start, head_dim / 2]`.

    Dynamic NTK stretches with the length of the sequence. Here the length that counts for a token is its
    own position + 1, so that a token's keys do not depend on how a prefill was chunked, batched or replayed.
    """
    positions = torch.arange(start, stop, dtype=torch.float32)
    if rope.kind == "dynamic" and stop > rope.original_positions:
        lengths = (positions.double() + 1).clamp(min=rope.original_positions)
        stretch = rope.factor * lengths / rope.original_positions - (rope.factor - 1)
        theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        return positions[:, None] * (theta[:, None] ** -exponents).float()
    return torch.outer(positions, inverse_frequencies(rope, head_dim))


class RotaryTable:
    """Rotations for the positions met so far; grows on demand."""

    __slots__ = ("_device", "_head_dim", "_rope", "_rows")

    def __init__(self, rope: RopeParameters, head_dim: int, device: torch.device) -> None:
        self._rope = rope
        self._head_dim = head_dim
        self._device = device
        self._rows = torch.empty(0, head_dim // 2, dtype=torch.complex64, device=device)

    def _reach(self, stop: int) -> Tensor:
        have = self._rows.shape[0]
        if stop > have:
            with torch.inference_mode(False):  # the table serves training steps too
                angle = angles(self._rope, self._head_dim, have, max(stop, 2 * have, 512))
                new = torch.polar(torch.full_like(angle, self._rope.amplitude), angle)
                self._rows = torch.cat([self._rows, to_device(new, self._device)])
        return self._rows

    def run(self, start: int, stop: int) -> Tensor:
        """Rotations of the positions `[start, stop)`: complex64 `[stop - start, 1, head_dim / 2]`."""
        return self._reach(stop)[start:stop].unsqueeze(1)

    def rows(self, positions: Tensor, stop: int) -> Tensor:
        """Rotations of `positions` (int64 `[tokens]`, all below `stop`): `[tokens, 1, head_dim / 2]`."""
        return self._reach(stop).index_select(0, positions).unsqueeze(1)


def rotate_(heads: Tensor, rotation: Tensor) -> None:
    """Rotates interleaved `heads` `[tokens, heads, head_dim]` in place by `[tokens, 1, head_dim / 2]`."""
    tokens, count, size = heads.shape
    if heads.dtype == torch.float32:
        pairs = heads.as_strided(
            (tokens, count, size // 2, 2), (heads.stride(0), size, 2, 1), heads.storage_offset()
        )
        torch.view_as_complex(pairs).mul_(rotation)
    else:
        pairs = heads.float().view(tokens, count, size // 2, 2)
        heads.copy_(torch.view_as_real(torch.view_as_complex(pairs) * rotation).flatten(2))


def interleave_keys(keys: Tensor) -> Tensor:
    """Reorders the last dimension of `keys [..., head_dim]` from half-split to interleaved."""
    halves = keys.view(*keys.shape[:-1], 2, keys.shape[-1] // 2)
    return halves.transpose(-1, -2).reshape(keys.shape)


def interleave_heads(rows: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of a projection (or a bias) from half-split heads to interleaved heads."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
