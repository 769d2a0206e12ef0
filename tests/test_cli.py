"""The command line, on a random model that draws in milliseconds.

What it writes, what it says, and how it refuses.
"""

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file, save_file

from conftest import ROOT
from extras import cli, fast, files, formats, show
from helpers import contents, finish, launch, sd, write_model

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(model, capsys):
    """run(argument, ...) -> (status, lines on stdout, lines on stderr); run.bare: no model said"""
    def bare(*argv):
        capsys.readouterr()
        status = cli.main(list(argv))
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    def run(*argv):
        return bare("--model", str(model), "--steps", "2", *argv)

    run.bare, run.model = bare, str(model)
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

    There must be no other, and no new file
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


# ── What it writes ────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(
    "flags, size",
    [("", (16, 16)), ("-W 12", (12, 16)), ("-H 26", (16, 26)), ("-W 4 -H 34", (4, 34))],
)
def test_size(draw, flags, size):
    """Any multiples of the model's factor, here 2; by default the model's own size."""
    picture = draw("red apple", *flags.split())
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", size)


def test_parameters(draw):
    prompt, negative = "a lighthouse, (stormy:1.2), 灯台\nat night", "blur: none"
    picture = draw(
        *"-s 42 --steps 3 --cfg-scale 4.5 --sampler dpm++2m --karras -W 12".split(), prompt, "-n",
        negative,
    )
    assert parse(picture) == (
        prompt,
        negative,
        {
            "Steps": "3", "Sampler": "DPM++ 2M Karras", "CFG scale": "4.5", "Seed": "42",
            "Size": "12x16", "Model": "tiny", "RNG": "CPU", "Version": f"tiny_sd {sd.__version__}",
        },
    )


def test_parameters_with_all_left_as_it_is(draw):
    prompt, negative, facts = parse(draw("-p", "red apple"))
    assert (prompt, negative) == ("red apple", "")
    assert facts.items() >= {"Sampler": "DPM++ 2M", "CFG scale": "7.5", "Seed": "0"}.items()
    assert "Denoising strength" not in facts


def test_parameters_of_a_batch_from_a_picture(run):
    Image.new("RGB", (9, 5), "red").save("in.png")
    _, out, _ = run(*"apple -b 2 -s 7 -i in.png --strength 0.5 --sampler euler_a".split())
    facts = [parse(Image.open(path))[2] for path in out]
    assert [f["Seed"] for f in facts] == ["7", "8"]
    assert all((f["Denoising strength"], f["Sampler"]) == ("0.5", "Euler a") for f in facts)


def test_a_batch_is_numbered_and_each_picture_is_that_of_its_own_seed(run, draw):
    status, out, _ = run("apple", "-b", "3", "-s", "5", "-o", "some.png")
    assert status == 0 and out == ["some-000.png", "some-001.png", "some-002.png"]
    for seed, path in zip((5, 6, 7), out):
        assert abs(pixels(draw("apple", "-s", str(seed))) - pixels(Image.open(path))).max() <= 1


def test_an_existing_file_stays_and_the_next_free_name_is_printed(run):
    mine = ["out.png", "out-1.png", "out-001.png", "out-2.png.part"]
    for name in mine:
        Path(name).write_text("mine")
    for argv, names in [
        ("a", ["out-2.png"]), ("a", ["out-3.png"]), ("a -b 2", ["out-000.png", "out-001-1.png"]),
    ]:
        assert run(*argv.split())[1] == names
    assert {path.name for path in Path().iterdir() if path.read_bytes() == b"mine"} == set(mine)
    assert len(list(Path().iterdir())) == len(mine) + 4


@pytest.mark.parametrize("name", ["sub folder/picture.png", "P.PNG", "a.b.png"])
def test_output(run, name):
    Path("sub folder").mkdir()
    assert run("apple", "-o", name)[:2] == (0, [name])
    assert Image.open(name).size == (16, 16) and not list(Path().rglob("*.part"))


def test_the_same_command_draws_the_same_file(run):
    run("apple")
    run("apple")
    assert Path("out.png").read_bytes() == Path("out-1.png").read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        "-s 1", "-n apple", "--cfg-scale 2", "--guidance-scale 1", "--steps 3", "--karras",
        *(f"--sampler {name}" for name in sd.SAMPLERS if name != "dpm++2m"),
    ],
)
def test_every_option_matters(draw, flags):
    flags = ["--steps", "4", *flags.split()]
    assert abs(pixels(draw("red", *flags)) - pixels(draw("red", *flags[:2]))).max() > 0


@pytest.mark.slow
def test_the_library_draws_the_commands_picture(run, model):
    """Where nothing is said, both take the model's own sampler, steps and guidance."""
    folder = Path(shutil.copytree(model, "model"))
    change(SCHEDULER, _class_name="EulerDiscreteScheduler", _guidance_scale=3)(folder)
    assert run.bare("red", "-m", "model")[0] == 0
    loaded, drawn = sd.load("model"), pixels(Image.open("out.png"))
    for said, same in ({}, True), ({"guidance": 7.5}, False):
        *_, x = sd.generate(loaded, "red", **said)
        assert np.array_equal(sd.decode(loaded, x)[0], drawn) == same


def test_by_the_formulas_alone(run, monkeypatch):
    """No faster form is asked, though all are there."""
    def fail(*args, **settings):
        raise AssertionError
    monkeypatch.setattr(sd, "FAST", dict.fromkeys(sd.FAST, fail))
    assert run("red", "--formulas")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, tolerance",
    [
        ("--backend torch", 1), ("--backend torch --dtype bfloat16", 60),
        ("--backend torch --dtype float16", 12),
    ],
)
def test_torch_draws_the_same_picture(draw, flags, tolerance):
    pytest.importorskip("torch")
    assert (
        abs(pixels(draw("red apple", *flags.split())) - pixels(draw("red apple"))).max()
        <= tolerance
    )


def test_a_model_by_name_lies_in_weights_unless_there_is_a_folder_of_that_name(
    draw, model, here, monkeypatch
):
    monkeypatch.setattr(sd, "HERE", here / "program")
    shutil.copytree(model, here / "program/weights/mine")
    assert parse(draw("a", "-m", "mine"))[2]["Model"] == "mine"
    Path("mine").mkdir()
    assert cli.main(["a", "-m", "mine"]) == 2


@pytest.mark.parametrize("argv", [["red apple " * 6], ["red", "-n", "red apple " * 6]])
def test_a_prompt_that_is_too_long_says_what_is_cut(run, argv):
    """On a line of its own. The model has room for ten words."""
    status, _, err = run(*argv)
    said = [line for line in err if line.startswith("tiny_sd: ")]
    assert status == 0 and len(said) == 1 and said[0].endswith("does not see: red apple")
    assert "the prompt 'red apple red apple red apple" in said[0] and "10 tokens" in said[0]


def test_what_is_cut_changes_nothing(draw):
    assert np.array_equal(pixels(draw("red apple " * 9)), pixels(draw("red apple " * 5)))


@pytest.mark.parametrize(
    "prompt",
    ["", " ", "\0\a\x1b[31m", "🍎🍏 日本語", "e\u0301", "<|endoftext|>", "a" * 3000, "a " * 20000],
    ids=lambda prompt: ascii(prompt[:9]),
)
def test_any_prompt_draws(draw, prompt):
    draw(f"--prompt={prompt}")


# ── From a picture ────────────────────────────────────────────────────────────────────────────────

RNG = np.random.default_rng(0)
PLAIN = Image.fromarray(RNG.integers(256, size=(16, 24, 3), dtype=np.uint8))
GREY, PALETTE, TURNED = PLAIN.convert("L"), PLAIN.quantize(16), Image.Exif()
TURNED[0x112] = 6                       # the orientation: to be turned clockwise
HOLES = RNG.random((16, 24)) < 0.5


