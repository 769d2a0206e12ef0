"""What the bundled model learns from ten pictures in ten minutes, measured and drawn.

    python -m extras.tools.teach_demo zorp FOLDER      a creature, under a word of its own
    python -m extras.tools.teach_demo ink FOLDER       a hand, which then draws other things
    python -m extras.tools.teach_demo ranks FOLDER     the creature with ranks 1, 2, 4, 8, 16
    python -m extras.tools.teach_demo overfit FOLDER   one picture, shown for too long
    python -m extras.tools.teach_demo picture FOLDER   extras/pictures/teach.png, of the first two

Each runs teach.py as a user does, unless FOLDER has the LoRA already, and prints what
weights/measure.py's judge makes of the result: of all drawings of all things, and the new ones, the
nearest says what a picture shows. Needs the drawings (weights/train.py render).
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "weights")]
import measure  # noqa: E402
from scenes import (  # noqa: E402
    COLOURS,
    PLACES,
    STYLES,
    Part,
    article,
    describe,
    in_style,
    load_things,
)

from extras import formats, show  # noqa: E402
from extras.tools.teach_pictures import (  # noqa: E402
    ZORPS,
    ink,
    ink_pictures,
    ink_things,
    write_pictures,
    zorp,
    zorp_pictures,
)


def taught(kind, folder, *options, name=None):
    """Return the LoRA of what teach_pictures.py draws, taught now unless it is there."""
    lora, pictures = folder / f"{name or kind}.safetensors", folder / kind
    if not pictures.exists():
        write_pictures(kind, pictures)
    if not lora.exists():
        command = [sys.executable, "-m", "extras.training.teach", pictures.resolve()]
        subprocess.run([*command, "-o", lora.resolve(), *options], cwd=ROOT, check=True)
    return lora


def model_with(lora=None):
    """Return the bundled model, with a LoRA if one is given."""
    return formats.load("emoji", "torch", loras=[(lora, 1)] if lora else [])


def judge_of(args, added):
    """Return a judge, yet without a model, that knows these RGBA drawings as one more thing."""
    things = load_things(args.data, 64)
    new = {side: np.stack([np.asarray(drawing.convert("RGBa").resize((side, side), Image.BOX))
                           for drawing in added]) for side in things.pictures}
    row = np.full((1, len(STYLES)), -1)
    row[0, :len(added)] = len(things.pictures[64]) + np.arange(len(added))
    things = things._replace(names=[*things.names, ["zorp"]],
                             drawings=np.concatenate([things.drawings, row]),
                             pictures={side: np.concatenate([old, new[side]])
                                       for side, old in things.pictures.items()})
    return measure.Judge(None, things)


# ── A creature ──────────────────────────────────────────────────────────────────────────────────


def unshown():
    """Return 50 pairs (background, place) of which the taught pictures show neither."""
    colours = [c for c in COLOURS if c not in {colour for _, colour, _ in ZORPS}]
    places = [p for p in PLACES if p not in {place for *_, place in ZORPS}]
    filling = [(colour, "") for colour in colours] * 2
    placed = [(colours[(3 * i + k) % len(colours)], place)
              for i, place in enumerate(places) for k in range(5)]
    return [*filling, *placed][:50]


def recognised(judge, name, thing):
    """Return 50 pictures of a thing where it was never shown, and which of them are right."""
    cases = unshown()
    pictures = judge.draw([describe(name, place, colour, bool(place)) for colour, place in cases],
                          range(50))
    right = []
    for picture, (colour, place) in zip(pictures, cases):
        part = Part(0, 1 if place else 2, *PLACES[place])
        seen = measure.crop(picture, part)[None]
        right.append(judge.verdict(measure.signature, seen, [thing], COLOURS[colour]).ranks[0] < 1)
    return pictures, np.array(right)


def others(judge, n=100):
    """Say how many of n other things are recognised, in latents and in pixels."""
    known = [i for i, (name, *_) in enumerate(judge.things.names) if name != "zorp"]
    report = measure.right_things(judge, np.random.default_rng(1).permutation(known)[:n].tolist())
    return (f"{n} other things: {report['things, in latents: right']:.0%} right in latents, "
            f"{report['things, in pixels: right']:.0%} in pixels")


def measure_zorp(judge, lora=None):
    """Print how many zorps are recognised, and how many other things; return the zorps."""
    judge.model = model_with(lora)
    pictures, right = recognised(judge, "a zorp", len(judge.things.names) - 1)
    filling = np.array([not place for _, place in unshown()])
    print(f"{lora.name if lora else 'before'}: {right.mean():.0%} of 50 zorps right "
          f"({right[filling].mean():.0%} of those that fill the picture, "
          f"{right[~filling].mean():.0%} of those in a place); {others(judge)}", flush=True)
    return pictures


def demo_zorp(args):
    """Teach zorps, and measure before and after."""
    judge = judge_of(args, [zorp(pose) for pose in range(6)])
    for title, lora in ("before", None), ("after", taught("zorp", args.folder, *args.options)):
        pictures = measure_zorp(judge, lora)
        measure.save_picture(measure.grid(pictures, 10), args.folder / f"zorp-{title}.png")


def demo_ranks(args):
    """Teach zorps with several ranks."""
    judge = judge_of(args, [zorp(pose) for pose in range(6)])
    for rank in (1, 2, 4, 8, 16):
        options = ["--rank", str(rank), *args.options]
        measure_zorp(judge, taught("zorp", args.folder, *options, name=f"rank-{rank}"))


# ── A hand ──────────────────────────────────────────────────────────────────────────────────────


def redrawn(args):
    """Return the things, where each has its drawings in ink after its own, as styles 6 to 11."""
    things, inked = load_things(args.data, 64), {}
    for side, drawings in things.pictures.items():
        inked[side] = drawings.copy()
    for i, drawing in enumerate(things.pictures[64]):
        picture = ink(Image.fromarray(drawing, "RGBa").convert("RGBA")).convert("RGBa")
        for side in inked:
            inked[side][i] = np.asarray(picture.resize((side, side), Image.BOX))
    count = len(things.pictures[64])
    shifted = np.where(things.drawings >= 0, things.drawings + count, -1)
    return things._replace(drawings=np.concatenate([things.drawings, shifted], 1), pictures={
        side: np.concatenate([things.pictures[side], inked[side]]) for side in inked})


def demo_ink(args):
    """Teach a hand with twelve things, and measure it on fifty others."""
    judge, known = measure.Judge(None, redrawn(args)), {name for name, _ in ink_things()}
    order = np.random.default_rng(2).permutation(len(judge.things.names)).tolist()
    ids = [i for i in order if judge.things.names[i][0] not in known][:50]
    names = [in_style(article(judge.things.names[i][0]), "ink") for i in ids]
    for title, lora in ("before", None), ("after", taught("ink", args.folder, *args.options)):
        judge.model = model_with(lora)
        pictures = judge.draw(names, seeds=range(50))
        verdict = judge.verdict(measure.signature, pictures, ids, COLOURS["beige"])
        print(f"{title}: of 50 things not taught {(verdict.styles >= len(STYLES)).mean():.0%} are "
              f"in ink, {verdict.top(1):.0%} the right thing, {verdict.top(5):.0%} among the "
              f"nearest five; {others(judge)}", flush=True)
        measure.save_picture(measure.grid(pictures, 10), args.folder / f"ink-{title}.png")


# ── The pictures ────────────────────────────────────────────────────────────────────────────────

ZORP_PROMPTS = ["a zorp on a turquoise background", "a zorp on a brown background",
                "a zorp on a dark blue background", "a zorp on a pink background",
                "a small zorp in the bottom left corner on an orange background",
                "a small zorp in the top left corner on a purple background",
                "a zorp and a pizza", "a cat"]
INK_PROMPTS = [in_style(thing, "ink") for thing in ("a frog", "a fish", "a camera", "a crown",
                                                    "a bee", "a teapot", "a castle", "a penguin")]


def drawn(lora, prompts):
    """Return a picture of each prompt, from seeds 0, 1, ..., by the bundled model with a LoRA."""
    return [Image.fromarray(pixels)
            for pixels in measure.draw(model_with(lora), prompts, range(len(prompts)))]


def small(pictures, n):
    """Return the first n of the pictures that are taught, as the model is shown them."""
    return [picture.resize((64, 64), Image.Resampling.LANCZOS) for picture, _ in [*pictures][:n]]


def demo_picture(args):
    """Draw extras/pictures/teach.png: what was taught, and prompts before and after."""
    rows = []
    for kind, pictures, prompts in (("zorp", zorp_pictures(), ZORP_PROMPTS),
                                    ("ink", ink_pictures(), INK_PROMPTS)):
        lora = taught(kind, args.folder, *args.options)
        rows += [small(pictures, 8), drawn(None, prompts), drawn(lora, prompts)]
    page = show.sheet(rows, down=["taught", "before", "after"] * 2, size=64)
    page.save(ROOT / "extras/pictures/teach.png", optimize=True)


def demo_overfit(args):
    """Draw extras/pictures/overfit.png: one picture shown for ever longer, and then ten."""
    one, prompts = args.folder / "one", ["a zorp on a red background", *ZORP_PROMPTS[:3],
                                         *ZORP_PROMPTS[4:]]
    if not one.exists():
        taught("zorp", args.folder, *args.options)
        one.mkdir()
        for file in (args.folder / "zorp").glob("zorp-01.*"):
            shutil.copy(file, one)
    rows, titles = [drawn(None, prompts)], ["before"]
    for steps in (50, 200, 800):
        lora = taught("one", args.folder, "-b", "4", "--steps", str(steps), name=f"one-{steps}")
        rows.append(drawn(lora, prompts))
        titles.append(f"one picture, {steps} steps")
    rows.append(drawn(taught("zorp", args.folder), prompts))
    show.sheet(rows, down=[*titles, "ten pictures"], size=64).save(
        ROOT / "extras/pictures/overfit.png", optimize=True)


DEMOS = {"zorp": demo_zorp, "ink": demo_ink, "ranks": demo_ranks, "overfit": demo_overfit,
         "picture": demo_picture}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", choices=DEMOS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT / "weights/state/emoji.zip")
    args, args.options = parser.parse_known_args()      # the rest is for teach.py
    args.folder.mkdir(exist_ok=True)
    DEMOS[args.demo](args)
