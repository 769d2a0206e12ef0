"""The file alone draws and refuses; and what imports what, of all our files."""

import ast
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from helpers import write_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return a folder with tiny_sd.py, a folder of weights, a picture, and nothing else."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(ROOT / "tiny_sd.py", folder)
    write_model(folder / "tiny")
    words = write_model(folder / "wordless") / "tokenizer"
    (words / "merges.txt").unlink()
    (words / "tokenizer.json").write_text("{}")
    Image.effect_noise((16, 16), 80).convert("RGB").save(folder / "in.png")
    return folder


def run(program, folder, *argv, **environment):
    """Return (status, stdout, this program's own lines on stderr) of a program run in a folder."""
    done = subprocess.run([sys.executable, program, *argv], cwd=folder, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": ""} | environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines()
                                          if line.startswith("tiny_sd: ")]


COMMANDS = [
    "red", "-p red", "apple -n red", "red -s 12345678901234567890", "red --steps 5",
    "red --cfg-scale 3", "red --guidance-scale 1", "red --sampler euler", "red --sampler euler_a",
    "red --sampler ddim", "red --sampler ddpm", "red -W 12 -H 26", "red -i in.png",
    "red -i in.png --strength 0.5", "red -i in.png -W 20", "red --backend torch",
    "red --backend torch --device cpu --dtype bfloat16", "red --dtype float32"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_file_alone_draws_what_it_draws_with_extras(command, alone, tmp_path):
    """At most one level of 255 apart."""
    if "torch" in command:
        pytest.importorskip("torch")
    pictures = []
    for program, name in (alone / "tiny_sd.py", "alone.png"), (ROOT / "tiny_sd.py", "extras.png"):
        argv = [*command.split(), "-m", "tiny", "-o", str(tmp_path / name)]
        if "--steps" not in argv:
            argv += ["--steps", "3"]
        assert run(program, alone, *argv)[:2] == (0, f"{tmp_path / name}\n")
        pictures.append(np.asarray(Image.open(tmp_path / name)).astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 1 and pictures[0].std() > 5


REFUSED = {
    "": "prompt", "red --steps 0": "--steps 0", "red --steps x": "'x'", "red apple": "apple",
    "red --frobnicate": "--frobnicate", "red --sampler heun": "heun", "red -W 15": "--width 15",
    "red -H 2": "--height 2", "red -i none.png": "none.png", "red -i tiny": "tiny",
    "red -i in.png --strength 0": "--strength 0", "red -i in.png --strength 2": "--strength 2",
    "red -i in.png --strength 0.01": "--strength 0.01", "red -i in.png --strength nan": "nan",
    "red --cfg-scale nan": "--cfg-scale nan",
    "red --device cuda --backend numpy": "cuda",
    "red --dtype float16 --backend numpy": "float16", "red --backend jax": "jax",
    "red -o in.png": "in.png is there already", "red -o none/out.png": "there is no folder none to",
    "red -s x": "'x'", "red -m none": "none", "red -m in.png": "in.png",
    "red -m tiny/unet": "tiny/unet", "red -m wordless": "tokenizer/tokenizer.json: 'model'"}


@pytest.mark.parametrize("command", REFUSED)
def test_the_file_alone_refuses_in_one_line(command, alone):
    before = {path: path.read_bytes() for path in alone.rglob("*.*") if path.is_file()}
    argv = command.split() + ([] if "-m" in command else ["-m", "tiny"])
    status, out, err = run(alone / "tiny_sd.py", alone, *argv)
    assert (status, out, len(err)) == (2, "", 1) and REFUSED[command] in err[0], err
    after = {path: path.read_bytes() for path in alone.rglob("*.*") if path.is_file()
             if "__pycache__" not in path.parts}
    assert after == {path: data for path, data in before.items() if "__pycache__" not in path.parts}


def test_the_file_alone_has_no_model_of_its_own(alone):
    status, out, err = run(alone / "tiny_sd.py", alone, "red")
    assert (status, out, len(err)) == (2, "", 1)
    assert f"there is no folder {alone / 'weights' / 'emoji'}" in err[0]


def test_the_file_alone_overwrites_nothing(alone, tmp_path):
    (tmp_path / "out.png").write_text("mine")
    status, _, err = run(alone / "tiny_sd.py", tmp_path, "red", "-m", str(alone / "tiny"))
    assert status == 2 and err == ["tiny_sd: out.png is there already"]
    assert (tmp_path / "out.png").read_text() == "mine"


# ── What imports what ─────────────────────────────────────────────────────────────────────────────

FILES = {"tiny_sd": ROOT / "tiny_sd.py"} | {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("extras", "extras/training") for path in (ROOT / folder).glob("*.py")
    if path.stem != "__init__"
}


def imports(name, inside_functions=True):
    """Return the modules of ours that a file of ours imports, with the lines where it does."""
    tree, found = ast.parse(FILES[name].read_text(encoding="utf-8")), {}
    hidden = {node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
              for node in ast.walk(function)} if not inside_functions else set()
    for node in ast.walk(tree):
        if node in hidden or not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import says the whole name"
            names = [node.module, *(f"{node.module}.{alias}" for alias in names)]
        found |= {module: node.lineno for module in names if module in FILES}
    return found


def test_the_lesson_imports_nothing_of_ours_but_the_start_of_the_program():
    found = imports("tiny_sd")
    assert found.keys() == {"extras.start"}
    tree = ast.parse(FILES["tiny_sd"].read_text(encoding="utf-8"))
    guard = next(node for node in tree.body if isinstance(node, ast.If)
                 and node.lineno < found["extras.start"] <= node.end_lineno)
    assert "__name__ == '__main__'" in ast.unparse(guard.test)


def test_arrows_only_point_down():
    """No file of ours needs, to be read, one that needs it.

    And none but other programs need the command line; the start knows it by name alone.
    """
    below = {name: set(imports(name)) - ({"extras.start"} if name == "tiny_sd" else set())
             for name in FILES}
    order = []
    while len(order) < len(FILES):
        free = [name for name in FILES if name not in order and below[name] <= set(order)]
        assert free, f"in a circle: {sorted(FILES.keys() - set(order))}"
        order += free
    assert order[0] == "tiny_sd"
    assert {name for name in FILES if "extras.cli" in below[name]} == {
        "extras.studio", "extras.training.teach"}


@pytest.mark.parametrize("name", [name for name in FILES if name != "extras.notebook"])
def test_each_file_can_be_imported_first(name):
    """And, but for extras.fast, changes nothing of the process."""
    script = (f"import os, signal, sys, threading; before = dict(os.environ); import {name}; "
              "print(sys.excepthook is sys.__excepthook__, threading.active_count(), "
              "signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, before == dict(os.environ))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.split()[:3] == ["True", "1", "True"]
    with_fast = "extras.fast" in imports(name) or name in ("extras.fast", "extras.start")
    assert with_fast or done.stdout.split()[3] == "True"
