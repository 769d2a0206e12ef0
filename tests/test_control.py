"""ControlNet: equal to diffusers', on both backends; its files, its options."""

import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import tiny_sd as sd
from conftest import ROOT, randomise, same
from extras import control, like_diffusers, samplers
from extras.training.drawings import STYLES, load_things
from extras.training.measure import agreement, draw
from extras.training.painting import outlines
from helpers import TWO_ENCODERS, drawn, write_model
from helpers_diffusers import (  # noqa: F401  (no_gradients is a fixture of all tests)
    PROMPT,
    drawn_by,
    first,
    last,
    no_gradients,
    same_pictures,
)

SIZE = {"width": 72, "height": 104}


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_the_bundled_network_leads_the_bundled_model(backend):
    """A snail crawls the other way, as training never shows it, if its outlines do."""
    weights = control.read_control(ROOT / "weights/outlines", 2, backend)
    model, things = sd.load("emoji", backend), load_things(ROOT / "tests/emoji.zip", 128)
    control.check_control("outlines", weights, model)
    snail = things.drawings[things.numbers["snail"], STYLES.index("twemoji")]
    drawing = things.pictures[128][snail][:, ::-1]
    lines = outlines(drawing[..., :3] + (255 - drawing[..., 3:]))
    hint = np.repeat(lines[..., None], 3, 2)
    predicts = sd.predict, partial(control.predict, [control.Control(model, weights, hint)])
    found = [agreement(draw(model, ["snail"] * 3, range(3), steps=8, predict=predict), [lines] * 3)
             for predict in predicts]
    assert found[0] < 0.2 < 0.5 < found[1], found


