"""What the bundled model learns from: drawings in six styles, scenes of them, and captions.

    npm packages ── render ──► emoji.zip ── load_things ──► Things
    Things ── draw_scene ──► Scene, with its caption ── paint ──► picture

Nothing here needs torch.
"""

import collections
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from extras.files import read_captioned, read_picture, read_text, replace_atomically  # noqa: E402
from tiny_sd import UserError, require  # noqa: E402

# ── Rendering: six sets of drawings ─────────────────────────────────────────────────────────────

class DrawingSet(NamedTuple):
    """One set of drawings: the word that captions use for its style, and its npm package."""
    word: str
    package: str
    version: str


SETS = (DrawingSet("noto", "noto", "1.2.9"), DrawingSet("blob", "noto-v1", "1.2.5"),
        DrawingSet("shaded", "fluent-emoji", "1.2.7"),
        DrawingSet("flat", "fluent-emoji-flat", "1.2.6"),
        DrawingSet("twemoji", "twemoji", "1.2.5"), DrawingSet("firefox", "fxemoji", "1.2.2"))
STYLES = [drawing_set.word for drawing_set in SETS]

# Noto's categories that are used, whatever is added to them from others, and what is left out.
CATEGORIES = {"Activities", "Animals & Nature", "Food & Drink", "Objects", "Smileys & Emotion",
              "Travel & Places"}
ADDED = {"bone", "brain", "tooth", "anatomical heart", "lungs", "mechanical arm", "mechanical leg",
         "footprints", "eyes", "eye"}
UNUSED = {"shit", "hankey", "harambe", "hocho", "iphone", "flags", "lower left crayon",
          "lower left ballpoint pen", "lower left fountain pen", "lower left paintbrush"}
LEFT_OUT = r"o'clock|thirty|stop sign|identification card|placard|wedding|zzz|mantelpiece clock"

# Names that people say rather than Unicode's; Unicode's becomes an alias.
SAID = {"automobile": "car", "honeybee": "bee", "lady beetle": "ladybug", "game die": "dice",
        "beverage box": "juice box", "ear of corn": "corn", "hot beverage": "cup of coffee",
        "wrapped gift": "gift", "pile of poo": "poo", "billed cap": "cap", "gem stone": "gem",
        "one-piece swimsuit": "swimsuit", "locked": "padlock", "high voltage": "lightning bolt",
        "magnifying glass tilted left": "magnifying glass", "droplet": "drop of water",
        "cheese wedge": "cheese", "poultry leg": "chicken leg", "cooked rice": "bowl of rice",
        "steaming bowl": "bowl of noodles", "soft ice cream": "ice cream cone",
        "bottle with popping cork": "champagne bottle", "delivery truck": "truck",
        "passenger ship": "cruise ship", "flying saucer": "ufo", "couch and lamp": "couch",
        "straight ruler": "ruler", "thong sandal": "flip-flop", "kiwi fruit": "kiwi",
        "deciduous tree": "tree", "bouquet": "bouquet of flowers", "headphone": "headphones",
        "musical keyboard": "piano", "carpentry saw": "saw", "fuel pump": "gas pump",
        "performing arts": "theatre masks", "ring buoy": "lifebuoy", "ringed planet": "planet",
        "video game": "game controller", "flying disc": "frisbee", "mobile phone": "cell phone",
        "red paper lantern": "paper lantern", "sport utility vehicle": "suv"}

