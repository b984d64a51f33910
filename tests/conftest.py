"""Of all tests: torch's threads, Triton's interpreter, and who runs beside whom (`pytest -n 2`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests import kernel_interpreter

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

#: What one worker runs as a whole.
TOGETHER = {
    # They start processes, or a browser, and wait for them with deadlines: never two of them at a time.
    "processes": ("tests/loopback/", "tests/browser/", "tests/docs/", "tests/cli/test_local_swarm.py"),
    # One process runs all of them.
    "simulated": ("tests/simulated/",),
}

# Several threads for matrices this small only wait for one another, and sum in another order.
torch.set_num_threads(1)
kernel_interpreter.load()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """A file is of one worker, which makes its fixtures once; see `TOGETHER` for what several files are."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return next((name for name, paths in TOGETHER.items() if path.startswith(paths)), path)

    return ByFile(config, log)
