"""Draw the pictures of NOTES.md.

    python -m extras.tools.figures                  draws all of them, in a few minutes
    python -m extras.tools.figures flow moons       only these

They use fixed seeds and the bundled model; clip, moons and training train a small network first.
Needs matplotlib and torch.
"""

import argparse
import functools
import io
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import extras.fast  # noqa: F401  (speed)
import tiny_sd
from extras import control, like_diffusers, samplers, show
from extras.files import replace_atomically
from extras.like_diffusers import picture_size
from extras.prompts import chunks_of
from extras.shapes import unet_shapes
from extras.tools import moons
from extras.training import train as recipe
from extras.training.drawings import STYLES, load_things
from extras.training.fitting import initial
from extras.training.painting import outlines

FOLDER = Path(__file__).resolve().parents[1] / "pictures"
FOX, STEPS = "a fox on a light blue background", 20
CLIP_STEPS, UNET_STEPS, MOON_STEPS = 400, 480, 4000
RED, BLUE = "#b3262e", "#1f5fa8"
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

# ── Pages ───────────────────────────────────────────────────────────────────────────────────────


def grid(rows, across=(), down=(), size=96, gap=4):
    """Return a figure of rows of pictures, with labels above the columns and before the rows."""
    rows = [list(row) for row in rows]
    width, height = (n * (size + gap) - gap for n in (len(rows[0]), len(rows)))
    figure = Figure((width / 100, height / 100), dpi=100)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            x, y = j * (size + gap), height - i * (size + gap) - size
            axes = figure.add_axes((x / width, y / height, size / width, size / height))
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
            if i == 0 and across:
                axes.set_title(across[j], pad=4)
            if j == 0 and down:
                axes.text(-0.06, 0.5, down[i], transform=axes.transAxes, ha="right", va="center")
    return figure


def plot(width=6.4, height=3.0, **settings):
    """Return a figure, and its one pair of axes with these settings."""
    figure = Figure((width, height), dpi=100, layout="constrained")
    return figure, figure.add_subplot(**settings)


def save(figure, path):
    """Write a figure as a PNG of at most 256 colours."""
    page = io.BytesIO()
    figure.savefig(page, facecolor="white", bbox_inches="tight", pad_inches=0.04)
    with replace_atomically(path) as unfinished:
        picture = Image.open(page).convert("RGB").quantize(256, kmeans=2)
        picture.save(unfinished, "PNG", optimize=True)


# ── What the model draws ────────────────────────────────────────────────────────────────────────


def latents_of(model, prompt=FOX, seed=0, steps=STEPS, **settings):
    """Return the final latents (1, h, w, 4) for a prompt."""
    noise = tiny_sd.numpy_noise([seed], tiny_sd.latent_shape(model))
    steps = tiny_sd.evenly_spaced_steps(steps, model.alpha_bars)
    *_, x = tiny_sd.generate(model, prompt, noise=noise, steps=steps, **settings)
    return x


def drawn(model, *args, **settings):
    """Draw a prompt; return the picture (height, width, 3)."""
    return tiny_sd.decode(model, latents_of(model, *args, **settings))[0]


def encoded(model, pictures):
    """Return the scaled latents (n, h, w, 4) of some pictures, as a tensor."""
    zeros = np.zeros((1, *tiny_sd.latent_shape(model)), np.float32)
    return torch.from_numpy(np.concatenate([tiny_sd.encode(model, p, zeros) for p in pictures]))


# ── Sections 3 to 5 ─────────────────────────────────────────────────────────────────────────────


def latents_picture(model):
    """A picture, the channels of its latents, and the decoded latents."""
    picture = drawn(model)
    z = encoded(model, [picture]).numpy()
    channels = [show.grey(channel, 3) for channel in np.moveaxis(z[0], -1, 0)]
    titles = ["picture", *(f"channel {i}" for i in range(4)), "decoded"]
    return grid([[picture, *channels, tiny_sd.decode(model, z)[0]]], titles, size=128)