# What fxemoji calls things that the others call by Unicode's names; nothing where it shows another
# thing, or a part of one.
FIREFOX = {
    "cat": "catside", "cat face": "cat", "dog": "dogside", "dog face": "dog",
    "rabbit": "bunnyside", "rabbit face": "bunny", "mouse": "mouseside", "mouse face": "mouse",
    "pig": "pigside", "pig face": "pig", "tiger": "tigerside", "tiger face": "tiger",
    "dragon": "dragonside", "dragon face": "dragonhead", "leopard": "leopardside",
    "hamster": "hampster", "wolf": "wolfface", "camel": "dromedarycamel",
    "two-hump camel": "bactriancamel", "eggplant": "aubergine", "hot pepper": "chilipepper",
    "pool 8 ball": "billiards", "bullseye": "directhit", "crying face": "crying",
    "curry rice": "curryandrice", "flashlight": "electrictorch", "evergreen tree": "evergreen",
    "fallen leaf": "fallingleaf", "sparkler": "fireworksparkler", "pizza": "sliceofpizza",
    "fish cake with swirl": "fishcakeswirl", "racing car": "racecar", "pile of poo": "poo",
    "wrapped gift": "present", "house": "housebuilding", "hundred points": "hundredpointssymbol",
    "cloud with rain": "raincloud", "cloud with snow": "snowcloud", "tennis": "tennisball",
    "snow-capped mountain": "snowmountains", "skis": "skiandskiboot", "necktie": "tie",
    "speech balloon": "speechbubble", "thought balloon": "thoughtbaloon",
    "studio microphone": "studiomic", "videocassette": "videocasette", "pig nose": "pigsnout",
    "ear of corn": "earofmaize", "sake": "sakebottleandcup", "spouting whale": "spurtingwhale",
    "woman's sandal": "sandals", "high-heeled shoe": "heels", "man's shoe": "mensshoe",
    "woman's clothes": "womansshirt", "t-shirt": "mansshirt", "purse": "pinkwallet",
    "mobile phone": "cellphone", "laptop": "personalcomputer", "link": "linksymbol",
    "locked with key": "lockandkey", "unlocked": "openlock", "tokyo tower": "toykotower",
    "musical notes": "multiplemusicalnotes", "globe showing americas": "americasglobe",
    "globe showing asia-australia": "asiaaustraliaglobe",
    "globe showing europe-africa": "europeafricaglobe",
    "globe with meridians": "meridianglobe", "see-no-evil monkey": "monkeysee",
    "hear-no-evil monkey": "monkeyhear", "speak-no-evil monkey": "monkeyspeak",
    "green heart": "heartgreen", "purple heart": "heartpurple", "yellow heart": "heartyellow",
    "two hearts": "2hearts", "heart with arrow": "heartarrow", "heart with ribbon": "heartribbon",
    "loudly crying face": "loudlycrying", "face with medical mask": "medicalmask",
    "winking face": "winking", "leaf fluttering in wind": "leaffluttering",
    "front-facing baby chick": "frontfacingchick", "chart decreasing": "chartdownwardstrend",
    "chart increasing": "chartupwardstrend", "chart increasing with yen": "chartupwardstrendyen",
    "dollar banknote": "banknotedollar", "euro banknote": "banknoteeuro",
    "pound banknote": "banknotepound", "yen banknote": "banknoteyen",
    "bell with slash": "bellcancellation", "muted speaker": "speakercancellation",
    "speaker high volume": "speaker3soundwaves", "joker": "playingcardblackjoker",
    "police car light": "policecarsrevolvinglight", "scissors": "blackscissors",
    "skull and crossbones": "blackskullcrossbones", "telephone": "blacktelephone",
    "sport utility vehicle": "recreationalvehicle", "keyboard": "wiredkeyboard",
    "sunglasses": "darksunglasses", "enraged face": "", "blue heart": "", "tram car": ""}


class Icons(NamedTuple):
    """A package's drawings: what each is called, squeezed to letters and digits, and as SVG."""
    names: dict     # {squeezed name or alias: name}
    chars: dict     # {characters: name}
    bodies: dict    # {name: the SVG's inside}
    sizes: dict     # {name: (left, top, width, height)}


def squeeze(name):
    return re.sub("[^a-z0-9]", "", name.lower())


def read_icons(folder):
    """The drawings in an unpacked package of Iconify."""
    data = json.loads(read_text(folder / "icons.json"))
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
    """Put the npm packages of SETS into folder, unless they are there; return where each is."""
    paths = [folder / "node_modules/@iconify-json" / s.package for s in SETS]
    wanted = [f"@iconify-json/{s.package}@{s.version}" for s in SETS]
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
    """[(names, {style: drawing's name})] of the things that four sets or more have drawn."""
    chosen = []
    for text, names in emoji_names():
        noto = icons["noto"].chars.get(text.replace("\ufe0f", ""))
        if categories.get(noto) not in CATEGORIES and names[0] not in ADDED:
            continue
        if re.search(LEFT_OUT, names[0]):
            continue
        drawn = {style: find_drawing(icons[style], text, [names[0], noto or "", *names[1:]],
                                     FIREFOX.get(names[0]) if style == "firefox" else None)
                 for style in STYLES}
        drawn = {style: name for style, name in drawn.items() if name}
        if len(drawn) >= 4:
            chosen.append((names, drawn))
    return list(zip(say_names([names for names, _ in chosen]), [drawn for _, drawn in chosen]))


