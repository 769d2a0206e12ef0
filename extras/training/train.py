#!/usr/bin/env python3
"""Train weights/emoji: a small but complete Stable Diffusion, from drawings to pictures.

    render ── drawings ──► vae, decoder ── latents ──► clip ── text encoder ──► unet ──► export

The recipe follows the paper (Rombach et al., 2022), stage by stage, and uses tiny_sd.py's own
functions: with torch tensors they are differentiable. drawings.py, painting.py and scenes.py make
the training data, fitting.py has the training loop, folder.py writes the model's folder, and
measure.py evaluates the model.

    python -m extras.training.train all --minutes 120   from scratch to weights/state/emoji
    python -m extras.training.train unet --start weights/emoji      start from a finished model
    python -m extras.training.train control --start weights/emoji   a ControlNet for outlines
    python -m extras.training.train evaluate --out weights/emoji    the table in weights/README.md
    torchrun --nproc-per-node 8 -m -- extras.training.train unet --device cuda

Ctrl-C saves the progress, and a kill loses a minute at most: the same command resumes.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":      # runs main() below; set up signals before the slow imports
    from extras.start import program
    program("extras.training.train")

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from tqdm import tqdm

import tiny_sd
from extras import cli, control
from extras.fast import keep_freed_memory
from extras.files import held, read_text, replace_atomically
from extras.shapes import conv, layer, text_shapes, unet_shapes, vae_shapes
from extras.training import fitting, measure
from extras.training.drawings import load_captioned, load_things, render
from extras.training.fitting import (
    ZERO,
    Optimizer,
    Schedule,
    check_same,
    fit,
    initial,
    join_processes,
    minimize,
    process,
    save_sample,
    share_of_batch,
)
from extras.training.folder import (
    CONTROL,
    HINT_CHANNELS,
    LENGTH,
    MODEL,
    SCHEDULER,
    VOCABULARY,
    check_replaceable,
    control_config,
    text_config,
    unet_config,
    vae_config,
    write_control,
    write_model,
)
from extras.training.painting import outlines
from extras.training.scenes import draw_scene, every_scene, paint
from tiny_sd import flatten, nest, read_config, require, tell

# ── Settings ────────────────────────────────────────────────────────────────────────────────────

class Setting(NamedTuple):
    """The three networks' config.json, as diffusers writes them, and how to train them."""
    vae: dict
    unet: dict
    text: dict
    batch: dict     # {stage: pictures per step}
    rate: dict      # {stage: highest learning rate}

    @property
    def size(self):
        """Width and height of a picture in pixels."""
        return self.vae["sample_size"]

    @property
    def groups(self):
        return self.vae["norm_num_groups"]

    def shapes(self, part):
        """{name: shape} of a part's weights, as checkpoints have them."""
        build = {"vae": vae_shapes, "unet": unet_shapes, "text_encoder": text_shapes}[part]
        config = self.text if part == "text_encoder" else getattr(self, part)
        return flatten(build(read_config(part, config)))


CONFIGS = {
    "small": Setting(
        vae=vae_config(size=128, channels=(16, 32, 64, 64), groups=8),
        unet=unet_config(latents=16, channels=(64, 128, 192), attends=(False, True, True),
                         heads=(2, 4, 6), groups=16, context=192),
        text=text_config(width=192, layers=4, heads=4),
        batch={"vae": 16, "decoder": 16, "clip": 256, "unet": 96, "control": 32},
        rate={"vae": 2e-3, "decoder": 1e-3, "clip": 1e-3, "unet": 1e-3, "control": 3e-3}),
    "base": Setting(
        vae=vae_config(size=256, channels=(32, 64, 128, 128), groups=16),
        unet=unet_config(latents=32, channels=(128, 192, 256), attends=(True, True, True),
                         heads=(4, 6, 8), groups=32, context=288),
        text=text_config(width=288, layers=6, heads=6),
        batch={"vae": 64, "decoder": 64, "clip": 1024, "unet": 512, "control": 128},
        rate={"vae": 1e-3, "decoder": 5e-4, "clip": 1e-3, "unet": 1e-3, "control": 3e-3})}


class Job(NamedTuple):
    """The arguments of every stage."""
    things: object
    setting: Setting
    schedule: Schedule
    state: object


# ── The state: files that training saves ────────────────────────────────────────────────────────

