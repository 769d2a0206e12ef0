"""The exercises of NOTES.md, each done on a copy of tiny_sd.py, and what is to be seen, measured.

    python -m extras.tools.exercises

Every change must match the program's text exactly once. Each changed program draws a picture of
the bundled model to the end, or fails as the notes say. What is measured compares it with the
unchanged program, both by the formulas alone, so that it holds for any weights.
"""

import functools
import itertools
import os
import sys
import types
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")      # of small arrays: more would only wait

import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

SOURCE, NUMBER = (ROOT / "tiny_sd.py").read_text(encoding="utf-8"), itertools.count()
PROMPT = "red apple on a blue background"


def change(*edits):
    """Return tiny_sd as a module of its own, with each old text replaced by the new one."""
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
def plain():
    """Return the program as it stands."""
    return change()


@functools.cache
def bundled(program):
    """Return the bundled model as that program loads it, with its functions."""
    return program.load(ROOT / "weights/emoji")


def latents(program, **settings):
    """Return the last latents of a picture, which the program also decodes."""
    settings = {"steps": 8, "sampler": "dpm++2m", "guidance": 7.5, **settings}
    *_, x = program.generate(bundled(program), PROMPT, **settings)
    h, w = x.shape[1:3]
    pictures = program.decode(bundled(program), x)
    assert pictures.shape == (1, h * bundled(program).factor, w * bundled(program).factor, 3)
    return x


@functools.cache
def unchanged():
    return latents(plain())


def distance(x, y):
    """Return the root mean square of x - y, in standard deviations of y."""
    return float(np.sqrt(np.square(x - y).mean()) / y.std())


def count_rows(program, **settings):
    """Return the latents of a picture, and how many rows the U-Net was asked for on the way."""
    rows, unet = [], program.unet

    def counted(x, *args, **kwargs):
        rows.append(len(x))
        return unet(x, *args, **kwargs)
    program.unet = counted
    try:
        return latents(program, **settings), sum(rows)
    finally:
        program.unet = unet


def guidance_off():
    changed = change(("return uncond + scale * (cond - uncond)", "return cond"))
    x, rows = count_rows(changed)
    single, single_rows = count_rows(plain(), guidance=1)
    alone, moved = distance(x, single), distance(x, unchanged())
    assert alone < 1e-3 < 0.05 < moved
    assert rows == 2 * single_rows
    return (f"{alone:.1e} from the picture of --cfg-scale 1, with {rows} answers of the U-Net "
            f"instead of {single_rows}, and {moved:.2f} from that of 7.5")


def first_order():
    newest = ("direction = x_0 + (x_0 - previous_x_0) / (2 * r)", "direction = x_0")
    changed = change(newest)
    few, many = (distance(latents(changed, steps=n), latents(plain(), steps=n)) for n in (5, 20))
    assert many < few / 2 and few > 0.1

    in_its_place = change(newest, ('"ddim": ddim,', '"ddim": dpm_pp_2m,'))
    ddim = latents(plain(), sampler="ddim")
    same, other = (distance(x, ddim) for x in (latents(in_its_place, sampler="ddim"),
                                               latents(changed)))
    assert same < 1e-3 < 0.05 < other
    return (f"{few:.2f} from the picture of 5 steps, {many:.2f} from that of 20; {same:.1e} from "
            f"DDIM's over the same levels, {other:.2f} over its own")


def first_skip_first():
    changed = change(("zip_longest(resnets, attentions, skips[::-1])",
                      "zip_longest(resnets, attentions, skips)"))
    try:
        latents(changed)
    except ValueError as error:
        return f"ValueError: {error}"
    raise AssertionError("channels should disagree")


def skip_before_picture():
    changed = change(("concat(x, skip)", "concat(skip, x)"))
    moved = distance(latents(changed), unchanged())
    assert moved > 0.5
    return f"no error, and {moved:.2f} from the picture"


def wrong_eps():
    line = "x = resnet(x, temb, groups, 1e-5, **resnet_weights)"
    slight, strong = (distance(latents(change((line, line.replace("1e-5", eps)))), unchanged())
                      for eps in ("1e-6", "1"))
    assert 0 < slight < 0.1 * strong and strong > 0.1
    return f"{slight:.1e} with 1e-6, {strong:.2f} with 1"


def half_the_heads():
    changed = change(("attention(h, h, n_head, **attn1)", "attention(h, h, n_head // 2, **attn1)"),
                     ("context, n_head, **attn2)", "context, n_head // 2, **attn2)"))
    moved = distance(latents(changed), unchanged())
    assert moved > 0.05

    inside = [f"split_heads(linear({source}), n_head" for source in
              ("x, **to_q", "context, **to_k", "context, **to_v")]
    everywhere = change(*((old, f"{old} // 2") for old in inside))
    try:
        latents(everywhere)
    except ZeroDivisionError:       # the VAE's one head
        return f"no error, and {moved:.2f} from the picture"
    raise AssertionError("half a head should be none")


def no_mask():
    changed = change(("]], causal=True)", "]])"))
    spread = []
    for program in (plain(), changed):
        one, other = program.embed_prompts(bundled(program), ["red apple", "blue cat"])[0][:, 0]
        spread.append(abs(one - other).max())
    masked, unmasked = spread
    assert masked < 1e-4 < 0.01 < unmasked
    moved = distance(latents(changed), unchanged())
    assert moved > 0.5
    return (f"the start's rows of two prompts differ by {masked:.1e}; without the mask by "
            f"{unmasked:.2f}, and the picture by {moved:.2f}")


def symmetric_padding():
    changed = change(("stride=2, padding=(0, 1))", "stride=2, padding=(1, 1))"))
    assert np.array_equal(latents(changed), unchanged())
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[20:40, 24:44] = 220, 40, 30

    def there_and_back(program):
        x = program.encode(bundled(program), picture, np.zeros((1, 16, 16, 4)))
        return program.decode(bundled(program), x)[0].astype(float)

    def moved(drawn):       # down and right, where it fits the picture best
        def error(by):
            shifted = np.roll(picture, (by[0] - 6, by[1] - 6), (0, 1))
            return np.square(shifted.astype(float) - drawn).mean()
        return np.array(min(np.ndindex(13, 13), key=error)) - 6

    before, after = there_and_back(plain()), there_and_back(changed)
    assert abs(moved(before)).max() <= 1
    by = moved(after) - moved(before)
    assert (by >= 2).all() and (by <= 4).all()

    def strip(drawn):       # how far from white: along the top and the left, and further inside
        grey = 255 - drawn.mean(axis=-1)
        return (grey[:3, 50:].mean(), grey[50:, :3].mean()), grey[6:14, 50:60].mean()
    edges, inside = strip(after)
    assert min(edges) > 5 * inside and min(edges) > 5 * max(strip(before)[0])
    return (f"moved by {by.tolist()} pixels; along the top and the left {max(edges):.0f} grey "
            f"levels from white, further inside {inside:.0f}")


EXERCISES = {"Guidance off": guidance_off, "A sampler of first order": first_order,
             "The first skip first": first_skip_first,
             "The skip before the picture": skip_before_picture, "Another eps": wrong_eps,
             "Half the heads": half_the_heads, "No mask": no_mask,
             "Symmetric padding": symmetric_padding}

if __name__ == "__main__":
    for title, exercise in EXERCISES.items():
        print(f"{title}: {exercise()}")
