#!/usr/bin/env python3
"""Train weights/emoji: a small but complete Stable Diffusion, from drawings to pictures.

    render ── drawings ──► vae, decoder ── latents ──► clip ── text encoder ──► unet ──► export

The recipe is the paper's (Rombach et al., 2022), stage by stage, through tiny_sd.py's own
functions: given torch tensors they are differentiable as they stand. scenes.py has the drawings
and their captions, fitting.py the loop that lowers a loss, folder.py the model's folder, and
measure.py looks at what was learnt.

    python weights/train.py all --minutes 120               from nothing to weights/state/emoji
    python weights/train.py unet --start weights/emoji      one stage, on from a finished model
    python weights/train.py evaluate --out weights/emoji    the table in weights/README.md
    torchrun --nproc-per-node 8 weights/train.py unet --device cuda

Ctrl-C keeps what was learnt, and a kill loses a minute at most: the same command resumes.
"""

import argparse
import collections
import functools
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import measure  # noqa: E402
from fitting import ZERO, Stopped, fit, gather, initial, process  # noqa: E402
from folder import (  # noqa: E402
    LENGTH,
    SCHEDULER,
    VOCABULARY,
    text_config,
    unet_config,
    vae_config,
    write_model,
)
from scenes import (  # noqa: E402
    COLOURS,
    PAIRS,
    PLACES,
    STYLES,
    draw_scene,
    every_scene,
    load_captioned,
    load_things,
    paint,
    render,
)

import tiny_sd  # noqa: E402
from extras.fast import keep_freed_memory  # noqa: E402
from extras.files import read_text, replace_atomically  # noqa: E402
from extras.shapes import conv_shapes, text_shapes, unet_shapes, vae_shapes  # noqa: E402
from tiny_sd import (  # noqa: E402
    UserError,
    clip_loss,
    diffusion_loss,
    flatten,
    nest,
    read_config,
    tell,
    vae_loss,
)

# ── Settings ────────────────────────────────────────────────────────────────────────────────────

class Setting(NamedTuple):
    """The three networks' config.json, as diffusers writes them, and how to train them."""
    vae: dict
    unet: dict
    text: dict
    batch: dict     # {stage: pictures in a step}
    rate: dict      # {stage: highest learning rate}

    @property
    def size(self):
        """Pixels of a picture, in each direction."""
        return self.vae["sample_size"]

    @property
    def latents(self):
        """Latents of a picture, in each direction."""
        return self.unet["sample_size"]


CONFIGS = {
    "small": Setting(
        vae=vae_config(size=64, channels=(32, 64, 64), groups=8),
        unet=unet_config(latents=16, channels=(64, 128, 192), attends=(False, True, True),
                         heads=(2, 4, 6), groups=16, context=192),
        text=text_config(width=192, layers=4, heads=4),
        batch={"vae": 16, "decoder": 16, "clip": 256, "unet": 96},
        rate={"vae": 2e-3, "decoder": 1e-3, "clip": 1e-3, "unet": 1e-3}),
    "base": Setting(
        vae=vae_config(size=128, channels=(64, 64, 128, 128), groups=16),
        unet=unet_config(latents=16, channels=(128, 192, 256), attends=(True, True, True),
                         heads=(4, 6, 8), groups=32, context=288),
        text=text_config(width=288, layers=6, heads=6),
        batch={"vae": 64, "decoder": 64, "clip": 1024, "unet": 512},
        rate={"vae": 1e-3, "decoder": 5e-4, "clip": 1e-3, "unet": 1e-3})}


class Schedule(NamedTuple):
    """How long to train, how fast, and what to do on the way."""
    minutes: float = 30
    steps: int = None       # instead of minutes
    batch: int = None       # instead of the setting's
    rate: float = None      # instead of the setting's
    bank: int = None        # scenes encoded ahead
    seed: int = 0
    keep_every: float = 60      # seconds
    show_every: float = 600     # seconds
    compile: bool = False

    @property
    def goal(self):
        """Steps or seconds in all."""
        return self.steps or 60 * self.minutes

    def progress(self, step, seconds):
        """The fraction of the goal that is reached."""
        return (step if self.steps else seconds) / self.goal