class State(fitting.State):
    """fitting.State, plus the tokenizer's merges.txt and the latents' scaling_factor.json."""

    def trained(self, stage, shapes):
        """The averaged {name: tensor} of a stage; UserError if they do not fit.

        shapes: {name: shape} of the weights wanted, as in checkpoints.
        """
        kept = self.load(stage)
        require(kept, f"{self.path(stage)} is missing: run the stage {stage} first")
        fresh = {name: p.shape for name, p in initial(shapes, 0).items()}
        for name, shape in fresh.items():
            found = kept["mean"].get(name)
            require(found is not None and found.shape == shape, f"{self.path(stage)} does not fit: "
                    f"{name} is missing or of another size. Was it made with another --config? "
                    "Name another --state")
        return {name: kept["mean"][name] for name in fresh}

    def vae(self, setting):
        """The VAE, nested, with the decoder of the later stage if that has run."""
        shapes = setting.shapes("vae")
        params = self.trained("vae", shapes)
        if self.path("decoder").exists():
            params |= self.trained("decoder", decoder_shapes(setting))
        return nest(params)

    def tokenizer(self, things=None):
        """The tokenizer in merges.txt; if missing, learn it from these things' captions."""
        path = self.folder / "merges.txt"
        if not path.exists():
            merges = train_tokenizer(things)
            with replace_atomically(path) as temporary:
                lines = ["#version: 0.2", *map(" ".join, merges), ""]
                temporary.write_text("\n".join(lines), encoding="utf-8")
        lines = [tuple(line.split()) for line in read_text(path).split("\n")[1:]]
        merges = [pair for pair in lines if pair]
        require(len(merges) == VOCABULARY - 514 and all(len(pair) == 2 for pair in merges),
                f"{path} does not hold {VOCABULARY - 514} pairs: move it elsewhere, with clip.pt "
                "and unet.pt, or name another --state")
        words = tiny_sd.Tokenizer(merges, length=LENGTH)
        words.merge = functools.cache(words.merge)      # captions repeat the same words
        return words

    def scaling_factor(self, latents=None):
        """The factor that gives latents variance 1: computed from these once, then saved."""
        path = self.folder / "scaling_factor.json"
        if not path.exists() and latents is not None:
            with replace_atomically(path) as temporary:
                temporary.write_text(json.dumps(1 / latents.std().item()))
        try:
            factor = float(json.loads(read_text(path)))
        except (ValueError, TypeError, RecursionError):
            factor = math.nan
        require(0 < factor < math.inf, f"{path} does not hold a number above 0: name another "
                "--state")
        return factor

    def begin_from(self, folder, setting):
        """Take missing files from an exported model, as if its stages had just begun."""
        model = tiny_sd.load(folder, "torch")
        text = model.encoders[0].weights
        found = {"vae": flatten(model.vae), "unet": flatten({"text": text, "unet": model.unet})}
        wanted = {"vae": setting.shapes("vae"), "unet": unet_stage_shapes(setting)}
        for stage, params in found.items():
            shapes = {name: p.shape for name, p in initial(wanted[stage], 0).items()}
            require(shapes == {name: p.shape for name, p in params.items()},
                    f"training cannot start from {folder}: its networks are not those of --config")
        texts = {"merges.txt": read_text(Path(folder) / "tokenizer/merges.txt"),
                 "scaling_factor.json": json.dumps(model.config.vae.scaling_factor)}
        for stage, params in found.items():
            if not self.path(stage).exists():
                params = {name: p.float() for name, p in params.items()}
                self.save(stage, {"params": params, "mean": params, "step": 0, "seconds": 0.0,
                                  "losses": []})
        for name, text in texts.items():
            if not (self.folder / name).exists():
                with replace_atomically(self.folder / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")


# ── The tokenizer: merge the most frequent byte pair, again and again ───────────────────────────

def train_tokenizer(things, captions=20_000):
    """Learn merges from names and captions (Sennrich et al., 2016)."""
    rng, spell = np.random.default_rng(0), tiny_sd.Tokenizer([])
    said = [name for names in things.names for name in names] * 8
    said += [draw_scene(things, rng).caption for _ in range(captions)]
    counts = collections.Counter(word for text in said for word in spell.words(text))
    words = {word: spell.merge(word) for word in counts}
    merges = []
    while len(merges) < VOCABULARY - 514:       # 512 symbols of bytes, and two specials
        pair = most_frequent_pair(words, counts)
        if pair is None:
            return merges + idle_merges(spell, {*merges}, VOCABULARY - 514 - len(merges))
        merges.append(pair)
        for symbols in words.values():
            join(symbols, pair)
    return merges


def most_frequent_pair(words, counts):
    """The most frequent pair of neighbours; None if every word is one symbol."""
    pairs = collections.Counter()
    for word, symbols in words.items():
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += counts[word]
    return max(pairs, key=lambda pair: (pairs[pair], pair), default=None)


def join(symbols, pair):
    """Merge the pair wherever it occurs in a list of symbols, in place."""
    i = 0
    while i < len(symbols) - 1:
        if (symbols[i], symbols[i + 1]) == pair:
            symbols[i:i + 2] = ["".join(pair)]
        i += 1


def idle_merges(spell, known, n):
    """n pairs that no word needs, to fill the vocabulary."""
    symbols = spell.bytes.values()
    idle = (pair for pair in itertools.product(symbols, symbols) if pair not in known)
    return [*itertools.islice(idle, n)]


# ── Stage 1: the VAE ────────────────────────────────────────────────────────────────────────────

def to_model(pictures, device):
    """uint8 pictures (batch, height, width, 3) as a tensor in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).to(device).float() / 127.5 - 1


def differences(x):
    """The differences between neighbouring pixels, down and across."""
    return x[:, 1:] - x[:, :-1], x[:, :, 1:] - x[:, :, :-1]


def pixels_and_edges(drawn, picture):
    """The absolute error of the pixels, half that of the edges, and that of the edges' strength.

    The strength is averaged over 5 x 5 pixels. Without it, edges would be blurred: a misplaced
    edge would cost more than none.
    """
    def strength(x):
        return [(F.avg_pool2d(d.square().sum(-1), 5, 2) + 1e-4).sqrt() for d in differences(x)]

    drawn = drawn.float()
    edges = sum((a - b).abs().mean() for a, b in zip(differences(drawn), differences(picture)))
    crisp = sum((a - b).abs().mean() for a, b in zip(strength(drawn), strength(picture)))
    return (drawn - picture).abs().mean() + edges / 2 + crisp


def pictures_of_scenes(job, rng, n, moved=True):
    """n scenes of all kinds as a tensor, moved by up to half a latent."""
    side = job.setting.size // job.setting.unet["sample_size"] // 2
    pictures = [np.roll(paint(draw_scene(job.things, rng), job.things),
                        rng.integers(-side, side + 1, 2) * moved, (0, 1)) for _ in range(n)]
    return to_model(pictures, job.state.device)


def parameters(begin, device):
    """Copies of these initial tensors on the device."""
    return {name: p.detach().clone().to(device) for name, p in begin.items()}


def train_stage(stage, job, optimizer, losses, rng, show=None):
    fit(stage, optimizer, losses, rng, job.schedule, job.state, show)
    if show:
        save_sample(stage, job.state, show)


def train_vae(job):
    setting, schedule, rng = job.setting, job.schedule, np.random.default_rng()
    n, side = share_of_batch("vae", schedule), setting.unet["sample_size"]
    params = parameters(initial(setting.shapes("vae"), schedule.seed), job.state.device)
    optimizer, vae = Optimizer(params, schedule), nest(params)

    def batches():
        while True:
            picture = pictures_of_scenes(job, rng, n)
            yield picture, torch.randn(n, side, side, 4, device=job.state.device)

    def loss(picture, eps):
        return tiny_sd.vae_loss(picture, eps, vae, setting.groups, pixels_and_edges)

    train_stage("vae", job, optimizer, minimize(loss, optimizer, batches()), rng,
                lambda: before_and_after(job, nest(optimizer.mean)))


@torch.no_grad()
def before_and_after(job, vae):
    """Originals above, reconstructions below; print the error in decibels."""
    groups = job.setting.groups
    image = pictures_of_scenes(job, np.random.default_rng(0), 24, moved=False)
    drawn = tiny_sd.vae_decode(tiny_sd.vae_encode(image, vae, groups)[0], vae, groups).clip(-1, 1)
    decibels = 10 * (4 / (drawn - image).square().mean((1, 2, 3))).log10()
    tqdm.write(f"vae: PSNR {decibels.mean():.2f} dB on 24 scenes", sys.stderr)
    pictures = [(x.float().cpu().numpy() * 127.5 + 127.5).round().astype(np.uint8)
                for pair in zip(image.split(12), drawn.split(12)) for x in pair]
    return fitting.grid(np.concatenate(pictures), 12)


# ── Stage 1b: the decoder alone ─────────────────────────────────────────────────────────────────
# The encoder now defines the latents. The decoder can still improve, since the other stages see
# only latents; Stable Diffusion's published VAEs ft-EMA and ft-MSE were trained this way. Latents
# from a U-Net are never exact, so the decoder also sees noisy ones, and learns to decode them
# cleanly.
#
# A second network, the discriminator, learns to tell the decoder's pictures from painted ones,
# patch by patch, while the decoder learns to fool it (Isola et al., 2017; Esser et al., 2021). The
# decoder's pictures should also give the same values in the discriminator's inner layers as the
# painted ones; LPIPS, too, compares pictures by the inner layers of a network.

NOISE = 0.4     # the maximum, in standard deviations of the latents
WIDTHS = 3, 24, 48, 96      # of the discriminator's layers
EAGER = 4       # how much faster than the decoder it learns
SHARES = 1, 1, 2        # of the gradient: pixels and edges, inner layers, fooling it


def decoder_shapes(setting):
    return {name: shape for name, shape in setting.shapes("vae").items()
            if name.startswith(("decoder.", "post_quant_conv."))}


def new_discriminator(seed):
    """Its initial weights: smaller, because inspect() multiplies by EAGER (Karras et al., 2018).

    1.4 makes up for what leaky_relu takes away.
    """
    halving = [layer(o, i, 4, 4) for i, o in itertools.pairwise(WIDTHS)]
    shapes = flatten({"discriminator": [*halving, conv(WIDTHS[-1], 1)]})
    return {name: 1.4 / EAGER * p for name, p in initial(shapes, seed).items()}


def inspect(x, layers):
    """Each layer's output for pictures x; the last, (batch, h, w, 1), says how real a patch is.

    It is multiplied by EAGER twice, so that it soon tells pictures apart.
    """
    found = []
    for weights in layers[:-1]:
        x = EAGER * tiny_sd.TORCH["conv2d"](x, *weights.values(), stride=2)
        found.append(x := F.leaky_relu(x, 0.2))
    return [*found, EAGER ** 2 * tiny_sd.TORCH["conv2d"](x, *layers[-1].values())]


def judged(drawn, image, layers):
    """The decoder's errors in the discriminator's eyes: in its inner layers, and in its verdict."""
    with torch.no_grad():
        *theirs, _ = inspect(image, layers)
    *ours, real = inspect(drawn, [{name: p.detach() for name, p in weights.items()}
                                  for weights in layers])
    alike = sum((a - b).abs().mean() / b.abs().mean() for a, b in zip(ours, theirs))
    return alike, -real.mean()


def misjudged(drawn, image, layers):
    """The discriminator's own error (the hinge loss)."""
    real, fake = (inspect(x, layers)[-1] for x in (image, drawn.detach()))
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def balanced(errors, drawn):
    """The sum of errors, weighted so that their gradients at the picture are as SHARES says."""
    first, *_ = sizes = [torch.autograd.grad(error, drawn, retain_graph=True)[0].norm()
                         for error in errors]
    return sum(share * error * first / size for share, error, size in zip(SHARES, errors, sizes))


def train_decoder(job):
    setting, schedule, rng = job.setting, job.schedule, np.random.default_rng()
    n, whole = share_of_batch("decoder", schedule), job.state.trained("vae", setting.shapes("vae"))
    encoder = nest(whole)
    begin = {name: whole[name] for name in decoder_shapes(setting)}
    params = parameters(begin | new_discriminator(schedule.seed), job.state.device)
    optimizer, decoder = Optimizer(params, schedule), nest(params)

    def batches():
        while True:
            image = pictures_of_scenes(job, rng, n)
            with torch.no_grad():
                z = tiny_sd.vae_encode(image, encoder, setting.groups)[0].float()
            level = NOISE * rng.random((n, 1, 1, 1), np.float32) * (rng.random((n, 1, 1, 1)) < 0.7)
            yield z + tiny_sd.array_like(z, level) * z.std() * torch.randn_like(z), image

    def loss(z, image):
        drawn, layers = tiny_sd.vae_decode(z, decoder, setting.groups), decoder["discriminator"]
        errors = pixels_and_edges(drawn, image), *judged(drawn, image, layers)
        return balanced(errors, drawn) + misjudged(drawn, image, layers)

    train_stage("decoder", job, optimizer, minimize(loss, optimizer, batches()), rng,
                lambda: before_and_after(job, nest(whole | optimizer.mean)))


# ── A bank of latents ───────────────────────────────────────────────────────────────────────────

class Bank:
    """Scenes as scaled latents (n, h, w, 4), with their captions.

    The bank is filled ahead and renewed gradually, so training sees more scenes than fit in memory
    and encodes each only once. Each process has its own bank.
    """

    def __init__(self, job, filled, capacity):
        self.job, self.turn, self.scale = job, 0, 1.0
        self.words, self.vae = job.state.tokenizer(job.things), job.state.vae(job.setting)
        rng = np.random.default_rng([job.schedule.seed, process()[0]])
        filled = job.schedule.bank or filled
        if job.things.drawings is None:     # each scene is one of the pictures
            filled = min(filled, len(job.things.names))
            self.warn_of_long_captions()
        self.capacity = max(capacity, filled)
        self.captions, self.latents = self.make(self.scenes(min(1024, filled), rng))
        self.scale = first_process_first(lambda: job.state.scaling_factor(self.latents))
        self.latents *= self.scale
        while len(self.captions) < filled:
            self.renew(min(1024, filled - len(self.captions)), rng)

    def warn_of_long_captions(self):
        """Warn of captions that are too long for the text encoder."""
        long = [caption for caption, in self.job.things.names if self.words.encode(caption)[1]]
        if long and process()[0] == 0:
            tell(f"{len(long)} captions have more than {LENGTH - 2} tokens, and are cut off there: "
                 f"{tiny_sd.shorten(long[0])}")

    def scenes(self, n, rng):
        return [draw_scene(self.job.things, rng) for _ in range(n)]

    @torch.no_grad()
    def make(self, scenes):
        """Captions and latents of some scenes."""
        pictures, latents = [paint(scene, self.job.things) for scene in scenes], []
        for i in range(0, len(pictures), 64):
            image = to_model(pictures[i:i + 64], self.job.state.device)
            mean, _ = tiny_sd.vae_encode(image, self.vae, self.job.setting.groups)
            latents.append(mean.float() * self.scale)
        return [*map(self.said, scenes, pictures)], torch.cat(latents)

    def said(self, scene, picture):
        """What is learnt with a picture: its caption."""
        return scene.caption

    def renew(self, n, rng):
        """Add n new scenes; when the bank is full, they replace the oldest."""
        captions, latents = self.make(self.scenes(n, rng))
        if len(self.captions) < self.capacity:
            self.captions += captions
            self.latents = torch.cat([self.latents, latents])
            return
        for i, caption in enumerate(captions):
            oldest = (self.turn + i) % len(self.captions)
            self.captions[oldest], self.latents[oldest] = caption, latents[i]
        self.turn += n

    def batches(self, n, new, rng):
        """Renew `new` scenes, then yield (latents, captions) of n from the bank; repeat."""
        while True:
            self.renew(new, rng)
            chosen = rng.integers(0, len(self.captions), n).tolist()
            yield self.latents[chosen], [self.captions[i] for i in chosen]


def first_process_first(make):
    """Call make() in the first process, then in the others."""
    if process()[0] > 0:
        dist.barrier()
    made = make()
    if process()[0] == 0 and dist.is_initialized():
        dist.barrier()
    return made


# ── Stage 2: the text encoder ───────────────────────────────────────────────────────────────────

def text_stage_shapes(setting):
    return {f"text.{name}": shape for name, shape in setting.shapes("text_encoder").items()}


def clip_parameters(setting, seed):
    """Initial text encoder, image encoder (a VAE encoder that takes latents) and projections."""
    width = setting.text["hidden_size"]
    image = read_config("vae", setting.vae | {"block_out_channels": [64, 128, width],
                                              "latent_channels": width // 2})
    shapes = {"image": vae_shapes(image)["encoder"] | {"conv_in": conv(4, 64)},
              "text_projection": {"weight": (width, width)}, "logit_scale": (1,)}
    params = initial(text_stage_shapes(setting) | flatten(shapes), seed)
    return params | {"logit_scale": torch.full((1,), math.log(1 / 0.07))}


def embed_text(setting, words, params, captions):
    """Unit vectors (batch, width): the state at the end of the caption, projected."""
    ids = np.stack([words.encode(text)[0] for text in captions])
    text = params["text"]
    states = tiny_sd.text_encoder(ids, setting.text["num_attention_heads"], tiny_sd.quick_gelu,
                                  text["embeddings"], text["encoder"]["layers"])
    ends = (ids == words.vocab[words.EOS]).argmax(1)
    last = tiny_sd.layer_norm(states[-1], **text["final_layer_norm"])[np.arange(len(ids)), ends]
    return F.normalize(tiny_sd.linear(last, **params["text_projection"]).float(), dim=-1)


def embed_image(setting, params, latents):
    """Unit vectors (batch, width): the mean of the image encoder's output."""
    h = tiny_sd.vae_encoder(latents, setting.groups, **params["image"])
    return F.normalize(h.float().mean((1, 2)), dim=-1)


def train_clip(job):
    setting, schedule, rng = job.setting, job.schedule, np.random.default_rng()
    bank, n = Bank(job, filled=4096, capacity=32768), share_of_batch("clip", schedule)
    params = parameters(clip_parameters(setting, schedule.seed), job.state.device)
    optimizer, nested = Optimizer(params, schedule), nest(params)

    def loss(latents, captions):
        text = embed_text(setting, bank.words, nested, captions)
        image = embed_image(setting, nested, latents)
        if dist.is_initialized():
            text, image = (torch.cat(dist.nn.functional.all_gather(x)) for x in (text, image))
        return tiny_sd.clip_loss(text, image, params["logit_scale"].clip(max=math.log(100)))

    train_stage("clip", job, optimizer, minimize(loss, optimizer, bank.batches(n, 32, rng)), rng)
    if process()[0] == 0:
        found = retrieval(setting, nest(optimizer.mean), bank)
        print(f"clip: {found:.1%} of the captions are nearest to their own drawing",
              file=sys.stderr)


@torch.no_grad()
def retrieval(setting, params, bank):
    """The fraction of captions that are nearest to their own drawing."""
    captions, latents = bank.make(every_scene(bank.job.things))
    text = torch.cat([embed_text(setting, bank.words, params, captions[i:i + 256])
                      for i in range(0, len(captions), 256)])
    image = torch.cat([embed_image(setting, params, part) for part in latents.split(256)])
    nearest = (text @ image.T).argmax(1)
    return (nearest == torch.arange(len(captions), device=nearest.device)).float().mean().item()


# ── Stage 3: the U-Net ──────────────────────────────────────────────────────────────────────────

def unet_stage_shapes(setting):
    unet = {f"unet.{name}": shape for name, shape in setting.shapes("unet").items()}
    return text_stage_shapes(setting) | unet


def unet_parameters(job):
    """A new U-Net, and the text encoder from its stage, which continues to train."""
    new = initial(unet_stage_shapes(job.setting), job.schedule.seed, (*ZERO, "conv_out.weight"))
    if job.state.path("unet").exists():     # fit() will resume from it
        return new
    return new | job.state.trained("clip", text_stage_shapes(job.setting))


def loss_weight(alpha_bar):
    """min(1, 5 (1 - ᾱ)): this makes the error of v that of x_0 times min(5, 1 / (1 - ᾱ)).

    At high noise, predicting v means predicting the picture, while predicting ε is nearly trivial
    (Salimans and Ho, 2022); and there the caption decides what to draw. The cap at low noise is
    that of Hang et al. (2023).
    """
    return np.minimum(1, 5 * (1 - alpha_bar))


def noisy_times(n, T, rng, shift=3):
    """n times in 0 .. T - 1, stratified and shifted towards noise: a third as many near 0.

    The content of a picture is decided while x_t is nearly all noise. Formula: Esser et al., 2024.
    """
    u = (rng.permutation(n) + rng.random(n)) / n
    return (T * shift * u / (1 + (shift - 1) * u)).astype(int)


def as_model(job, words, params):
    """A Model with these parameters, to train or to draw with."""
    setting, nested = job.setting, nest(params)
    config = SimpleNamespace(
        vae=read_config("vae", setting.vae | {"scaling_factor": job.state.scaling_factor()}),
        unet=read_config("unet", setting.unet), scheduler=read_config("scheduler", SCHEDULER))
    encoder = tiny_sd.Encoder(words, read_config("text_encoder", setting.text), nested["text"])
    levels = tiny_sd.scaled_linear_schedule()
    return tiny_sd.Model("training", config, [encoder], job.state.vae(setting), nested["unet"],
                         levels, SCHEDULER["_guidance_scale"])


def train_unet(job):
    schedule, rng = job.schedule, np.random.default_rng()
    bank, n = Bank(job, filled=8192, capacity=65536), share_of_batch("unet", schedule)
    params = parameters(unet_parameters(job), job.state.device)
    optimizer, model = Optimizer(params, schedule), as_model(job, bank.words, params)
    losses = tiny_sd.train(model, optimizer, bank.batches(n, max(1, n // 8), rng), rng,
                           noisy_times, loss_weight)

    @torch.no_grad()
    def show():
        return measure.sheet(as_model(job, bank.words, optimizer.mean),
                             measure.sample_prompts(job.things), seeds=(0,), columns=8, steps=12)

    train_stage("unet", job, optimizer, losses, rng, show)


# ── A control network for outlines ──────────────────────────────────────────────────────────────
# Not a part of `all`: it learns to lead a finished U-Net, which stays as it is (REFERENCE §9).

class OutlinedBank(Bank):
    """Its captions are pairs: a caption, and outlines (height, width) of uint8."""

    def said(self, scene, picture):
        return scene.caption, outlines(picture)


def control_shapes(setting):
    """Those of the U-Net's way down without attention, and of what is new before and behind it."""
    widths, read = setting.unet["block_out_channels"], HINT_CHANNELS
    blocks = [conv(i, o) for a, b in zip(read, read[1:]) for i, o in ((a, a), (a, b))]
    skips = [width for width in widths for _ in range(setting.unet["layers_per_block"] + 1)]
    copied = {name: shape for name, shape in setting.shapes("unet").items()
              if name.startswith(control.COPIED)}
    return control.without_attention(copied) | flatten({
        "controlnet_cond_embedding": {"conv_in": conv(3, read[0]), "blocks": blocks,
                                      "conv_out": conv(read[-1], widths[0])},
        "controlnet_down_blocks": [layer(n, n, 1, 1) for n in [widths[0], *skips[:-1]]],
        "controlnet_mid_block": layer(widths[-1], widths[-1], 1, 1)})


def control_parameters(job, unet):
    """A copy of the U-Net's way down, and zeros where what is new joins it."""
    shapes = control_shapes(job.setting)
    zeros = tuple(name for name in shapes if name.startswith(control.OWN[1:]))
    params = initial(shapes, job.schedule.seed, ("conv_out.weight", *zeros))
    for name in params:
        if name.startswith(control.OWN[0]):
            params[name] *= 2       # silu(x) is about x / 2, seven times in a row
        params[name] = unet.get(f"unet.{name}", params[name])
    return params


def led_unet(model, weights, lines, x, t, context):
    """What the U-Net predicts for x, led by outlines (n, height, width) of uint8.

    t: one time, or one of each x. Where there are more x than outlines, these come again.
    """
    picture = torch.from_numpy(lines).to(x.device)[..., None].repeat(1, 1, 1, 3) / 255
    hint = control.hint_features(picture, **weights["controlnet_cond_embedding"])
    hint = hint.repeat(len(x) // len(hint), 1, 1, 1)
    added = control.residuals(weights, model, x, hint, t, context)
    temb = model.embed_time(model, x, np.full(len(x), t))
    return control.steered(model, x, temb, context, [added])


def train_control(job):
    schedule, rng = job.schedule, np.random.default_rng()
    whole = job.state.trained("unet", unet_stage_shapes(job.setting))
    bank, n = OutlinedBank(job, filled=2048, capacity=8192), share_of_batch("control", schedule)
    params = parameters(control_parameters(job, whole), job.state.device)
    optimizer, weights = Optimizer(params, schedule), nest(params)
    model = as_model(job, bank.words, whole)
    prediction_type = model.config.scheduler.prediction_type

    def loss(x_0, said):
        captions, lines = zip(*said)
        with torch.no_grad():       # half without a caption: outlines alone must say what it is
            context, _ = tiny_sd.embed_prompts(model, tiny_sd.drop_captions(captions, rng, 0.5))
        t = noisy_times(len(x_0), len(model.alpha_bars), rng)
        levels = model.alpha_bars[t]
        predict = functools.partial(led_unet, model, weights, np.stack(lines), t=t,
                                    context=context)
        alpha_bar = tiny_sd.array_like(x_0, levels)[:, None, None, None]
        errors = tiny_sd.diffusion_loss(predict, prediction_type, x_0, alpha_bar,
                                        torch.randn_like(x_0))
        return (tiny_sd.array_like(errors, loss_weight(levels)) * errors).mean()

    losses = minimize(loss, optimizer, bank.batches(n, max(1, n // 8), rng))
    train_stage("control", job, optimizer, losses, rng,
                lambda: with_and_without(job, model, nest(optimizer.mean)))


@torch.no_grad()
def with_and_without(job, model, weights):
    """Outlines of scenes that training never shows; what is drawn without and with them.

    Says how far the outlines of what is drawn are those.
    """
    rng = np.random.default_rng(0)
    scenes = [draw_scene(job.things, rng, shown=False) for _ in range(12)]
    captions = [scene.caption for scene in scenes]
    lines = np.stack([outlines(paint(scene, job.things)) for scene in scenes])

    def led(model, x, t, context):
        x = tiny_sd.array_like(context, x)
        return tiny_sd.to_numpy(led_unet(model, weights, lines, x, t, context))

    both = [measure.draw(model, captions, range(len(scenes)), steps=12, predict=predict)
            for predict in (tiny_sd.predict, led)]
    alone, follows = (measure.agreement(pictures, lines) for pictures in both)
    tqdm.write(f"control: the outlines of {len(lines)} pictures correlate by {follows:.2f} with "
               f"those asked for, without it by {alone:.2f}", sys.stderr)
    rows = np.stack([lines[..., None].repeat(3, -1), *both], 1)
    return fitting.grid(np.concatenate(rows), 12)


# ── Command line ────────────────────────────────────────────────────────────────────────────────

# How each stage is trained, and its share of `all`.
STAGES = {"vae": (train_vae, 0.15), "decoder": (train_decoder, 0.05),
          "clip": (train_clip, 0.04), "unet": (train_unet, 0.76), "control": (train_control, 0)}


def run_stage(stage, job):
    """Train a stage, unless it is finished."""
    kept, setting, schedule = job.state.load(stage), job.setting, job.schedule
    check_same(job.state, kept)
    step, seconds = kept.get("step", 0), kept.get("seconds", 0)
    if schedule.progress(step, seconds) >= 1:
        if process()[0] == 0:
            print(f"{stage}: finished after {step} steps in {seconds / 60:.1f} minutes; use a "
                  "larger --minutes or --steps to continue", file=sys.stderr)
        return
    schedule = schedule._replace(batch=schedule.batch or setting.batch[stage],
                                 rate=schedule.rate or setting.rate[stage])
    train, _ = STAGES[stage]
    train(job._replace(schedule=schedule))


def run_command(args, setting, schedule, state, stack):
    """Do what the command line asks for. stack: an ExitStack for clean-up at the end."""
    data, leads = args.data or args.state / "emoji.zip", args.command == "control"
    out = args.out or args.state / ("outlines" if leads else "emoji")
    exports, first = args.command in ("export", "all", "control"), process()[0] == 0
    asked, kept = args.out is not None, [data, args.state]
    check = functools.partial(check_replaceable, out, kept, CONTROL if leads else MODEL)
    if exports:
        check(asked)
    # do not replace a folder that appears meanwhile
    check = functools.partial(check, asked and out.exists())
    if args.command in (*STAGES, "all") and first:
        stack.enter_context(held(args.state))
    if args.start:
        state.begin_from(args.start, setting)
    if args.command in ("render", "all") and not data.exists():
        data = render(data, args.state / "npm")
    if args.command == "render":
        return print(data)

    things = (load_captioned if data.is_dir() else load_things)(data, setting.size)
    job = Job(things, setting, schedule, state)
    if args.command in STAGES:
        run_stage(args.command, job)
    if args.command == "all":
        for name, (_, share) in STAGES.items():
            part = schedule._replace(minutes=schedule.minutes * share)
            if share:
                run_stage(name, job._replace(schedule=part))
    if leads and first:
        params = state.trained("control", control_shapes(setting))
        write_control(out, params, control_config(setting.unet), check)
        print(out)
    elif exports and first:
        params = state.trained("unet", unet_stage_shapes(setting))
        write_model(out, nest(params), state.vae(setting), things, setting, state, check)
        print(out)
    if args.command == "evaluate":
        measure.evaluate(out, things, args.limit, args.draw_steps, args.device)
    if args.command in ("sheet", "all") and first:
        measure.write_sheet(out, things, args.draw_steps, args.device)


COMMANDS = ("render", *STAGES, "export", "evaluate", "sheet", "all")
MOST = {"minutes": 10 ** 6, "steps": 10 ** 9, "batch": 10 ** 5, "bank": 10 ** 7, "rate": 1,
        "limit": 10 ** 6, "draw_steps": 999, "threads": 1024}


def parse_arguments(argv):
    p = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add, own = p.add_argument, Schedule()
    add("command", choices=COMMANDS)
    add("--config", choices=CONFIGS, default="small",
        help="the size of picture and networks (default: small)")
    add("--start", type=Path, metavar="FOLDER", help="start from this model, not from scratch")
    add("--minutes", type=float, default=own.minutes, help="total training time (30)")
    add("--steps", type=int, help="total steps of each stage, instead of --minutes")
    add("--batch", type=int, help="pictures per step, over all processes")
    add("--rate", type=float, help="the highest learning rate")
    add("--seed", type=int, default=own.seed)
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, help="CPU threads per process")
    add("--bank", type=int, metavar="N",
        help="scenes encoded ahead (4096 for clip, 8192 for unet)")
    add("--keep-every", type=float, default=own.keep_every, metavar="SECONDS",
        help="time between saves of the state (60)")
    add("--show-every", type=float, default=own.show_every, metavar="SECONDS",
        help="time between sheets of samples (600)")
    add("--state", type=Path, default=tiny_sd.HERE / "weights/state",
        help="folder for the state of the training (weights/state)")
    add("--data", type=Path, help="zip of rendered drawings, or a folder of pictures with "
                                  "captions: a.png, a.txt, ... (STATE/emoji.zip)")
    add("--out", type=Path, help="the model's folder (STATE/emoji)")
    add("--limit", type=int, default=60, help="evaluate: how many of each kind (60)")
    add("--draw-steps", type=int, default=20, help="evaluate, sheet: sampling steps (20)")
    args = p.parse_args(argv)
    for name, most in MOST.items():
        value = getattr(args, name)
        if value is not None and not 0 < value <= most:
            p.error(f"--{name.replace('_', '-')} must be above 0, and at most {most:,}")
    for name in "keep_every", "show_every":     # 0: after every step
        if not 0 <= getattr(args, name) <= 10 ** 6:
            p.error(f"--{name.replace('_', '-')} must be from 0 to 1,000,000 seconds")
    if not 0 <= args.seed < 2 ** 63:
        p.error("--seed must be from 0 to 2**63 - 1")
    if args.out and args.out.name in ("", ".."):
        p.error(f"--out {args.out} does not name a folder: what is written lies beside it, too")
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        p.error(f"torch finds no {args.device} device here")
    return args


def faster_on_cpu(operations):
    """Forms of two of torch's operations that are faster on a CPU at these sizes."""
    torch_group_norm = operations["group_norm"]

    def attention(q, k, v, causal=False):       # the formula; torch has a fused kernel
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
        return scores.softmax(-1) @ v

    def group_norm(x, *args, **kwargs):         # at 16 x 16, torch is half as fast in bfloat16
        return torch_group_norm(x.float(), *args, **kwargs).to(x.dtype)

    return {"dot_product_attention": attention, "group_norm": group_norm}


def run(argv):
    """Do what the command line asks for."""
    args, operations = parse_arguments(argv), {}
    schedule = Schedule(**{name: getattr(args, name) for name in Schedule._fields})
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()
        operations = faster_on_cpu(tiny_sd.TORCH)
    join_processes(args.device)
    try:
        with mock.patch.dict(tiny_sd.TORCH, operations), contextlib.ExitStack() as stack:
            state = State(args.state, args.device)
            run_command(args, CONFIGS[args.config], schedule, state, stack)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None):
    """Run the program; return its exit status, as cli.main does."""
    return cli.main(argv, run)
