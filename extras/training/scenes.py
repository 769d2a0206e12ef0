"""What the bundled model learns from: scenes of drawings, and their captions.

    Things ── draw_scene ──► Scene, with its caption ── paint ──► picture

A scene has a subject (one thing, several of it, or two in a relation), perhaps colours and a size,
somewhere where it is, and perhaps a medium. words.json has the words. Nothing here needs torch.
"""

import re
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from extras.training.drawings import STYLES, WORDS
from extras.training.painting import (
    FLOATING,
    MEDIA,
    SURROUNDINGS,
    VARIANTS,
    repaint,
    surroundings,
)

COLOURS, TINTS = ({name: tuple(rgb) for name, rgb in WORDS["colours"][kind].items()}
                  for kind in ("backgrounds", "tints"))
SAID = WORDS["captions"]
# x and y, as fractions of the room that is left
PLACES = {"in the top left corner": (0, 0), "in the top right corner": (1, 0),
          "in the bottom left corner": (0, 1), "in the bottom right corner": (1, 1),
          "on the left": (0, .5), "on the right": (1, .5), "at the top": (.5, 0),
          "at the bottom": (.5, 1)}
PAIRS = {"and": ((0, .5), (1, .5)), "next to": ((0, .5), (1, .5)), "above": ((.5, 0), (.5, 1)),
         "below": ((.5, 1), (.5, 0))}

# ── What is held out ────────────────────────────────────────────────────────────────────────────

def share(*words):
    """A number in [0, 1) that is always the same for the same words."""
    return zlib.crc32("|".join(words).encode()) / 2 ** 32


def held_out(kind, *words):
    """Whether training never shows this: ("style", name, style), ("pair", *sorted names),
    ("background", name, colour), ("tint", name, colour), ("medium", name, medium),
    ("scene", name, surroundings), ("count", name, "3"), ("relation", name, relation, name)."""
    return share(kind, *words) < (1 / 10 if kind in ("style", "pair") else 1 / 8)


# ── Grammar ─────────────────────────────────────────────────────────────────────────────────────

def plural(name):
    """Whether a name is one already."""
    last = name.split(" with ")[0].split(" of ")[0].split()[-1]
    return last.endswith("s") and not last.endswith(("ss", "us", "is", "'s")) \
        or name.split()[0] in ("women", "men", "people")


def article(name):
    """The name as one says it: a cat, an apple, cherries."""
    if name[0] in "0123456789" or plural(name):
        return name
    vowel = re.match(r"(?!uni|use|uk|ufo|eu|one|ewe)[aeiou]|hour|honest|x-|suv|mp", name)
    return f"{'an' if vowel else 'a'} {name}"


