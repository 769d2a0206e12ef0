"""tiny_sd.ipynb is made of NOTES.md and tiny_sd.py, and runs from first to last cell."""

import os

import pytest

from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
from extras import notebook  # noqa: E402

PATH = ROOT / "tiny_sd.ipynb"


def made():
    return notebook.make((ROOT / "NOTES.md").read_text(encoding="utf-8"),
                         (ROOT / "tiny_sd.py").read_text(encoding="utf-8"))


def test_it_is_as_new_as_its_sources():
    """If not, run python -m extras.notebook."""
    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(PATH, 4).cells]
    assert cells == [(cell.cell_type, cell.source) for cell in made().cells]


def test_it_holds_each_definition_of_the_file_once():
    source = (ROOT / "tiny_sd.py").read_text(encoding="utf-8")
    _, sections = notebook.definitions(source)
    code = [cell.source for cell in made().cells if cell.cell_type == "code"]
    for definition in (d for section in sections for d in section):
        assert code.count(definition.source) == 1, definition.names


def test_its_mathematics_is_a_notebooks():
    text = "\n".join(cell.source for cell in made().cells if cell.cell_type == "markdown")
    assert "$`" not in text and "```math" not in text and text.count("$$") % 2 == 0
    assert PATH.stat().st_size < 2_000_000


@pytest.mark.slow
def test_it_runs(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    book = nbformat.read(PATH, 4)
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(ROOT)}}).execute()
    pictures = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
                if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
