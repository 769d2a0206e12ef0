"""The exercises of NOTES.md: solutions pass, wrong ones fail, and changes do as the answers say."""

import re

import numpy as np
import pytest

import tiny_sd as sd
from conftest import ROOT
from extras.tools import exercises
from extras.tools.exercises import BROKEN, BUILT


@pytest.mark.parametrize("title", [pytest.param(title, marks=pytest.mark.slow) if title
                                   == "Two pictures, learnt" else title for title in BUILT])
def test_a_solution_passes(title):
    solution, check = BUILT[title]
    check(solution)


def late_noise(denoise, x, steps):
    """Mix for the level just left."""
    for t, alpha_bar, _ in steps:
        x = sd.add_noise(*denoise(x, t, alpha_bar)[:1], alpha_bar, denoise(x, t, alpha_bar)[1])
        yield x


WRONG = {
    "Two steps by hand": lambda: (0.9 * 0.9 - 0.5 * 0.19 ** 0.5, 0.81 ** 2, -0.5),
    "A sampler": late_noise, "A schedule": lambda: np.cos(np.linspace(0, 1, 1000) * np.pi / 2) ** 2,
    "The negative prompt's role, swapped": lambda uncond, cond, negative, scale, other: negative
    + scale * (cond - negative), "Every shape": lambda: ([(32, 32, 320)] * 10, 32 * 32),
    "Two pictures, learnt": lambda: lambda x, t, alpha_bar: (np.sign(x), None)}


@pytest.mark.parametrize("title", BUILT)
def test_a_wrong_solution_fails(title):
    with pytest.raises(AssertionError):
        BUILT[title][1](WRONG[title])


@pytest.mark.slow
@pytest.mark.parametrize("title", BROKEN)
def test_a_change_does_as_the_answers_say(title):
    BROKEN[title]()


def test_the_notes_have_the_same():
    text = (ROOT / "NOTES.md").read_text(encoding="utf-8")
    text = text.split("## Exercises")[1].split("\n## ")[0]
    assert re.findall(r"^\d+\. \*\*(.+)\.\*\*", text, re.M) == [*BUILT, *BROKEN]
    answers = (ROOT / "extras/REFERENCE.md").read_text(encoding="utf-8").split("**Broken.**")[1]
    assert re.findall(r"^\d+\. \*\*(.+)\.\*\*", answers, re.M) == [*BROKEN]


def test_the_answers_are_those_of_the_solutions():
    answers = (ROOT / "extras/REFERENCE.md").read_text(encoding="utf-8")
    x, _, eps = exercises.two_steps()
    assert f"= {x:.5f}" in answers and f"= {eps:.5f}" in answers
    half = abs(exercises.cosine_schedule() - 0.5).argmin()
    assert f"at $`t = {half}`$" in answers
    assert f"{exercises.every_shape()[1]:,}".replace(",", "{,}") in answers
