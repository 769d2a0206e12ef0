"""The exercises of NOTES.md, each done on a copy of the program with the bundled model."""

import re

import pytest

from conftest import ROOT
from extras.tools.exercises import EXERCISES


@pytest.mark.slow
@pytest.mark.parametrize("title", EXERCISES)
def test_exercise(title):
    EXERCISES[title]()


def test_the_notes_have_the_same():
    notes = (ROOT / "NOTES.md").read_text(encoding="utf-8")
    text = notes.split("## Exercises")[1].split("\n## ")[0]
    assert re.findall(r"^\d+\. \*\*(.+)\.\*\*", text, re.M) == list(EXERCISES)
