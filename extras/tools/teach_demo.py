"""Show what the bundled model learns from ten pictures in ten minutes.

    python -m extras.tools.teach_demo FOLDER [option ...]

Write captioned pictures to FOLDER, of a creature with a new name and of things in an ink style.
Teach both to the model with teach.py and these options, unless FOLDER has the LoRAs. Draw
extras/pictures/teach.png, before and after, and overfit.png, after training on one picture for too
long.
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

from extras import formats, show
from extras.files import replace_atomically
from extras.training import measure
from extras.training.scenes import COLOURS, PLACES, article, describe, in_style

ROOT = Path(__file__).resolve().parents[2]

# ── What is taught ──────────────────────────────────────────────────────────────────────────────

SKIN, DARK, PALE, PINK = (38, 166, 154), (12, 84, 92), (255, 224, 130), (236, 64, 122)
INK, WASH, PAPER = (38, 44, 110), (122, 146, 214), (246, 240, 226)


def zorp(pose=0, side=256):
    """Draw a zorp as RGBA: round and green, with one eye, three legs, two horns and a pink tuft.

    pose: 0 to 5, for the direction of the eye and the position of the arms.
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


ZORPS = [       # the pictures to teach: (pose, background, place); no place: full size
    (0, "white", ""), (1, "red", ""), (2, "light blue", ""), (3, "yellow", ""), (4, "green", ""),
    (5, "black", ""), (0, "white", "at the top"), (1, "light blue", "on the right"),
    (2, "yellow", "at the top"), (3, "white", "on the right")]


def ink(drawing):
    """Redraw an RGBA drawing in ink: dark outlines, and three tones of one blue."""
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
    """Return [(name, RGBA drawing)] of the first things in tests/emoji.zip, in Noto's style."""
    with zipfile.ZipFile(ROOT / "tests" / "emoji.zip") as archive:
        names = json.loads(archive.read("things.json"))
        files = [io.BytesIO(archive.read(f"{i:04}-noto.png")) for i in range(n)]
    return [(name, Image.open(file).convert("RGBA")) for (name, *_), file in zip(names, files)]


def on_colour(drawing, colour, place="", side=256):
    """Put a drawing on a coloured background, at full size, or at half size in a place."""
    page, (x, y) = Image.new("RGBA", (side, side), COLOURS[colour]), PLACES.get(place, (.5, .5))
    n = side // 2 if place else side
    drawing = drawing.resize((n, n), Image.Resampling.LANCZOS)
    page.alpha_composite(drawing, (round(x * (side - n)), round(y * (side - n))))
    return page.convert("RGB")


def pictures_of(kind):
    """Return [(picture, caption)] to teach: of zorps, or of things in ink."""
    if kind == "zorp":
        return [(on_colour(zorp(pose), colour, place),
                 describe("a zorp", place, colour, bool(place))) for pose, colour, place in ZORPS]
    return [(on_colour(ink(drawing), "beige", side=64), in_style(article(name), "ink"))
            for name, drawing in ink_things()]


def taught(kind, folder, *options, name=None):
    """Return the LoRA of these pictures, or of those in the folder; train it if it is missing.

    name: of the LoRA. options: for teach.py.
    """
    lora, pictures = folder / f"{name or kind}.safetensors", folder / kind
    if not pictures.exists():
        with replace_atomically(pictures) as unfinished:
            unfinished.mkdir()
            for i, (picture, caption) in enumerate(pictures_of(kind)):
                picture.save(unfinished / f"{kind}-{i:02}.png")
                (unfinished / f"{kind}-{i:02}.txt").write_text(caption + "\n", encoding="utf-8")
    if not lora.exists():
        command = [sys.executable, "-m", "extras.training.teach", pictures.resolve()]
        subprocess.run([*command, "-o", lora.resolve(), *options], cwd=ROOT, check=True)
    return lora


# ── The pictures ────────────────────────────────────────────────────────────────────────────────

ZORP_PROMPTS = ["a zorp on a turquoise background", "a zorp on a brown background",
                "a zorp on a dark blue background", "a zorp on a pink background",
                "a small zorp in the bottom left corner on an orange background",
                "a small zorp in the top left corner on a purple background",
                "a zorp and a pizza", "a cat"]
INK_PROMPTS = [in_style(thing, "ink") for thing in ("a frog", "a fish", "a camera", "a crown",
                                                    "a bee", "a teapot", "a castle", "a penguin")]


def drawn(lora, prompts):
    """Draw each prompt with the bundled model and a LoRA, from seeds 0, 1, ..."""
    model = formats.load("emoji", "torch", loras=[(lora, 1)] if lora else [])
    return [*map(Image.fromarray, measure.draw(model, prompts, range(len(prompts))))]


def draw_teach(folder, options):
    """Draw the pictures taught, and prompts before and after."""
    rows = []
    for kind, prompts in ("zorp", ZORP_PROMPTS), ("ink", INK_PROMPTS):
        shown = [picture.resize((64, 64), Image.Resampling.LANCZOS)
                 for picture, _ in pictures_of(kind)[:8]]
        lora = taught(kind, folder, *options)
        rows += [shown, drawn(None, prompts), drawn(lora, prompts)]
    return show.sheet(rows, down=["taught", "before", "after"] * 2, size=64)


def draw_overfit(folder, options):
    """Draw the results of training on one picture for longer and longer, and then on ten."""
    zorps = taught("zorp", folder, *options)
    one, prompts = folder / "one", ["a zorp on a red background", *ZORP_PROMPTS[:3],
                                    *ZORP_PROMPTS[4:]]
    if not one.exists():
        one.mkdir()
        for file in (folder / "zorp").glob("zorp-01.*"):
            shutil.copy(file, one)
    rows, titles = [drawn(None, prompts)], ["before"]
    for steps in (50, 200, 800):
        lora = taught("one", folder, "-b", "4", "--steps", str(steps), name=f"one-{steps}")
        rows.append(drawn(lora, prompts))
        titles.append(f"one picture, {steps} steps")
    rows.append(drawn(zorps, prompts))
    return show.sheet(rows, down=[*titles, "ten pictures"], size=64)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args, options = parser.parse_known_args()
    args.folder.mkdir(exist_ok=True)
    for name, draw in ("teach", draw_teach), ("overfit", draw_overfit):
        picture = draw(args.folder, options)
        with replace_atomically(ROOT / f"extras/pictures/{name}.png") as unfinished:
            picture.save(unfinished, "PNG", optimize=True)
