"""What a trained model can do: pictures drawn from fixed seeds, judged by all drawings there are.

    draw ── pictures ──► Judge ── distances to the drawings ──► Verdict ──► evaluate ── a table

A picture is judged in two spaces, the VAE's latents and the pixels with their colours. It shows
the thing right when, of all drawings of all things, the nearest is one of that thing's own; and
the style right when, of the thing's own, the nearest is the one in that style.
"""

import functools
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from scenes import (  # noqa: E402
    COLOURS,
    PAIRS,
    STYLES,
    Part,
    Scene,
    article,
    describe,
    held_out_background,
    held_out_pair,
    held_out_style,
    in_style,
    paint,
    styles_to_train,
)

import tiny_sd  # noqa: E402
from extras.files import replace_atomically  # noqa: E402
from extras.show import sheet as labelled  # noqa: E402

WHITE = COLOURS["white"]


# ── Drawing many pictures at once ───────────────────────────────────────────────────────────────

def draw(model, prompts, seeds, negatives=None, steps=20, guidance=None, guesses=None):
    """Pictures (n, height, width, 3) of uint8, one for each prompt with its seed.

    They are what tiny_sd.generate draws for each by itself. guesses: a list that gets each step's
    x̂_0, one batch after another; give 64 prompts at most with it.
    """
    guidance = model.config.scheduler._guidance_scale if guidance is None else guidance

    def make(negatives, prompts):
        texts = [*negatives, *prompts] if guidance > 1 else prompts
        context = tiny_sd.embed_prompts(model, texts)[0]
        return functools.partial(batched_denoiser, context, guidance, guesses)

    return draw_batches(model, prompts, seeds, negatives, steps, make)


def draw_batches(model, prompts, seeds, negatives, steps, make):
    """Pictures (n, height, width, 3), 64 at a time; make(negatives, prompts): their denoiser."""
    negatives, pictures = negatives or [""] * len(prompts), []
    for i in tqdm(range(0, len(prompts), 64), "drawing", leave=False):
        part = slice(i, i + 64)
        *_, x = tiny_sd.generate(model, "", seeds=[*map(int, seeds[part])], steps=steps,
                                 guidance=1.0, denoiser=make(negatives[part], prompts[part]))
        pictures.append(tiny_sd.decode(model, x))
    return np.concatenate(pictures)


