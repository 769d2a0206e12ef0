"""What tiny_sd computes on the way to a picture: pictures of every stage, and each part's size.

    python tiny_sd.py "red apple" --show DIR        the picture, and a page about it: DIR/index.html
    python tiny_sd.py "red apple" --explain         how the prompt is read, what each part costs
    python -m extras.show notes                     draws the pictures of NOTES.md again

An example of tiny_sd as a library: generate() is given a denoiser that asks tiny_sd's and writes
down the answers, and while it does, the functions it watches are wrapped.
"""

import contextlib
import copy
import functools
import html
import itertools
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

# isort: split      (first of all fast: it sets up BLAS before NumPy is loaded)
from extras import fast  # noqa: F401

# isort: split
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import tiny_sd
from extras.files import free_names, write_atomically
from tiny_sd import require

# ── Watching ──────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def watching(**watchers):
    """While it lasts, tell each call of the named functions of tiny_sd to f(result, *arguments).

    The halves of guidance are computed one after the other, so that their calls do not mingle.
    """
    def watched(function, watcher):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            watcher(result, *args, **kwargs)
            return result
        return wrapped

    originals = {name: getattr(tiny_sd, name) for name in watchers}
    threaded = tiny_sd.FAST.pop("map_rows", None)
    try:
        for name, watcher in watchers.items():
            setattr(tiny_sd, name, watched(originals[name], watcher))
        yield
    finally:
        for name, function in originals.items():
            setattr(tiny_sd, name, function)
        if threaded:
            tiny_sd.FAST["map_rows"] = threaded


def probabilities(q, k):
    """Return softmax(q kᵀ / √d) (batch, heads, queries, keys), which attention need not hold."""
    q, k = tiny_sd.to_numpy(q), tiny_sd.to_numpy(k)
    return tiny_sd.softmax.formula(q @ k.mT / math.sqrt(q.shape[-1]))