def test_what_is_bundled_is_small():
    files = [file for folder in ("emoji", "outlines")
             for file in (ROOT / "weights" / folder).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40e6


def random_network(unet, attention=True):
    """A control network for a diffusers U-Net, with noise in the weights that start as zeros."""
    torch.manual_seed(5)
    network = diffusers.ControlNetModel.from_unet(unet)
    if not attention:
        kinds = {"down_block_types": ["DownBlock2D"] * len(unet.config.down_block_types),
                 "mid_block_type": "UNetMidBlock2D"}
        network = diffusers.ControlNetModel.from_config({**network.config, **kinds})
    randomise(network, 7)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.startswith("controlnet_") and p.ndim > 1 and not p.any():
                p += torch.randn_like(p) / p[0].numel() ** 0.5
    return network


@pytest.fixture(scope="module")
def network(reference):
    return random_network(reference.unet)


@pytest.fixture(scope="module")
def written(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("controls") / "outlines"
    network.save_pretrained(path)
    return path


def edges(width=72, height=104):
    pixels = np.random.default_rng(3).integers(256, size=(height, width, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(pixels // 128 * 255))


def original_names(arrays):
    """Return the arrays as in the single files of the ControlNet's authors."""
    names = {}
    unet = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
            "conv_in": "input_blocks.0.0", "mid_block.resnets.0": "middle_block.0",
            "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
              "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    hint = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
    for name in arrays:
        new = name
        if name.startswith("controlnet_cond_embedding."):
            part, _, end = name.removeprefix("controlnet_cond_embedding.").rpartition(".")
            new = f"input_hint_block.{2 * hint.index(part)}.{end}"
        new = re.sub(r"^controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0", new)
        new = re.sub("^controlnet_mid_block", "middle_block_out.0", new)
        for long, short in unet.items():
            new = re.sub(f"^{re.escape(long)}\\.", f"{short}.", new)
        new = re.sub(r"^down_blocks\.(\d)\.downsamplers\.0\.conv",
                     lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op", new)
        new = re.sub(r"^down_blocks\.(\d)\.(resnets|attentions)\.(\d)", lambda m:
                     f"input_blocks.{3 * int(m[1]) + int(m[3]) + 1}.{int(m[2] == 'attentions')}",
                     new)
        if ".resnets." in name:
            for long, short in inside.items():
                new = new.replace(f".{long}.", f".{short}.")
        names[f"control_model.{new}"] = arrays[name]
    return names


def weights_at(path, model, backend="numpy"):
    n = len(model.unet["down_blocks"][0]["resnets"]) + 1
    found = control.read_control(str(path), n, backend)
    control.check_control(path, found, model)
    return found


def test_residuals_and_output(network, written, reference, model, backend):
    """The network's residuals and the U-Net's output with them, each picture at its own noise."""
    rng, hint = np.random.default_rng(0), edges()
    x, context = (rng.normal(size=shape).astype(np.float32)
                  for shape in ((2, 13, 9, 4), (2, 77, 128)))
    ours = control.Control(model, weights_at(written, model, backend), hint, 0.8)
    like = model.unet["conv_in"]["bias"]
    context = sd.array_like(like, context)
    middle, skips = ours.added(model, sd.array_like(like, x), 500, context, None)

    picture = first(hint[None].astype(np.float32) / 255).repeat(2, 1, 1, 1)
    words = torch.as_tensor(sd.to_numpy(context))
    down, mid = network(first(x), 500, words, picture, conditioning_scale=0.8, return_dict=False)
    assert len(down) == len(skips) == 12
    for found, expected in zip([*skips, middle], [*down, mid], strict=True):
        same("ControlNet", sd.to_numpy(found), last(expected), 2e-5)

    expected = reference.unet(first(x), 500, words, down_block_additional_residuals=down,
                              mid_block_additional_residual=mid).sample
    found = control.predict([ours], model, x, 500, context)
    same("U-Net with ControlNet", found, last(expected), 2e-5)
    assert abs(found - sd.predict(model, x, 500, context)).max() > 0.01
    ours.now = 0.0
    same("U-Net with ControlNet", control.predict([ours], model, x, 500, context),
         sd.predict(model, x, 500, context), 1e-6)


def test_without_attention(reference, model, tmp_path, backend):
    """A small network, whose middle is one ResNet block; one that lacks some of it is refused."""
    network, hint = random_network(reference.unet, attention=False), edges()
    network.save_pretrained(tmp_path / "small")
    ours = control.Control(model, weights_at(tmp_path / "small", model, backend), hint)
    x = np.random.default_rng(0).normal(size=(2, 13, 9, 4)).astype(np.float32)
    context = sd.array_like(model.unet["conv_in"]["bias"], np.zeros((2, 77, 128)))
    middle, skips = ours.added(model, sd.array_like(context, x), 500, context, None)
    picture = first(hint[None].astype(np.float32) / 255).repeat(2, 1, 1, 1)
    down, mid = network(first(x), 500, torch.zeros(2, 77, 128), picture, return_dict=False)
    for found, expected in zip([*skips, middle], [*down, mid], strict=True):
        same("ControlNet without attention", sd.to_numpy(found), last(expected), 2e-5)

    arrays = load_file(tmp_path / "small/diffusion_pytorch_model.safetensors")
    save_file({name: array for name, array in arrays.items() if "mid_block.resnets" not in name},
              tmp_path / "cut.safetensors")
    with pytest.raises(sd.UserError, match="another model than .*mid_block.resnets.0"):
        weights_at(tmp_path / "cut.safetensors", model)


@pytest.mark.slow
def test_pictures(network, written, reference, model, backend):
    """Two networks, one of them for a part of the steps, as diffusers' pipeline draws it."""
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **{**reference.components, "scheduler": diffusers.DDIMScheduler.from_config(
            reference.scheduler.config, timestep_spacing="leading", clip_sample=False)},
        controlnet=[network, network], requires_safety_checker=False)
    hints = [edges(), edges()[::-1].copy()]
    expected = drawn_by(
        pipe, [Image.fromarray(hint) for hint in hints], negative_prompt="a dog",
        num_inference_steps=6, guidance_scale=7.5, controlnet_conditioning_scale=[0.8, 0.5],
        control_guidance_start=[0.0, 0.3], control_guidance_end=[1.0, 0.8], **SIZE)

    weights = weights_at(written, model, backend)
    controls = [control.Control(model, weights, hints[0], 0.8),
                control.Control(model, weights, hints[1], 0.5, 0.3, 0.8)]
    sampler = samplers.counting(sd.ddim, *(c.count for c in controls))
    ours = drawn(model, PROMPT, "a dog", (5,), 6, 7.5, sampler, **SIZE,
                 make_denoiser=partial(like_diffusers.denoiser,
                                       predict=partial(control.predict, controls)))
    same_pictures("pictures with ControlNet", ours, expected)


def test_zeros_learn(reference, model):
    """In a new network only the last zeros have gradients that are not zero (9.21).

    With our own functions: the copy learns once those have changed.
    """
    fresh = diffusers.ControlNetModel.from_unet(reference.unet)
    arrays = {name: p.numpy() for name, p in fresh.state_dict().items()}
    weights = sd.nest({name: sd.to_backend(array, "torch") for name, array in arrays.items()})
    steered = control.Control(model, weights, edges())
    learnt = sd.flatten(weights)
    rng = np.random.default_rng(0)
    x, context = (torch.tensor(rng.normal(size=shape), dtype=torch.float32)
                  for shape in ((1, 13, 9, 4), (1, 77, 128)))
    config = SimpleNamespace(config=model.config, alpha_bars=model.alpha_bars)

    def learners():
        with torch.enable_grad():
            for weight in learnt.values():
                weight.requires_grad_()
            middle, skips = steered.added(config, x, 500, context, None)
            loss = sum(((y - 1) ** 2).mean() for y in (middle, *skips))
            slopes = torch.autograd.grad(loss, learnt.values(), allow_unused=True)
        return {name: slope for name, slope in zip(learnt, slopes)
                if slope is not None and slope.any()}
    first_step = learners()
    last_zeros = {name for name in learnt if re.match("controlnet_(down|mid)", name)}
    assert first_step.keys() == last_zeros
    for name, slope in first_step.items():
        learnt[name] -= 0.1 * slope
    assert learners().keys() >= {name for name in learnt if re.match("(down|mid)_block", name)
                                 and "to_k.bias" not in name}


def test_single_files_and_folders_hold_the_same(written, model, tmp_path):
    arrays = load_file(written / "diffusion_pytorch_model.safetensors")
    save_file(original_names(arrays), tmp_path / "original.safetensors")
    save_file(arrays, tmp_path / "bare.safetensors")
    expected = sd.flatten(weights_at(written, model))
    for file in ("original.safetensors", "bare.safetensors"):
        found = sd.flatten(weights_at(tmp_path / file, model))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(sd.widen(found[name]), sd.widen(expected[name]))
                   for name in found)


def test_the_command_line(folder, written, tmp_path, monkeypatch, capsys):
    from extras import cli
    monkeypatch.chdir(tmp_path)
    Image.fromarray(edges()).save("edges.png")
    shutil.copy(written / "diffusion_pytorch_model.safetensors", "outlines.safetensors")
    base = ["a cat", "-m", str(folder), "--steps", "3", "-W", "72", "-H", "104", "-o"]

    def draw(name, *flags):
        assert cli.main([*base, name, *flags]) == 0
        return np.asarray(Image.open(name))
    plain = draw("a.png")
    steered = draw("b.png", "--control", "outlines.safetensors:0.5", "edges.png")
    twice = draw("c.png", *["--control", str(written), "edges.png"] * 2, "--control-until", "0.7")
    assert len({picture.tobytes() for picture in (plain, steered, twice)}) == 3
    never = draw("d.png", "--control", str(written), "edges.png", "--control-from", "0.9")
    assert np.array_equal(plain, never)
    assert "ControlNet: outlines 0.5 edges.png" in Image.open("b.png").info["parameters"]

    Image.new("RGB", (8, 8)).save("outlines.png")
    save_file({"x": np.zeros(3, np.float32)}, "other.safetensors")
    arrays = load_file("outlines.safetensors")
    wide = {**arrays, "conv_in.weight": np.zeros((8, 4, 3, 3), np.float32)}
    save_file(wide, "wide.safetensors")
    save_file({k: v for k, v in arrays.items() if "mid_block.resnets" not in k}, "cut.safetensors")
    save_file({k: v for k, v in arrays.items() if "down_blocks.11" not in k}, "few.safetensors")
    eye = "controlnet_cond_embedding"
    one = {f"{eye}.conv_out.weight": arrays[f"{eye}.conv_out.weight"][:1].copy(),
           f"{eye}.conv_out.bias": np.zeros(1, np.float32)}
    save_file(arrays | one, "one.safetensors")
    none = {f"{eye}.conv_in.weight": np.zeros((0, 3, 3, 3), np.float32),
            f"{eye}.conv_in.bias": np.zeros(0, np.float32)}
    save_file(arrays | none, "none.safetensors")
    save_file(arrays | {eye + ".0" * 3000: np.zeros(1, np.float32)}, "deep.safetensors")
    save_file(arrays | {f"{eye}.{'9' * 5000}": np.zeros(1, np.float32)}, "count.safetensors")
    save_file(arrays | {f"{eye}.conv_in.weight": np.zeros((100_000, 3, 3, 3), np.float16),
                        f"{eye}.conv_in.bias": np.zeros(100_000, np.float16)}, "huge.safetensors")
    arrays.pop("controlnet_cond_embedding.blocks.3.weight")
    save_file(arrays, "blind.safetensors")
    Path("gone.safetensors").write_bytes(b"")
    for flags, said in (
            (["no.safetensors", "edges.png"], "no.safetensors"),
            (["outlines.safetensors", "no.png"], "no.png"),
            (["other.safetensors", "edges.png"], "other.safetensors is not a control network"),
            (["wide.safetensors", "edges.png"], "another model"),
            (["cut.safetensors", "edges.png"], "another model"),
            (["few.safetensors", "edges.png"], "controlnet_down_blocks.11.weight is None"),
            (["blind.safetensors", "edges.png"], "controlnet_cond_embedding"),
            (["gone.safetensors", "edges.png"], "gone.safetensors is empty"),
            (["one.safetensors", "edges.png"], "does not shrink as the model's"),
            (["huge.safetensors", "edges.png"], "a layer has more than 512 channels"),
            (["none.safetensors", "edges.png"], "controlnet_cond_embedding is not whole"),
            (["deep.safetensors", "edges.png"], "deep.safetensors has a tensor's name of more"),
            (["count.safetensors", "edges.png"], "count.safetensors has a tensor's name of more"),
            (["outlines.safetensors", "edges.png", "--control-from", "1"], "--control-from 1"),
            (["outlines.safetensors", "edges.png", "--show", "page"], "--show")):
        capsys.readouterr()
        assert cli.main([*base, "e.png", "--control", *flags]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "tiny_sd:" in line]
        assert said in errors[-1]


def test_sdxl(tmp_path, backend):
    """With a second text encoder, the network also gets the pooled text and the sizes."""
    folder = write_model(tmp_path / "xl", TWO_ENCODERS)
    network = random_network(diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"))
    network.save_pretrained(tmp_path / "outlines")
    model = sd.load(folder, backend)
    model.config.vae.block_out_channels = [4] * 4       # so that it shrinks pictures by 8

    rng, hint = np.random.default_rng(0), edges(64, 96)
    x, context, pooled = (rng.normal(size=shape).astype(np.float32) for shape in
                          ((2, 12, 8, 4), (2, 12, 28), (2, 10)))
    ours = control.Control(model, weights_at(tmp_path / "outlines", model, backend), hint)
    xs, *others = (sd.array_like(model.unet["conv_in"]["bias"], array)
                   for array in (x, context, pooled))
    middle, skips = ours.added(model, xs, 500, *others)
    sizes = torch.tensor([[96, 64, 0, 0, 96, 64]] * 2)
    down, mid = network(first(x), 500, torch.as_tensor(context),
                        first(hint[None].astype(np.float32) / 255).repeat(2, 1, 1, 1),
                        added_cond_kwargs={"text_embeds": torch.as_tensor(pooled),
                                           "time_ids": sizes}, return_dict=False)
    for found, expected in zip([*skips, middle], [*down, mid], strict=True):
        same("ControlNet of SDXL", sd.to_numpy(found), last(expected), 2e-5)
