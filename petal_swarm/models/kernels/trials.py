"""Which of several ways to compute the same is right and fastest, tried on the device itself.

Nobody can know it beforehand: it depends on the device, on Triton's version, and on the shape.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: `x [rows, inner]` and what to add to the product, or None, to `[rows, outer]`.
Product: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
#: Seconds that the device takes for something.
Clock: TypeAlias = Callable[[Callable[[], object]], float]

#: Each number of rows up to the next of these is multiplied in the same way, and more than the last, too.
ROWS = tuple(1 << power for power in range(10))
#: Relative distance from what torch computes: both round weights or sums to the dtype, in other places.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}

_CALLS = 5
# Launches pile up meanwhile, so that only the device's own time is measured: about a millisecond.
_SLEEP_CYCLES = 2_000_000
_OUTLIER = 30.0


class Way(NamedTuple):
    """A way for `least_rows` to `most_rows`.

    It may be `tolerance` farther from the plain way than rounding explains, and is taken if it needs less
    than `share` of the time of the best that came before it.
    """

    name: str
    product: Product
    least_rows: int
    most_rows: int
    tolerance: float = 0.0
    share: float = 1.0


def fastest(
    plain: Product, ways: Sequence[Way], inner: int, dtype: torch.dtype, device: torch.device, clock: Clock
) -> list[Way | None]:
    """The way to take for each of `ROWS`; None is the plain one.

    Activations for the trial have some columns with outliers. A way that fails, or gives other numbers, is
    not taken for any number of rows: the log says which.
    """
    generator = torch.Generator().manual_seed(0)
    most = torch.randn(ROWS[-1], inner, generator=generator)
    most[:, :: max(1, inner // 4)] *= _OUTLIER
    most = most.to(dtype).to(device)
    sound = list(ways)
    found: list[Way | None] = []
    for rows in ROWS:
        x = most[:rows]
        able = [way for way in sound if way.least_rows <= rows <= way.most_rows]
        best, best_s = None, 0.0
        if able:
            expected = plain(x, None)
            best_s = clock(lambda x=x: plain(x, None))  # type: ignore[misc]
        for way in able:
            trouble = _trouble(way, x, expected)
            if trouble is not None:
                logger.warning("%s is not used on this device: %s", way.name, trouble)
                sound.remove(way)
                found = [None if other is way else other for other in found]
                continue
            took_s = clock(lambda way=way, x=x: way.product(x, None))  # type: ignore[misc]
            if took_s <= way.share * best_s:
                best, best_s = way, took_s
        found.append(best)
    return found


def _trouble(way: Way, x: Tensor, expected: Tensor) -> str | None:
    try:
        off = distance(way.product(x, None), expected)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton, its compilers and CUDA raise errors of all kinds
        return f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
    allowed = TOLERANCES[x.dtype] + way.tolerance
    return None if off <= allowed else f"it is {off:.2g} off with {len(x)} rows, {allowed:.2g} would do"


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative; not a number if either is not finite. Waits for the device."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def device_clock(device: torch.device) -> Clock:
    """Times work on `device`, launching not counted on CUDA. It waits, so it is not for a step."""

    def on_cuda(work: Callable[[], object]) -> float:
        work()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(_CALLS):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / _CALLS

    return on_cuda if device.type == "cuda" else wall_clock(device)


def wall_clock(device: torch.device) -> Clock:
    """Times work on `device` as somebody who waits for it sees it: a median."""

    def on_wall(work: Callable[[], object]) -> float:
        took = []
        for _ in range(_CALLS):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            took.append(time.perf_counter() - started)
        return statistics.median(took)

    return on_wall