def batched_denoiser(context, guidance, guesses, model, *_):
    """denoise(x_t, t, ᾱ_t) -> (x̂_0, ε̂), where each picture of the batch has its own context.

    context: (batch, tokens, width), or with guidance the negative prompts' and then the prompts'.
    """
    heads, groups = model.config.unet.n_head, model.config.unet.norm_num_groups
    prediction_type = model.config.scheduler.prediction_type

    def denoise(x_t, t, alpha_bar):
        n = len(context)
        x = tiny_sd.array_like(context, np.concatenate([x_t] * (n // len(x_t))))
        times = np.full(n, t, np.float32)
        output = tiny_sd.unet(x, times, context, heads, groups, **model.unet)
        output = tiny_sd.to_numpy(output)
        if n > len(x_t):
            output = tiny_sd.guide(*np.split(output, 2), guidance)
        x_0, eps = tiny_sd.split_prediction(prediction_type, output, x_t, alpha_bar)
        if guesses is not None:
            guesses.append(x_0)
        return x_0, eps

    return denoise


# ── Judging ─────────────────────────────────────────────────────────────────────────────────────

def signature(pictures):
    """16 x 16 pixels and a histogram of 64 colours: a space that the model never saw.

    (n, height, width, 3) of uint8 -> (n, 832)
    """
    n, side = len(pictures), pictures.shape[1]
    small = pictures.reshape(n, 16, side // 16, 16, side // 16, 3).mean((2, 4)) / 255
    colours = (pictures // 64 @ np.array([16, 4, 1])).reshape(n, -1)
    histogram = np.stack([np.bincount(row, minlength=64) / row.size for row in colours])
    return np.concatenate([small.reshape(n, -1) / 16, histogram], axis=1).astype(np.float32)


def squared_distances(a, b):
    """(n, m): between the rows of a (n, d) and of b (m, d)."""
    return np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T


def on_colour(drawings, colour):
    """RGBA drawings (n, side, side, 4), premultiplied, on a colour: (n, side, side, 3)."""
    clear = 255 - drawings[..., 3:].astype(np.uint16)
    return (drawings[..., :3] + (np.uint16(colour) * clear + 127) // 255).astype(np.uint8)


class Verdict(NamedTuple):
    """What some pictures were taken for, in one space."""
    ranks: np.ndarray   # how many drawings of other things are nearer than the nearest own one
    styles: np.ndarray  # the style of the nearest own one

    def top(self, n):
        return float((self.ranks < n).mean())


class Judge:
    """Compares pictures with all drawings, put on the same colour at the same size."""

    def __init__(self, model, things, steps=20):
        self.model, self.things, self.steps, self.spaces = model, things, steps, {}

    def draw(self, prompts, seeds, negatives=None):
        return draw(self.model, prompts, seeds, negatives, self.steps)

    def latents(self, pictures):
        """The VAE's means for pictures (n, side, side, 3): (n, d)."""
        vae, groups = self.model.vae, self.model.config.vae.norm_num_groups
        means = []
        for i in range(0, len(pictures), 64):
            x = pictures[i:i + 64] / np.float32(127.5) - 1
            x = tiny_sd.array_like(vae["quant_conv"]["weight"], x)
            means.append(tiny_sd.to_numpy(tiny_sd.vae_encode(x, vae, groups)[0]))
        return np.concatenate(means).reshape(len(pictures), -1)

    def originals(self, space, side, colour):
        """All drawings of this side on a colour, in a space."""
        key = space.__name__, side, colour
        if key not in self.spaces:
            drawings = self.things.pictures[side]
            self.spaces[key] = np.concatenate([space(on_colour(drawings[i:i + 512], colour))
                                               for i in range(0, len(drawings), 512)])
        return self.spaces[key]

    def distances(self, space, pictures, colour=WHITE):
        """(pictures, drawings)."""
        return squared_distances(space(pictures),
                                 self.originals(space, pictures.shape[1], colour))

    def verdict(self, space, pictures, ids, colour=WHITE):
        """The Verdict on pictures that should show the things of these ids."""
        ranks, styles = [], []
        for i in range(0, len(pictures), 256):
            for row, thing in zip(self.distances(space, pictures[i:i + 256], colour),
                                  ids[i:i + 256]):
                drawn = self.things.drawings[thing]
                mine = np.where(drawn >= 0, row[drawn], np.inf)
                others = np.delete(row, drawn[drawn >= 0])
                ranks.append(int((others < mine.min()).sum()))
                styles.append(int(mine.argmin()))
        return Verdict(np.array(ranks), np.array(styles))

    def verdicts(self, pictures, ids):
        """{name of the space: Verdict} of pictures on white."""
        return {"latents": self.verdict(self.latents, pictures, ids),
                "pixels": self.verdict(signature, pictures, ids)}


class IdealJudge(Judge):
    """Judges what an ideal denoiser draws, which knows all drawings on white by heart.

    The squared error is least where x̂_0 is the mean of all drawings z that the caption may mean,
    each weighted by how likely noise is to turn it into x_t: exp(-|x_t - √ᾱ z|² / 2 (1 - ᾱ)). What
    guidance fails to do with this denoiser cannot be expected of one that learnt.
    """

    def __init__(self, model, things, steps=20):
        super().__init__(model, things, steps)
        self.z = self.originals(self.latents, max(things.pictures), WHITE)
        self.z = self.z * np.float32(model.config.vae.scaling_factor)
        self.numbers = {names[0]: i for i, names in enumerate(things.names)}
        self.often = np.zeros(len(self.z))      # how often training shows each
        for thing, drawn in enumerate(things.drawings):
            shown = drawn[styles_to_train(things, thing)]
            self.often[shown] = 1 / len(shown)

    def meant(self, text):
        """How often each drawing has this caption: "cat", "in the blob style" or none at all."""
        drawn, style = self.things.drawings, re.fullmatch(r"in the (\w+) style", text)
        if style:
            drawn = drawn[:, STYLES.index(style[1])]
        elif text:
            drawn = drawn[self.numbers[text]]
        often, drawn = np.zeros(len(self.z)), drawn[drawn >= 0]
        often[drawn] = self.often[drawn]
        return often

    def draw(self, prompts, seeds, negatives=None):
        """What Judge.draw returns, by this denoiser."""
        def make(negatives, prompts):
            often = np.stack([*map(self.meant, [*negatives, *prompts])])
            return functools.partial(self.denoiser, often)

        return draw_batches(self.model, prompts, seeds, negatives, self.steps, make)

    def denoiser(self, often, *_):
        """denoise(x_t, t, ᾱ_t) -> (x̂_0, ε̂); often: (negatives and prompts, drawings)."""
        guidance = self.model.config.scheduler._guidance_scale
        with np.errstate(divide="ignore"):
            log_often = np.log(often)

        def denoise(x_t, t, alpha_bar):
            rows = x_t.reshape(len(x_t), -1)
            scores = -squared_distances(rows, math.sqrt(alpha_bar) * self.z) / (2 - 2 * alpha_bar)
            shares = tiny_sd.softmax(np.tile(scores, (2, 1)) + log_often)
            x_0 = tiny_sd.guide(*np.split(shares @ self.z, 2), guidance).reshape(x_t.shape)
            return tiny_sd.split_prediction("sample", x_0, x_t, alpha_bar)

        return denoise


def crop(picture, part):
    """The square of a picture in which a Part stands."""
    side = part.halves * len(picture) // 2
    left, top = (round(place * (len(picture) - side)) for place in (part.x, part.y))
    return picture[top:top + side, left:left + side]


# ── Measures: each returns {what: number} ───────────────────────────────────────────────────────

def reconstruction(judge, n):
    """The VAE's mean PSNR for n drawings of each style, on random colours."""
    rng, model, things, report = np.random.default_rng(0), judge.model, judge.things, {}
    for s, style in enumerate(STYLES):
        drawn = things.drawings[:, s][things.drawings[:, s] >= 0]
        decibels = []
        for picture in rng.choice(drawn, min(n, len(drawn)), replace=False).tolist():
            scene = Scene([Part(picture, 2, .5, .5)], rng.integers(0, 256, 3), "")
            original = paint(scene, things)
            latents = tiny_sd.encode(model, original, np.float32(0))
            decibels.append(psnr(tiny_sd.decode(model, latents)[0], original))
        report[f"VAE, {style}: PSNR, dB"] = float(np.mean(decibels))
    return report


def psnr(picture, original):
    error = np.square(picture.astype(float) - original).mean()
    return 10 * math.log10(255 ** 2 / max(error, 1e-9))


def right_things(judge, ids, title="things"):
    """One picture of each thing, named without a style."""
    prompts = [judge.things.names[i][0] for i in ids]
    pictures = judge.draw(prompts, seeds=ids)
    report = {}
    for space, verdict in judge.verdicts(pictures, ids).items():
        report[f"{title}, in {space}: right"] = verdict.top(1)
        report[f"{title}, in {space}: right one among the nearest five"] = verdict.top(5)
    return report


def variety(judge, ids, seeds=8):
    """How much the pictures of one thing differ, and what a negative prompt makes of them."""
    names = [judge.things.names[i][0] for i in ids for _ in range(seeds)]
    which = np.repeat(ids, seeds)
    numbers = [*range(seeds)] * len(ids)
    pictures = judge.draw(names, numbers)
    report = {"seeds of a thing differ, relative to things": spread(pictures, seeds)}
    styles = judge.verdict(judge.latents, pictures, which).styles
    found = [len({*row}) for row in styles.reshape(len(ids), seeds).tolist()]
    report[f"different drawings among {seeds} seeds of a thing"] = float(np.mean(found))

    again = [i for i in range(len(names)) if i % seeds < 2]
    without = judge.draw([names[i] for i in again], [numbers[i] for i in again],
                   [f"in the {STYLES[styles[i]]} style" for i in again])
    kept = judge.verdict(judge.latents, without, which[again]).styles == styles[again]
    report["a negative prompt that names its style keeps it away"] = float(1 - kept.mean())
    return report


def most_variety(things, ids, seeds=8):
    """The same two measures where each seed shows one of the thing's drawings, chosen at random."""
    rng, side = np.random.default_rng(0), max(things.pictures)
    styles = np.stack([rng.choice(styles_to_train(things, i), seeds) for i in ids])
    shown = things.drawings[np.repeat(ids, seeds), styles.ravel()]
    pictures = on_colour(things.pictures[side][shown], WHITE)
    return {"drawings chosen at random differ, relative to things": spread(pictures, seeds),
            f"different drawings among {seeds} chosen at random":
                float(np.mean([len({*row}) for row in styles.tolist()]))}


def ideal_variety(judge, ids):
    """What variety() gives of an ideal denoiser."""
    ideal = IdealJudge(judge.model, judge.things, judge.steps)
    return {f"ideally, {name}": value for name, value in variety(ideal, ids).items()}


def spread(pictures, seeds):
    """Mean pixel distance among seeds over that among things, at 32 x 32 pixels."""
    n, side = len(pictures) // seeds, pictures.shape[1] // 32
    flat = pictures.reshape(n, seeds, 32, side, 32, side, 3).mean((3, 5)).reshape(n, seeds, -1)
    among_seeds = [np.abs(flat[:, a] - flat[:, b]).mean()
                   for a in range(seeds) for b in range(a)]
    among_things = [np.abs(flat[:, s] - np.roll(flat[:, s], shift, 0)).mean()
                    for s in range(seeds) for shift in range(1, min(n, 8))]
    return float(np.mean(among_seeds) / np.mean(among_things))


def named_styles(judge, drawings, title):
    """One picture of each (thing, style), named; title: what these have in common."""
    if not drawings:
        return {}
    ids, wanted = (np.array(column) for column in zip(*drawings))
    names = [in_style(article(judge.things.names[i][0]), STYLES[s]) for i, s in drawings]
    pictures = judge.draw(names, seeds=ids)
    report = {}
    for space, verdict in judge.verdicts(pictures, ids).items():
        report[f"{title}, in {space}: thing right"] = verdict.top(1)
        right = verdict.styles == wanted
        report[f"{title}, in {space}: style right"] = float(right.mean())
        if space == "latents":
            twins = np.isin(wanted, [STYLES.index("shaded"), STYLES.index("flat")])
            report[f"{title}: style right, shaded and flat"] = share_of(right, twins)
            report[f"{title}: style right, the other four"] = share_of(right, ~twins)
    return report


def share_of(right, chosen):
    return float(right[chosen].mean()) if chosen.any() else float("nan")


def backgrounds(judge, scenes, ids):
    """Things on backgrounds that training never showed them on; in pixels alone."""
    pictures = judge.draw([scene.caption for scene in scenes], seeds=ids)
    ranks, errors = [], []
    for picture, scene, thing in zip(pictures, scenes, ids):
        verdict = judge.verdict(signature, picture[None], [thing], scene.colour)
        ranks.append(verdict.ranks[0])
        drawing = judge.things.drawings[thing, verdict.styles[0]]
        bare = judge.things.pictures[len(picture)][drawing][..., 3] == 0
        if bare.any():
            colour = np.median(picture[bare], 0)
            errors.append(np.linalg.norm(to_lab(colour) - to_lab(scene.colour)))
    return {"backgrounds never shown, in pixels: thing right": float((np.array(ranks) < 1).mean()),
            "backgrounds never shown: median error of the colour, ΔE": float(np.median(errors))}


def pairs(judge, scenes, ids):
    """Two things that training never showed together."""
    pictures = judge.draw([scene.caption for scene in scenes], seeds=range(len(scenes)))
    report = {}
    for name, space in (("latents", judge.latents), ("pixels", signature)):
        both = [judge.verdict(space, np.stack([crop(picture, scene.parts[k])
                                               for picture, scene in zip(pictures, scenes)]),
                              [two[k] for two in ids]).ranks for k in (0, 1)]
        report[f"pairs never shown, in {name}: both right"] = float((np.max(both, 0) < 1).mean())
        report[f"pairs never shown, in {name}: both among the nearest five"] = \
            float((np.max(both, 0) < 5).mean())
    return report


STRENGTHS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)


def image_to_image(judge, drawings):
    """How far a drawing with its own caption is left behind as strength grows."""
    things, decibels = judge.things, []
    for thing, s in drawings:
        scene = Scene([Part(int(things.drawings[thing, s]), 2, .5, .5)], WHITE,
                      in_style(things.names[thing][0], STYLES[s]))
        original = paint(scene, things)
        decibels.append([psnr(from_picture(judge.model, original, scene.caption, strength),
                              original) for strength in STRENGTHS])
    return {f"from a drawing at strength {strength}: PSNR to it, dB": float(mean)
            for strength, mean in zip(STRENGTHS, np.mean(decibels, 0))}


def from_picture(model, picture, prompt, strength, steps=20):
    """What image-to-image makes of a picture, from seed 0."""
    *_, x = tiny_sd.generate(model, prompt, steps=steps, init=picture, strength=strength)
    return tiny_sd.decode(model, x)[0]


def guessing(model, names, steps):
    """Each step's guess of the picture, without guidance: (steps, n, side, side, 3)."""
    guesses = []
    draw(model, names, seeds=range(len(names)), steps=steps, guidance=1.0, guesses=guesses)
    return np.stack([tiny_sd.decode(model, x_0) for x_0 in guesses])


def sharpness(pictures):
    """The mean difference between neighbouring pixels."""
    x = pictures.astype(float)
    return float(np.abs(np.diff(x, axis=1)).mean() + np.abs(np.diff(x, axis=2)).mean())


def first_guesses(judge, ids):
    """How blurred the first guess of a thing is beside the last."""
    guesses = guessing(judge.model, [judge.things.names[i][0] for i in ids[:64]], judge.steps)
    sharp = [sharpness(pictures) for pictures in guesses]
    return {f"sharpness of guess {i + 1} of {len(sharp)}, relative to last": sharp[i] / sharp[-1]
            for i in (0, len(sharp) // 4, len(sharp) // 2)}


def to_lab(colour):
    """sRGB in 0..255 to CIE L*a*b* under D65."""
    c = np.asarray(colour, float) / 255
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = c @ np.array([[.4124, .2126, .0193], [.3576, .7152, .1192], [.1805, .0722, .9505]])
    xyz = xyz / [.9505, 1, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / 3 / (6 / 29) ** 2 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]),
                     200 * (f[..., 1] - f[..., 2])], -1)


def seconds_for_one(out):
    """A picture with NumPy, from start to file."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        subprocess.run([sys.executable, HERE.parent / "tiny_sd.py", "red apple", "-m", out,
                        "--steps", "20", "-o", f"{folder}/apple.png"], check=True,
                       capture_output=True)
        return time.monotonic() - begun


# ── What is held out ────────────────────────────────────────────────────────────────────────────

def drawings_by_style(things, held_out, rng, n):
    """n drawings (thing, style) that training never shows, or n that it does."""
    found = [(thing, s) for thing, s in np.argwhere(things.drawings >= 0).tolist()
             if held_out_style(things.names[thing][0], STYLES[s]) == held_out]
    return [found[i] for i in rng.permutation(len(found))[:n]]


def held_out_backgrounds(things, rng, n):
    """(scenes, ids) of n things on backgrounds that training never shows them on."""
    scenes, ids = [], []
    while len(scenes) < n:
        thing, colour = int(rng.integers(len(things.names))), str(rng.choice([*COLOURS]))
        name = things.names[thing][0]
        if held_out_background(name, colour):
            caption = describe(article(name), colour=colour)
            scenes.append(Scene([], COLOURS[colour], caption))
            ids.append(thing)
    return scenes, ids


def held_out_pairs(things, rng, n):
    """(scenes, pairs of ids) of n pairs that training never shows."""
    scenes, ids = [], []
    while len(scenes) < n:
        two = rng.choice(len(things.names), 2, replace=False).tolist()
        names, how = [things.names[i][0] for i in two], str(rng.choice([*PAIRS]))
        if held_out_pair(*names):
            parts = [Part(-1, 1, *place) for place in PAIRS[how]]
            scenes.append(Scene(parts, WHITE, f" {how} ".join(map(article, names))))
            ids.append(two)
    return scenes, ids


# ── All together ────────────────────────────────────────────────────────────────────────────────

def evaluate(out, things, limit, steps, device):
    """Measure the model in a folder; print a table and write OUT.json."""
    tiny_sd.require(things.drawings is not None, "only models of the drawings can be evaluated")
    judge, report = Judge(tiny_sd.load(out, "torch", device), things, steps), {}
    for numbers in measures(judge, min(limit, len(things.names)), out):
        report |= numbers
        write_report(out, report)
    print(table(report))


def measures(judge, n, out):
    """Yield {what: number}, one measure after another, of n things."""
    things, rng, few = judge.things, np.random.default_rng(1), min(n, 200)
    ids = rng.permutation(len(things.names))[:n].tolist()
    fifth = ids[:max(2, n // 5)]
    shown, unshown = (drawings_by_style(things, held_out, rng, n) for held_out in (False, True))
    yield right_things(judge, ids)
    yield variety(judge, fifth)
    yield most_variety(things, fifth)
    yield ideal_variety(judge, fifth)
    yield named_styles(judge, shown, "style named")
    yield named_styles(judge, unshown, "drawings never shown")
    yield backgrounds(judge, *held_out_backgrounds(things, rng, few))
    yield pairs(judge, *held_out_pairs(things, rng, few))
    yield image_to_image(judge, shown[:max(1, few // 8)])
    yield first_guesses(judge, ids)
    yield reconstruction(judge, few)
    yield {"seconds for one picture with NumPy, 20 steps": seconds_for_one(out),
           "megabytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6,
           "things": n, "drawings never shown": len(unshown),
           "backgrounds, and pairs, never shown": few}


def write_report(out, report):
    with replace_atomically(out.with_suffix(".json")) as temporary:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")


def table(report):
    """The numbers in Markdown, fractions in per cent."""
    def said(name, value):
        is_share = re.search("right|nearest five|away|differ", name)
        return f"{value:.1%}" if is_share and "drawings among" not in name else f"{value:.4g}"

    rows = [f"| {name} | {said(name, value)} |" for name, value in report.items()]
    return "\n".join(["| measure | value |", "| --- | --- |", *rows])


# ── Sheets ──────────────────────────────────────────────────────────────────────────────────────

PROMPTS = ["cat", "a cat in the noto style", "a cat in the blob style", "a cat in the shaded style",
           "a cat in the flat style", "a cat in the twemoji style", "a cat in the firefox style",
           "red apple", "a dog on a light blue background", "a rocket in the firefox style",
           "pizza on a green background", "a cat and a pizza", "rocket above a house",
           "a small ghost in the top left corner", "umbrella", "an octopus in the blob style",
           "a tractor on a yellow background", "a guitar and a drum in the flat style",
           "sunflower on a black background", "penguin", "a robot and a rose", "hot dog",
           "a crown in the twemoji style on a red background", "a bee above a sunflower"]


def sample_prompts(things):
    """What sheets show while training proceeds: at most 24 prompts."""
    if things.drawings is not None:
        return PROMPTS
    return [*dict.fromkeys(caption for caption, in things.names)][:24]


def save_picture(picture, path):
    with replace_atomically(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG")


def grid(pictures, columns):
    """Pictures (n, height, width, 3) as one, row by row; the last row is filled with white."""
    pictures = np.asarray(pictures)
    empty = np.full_like(pictures[:1], 255).repeat(-len(pictures) % columns, 0)
    rows = np.concatenate([pictures, empty]).reshape(-1, columns, *pictures.shape[1:])
    return np.concatenate([np.concatenate([*row], axis=1) for row in rows])


def sheet(model, prompts, seeds, columns, **how):
    """Prompts one after the other, each with all its seeds, as one picture."""
    texts = [prompt for prompt in prompts for _ in seeds]
    return grid(draw(model, texts, [*seeds] * len(prompts), **how), columns)


def write_sheet(out, things, steps, device):
    """OUT.png: 60 prompts of all kinds, unchosen, each from four seeds, three prompts a row.

    OUT-overview.png: see write_overview. OUT-guesses.png: the guesses without guidance.
    OUT-strength.png: a cat on its way to a dog. Of pictures with captions, OUT.png alone, of 24.
    """
    rng, model = np.random.default_rng(0), tiny_sd.load(out, "torch", device)
    if things.drawings is None:
        pictures = sheet(model, sample_prompts(things), range(4), 12, steps=steps)
        return save_picture(pictures, out.with_suffix(".png"))
    drawings = drawings_by_style(things, True, rng, 12)
    styled = [in_style(article(things.names[i][0]), STYLES[s]) for i, s in drawings]
    grounds, _ = held_out_backgrounds(things, rng, 12)
    two, _ = held_out_pairs(things, rng, 12)
    prompts = PROMPTS + styled + [scene.caption for scene in grounds + two]
    save_picture(sheet(model, prompts, range(4), 12, steps=steps), out.with_suffix(".png"))
    for i in range(0, len(prompts), 3):
        print(f"{i // 3 + 1:2}  " + " | ".join(prompts[i:i + 3]))

    write_overview(out, model, steps)
    names = [names[0] for names in things.names]
    guesses = guessing(model, [names[i] for i in rng.permutation(len(names))[:12]], steps)
    guesses = guesses[np.linspace(0, len(guesses) - 1, 8).round().astype(int)]
    save_picture(grid(guesses.reshape(-1, *guesses.shape[2:]), 12),
                 out.with_name(out.name + "-guesses.png"))
    strengths = strength_sheet(model, things, names, max(steps, 10))
    save_picture(strengths, out.with_name(out.name + "-strength.png"))


OVERVIEW = [    # (title, six prompts, the seed of each); the last two rows hold nothing ever shown
    ("six styles", [f"a frog in the {style} style" for style in STYLES], [0] * 6),
    ("six styles", [f"a hot dog in the {style} style" for style in STYLES], [0] * 6),
    ("six seeds", ["a penguin"] * 6, range(6)),
    ("six seeds", ["a rocket"] * 6, range(6)),
    ("new backgrounds", ["a cat on a yellow background", "a dog on a pink background",
                         "a rocket on a turquoise background", "a fox on a blue background",
                         "a sunflower on a light blue background",
                         "a crab on a dark blue background"], [0] * 6),
    ("new pairs", ["a cat and a pizza", "a penguin and an umbrella", "a rocket above a tractor",
                   "a frog next to a tree", "a house and a balloon", "an octopus and an owl"],
     [0] * 6)]


def write_overview(out, model, steps):
    """OUT-overview.png: one thing in six styles, from six seeds, and what training never showed."""
    rows = []
    for _, prompts, seeds in OVERVIEW:
        rows.append([Image.fromarray(p) for p in draw(model, prompts, [*seeds], steps=steps)])
    picture = labelled(rows, down=[title for title, *_ in OVERVIEW], size=96)
    save_picture(np.asarray(picture), out.with_name(out.name + "-overview.png"))


def strength_sheet(model, things, names, steps):
    """Each style's cat, and what the prompt "dog" makes of it as strength grows."""
    rows = []
    for picture in things.drawings[names.index("cat")]:
        if picture >= 0:
            cat = paint(Scene([Part(int(picture), 2, .5, .5)], WHITE, ""), things)
            rows += [cat, *(from_picture(model, cat, "dog", strength / 10, steps)
                            for strength in range(1, 11))]
    return grid(rows, 11)
