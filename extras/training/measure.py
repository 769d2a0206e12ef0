"""Evaluate a trained model: draw pictures from fixed seeds and compare them with true ones.

    draw ── pictures ──► Judge ── distances to true pictures ──► evaluate ── a table

scenes.py can paint whatever a caption asks for, including combinations that training never shows.
A drawn picture is right if its nearest neighbour among true pictures shows what was asked for. The
others are the same thing in every other colour (medium, surroundings, ...), and 60 other things in
the same one.
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

import numpy as np
from PIL.Image import fromarray
from tqdm import tqdm

import tiny_sd
from extras import like_diffusers
from extras.files import replace_atomically, save_new, save_picture
from extras.show import sheet as labelled
from extras.training.fitting import grid
from extras.training.painting import outlines
from extras.training.scenes import (
    COUNTS,
    MEDIA_SHARES,
    RELATIONS,
    SURROUNDINGS_SHARES,
    TINTS,
    Manner,
    Subject,
    compose,
    draw_scene,
    draw_subject,
    held_out,
    may_show,
    paint,
    plural,
    taught,
)
from extras.training.scenes import share as fixed_share

# ── Drawing many pictures at once ───────────────────────────────────────────────────────────────

def draw(model, prompts, seeds, negatives=None, steps=20, guidance=None, predict=tiny_sd.predict):
    """Pictures (n, height, width, 3) of uint8, one for each prompt with its seed, 64 at a time.

    They are the same as if tiny_sd drew each alone, with the model's own sampler.
    """
    make_denoiser = functools.partial(denoiser, predict=predict)
    negatives, pictures = negatives or [None] * len(prompts), []
    for i in tqdm(range(0, len(prompts), 64), "drawing", leave=False):
        part = slice(i, i + 64)
        texts = [*negatives[part], *prompts[part]]      # instead of one pair

        def embed(model, _, texts=texts):
            return tiny_sd.embed_prompts(model, texts)
        *_, x = like_diffusers.generate(model, "", seeds=[*map(int, seeds[part])], steps=steps,
                                        guidance=guidance, make_denoiser=make_denoiser,
                                        embed=embed)
        pictures.append(tiny_sd.decode(model, x))
    return np.concatenate(pictures)


def denoiser(model, context, guidance, *_, predict=tiny_sd.predict):
    """denoise(x_t, t, ᾱ_t) -> (x̂_0, ε̂), where each picture of the batch has its own context."""
    def denoise(x_t, t, alpha_bar):
        if guidance == 1:
            output = predict(model, x_t, t, context[len(x_t):])
        else:
            both = predict(model, np.concatenate([x_t, x_t]), t, context)
            output = tiny_sd.guide(*np.split(both, 2), guidance)
        return tiny_sd.split_prediction(model.config.scheduler.prediction_type, output, x_t,
                                        alpha_bar)

    return denoise


# ── Judging ─────────────────────────────────────────────────────────────────────────────────────

def small(pictures, side=32):
    """Pictures (n, height, width, 3) of uint8 as means: (n, side · side · 3), from 0 to 1."""
    n, height = pictures.shape[:2]
    cell = height // side
    means = pictures.reshape(n, side, cell, side, cell, 3).mean((2, 4))
    return means.reshape(n, -1).astype(np.float32) / 255


class Judge:
    """Paint true pictures, and find the one nearest to a drawn picture."""

    def __init__(self, things, tries=40, size=64):
        self.things, self.tries, self.size = things, tries, size
        self.truths = functools.cache(self.paint_truths)

    def paint_truths(self, subject, manner):
        """True pictures of this, small, (n, d), with all of its drawings; always the same."""
        rng = np.random.default_rng(int(fixed_share(repr((subject, manner))) * 2 ** 32))
        scenes = [compose(self.things, rng, subject, manner) for _ in range(self.tries)]
        scenes = {tuple(part.picture for part in scene.parts): scene for scene in scenes}.values()
        return small(np.stack([paint(scene, self.things, self.size) for scene in scenes]))

    def nearest(self, picture, candidates):
        """The one of these (subject, manner) to which a picture (height, width, 3) is nearest."""
        picture = small(picture[None])
        distances = [np.square(self.truths(*candidate) - picture).sum(-1).min()
                     for candidate in candidates]
        return candidates[int(np.argmin(distances))]

    def others(self, asked, n=60):
        """The same with n other things, which are chosen at random but fixed for each subject."""
        subject, manner = asked
        rng = np.random.default_rng(list(subject.ids))
        for i in rng.permutation(len(self.things.names))[:n].tolist():
            if i not in subject.ids:
                yield subject._replace(ids=(i, *subject.ids[1:])), manner
                if len(subject.ids) > 1:
                    yield subject._replace(ids=(subject.ids[0], i, *subject.ids[2:])), manner

    def rates(self, title, pictures, asked, alternatives):
        """{measure: share of pictures}; alternatives(subject, manner) -> those with other words."""
        thing, word, both = [], [], []
        for picture, one in zip(pictures, asked):
            others, words = [*self.others(one)], [*alternatives(*one)]
            thing.append(self.nearest(picture, [one, *others]) == one)
            word.append(not words or self.nearest(picture, [one, *words]) == one)
            both.append(thing[-1] and word[-1])
        rates = {"": both} if not words else {": the thing": thing, f": the {title}": word,
                                              ": both": both}
        return {f"{title}{what}": float(np.mean(right)) for what, right in rates.items()}


# ── Questions: combinations that training never shows ───────────────────────────────────────────

def tries():
    """Yield for a while, then UserError: few things may leave nothing to ask for."""
    yield from range(100_000)
    raise tiny_sd.UserError("the data have too few things to evaluate a model: there is nothing "
                            "that training never shows")


def unshown(things, kind, words, n, make):
    """n results of make(thing, word), for pairs held out by the key ("tint", name, word), ..."""
    rng, found = np.random.default_rng(1), []
    for _ in tries():
        if len(found) == n:
            return found
        thing, word = int(rng.integers(len(things.names))), words[int(rng.integers(len(words)))]
        name = things.names[thing][0]
        makes_sense = may_show(things, Subject((thing,)), Manner()) and not (
            kind == "count" and (plural(name) or name[0].isdigit())
            or kind == "tint" and name.split()[0] in TINTS)
        if held_out(kind, name, str(word)) and makes_sense:
            found.append(make(thing, word))


def questions(things, n):
    """{title: (asked, alternatives)}, for Judge.rates."""
    def other_words(make, words):
        return lambda subject, manner: [one for word in words
                                        if (one := make(subject.ids[0], word)) != (subject, manner)]

    asked = {}
    for title, kind, words, make in (
            ("colour", "tint", [*TINTS], lambda i, tint: (Subject((i,)), Manner((tint,)))),
            ("medium", "medium", taught(MEDIA_SHARES),
             lambda i, name: (Subject((i,)), Manner(medium=name))),
            ("surroundings", "scene", taught(SURROUNDINGS_SHARES),
             lambda i, name: (Subject((i,)), Manner(surroundings=name))),
            ("number", "count", taught(COUNTS), lambda i, n: (Subject((i,), n), Manner()))):
        asked[title] = unshown(things, kind, words, n, make), other_words(make, words)
    asked["relation"] = unshown_relations(things, n), other_relations
    return asked


def unshown_relations(things, n):
    """n pairs in relations that training never shows."""
    rng, found = np.random.default_rng(2), []
    for _ in tries():
        if len(found) == n:
            return found
        subject = draw_subject(things, rng)
        names = [things.names[i][0] for i in subject.ids]
        if len({*names}) == 2 and held_out("relation", names[0], subject.relation, names[1]):
            found.append((subject, Manner(("", ""))))


def other_relations(subject, manner):
    """The same two things in other relations, and swapped."""
    sets_apart = {"and": "next to", "next to": "and"}       # these look the same
    for relation in taught(RELATIONS):
        if relation not in ("between", subject.relation, sets_apart.get(subject.relation)):
            yield subject._replace(relation=relation), manner
    if subject.relation not in sets_apart:
        yield subject._replace(ids=subject.ids[::-1]), manner


# ── Measures: each returns {what: number} ───────────────────────────────────────────────────────

def combinations(model, judge, n, steps):
    """Yield the rates of each kind of combination that training never shows.

    Also those of true pictures of the same prompts: no model can expect better.
    """
    rng = np.random.default_rng(3)
    for title, (asked, alternatives) in questions(judge.things, n).items():
        scenes = [compose(judge.things, rng, *one) for one in asked]
        pictures = draw(model, [scene.caption for scene in scenes], range(n), steps=steps)
        yield judge.rates(title, pictures, asked, alternatives)
        true = [paint(scene, judge.things) for scene in scenes]
        both, = [*judge.rates(title, true, asked, alternatives).values()][-1:]
        yield {f"{title}: both, in true pictures": both}


def alone(model, judge, ids, title, steps):
    """A thing by its name alone."""
    pictures = draw(model, [judge.things.names[i][0] for i in ids], ids, steps=steps)
    asked = [(Subject((i,)), Manner()) for i in ids]
    return judge.rates(title, pictures, asked, lambda *_: [])


def kept_away(model, judge, ids, steps, seeds=4):
    """How often a negative prompt that names a picture's colour removes it."""
    names = [judge.things.names[i][0] for i in ids for _ in range(seeds)]
    numbers = [*range(seeds)] * len(ids)

    def tint_of(picture, i):
        nearest = judge.nearest(picture, [(Subject((i,)), Manner((tint,))) for tint in TINTS])
        return nearest[1].tints[0]

    which = np.repeat(ids, seeds).tolist()
    came = [*map(tint_of, draw(model, names, numbers, steps=steps), which)]
    several = [k for k in range(len(names)) if len({*came[k - k % seeds:][:seeds]}) > 1]
    pictures = draw(model, [names[k] for k in several], [numbers[k] for k in several],
                    [came[k] for k in several], steps)
    gone = [tint_of(picture, which[k]) != came[k] for picture, k in zip(pictures, several)]
    return {"a negative prompt keeps a colour away": float(np.mean(gone or [math.nan])),
            "negative prompts": len(several)}


