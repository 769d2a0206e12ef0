"""Prompts that change during sampling, or are combined, as in AUTOMATIC1111's web UI.

    [from:to:when]   [to:when]   [from::when]   one text until step `when`, then another
    [one|two|...]                               alternate: each step takes the next one
    one AND two :0.5                            both at once, each with a weight

`when` is a fraction of the steps if it has a decimal point, else a number of steps. Anything else
is text, including brackets for weights, which extras/prompts.py reads.
"""

import functools
import re

from extras.guidance import composed
from extras.prompts import LONGEST
from tiny_sd import guide, require, shorten

DEEPEST = 50        # levels of nested brackets; deeper ones are text
NUMBER = re.compile(r"\s*([+-]?(\d+\.?\d*|\.\d+))\s*")


def parts_of(text):
    """Return [(prompt, weight), ...] of a prompt with AND in it."""
    parts = re.split(r"\bAND\b", text)
    if len(parts) == 1:
        return [(text, 1.0)]
    splits = [part.rpartition(":") for part in parts]
    weights = [NUMBER.fullmatch(end) for _, _, end in splits]
    return [(start, float(weight[1])) if colon and weight else (part, 1.0)
            for part, (start, colon, _), weight in zip(parts, splits, weights)]


def texts_of(text, n, more=0):
    """Return a prompt's text at each of n steps, and at `more` steps after these."""
    tree = tree_of(text)
    return ["".join(at(tree, step, n)) for step in range(1, n + more + 1)]


def at(tree, step, n):
    """Yield the pieces of a parsed prompt's text at a step, 1 to n."""
    for node in tree:
        if isinstance(node, str):
            yield node
        elif isinstance(node, list):
            yield from at(node[(step - 1) % len(node)], step, n)
        else:
            before, after, when = node
            share = float(when) * n if "." in when else float(when)
            yield from at(before if step <= int(min(n, share)) else after, step, n)


def parsed(text, depth=0):
    """Parse a prompt into a list of texts, lists of alternatives and triples (before, after, when).

    Alternatives, before and after are such lists, too. ValueError if the whole prompt is plain
    text because of a "|" outside brackets.
    """
    tree, i, ends = [], 0, closing(text)
    for mark in re.finditer(r"\\.|[\[|]", text, re.DOTALL):
        if mark.start() < i or mark[0][0] == "\\":
            continue
        if mark[0] == "|" or depth > DEEPEST:
            raise ValueError
        if (end := ends.get(mark.start())) is not None:
            tree += [text[i:mark.start()], *bracket(text[mark.end():end], depth + 1)]
            i = end + 1
    return [*tree, text[i:]]


def closing(text):
    """Return {index of "[": index of the "]" that closes it}."""
    opened, ends = [], {}
    for mark in re.finditer(r"\\.|[\[\]]", text, re.DOTALL):
        if mark[0] == "[":
            opened.append(mark.start())
        elif mark[0] == "]" and opened:
            ends[opened.pop()] = mark.start()
    return ends


def bracket(inside, depth):
    """Return the nodes for the text between "[" and "]"."""
    options, parts = separated(inside, "|"), separated(inside, ":")
    if len(options) > 1 and len(parts) == 1:
        return [[parsed(option, depth) for option in options]]
    when = NUMBER.fullmatch(parts[-1])
    if len(options) == 1 and len(parts) in (2, 3) and when:
        before, after = ["", *parts[:-1]][-2:]
        return [(parsed(before, depth), parsed(after, depth), when[1])]
    return ["[", *parsed(inside, depth), "]"]


def separated(text, separator):
    """Split a text at separators outside brackets; do not split if the brackets do not match."""
    parts, opened, start = [], [], 0
    for mark in re.finditer(r"\\.|[\[\]():|]", text, re.DOTALL):
        if mark[0] in "[(":
            opened.append("])"["[(".index(mark[0])])
        elif mark[0] in "])" and (not opened or opened.pop() != mark[0]):
            return [text]
        elif mark[0] == separator and not opened:
            parts.append(text[start:mark.start()])
            start = mark.end()
    return [text] if opened else [*parts, text[start:]]


def tree_of(text):
    """Return parsed(text), or the text alone if it is plain."""
    try:
        return parsed(text)
    except ValueError:
        return [text]


def changes(*texts):
    """Does any of these prompts (some may be None) change during sampling or have parts?"""
    return any(len(parts_of(text)) > 1 or not all(isinstance(node, str) for node in tree_of(text))
               for text in texts if text)


def all_words(text):
    """Return all words that a prompt has at any step."""
    def words(tree):
        for node in tree:
            if isinstance(node, str):
                yield node
            else:       # alternatives, or before and after
                for option in node if isinstance(node, list) else node[:2]:
                    yield from words(option)
    return " ".join(word for part, _ in parts_of(text) for word in words(tree_of(part)))


class Timeline:
    """The texts of two prompts at each of n + more steps; each distinct text is encoded once.

    Pass embed and denoiser(make_denoiser) to like_diffusers.generate, count to samplers.counting
    and combine to extras/guidance.py.
    """

    def __init__(self, prompt, negative, n, embed, more=0):
        self.inner, self.step = embed, 0
        parts = parts_of(prompt)
        for text in filter(None, (prompt, negative)):
            require(text.count("[") + len(parts) <= 1000, "the prompt changes in more than a "
                    f"thousand places: {shorten(text, 30)}")
        weights = [weight for _, weight in parts]
        require(max(map(abs, weights)) <= 1e6, "a weight after AND is beyond a million: "
                                               f"{shorten(prompt, 30)}")
        self.combine = composed(weights) if len(weights) > 1 else guide
        texts = [[None] * (n + more) if negative is None else texts_of(negative, n, more),
                 *(texts_of(text, n, more) for text, _ in parts)]
        self.steps = list(zip(*texts))      # for each step (negative text, text of each part ...)
        self.texts = list(dict.fromkeys(text for step in self.steps for text in step))
        total = sum(len(text or "") for text in self.texts)
        require(total <= 10 * LONGEST, f"the prompt becomes {total:,} characters over all steps: "
                f"{shorten(prompt, 30)}")

    def embed(self, model, texts):
        """Return the contexts of all texts, and their pooled vectors."""
        self.guided = len(texts) == 2 or self.combine is not guide
        return self.inner(model, self.texts)

    def denoiser(self, make_denoiser):
        """Return make_denoiser, changed to use the contexts of the current step."""
        def make(model, context, guidance=1.0, pooled=None, *others):
            @functools.cache
            def asking(*rows):
                rows = list(rows)
                pooled_rows = None if pooled is None else pooled[rows]
                return make_denoiser(model, context[rows], guidance, pooled_rows, *others)

            def denoise(x_t, t, alpha_bar):
                texts = self.steps[self.step][0 if self.guided else 1:]
                return asking(*map(self.texts.index, texts))(x_t, t, alpha_bar)
            return denoise
        return make

    def count(self, step, n):
        """Note that step `step` is next, counted from 0."""
        self.step = min(step, len(self.steps) - 1)
