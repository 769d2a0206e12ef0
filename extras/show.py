"""Show what tiny_sd computes on the way to a picture.

    python tiny_sd.py "red apple" --show DIR        the picture, and a page about it: DIR/index.html

This is also an example of tiny_sd as a library: it passes generate() a denoiser that calls
tiny_sd's and records the results, and it wraps the functions that it watches meanwhile.
"""

import contextlib
import functools
import html
import inspect
import math
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from string import Template
from threading import get_ident
from types import SimpleNamespace
from unittest import mock

# isort: split      (first of all fast: it sets up BLAS before NumPy is loaded)
from extras import fast  # noqa: F401

# isort: split
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import tiny_sd
from extras import like_diffusers
from extras.files import check_folder_of, put_folder, settle, unfinished_name
from tiny_sd import require

# ── Watching ────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def watching(module=tiny_sd, **watchers):
    """Within this context, call f(result, *args) after each call of a module's function `name`.

    watchers: name=f.
    """
    def watched(function, watcher):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            watcher(result, *args, **kwargs)
            return result
        return wrapped

    wrapped = {name: watched(getattr(module, name), f) for name, f in watchers.items()}
    with mock.patch.multiple(module, **wrapped):
        yield


def counting(tell):
    """Within this context, call tell(flops, result, weight) after each operation with a weight.

    Also after attention, with weight None. flops: the multiplications and additions in its matrix
    products, which are nearly all there are.
    """
    def product(y, x, weight, *_, **__):
        tell(2 * math.prod(y.shape) * math.prod(weight.shape[1:]), y, weight)

    def norm(y, *_, weight, **__):
        tell(0, y, weight)

    def attention(y, q, k, *_, **__):
        tell(4 * math.prod(q.shape) * k.shape[-2], y, None)

    return watching(linear=product, conv2d=product, group_norm=norm, layer_norm=norm,
                    dot_product_attention=attention)


def probabilities(q, k):
    """Return softmax(q kᵀ / √d) (batch, heads, queries, keys)."""
    q, k = tiny_sd.to_numpy(q), tiny_sd.to_numpy(k)
    return tiny_sd.softmax.formula(q @ k.mT / math.sqrt(q.shape[-1]))