def variety(model, judge, ids, steps, seeds=8):
    """How much the pictures of one thing differ, and how many of its drawings they match."""
    things = judge.things
    names = [things.names[i][0] for i in ids for _ in range(seeds)]
    pictures = draw(model, names, [*range(seeds)] * len(ids), steps=steps)
    drawings, found = things.pictures[max(things.pictures)], []
    for i, row in zip(ids, small(pictures).reshape(len(ids), seeds, -1)):
        drawn = drawings[things.drawings[i][things.drawings[i] >= 0]]
        shown = small(drawn[..., :3] + (255 - drawn[..., 3:]))      # on white
        distances = np.square(row[:, None] - shown).sum(-1)
        found.append(len({*distances.argmin(1).tolist()}))
    return {"seeds of a thing differ, relative to things": spread(pictures, seeds),
            f"different drawings among {seeds} seeds of a thing": float(np.mean(found))}


def spread(pictures, seeds):
    """Mean pixel distance among seeds over that among things, at 32 x 32 pixels."""
    n = len(pictures) // seeds
    flat = small(pictures).reshape(n, seeds, -1)
    among_seeds = [np.abs(flat[:, a] - flat[:, b]).mean()
                   for a in range(seeds) for b in range(a)]
    among_things = [np.abs(flat[:, s] - np.roll(flat[:, s], shift, 0)).mean()
                    for s in range(seeds) for shift in range(1, min(n, 8))]
    return float(np.mean(among_seeds) / np.mean(among_things))


