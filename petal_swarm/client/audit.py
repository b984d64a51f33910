"""Whether two servers computed the same: the comparison behind an audit.

Pure: rows in, a verdict out. Whom to ask, and whom to believe, is `audit_ledger`'s.

Honest servers differ: by dtype, quantized weights, the order of sums. Each kind of rounding changes what
blocks *add* to a row by a share of it that hardly depends on the model, so the tolerance follows from what
both announce. The rows themselves say little: a few channels are a hundred times larger than the rest, and
what went in mostly comes out again. docs/decisions/0020-audits.md has the figures behind every constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from petal_swarm.errors import ConfigError
from petal_swarm.wire.announcement import Announcement
from petal_swarm.wire.tensors import DTYPES

Side = Literal["claimed", "recomputed"]
_BOTH: tuple[Side, ...] = ("claimed", "recomputed")

#: What a kind of rounding may change in what one block adds to a typical row, as a share of it: 1.6 to 1.9
#: times what was seen in eight neighbouring rows while these were chosen, and 1.1 times the worst since.
_OF_DTYPE = {"float32": 0.0025, "float16": 0.0025, "bfloat16": 0.0156}
_OF_QUANT = {"none": 0.0, "int8": 0.0475, "nf4": 0.41}
_OF_KV = {"auto": 0.0, "int8": 0.0375}
#: Servers with the same quantized weights differ only by how they round activations.
_OF_EQUAL_WEIGHTS = 0.0275
#: Rounding errors of many blocks add up, but so does what they are a share of.
_GROWTH = 1 / 6

#: Two roundings in a block of the row itself; half a unit in the last place, doubled.
_UNIT = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_ROUNDINGS_PER_BLOCK = 2
_ROUNDING = 0.3

#: The typical row is the median of so many or more.
_TYPICAL_OF = 5
#: And it may differ by so many times as much in its large channels, which outweigh the others in a sum of
#: squares.
_LARGE_LIMIT = 2.5
#: Any row may differ by so many times what is allowed for the typical one, for all reasons together and for
#: the dtypes alone, and in any case by half the change. Some tokens have channels that grow by thousands in
#: one block, where they are rounded coarsely, and shrink in another: how far off they are has no near bound.
_ROW_LIMITS = (5.0, 20.0)
_ROW_SHARE = 0.5
#: Twice that for the first token, the most exceptional of all.
_FIRST_TOKEN = 2.0
#: A channel counts for at most so many times the limit: one in 64 that is wholly wrong fails its row.
_CLIP = 8.0
#: Of a normal distribution: from the median magnitude to the standard deviation.
_MEDIAN_TO_DEVIATION = 1.4826
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Precision:
    """How a server says that it computes.

    Raises:
        ConfigError: names that have no tolerance here, as those of a newer version.
    """

    dtype: str = "float32"
    quant: str = "none"
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, known in ((self.dtype, _OF_DTYPE), (self.quant, _OF_QUANT), (self.kv_dtype, _OF_KV)):
            if name not in known:
                raise ConfigError(f"no tolerance is known for {name!r}, only for {', '.join(known)}")

    @classmethod
    def of(cls, announcement: Announcement) -> Precision:
        """As announced.

        Raises:
            ConfigError: as above.
        """
        return cls(announcement.dtype, announcement.quant, announcement.kv_dtype)

    def __str__(self) -> str:
        weights = "" if self.quant == "none" else f" with {self.quant} weights"
        return f"{self.dtype}{weights}" + (
            "" if self.kv_dtype == "auto" else f" and {self.kv_dtype} KV cache"
        )


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What two honest servers may differ by in a typical row, as shares.

    `of_change` is of what blocks add to the row, and `of_change_by_dtype` the part of it that is due to
    dtypes; `of_row` is of the row itself.
    """

    of_change: float
    of_change_by_dtype: float
    of_row: float

    @classmethod
    def between(cls, one: Precision, other: Precision, blocks: int) -> Tolerance:
        """For `blocks` blocks, and rows that travel as float32."""
        both = (one, other)
        of_dtype = sum(_OF_DTYPE[side.dtype] ** 2 for side in both)
        squares = of_dtype + sum(_OF_KV[side.kv_dtype] ** 2 for side in both)
        if one.quant != other.quant:
            squares += sum(_OF_QUANT[side.quant] ** 2 for side in both)
        elif one.quant != "none":
            squares += _OF_EQUAL_WEIGHTS**2
        growth = blocks**_GROWTH
        units = sum(_UNIT[side.dtype] ** 2 for side in both) * _ROUNDINGS_PER_BLOCK * blocks
        return cls(math.sqrt(squares) * growth, math.sqrt(of_dtype) * growth, _ROUNDING * math.sqrt(units))

    def travelled(self, dtypes: Sequence[torch.dtype]) -> Tolerance:
        """With the rounding of rows to the dtypes in which they came."""
        squares = sum((_ROUNDING * torch.finfo(dtype).eps) ** 2 for dtype in dtypes)
        return replace(self, of_row=math.sqrt(self.of_row**2 + squares))

    @property
    def row_limit(self) -> float:
        """What any row may differ by, as a multiple of what is allowed for a typical one."""
        limit = math.hypot(_ROW_LIMITS[0], _ROW_LIMITS[1] * self.of_change_by_dtype / self.of_change)
        return max(limit, _ROW_SHARE / self.of_change)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether rows agree; if not, what differs in words, and which side may be wrong.

    `ratio` is the largest difference as a multiple of what is allowed; infinite where there is no number.
    """

    ratio: float
    difference: str = ""
    suspects: tuple[Side, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.difference


def compare(
    inputs: Tensor,
    claimed: Tensor,
    recomputed: Tensor,
    audited: Precision,
    auditor: Precision,
    *,
    blocks: int,
    position: int,
) -> Verdict:
    """Whether `claimed` and `recomputed` can both be what `blocks` blocks make of `inputs`.

    All three are `[rows, hidden_size]`, of neighbouring tokens of one sequence, the first at the absolute
    `position`. Rows of several steps may come together: a typical row is judged more strictly than one alone.
    """
    assert inputs.dim() == 2, "rows of hidden states"
    sides: tuple[tuple[Side, Tensor], ...] = (("claimed", claimed), ("recomputed", recomputed))
    for side, rows in sides:
        if flaw := _flaw(rows, inputs, position):
            return Verdict(math.inf, f"the {side} rows {flaw}", (side,))
    if not len(inputs):
        return Verdict(0.0)
    tolerance = Tolerance.between(audited, auditor, blocks).travelled((claimed.dtype, recomputed.dtype))
    spread, large = relative_differences(inputs, claimed, recomputed, tolerance)
    if position == 0:
        spread[0] /= _FIRST_TOKEN
    made = f"of what {blocks} block{'s' if blocks > 1 else ''} add, between {audited} and {auditor}"
    return _judge(spread, large, tolerance, position, made)


def relative_differences(
    inputs: Tensor, claimed: Tensor, recomputed: Tensor, tolerance: Tolerance
) -> tuple[Tensor, Tensor]:
    """Two figures for each row, 1 being what is allowed: over all channels alike, and over the large ones.

    What is allowed follows from `recomputed` alone, so that a claim cannot widen it.
    """
    before, after = inputs.float(), recomputed.float()
    change = after - before
    usual = change.abs().median(-1, keepdim=True).values * _MEDIAN_TO_DEVIATION
    allowed = tolerance.of_change**2 * (usual.square() + change.square())
    allowed += tolerance.of_row**2 * torch.maximum(before.square(), after.square())
    allowed.clamp_min_(_TINY)
    squares = (claimed.float() - after).square()
    spread = (squares / allowed).clamp_max((_CLIP * tolerance.row_limit) ** 2).mean(-1).sqrt()
    return spread, (squares.sum(-1) / allowed.sum(-1)).sqrt()


def _flaw(rows: Tensor, inputs: Tensor, position: int) -> str:
    if rows.shape != inputs.shape:
        return f"have shape {list(rows.shape)}, not {list(inputs.shape)}"
    if rows.dtype not in DTYPES.values():
        return f"are of {rows.dtype}"
    bad = rows.isfinite().all(1).logical_not().nonzero()
    return f"hold a number that is not finite, at position {position + int(bad[0])}" if len(bad) else ""


def _judge(spread: Tensor, large: Tensor, tolerance: Tolerance, position: int, made: str) -> Verdict:
    """By the one of three rules that is broken most, or comes nearest to it."""
    row = int(spread.argmax())
    rules = [(float(spread[row]), tolerance.row_limit, f"the row at position {position + row} differs")]
    if len(spread) >= _TYPICAL_OF:
        typical = f"the typical of {len(spread)} rows differs"
        rules.append((float(spread.median()), 1.0, typical))
        rules.append((float(large.median()), _LARGE_LIMIT, f"{typical} in its largest channels"))
    found, limit, what = max(rules, key=lambda rule: rule[0] / rule[1])
    ratio, share = found / limit, tolerance.of_change
    if ratio <= 1:
        return Verdict(ratio)
    return Verdict(ratio, f"{what} by {found * share:.2g} ({limit * share:.2g} allowed) {made}", _BOTH)
