"""Larger pictures: --hires, --only-masked, --tiles and --seamless.

Most functions here wrap one of tiny_sd.py or like_diffusers.py and keep its signature.
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
    """UserError if the numbers of --hires are out of range."""
    scale, strength, steps = job.hires
    require(1 < scale <= 8 and 0 < strength <= 1 and 0 <= steps <= 999 * strength, "--hires "
            f"{scale:g}:{strength:g}:{steps} needs a scale above 1 and up to 8, a strength above "
            "0 and up to 1, and at most 999 steps times the strength")


def drawn_size(model, job):
    """Return the final (width, height) of the picture; UserError if the model cannot draw it."""
    scale = job.hires[0] if job.hires else 1
    width, height = (round(side * scale / model.factor) * model.factor
                     for side in (job.width, job.height))
    latent_shape(model, width, height)
    smallest = model.factor * 2 ** (len(model.unet["down_blocks"]) - 1)
    require(not job.seamless or not (width % smallest or height % smallest),
            f"--seamless needs a width and a height that are multiples of {smallest}")
    return width, height


def drawn_over(generate, size, strength, steps, later):
    """Return like_diffusers.generate with a second pass: enlarge each picture and draw over it.

    size: the new (width, height). The second pass noises the picture to `strength` and takes
    `steps` steps of the sampler `later`.
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
    """Return a job's picture (h, w, 3) and mask (h, w) at their original size."""
    size = files.upright(job.init_img).size
    mask = files.read_mask(job.mask, job.init_img, *size, notes)
    return files.read_picture(job.init_img, *size), mask


