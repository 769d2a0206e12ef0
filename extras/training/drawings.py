"""Render and read the bundled model's training drawings: six sets from npm packages.

    npm packages ── render ──► emoji.zip ── load_things ──► Things

words.json has the tables: which emoji to use, and what people call them. Nothing here needs torch.
"""

import collections
import functools
import io
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from extras.checks import check_memory
from extras.files import read_captioned, read_picture, read_text, save_new
from tiny_sd import UserError, require

WORDS = json.loads(read_text(Path(__file__).with_name("words.json")))
TABLES, ROLES = WORDS["drawings"], WORDS["roles"]


# {word for a set's style in captions: its npm package}
SETS = {"noto": "noto@1.2.9", "blob": "noto-v1@1.2.5", "shaded": "fluent-emoji@1.2.7",
        "flat": "fluent-emoji-flat@1.2.6", "twemoji": "twemoji@1.2.5", "firefox": "fxemoji@1.2.2"}
STYLES = [*SETS]
LARGEST = 2 ** 24       # bytes of a file in the zip, unpacked
WIDEST = 1024           # pixels of a picture in the zip; render makes 128


# ── Rendering ───────────────────────────────────────────────────────────────────────────────────

class Icons(NamedTuple):
    """A package's drawings as SVG, with their names reduced to letters and digits."""
    names: dict     # {squeezed name or alias: name}
    chars: dict     # {characters: name}
    bodies: dict    # {name: the SVG's inside}
    sizes: dict     # {name: (left, top, width, height)}


def squeeze(name):
    return re.sub("[^a-z0-9]", "", name.lower())


def read_icons(folder):
    """The drawings in an unpacked package of Iconify."""
    data = json.loads(read_text(folder / "icons.json", 2 ** 28))     # fluent's has 100 MB
    bodies = {name: icon["body"] for name, icon in data["icons"].items()}
    names = {squeeze(name): name for name in bodies}
    for alias, icon in data.get("aliases", {}).items():
        names.setdefault(squeeze(alias), icon["parent"])

    def size(icon):
        return tuple(icon.get(key, data.get(key, default)) for key, default in
                     (("left", 0), ("top", 0), ("width", 16), ("height", 16)))
    chars = json.loads(read_text(folder / "chars.json"))
    chars = {"".join(chr(int(c, 16)) for c in key.split("-")).replace("\ufe0f", ""): name
             for key, name in chars.items()}
    return Icons(names, chars, bodies, {name: size(i) for name, i in data["icons"].items()})


def install_sets(folder):
    """Install the npm packages of SETS in folder if necessary; return the path of each."""
    wanted = [f"@iconify-json/{package}" for package in SETS.values()]
    paths = [folder / "node_modules" / name.rpartition("@")[0] for name in wanted]
    if not all((path / "icons.json").exists() for path in paths):
        if not shutil.which("npm"):
            raise UserError("npm is missing: install it (Debian: apt install npm), or give --data "
                            "a zip that render made")
        folder.mkdir(parents=True, exist_ok=True)
        run = subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", folder,
                              *wanted], capture_output=True, text=True)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no reason given"])[0]
            raise UserError(f"npm could not install the drawings: {reason}")
    return paths


def emoji_names():
    """[(characters, [name, alias, ...])] of every emoji but skin tones and flags (PyPI emoji)."""
    import emoji
    left_out = {*range(0x1F3FB, 0x1F400), *range(0x1F1E6, 0x1F200), *range(0xE0020, 0xE0080)}

    def tidy(name):
        return re.sub("[“”]", "", name.strip(":").replace("_", " ").replace("’", "'")).lower()

    return [(text, [tidy(name) for name in (d["en"], *d.get("alias", []))])
            for text, d in emoji.EMOJI_DATA.items()
            if d["status"] == emoji.STATUS["fully_qualified"]
            and left_out.isdisjoint(map(ord, text))]


def find_drawing(icons, text, names, wanted=None):
    """The name of an emoji's drawing in a set: by its characters, or else by any of its names."""
    found = icons.chars.get(text.replace("\ufe0f", ""))
    names = names if wanted is None else [wanted]
    return found or next((icons.names[n] for n in map(squeeze, names) if n in icons.names), None)