def time_picture(model):
    """The embedding of every second time, a column each: cosines above, sines below."""
    waves = tiny_sd.timestep_embedding(np.arange(0, 1000, 2.0), 64).T
    figure, axes = plot(6.4, 2.4, xlabel="t")
    axes.imshow(waves, cmap="gray", aspect="auto", extent=(0, 1000, 64, 0), interpolation="nearest")
    axes.set_yticks([16, 48], ["cosines", "sines"])
    return figure


def words_picture(model):
    """The attention to each word of the prompt, over all steps, at the finest resolution."""
    film, tokenizer = show.Film(), model.encoders[0].tokenizer
    picture, = tiny_sd.decode(model, latents_of(model, make_denoiser=film))
    size = max(film.steps[0].attention)
    maps = np.mean([step.attention[size][0] for step in film.steps], axis=0)    # (tokens, h, w)
    chunks = chunks_of(tokenizer, FOX, weighted=False)
    words = show.positions_of_words(tokenizer, chunks, len(maps))[1:-1]
    cells = [show.over(picture, maps[positions].sum(0)) for _, positions in words]
    return grid([[picture, *cells]], ["drawn", *(word for word, _ in words)], size=128)


# ── Section 6 ───────────────────────────────────────────────────────────────────────────────────


def flow_picture(model):
    """With only two pictures, +1 and -1: the density of x_t, and ddim's paths through it."""
    alpha_bar = 1 / (1 + np.geomspace(14.6, 0.03, 400) ** 2)
    values, variance = np.linspace(-2.5, 2.5, 300)[:, None], 1 - alpha_bar
    density = sum(np.exp(-(values - sign * np.sqrt(alpha_bar)) ** 2 / (2 * variance))
                  for sign in (1, -1)) / np.sqrt(variance)

    def denoise(x, t, alpha_bar):
        x_0 = np.tanh(x * math.sqrt(alpha_bar) / (1 - alpha_bar))
        return x_0, (x - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)

    steps = [(0, *pair) for pair in zip(alpha_bar.tolist(), alpha_bar[1:].tolist())]
    starts = np.linspace(-2.1, 2.1, 16)
    paths = np.array([starts, *tiny_sd.ddim(denoise, starts, steps)])
    figure, axes = plot(7.2, 3.6, xlabel="σ, the noise-to-signal ratio", ylabel="x_t")
    axes.imshow(density ** 0.5, cmap="inferno", vmax=1.6, aspect="auto", origin="lower",
                extent=(0, 399, -2.5, 2.5))
    axes.plot(paths, color="#7fd0ff", linewidth=1)
    at = [0, 1, 0.3, 0.1, 0.03]
    axes.set_xticks(*zip(*[(399 * math.log(14.6 / s) / math.log(14.6 / 0.03), f"{s:g}")
                           for s in [14.6, 5, *at[1:]]]))
    return figure


def noising_picture(model):
    """One picture with more and more noise, by the closed form."""
    x, times = latents_of(model), [0, 100, 200, 354, 500, 700, 999]
    noise = tiny_sd.numpy_noise([1], x.shape[1:])()
    row = [tiny_sd.decode(model, tiny_sd.add_noise(x, model.alpha_bars[t], noise))[0]
           for t in times]
    return grid([row], [f"t = {t}" for t in times], size=128)


def plane(axes, points, title):
    """Prepare axes as a plane with faint points, and return them."""
    axes.set(title=title, xlim=(-2.5, 2.6), ylim=(-2.1, 1.9), aspect=1)
    axes.set_axis_off()
    axes.scatter(*points.T, s=2, color="#ccc", linewidths=0)
    return axes


