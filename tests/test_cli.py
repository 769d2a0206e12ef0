"""The command line, on a random model that draws in milliseconds: what it writes, what it says, and how it refuses."""

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file, save_file

from conftest import ROOT
from helpers import sd, write_model

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
    """run(argument, ...) -> (status, lines on stdout, lines on stderr)"""
    def run(*argv):
        capsys.readouterr()
        status = sd.main(["--model", str(model), "--steps", "2", *argv])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()
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
    """refuse(argument, ...) -> the one line that says why; there must be no other, and no new file"""
    def refuse(*argv):
        before = everything()
        status, out, err = run(*argv)
        assert status == 2 and out == [] and everything() == before
        assert len(err) == 1 and err[0].startswith("tiny_sd: ")
        return err[0]
    return refuse


def everything():
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def pixels(picture):
    return np.asarray(picture).astype(int)


def parse(picture):
    """Prompt, negative prompt and facts, by the rules by which other programs read the `parameters` of a PNG."""
    above, line = picture.text["parameters"].rsplit("\n", 1)
    prompt, negative = above.split("\nNegative prompt: ")
    return prompt, negative, dict(re.findall(r"\s*(\w[\w -]+): ([^,]*)(?:,|$)", line))


# ── What it writes ───────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("flags, size", [("", (16, 16)), ("-W 12", (12, 16)), ("-H 26", (16, 26)), ("-W 4 -H 34", (4, 34))])
def test_size(draw, flags, size):
    """Any multiples of the model's factor, here 2; by default the model's own size."""
    picture = draw("red apple", *flags.split())
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", size)


def test_parameters(draw):
    prompt, negative = "a lighthouse, (stormy:1.2), 灯台\nat night", "blur: none"
    picture = draw(*"-s 42 --steps 3 --cfg-scale 4.5 --sampler dpm++2m --karras -W 12".split(), prompt, "-n", negative)
    assert parse(picture) == (prompt, negative, {
        "Steps": "3", "Sampler": "DPM++ 2M Karras", "CFG scale": "4.5", "Seed": "42", "Size": "12x16", "Model": "tiny",
        "RNG": "CPU", "Version": f"tiny_sd {sd.__version__}"})


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
    for argv, names in [("a", ["out-2.png"]), ("a", ["out-3.png"]), ("a -b 2", ["out-000.png", "out-001-1.png"])]:
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


@pytest.mark.parametrize("flags", ["-s 1", "-n apple", "--cfg-scale 2", "--guidance-scale 1", "--steps 3", "--karras",
                                   *(f"--sampler {name}" for name in sd.SAMPLERS if name != "dpm++2m")])
def test_every_option_matters(draw, flags):
    flags = ["--steps", "4", *flags.split()]
    assert abs(pixels(draw("red", *flags)) - pixels(draw("red", *flags[:2]))).max() > 0


@pytest.mark.parametrize("flags, tolerance", [("--backend torch", 1), ("--backend torch --dtype bfloat16", 60),
                                              ("--backend torch --dtype float16", 12)])
def test_torch_draws_the_same_picture(draw, flags, tolerance):
    assert abs(pixels(draw("red apple", *flags.split())) - pixels(draw("red apple"))).max() <= tolerance


def test_a_model_by_name_lies_in_weights_unless_there_is_a_folder_of_that_name(draw, model, here, monkeypatch):
    monkeypatch.setattr(sd, "HERE", here / "program")
    shutil.copytree(model, here / "program/weights/mine")
    assert parse(draw("a", "-m", "mine"))[2]["Model"] == "mine"
    Path("mine").mkdir()
    assert sd.main(["a", "-m", "mine"]) == 2


@pytest.mark.parametrize("argv", [["red apple " * 6], ["red", "-n", "red apple " * 6]])
def test_a_prompt_that_is_too_long_says_what_is_cut(run, argv):
    """On a line of its own. The model has room for ten words."""
    status, _, err = run(*argv)
    said = [line for line in err if line.startswith("tiny_sd: ")]
    assert status == 0 and len(said) == 1 and said[0].endswith("does not see: red apple")


