"""The exercises of NOTES.md: each change made on a copy of tiny_sd.py, and what is to be seen then, measured.

    python tests/exercises.py

Every change must match the program's text exactly once. What is measured compares the changed program with the unchanged
one, on the bundled model, so that it holds for any weights.
"""

import functools
import itertools
import sys
import types
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import tiny_sd  # noqa: E402

SOURCE, NUMBER = (ROOT / "tiny_sd.py").read_text(encoding="utf-8"), itertools.count()
PROMPT = "red apple on a blue background"


def change(*edits):
    """tiny_sd as a module of its own, with each old text replaced by the new one."""
    source = SOURCE
    for old, new in edits:
        assert source.count(old) == 1, f"{source.count(old)} times in tiny_sd.py: {old}"
        source = source.replace(old, new)
    module = types.ModuleType(f"changed_{next(NUMBER)}")
    module.__file__ = str(ROOT / "tiny_sd.py")
    sys.modules[module.__name__] = module
    exec(compile(source, module.__name__, "exec"), vars(module))
    return module


@functools.cache
def bundled():
    return tiny_sd.load(ROOT / "weights/emoji")


def latents(program, **settings):
    *_, x = program.generate(bundled(), PROMPT, **{"steps": 8, "sampler": "dpm++2m", **settings})
    return x


@functools.cache
def unchanged():
    return latents(tiny_sd)


def distance(x, y):
    """The difference of two latents' root mean square, in spreads of the second."""
    return float(np.sqrt(np.square(x - y).mean()) / y.std())


def guidance_off():
    changed = change(("return uncond + scale * (cond - uncond)", "return cond"))
    alone = distance(latents(changed), latents(tiny_sd, guidance=1))
    moved = distance(latents(changed), unchanged())
    assert alone < 1e-3 < 0.05 < moved
    return f"{alone:.1e} from the picture of --cfg-scale 1, {moved:.2f} from that of 7.5"


def first_order():
    changed = change(("direction = x_0 + (x_0 - last_x_0) / (2 * r)", "direction = x_0"))
    model, noise = bundled(), tiny_sd.Noise(0)(4, 16, 16)[None]
    denoise = tiny_sd.denoiser(model, tiny_sd.encode_prompts(model, ["", PROMPT]), 7.5)
    steps = tiny_sd.sampling_steps("dpm++2m", 8, model.config["scheduler"])
    *_, ddim = tiny_sd.ddim(denoise, noise, steps, None)
    same, moved = distance(latents(changed), ddim), distance(latents(changed), unchanged())
    assert same < 1e-3 < moved
    return f"{same:.1e} from DDIM over the same levels, {moved:.2f} from the second order"


def first_skip_first():
    changed = change(("concat(x, skips.pop())", "concat(x, skips.pop(0))"))
    try:
        latents(changed)
    except ValueError as error:
        return f"ValueError: {error}"
    raise AssertionError("sizes should disagree")


def skip_before_picture():
    changed = change(("concat(x, skips.pop())", "concat(skips.pop(), x)"))
    moved = distance(latents(changed), unchanged())
    assert moved > 0.5
    return f"no error, and {moved:.2f} from the picture"


def wrong_eps():
    line = "x = resnet(x, temb, groups, 1e-5, **weights)"
    slight, strong = (distance(latents(change((line, line.replace("1e-5", eps)))), unchanged()) for eps in ("1e-6", "1"))
    assert 0 < slight < 0.1 * strong and strong > 0.1
    return f"{slight:.1e} with 1e-6, {strong:.2f} with 1"


def half_the_heads():
    changed = change(("n_head) for s, p in ((x, to_q)", "max(1, n_head // 2)) for s, p in ((x, to_q)"))
    moved = distance(latents(changed), unchanged())
    assert moved > 0.05
    return f"no error, and {moved:.2f} from the picture"


def no_mask():
    changed = change(("dot_product_attention(q, k, v, causal=True)", "dot_product_attention(q, k, v)"))
    first, other = (program.encode_prompts(bundled(), ["red apple", "blue cat"])[:, 0] for program in (tiny_sd, changed))
    assert abs(first[0] - first[1]).max() < 1e-4 < 0.01 < abs(other[0] - other[1]).max()
    return f"the start's rows of two prompts differ by {abs(first[0] - first[1]).max():.1e}; without the mask by {abs(other[0] - other[1]).max():.2f}"


def symmetric_padding():
    changed = change(('stride=2, padding=(0, 1))', 'stride=2, padding=(1, 1))'))
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[20:40, 24:44] = 220, 40, 30

    def moved(program):     # down and right, where the result fits the picture best
        drawn = program.decode(bundled(), program.encode(bundled(), picture, np.zeros((1, 16, 16, 4))))[0].astype(float)
        return min(np.ndindex(13, 13), key=lambda by: np.square(
            np.roll(picture, (by[0] - 6, by[1] - 6), (0, 1)).astype(float) - drawn).mean())
    plain, shifted = (np.array(moved(program)) - 6 for program in (tiny_sd, changed))
    assert abs(plain).max() <= 1 and (shifted - plain >= 2).all() and (shifted - plain <= 4).all()
    return f"moved by {shifted.tolist()} pixels instead of {plain.tolist()}"


EXERCISES = {"Guidance off": guidance_off, "A sampler of first order": first_order, "The first skip first": first_skip_first,
             "The skip before the picture": skip_before_picture, "Another eps": wrong_eps, "Half the heads": half_the_heads,
             "No mask": no_mask, "Symmetric padding": symmetric_padding}

if __name__ == "__main__":
    for title, exercise in EXERCISES.items():
        print(f"{title}: {exercise()}")
