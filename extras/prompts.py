r"""Long prompts with weights, LoRAs and learnt words, as in AUTOMATIC1111's web UI.

    (word)   (word:1.3)   [word]    1.1, 1.3 and 1 / 1.1 times the weight; nested ones multiply
    \(   \)   \[   \]   \\          the character itself
    BREAK                           starts a new chunk
    <lora:name:0.8>                 adds the LoRA in the file of that name

Use embed_prompts() here instead of tiny_sd's: generate(..., embed=...).
"""

import dataclasses
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import tiny_sd
from extras import tensors
from extras.checks import first_five
from extras.narrow import wide
from tiny_sd import Tokenizer, UserError, array_like, concat, require, shorten, widen

# ── Weights ─────────────────────────────────────────────────────────────────────────────────────

MARK = re.compile(r"\\[()\[\]\\]?|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
PAUSE = re.compile(r"\bBREAK\b")
BREAK = ("BREAK", -1)
LONGEST, LONGEST_WORD, DEEPEST = 100_000, 10_000, 200       # so that no prompt takes forever
LONGEST_NAME, MOST_TAGS, MOST_CHUNKS = 200, 100, 4096


def weighted_parts(text):
    """Return [(text, weight), ...] of a prompt, with (BREAK, -1) between chunks.

    An opening bracket without its pair extends to the end; a closing one is text. As in the web UI,
    a BREAK inside brackets gets their weight, which makes it an ordinary word.
    """
    parts, opened = [], {"(": [], "[": []}

    def close(bracket, factor):
        for part in parts[opened[bracket].pop():]:
            part[1] *= factor

    for mark in MARK.finditer(text):
        piece, weight = mark.group(0, 1)
        if piece[0] == "\\":
            parts.append([piece[1:], 1.0])
        elif piece in opened:
            opened[piece].append(len(parts))
            require(len(opened[piece]) < DEEPEST, f"the prompt nests brackets {DEEPEST} deep")
        elif weight and opened["("]:
            close("(", number(weight))
        elif piece == ")" and opened["("]:
            close("(", 1.1)
        elif piece == "]" and opened["["]:
            close("[", 1 / 1.1)
        else:
            first, *others = PAUSE.split(piece)
            parts.append([first.rstrip() if others else first, 1.0])
            for i, other in enumerate(others, 1):
                other = other.strip() if i < len(others) else other.lstrip()
                parts += [[*BREAK], [other, 1.0]]
    for bracket, factor in ("(", 1.1), ("[", 1 / 1.1):
        while opened[bracket]:
            close(bracket, factor)
    return merged(parts)


def number(text):
    """Parse a weight in a prompt."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"the prompt's weight {shorten(text, 30)} is not a number (--plain-prompt "
                        "reads brackets as plain text)") from None


def merged(parts):
    """Join neighbours of the same weight, so that the tokenizer sees one text."""
    for text, weight in parts:
        require(abs(weight) < 1e6, f"the weight of {shorten(repr(text), 30)} in the prompt is "
                                   "beyond a million")
    runs = itertools.groupby(parts or [("", 1.0)], key=lambda part: part[1])
    return [("".join(text for text, _ in run), weight) for weight, run in runs]


# ── Chunks ──────────────────────────────────────────────────────────────────────────────────────


def check_length(text):
    """UserError if a prompt, or one of its words, is too long."""
    longest = max(map(len, text.split()), default=0)
    require(len(text) <= LONGEST and longest <= LONGEST_WORD,
            f"the prompt {shorten(repr(text), 30)} has {len(text)} characters, {longest} of them "
            f"in one word: at most {LONGEST} and {LONGEST_WORD} are allowed")


def chunks_of(tokenizer, text, weighted=True):
    """Return the chunks of a prompt: lists of (id, weight) that fit into the model.

    If a chunk overflows and has a comma among its last 20 tokens, the text after the comma moves
    to the next chunk. Without `weighted` the prompt is read as by Tokenizer.encode: one chunk, and
    the rest is cut off.
    """
    if not weighted:
        start = re.sub(rf"[{tokenizer.SPACE}]+", " ", text)[:40 * tokenizer.length]
        return [[(i, 1.0) for i in tokenizer.tokens(start)[:tokenizer.length - 2]]]
    check_length(text)
    room, comma_id = tokenizer.length - 2, tokenizer.vocab.get(",</w>")
    chunks, comma = [[]], None
    for part, weight in weighted_parts(text):
        if (part, weight) == BREAK:
            chunks.append([])
            comma = None
            continue
        for ids in words_of(tokenizer, part):
            here = len(chunks[-1])
            if ids == [comma_id]:
                comma = here
            elif here == room and comma is not None and here - comma <= 20:
                chunks[-1:] = [chunks[-1][:comma + 1], chunks[-1][comma + 1:]]
                comma = None
            if len(chunks[-1]) + len(ids) > room:
                chunks.append([])
                comma = None
            chunks[-1] += [(i, weight) for i in ids]
    require(len(chunks) <= 1000, f"the prompt {shorten(repr(text), 30)} has {len(chunks)} chunks: "
                                 "at most 1000")
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def words_of(tokenizer, text):
    """Yield the ids of a text as lists: one token, or all vectors of a learnt word."""
    ids, lengths, i = tokenizer.tokens(text), getattr(tokenizer, "lengths", {}), 0
    while i < len(ids):
        n = lengths.get(ids[i], 1)
        yield ids[i:i + n]
        i += n


def weigh(model, context, weights):
    """Multiply each row of a context (chunks, 77, width) by its weight, and restore the means.

    The mean of each chunk is restored, separately for each text encoder's part.
    """
    ends = np.cumsum([encoder.config.hidden_size for encoder in model.encoders])
    return concat(*(weigh_part(context[..., start:end], weights)
                    for start, end in zip([0, *ends], ends)))


def weigh_part(z, weights):
    """Multiply each row of z (chunks, 77, width) by its weight, then restore each chunk's mean."""
    weighted = z * array_like(z, weights)[..., None]
    before, after = (x.reshape(len(x), -1).mean(axis=1) for x in (z, weighted))
    ratio = before / (after + (after == 0))         # without a prompt, all values are zero
    return weighted * ratio[:, None, None]


def embed_prompts(model, texts, skip=None, chunks_of=chunks_of, weigh=weigh):
    """Like tiny_sd.embed_prompts, for weighted texts of any length.

    Encode each chunk separately and concatenate the contexts. Repeat texts with fewer chunks, which
    attention does not notice: softmax divides the weight among the copies. A second encoder's
    pooled vector is that of the first chunk. chunks_of, weigh: replacements for these functions.
    """
    tokenizer = model.encoders[0].tokenizer
    texts = [text if text is None else chunks_of(tokenizer, text) for text in texts]
    chunks = [chunk for text in texts for chunk in ([None] if text is None else text)]
    ids = [chunk if chunk is None else [i for i, _ in chunk] for chunk in chunks]
    context, pooled = tiny_sd.embed_prompts(reader_of_ids(model), ids, skip)    # (chunks, 77, ...)
    weights = np.ones(context.shape[:2], np.float32)                        # (chunks, 77)
    for row, chunk in zip(weights, chunks):
        row[1:1 + len(chunk or [])] = [weight for _, weight in chunk or []]
    if (weights != 1).any():
        context = weigh(model, context, weights)

    lengths = [1 if text is None else len(text) for text in texts]
    n = math.lcm(*lengths)
    if n > 60:      # from 7 and 9 chunks on: accept uneven copies
        n = max(lengths)
    rows = np.stack([end - length + np.arange(n) % length
                     for end, length in zip(np.cumsum(lengths), lengths)])  # (texts, n)
    require(rows.size <= MOST_CHUNKS, f"the prompt becomes {len(texts)} texts of {n} chunks, more "
            f"than {MOST_CHUNKS} in all")
    context = context[rows].reshape(len(texts), -1, context.shape[-1])      # (texts, 77 n, width)
    return context, None if pooled is None else pooled[rows[:, 0]]


def reader_of_ids(model):
    """Return the model with tokenizers whose encode() takes the ids of a chunk, not a text."""
    def framing(tokenizer):
        bos, eos = tokenizer.vocab[Tokenizer.BOS], tokenizer.vocab[Tokenizer.EOS]

        def encode(ids):
            used = [bos, *ids, eos] if ids else [bos, eos]
            return np.array(used + [tokenizer.pad] * (tokenizer.length - len(used))), ""
        return SimpleNamespace(encode=encode, vocab=tokenizer.vocab)

    encoders = [encoder._replace(tokenizer=framing(encoder.tokenizer))
                for encoder in model.encoders]
    return dataclasses.replace(model, encoders=encoders)


def skipping(embed, n):
    """Return embed_prompts with CLIP skip n: without the last n - 1 layers of each text encoder.

    Stable Diffusion 2 and XL already skip one layer, so 2 changes nothing there. The final norm, if
    any, and a second encoder's pooled vector are unaffected.
    """
    def skipped(model, texts):
        two = len(model.encoders) == 2
        without = not two and model.encoders[0].config.hidden_act == "gelu"   # Stable Diffusion 2
        skip = max(int(two), n - 1 - without)
        layers = min(len(encoder.weights["encoder"]["layers"]) for encoder in model.encoders)
        require(skip < layers, f"--clip-skip {n} leaves nothing of a text encoder of "
                               f"{layers + without} layers")
        return embed(model, texts, skip)
    return skipped


def reads_weights(model):
    """Does the model use CLIP's own tokenizer? Then weights in prompts are common."""
    tokenizer = model.encoders[0].tokenizer
    return tokenizer.length == 77 and len(tokenizer.vocab) >= 49408


LISTS = re.compile(r"(?<!\\)\{[^{}|]*\|[^{}]*\}|__[\w/*.-]{1,60}?__")     # see extras/choices.py


def remarks(model, texts, plain=False):
    """Yield warnings about parts of the prompts that have no effect, and about unused learnt words.

    texts: the prompt and the negative prompt, without tags.
    """
    weighted = reads_weights(model) and not plain
    for text in texts:
        check_length(text)
        if weighted and (found := LISTS.search(text)):
            yield (f"{shorten(found[0], 60)} in the prompt is read as plain text: --wildcards DIR "
                   "would choose from lists")
        if mark := not weighted and not plain and re.search(r"\([^()]*:[\d.]+\)", text):
            yield f"{mark[0]} is read as plain text: this model's prompts have no weights"
    tokenizer = model.encoders[0].tokenizer
    if learnt := getattr(tokenizer, "names", {}):
        said = {i for text in texts for chunk in chunks_of(tokenizer, text, weighted)
                for i, _ in chunk}
        if silent := [" or ".join(names) for first, names in learnt.items() if first not in said]:
            yield f"no prompt uses {first_five(silent)}, given with --embedding"


# ── Learnt words ────────────────────────────────────────────────────────────────────────────────
#
# Textual inversion (Gal et al., 2022) learns a word: one or more rows of the table of token
# embeddings, stored in a small file. The network treats them like other tokens.


class LearntTokenizer(Tokenizer):
    """A tokenizer with learnt words, each standing for a run of new ids.

    words: {word: its ids}. As in the web UI, the ids replace the word's own tokens wherever those
    occur in sequence; the longest match wins. A word in angle brackets is matched in the text, as
    in diffusers, because the comma of "<cat>," would share a token with ">". As in ComfyUI,
    "embedding:" before a word belongs to it.
    """

    def __init__(self, tokenizer, words):
        vars(self).update(vars(tokenizer))
        self.inner = tokenizer
        called = {start + word: ids for word, ids in words.items() if tokenizer.tokens(word)
                  for start in ("embedding:", "")}      # in ComfyUI, and in other programs
        self.learnt = {tuple(tokenizer.tokens(word)): ids for word, ids in called.items()}
        self.bracketed = {word.lower(): ids for word, ids in called.items()
                          if re.fullmatch("(embedding:)?<.+>", word)}
        longest_first = sorted(self.bracketed, key=len, reverse=True)
        marks = "|".join(map(re.escape, longest_first)) or "(?!)"
        self.marks = re.compile(f"({marks})", re.IGNORECASE)
        self.sizes = [*sorted({len(word) for word in self.learnt}, reverse=True), 1]
        self.lengths = getattr(tokenizer, "lengths", {}) | {
            ids[0]: len(ids) for ids in words.values()}
        self.names = getattr(tokenizer, "names", {}) | {ids[0]: [] for ids in words.values()}
        self.symbol = {**self.symbol}
        for word, (first, *others) in words.items():
            spelling = "".join(self.bytes[b] for b in word.encode(errors="replace"))
            self.symbol |= {first: spelling + "</w>", **dict.fromkeys(others, "")}
            self.names[first].append(word)

    def tokens(self, text):
        """Return the ids of a text, with those of learnt words."""
        return [i for piece in self.marks.split(text)
                for i in self.bracketed.get(piece.lower()) or self.learnt_tokens(piece)]

    def learnt_tokens(self, text):
        """Return the ids of a text, finding learnt words by their tokens."""
        spelt, ids, i = self.inner.tokens(text), [], 0
        while i < len(spelt):
            words = (tuple(spelt[i:i + n]) for n in self.sizes)
            word = next((word for word in words if word in self.learnt), (spelt[i],))
            ids += self.learnt.get(word, word)
            i += len(word)
        return ids


def with_embeddings(model, files):
    """Return the model with the learnt words of these textual inversion files.

    The word is the file's name, and in diffusers' files also the name inside. Instead of a file,
    (its name, {name: array}) works too. UserError if a file is not an embedding, or is for another
    family of models.
    """
    tables = [wide(encoder.weights["embeddings"]["token_embedding"]["weight"])
              for encoder in model.encoders]
    words, learnt, first = {}, [], len(tables[0])
    room = model.encoders[0].tokenizer.length - 2
    for file in files:
        names, vectors = read_embedding(file, [table.shape[1] for table in tables], room)
        words |= dict.fromkeys(names, [*range(first, first + len(vectors[0]))])
        first += len(vectors[0])
        learnt.append(vectors)
    tables = [concat(table.T, *(array_like(table, rows).T for rows in more)).T
              for table, *more in zip(tables, *learnt)]

    encoders = []
    for (tokenizer, config, weights), table in zip(model.encoders, tables):
        embeddings = weights["embeddings"] | {"token_embedding": {"weight": table}}
        encoders.append(tiny_sd.Encoder(LearntTokenizer(tokenizer, words), config,
                                        weights | {"embeddings": embeddings}))
    return dataclasses.replace(model, encoders=encoders)


def read_embedding(file, widths, room):
    """Return the names of a learnt word, and its vectors (n, width) for each text encoder.

    file: a path, or (name, {name: array}). widths: of the model's text encoders. room: the number
    of vectors that fit in a prompt.
    """
    if isinstance(file, tuple):
        file, found = file
        names, arrays = embedding_arrays(file, file, found)
    else:
        require(Path(file).is_file(), f"there is no embedding {file}")
        names, arrays = embedding_arrays(file, Path(file).stem, tensors.read_contents(file))
    vectors = [array.reshape(-1, array.shape[-1]).astype(np.float32)
               if array.ndim in (1, 2) and array.size else np.zeros((0, 0)) for array in arrays]
    given, wanted = (" and ".join(map(str, sizes)) for sizes in
                     ([array.shape[1] for array in vectors], widths))
    require(given == wanted, f"{file} is for another model: its vectors have {given} numbers, "
                             f"the model's {wanted}")
    require(len({len(array) for array in vectors}) == 1,
            f"{file} has different numbers of vectors for the two text encoders")
    require(all(np.isfinite(array).all() for array in vectors),
            f"{file} has numbers that are not finite")
    n = len(vectors[0])
    require(n <= room, f"{file} has {n} vectors, too many for a prompt")
    return names, vectors


def embedding_arrays(file, name, found):
    """Return the names of a learnt word, and the arrays in its file: two for SDXL.

    The web UI writes {"string_to_param": {"*": array}, "name": name} or {"emb_params": array},
    diffusers {name: array}, and for SDXL every program {"clip_l": array, "clip_g": array}.
    """
    names = [name]
    if web_ui := isinstance(found.get("string_to_param"), dict):
        found = found["string_to_param"]

    arrays = {name: widen(array) for name, array in found.items()
              if isinstance(name, str) and isinstance(array, np.ndarray)}
    if arrays.keys() >= {"clip_l", "clip_g"}:
        arrays = {name: arrays[name] for name in ("clip_l", "clip_g")}
    else:
        kind = tensors.kind_of(arrays)
        require(len(arrays) == 1 and (kind is None or "embedding" in kind),
                f"{file} is not an embedding: it holds {len(arrays)} tensors instead of "
                f"one, or of clip_l and clip_g{tensors.not_but(kind)}")
        names += [] if web_ui else arrays.keys() - {"*", "emb_params"}
    return [name for name in names if 0 < len(name) <= LONGEST_NAME], [*arrays.values()]


# ── Tags ────────────────────────────────────────────────────────────────────────────────────────

TAG = re.compile(r"<(\w+):([^<>]+)>")


def without_tags(text):
    """Return a prompt without tags like <lora:name:0.8>."""
    return TAG.sub("", text)


def tags(text):
    """Yield (tag, name of the LoRA, weight) for each tag in a prompt.

    If a tag is not of the form <lora:name:weight>, yield (tag, None, why not).
    """
    found = [*TAG.finditer(text)]
    require(len(found) <= MOST_TAGS,
            f"the prompt has {len(found)} tags like <lora:name:weight>: at most {MOST_TAGS}")
    for tag in found:
        name, *weights = tag[2].split(":")
        if tag[1] not in ("lora", "lyco"):
            yield tag[0], None, "only tags <lora:name:weight> work here"
            continue
        try:
            weight, = {lora_weight(text) for text in weights} or {1.0}
            yield tag[0], name, weight
        except ValueError:
            yield tag[0], None, "it is not of the form <lora:name:weight>"


def lora_weight(text):
    """Parse the weight of a LoRA; ValueError if it is not a number, or beyond 1000."""
    weight = float(text)
    if not -1000 <= weight <= 1000:
        raise ValueError(f"a LoRA's weight is at most 1000, not {weight}")
    return weight