def around(colour, width, height):
    """PLAIN in the middle of a larger picture."""
    picture = Image.new("RGB", (width, height), colour)
    picture.paste(PLAIN, ((width - 24) // 2, (height - 16) // 2))
    return picture


def on_white(picture, holes):
    return Image.composite(
        Image.new("RGB", picture.size, "white"), picture.convert("RGB"), Image.fromarray(holes)
    )


def with_alpha(picture, alpha):
    picture = picture.copy()
    picture.putalpha(Image.fromarray(alpha))
    return picture


PICTURES = {  # the picture as it is saved, the file, settings, and the plain picture that it means
    "RGBA": (PLAIN.convert("RGBA"), "in.png", {}, PLAIN),
    "transparent": (
        with_alpha(PLAIN, np.uint8(255 * ~HOLES)), "in.png", {}, on_white(PLAIN, HOLES),
    ),
    "greyscale": (GREY, "in.png", {}, GREY.convert("RGB")),
    "greyscale, transparent": (
        with_alpha(GREY, np.uint8(255 * ~HOLES)), "in.png", {}, on_white(GREY, HOLES),
    ),
    "16 bits": (
        Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "in.png", {},
        GREY.convert("RGB"),
    ),
    "16 bits, TIFF": (
        Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "in.tiff", {},
        GREY.convert("RGB"),
    ),
    "black and white": (PLAIN.convert("1"), "in.png", {}, PLAIN.convert("1").convert("RGB")),
    "palette": (PALETTE, "in.png", {}, PALETTE.convert("RGB")),
    "palette, GIF": (PALETTE, "in.gif", {}, PALETTE.convert("RGB")),
    "palette, transparent": (
        PALETTE, "in.png", {"transparency": 3}, on_white(PALETTE, np.asarray(PALETTE) == 3),
    ),
    "CMYK": (PLAIN.convert("CMYK"), "in.tiff", {}, PLAIN),
    "turned": (PLAIN.transpose(Image.Transpose.ROTATE_90), "in.png", {"exif": TURNED}, PLAIN),
    "too wide": (around("red", 48, 16), "in.png", {}, PLAIN),
    "too high": (around("red", 24, 36), "in.png", {}, PLAIN),
}


@pytest.mark.parametrize("name", PICTURES)
def test_from_any_picture(draw, name):
    """The same as from the plain picture that it means."""
    picture, file, settings, plain = PICTURES[name]
    picture.save(file, **settings)
    plain.save("plain.png")
    ours, reference = (
        draw(*"apple -W 24 -H 16 --strength 0.5 -i".split(), path) for path in (file, "plain.png")
    )
    assert ours.size == (24, 16) and np.array_equal(pixels(ours), pixels(reference))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (500, 300)])
def test_from_a_picture_of_any_size(draw, size):
    Image.new("RGB", size, "red").save("in.png")
    assert draw("apple", "-i", "in.png").size == (16, 16)


def test_strength_leads_away_from_the_picture(run, monkeypatch):
    """Counted in steps; the fewer of them, the less noise the sampler starts from."""
    PLAIN.save("in.png")
    started = []
    monkeypatch.setitem(
        sd.SAMPLERS, "ddim", lambda denoise, x, levels, noise: started.append(levels) or iter([x])
    )
    for strength in ("0.1", "0.58", "1"):
        run(*f"apple -i in.png --steps 50 --sampler ddim --strength {strength}".split())
    assert [len(levels) for levels in started] == [5, 29, 50]
    assert started[0][0][1] > started[1][0][1] > started[2][0][1]


# ── What it refuses ───────────────────────────────────────────────────────────────────────────────

ARGUMENTS = {  # the arguments, and what the line must name
    "": "prompt", "one -p two": "prompt", "one two": "two", "a --frobnicate": "--frobnicate",
    "a --prom b": "--prom", "a -s": "--seed", "a -s x": "'x'", "a -s 1.5": "1.5",
    "a -s -2": "--seed -2", f"a -s {2**64}": f"{2**64}", "a --steps 0": "--steps 0",
    "a --steps -3": "--steps -3", "a --steps 5000": "5000", "a --steps x": "'x'",
    "a --cfg-scale nan": "--cfg-scale nan", "a --cfg-scale -1": "-1", "a --cfg-scale inf": "inf",
    "a --cfg-scale x": "'x'", "a -i in.png --strength 0": "--strength 0",
    "a -i in.png --strength -0.5": "-0.5", "a -i in.png --strength 1.01": "1.01",
    "a -i in.png --strength nan": "--strength nan", "a -i in.png --strength inf": "--strength inf",
    "a -i in.png --strength 0.4": "--strength 0.4", "a --sampler heun": "'heun'",
    "a --mask in.png": "--init-img", "a --karras --sampler plms": "--karras",
    "a --prompts in.png": "one prompt", "--prompts none.txt": "none.txt",
    "--like none.png": "none.png", "--like in.png": "in.png", "a --preview x.jpg": "x.jpg",
    "a --karras --sampler ddim": "--karras", "a -W 15": "--width 15", "a -H 17": "--height 17",
    "a -W -16": "--width -16", "a -W 0": "--width 0", "a -H 0": "--height 0", "a -W 2": "--width 2",
    "a -H 4098": "--height 4098", "a -W 1e3": "1e3", "a -b 0": "--batch-size 0", "a -b -1": "-1",
    "a -b 1001": "1001", "a -o no/such.png": "no", "a -o out.gif": "out.gif", "a -o out": "out",
    "a -o .png": ".png", "a -o folder": "folder", "a -o in.png/out.png": "in.png",
    "a --backend jax": "'jax'", "a --device tpu": "'tpu'", "a --dtype int8": "'int8'",
    "a --dtype float16": "--dtype float16", "a --backend numpy --device cuda": "--device cuda",
    "a --device mps": "mps", "a -m none": "none", "a -m no/such/folder": "no/such/folder",
    "a -m none.safetensors": "none.safetensors", "a -m folder": "folder", "a -m in.png": "in.png",
    "a -m sd-v1-4.ckpt": "sd-v1-4.ckpt", "a -m ''": "Stable Diffusion folder",
    "a -i none.png": "none.png", "a -i folder": "folder", "a -i empty.png": "empty.png",
    "a -i text.png": "text.png", "a -i cut.png": "cut.png", "a -i ''": "picture",
}


@pytest.mark.parametrize("argv", ARGUMENTS)
def test_bad_arguments(refuse, argv):
    if "mps" in argv:
        pytest.importorskip("torch")
    PLAIN.save("in.png")
    Path("folder").mkdir()
    Path("empty.png").touch()
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("in.png").read_bytes()[:-200])
    assert ARGUMENTS[argv] in refuse(*shlex.split(argv))


@pytest.mark.parametrize("flag", ["-i", "--like"])
def test_a_picture_that_is_a_program(refuse, flag):
    PLAIN.save("in.eps")
    assert "PostScript" in refuse(*["a"] * (flag == "-i"), flag, "in.eps")


def test_a_decompression_bomb(refuse, monkeypatch):
    PLAIN.save("in.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "in.png" in refuse("a", "-i", "in.png")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def change(name, **settings):
    """Sets keys of a config, or takes away those that are given as None."""
    def edit(folder):
        config = json.loads((folder / name).read_text()) | settings
        (folder / name).write_text(
            json.dumps({key: value for key, value in config.items() if value is not None})
        )

    return edit


def cut(part):
    return lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[part])


def arrays(edit):
    def rewrite(folder):
        weights = load_file(folder / UNET)
        edit(weights)
        save_file(weights, folder / UNET)
    return rewrite


def remove(name):
    return lambda folder: (
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    )


