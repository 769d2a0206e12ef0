"""extras/figures.py: the pictures of NOTES.md, and the two small trainings behind two of them."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import tiny_sd as sd
from conftest import ROOT
from extras import figures, like_diffusers


def test_the_notes_show_every_picture():
    """Each of those that figures.py and teach_demo.py draw, once, and all of them small."""
    notes = (ROOT / "NOTES.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[.+?\]\(extras/pictures/(\w+)\.png\)", notes)
    files = sorted(ROOT.glob("extras/pictures/*"))
    drawn = sorted([*figures.PICTURES, "overfit", "teach"])
    assert sorted(shown) == drawn == [path.stem for path in files]
    assert max(path.stat().st_size for path in files) < 250e3


@pytest.mark.parametrize("module", ["figures", "notebook"])
def test_help_draws_and_writes_nothing(module):
    before = {path: path.stat().st_mtime_ns for path in ROOT.glob("extras/pictures/*")}
    before[ROOT / "tiny_sd.ipynb"] = (ROOT / "tiny_sd.ipynb").stat().st_mtime_ns
    done = subprocess.run([sys.executable, "-m", f"extras.{module}", "--help"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and f"python -m extras.{module}" in done.stdout
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def draw_pictures(folder, monkeypatch):
    """Draw all pictures, from the bundled model, with fewer steps."""
    generate = like_diffusers.generate
    monkeypatch.setattr(sd, "generate", lambda *args, **settings: generate(
        *args, **{**settings, "steps": 20 if "init" in settings else 5}))
    monkeypatch.setattr(figures, "CLIP_STEPS", 3)
    monkeypatch.setattr(figures, "UNET_STEPS", 8)
    figures.draw_pictures(folder)
    return {path.stem: np.asarray(Image.open(path)) for path in folder.iterdir()}


@pytest.mark.slow
def test_pictures_can_be_drawn_again(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pictures = draw_pictures(tmp_path / "pictures", monkeypatch)
    assert pictures.keys() == figures.PICTURES.keys()
    assert all(np.ptp(picture) > 100 for picture in pictures.values())


@pytest.mark.slow
def test_without_torch_the_others_are_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    pictures = draw_pictures(tmp_path / "pictures", monkeypatch)
    assert figures.PICTURES.keys() - pictures.keys() == {"clip", "training"}
    said = capsys.readouterr().out
    assert all(f"{name}.png is left as it is" in said for name in ("clip", "training"))


@pytest.mark.slow
def test_the_small_training_learns(monkeypatch):
    """It begins at a loss of about 1, that of always answering 0, with samples on the way."""
    pytest.importorskip("torch")
    monkeypatch.setattr(figures, "UNET_STEPS", 120)
    losses, drawn = figures.training(sd.load("weights/emoji"), ["a cat", "a rocket"], 60)
    assert losses[0] == pytest.approx(1, abs=0.25)
    assert np.mean(losses[-20:]) < 0.8 * losses[0]
    assert [*drawn] == [0, 60, 120]
    assert all(sample.size == (64, 64) for samples in drawn.values() for sample in samples)


@pytest.mark.slow
def test_the_matrix_of_clip():
    """Eight drawings in a style that was not shown: most captions find theirs, at first few."""
    pytest.importorskip("torch")
    before, after = figures.clip_scores(sd.load("weights/emoji"))
    names = [*figures.drawings("noto")]
    chosen = [names.index(name) for name in figures.PAIRS]
    found = [(scores[chosen][:, chosen].argmax(1) == range(8)).sum() for scores in (before, after)]
    assert found[0] <= 3 and found[1] >= 6
    assert after[chosen, chosen].mean() > after.mean() + 0.5
