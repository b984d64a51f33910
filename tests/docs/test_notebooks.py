"""The notebooks run from top to bottom, with a small random model in the place of a real one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.checkpoints import save_llama
from tests.cli.tokenizers_of_tests import characters

pytest.importorskip("hivemind")

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
#: Without the tokenizer's end: a random model would sample it now and then, and say nothing.
BYTES = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("notebooks") / "tiny", blocks=4, vocabulary=BYTES)
    characters().save_pretrained(folder)
    return folder


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def run(name: str, settings: dict[str, object], folder: Path) -> Any:
    """The notebook with its outputs, after its cell of settings was followed by these."""
    notebook = read(name)
    (place,) = (n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def printed(notebook: Any) -> str:
    """All that the cells wrote on stdout."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(
        output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_kept_without_outputs(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert set(cell.metadata) <= {"tags", "cellView"}


def test_quickstart(model: Path, tmp_path: Path) -> None:
    text = printed(run("quickstart", {"MODEL": str(model)}, tmp_path))
    assert "local-1 serves blocks 0:2\nlocal-2 serves blocks 2:4\n" in text
    assert "you -> local-1 0:2 -> local-2 2:4 -> you" in text
    assert "tokens are held by you -> local-1" in text
    assert "> And of Italy?" in text
    (answer,) = re.findall(r"talk at http://127\.0\.0\.1:\d+, look at .*/swarm\n(.+)", text, re.DOTALL)
    assert len(answer) > 10


def test_fine_tune(model: Path, tmp_path: Path) -> None:
    notebook = run("fine_tune", {"MODEL": str(model), "STEPS": 12}, tmp_path)
    losses = re.findall(r"loss: ([\d.]+) before, ([\d.]+) after", printed(notebook))
    assert len(losses) == 2
    assert all(float(after) < float(before) - 0.1 for before, after in losses)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    saved = {path.name for path in (tmp_path / "crocodile").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
