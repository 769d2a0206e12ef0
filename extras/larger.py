"""Larger pictures: drawn over once more, in tiles, without an edge; and a part of one, drawn large.

Each function takes and returns what those of tiny_sd.py and like_diffusers.py do, or changes one
into another that does.
"""

import math

import numpy as np
from PIL import Image

from tiny_sd import decode, latent_shape, require

# ── Drawn over ──────────────────────────────────────────────────────────────────────────────────


def hires(text):
    """Return SCALE, SCALE:STRENGTH or SCALE:STRENGTH:STEPS as numbers; 0 steps: as many again."""
    parts = text.split(":")
    scale, strength, steps = *parts, *("", "0.5", "0")[len(parts):]
    return float(scale), float(strength), int(steps)


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
    return width, height


def drawn_over(generate, size, strength, steps):
    """Return like_diffusers.generate, followed by as much again on each picture, enlarged.

    size: its new (width, height). steps: how many are taken then, after noising to `strength`.
    """
    def walk(model, prompt, negative, seeds, n, guidance, sampler, schedule, *others):
        for x in generate(model, prompt, negative, seeds, n, guidance, sampler, schedule, *others):
            yield x
        total, paths = math.ceil(round((steps or n) / strength, 9)), []
        for seed, latents in zip(seeds, x):
            picture = Image.fromarray(decode(model, latents[None])[0])
            picture = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
            paths.append(generate(model, prompt, negative, [seed], total, guidance, sampler,
                                  schedule, *size, picture, strength, None, *others[5:]))
        for drawn in zip(*paths):
            yield np.concatenate(drawn)
    return walk
