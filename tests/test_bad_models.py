"""Models that are broken, odd, or changed while they are in use."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from extras import cli, formats, like_diffusers
from helpers import finish
from helpers_cli import *  # noqa: F403
from helpers_cli import SCHEDULER, UNET, change, parse, start, write_lora

# ── Models ────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("settings, said", [
    ({"_class_name": "KarrasVeScheduler"}, "KarrasVeScheduler does not exist here: dpm++2m"),
    ({"thresholding": True}, "thresholding is False here, not True"),
    ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
     "algorithm_type is 'dpmsolver++' here"),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
     "solver_order is 2 here, not 3"),
    ({"use_flow_sigmas": True}, "use_flow_sigmas is False here, not True")])
def test_what_a_scheduler_asks_for_and_does_not_get(run, model, settings, said):
    change(SCHEDULER, **settings)(Path(shutil.copytree(model, "model")))
    status, out, err = run("red", "-m", "model")
    lines = [line for line in err if line.startswith("tiny_sd: ")]
    assert status == 0 and len(lines) == 1 and said in lines[0]


def test_the_default_model_is_the_bundled_one(here):
    """The model called emoji, if the current folder has one, too."""
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
        said = "is not a file" if file == UNET else "is a FIFO that nobody writes to"
        assert f"{file} {said}" in refuse("red", "-m", str(copy))
    assert "neither a folder nor a file" in refuse("red", "-m", name)
    assert f"the LoRA {name} is not a file" in refuse("red", "--lora", name)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are Unicode")
def test_names_that_are_no_text(model, here):
    """Of bytes that no encoding has; the picture's text has question marks for them."""
    folder, lora, output = map(os.fsdecode, (b"m\xff", b"l\xff.safetensors", b"o\xff.png"))
    shutil.copytree(model, folder)
    write_lora(lora)
    status, out, err = finish(start("apple", "-m", folder, "--lora", lora, "--steps", "1", "-o",
                                    output))
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


@pytest.mark.parametrize("flags", [["--lora", "a"], ["--embedding", "a"], ["--vae", "a"],
                                   ["--control", "a", "a.png"], ["-m", "a"]])
def test_every_reader_refuses_such_a_shape(refuse, model, flags):
    header = json.dumps({"lora_up.weight": {"dtype": "F32", "shape": [0, 2 ** 62, 2 ** 62],
                                            "data_offsets": [0, 0]}}).encode()
    Path("a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    Image.new("RGB", (8, 8)).save("a.png")
    flags = [flag.replace("a", "a.safetensors") if flag == "a" else flag for flag in flags]
    assert "a.safetensors" in refuse("red", "-m", model, "-s", "1", *flags)


@pytest.mark.filterwarnings("error")
def test_numbers_beyond_float32_are_told_in_one_line(run, refuse, model):
    """NumPy warns of each, from wherever it meets them."""
    path = Path(shutil.copytree(model, "model")) / UNET
    arrays = load_file(path)
    arrays["conv_in.weight"] = np.full(arrays["conv_in.weight"].shape, 1e300)
    path.unlink()
    save_file(arrays, path)
    save_file({"emb_params": np.full((1, 12), 1e300)}, "word.safetensors")
    status, _, lines = run("red", "-m", "model", "--steps", "1")
    assert status == 2 and "not finite" in lines[-1]
    assert "that are not finite" in refuse("red", "-m", model, "--embedding", "word.safetensors")


def test_a_model_that_is_changed_while_it_is_in_use(run, model, monkeypatch):
    """A file that is written into is refused; if it is replaced, the old one is still read."""
    path = Path(shutil.copytree(model, "model")) / UNET
    generate = like_diffusers.generate

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

    monkeypatch.setattr(like_diffusers, "generate", then(write_it))
    status, out, err = run("red", "-m", "model")
    assert (status, out) == (2, ["out.png"])     # which took long, and may be right
    assert err[-1].endswith("was changed while it was in use: what was drawn then may be wrong")
    monkeypatch.setattr(like_diffusers, "generate", then(replace_it))
    assert run("red", "-m", "model")[:2] == (0, ["out-1.png"])


def test_a_loaded_model_prints_as_one_line(model):
    assert len(repr(formats.load(model))) < 100


# ── Folders that are broken ───────────────────────────────────────────────────────────────────────

class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(part):
    return lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[part])


def arrays(**changes):
    """Set arrays of the U-Net's conv_in; remove those given as None."""
    def rewrite(folder):
        weights = load_file(folder / UNET) | {f"conv_in.{k}": a for k, a in changes.items()}
        save_file({k: a for k, a in weights.items() if a is not None}, folder / UNET)
    return rewrite


def remove(name):
    return lambda folder: (shutil.rmtree(folder / name)
                           if (folder / name).is_dir() else (folder / name).unlink())