def many(name):
    """The plural of a name."""
    if plural(name):
        return name
    head, of, rest = re.fullmatch(r"(.*?)((?: with| of| in| on|$))(.*)", name).groups()
    *before, last = head.split()
    if last in SAID["irregular plurals"]:
        last = SAID["irregular plurals"][last]
    elif re.search("[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "es" if re.search("(s|x|ch|sh|[^aeiouo]o)$", last) and last != "piano" else "s"
    return " ".join([*before, last]) + of + rest


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


def say(names, rng):
    """One of a thing's names, mostly the first."""
    first = len(names) == 1 or rng.random() < 0.6
    return names[0] if first else names[rng.integers(1, len(names))]


def pick(rng, options):
    return options[int(rng.integers(len(options)))]


def named(name, rng, size="", tint=""):
    """A thing as somebody would call it: "a big blue cat", "blue cat", "a cat, blue"."""
    size = pick(rng, SAID["sizes"][size]) if size else ""
    if tint == "golden" and rng.random() < 0.3:
        tint = "gold"
    if tint == "gray" and rng.random() < 0.3:
        tint = "grey"
    if tint and rng.random() < 0.06:
        return f"{article(f'{size} {name}'.strip())}, {tint}"
    words = " ".join(filter(None, (size, tint, name)))
    return article(words) if rng.random() < 0.6 else words


# ── Scenes ──────────────────────────────────────────────────────────────────────────────────────

class Part(NamedTuple):
    """A drawing in a scene: which, its side and its corner in sides of the scene, and its tint."""
    picture: int
    side: float
    left: float
    top: float
    tint: str = ""


class Scene(NamedTuple):
    """A picture to be. ground: a colour (red, green, blue), or the name of surroundings."""
    parts: list
    ground: object
    caption: str
    medium: str = ""
    seed: int = 0


class Subject(NamedTuple):
    """What a scene shows: the numbers of its things, and how many of it or their relation."""
    ids: tuple
    count: int = 1
    relation: str = ""


class Manner(NamedTuple):
    """How a scene shows its subject."""
    tints: tuple = ("",)        # of each thing
    size: str = ""
    surroundings: str = ""
    colour: str = "white"       # of the background
    place: str = ""
    medium: str = ""


# How often training shows each of a kind. What stands at 0 can be painted, but is not taught yet.
RELATIONS = {"and": 10, "next to": 4, "above": 3, "below": 3, "on": 8, "riding": 9, "wearing": 9,
             "between": 0, "under": 0, "in front of": 0, "behind": 0, "holding": 0, "inside": 0}
COUNTS = {2: 4, 3: 4, 4: 3, 5: 0, 6: 0}
MEDIA_SHARES = dict.fromkeys(MEDIA, 0) | {
    "sketch": 6, "blueprint": 5, "neon": 5, "pixel art": 6, "black and white": 5, "silhouette": 5,
    "watercolor": 6}
SURROUNDINGS_SHARES = dict.fromkeys(SURROUNDINGS, 1) | dict.fromkeys(
    ("at night", "at sunset", "on the beach", "in the snow", "under water", "in space",
     "in the forest"), 2)
GREY_MEDIA = {"sketch", "blueprint", "black and white", "silhouette", "wood", "stone", "ice",
              "old photo", "woodcut"}       # in which no tint can be seen,
GROUNDED_MEDIA = {"sketch", "blueprint", "neon", "woodcut", "sticker", "old photo"}     # no ground


def draw_scene(things, rng, shown=True):
    """A random scene that training may show, or else one that it never shows."""
    if things.drawings is None:
        return captioned_scene(things, int(rng.integers(len(things.names))))
    while True:
        subject = draw_subject(things, rng)
        manner = draw_manner(rng, subject)
        if may_show(things, subject, manner) == shown:
            return compose(things, rng, subject, manner)


def captioned_scene(things, i):
    """A picture that comes with its caption."""
    return Scene([Part(i, 1, 0, 0)], COLOURS["white"], things.names[i][0])


def every_scene(things):
    """Each drawing on white, named with its style; or each picture that comes with its caption."""
    if things.drawings is None:
        return [captioned_scene(things, i) for i in range(len(things.names))]
    return [Scene([Part(int(picture), 1, 0, 0)], COLOURS["white"], in_style(names[0], style))
            for names, row in zip(things.names, things.drawings)
            for style, picture in zip(STYLES, row) if picture >= 0]


def weighted(rng, shares):
    """One of a mapping's keys, as often as its values say."""
    sums = np.cumsum([*shares.values()])
    return [*shares][int(np.searchsorted(sums, rng.random() * sums[-1], "right"))]


def taught(shares):
    """Those that training shows at all."""
    return [name for name, share in shares.items() if share]


def choose(things, rng, role=None):
    """The number of a random thing, of those that may play this role, if any are there."""
    if role is None:
        role = weighted(rng, {"": .42, "common": .44, "persons": .14})
    found = things.roles[role] if role else []
    return int(pick(rng, found or range(len(things.names))))


def draw_subject(things, rng):
    """A random Subject: three in five are one thing alone."""
    kind = rng.random()
    if kind < 0.6:
        return Subject((choose(things, rng),))
    if kind < 0.76:
        return Subject((choose(things, rng),), weighted(rng, COUNTS))
    relation = weighted(rng, RELATIONS)
    return Subject(participants(things, rng, relation), relation=relation)


def participants(things, rng, relation):
    """The numbers of things that could be so related."""
    one, role = choose(things, rng), None
    if relation == "wearing":
        one = choose(things, rng, pick(rng, ("faced", "frontal", "persons")))
        role = "hats" if rng.random() < 0.65 else "glasses"
    if relation in ("riding", "holding") and rng.random() < 0.75:
        one = choose(things, rng, "persons" if rng.random() < 0.6 else "animals")
    if rng.random() < 0.65:
        role = {"riding": "rides", "inside": "containers", "on": "seats"}.get(relation, role)
    third = [choose(things, rng)] if relation == "between" else []
    return (one, choose(things, rng, role), *third)


def draw_manner(rng, subject):
    """A random Manner for a subject."""
    alone = len(subject.ids) == subject.count == 1
    where = weighted(rng, {"": .5, "colour": .1, "surroundings": .36, "place": .04} if alone else
                     {"": .76, "colour": .1, "surroundings": .14})
    tints = tuple(pick(rng, [*TINTS]) if rng.random() < .34 else "" for _ in subject.ids)
    medium = weighted(rng, MEDIA_SHARES) if rng.random() < (.1 if where else .3) else ""
    if medium in GREY_MEDIA:
        tints = ("",) * len(tints)
    if where == "colour" and medium in GROUNDED_MEDIA:
        medium = ""
    sized = alone and where != "place" and rng.random() < 0.12
    return Manner(tints, pick(rng, [*SAID["sizes"]]) if sized else "",
                  weighted(rng, SURROUNDINGS_SHARES) if where == "surroundings" else "",
                  pick(rng, [*COLOURS][1:]) if where == "colour" else "white",
                  pick(rng, [*PLACES]) if where == "place" else "", medium)


def may_show(things, subject, manner):
    """Whether it makes sense, and nothing in it is held out."""
    names = [things.names[i][0] for i in subject.ids]
    if len({*names}) < len(names) or any(
            held_out("pair", *sorted((names[0], other))) for other in names[1:]) \
            or subject.relation and held_out("relation", names[0], subject.relation, names[1]):
        return False
    if subject.count > 1 and (plural(names[0]) or names[0][0].isdigit()
                              or held_out("count", names[0], str(subject.count))):
        return False
    for name, tint in zip(names, manner.tints):
        if tint and (name.split()[0] in (*COLOURS, *TINTS) or held_out("tint", name, tint)) \
                or manner.colour != "white" and held_out("background", name, manner.colour) \
                or manner.medium and held_out("medium", name, manner.medium) \
                or manner.surroundings and held_out("scene", name, manner.surroundings):
            return False
    return True


# ── Composition ─────────────────────────────────────────────────────────────────────────────────

def compose(things, rng, subject, manner):
    """A Scene of this subject in this manner, and its caption."""
    style, pictures = draw_pictures(things, rng, subject)
    if subject.relation:
        parts = arrange(things, rng, subject.relation, pictures, manner.tints)
    else:
        parts = spread_out(rng, pictures, manner)
    if manner.surroundings:
        parts = moved_into(things, rng, parts, manner)
    plain = manner == Manner(colour=manner.colour, place=manner.place)
    style = style if len(pictures) == 1 and plain and rng.random() < 0.33 else ""
    return Scene(parts, manner.surroundings or COLOURS[manner.colour],
                 caption_of(things, rng, subject, manner, style), manner.medium,
                 int(rng.integers(2 ** 31)))


def draw_pictures(things, rng, subject):
    """(the style of the first, the numbers of the drawings to show)."""
    pictures, mixed = [], subject.count == 1 or rng.random() < 0.3
    for k, thing in enumerate(subject.ids * subject.count):
        if subject.relation == "wearing" and k == 0:        # a head that is seen from before
            thing = things.numbers.get(f"{things.names[thing][0]} face", thing)
        if k == 0 or mixed:
            style = pick(rng, styles_to_train(things, thing))
        pictures.append(int(things.drawings[thing, style]))
    return STYLES[style], pictures


def styles_to_train(things, thing):
    """The styles in which training may show a thing: all, where each of them is held out."""
    drawn = np.flatnonzero(things.drawings[thing] >= 0).tolist()
    name = things.names[thing][0]
    return [s for s in drawn if not held_out("style", name, STYLES[s])] or drawn


# Where so many things stand, in the room that is left, and how large each is.
GRIDS = {2: [(.5, [(0, .5), (1, .5)])],
         3: [(.5, [(.5, 0), (0, 1), (1, 1)])],
         4: [(.5, [(0, 0), (1, 0), (0, 1), (1, 1)])],
         5: [(.36, [(0, .05), (.5, .05), (1, .05), (.25, .95), (.75, .95)]),
             (.36, [(0, .05), (1, .05), (.5, .5), (0, .95), (1, .95)])],
         6: [(.36, [(0, .05), (.5, .05), (1, .05), (0, .95), (.5, .95), (1, .95)])]}


def spread_out(rng, pictures, manner):
    """The Parts of one drawing, or of several on a loose grid."""
    tint, = manner.tints
    if len(pictures) > 1:
        side, places = pick(rng, GRIDS[len(pictures)])
        jitter = rng.uniform(-0.03, 0.03, (len(pictures), 2))
        return [Part(picture, side, x * (1 - side) + dx, y * (1 - side) + dy, tint)
                for picture, (x, y), (dx, dy) in zip(pictures, places, jitter)]
    side = {"small": rng.uniform(0.3, 0.42), "huge": 1.3}.get(manner.size, 1)
    x, y = PLACES.get(manner.place, (.5, .5))
    side = 1 if manner.surroundings else 0.5 if manner.place else side
    return [Part(pictures[0], side, x * (1 - side), y * (1 - side), tint)]


def moved_into(things, rng, parts, manner):
    """The Parts as they stand in their surroundings, with their feet on the ground.

    They are nearly as large as by themselves, so that what the network knows of them still holds.
    """
    size = {"small": 0.75, "": 1, "big": 1.15, "huge": 1.4}[manner.size] * rng.uniform(0.88, 1)
    foot = max(part.top + part.side * things.boxes[part.picture][3] for part in parts)
    left, top = 0.5 - size / 2 + rng.uniform(-0.02, 0.02), rng.uniform(0.94, 0.98) - size * foot
    if manner.surroundings in FLOATING:
        top = 0.5 - size / 2 + rng.uniform(-0.02, 0.02)
    return [part._replace(side=size * part.side, left=left + size * part.left,
                          top=top + size * part.top) for part in parts]


def standing(things, picture, side, middle, foot, tint=""):
    """The Part whose ink stands at this height, around this middle."""
    left, _, right, bottom = things.boxes[picture]
    return Part(picture, side, middle - side * (left + right) / 2, foot - side * bottom, tint)


def ink(things, part):
    """(left, top, right, bottom) of a part's ink, in sides of the scene."""
    left, top, right, bottom = things.boxes[part.picture] * part.side
    return part.left + left, part.top + top, part.left + right, part.top + bottom


def arrange(things, rng, relation, pictures, tints):
    """The Parts, from the hindmost on, of drawings that are so related."""
    (a, tint_a), (b, tint_b), *_ = both = [*zip(pictures, tints)]
    if relation in PAIRS:
        return [Part(picture, 0.5, x / 2, y / 2, tint)
                for (picture, tint), (x, y) in zip(both, PAIRS[relation])]
    if relation == "between":
        return [Part(picture, 0.34, x, 0.33, tint)
                for (picture, tint), x in zip(both, (.33, 0, .66))]
    if relation == "wearing":
        return dressed(things, a, b, tint_a, tint_b)
    if relation == "holding":
        holder = standing(things, a, 0.82, 0.42, 0.97, tint_a)
        _, top, right, bottom = ink(things, holder)
        hand = top + 0.62 * (bottom - top)
        return [holder, Part(b, 0.38, min(right - 0.1, 0.62), hand - 0.19, tint_b)]
    if relation in ("in front of", "behind"):
        near, far = both if relation == "in front of" else both[::-1]
        middle = 0.5 + pick(rng, (-1, 1)) * rng.uniform(0.08, 0.2)
        return [standing(things, far[0], 0.82, 0.5, 0.88, far[1]),
                standing(things, near[0], 0.46, middle, 0.98, near[1])]
    upper, lower = (both[1], both[0]) if relation == "under" else both
    return stacked(things, rng, relation, upper, lower)


def stacked(things, rng, relation, upper, lower):
    """Two Parts, the upper one's foot sunk so far into the lower one."""
    sink = {"on": 0.12, "under": 0.08, "riding": 0.42, "inside": 0.45}[relation]
    sides = {"on": (.56, .85), "riding": (.56, .88), "under": (.85, .56), "inside": (.52, .66)}[
        relation]
    high, low = (side * (things.boxes[picture][3] - things.boxes[picture][1])
                 for side, (picture, _) in zip(sides, (upper, lower)))
    fit = min(1, 0.94 / (high + low * (1 - sink)))      # so that both are in the picture
    foot = 0.97 - fit * low * (1 - sink)
    above = standing(things, upper[0], fit * sides[0], 0.5 + rng.uniform(-0.04, 0.04), foot,
                     upper[1])
    below = standing(things, lower[0], fit * sides[1], 0.5, 0.97, lower[1])
    return [above, below] if relation in ("riding", "inside") else [below, above]


def dressed(things, a, b, tint_a, tint_b):
    """A head or a person, and what is worn on it: hats on top, glasses where eyes are."""
    wearer = standing(things, a, 0.82, 0.5, 0.99, tint_a)
    left, top, right, bottom = ink(things, wearer)
    worn_left, worn_top, worn_right, worn_bottom = things.boxes[b]
    side = min(right - left, bottom - top) * 0.64 / (worn_right - worn_left)
    if things.owners[b] not in things.roles["glasses"]:
        return [wearer, standing(things, b, side, 0.5, top + 0.12 * (bottom - top), tint_b)]
    person = things.owners[a] in things.roles["persons"]
    eyes = top + (0.36 if person else 0.42) * (bottom - top)
    return [wearer, Part(b, side, 0.5 - side * (worn_left + worn_right) / 2,
                         eyes - side * (worn_top + worn_bottom) / 2, tint_b)]


# ── Captions ────────────────────────────────────────────────────────────────────────────────────

def caption_of(things, rng, subject, manner, style=""):
    """The whole caption; one in sixteen that have one word beside the things is that word alone."""
    alone = [*filter(None, (*manner.tints, manner.medium, manner.surroundings, style))]
    if len(alone) == 1 and rng.random() < 0.06:
        return in_style("", style) if style else alone[0]
    text = in_style(name_subject(things, rng, subject, manner), style)
    text = f"{text} {manner.place}".strip()
    if manner.surroundings:
        said = pick(rng, SAID["surroundings"][manner.surroundings])
        text = weighted(rng, {f"{text} {said}": 75, f"{text}, {said}": 15, f"{said}, {text}": 10})
    if manner.colour != "white":
        text = on_background(text, manner.colour) if rng.random() < 0.8 \
            else f"{text}, {manner.colour} background"
    frame = "{}"
    if manner.medium:
        frame = pick(rng, SAID["media"][manner.medium])
    elif rng.random() < 0.06:
        frame = pick(rng, SAID["leads"])
    if re.search(r"(neon|art|wooden|down|book|cute) \{\}$", frame):
        text = re.sub("^(an?) ", "", text)
    text = frame.format(text)
    if rng.random() < 0.08:         # words that mean nothing
        extra = [pick(rng, SAID["adornments"]) for _ in range(1 + (rng.random() < 0.4))]
        text = ", ".join([text, *extra] if rng.random() < 0.8 else [*extra, text])
    return text


def name_subject(things, rng, subject, manner):
    """ "three red apples", "a blue cat and dog", ..."""
    names = [say(things.names[i], rng) for i in subject.ids]
    if subject.count > 1:
        words = pick(rng, SAID["counts"][str(subject.count)]), manner.tints[0], many(names[0])
        return " ".join(filter(None, words))
    if subject.relation == "wearing" and subject.ids[1] in things.roles["hats"] \
            and rng.random() < 0.3:
        names[1] = "hat"
    one, *others = (named(name, rng, manner.size, tint)
                    for name, tint in zip(names, manner.tints))
    if not others:
        return one
    how = pick(rng, SAID["relations"][subject.relation])
    others = " and ".join(others)
    return f"{one}, {others}" if how == "," else f"{one} {how} {others}"


# ── Painting ────────────────────────────────────────────────────────────────────────────────────

def paint(scene, things, side=None):
    """The scene as a picture (side, side, 3) uint8."""
    side = side or max(things.pictures)
    place = scene.ground if isinstance(scene.ground, str) else None
    if place:
        canvas = surroundings(place, scene.seed % VARIANTS, side).copy()
    else:
        canvas = np.broadcast_to(np.uint8(scene.ground), (side, side, 3)).copy()
    clear = np.full((side, side, 1), 255, np.uint16)
    for part in scene.parts:
        put(canvas, clear, part, things, side)
    if not place and not scene.medium:
        return canvas
    rng, x = np.random.default_rng(scene.seed), canvas / np.float32(255)
    cover = 1 - clear / np.float32(255)
    if place:
        _, alter, front = SURROUNDINGS[place]
        x = x + (alter(x) - x) * cover if alter else x
        x = front(x, rng) if front else x
    if scene.medium:
        x = MEDIA[scene.medium](x, cover)
    return (x * 255 + 0.5).clip(0, 255).astype(np.uint8)


def put(canvas, clear, part, things, side):
    """Lay a part's drawing over the canvas."""
    n = max(1, round(part.side * side))
    left, top = round(part.left * side), round(part.top * side)
    rows, columns = slice(max(top, 0), min(top + n, side)), slice(max(left, 0), min(left + n, side))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    drawing = drawing_at(things, part.picture, n)
    if part.tint:
        drawing = repaint(drawing, TINTS[part.tint])
    drawing = drawing[rows.start - top:rows.stop - top, columns.start - left:columns.stop - left]
    opaque = 255 - drawing[..., 3:].astype(np.uint16)
    view = canvas[rows, columns]
    view[:] = drawing[..., :3] + (view * opaque + 127) // 255
    clear[rows, columns] = (clear[rows, columns] * opaque + 127) // 255


def drawing_at(things, picture, n):
    """A drawing at n x n pixels, premultiplied."""
    if n in things.pictures:
        return things.pictures[n][picture]
    larger = min((s for s in things.pictures if s > n), default=max(things.pictures))
    source = Image.frombuffer("RGBa", (larger, larger), things.pictures[larger][picture], "raw",
                              "RGBa", 0, 1)
    return np.asarray(source.resize((n, n), Image.BILINEAR))