def box_around(mask, margin, height, width):
    """Return the box (left, top, right, bottom) around a mask, with the proportions to draw.

    margin: pixels to add on each side. The box stays inside the picture.
    """
    lines = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
    ends = [(at[0] - margin, at[-1] + 1 + margin) if len(at) else (0, n)
            for at, n in zip(lines, mask.shape)]
    scale = max((end - start) / n for (start, end), n in zip(ends, (height, width)))
    sides = [min(n, round(scale * side)) for n, side in zip(mask.shape, (height, width))]
    (top, left) = (max(0, min(n - side, (start + end - side) // 2))
                   for (start, end), side, n in zip(ends, sides, mask.shape))
    return left, top, left + sides[1], top + sides[0]


def part_of(picture, mask, job):
    """Crop a picture and its mask to the box that a job draws, and resize both."""
    box, size = box_around(mask, job.only_masked, job.height, job.width), (job.width, job.height)
    picture, hole = (np.asarray(Image.fromarray(array).crop(box).resize(
        size, Image.Resampling.LANCZOS)) for array in (picture, mask.astype(np.uint8) * 255))
    return picture, hole > 127


def pasted(job, pixels):
    """Paste the pixels drawn (height, width, 3) into the job's picture where the mask is true."""
    picture, mask = whole(job, [])
    box = left, top, right, bottom = box_around(mask, job.only_masked, job.height, job.width)
    drawn = Image.fromarray(pixels).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    picture = Image.fromarray(picture)
    picture.paste(drawn, (left, top), Image.fromarray(mask).crop(box))
    return np.asarray(picture)


# ── Other forms of the primitives ───────────────────────────────────────────────────────────────


INSIDE, ONE_AT_A_TIME = threading.local(), threading.RLock()


def with_forms(function, forms):
    """Return the function, changed to compute with other forms of primitives, for either library.

    forms: {name: a function of the original form, then the primitive's arguments}. The tables FAST
    and TORCH belong to the whole process, so each form checks which thread calls it: other threads
    get the original form.
    """
    @functools.wraps(function)
    def computing(*args):
        if "torch" in sys.modules:      # load torch's forms now, or they would replace ours later
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
    """Put forms into a table; at the end, put the old ones back one by one."""
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
    """Return the function, changed to mark its thread as one that uses the other forms."""
    def run(*args):
        before = is_inside()
        INSIDE.here = True
        try:
            return function(*args)
        finally:
            INSIDE.here = before
    return run


def is_inside():
    """Does this thread use the other forms?"""
    return getattr(INSIDE, "here", False)


def only_inside(form, known):
    """Return a function that calls `form` in marked threads and `known` in others."""
    return lambda *args, **how: (form if is_inside() else known)(*args, **how)


def each_inside(each):
    """Return each, changed so that its threads are marked if the calling thread is."""
    return lambda function, *items: each(inside(function) if is_inside() else function, *items)


def known_form(name):
    """Return the form of a primitive in use now, as a function for either library."""
    numpy, torch = FAST.get(name, getattr(tiny_sd, name).formula), dict.get(TORCH, name)
    return lambda x, *args, **how: (numpy if isinstance(x, np.ndarray) else torch)(x, *args, **how)


def change_vae(model, forms):
    """Make the model's VAE compute with these forms."""
    for name in ("vae_encode", "vae_decode"):
        setattr(model, name, with_forms(inspect.unwrap(getattr(model, name)), forms))


# ── In bands ────────────────────────────────────────────────────────────────────────────────────
#
# Most of the memory goes to images between two convolutions: the normalised one, the activated
# one. Here GroupNorm only computes the statistics of the whole image, and the convolution asks for
# one band of rows at a time, with an extra row on either side. The result is exact, without seams.

BAND = 2 ** 21      # numbers in a band


class Rows:
    """An image (batch, height, width, channels) that computes its rows on demand."""

    def __init__(self, shape, compute):
        self.shape, self.compute = shape, compute

    def __getitem__(self, index):
        return self.compute(index[1])       # of x[:, rows]

    def reshape(self, *shape):
        return self[:, :].reshape(*shape)


def bands(height, width, channels):
    """Split the rows of an image into slices of about BAND numbers."""
    size = max(1, BAND // (width * channels))
    return [slice(i, min(i + size, height)) for i in range(0, height, size)]


def norm_later(form, x, groups, delta, weight, bias):
    """Compute the statistics of group_norm now and its rows on demand."""
    B, H, W, C = x.shape
    each, parts = FAST.get("each", map), bands(H, 8 * W, C)

    def average(of):        # the mean of each group, repeated for each of its channels
        sums = np.array(list(each(lambda s: to_numpy(of(x[:, s]).sum((1, 2))), parts)), np.float64)
        means = sums.sum(0).reshape(B, groups, -1).mean(2) / (H * W)
        return array_like(x, np.repeat(means, C // groups, 1))[:, None, None]
    mean = average(lambda rows: rows)
    scale = weight / (average(lambda rows: (rows - mean) ** 2) + delta) ** 0.5
    return Rows(x.shape, lambda s: (x[:, s] - mean) * scale + bias)


def silu_later(form, x):
    """silu: now for an array, on demand for Rows."""
    return Rows(x.shape, lambda s: silu(x[:, s])) if isinstance(x, Rows) else form(x)


def conv_in_bands(form, x, weight, bias=None, stride=1, padding=(1, 1)):
    """conv2d, one band of rows at a time."""
    weight, size = wide(weight), weight.shape[1] - sum(padding)
    B, (H, W), C = x.shape[0], ((n - size) // stride + 1 for n in x.shape[1:3]), len(weight)
    new = np.empty if isinstance(weight, np.ndarray) else weight.new_empty
    out = new((B, H, W, C), dtype=weight.dtype)

    def band(s):        # with an extra row on either side, except at the edges
        first = max(0, s.start - 1)
        y = form(x[:, stride * first:stride * (s.stop + 1)], weight, bias, stride, padding)
        out[:, s] = y[:, s.start - first:][:, :s.stop - s.start]
    list(FAST.get("each", map)(band, bands(H, W, max(C, x.shape[3]))))
    return out


IN_BANDS = {"group_norm": norm_later, "silu": silu_later, "conv2d": conv_in_bands}


# ── Without an edge ─────────────────────────────────────────────────────────────────────────────


def conv_around(form, x, weight, bias=None, stride=1, padding=(1, 1)):
    """conv2d with the image wrapped around at its edges instead of padded with zeros."""
    before, after = padding
    rows, columns = (np.arange(-before, n + after) % n for n in x.shape[1:3])
    x = x[:, rows[:, None], columns]
    if stride == 1:     # the fast forms expect padding: pad, then crop
        return form(x, weight, bias)[:, 1:-1, 1:-1]
    return form(x, weight, bias, stride, (0, 0))


SEAMLESS = {"conv2d": conv_around}


def seamless(make_denoiser):
    """Return make_denoiser, changed so that pictures laid side by side have no seams."""
    return lambda *args: with_forms(make_denoiser(*args), SEAMLESS)