DAMAGED = {     # what is done to the folder, and what the line must name
    "weights, empty": (write(UNET, b""), UNET),
    "weights, cut in the header": (cut(slice(300)), UNET),
    "weights, cut at the end": (cut(slice(-1)), UNET),
    "weights, a web page": (write(UNET, b"<!DOCTYPE html><title>Sign in</title>"), UNET),
    "weights, a pickle": (write(UNET, pickle.dumps(Bomb())), UNET),
    "weights, header without end": (write(UNET, b"\xff" * 8 + b"{}"), UNET),
    "weights, none": (remove(UNET), UNET),
    "an array too many": (arrays(gain=np.ones(8, np.float32)), "conv_in.gain is unknown"),
    "an array too few": (arrays(bias=None), "conv_in.bias is missing"),
    "an array too short": (arrays(bias=np.ones(7, np.float32)), "conv_in.bias has shape (7,)"),
    "an array of bytes": (arrays(bias=np.ones(8, np.uint8)), "numbers are uint8, not floats"),
    "an array named in two lines": (arrays(**{"a\nb": np.ones(8, np.float32)}), "is unknown"),
    "config, none": (remove("vae/config.json"), "vae/config.json"),
    "config, no JSON": (write("vae/config.json", b"{'a': 1}"), "vae/config.json"),
    "config, no text": (write("vae/config.json", b"\xff\xfe"), "vae/config.json"),
    "config, a list": (write("vae/config.json", b"[]"), "vae"),
    "config, nested 100,000 deep": (write("unet/config.json", b'{"a":' * 100_000), "unet/config"),
    "scheduler, none": (remove("scheduler"), "scheduler_config.json"),
    "scheduler, a list": (write(SCHEDULER, b"[]"), "scheduler"),
    "scheduler, beta_end null": (write(SCHEDULER, b'{"beta_end": null}'), "beta_end"),
    "scheduler, null timesteps": (write(SCHEDULER, b'{"num_train_timesteps": null}'), "timesteps"),
    "scheduler, nested 100,000 deep": (write(SCHEDULER, b"[" * 100_000), SCHEDULER),
    "tokenizer, none": (remove("tokenizer"), "tokenizer"),
    "tokenizer, no text": (write("tokenizer/merges.txt", b"\xff\xfe"), "tokenizer"),
    "tokenizer, a list": (write("tokenizer/vocab.json", b'["a"]'), "tokenizer"),
    "tokenizer, nested 100,000 deep": (write("tokenizer/vocab.json", b"[" * 100_000), "vocab"),
    "tokenizer, no words": (write("tokenizer/vocab.json", b"{}"), "no vocabulary"),
    "tokenizer, no specials": (write("tokenizer/vocab.json", b'{"a": 0}'), "startoftext"),
    "tokenizer, an id that is none": (write("tokenizer/vocab.json", b'{"<|startoftext|>": true, '
                                            b'"<|endoftext|>": 1}'), "no vocabulary")}
CHANGED = {     # a part, what its config says, and what the line must name
    "text_encoder": [
        ({"num_attention_heads": 5}, "text_encoder"), ({"hidden_act": "relu"}, "relu"),
        ({"num_hidden_layers": 10 ** 10}, "10000000000"), ({"layer_norm_eps": 1e-6}, "layer_norm")],
    "vae": [
        ({"norm_num_groups": 3}, "vae"), ({"in_channels": 1}, "in_channels"),
        ({"out_channels": 4}, "out_channels"), ({"act_fn": "gelu"}, "act_fn")],
    "unet": [
        ({"cross_attention_dim": None}, "cross_attention_dim"),
        ({"cross_attention_dim": 16}, "cross_attention_dim is 16"),
        ({"block_out_channels": [8, 24]}, "unet"),
        ({"num_attention_heads": [2]}, "heads"), ({"out_channels": 3}, "returns 3 channels"),
        ({"in_channels": 8}, "8 input channels"), ({"in_channels": 5}, "5 input channels"),
        ({"norm_eps": 1e-6}, "norm_eps"), ({"act_fn": "mish"}, "mish"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"), ({"only_cross_attention": True}, "only_c"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"transformer_layers_per_block": [1, 2, 3]}, "transformer_layers")],
    "scheduler": [
        ({"beta_schedule": "cosine"}, "'cosine'"), ({"timestep_spacing": "wide"}, "'wide'"),
        ({"prediction_type": "flow"}, "'flow'"), ({"beta_end": 1}, "beta_end"),
        ({"beta_end": -1}, "beta_end"), ({"beta_end": "0.012"}, "beta_end"),
        ({"beta_start": 0, "beta_end": 0}, "beta_start"), ({"beta_start": 0.02}, "below"),
        ({"num_train_timesteps": 1000.0}, "1000.0"), ({"num_train_timesteps": -5}, "-5"),
        ({"num_train_timesteps": 10 ** 7}, "10000000"), ({"_class_name": []}, "_class_name"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"_guidance_scale": 10 ** 400}, "_guidance_scale")],
    "tokenizer": [({"model_max_length": 20}, "20"), ({"pad_token": "nothing"}, "nothing")]}
FILES = {"scheduler": SCHEDULER, "tokenizer": "tokenizer/tokenizer_config.json"}
MODELS = DAMAGED | {
    f"{part}, {settings}"[:60]: (change(FILES.get(part, f"{part}/config.json"), **settings), named)
    for part, rows in CHANGED.items() for settings, named in rows}


@pytest.mark.parametrize("name", MODELS)
def test_bad_models(refuse, model, name):
    damage, named = MODELS[name]
    damage(Path(shutil.copytree(model, "model")))
    assert named in refuse("apple", "-m", "model")


@pytest.mark.parametrize("name, content",
                         [("a.safetensors", b""), ("b.safetensors", pickle.dumps(Bomb())),
                          ("c.ckpt", pickle.dumps(Bomb())), ("d.txt", b"hello"),
                          ("e.safetensors", b"\2" + b"\0" * 7 + b"{}")])
def test_bad_single_files(refuse, name, content):
    Path(name).write_bytes(content)
    assert name in refuse("apple", "-m", name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_weights_that_are_not_finite(run, model, value):
    arrays(bias=np.full(8, value, np.float32))(Path(shutil.copytree(model, "model")))
    status, out, err = run("apple", "-m", "model")
    assert status == 2 and out == [] and "not finite" in err[-1] and not list(Path().glob("out*"))
