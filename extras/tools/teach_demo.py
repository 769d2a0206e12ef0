"""What the bundled model learns from ten pictures in ten minutes, measured and drawn.

    python -m extras.tools.teach_demo zorp FOLDER      a creature, under a word of its own
    python -m extras.tools.teach_demo ink FOLDER       a hand, which then draws other things
    python -m extras.tools.teach_demo ranks FOLDER     the creature with ranks 1, 2, 4, 8, 16
    python -m extras.tools.teach_demo overfit FOLDER   one picture, shown for too long
    python -m extras.tools.teach_demo picture FOLDER   extras/pictures/teach.png, of the first two

Each runs teach.py as a user does, unless FOLDER has the LoRA already, and prints what
comes of it: of all drawings of all things, and the new ones, the nearest says what a picture shows.
Needs the drawings (python -m extras.training.train render).
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from extras import formats, show
from extras.tools.teach_pictures import (
    ZORPS,
    ink,
    ink_pictures,
    ink_things,
    write_pictures,
    zorp,
    zorp_pictures,
)
from extras.training import measure
from extras.training.drawings import STYLES, Things, load_things
from extras.training.fitting import grid, save_picture
from extras.training.scenes import COLOURS, PLACES, article, describe, in_style

ROOT = Path(__file__).resolve().parents[2]
WHITE = COLOURS["white"]


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


def size_of(model):
    return model.factor * model.config.unet.sample_size


def with_thing(things, name, added):
    """Return the things with one more, of these RGBA drawings."""
    new = {side: np.stack([np.asarray(drawing.convert("RGBa").resize((side, side), Image.BOX))
                           for drawing in added]) for side in things.pictures}
    row = np.full((1, things.drawings.shape[1]), -1)
    row[0, :len(added)] = len(things.pictures[max(new)]) + np.arange(len(added))
    return Things([*things.names, [name]], np.concatenate([things.drawings, row]),
                  {side: np.concatenate([old, new[side]]) for side, old in things.pictures.items()})


def nearest(things, pictures, colour=WHITE):
    """Return (things, styles) of the drawings, on a colour, that pictures are nearest to."""
    drawings = things.pictures[pictures.shape[1]]
    truths = np.concatenate([measure.small(measure.on_colour(drawings[i:i + 512], colour))
                             for i in range(0, len(drawings), 512)])
    found = measure.squared_distances(measure.small(pictures), truths).argmin(1)
    places = [np.argwhere(things.drawings == picture)[0] for picture in found]
    return np.array(places).T


# ── A creature ──────────────────────────────────────────────────────────────────────────────────


def unshown():
    """Return 50 pairs (background, place) of which the taught pictures show neither."""
    colours = [c for c in COLOURS if c not in {colour for _, colour, _ in ZORPS}]
    places = [p for p in PLACES if p not in {place for *_, place in ZORPS}]
    filling = [(colour, "") for colour in colours] * 2
    placed = [(colours[(3 * i + k) % len(colours)], place)
              for i, place in enumerate(places) for k in range(5)]
    return [*filling, *placed][:50]


def recognised(model, things, name, thing):
    """Return 50 pictures of a thing where it was never shown, and which of them are right."""
    cases, right = unshown(), []
    prompts = [describe(name, place, colour, bool(place)) for colour, place in cases]
    pictures = measure.draw(model, prompts, range(50))
    for picture, (colour, place) in zip(pictures, cases):
        half = len(picture) // 2
        left, top = (round(half * share) for share in PLACES.get(place, (0, 0)))
        seen = picture[top:top + half, left:left + half] if place else picture
        found, _ = nearest(things, seen[None], COLOURS[colour])
        right.append(found[0] == thing)
    return pictures, np.array(right)


def others(model, things, n=100):
    """Say how many of n other things are recognised."""
    known = [i for i, (name, *_) in enumerate(things.names) if name != "zorp"]
    ids = np.random.default_rng(1).permutation(known)[:n]
    found, _ = nearest(things, measure.draw(model, [things.names[i][0] for i in ids], ids))
    return f"{n} other things: {(found == ids).mean():.0%} right"


def measure_zorp(args, lora=None):
    """Print how many zorps are recognised, and how many other things; return the zorps."""
    model = model_with(lora)
    things = with_thing(load_things(args.data, size_of(model)), "zorp", [*map(zorp, range(6))])
    pictures, right = recognised(model, things, "a zorp", len(things.names) - 1)
    filling = np.array([not place for _, place in unshown()])
    print(f"{lora.name if lora else 'before'}: {right.mean():.0%} of 50 zorps right "
          f"({right[filling].mean():.0%} of those that fill the picture, "
          f"{right[~filling].mean():.0%} of those in a place); {others(model, things)}", flush=True)
    return pictures


def demo_zorp(args):
    """Teach zorps, and measure before and after."""
    for title, lora in ("before", None), ("after", taught("zorp", args.folder, *args.options)):
        save_picture(grid(measure_zorp(args, lora), 10), args.folder / f"zorp-{title}.png")


def demo_ranks(args):
    """Teach zorps with several ranks."""
    for rank in (1, 2, 4, 8, 16):
        options = ["--rank", str(rank), *args.options]
        measure_zorp(args, taught("zorp", args.folder, *options, name=f"rank-{rank}"))


# ── A hand ──────────────────────────────────────────────────────────────────────────────────────


def redrawn(things):
    """Return the things, where each has its drawings in ink after its own, as styles 6 to 11."""
    inked = {side: drawings.copy() for side, drawings in things.pictures.items()}
    for i, drawing in enumerate(things.pictures[max(inked)]):
        picture = ink(Image.fromarray(drawing, "RGBa").convert("RGBA")).convert("RGBa")
        for side in inked:
            inked[side][i] = np.asarray(picture.resize((side, side), Image.BOX))
    count = len(inked[max(inked)])
    shifted = np.where(things.drawings >= 0, things.drawings + count, -1)
    return Things(things.names, np.concatenate([things.drawings, shifted], 1), {
        side: np.concatenate([things.pictures[side], inked[side]]) for side in inked})


def demo_ink(args):
    """Teach a hand with twelve things, and measure it on fifty others."""
    known = {name for name, _ in ink_things()}
    for title, lora in ("before", None), ("after", taught("ink", args.folder, *args.options)):
        model = model_with(lora)
        things = redrawn(load_things(args.data, size_of(model)))
        order = np.random.default_rng(2).permutation(len(things.names)).tolist()
        ids = [i for i in order if things.names[i][0] not in known][:50]
        names = [in_style(article(things.names[i][0]), "ink") for i in ids]
        pictures = measure.draw(model, names, range(50))
        found, styles = nearest(things, pictures, COLOURS["beige"])
        print(f"{title}: of 50 things not taught {(styles >= len(STYLES)).mean():.0%} are in ink, "
              f"{(found == ids).mean():.0%} the right thing; {others(model, things)}", flush=True)
        save_picture(grid(pictures, 10), args.folder / f"ink-{title}.png")


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
