"""Small random models for the engine, each beside the same one in transformers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .tiny import KINDS, Tiny, make


@pytest.fixture(scope="session", params=KINDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make("bloom", tmp_path_factory.mktemp("bloom"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are slower, and not the same to the last bit, on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