def say_names(all_names):
    """Each thing's names as people say them: the first, then the aliases that are its alone."""
    all_names = [[SAID.get(names[0], names[0]), *names] for names in all_names]
    all_names = [[*dict.fromkeys(names)] for names in all_names]
    firsts = {names[0] for names in all_names}
    owners = collections.Counter(name for names in all_names for name in names)

    def fit(name):
        return re.fullmatch("[a-zñ][a-zñ' -]+[a-zñ]", name) and owners[name] == 1 \
            and name not in firsts | UNUSED
    return [[names[0], *filter(fit, names[1:])] for names in all_names]


def draw_icon(icons, name, side=128, margin=4):
    """The drawing, RGBA, cut to its ink and scaled so that its longer side leaves the margin."""
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

    packages: the folder for the npm packages, which are installed there if they are missing."""
    folders = install_sets(packages)
    icons = {s.word: read_icons(folder) for s, folder in zip(SETS, folders)}
    categories = {name: category for category, names in
                  json.loads(read_text(folders[0] / "metadata.json"))["categories"].items()
                  for name in names}
    things = choose_things(icons, categories)
    with replace_atomically(data) as path, zipfile.ZipFile(path, "w") as archive:
        for i, (_, drawn) in enumerate(tqdm(things, "render")):
            for style, name in drawn.items():
                png = io.BytesIO()
                picture = draw_icon(icons[style], name)
                if picture:
                    picture.save(png, "PNG")
                    archive.writestr(f"{i:04}-{style}.png", png.getvalue())
        names = [names for names, _ in things]
        archive.writestr("things.json", json.dumps(names, ensure_ascii=False, indent=0))


class Things(NamedTuple):
    """What there is to draw."""
    names: list         # [[name, alias, ...]] of each thing; or [[caption]] of each picture
    drawings: np.ndarray    # (things, styles): which picture, or -1 where a style has none; or None
    pictures: dict      # {side: (n, side, side, 4) uint8}, colours multiplied by opacity


def load_things(data, size):
    """The rendered things, their pictures at size x size pixels and at half of that.

    data: a zip as render writes it; README.md says what must be in it. UserError if it is not.
    """
    try:
        archive = zipfile.ZipFile(data)
        names = json.loads(archive.read("things.json"))
        check_names(names)
        files = sorted(name for name in archive.namelist() if name.endswith(".png"))
        drawings = np.full((len(names), len(STYLES)), -1)
        pictures = {side: np.empty((len(files), side, side, 4), np.uint8)
                    for side in (size, size // 2)}
        for i, file in enumerate(files):
            drawings[parse_name(file, len(names))] = i
            picture = Image.open(io.BytesIO(archive.read(file))).convert("RGBA").convert("RGBa")
            for side, array in pictures.items():
                array[i] = np.asarray(picture.resize((side, side), Image.BOX))
        for thing in np.flatnonzero((drawings < 0).all(1)):
            raise ValueError(f"{names[thing][0]} has no drawing, such as {thing:04}-noto.png")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, RecursionError,
            Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the rendered pictures in {data}: {error}") from None
    return Things(names, drawings, pictures)


def load_captioned(folder, size):
    """A folder's pictures, cropped to size x size pixels, as Things that have captions for names.

    folder: a.png, a.txt, b.jpg, b.txt, ... UserError if that is not what is in it.
    """
    files = read_captioned(folder)
    require(len(files) > 1, f"{folder} has one picture, which is too little to train on")
    pictures = np.full((len(files), size, size, 4), 255, np.uint8)
    for picture, (path, _) in zip(pictures, tqdm(files, "reading", leave=False)):
        picture[..., :3] = read_picture(path, size, size)
    return Things([[caption] for _, caption in files], None,
                  {size: pictures, size // 2: pictures[:, ::2, ::2]})


def check_names(names):
    """ValueError unless these are [[name, alias, ...], ...] of two things or more."""
    listed = isinstance(names, list) and len(names) > 1 and all(
        isinstance(options, list) and options for options in names)
    if not listed or not all(isinstance(name, str) and re.match(r"\w", name)
                             for options in names for name in options):
        raise ValueError("things.json is not [[name, alias, ...], ...] of two things or more")


def parse_name(file, n):
    """(thing, style) as numbers, of a file like 0000-noto.png; n: how many things there are."""
    match = re.fullmatch(r"(\d{1,9})-(\w+)\.png", file)
    if not match or int(match[1]) >= n or match[2] not in STYLES:
        raise ValueError(f"{file} is not named like 0000-noto.png: a number from 0000 to "
                         f"{n - 1:04}, a hyphen, and one of {', '.join(STYLES)}")
    return int(match[1]), STYLES.index(match[2])


# ── Captions ────────────────────────────────────────────────────────────────────────────────────

COLOURS = {"white": (255, 255, 255), "black": (20, 20, 20), "gray": (150, 150, 150),
           "red": (225, 50, 50), "orange": (250, 150, 40), "yellow": (250, 220, 70),
           "green": (50, 160, 70), "light green": (160, 225, 150), "blue": (50, 100, 220),
           "light blue": (160, 205, 250), "dark blue": (30, 40, 110), "purple": (140, 70, 190),
           "pink": (250, 175, 205), "brown": (130, 85, 55), "beige": (240, 225, 195),
           "turquoise": (60, 200, 195)}
# x and y, as fractions of the room that is left
PLACES = {"in the top left corner": (0, 0), "in the top right corner": (1, 0),
          "in the bottom left corner": (0, 1), "in the bottom right corner": (1, 1),
          "on the left": (0, .5), "on the right": (1, .5), "at the top": (.5, 0),
          "at the bottom": (.5, 1), "": (.5, .5)}
PAIRS = {"and": ((0, .5), (1, .5)), "next to": ((0, .5), (1, .5)), "above": ((.5, 0), (.5, 1)),
         "below": ((.5, 1), (.5, 0))}


def share(*words):
    """A number in [0, 1) that is always the same for the same words."""
    return zlib.crc32("|".join(words).encode()) / 2 ** 32


def held_out_style(name, style):
    """Whether training never shows this thing's drawing in this style."""
    return share("style", name, style) < 1 / 10


