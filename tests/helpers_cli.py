"""Helpers for tests of the command line: a runner, and a parser for what pictures record.

`from helpers_cli import *` imports the fixtures; `here` gives each test its own folder.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from helpers import contents, launch, own_lines, write_model

__all__ = ["model", "here", "run", "draw", "refuse"]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run each test in a new folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(model, command):
    """run(argument, ...) -> (status, lines on stdout, lines on stderr); run.bare: no --model"""
    def run(*argv):
        return command("--model", model, "--steps", "2", *argv)

    run.bare, run.model = command, str(model)
    return run


@pytest.fixture
def draw(run):
    """draw(argument, ...) -> the one picture drawn"""
    def draw(*argv):
        status, out, _ = run(*argv)
        assert status == 0 and len(out) == 1
        return Image.open(out[0])
    return draw


@pytest.fixture
def refuse(run):
    """refuse(argument, ...) -> the one line that says why.

    There must be no other line, and no new file.
    """

    def refuse(*argv):
        before = contents()
        status, out, err = run(*argv)
        assert status == 2 and out == [] and contents() == before
        assert len(err) == 1 and err[0].startswith("tiny_sd: ")
        return err[0]
    return refuse


def pixels(picture):
    return np.asarray(picture).astype(int)


def parse(picture):
    """(prompt, negative prompt, {fact: value}), as other programs read a PNG's `parameters`."""
    above, line = picture.text["parameters"].rsplit("\n", 1)
    prompt, negative = above.rsplit("\nNegative prompt: ", 1)
    return prompt, negative, dict(re.findall(r"\s*(\w[\w -]+): ([^,]*)(?:,|$)", line))


RNG = np.random.default_rng(0)
PLAIN = Image.fromarray(RNG.integers(256, size=(16, 24, 3), dtype=np.uint8))


def change(name, **settings):
    """Set keys of a config; remove those whose value is None."""
    def edit(folder):
        config = json.loads((folder / name).read_text()) | settings
        (folder / name).write_text(
            json.dumps({key: value for key, value in config.items() if value is not None}))

    return edit


SCHEDULER = "scheduler/scheduler_config.json"


def start(*argv, without=()):
    """Start the program in a process for which some packages are not installed."""
    for name in without:
        Path("lacking").mkdir(exist_ok=True)
        Path("lacking",
             f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')")
    return launch(*argv, PYTHONPATH="lacking")


def write_facts(name, text):
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(name, pnginfo=info)


def cli_lines(run, *argv, model=True):
    """run(), with only this program's own lines on stderr."""
    status, out, err = run(*argv) if model else run.bare(*argv)
    return status, out, own_lines(err)


def write_lora(path):
    name = "lora_unet_mid_block_resnets_0_conv1"
    save_file({f"{name}.lora_down.weight": np.ones((1, 16, 3, 3), np.float32),
               f"{name}.lora_up.weight": np.ones((16, 1, 1, 1), np.float32)}, "l.safetensors")
    os.replace("l.safetensors", path)
