"""LoRAs with every kind of names are W + w α/r B A, as diffusers fuses them, and what does not fit
is refused by name.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_sd
from conftest import with_torch_too
from extras import cli, formats
from helpers import drawn
from helpers_diffusers import PROMPT, drawn_by, same_pictures

pytestmark = pytest.mark.slow

UNET = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
        "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0",
        "down_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj",
        "down_blocks.0.attentions.1.proj_in", "down_blocks.2.resnets.0.conv1",
        "down_blocks.0.downsamplers.0.conv", "up_blocks.0.resnets.0.conv_shortcut",
        "mid_block.resnets.0.time_emb_proj"]
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.2.self_attn.out_proj",
        "encoder.layers.1.mlp.fc1"]
ATTENTION = [name for name in UNET if "attn" in name]


def parts_of(model):
    parts = zip(("text_encoder", "text_encoder_2"), model.encoders)
    return {"unet": model.unet} | {part: encoder.weights for part, encoder in parts}


@pytest.fixture(scope="module")
def plain(folder):
    return {part: tiny_sd.flatten(weights)
            for part, weights in parts_of(formats.load(folder)).items()}


@pytest.fixture(scope="module")
def pairs(plain):
    """{(part, module): (A, B)}, of rank 3, as torch keeps the weights: channels before places."""
    torch.manual_seed(5)
    made = {}
    for part, names in (("unet", UNET), ("text_encoder", TEXT)):
        for name in names:
            shape = plain[part][f"{name}.weight"].shape
            inputs = shape[1:] if len(shape) == 2 else (shape[3], *shape[1:3])
            made[part, name] = (torch.randn(3, *inputs) / np.prod(inputs) ** 0.5,
                                torch.randn(shape[0], 3, *[1] * (len(shape) - 2)) / 3 ** 0.5)
    return made


def kohya(part, name):
    start = "lora_unet_" if part == "unet" else "lora_te_text_model_"
    name = start + name.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def peft(part, name):
    name = f"{part}.{'text_model.' * (part == 'text_encoder')}{name}"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha"


def old_diffusers(part, name):
    if part == "text_encoder":
        name = f"text_encoder.text_model.{name}.lora_linear_layer"
        return f"{name}.down.weight", f"{name}.up.weight", None
    name = "unet." + re.sub(r"\.(to_\w+)(\.0)?$", r".processor.\1_lora", name)
    return f"{name}.down.weight", f"{name}.up.weight", None


def bare_processor(part, name):
    return tuple(name and name.removeprefix("unet.") for name in old_diffusers(part, name))


def base_model(part, name):
    return (f"base_model.model.{name}.lora_A.default.weight",
            f"base_model.model.{name}.lora_B.default.weight", None)


NAMINGS = {"kohya": (kohya, UNET + TEXT), "peft": (peft, UNET + TEXT),
           "old diffusers": (old_diffusers, ATTENTION + TEXT),
           "processors alone": (bare_processor, ATTENTION), "peft's own": (base_model, UNET)}


def write(path, pairs, naming, names, alpha=None, dtype=torch.float32, metadata=None):
    arrays = {}
    for (part, name), (A, B) in pairs.items():
        if name in names:
            down, up, scale = naming(part, name)
            arrays[down], arrays[up] = A.to(dtype).contiguous(), B.to(dtype).contiguous()
            if alpha is not None and scale:
                arrays[scale] = torch.tensor(float(alpha)).to(dtype)
    save_file(arrays, path, metadata)
    return path


def largest_error(model, plain, pairs, names, scale):
    """Of each weight from W + scale · B A, computed in torch as a convolution by A followed by one
    by B.
    """
    errors = []
    for part in plain:
        for name, array in tiny_sd.flatten(parts_of(model)[part]).items():
            expected = torch.from_numpy(np.array(plain[part][name], np.float32))
            pair = pairs.get((part, name.removesuffix(".weight")))
            if pair and name.removesuffix(".weight") in names and name.endswith(".weight"):
                delta = torch.einsum("or,r...->o...", pair[1].flatten(1), pair[0]) * scale
                expected = expected + (delta.permute(0, 2, 3, 1) if delta.ndim == 4 else delta)
            found = np.asarray(array, np.float32)
            errors.append(np.abs(found - expected.numpy().reshape(array.shape)).max())
    return np.max(errors)       # max() would pass over NaN


@with_torch_too("naming", NAMINGS, ["kohya"])
def test_namings(naming, folder, plain, pairs, backend, tmp_path):
    name, names = NAMINGS[naming]
    path = write(tmp_path / "lora.safetensors", pairs, name, names)
    assert largest_error(formats.load(folder, backend, loras=[(path, 0.5)]), plain, pairs, names,
                         0.5) < 1e-5


def test_a_lora_that_torch_wrote(folder, plain, pairs, tmp_path):
    name, names = NAMINGS["kohya"]
    arrays = load_file(write(tmp_path / "lora.safetensors", pairs, name, names))
    torch.save(arrays, tmp_path / "lora.pt")
    model = formats.load(folder, loras=[(tmp_path / "lora.pt", 0.5)])
    assert largest_error(model, plain, pairs, names, 0.5) < 1e-5


@pytest.mark.parametrize("naming", ["kohya", "peft"])
def test_alpha_over_rank(naming, folder, plain, pairs, tmp_path):
    path = write(tmp_path / "lora.safetensors", pairs, *NAMINGS[naming], alpha=12)
    assert largest_error(formats.load(folder, loras=[(path, -1)]), plain, pairs, UNET + TEXT,
                         -4) < 1e-5


def test_alpha_in_the_metadata(folder, plain, pairs, tmp_path):
    """Where current versions of diffusers write it."""
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(
        {"unet.r": 3, "unet.lora_alpha": 12, "text_encoder.lora_alpha": 12})}
    path = write(tmp_path / "lora.safetensors", pairs, *NAMINGS["peft"], metadata=metadata)
    assert largest_error(formats.load(folder, loras=[(path, 1)]), plain, pairs, UNET + TEXT,
                         4) < 1e-5


def test_half_precision_and_several_files(folder, plain, pairs, tmp_path):
    one = write(tmp_path / "one.safetensors", pairs, *NAMINGS["kohya"], dtype=torch.float16)
    two = write(tmp_path / "two.safetensors", pairs, *NAMINGS["peft"], dtype=torch.bfloat16)
    model = formats.load(folder, loras=[(one, 1), (two, 0.5)])
    assert 0 < largest_error(model, plain, pairs, UNET + TEXT, 1.5) < 0.02


def test_single_file(single_file, pairs, tmp_path):
    path = write(tmp_path / "lora.safetensors", pairs, *NAMINGS["kohya"])
    bare, model = (formats.load(single_file("F32")),
                   formats.load(single_file("F32"), loras=[(path, 1)]))
    plain = {part: tiny_sd.flatten(weights) for part, weights in parts_of(bare).items()}
    assert largest_error(model, plain, pairs, UNET + TEXT, 1) < 1e-5


@with_torch_too("naming", ["kohya", "peft"], ["peft"])
def test_diffusers_draws_the_same(naming, folder, pairs, backend, tmp_path):
    """load_lora_weights and fuse_lora, which need peft."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    names = [
        name for name in UNET + TEXT if "time_emb" not in name or naming == "peft"
    ]  # diffusers has no name for it
    settings = {f"{part}.{key}": value for part, modules in (("unet", UNET), ("text_encoder", TEXT))
                for key, value in (("r", 3), ("lora_alpha", 2), ("target_modules", modules))}
    path = write(tmp_path / "lora.safetensors", pairs, NAMINGS[naming][0], names,
                 **({"alpha": 2} if naming == "kohya"
                    else {"metadata": {"lora_adapter_metadata": json.dumps(settings)}}))
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    how = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 5, "width": 64, "height": 64}
    before = drawn_by(pipe, **how)
    pipe.load_lora_weights(str(path))
    pipe.fuse_lora(lora_scale=0.8)
    ours = drawn(formats.load(folder, backend, loras=[(path, 0.8)]), PROMPT, seeds=(3,), steps=3,
                 guidance=5, sampler="ddim", width=64, height=64)
    same_pictures(f"picture with a LoRA, {naming}", ours, drawn_by(pipe, **how), before)