def held_out_background(name, colour):
    """Whether training never shows this thing on this background."""
    return colour != "white" and share("background", name, colour) < 1 / 8


def held_out_pair(one, other):
    """Whether training never shows these two things together."""
    return share("pair", *sorted((one, other))) < 1 / 10


def article(name):
    """The name as one says it: a cat, an apple, cherries."""
    last = name.split(" with ")[0].split(" of ")[0].split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is", "'s"))
    if name[0] in "0123456789" or plural or name.split()[0] in ("women", "men", "people"):
        return name
    vowel = re.match(r"(?!uni|use|uk|ufo|eu|one|ewe)[aeiou]|hour|honest|x-|suv|mp", name)
    return f"{'an' if vowel else 'a'} {name}"


def in_style(text, style):
    """The text, with its style where it has one."""
    return f"{text} in the {style} style".strip() if style else text


def describe(text, place="", colour="white", small=False):
    """The full caption of one thing: text is its name with or without article and style."""
    if small:
        text = re.sub(r"^(an? )?", lambda m: "a small " if m[1] else "small ", text, count=1)
    return on_background(f"{text} {place}" if place else text, colour)


def on_background(text, colour):
    return text if colour == "white" else f"{text} on {article(colour)} background"


# ── Scenes ──────────────────────────────────────────────────────────────────────────────────────

class Part(NamedTuple):
    """A drawing in a scene: which picture, its side in halves of the scene's, and where."""
    picture: int
    halves: int
    x: float
    y: float


class Scene(NamedTuple):
    """A picture to be."""
    parts: list
    colour: tuple
    caption: str


KINDS = {"plain": 0.36, "colour": 0.30, "placed": 0.12, "pair": 0.22}
STYLED = 0.6        # how often a caption names its drawing's style,
STYLE_ALONE = 0.15  # and how often such a caption names nothing else


def draw_scene(things, rng):
    """A random scene that training may show."""
    if things.drawings is None:
        return captioned_scene(things, int(rng.integers(len(things.names))))
    kind = rng.choice([*KINDS], p=[*KINDS.values()])
    plain = kind == "plain" or kind != "colour" and rng.random() < 0.5
    colour = "white" if plain else str(rng.choice([*COLOURS][1:]))
    draw = draw_pair if kind == "pair" else draw_single
    return draw(things, rng, colour, kind) or draw_scene(things, rng)


