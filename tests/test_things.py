"""What a model says it knows: --things, and the line on a prompt that names nothing of it."""

import json
import os
import time
from pathlib import Path

import pytest

from extras import cli, things
from helpers import write_model

KNOWN = {"things": [["cat", "kitty"], ["hot dog"], ["rocket"]], "styles": ["blob", "flat"],
         "backgrounds": ["red", "light blue"], "places": ["on the left"]}


@pytest.fixture
def model(tmp_path):
    folder = write_model(tmp_path / "m")
    (folder / "things.json").write_text(json.dumps(KNOWN), encoding="utf-8")
    return folder


@pytest.mark.parametrize("prompt, known", [
    ("a cat", True), ("Kitty in the blob style", True), ("two HOT  dogs? a hot dog!", True),
    ("rocket", True), ("", True), ("hot", False), ("astronaut riding a horse", False),
    ("a category", False)])
def test_a_prompt_is_known_if_it_names_a_thing(prompt, known):
    said = [line for line in things.remarks(KNOWN, prompt) if "--things" in line]
    assert bool(said) == (not known) and all("3 things" in line for line in said)


@pytest.mark.parametrize("prompt, new", [
    ("a small cat on a light blue background", ""),
    ("kitty next to a hot dog in the flat style", ""),
    ("masterpiece, best cat", '"masterpiece", "best"'), ("(cat), rocket!", ""),
    ("a shiny cat", '"shiny"'), ("cats", '"cats" (it knows cat)'),
    ("rockte", '"rockte" (it knows rocket)'),
    ("puppies and spaceships", '"puppies", "spaceships" (it knows rocket)'),
    ("1 2 3 4 5 6 cat", '"1", "2", "3", "4", "5", ...')])
def test_words_that_were_never_learnt(prompt, new):
    it = "they" if ", " in new else "it"
    said = [f"the model never learnt {new}: {it} may spoil the picture"] if new else []
    assert [*things.remarks(KNOWN, prompt)] == said


def test_what_is_near(model, capsys):
    assert [*things.remarks(KNOWN, "something hot")] == [
        'the model knows nothing in "something hot", but hot dog: --things lists the 3 things it '
        "can draw"]
    for word, said in ("cat", "cat (kitty)\n"), ("HOT", "hot dog\n"), (
            "spaceship", "no thing has spaceship in its name; the nearest is rocket\n"), (
            "zzz", "no thing has zzz in its name\n"):
        assert cli.main(["--things", word, "-m", str(model)]) == 0
        assert capsys.readouterr().out == said


def test_a_prompt_of_many_words_takes_no_time():
    known = KNOWN | {"things": [[f"thing {i}"] for i in range(2000)]}
    start = time.process_time()
    assert len([*things.remarks(known, "a b " * 25_000)]) == 1
    assert time.process_time() - start < 3


def test_a_size_that_was_not_learnt_is_told(model, capsys, tmp_path):
    draw = ["a cat", "-m", str(model), "--steps", "1", "-o", str(tmp_path / "a.png")]
    assert cli.main(draw) == 0 and "pictures of" not in capsys.readouterr().err
    assert cli.main([*draw, "-W", "32"]) == 0
    assert "the model was trained on pictures of 16 x 16 and draws" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["🐱", "!!!"])
def test_signs_are_no_things(prompt):
    assert "--things" in [*things.remarks(KNOWN, prompt)][0]


def test_things_are_listed(model, capsys):
    assert cli.main(["--things", "-m", str(model)]) == 0
    out = capsys.readouterr().out
    assert "3 things" in out and "cat (kitty); hot dog; rocket" in out
    for word in ("blob", "light blue", "on the left"):
        assert word in out


def test_a_prompt_without_known_things_is_drawn_with_a_line(model, capsys, tmp_path):
    draw = ["-m", str(model), "--steps", "1", "-o", str(tmp_path / "a.png")]
    assert cli.main(["astronaut", *draw]) == 0
    assert "--things" in capsys.readouterr().err and (tmp_path / "a.png").exists()
    assert cli.main(["a cat", *draw]) == 0
    assert "--things" not in capsys.readouterr().err


def test_what_a_model_says_cannot_write_to_the_terminal(model, capsys):
    said = KNOWN | {"things": [["cat\x1b[31m", 7], []], "styles": ["\x07blob"]}
    (model / "things.json").write_text(json.dumps(said))
    assert cli.main(["--things", "-m", str(model)]) == 0
    out = capsys.readouterr().out
    assert "1 things" in out and "cat [31m (7)" in out and " blob" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_more_that_a_model_knows(model, capsys):
    """A model's own kinds of words, with titles, are listed, and no longer unknown."""
    more = {'colours,\x1b as in "a blue cat"': ["blue", "golden"], "media": ["a sketch of ..."]}
    (model / "things.json").write_text(json.dumps(KNOWN | {"more": more}))
    assert cli.main(["--things", "-m", str(model)]) == 0
    out = capsys.readouterr().out
    assert 'colours,  as in "a blue cat":\n  blue, golden' in out and "media:\n" in out
    known = things.known_things(model)
    assert [*things.remarks(known, "a sketch of a golden cat")] == []
    assert '"silver"' in "".join(things.remarks(known, "a silver cat"))


@pytest.mark.parametrize("text", [
    None, "[]", "{}", '{"things": 3}', "[" * 100000, json.dumps(KNOWN | {"styles": 5}),
    json.dumps(KNOWN | {"more": [3]}), json.dumps(KNOWN | {"more": {"a": 3}}), "a pipe",
    json.dumps(KNOWN | {"things": [["a name"]] * 2 ** 14})])
def test_a_model_that_does_not_say(tmp_path, capsys, text):
    folder = write_model(tmp_path / "m")
    if text == "a pipe":
        getattr(os, "mkfifo", Path.touch)(folder / "things.json")   # it would be waited for
    elif text is not None:
        (folder / "things.json").write_text(text)
    assert cli.main(["--things", "-m", str(folder)]) == 2
    assert "things.json" in capsys.readouterr().err
    output = str(tmp_path / "a.png")
    assert cli.main(["anything", "-m", str(folder), "--steps", "1", "-o", output]) == 0
    assert "--things" not in capsys.readouterr().err