def attention_maps(maps, height, width):
    """Return {(h', w'): (batch, tokens, h', w')}: how much each pixel attends to each token.

    maps: one per layer, (batch, pixels, tokens), for latents of height x width. Maps of the same
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


def check_folder(folder, path):
    """UserError unless --show can write a page to this folder; path: the same, absolute."""
    if path.exists():
        empty = path.is_dir() and not any(path.iterdir())
        require(empty, f"--show {folder} exists already: name a new folder, or an empty one")
        require(os.access(path, os.W_OK), f"--show {folder} cannot be written to")
    else:
        check_folder_of(path, f"--show {folder} cannot be created: ")


class Film:
    """Record what a run computes at each step. Pass it to generate() as make_denoiser, then save().

    steps: one record for each call of the denoiser: t, alpha_bar = ᾱ_t, x = x_t, x_0 = x̂_0 (batch,
    h, w, channels), push = ε̂_c - ε̂_∅ of that shape (None without guidance), and attention (see
    attention_maps). UserError if the folder to save to is not empty, or cannot be created.
    """

    def __init__(self, folder=None):
        self.folder, self.steps = folder and Path(os.path.abspath(folder)), []
        if folder:
            check_folder(folder, self.folder)

    def __call__(self, model, context, *args):
        """Return a denoise() for samplers that records each step."""
        self.model, kind = model, model.config.scheduler.prediction_type
        denoise = like_diffusers.denoiser(model, context, *args)
        prompt = tiny_sd.to_numpy(context[-1])

        def watched(x, t, alpha_bar):
            heard, answers, n = defaultdict(list), {}, len(x)      # by thread: each context has one

            def see_attention(y, q, k, *_, **__):
                maps = heard[get_ident()]       # a block's second attention is to the words
                maps.append(probabilities(q, k).mean(1) if len(maps) % 2 else None)

            def see_output(y, _model, _x, _t, contexts, *_):
                maps = heard.pop(get_ident(), [])[1::2]
                for i in range(0, len(y), n):       # torch computes both contexts in one batch
                    with_prompt = np.array_equal(tiny_sd.to_numpy(contexts[i]), prompt)
                    _, eps = tiny_sd.split_prediction(kind, y[i:i + n], x, alpha_bar)
                    answers[with_prompt] = eps, [m[i:i + n] for m in maps]

            with watching(predict=see_output, dot_product_attention=see_attention):
                x_0, eps = denoise(x, t, alpha_bar)
            cond, maps = answers[True]
            push = None
            if len(context) == 2:
                uncond, _ = answers.get(False, answers[True])   # the prompts may be the same
                push = cond - uncond
            self.steps.append(SimpleNamespace(
                t=t, alpha_bar=alpha_bar, x=x, x_0=x_0, push=push,
                attention=attention_maps(maps, *x.shape[1:3])))
            return x_0, eps
        return watched

    def save(self, x, prompt, chunks, seeds):
        """Write the folder, completely or not at all, and return the path of its page.

        x: the last latents. chunks: the prompt's, from prompts.chunks_of. An existing empty folder,
        such as a mounted disk, is filled. If it is no longer empty by then, its files stay and the
        page goes into a new folder in it.
        """
        fill = self.folder.is_dir()
        with unfinished_name(self.folder, inside=fill) as unfinished:
            unfinished.mkdir()
            write_page(self, x, prompt, chunks, seeds, unfinished)
            settle(unfinished)
            if fill and list(self.folder.iterdir()) == [unfinished]:
                for file in sorted(unfinished.iterdir(), key=lambda file: file.suffix == ".html"):
                    file.rename(self.folder / file.name)
                return self.folder / "index.html"
            target = put_folder(unfinished, self.folder / "page" if fill else self.folder)
        return target / "index.html"


def seeing(viewer_of, inside=like_diffusers.denoiser) -> Callable:
    """Return make_denoiser for denoisers that pass each guess x̂_0 to viewer_of(model)."""
    def make(model, *args, **settings):
        see, denoise = viewer_of(model), inside(model, *args, **settings)

        def watched(x, t, alpha_bar):
            x_0, eps = denoise(x, t, alpha_bar)
            see(x_0)
            return x_0, eps
        return watched
    return make


def as_pixels(picture):
    """Clip and round a picture of floats to uint8."""
    return np.nan_to_num(picture).clip(0, 255).round().astype(np.uint8)


def colour_map(model):
    """Fit a matrix (channels + 1, 3) that maps latents, and a 1, to their colours."""
    colours, size = np.random.default_rng(0).integers(0, 256, (8, 8, 3)), 2 * model.factor
    latents = tiny_sd.encode(model, np.kron(colours, np.ones((size, size, 1))), np.float32(0))
    latents = latents.reshape(8, 2, 8, 2, -1).mean((1, 3)).reshape(64, -1)
    fit, *_ = np.linalg.lstsq(np.c_[latents, np.ones(64)], colours.reshape(64, 3), rcond=None)
    return fit


def quick_decoder(model):
    """Return a fast function from latents to pixels: a tiny VAE, or else the linear colour_map."""
    if inspect.unwrap(model.vae_decode) is not tiny_sd.vae_decode:
        return functools.partial(tiny_sd.decode, model)
    fit = colour_map(model)
    return lambda x: x @ fit[:-1] + fit[-1]


def check_preview(path):
    """UserError if --preview would replace a file that it did not write."""
    ours = not os.path.lexists(path)
    if path.is_file():
        with open(path, "rb") as file:
            ours = b"Software\0tiny_sd preview" in file.read(99)
    require(ours, f"--preview {path} exists already and is not a preview: name another file")


def previewer(path: Path, inside=like_diffusers.denoiser) -> Callable:
    """Return make_denoiser for denoisers that write x̂_0 to a PNG, quickly decoded and smoothed.

    UserError if the file exists, or appears meanwhile, and is not a preview.
    """
    mark = PngInfo()
    mark.add_text("Software", "tiny_sd preview")
    check_preview(path)

    def viewer(model):
        small = quick_decoder(model)

        def see(x_0):
            picture = Image.fromarray(as_pixels(np.concatenate(small(x_0), axis=1)))
            scale = model.factor * x_0.shape[1] // picture.height   # 1 with a tiny VAE
            picture = ImageOps.scale(picture, scale, Image.Resampling.BICUBIC)
            with unfinished_name(path) as unfinished:
                picture.save(unfinished, "PNG", pnginfo=mark)
                check_preview(path)
                os.replace(unfinished, path)
        return see
    return seeing(viewer, inside)


def recorder(frames: list, inside=like_diffusers.denoiser) -> Callable:
    """Return make_denoiser for denoisers that append each guess x̂_0, decoded, to frames."""
    def viewer(model):
        return lambda x_0: frames.append(np.concatenate(tiny_sd.decode(model, x_0), axis=1))
    return seeing(viewer, inside)


# ── Drawing, with Pillow alone ──────────────────────────────────────────────────────────────────

HEAT = np.array([(0, 0, 0), (80, 20, 110), (190, 55, 85), (250, 145, 20), (255, 255, 170)])


def heat(values, most=None):
    """Draw an array (h, w) of values from 0 (black) to `most` (pale yellow)."""
    v = np.clip(values / (most or values.max() or 1), 0, 1)
    colours = np.stack([np.interp(v, np.linspace(0, 1, 5), c) for c in HEAT.T], -1)
    return Image.fromarray(colours.round().astype(np.uint8))


def grey(values, most):
    """Draw an array (h, w) of values from -most (black) to most (white)."""
    pixels = (np.clip(values / most / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB")


def over(picture, values, most=None, smooth=True):
    """Draw a heat map of values (h, w) over a picture (height, width, 3)."""
    picture = Image.fromarray(picture)
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    values = np.asarray(Image.fromarray(values.astype(np.float32)).resize(picture.size, how))
    return Image.blend(picture.convert("L").convert("RGB"), heat(values, most), 0.65)


def enlarged(picture, size):
    """Enlarge a picture by the integer that brings its width closest to size."""
    n = max(1, round(size / picture.width))
    return picture.resize((n * picture.width, n * picture.height), Image.Resampling.NEAREST)


def sheet(rows, across=(), down=(), size=96, gap=4):
    """Join rows of equally large pictures into one, with labels above columns and before rows."""
    rows = [[enlarged(cell, size) for cell in row] for row in rows]
    write, (w, h) = ImageFont.load_default(13), rows[0][0].size
    left = max([0, *(math.ceil(write.getlength(word)) + 12 for word in down)])
    top = 22 * bool(across)
    whole = left + len(rows[0]) * (w + gap) - gap, top + len(rows) * (h + gap) - gap
    page = Image.new("RGB", whole, "white")
    draw = ImageDraw.Draw(page)
    for i, word in enumerate(across):
        draw.text((left + i * (w + gap) + w / 2, 10), word, "black", write, "mm")
    for i, word in enumerate(down):
        draw.text((left - 8, top + i * (h + gap) + h / 2), word, "black", write, "rm")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            page.paste(cell, (left + j * (w + gap), top + i * (h + gap)))
    return page


# ── Maps of attention and guidance ──────────────────────────────────────────────────────────────


def positions_of_words(tokenizer, chunks, n):
    """Return [(word, its positions)] in a context of n tokens, from (start) to (end and padding).

    chunks: from extras.prompts; the context has them one or more times. A word's weight follows it,
    unless it is 1.
    """
    length, words, used = tokenizer.length, [], []
    specials = tokenizer.BOS, tokenizer.EOS, ""     # "": all but the first vector of a learnt word
    for start, chunk in zip(range(0, n, length), chunks):
        ended = True
        for position, (i, weight) in enumerate(chunk, start + 1):
            symbol = tokenizer.symbol[i]
            if ended and symbol or not words:
                words.append(([], [], weight))
            words[-1][0].append(i)
            words[-1][1].append(position)
            ended = symbol in specials or symbol.endswith("</w>")
        used += range(start, start + 1 + len(chunk))

    whole = length * len(chunks)
    found = [("(start)", range(0, whole, length))]
    found += [(tokenizer.decode(ids) + f" × {weight:.3g}" * (weight != 1), positions)
              for ids, positions, weight in words]
    found.append(("(end and padding)", sorted({*range(whole)} - {*used})))
    return [(word, np.add.outer(range(0, n, whole), [*positions]).reshape(-1).astype(int))
            for word, positions in found]


def enlarge(values, size):
    """Resize an array (h, w) to (height, width), keeping its mean."""
    picture = Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.NEAREST))


def word_maps(steps, positions, k):
    """Return {resolution: (steps, h, w)}, the attention to a word in picture k, and their mean.

    The mean over the resolutions has the size of the largest.
    """
    sizes = list(steps[0].attention)
    maps = {size: np.array([step.attention[size][k, positions].sum(0) for step in steps])
            for size in sizes}
    return maps, np.mean([[enlarge(m, sizes[0]) for m in maps[size]] for size in sizes], axis=0)


def push_maps(steps, k):
    """Return (steps, h, w): how much guidance changes picture k, as a norm over the channels.

    It is 0 at steps without guidance.
    """
    pushes = [0 * step.x if step.push is None else step.push for step in steps]
    return np.array([np.sqrt(np.square(push[k]).sum(-1)) for push in pushes])


def push_lengths(steps, k):
    """Return (steps,): how much guidance changes the whole picture, as a norm."""
    return np.sqrt(np.square(push_maps(steps, k)).sum((1, 2)))


def sigma(step):
    """Return the noise-to-signal ratio of a step; finite even for pure noise."""
    return tiny_sd.sigma_of(max(step.alpha_bar, 2 ** -24))


# ── The page of one run ─────────────────────────────────────────────────────────────────────────


class Page:
    """An HTML page with its pictures, written to a folder."""

    def __init__(self, folder):
        self.folder, self.body, self.prefix = folder, [], ""

    def say(self, *lines):
        """Add lines of HTML."""
        self.body += lines

    def image(self, picture, name, words):
        """Save a picture; return its HTML tag."""
        path = self.folder / f"{self.prefix}{name}.png"
        picture.save(path)
        return f'<img src="{path.name}" alt="{html.escape(words)}">'

    def figures(self, pictures):
        """Show [(picture, name, caption)] side by side."""
        self.say('<div class="row">')
        for picture, name, caption in pictures:
            self.say(f"<figure>{self.image(picture, name, caption)}"
                     f"<figcaption>{caption}</figcaption></figure>")
        self.say("</div>")

    def write(self, title, width, rendering):
        """Write index.html, with pictures of this width in CSS pixels."""
        page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
        text = page.substitute(title=html.escape(title), width=width, rendering=rendering,
                               body="\n".join(self.body))
        (self.folder / "index.html").write_text(text, encoding="utf-8")


def film_section(page, steps, pairs, result):
    """Show x_t and the guess at each step, and an animation of them."""
    frames = [sheet([pair], size=128) for pair in [*pairs, (result, result)]]
    frames[0].save(page.folder / f"{page.prefix}film.png", save_all=True, loop=0,
                   append_images=frames[1:], duration=[300] * len(pairs) + [2000])
    page.say(
        "<h3>The film</h3><p>At each step the program has a noisy x<sub>t</sub> (left). From it "
        "the network guesses the clean picture x̂<sub>0</sub> (right): the mean of all pictures "
        "that the noise could hide, a blur at first. The sampler goes part of the way there and "
        "calls the network again. σ is the noise-to-signal ratio. Both pictures are decoded.</p>",
        f'<img class="wide" src="{page.prefix}film.png" alt="the same, animated">',
        '<div class="row">')
    for i, (step, pair) in enumerate(zip(steps, pairs), 1):
        tags = [page.image(picture, f"film-{i:03d}-{name}", f"{name} at step {i}")
                for picture, name in zip(pair, ("x", "x0"))]
        page.say(f'<figure><div class="pair">{"".join(tags)}</div><figcaption>step {i}: '
                 f"t = {step.t:.0f}, σ = {sigma(step):.3g}</figcaption></figure>")
    page.say("</div>")


def words_section(page, film, k, picture, chunks):
    """Show the attention to each word: in total, per resolution, and per third of the steps."""
    sizes = list(film.steps[0].attention)
    thirds = [part for part in np.array_split(np.arange(len(film.steps)), 3) if len(part)]
    page.say(
        "<h3>What each pixel attends to</h3><p>In cross-attention every pixel of the latents "
        "divides its attention among the tokens of the prompt. Each row shows which pixels attend "
        "to a word: over all steps and resolutions, then at each resolution, then in each third of "
        "the steps. Black is none, pale yellow the maximum of that map; the numbers are the mean "
        "and the largest share. Attention that no word attracts goes to start and padding.</p>",
        '<div class="scroll"><table><tr><th>word<th>mean',
        *(f"<th>at {h} × {w}" for h, w in sizes),
        *(f"<th>steps {part[0] + 1} to {part[-1] + 1}" for part in thirds), "</tr>")
    tokenizer, tokens = film.model.encoders[0].tokenizer, film.steps[0].attention[sizes[0]].shape[1]
    for n, (word, positions) in enumerate(positions_of_words(tokenizer, chunks, tokens)):
        maps, mean = word_maps(film.steps, positions, k)
        cells = [(mean.mean(0), True), *((maps[size].mean(0), False) for size in sizes),
                 *((mean[part].mean(0), True) for part in thirds)]
        page.say(f"<tr><th>{html.escape(word)}")
        for i, (m, smooth) in enumerate(cells):
            tag = page.image(over(picture, m, smooth=smooth), f"word-{n:02d}-{i}",
                             f"attention to {word}")
            page.say(f"<td>{tag}{m.mean():.1%}, {m.max():.1%}")
        page.say("</tr>")
    page.say("</table></div>")


def curve(values, names):
    """Return an SVG plot of values, starting at 0, with names under some points."""
    top, every = max(values) or 1, -(-len(values) // 10)
    points = [(60 + 550 * i / max(1, len(values) - 1), 160 - 140 * v / top)
              for i, v in enumerate(values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    text = [(x, 184, "middle", name) for (x, _), name in [*zip(points, names)][::every]]
    text += [(52, 165, "end", "0"), (52, 25, "end", f"{top:.3g}")]
    return ('<svg viewBox="0 0 640 200" class="curve"><path d="M60 20H610M60 160H610" '
            f'stroke="#8888"/><polyline points="{line}" fill="none" stroke="#b3262e" '
            'stroke-width="3"/>' + "".join(
                f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{word}</text>'
                for x, y, anchor, word in text) + "</svg>")


def guidance_section(page, steps, k):
    """Show where, and how much, the prompt changes the output at each step."""
    pushes = push_maps(steps, k)
    lengths = push_lengths(steps, k)
    page.say(
        "<h3>What the prompt changes</h3><p>The network runs twice, with the prompt "
        "(ε<sub>c</sub>) and with the negative one (ε<sub>∅</sub>). Guidance exaggerates the "
        "difference. Its norm ‖ε<sub>c</sub> − ε<sub>∅</sub>‖ over the channels shows where the "
        "prompt matters at each step; all maps have the same scale. The curve is the norm over the "
        "whole picture.</p>", curve(lengths, [f"t = {s.t:.0f}" for s in steps]))
    page.figures((heat(push, pushes.max()), f"guidance-{i:03d}", f"step {i}: {length:.3g}")
                 for i, (push, length) in enumerate(zip(pushes, lengths), 1))


def latents_section(page, film, k, latents):
    """Show the channels of the latents."""
    h, w, n = latents.shape
    page.say(
        "<h3>The latents</h3><p>The channels of the result, which the decoder turns into the "
        f"picture: {h} × {w} × {n} numbers become {film.model.factor ** 2 * 3 * h * w:,}. Black is "
        "−3, white 3; latents are scaled to a standard deviation of about 1.</p>")
    channels = np.moveaxis(latents, -1, 0)
    page.figures((grey(channel, 3), f"latent-{i}",
                  f"channel {i}: mean {channel.mean():.2f}, spread {channel.std():.2f}")
                 for i, channel in enumerate(channels))


def write_page(film, x, prompt, chunks, seeds, folder):
    """Write index.html and its pictures, with a section for each seed."""
    page, final = Page(folder), tiny_sd.decode(film.model, x)
    decoded = [[tiny_sd.decode(film.model, latents) for latents in (s.x, s.x_0)]
               for s in tqdm(film.steps, desc="pictures", unit="step")]
    page.say(f"<h1>{html.escape(prompt) or '(no prompt)'}</h1>",
             f"<p>Drawn in {len(film.steps)} steps by tiny_sd {tiny_sd.__version__} with the model "
             f"{html.escape(film.model.name)}. NOTES.md explains the mathematics.</p>")
    for k, seed in enumerate(seeds):
        page.prefix = f"{seed}-" if len(seeds) > 1 else ""
        page.say(f"<h2>Seed {seed}</h2>",
                 page.image(Image.fromarray(final[k]), "picture", prompt))
        pairs = [[Image.fromarray(pictures[k]) for pictures in pair] for pair in decoded]
        film_section(page, film.steps, pairs, Image.fromarray(final[k]))
        if film.steps[0].attention:
            words_section(page, film, k, final[k], chunks)
        if any(step.push is not None for step in film.steps):
            guidance_section(page, film.steps, k)
        latents_section(page, film, k, x[k])
    small = final.shape[2] < 256
    page.write(prompt or "tiny_sd", width=128 if small else 192,
               rendering="pixelated" if small else "auto")
