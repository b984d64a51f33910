from pathlib import Path

import pytest

from tests.checkpoints import save_bloom, save_llama


@pytest.fixture(scope="session", params=["bloom", "llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model of each family."""
    save = {"bloom": save_bloom, "llama": save_llama}[request.param]
    return save(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bloom(tmp_path_factory.mktemp("bloom"), blocks=4, hidden=32)