def test_what_is_cut_changes_nothing(draw):
    assert np.array_equal(pixels(draw("red apple " * 9)), pixels(draw("red apple " * 5)))


@pytest.mark.parametrize("prompt", ["", " ", "\0\a\x1b[31m", "🍎🍏 日本語", "e\u0301", "<|endoftext|>", "a" * 3000, "a " * 20000],
                         ids=lambda prompt: ascii(prompt[:9]))
def test_any_prompt_draws(draw, prompt):
    draw(f"--prompt={prompt}")


# ── From a picture ───────────────────────────────────────────────────────────────────────────────────────────────────

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
    return Image.composite(Image.new("RGB", picture.size, "white"), picture.convert("RGB"), Image.fromarray(holes))


def with_alpha(picture, alpha):
    picture = picture.copy()
    picture.putalpha(Image.fromarray(alpha))
    return picture


PICTURES = {    # the picture as it is saved, the file, settings, and the plain picture that it means
    "RGBA": (PLAIN.convert("RGBA"), "in.png", {}, PLAIN),
    "transparent": (with_alpha(PLAIN, np.uint8(255 * ~HOLES)), "in.png", {}, on_white(PLAIN, HOLES)),
    "greyscale": (GREY, "in.png", {}, GREY.convert("RGB")),
    "greyscale, transparent": (with_alpha(GREY, np.uint8(255 * ~HOLES)), "in.png", {}, on_white(GREY, HOLES)),
    "16 bits": (Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "in.png", {}, GREY.convert("RGB")),
    "16 bits, TIFF": (Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "in.tiff", {}, GREY.convert("RGB")),
    "black and white": (PLAIN.convert("1"), "in.png", {}, PLAIN.convert("1").convert("RGB")),
    "palette": (PALETTE, "in.png", {}, PALETTE.convert("RGB")),
    "palette, GIF": (PALETTE, "in.gif", {}, PALETTE.convert("RGB")),
    "palette, transparent": (PALETTE, "in.png", {"transparency": 3}, on_white(PALETTE, np.asarray(PALETTE) == 3)),
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
    ours, reference = (draw(*"apple -W 24 -H 16 --strength 0.5 -i".split(), path) for path in (file, "plain.png"))
    assert ours.size == (24, 16) and np.array_equal(pixels(ours), pixels(reference))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (500, 300)])
def test_from_a_picture_of_any_size(draw, size):
    Image.new("RGB", size, "red").save("in.png")
    assert draw("apple", "-i", "in.png").size == (16, 16)


def test_strength_leads_away_from_the_picture(run, monkeypatch):
    """Counted in steps; the fewer of them, the less noise the sampler starts from."""
    PLAIN.save("in.png")
    started = []
    monkeypatch.setitem(sd.SAMPLERS, "ddim", lambda denoise, x, levels, noise: started.append(levels) or iter([x]))
    for strength in ("0.1", "0.58", "1"):
        run(*f"apple -i in.png --steps 50 --sampler ddim --strength {strength}".split())
    assert [len(levels) for levels in started] == [5, 29, 50]
    assert started[0][0][1] > started[1][0][1] > started[2][0][1]


# ── What it refuses ──────────────────────────────────────────────────────────────────────────────────────────────────

