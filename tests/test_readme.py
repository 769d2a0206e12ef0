"""README.md's Python code runs unchanged, and the files and options that it names exist."""

import ast
import contextlib
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

import tiny_sd
from conftest import ROOT
from extras import cli, formats, like_diffusers, show
from helpers import TWO_ENCODERS, own_lines, write_model
from helpers_cli import write_lora

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The names that the examples define, run one after another in a different folder."""
    names = {}
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[1:]:
            exec(block, names)
    return names


@pytest.mark.slow
def test_the_library_example(ran):
    assert ran["pictures"].shape == (2, 128, 128, 3) and ran["pictures"].dtype == np.uint8
    assert len(ran["guesses"]) == 20


@pytest.mark.slow
def test_heun_is_of_second_order(ran):
    """In the two-picture world of NOTES §6, twice the steps leave about a quarter of the error."""
    def denoise(x, t, alpha_bar):
        x_0 = np.tanh(x * alpha_bar ** 0.5 / (1 - alpha_bar))
        return x_0, (x - alpha_bar ** 0.5 * x_0) / (1 - alpha_bar) ** 0.5

    def walk(n):
        levels = (1 / (1 + np.geomspace(5, 0.5, n + 1) ** 2)).tolist()
        steps = [(0, *pair) for pair in zip(levels, levels[1:])]
        *_, x = ran["heun"](denoise, np.array([0.3, 1.2]), steps)
        return x

    exact = walk(2048)
    coarse, fine = abs(walk(32) - exact).max(), abs(walk(64) - exact).max()
    assert 3 < coarse / fine < 5


def test_the_layer_shown_is_the_layer():
    """Except for its docstring."""
    shown = ast.parse(re.search(r"```python\n(def resnet.*?)```", TEXT, re.DOTALL)[1]).body[0]
    layer = ast.parse(inspect.getsource(tiny_sd.resnet)).body[0]
    layer.body = layer.body[1:]
    assert ast.dump(shown) == ast.dump(layer)


def test_a_program_in_another_folder_finds_the_library(tmp_path):
    """With PYTHONPATH, as in the README."""
    (tmp_path / "mine.py").write_text("import tiny_sd; print(tiny_sd.load('emoji').name)")
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "emoji\n" and "PYTHONPATH=path/to/tiny_sd python" in TEXT, done.stderr


def test_links_and_options_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
    options = cli.option_parser().options
    known = ["--help", *(flag for option in options for flag in option.option_strings)]
    commands = [line for line in TEXT.split("\n") if "python tiny_sd.py" in line]
    for flag in set(re.findall(r" (--[a-z-]+|-[a-zA-Z])\b", "\n".join(commands))):
        assert flag in known, flag


def test_what_it_runs_is_there():
    """Each file, module and test that a command names."""
    for module in set(re.findall(r"python -m ([a-z_.]*[a-z_])", TEXT)) - {"venv"}:
        assert importlib.util.find_spec(module), module
    for file in re.findall(r"python ([\w/]+\.py)", TEXT):
        assert file == "your_program.py" or (ROOT / file).exists(), file
    for folder, names in re.findall(r"(tests/)(test_[\w{},]+)\.py", TEXT):
        before, _, choice = names.rstrip("}").partition("{")
        for name in choice.split(","):
            assert (ROOT / folder / f"{before}{name}.py").exists(), names


RECIPES = {"lightning": "EulerDiscreteScheduler", "Hyper": "DDIMScheduler",
           "pytorch_lora": "LCMScheduler"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_for_few_steps(name, tmp_path, monkeypatch, command):
    """They use the times of diffusers' scheduler, and no guidance."""
    diffusers = pytest.importorskip("diffusers")
    line, = re.findall(
        rf"python tiny_sd.py (.* --lora \S*{name}.*)", TEXT)
    words = shlex.split(line)
    values = dict(zip(words[1::2], words[2::2]))
    monkeypatch.chdir(tmp_path)
    write_lora(values["--lora"])
    config = {"config": TWO_ENCODERS} if values["-m"] == "sdxl" else {}
    words[words.index("-m") + 1] = write_model(tmp_path / "model", **config)

    times = []
    with show.watching(predict=lambda y, model, x, t, *_: times.append((len(y), int(t)))):
        status, (picture,), err = command(*words)
    assert status == 0 and own_lines(err) == []
    reference = getattr(diffusers, RECIPES[name])(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        **{"timestep_spacing": "trailing"} if "--scheduler" in values else {})
    reference.set_timesteps(int(values["--steps"]))
    assert times == [(1, int(t)) for t in reference.timesteps]
    without = [*words[:3], *words[5:]]
    assert "--lora" not in without
    plain = command(*without)[1][0]
    assert np.ptp(np.asarray(Image.open(picture)).astype(int) - np.asarray(Image.open(plain))) > 0


def test_the_librarys_functions_say_what_they_take_and_give(tmp_path):
    """The annotations of load, generate and others match the types in a run."""
    folder, hints = write_model(tmp_path / "tiny"), typing.get_type_hints
    for load in tiny_sd.load, formats.load:
        model = load(folder)
        assert isinstance(folder, hints(load)["path"]) and isinstance(model, hints(load)["return"])

    for generate in tiny_sd.generate, like_diffusers.generate:
        xs = generate(model, "red")
        assert hints(generate)["return"] == Iterator[np.ndarray] and isinstance(xs, Iterator)
    *_, x = xs
    picture, = tiny_sd.decode(model, x)
    assert callable(tiny_sd.denoiser(model, tiny_sd.embed_prompts(model, ["red"])[0], 1.0))
    for function, value in (tiny_sd.decode, tiny_sd.decode(model, x)), (
            tiny_sd.encode, tiny_sd.encode(model, picture, x)):
        assert isinstance(value, hints(function)["return"])
    for function in (tiny_sd.generate, like_diffusers.generate, tiny_sd.decode, tiny_sd.encode,
                     tiny_sd.embed_prompts, tiny_sd.denoiser, like_diffusers.denoiser):
        assert hints(function)["model"] is tiny_sd.Model


def test_the_project_file_agrees_with_the_program_and_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert project["version"] == tiny_sd.__version__ and {*project["dependencies"]} <= {*lines}
