"""Tests that need a CUDA device: without one they are skipped.

`pytest tests/gpu --gpu-device cpu` takes the ways of a device on the CPU, to test these tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from petal_swarm.models import devices

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-device", default="cuda", choices=("cuda", "cpu"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--gpu-device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if wanted == "cuda" and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--gpu-device"))


@pytest.fixture(autouse=True)
def _ways_of_a_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if device.type == "cpu":
        monkeypatch.setattr(devices, "on_host", lambda place: False)
    with torch.inference_mode():
        yield


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """For what only a real device can show."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device
