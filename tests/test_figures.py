"""The pictures of NOTES.md, drawn again, and the small trainings behind some of them."""

import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import tiny_sd as sd
from conftest import ROOT

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
from extras.tools import benchmark, figures, moons  # noqa: E402


def test_the_documents_show_every_picture():
    """Those of figures.py once, and the others of extras/pictures somewhere; all of them small."""
    text = "".join((ROOT / name).read_text(encoding="utf-8")
                   for name in ("NOTES.md", "extras/REFERENCE.md", "README.md"))
    shown = re.findall(r"!\[.+?\]\((?:extras/)?pictures/(\w+)\.png\)", text)
    files = sorted(ROOT.glob("extras/pictures/*"))
    assert sorted({*shown}) == [path.stem for path in files]
    assert all(shown.count(name) == 1 for name in figures.PICTURES)
    assert max(path.stat().st_size for path in files) < 250e3


@pytest.mark.parametrize("module", ["figures", "notebook"])
def test_help_draws_and_writes_nothing(module):
    before = {path: path.stat().st_mtime_ns for path in ROOT.glob("extras/pictures/*")}
    before[ROOT / "tiny_sd.ipynb"] = (ROOT / "tiny_sd.ipynb").stat().st_mtime_ns
    done = subprocess.run([sys.executable, "-m", f"extras.tools.{module}", "--help"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and f"python -m extras.tools.{module}" in done.stdout
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_full_disk_leaves_the_old_picture(tmp_path):
    """Here a limit on file sizes."""
    path, limits = tmp_path / "flow.png", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("the old one")
    figure, _ = figures.plot()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(sd.UserError, match="cannot be written"):
            figures.save(figure, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "the old one" and len([*tmp_path.iterdir()]) == 1


@pytest.mark.slow
def test_a_benchmark_reads_and_replaces_nobodys_files(tmp_path, monkeypatch, capsys):
    """What another user put where the random model belongs, and results of an earlier run."""
    def arguments(*options):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--width", "32", *options])
        return benchmark.parse_arguments()

    monkeypatch.setattr(benchmark.tempfile, "tempdir", str(tmp_path))
    folder = benchmark.random_model(arguments())
    assert [*tmp_path.iterdir()] == [folder] == [benchmark.random_model(arguments())]
    if os.getuid() == 0:        # only root can make links that are another's
        folder.rename(tmp_path / "mine")
        folder.symlink_to("mine")
        os.lchown(folder, 1, 1)
        with pytest.raises(benchmark.Failure, match="is another user's"):
            benchmark.random_model(arguments())
    monkeypatch.setattr(os, "getuid", lambda: -1)
    with pytest.raises(benchmark.Failure, match="is another user's"):
        benchmark.random_model(arguments())
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(SystemExit):
        arguments("--json", str(tmp_path / "old.json"))
    assert "old.json exists already" in capsys.readouterr().err
    args = arguments("--json", str(tmp_path / "new.json"))
    (tmp_path / "new.json").write_text("mine")      # it came meanwhile
    with pytest.raises(FileExistsError):
        with benchmark.reserved(args.json):
            pass
    assert (tmp_path / "new.json").read_text() == "mine"
    for text in "", "{}":       # without results nothing is left
        with benchmark.reserved(tmp_path / "next.json") as file:
            file.write(text)
            file.flush()
        assert (tmp_path / "next.json").exists() == bool(text)


@pytest.mark.slow
def test_pictures_can_be_drawn_again(tmp_path, monkeypatch):
    """With fewer steps, each looks much like the picture in NOTES.md.

    The film has all steps, since its frames are steps, and those of "a fox" alone look less
    similar.
    """
    figures.main(["film"], tmp_path)
    steps = sd.evenly_spaced_steps
    monkeypatch.setattr(sd, "evenly_spaced_steps", lambda n, levels: steps(min(n, 10), levels))
    for name in ("CLIP_STEPS", "MOON_STEPS", "UNET_STEPS"):
        monkeypatch.setattr(figures, name, 8)
    figures.main(figures.PICTURES.keys() - {"film"}, tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == figures.PICTURES.keys()
    for path in tmp_path.iterdir():
        pictures = [Image.open(found) for found in (path, figures.FOLDER / path.name)]
        assert pictures[0].height == pictures[1].height
        grey = [np.asarray(picture.convert("L").resize((64, 64))).ravel() for picture in pictures]
        limit = {"film": 0.95, "training": 0.35}.get(path.stem, 0.8)
        assert np.corrcoef(grey)[0, 1] > limit, path.stem


@pytest.mark.slow
def test_the_small_training_learns(monkeypatch):
    """It begins at a loss of about 1, that of always answering 0, with samples on the way."""
    monkeypatch.setattr(figures, "UNET_STEPS", 60)
    model = sd.load("weights/emoji")
    losses, drawn = figures.training(model, ["a cat", "a rocket"], 30)
    assert losses[0] == pytest.approx(1, abs=0.25)
    assert np.mean(losses[-20:]) < 0.8 * losses[0]
    assert [*drawn] == [0, 30, 60]
    width, height = figures.picture_size(model)
    assert all(picture.shape == (height, width, 3) for samples in drawn.values()
               for picture in samples)


@pytest.mark.slow
def test_the_matrix_of_clip(monkeypatch):
    """Eight drawings in a style that was not shown: most captions find theirs, in fewer steps."""
    monkeypatch.setattr(figures, "CLIP_STEPS", 240)
    captions, scores = figures.clip_scores(sd.load("weights/emoji"))
    chosen = [captions.index(name) for name in figures.PAIRS]
    assert (scores[chosen][:, chosen].argmax(1) == range(8)).sum() >= 6
    assert scores[chosen, chosen].mean() > scores.mean() + 0.5


# ── The two moons ───────────────────────────────────────────────────────────────────────────────


def test_the_exact_guess_is_the_score_of_the_blurred_points():
    """By the difference quotient of log q(x_t), for three points as the only pictures."""
    points = np.random.default_rng(0).standard_normal((3, 2))
    alpha_bar, x, h = 0.4, np.array([[0.3, -0.2]]), 1e-5

    def log_q(x):
        return np.log(np.exp(-np.square(x - alpha_bar ** 0.5 * points).sum(1)
                             / (2 * (1 - alpha_bar))).sum())
    slope = [(log_q(x + step) - log_q(x - step)) / (2 * h) for step in h * np.eye(2)]
    _, eps = moons.exact_denoiser(points)(x, 0, alpha_bar)
    np.testing.assert_allclose(-eps[0] / (1 - alpha_bar) ** 0.5, slope, rtol=1e-6)


@pytest.mark.slow
def test_the_network_of_the_moons_learns_the_exact_arrows():
    rng = np.random.default_rng(0)
    weights = moons.new_network(rng)
    losses = [*moons.train(weights, lambda n: moons.two_moons(n, rng)[0], 1500, rng)]
    assert np.mean(losses[-100:]) < 0.8 * np.mean(losses[:20])
    points, _ = moons.two_moons(1000, rng)
    learnt, exact = moons.learnt_denoiser(weights), moons.exact_denoiser(points)
    for t in (250, 600):
        alpha_bar = moons.ALPHA_BARS[t]
        x = sd.add_noise(points, alpha_bar, rng.standard_normal(points.shape))
        (guess, _), (mean, _) = (f(x, t, alpha_bar) for f in (learnt, exact))
        assert np.square(guess - mean).mean() < 0.02 * np.square(x - mean).mean()
    *_, x = sd.ddim(learnt, rng.standard_normal((300, 2)),
                    sd.evenly_spaced_steps(30, moons.ALPHA_BARS))
    nearest = np.sqrt(np.square(x[:, None] - points).sum(-1)).min(1)
    assert np.mean(nearest < 0.25) > 0.75


def test_guidance_narrows_what_is_drawn():
    """With w = 8 the points of the upper moon vary less, and are further from the lower one."""
    rng = np.random.default_rng(1)
    points, upper = moons.two_moons(600, rng)
    nothing, caption = moons.exact_denoiser(points), moons.exact_denoiser(points[upper])

    def drawn(w):
        def guided(x, t, alpha_bar):
            eps = sd.guide(nothing(x, t, alpha_bar)[1], caption(x, t, alpha_bar)[1], w)
            return sd.split_prediction("epsilon", eps, x, alpha_bar)
        *_, x = sd.ddim(guided, np.random.default_rng(0).standard_normal((150, 2)),
                        sd.evenly_spaced_steps(25, moons.ALPHA_BARS))
        return x
    loose, tight = drawn(1), drawn(8)
    assert tight.std(0)[0] < 0.7 * loose.std(0)[0]
    assert tight.mean(0)[0] < loose.mean(0)[0] - 0.4        # the lower moon is on the right