# ── Refused ───────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_an_alpha_of_any_shape_of_one_number(shape, folder, plain, pairs, tmp_path):
    """NumPy no longer converts it to a number, from 2.4 on."""
    path = write(tmp_path / "lora.safetensors", pairs, *NAMINGS["kohya"], alpha=12)
    arrays = {name: array.reshape(shape) if name.endswith(".alpha") else array
              for name, array in load_file(path).items()}
    save_file(arrays, path)
    model = formats.load(folder, loras=[(path, -1)])
    assert largest_error(model, plain, pairs, UNET + TEXT, -4) < 1e-5


NAME, WEIGHT = "lora_unet_mid_block_resnets_0_conv1", "mid_block.resnets.0.conv1.weight"


def pair(down, up):
    """The two matrices of a LoRA, of zeros and of these shapes."""
    return {f"{NAME}.lora_down.weight": torch.zeros(down),
            f"{NAME}.lora_up.weight": torch.zeros(up)}


@pytest.mark.parametrize(
    "arrays, metadata, named",
    [*(({name: torch.zeros(3, 8)}, {}, named) for name, named in (
        ("lora_unet_input_blocks_30_1_proj_in.lora_down.weight",
         "lora_unet_input_blocks_30_1_proj_in.lora_down.weight"),
        ("lora_te_text_model_encoder_layers_9_mlp_fc1.lora_up.weight",
         "layers_9_mlp_fc1.lora_up.weight"),
        ("lora_unet_conv_in.dora_scale", "conv_in.weight: it has an alpha or a scale"),
        ("anything", "anything"), ("lora_unet_conv_in.lora_down.weight", "conv_in.weight"))),
     (pair((3, 128, 3, 3), (128, 4, 1, 1)), {}, WEIGHT),
     (pair((3, 128, 1, 1), (128, 3, 1, 1)), {}, WEIGHT),
     (pair((3, 64, 3, 6), (128, 3)), {}, WEIGHT),
     (pair((3, 1152), (128, 3)), {}, WEIGHT),
     (pair((3, 128, 3, 3), (64, 6)), {}, WEIGHT),
     (pair((0, 128, 3, 3), (128, 0)), {}, WEIGHT),
     (pair((), ()), {}, WEIGHT),
     (pair((3, 128, 3, 3), (128, 3, 1, 1)) | {f"{NAME}.alpha": torch.zeros(2)}, {},
      "not one number"),
     ({}, {"format": "pt"}, "it has no weights"),
     ({}, {"lora_adapter_metadata": "{"}, "it has no weights"),
     (None, {"lora_adapter_metadata": "{"}, "lora_adapter_metadata is not JSON"),
     (None, {"lora_adapter_metadata": "[" * 100_000}, "lora_adapter_metadata is not JSON"),
     (None, {"lora_adapter_metadata": '{"unet.lora_alpha": 1' + "0" * 400 + "}"}, "conv1.weight"),
     (None, {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'}, "conv1.weight"),
     (None, {"lora_adapter_metadata": '{"unet.lora_alpha": []}'}, "conv1.weight")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_no_lora_of_the_model(arrays, metadata, named, folder, tmp_path):
    """With as many numbers in another shape; without tensors; with invalid settings."""
    if arrays is None:
        arrays = pair((3, 128, 3, 3), (128, 3, 1, 1))
    save_file(arrays, tmp_path / "lora.safetensors", metadata)
    with pytest.raises(tiny_sd.UserError, match=re.escape(named)):
        formats.load(folder, loras=[(tmp_path / "lora.safetensors", 1)])


def test_a_lora_that_is_missing(folder):
    with pytest.raises(tiny_sd.UserError, match=r"^there is no LoRA none\.safetensors$"):
        formats.load(folder, loras=[("none.safetensors", 1)])


def test_command_line(folder, pairs, tmp_path, monkeypatch, capsys):
    """FILE and FILE:WEIGHT, twice; they are in the picture's parameters.

    A file that is not a LoRA gets one line.
    """
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "one.safetensors", pairs, *NAMINGS["kohya"])
    shutil.copy("one.safetensors", "two.safetensors")
    draw = ["cat", "-m", str(folder), "--steps", "1", "-W", "64", "-H", "64"]
    pictures = []
    for flags in ([], ["--lora", "one.safetensors:0.5", "--lora", "two.safetensors:.5"],
                  ["--lora", "one.safetensors"]):
        assert cli.main([*draw, *flags]) == 0
        pictures.append(Image.open(capsys.readouterr().out.strip()))
    first, second, third = (np.asarray(picture).astype(int) for picture in pictures)
    assert abs(second - third).max() <= 1 < abs(second - first).max()
    assert ("Lora: one 0.5 two 0.5," in pictures[1].text["parameters"]
            and "Lora" not in pictures[0].text["parameters"])
    for flag in ("no.safetensors", "one.safetensors:1.2.3", "one.safetensors:x"):
        assert cli.main([*draw, "--lora", flag]) == 2
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("tiny_sd: ") and flag in line
