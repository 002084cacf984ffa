"""The notebook of the docs runs from its first cell to its last, and shows what it says."""

from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "docs" / "notebooks" / "first_hour.ipynb"


def test_the_notebook_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.matrix
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (steps,) = [cell for cell in notebook.cells if "STEPS = 300" in cell.source]
    steps.source = steps.source.replace("STEPS = 300", "STEPS = 20")  # that it runs is shown; not what it learns
    kernel = AsyncKernelManager(transport="ipc")  # files in a folder of its own, not ports
    kernel.ip = str(tmp_path / "kernel")
    client = NotebookClient(notebook, timeout=None, km=kernel, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = ["".join(out.get("text", "") for out in cell.get("outputs", [])) for cell in notebook.cells]
    assert sum("exact match" in text for text in outputs) == 1
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))
    assert (tmp_path / "runs" / "notebook_concept" / "report.html").is_file()
