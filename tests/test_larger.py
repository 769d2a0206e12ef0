"""Larger pictures (extras/larger.py)."""

import numpy as np
import pytest
from PIL import Image

import tiny_sd
from extras import files, formats, like_diffusers
from helpers_cli import *  # noqa: F403
from helpers_cli import PLAIN, parse, pixels

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
        assert any("is cut" in line for line in err) == (resize == "crop")
        init = files.read_picture("in.png", 16, 16, resize=resize)
        assert parse(drawn[resize])[2].get("Resize", "crop") == resize and init.shape == (16, 16, 3)
    assert len({picture.tobytes() for picture in drawn.values()}) == 3


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_edges_of_a_picture_of_one_column(draw, size):
    Image.new("RGB", size, "red").save("in.png")
    assert draw("apple", "-i", "in.png", "--resize", "fill").size == (16, 16)
