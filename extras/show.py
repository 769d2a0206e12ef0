"""What tiny_sd computes on the way to a picture: pictures of every stage, and each part's size.

    python tiny_sd.py "red apple" --show DIR        the picture, and a page about it: DIR/index.html
    python tiny_sd.py "red apple" --explain         how the prompt is read, what each part costs

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
from collections.abc import Callable
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
from extras import prompts
from extras.files import free_names, unfinished_name
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

    steps: for each guess t, alpha_bar = ᾱ_t, x = x_t and x_0 = x̂_0 (batch, h, w, channels), push
    = ε̂_c - ε̂_∅ of the same shape (None without guidance), and attention, see attention_maps.
    UserError if the folder to save to is in use, or cannot be made.
    """

    def __init__(self, folder=None):
        self.folder, self.steps = folder and Path(os.path.abspath(folder)), []
        self.chunks = None      # of extras.prompts, where the prompt is read with weights
        if folder:
            check_folder(folder, self.folder)

    def __call__(self, model, context, *args):
        """Return a denoise() for samplers, which remembers what it sees."""
        self.model = model
        denoise = tiny_sd.denoiser(model, context, *args)
        kind = model.config.scheduler.prediction_type

        def watched(x, t, alpha_bar):
            outputs, maps, calls, n = [], [], itertools.count(), len(x)

            def see_output(y, *_):
                outputs.append(y)

            def see_attention(y, q, k, v, causal=False):
                if next(calls) % 2:     # each transformer block: first the pixels, then the words
                    maps.append(probabilities(q, k).mean(1))

            with watching(map_rows=see_output, dot_product_attention=see_attention):
                x_0, eps = denoise(x, t, alpha_bar)
            push = None
            if len(outputs[-1]) == 2 * n:       # the second half is the prompt's
                together = maps and len(maps[0]) == 2 * n
                maps = [m[n:] for m in maps] if together else maps[len(maps) // 2:]
                uncond, cond = (tiny_sd.split_prediction(kind, half, x, alpha_bar)[1]
                                for half in np.split(outputs[-1], 2))
                push = cond - uncond
            attention = attention_maps(maps, *x.shape[1:3])
            self.steps.append(SimpleNamespace(t=t, alpha_bar=alpha_bar, x=x, x_0=x_0, push=push,
                                              attention=attention))
            return x_0, eps
        return watched

    def save(self, x, prompt, seeds):
        """Write the folder, whole or not at all, and return the path of its page.

        x: the last latents. An empty folder that is there already, perhaps a disk's own, is
        filled. What others put there in the meantime stays, and the page goes beside it.
        """
        fill = self.folder.is_dir()
        with unfinished_name(self.folder, inside=fill) as unfinished:
            unfinished.mkdir()
            write_page(self, x, prompt, seeds, unfinished)
            if fill and list(self.folder.iterdir()) == [unfinished]:
                for file in sorted(unfinished.iterdir(), key=lambda file: file.suffix == ".html"):
                    file.rename(self.folder / file.name)
                return self.folder / "index.html"
            target = put_folder(unfinished, self.folder / "page" if fill else self.folder)
        return target / "index.html"


def put_folder(folder, path):
    """Rename a folder to the first free name of path, path-1, path-2, ...; return that."""
    for target in free_names(path):
        try:
            if not os.path.lexists(target):
                return folder.rename(target)
        except OSError:     # unless the name was taken just now
            if not os.path.lexists(target):
                raise


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


def previewer(path: Path, inside=tiny_sd.denoiser) -> Callable:
    """Return a denoiser that writes x̂_0 to a small PNG at each step.

    UserError if there is such a file already, or comes to be, unless it is a preview too.
    """
    mark = PngInfo()
    mark.add_text("Software", "tiny_sd preview")
    check_preview(path)

    def make(model, *args):
        small = quick_decoder(model)
        denoise = inside(model, *args)

        def watched(x, t, alpha_bar):
            x_0, eps = denoise(x, t, alpha_bar)
            pixels = np.concatenate(small(x_0), axis=1)
            with unfinished_name(path) as unfinished:
                picture = Image.fromarray(np.nan_to_num(pixels).clip(0, 255).astype(np.uint8))
                picture.save(unfinished, "PNG", pnginfo=mark)
                check_preview(path)
                os.replace(unfinished, path)
            return x_0, eps
        return watched
    return make


def check_preview(path):
    """UserError if there is a file that --preview must not replace."""
    require(not os.path.lexists(path) or is_preview(path),
            f"--preview {path} is there already, and no preview: name another file")


def is_preview(path):
    """Is this file one that previewer() wrote?"""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return b"tiny_sd preview" in file.read(99)


def quick_decoder(model):
    """Return a function from latents to pixels: that of a tiny VAE, or a map of single latents.

    The map is the linear one that fits 64 colours best.
    """
    if model.vae_decode is not tiny_sd.vae_decode:
        return functools.partial(tiny_sd.decode, model)
    fit = colour_map(model)
    return lambda x: x @ fit[:-1] + fit[-1]


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
    """Enlarged by the whole factor that brings it nearest to `size` pixels of width."""
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
        """Save a picture; return the tag that shows it."""
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
        if piece in (tokenizer.BOS, tokenizer.EOS):
            found.append((piece, [piece]))
        else:
            found += [(word, tokenizer.merge(word)) for word in tokenizer.words(piece)]
    return found


def places_of_words(tokenizer, prompt):
    """Return [(word, slice of its tokens)]: the start, the words that fit, and the rest."""
    found, end, room = [("(start)", slice(0, 1))], 1, tokenizer.length - 1
    for word, symbols in pieces(tokenizer, prompt):
        if end < room:
            found.append((word, slice(end, min(end + len(symbols), room))))
            end = found[-1][1].stop
    return [*found, ("(end and padding)", slice(end, tokenizer.length))]


def places_in_chunks(tokenizer, chunks, n):
    """Return [(word, its places)] of extras.prompts' chunks in a context of n tokens.

    It holds the chunks one or more times. A word has its weight beside it.
    """
    length, words, used = tokenizer.length, [], []
    for start, chunk in zip(range(0, n, length), chunks):
        ended = True
        for place, (i, weight) in enumerate(chunk, start + 1):
            symbol = tokenizer.symbol[i]
            if ended and symbol:        # all but the first vector of a learnt word have none
                words.append(([], [], weight))
            words[-1][0].append(i)
            words[-1][1].append(place)
            ended = not symbol or symbol.endswith("</w>")
        used += [start, *range(start + 1, start + 1 + len(chunk))]

    whole = length * len(chunks)
    found = [("(start)", range(0, whole, length))]
    found += [(tokenizer.decode(ids) + f" × {weight:.3g}" * (weight != 1), places)
              for ids, places, weight in words]
    found.append(("(end and padding)", sorted({*range(whole)} - {*used})))
    return [(word, np.add.outer(range(0, n, whole), [*places]).reshape(-1).astype(int))
            for word, places in found]


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
        "again. σ is the noise-to-signal ratio. Both are shown as the decoder sees them.</p>",
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
    return math.sqrt(1 / step.alpha_bar - 1)


def visible(text):
    """Return a text with spaces in the place of all that does not print, such as ESC."""
    return "".join(c if c.isprintable() else " " for c in text)


def words_section(page, film, k, picture, prompt):
    sizes = list(film.steps[0].attention)
    thirds = [part for part in np.array_split(np.arange(len(film.steps)), 3) if len(part)]
    page.say(
        "<h3>What each pixel listens to</h3><p>In cross-attention every pixel of the latents "
        "divides its attention among the tokens of the prompt. A row shows where a word was "
        "listened to: first over all steps and resolutions, then at each resolution, then in each "
        "third of the way. Black is none, pale yellow the most in that map; the numbers are "
        "the mean and the largest share. Start and padding take what no word wants.</p>",
        '<div class="scroll"><table><tr><th>word<th>mean',
        *(f"<th>at {h} × {w}" for h, w in sizes),
        *(f"<th>steps {part[0] + 1} to {part[-1] + 1}" for part in thirds),
        "</tr>",
    )
    tokens = film.steps[0].attention[sizes[0]].shape[1]
    words = (places_in_chunks(film.model.tokenizer, film.chunks, tokens) if film.chunks
             else places_of_words(film.model.tokenizer, prompt))
    for n, (word, places) in enumerate(words):
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


def tokens_text(tokenizer, prompt, weighted=False):
    """Return how the prompt is read: bytes, symbols, merges, ids, and what is cut."""
    words = prompt
    if weighted:
        words = " ".join(part[0] for part in prompts.weighted_parts(prompt)
                         if part != prompts.BREAK)
    lines, unknown = [], tokenizer.vocab[tokenizer.EOS]
    for word, symbols in pieces(tokenizer, words):
        special = word in (tokenizer.BOS, tokenizer.EOS)
        data = word.encode(errors="replace").hex(" ")
        lines.append(f"  {word}: " + ("a special token" if special else f"bytes {data}"))
        steps = [symbols] if special else merging(tokenizer, word)
        lines += [f"    {'→' if i else ' '} {' '.join(step)}" for i, step in enumerate(steps)]
        lines.append("      " + " ".join(str(tokenizer.vocab.get(s, unknown)) for s in symbols))

    places = chunks_lines if weighted else places_lines
    return "\n".join(map(visible, [
        "Words to tokens. A line for each merge, in the order in which the tokenizer learnt them; "
        "then the ids.", *lines, "", *places(tokenizer, prompt)]))


def places_lines(tokenizer, prompt):
    """Return lines on the ids of a prompt that is taken literally, and on what is cut."""
    ids, cut = tokenizer.encode(prompt)
    used = 2 + sum(len(symbols) for _, symbols in pieces(tokenizer, prompt))
    filled, end = max(0, len(ids) - used), ids[min(used, len(ids)) - 1]
    return [f"The model's {len(ids)} places: {ids[0]} marks the start, {end} the end, and {filled} "
            f"are filled with {tokenizer.pad}.", " ".join(map(str, ids)),
            f"Cut off, because it does not fit: {cut}" if cut else "Nothing is cut off."]


def chunks_lines(tokenizer, prompt):
    """Return lines on the chunks of a prompt that has weights: words with these, and ids."""
    chunks = prompts.chunks_of(tokenizer, prompt)
    lines = [f"The text encoder reads {len(chunks)} chunk{'s' * (len(chunks) > 1)} of up to "
             f"{tokenizer.length - 2} tokens, one by one, each with its start, end and padding:"]
    for chunk in chunks:
        words = places_in_chunks(tokenizer, [chunk], tokenizer.length)[1:-1]
        lines += ["  " + ", ".join(word for word, _ in words),
                  "    " + " ".join(str(i) for i, _ in chunk)]
    return lines


def part_of(network, name):
    """Return the row of the table for a weight of a network.

    unet, down_blocks.0.resnets.1.conv1.weight is in "unet down_blocks.0.resnets".
    """
    side = re.match(r"(encoder|decoder)\.", name) if network == "vae" else None
    network, name = (f"vae {side[1]}", name[side.end():]) if side else (network, name)
    part = re.match(r"(down|up)_blocks\.\d+\.\w+|mid_block\.\w+|encoder\.layers|\w+", name)[0]
    return f"{network} {part}"


def sizes(model: tiny_sd.Model, prompt: str, width: int, height: int) -> dict:
    """Return {part: record of shape, parameters, flops}, in the order in which the parts run.

    What each part gives out, holds and computes in one pass of one picture through each network,
    counted by watching that. flops: the multiplications and additions of all matrix products,
    which are next to everything.
    """
    owner, table, order = {}, {}, []
    networks = {"text_encoder": model.text_encoder}
    if model.second:
        tail = {name: part for name, part in vars(model.second).items() if isinstance(part, dict)}
        networks["text_encoder_2"] = tail.pop("text_encoder") | tail
    for network, weights in (networks | {"unet": model.unet, "vae": model.vae}).items():
        for name, array in tiny_sd.flatten(weights).items():
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

    def step():
        context, pooled = tiny_sd.embed_prompts(model, [prompt])
        tiny_sd.denoiser(model, context, 1, pooled)(x, 500, 0.5)

    runs = [
        step,
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
    names = [*(table.keys() - set(order)), *dict.fromkeys(order)]
    return {name: table[name] for name in sorted(names, key=lambda name: name.split()[0])}


def explain(model: tiny_sd.Model, prompt: str, width: int, height: int, weighted=False):
    """Print how the prompt is read, and what each part of the model gives out, holds and costs.

    weighted: whether that is by extras.prompts.
    """
    print(tokens_text(model.tokenizer, prompt, weighted))
    table = sizes(model, "" if weighted else prompt, width, height)
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
        total = SimpleNamespace(shape=(), parameters=sum(row.parameters for _, row in rows),
                                flops=sum(row.flops for _, row in rows))
        for name, row in [*rows, (f"{network}, all of it", total)]:
            shape = " x ".join(map(str, row.shape))
            print(f"{name:40}{shape:>16}{row.parameters:>14,}{metric(row.flops):>10}")


def metric(n):
    """12 G for 12,000,000,000, nothing for 0."""
    power = 0
    while n >= 1000:
        n, power = n / 1000, power + 1
    return f"{n:.3g} {' kMGTP'[power]}" if n else ""