SCHEDULER = "scheduler/scheduler_config.json"
MODELS = {  # what was done to the folder, and what the line must name
    "weights, empty": (write(UNET, b""), UNET),
    "weights, cut in the header": (cut(slice(300)), UNET),
    "weights, cut at the end": (cut(slice(-1)), UNET),
    "weights, a web page": (write(UNET, b"<!DOCTYPE html><title>Sign in</title>"), UNET),
    "weights, a pickle": (write(UNET, pickle.dumps(Bomb())), UNET),
    "weights, header without end": (write(UNET, b"\xff" * 8 + b"{}"), UNET),
    "weights, none": (remove(UNET), UNET),
    "an array too many": (
        arrays(lambda w: w.update({"conv_in.gain": np.ones(8, np.float32)})),
        "conv_in.gain is unknown",
    ),
    "an array too few": (arrays(lambda w: w.pop("conv_in.bias")), "conv_in.bias is missing"),
    "an array too short": (
        arrays(lambda w: w.update({"conv_in.bias": np.ones(7, np.float32)})),
        "conv_in.bias has shape (7,)",
    ),
    "an array of bytes": (
        arrays(lambda w: w.update({"conv_in.bias": np.ones(8, np.uint8)})),
        "conv_in.bias is U8",
    ),
    "an array named in two lines": (
        arrays(lambda w: w.update({"a\nb": np.ones(8, np.float32)})),
        "is unknown",
    ),
    "config, none": (remove("vae/config.json"), "vae/config.json"),
    "config, no JSON": (write("vae/config.json", b"{'a': 1}"), "vae/config.json"),
    "config, no text": (write("vae/config.json", b"\xff\xfe"), "vae/config.json"),
    "config, a list": (write("vae/config.json", b"[]"), "vae"),
    "config, a key too few": (
        change("unet/config.json", cross_attention_dim=None),
        "cross_attention_dim",
    ),
    "config, other widths": (change("unet/config.json", block_out_channels=[8, 24]), "unet"),
    "config, groups that do not divide": (change("vae/config.json", norm_num_groups=3), "vae"),
    "config, heads that do not divide": (
        change("text_encoder/config.json", num_attention_heads=5),
        "text_encoder",
    ),
    "config, an unknown activation": (
        change("text_encoder/config.json", hidden_act="relu"),
        "relu",
    ),
    "scheduler, none": (remove("scheduler"), "scheduler_config.json"),
    "scheduler, a list": (write("scheduler/scheduler_config.json", b"[]"), "scheduler"),
    "scheduler, an unknown schedule": (
        change("scheduler/scheduler_config.json", beta_schedule="cosine"),
        "'cosine'",
    ),
    "scheduler, an unknown spacing": (
        change("scheduler/scheduler_config.json", timestep_spacing="wide"),
        "'wide'",
    ),
    "scheduler, an unknown prediction": (
        change("scheduler/scheduler_config.json", prediction_type="flow"),
        "'flow'",
    ),
    "tokenizer, none": (remove("tokenizer"), "tokenizer"),
    "tokenizer, no text": (write("tokenizer/merges.txt", b"\xff\xfe"), "tokenizer"),
    "tokenizer, a list": (write("tokenizer/vocab.json", b'["a"]'), "tokenizer"),
    "tokenizer, longer than the model": (
        change("tokenizer/tokenizer_config.json", model_max_length=20),
        "20",
    ),
    "tokenizer, an unknown pad token": (
        change("tokenizer/tokenizer_config.json", pad_token="nothing"),
        "nothing",
    ),
    "tokenizer, no words": (write("tokenizer/vocab.json", b"{}"), "startoftext"),
    "tokenizer, no specials": (write("tokenizer/vocab.json", b'{"a": 0}'), "startoftext"),
    "scheduler, beta_end 1": (change(SCHEDULER, beta_end=1), "beta_end"),
    "scheduler, beta_end -1": (change(SCHEDULER, beta_end=-1), "beta_end"),
    "scheduler, beta_end a text": (change(SCHEDULER, beta_end="0.012"), "beta_end"),
    "scheduler, beta_end null": (write(SCHEDULER, b'{"beta_end": null}'), "beta_end"),
    "scheduler, both betas 0": (change(SCHEDULER, beta_start=0, beta_end=0), "beta_start"),
    "scheduler, betas that fall": (change(SCHEDULER, beta_start=0.02), "below"),
    "scheduler, 1000.0 timesteps": (change(SCHEDULER, num_train_timesteps=1000.0), "1000.0"),
    "scheduler, -5 timesteps": (change(SCHEDULER, num_train_timesteps=-5), "-5"),
    "scheduler, null timesteps": (write(SCHEDULER, b'{"num_train_timesteps": null}'), "timesteps"),
    "scheduler, 10^7 timesteps": (change(SCHEDULER, num_train_timesteps=10**7), "10000000"),
    "scheduler, steps_offset null": (write(SCHEDULER, b'{"steps_offset": null}'), "steps_offset"),
    "scheduler, steps_offset a text": (change(SCHEDULER, steps_offset="1"), "steps_offset"),
    "scheduler, a class that is a list": (change(SCHEDULER, _class_name=[]), "_class_name"),
    "scheduler, guidance 10^400": (change(SCHEDULER, _guidance_scale=10**400), "_guidance_scale"),
    "scheduler, nested 100,000 deep": (write(SCHEDULER, b"[" * 100_000), SCHEDULER),
    "config, nested 100,000 deep": (write("unet/config.json", b'{"a":' * 100_000), "unet/config"),
    "tokenizer, nested 100,000 deep": (write("tokenizer/vocab.json", b"[" * 100_000), "vocab"),
    "config, 10^10 layers": (
        change("text_encoder/config.json", num_hidden_layers=10**10),
        "10000000000",
    ),
    "config, too few heads": (change("unet/config.json", num_attention_heads=[2]), "heads"),
    "config, words of another width": (
        change("unet/config.json", cross_attention_dim=16),
        "words of 16",
    ),
    "config, 3 channels given": (change("unet/config.json", out_channels=3), "gives 3 channels"),
    "config, 8 input channels": (change("unet/config.json", in_channels=8), "8 input channels"),
    "config, 5 input channels": (change("unet/config.json", in_channels=5), "5 input channels"),
    "config, a VAE of one channel": (change("vae/config.json", in_channels=1), "in_channels"),
    "config, a VAE of four": (change("vae/config.json", out_channels=4), "out_channels"),
    "config, another norm": (change("unet/config.json", norm_eps=1e-6), "norm_eps"),
    "config, another activation": (change("unet/config.json", act_fn="mish"), "mish"),
    "config, sines first": (change("unet/config.json", flip_sin_to_cos=False), "flip_sin_to_cos"),
    "config, shifted by the time": (
        change("unet/config.json", resnet_time_scale_shift="scale_shift"),
        "resnet_time_scale_shift",
    ),
    "config, words alone": (change("unet/config.json", only_cross_attention=True), "only_cross"),
    "config, deep transformers": (
        change("unet/config.json", transformer_layers_per_block=[1, 2, 3]),
        "transformer_layers",
    ),
    "config, a VAE of another activation": (change("vae/config.json", act_fn="gelu"), "act_fn"),
    "config, another layer norm": (
        change("text_encoder/config.json", layer_norm_eps=1e-6),
        "layer_norm",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_models(refuse, model, name):
    damage, named = MODELS[name]
    damage(Path(shutil.copytree(model, "model")))
    assert named in refuse("apple", "-m", "model")


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.safetensors", b""), ("b.safetensors", pickle.dumps(Bomb())),
        ("c.ckpt", pickle.dumps(Bomb())), ("d.txt", b"hello"),
        ("e.safetensors", b"\2" + b"\0" * 7 + b"{}"),
    ],
)
def test_bad_single_files(refuse, name, content):
    Path(name).write_bytes(content)
    assert name in refuse("apple", "-m", name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_weights_that_are_not_finite(run, model, value):
    arrays(lambda w: w["conv_in.bias"].fill(value))(Path(shutil.copytree(model, "model")))
    status, out, err = run("apple", "-m", "model")
    assert status == 2 and out == [] and "not finite" in err[-1] and not list(Path().glob("out*"))


# ── When it cannot go on ──────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", ["/proc/out.png", "a" * 300 + ".png"], ids=["/proc", "long"])
def test_an_output_that_cannot_be_written(run, name):
    if not Path(name).parent.is_dir():
        pytest.skip(f"there is no {Path(name).parent} here")
    status, out, err = run("apple", "-o", name)
    assert (status, out) == (2, []) and err[-1].startswith("tiny_sd: ")
    assert not list(Path().iterdir())


def test_an_output_whose_name_leaves_no_room_for_a_suffix(run):
    name = "a" * 249 + ".png"
    assert run("apple", "-o", name)[:2] == (0, [name])
    assert [path.name for path in Path().iterdir()] == [name]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_too_little_memory(run, monkeypatch, backend):
    """More than any system has, of which each library speaks in its own way."""
    pytest.importorskip(backend)

    def decode(model, x):
        like = model.vae["quant_conv"]["weight"]
        return sd.array_like(like, np.broadcast_to(np.float32(0), 2 ** 60)) + 1
    monkeypatch.setattr(sd, "decode", decode)
    status, out, err = run("apple", "--backend", backend)
    assert status == 2 and re.search("allocate|memory", err[-1]) and not list(Path().iterdir())


def test_networks_are_dropped_when_nothing_needs_them_any_more(run, monkeypatch):
    seen, decode = [], sd.decode

    def look(model, x):
        seen.append((model.text_encoder, model.unet))
        return decode(model, x)
    monkeypatch.setattr(sd, "decode", look)
    Path("prompts.txt").write_text("red\napple\n")
    assert run("--prompts", "prompts.txt")[0] == 0
    assert len(seen) == 2 and all(seen[0]) and seen[1] == (None, None)


def test_a_bug_is_not_hidden(run, monkeypatch):
    def decode(model, x):
        raise RuntimeError("a bug")
    monkeypatch.setattr(sd, "decode", decode)
    with pytest.raises(RuntimeError):
        run("apple")


def test_a_message_of_one_line_without_control_characters(refuse, monkeypatch):
    def load(*args):
        raise sd.UserError("a\x1b[31m\nb" + 9999 * "c")
    monkeypatch.setattr(formats, "load", load)
    said = refuse("apple")
    assert said.startswith("tiny_sd: a [31m bccc") and len(said) == 2009


def test_a_file_system_without_links(run, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", link)
    Path("out.png").write_text("mine")
    Path("out-1.png").symlink_to("nowhere")
    assert run("apple")[:2] == (0, ["out-2.png"]) and Image.open("out-2.png").size == (16, 16)
    assert (
        Path("out.png").read_text() == "mine"
        and Path("out-1.png").is_symlink()
        and len(list(Path().iterdir())) == 3
    )


def test_a_name_that_a_picture_cannot_have(run, refuse):
    if Path("/proc").is_dir():
        assert (
            run("apple", "-o", "/proc/out.png")[2][-1]
            == "tiny_sd: /proc/out.png cannot be written: No such file or directory"
        )
    assert (
        refuse("apple", "--preview", "no/such.png") == "tiny_sd: there is no folder no to write to"
    )


# ── As a program ──────────────────────────────────────────────────────────────────────────────────

def start(*argv, without=()):
    """The program in a process of its own, to which some packages are not installed."""
    for name in without:
        Path("lacking").mkdir(exist_ok=True)
        Path("lacking", f"{name}.py").write_text(
            f"raise ModuleNotFoundError('No module named {name}')"
        )
    return launch(*argv, PYTHONPATH="lacking")


@pytest.mark.parametrize("module, package", [("PIL", "pillow"), ("numpy", "numpy")])
def test_a_missing_package_is_named(module, package):
    """With what to do about it."""
    Path("lacking").mkdir()
    Path(f"lacking/{module}.py").write_text(
        f"raise ModuleNotFoundError('No module named {module}', name='{module}')")
    status, out, err = finish(launch("apple", PYTHONPATH="lacking"))
    said = f"tiny_sd: No module named {module}: pip install {package}\n"
    assert (status, out, err) == (2, "", said)


def test_numpy_is_enough(model):
    """With torch, diffusers and transformers out of reach.

    A bar on stderr, and on stdout nothing but the path.
    """
    status, out, err = finish(
        start("apple", "-m", model, "--steps", "2", without=["torch", "diffusers", "transformers"])
    )
    assert (status, out) == (0, "out.png\n") and "2/2" in err and err.count("\n") == 1
    assert Image.open("out.png").size == (16, 16)


@pytest.mark.parametrize("argv, without, named", [
    (["apple", "--steps", "0"], [], "--steps 0"),
    (["apple", "--backend", "torch"], ["torch"], "torch"), (["apple"], ["tqdm"], "tqdm"),
])
def test_one_line_and_no_traceback(model, argv, without, named):
    status, out, err = finish(start(*argv, "-m", model, without=without))
    assert (status, out) == (2, "") and re.fullmatch(f"tiny_sd: .*{named}.*\n", err), err
    assert not list(Path().glob("*.png"))


def test_an_old_python(here):
    (here / "lib").mkdir()
    (here / "lib/sitecustomize.py").write_text("import sys\nsys.version_info = (3, 10)\n")
    status, out, err = finish(launch("red", PYTHONPATH=str(here / "lib")))
    assert (status, out) == (2, "") and err.startswith("tiny_sd: this needs Python 3.11 or later")
    assert err.count("\n") == 1


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    shown = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))
    flags = {flag for action in cli.option_parser()._actions for flag in action.option_strings}
    assert len(flags) > 40 and shown >= flags and "PROMPT" in text
    headings = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert headings == ["options", "what to draw", "model", "sampling", "size", "from a picture",
                        "output", "hardware", "examples"]
    assert max(map(len, text.splitlines())) <= 100


