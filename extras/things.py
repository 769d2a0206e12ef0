"""What a small model knows how to draw, where its folder says so: things.json."""

import json
import re
import textwrap
from pathlib import Path

from tiny_sd import HERE, UserError

KEYS = ("things", "styles", "backgrounds", "places")


def known_things(model):
    """Return the things.json of a folder, or of one of this name in weights/, None without it."""
    for folder in Path(model), HERE / "weights" / model:
        file = folder / "things.json"
        try:
            known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            things = [names for names in map(texts, known["things"]) if names]
            return {key: texts(known[key]) for key in KEYS} | {"things": things}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue
    return None


def texts(values):
    """Return the values of a list as texts without what controls a terminal."""
    return ["".join(c if c.isprintable() else " " for c in str(value)) for value in values]


def split_words(text):
    """Return a text's words in lower case, and each other sign by itself."""
    return re.findall(r"[\w']+|[^\w\s]", text.lower())


# What captions say beside things, styles, backgrounds and places.
FRAME = "a an small and next to above below in the style on background"


def remarks(known, prompt):
    """Yield a line if a prompt names none of the known things, or has words beside them."""
    words = split_words(prompt)
    names = [split_words(name) for names in known["things"] for name in names]
    if words and not any(name == words[i:i + len(name)] for name in names
                         for i in range(len(words))):
        yield (f"the model knows nothing in \"{prompt[:100]}\": --things lists the "
               f"{len(known['things'])} things that it can draw")
        return
    if new := [f'"{word}"' for word in unknown_words(known, prompt)]:
        more = ", ..." if len(new) > 5 else ""
        yield f"the model never learnt {', '.join(new[:5])}{more}: they can spoil the picture"


def unknown_words(known, prompt):
    """Return the words of a prompt that the model never learnt."""
    texts = [FRAME, *known["styles"], *known["backgrounds"], *known["places"],
             *(name for names in known["things"] for name in names)]
    learnt = {word for text in texts for word in split_words(text)}
    return [word for word in dict.fromkeys(split_words(prompt)) if word not in learnt]


def describe_things(known):
    """Return what a model knows as text: things with their aliases, then the rest."""
    if known is None:
        raise UserError("this model does not say what it knows: it has no things.json, or "
                        "one that cannot be read")
    names = sorted(known["things"], key=lambda names: names[0].lower())
    things = [first + (f" ({', '.join(others)})" if others else "") for first, *others in names]
    parts = [(f"{len(things)} things, other names in brackets", "; ".join(things)),
             ('styles, as in "a cat in the blob style"', ", ".join(known["styles"])),
             ('backgrounds, as in "a cat on a light blue background"',
              ", ".join(known["backgrounds"])),
             ('places, as in "a small cat in the top left corner"', ", ".join(known["places"]))]
    fill = textwrap.TextWrapper(96, initial_indent="  ", subsequent_indent="  ").fill
    return "\n\n".join(f"{title}:\n{fill(text)}" for title, text in parts)
