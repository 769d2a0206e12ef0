"""What a small model can draw, as listed in its folder's things.json."""

import difflib
import json
import re
import textwrap
from pathlib import Path

from extras.files import printable, read_text
from tiny_sd import HERE, UserError

LONGEST = 2 ** 17       # bytes of a things.json: each unknown word is compared with every name
KEYS = ("things", "styles", "backgrounds", "places")


def known_things(model):
    """Return the things.json of a folder, or of a name in weights/; None if there is none."""
    for folder in Path(model), HERE / "weights" / model:
        file = folder / "things.json"
        try:
            known = json.loads(read_text(file, LONGEST)) if file.is_file() else {}
            things = [names for names in map(texts, known["things"]) if names]
            more = {texts([title])[0]: texts(words)
                    for title, words in known.get("more", {}).items()}
            return {key: texts(known[key]) for key in KEYS} | {"things": things, "more": more}
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            continue
    return None


def texts(values):
    """Return the values of a list as texts without control characters."""
    return [printable(str(value), control=False) for value in values]


def split_words(text):
    """Return a text's words in lower case."""
    return re.findall(r"[\w'-]+", text.lower())


# Words of captions besides things, styles, backgrounds and places.
FRAME = "a an small and next to above below in the style on background"
# Common words for things that the model knows by another name.
SAME = dict(pair.split("=") for pair in (
    "sofa=couch kitten=cat kitty=cat puppy=dog plane=airplane jet=airplane cellphone=phone "
    "pc=computer tv=television home=house burger=hamburger bunny=rabbit ape=monkey auto=car "
    "cab=taxi motorbike=motorcycle spaceship=rocket dinosaur=t-rex donut=doughnut pasta=spaghetti "
    "noodles=spaghetti goldfish=fish hen=chicken toad=frog alligator=crocodile hippo=hippopotamus "
    "rhino=rhinoceros insect=bug squirrel=chipmunk suitcase=luggage earth=globe yacht=sailboat "
    "sea=wave ocean=wave present=gift bike=bicycle phone=telephone").split())


def singular(word):
    """Return a word without a plural ending."""
    for ending, other in ("ies", "y"), ("ses", "s"), ("xes", "x"), ("hes", "h"), ("s", ""):
        if word.endswith(ending) and not word.endswith("ss"):
            return word.removesuffix(ending) + other
    return word


def like(word, names):
    """Return the known name nearest to a word, or None; names: {words: name}."""
    for said in word, singular(word):
        if inside := [name for words, name in names.items() if said in words]:
            return min(inside, key=len)
        if (SAME.get(said),) in names:
            return SAME[said]
    alike = [words[0] for words in names if len(words) == 1 and abs(len(words[0]) - len(word)) < 2]
    return next(iter(difflib.get_close_matches(word, alike, 1, 0.8)), None)


def by_words(things):
    """Return {words: name} of things; each thing is a list of names."""
    return {tuple(split_words(name)): name for names in things for name in names}


def remarks(known, prompt):
    """Yield a line if a prompt names none of the known things, or has unknown words."""
    words, names = split_words(prompt)[:1000], by_words(known["things"])     # enough for a remark
    lengths = {*map(len, names)}
    named = any(tuple(words[i:i + n]) in names for n in lengths for i in range(len(words)))
    new = unknown_words(known, prompt)
    nearest = {word: like(word[:60], names) for word in new[:5]}
    said = ", ".join(f'"{word[:60]}"' + f" (it knows {nearest[word]})" * bool(nearest[word])
                     for word in new[:5]) + ", ..." * (len(new) > 5)
    if named and new or any(nearest.values()):
        yield (f"the model never learnt {said}: {'they' if len(new) > 1 else 'it'} may spoil the "
               "picture")
    elif prompt.strip() and not named:
        near = next(filter(None, (like(word[:60], names) for word in words[:50]
                                  if word not in FRAME.split())), None)
        yield (f"the model knows nothing in \"{prompt[:100]}\"{f', but {near}' if near else ''}: "
               f"--things lists the {len(known['things'])} things it can draw")


def unknown_words(known, prompt):
    """Return the words of a prompt that the model never learnt."""
    texts = [FRAME, *known["styles"], *known["backgrounds"], *known["places"],
             *(text for kind in (known["things"], known.get("more", {}).values()) for words in kind
               for text in words)]
    learnt = {word for text in texts for word in split_words(text)}
    return [word for word in dict.fromkeys(split_words(prompt)) if word not in learnt]


def describe_things(known, word=""):
    """Describe what a model knows: things with their aliases, then the rest.

    word: list only things with this in their names.
    """
    if known is None:
        raise UserError("this model does not list what it knows: its things.json is missing or "
                        "cannot be read")
    names = sorted(known["things"], key=lambda names: names[0].lower())
    if word:
        near = like(word.lower(), by_words(names))
        names = [one for one in names if word.lower() in " ".join(one).lower()]
        if not names:
            return f"no thing has {word} in its name" + f"; the nearest is {near}" * bool(near)
    things = [first + (f" ({', '.join(others)})" if others else "") for first, *others in names]
    if word:
        return "\n".join(things)
    parts = [(f"{len(things)} things, other names in brackets", "; ".join(things)),
             ('styles, as in "a cat in the blob style"', ", ".join(known["styles"])),
             ('backgrounds, as in "a cat on a light blue background"',
              ", ".join(known["backgrounds"])),
             ('places, as in "a small cat in the top left corner"', ", ".join(known["places"])),
             *((title, ", ".join(words)) for title, words in known.get("more", {}).items())]
    fill = textwrap.TextWrapper(96, initial_indent="  ", subsequent_indent="  ").fill
    return "\n\n".join(f"{title}:\n{fill(text)}" for title, text in parts)
