#!/usr/bin/env python3
"""Train weights/emoji: a small but complete Stable Diffusion, from a font to a picture.

    render ── 1,637 emoji ──► vae, decoder ── latents ──► clip ── text encoder ──► unet ──► export ──► evaluate, sheet

The recipe is the paper's (Rombach et al., 2022), stage by stage, through tiny_sd.py's own functions: given torch tensors
they are differentiable as they stand. Each stage goes on where it was after a kill.

    python weights/train.py all --minutes 120                                  from nothing to weights/emoji
    torchrun --nproc-per-node 8 weights/train.py unet --device cuda            one stage on eight GPUs

render needs the font of Debian's fonts-noto-color-emoji and the PyPI package emoji, unless --data has its result.
"""

import argparse
import collections
import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tiny_sd  # noqa: E402
from tiny_sd import UserError, flatten, nest  # noqa: E402

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
VOCABULARY, LENGTH = 2000, 32          # tokens known, and tokens in a caption


# ── Settings ────────────────────────────────────────────────────────────────────────────────────────────────────

def setting(size, vae, vae_groups, unet, attend, heads, unet_groups, text_width, text_layers, batch, rate):
    """The three parts' config.json, as diffusers and transformers write them, and how to train them."""
    cross = ["CrossAttn" if a else "" for a in attend]
    return {
        "size": size, "factor": 2 ** (len(vae) - 1), "batch": batch, "rate": rate,
        "vae": {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
                "block_out_channels": list(vae), "layers_per_block": 1, "norm_num_groups": vae_groups,
                "down_block_types": ["DownEncoderBlock2D"] * len(vae), "up_block_types": ["UpDecoderBlock2D"] * len(vae),
                "act_fn": "silu", "sample_size": size},
        "unet": {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4,
                 "sample_size": size >> len(vae) - 1, "block_out_channels": list(unet), "layers_per_block": 1,
                 "cross_attention_dim": text_width, "attention_head_dim": list(heads), "norm_num_groups": unet_groups,
                 "down_block_types": [f"{c}DownBlock2D" for c in cross],
                 "up_block_types": [f"{c}UpBlock2D" for c in cross[::-1]],
                 "act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0},
        "text": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": VOCABULARY,
                 "hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_layers,
                 "num_attention_heads": text_width // 48, "max_position_embeddings": LENGTH, "hidden_act": "quick_gelu",
                 "layer_norm_eps": 1e-5, "torch_dtype": "float32", "projection_dim": text_width, "bos_token_id": VOCABULARY - 2,
                 "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}}


CONFIGS = {
    "small": setting(64, (32, 64, 64), 8, (64, 128, 192), (0, 1, 1), (2, 4, 6), 16, 192, 4,
                     {"vae": 16, "decoder": 16, "clip": 256, "unet": 64},
                     {"vae": 2e-3, "decoder": 1e-3, "clip": 1e-3, "unet": 1e-3}),
    "base": setting(128, (64, 64, 128, 128), 16, (128, 192, 256), (1, 1, 1), (4, 6, 8), 32, 288, 6,
                    {"vae": 64, "decoder": 64, "clip": 1024, "unet": 512},
                    {"vae": 1e-3, "decoder": 5e-4, "clip": 1e-3, "unet": 1e-3})}
SCHEDULER = {"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
             "beta_schedule": "scaled_linear", "steps_offset": 1, "timestep_spacing": "leading",
             "prediction_type": "v_prediction", "_guidance_scale": 4.0}      # the last for tiny_sd alone: what suits best


def read(path):
    """A file's text; UserError if it is not there."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


@contextlib.contextmanager
def whole(path):
    """A temporary name to write to, which becomes path when all is written: a file is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ── Pictures: an emoji font and its names ───────────────────────────────────────────────────────────────────────

def emoji_names():
    """[(characters, [name, alias, ...])] of every emoji but skin tones and flags, in Unicode's own words."""
    import emoji
    left_out = {*range(0x1F3FB, 0x1F400), *range(0x1F1E6, 0x1F200), *range(0xE0020, 0xE0080)}

    def tidy(name):
        return re.sub("[“”]", "", name.strip(":").replace("_", " ").replace("’", "'")).lower()

    found = [(text, [tidy(name) for name in (d["en"], *d.get("alias", []))]) for text, d in emoji.EMOJI_DATA.items()
             if d["status"] == emoji.STATUS["fully_qualified"] and left_out.isdisjoint(map(ord, text))]
    owners = collections.Counter(name for _, names in found for name in {*names})
    return [(text, [names[0], *(n for n in dict.fromkeys(names[1:])
                                if owners[n] == 1 and len(n) > 2 and not re.fullmatch("u[0-9a-f]{4}", n))])
            for text, names in found]


def render(o):
    """The font's glyphs as 128-pixel RGBA pictures, 0000.png and so on, and names.json beside them, in one zip file."""
    if o.data.exists():
        return
    if not Path(FONT).exists():
        raise UserError(f"{FONT} is missing: install fonts-noto-color-emoji, or give --data a zip that render made")
    font, kept = ImageFont.truetype(FONT, 109), []              # 109: the one size its bitmaps, 136 x 128, come in
    with whole(o.data) as path, zipfile.ZipFile(path, "w") as archive:
        for text, names in tqdm(emoji_names(), "render"):
            if font.getbbox(text) != (0, 0, 136, 128):          # not in this font, or not as one glyph
                continue
            glyph = Image.new("RGBA", (136, 136))
            ImageDraw.Draw(glyph).text((0, 4), text, font=font, embedded_color=True)
            png = io.BytesIO()
            glyph.resize((128, 128), Image.LANCZOS).save(png, "PNG", optimize=True)
            archive.writestr(f"{len(kept):04}.png", png.getvalue())
            kept.append(names)
        archive.writestr("names.json", json.dumps(kept, ensure_ascii=False, indent=0))


class Things(NamedTuple):
    """What there is to draw: names [[name, alias, ...]], and pictures {side: (n, side, side, 4) uint8}, premultiplied."""
    names: list
    pictures: dict


def load_things(o):
    """The rendered things at the setting's size and at half of it."""
    try:
        archive = zipfile.ZipFile(o.data)
        names = json.loads(archive.read("names.json"))
        pngs = [Image.open(io.BytesIO(archive.read(f"{i:04}.png"))).convert("RGBA") for i in range(len(names))]
    except (OSError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"cannot read the rendered pictures in {o.data}: {e}") from None

    def at(side):
        return np.stack([np.asarray(p.convert("RGBa").resize((side, side), Image.BOX)) for p in pngs])
    return Things(names, {side: at(side) for side in (o.setting["size"], o.setting["size"] // 2)})


# ── Scenes and captions ─────────────────────────────────────────────────────────────────────────────────────────

COLOURS = {"white": (255, 255, 255), "black": (20, 20, 20), "gray": (150, 150, 150), "red": (225, 50, 50),
           "orange": (250, 150, 40), "yellow": (250, 220, 70), "green": (50, 160, 70), "light green": (160, 225, 150),
           "blue": (50, 100, 220), "light blue": (160, 205, 250), "dark blue": (30, 40, 110), "purple": (140, 70, 190),
           "pink": (250, 175, 205), "brown": (130, 85, 55), "beige": (240, 225, 195), "turquoise": (60, 200, 195)}
PLACES = {"in the top left corner": (0, 0), "in the top right corner": (1, 0), "in the bottom left corner": (0, 1),
          "in the bottom right corner": (1, 1), "on the left": (0, .5), "on the right": (1, .5), "at the top": (.5, 0),
          "at the bottom": (.5, 1), "": (.5, .5)}                    # x and y, as shares of the room that is left
PAIRS = {"and": ((0, .5), (1, .5)), "next to": ((0, .5), (1, .5)), "above": ((.5, 0), (.5, 1)), "below": ((.5, 1), (.5, 0))}


class Scene(NamedTuple):
    """A picture to be: [(thing, side in half pictures, x, y)], a background colour (r, g, b), and its caption."""
    parts: list
    colour: tuple
    caption: str


def share(*words):
    """A number in [0, 1) that is always the same for the same words."""
    return zlib.crc32("|".join(words).encode()) / 2 ** 32


def held_out(names, colour="white"):
    """Whether training never shows it: an eighth of (thing, background) and a tenth of the unordered pairs of things."""
    if len(names) == 2:
        return share("pair", *sorted(names)) < 1 / 10
    return colour != "white" and share("background", names[0], colour) < 1 / 8


def article(name):
    """The name as one says it: a cat, an apple, cherries."""
    last = name.split(" with ")[0].split(" of ")[0].split()[-1]
    if name[0] in "0123456789" or (last.endswith("s") and not last.endswith(("ss", "us", "is", "'s"))) \
            or name.split()[0] in ("women", "men", "people", "keycap"):
        return name
    vowel = re.match(r"(?!uni|use|uk|eu|one)[aeiou]|hour|honest|x-|sos|atm|ng |mrs", name)
    return f"{'an' if vowel else 'a'} {name}"


def describe(named, colour="white", how="", small=False):
    """The full caption of one named thing, or of two with the word between them; see PLACES and PAIRS for `how`."""
    if len(named) == 2:
        text = f"{named[0]} {how} {named[1]}"
    else:
        text = re.sub(r"^(an? )?", lambda m: "a small " if m[1] else "small ", named[0], count=1) if small else named[0]
        text += f" {how}" * bool(how)
    return text + (f" on {article(colour)} background" if colour != "white" else "")


def draw_scene(names, rng):
    """A random scene that training may show: often two things, which take the longest to learn."""
    def say(i):
        options = names[i]
        name = options[0] if len(options) == 1 or rng.random() < 0.8 else options[rng.integers(1, len(options))]
        return name if rng.random() < 0.5 else article(name)

    while True:
        kind = rng.choice(["plain", "colour", "placed", "pair"], p=[0.25, 0.13, 0.17, 0.45])
        colour = "white" if kind == "plain" or kind != "colour" and rng.random() < 0.5 else rng.choice([*COLOURS][1:])
        things = rng.choice(len(names), 2 if kind == "pair" else 1, replace=False).tolist()
        if not held_out([names[i][0] for i in things]) and not held_out([names[things[0]][0]], colour):
            break
    how, small = "", False
    if kind == "pair":
        how = rng.choice([*PAIRS])
        parts = [(i, 1, *place) for i, place in zip(things, PAIRS[how])]
    elif kind == "placed":
        how = rng.choice([*PLACES])
        small = how == "" or rng.random() < 0.3
        parts = [(things[0], 1, *PLACES[how])]
    else:
        parts = [(things[0], 2, .5, .5)]
    return Scene(parts, COLOURS[colour], describe([say(i) for i in things], colour, how, small))


def paint(scene, things):
    """The scene as a picture (size, size, 3) uint8."""
    half = min(things.pictures)
    canvas = np.broadcast_to(np.uint8(scene.colour), (2 * half, 2 * half, 3)).copy()
    for i, halves, x, y in scene.parts:
        side = halves * half
        left, top = (round(place * (2 * half - side)) for place in (x, y))
        view = canvas[top:top + side, left:left + side]
        thing = things.pictures[side][i].astype(np.uint16)
        view[:] = thing[..., :3] + (view * (255 - thing[..., 3:]) + 127) // 255
    return canvas


def to_model(pictures, o):
    """uint8 pictures (batch, height, width, 3) as a tensor in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).to(o.device).float() / 127.5 - 1


# ── The tokenizer: byte pairs, merged from the most frequent on ─────────────────────────────────────────────────

def train_tokenizer(names):
    """Merges, learnt from all words that a caption can hold, each once a mention (Sennrich et al., 2016)."""
    said = [*itertools.chain(*names)] * 4 + [f"a an small {w} background" for w in [*COLOURS, *PLACES, *PAIRS]] * 40
    spell = tiny_sd.Tokenizer([])
    counts = collections.Counter(word for text in said for word in spell.words(text))
    words = {word: spell.merge(word) for word in counts}
    merges = []
    while len(merges) < VOCABULARY - 514:
        pairs = collections.Counter()
        for word, symbols in words.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += counts[word]
        if not pairs:                                       # all words are whole: fill the table with idle entries
            symbols = [*spell.bytes.values()]
            known = {*merges}
            idle = (pair for pair in itertools.product(symbols, symbols) if pair not in known)
            return merges + [*itertools.islice(idle, VOCABULARY - 514 - len(merges))]
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        for word, symbols in words.items():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i:i + 2] = ["".join(best)]
                i += 1
    return merges


def tokenizer(o):
    """The tokenizer of STATE/merges.txt, which is trained and written where it is missing."""
    path = o.state / "merges.txt"
    if not path.exists():
        merges = train_tokenizer(load_things(o).names)
        with whole(path) as temporary:
            temporary.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    merges = [tuple(line.split()) for line in path.read_text(encoding="utf-8").split("\n")[1:-1]]
    return tiny_sd.Tokenizer(merges, length=LENGTH)


def encode(o, words, captions):
    """Captions to ids (batch, LENGTH) by the tokenizer `words`."""
    return torch.from_numpy(np.stack([words.encode(caption)[0] for caption in captions])).to(o.device)


# ── Fitting: one loop for the three stages ──────────────────────────────────────────────────────────────────────

def initial(shapes, seed, zero=()):
    """{name: tensor} for nested checkpoint shapes, convolutions as (out, kh, kw, in): norms 1, biases 0, weights of
    variance 1 / inputs, but 0 where the name ends in one of `zero`, so that every residual branch begins as nothing."""
    noise = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in flatten(shapes).items():
        shape = [shape[0], *shape[2:], shape[1]] if len(shape) == 4 else shape
        if len(shape) == 1:
            params[name] = torch.full(shape, float("norm" in name and name.endswith("weight")))
        else:
            std = 0 if name.endswith(zero) else 0.02 if "embedding.weight" in name else math.prod(shape[1:]) ** -0.5
            params[name] = torch.randn(shape, generator=noise) * std
    return params


ZERO = ("conv2.weight", "to_out.0.weight", "net.2.weight", "proj_out.weight", "out_proj.weight", "fc2.weight")


class Loss(torch.nn.Module):
    """A loss of nested parameters as a module, for DistributedDataParallel to wrap. It holds each convolution's weight
    as the matrix (out, kh · kw · in), the form in which Muon makes its steps orthogonal."""

    def __init__(self, loss, params):
        super().__init__()
        self.loss, self.shapes = loss, {name: p.shape for name, p in params.items()}
        self.leaves = torch.nn.ParameterList([p.flatten(1) if p.ndim > 2 else p for p in params.values()])

    def forward(self, *batch):
        return self.loss(nest({n: p.reshape(s) for (n, s), p in zip(self.shapes.items(), self.leaves)}), *batch)


def optimizers(model, rate):
    """Muon (Jordan et al., 2024) for the matrices inside the network; AdamW for vectors and embeddings."""
    named = [*zip(model.shapes, model.leaves)]
    inner = [p for n, p in named if p.ndim == 2 and "embedding.weight" not in n]
    rest = [p for n, p in named if not any(p is q for q in inner)]
    return [torch.optim.Muon(inner, rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, rate, (0.9, 0.99), weight_decay=0.0, fused=True)]


def cpu_attention(q, k, v, causal=False):
    """The formula itself: at these sizes a CPU computes it faster than torch's fused kernel, both ways."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
    return scores.softmax(-1) @ v


def fit(o, stage, params, loss, draw, show):
    """Lower loss(nested params, *batch) until --minutes or --steps are over, and return the averaged parameters.

    params {name: tensor}; draw(step, rng) -> batch, of which each process takes its share; show(params) -> a picture for
    STATE/stage.png, or None. The state, with each step's loss, is kept in STATE/stage.pt once a minute (--keep-every);
    where one is, training goes on from it.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = Loss(loss, {n: p.to(o.device) for n, p in params.items()})
    steps = optimizers(model, o.rate or o.setting["rate"][stage])
    mean = [p.detach().clone() for p in model.leaves]
    done, spent, losses, path = 0, 0.0, [], o.state / f"{stage}.pt"
    if path.exists():
        state = torch.load(path, map_location=o.device, weights_only=True)
        for target, source in ((model.leaves, state["params"]), (mean, state["mean"])):
            torch._foreach_copy_([p.data for p in target], source)
        for optimizer, saved in zip(steps, state["optimizers"]):
            optimizer.load_state_dict(saved)
        done, spent, losses = state["step"], state["seconds"], state.get("losses", [])

    run = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    run = torch.compile(run) if o.compile else run
    begun, kept, shown = time.monotonic() - spent, time.monotonic(), time.monotonic()
    goal = o.steps or 60 * o.minutes
    bar = tqdm(total=round(goal), initial=round(done if o.steps else spent), desc=stage, disable=rank > 0,
               unit="step" if o.steps else "s", mininterval=1 if sys.stderr.isatty() else 20)
    begin = done

    def averaged():
        return {n: p.reshape(s) for (n, s), p in zip(model.shapes.items(), mean)}

    def keep():
        if rank == 0:
            with whole(path) as temporary:
                torch.save({"params": [p.data for p in model.leaves], "mean": mean, "step": done, "seconds": spent,
                            "losses": losses, "optimizers": [optimizer.state_dict() for optimizer in steps]}, temporary)

    while (progress := (done if o.steps else spent) / goal) < 1:
        rng = np.random.default_rng([o.seed, done, zlib.crc32(stage.encode())])
        torch.manual_seed(int(rng.integers(2 ** 31)))
        batch = draw(done, rng)
        with torch.autocast(o.device, torch.bfloat16):
            value = run(*(part[rank::ranks] for part in batch))
        value.backward()
        for optimizer in steps:
            for group in optimizer.param_groups:
                rate = o.rate or o.setting["rate"][stage]
                group["lr"] = rate * min(1, (done + 1) / 100) * (0.01 + 0.99 * math.cos(progress * math.pi / 2) ** 2)
            optimizer.step()
            optimizer.zero_grad()
        done += 1
        torch._foreach_lerp_(mean, [p.data for p in model.leaves], 1 - min(0.998, done / (done + 10)))
        report = torch.tensor([(time.monotonic() - begun) * (rank == 0), value.item() / ranks])
        if ranks > 1:                                       # all processes stop at the same step: by the first one's clock
            report = report.to(o.device)
            dist.all_reduce(report)
        spent, loss = report.tolist()
        losses.append(loss)
        if not math.isfinite(loss):
            raise UserError(f"{stage}: the loss is {loss} at step {done}; lower --rate and go on from {path}")
        bar.set_postfix_str(f"step {done}, loss {np.mean(losses[-200:]):.4f}", refresh=False)
        bar.update(round(done if o.steps else spent) - bar.n)
        if time.monotonic() - kept > o.keep_every:
            keep()
            kept = time.monotonic()
        if rank == 0 and time.monotonic() - shown > o.show_every:
            save_picture(show(averaged()), o.state / f"{stage}.png")
            shown = time.monotonic()
    bar.close()
    if done > begin:
        keep()
        if rank == 0:
            save_picture(show(averaged()), o.state / f"{stage}.png")
    return averaged()


def trained(o, stage):
    """The averaged parameters that a stage reached, {name: tensor}."""
    path = o.state / f"{stage}.pt"
    if not path.exists():
        raise UserError(f"{path} is missing: run the stage {stage} first")
    shapes = STAGES[stage].parameters(o)
    mean = torch.load(path, map_location=o.device, weights_only=True)["mean"]
    return {n: m.reshape(p.shape) for (n, p), m in zip(shapes.items(), mean)}


def save_picture(picture, path):
    if picture is not None:
        with whole(path) as temporary:
            Image.fromarray(picture).save(temporary, "PNG")


def grid(pictures, columns):
    """Pictures (n, height, width, 3) as one, row by row."""
    rows = [np.concatenate(pictures[i:i + columns], axis=1) for i in range(0, len(pictures), columns)]
    return np.concatenate([row for row in rows if row.shape == rows[0].shape], axis=0)


def to_pixels(x):
    return (tiny_sd.to_numpy(x).clip(-1, 1) * 127.5 + 127.5).round().astype(np.uint8)


# ── Stage 1: the VAE ────────────────────────────────────────────────────────────────────────────────────────────

def vae_parameters(o):
    return initial(tiny_sd.vae_shapes(o.setting["vae"]), o.seed, ZERO)


def differences(x):
    """How each pixel differs from the next, down and across."""
    return x[:, 1:] - x[:, :-1], x[:, :, 1:] - x[:, :, :-1]


def vae_loss(groups, vae, image, noise):
    """Absolute error of pixels and of edges, and a little of KL(q(z | image) || N(0, 1)) (Kingma and Welling, 2014)."""
    mean, logvar = tiny_sd.vae_encode(image, vae, groups)
    mean, logvar = mean.float(), logvar.float()
    drawn = tiny_sd.vae_decode(mean + torch.exp(logvar / 2) * noise, vae, groups).float()
    edges = sum((a - b).abs().mean() for a, b in zip(differences(drawn), differences(image)))
    kl = (mean ** 2 + logvar.exp() - 1 - logvar).mean() / 2
    return (drawn - image).abs().mean() + edges / 2 + 1e-4 * kl


def train_vae(o):
    things, size, groups = load_things(o), o.setting["size"], o.setting["vae"]["norm_num_groups"]

    def draw(step, rng):
        image = to_model([*moved_scenes(things, rng, o.batch or o.setting["batch"]["vae"])], o)
        side = size // o.setting["factor"]
        return image, torch.randn(len(image), side, side, 4, device=o.device)

    fit(o, "vae", vae_parameters(o), functools.partial(vae_loss, groups), draw, functools.partial(before_and_after, o, things))


def moved_scenes(things, rng, n, jitter=True):
    """Scenes of all kinds, half of them on a colour of no name, each moved by up to half a latent."""
    for _ in range(n):
        scene = draw_scene(things.names, rng)
        if rng.random() < 0.5:
            scene = scene._replace(colour=rng.integers(0, 256, 3))
        yield np.roll(paint(scene, things), rng.integers(-2, 3, 2) * jitter, (0, 1))


@torch.no_grad()
def before_and_after(o, things, params):
    """Originals above, reconstructions below; and the error on the way, in decibels."""
    size, groups, vae = o.setting["size"], o.setting["vae"]["norm_num_groups"], nest(params)
    image = to_model([*moved_scenes(things, np.random.default_rng(0), 48, False)], o)
    drawn = tiny_sd.vae_decode(tiny_sd.vae_encode(image, vae, groups)[0], vae, groups).clip(-1, 1)
    decibels = 10 * (4 / (drawn - image).square().mean((1, 2, 3))).log10()
    tqdm.write(f"vae: PSNR {decibels.mean():.2f} dB on 48 scenes", sys.stderr)
    rows = zip(to_pixels(image).reshape(4, 12, size, size, 3), to_pixels(drawn).reshape(4, 12, size, size, 3))
    return grid(np.concatenate([part for pair in rows for part in pair]), 12)


# ── Stage 1b: the decoder alone ─────────────────────────────────────────────────────────────────────────────────
# What the latents mean is fixed now, by the encoder; how to draw them can still be learnt better, at any time, since
# the other stages only ever see latents. The published VAEs ft-EMA and ft-MSE of Stable Diffusion were made so.

def decoder_parameters(o):
    """The decoder as the stage before left it."""
    return {name: p for name, p in trained(o, "vae").items() if name.startswith(("decoder.", "post_quant_conv."))}


def decoder_loss(groups, decoder, latents, image):
    """The logarithm of each picture's squared error: PSNR itself, but for its unit."""
    drawn = tiny_sd.vae_decode(latents, decoder, groups).float()
    return (drawn - image).square().mean((1, 2, 3)).log().mean()


def train_decoder(o):
    things, groups, encoder = load_things(o), o.setting["vae"]["norm_num_groups"], trained(o, "vae")
    nested = nest(encoder)

    @torch.no_grad()
    def draw(step, rng):
        image = to_model([*moved_scenes(things, rng, o.batch or o.setting["batch"]["decoder"])], o)
        with torch.autocast(o.device, torch.bfloat16):
            return tiny_sd.vae_encode(image, nested, groups)[0].float(), image

    fit(o, "decoder", decoder_parameters(o), functools.partial(decoder_loss, groups), draw,
        lambda decoder: before_and_after(o, things, encoder | decoder))


def trained_vae(o):
    """The VAE, with the decoder of the stage of its own where that has run."""
    return trained(o, "vae") | (trained(o, "decoder") if (o.state / "decoder.pt").exists() else {})


def scaling_factor(o, latents=None):
    """What the U-Net's latents are multiplied by to have variance 1: of these latents, once, and kept in the state."""
    path = o.state / "scaling_factor.json"
    if path.exists() or latents is None:
        return json.loads(read(path))
    with whole(path) as temporary:
        temporary.write_text(json.dumps(1 / latents.std().item()))
    return json.loads(read(path))


class Bank:
    """Scenes as scaled latents (n, h, w, 4) with the ids of their captions (n, LENGTH), made ahead and renewed bit by bit:
    the U-Net meets more scenes than memory holds, and each is encoded once."""

    def __init__(self, o, filled, capacity):
        rng, filled = np.random.default_rng(o.seed), o.bank or filled
        self.o, self.things, self.words, self.capacity, self.turn = o, load_things(o), tokenizer(o), capacity, 0
        self.vae, self.groups, self.scale = nest(trained(o, "vae")), o.setting["vae"]["norm_num_groups"], 1.0
        self.ids, self.latents = self.make([draw_scene(self.things.names, rng) for _ in range(min(1024, filled))])
        self.scale = scaling_factor(o, self.latents)
        self.latents *= self.scale
        while len(self.ids) < filled:
            self.renew(min(1024, filled - len(self.ids)), rng)

    @torch.no_grad()
    def make(self, scenes):
        """Ids and latents of some scenes; each process encodes its share of them, all shares of one length."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        even = scenes + scenes[:-len(scenes) % ranks]
        mine, latents = [paint(scene, self.things) for scene in even[rank::ranks]], []
        for i in range(0, len(mine), 128):
            with torch.autocast(self.o.device, torch.bfloat16):
                mean, _ = tiny_sd.vae_encode(to_model(mine[i:i + 128], self.o), self.vae, self.groups)
            latents.append(mean.float() * self.scale)
        latents = torch.cat(latents)
        if ranks > 1:
            shares = [torch.empty_like(latents) for _ in range(ranks)]
            dist.all_gather(shares, latents)
            latents = torch.stack(shares, 1).flatten(0, 1)[:len(scenes)]
        return encode(self.o, self.words, [scene.caption for scene in scenes]), latents

    def renew(self, n, rng):
        """Add n new scenes; once the bank is full they take the place of the oldest."""
        ids, latents = self.make([draw_scene(self.things.names, rng) for _ in range(n)])
        if len(self.ids) < self.capacity:
            self.ids, self.latents = torch.cat([self.ids, ids]), torch.cat([self.latents, latents])
        else:
            places = (torch.arange(n) + self.turn) % len(self.ids)
            self.ids[places], self.latents[places] = ids, latents
            self.turn += n

    def draw(self, n, rng):
        chosen = torch.from_numpy(rng.integers(0, len(self.ids), n)).to(self.o.device)
        return self.ids[chosen], self.latents[chosen]


# ── Stage 2: the text encoder ───────────────────────────────────────────────────────────────────────────────────

def clip_parameters(o):
    """The text encoder; an image encoder, which is a VAE's encoder that reads latents; and what brings both together."""
    text, width = o.setting["text"], o.setting["text"]["hidden_size"]
    image = o.setting["vae"] | {"in_channels": 4, "block_out_channels": [64, 128, width], "latent_channels": width // 2}
    params = initial({"text": tiny_sd.text_shapes(text), "image": tiny_sd.vae_shapes(image)["encoder"],
                      "text_projection": {"weight": (width, width)}, "logit_scale": (1,)}, o.seed, ZERO)
    return params | {"logit_scale": torch.full((1,), math.log(1 / 0.07))}


def embed_text(o, params, ids):
    """What a caption comes to, (batch, width) of length 1: the context where the text ends, projected."""
    context = tiny_sd.text_encoder(ids, o.setting["text"]["num_attention_heads"], tiny_sd.quick_gelu, **params["text"])
    end = (ids == o.setting["text"]["eos_token_id"]).int().argmax(1)
    return F.normalize(tiny_sd.linear(context[torch.arange(len(ids)), end], **params["text_projection"]).float(), dim=-1)


def embed_image(o, params, latents):
    """What a picture comes to, (batch, width) of length 1."""
    h = tiny_sd.vae_half(latents, o.setting["vae"]["norm_num_groups"], **params["image"])
    return F.normalize(h.float().mean((1, 2)), dim=-1)


def clip_loss(o, params, ids, latents):
    """Each caption should find its picture among the batch's, and each picture its caption (Radford et al., 2021)."""
    text, image = embed_text(o, params, ids), embed_image(o, params, latents)
    if dist.is_initialized():
        text, image = (torch.cat(dist.nn.functional.all_gather(x)) for x in (text, image))
    logits = params["logit_scale"].exp().clip(max=100) * text @ image.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@torch.no_grad()
def retrieval(o, params, bank):
    """The share of names that find their own picture among all."""
    names = [name for name, *_ in bank.things.names]
    ids, latents = bank.make([Scene([(i, 2, .5, .5)], COLOURS["white"], name) for i, name in enumerate(names)])
    nearest = (embed_text(o, params, ids) @ embed_image(o, params, latents).T).argmax(1)
    return (nearest == torch.arange(len(names), device=nearest.device)).float().mean().item()


def train_clip(o):
    bank = Bank(o, 4096, 32768)

    def draw(step, rng):
        bank.renew(32, rng)
        return bank.draw(o.batch or o.setting["batch"]["clip"], rng)

    mean = fit(o, "clip", clip_parameters(o), functools.partial(clip_loss, o), draw, lambda params: None)
    found = retrieval(o, nest(mean), bank)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"clip: {found:.1%} of all names find their picture", file=sys.stderr)


# ── Stage 3: the U-Net ──────────────────────────────────────────────────────────────────────────────────────────

def unet_parameters(o):
    """The U-Net, new, and the text encoder as the stage before left it, which goes on learning."""
    text = {name: p for name, p in trained(o, "clip").items() if name.startswith("text.")}
    unet = initial({"unet": tiny_sd.unet_shapes(o.setting["unet"])}, o.seed, (*ZERO, "conv_out.weight"))
    return text | unet


def unet_loss(o, alpha_bar, params, ids, x_0, t, noise):
    """The squared error of v, weighted by min(1, 5 (1 - ᾱ)): that of x_0 by between 1 and 5 at every noise level.

    Where little of the picture is left, v asks for the picture and epsilon for next to nothing (Salimans and Ho, 2022);
    and it is there that the caption must say what to draw. The cap is that of Hang et al. (2023).
    """
    a = alpha_bar[t][:, None, None, None]
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    v = a.sqrt() * noise - (1 - a).sqrt() * x_0
    text, unet = o.setting["text"], o.setting["unet"]
    context = tiny_sd.text_encoder(ids, text["num_attention_heads"], tiny_sd.quick_gelu, **params["text"])
    drawn = tiny_sd.unet(x_t, t.float(), context, unet["attention_head_dim"], unet["norm_num_groups"], **params["unet"])
    error = (drawn.float() - v).square().mean((1, 2, 3))
    return ((5 * (1 - a)).flatten().clip(max=1) * error).mean()


PROMPTS = ["red apple", "cat", "a dog on a light blue background", "rocket", "pizza on a green background",
           "a cat and a pizza", "rocket above a house", "a small ghost in the top left corner", "umbrella", "octopus",
           "a tractor on a yellow background", "guitar", "sunflower on a black background", "penguin",
           "grinning face", "woman firefighter", "a robot and a rose", "crown on a red background", "airplane",
           "a bee above a sunflower", "snowman on a dark blue background", "key", "banana on the right", "locomotive"]


def train_unet(o):
    bank = Bank(o, 8192, 65536)
    alpha_bar = torch.from_numpy(tiny_sd.alpha_bars(SCHEDULER)).float().to(o.device)
    nothing = encode(o, bank.words, [""])

    def draw(step, rng):
        n = o.batch or o.setting["batch"]["unet"]
        bank.renew(max(1, n // 4), rng)
        ids, x_0 = bank.draw(n, rng)
        ids = torch.where(torch.rand(n, 1, device=o.device) < 0.1, nothing, ids)        # for guidance
        t = (1000 * (torch.randperm(n) + torch.rand(n)) / n).long().to(o.device)        # one from each n-th of the times
        return ids, x_0, t, torch.randn_like(x_0)

    def show(params):
        return sheet_of(model_of(o, params, bank.scale), PROMPTS[:16], (0,), 8, steps=12, guidance=4.0)

    fit(o, "unet", unet_parameters(o), functools.partial(unet_loss, o, alpha_bar), draw, show)


# ── The model as a user meets it ────────────────────────────────────────────────────────────────────────────────

def configs(o, scale):
    """{part: its config} of a diffusers folder."""
    return {"text_encoder": o.setting["text"], "vae": o.setting["vae"] | {"scaling_factor": scale},
            "unet": o.setting["unet"], "scheduler": SCHEDULER}


def model_of(o, params, scale):
    """tiny_sd's model from the parameters in training, with torch tensors as they stand."""
    parts = nest(params)
    return tiny_sd.Model("emoji", "", configs(o, scale), tokenizer(o), parts["text"], nest(trained_vae(o)), parts["unet"])


@torch.no_grad()
def draw_picture(model, prompt, seed=0, **how):
    """What the program draws for a prompt, (height, width, 3) uint8."""
    *_, x = tiny_sd.generate(model, prompt, seeds=(seed,), **how)
    return tiny_sd.decode(model, x)[0]


def sheet_of(model, prompts, seeds, columns, **how):
    """Prompts one after the other, each with all its seeds, as one picture."""
    cells = [draw_picture(model, prompt, seed, **how) for prompt in tqdm(prompts, "sheet", leave=False) for seed in seeds]
    return grid(cells, columns)


def export(o):
    """The trained parts in float16 as a diffusers folder, which takes the place of --out."""
    from safetensors.numpy import save_file
    params, words = nest(trained(o, "unet")), tokenizer(o)
    parts = {"text_encoder": params["text"], "vae": nest(trained_vae(o)), "unet": params["unet"]}
    classes = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer", "vae": "AutoencoderKL",
               "unet": "UNet2DConditionModel", "scheduler": SCHEDULER["_class_name"]}
    libraries = {part: ["transformers" if "CLIP" in name else "diffusers", name] for part, name in classes.items()}
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0", "requires_safety_checker": False,
             "safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None], **libraries}
    begin, end = words.BOS, words.EOS
    marks = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": end}
    texts = {"model_index.json": index, "tokenizer/vocab.json": words.vocab, "tokenizer/special_tokens_map.json": marks,
             "tokenizer/tokenizer_config.json": marks | {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH,
                                                         "do_lower_case": True}}
    for part, config in configs(o, scaling_factor(o)).items():
        texts[f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json"] = config

    with whole_folder(o.out) as folder:
        for name, value in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "tokenizer/merges.txt").write_text(read(o.state / "merges.txt"), encoding="utf-8")
        for part, weights in parts.items():
            name, prefix = ("model", "text_model.") if part == "text_encoder" else ("diffusion_pytorch_model", "")
            arrays = {prefix + key: tiny_sd.to_numpy(p.permute(0, 3, 1, 2) if p.ndim == 4 else p).astype(np.float16)
                      for key, p in flatten(weights).items()}
            save_file({key: np.ascontiguousarray(a) for key, a in arrays.items()}, folder / part / f"{name}.safetensors",
                      {"format": "pt"})
    print(o.out)


@contextlib.contextmanager
def whole_folder(path):
    """A temporary folder to fill, which then takes the place of path."""
    temporary, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    for folder in (temporary, old):
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


# ── Measuring ───────────────────────────────────────────────────────────────────────────────────────────────────

def signature(pictures):
    """A space that the model never saw: 16 x 16 pixels and a histogram of 64 colours; (n, height, width, 3) to (n, 832)."""
    n, side = len(pictures), pictures.shape[1]
    small = pictures.reshape(n, 16, side // 16, 16, side // 16, 3).mean((2, 4)).reshape(n, -1) / 255
    colours = (pictures // 64 @ np.array([16, 4, 1])).reshape(n, -1)
    histogram = np.stack([np.bincount(row, minlength=64) / row.size for row in colours])
    return np.concatenate([small / 16, histogram], axis=1).astype(np.float32)


class Judge:
    """Says which thing a drawn picture shows: the nearest of all things, painted in the same place on the same ground."""

    def __init__(self, o, model):
        self.things, self.model = load_things(o), model

    @torch.no_grad()
    def spaces(self, pictures):
        """The pictures (n, side, side, 3) in both spaces: the VAE's latents and the signature."""
        vae, groups = self.model.vae, self.model.config["vae"]["norm_num_groups"]
        x = tiny_sd.array_like(vae["quant_conv"]["weight"], pictures / np.float32(127.5) - 1)
        means = [tiny_sd.to_numpy(tiny_sd.vae_encode(x[i:i + 64], vae, groups)[0]) for i in range(0, len(x), 64)]
        return np.concatenate(means).reshape(len(pictures), -1), signature(pictures)

    @functools.lru_cache(maxsize=None)
    def originals(self, side, colour):
        pictures = self.things.pictures[side].astype(np.uint16)
        return self.spaces((pictures[..., :3] + np.array(colour) * (255 - pictures[..., 3:]) // 255).astype(np.uint8))

    def ranks(self, picture, part, colour):
        """How many other things are nearer than the right one, in each space: 0 is recognised."""
        i, halves, x, y = part
        side = halves * min(self.things.pictures)
        left, top = (round(place * (len(picture) - side)) for place in (x, y))
        drawn = self.spaces(picture[None, top:top + side, left:left + side])
        distances = [np.square(a - d).sum(1) for a, d in zip(self.originals(side, colour), drawn)]
        return [int((d < d[i]).sum()) for d in distances]


def to_lab(colour):
    """sRGB in 0..255 to CIE L*a*b* under D65."""
    c = np.asarray(colour, float) / 255
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = c @ np.array([[.4124, .2126, .0193], [.3576, .7152, .1192], [.1805, .0722, .9505]]) / [.9505, 1, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / 3 / (6 / 29) ** 2 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def held_out_scenes(names, n):
    """n things on backgrounds and n pairs that training never showed, from a fixed seed."""
    rng, grounds, pairs = np.random.default_rng(0), [], []
    while len(grounds) < n:
        i, colour = int(rng.integers(len(names))), str(rng.choice([*COLOURS]))
        if held_out([names[i][0]], colour):
            grounds.append(Scene([(i, 2, .5, .5)], COLOURS[colour], describe([article(names[i][0])], colour)))
    while len(pairs) < n:
        two, how = rng.choice(len(names), 2, replace=False).tolist(), str(rng.choice([*PAIRS]))
        if held_out([names[i][0] for i in two]):
            pairs.append(Scene([(i, 1, *place) for i, place in zip(two, PAIRS[how])], COLOURS["white"],
                               describe([article(names[i][0]) for i in two], how=how)))
    return grounds, pairs


def reconstruction(judge, model):
    """The VAE's mean PSNR in decibels over all things, each on a background of its own."""
    rng, things, config = np.random.default_rng(0), judge.things, model.config["vae"]
    decibels = []
    for i in tqdm(range(len(things.names)), "vae", leave=False):
        picture = paint(Scene([(i, 2, .5, .5)], rng.integers(0, 256, 3), ""), things)
        latents = tiny_sd.encode(model, picture, np.float32(0))
        error = np.square(tiny_sd.decode(model, latents)[0] - picture.astype(float)).mean()
        decibels.append(10 * math.log10(255 ** 2 / max(error, 1e-9)))
    return float(np.mean(decibels))


@torch.no_grad()
def evaluate(o):
    """Measures the folder --out through the program's own code, from fixed seeds; prints a table and writes OUT.json."""
    model = tiny_sd.load(o.out, "torch", o.device)
    judge = Judge(o, model)
    names = judge.things.names
    chosen = np.random.default_rng(1).permutation(len(names))[:o.limit].tolist()
    report = {"VAE: PSNR, dB": reconstruction(judge, model)}
    if (o.state / "clip.pt").exists():
        report["retrieval by the contrastive stage, top 1"] = retrieval(o, nest(trained(o, "clip")), Bank(o, 1, 1024))

    def shares(title, ranks):
        """ranks (scenes, parts, 2 spaces): a scene counts where all of its parts do."""
        worst = np.array(ranks).max(1)
        for space, column in zip(("latents", "pixels and colours"), worst.T):
            report[f"{title}, in {space}, top 1"] = float((column < 1).mean())
            report[f"{title}, in {space}, top 5"] = float((column < 5).mean())

    def drawn(scenes, title, negative=lambda scene: ""):
        for scene in tqdm(scenes, title, leave=False):
            yield scene, draw_picture(model, scene.caption, negative=negative(scene), **o.how)

    grounds, pairs = held_out_scenes(names, min(o.limit, 200))
    plain = [Scene([(i, 2, .5, .5)], COLOURS["white"], names[i][0]) for i in chosen]
    person = re.compile(r"\b(man|men|woman|women|person|people|boy|girl|family|couple|button|symbol|sign|keycap|clock|o'clock|"
                        r"thirty|arrow|square|circle|hand|face|moon|hair|kiss)\b")
    ranks = [[judge.ranks(picture, scene.parts[0], scene.colour)] for scene, picture in drawn(plain, "names")]
    shares("all names", ranks)
    shares("names of neither persons nor symbols", [r for r, i in zip(ranks, chosen) if not person.search(names[i][0])] or ranks)
    ranks, errors = [], []
    for scene, picture in drawn(grounds, "backgrounds"):
        bare = judge.things.pictures[len(picture)][scene.parts[0][0]][..., 3] == 0
        if bare.any():
            errors.append(np.linalg.norm(to_lab(np.median(picture[bare], 0)) - to_lab(scene.colour)))
        ranks.append([judge.ranks(picture, scene.parts[0], scene.colour)])
    shares("held-out backgrounds", ranks)
    report["held-out backgrounds: median colour error, ΔE"] = float(np.median(errors))
    ranks = [[judge.ranks(picture, part, scene.colour) for part in scene.parts] for scene, picture in drawn(pairs, "pairs")]
    shares("held-out pairs, both", ranks)

    def second(scene):      # the thing that the negative prompt names: it should go
        return names[scene.parts[1][0]][0]
    without = [judge.ranks(picture, scene.parts[1], scene.colour) for scene, picture in drawn(pairs, "negative", second)]
    for title, found in (("", [r[1] for r in ranks]), (" when the negative prompt names it", without)):
        report[f"held-out pairs, the second{title}, in latents, top 1"] = float((np.array(found)[:, 0] < 1).mean())
    report["seconds for one picture with NumPy, 20 steps, from start to file"] = seconds_for_one(o)
    report["megabytes"] = sum(f.stat().st_size for f in o.out.rglob("*") if f.is_file()) / 1e6
    report |= {"names drawn": len(chosen), "scenes of each held-out kind": len(grounds)}
    with whole(o.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print("| measure | value |\n| --- | --- |")
    print("\n".join(f"| {name} | {value:.4g} |" for name, value in report.items()))


def seconds_for_one(o):
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        subprocess.run([sys.executable, HERE.parent / "tiny_sd.py", "red apple", "-m", o.out, "--steps", "20",
                        "-o", f"{folder}/apple.png"], check=True, capture_output=True)
        return time.monotonic() - begun


def sheet(o):
    """OUT.png: 24 prompts as most people would type them, then 24 held-out combinations, unchosen, all from --seed."""
    grounds, pairs = held_out_scenes(load_things(o).names, 12)
    prompts = PROMPTS + [scene.caption for scene in grounds + pairs]
    save_picture(sheet_of(tiny_sd.load(o.out, "torch", o.device), prompts, (o.seed,), 8, **o.how), o.out.with_suffix(".png"))
    print("\n".join(prompts))


# ── Command line ────────────────────────────────────────────────────────────────────────────────────────────────

class Stage(NamedTuple):
    """A trained part: parameters(o) -> {name: tensor} as it begins, train(o), and its share of the minutes of `all`."""
    parameters: object
    train: object
    share: float


STAGES = {"vae": Stage(vae_parameters, train_vae, 0.15), "decoder": Stage(decoder_parameters, train_decoder, 0.05),
          "clip": Stage(clip_parameters, train_clip, 0.04),
          "unet": Stage(unet_parameters, train_unet, 0.76)}


def train_all(o):
    """Every stage after the other, then the folder and its sheet."""
    render(o)
    for stage in STAGES.values():
        stage.train(argparse.Namespace(**vars(o) | {"minutes": o.minutes * stage.share}))
    if not dist.is_initialized() or dist.get_rank() == 0:
        export(o)
        sheet(o)


COMMANDS = {"render": render, **{name: stage.train for name, stage in STAGES.items()},
            "export": export, "evaluate": evaluate, "sheet": sheet, "all": train_all}


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("command", choices=COMMANDS)
    p.add_argument("--config", choices=CONFIGS, default="small", help="the size of picture and networks (default: small)")
    p.add_argument("--minutes", type=float, default=30, help="how long to train, in all (default: 30)")
    p.add_argument("--steps", type=int, help="how many steps to train, in all, instead of minutes")
    p.add_argument("--batch", type=int, help="pictures a step, over all processes")
    p.add_argument("--rate", type=float, help="the highest learning rate")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--threads", type=int, help="of each process, on a CPU")
    p.add_argument("--compile", action="store_true", help="compile the losses first, which pays on a GPU")
    p.add_argument("--bank", type=int, metavar="N", help="scenes encoded ahead (default: 4096 for clip, 8192 for unet)")
    p.add_argument("--keep-every", type=float, default=60, metavar="SECONDS", help="between savings of the state (default: 60)")
    p.add_argument("--show-every", type=float, default=600, metavar="SECONDS", help="between sheets of samples")
    p.add_argument("--state", type=Path, default=HERE / "state", help="folder of what training keeps (default: weights/state)")
    p.add_argument("--data", type=Path, help="zip of rendered pictures (default: STATE/emoji.zip)")
    p.add_argument("--out", type=Path, default=HERE / "emoji", help="the model's folder (default: weights/emoji)")
    p.add_argument("--limit", type=int, default=10 ** 6, help="evaluate: at most so many names, and scenes of each kind")
    p.add_argument("--draw-steps", type=int, default=20, help="evaluate, sheet: sampling steps (default: 20)")
    p.add_argument("--cfg-scale", type=float, default=4.0, help="evaluate, sheet: guidance (default: 4)")
    o = p.parse_args()
    o.setting, o.data = CONFIGS[o.config], o.data or o.state / "emoji.zip"
    o.how = {"steps": o.draw_steps, "guidance": o.cfg_scale}
    if min(o.minutes, o.limit, *(1 if n is None else n for n in (o.steps, o.batch, o.bank))) <= 0:
        p.error("--minutes, --steps, --batch, --bank and --limit must be above 0")
    return o


def main():
    o = parse_arguments()
    if o.threads:
        torch.set_num_threads(o.threads)
    if o.device == "cpu":
        tiny_sd.on_torch().dot_product_attention = cpu_attention
    if "RANK" in os.environ:                                    # started by torchrun
        dist.init_process_group("nccl" if o.device == "cuda" else "gloo")
        if o.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch._dynamo.config.optimize_ddp = False               # one graph, not one for each bucket of gradients
    try:
        COMMANDS[o.command](o)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
