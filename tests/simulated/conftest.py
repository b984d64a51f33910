"""Tests on a simulated device run in a process of their own, since torch never forgets a device.

The first of them starts it, for all that were asked for; each then reports what came of it there.
`--simulate-here` does without, for a debugger.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
_REPORTS = pytest.StashKey[dict[str, list[Any]]]()
# The first test waits for all of them.
_TIMEOUT_S = 600


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--simulate-here", action="store_true", default=False, help="simulate a device in this process"
    )
    parser.addoption("--simulated-reports", type=Path, default=None, help="a file to write reports to")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and not _is_here(config):
            item.add_marker(pytest.mark.timeout(_TIMEOUT_S))


def _is_here(config: pytest.Config) -> bool:
    return bool(config.getoption("--simulate-here"))


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if _is_here(item.config) or HERE not in item.path.parents:
        return None
    reports = item.config.stash.get(_REPORTS, None)
    if reports is None:
        reports = item.config.stash[_REPORTS] = _run(item.session)
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports[item.nodeid]:
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run(session: pytest.Session) -> dict[str, list[Any]]:
    """Runs the session's tests of this folder in a child; the reports of each."""
    config = session.config
    chosen = [item.nodeid for item in session.items if HERE in item.path.parents]
    file = config._tmp_path_factory.mktemp("simulated") / "reports"  # type: ignore[attr-defined]
    options = ["--simulate-here", "--simulated-reports", str(file), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "--rootdir", str(config.rootpath), *options, *chosen]
    done = subprocess.run(command, cwd=config.rootpath, capture_output=True, text=True, check=False)
    found: dict[str, list[Any]] = {nodeid: [] for nodeid in chosen}
    for line in file.read_text().splitlines() if file.exists() else ():
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)  # of a skipped test; JSON has no tuples
        found[report.nodeid].append(report)
    for nodeid, reports in found.items():
        if not any(report.when == "teardown" for report in reports):
            what = f"the simulated device's process ended with {done.returncode}: {done.stdout}{done.stderr}"
            reports.append(pytest.TestReport(nodeid, ("", None, ""), {}, "failed", what, "setup"))
    return found


class _Reporter:
    def __init__(self, config: pytest.Config, file: Path) -> None:
        self._config = config
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with self._file.open("a") as lines:
            lines.write(json.dumps(data) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--simulated-reports")
    if file is not None:
        config.pluginmanager.register(_Reporter(config, file))


@pytest.fixture(scope="session")
def _registered() -> Any:
    from .backend import register

    return register()


@pytest.fixture
def device(_registered: Any) -> Iterator[Any]:
    """The simulation; its device is "simulated"."""
    from .backend import simulated

    with simulated() as simulation:
        yield simulation


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Random models by name: see `stacks.Folders`."""
    from tests.models.tiny_models import make

    @cache
    def folder(model: str) -> Path:
        path = tmp_path_factory.mktemp(model)
        make(model).save_pretrained(path)
        return path

    return folder