ARGUMENTS = {   # the arguments, and what the line must name
    "": "prompt", "one -p two": "prompt", "one two": "two", "a --frobnicate": "--frobnicate", "a --prom b": "--prom",
    "a -s": "--seed", "a -s x": "'x'", "a -s 1.5": "1.5", "a -s -1": "-1", f"a -s {2 ** 64}": f"{2 ** 64}",
    "a --steps 0": "--steps 0", "a --steps -3": "--steps -3", "a --steps 5000": "5000", "a --steps x": "'x'",
    "a --cfg-scale nan": "--cfg-scale nan", "a --cfg-scale -1": "-1", "a --cfg-scale inf": "inf", "a --cfg-scale x": "'x'",
    "a -i in.png --strength 0": "--strength 0", "a -i in.png --strength -0.5": "-0.5", "a -i in.png --strength 1.01": "1.01",
    "a -i in.png --strength nan": "--strength nan", "a -i in.png --strength inf": "--strength inf",
    "a -i in.png --strength 0.4": "--strength 0.4",
    "a --sampler heun": "'heun'", "a --mask in.png": "--init-img", "a --karras --sampler plms": "--karras",
    "a --prompts in.png": "one prompt", "--prompts none.txt": "none.txt", "--like none.png": "none.png", "--like in.png": "in.png",
    "a --preview x.jpg": "x.jpg", "a --karras --sampler ddim": "--karras",
    "a -W 15": "--width 15", "a -H 17": "--height 17", "a -W -16": "--width -16", "a -W 0": "--width 0", "a -H 0": "--height 0",
    "a -W 2": "--width 2", "a -H 4098": "--height 4098", "a -W 1e3": "1e3",
    "a -b 0": "--batch-size 0", "a -b -1": "-1", "a -b 1001": "1001",
    "a -o no/such.png": "no", "a -o out.jpg": "out.jpg", "a -o out": "out", "a -o .png": ".png", "a -o folder": "folder",
    "a -o in.png/out.png": "in.png",
    "a --backend jax": "'jax'", "a --device tpu": "'tpu'", "a --dtype int8": "'int8'", "a --dtype float16": "--dtype float16",
    "a --backend numpy --device cuda": "--device cuda", "a --device mps": "mps",
    "a -m none": "none", "a -m no/such/folder": "no/such/folder", "a -m none.safetensors": "none.safetensors",
    "a -m folder": "folder", "a -m in.png": "in.png", "a -m sd-v1-4.ckpt": "sd-v1-4.safetensors", "a -m ''": "Stable Diffusion folder",
    "a -i none.png": "none.png", "a -i folder": "folder", "a -i empty.png": "empty.png", "a -i text.png": "text.png",
    "a -i cut.png": "cut.png", "a -i ''": "picture",
}