def test_each_option_says_what_it_does():
    for action in cli.option_parser()._actions:
        assert len(action.help or "") > 8, action.option_strings


def test_the_examples_of_help_can_be_read():
    for line in cli.EXAMPLES.splitlines()[1:]:
        command = line.split("   ")[0]
        args = cli.parse_known(cli.option_parser(), shlex.split(command)[2:])
        assert args.words or args.like or args.prompts


# ── Files of prompts, pictures drawn again, previews ──────────────────────────────────────────────

def test_like_draws_the_picture_again(tmp_path):
    first, again, other, model = (
        tmp_path / "first.png", tmp_path / "again.png", tmp_path / "other.png",
        str(write_model(tmp_path / "m")),
    )
    prompt = "red, apple: Steps: 3\nNegative prompt: x"
    how = [
        "-n", "a, b: c", "--steps", "3", "-s", "7", "--sampler", "euler", "--karras", "--cfg-scale",
        "3.5", "-W", "20", "-H", "12",
    ]
    assert cli.main([prompt, "-m", model, "-o", str(first), *how]) == 0
    words, negative, facts = parse(Image.open(first))
    assert (words, negative, facts["Seed"]) == (prompt, "a, b: c", "7")
    assert cli.main(["--like", str(first), "-m", model, "-o", str(again)]) == 0
    assert again.read_bytes() == first.read_bytes()
    assert cli.main(["blue", "--like", str(first), "-m", model, "-o", str(other), "-s", "8"]) == 0
    words, _, facts = parse(Image.open(other))
    assert (words, facts["Seed"], facts["Sampler"]) == ("blue", "8", "Euler Karras")


def test_like_reads_what_other_programs_write(tmp_path):
    info = PngInfo()
    info.add_text(
        "parameters",
        "a (cat:1.2), sitting\nNegative prompt: dog, bad\nSteps: 25, Sampler: DPM++ 2M, "
        "Schedule type: Karras, CFG scale: 6.5, Seed: 42, Size: 512x768, Model hash: 6ce0161689, "
        "Model: v1-5-pruned-emaonly, RNG: CPU, Version: v1.10.1",
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    args = cli.parse_arguments(["--like", str(tmp_path / "a.png"), "--steps", "9"])
    assert (
        args.prompt, args.negative_prompt, args.steps, args.sampler, args.karras, args.cfg_scale,
        args.seed, args.width, args.height,
    ) == ("a (cat:1.2), sitting", "dog, bad", 9, "dpm++2m", True, 6.5, 42, 512, 768)


def test_prompts_from_a_file(tmp_path, capsys, monkeypatch):
    model, out, lines = (
        str(write_model(tmp_path / "m")), tmp_path / "p.png", tmp_path / "prompts.txt",
    )
    lines.write_text(
        "# first\nred apple\n\na dog's house -s 5 --steps 2 -n 'b, c'   # a comment\n"
        "well-known -b 2\n",
        encoding="utf-8",
    )
    run = ["--prompts", str(lines), "-m", model, "-o", str(out), "--steps", "1"]
    assert cli.main(run) == 0
    names = ["p-0002.png", "p-0004.png", "p-0005-000.png", "p-0005-001.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    prompt, negative, last = parse(Image.open(tmp_path / "p-0004.png"))
    assert (prompt, negative, last["Seed"], last["Steps"]) == ("a dog's house", "b, c", "5", "2")
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    (tmp_path / "p-0004.png").unlink()
    assert cli.main(run) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert sum((tmp_path / name).stat().st_mtime_ns != before[name] for name in names) == 1
    monkeypatch.setattr(
        formats, "load", None
    )  # no need to wait for a model if nothing is to be drawn
    capsys.readouterr()
    assert cli.main(run) == 0 and capsys.readouterr() == (
        "",
        f"tiny_sd: {lines}: every picture is there already\n",
    )
    for line, said in (
        ("red --steps 0", "--steps 0"), ("red -h 64", "-h"), ("red --preview x.png", "--preview"),
        ("red -m x", "model"), ("--prompt red", "not with --prompt"),
    ):
        lines.write_text(line, encoding="utf-8")
        assert cli.main(run) == 2
        err = capsys.readouterr().err
        assert "line 1: " in err and said in err and err.count("\n") == 1


@pytest.mark.slow
def test_two_processes_share_the_prompts(tmp_path):
    pytest.importorskip("torch")
    model, lines = str(write_model(tmp_path / "m")), tmp_path / "prompts.txt"
    lines.write_text("red\napple\nred apple\n", encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            ROOT / "tiny_sd.py", "--prompts", lines, "-m", model, "-o", tmp_path / "p.png",
            "--steps", "1",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "p-0001.png", "p-0002.png", "p-0003.png",
    ]


@pytest.mark.slow
def test_preview_is_close_to_the_picture(tmp_path):
    """The linear map of the last latents, beside the decoder's picture in small."""
    picture, preview = tmp_path / "a.png", tmp_path / "preview.png"
    assert (
        cli.main(
            [
                "red apple", "-m", str(ROOT / "weights" / "emoji"), "-o", str(picture), "--preview",
                str(preview), "--steps", "8",
            ]
        )
        == 0
    )
    small = np.asarray(Image.open(preview)).astype(float)
    large = np.asarray(
        Image.open(picture).resize(Image.open(preview).size, Image.Resampling.BOX)
    ).astype(float)
    assert small.shape == (16, 16, 3) and np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.8


def test_preview_replaces_only_a_preview(run, refuse):
    PLAIN.save("mine.png")
    Path("text.png").write_text("mine")
    for name in ("mine.png", "text.png"):
        assert (
            refuse("apple", "--preview", name)
            == f"tiny_sd: --preview {name} is there already, and no preview: name another file"
        )
    for seed in "12":
        assert run("apple", "--preview", "new.png", "-s", seed)[0] == 0
        assert Image.open("new.png").size == (8, 8)
    assert "are both out.png" in refuse("apple", "--preview", "out.png", "-o", "out.png")


def test_preview_replaces_no_picture_saved_in_the_meantime(run, monkeypatch):
    """Such as the one that another process was drawing."""
    fit = show.colour_map

    def colour_map(model):
        PLAIN.save("mine.png")
        return fit(model)
    monkeypatch.setattr(show, "colour_map", colour_map)
    status, out, err = run("apple", "--preview", "mine.png")
    assert (status, out) == (2, []) and "no preview" in err[-1]
    assert np.array_equal(pixels(Image.open("mine.png")), pixels(PLAIN))


# ── Names that people know ────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name, sampler, karras", [
    ("DPM++ 2M Karras", "DPM++ 2M", True), ("dpm++ 2m", "DPM++ 2M", False),
    ("dpmpp_2m", "DPM++ 2M", False), ("Euler a", "Euler a", False),
    ("EULER_ANCESTRAL", "Euler a", False), ("k_euler_a", "Euler a", False),
    ("k_euler", "Euler", False), ("EulerDiscreteScheduler", "Euler", False),
    ("PNDM", "PLMS", False), ("euler_karras", "Euler", True)])
