"""--explain: how a prompt becomes tokens, and the size and cost of each part of the model."""

import copy
import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

import tiny_sd
from extras import prompts
from extras.files import printable
from extras.show import counting, positions_of_words

LONGEST_WORD = 200      # characters; of a longer word only the result is shown


def merging(tokenizer, word):
    """Yield the word's symbols, at first and then after each merge, in order of rank.

    For a very long word, only the last of these.
    """
    learner, known = copy.copy(tokenizer), [None]
    learner.rank = {}
    if len(word) > LONGEST_WORD:
        return (yield tokenizer.merge(word))
    while known:
        symbols = learner.merge(word)
        yield symbols
        known = [pair for pair in zip(symbols, symbols[1:]) if pair in tokenizer.rank]
        if known:
            pair = min(known, key=tokenizer.rank.get)
            learner.rank[pair] = tokenizer.rank[pair]


def places_lines(tokenizer, prompt):
    """Return lines about the ids of a prompt without weights, and about what was cut off."""
    ids, cut = tokenizer.encode(prompt)
    filled, end = len(ids) - 2 - len(tokenizer.tokens(prompt)), tokenizer.vocab[tokenizer.EOS]
    return [f"The model's {len(ids)} positions: {ids[0]} marks the start, {end} the end, and "
            f"{max(0, filled)} are filled with {tokenizer.pad}.", " ".join(map(str, ids)),
            f"Cut off, because it does not fit: {cut}" if cut else "Nothing is cut off."]


def chunks_lines(tokenizer, prompt):
    """Return lines about the chunks of a weighted prompt: words with weights, and ids."""
    chunks = prompts.chunks_of(tokenizer, prompt)
    lines = [f"The text encoder reads {len(chunks)} chunk{'s' * (len(chunks) > 1)} of up to "
             f"{tokenizer.length - 2} tokens, one by one, each with its start, end and padding:"]
    for chunk in chunks:
        words = positions_of_words(tokenizer, [chunk], tokenizer.length)[1:-1]
        lines += ["  " + ", ".join(word for word, _ in words),
                  "    " + " ".join(str(i) for i, _ in chunk)]
    return lines


def tokens_text(tokenizer, prompt, weighted=False):
    """Explain how the prompt becomes tokens: bytes, symbols, merges, ids, and what is cut off."""
    words = prompt
    if weighted:
        words = " ".join(part[0] for part in prompts.weighted_parts(prompt)
                         if part != prompts.BREAK)
    lines, unknown = [], tokenizer.vocab[tokenizer.EOS]
    specials = tokenizer.BOS, tokenizer.EOS, tokenizer.symbol[tokenizer.pad]
    for piece in re.split(f"({'|'.join(map(re.escape, specials))})", words):
        special = piece in specials     # as in Tokenizer.tokens
        for word in [piece] if special else tokenizer.words(piece):
            data = word.encode(errors="replace").hex(" ")
            lines.append(f"  {word}: " + ("a special token" if special else f"bytes {data}"))
            steps = [[word]] if special else [*merging(tokenizer, word)]
            lines += [f"    {'→' if i else ' '} {' '.join(step)}" for i, step in enumerate(steps)]
            lines.append("      " + " ".join(str(tokenizer.vocab.get(symbol, unknown))
                                             for symbol in steps[-1]))

    places = chunks_lines if weighted else places_lines
    return "\n".join(printable(line, control=False) for line in [
        "Words to tokens: one line per merge, in the order in which the tokenizer learnt them, "
        "then the ids.", *lines, "", *places(tokenizer, prompt)])


# unet.down_blocks.0.resnets.1.conv1.weight is in "unet down_blocks.0.resnets"
PART = re.compile(r"(vae\.(?:en|de)coder|\w+)\."
                  r"((?:down|up)_blocks\.\d+\.\w+|mid_block\.\w+|encoder\.layers|\w+)")


def weights_by_part(model):
    """Return {id of a weight: its part}, and {part: record of shape, parameters, flops}."""
    owner, table = {}, {}
    texts = zip(("text_encoder", "text_encoder_2"), [encoder.weights for encoder in model.encoders])
    weights = tiny_sd.flatten({**dict(texts), "unet": model.unet, "vae": model.vae})
    for name, array in weights.items():
        network, part = PART.match(name).groups()
        owner[id(array)] = part = f"{network.replace('.', ' ')} {part}"
        row = table.setdefault(part, SimpleNamespace(shape=(), parameters=0, flops=0))
        row.parameters += math.prod(array.shape)
    return owner, table


def sizes(model: tiny_sd.Model, prompt: str, width: int, height: int) -> dict:
    """Return {part: record of shape, parameters, flops}, in the order in which the parts run.

    Run each network once on one picture, and record each part's output shape and operations.
    """
    (owner, table), order = weights_by_part(model), []

    def count(flops, y, weight):
        order.append(order[-1] if weight is None else owner[id(weight)])
        row = table[order[-1]]
        row.flops, row.shape = row.flops + flops, tuple(y.shape)[1:]

    h, w, channels = tiny_sd.latent_shape(model, width, height)
    x = np.zeros((1, h, w, channels), np.float32)
    more = model.config.unet.in_channels - channels     # of a model that inpaints
    more = np.zeros((1, h, w, more), np.float32) if more else None

    def step():
        context, pooled = tiny_sd.embed_prompts(model, [prompt])
        tiny_sd.denoiser(model, context, 1, pooled, more)(x, 500, 0.5)

    runs = [step, lambda: tiny_sd.encode(model, np.zeros((height, width, 3), np.uint8), x),
            lambda: tiny_sd.decode(model, x)]
    with counting(count):
        for work in tqdm(runs, desc="counting", unit="part", leave=False):
            work()
    names = [*(name for name in table if name not in order), *dict.fromkeys(order)]
    return {name: table[name] for name in sorted(names, key=lambda name: name.split()[0])}


def metric(n):
    """Return 12 G for 12,000,000,000, nothing for 0."""
    power = 0
    while n >= 1000:
        n, power = n / 1000, power + 1
    return f"{n:.3g} {' kMGTP'[power]}" if n else ""


def explain(model: tiny_sd.Model, prompt: str, width: int, height: int, weighted=False) -> str:
    """Explain how the prompt becomes tokens, and list each part's output, parameters and cost.

    weighted: whether brackets in the prompt mean weights (extras/prompts.py).
    """
    table = sizes(model, "" if weighted else prompt, width, height)
    lines = [
        tokens_text(model.encoders[0].tokenizer, prompt, weighted), "",
        f"The parts of {model.name}, for a picture of {width} x {height}: output shape, "
        "parameters, and the multiplications and\nadditions in matrix products (linear layers, "
        "convolutions, attention). A sampling step runs the U-Net once, or\ntwice with guidance. "
        "The other networks run once per picture; the VAE's encoder only if you start from one.",
        "",
        f"{'part':40}{'output':>16}{'parameters':>14}{'FLOP':>10}"]
    for network, rows in itertools.groupby(table.items(), lambda item: item[0].split()[0]):
        rows = list(rows)
        total = SimpleNamespace(shape=(), parameters=sum(row.parameters for _, row in rows),
                                flops=sum(row.flops for _, row in rows))
        for name, row in [*rows, (f"{network}, all of it", total)]:
            shape = " x ".join(map(str, row.shape))
            lines.append(f"{name:40}{shape:>16}{row.parameters:>14,}{metric(row.flops):>10}")
    return "\n".join(lines)
