"""--grid: sheets of pictures over one or two options (extras/grid.py)."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers_cli import *  # noqa: F403
from helpers_cli import parse, pixels


def test_a_sheet_of_two_options(run, draw):
    """Its cells are what single commands draw, row by row."""
    status, out, _ = run("red", "--grid", "steps=1,2,3", "cfg=1,5", "-s", "3")
    cells = [f"out-{i:04d}.png" for i in range(1, 7)]
    assert status == 0 and out == [*cells, "out.png"]
    facts = [parse(Image.open(name))[2] for name in cells]
    assert [(fact["Steps"], fact["CFG scale"]) for fact in facts] == [
        ("1", "1.0"), ("2", "1.0"), ("3", "1.0"), ("1", "5.0"), ("2", "5.0"), ("3", "5.0")]
    alone = draw("red", "-s", "3", "--steps", "2", "--cfg-scale", "5", "-o", "alone.png")
    assert abs(pixels(alone) - pixels(Image.open(cells[4]))).max() <= 1
    sheet = pixels(Image.open("out.png").convert("RGB"))
    at = np.argwhere((np.lib.stride_tricks.sliding_window_view(sheet, (16, 16, 3))[:, :, 0]
                      == pixels(Image.open(cells[4]))).all((2, 3, 4)))
    assert len(at) == 1 and (at[0] == [22 + 20, sheet.shape[1] - 16 - 20]).all()


def test_a_sheet_goes_on(run):
    """Only missing pictures are drawn, and the sheet of all."""
    grid = ["red", "--grid", "seed=1,2"]
    assert run(*grid)[1] == ["out-0001.png", "out-0002.png", "out.png"]
    before = Path("out.png").read_bytes()
    os.remove("out-0002.png")
    assert run(*grid)[1] == ["out-0002.png", "out-1.png"]
    assert run(*grid)[1] == ["out-2.png"]
    assert Path("out-1.png").read_bytes() == Path("out-2.png").read_bytes() == before
    assert [parse(Image.open(f"out-000{i}.png"))[2]["Seed"] for i in (1, 2)] == ["1", "2"]


def test_samplers_on_a_sheet(run):
    """With the names of other programs, too."""
    assert run("red", "--grid", "steps=2,3", "sampler=ddim,DPM++ 2M Karras")[0] == 0
    facts = [parse(Image.open(f"out-000{i}.png"))[2] for i in (1, 2, 3, 4)]
    assert [fact["Sampler"] for fact in facts] == 2 * ["DDIM"] + 2 * ["DPM++ 2M Karras"]


def test_pictures_of_two_sizes_and_a_seed_at_random(run):
    _, out, _ = run("red", "--grid", "width=16,32", "-s", "-1", "-o", "a {prompt}.png")
    assert out == ["a red-0001.png", "a red-0002.png", "a red.png"]
    assert len({parse(Image.open(name))[2]["Seed"] for name in out[:2]}) == 1


def test_values_that_are_no_row_of_a_table(run):
    for values in "steps=1\n2", "negative=" + "a" * 200_000:
        status, out, (line,) = run("red", "--grid", values)
        assert (status, out) == (2, []) and "--grid" in line


@pytest.mark.parametrize("axes", [("steps=1,2", "steps=3"), ("cfg=1", "guidance-scale=2"),
                                  ("merge=a,b",), ("things=fox",)])
def test_options_that_make_no_sheet(refuse, axes):
    assert "--grid" in refuse("red", "--grid", *axes)


def test_pictures_too_large_for_a_sheet(run, monkeypatch):
    """Of more pixels than Pillow reads without a warning; each is drawn, and kept."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    status, out, err = run("red", "--grid", "steps=1,2")
    assert (status, out) == (2, ["out-0001.png", "out-0002.png"])
    assert "cannot make the sheet, because a picture cannot be read back" in err[-1]