def moons_picture(model):
    """Two moons: arrows from x̄ to the guesses, exact and learnt, at two levels; drawn points."""
    rng = np.random.default_rng(0)
    weights = moons.new_network(rng)
    steps = moons.train(weights, lambda n: moons.two_moons(n, rng)[0], MOON_STEPS, rng)
    for _ in tqdm(steps, "moons", MOON_STEPS, leave=False):
        pass
    points, _ = moons.two_moons(1500, rng)
    learnt, exact = moons.learnt_denoiser(weights), moons.exact_denoiser(points)
    figure = Figure((9.2, 2.8), dpi=100, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    x_bar = np.stack(np.meshgrid(np.linspace(-2.3, 2.4, 11), np.linspace(-1.9, 1.8, 9)), -1)
    x_bar = x_bar.reshape(-1, 2)
    for axes, t in ((left, 600), (middle, 250)):
        plane(axes, points, f"t = {t}")
        alpha_bar = moons.ALPHA_BARS[t]
        for denoise, colour, width in ((exact, "black", 0.007), (learnt, "#ff8a3c", 0.003)):
            x_0, _ = denoise(alpha_bar ** 0.5 * x_bar, t, alpha_bar)
            axes.quiver(*x_bar.T, *(0.4 * (x_0 - x_bar)).T, color=colour, width=width,
                        angles="xy", scale_units="xy", scale=1)
    *_, x = tiny_sd.ddim(learnt, rng.standard_normal((1000, 2)),
                         tiny_sd.evenly_spaced_steps(50, moons.ALPHA_BARS))
    plane(right, points, "drawn with the network").scatter(*x.T, s=3, color=BLUE, linewidths=0)
    return figure


def arrows_picture(model):
    """Guidance: the guesses without and with "upper", their extrapolation, and the results."""
    rng = np.random.default_rng(1)
    points, upper = moons.two_moons(1500, rng)
    nothing, caption = moons.exact_denoiser(points), moons.exact_denoiser(points[upper])
    figure = Figure((10, 2.9), dpi=100, layout="constrained")
    first, *others = figure.subplots(1, 4, width_ratios=[1.5, 1, 1, 1])
    plane(first, points, "three guesses at t = 500")
    t, x_bar = 500, np.array([[0.3, -1.8]])
    alpha_bar = moons.ALPHA_BARS[t]
    guesses = [f(alpha_bar ** 0.5 * x_bar, t, alpha_bar)[0] for f in (nothing, caption)]
    guesses.append(tiny_sd.guide(*guesses, 2))
    first.plot(*np.concatenate(guesses).T, color="gray", linewidth=0.8, linestyle="--")
    names = ("without a caption", 'with "upper"', "guided, w = 2")
    for guess, colour, name in zip(guesses, ("black", BLUE, RED), names):
        how = {"arrowstyle": "->", "color": colour, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
        first.annotate("", guess[0], x_bar[0], arrowprops=how)
        first.text(*(guess[0] + [0.08, 0.08]), name, color=colour, weight="bold")
    first.plot(*x_bar.T, "ko", markersize=4)
    first.text(*(x_bar[0] + [0.12, -0.1]), "x_t / √ᾱ")

    noise = rng.standard_normal((400, 2))
    for axes, w in zip(others, (1, 3, 8)):
        def guided(x, t, alpha_bar, w=w):
            eps = tiny_sd.guide(nothing(x, t, alpha_bar)[1], caption(x, t, alpha_bar)[1], w)
            return tiny_sd.split_prediction("epsilon", eps, x, alpha_bar)
        *_, x = tiny_sd.ddim(guided, noise, tiny_sd.evenly_spaced_steps(25, moons.ALPHA_BARS))
        plane(axes, points, f"drawn with w = {w}").scatter(*x.T, s=3, color=BLUE, linewidths=0)
    return figure


def film_picture(model):
    """The sampler's x_t and the network's guess, on the way to one picture."""
    film = show.Film()
    latents_of(model, make_denoiser=film)
    steps = [*film.steps[::3], film.steps[-1]]
    rows = [[tiny_sd.decode(model, x)[0] for x in xs]
            for xs in ([step.x for step in steps], [step.x_0 for step in steps])]
    return grid(rows, [f"t = {step.t}" for step in steps], ["x_t", "guess"], 128)


GUIDED = [("a cat", 0), ("a hamburger", 1), ("a rocket", 2)]


def guidance_picture(model):
    """Three prompts with more and more guidance."""
    scales = [1, 2, 4, 8, 16]
    rows = [[drawn(model, prompt, seed, guidance=scale) for scale in scales]
            for prompt, seed in GUIDED]
    return grid(rows, [f"w = {scale}" for scale in scales], [prompt for prompt, _ in GUIDED], 128)


# ── Sections 7 and 8, Part II ───────────────────────────────────────────────────────────────────


def strength_picture(model):
    """Image to image: from a fox to another fox, and to a frog."""
    picture, strengths = drawn(model), [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
    rows = [[picture, *(drawn(model, prompt, 1, picture=picture, strength=s) for s in strengths)]
            for prompt in (FOX, FOX.replace("fox", "frog"))]
    return grid(rows, ["start", *map(str, strengths)], ["a fox ...", "a frog ..."], 96)


def control_picture(model):
    """Mirrored outlines, and what the model draws without and with them."""
    rows, weights = [], control.read_control(tiny_sd.HERE / "weights/outlines", 2)
    for name in ("snail", "cat", "rocket", "tractor", "hamburger", "ghost"):
        lines = outlines(drawings(picture_size(model)[0])["twemoji"][name][:, ::-1])
        lines = np.repeat(lines[..., None], 3, axis=2)
        led = functools.partial(control.predict, [control.Control(model, weights, lines)])
        make = functools.partial(like_diffusers.denoiser, predict=led)
        rows.append([lines, drawn(model, f"a {name}"),
                     drawn(model, f"a {name}", make_denoiser=make)])
    return grid(zip(*rows), down=["outlines", "without", "with them"])


def samplers_picture(model):
    """Three samplers with few and with many steps, over the same levels."""
    counts, named = [2, 3, 4, 6, 10, 20], {"ddim": tiny_sd.ddim, "dpm++2m": tiny_sd.dpm_pp_2m,
                                           "euler_a": samplers.euler_ancestral}
    rows = [[drawn(model, "a cat", steps=n, sampler=sampler, guidance=6) for n in counts]
            for sampler in named.values()]
    return grid(rows, [f"{n} steps" for n in counts], list(named), 128)


# Two small training runs, on 24 drawings in each of six styles.

DRAWINGS = tiny_sd.HERE / "tests" / "emoji.zip"
PAIRS = ["cat", "dog", "car", "tractor", "rocket", "airplane", "red apple", "rose"]
TAUGHT = ["cat", "pizza", "red apple", "rocket", "ghost", "tractor", "penguin", "rose", "crown",
          "bee", "snail", "hamburger"]


def drawings(side):
    """Return {style: {name: picture (side, side, 3)}}, on white."""
    things = load_things(DRAWINGS, side)
    rgba = things.pictures[side]
    on_white = rgba[..., :3] + (255 - rgba[..., 3:])        # colours are multiplied by opacity
    return {style: {names[0]: on_white[i] for names, i in zip(things.names, numbers)}
            for style, numbers in zip(STYLES, things.drawings.T)}


def clip_scores(model):
    """Train two encoders on five styles; return u_i · w_j (24, 24) for drawings in the sixth."""
    pictures, words = drawings(picture_size(model)[0]), model.encoders[0].tokenizer
    *shown, hidden = (encoded(model, pictures[style].values()) for style in STYLES[::-1])
    shown, captions = torch.stack(shown), list(pictures["noto"])
    small = recipe.CONFIGS["small"]
    setting = small._replace(text=small.text | {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        "vocab_size": len(words.vocab), "max_position_embeddings": words.length})
    params = tiny_sd.nest(recipe.clip_parameters(setting, 0))

    def vectors(latents):
        return (recipe.embed_text(setting, words, params, captions),
                recipe.embed_image(setting, params, latents))

    optimizer, rng = torch.optim.Adam(tiny_sd.parameters(params), lr=2e-3), np.random.default_rng(0)
    for _ in tqdm(range(CLIP_STEPS), "clip", leave=False):
        seen = shown[rng.integers(len(shown), size=len(captions)), range(len(captions))]
        seen = seen.roll(rng.integers(-1, 2, 2).tolist(), (1, 2))
        seen = seen + 0.2 * torch.from_numpy(rng.standard_normal(seen.shape, np.float32))
        loss = tiny_sd.clip_loss(*vectors(seen), params["logit_scale"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        u, w = vectors(hidden)
        return captions, (u @ w.T).numpy()


def clip_picture(model):
    """CLIP's score matrix for eight captions and eight drawings, after training."""
    captions, scores = clip_scores(model)
    chosen, pictures = [captions.index(name) for name in PAIRS], drawings(64)["noto"]
    figure, axes = plot(4.2, 3.9)
    values = scores[chosen][:, chosen]
    axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(PAIRS)), [f'"{name}"' for name in PAIRS])
    axes.set_xticks([])
    axes.tick_params(length=0)
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{max(0, value):.1f}", ha="center", va="center", size=7,
                  color="white" if value < 0.6 else "black")
    for j, name in enumerate(PAIRS):
        above = axes.inset_axes((j + 0.04 - 0.5, -1.5, 0.92, 0.92), transform=axes.transData)
        above.imshow(pictures[name])
        above.set_axis_off()
    return figure


def training(model, shown, every):
    """Train a small U-Net on twelve drawings; return its losses, and samples {step: pictures}."""
    config = tiny_sd.read_config("unet", recipe.CONFIGS["small"].unet | {
        "block_out_channels": [32, 64], "layers_per_block": 1, "attention_head_dim": 4,
        "cross_attention_dim": model.config.unet.cross_attention_dim, "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]})
    small = tiny_sd.load("weights/emoji", "torch")
    small.config.unet = config
    shapes = tiny_sd.flatten(unet_shapes(config))
    small.unet = tiny_sd.nest(initial(shapes, 0, ("conv_out.weight",)))     # answers 0 as yet
    pictures, rng = drawings(picture_size(model)[0])["noto"], np.random.default_rng(0)
    latents = encoded(model, [pictures[name] for name in TAUGHT])
    batches = tiny_sd.random_batches(latents, [f"a {name}" for name in TAUGHT], 16, rng)
    optimizer = torch.optim.Adam(tiny_sd.parameters(small.unet), lr=2e-3)

    @torch.no_grad()
    def samples():
        return [drawn(small, caption, steps=12, guidance=2) for caption in shown]

    losses, found = [], {0: samples()}
    for loss, _ in zip(tiny_sd.train(small, optimizer, batches, rng),
                       tqdm(range(UNET_STEPS), "training", leave=False)):
        losses.append(loss)
        if len(losses) % every == 0:
            found[len(losses)] = samples()
    return losses, found


def training_picture(model):
    """A training run: the loss of each step, its running mean, and samples below their steps."""
    captions, every = ["a cat", "a red apple", "a rocket"], UNET_STEPS // 8
    losses, found = training(model, captions, every)
    mean = [np.mean(losses[max(0, i - 19):i + 1]) for i in range(len(losses))]
    figure = Figure((7.2, 4.8), dpi=100)
    axes = figure.add_axes((0.12, 0.5, 0.8, 0.47), xlim=(0, UNET_STEPS), ylim=(0, 1.2),
                           xticks=list(found), xlabel="steps of training", ylabel="loss")
    axes.plot(losses, color="#bbb", linewidth=1, label="one step")
    axes.plot(mean, color=RED, linewidth=2, label="mean of the last 20")
    axes.legend(frameon=False)
    for i, pictures in enumerate(found.values()):
        for j, picture in enumerate(pictures):
            below = figure.add_axes((0.12 + 0.1 * i - 0.045, 0.27 - 0.13 * j, 0.09, 0.135))
            below.imshow(picture)
            below.set_axis_off()
            if i == 0:
                below.text(-0.08, 0.5, captions[j], transform=below.transAxes, ha="right",
                           va="center")
    return figure


PICTURES = {name.removesuffix("_picture"): draw for name, draw in list(vars().items())
            if name.endswith("_picture")}


def main(names, folder=FOLDER):
    """Draw the pictures of these names, or all."""
    torch.set_num_threads(1)        # on small arrays more threads would only wait for each other
    model = tiny_sd.load("weights/emoji")
    for name in tqdm(names or PICTURES, unit="picture"):
        save(PICTURES[name](model), folder / f"{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *PICTURES], metavar="NAME")
    main(parser.parse_args().names)