def choose_things(icons, categories):
    """[(names, {style: drawing's name})] of the things that at least four sets have drawn."""
    added = {*TABLES["added"], *TABLES["persons"], *TABLES["hands"]}
    chosen = []
    for text, names in emoji_names():
        noto = icons["noto"].chars.get(text.replace("\ufe0f", ""))
        if categories.get(noto) not in TABLES["categories"] and names[0] not in added:
            continue
        if re.search(TABLES["left out"], names[0]):
            continue
        firefox = TABLES["in firefox"].get(names[0])
        drawn = {style: find_drawing(icons[style], text, [names[0], noto or "", *names[1:]],
                                     firefox if style == "firefox" else None)
                 for style in STYLES}
        drawn = {style: name for style, name in drawn.items() if name}
        if len(drawn) >= 4:
            chosen.append((names, drawn))
    return list(zip(say_names([names for names, _ in chosen]), [drawn for _, drawn in chosen]))


def say_names(all_names):
    """Each thing's names in everyday words: the main name, then aliases that no other thing has."""
    all_names = [[TABLES["said"].get(names[0], names[0]), *names] for names in all_names]
    all_names = [[*dict.fromkeys(names)] for names in all_names]
    unused = {names[0] for names in all_names}.union(TABLES["unused aliases"])
    owners = collections.Counter(name for names in all_names for name in names)

    def fit(name):
        return re.fullmatch("[a-zñ][a-zñ' -]+[a-zñ]", name) and owners[name] == 1 \
            and name not in unused
    return [[*dict.fromkeys([first, *filter(fit, others), *TABLES["also"].get(first, [])])]
            for first, *others in all_names]


def draw_icon(icons, name, side=128, margin=4):
    """Draw an icon as RGBA, cropped to its ink and scaled to fit within the margin."""
    import resvg_py
    left, top, width, height = icons.sizes[name]
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="{left} {top} {width} {height}">{icons.bodies[name]}</svg>')
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * side, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()
    if box is None:
        return None
    ink = picture.crop(box)
    scale = (side - 2 * margin) / max(ink.size)
    ink = ink.convert("RGBa").resize([max(1, round(n * scale)) for n in ink.size], Image.LANCZOS)
    canvas = Image.new("RGBa", (side, side))
    canvas.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return canvas.convert("RGBA")


def render(data, packages):
    """Write data, a zip of every thing in every style: 0000-noto.png and so on, and things.json.

    packages: the folder for the npm packages, which are installed there if missing. Return the name
    used: another if a file of this name appeared meanwhile."""
    folders = install_sets(packages)
    icons = {style: read_icons(folder) for style, folder in zip(SETS, folders)}
    categories = {name: category for category, names in
                  json.loads(read_text(folders[0] / "metadata.json"))["categories"].items()
                  for name in names}
    things = choose_things(icons, categories)
    data.parent.mkdir(parents=True, exist_ok=True)
    return save_new(data, functools.partial(write_zip, things, icons))


def write_zip(things, icons, file):
    """Draw the things, and write the zip to an open file."""
    with zipfile.ZipFile(file, "w") as archive:
        for i, (_, drawn) in enumerate(tqdm(things, "render")):
            for style, name in drawn.items():
                png = io.BytesIO()
                picture = draw_icon(icons[style], name)
                if picture:
                    picture.save(png, "PNG")
                    archive.writestr(f"{i:04}-{style}.png", png.getvalue())
        names = [names for names, _ in things]
        archive.writestr("things.json", json.dumps(names, ensure_ascii=False, indent=0))


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────

class Things:
    """The things to draw.

    names: [[name, alias, ...]] of each thing; or [[caption]] of each picture.
    drawings: (things, styles): the picture's index, -1 if the style has none; or None.
    pictures: {side: (n, side, side, 4) uint8}, premultiplied by opacity.
    """

    def __init__(self, names, drawings, pictures):
        self.names, self.drawings, self.pictures = names, drawings, pictures
        self.numbers = {options[0]: i for i, options in enumerate(names)}
        if drawings is not None:
            self.owners = {int(p): i for i, row in enumerate(drawings) for p in row if p >= 0}
            small = pictures[min(pictures)][..., 3]
            self.boxes = np.array([ink_box(alpha > 30) for alpha in small])

    @functools.cached_property
    def roles(self):
        """{role: the numbers of the things that may play it}, from words.json."""
        said = TABLES["said"]
        roles = ROLES | {"persons": [said.get(name, name) for name in TABLES["persons"]],
                         "faced": [name.removesuffix(" face") for name in self.numbers
                                   if name.endswith(" face")]}
        return {role: [self.numbers[name] for name in names if name in self.numbers]
                for role, names in roles.items()}