class Film:
    """What a run computes at each step: give it to tiny_sd.generate() as its denoiser, then save().

    steps: for each guess t, a = ᾱ_t, x = x_t and x_0 = x̂_0 (batch, h, w, channels), push =
    ε̂_c - ε̂_∅ of the same shape (None without guidance), and attention, see attention_maps.
    UserError if the folder to save to is in use, or cannot be made.
    """

    def __init__(self, folder=None):
        self.folder, self.steps = folder and Path(os.path.abspath(folder)), []
        if folder:
            check_folder(folder, self.folder)

    def __call__(self, model, context, *args):
        """Return a denoise() for samplers, which remembers what it sees."""
        self.model = model
        denoise = tiny_sd.denoiser(model, context, *args)
        kind = model.config.scheduler.prediction_type

        def watched(x, t, a):
            outputs, maps, calls, n = [], [], itertools.count(), len(x)

            def see_output(y, *_):
                outputs.append(y)

            def see_attention(y, q, k, v, causal=False):
                if next(calls) % 2:     # each transformer block: first the pixels, then the words
                    maps.append(probabilities(q, k).mean(1))

            with watching(map_rows=see_output, dot_product_attention=see_attention):
                x_0, eps = denoise(x, t, a)
            push = None
            if len(outputs[-1]) == 2 * n:       # the second half is the prompt's
                together = maps and len(maps[0]) == 2 * n
                maps = [m[n:] for m in maps] if together else maps[len(maps) // 2:]
                uncond, cond = (tiny_sd.split_prediction(kind, half, x, a)[1]
                                for half in np.split(outputs[-1], 2))
                push = cond - uncond
            attention = attention_maps(maps, *x.shape[1:3])
            self.steps.append(SimpleNamespace(t=t, a=a, x=x, x_0=x_0, push=push,
                                              attention=attention))
            return x_0, eps
        return watched

    def save(self, x, prompt, seeds):
        """Write the folder, whole or not at all, and return the path of its page.

        x: the last latents. An empty folder that is there already, perhaps a disk's own, is
        filled. What others put there in the meantime stays, and the page goes beside it.
        """
        fill = self.folder.is_dir()
        with write_atomically(self.folder, inside=fill) as unfinished:
            unfinished.mkdir()
            write_page(self, x, prompt, seeds, unfinished)
            if fill and list(self.folder.iterdir()) == [unfinished]:
                for file in sorted(unfinished.iterdir(), key=lambda file: file.suffix == ".html"):
                    file.rename(self.folder / file.name)
                return self.folder / "index.html"
            names = free_names(self.folder / "page" if fill else self.folder)
            target = next(name for name in names if not os.path.lexists(name))
            unfinished.rename(target)
        return target / "index.html"


def check_folder(folder, path):
    """UserError unless --show can make a page in this folder, as given and as a whole path."""
    if path.exists():
        empty = path.is_dir() and not any(path.iterdir())
        require(empty, f"--show {folder} is there already: name a new folder, or an empty one")
        require(os.access(path, os.W_OK), f"--show {folder} cannot be written to")
    else:
        require(path.parent.is_dir(), f"--show {folder} cannot be made: there is no folder "
                                      f"{path.parent} to write to")
        require(os.access(path.parent, os.W_OK), f"--show {folder} cannot be made: the folder "
                                                 f"{path.parent} cannot be written to")


def attention_maps(maps, height, width):
    """Return {(h', w'): (batch, tokens, h', w')}: the attention that each pixel gives each token.

    maps: of each layer, (batch, pixels, tokens), of a height x width image; those of one
    resolution are averaged.
    """
    attention = {}
    for i in range(8):
        h, w = -(-height // 2 ** i), -(-width // 2 ** i)
        layers = [m for m in maps if m.shape[1] == h * w]
        if layers and (h, w) not in attention:
            mean = np.mean(layers, axis=0).swapaxes(1, 2)
            attention[h, w] = mean.reshape(*mean.shape[:2], h, w)
    return attention


def previewer(path, inside=tiny_sd.denoiser):
    """Return a denoiser that writes x̂_0 to a small PNG at each step.

    By the linear map from latents to colours that fits 64 colours best. UserError if there is
    such a file already, unless it is a preview too.
    """
    mark = PngInfo()
    mark.add_text("Software", "tiny_sd preview")
    require(not path.exists() or is_preview(path),
            f"--preview {path} is there already, and no preview: name another file")

    def make(model, *args):
        fit = colour_map(model)
        denoise = inside(model, *args)

        def watched(x, t, a):
            x_0, eps = denoise(x, t, a)
            pixels = np.concatenate(x_0 @ fit[:-1] + fit[-1], axis=1)
            with write_atomically(path) as unfinished:
                picture = Image.fromarray(np.nan_to_num(pixels).clip(0, 255).astype(np.uint8))
                picture.save(unfinished, "PNG", pnginfo=mark)
                os.replace(unfinished, path)
            return x_0, eps
        return watched
    return make


def is_preview(path):
    """Is this file one that previewer() wrote?"""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return b"tiny_sd preview" in file.read(99)


def colour_map(model):
    """Return the matrix (channels + 1, 3) that takes latents, and a 1, nearest to their colours."""
    colours, size = np.random.default_rng(0).integers(0, 256, (8, 8, 3)), 2 * model.factor
    latents = tiny_sd.encode(model, np.kron(colours, np.ones((size, size, 1))), np.float32(0))
    latents = latents.reshape(8, 2, 8, 2, -1).mean((1, 3)).reshape(64, -1)
    fit, *_ = np.linalg.lstsq(np.c_[latents, np.ones(64)], colours.reshape(64, 3), rcond=None)
    return fit


# ── Drawing, with Pillow alone ────────────────────────────────────────────────────────────────────

HEAT = np.array(
    [(0, 0, 0), (80, 20, 110), (190, 55, 85), (250, 145, 20), (255, 255, 170)]
)  # from little to much


def heat(values, most=None):
    """An array (h, w) from 0 to `most` as colours."""
    v = np.clip(values / (most or values.max() or 1), 0, 1)
    return Image.fromarray(
        np.stack([np.interp(v, np.linspace(0, 1, 5), c) for c in HEAT.T], -1)
        .round()
        .astype(np.uint8)
    )


def grey(values, most):
    """An array (h, w) from -most, black, to most, white."""
    return Image.fromarray(
        (np.clip(values / most / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    ).convert("RGB")


def over(picture, values, most=None, smooth=True):
    """A heat map over the picture (h, w, 3)."""
    picture = Image.fromarray(picture)
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    values = np.asarray(Image.fromarray(values.astype(np.float32)).resize(picture.size, how))
    return Image.blend(picture.convert("L").convert("RGB"), heat(values, most), 0.65)


def font(size):
    return ImageFont.load_default(size)


def enlarged(picture, size):
    """At least `size` pixels wide, in whole multiples."""
    n = max(1, round(size / picture.width))
    return picture.resize((n * picture.width, n * picture.height), Image.Resampling.NEAREST)


def sheet(rows, across=(), down=(), size=96, gap=4):
    """Rows of pictures of one size as one, with words above the columns and before the rows."""
    rows = [[enlarged(cell, size) for cell in row] for row in rows]
    write, (w, h) = font(13), rows[0][0].size
    left = max([0, *(math.ceil(write.getlength(word)) + 12 for word in down)])
    top = 22 * bool(across)
    page = Image.new(
        "RGB", (left + len(rows[0]) * (w + gap) - gap, top + len(rows) * (h + gap) - gap), "white"
    )
    draw = ImageDraw.Draw(page)
    for i, word in enumerate(across):
        draw.text((left + i * (w + gap) + w / 2, 10), word, "black", write, "mm")
    for i, word in enumerate(down):
        draw.text((left - 8, top + i * (h + gap) + h / 2), word, "black", write, "rm")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            page.paste(cell, (left + j * (w + gap), top + i * (h + gap)))
    return page


def curve(values, names, title, size=(640, 240)):
    """A line through values, from 0 up, with names under some of its points."""
    (w, h), write = size, font(13)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    top = max(values) or 1
    at = [
        (60 + i * (w - 90) / max(1, len(values) - 1), h - 35 - v / top * (h - 75))
        for i, v in enumerate(values)
    ]
    for y, label in ((h - 35, "0"), (40, f"{top:.3g}")):
        draw.line((60, y, w - 30, y), "#ccc")
        draw.text((52, y), label, "black", write, "rm")
    every = -(-len(values) // 10)
    for (x, _), name in list(zip(at, names))[::every]:
        draw.text((x, h - 20), name, "black", write, "mm")
    draw.text((60, 18), title, "black", write, "lm")
    draw.line(at, "#b3262e", 3)
    for x, y in at:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), "#b3262e")
    return page


# ── The page of one run ───────────────────────────────────────────────────────────────────────────

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
body {{ max-width: 76rem; margin: 2rem auto; padding: 0 1rem }}
p, h1, h2, h3 {{ max-width: 46rem }}
img {{ display: block; max-width: 100%; width: {width}px; image-rendering: {rendering} }}
img.wide {{ width: auto; image-rendering: auto }}
figure {{ margin: 0 }}
figcaption, td, th {{ font-size: .85rem; text-align: left; vertical-align: top }}
.row {{ display: flex; flex-wrap: wrap; gap: 1rem }}
.pair {{ display: flex; gap: 2px }}
.scroll {{ overflow-x: auto }}
</style></head>
<body>
{body}
</body>
</html>
"""


class Page:
    """An HTML page and the pictures beside it, written to a folder."""

    def __init__(self, folder):
        self.folder, self.body, self.prefix = folder, [], ""

    def say(self, *lines):
        self.body += lines

    def image(self, picture, name, words, wide=False):
        """Saves a picture, and gives back the tag that shows it."""
        path = self.folder / f"{self.prefix}{name}.png"
        picture.save(path)
        return f'<img src="{path.name}" alt="{html.escape(words)}"{" class=wide" * wide}>'

    def write(self, title, width, rendering):
        text = PAGE.format(
            title=html.escape(title), width=width, rendering=rendering, body="\n".join(self.body)
        )
        (self.folder / "index.html").write_text(text, encoding="utf-8")


def pieces(tokenizer, text):
    """[(word, its symbols)] of a text, as Tokenizer.tokens takes it apart."""
    found = []
    for piece in re.split(r"(<\|startoftext\|>|<\|endoftext\|>)", text):
        special = piece in (tokenizer.BOS, tokenizer.EOS)
        found += (
            [(piece, [piece])]
            if special
            else [(w, tokenizer.merge(w)) for w in tokenizer.words(piece)]
        )
    return found


def places_of_words(tokenizer, prompt):
    """Return [(word, slice of its tokens)]: the start, the words that fit, and the rest."""
    found, end, room = [("(start)", slice(0, 1))], 1, tokenizer.length - 1
    for word, symbols in pieces(tokenizer, prompt):
        if end < room:
            found.append((word, slice(end, min(end + len(symbols), room))))
            end = found[-1][1].stop
    return [*found, ("(end and padding)", slice(end, tokenizer.length))]


def write_page(film, x, prompt, seeds, folder):
    """index.html and its pictures, for each seed a part."""
    page, final = Page(folder), tiny_sd.decode(film.model, x)
    decoded = [[tiny_sd.decode(film.model, latents) for latents in (s.x, s.x_0)]
               for s in tqdm(film.steps, desc="pictures", unit="step")]
    page.say(
        f"<h1>{html.escape(prompt) or '(no prompt)'}</h1>",
        f"<p>What happened in {len(film.steps)} steps, drawn by tiny_sd {tiny_sd.__version__} with "
        "the model "
        f"{html.escape(film.model.name)}. NOTES.md has the mathematics.</p>",
    )
    for k, seed in enumerate(seeds):
        page.prefix = f"{seed}-" if len(seeds) > 1 else ""
        result = Image.fromarray(final[k])
        page.say(f"<h2>Seed {seed}</h2>", page.image(result, "picture", prompt))
        film_section(
            page,
            film.steps,
            [[Image.fromarray(both[k]) for both in pair] for pair in decoded],
            result,
        )
        if film.steps[0].attention:
            words_section(page, film, k, final[k], prompt)
        if film.steps[0].push is not None:
            guidance_section(page, film.steps, k)
        latents_section(page, film, k, x[k])
    page.write(
        prompt or "tiny_sd", *((128, "pixelated") if final.shape[2] < 256 else (192, "auto"))
    )


def film_section(page, steps, pairs, result):
    frames = [sheet([pair], size=128) for pair in [*pairs, (result, result)]]
    frames[0].save(
        page.folder / f"{page.prefix}film.png",
        save_all=True,
        append_images=frames[1:],
        loop=0,
        duration=[300] * len(pairs) + [2000],
    )
    page.say(
        "<h3>The film</h3><p>At each step the program holds a noisy x<sub>t</sub> (left). From it "
        "the network guesses the clean picture x̂<sub>0</sub> (right): the mean of all that could "
        "hide in the noise, a blur at first. The sampler goes a part of the way there, and asks "
        "again. σ is the noise per signal. Both are shown as the decoder sees them.</p>",
        f'<img class="wide" src="{page.prefix}film.png" alt="the same, moving">',
        '<div class="row">',
    )
    for i, (step, pair) in enumerate(zip(steps, pairs)):
        tags = [page.image(picture, f"film-{i + 1:03d}-{name}", f"{name} at step {i + 1}")
                for picture, name in zip(pair, ("x", "x0"))]
        page.say(
            f'<figure><div class="pair">{"".join(tags)}</div>'
            f"<figcaption>step {i + 1}: t = {step.t:.0f}, "
            f"σ = {sigma(step):.3g}</figcaption></figure>"
        )
    page.say("</div>")


def sigma(step):
    return math.sqrt(1 / step.a - 1)


def visible(text):
    """Return a text with spaces in the place of all that does not print, such as ESC."""
    return "".join(c if c.isprintable() else " " for c in text)


def words_section(page, film, k, picture, prompt):
    sizes = list(film.steps[0].attention)
    thirds = [part for part in np.array_split(np.arange(len(film.steps)), 3) if len(part)]
    page.say(
        "<h3>What each place listens to</h3><p>In cross-attention every place of the picture "
        "divides its attention among the tokens of the prompt. A row shows where a word was "
        "listened to: first over all steps and resolutions, then at each resolution, then in each "
        "third of the way. Black is none, pale yellow the most in that map; the numbers are "
        "the mean and the largest share. Start and padding take what no word wants.</p>",
        '<div class="scroll"><table><tr><th>word<th>mean',
        *(f"<th>at {h} × {w}" for h, w in sizes),
        *(f"<th>steps {part[0] + 1} to {part[-1] + 1}" for part in thirds),
        "</tr>",
    )
    for n, (word, places) in enumerate(places_of_words(film.model.tokenizer, prompt)):
        maps = {size: np.array([s.attention[size][k, places].sum(0) for s in film.steps])
                for size in sizes}
        whole = np.mean([[enlarge(m, sizes[0]) for m in maps[size]] for size in sizes], axis=0)
        cells = [(whole.mean(0), True), *((maps[size].mean(0), False) for size in sizes),
                 *((whole[part].mean(0), True) for part in thirds)]
        page.say(f"<tr><th>{html.escape(word)}")
        for i, (m, smooth) in enumerate(cells):
            heated = over(picture, m, smooth=smooth)
            tag = page.image(heated, f"word-{n:02d}-{i}", f"attention to {word}")
            page.say(f"<td>{tag}{m.mean():.1%}, {m.max():.1%}")
        page.say("</tr>")
    page.say("</table></div>")


def enlarge(values, size):
    """An array (h, w) at another size (height, width), its mean kept."""
    return np.asarray(
        Image.fromarray(values.astype(np.float32)).resize(size[::-1], Image.Resampling.NEAREST)
    )


def guidance_section(page, steps, k):
    pushes = [np.sqrt(np.square(step.push[k]).sum(-1)) for step in steps]
    lengths, most = [math.sqrt(np.square(p).sum()) for p in pushes], max(p.max() for p in pushes)
    page.say(
        "<h3>What the prompt changes</h3><p>The network answers twice, with the prompt "
        "(ε<sub>c</sub>) and with the negative one (ε<sub>∅</sub>). Guidance exaggerates the "
        "difference. Its length ‖ε<sub>c</sub> − ε<sub>∅</sub>‖, over the channels, shows where "
        "the prompt has something to say at each step; all maps have one scale.</p>",
        page.image(curve(lengths, [f"t = {s.t:.0f}" for s in steps],
                         "length of the difference, over the whole picture"),
                   "guidance", "a curve", True),
        '<div class="row">')
    for i, push in enumerate(pushes, 1):
        tag = page.image(heat(push, most), f"guidance-{i:03d}", f"guidance at step {i}")
        page.say(f"<figure>{tag}<figcaption>step {i}: {lengths[i - 1]:.3g}</figcaption></figure>")
    page.say("</div>")


def latents_section(page, film, k, latents):
    channels, (h, w, _), factor = np.moveaxis(latents, -1, 0), latents.shape, film.model.factor
    page.say(
        "<h3>The latent picture</h3><p>The channels of the result, which the decoder turns into "
        f"the picture: {' × '.join(map(str, latents.shape))} numbers for "
        f"{factor ** 2 * 3 * h * w:,}. Black is −3, white 3; the scale of the model makes their "
        "spread about 1.</p>", '<div class="row">')
    for i, channel in enumerate(channels):
        page.say(f"<figure>{page.image(grey(channel, 3), f'latent-{i}', f'channel {i}')}"
                 f"<figcaption>channel {i}: mean {channel.mean():.2f}, spread "
                 f"{channel.std():.2f}</figcaption></figure>")
    page.say("</div>")


# ── The prompt's tokens and the model's parts ─────────────────────────────────────────────────────


def merging(tokenizer, word):
    """Yield the word's symbols at first and after each merge, in the order of the ranks."""
    learner, known = copy.copy(tokenizer), [None]
    learner.rank = {}
    while known:
        symbols = learner.merge(word)
        yield symbols
        known = [pair for pair in zip(symbols, symbols[1:]) if pair in tokenizer.rank]
        if known:
            pair = min(known, key=tokenizer.rank.get)
            learner.rank[pair] = tokenizer.rank[pair]


def tokens_text(tokenizer, prompt):
    """Return how the prompt is read: bytes, symbols, merges, ids, and what is cut."""
    ids, cut = tokenizer.encode(prompt)
    lines, unknown = [], tokenizer.vocab[tokenizer.EOS]
    for word, symbols in pieces(tokenizer, prompt):
        special = word in (tokenizer.BOS, tokenizer.EOS)
        data = word.encode(errors="replace").hex(" ")
        lines.append(f"  {word}: " + ("a special token" if special else f"bytes {data}"))
        steps = [symbols] if special else merging(tokenizer, word)
        lines += [f"    {'→' if i else ' '} {' '.join(step)}" for i, step in enumerate(steps)]
        lines.append("      " + " ".join(str(tokenizer.vocab.get(s, unknown)) for s in symbols))

    used = 2 + sum(len(symbols) for _, symbols in pieces(tokenizer, prompt))
    filled, end = max(0, len(ids) - used), ids[min(used, len(ids)) - 1]
    return "\n".join(map(visible, [
        "Words to tokens. A line for each merge, in the order in which the tokenizer learnt them; "
        "then the ids.", *lines, "",
        f"The model's {len(ids)} places: {ids[0]} marks the start, {end} the end, and {filled} "
        f"are filled with {tokenizer.pad}.", " ".join(map(str, ids)),
        f"Cut off, because it does not fit: {cut}" if cut else "Nothing is cut off."]))


def part_of(network, name):
    """Return the row of the table for a weight of a network.

    unet, down_blocks.0.resnets.1.conv1.weight is in "unet down_blocks.0.resnets".
    """
    side = re.match(r"(encoder|decoder)\.", name) if network == "vae" else None
    network, name = (f"vae {side[1]}", name[side.end():]) if side else (network, name)
    return (
        network
        + " "
        + re.match(r"(down|up)_blocks\.\d+\.\w+|mid_block\.\w+|encoder\.layers|\w+", name)[0]
    )


def sizes(model, prompt, width, height):
    """Return {part: record of shape, parameters, flops}, in the order in which the parts run.

    What each part gives out, holds and computes in one pass of one picture through each network,
    counted by watching that. flops: the multiplications and additions of all matrix products,
    which are next to everything.
    """
    owner, table, order = {}, {}, []
    for network in ("text_encoder", "unet", "vae"):
        for name, array in tiny_sd.flatten(getattr(model, network)).items():
            owner[id(array)] = part_of(network, name)
            row = table.setdefault(
                part_of(network, name), SimpleNamespace(shape=(), parameters=0, flops=0)
            )
            row.parameters += math.prod(array.shape)

    def count(y, flops, weight=None):
        order.append(order[-1] if weight is None else owner[id(weight)])
        row = table[order[-1]]
        row.flops, row.shape = row.flops + flops, tuple(y.shape)[1:]

    def linear(y, x, weight, bias=None):
        count(y, 2 * math.prod(y.shape) * x.shape[-1], weight)

    def conv2d(y, x, weight, bias=None, **how):
        count(y, 2 * math.prod(y.shape) * math.prod(weight.shape[1:]), weight)

    def attention(y, q, k, v, causal=False):
        count(y, 4 * math.prod(q.shape) * k.shape[-2])

    def group_norm(y, x, groups, eps, weight, bias):
        count(y, 0, weight)

    def layer_norm(y, x, weight, bias):
        count(y, 0, weight)

    x = np.zeros(
        (1, height // model.factor, width // model.factor, model.config.vae.latent_channels),
        np.float32,
    )
    runs = [
        lambda: tiny_sd.denoiser(model, tiny_sd.encode_prompts(model, [prompt]), 1)(x, 500, 0.5),
        lambda: tiny_sd.encode(model, np.zeros((height, width, 3), np.uint8), x),
        lambda: tiny_sd.decode(model, x),
    ]
    with watching(
        linear=linear,
        conv2d=conv2d,
        dot_product_attention=attention,
        group_norm=group_norm,
        layer_norm=layer_norm,
    ):
        for work in tqdm(runs, desc="counting", unit="part", leave=False):
            work()
    return {name: table[name] for name in [*(table.keys() - set(order)), *dict.fromkeys(order)]}


def explain(model, prompt, width, height):
    """Prints how the prompt is read, and what each part of the model gives out, holds and costs."""
    print(tokens_text(model.tokenizer, prompt))
    table = sizes(model, prompt, width, height)
    print(
        f"\nThe parts of {model.name}, for a picture of {width} x {height}: what comes out, the "
        "parameters, and the multiplications and\nadditions of matrix products (linear layers, "
        "convolutions, attention). One step of sampling is the U-Net once, and\ntwice with "
        "guidance; the others run once a picture, the VAE's encoder only to start from a picture."
        "\n"
    )
    print(f"{'part':40}{'what comes out':>16}{'parameters':>14}{'FLOP':>10}")
    for network, rows in itertools.groupby(table.items(), lambda item: item[0].split()[0]):
        rows = list(rows)
        for name, row in [
            *rows,
            (
                f"{network}, all of it",
                SimpleNamespace(
                    shape=(),
                    parameters=sum(r.parameters for _, r in rows),
                    flops=sum(r.flops for _, r in rows),
                ),
            ),
        ]:
            shape = " x ".join(map(str, row.shape))
            print(f"{name:40}{shape:>16}{row.parameters:>14,}{metric(row.flops):>10}")


def metric(n):
    """12 G for 12,000,000,000, nothing for 0."""
    power = 0
    while n >= 1000:
        n, power = n / 1000, power + 1
    return f"{n:.3g} {' kMGTP'[power]}" if n else ""


# ── The pictures of NOTES.md ──────────────────────────────────────────────────────────────────────

PROMPT = "a fox on a light blue background"
SENTENCES = ["red apple", "green apple", "a red apple in the flat style", "cat", "dog", "a dog",
             "cat on a blue background", "dog on a blue background", "rocket", "airplane"]


def last(model, prompt=PROMPT, **settings):
    """Return the one picture that generate() ends with."""
    *_, x = tiny_sd.generate(model, prompt, **settings)
    return decoded(model, x)


def decoded(model, x):
    """Return latents as a picture."""
    return Image.fromarray(tiny_sd.decode(model, x)[0])


def text_picture(model, film, x):
    """How alike the text encoder finds some sentences.

    The cosine of their rows at the end mark, less what all have in common.
    """
    ends = [len(model.tokenizer.tokens(sentence)) + 1 for sentence in SENTENCES]
    rows = tiny_sd.encode_prompts(model, SENTENCES)[np.arange(len(SENTENCES)), ends]
    rows = rows - rows.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cells = [[heat(np.array([[max(0, a @ b)]]), 1) for b in rows] for a in rows]
    return sheet(cells, down=SENTENCES, size=40, gap=2)


def latents_picture(model, film, x):
    """A picture, its latent channels, and what the decoder makes of them."""
    picture = decoded(model, x)
    z = tiny_sd.encode(model, np.asarray(picture), np.zeros_like(x))
    channels = [grey(channel, 3).resize(picture.size, Image.Resampling.NEAREST)
                for channel in np.moveaxis(z[0], -1, 0)]
    titles = ["picture", *(f"channel {i}" for i in range(len(channels))), "decoded"]
    return sheet([[picture, *channels, decoded(model, z)]], titles, size=128)


def time_picture(model, film, x):
    """The embedding of every second time, a column each: the cosines above, the sines below."""
    waves = tiny_sd.timestep_embedding(np.arange(0, 1000, 2.0), 64).T
    picture = grey(waves, 1).resize((500, 192), Image.Resampling.NEAREST)
    return sheet([[picture]], ["t from 0, left, to 1000"], size=500)


def words_picture(model, film, x):
    """The attention to each word of the prompt, over all steps, at the finest resolution."""
    size = max(film.steps[0].attention)
    maps = np.mean([s.attention[size][0] for s in film.steps], axis=0)
    words = places_of_words(model.tokenizer, PROMPT)[1:-1]
    picture = tiny_sd.decode(model, x)[0]
    cells = [over(picture, maps[places].sum(0)) for _, places in words]
    return sheet([cells], [word for word, _ in words], size=128)


def alpha_bar_picture(model, film, x):
    """The schedule: ᾱ, and the amplitudes of picture and noise, over t."""
    alpha_bar = model.alpha_bars
    lines = {"alpha_bar, the fraction of variance that is signal": alpha_bar,
             "its root, the amplitude of the picture": alpha_bar ** 0.5,
             "the amplitude of the noise": (1 - alpha_bar) ** 0.5}
    return plot(lines, "t", (0, 1000), (0, 1), marks={354: "as much noise as picture"})


def noising_picture(model, film, x):
    """Ever more noise on one picture, by the closed form."""
    noise, times = tiny_sd.Noise(1)(*x[0].shape)[None], [0, 100, 200, 350, 500, 700, 999]
    noisy = [tiny_sd.add_noise(x, model.alpha_bars[t], noise) for t in times]
    return sheet([[decoded(model, x_t) for x_t in noisy]], [f"t = {t}" for t in times], size=128)


def film_picture(model, film, x):
    """What a sampler holds and what the network guesses, without prompt and guidance."""
    film = Film()
    *_, x = tiny_sd.generate(model, "", seeds=[3], guidance=1, denoiser=film)
    steps = film.steps[::3]
    rows = [[decoded(model, s.x) for s in steps], [decoded(model, s.x_0) for s in steps]]
    return sheet(rows, [f"t = {s.t:.0f}" for s in steps], ["x_t", "guess"], 128)


def push_picture(model, film, x):
    """The length of the difference that guidance exaggerates."""
    lengths = [float(np.sqrt(np.square(s.push[0]).sum())) for s in film.steps]
    return curve(lengths, [f"t = {s.t:.0f}" for s in film.steps],
                 "length of the difference between the two guesses of the noise")


def guidance_picture(model, film, x):
    """Four seeds without guidance, and with more and more of it."""
    scales = [1, 2, 4, 8, 16]
    rows = [[last(model, "a hot dog", guidance=scale, seeds=[seed]) for scale in scales]
            for seed in range(4)]
    return sheet(rows, [f"{scale:g}" for scale in scales], [f"seed {i}" for i in range(4)], 96)


def samplers_picture(model, film, x):
    """What three samplers draw in few steps and in many."""
    counts, names = [2, 3, 5, 8, 12, 20], ("ddim", "dpm++2m", "euler_a")
    rows = [[last(model, steps=n, sampler=name) for n in counts] for name in names]
    return sheet(rows, [f"{n} steps" for n in counts], names, 96)


def flow_picture(model, film, x):
    """Where pictures are the numbers 1 and -1: the density of x_t, and paths of ddim through it."""
    alpha_bar = 1 / (1 + np.geomspace(14.6, 0.03, 400) ** 2)
    height, top = 240, 2.5
    values = np.linspace(top, -top, height)[:, None]
    variance = 1 - alpha_bar
    density = sum(np.exp(-(values - sign * np.sqrt(alpha_bar)) ** 2 / (2 * variance))
                  for sign in (1, -1)) / np.sqrt(variance)
    page = heat(density ** 0.5, 1.6).resize((800, 480), Image.Resampling.BICUBIC)

    def denoise(x, t, alpha_bar):
        x_0 = np.tanh(x * math.sqrt(alpha_bar) / (1 - alpha_bar))
        return x_0, (x - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)

    starts = np.linspace(-2.1, 2.1, 16)
    steps = [(0, *pair) for pair in itertools.pairwise(alpha_bar.tolist())]
    paths = np.array([starts, *tiny_sd.ddim(denoise, starts, steps)])
    draw = ImageDraw.Draw(page)
    for path in paths.T:
        draw.line([(2 * i, (top - y) / (2 * top) * 480) for i, y in enumerate(path)], "#7fd0ff", 2)
    return with_axes(page, "noise per signal, from sigma = 14.6 to 0.03", (-top, top))


def strength_picture(model, film, x):
    """Image to image, from a fox towards a fox and towards a frog."""
    picture, strengths = np.asarray(last(model, "a fox")), [0.1, 0.3, 0.4, 0.5, 0.6, 0.8]
    same, drawn = ([last(model, prompt, init=picture, strength=strength, seeds=[1])
                    for strength in strengths] for prompt in ("a fox", "a frog"))
    titles = ["start", *(f"{strength:g}" for strength in strengths)]
    start = Image.fromarray(picture)
    return sheet([[start, *same], [start, *drawn]], titles, ["a fox", "a frog"], 96)


def with_axes(picture, x_name, y_range):
    """Return a picture with the range of its vertical axis, and a name under the horizontal one."""
    left, bottom, write = 48, 28, font(13)
    page = Image.new("RGB", (picture.width + left, picture.height + bottom), "white")
    page.paste(picture, (left, 0))
    draw = ImageDraw.Draw(page)
    low, high = y_range
    for y in np.arange(math.ceil(low), math.floor(high) + 1):
        at = (high - y) / (high - low) * picture.height
        draw.text((left - 8, at), f"{y:g}", "black", write, "rm")
        draw.line((left - 5, at, left, at), "black")
    draw.text((left + picture.width / 2, picture.height + bottom / 2), x_name, "black", write, "mm")
    return page


def plot(lines, x_name, x_range, y_range, marks=()):
    """Draw lines {name: values over the x range} with their names, and marks {x: name}."""
    (w, h), write, colours = (640, 300), font(13), ("#b3262e", "#1f5fa8", "#2f7d32")
    page = Image.new("RGB", (w, h), "white")
    draw = ImageDraw.Draw(page)
    (x0, x1), (y0, y1) = x_range, y_range

    def at(x, y):
        return 50 + (x - x0) / (x1 - x0) * (w - 80), h - 45 - (y - y0) / (y1 - y0) * (h - 75)

    for y in np.linspace(y0, y1, 5):
        draw.line((*at(x0, y), *at(x1, y)), "#ddd")
        draw.text((42, at(x0, y)[1]), f"{y:.3g}", "black", write, "rm")
    for x in np.linspace(x0, x1, 6):
        draw.text((at(x, y0)[0], h - 35), f"{x:.4g}", "black", write, "mm")
    draw.text((w / 2, h - 14), x_name, "black", write, "mm")
    for x in marks:
        draw.line((*at(x, y0), *at(x, y1)), "#999")
        draw.text((at(x, y1)[0] + 6, at(x, y1)[1] + 8), f"{x}: {marks[x]}", "#555", write, "lm")
    for i, (name, values) in enumerate(lines.items()):
        xs = np.linspace(x0, x1, len(values))
        draw.line([at(x, y) for x, y in zip(xs, values)], colours[i], 3)
        draw.text((w - 40, 105 + 18 * i), name, colours[i], write, "rm")
    return page


PICTURES = {name.removesuffix("_picture"): draw for name, draw in list(vars().items())
            if name.endswith("_picture")}


def notes(folder=None):
    """Draw the pictures of NOTES.md again, from one seed and the bundled model."""
    folder = folder or Path(__file__).resolve().parent / "pictures"
    model, film = tiny_sd.load(tiny_sd.HERE / "weights" / "emoji"), Film()
    *_, x = tiny_sd.generate(model, PROMPT, denoiser=film)
    folder.mkdir(exist_ok=True)
    for name, draw in tqdm(PICTURES.items(), unit="picture"):
        draw(model, film, x).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    if sys.argv[1:] != ["notes"]:
        sys.exit(__doc__)
    notes()
