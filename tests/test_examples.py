"""The example notebook runs from start to end and is committed with its outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "captioning.ipynb"
SMALLER = {  # replacements in the first code cell: fewer scenes and epochs
    r'SCENES = \{"train": \d+, "val": \d+, "test": \d+\}': 'SCENES = {"train": 24, "val": 6, "test": 8}',
    r"EPOCHS = \d+": "EPOCHS = 2",
}


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def text_of(notebook: Any) -> str:
    """Return the text of all outputs."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.text if output.output_type == "stream" else "".join(output.data.values()) for output in outputs]
    return "\n".join(texts)


def test_notebook_has_twelve_cells_with_outputs(notebook: Any) -> None:
    assert len(notebook.cells) == 12
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    text = text_of(notebook)
    assert "CIDEr" in text
    assert "<th>predicted</th><th>reference</th>" in text
    assert not re.search(r"Traceback|(?<![\w.])/(home|root|tmp|work|usr)/", text)
    assert NOTEBOOK.stat().st_size < 2_000_000


@pytest.mark.slow
def test_notebook_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for pattern, text in SMALLER.items():
        first.source, count = re.subn(pattern, text, first.source)
        assert count == 1, pattern
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the demo package is not installed
    folder = {"metadata": {"path": str(tmp_path)}}
    # The kernel sends the output of commands in pieces of any size.
    NotebookClient(notebook, timeout=1200, resources=folder, coalesce_streams=True).execute()
    text = text_of(notebook)
    assert "24 images" in text
    assert "2 epochs, best is epoch" in text
    assert "<figure>" in text, "the caption with its attention maps"
    report = (tmp_path / "captioning_output" / "report.html").read_text(encoding="utf-8")
    assert "<html" in report