# ── The state: what training keeps ──────────────────────────────────────────────────────────────

class State:
    """The folder of what training keeps, and the device to load it to.

    STAGE.pt: {"params": {name: tensor}, "mean": their running average, "optimizers", "step",
    "seconds", "losses"}; merges.txt, the tokenizer's; scaling_factor.json, the latents'.
    """

    def __init__(self, folder, device="cpu"):
        self.folder, self.device = folder, device

    def path(self, stage):
        return self.folder / f"{stage}.pt"

    def load(self, stage):
        """What a stage kept, or nothing."""
        if not self.path(stage).exists():
            return {}
        try:
            return torch.load(self.path(stage), map_location=self.device, weights_only=True)
        except Exception as error:      # of whatever kind torch and pickle raise
            raise UserError(f"{self.path(stage)} is not whole: remove it, or name another --state "
                            f"({str(error)[:100]})") from None

    def save(self, stage, checkpoint):
        with replace_atomically(self.path(stage)) as temporary:
            torch.save(checkpoint, temporary)

    def trained(self, stage):
        """The averaged parameters that a stage reached, {name: tensor}."""
        checkpoint = self.load(stage)
        if not checkpoint:
            raise UserError(f"{self.path(stage)} is missing: run the stage {stage} first")
        return checkpoint["mean"]

    def vae(self):
        """The VAE, with the decoder of the stage of its own where that has run."""
        decoder = self.load("decoder")
        return self.trained("vae") | (decoder["mean"] if decoder else {})

    def tokenizer(self, names=()):
        """The tokenizer of merges.txt, which is trained on these names where it is missing."""
        path = self.folder / "merges.txt"
        if not path.exists():
            merges = train_tokenizer(names)
            with replace_atomically(path) as temporary:
                lines = ["#version: 0.2", *map(" ".join, merges), ""]
                temporary.write_text("\n".join(lines), encoding="utf-8")
        merges = [tuple(line.split()) for line in read_text(path).split("\n")[1:-1]]
        words = tiny_sd.Tokenizer(merges, length=LENGTH)
        words.merge = functools.cache(words.merge)      # captions say the same words again
        return words

    def scaling_factor(self, latents=None):
        """What latents are multiplied by to have variance 1: from these, once, then kept."""
        path = self.folder / "scaling_factor.json"
        if not path.exists() and latents is not None:
            with replace_atomically(path) as temporary:
                temporary.write_text(json.dumps(1 / latents.std().item()))
        return json.loads(read_text(path))

    def begin_from(self, folder):
        """Take what is missing here from an exported model, as though its stages had just begun."""
        model = tiny_sd.load(folder, "torch")
        for stage, weights in (("vae", model.vae), ("unet", {"text": model.text_encoder,
                                                             "unet": model.unet})):
            if not self.path(stage).exists():
                params = {name: p.float() for name, p in flatten(weights).items()}
                self.save(stage, {"params": params, "mean": params, "step": 0, "seconds": 0.0,
                                  "losses": []})
        factor = json.loads(read_text(folder / "vae/config.json"))["scaling_factor"]
        for name, text in (("merges.txt", read_text(folder / "tokenizer/merges.txt")),
                           ("scaling_factor.json", json.dumps(factor))):
            if not (self.folder / name).exists():
                with replace_atomically(self.folder / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")


# ── The tokenizer: byte pairs, merged from the most frequent on ─────────────────────────────────

def train_tokenizer(names):
    """Merges, learnt from the words that captions hold (Sennrich et al., 2016)."""
    frame = "a an small {} background in the {} style"
    said = [*itertools.chain(*names)] * 4
    said += [frame.format(w, w) for w in (*COLOURS, *PLACES, *PAIRS, *STYLES)] * 40
    spell = tiny_sd.Tokenizer([])
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
    """The neighbours met most often; None when every word is one symbol."""
    pairs = collections.Counter()
    for word, symbols in words.items():
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += counts[word]
    return max(pairs, key=lambda pair: (pairs[pair], pair), default=None)


def join(symbols, pair):
    """Merge the pair wherever it stands in a list of symbols, in place."""
    i = 0
    while i < len(symbols) - 1:
        if (symbols[i], symbols[i + 1]) == pair:
            symbols[i:i + 2] = ["".join(pair)]
        i += 1


def idle_merges(spell, known, n):
    """n pairs that no word needs, so that the vocabulary has its size."""
    symbols = spell.bytes.values()
    idle = (pair for pair in itertools.product(symbols, symbols) if pair not in known)
    return [*itertools.islice(idle, n)]


def encode(words, captions, device):
    """Captions to ids (batch, LENGTH)."""
    return torch.from_numpy(np.stack([words.encode(text)[0] for text in captions])).to(device)


# ── Stage 1: the VAE ────────────────────────────────────────────────────────────────────────────

def to_model(pictures, device):
    """uint8 pictures (batch, height, width, 3) as a tensor in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).to(device).float() / 127.5 - 1


def vae_parameters(setting, schedule):
    return initial(vae_shapes(read_config("vae", setting.vae)), schedule.seed)


def differences(x):
    """How each pixel differs from the next, down and across."""
    return x[:, 1:] - x[:, :-1], x[:, :, 1:] - x[:, :, :-1]


def pixels_and_edges(drawn, picture):
    """The absolute error of pixels, and half that of edges."""
    drawn = drawn.float()
    edges = sum((a - b).abs().mean() for a, b in zip(differences(drawn), differences(picture)))
    return (drawn - picture).abs().mean() + edges / 2


def train_vae(things, setting, schedule, state):
    groups, side = setting.vae["norm_num_groups"], setting.latents

    def draw(step, rng):
        n = schedule.batch or setting.batch["vae"]
        pictures = to_model([*moved_scenes(things, rng, n)], state.device)
        return pictures, torch.randn(n, side, side, 4, device=state.device)

    def loss(vae, picture, eps):
        return vae_loss(picture, eps, vae, groups, pixels_and_edges)

    show = functools.partial(before_and_after, things, setting, state.device)
    begin = functools.partial(vae_parameters, setting, schedule)
    return fit("vae", begin, loss, draw, setting, schedule, state, show)


def moved_scenes(things, rng, n, jitter=True):
    """Scenes of all kinds, half of them on a colour of no name, moved by up to half a latent."""
    for _ in range(n):
        scene = draw_scene(things, rng)
        if rng.random() < 0.5:
            scene = scene._replace(colour=rng.integers(0, 256, 3))
        yield np.roll(paint(scene, things), rng.integers(-2, 3, 2) * jitter, (0, 1))


@torch.no_grad()
def before_and_after(things, setting, device, params):
    """Originals above, reconstructions below; says the error in decibels."""
    size, groups, vae = setting.size, setting.vae["norm_num_groups"], nest(params)
    originals = [*moved_scenes(things, np.random.default_rng(0), 48, jitter=False)]
    image = to_model(originals, device)
    drawn = tiny_sd.vae_decode(tiny_sd.vae_encode(image, vae, groups)[0], vae, groups).clip(-1, 1)
    decibels = 10 * (4 / (drawn - image).square().mean((1, 2, 3))).log10()
    tqdm.write(f"vae: PSNR {decibels.mean():.2f} dB on 48 scenes", sys.stderr)
    drawn = (drawn.float().cpu().numpy() * 127.5 + 127.5).round().astype(np.uint8)
    rows = zip(np.stack(originals).reshape(4, 12, size, size, 3),
               drawn.reshape(4, 12, size, size, 3))
    return measure.grid(np.concatenate([part for pair in rows for part in pair]), 12)


# ── Stage 1b: the decoder alone ─────────────────────────────────────────────────────────────────
# What the latents mean is fixed now, by the encoder; how to draw them can still be learnt better,
# at any time, since the other stages only ever see latents. The published VAEs ft-EMA and ft-MSE
# of Stable Diffusion were made so.

def decoder_parameters(state):
    """The decoder as the stage before left it."""
    return {name: p for name, p in state.trained("vae").items()
            if name.startswith(("decoder.", "post_quant_conv."))}


def train_decoder(things, setting, schedule, state):
    groups, encoder = setting.vae["norm_num_groups"], state.trained("vae")
    nested = nest(encoder)

    @torch.no_grad()
    def draw(step, rng):
        n = schedule.batch or setting.batch["decoder"]
        image = to_model([*moved_scenes(things, rng, n)], state.device)
        with torch.autocast(state.device, torch.bfloat16):
            return tiny_sd.vae_encode(image, nested, groups)[0].float(), image

    def loss(decoder, latents, image):
        """The logarithm of each picture's squared error: PSNR itself, but for its unit."""
        drawn = tiny_sd.vae_decode(latents, decoder, groups).float()
        return (drawn - image).square().mean((1, 2, 3)).log().mean()

    def show(decoder):
        return before_and_after(things, setting, state.device, encoder | decoder)

    begin = functools.partial(decoder_parameters, state)
    return fit("decoder", begin, loss, draw, setting, schedule, state, show)


# ── A bank of latents ───────────────────────────────────────────────────────────────────────────

class Bank:
    """Scenes as scaled latents (n, h, w, 4), with the ids of their captions (n, LENGTH).

    They are made ahead and renewed bit by bit: training meets more scenes than memory holds, and
    each is encoded once.
    """

    def __init__(self, things, setting, schedule, state, filled, capacity):
        self.things, self.device = things, state.device
        self.words, self.vae = state.tokenizer(things.names), nest(state.trained("vae"))
        self.groups, self.turn, self.scale = setting.vae["norm_num_groups"], 0, 1.0
        rng, filled = np.random.default_rng(schedule.seed), schedule.bank or filled
        if things.drawings is None:     # each scene is a picture as it stands
            filled = min(filled, len(things.names))
            self.warn_of_long_captions()
        self.capacity = max(capacity, filled)
        self.ids, self.latents = self.make(self.scenes(min(1024, filled), rng))
        self.scale = state.scaling_factor(self.latents)
        self.latents *= self.scale
        while len(self.ids) < filled:
            self.renew(min(1024, filled - len(self.ids)), rng)

    def warn_of_long_captions(self):
        """Say which captions are longer than what the text encoder reads."""
        long = [caption for caption, in self.things.names if self.words.encode(caption)[1]]
        if long and process()[0] == 0:
            tell(f"{len(long)} captions have more than {LENGTH - 2} tokens, and their ends are not "
                 f"learnt: {tiny_sd.shorten(long[0])}")

    def scenes(self, n, rng):
        return [draw_scene(self.things, rng) for _ in range(n)]

    @torch.no_grad()
    def make(self, scenes):
        """Ids and latents of some scenes; each process encodes its share of them."""
        rank, ranks = process()
        even = scenes + scenes[:1] * (-len(scenes) % ranks)
        pictures = [paint(scene, self.things) for scene in even[rank::ranks]]
        latents = []
        for i in range(0, len(pictures), 128):
            image = to_model(pictures[i:i + 128], self.device)
            with torch.autocast(self.device, torch.bfloat16):
                mean, _ = tiny_sd.vae_encode(image, self.vae, self.groups)
            latents.append(mean.float() * self.scale)
        ids = encode(self.words, [scene.caption for scene in scenes], self.device)
        return ids, gather(torch.cat(latents), len(scenes))

    def renew(self, n, rng):
        """Add n new scenes; once the bank is full they replace the oldest."""
        ids, latents = self.make(self.scenes(n, rng))
        if len(self.ids) < self.capacity:
            self.ids, self.latents = torch.cat([self.ids, ids]), torch.cat([self.latents, latents])
            return
        oldest = (torch.arange(n) + self.turn) % len(self.ids)
        self.ids[oldest], self.latents[oldest] = ids, latents
        self.turn += n

    def draw(self, n, rng):
        chosen = torch.from_numpy(rng.integers(0, len(self.ids), n)).to(self.device)
        return self.ids[chosen], self.latents[chosen]


# ── Stage 2: the text encoder ───────────────────────────────────────────────────────────────────

def clip_parameters(setting, schedule):
    """The text encoder; an image encoder, which is a VAE's that reads latents; projections."""
    width = setting.text["hidden_size"]
    image = read_config("vae", setting.vae | {"block_out_channels": [64, 128, width],
                                              "latent_channels": width // 2})
    params = initial({"text": text_shapes(read_config("text_encoder", setting.text)),
                      "image": vae_shapes(image)["encoder"] | {"conv_in": conv_shapes(4, 64)},
                      "text_projection": {"weight": (width, width)}, "logit_scale": (1,)},
                     schedule.seed)
    return params | {"logit_scale": torch.full((1,), math.log(1 / 0.07))}


def text_context(setting, ids, text):
    """The context of some captions' ids."""
    heads = setting.text["num_attention_heads"]
    return tiny_sd.text_encoder(ids, heads, tiny_sd.quick_gelu, **text)


def embed_text(setting, params, ids):
    """(batch, width) of length 1: the context where the caption ends, projected."""
    context = text_context(setting, ids, params["text"])
    end = (ids == setting.text["eos_token_id"]).int().argmax(1)
    last = context[torch.arange(len(ids)), end]
    return F.normalize(tiny_sd.linear(last, **params["text_projection"]).float(), dim=-1)


def embed_image(setting, params, latents):
    """(batch, width) of length 1: the mean of what the image encoder finds."""
    h = tiny_sd.vae_encoder(latents, setting.vae["norm_num_groups"], **params["image"])
    return F.normalize(h.float().mean((1, 2)), dim=-1)


def train_clip(things, setting, schedule, state):
    bank = Bank(things, setting, schedule, state, filled=4096, capacity=32768)

    def draw(step, rng):
        bank.renew(32, rng)
        return bank.draw(schedule.batch or setting.batch["clip"], rng)

    def loss(params, ids, latents):
        text, image = embed_text(setting, params, ids), embed_image(setting, params, latents)
        if dist.is_initialized():
            text, image = (torch.cat(dist.nn.functional.all_gather(x)) for x in (text, image))
        return clip_loss(text, image, params["logit_scale"].clip(max=math.log(100)))

    begin = functools.partial(clip_parameters, setting, schedule)
    mean = fit("clip", begin, loss, draw, setting, schedule, state)
    found = retrieval(setting, nest(mean), bank)
    if process()[0] == 0:
        print(f"clip: {found:.1%} of the captions find their drawing", file=sys.stderr)


@torch.no_grad()
def retrieval(setting, params, bank):
    """The fraction of captions that find their own drawing among all."""
    ids, latents = bank.make(every_scene(bank.things))
    text = torch.cat([embed_text(setting, params, part) for part in ids.split(256)])
    image = torch.cat([embed_image(setting, params, part) for part in latents.split(256)])
    nearest = (text @ image.T).argmax(1)
    return (nearest == torch.arange(len(ids), device=nearest.device)).float().mean().item()


# ── Stage 3: the U-Net ──────────────────────────────────────────────────────────────────────────

def unet_parameters(setting, schedule, state):
    """The U-Net, new, and the text encoder as its stage left it, which goes on learning."""
    text = {name: p for name, p in state.trained("clip").items() if name.startswith("text.")}
    shapes = {"unet": unet_shapes(read_config("unet", setting.unet))}
    return text | initial(shapes, schedule.seed, (*ZERO, "conv_out.weight"))


def loss_weight(alpha_bar):
    """min(1, 5 (1 - ᾱ)): so weighted, the error of v is that of x_0 times min(5, 1 / (1 - ᾱ)).

    Where little of the picture is left, v asks for the picture and epsilon for next to nothing
    (Salimans and Ho, 2022); and it is there that the caption must say what to draw. The cap on the
    weight of little noise is that of Hang et al. (2023).
    """
    return (5 * (1 - alpha_bar)).flatten().clip(max=1)


def shifted(u, shift=2):
    """Times in [0, 1), moved towards noise: for uniform u, twice as many near 1, half near 0.

    What to draw is settled while x_t is nearly all noise (the formula: Esser et al., 2024).
    """
    return shift * u / (1 + (shift - 1) * u)


def train_unet(things, setting, schedule, state):
    bank = Bank(things, setting, schedule, state, filled=8192, capacity=65536)
    alpha_bars = torch.from_numpy(tiny_sd.scaled_linear_schedule()).float().to(state.device)
    nothing = encode(bank.words, [""], state.device)
    heads, groups = setting.unet["attention_head_dim"], setting.unet["norm_num_groups"]

    def draw(step, rng):
        n = schedule.batch or setting.batch["unet"]
        bank.renew(max(1, n // 8), rng)
        ids, x_0 = bank.draw(n, rng)
        dropped = torch.rand(n, 1, device=state.device) < 0.1       # for guidance
        u = (torch.randperm(n) + torch.rand(n)) / n     # one of each n-th
        t = (1000 * shifted(u)).long()
        return torch.where(dropped, nothing, ids), x_0, t.to(state.device), torch.randn_like(x_0)

    def loss(params, ids, x_0, t, eps):
        context = text_context(setting, ids, params["text"])
        alpha_bar = alpha_bars[t][:, None, None, None]

        def predict(x_t):
            return tiny_sd.unet(x_t, t.cpu(), context, heads, groups, **params["unet"])

        error = diffusion_loss(predict, SCHEDULER["prediction_type"], x_0, alpha_bar, eps)
        return (loss_weight(alpha_bar) * error).mean()

    def show(params):
        folder = state.folder / "showing"
        write_model(folder, nest(params), things, setting, state)
        model = tiny_sd.load(folder, "torch", state.device)
        return measure.sheet(model, measure.sample_prompts(things), seeds=(0,), columns=8, steps=12)

    begin = functools.partial(unet_parameters, setting, schedule, state)
    return fit("unet", begin, loss, draw, setting, schedule, state, show)


# ── Command line ────────────────────────────────────────────────────────────────────────────────

class Stage(NamedTuple):
    """A trained part: train(things, setting, schedule, state), and its share of `all`."""
    train: object
    share: float


STAGES = {"vae": Stage(train_vae, 0.15), "decoder": Stage(train_decoder, 0.05),
          "clip": Stage(train_clip, 0.04), "unet": Stage(train_unet, 0.76)}


def run_stage(stage, things, setting, schedule, state):
    """Train a stage, unless it is finished."""
    checkpoint = state.load(stage)
    step, seconds = checkpoint.get("step", 0), checkpoint.get("seconds", 0)
    if schedule.progress(step, seconds) >= 1:
        if process()[0] == 0:
            print(f"{stage}: finished, after {step} steps in {seconds / 60:.1f} minutes; a larger "
                  "--minutes or --steps goes on", file=sys.stderr)
        return
    STAGES[stage].train(things, setting, schedule, state)


def run_command(args, setting, schedule, state):
    """Do what the command line asks for."""
    data, out = args.data or args.state / "emoji.zip", args.out or args.state / "emoji"
    if args.command in ("export", "all") and args.out is None and out.exists():
        raise UserError(f"{out} is there already: name it with --out to replace it, or another")
    if args.start:
        state.begin_from(args.start)
    if args.command in ("render", "all") and not data.exists():
        render(data, args.state / "npm")
    if args.command == "render":
        return print(data)

    things = (load_captioned if data.is_dir() else load_things)(data, setting.size)
    if args.command in STAGES:
        run_stage(args.command, things, setting, schedule, state)
    if args.command == "all":
        for name, stage in STAGES.items():
            part = schedule._replace(minutes=schedule.minutes * stage.share)
            run_stage(name, things, setting, part, state)
    if args.command in ("export", "all") and process()[0] == 0:
        export(out, things, setting, state)
    if args.command == "evaluate":
        measure.evaluate(out, things, args.limit, args.draw_steps, args.device)
    if args.command in ("sheet", "all") and process()[0] == 0:
        measure.write_sheet(out, things, args.draw_steps, args.device)


def export(out, things, setting, state):
    write_model(out, nest(state.trained("unet")), things, setting, state)
    print(out)


COMMANDS = ("render", *STAGES, "export", "evaluate", "sheet", "all")


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add, own = p.add_argument, Schedule()
    add("command", choices=COMMANDS)
    add("--config", choices=CONFIGS, default="small",
        help="the size of picture and networks (default: small)")
    add("--start", type=Path, metavar="FOLDER", help="go on from this model, not from nothing")
    add("--minutes", type=float, default=own.minutes, help="how long to train, in all (30)")
    add("--steps", type=int, help="how many steps each stage takes in all, instead of minutes")
    add("--batch", type=int, help="pictures in a step, over all processes")
    add("--rate", type=float, help="the highest learning rate")
    add("--seed", type=int, default=own.seed)
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, help="of each process, on a CPU")
    add("--compile", action="store_true", help="compile the losses first, which pays on a GPU")
    add("--bank", type=int, metavar="N",
        help="scenes encoded ahead (4096 for clip, 8192 for unet)")
    add("--keep-every", type=float, default=own.keep_every, metavar="SECONDS",
        help="between savings of the state (60)")
    add("--show-every", type=float, default=own.show_every, metavar="SECONDS",
        help="between sheets of samples (600)")
    add("--state", type=Path, default=HERE / "state",
        help="folder of what training keeps (weights/state)")
    add("--data", type=Path, help="zip of rendered drawings, or a folder of pictures with "
                                  "captions: a.png, a.txt, ... (STATE/emoji.zip)")
    add("--out", type=Path, help="the model's folder (STATE/emoji)")
    add("--limit", type=int, default=10 ** 6,
        help="evaluate: at most so many things, and scenes of each kind")
    add("--draw-steps", type=int, default=20, help="evaluate, sheet: sampling steps (20)")
    args = p.parse_args()
    numbers = (args.minutes, args.limit, args.steps, args.batch, args.bank, args.rate)
    if any(n is not None and not 0 < n < math.inf for n in numbers):
        p.error("--minutes, --steps, --batch, --bank, --limit and --rate must be above 0")
    if args.seed < 0 or (args.threads or 0) < 0:
        p.error("--seed and --threads must be 0 or more")
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        p.error(f"torch finds no {args.device} device here")
    return args


def prefer_on_cpu(operations):
    """Replace two of torch's operations by forms that are faster on a CPU at these sizes."""
    torch_group_norm = operations["group_norm"]

    def attention(q, k, v, causal=False):       # the formula; torch has a fused kernel
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
        return scores.softmax(-1) @ v

    def group_norm(x, *args, **kwargs):         # at 16 x 16, bfloat16 takes torch twice the time
        return torch_group_norm(x.float(), *args, **kwargs).to(x.dtype)

    operations |= {"dot_product_attention": attention, "group_norm": group_norm}


def join_processes(device):
    """Find the other processes, where torchrun started several."""
    if "RANK" not in os.environ:
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch._dynamo.config.optimize_ddp = False       # one graph, not one for each bucket


def main():
    args = parse_arguments()
    schedule = Schedule(**{name: getattr(args, name) for name in Schedule._fields})
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()
        prefer_on_cpu(tiny_sd.torch_operations())
    join_processes(args.device)
    try:
        run_command(args, CONFIGS[args.config], schedule, State(args.state, args.device))
    except (UserError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Stopped) as error:
        reason = str(error) or f"stopped; what was kept is in {args.state}"
        print(f"train.py: {reason}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