def ink_box(inked):
    """The bounding box (left, top, right, bottom) of true pixels, in fractions of the side."""
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    if not len(rows):
        return 0, 0, 1, 1
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / len(inked)


def load_things(data, size):
    """Read the rendered things, with pictures of size x size pixels and of half that size.

    data: a zip from render; weights/README.md describes its contents. UserError if it differs.
    """
    require(data.is_file(), f"there is no file {data}")     # a pipe might never deliver anything
    try:
        archive = zipfile.ZipFile(data)
        if any(member.file_size > LARGEST for member in archive.infolist()):
            raise ValueError(f"one of the files in it has more than {LARGEST:,} bytes")
        names = json.loads(archive.read("things.json"))
        check_names(names)
        files = sorted(name for name in archive.namelist() if name.endswith(".png"))
        drawings = np.full((len(names), len(STYLES)), -1)
        check_memory(5 * size ** 2 * len(files), f"a zip of {len(files):,} pictures", "take fewer")
        pictures = {side: np.empty((len(files), side, side, 4), np.uint8)
                    for side in (size, size // 2)}
        for i, file in enumerate(files):
            drawings[parse_name(file, len(names))] = i
            picture = Image.open(io.BytesIO(archive.read(file)), formats=["PNG"])
            if max(picture.size) > WIDEST:
                raise ValueError(f"{file} is wider or higher than {WIDEST} pixels")
            picture = picture.convert("RGBA").convert("RGBa")
            for side, array in pictures.items():
                array[i] = np.asarray(picture.resize((side, side), Image.BOX))
        for thing in np.flatnonzero((drawings < 0).all(1)):
            raise ValueError(f"{names[thing][0]} has no drawing, such as {thing:04}-noto.png")
    except Exception as error:      # zipfile, json and Pillow raise many kinds
        raise UserError(f"cannot read the rendered pictures in {data}: {error}") from None
    return Things(names, drawings, pictures)


def load_captioned(folder, size):
    """Read a folder's pictures, cropped to size x size pixels, as Things with captions as names.

    folder: a.png, a.txt, b.jpg, b.txt, ... UserError if it has other contents.
    """
    files = read_captioned(folder)
    require(len(files) > 1, f"{folder} has only one picture, which is too little to train on")
    check_memory(4 * size ** 2 * len(files), f"{folder}, with {len(files):,} pictures,",
                 "take fewer")
    pictures = np.full((len(files), size, size, 4), 255, np.uint8)
    for picture, (path, _) in zip(pictures, tqdm(files, "reading", leave=False)):
        picture[..., :3] = read_picture(path, size, size)
    return Things([[caption] for _, caption in files], None,
                  {size: pictures, size // 2: pictures[:, ::2, ::2]})


def check_names(names):
    """ValueError unless these are [[name, alias, ...], ...] of at least two things."""
    listed = isinstance(names, list) and len(names) > 1 and all(
        isinstance(options, list) and options for options in names)
    if not listed or not all(isinstance(name, str) and re.match(r"\w", name)
                             for options in names for name in options):
        raise ValueError("things.json is not [[name, alias, ...], ...] of at least two things")


def parse_name(file, n):
    """Parse a name like 0000-noto.png into the numbers (thing, style); n: the number of things."""
    match = re.fullmatch(r"(\d{1,9})-(\w+)\.png", file)
    if not match or int(match[1]) >= n or match[2] not in STYLES:
        raise ValueError(f"{file} is not named like 0000-noto.png: a number from 0000 to "
                         f"{n - 1:04}, a hyphen, and one of {', '.join(STYLES)}")
    return int(match[1]), STYLES.index(match[2])
