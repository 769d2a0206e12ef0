"""Fewer passes through the U-Net: fewer steps, or fewer passes a step?

    python -m extras.tools.passes        the table of REFERENCE §12; 23 minutes on two busy cores

A step with guidance takes two passes. Each row is compared with pictures of 100 steps, 200 passes;
the honest rival of a trick is fewer steps of the same sampler at as many passes.
"""

import numpy as np
from tqdm import tqdm

import extras.fast  # noqa: F401  (speed)
import tiny_sd
from extras import formats, guidance, show
from extras.like_diffusers import generate

PROMPTS = ["red apple", "a blue cat", "a sketch of a fox", "a rocket", "a small green ghost",
           "guitar in pixel art"]
SEEDS = [0, 1]
SCHEDULES = ["karras", "exponential", "simple"]


def reused(period):
    """Return make_denoiser: what guidance added to the prompt's answer serves for some steps."""
    def make(model, context, scale, *_):
        step = push = 0

        def denoise(x, t, alpha_bar):
            nonlocal step, push
            cond = tiny_sd.predict(model, x, t, context[[1] * len(x)])
            if step % period == 0:
                push = cond - tiny_sd.predict(model, x, t, context[[0] * len(x)])
            step += 1
            kind = model.config.scheduler.prediction_type
            return tiny_sd.split_prediction(kind, cond + (scale - 1) * push, x, alpha_bar)
        return denoise
    return make


def forecast(period):
    """Return make_denoiser: after two steps, only one in `period` asks; the others keep x̂_0."""
    def make(model, context, scale, *others):
        ask, step, x_0 = tiny_sd.denoiser(model, context, scale, *others), 0, None

        def denoise(x, t, alpha_bar):
            nonlocal step, x_0
            if step < 2 or step % period == 0:
                x_0, _ = ask(x, t, alpha_bar)
            step += 1
            return x_0, (x - alpha_bar ** 0.5 * x_0) / (1 - alpha_bar) ** 0.5
        return denoise
    return make


WAYS = {"every step": tiny_sd.denoiser,
        **{f"guided at {low} to {high}": guidance.within(tiny_sd.denoiser, low, high)
           for low, high in [(0, 0.8), (0.1, 0.9), (0.2, 1)]},
        "guidance reused once": reused(2), "x̂_0 reused once": forecast(2)}


def draw(model, n, schedule, make):
    """Return the pictures of all prompts and seeds, and how many passes each of them took."""
    passes, pictures = [], []
    with show.watching(predict=lambda *_: passes.append(1)):
        for prompt in PROMPTS:
            *_, x = generate(model, prompt, None, SEEDS, n, 2.0, "dpm++2m", schedule,
                             make_denoiser=make)
            pictures.append(tiny_sd.decode(model, x).astype(np.float32))
    return np.concatenate(pictures), len(passes) // len(PROMPTS)


def main():
    """Print a line for each way, schedule and number of steps, sorted by passes."""
    model = formats.load("emoji")
    best, _ = draw(model, 100, "karras", tiny_sd.denoiser)
    rows = []
    for name, schedule, n in tqdm([(name, schedule, n) for name in WAYS for schedule in SCHEDULES
                                   for n in (4, 5, 6, 8, 10, 15)]):
        pictures, passes = draw(model, n, schedule, WAYS[name])
        error = np.square(pictures - best).mean((1, 2, 3))
        rows.append((passes, np.median(10 * np.log10(255 ** 2 / error)), name, schedule, n))
    for passes, decibels, name, schedule, n in sorted(rows, key=lambda row: (row[0], -row[1])):
        print(f"{passes:3} passes {decibels:6.1f} dB  {name}, {schedule}, {n}")


if __name__ == "__main__":
    main()
