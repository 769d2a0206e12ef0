"""The file alone: without extras/ it draws and refuses by its own small program."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from conftest import ROOT
from helpers import contents, finish, launch, sd, write_model

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
    config = write_model(folder / "noiseless") / "scheduler/scheduler_config.json"
    config.write_text('{"beta_start": 0, "beta_end": 0, "beta_schedule": "scaled_linear"}')
    config = write_model(folder / "noisy") / "scheduler/scheduler_config.json"
    config.write_text('{"num_train_timesteps": 50000000000}')      # they would fill the memory
    config = write_model(folder / "wide") / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 10 ** 5}))
    config = write_model(folder / "groupless") / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_num_groups": 0}))
    endless = write_model(folder / "endless")
    for name, key in (("text_encoder/config.json", "max_position_embeddings"),
                      ("tokenizer/tokenizer_config.json", "model_max_length")):
        text = json.dumps(json.loads((endless / name).read_text()) | {key: 10 ** 12})
        (endless / name).write_text(text)
    Image.effect_noise((16, 16), 80).convert("RGB").save(folder / "in.png")
    Image.new("RGB", (16, 16)).save(folder / "program.png", "EPS")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    return folder


@pytest.fixture(scope="module")
def program(alone):
    """The copy as a separate module, which computes by the formulas."""
    spec = importlib.util.spec_from_file_location("tiny_sd_alone", alone / "tiny_sd.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert not module.FAST
    return module


@pytest.fixture
def run(program, alone, monkeypatch, capsys):
    """run(argument, ...) -> (status, stdout, this program's own lines on stderr)."""
    monkeypatch.chdir(alone)

    def run(*argv):
        capsys.readouterr()
        status = program.main(list(argv))
        out, err = capsys.readouterr()
        return status, out, re.findall("^tiny_sd: .*", err, re.M)
    return run


def launched(alone, *argv):
    """Like run, in a separate process."""
    status, out, err = finish(launch(*argv, program=alone / "tiny_sd.py", cwd=alone, PYTHONPATH=""))
    assert "Traceback" not in err
    return status, out, re.findall("^tiny_sd: .*", err, re.M)


COMMANDS = {    # and what the library takes for it
    "red": {}, "apple -n red": {"negative": "red"}, "red -s 12345678901234567890": {},
    "red --steps 5": {}, "red --cfg-scale 3": {"guidance": 3.0}, "red --guidance-scale 1": {
        "guidance": 1.0}, "red --sampler dpm++2m": {"sampler": sd.dpm_pp_2m},
    "red --sampler ddim": {}, "red --sampler ddpm": {"sampler": sd.ddpm}, "red -W 12 -H 26": {},
    "red -i in.png": {}, "red -i in.png --strength 0.5": {"strength": 0.5},
    "red -i in.png -W 20": {}, "red --backend torch": {},
    "red --backend torch --device cpu --dtype bfloat16": {}, "red --dtype float32": {}}


def expected(folder, words, settings):
    """Draw by the library, with all that makes it fast, what a command asks for."""
    def value(flag, default):
        return words[words.index(flag) + 1] if flag in words else default

    if "torch" in words:
        pytest.importorskip("torch")
    model = sd.load(folder / "tiny", value("--backend", None), dtype=value("--dtype", "float32"))
    w, h = (int(value(flag, 16)) for flag in ("-W", "-H"))
    if "-i" in words:
        picture = ImageOps.fit(Image.open(folder / "in.png"), (w, h), Image.Resampling.LANCZOS)
        settings = settings | {"picture": np.asarray(picture)}
    steps = sd.evenly_spaced_steps(int(value("--steps", 3)), model.alpha_bars)
    noise = sd.numpy_noise([int(value("-s", 0))], (h // 2, w // 2, 4))
    *_, x = sd.generate(model, words[0], steps=steps, noise=noise, **settings)
    return sd.decode(model, x)[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_it_draws_what_the_library_draws(command, run, alone, tmp_path):
    """At most one level of 255 apart."""
    words, path = command.split(), str(tmp_path / "out.png")
    few = [] if "--steps" in words else ["--steps", "3"]
    assert run(*words, *few, "-m", "tiny", "-o", path) == (0, f"{path}\n", [])
    picture = np.asarray(Image.open(path)).astype(int)
    reference = expected(alone, words, COMMANDS[command])
    assert picture.shape == reference.shape and picture.std() > 5
    assert abs(picture - reference).max() <= 1


REFUSED = {
    "": "prompt", "red --steps 0": "--steps 0", "red --steps x": "'x'", "red apple": "apple",
    "red --frobnicate": "--frobnicate", "red --sampler heun": "heun", "red -W 15": "width 15",
    "red -H 2": "height 2", "red -i none.png": "none.png", "red -i tiny": "tiny",
    "red -i in.png --strength 0": "strength 0", "red -i in.png --strength 2": "strength 2",
    "red -i in.png --strength 0.01": "strength 0.01", "red -i in.png --strength nan": "nan",
    "red --cfg-scale nan": "--cfg-scale", "red --device cuda --backend numpy": "cuda",
    "red --dtype float16 --backend numpy": "float16", "red --backend jax": "jax",
    "red -o in.png": "in.png is there already", "red -o none/out.png": "there is no folder none to",
    "red -s x": "'x'", "red -m none": "none", "red -m in.png": "in.png",
    "red -m tiny/unet": "tiny/unet", "red -m wordless": "tokenizer/tokenizer.json: 'model'",
    "red -m noisy": "the scheduler's num_train_timesteps cannot be 50000000000",
    "red -m wide": "the unet's sample_size cannot be 100000",
    "red -m noiseless": "noise levels do not fall", "red -m groupless": "ZeroDivisionError",
    "red -i program.png": "cannot identify image file 'program.png'", "red -i bomb.png": "bomb"}


@pytest.mark.parametrize("command", REFUSED)
def test_it_refuses_in_one_line(command, run, alone):
    before = contents(alone)
    status, out, err = run(*command.split(), *([] if "-m" in command else ["-m", "tiny"]))
    assert (status, out, len(err)) == (2, "", 1) and REFUSED[command] in err[0], err
    assert contents(alone) == before


def test_endless_lengths_are_those_of_the_weights(run):
    assert run("red", "-m", "endless", "--steps", "1", "-o", "endless.png")[0] == 0
    Path("endless.png").unlink()


def test_a_file_that_appears_while_it_draws_is_kept(program, run, tmp_path, monkeypatch):
    path, decode = tmp_path / "out.png", program.decode

    def meanwhile(*args):
        path.write_text("mine")
        return decode(*args)
    monkeypatch.setattr(program, "decode", meanwhile)
    status, out, err = run("red", "-m", "tiny", "--steps", "1", "-o", str(path))
    assert (status, out, len(err)) == (2, "", 1) and path.read_text() == "mine"


def test_as_a_process(alone, tmp_path):
    """The bundled model: an apple that is red, on blue; then nothing is overwritten."""
    path = str(tmp_path / "out.png")
    argv = ["red apple on a blue background", "-m", str(ROOT / "weights/emoji"), "-o", path]
    assert launched(alone, *argv) == (0, f"{path}\n", [])
    data = Path(path).read_bytes()
    pixels = np.asarray(Image.open(path)).astype(int)
    n = len(pixels) // 8
    red, green, blue = pixels[3 * n:5 * n, 3 * n:5 * n].mean((0, 1))
    assert red > green + 50 and red > blue + 50
    red, green, blue = np.concatenate([pixels[:n // 2], pixels[-n // 2:]]).mean((0, 1))
    assert blue > red + 50
    assert launched(alone, *argv) == (2, "", [f"tiny_sd: {path} is there already"])
    assert Path(path).read_bytes() == data


def test_it_has_no_model_of_its_own(alone):
    status, out, err = launched(alone, "red")
    assert (status, out, len(err)) == (2, "", 1)
    assert f"there is no folder emoji nor {alone / 'weights' / 'emoji'}" in err[0]