def captioned_scene(things, i):
    """A picture that comes with its caption."""
    return Scene([Part(i, 2, .5, .5)], COLOURS["white"], things.names[i][0])


def every_scene(things):
    """Each drawing on white, named with its style; or each picture that comes with its caption."""
    if things.drawings is None:
        return [captioned_scene(things, i) for i in range(len(things.names))]
    return [Scene([Part(int(picture), 2, .5, .5)], COLOURS["white"], in_style(names[0], style))
            for names, row in zip(things.names, things.drawings)
            for style, picture in zip(STYLES, row) if picture >= 0]


def draw_single(things, rng, colour, kind):
    """One thing, or None where it is held out on this background."""
    thing = int(rng.integers(len(things.names)))
    if held_out_background(things.names[thing][0], colour):
        return None
    style = draw_style(things, rng, thing)
    text = say(things.names[thing], rng)
    if rng.random() < STYLED:
        alone = kind != "placed" and rng.random() < STYLE_ALONE
        text = in_style("" if alone else text, STYLES[style])
    picture = int(things.drawings[thing, style])
    if kind != "placed":
        return Scene([Part(picture, 2, .5, .5)], COLOURS[colour], describe(text, "", colour))
    place = str(rng.choice([*PLACES]))
    small = place == "" or rng.random() < 0.3
    return Scene([Part(picture, 1, *PLACES[place])], COLOURS[colour],
                 describe(text, place, colour, small))


def draw_pair(things, rng, colour, kind):
    """Two things, or None where they are held out, or lack a common style."""
    one, other = rng.choice(len(things.names), 2, replace=False).tolist()
    names = [things.names[i] for i in (one, other)]
    if held_out_pair(names[0][0], names[1][0]):
        return None
    if any(held_out_background(options[0], colour) for options in names):
        return None
    how = str(rng.choice([*PAIRS]))
    said = [say(options, rng) for options in names]
    if rng.random() < 0.4:      # both in one style, named once at the end
        common = [s for s in styles_to_train(things, one) if s in styles_to_train(things, other)]
        if not common:
            return None
        styles = [int(rng.choice(common))] * 2
        text = in_style(f"{said[0]} {how} {said[1]}", STYLES[styles[0]])
    else:
        styles = [draw_style(things, rng, thing) for thing in (one, other)]
        named = [STYLES[style] if rng.random() < STYLED else "" for style in styles]
        colour = "white" if all(named) else colour      # or the caption could be too long
        text = f" {how} ".join(in_style(name, style) for name, style in zip(said, named))
    parts = [Part(int(things.drawings[thing, style]), 1, *place)
             for thing, style, place in zip((one, other), styles, PAIRS[how])]
    return Scene(parts, COLOURS[colour], on_background(text, colour))


def styles_to_train(things, thing):
    """The styles in which training may show a thing: all, where each of them is held out."""
    drawn = np.flatnonzero(things.drawings[thing] >= 0).tolist()
    name = things.names[thing][0]
    return [s for s in drawn if not held_out_style(name, STYLES[s])] or drawn


def draw_style(things, rng, thing):
    """One of the styles in which training may show a thing."""
    return int(rng.choice(styles_to_train(things, thing)))


def say(names, rng):
    """One of a thing's names, mostly the first, half of the time with its article."""
    first = len(names) == 1 or rng.random() < 0.75
    name = names[0] if first else names[rng.integers(1, len(names))]
    return name if rng.random() < 0.5 else article(name)


def paint(scene, things):
    """The scene as a picture (size, size, 3) uint8."""
    half = min(things.pictures)
    canvas = np.broadcast_to(np.uint8(scene.colour), (2 * half, 2 * half, 3)).copy()
    for part in scene.parts:
        side = part.halves * half
        left, top = (round(place * (2 * half - side)) for place in (part.x, part.y))
        view = canvas[top:top + side, left:left + side]
        drawing = things.pictures[side][part.picture].astype(np.uint16)
        view[:] = drawing[..., :3] + (view * (255 - drawing[..., 3:]) + 127) // 255
    return canvas
