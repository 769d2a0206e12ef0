"""Larger pictures: drawn over once more, in bands, without an edge; and a part of one, drawn large.

Each function takes and returns what those of tiny_sd.py and like_diffusers.py do, or changes one
into another that does.
"""

import contextlib
import functools
import inspect
import math
import sys
import threading

import numpy as np
from PIL import Image

import tiny_sd
from extras import files, like_diffusers
from extras.narrow import wide
from tiny_sd import FAST, TORCH, array_like, decode, latent_shape, require, silu, to_numpy

# ── Drawn over ──────────────────────────────────────────────────────────────────────────────────


def check_hires(job):
    """UserError where the numbers of --hires are out of range, or it does not go with another."""
    scale, strength, steps = job.hires
    require(1 < scale <= 8 and 0 < strength <= 1 and 0 <= steps <= 999 * strength, "--hires "
            f"{scale:g}:{strength:g}:{steps} is not a scale above 1 and up to 8, a strength above "
            "0 and up to 1, and at most 999 steps times the strength")
    clash = next((name for name in ("init_img", "control", "show", "film", "play")
                  if getattr(job, name)), None)
    require(not clash, f"--hires does not go with --{str(clash).replace('_', '-')}")


def drawn_size(model, job):
    """Return the (width, height) that is drawn in the end; UserError where it cannot be."""
    scale = job.hires[0] if job.hires else 1
    width, height = (round(side * scale / model.factor) * model.factor
                     for side in (job.width, job.height))
    latent_shape(model, width, height)
    smallest = model.factor * 2 ** (len(model.unet["down_blocks"]) - 1)
    require(not job.seamless or not (width % smallest or height % smallest),
            f"--seamless needs a width and a height that are multiples of {smallest}")
    return width, height


def drawn_over(generate, size, strength, steps, later):
    """Return like_diffusers.generate, followed by as much again on each picture, enlarged.

    size: its new (width, height). steps: how many are taken then, after noising to `strength`.
    later: the sampler for that.
    """
    def start(model, prompt, negative, seeds, n, guidance, sampler, schedule, *others):
        total = math.ceil(round((steps or n) / strength, 9))
        levels = sampler, total, model.config.scheduler, model.alpha_bars
        like_diffusers.sampling_steps(*levels, like_diffusers.own_schedule(schedule, model))
        first = generate(model, prompt, negative, seeds, n, guidance, sampler, schedule, *others)

        def walk():
            for x in first:
                yield x
            paths = []
            for seed, latents in zip(seeds, x):
                picture = Image.fromarray(decode(model, latents[None])[0])
                picture = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
                paths.append(generate(model, prompt, negative, [seed], total, guidance, later,
                                      schedule, *size, picture, strength, None, *others[5:]))
            for drawn in zip(*paths):
                yield np.concatenate(drawn)
        return walk()
    return start


# ── Only what is masked ─────────────────────────────────────────────────────────────────────────


def whole(job, notes):
    """Return the picture and the mask of a job at their own size, (h, w, 3) and (h, w) of bool."""
    size = files.upright(job.init_img).size
    mask = files.read_mask(job.mask, job.init_img, *size, notes)
    return files.read_picture(job.init_img, *size), mask


