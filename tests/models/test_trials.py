"""Which of several ways is taken, by a clock that is told how long they take."""

from __future__ import annotations

import logging

import pytest
import torch

from petal_swarm.models.kernels import trials
from petal_swarm.models.kernels.trials import ROWS, Way, fastest

PLAIN_S = 10.0


class Costs:
    """Products that are right, wrong or broken; `clock` tells how long the last one called takes."""

    def __init__(self) -> None:
        self.last_s = 0.0

    def product(self, seconds: float, off: float = 0.0):
        def multiply(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
            self.last_s = seconds
            return x * (1 + off)

        return multiply

    def clock(self, work) -> float:
        work()
        return self.last_s

    def choose(self, *ways: Way) -> list[str | None]:
        plain = self.product(PLAIN_S)
        found = fastest(plain, ways, 32, torch.float32, torch.device("cpu"), self.clock)
        return [None if way is None else way.name for way in found]


def test_the_fastest_is_taken_for_each_number_of_rows():
    costs = Costs()
    few, many = costs.product(2.0), costs.product(5.0)
    names = costs.choose(
        Way("few", few, 1, 4), Way("many", many, 1, 64), Way("slow", costs.product(11), 1, 512)
    )
    assert names == ["few"] * 3 + ["many"] * 4 + [None] * (len(ROWS) - 7)


def test_what_is_less_exact_has_to_be_much_faster():
    costs = Costs()
    for seconds, name in ((7.0, "rounding"), (9.0, None)):
        way = Way("rounding", costs.product(seconds, off=0.01), 1, 512, tolerance=0.02, share=0.8)
        assert costs.choose(way) == [name] * len(ROWS)


def broken(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    if len(x) > 16:
        raise ValueError("no such kernel\nand much more")
    return x.clone()


@pytest.mark.parametrize("trouble", ["raises", "wrong", "undefined"])
def test_a_way_that_is_wrong_anywhere_is_not_taken(trouble, caplog):
    costs = Costs()
    off = {"wrong": 1e-3, "undefined": torch.nan}.get(trouble)
    product = broken if off is None else costs.product(1.0, off)
    with caplog.at_level(logging.WARNING, trials.__name__):
        names = costs.choose(Way("new", product, 1, 512), Way("other", costs.product(3.0), 1, 2))
    assert names == ["other"] * 2 + [None] * (len(ROWS) - 2)
    (record,) = caplog.records
    assert record.getMessage().startswith("new is not used on this device: ")
    if off is None:
        assert record.getMessage().endswith("ValueError: no such kernel")
