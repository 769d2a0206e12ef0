"""Prompts from lists and tables (extras/choices.py)."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from extras import choices, cli
from helpers_cli import *  # noqa: F403
from tiny_sd import UserError


@pytest.fixture(autouse=True)
def lists(here):
    Path("lists/animals").mkdir(parents=True)
    Path("lists/colour.txt").write_text("# of paint\nred\n\n blue \n__shade__ green\n")
    Path("lists/shade.txt").write_text("dark\nlight\n")
    Path("lists/empty.txt").write_text("# none\n")
    Path("lists/self.txt").write_text("a __self__\n")
    Path("lists/animals/cats.txt").write_text("tiger\n")
    Path("lists/animals/dogs.txt").write_text("wolf\n")
    Path("styles.csv").write_bytes(
        "\ufeffname,prompt,negative_prompt\nfilm,\"a {prompt}, {prompt} on film\",digital\n"
        "ink,\"ink, black\",\nplain,,\n".encode())
    Path("broken.csv").write_bytes(b'name\n"\0')


def all_choices(text):
    return {choices.choose(text, seed, "lists") for seed in range(60)}


def test_a_list_is_read_once(monkeypatch):
    """It may have a million lines, and the prompt may name it a thousand times."""
    read, files = choices.read_text, []
    monkeypatch.setattr(choices, "read_text", lambda file: files.append(file) or read(file))
    words = choices.choose("__shade__ __colour__ " * 100, 0, "lists").split()
    assert {*words} == {"dark", "light", "red", "blue", "green"} and len(files) == 2


def test_small_seeds_do_not_choose_alike():
    assert len({choices.choose("{a|b|c}", seed, "lists") for seed in range(1, 9)}) == 3


@pytest.mark.parametrize("text, chosen", [
    ("a {x|y z|} b", {"a x b", "a y z b", "a  b"}), ("{a|{b|c}}", {"a", "b", "c"}),
    ("__colour__ cat", {"red cat", "blue cat", "dark green cat", "light green cat"}),
    ("__animals/*__", {"tiger", "wolf"}), ("__shade__-__shade____animals/cats__", {
        "dark-darktiger", "dark-lighttiger", "light-darktiger", "light-lighttiger"}),
    ("{__shade__|x}", {"dark", "light", "x"}),
    ("a {b} _c_ [d|e]", {"a {b} _c_ [d|e]"})])
def test_all_choices_come_and_no_others(text, chosen):
    assert all_choices(text) == chosen
    assert choices.choose(text, 7, "lists") == choices.choose(text, 7, "lists")


@pytest.mark.parametrize("text, prompt, negative", [
    ("film", "a cat, cat on film", "bad, digital"), ("ink", "cat, ink, black", "bad"),
    ("plain", "cat", "bad")])
def test_styles(text, prompt, negative):
    assert choices.with_style("cat", "bad", "styles.csv", text) == (prompt, negative)
    assert choices.with_style("cat", None, "styles.csv", "ink")[1] is None


def test_a_wide_table_takes_little(here):
    """A DictReader would fill in 60,000 columns of each row."""
    Path("wide.csv").write_text("name,prompt," + "," * 60_000 + "\n" + "a,b\n" * 20_000 + "x,y\n")
    start = time.process_time()
    assert choices.with_style("cat", None, "wide.csv", "x") == ("cat, y", None)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("line, said", [
    ("a cat --lora " + "a" * 10 ** 6, "a line has 1000013 characters"),
    ("a cat " + "-s1 " * 10_000, "more than 200 flags"),
    ("--prompt x " + "-s1 " * 10_000, "more than 200 flags")])
def test_a_line_without_end_is_refused_at_once(line, said):
    start = time.process_time()
    with pytest.raises(UserError, match=said):
        choices.split_line(line)
    assert time.process_time() - start < 5


def test_styles_of_styles_have_a_limit(here):
    """A row of 130 kB, twice, made a prompt of a gigabyte."""
    Path("s.csv").write_text(f"name,prompt,negative_prompt\na,{'{prompt}' * 100},\n"
                             f"b,{'{prompt}' * 101},\n")
    for name, said in ("a", "in one word: at most"), ("b", "b repeats {prompt} more than 100"):
        args = SimpleNamespace(styles=[("s.csv", name)] * 3, wildcards=None)
        with pytest.raises(UserError, match=said):
            choices.made(["cat", None], args)


def test_what_was_chosen_is_recorded(run):
    from PIL import Image

    from helpers_cli import parse
    job = cli.make_job(["{red|apple} {1|2|3}", "-s", "5", "--wildcards", "lists"])
    flags = ["--wildcards", "lists", "--styles", "styles.csv", "ink", "-s", "5"]
    _, out, err = run("{red|apple} {1|2|3}", *flags)
    assert parse(Image.open(out[0]))[:2] == (f"{job.prompt}, ink, black", "")
    assert not any("read as plain text" in line for line in err) and "{" not in job.prompt
    assert run("x {1|2|3|4}", "--wildcards", "lists", "--grid", "seed=1,2,3")[0] == 0
    assert len({parse(Image.open(f"out-000{i}.png"))[0] for i in (1, 2, 3)}) > 1


@pytest.mark.parametrize("argv, said", [
    (["__color__", "--wildcards", "lists"], "did you mean colour?"),
    (["__empty__", "--wildcards", "lists"], "that list is empty"),
    (["__self__", "--wildcards", "lists"], "does a list name itself?"),
    (["__../styles__", "--wildcards", "lists"], "no such list"),
    (["a", "--wildcards", "none"], "--wildcards none is not a folder"),
    (["a", "--styles", "styles.csv", "fim"], "did you mean film?"),
    (["a", "--styles", "none.csv", "film"], "none.csv cannot be read"),
    (["a", "--styles", "broken.csv", "film"], "broken.csv")])
def test_lists_that_are_not_there(refuse, argv, said):
    assert said in refuse(*argv)


def test_files_by_name_in_a_folder_of_models(refuse, here):
    names = {"Stable-diffusion/m.safetensors", "Lora/l.safetensors", "loras/k.pt", "vae/v.pt",
             "../embeddings/e.pt", "ControlNet/c.safetensors"}      # as in the web UI
    for name in names:
        path = here / "web" / "models" / name
        path.parent.mkdir(parents=True)
        path.touch()
    job = cli.make_job(["a <lora:l:0.5>", "-m", "m", "--lora", "k:2", "--vae", "v", "--embedding",
                        "e", "--control", "c:0.7", "x.png", "--models-dir", "web/models"])
    found = {job.model, job.vae, *job.embedding, *(file for file, _ in job.lora), job.control[0][0]}
    assert {os.path.relpath(file, "web/models") for file in found} == names
    assert job.control[0][1:] == (0.7, "x.png") and [weight for _, weight in job.lora] == [2, 0.5]
    assert refuse("a", "--models-dir", "none") == "tiny_sd: --models-dir none is not a folder"