@pytest.mark.parametrize("argv", ARGUMENTS)
def test_bad_arguments(refuse, argv):
    PLAIN.save("in.png")
    Path("folder").mkdir()
    Path("empty.png").touch()
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("in.png").read_bytes()[:-200])
    assert ARGUMENTS[argv] in refuse(*shlex.split(argv))


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
        (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
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
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


MODELS = {      # what was done to the folder, and what the line must name
    "weights, empty": (write(UNET, b""), UNET),
    "weights, cut in the header": (cut(slice(300)), UNET),
    "weights, cut at the end": (cut(slice(-1)), UNET),
    "weights, a web page": (write(UNET, b"<!DOCTYPE html><title>Sign in</title>"), UNET),
    "weights, a pickle": (write(UNET, pickle.dumps(Bomb())), UNET),
    "weights, header without end": (write(UNET, b"\xff" * 8 + b"{}"), UNET),
    "weights, none": (remove(UNET), UNET),
    "an array too many": (arrays(lambda w: w.update({"conv_in.gain": np.ones(8, np.float32)})), "conv_in.gain is unknown"),
    "an array too few": (arrays(lambda w: w.pop("conv_in.bias")), "conv_in.bias is missing"),
    "an array too short": (arrays(lambda w: w.update({"conv_in.bias": np.ones(7, np.float32)})), "conv_in.bias has shape (7,)"),
    "an array of bytes": (arrays(lambda w: w.update({"conv_in.bias": np.ones(8, np.uint8)})), "conv_in.bias is U8"),
    "an array named in two lines": (arrays(lambda w: w.update({"a\nb": np.ones(8, np.float32)})), "is unknown"),
    "config, none": (remove("vae/config.json"), "vae/config.json"),
    "config, no JSON": (write("vae/config.json", b"{'a': 1}"), "vae/config.json"),
    "config, no text": (write("vae/config.json", b"\xff\xfe"), "vae/config.json"),
    "config, a list": (write("vae/config.json", b"[]"), "vae"),
    "config, a key too few": (change("unet/config.json", cross_attention_dim=None), "cross_attention_dim"),
    "config, other widths": (change("unet/config.json", block_out_channels=[8, 24]), "unet"),
    "config, groups that do not divide": (change("vae/config.json", norm_num_groups=3), "vae"),
    "config, heads that do not divide": (change("text_encoder/config.json", num_attention_heads=5), "text_encoder"),
    "config, an unknown activation": (change("text_encoder/config.json", hidden_act="relu"), "relu"),
    "scheduler, none": (remove("scheduler"), "scheduler_config.json"),
    "scheduler, a list": (write("scheduler/scheduler_config.json", b"[]"), "scheduler"),
    "scheduler, an unknown schedule": (change("scheduler/scheduler_config.json", beta_schedule="cosine"), "'cosine'"),
    "scheduler, an unknown spacing": (change("scheduler/scheduler_config.json", timestep_spacing="wide"), "'wide'"),
    "scheduler, an unknown prediction": (change("scheduler/scheduler_config.json", prediction_type="flow"), "'flow'"),
    "tokenizer, none": (remove("tokenizer"), "tokenizer"),
    "tokenizer, no text": (write("tokenizer/merges.txt", b"\xff\xfe"), "tokenizer"),
    "tokenizer, a list": (write("tokenizer/vocab.json", b'["a"]'), "tokenizer"),
    "tokenizer, longer than the model": (change("tokenizer/tokenizer_config.json", model_max_length=20), "20"),
    "tokenizer, an unknown pad token": (change("tokenizer/tokenizer_config.json", pad_token="nothing"), "nothing"),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_models(refuse, model, name):
    damage, named = MODELS[name]
    damage(Path(shutil.copytree(model, "model")))
    assert named in refuse("apple", "-m", "model")


@pytest.mark.parametrize("name, content", [("a.safetensors", b""), ("b.safetensors", pickle.dumps(Bomb())), ("c.ckpt", pickle.dumps(Bomb())),
                                           ("d.txt", b"hello"), ("e.safetensors", b"\2" + b"\0" * 7 + b"{}")])
def test_bad_single_files(refuse, name, content):
    Path(name).write_bytes(content)
    assert name in refuse("apple", "-m", name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_weights_that_are_not_finite(run, model, value):
    arrays(lambda w: w["conv_in.bias"].fill(value))(Path(shutil.copytree(model, "model")))
    status, out, err = run("apple", "-m", "model")
    assert status == 2 and out == [] and "not finite" in err[-1] and not list(Path().glob("out*"))


# ── When it cannot go on ───────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", ["/proc/out.png", "a" * 300 + ".png", "a" * 249 + ".png"], ids=lambda name: name[:12])
def test_an_output_that_cannot_be_written(run, name):
    """The last of these is a name that is allowed, but has no room for a suffix."""
    if Path(name).parent.is_dir():
        status, out, err = run("apple", "-o", name)
        assert status in (0, 2) and len(out) == (status == 0) and (status == 0 or err[-1].startswith("tiny_sd: "))
        assert len(list(Path().iterdir())) == len(out)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_too_little_memory(run, monkeypatch, backend):
    """More than any system has, of which each library speaks in its own way."""
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
    monkeypatch.setattr(sd, "load", load)
    said = refuse("apple")
    assert said.startswith("tiny_sd: a [31m bccc") and len(said) == 2009


def test_a_file_system_without_links(run, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", link)
    Path("out.png").write_text("mine")
    Path("out-1.png").symlink_to("nowhere")
    assert run("apple")[:2] == (0, ["out-2.png"]) and Image.open("out-2.png").size == (16, 16)
    assert Path("out.png").read_text() == "mine" and Path("out-1.png").is_symlink() and len(list(Path().iterdir())) == 3


def test_a_name_that_a_picture_cannot_have(run, refuse):
    if Path("/proc").is_dir():
        assert run("apple", "-o", "/proc/out.png")[2][-1] == "tiny_sd: /proc/out.png cannot be written: No such file or directory"
    assert refuse("apple", "--preview", "no/such.png") == "tiny_sd: there is no folder no to write to"


# ── As a program ─────────────────────────────────────────────────────────────────────────────────────────────────────

def start(*argv, without=()):
    """The program in a process of its own, to which some packages are not installed."""
    for name in without:
        Path("lacking").mkdir(exist_ok=True)
        Path("lacking", f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')")
    return subprocess.Popen(
        [sys.executable, ROOT / "tiny_sd.py", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": "lacking"}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out.decode(), err.decode()


def test_numpy_is_enough(model):
    """With torch, diffusers and transformers out of reach; a bar on stderr, and on stdout nothing but the path."""
    status, out, err = finish(start("apple", "-m", model, "--steps", "2", without=["torch", "diffusers", "transformers"]))
    assert (status, out) == (0, "out.png\n") and "2/2" in err and err.count("\n") == 1
    assert Image.open("out.png").size == (16, 16)


@pytest.mark.parametrize("argv, without, named", [
    (["apple", "--steps", "0"], [], "--steps 0"),
    (["apple", "--backend", "torch"], ["torch"], "torch"),
    (["apple"], ["tqdm"], "tqdm"),
])
def test_one_line_and_no_traceback(model, argv, without, named):
    status, out, err = finish(start(*argv, "-m", model, without=without))
    assert (status, out) == (2, "") and re.fullmatch(f"tiny_sd: .*{named}.*\n", err), err
    assert not list(Path().glob("*.png"))


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        sd.main(["--help"])
    text = capsys.readouterr().out
    for flag in """PROMPT -p --prompt -n --negative-prompt -m --model -o --output -s --seed --steps --cfg-scale --guidance-scale
            --sampler --karras -W --width -H --height -b --batch-size -i --init-img --strength --backend --device --dtype --show --explain""".split():
        assert re.search(rf"(?<![\w-]){flag}\b", text), flag


# ── Files of prompts, pictures drawn again, previews ───────────────────────────────────────────────────────────────

def facts(path):
    """A reader of its own for the text that programs leave in a picture: (prompt, negative, {key: value})."""
    lines = Image.open(path).text["parameters"].split("\n")
    last = dict(part.split(": ", 1) for part in lines[-1].split(", "))
    return "\n".join(lines[:-2]), lines[-2].removeprefix("Negative prompt: "), last


def test_like_draws_the_picture_again(tmp_path):
    first, again, other, model = tmp_path / "first.png", tmp_path / "again.png", tmp_path / "other.png", str(write_model(tmp_path / "m"))
    prompt = "red, apple: Steps: 3\nNegative prompt: x"
    how = ["-n", "a, b: c", "--steps", "3", "-s", "7", "--sampler", "euler", "--karras", "--cfg-scale", "3.5", "-W", "20", "-H", "12"]
    assert sd.main([prompt, "-m", model, "-o", str(first), *how]) == 0
    assert facts(first)[:2] == (prompt, "a, b: c") and facts(first)[2]["Seed"] == "7"
    assert sd.main(["--like", str(first), "-m", model, "-o", str(again)]) == 0
    assert again.read_bytes() == first.read_bytes()
    assert sd.main(["blue", "--like", str(first), "-m", model, "-o", str(other), "-s", "8"]) == 0
    assert facts(other)[0] == "blue" and facts(other)[2]["Seed"] == "8" and facts(other)[2]["Sampler"] == "Euler Karras"


def test_like_reads_what_other_programs_write(tmp_path):
    info = PngInfo()
    info.add_text("parameters", "a (cat:1.2), sitting\nNegative prompt: dog, bad\nSteps: 25, Sampler: DPM++ 2M, Schedule type: Karras, "
                  "CFG scale: 6.5, Seed: 42, Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, RNG: CPU, Version: v1.10.1")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    args = sd.parse_arguments(["--like", str(tmp_path / "a.png"), "--steps", "9"])
    assert (args.prompt, args.negative_prompt, args.steps, args.sampler, args.karras, args.cfg_scale, args.seed, args.width, args.height) == (
        "a (cat:1.2), sitting", "dog, bad", 9, "dpm++2m", True, 6.5, 42, 512, 768)


def test_prompts_from_a_file(tmp_path, capsys, monkeypatch):
    model, out, lines = str(write_model(tmp_path / "m")), tmp_path / "p.png", tmp_path / "prompts.txt"
    lines.write_text("# first\nred apple\n\na dog's house -s 5 --steps 2 -n 'b, c'   # a comment\nwell-known -b 2\n", encoding="utf-8")
    run = ["--prompts", str(lines), "-m", model, "-o", str(out), "--steps", "1"]
    assert sd.main(run) == 0
    names = ["p-0002.png", "p-0004.png", "p-0005-000.png", "p-0005-001.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    prompt, negative, last = facts(tmp_path / "p-0004.png")
    assert (prompt, negative, last["Seed"], last["Steps"]) == ("a dog's house", "b, c", "5", "2")
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    (tmp_path / "p-0004.png").unlink()
    assert sd.main(run) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert sum((tmp_path / name).stat().st_mtime_ns != before[name] for name in names) == 1
    monkeypatch.setattr(sd, "load", None)       # no need to wait for a model if nothing is to be drawn
    capsys.readouterr()
    assert sd.main(run) == 0 and capsys.readouterr() == ("", f"tiny_sd: {lines} has no prompt whose picture is not there yet\n")
    for line, said in (("red --steps 0", "--steps 0"), ("red -h 64", "-h"), ("red --preview x.png", "--preview"), ("red -m x", "model")):
        lines.write_text(line, encoding="utf-8")
        assert sd.main(run) == 2
        err = capsys.readouterr().err
        assert "line 1: " in err and said in err and err.count("\n") == 1


def test_two_processes_share_the_prompts(tmp_path):
    model, lines = str(write_model(tmp_path / "m")), tmp_path / "prompts.txt"
    lines.write_text("red\napple\nred apple\n", encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "tiny_sd.py",
                           "--prompts", lines, "-m", model, "-o", tmp_path / "p.png", "--steps", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["p-0001.png", "p-0002.png", "p-0003.png"]


def test_preview_is_close_to_the_picture(tmp_path):
    """The linear map of the last latents, beside the decoder's picture in small."""
    picture, preview = tmp_path / "a.png", tmp_path / "preview.png"
    assert sd.main(["red apple", "-m", str(ROOT / "weights" / "emoji"), "-o", str(picture), "--preview", str(preview), "--steps", "8"]) == 0
    small = np.asarray(Image.open(preview)).astype(float)
    large = np.asarray(Image.open(picture).resize(Image.open(preview).size, Image.Resampling.BOX)).astype(float)
    assert small.shape == (16, 16, 3) and np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.8


def test_preview_replaces_only_a_preview(run, refuse):
    PLAIN.save("mine.png")
    Path("text.png").write_text("mine")
    for name in ("mine.png", "text.png"):
        assert refuse("apple", "--preview", name) == f"tiny_sd: --preview {name} is there already, and no preview: name another file"
    for seed in "12":
        assert run("apple", "--preview", "new.png", "-s", seed)[0] == 0
        assert Image.open("new.png").size == (8, 8)