def test_samplers_by_the_names_of_other_programs(draw, name, sampler, karras):
    assert parse(draw("apple", "--sampler", name))[2]["Sampler"] == sampler + " Karras" * karras


@pytest.mark.parametrize("argv, hint", [
    ("red --stepps 3", "did you mean --steps?"), ("red --sampler eular", "did you mean euler?"),
    ("red --guidance 3", "did you mean --guidance-scale?"), ("red --W 8", "did you mean -W?"),
    ("red -m sd1.5", "did you mean sd15?"), ("red -m sdxl-trubo", "did you mean sdxl-turbo?"),
    ("red -m emogi", "did you mean emoji?"), ("red --clip_skip 2", "did you mean --clip-skip?"),
    ("red --embeding x", "did you mean --embedding?"),
    ("red apple", 'quote the prompt: "red apple"'), ("-p red -s 3 apple pie", 'quote the prompt'),
    ("red --sampler 'DPM++ 2M SDE'", "there is no 'DPM++ 2M SDE': choose one of ddpm, ddim,"),
    ("red --sampler x", "there is no 'x': choose one of ddpm")])
def test_a_hint(refuse, argv, hint):
    assert hint in refuse(*shlex.split(argv))


def test_a_seed_drawn_at_random(draw):
    seeds = {parse(draw("apple", "-s", "-1", "-b", "1"))[2]["Seed"] for _ in range(3)}
    assert len(seeds) == 3 and all(0 <= int(seed) < 2 ** 32 for seed in seeds)
    again = draw("apple", "-s", seeds.copy().pop())
    assert any(np.array_equal(pixels(again), pixels(Image.open(path)))
               for path in Path().glob("*.png") if path.name != Path(again.filename).name)


# ── Where it writes ───────────────────────────────────────────────────────────────────────────────

def test_into_a_folder(run, refuse):
    Path("sub").mkdir()
    assert run("apple", "-o", "sub/")[1] == ["sub/out.png"]
    assert run("apple", "-o", "sub/")[1] == ["sub/out-1.png"]
    assert "--output sub is a folder: sub/ writes into it" in refuse("apple", "-o", "sub")
    assert "there is no folder none" in refuse("apple", "-o", "none/")


@pytest.mark.parametrize(
    "flags, names",
    [
        ("-o {seed}.png -s 7", ["7.png"]), ("-o a-{seed}.png -s 7 -b 2", ["a-7.png", "a-8.png"]),
        ("-o {prompt}.png", ["red-apple-on-a-b.png"]),
        ("-o {x}{prompt}.png", ["{x}red-apple-on-a-b.png"]),
        ("-o {prompt}-{seed}.jpg", ["red-apple-on-a-b-0.jpg"]),
        ("-o {prompt}.png -b 2", ["red-apple-on-a-b-000.png", "red-apple-on-a-b-001.png"]),
    ],
)
def test_names_filled_in(run, flags, names):
    assert run("red/apple, on a: ../b.", *flags.split())[:2] == (0, names)
    assert sorted(path.name for path in Path().iterdir()) == names


