"""The exercises of NOTES.md: six to build, with solutions and checks, and eight to break.

    python -m pytest -q tests/test_exercises.py

The solutions come first; replace one by yours, and the command checks it. A check takes the
solution and fails by assertion. The text that a change replaces must occur exactly once in the
program. Each changed program draws a picture with the bundled model, or fails as
extras/REFERENCE.md says. It is compared with the unchanged program, both without fast.py, so that
the statements hold for any weights.
"""

import functools
import itertools
import math
import sys
import types

import numpy as np

import tiny_sd
from extras import show
from extras.tools import models

# ── Solutions ───────────────────────────────────────────────────────────────────────────────────


def two_steps():
    """Return x after the two steps, and the ᾱ and ε that lead there in one step."""
    x = 0.9 * (0.9 * 1 + 0.19 ** 0.5 * 0.5) - 0.19 ** 0.5
    alpha_bar = 0.81 ** 2
    return x, alpha_bar, (0.9 * 0.19 ** 0.5 * 0.5 - 0.19 ** 0.5) / (1 - alpha_bar) ** 0.5


def ddim(denoise, x, steps):
    for t, alpha_bar, alpha_bar_next in steps:
        x_0, eps = denoise(x, t, alpha_bar)
        x = alpha_bar_next ** 0.5 * x_0 + (1 - alpha_bar_next) ** 0.5 * eps
        yield x


