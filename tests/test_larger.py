"""Larger pictures (extras/larger.py)."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import tiny_sd
from conftest import same
from extras import drawing, files, formats, larger, like_diffusers
from helpers_cli import *  # noqa: F403
from helpers_cli import PLAIN, parse, pixels
from tiny_sd import UserError

# ── Drawn over ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("hires, strength, total, taken", [
    ("2", 0.5, 4, 2), ("1.5:0.3:3", 0.3, 10, 3)])
def test_hires_is_image_to_image_on_the_enlarged_picture(run, draw, hires, strength, total, taken):
    size = 32 if hires == "2" else 24
    small = draw("red", "-s", "5", "-o", "small.png")
    ours = draw("red", "-s", "5", "--hires", hires)
    picture = np.asarray(small.resize((size, size), Image.Resampling.LANCZOS))
    model = formats.load(run.model)
    walk = like_diffusers.generate(model, "red", None, [5], total, init=picture, strength=strength)
    steps = list(walk)
    assert len(steps) == taken and ours.size == (size, size)
    assert abs(pixels(ours) - tiny_sd.decode(model, steps[-1])[0]).max() <= 1


def test_a_prompt_that_changed_does_not_begin_again(run, draw):
    """The second pass continues at the end, as in the web UI; alternation goes on."""
    by_hand = ["-i", "large.png", "-W", "32", "-H", "32", "--strength", "1", "--steps", "2"]
    for prompt, end in ("[red:apple:1] a", "apple a"), ("[red:[a|a|blue]:1]", "[blue|a]"):
        ours = draw(prompt, "--hires", "2:1:2")
        small = draw(prompt, "-o", "small.png")
        small.resize((32, 32), Image.Resampling.LANCZOS).save("large.png")
        assert abs(pixels(ours) - pixels(draw(end, *by_hand))).max() <= 1
    assert abs(pixels(ours) - pixels(draw("[a|blue]", *by_hand))).max() > 1


def test_a_batch_drawn_over_is_recorded_and_drawn_again(run, draw):
    _, out, err = run("red", "--hires", "2:0.4:3", "-b", "2")
    assert "5/5" in err[-1]
    facts = parse(Image.open(out[1]))[2]
    assert facts.items() >= {
        "Hires upscale": "2.0", "Hires steps": "3", "Hires upscaler": "Lanczos",
        "Denoising strength": "0.4", "Size": "16x16"}.items()
    again = draw("--like", out[1])
    assert again.size == (32, 32) and abs(pixels(again) - pixels(Image.open(out[1]))).max() <= 1
    assert parse(again)[2] == facts


def test_what_the_second_drawing_cannot_do_is_said_before_the_first(run):
    generate = larger.drawn_over(like_diffusers.generate, (32, 32), 0.5, 0, None)
    model = formats.load(run.model)
    for steps, sampler, most in (600, "ddim", 999), (30, "lcm", 50):
        with pytest.raises(UserError, match=f"steps {2 * steps} is not from 1 to {most}"):
            generate(model, "red", None, [0], steps, 1, tiny_sd.SAMPLERS[sampler], None, 16, 16,
                     None, None, None, like_diffusers.denoiser, tiny_sd.embed_prompts)


# ── Pictures of another shape ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("resize", files.RESIZE)
def test_pictures_of_another_shape(resize):
    """Of a ramp from left to right the middle remains, or all, closer together."""
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    Image.fromarray(ramp).save("in.png")
    read = files.read_picture("in.png", 64, 64, resize=resize)[..., 0].astype(int)
    wanted = np.arange(96, 160) if resize == "crop" else 4 * np.arange(64) + 1.5
    assert read.shape == (64, 64) and abs(read - wanted).max() <= 1.5
    assert files.read_picture("in.png", 96, 64, resize="fill").shape == (64, 96, 3)


def test_the_mask_is_resized_as_its_picture(run):
    PLAIN.save("in.png")
    Image.eval(PLAIN.convert("L"), lambda v: 255 * (v > 127)).save("mask.png")
    drawn = {}
    for resize in files.RESIZE:
        _, out, err = run("red", "-i", "in.png", "--mask", "mask.png", "--resize", resize)
        drawn[resize] = Image.open(out[0])
        assert any("is cropped" in line for line in err) == (resize == "crop")
        init = files.read_picture("in.png", 16, 16, resize=resize)
        assert parse(drawn[resize])[2].get("Resize", "crop") == resize and init.shape == (16, 16, 3)
    assert len({picture.tobytes() for picture in drawn.values()}) == 3


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_edges_of_a_picture_of_one_column(draw, size):
    Image.new("RGB", size, "red").save("in.png")
    assert draw("apple", "-i", "in.png", "--resize", "fill").size == (16, 16)


# ── In bands ────────────────────────────────────────────────────────────────────────────────────


def test_in_bands_a_vae_computes_the_same(folder, backend, monkeypatch):
    """To rounding: the narrowest bands that there can be, seen from a picture of odd rows."""
    bands, form = [], larger.bands
    monkeypatch.setattr(larger, "BAND", 1)
    monkeypatch.setattr(larger, "bands", lambda *args: bands.append(1) or form(*args))
    model, before = tiny_sd.load(folder, backend), dict(tiny_sd.FAST)
    z = np.random.default_rng(0).standard_normal((1, 5, 6, 4), np.float32)
    picture = np.random.default_rng(1).integers(256, size=(40, 48, 3), dtype=np.uint8)
    whole = tiny_sd.vae_decode(z, model.vae, 32), tiny_sd.encode(model, picture, 0 * z)
    larger.change_vae(model, larger.IN_BANDS)
    banded = model.vae_decode(z, model.vae, 32), tiny_sd.encode(model, picture, 0 * z)
    for ours, reference in zip(banded, whole):
        same(f"VAE in bands, {backend}", tiny_sd.to_numpy(ours), tiny_sd.to_numpy(reference), 2e-5)
    assert tiny_sd.FAST == before and len(bands) > 100


def test_tiles_by_option_or_where_memory_is_short(run, draw, monkeypatch):
    bands, form = [], larger.conv_in_bands
    monkeypatch.setitem(larger.IN_BANDS, "conv2d", lambda *args, **weights: bands.append(1)
                        or form(*args, **weights))
    whole = pixels(draw("red", "-W", "32"))
    assert not bands and abs(pixels(draw("red", "-W", "32", "--tiles")) - whole).max() <= 1
    assert bands
    bands.clear()
    monkeypatch.setattr(drawing, "free_memory", lambda: 5 * 4 * 8 * 32 * 16)
    assert abs(pixels(draw("red", "-W", "32")) - whole).max() <= 1 and bands


# ── Without an edge ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_convolutions_that_wrap_are_those_of_diffusers(reference, folder, backend):
    """With padding_mode circular in every convolution."""
    import copy

    import torch
    model, (unet, vae) = tiny_sd.load(folder, backend), map(
        copy.deepcopy, (reference.unet, reference.vae))
    for layer in [*unet.modules(), *vae.modules()]:
        if isinstance(layer, torch.nn.Conv2d):
            layer.padding_mode = "circular"
            layer._reversed_padding_repeated_twice = [n for n in layer.padding[::-1]
                                                      for _ in range(2)]
    larger.change_vae(model, larger.SEAMLESS)
    x = np.random.default_rng(0).standard_normal((2, 8, 16, 4), np.float32)
    context = np.random.default_rng(1).standard_normal((1, 77, 128), np.float32)
    context = tiny_sd.to_torch(context, "cpu", "float32") if backend == "torch" else context
    denoise = larger.seamless(tiny_sd.denoiser)(model, context)
    first = torch.from_numpy(x).movedim(-1, 1)
    with torch.no_grad():
        eps = unet(first, 500, torch.as_tensor(context).repeat(2, 1, 1)).sample.movedim(1, -1)
        decoded = vae.decode(first).sample.movedim(1, -1)
    same("seamless U-Net", denoise(x, 500, 0.5)[1], eps, 2e-5)
    same("seamless VAE", tiny_sd.to_numpy(model.vae_decode(x, model.vae, 32)), decoded, 2e-5)


def test_a_seamless_picture_moves_with_its_noise(run, draw, monkeypatch):
    """Rolled by whole latents of the smallest level, it is the same picture, rolled."""
    noise, drawn = like_diffusers.torch_noise, []
    for k in 0, 2:
        monkeypatch.setattr(like_diffusers, "torch_noise", lambda *args, k=k: lambda: np.roll(
            noise(*args)(), (k, -k), (1, 2)))
        drawn.append(pixels(draw("red", "--seamless", "--sampler", "ddim")))
    assert abs(np.roll(drawn[0], (4, -4), (0, 1)) - drawn[1]).max() <= 1
    assert abs(drawn[0] - drawn[1]).max() > 50
    again = Image.open("out.png")
    assert parse(again)[2]["Tiling"] == "True"
    assert abs(pixels(draw("--like", "out.png", "-s", "1")) - drawn[0]).max() > 0
    assert parse(Image.open("out-2.png"))[2]["Tiling"] == "True"


def test_other_threads_compute_as_they_would_alone(run):
    """Next to a VAE in bands and a seamless picture; and afterwards everything is restored."""
    plain, tiled = (formats.load(run.model) for _ in range(2))
    larger.change_vae(tiled, larger.IN_BANDS)
    seamless = larger.seamless(like_diffusers.denoiser)

    def draw(model, make):
        *_, x = like_diffusers.generate(model, "red", steps=3, make_denoiser=make)
        return tiny_sd.decode(model, x)[0].astype(int)

    kinds = [(plain, None), (tiled, None), (plain, seamless), (tiled, seamless)]
    alone, tables = [draw(*kind) for kind in kinds], (dict(tiny_sd.FAST), dict(tiny_sd.TORCH))
    assert abs(alone[0] - alone[2]).max() > 5
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: draw(*kinds[i % 4]), range(32)))
    assert all(abs(picture - alone[i % 4]).max() <= 1 for i, picture in enumerate(found))
    assert (dict(tiny_sd.FAST), dict(tiny_sd.TORCH)) == tables


def test_a_size_that_does_not_wrap(refuse):
    assert refuse("red", "--seamless", "-W", "18", "-H", "16").endswith("multiples of 4")


# ── Only what is masked ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("hole, margin, box", [
    ((10, 20, 30, 50), 0, (30, 5, 50, 25)),         # rows 10 to 19, columns 30 to 49: a square,
    ((10, 20, 30, 50), 5, (25, 0, 55, 30)),         # and with a margin that meets the top
    ((0, 1, 0, 1), 2, (0, 0, 5, 5)), ((59, 60, 99, 100), 0, (99, 59, 100, 60)),
    ((0, 60, 0, 100), 9, (0, 0, 100, 60)), ((0, 0, 0, 0), 9, (0, 0, 100, 60))])
def test_the_box_around_a_mask(hole, margin, box):
    mask = np.zeros((60, 100), bool)
    mask[hole[0]:hole[1], hole[2]:hole[3]] = True
    assert larger.box_around(mask, margin, 16, 16) == box


def test_the_box_around_a_large_mask_takes_no_time():
    start = time.process_time()
    box = larger.box_around(np.ones((6000, 6000), bool), 0, 16, 16)
    assert box == (0, 0, 6000, 6000) and time.process_time() - start < 3


def test_only_what_is_masked_is_drawn_and_large(run, draw):
    """The picture that the program draws from the part, resized, where the mask is white."""
    rng = np.random.default_rng(0)
    init = Image.fromarray(rng.integers(256, size=(60, 100, 3), dtype=np.uint8))
    mask = np.zeros((60, 100), bool)
    mask[20:26, 70:78] = True
    init.save("in.png")
    Image.fromarray(mask).save("mask.png")
    flags = ["red", "-i", "in.png", "--mask", "mask.png"]
    _, _, err = run(*flags, "--only-masked", "4", "-o", "ours.png")
    assert not any("is cropped" in line for line in err)
    ours = Image.open("ours.png")
    box = larger.box_around(mask, 4, 16, 16)
    assert box == (66, 15, 82, 31)
    init.crop(box).save("part.png")
    Image.fromarray(mask).crop(box).save("hole.png")
    part = draw("red", "-i", "part.png", "--mask", "hole.png")
    expected = init.copy()
    expected.paste(part, box[:2], Image.fromarray(mask).crop(box))
    assert ours.size == (100, 60) and abs(pixels(ours) - pixels(expected)).max() <= 1
    assert (pixels(ours) == pixels(init))[~mask].all()
    assert parse(ours)[2]["Masked area padding"] == "4"
    again = draw("--like", "ours.png", *flags[1:])
    assert again.size == ours.size and np.array_equal(pixels(again), pixels(ours))
