"""Pictures to teach from: a creature that no model knows, and drawings redrawn in one hand.

    python -m extras.tools.teach_pictures zorp FOLDER   ten pictures of a zorp, with captions
    python -m extras.tools.teach_pictures ink FOLDER    twelve things in ink, with captions
"""

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from extras.training.scenes import COLOURS, PLACES, article, describe, in_style

ROOT = Path(__file__).resolve().parents[2]

SKIN, DARK, PALE, PINK = (38, 166, 154), (12, 84, 92), (255, 224, 130), (236, 64, 122)
INK, WASH, PAPER = (38, 44, 110), (122, 146, 214), (246, 240, 226)


# ── A creature ──────────────────────────────────────────────────────────────────────────────────


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


def on_colour(drawing, colour, place="", side=256):
    """Return a drawing on a colour, filling it, or of half its size in a place."""
    page, (x, y) = Image.new("RGBA", (side, side), COLOURS[colour]), PLACES.get(place, (.5, .5))
    n = side // 2 if place else side
    drawing = drawing.resize((n, n), Image.Resampling.LANCZOS)
    page.alpha_composite(drawing, (round(x * (side - n)), round(y * (side - n))))
    return page.convert("RGB")


def zorp_pictures():
    """Yield (picture, caption) of what is taught of zorps."""
    for pose, colour, place in ZORPS:
        yield on_colour(zorp(pose), colour, place), describe("a zorp", place, colour, bool(place))


# ── A hand ──────────────────────────────────────────────────────────────────────────────────────


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


def ink_pictures():
    """Yield (picture, caption) of what is taught of the hand."""
    for name, drawing in ink_things():
        yield on_colour(ink(drawing), "beige", side=64), in_style(article(name), "ink")


PICTURES = {"zorp": zorp_pictures, "ink": ink_pictures}


def write_pictures(kind, folder):
    """Write pictures and captions as teach.py reads them, into a new folder."""
    folder.mkdir(parents=True)
    for i, (picture, caption) in enumerate(PICTURES[kind]()):
        picture.save(folder / f"{kind}-{i:02}.png")
        (folder / f"{kind}-{i:02}.txt").write_text(caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_pictures(sys.argv[1], Path(sys.argv[2]))