def cosine_schedule(num_train_timesteps=1000):
    g = np.cos((np.linspace(0, 1, num_train_timesteps + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = np.minimum(1 - g[1:] / g[:-1], 0.999)
    return np.cumprod(1 - beta)


def guide_both_ways(uncond, cond, negative, scale, negative_scale):
    return uncond + scale * (cond - uncond) - negative_scale * (negative - uncond)


def every_shape():
    """Return the shapes in order (conv_in, four levels down, the middle, four levels up) and the
    number of scores that a head computes at the finest level.
    """
    down = [(32, 32, 320), (16, 16, 640), (8, 8, 1280), (4, 4, 1280)]
    return [(32, 32, 320), *down, (4, 4, 1280), *reversed(down)], (32 * 32) ** 2


def learnt_pictures():
    """Train a network on the pictures +1 and -1; return its denoise() for x (n, 1)."""
    from extras.tools import moons
    rng = np.random.default_rng(0)
    weights = moons.new_network(rng, dim=1, width=64)
    for _ in moons.train(weights, lambda n: rng.choice([-1.0, 1.0], (n, 1)), 1500, rng):
        pass
    return moons.learnt_denoiser(weights)


# ── Their checks ────────────────────────────────────────────────────────────────────────────────


def check_two_steps(solution):
    found, alpha_bar, eps = solution()
    x = tiny_sd.add_noise(tiny_sd.add_noise(1.0, 0.81, 0.5), 0.81, -1.0)
    assert abs(found - x) < 1e-3 and abs(alpha_bar - 0.6561) < 1e-3
    assert abs(tiny_sd.add_noise(1.0, alpha_bar, eps) - x) < 1e-3


def check_ddim(solution):
    def denoise(x, t, alpha_bar):
        x_0 = np.tanh(2 * x + t / 1000)
        return x_0, (x - alpha_bar ** 0.5 * x_0) / (1 - alpha_bar) ** 0.5
    x = np.random.default_rng(0).standard_normal(50)
    steps = tiny_sd.evenly_spaced_steps(20, tiny_sd.scaled_linear_schedule())
    ours, theirs = list(tiny_sd.ddim(denoise, x, steps)), list(solution(denoise, x.copy(), steps))
    assert len(theirs) == 20 and np.allclose(ours, theirs, atol=1e-9)


def check_cosine_schedule(solution):
    alpha_bar = solution()
    assert alpha_bar.shape == (1000,) and (np.diff(alpha_bar) < 0).all()
    t = np.arange(1000)
    g = np.cos(((t + 1) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / math.cos(
        0.008 / 1.008 * math.pi / 2) ** 2
    assert np.allclose(alpha_bar[:999], g[:999])        # only the last β is above 0.999
    assert np.isclose(1 - alpha_bar[999] / alpha_bar[998], 0.999)


def check_guide_both_ways(solution):
    uncond, cond, negative = np.random.default_rng(0).standard_normal((3, 50))
    guide = tiny_sd.guide
    for found, expected in (
            (solution(uncond, cond, negative, 7.5, 0), guide(uncond, cond, 7.5)),
            (solution(uncond, cond, cond, 7.5, 2), guide(uncond, cond, 5.5)),
            (solution(uncond, cond, negative, 7.5, 6.5), guide(negative, cond, 7.5)),
            (solution(uncond, cond, negative, 0, 1), uncond - (negative - uncond))):
        assert np.allclose(found, expected)


def check_every_shape(solution):
    """Against what the program's U-Net computes, with a tenth of Stable Diffusion's channels."""
    shapes, scores = solution()
    program, convolved, blocks, asked = change(), [], [], []
    weights = {name: np.zeros([shape[0], *shape[2:], shape[1]] if len(shape) == 4 else shape,
                              np.float32) for name, shape in
               models.shapes_of("unet", models.sd15(32)["unet"]).items()}
    with show.watching(
            program, conv2d=lambda y, *_, **__: convolved.append(y.shape),
            resnet=lambda y, *_, **__: blocks.append(y.shape),
            dot_product_attention=lambda y, q, k, *_: asked.append(q.shape[2] * k.shape[2])):
        program.unet(np.zeros((1, 32, 32, 4), np.float32), np.zeros((1, 128), np.float32),
                     np.zeros((1, 77, 64), np.float32), [8] * 4, 32, **program.nest(weights))
    last_of_level = [1, 3, 5, 7, 9, 12, 15, 18, 21]     # of 2 blocks each, 2, and 3 each
    expected = [convolved[0], *(blocks[i] for i in last_of_level)]
    assert [tuple(shape) for shape in shapes] == [(h, w, 10 * c) for _, h, w, c in expected]
    assert scores == max(asked)


def check_learnt_pictures(solution):
    denoise, rng = solution(), np.random.default_rng(1)
    alpha_bar = tiny_sd.scaled_linear_schedule()[300]
    x = tiny_sd.add_noise(rng.choice([-1.0, 1.0], (2000, 1)), alpha_bar,
                          rng.standard_normal((2000, 1)))
    exact = np.tanh(x * alpha_bar ** 0.5 / (1 - alpha_bar))
    found, _ = denoise(x, 300, alpha_bar)
    error, size = (float(np.sqrt(np.square(v).mean())) for v in (found - exact, exact))
    assert error < 0.1 and size > 0.7


BUILT = {"Two steps by hand": (two_steps, check_two_steps),
         "A sampler": (ddim, check_ddim),
         "A schedule": (cosine_schedule, check_cosine_schedule),
         "The negative prompt's role, swapped": (guide_both_ways, check_guide_both_ways),
         "Every shape": (every_shape, check_every_shape),
         "Two pictures, learnt": (learnt_pictures, check_learnt_pictures)}


# ── Changes to the program ──────────────────────────────────────────────────────────────────────

LESSON, NUMBER = tiny_sd.HERE / "tiny_sd.py", itertools.count()
PROMPT = "red apple on a blue background"


def change(*edits):
    """Return a new module of tiny_sd, with each old text replaced by the new one."""
    source = LESSON.read_text(encoding="utf-8")
    for old, new in edits:
        assert source.count(old) == 1, f"{source.count(old)} times in tiny_sd.py: {old}"
        source = source.replace(old, new)
    module = types.ModuleType(f"changed_{next(NUMBER)}")
    module.__file__ = str(LESSON)
    sys.modules[module.__name__] = module
    exec(compile(source, module.__name__, "exec"), vars(module))
    return module


@functools.cache
def plain():
    """Return the unchanged program."""
    return change()


@functools.cache
def bundled(program):
    """Return the bundled model loaded by that program, with its functions."""
    return program.load(tiny_sd.HERE / "weights/emoji")


def latents(program, **settings):
    """Draw a picture; return its final latents, after checking that they can be decoded."""
    model, settings = bundled(program), {"guidance": 7.5, "sampler": "dpm_pp_2m", **settings}
    settings["sampler"] = getattr(program, settings["sampler"])
    settings["steps"] = program.evenly_spaced_steps(settings.get("steps", 8), model.alpha_bars)
    *_, x = program.generate(model, PROMPT, **settings)
    h, w = x.shape[1:3]
    assert program.decode(model, x).shape == (1, h * model.factor, w * model.factor, 3)
    return x


@functools.cache
def unchanged():
    return latents(plain())


def distance(x, y):
    """Return the root mean square of x - y, in standard deviations of y."""
    return float(np.sqrt(np.square(x - y).mean()) / y.std())


def moved_by(*edits):
    """Return how much changes to the program change the picture."""
    return distance(latents(change(*edits)), unchanged())


def fails(kind, *edits):
    """Do changes to the program cause an error of this kind?"""
    try:
        latents(change(*edits))
    except kind:
        return True
    return False


def count_rows(program, **settings):
    """Return the latents of a picture, and how many rows the U-Net computed for it."""
    rows = []
    with show.watching(program, unet=lambda y, *_, **__: rows.append(len(y))):
        return latents(program, **settings), sum(rows)


def guidance_off():
    x, rows = count_rows(change(("return uncond + scale * (cond - uncond)", "return cond")))
    single, single_rows = count_rows(plain(), guidance=1)
    assert distance(x, single) < 1e-3 < 0.05 < distance(x, unchanged())
    assert rows == 2 * single_rows


def first_order():
    changed = change(("target = x_0 + (x_0 - previous_x_0) / (2 * r)", "target = x_0"))
    few, many = (distance(latents(changed, steps=n), latents(plain(), steps=n)) for n in (5, 20))
    assert many < few / 2 and few > 0.1
    assert distance(latents(changed), latents(plain(), sampler="ddim")) < 1e-3


def oldest_skip():
    assert fails(ValueError, ("skips.pop()", "skips.pop(0)"))


def skip_before_picture():
    assert moved_by(("concat(x, skips.pop())", "concat(skips.pop(), x)")) > 0.5


def another_delta():
    line = "x = resnet(x, temb, groups, 1e-5, **resnet_weights)"
    slight, strong = (moved_by((line, line.replace("1e-5", delta))) for delta in ("1e-6", "1"))
    assert 0 < slight < 0.1 * strong and strong > 0.1


def half_the_heads():
    assert moved_by(("attention(h, h, n_head, **attn1)", "attention(h, h, n_head // 2, **attn1)"),
                    ("context, n_head, **attn2)", "context, n_head // 2, **attn2)")) > 0.05

    inside = [f"split_heads(linear({source}), n_head" for source in
              ("x, **to_q", "context, **to_k", "context, **to_v")]
    assert fails(ZeroDivisionError, *((old, f"{old} // 2") for old in inside))  # of the VAE's 1


def no_mask():
    changed = change(("]], causal=True)", "]])"))
    spread = []
    for program in (plain(), changed):
        one, other = program.embed_prompts(bundled(program), ["red apple", "blue cat"])[0][:, 0]
        spread.append(abs(one - other).max())
    masked, unmasked = spread
    assert masked < 1e-4 < 0.01 < unmasked
    assert distance(latents(changed), unchanged()) > 0.5


def symmetric_padding():
    changed = change(("stride=2, padding=(0, 1))", "stride=2, padding=(1, 1))"))
    model = bundled(plain())
    assert np.array_equal(latents(changed), unchanged())
    shape = plain().latent_shape(model)
    side = model.factor * shape[0]
    picture = np.full((side, side, 3), 255, np.uint8)
    picture[side // 3:2 * side // 3, 3 * side // 8:5 * side // 8] = 220, 40, 30

    def there_and_back(program):
        x = program.encode(bundled(program), picture, np.zeros((1, *shape)))
        return program.decode(bundled(program), x)[0].astype(float)

    def moved(drawn):       # down and right, where it fits the picture best
        def error(by):
            shifted = np.roll(picture, (by[0] - 10, by[1] - 10), (0, 1))
            return np.square(shifted.astype(float) - drawn).mean()
        return np.array(min(np.ndindex(21, 21), key=error)) - 10

    before, after = there_and_back(plain()), there_and_back(changed)
    by, expected = moved(after) - moved(before), model.factor - 1
    assert abs(moved(before)).max() <= 1 and abs(by - expected).max() <= 1

    def strip(drawn):       # how far from white: along the top and the left, and further inside
        grey, n = 255 - drawn.mean(axis=-1), side // 8
        return (grey[:3, -n:].mean(), grey[-n:, :3].mean()), grey[n:2 * n, -n:-n // 2].mean()
    edges, inside = strip(after)
    assert min(edges) > 5 * inside and min(edges) > 5 * max(strip(before)[0])


BROKEN = {"Guidance off": guidance_off, "A sampler of first order": first_order,
          "The oldest skip": oldest_skip, "The skip before the picture": skip_before_picture,
          "Another delta": another_delta, "Half the heads": half_the_heads, "No mask": no_mask,
          "Symmetric padding": symmetric_padding}
