"""The pictures of NOTES.md.

    python -m extras.figures            draws them again, in two minutes

From one seed and the bundled model; two of them from small trainings of their own, which need
torch.
"""

import argparse
import dataclasses
import io
import itertools
import json
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import tiny_sd
from extras import like_diffusers
from extras.checks import conv_shapes, text_shapes, unet_shapes, vae_shapes
from extras.show import Film, font, grey, heat, one_chunk, over, positions_of_words, sheet

BUNDLED = tiny_sd.HERE / "weights" / "emoji"
PROMPT = "a fox on a light blue background"
SENTENCES = ["red apple", "green apple", "a red apple in the flat style", "cat", "dog", "a dog",
             "cat on a blue background", "dog on a blue background", "rocket", "airplane"]


def last(model, prompt=PROMPT, **settings):
    """Return the one picture that generate() ends with."""
    *_, x = like_diffusers.generate(model, prompt, **settings)
    return decoded(model, x)


def decoded(model, x):
    """Return latents as a picture."""
    return Image.fromarray(tiny_sd.decode(model, x)[0])


def text_picture(model, film, x):
    """How alike the text encoder finds some sentences.

    The cosine of their rows at the end mark, less what all have in common.
    """
    ends = [len(model.encoders[0].tokenizer.tokens(sentence)) + 1 for sentence in SENTENCES]
    rows = tiny_sd.embed_prompts(model, SENTENCES)[0][np.arange(len(SENTENCES)), ends]
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
    tokenizer = model.encoders[0].tokenizer
    chunks = one_chunk(tokenizer, PROMPT)
    words = positions_of_words(tokenizer, chunks, tokenizer.length)[1:-1]
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
    noise, times = like_diffusers.Noise(1)(*x[0].shape)[None], [0, 100, 200, 350, 500, 700, 999]
    noisy = [tiny_sd.add_noise(x, model.alpha_bars[t], noise) for t in times]
    return sheet([[decoded(model, x_t) for x_t in noisy]], [f"t = {t}" for t in times], size=128)


def film_picture(model, film, x):
    """What a sampler holds and what the network guesses, without prompt and guidance."""
    film = Film()
    *_, x = like_diffusers.generate(model, "", seeds=[3], guidance=1, make_denoiser=film)
    steps = film.steps[::3]
    rows = [[decoded(model, s.x) for s in steps], [decoded(model, s.x_0) for s in steps]]
    return sheet(rows, [f"t = {s.t:.0f}" for s in steps], ["x_t", "guess"], 128)


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
    return with_axes(page, "noise-to-signal ratio, from sigma = 14.6 to 0.03", (-top, top))


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


def plot(lines, x_name, x_range, y_range, marks=(), ticks=6,
         colours=("#b3262e", "#1f5fa8", "#2f7d32")):
    """Draw lines {name: values over the x range} with their names, and marks {x: name}."""
    (w, h), write = (640, 300), font(13)
    page = Image.new("RGB", (w, h), "white")
    draw = ImageDraw.Draw(page)
    (x0, x1), (y0, y1) = x_range, y_range

    def at(x, y):
        return 50 + (x - x0) / (x1 - x0) * (w - 80), h - 45 - (y - y0) / (y1 - y0) * (h - 75)

    for y in np.linspace(y0, y1, 5):
        draw.line((*at(x0, y), *at(x1, y)), "#ddd")
        draw.text((42, at(x0, y)[1]), f"{y:.3g}", "black", write, "rm")
    for x in np.linspace(x0, x1, ticks):
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


# ── Two small trainings, on 24 drawings in each of six styles ─────────────────────────────────────

DRAWINGS = tiny_sd.HERE / "tests" / "emoji.zip"
STYLES = ["blob", "shaded", "flat", "twemoji", "firefox", "noto"]
CLIP_STEPS, UNET_STEPS = 400, 480
PAIRS = ["cat", "dog", "car", "tractor", "rocket", "airplane", "red apple", "rose"]


def drawings(style):
    """Return {name: picture (64, 64, 3)} of the things drawn in a style, on white."""
    pictures = {}
    with zipfile.ZipFile(DRAWINGS) as archive:
        for i, (name, *_) in enumerate(json.loads(archive.read("things.json"))):
            drawing = Image.open(io.BytesIO(archive.read(f"{i:04d}-{style}.png"))).convert("RGBA")
            page = Image.new("RGBA", drawing.size, "white")
            page.alpha_composite(drawing)
            pictures[name] = np.asarray(page.convert("RGB"))
    return pictures