def reconstruction(model, judge, n):
    """The VAE's mean PSNR on n scenes, and its edge energy as a fraction of the original's."""
    rng, decibels, edges = np.random.default_rng(4), [], []
    for _ in range(n):
        original = paint(draw_scene(judge.things, rng), judge.things)
        x = tiny_sd.encode(model, original, np.float32(0))
        drawn = tiny_sd.decode(model, x)[0]
        decibels.append(psnr(drawn, original))
        edges.append((edge_energy(drawn), edge_energy(original)))
    ours, theirs = np.sum(edges, 0)
    return {"VAE: PSNR, dB": float(np.mean(decibels)), "VAE: edges": float(ours / theirs)}


def agreement(pictures, lines):
    """How far the outlines of pictures are these, (n, height, width): the mean correlation."""
    return float(np.mean([np.corrcoef(outlines(picture).ravel(), asked.ravel())[0, 1]
                          for picture, asked in zip(pictures, lines)]))


def psnr(picture, original):
    error = np.square(picture.astype(float) - original).mean()
    return 10 * math.log10(255 ** 2 / max(error, 1e-9))


def edge_energy(picture):
    """The sum of squared differences between neighbouring pixels."""
    x = picture.astype(float)
    return sum(np.square(np.diff(x, axis=axis)).sum() for axis in (0, 1))


