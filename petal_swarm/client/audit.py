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
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from petal_swarm.errors import ConfigError
from petal_swarm.wire.announcement import Announcement
from petal_swarm.wire.tensors import DTYPES

Side = Literal["claimed", "recomputed"]
_BOTH: tuple[Side, ...] = ("claimed", "recomputed")

#: What a kind of rounding may change in what one block adds to a row, as a share of it. The typical row of
#: honest servers, of any model and depth, differs by less than half of it.
_OF_DTYPE = {"float32": 0.006, "float16": 0.006, "bfloat16": 0.045}
_OF_QUANT = {"none": 0.0, "int8": 0.08, "nf4": 0.7}
_OF_KV = {"auto": 0.0, "int8": 0.09}
#: Servers with the same quantized weights differ only by how they round activations, whatever their dtype.
_OF_EQUAL_WEIGHTS = 0.06
#: Rounding errors of many blocks add up, but so does what they are a share of.
_GROWTH = 1 / 8

#: Two roundings in a block of the row itself; half a unit in the last place, doubled.
_UNIT = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_ROUNDINGS_PER_BLOCK = 2
_ROUNDING = 0.3

#: Limits, as multiples of that. The typical row, where there are enough rows to speak of one:
_MEDIAN_LIMIT = 0.5
_MEDIAN_ROWS = 5
#: any row: exceptional tokens grow large channels in one block and lose them in another,
_ROW_LIMIT = 2.0
#: and are least exact in those channels;
_LARGE_LIMIT = 5.0
#: and all this twice for the first token, the most exceptional of all.
_FIRST_TOKEN = 2.0
#: A channel counts for at most so many times what is allowed: one in 64 that is wholly wrong fails its row.
_CLIP = 16.0
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
    """What two honest servers may differ by: shares of what blocks add to a row, and of the row itself."""

    of_change: float
    of_row: float

    @classmethod
    def between(cls, one: Precision, other: Precision, blocks: int) -> Tolerance:
        """For `blocks` blocks, and rows that travel as float32."""
        both = (one, other)
        squares = sum(_OF_DTYPE[side.dtype] ** 2 + _OF_KV[side.kv_dtype] ** 2 for side in both)
        if one.quant != other.quant:
            squares += sum(_OF_QUANT[side.quant] ** 2 for side in both)
        elif one.quant != "none":
            squares += _OF_EQUAL_WEIGHTS**2
        units = sum(_UNIT[side.dtype] ** 2 for side in both) * _ROUNDINGS_PER_BLOCK * blocks
        return cls(math.sqrt(squares) * blocks**_GROWTH, _ROUNDING * math.sqrt(units))

    def travelled(self, dtypes: Sequence[torch.dtype]) -> Tolerance:
        """With the rounding of rows to the dtypes in which they came."""
        squares = sum((_ROUNDING * torch.finfo(dtype).eps) ** 2 for dtype in dtypes)
        return Tolerance(self.of_change, math.sqrt(self.of_row**2 + squares))


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
        large[0] /= _FIRST_TOKEN
    made = f"of what {blocks} block{'s' if blocks > 1 else ''} add, between {audited} and {auditor}"
    return _judge(spread, large, tolerance.of_change, position, made)


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
    spread = (squares / allowed).clamp_max(_CLIP**2).mean(-1).sqrt()
    return spread, (squares.sum(-1) / allowed.sum(-1)).sqrt()


def _flaw(rows: Tensor, inputs: Tensor, position: int) -> str:
    if rows.shape != inputs.shape:
        return f"have shape {list(rows.shape)}, not {list(inputs.shape)}"
    if rows.dtype not in DTYPES.values():
        return f"are of {rows.dtype}"
    bad = rows.isfinite().all(1).logical_not().nonzero()
    return f"hold a number that is not finite, at position {position + int(bad[0])}" if len(bad) else ""


def _judge(spread: Tensor, large: Tensor, share: float, position: int, made: str) -> Verdict:
    """The one of the three rules that is broken most, or comes nearest to it."""
    row, large_row = int(spread.argmax()), int(large.argmax())
    rules = [
        (float(spread[row]), _ROW_LIMIT, f"the row at position {position + row} differs"),
        (
            float(large[large_row]),
            _LARGE_LIMIT,
            f"the row at position {position + large_row} differs in its largest channels",
        ),
    ]
    if len(spread) >= _MEDIAN_ROWS:
        rules.append((float(spread.median()), _MEDIAN_LIMIT, f"the typical of {len(spread)} rows differs"))
    found, limit, what = max(rules, key=lambda rule: rule[0] / rule[1])
    ratio = found / limit
    if ratio <= 1:
        return Verdict(ratio)
    return Verdict(ratio, f"{what} by {found * share:.2g} ({limit * share:.2g} allowed) {made}", _BOTH)
