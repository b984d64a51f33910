from collections.abc import Iterator
from pathlib import Path

import pytest

from petal_swarm.engine.engine import Engine
from petal_swarm.server import loader
from tests.checkpoints import save_bloom, save_llama


def _figures(engine: Engine, **_: object) -> None:
    engine.seed(block_time_s=2e-4, prefill_tokens_per_s=5e4)


@pytest.fixture(scope="package", autouse=True)
def _servers_are_not_measured() -> Iterator[None]:
    """Routes on a virtual clock shall not follow from how busy this machine is; and each start is quicker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "calibrate", _figures)
        yield


@pytest.fixture(scope="session", params=["bloom", "llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model of each family."""
    save = {"bloom": save_bloom, "llama": save_llama}[request.param]
    return save(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bloom(tmp_path_factory.mktemp("bloom"), blocks=4, hidden=32)