def test_a_name_filled_in_is_never_too_long(run):
    assert run("🍎" * 300, "-o", "{prompt}{seed}.png")[0] == 0
    assert run("苹" * 300, "-o", "{prompt}{seed}.png")[0] == 0
    assert len(list(Path().iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.jpg", "out.jpeg", "out.webp", "P.JPG"])
def test_other_formats_tell_how_they_were_made(run, name):
    """As A1111 writes it, in EXIF's UserComment; --like reads it back."""
    flags = "--steps 3 -s 9 --sampler euler --karras -n".split() + ["x: y, z"]
    assert run("灯台 apple", "-o", name, *flags)[:2] == (0, [name])
    comment = Image.open(name).getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    assert run("灯台 apple", *flags)[0] == 0
    assert comment[8:].decode("utf-16-be") == Image.open("out.png").text["parameters"]
    assert run.bare("--like", name, "-o", "again.png", "-m", run.model)[0] == 0
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()


def test_a_prompt_too_long_for_a_jpeg(run):
    status, out, err = run("x " * 30000, "-o", "out.jpg")
    assert (status, out) == (0, ["out.jpg"]) and any(
        "too long to be recorded" in line for line in err
    )
    Image.open("out.jpg").load()


def test_a_name_that_is_too_long_is_refused_before_anything_is_drawn(refuse, monkeypatch):
    """With its number, too, and with the one that it gets where it is taken."""
    monkeypatch.setattr(sd, "generate", None)
    refuse("apple", "-o", "a" * 300 + ".png")
    refuse("apple", "-b", "2", "-o", "a" * 249 + ".png")
    Path("a" * 251 + ".png").touch()
    assert "too long" in refuse("apple", "-o", "a" * 251 + ".png")


# ── Pictures drawn again ──────────────────────────────────────────────────────────────────────────

def write_facts(name, text):
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(name, pnginfo=info)


def test_like_says_what_it_does_not_take_up(run):
    PLAIN.save("in.png")
    write_facts(
        "a.png",
        "red apple\nNegative prompt: \nSteps: 2, Sampler: Euler, Seed: 3, Size: 16x16, "
        "Model: /etc/other, Denoising strength: 0.5, Lora: some 0.8 other 1, Eta: 0.5, "
        "Hires upscale: 2, Hires steps: 5, ENSD: 31337, RNG: NV",
    )
    _, _, err = cli_lines(run, "--like", "a.png", model=False)
    assert err == ["--like a.png: " + line for line in [
        "Denoising strength 0.5 is not taken up: give the picture it began from with --init-img",
        "Eta 0.5 is not taken up",
        "Hires upscale 2 is not taken up: the picture was enlarged and drawn over (Hires fix)",
        "ENSD 31337 is not taken up: what a sampler adds on the way came from another seed",
        "RNG NV is not taken up: the noise came from a graphics card, and is other noise here",
        "Model /etc/other is not taken up: give it with --model",
        "Lora some 0.8 other 1 is not taken up: give it with --lora"]]
    status, out, err = cli_lines(run, "--like", "a.png", "-i", "in.png")
    assert status == 0 and not any("Model" in line or "Denoising" in line for line in err)


@pytest.mark.parametrize("facts, line", [
    ("Version: v1.10.1", "RNG GPU is not taken up"), ("User: me", "RNG GPU is not taken up"),
    ("Version: f2.0.1v1.10.1-previous", "RNG GPU is not taken up"),
    ("RNG: CPU, Version: v1.10.1", None), ("Version: ComfyUI", "Emphasis ComfyUI's is not taken"),
    ("RNG: CPU, Refiner: x, Refiner switch at: 0.8", "Refiner x is not taken up: a second model"),
    ("RNG: CPU, Face restoration: CodeFormer", "Face restoration CodeFormer is not taken up"),
    ("RNG: CPU, Token merging ratio: 0.5", "Token merging ratio 0.5 is not taken up"),
    ("RNG: CPU, Variation seed: 3, Variation seed strength: 0.1", "Variation seed 3 is not taken"),
    ('RNG: CPU, ControlNet 0: "Module: canny, Weight: 1"', "ControlNet 0 Module: canny, Weight: 1"),
    ('RNG: CPU, Hashes: {"model": "ab", "lora:x": "cd"}, Batch size: 2, Batch pos: 1', None)])
def test_like_names_what_other_programs_do(facts, line):
    write_facts("a.png", f"a (cat:1.2)\nSteps: 2, Sampler: Euler, Seed: 3, Size: 8x8, {facts}")
    notes = cli.parse_arguments(["--like", "a.png"]).notes
    assert len(notes) == (line is not None)
    assert not line or notes[0].startswith(f"--like a.png: {line}")


def test_like_a_picture_of_the_web_ui(model):
    """With all that it records of a prompt, and no negative prompt."""
    write_facts("a.png", "a (cat:1.2) <lora:some thing:0.8>, neg-emb\nSteps: 20, Sampler: Euler a, "
                "Schedule type: Automatic, CFG scale: 7, Seed: 42, Size: 512x768, Model hash: "
                "6ce0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, "
                'TI hashes: "neg-emb: c74b4e810b03, neg-emb: c74b4e810b03", '
                'Lora hashes: "some thing: 0123456789ab", RNG: CPU, Version: v1.10.1')
    Path("loras").mkdir()
    for name in "loras/some thing.safetensors", "neg-emb.pt", "v1-5-pruned-emaonly.safetensors":
        Path(name).touch()
    args = cli.parse_arguments(["--like", "a.png"])
    cli.take_up_loras(args)
    assert args.notes == [] and args.model == "v1-5-pruned-emaonly.safetensors"
    assert args.prompt.startswith("a (cat:1.2) <lora") and args.negative_prompt is None
    assert (args.sampler, args.clip_skip, args.seed) == ("euler_a", 2, 42)
    (lora, weight), (embedding,) = *args.lora, args.embedding
    assert Path(lora).samefile("loras/some thing.safetensors") and weight == 0.8
    assert Path(embedding).samefile("neg-emb.pt")


def test_like_without_a_lora_says_so_and_draws(run):
    write_facts("a.png", "red <lora:none:0.8> <hypernet:x:1>\nSteps: 2, Sampler: Euler, Seed: 3, "
                         "Size: 16x16, RNG: CPU")
    status, out, err = cli_lines(run, "--like", "a.png")
    assert (status, out) == (0, ["out.png"]) and err == [
        "--like a.png: <lora:none:0.8> is not taken up: there is no such LoRA beside the model, in "
        "loras/ or here: --lora FILE names one elsewhere",
        "--like a.png: <hypernet:x:1> is not taken up: of such tags, <lora:name:weight> is known "
        "here"]


def test_like_with_a_sampler_instead_of_one_unknown_here(run, refuse):
    write_facts("a.png", "red\nSteps: 2, Sampler: UniPC, Seed: 3, Size: 16x16, RNG: CPU")
    assert "a.png was drawn with UniPC" in refuse("--like", "a.png")
    assert run("--like", "a.png", "--sampler", "ddim")[0] == 0
    assert parse(Image.open("out.png"))[2]["Sampler"] == "DDIM"


def test_a_strength_for_nothing_is_said(run):
    said = cli_lines(run, "red", "--strength", ".5")[2]
    assert said == ["--strength does nothing without --init-img"]


def test_an_empty_negative_prompt_is_not_none(run):
    assert run("red", "-n", "", "-o", "a.png")[0] == run("red", "-o", "b.png")[0] == 0
    assert cli.parse_arguments(["--like", "a.png"]).negative_prompt == ""
    assert cli.parse_arguments(["--like", "b.png"]).negative_prompt is None


def cli_lines(run, *argv, model=True):
    """run(), and only this program's own lines on stderr."""
    if model:
        status, out, err = run(*argv)
    else:
        status, out, err = run.bare(*argv)
    return status, out, [line.removeprefix("tiny_sd: ") for line in err
                         if line.startswith("tiny_sd: ")]


def test_like_takes_no_model_from_a_strangers_picture(here):
    for name in (str(here), "..", "a/b", "../weights/emoji", "state\0"):
        write_facts("a.png", f"red\nSteps: 2, Sampler: Euler, Seed: 3, Size: 16x16, Model: {name}")
        assert cli.parse_arguments(["--like", "a.png"]).model == str(ROOT / "weights" / "emoji")


@pytest.mark.parametrize("negative", [
    "blue Negative prompt: green", "Negative prompt: green", "a\nNegative prompt: b", " a ", "\n",
    "Steps: 3", "a, b: c\n"])
def test_a_negative_prompt_stays_where_it_is(run, negative):
    assert run("red", "-n", negative, "-o", "a.png")[0] == 0
    assert run("--like", "a.png", "-o", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize("prompt", ["red\nNegative prompt: x", "\n\nred\n", "Steps: 5, Sampler: x",
                                    "\ud800", "", "a\0b", "🍎\r\n"])
def test_any_prompt_is_drawn_again(run, prompt):
    assert run(f"--prompt={prompt}", "-o", "a.png")[0] == 0
    assert run("--like", "a.png", "-o", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize("kind", ["v", "sample", "epsilon"])
def test_what_is_predicted_is_recorded(run, kind):
    assert run("red", "--prediction", kind, "-o", "a.png")[0] == 0
    assert run("--like", "a.png", "-o", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_like_with_another_sampler_leaves_karras(run):
    assert run("red", "--sampler", "euler", "--karras", "-o", "a.png")[0] == 0
    assert run("--like", "a.png", "--sampler", "ddim", "-o", "b.png")[0] == 0
    assert parse(Image.open("b.png"))[2]["Sampler"] == "DDIM"
    assert run("--like", "a.png", "--sampler", "dpm++2m", "-o", "c.png")[0] == 0
    assert parse(Image.open("c.png"))[2]["Sampler"] == "DPM++ 2M Karras"


@pytest.mark.parametrize("text", ["a" * 10 ** 6, "a: " * 330_000, "A " * 500_000, '"' * 10 ** 6])
def test_a_million_letters_that_tell_nothing(refuse, text):
    write_facts("a.png", f"Steps: 2, {text}")
    start = time.process_time()
    assert "a.png" in refuse("--like", "a.png")
    assert time.process_time() - start < 20


def test_quoted_facts_of_other_programs():
    facts = files.recorded_facts('Steps: 2, Lora hashes: "a: 1, b: 2", Seed: 3')
    assert facts == {"Steps": "2", "Lora hashes": "a: 1, b: 2", "Seed": "3"}
    facts = files.recorded_facts('Steps: 2, Hashes: {"model": "a", "b": "c"}, X: "\\"a\\\\", Y: 4')
    assert facts == {"Steps": "2", "Hashes": '{"model": "a", "b": "c"}', "X": '"a\\', "Y": "4"}


# ── Lists of prompts ──────────────────────────────────────────────────────────────────────────────

def test_a_batch_that_broke_off_goes_on(run):
    """All pictures of a line are looked for, not only the first."""
    Path("p.txt").write_text("red -b 3\napple\n")
    assert len(run("--prompts", "p.txt")[1]) == 4
    Path("out-0001-002.png").unlink()
    assert run("--prompts", "p.txt")[1] == ["out-0001-000-1.png", "out-0001-001-1.png",
                                            "out-0001-002.png"]
    assert run("--prompts", "p.txt")[1] == []


@pytest.mark.slow
def test_an_edited_line_is_drawn_again(run):
    """By its prompts and options; a file that tells nothing is none of its pictures."""
    Path("p.txt").write_text("red\napple -s 5\nblue -n x\ngreen\n")
    assert len(run("--prompts", "p.txt")[1]) == 4
    PLAIN.save("out-0004.png")
    Path("p.txt").write_text("red apple\napple -s 6\nblue -n y\ngreen\n")
    again = ["out-0001-1.png", "out-0002-1.png", "out-0003-1.png", "out-0004-1.png"]
    assert run("--prompts", "p.txt")[1] == again
    assert run("--prompts", "p.txt")[1] == []
    Path("p.txt").write_text("red\napple -s 5\nblue -n x\n")
    assert run("--prompts", "p.txt")[1] == []


@pytest.mark.parametrize("option", [
    "--steps 3", "--cfg-scale 3", "--sampler euler", "--sampler dpm++2m --karras", "-W 32 -H 16",
    "--clip-skip 1", "--plain-prompt", "-i in.png", "-i in.png --mask in.png", "-n ''"])
def test_other_options_draw_a_line_again(run, option):
    """A line that leaves them to the model takes any."""
    PLAIN.save("in.png")
    Path("p.txt").write_text("red")
    assert run("--prompts", "p.txt")[1] == ["out-0001.png"]
    Path("p.txt").write_text(f"red {option}")
    assert run("--prompts", "p.txt")[1] == ["out-0001-1.png"]
    assert run("--prompts", "p.txt")[1] == []


@pytest.mark.parametrize("text", ["", "# none\n\n"])
def test_a_list_without_prompts(refuse, text):
    Path("p.txt").write_text(text)
    assert refuse("--prompts", "p.txt") == "tiny_sd: --prompts p.txt has no prompt in it"


def test_seeds_at_random_are_drawn_once(run):
    Path("p.txt").write_text("red -s -1\napple -s -1\n")
    _, out, _ = run("--prompts", "p.txt")
    assert len({parse(Image.open(name))[2]["Seed"] for name in out}) == 2
    assert run("--prompts", "p.txt")[1] == []


def test_which_of_how_many(run):
    Path("p.txt").write_text("red\napple\nblue\n")
    err = "\n".join(run("--prompts", "p.txt")[2])
    assert re.search(r"1 of 3: .*\n?", err) and re.search(r"3 of 3, \d\d:\d\d left: ", err)


def test_a_number_sign_in_a_prompt(run):
    Path("p.txt").write_text("a house, #1 in the list\nred  # a comment\na#b\n")
    said = [line for line in run("--prompts", "p.txt")[2] if line.startswith("tiny_sd: ")]
    assert said == ["tiny_sd: p.txt, line 1: from #1 in the list on, this is a comment"]
    assert parse(Image.open("out-0001.png"))[0] == "a house,"
    assert parse(Image.open("out-0003.png"))[0] == "a#b"


def test_lines_end_where_files_say(run):
    """Not at a form feed or U+2028; and a byte-order mark is none of the prompt's letters."""
    Path("p.txt").write_bytes("\ufeffred\fapple\u2028blue\r\ngreen".encode())
    assert run("--prompts", "p.txt")[1] == ["out-0001.png", "out-0002.png"]
    assert parse(Image.open("out-0001.png"))[0] == "red apple blue"


@pytest.mark.parametrize("line", ["red -i none.png", "red -i in.png --mask none.png"])
def test_a_picture_that_is_missing_is_found_before_anything_is_drawn(refuse, line):
    PLAIN.save("in.png")
    Path("p.txt").write_text(f"apple\n{line}\n")
    assert refuse("--prompts", "p.txt") == "tiny_sd: p.txt, line 2: none.png is not there"


def test_a_line_of_a_million_spaces(run):
    Path("p.txt").write_text("red" + " " * 10 ** 6 + "apple" + " -" * 10 ** 5 + "\n")
    start = time.process_time()
    assert run("--prompts", "p.txt", "--steps", "1")[0] == 0
    assert time.process_time() - start < 20


@pytest.mark.slow
def test_a_line_like_another_picture(run):
    assert run("red", "-o", "a.png", "-s", "4")[0] == 0
    Path("p.txt").write_text("apple --like a.png\nblue --like a.png -s 5\ngreen\n")
    _, out, err = run("--prompts", "p.txt")
    drawn = [parse(Image.open(name)) for name in out]
    assert [(prompt, facts["Seed"]) for prompt, _, facts in drawn] == [
        ("apple", "4"), ("blue", "5"), ("green", "0")]
    Path("p.txt").write_text("apple\nblue\n")
    write_facts("b.png", "red\nSteps: 2, Sampler: Euler, Seed: 3, Size: 16x16, ENSD: 2")
    _, out, err = run("--prompts", "p.txt", "--like", "b.png", "-o", "c.png")
    assert [parse(Image.open(name))[2]["Seed"] for name in out] == ["3", "3"]
    assert sum("ENSD" in line for line in err) == 1


# ── A sampler of one's own ────────────────────────────────────────────────────────────────────────

def halves(denoise, x, steps, noise):
    """A sampler that is none of ours."""
    for _, alpha_bar, alpha_bar_next in steps:
        x_0, eps = denoise(x, _, alpha_bar)
        x = sd.add_noise(x_0, alpha_bar_next, 0.5 * eps)
        yield x


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(sd.SAMPLERS, "half-way", halves)


def test_a_sampler_is_a_function(registered, model):
    loaded = sd.load(model)
    *_, one = sd.generate(loaded, "red", steps=3, sampler=halves)
    *_, other = sd.generate(loaded, "red", steps=3, sampler="half-way")
    *_, ddim = sd.generate(loaded, "red", steps=3, sampler="ddim")
    assert np.array_equal(one, other) and not np.array_equal(one, ddim)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_sampler_says_its_spacing(registered, spacing, monkeypatch):
    monkeypatch.setattr(halves, "spacing", spacing, raising=False)
    scheduler = sd.read_config("scheduler", {})
    expected = {"leading": [501, 1], "trailing": [999, 499], "linspace": [999, 0]}[spacing]
    for name in (halves, "half-way"):
        steps = sd.sampling_steps(name, 2, scheduler, sd.alpha_bars())
        assert [t for t, _, _ in steps] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half-way", "Half way: mine, too"])
def test_a_registered_sampler_goes_from_the_command_line_into_the_picture_and_back(
        name, monkeypatch, run):
    monkeypatch.setitem(sd.SAMPLERS, name, halves)
    assert run("red", "--sampler", name, "-o", "a.png")[0] == 0
    assert parse(Image.open("a.png"))[2]["Sampler"] == re.sub("[:,]", " ", name)
    assert run("--like", "a.png", "-o", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_karras_with_a_models_own_sampler_that_has_none(run, model):
    """Found when the sampler is known, before anything is drawn."""
    change(SCHEDULER, _class_name="PNDMScheduler")(Path(shutil.copytree(model, "model")))
    status, out, err = run("red", "-m", "model", "--karras")
    assert (status, out) == (2, []) and err[-1].endswith("--karras does not go with --sampler plms")


# ── Models ────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("settings, said", [
    ({"_class_name": "HeunDiscreteScheduler"}, "HeunDiscreteScheduler is not known here: dpm++2m"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is False here, not True"),
    ({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type is 'dpmsolver++' here"),
    ({"solver_order": 3}, "solver_order is 2 here, not 3"),
    ({"trained_betas": [0.1]}, "trained_betas is None here"),
    ({"clip_sample": True}, "clip_sample is False here, not True")])
def test_what_a_scheduler_asks_for_and_does_not_get(run, model, settings, said):
    change(SCHEDULER, **settings)(Path(shutil.copytree(model, "model")))
    status, out, err = run("red", "-m", "model")
    lines = [line for line in err if line.startswith("tiny_sd: ")]
    assert status == 0 and len(lines) == 1 and said in lines[0]


def test_the_default_model_is_the_bundled_one(here):
    """Whatever is called emoji in the current folder."""
    Path("emoji").mkdir()
    assert cli.main(["red apple", "--steps", "1"]) == 0
    assert parse(Image.open("out.png"))[2]["Model"] == "emoji"
    assert cli.main(["--like", "out.png"]) == 0


@pytest.mark.parametrize("name", ["/dev/null", "fifo"])
def test_what_is_neither_a_folder_nor_a_file(refuse, name, model, here):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has neither")
    os.mkfifo("fifo")
    for file in (UNET, "vae/config.json", "tokenizer/vocab.json"):
        copy = Path(shutil.copytree(model, f"m{len(list(here.iterdir()))}"))
        (copy / file).unlink()
        os.mkfifo(copy / file)
        assert f"{file} is not a file" in refuse("red", "-m", str(copy))
    assert "neither a folder nor a file" in refuse("red", "-m", name)
    assert f"the LoRA {name} is not a file" in refuse("red", "--lora", name)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are Unicode")
def test_names_that_are_no_text(model, here):
    """Of bytes that no encoding has; the picture's text has question marks for them."""
    folder, lora, output = map(os.fsdecode, (b"m\xff", b"l\xff.safetensors", b"o\xff.png"))
    shutil.copytree(model, folder)
    write_lora(lora)
    status, out, err = finish(
        start("apple", "-m", folder, "--lora", lora, "--steps", "1", "-o", output)
    )
    assert status == 0 and "Traceback" not in err
    text = Image.open(output).text["parameters"]
    assert text.count("Model: m?") == text.count("Lora: l? 1.0") == 1


@pytest.mark.parametrize("shape", [[2 ** 62, 0], [1] * 65, [0] * 65, [2 ** 64, 0]])
def test_shapes_that_numpy_does_not_have(refuse, model, shape):
    path = Path(shutil.copytree(model, "model")) / UNET
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    empty = 0 in shape
    header["more"] = {"dtype": "F32", "shape": shape,
                      "data_offsets": [len(data) - end, len(data) - end + 4 * (not empty)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:] + b"\0" * 4 * (not empty))
    refuse("red", "-m", "model")


def test_a_model_that_is_changed_while_it_is_in_use(run, model, monkeypatch):
    """Written into: refused. Replaced by another file: the old one is still what is read."""
    path = Path(shutil.copytree(model, "model")) / UNET
    generate = sd.generate

    def write_it():
        path.write_bytes(path.read_bytes())

    def replace_it():
        Path("new").write_bytes(path.read_bytes())
        os.replace("new", path)

    def then(change):
        def walk(path):
            yield from path
            change()
        return lambda *args, **settings: walk(generate(*args, **settings))

    monkeypatch.setattr(sd, "generate", then(write_it))
    status, out, err = run("red", "-m", "model")
    assert (status, out) == (2, []) and "was changed while it was in use" in err[-1]
    monkeypatch.setattr(sd, "generate", then(replace_it))
    assert run("red", "-m", "model")[:2] == (0, ["out.png"])


def test_a_loaded_model_prints_as_one_line(model):
    assert len(repr(formats.load(model))) < 100


# ── Pictures of any depth ─────────────────────────────────────────────────────────────────────────

RAMP = np.arange(16 * 24).reshape(16, 24) % 256
DEEP = {  # the file, its numbers, and the 8 bits that they mean
    "in.pgm": (RAMP.astype(np.uint16) * 257, RAMP),
    "in16.tiff": (RAMP.astype(np.uint16) * 257, RAMP),
    "in32.tiff": (RAMP.astype(np.int32) * 257, RAMP),
    "float.tiff": (RAMP.astype(np.float32) / 255, RAMP),
    "float255.tiff": (RAMP.astype(np.float32), RAMP),
    "nan.tiff": (np.where(RAMP == 3, np.nan, RAMP / 255).astype(np.float32), RAMP * (RAMP != 3)),
}


@pytest.mark.parametrize("name", DEEP)
def test_pictures_of_16_and_32_bits_and_floats(name):
    values, expected = DEEP[name]
    Image.fromarray(values).save(name)
    read = files.read_picture(name, 24, 16)
    assert abs(read.astype(int) - expected[..., None]).max() <= 1


def test_what_is_cut_off_is_said(run):
    Image.new("RGB", (48, 16), "red").save("in.png")
    err = run("red", "-i", "in.png")[2]
    assert "tiny_sd: in.png, 48 x 16, is cut to the shape of 16 x 16" in err
    Image.new("RGB", (321, 320), "red").save("in.png")
    assert not any("cut" in line for line in run("red", "-i", "in.png")[2])


def test_a_mask_has_the_shape_of_its_picture(run, refuse):
    PLAIN.resize((32, 16)).save("in.png")
    Image.new("L", (64, 32), 255).save("mask.png")
    assert run("red", "-i", "in.png", "--mask", "mask.png")[0] == 0
    Image.new("L", (16, 16), 255).save("mask.png")
    assert refuse("red", "-i", "in.png", "--mask", "mask.png") == (
        "tiny_sd: --mask mask.png is 16 x 16, and in.png is 32 x 16: they must have the same shape")


def test_a_mask_is_black_where_it_is_transparent(run):
    """Like the layers that GIMP and Photoshop export."""
    PLAIN.resize((16, 16)).save("in.png")
    drawn = {}
    for mode, white, clear in ("L", 255, 0), ("RGBA", (255,) * 4, (255, 255, 255, 0)):
        mask = Image.new(mode, (16, 16), clear)
        mask.paste(white, (0, 0, 8, 16))
        mask.save("mask.png")
        drawn[mode] = np.asarray(Image.open(run("red", "-i", "in.png", "--mask", "mask.png")[1][0]))
    np.testing.assert_array_equal(drawn["L"], drawn["RGBA"])
    Image.new("RGBA", (16, 16)).save("mask.png")
    err = run("red", "-i", "in.png", "--mask", "mask.png")[2]
    assert "tiny_sd: mask.png has no white, and so nothing is replaced" in err


def test_a_mask_is_recorded(run):
    PLAIN.resize((16, 16)).save("in.png")
    Image.new("L", (16, 16), 255).save("mask.png")
    assert run("red", "-i", "in.png", "--mask", "mask.png", "-o", "a.png")[0] == 0
    said = cli_lines(run, "--like", "a.png", "-i", "in.png")[2]
    assert said == ["--like a.png: Mask mask.png is not taken up: give it with --mask"]
    assert cli_lines(run, "--like", "a.png", "-i", "in.png", "--mask", "mask.png")[2] == []


def test_too_little_memory_for_a_picture_is_said(refuse, monkeypatch):
    """A MemoryError has no text of its own."""
    PLAIN.save("in.png")

    def fail(*args):
        raise MemoryError
    monkeypatch.setattr(files, "eight_bits", fail)
    assert refuse("red", "-i", "in.png") == "tiny_sd: there is not enough memory"


# ── Nothing is lost ───────────────────────────────────────────────────────────────────────────────

def test_nobody_reads_the_names(model):
    """As after "| head -1": the pictures that are drawn already are saved all the same."""
    process = start("red", "-m", model, "-b", "3", "--steps", "1")
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 2 and err.endswith("tiny_sd: [Errno 32] Broken pipe\n")
    for name in ("out-000.png", "out-001.png", "out-002.png"):
        Image.open(name).load()


def write_lora(path):
    name = "lora_unet_mid_block_resnets_0_conv1"
    save_file({f"{name}.lora_down.weight": np.ones((1, 16, 3, 3), np.float32),
               f"{name}.lora_up.weight": np.ones((16, 1, 1, 1), np.float32)}, "l.safetensors")
    os.replace("l.safetensors", path)


def test_a_lora_that_goes_while_it_is_in_use(run, monkeypatch):
    """Its hash was recorded before."""
    write_lora("l.safetensors")
    generate = sd.generate

    def gone(*args, **settings):
        walk = generate(*args, **settings)
        Path("l.safetensors").unlink()
        return walk
    monkeypatch.setattr(sd, "generate", gone)
    assert run("red", "--lora", "l.safetensors")[:2] == (0, ["out.png"])


def test_each_picture_is_saved_before_the_next_is_decoded(run, monkeypatch):
    decode = sd.decode

    def interrupted(model, x):
        if Path("out-001.png").exists():
            raise KeyboardInterrupt
        return decode(model, x)
    monkeypatch.setattr(sd, "decode", interrupted)
    assert run("red", "-b", "3")[:2] == (130, ["out-000.png", "out-001.png"])


def test_threads_that_save_under_one_name(here):
    """Each picture once, whole, under a name of its own."""
    threads = [threading.Thread(target=lambda k=k: files.save_picture(
        np.full((4, 4, 3), k, np.uint8), Path("a.png"), str(k))) for k in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted((int(Image.open(path).text["parameters"]), pixels(Image.open(path)).max())
                   for path in Path().iterdir())
    assert found == [(k, k) for k in range(24)]


@pytest.mark.parametrize("left", ["link", "folder"])
def test_processes_of_one_number(run, monkeypatch, left):
    """Of two containers that share a folder: the unfinished file's name is not the process's."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    Path("precious").write_text("mine")
    if left == "link":
        Path(".tiny_sd-1.part").symlink_to("precious")
    else:
        Path(".tiny_sd-1.part").mkdir()
    assert run("red")[:2] == (0, ["out.png"]) and Path("precious").read_text() == "mine"


def test_an_unfinished_name_that_is_taken_is_not_followed(run, monkeypatch):
    Path("precious").write_text("mine")
    Path(".tiny_sd-x.part").symlink_to("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "x")
    assert run("red")[0] == 2 and Path("precious").read_text() == "mine"


def test_file_systems_without_links_lose_nothing_either(here, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", link)
    test_threads_that_save_under_one_name(here)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": ""}, {"RANK": "", "WORLD_SIZE": ""}, {"WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"},
    ],
)
def test_half_of_what_torchrun_says(run, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Path("p.txt").write_text("red\napple\n")
    assert run("--prompts", "p.txt")[1] == ["out-0001.png", "out-0002.png"]


RANK = """
import sys, time
from datetime import timedelta
import torch.distributed.distributed_c10d as distributed
distributed.default_pg_timeout = timedelta(seconds=2)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].removesuffix("tiny_sd.py"))
from extras import files, start
save_picture = files.save_picture
files.save_picture = lambda *args: time.sleep(8) or save_picture(*args)
start.program()
"""


def start_rank(rank, model, port):
    """One of two processes that share a list of one prompt, as torchrun starts them."""
    pytest.importorskip("torch")
    Path("p.txt").write_text("red\n")
    return launch("--prompts", "p.txt", "-m", model, python=["-c", RANK], RANK=str(rank),
                  WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_an_idle_process_waits_for_the_busy_ones(model):
    """Longer than torch by itself, which here gives up after two seconds."""
    port = free_port()
    busy, idle = (start_rank(rank, model, port) for rank in (0, 1))
    assert finish(idle)[:2] == (0, "") and Path("out-0001.png").exists()
    assert finish(busy)[:2] == (0, "out-0001.png\n")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process")
def test_an_idle_process_can_be_interrupted(model):
    """The other is not there, and never will be."""
    idle = start_rank(1, model, free_port())
    while b"waits for the others" not in (line := idle.stderr.readline()):
        assert line
    time.sleep(1)
    idle.send_signal(signal.SIGINT)
    try:
        assert idle.wait(60) == 130
    finally:
        idle.kill()


@pytest.mark.slow
def test_processes_that_cannot_meet(model):
    """What they have drawn is there."""
    status, out, err = finish(start_rank(0, model, "nowhere"))
    assert (status, out) == (2, "out-0001.png\n") and "Traceback" not in err
    assert "the other processes cannot be reached: " in err


def test_no_thread_can_be_started(run, monkeypatch):
    def submit(*args):
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(fast.pool, "submit", submit)
    assert run("red apple", "-b", "2", "-W", "64", "-H", "64")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-P", "-I", "-O", "-S"])
def test_pythons_flags(model, flag):
    """With -P, and PYTHONSAFEPATH, the file's own folder is not on the path."""
    if flag == "-S":        # without site-packages: one line
        status, _, err = finish(launch("apple", "-m", model, python=["-S"], PYTHONSAFEPATH="1"))
        assert status == 2 and err.count("\n") == 1 and err.startswith("tiny_sd: ")
        return
    status, out, err = finish(launch("apple", "-m", model, "--steps", "1", python=[flag],
                                     PYTHONSAFEPATH="1"))
    assert (status, out) == (0, "out.png\n"), err
