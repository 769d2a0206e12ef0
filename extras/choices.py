"""Fill in prompts from lists and tables, as extensions of AUTOMATIC1111's web UI do.

    {red|green|blue}    one of these; the seed decides which
    __colour__          a line of colour.txt in a folder; __animals/*__ of any list in animals/
"""

import csv
import fnmatch
import functools
import io
import random
import re
import shlex
from pathlib import Path

from extras.checks import nearest
from extras.files import read_text
from extras.prompts import LISTS, check_length
from tiny_sd import UserError, require

LONGEST_LINE, MOST_FLAGS = 110_000, 200     # of a list, so that none takes forever


def split_line(line):
    """Return the prompt of a line of a list, and the flags after it.

    A prompt may be in quotes. AUTOMATIC1111's web UI writes it after --prompt, among flags with
    underscores.
    """
    require(len(line) <= LONGEST_LINE, f"a line has {len(line)} characters: at most "
            f"{LONGEST_LINE} are allowed")
    words = shlex.split(line) if line.startswith("--") else []
    require(len(words) <= MOST_FLAGS, f"a line has more than {MOST_FLAGS} flags and values")
    if "--prompt" in words[:-1]:
        i = words.index("--prompt")
        flags = [word.replace("_", "-").replace("--sampler-name", "--sampler")
                 if word.startswith("--") else word for word in words[:i] + words[i + 2:]]
        return words[i + 1], flags
    prompt, *flags = re.split(r" (?=--?[A-Za-z])", line, maxsplit=1)
    require(not re.match("--?[A-Za-z]", prompt), "a line starts with its prompt, and flags follow: "
            f"it cannot start with {prompt.split()[0]}")
    quoted = len(prompt) > 1 and prompt[0] == prompt[-1] == '"'
    flags = shlex.split("".join(flags))
    require(len(flags) <= MOST_FLAGS, f"a line has more than {MOST_FLAGS} flags and values")
    return prompt[1:-1] if quoted else prompt, flags


def made(texts, args):
    """Return prompts with args' styles and choices filled in; clear these options in args."""
    for file, name in args.styles:
        texts = with_style(*texts, file, name)
        for text in filter(None, texts):    # a style can repeat what the one before it has made
            check_length(text)
    if args.wildcards is not None:
        texts = [text and choose(text, args.seed, args.wildcards) for text in texts]
    args.styles, args.wildcards = [], None
    return texts


def choose(text, seed, folder):
    """Replace each list of choices in a prompt by one of them, the innermost first."""
    rng, names = random.Random(str(seed)), {}       # a str is hashed; small ints give similar draws
    require(Path(folder).is_dir(), f"--wildcards {folder} is not a folder")
    for path in sorted(Path(folder).rglob("*.txt")):
        names[path.relative_to(folder).with_suffix("").as_posix()] = path
    lines = functools.cache(functools.partial(lines_of, names))     # read each list once
    for _ in range(1000):
        check_length(text)
        mark = LISTS.search(text)
        if not mark:
            return text
        options = mark[0][1:-1].split("|") if mark[0][0] == "{" else lines(mark[0])
        text = text[:mark.start()] + rng.choice(options).strip() + text[mark.end():]
    raise UserError("the prompt has more than a thousand choices: does a list name itself?")


def lines_of(names, mark):
    """Return the lines of all lists that __name__ matches. names: {name: its file}."""
    found = fnmatch.filter(names, mark[2:-2])
    require(found, f"the prompt has {mark}, but there is no such list{nearest(mark[2:-2], names)}")
    lines = [line.strip() for name in found for line in read_text(names[name]).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    require(lines, f"the prompt has {mark}, but that list is empty")
    return lines


def with_style(prompt, negative, file, name):
    """Add a style, a row of a table with a name and two texts, to both prompts.

    The prompt replaces {prompt} in the style's text, or else goes before it.
    """
    try:
        head, *rows = [*csv.reader(io.StringIO(read_text(file)))] or [[]]
    except csv.Error as error:
        raise UserError(f"--styles {file} is not a table: {error}") from None
    places = {column: i for i, column in enumerate(head)}

    def cell(row, column):
        place = places.get(column, len(row))
        return row[place] if place < len(row) else ""
    styles = {cell(row, "name"): row for row in rows if cell(row, "name")}
    require(name in styles, f"--styles {file} has no style {name}{nearest(name, styles)}")

    def joined(text, style):
        style = style.strip()
        require(style.count("{prompt}") <= 100, f"--styles {file}: {name} repeats {{prompt}} more "
                "than 100 times")
        if "{prompt}" in style:
            return style.replace("{prompt}", text or "")
        return ", ".join(filter(None, (text, style))) if style else text
    row = styles[name]
    return joined(prompt, cell(row, "prompt")), joined(negative, cell(row, "negative_prompt"))