def article(name):
    """Return a or an."""
    return "an" if name[0] in "aeiou" else "a"


def encoded(model, pictures):
    """Return the scaled latents (n, h, w, 4) of some pictures, as a tensor."""
    import torch
    zeros = np.zeros((1, 16, 16, 4), np.float32)
    return torch.from_numpy(np.concatenate([tiny_sd.encode(model, p, zeros) for p in pictures]))


def new_network(shapes, seed=0):
    """Return a network with random weights, in torch: norms 1, biases 0, outputs of variance 1."""
    rng, arrays = np.random.default_rng(seed), {}
    for name, shape in tiny_sd.flatten(shapes).items():
        if len(shape) == 1:
            array = np.full(shape, "norm" in name and name.endswith("weight"), np.float32)
        else:
            array = rng.standard_normal(shape, np.float32) / math.sqrt(math.prod(shape[1:]))
        arrays[name] = tiny_sd.to_backend(array, "torch")
    return tiny_sd.nest(arrays)


def encoder_pair(vocabulary, width=64):
    """Return a text encoder for captions and an image encoder for latents, both untrained."""
    text = SimpleNamespace(vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width,
                           num_hidden_layers=2, max_position_embeddings=32)
    image = SimpleNamespace(block_out_channels=[16, 32], layers_per_block=1, in_channels=4,
                            out_channels=4, latent_channels=width // 2)
    encoder = vae_shapes(image)["encoder"] | {"conv_in": conv_shapes(4, 16)}
    return new_network(text_shapes(text)), new_network(encoder)


def text_vectors(ids, ends, text):
    """Return the rows of some captions at their end marks, scaled to length 1."""
    h = tiny_sd.text_encoder(ids, 4, tiny_sd.quick_gelu, **text)[range(len(ids)), ends]
    return h / h.norm(dim=1, keepdim=True)


def image_vectors(latents, image):
    """Return the means of what the image encoder finds in some latents, scaled to length 1."""
    h = tiny_sd.vae_encoder(latents, 4, **image).mean((1, 2))
    return h / h.norm(dim=1, keepdim=True)


def clip_scores(model):
    """Train two encoders; return how alike they find captions and drawings, before and after.

    Two arrays (24, 24) of u_i · w_j, for drawings in the last style, which training leaves out.
    """
    import torch
    latents = torch.stack([encoded(model, drawings(style).values()) for style in STYLES])
    captions = [f"{article(name)} {name}" for name in drawings("noto")]
    tokenizer = model.encoders[0].tokenizer
    ids = torch.tensor(np.stack([tokenizer.encode(caption)[0] for caption in captions]))
    ends = [len(tokenizer.tokens(caption)) + 1 for caption in captions]
    text, image = encoder_pair(len(tokenizer.vocab))

    def scores():
        with torch.no_grad():
            return (text_vectors(ids, ends, text) @ image_vectors(latents[-1], image).T).numpy()

    before = scores()
    train_pair(text, image, ids, ends, latents[:-1])
    return before, scores()


def train_pair(text, image, ids, ends, latents):
    """Train both encoders in place, on batches of one drawing of each thing, moved a little."""
    import torch
    logit_scale = torch.tensor(math.log(1 / 0.07), requires_grad=True)
    weights = [*tiny_sd.parameters(text, image), logit_scale]
    optimizer, rng = torch.optim.Adam(weights, lr=2e-3), np.random.default_rng(0)

    for _ in tqdm(range(CLIP_STEPS), desc="clip.png", unit="step", leave=False):
        seen = latents[rng.integers(len(latents), size=len(ids)), range(len(ids))]
        seen = seen.roll(rng.integers(-1, 2, 2).tolist(), (1, 2))
        seen = seen + 0.2 * torch.from_numpy(rng.standard_normal(seen.shape, np.float32))
        u, w = text_vectors(ids, ends, text), image_vectors(seen, image)
        loss = tiny_sd.clip_loss(u, w, logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def clip_picture(model, film, x):
    """CLIP's matrix of a batch: eight captions with eight drawings, before and after training."""
    pictures = drawings("noto")
    chosen = [[*pictures].index(name) for name in PAIRS]
    above = [Image.fromarray(pictures[name]).resize((40, 40)) for name in PAIRS]
    parts = []
    for scores in clip_scores(model):
        cells = [[heat(scores[i:i + 1, j:j + 1], 1).resize((40, 40)) for j in chosen]
                 for i in chosen]
        captions = ["", *(f"{article(name)} {name}" for name in PAIRS)]
        parts.append(sheet([above, *cells], down=captions, size=40, gap=2))
    return beside(parts, ["before training", f"after {CLIP_STEPS} steps"])


def beside(parts, titles):
    """Return pictures of one height side by side, each below its title."""
    left = np.cumsum([0, *(part.width + 16 for part in parts)])
    page = Image.new("RGB", (int(left[-1]) - 16, parts[0].height + 26), "white")
    draw = ImageDraw.Draw(page)
    for x, part, title in zip(left.tolist(), parts, titles):
        page.paste(part, (x, 26))
        draw.text((x + part.width / 2, 12), title, "black", font(13), "mm")
    return page


TAUGHT = ["cat", "pizza", "red apple", "rocket", "ghost", "tractor", "penguin", "rose", "crown",
          "bee", "snail", "hamburger"]
TOY_UNET = {"block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 192,
            "attention_head_dim": 4, "norm_num_groups": 8, "sample_size": 16, "in_channels": 4,
            "out_channels": 4, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}


def new_painter():
    """Return the bundled model in torch, but with a small U-Net that always answers 0 as yet."""
    config = tiny_sd.read_config("unet", TOY_UNET)
    unet = new_network(unet_shapes(config))
    unet["conv_out"]["weight"].zero_()
    model = tiny_sd.load(BUNDLED, "torch")
    model.config.unet = config
    return dataclasses.replace(model, unet=unet)


def training(model, shown, every):
    """Train a small U-Net on twelve drawings; return its losses, and samples {step: pictures}.

    shown: captions to draw at step 0 and after every so many.
    """
    import torch
    pictures = drawings("noto")
    latents = encoded(model, [pictures[name] for name in TAUGHT])
    painter = new_painter()

    def samples():
        with torch.no_grad():
            return [last(painter, caption, seeds=[0], steps=12, guidance=2) for caption in shown]

    optimizer = torch.optim.Adam(tiny_sd.parameters(painter.unet), lr=2e-3)
    steps = tiny_sd.train(painter, optimizer, latents, [f"a {name}" for name in TAUGHT], UNET_STEPS)
    losses, drawn = [], {0: samples()}
    for loss in tqdm(steps, "training.png", UNET_STEPS, unit="step", leave=False):
        losses.append(loss)
        if len(losses) % every == 0:
            drawn[len(losses)] = samples()
    return losses, drawn


def training_picture(model, film, x):
    """A training as it proceeds: the loss of each step, its mean, and samples below their steps."""
    captions = ["a cat", "a red apple", "a rocket"]
    losses, drawn = training(model, captions, UNET_STEPS // 8)
    mean = [np.mean(losses[max(0, i - 19):i + 1]) for i in range(len(losses))]
    above = plot({"loss of one step": losses, "mean of the last 20": mean}, "steps of training",
                 (0, UNET_STEPS), (0, 1.2), ticks=len(drawn), colours=("#bbb", "#b3262e"))
    below = sheet(zip(*drawn.values()), down=captions, size=64, gap=6)
    left = below.width - 70 * len(drawn) + 38 - 50      # puts each sample below its step
    page = Image.new("RGB", (left + above.width, above.height + below.height), "white")
    page.paste(above, (left, 0))
    page.paste(below, (0, above.height))
    return page


PICTURES = {name.removesuffix("_picture"): draw for name, draw in list(vars().items())
            if name.endswith("_picture")}


def draw_pictures(folder=None):
    """Draw the pictures of NOTES.md again; without torch, all but those that need it."""
    folder = folder or Path(__file__).resolve().parent / "pictures"
    model, film = tiny_sd.load(BUNDLED), Film()
    *_, x = like_diffusers.generate(model, PROMPT, make_denoiser=film)
    folder.mkdir(exist_ok=True)
    for name, draw in tqdm(PICTURES.items(), unit="picture"):
        try:
            draw(model, film, x).save(folder / f"{name}.png", optimize=True)
        except ModuleNotFoundError as error:
            tqdm.write(f"{name}.png is left as it is: {error}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    draw_pictures()