def seconds_for_one(out):
    """The seconds for one picture with NumPy, from start to file."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        subprocess.run([sys.executable, tiny_sd.HERE / "tiny_sd.py", "red apple", "-m", out,
                        "--steps", "20", "-o", f"{folder}/apple.png"], check=True,
                       capture_output=True)
        return time.monotonic() - begun


# ── All together ────────────────────────────────────────────────────────────────────────────────

def evaluate(out, things, n, steps, device):
    """Measure the model in a folder on n of each kind; print a table and write OUT.json."""
    tiny_sd.require(things.drawings is not None, "only models of the drawings can be evaluated")
    model, report = tiny_sd.load(out, "torch", device), {}
    file = save_new(out.with_name(f"{out.name}.json"), lambda file: file.write(b"{}\n"))
    for numbers in measures(model, Judge(things), min(n, len(things.names)), out, steps):
        report |= numbers
        with replace_atomically(file) as temporary:
            text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8")
    print(table(report))


def measures(model, judge, n, out, steps):
    """Yield {what: number}, one measure after another."""
    order = np.random.default_rng(1).permutation(len(judge.things.names)).tolist()
    persons = [i for i in order if i in {*judge.things.roles["persons"]}]
    others = [i for i in order if i not in persons]
    yield from combinations(model, judge, n, steps)
    yield alone(model, judge, others[:n], "a thing by its name alone", steps)
    if persons:
        yield alone(model, judge, persons[:n], "a person by name alone", steps)
    yield kept_away(model, judge, order[:max(2, n // 2)], steps)
    yield variety(model, judge, order[:max(2, n // 3)], steps)
    yield reconstruction(model, judge, n)
    yield {"seconds for one picture with NumPy, 20 steps": seconds_for_one(out),
           "megabytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6,
           "of each kind": n}


def table(report):
    """The numbers in Markdown, fractions in per cent."""
    def said(name, value):
        plain = re.search("drawings|PSNR|edges|seconds|megabytes|of each|prompts", name)
        return f"{value:.4g}" if plain else f"{value:.1%}"

    rows = [f"| {name} | {said(name, value)} |" for name, value in report.items()]
    return "\n".join(["| measure | value |", "| --- | --- |", *rows])


# ── Sheets ──────────────────────────────────────────────────────────────────────────────────────

PROMPTS = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))


def sample_prompts(things):
    """The prompts for sheets during training, at most 24."""
    if things.drawings is not None:
        return PROMPTS["sheet"][:24]
    return [*dict.fromkeys(caption for caption, in things.names)][:24]


def sheet(model, prompts, seeds, columns, **how):
    """Draw each prompt from all seeds, as one picture."""
    texts = [prompt for prompt in prompts for _ in seeds]
    return grid(draw(model, texts, [*seeds] * len(prompts), **how), columns)


def write_sheet(out, things, steps, device):
    """Write three sheets of fixed prompts; existing files are kept, and the name is OUT-1.png then.

    OUT.png: three prompts per row, each from four seeds. OUT-strangers.png: prompts that fit no
    template of scenes.py, ten per row. OUT-overview.png: rows of prompts with titles.
    """
    model = tiny_sd.load(out, "torch", device)

    def write(end, picture):
        print(save_picture(np.asarray(picture), out.with_name(f"{out.name}{end}.png"), ""))

    prompts = sample_prompts(things) if things.drawings is None else PROMPTS["sheet"]
    write("", sheet(model, prompts, range(4), 12, steps=steps))
    for i in range(0, len(prompts), 3):
        print(f"{i // 3 + 1:2}  " + " | ".join(prompts[i:i + 3]))
    if things.drawings is None:
        return
    write("-strangers", sheet(model, PROMPTS["strangers"], (0,), 10, steps=steps))
    rows = [[*map(fromarray, draw(model, row["prompts"], row["seeds"], steps=steps))]
            for row in PROMPTS["overview"]]
    write("-overview", labelled(rows, down=[row["title"] for row in PROMPTS["overview"]], size=96))
