"""The example notebook runs from its first cell to its last in a kernel."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "compare.ipynb"


def output(cell: Any) -> str:
    """Return the texts of a cell's outputs, HTML too."""
    data = (found.get("data", {}) for found in cell.outputs)
    return "".join(text for kinds in data for kind, text in kinds.items() if kind.startswith("text/"))


def test_the_notebook_is_committed_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.filterwarnings("ignore")  # of the kernel's sockets
def test_the_notebook_goes_from_data_to_a_comparison(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "".join(output(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert "<progress value=" in shown and "rounds 12 of 12" in shown  # a bar that reached its end
    assert "data:image/png;base64," in shown and "History(" in shown
    assert all(name in shown for name in ("fedavg", "snip", "staged"))
    assert (tmp_path / "comparison" / "accuracy_by_bytes.png").is_file()
