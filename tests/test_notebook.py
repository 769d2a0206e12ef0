"""tiny_sd.ipynb is made of NOTES.md and tiny_sd.py, has run, and shows its pictures."""

import ast
import base64
import io
import subprocess

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
from extras.tools import notebook  # noqa: E402

PATH = ROOT / "tiny_sd.ipynb"
SOURCE = (ROOT / "tiny_sd.py").read_text(encoding="utf-8")


def made():
    return notebook.make((ROOT / "NOTES.md").read_text(encoding="utf-8"), SOURCE)


def code_of(book):
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


def pictures_in(book):
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
            if "image/png" in output.get("data", {})]


def test_it_is_as_new_as_its_sources():
    """If not, run python -m extras.tools.notebook."""
    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(PATH, 4).cells]
    assert cells[1:] == [(cell.cell_type, cell.source) for cell in made().cells][1:]


def test_it_holds_each_definition_of_the_lesson_once_and_in_order():
    lesson = SOURCE[:SOURCE.index("The lesson ends here")].rpartition("\n\n")[0]
    names = [node.name for node in ast.parse(lesson).body if hasattr(node, "name")]
    ours = [node.name for code in code_of(made()) for node in ast.parse(code).body
            if hasattr(node, "name")]
    assert [name for name in ours if name in names] == names


def test_its_mathematics_is_a_notebooks():
    text = "\n".join(cell.source for cell in made().cells if cell.cell_type == "markdown")
    assert "$`" not in text and "```math" not in text and text.count("$$") % 2 == 0


def test_it_shows_its_pictures():
    book = nbformat.read(PATH, 4)
    assert len(pictures_in(book)) >= 8 and PATH.stat().st_size < 2_000_000
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")


@pytest.mark.parametrize("url, name", [
    ("https://github.com/someone/tiny_sd.git", "someone/tiny_sd"),
    ("git@github.com:someone/their-fork", "someone/their-fork"), ("/srv/git/tiny_sd", None)])
def test_its_link_is_that_of_the_repository(tmp_path, url, name):
    for command in (["init", "-q"], ["remote", "add", "origin", url]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    link = notebook.badge(tmp_path)
    assert f"colab.research.google.com/github/{name}/blob" in link if name else link == ""


@pytest.mark.slow
def test_it_runs():
    """And shows the pictures that the file shows, cell by cell."""
    book = made()
    notebook.run(book)
    ours, theirs = pictures_in(book), pictures_in(nbformat.read(PATH, 4))
    assert len(ours) == len(theirs)
    for pair in zip(ours, theirs):
        one, other = (np.asarray(Image.open(io.BytesIO(base64.b64decode(
            output["data"]["image/png"]))).convert("RGB")).astype(int) for output in pair)
        assert one.shape == other.shape and abs(one - other).mean() < 1
