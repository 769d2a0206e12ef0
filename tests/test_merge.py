"""--merge: the weights are means of several models', in each of the layouts."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from test_fuzz import write_single_file

from extras import formats, merge
from extras.tools.models import write_model
from helpers import CONFIG, TOKENIZER, TWO_ENCODERS, contents
from helpers_cli import *  # noqa: F403
from helpers_cli import cli_lines


def write(name, seed, config=CONFIG, dtype=np.float32):
    def save(path, shapes):
        rng = np.random.default_rng([seed, len(str(path.parent.name))])
        save_file({key: rng.standard_normal(shape).astype(dtype) for key, shape in shapes.items()},
                  path)
    return write_model(Path(name), config, TOKENIZER, save)


def weights(path):
    return {f"{part}.{name}": array for part, arrays in formats.read(Path(path))[1].items()
            for name, array in arrays.items()}


def is_mean(new, *shares, within=1e-6):
    """Is each weight of a model the sum of those of (path, share)?"""
    found, parts = weights(new), [(weights(path), share) for path, share in shares]
    assert found.keys() == parts[0][0].keys()
    for name, array in found.items():
        sums = sum(share * arrays[name].astype(float).reshape(array.shape)
                   for arrays, share in parts)
        assert abs(array - sums).max() <= within * max(1, abs(sums).max()), name


def test_folders(run):
    for name, seed in ("a", 1), ("b", 2), ("c", 3):
        write(name, seed)
    before = contents()
    assert cli_lines(run, "--merge", "a:0.25", "b:0.75", "-o", "new", model=False) == (
        0, ["new"], [])
    is_mean("new", ("a", 0.25), ("b", 0.75))
    assert {path: data for path, data in contents().items() if path in before} == before
    same = {path.relative_to("a") for path in before if path.parts[:1] == ("a",)} - {Path()}
    assert {path.relative_to("new") for path in Path("new").rglob("*")} == same
    assert run.bare("red", "-m", "new", "--steps", "1")[0] == 0

    assert cli_lines(run, "--merge", "a:1", "b:0.5", "c:-0.5", "-o", "more", model=False)[2] == []
    is_mean("more", ("a", 1), ("b", 0.5), ("c", -0.5))      # a + (b - c) / 2
    assert cli_lines(run, "--merge", "a", "b:3", "-o", "shares", model=False)[2] == [
        "the weights of --merge sum to 4, so each is divided by that"]
    is_mean("shares", ("a", 0.25), ("b", 0.75))


def write_file(name, seed, encoders=1):
    """A checkpoint in one file, with things in it that no network computes with."""
    write_single_file(name, encoders)
    rng = np.random.default_rng(seed)
    arrays = {key: rng.standard_normal(array.shape).astype(np.float32)
              for key, array in load_file(name).items()}
    save_file(arrays | {"betas": np.full(3, seed, np.float32), "v_pred": np.zeros(1, np.float32)},
              name, {"modelspec.prediction_type": "v", "sshs_model_hash": "of another"})


@pytest.mark.parametrize("encoders", [1, 2])
def test_single_files(run, encoders):
    """Two encoders: OpenCLIP has q, k and v in one array, and its projection transposed."""
    for name, seed in ("a.safetensors", 1), ("b.safetensors", 2):
        write_file(name, seed, encoders)
    assert run.bare("--merge", "a.safetensors:0.5", "b.safetensors:0.5", "-o",
                    "new.safetensors")[:2] == (0, ["new.safetensors"])
    a, b, new = map(load_file, ("a.safetensors", "b.safetensors", "new.safetensors"))
    assert new.keys() == a.keys() and [*new["betas"]] == [1] * 3
    assert all(np.allclose(new[name], (a[name] + b[name]) / 2, atol=1e-6)
               for name in new.keys() - {"betas"})
    assert run.bare("red", "-m", "new.safetensors", "--steps", "1", "-W", "16", "-H", "16")[0] == 0
    with open("new.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "pt", "modelspec.prediction_type": "v"}


@pytest.mark.slow
def test_a_folder_and_a_single_file(folder, single_file, run):
    """The same weights in other names, and as 1x1 convolutions."""
    file = single_file("F32")
    assert run.bare("--merge", str(folder), str(file), "-o", "new")[0] == 0
    is_mean("new", (folder, 1), within=1e-6)
    assert run.bare("--merge", f"{file}:-1", f"{folder}:2", "-o", "new.safetensors")[0] == 0
    is_mean("new.safetensors", (folder, 1), within=1e-5)
    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained("new", safety_checker=None)
    assert torch.equal(pipeline.unet.conv_in.weight.detach(), torch.from_numpy(
        load_file("new/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_of_numbers_stay(dtype):
    """Rounded as torch rounds."""
    arrays = [torch.randn(1000, generator=torch.manual_seed(seed)).to(dtype) for seed in (1, 2)]
    mean = (0.3 * arrays[0].float() + 0.7 * arrays[1].float())
    save_torch({"a": arrays[0]}, "a.safetensors")
    old = formats.read_tensors("a.safetensors")
    merge.write_safetensors(Path("b.safetensors"), old, {}, lambda name: mean.numpy())
    assert torch.equal(load_torch("b.safetensors")["a"], mean.to(dtype))


def test_what_does_not_go_together(run, refuse, monkeypatch):
    write("a", 1)
    write("b", 2)
    write("xl", 3, TWO_ENCODERS)
    write("wide", 4, CONFIG | {"unet": CONFIG["unet"] | {"in_channels": 9}})
    write("v", 5, CONFIG | {"scheduler": CONFIG["scheduler"] | {
        "prediction_type": "v_prediction"}})
    write("huge", 6, dtype=np.float16)
    write("lacks", 7)
    write_file("f.safetensors", 8)
    file = Path("lacks/unet/diffusion_pytorch_model.safetensors")
    save_file({name: array for name, array in load_file(file).items() if name != "conv_in.bias"},
              file)
    Path("kept").mkdir()
    save_file({"lora_x": np.ones(1)}, "lora.safetensors")

    def why(*argv):
        return refuse("--merge", *argv).removeprefix("tiny_sd: ")

    start = "xl is not the same kind of model as a: they differ in text_encoder_2's "
    assert why("a", "xl", "-o", "new").startswith(start)
    assert why("a", "wide", "-o", "new") == (
        "wide is not the same kind of model as a: they differ in unet's conv_in.weight")
    assert why("a", "lacks", "-o", "new").endswith("they differ in unet's conv_in.bias")
    assert why("a", "v", "-o", "new") == "v predicts v_prediction, but a predicts epsilon"
    assert "f.safetensors is not the same kind of" in why("a", "f.safetensors", "-o", "new")
    assert "is a LoRA" in why("a", "lora.safetensors", "-o", "new")
    assert why("a", "-o", "new") == "--merge needs at least two models"
    assert why("a:1", "b:-1", "-o", "new") == (
        "the weights of --merge sum to 0")
    assert why("a", "b") == "--output out.png must name a folder, like a"
    assert why("f.safetensors", "b", "-o", "new") == (
        "--output new must name a .safetensors, like f.safetensors")
    assert why("a", "b", "-o", "kept") == "kept exists already"
    assert why("a", "b", "-o", "no/new") == "there is no folder no to write to"
    assert "there is no model none" in why("a", "none", "-o", "new")
    assert "is not finite" in why("huge:1000", "a:-999.99", "-o", "new")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2, 1, 1))
    assert why("a", "b", "-o", "new").startswith("new needs 0.0 GB, but only 0.0 GB are free")


@pytest.mark.parametrize("output", ["a/new", "a/unet/new", "a/tokenizer/new"])
def test_a_folder_that_holds_odd_things(run, output):
    """And the new one: only files beside those of a model are copied, as they were before."""
    write("a", 1)
    write("b", 2)
    before = {path.relative_to("a") for path in Path("a").rglob("*")}
    os.mkfifo("a/pipe")
    for link, target in ("dead", "none"), ("unet/up", ".."), ("tokenizer/itself", "itself"):
        Path("a", link).symlink_to(target)
    Path("a/.git").mkdir()
    Path("a/.git/HEAD").write_text("x")
    os.rename("a/scheduler", "there")
    Path("a/scheduler").symlink_to("../there")
    assert cli_lines(run, "--merge", "a:0.5", "b:0.5", "-o", output, model=False) == (
        0, [output], [])
    assert {path.relative_to(output) for path in Path(output).rglob("*")} == before


def test_an_output_that_comes_to_be_meanwhile(run, monkeypatch):
    """Is kept."""
    write_file("a.safetensors", 1)
    write("b", 2)
    narrowed = merge.narrowed

    def meanwhile(*args):
        Path("new.safetensors").write_text("mine")
        Path("new").mkdir(exist_ok=True)
        Path("new/mine").write_text("mine")
        return narrowed(*args)

    monkeypatch.setattr(merge, "narrowed", meanwhile)
    assert run.bare("--merge", "a.safetensors:0.5", "a.safetensors:0.5", "-o",
                    "new.safetensors")[:2] == (0, ["new-1.safetensors"])
    shutil.rmtree("new")
    status, out, (line,) = run.bare("--merge", "b:0.5", "b:0.5", "-o", "new")
    assert (status, out) == (2, []) and "new cannot be written" in line
    assert Path("new/mine").read_text() == Path("new.safetensors").read_text() == "mine"


def test_a_disk_that_is_full_leaves_nothing(refuse, monkeypatch):
    """As it turns out in the middle of it."""
    write("a", 1)
    write("b", 2)

    def full(values, dtype):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "narrowed", full)
    assert refuse("--merge", "a", "b", "-o", "new") == (
        "tiny_sd: new cannot be written: No space left on device")