def box_around(mask, margin, height, width):
    """Return (left, top, right, bottom) around what is true in a mask, of the shape to draw.

    margin: pixels around it. Where the picture ends, the box does.
    """
    ends = [(min(at) - margin, max(at) + 1 + margin) if len(at) else (0, n)
            for at, n in zip(np.nonzero(mask), mask.shape)]
    scale = max((end - start) / n for (start, end), n in zip(ends, (height, width)))
    sides = [min(n, round(scale * side)) for n, side in zip(mask.shape, (height, width))]
    (top, left) = (max(0, min(n - side, (start + end - side) // 2))
                   for (start, end), side, n in zip(ends, sides, mask.shape))
    return left, top, left + sides[1], top + sides[0]


def part_of(picture, mask, job):
    """Return the part of a picture and of its mask that a job draws, at the size to draw."""
    box, size = box_around(mask, job.only_masked, job.height, job.width), (job.width, job.height)
    picture, hole = (np.asarray(Image.fromarray(array).crop(box).resize(
        size, Image.Resampling.LANCZOS)) for array in (picture, mask.astype(np.uint8) * 255))
    return picture, hole > 127


def pasted(job, pixels):
    """Return the job's picture with what was drawn, (height, width, 3), where the mask is true."""
    picture, mask = whole(job, [])
    box = left, top, right, bottom = box_around(mask, job.only_masked, job.height, job.width)
    drawn = Image.fromarray(pixels).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    picture = Image.fromarray(picture)
    picture.paste(drawn, (left, top), Image.fromarray(mask).crop(box))
    return np.asarray(picture)


# ── Other forms of the primitives ───────────────────────────────────────────────────────────────


INSIDE, ONE_AT_A_TIME = threading.local(), threading.RLock()


def with_forms(function, forms):
    """Return a function that computes with other forms of primitives, for either library.

    forms: {name: a function of the form that stands aside, and of the primitive's arguments}.
    They stand in tables of the whole process, so other threads that get there take the form aside.
    """
    @functools.wraps(function)
    def computing(*args):
        if "torch" in sys.modules:      # else torch's forms, when they come, would take the places
            TORCH.update(tiny_sd.torch_operations() | dict(TORCH))
        with ONE_AT_A_TIME:
            ours = {name: only_inside(functools.partial(form, known_form(name)), known_form(name))
                    for name, form in forms.items()}
            each = {"each": each_inside(FAST["each"])} if "each" in FAST else {}
            with standing_in(FAST, ours | each), standing_in(TORCH, ours):
                return inside(function)(*args)
    return computing


@contextlib.contextmanager
def standing_in(table, forms):
    """Put forms into a table, and at the end what was there before; it is never without any."""
    before = dict(table)
    table.update(forms)
    try:
        yield
    finally:
        for name in forms:
            if name in before:
                table[name] = before[name]
            else:
                del table[name]


def inside(function):
    """Return a function that does the same, as a part of what computes with other forms."""
    def run(*args):
        before = is_inside()
        INSIDE.here = True
        try:
            return function(*args)
        finally:
            INSIDE.here = before
    return run


def is_inside():
    """Does this thread compute with other forms?"""
    return getattr(INSIDE, "here", False)


def only_inside(form, known):
    """Return a function that is the one form inside, and the known one in other threads."""
    return lambda *args, **how: (form if is_inside() else known)(*args, **how)


def each_inside(each):
    """Return each, whose threads are inside where the one that calls it is."""
    return lambda function, *items: each(inside(function) if is_inside() else function, *items)


def known_form(name):
    """Return a function that computes a primitive as it is computed now."""
    numpy, torch = FAST.get(name, getattr(tiny_sd, name).formula), dict.get(TORCH, name)
    return lambda x, *args, **how: (numpy if isinstance(x, np.ndarray) else torch)(x, *args, **how)


def change_vae(model, forms):
    """Let the model's VAE compute with these forms."""
    for name in ("vae_encode", "vae_decode"):
        setattr(model, name, with_forms(inspect.unwrap(getattr(model, name)), forms))


# ── In bands ────────────────────────────────────────────────────────────────────────────────────
#
# Much of what fills the memory lies between two convolutions: the normalised image, the activated
# one. Here a GroupNorm only gathers the statistics of its whole image, and a convolution asks for
# a band of rows after another, with a row more on either side: it is exact, and has no seams.

BAND = 2 ** 21      # numbers in a band


class Rows:
    """An image (batch, height, width, channels) whose rows are computed when they are asked for."""

    def __init__(self, shape, compute):
        self.shape, self.compute = shape, compute

    def __getitem__(self, index):
        return self.compute(index[1])       # of x[:, rows]

    def reshape(self, *shape):
        return self[:, :].reshape(*shape)


def bands(height, width, channels):
    """Return slices that cover the rows of an image."""
    size = max(1, BAND // (width * channels))
    return [slice(i, min(i + size, height)) for i in range(0, height, size)]


def norm_later(form, x, groups, delta, weight, bias):
    """Compute the statistics of group_norm now, and the rows when they are asked for."""
    B, H, W, C = x.shape
    each, parts = FAST.get("each", map), bands(H, 8 * W, C)

    def average(of):        # over the pixels and channels of a group, for each channel
        sums = np.array(list(each(lambda s: to_numpy(of(x[:, s]).sum((1, 2))), parts)), np.float64)
        means = sums.sum(0).reshape(B, groups, -1).mean(2) / (H * W)
        return array_like(x, np.repeat(means, C // groups, 1))[:, None, None]
    mean = average(lambda rows: rows)
    scale = weight / (average(lambda rows: (rows - mean) ** 2) + delta) ** 0.5
    return Rows(x.shape, lambda s: (x[:, s] - mean) * scale + bias)


def silu_later(form, x):
    """silu: at once for an array, later for Rows."""
    return Rows(x.shape, lambda s: silu(x[:, s])) if isinstance(x, Rows) else form(x)


def conv_in_bands(form, x, weight, bias=None, stride=1, padding=(1, 1)):
    """conv2d, one band of rows after the other."""
    weight, size = wide(weight), weight.shape[1] - sum(padding)
    B, (H, W), C = x.shape[0], ((n - size) // stride + 1 for n in x.shape[1:3]), len(weight)
    new = np.empty if isinstance(weight, np.ndarray) else weight.new_empty
    out = new((B, H, W, C), dtype=weight.dtype)

    def band(s):        # with a row more on either side, where there is one
        first = max(0, s.start - 1)
        y = form(x[:, stride * first:stride * (s.stop + 1)], weight, bias, stride, padding)
        out[:, s] = y[:, s.start - first:][:, :s.stop - s.start]
    list(FAST.get("each", map)(band, bands(H, W, max(C, x.shape[3]))))
    return out


IN_BANDS = {"group_norm": norm_later, "silu": silu_later, "conv2d": conv_in_bands}


# ── Without an edge ─────────────────────────────────────────────────────────────────────────────


def conv_around(form, x, weight, bias=None, stride=1, padding=(1, 1)):
    """conv2d without zeros around the image: past one side it goes on at the other."""
    before, after = padding
    rows, columns = (np.arange(-before, n + after) % n for n in x.shape[1:3])
    x = x[:, rows[:, None], columns]
    if stride == 1:     # with zeros around, for which there are quick forms, and then without them
        return form(x, weight, bias)[:, 1:-1, 1:-1]
    return form(x, weight, bias, stride, (0, 0))


SEAMLESS = {"conv2d": conv_around}


def seamless(make_denoiser):
    """Return make_denoiser, so that pictures laid side by side have no seams."""
    return lambda *args: with_forms(make_denoiser(*args), SEAMLESS)
