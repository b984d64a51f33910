"""Small random models for the engine, each beside the same one in transformers."""

from __future__ import annotations

import pytest

from .tiny import KINDS, Tiny, make


@pytest.fixture(scope="session", params=KINDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make("bloom", tmp_path_factory.mktemp("bloom"))
