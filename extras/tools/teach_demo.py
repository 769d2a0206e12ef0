"""What the bundled model learns from ten pictures in ten minutes, measured and drawn.

    python -m extras.tools.teach_demo zorp FOLDER      a creature, under a word of its own
    python -m extras.tools.teach_demo ink FOLDER       a hand, which then draws other things
    python -m extras.tools.teach_demo ranks FOLDER     the creature with ranks 1, 2, 4, 8, 16
    python -m extras.tools.teach_demo overfit FOLDER   one picture, shown for too long
    python -m extras.tools.teach_demo picture FOLDER   extras/pictures/teach.png, of the first two

Each writes pictures with captions into FOLDER and teaches them as a user does, unless the LoRA is
there already, and prints what comes of it: of all drawings of all things, and the new ones, the
nearest says what a picture shows. Needs the drawings (python -m extras.training.train render).
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from extras import formats, like_diffusers, show
from extras.training import measure
from extras.training.drawings import load_things
from extras.training.fitting import grid, save_picture
from extras.training.scenes import COLOURS, PLACES, article, describe, in_style

ROOT = Path(__file__).resolve().parents[2]

# ── What is taught ──────────────────────────────────────────────────────────────────────────────

SKIN, DARK, PALE, PINK = (38, 166, 154), (12, 84, 92), (255, 224, 130), (236, 64, 122)
INK, WASH, PAPER = (38, 44, 110), (122, 146, 214), (246, 240, 226)


def zorp(pose=0, side=256):
    """Return a zorp as RGBA: round and green, one eye, three legs, two horns, and a pink tuft.

    pose: 0 to 5; the eye looks elsewhere, and the arms are held otherwise.
    """
    page = Image.new("RGBA", (512, 512))
    draw, up = ImageDraw.Draw(page), (-1, 1, 0, 1, -1, 0)[pose]
    for x in (150, 256, 362):
        draw.rounded_rectangle((x - 32, 350, x + 32, 484), 30, DARK)
        draw.ellipse((x - 46, 446, x + 46, 496), DARK)
    for sign in (-1, 1):
        x, y = 256 + sign * 216, 270 - 70 * up * sign
        draw.line((256 + sign * 130, 280, x, y), DARK, 44)
        draw.ellipse((x - 34, y - 34, x + 34, y + 34), DARK)
        draw.polygon((256 + sign * 70, 130, 256 + sign * 150, 170, 256 + sign * 170, 40), PALE)
    draw.polygon((206, 100, 306, 100, 330, 20, 280, 60, 256, 6, 232, 60, 182, 20), PINK)
    draw.ellipse((96, 80, 416, 432), SKIN)
    draw.ellipse((166, 270, 346, 420), PALE)
    for y in (310, 350, 390):
        half = 66 - abs(350 - y) // 2
        draw.line((256 - half, y, 256 + half, y), SKIN, 12)
    draw.ellipse((176, 112, 336, 262), "white")
    x, y = 256 + (0, 22, -22, 14, -14, 0)[pose], 190 + (0, 8, 8, -14, -14, 20)[pose]
    draw.ellipse((x - 40, y - 40, x + 40, y + 40), (20, 20, 30))
    draw.ellipse((x - 24, y - 28, x - 4, y - 8), "white")
    return page.resize((side, side), Image.Resampling.LANCZOS)


ZORPS = [       # what is taught: (pose, background, place); without a place it fills the picture
    (0, "white", ""), (1, "red", ""), (2, "light blue", ""), (3, "yellow", ""), (4, "green", ""),
    (5, "black", ""), (0, "white", "at the top"), (1, "light blue", "on the right"),
    (2, "yellow", "at the top"), (3, "white", "on the right")]


def ink(drawing):
    """Return an RGBA drawing redrawn in ink: dark outlines, and three tones of one blue."""
    page = Image.new("RGBA", drawing.size, "white")
    page.alpha_composite(drawing)
    tones, edges = page.convert("L").filter(ImageFilter.MedianFilter(3)), ImageFilter.FIND_EDGES
    width = max(3, drawing.width // 16 | 1)
    inside = drawing.getchannel("A").point(lambda a: 255 * (a > 128))

    pixels = np.full((*np.shape(tones), 3), PAPER, np.uint8)
    pixels[np.asarray(tones) < 190] = WASH
    pixels[np.asarray(tones) < 110] = INK
    pixels[np.asarray(tones.filter(edges)) > 90] = INK
    pixels[np.asarray(inside.filter(ImageFilter.MinFilter(width))) == 0] = INK
    redrawn = Image.fromarray(pixels).convert("RGBA")
    redrawn.putalpha(drawing.getchannel("A"))
    return redrawn


def ink_things(n=12):
    """Return [(name, RGBA drawing)] of the first things in tests/emoji.zip, as Noto draws them."""
    with zipfile.ZipFile(ROOT / "tests" / "emoji.zip") as archive:
        names = json.loads(archive.read("things.json"))
        files = [io.BytesIO(archive.read(f"{i:04}-noto.png")) for i in range(n)]
    return [(name, Image.open(file).convert("RGBA")) for (name, *_), file in zip(names, files)]


def on_colour(drawing, colour, place="", side=256):
    """Return a drawing on a colour, filling it, or of half its size in a place."""
    page, (x, y) = Image.new("RGBA", (side, side), COLOURS[colour]), PLACES.get(place, (.5, .5))
    n = side // 2 if place else side
    drawing = drawing.resize((n, n), Image.Resampling.LANCZOS)
    page.alpha_composite(drawing, (round(x * (side - n)), round(y * (side - n))))
    return page.convert("RGB")


def pictures_of(kind):
    """Return [(picture, caption)] of what is taught: of zorps, or of things in ink."""
    if kind == "zorp":
        return [(on_colour(zorp(pose), colour, place),
                 describe("a zorp", place, colour, bool(place))) for pose, colour, place in ZORPS]
    return [(on_colour(ink(drawing), "beige", side=64), in_style(article(name), "ink"))
            for name, drawing in ink_things()]


def taught(kind, folder, *options, name=None):
    """Return the LoRA of these pictures, or of those in the folder, taught now unless it is there.

    name: its own. options: of teach.py.
    """
    lora, pictures = folder / f"{name or kind}.safetensors", folder / kind
    if not pictures.exists():
        pictures.mkdir(parents=True)
        for i, (picture, caption) in enumerate(pictures_of(kind)):
            picture.save(pictures / f"{kind}-{i:02}.png")
            (pictures / f"{kind}-{i:02}.txt").write_text(caption + "\n", encoding="utf-8")
    if not lora.exists():
        command = [sys.executable, "-m", "extras.training.teach", pictures.resolve()]
        subprocess.run([*command, "-o", lora.resolve(), *options], cwd=ROOT, check=True)
    return lora


def model_with(lora=None):
    """Return the bundled model, with a LoRA if one is given."""
    return formats.load("emoji", "torch", loras=[(lora, 1)] if lora else [])


# ── What came of it ─────────────────────────────────────────────────────────────────────────────


class Drawings:
    """All drawings of all things, and more of them, each by its number."""

    def __init__(self, args, model):
        side, _ = like_diffusers.picture_size(model)
        self.things = load_things(args.data, side)
        self.pictures, self.count = {**self.things.pictures}, len(self.things.pictures[side])
        self.owners = [self.things.owners[k] for k in range(self.count)]

    def add(self, drawings, owners):
        """Add drawings in RGBA of the things of these numbers, behind those that there are."""
        self.owners = [*self.owners, *owners]
        for side, known in self.pictures.items():
            new = [np.asarray(drawing.convert("RGBa").resize((side, side), Image.BOX))
                   for drawing in drawings]
            self.pictures[side] = np.concatenate([known, np.stack(new)])

    def nearest(self, pictures, colour="white"):
        """Return the numbers of the drawings, on a colour, that pictures are nearest to."""
        known = self.pictures[pictures.shape[1]]
        truths = [measure.small(measure.on_colour(known[i:i + 512], COLOURS[colour]))
                  for i in range(0, len(known), 512)]
        distances = measure.squared_distances(measure.small(pictures), np.concatenate(truths))
        return distances.argmin(1)

    def others(self, model, n=100):
        """Say how many of n things that were not taught are recognised."""
        ids = np.random.default_rng(1).permutation(len(self.things.names))[:n]
        found = self.nearest(measure.draw(model, [self.things.names[i][0] for i in ids], ids))
        right = [self.owners[k] == i for k, i in zip(found, ids)]
        return f"{n} other things: {np.mean(right):.0%} right"


def unshown():
    """Return 50 pairs (background, place) that the taught pictures do not show."""
    colours = [c for c in COLOURS if c not in {colour for _, colour, _ in ZORPS}]
    places = [p for p in PLACES if p not in {place for *_, place in ZORPS}]
    filling = [(colour, "") for colour in colours] * 2
    placed = [(colours[(3 * i + k) % len(colours)], place)
              for i, place in enumerate(places) for k in range(5)]
    return [*filling, *placed][:50]


def measure_zorp(args, lora=None):
    """Print how many of 50 zorps are recognised, and of other things; return the zorps."""
    model, cases, right = model_with(lora), unshown(), []
    drawings = Drawings(args, model)
    drawings.add([zorp(pose) for pose in range(6)], [None] * 6)
    prompts = [describe("a zorp", place, colour, bool(place)) for colour, place in cases]
    pictures = measure.draw(model, prompts, range(len(cases)))
    for picture, (colour, place) in zip(pictures, cases):
        half = len(picture) // 2
        left, top = (round(half * share) for share in PLACES.get(place, (0, 0)))
        seen = picture[top:top + half, left:left + half] if place else picture
        right.append(drawings.nearest(seen[None], colour)[0] >= drawings.count)
    filling = [not place for _, place in cases]
    print(f"{lora.name if lora else 'before'}: {np.mean(right):.0%} of 50 zorps right "
          f"({np.mean(right, where=filling):.0%} of those that fill the picture, "
          f"{np.mean(right, where=np.invert(filling)):.0%} of those in a place); "
          f"{drawings.others(model)}", flush=True)
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


def demo_ink(args):
    """Teach a hand with twelve things, and measure it on fifty others."""
    known = {name for name, _ in ink_things()}
    for title, lora in ("before", None), ("after", taught("ink", args.folder, *args.options)):
        model = model_with(lora)
        drawings = Drawings(args, model)
        things = drawings.things
        drawings.add([ink(Image.fromarray(drawing, "RGBa").convert("RGBA"))
                      for drawing in things.pictures[max(things.pictures)]], drawings.owners)
        order = np.random.default_rng(2).permutation(len(things.names)).tolist()
        ids = [i for i in order if things.names[i][0] not in known][:50]
        names = [in_style(article(things.names[i][0]), "ink") for i in ids]
        pictures = measure.draw(model, names, range(len(names)))
        found = drawings.nearest(pictures, "beige")
        right = [drawings.owners[k] == i for k, i in zip(found, ids)]
        inked = found >= drawings.count
        print(f"{title}: of 50 things not taught {np.mean(inked):.0%} are in ink, "
              f"{np.mean(right):.0%} the right thing; {drawings.others(model)}", flush=True)
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


def demo_picture(args):
    """Draw extras/pictures/teach.png: what was taught, and prompts before and after."""
    rows = []
    for kind, prompts in ("zorp", ZORP_PROMPTS), ("ink", INK_PROMPTS):
        shown = [picture.resize((64, 64), Image.Resampling.LANCZOS)
                 for picture, _ in pictures_of(kind)[:8]]
        lora = taught(kind, args.folder, *args.options)
        rows += [shown, drawn(None, prompts), drawn(lora, prompts)]
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
