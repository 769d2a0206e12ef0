"""Teach a model something new from a handful of pictures: train a LoRA.

    python -m extras.training.teach pictures/ -o mine.safetensors
    python tiny_sd.py "a zorp on a blue background" --lora mine.safetensors

pictures/ holds pictures of any size with a caption beside each: a.png, a.txt, b.jpg, b.txt, ...
Each matrix W in the transformers of the U-Net becomes W + B A, and only B (out, r) and A (r, in)
are trained (Hu et al., 2021), by tiny_sd.train. NOTES §7 says what that can do. Needs torch.

mine.safetensors.state keeps what was reached: after Ctrl-C or a kill the same command resumes from
there. mine.png shows some captions drawn without what was learnt, and with it, from fixed seeds.

With some thousands of pictures, train a model of your own on them, by the recipe in weights/:

    python -m extras.training.teach pictures/ -o mine --from-scratch --minutes 600
    python tiny_sd.py "a zorp on a blue background" -m mine
"""

import contextlib
import dataclasses
import functools
import math
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":      # hand over to main() below, as tiny_sd.py does to the command line
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from extras.start import program
    program("extras.training.teach")

# isort: split      (first of all cli: it sets up BLAS before NumPy is loaded)
from extras import cli, like_diffusers

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import tiny_sd
from extras import fast, files, formats, show, things
from tiny_sd import UserError, flatten, nest, require, tell

# ── The pictures ────────────────────────────────────────────────────────────────────────────────


def encode_pictures(model, pictures, args):
    """Return the scaled latents (1, h, w, 4) and captions; with --flip, each also mirrored."""
    size = tiny_sd.latent_shape(model, args.width, args.height)
    noise, notes, latents, captions = like_diffusers.torch_noise([args.seed], size), [], [], []
    for path, caption in tqdm(pictures, "encoding", leave=False):
        picture = files.read_picture(path, args.width, args.height, notes)
        for pixels in [picture, picture[:, ::-1]][:1 + args.flip]:
            latents.append(tiny_sd.encode(model, pixels, noise()))
            captions.append(caption)
    for note in notes[:5]:
        tell(note)
    return latents, captions


def prompts_to_keep(args):
    """Return the lines of --keep, or else the things that the model's folder says it knows."""
    if args.keep:
        return [*filter(None, map(str.strip, files.read_text(args.keep).splitlines()))]
    known = things.known_things(args.model) or {"things": []}
    return [name for name, *_ in known["things"]]


@torch.no_grad()
def own_pictures(model, prompts, args):
    """Return the latents (1, h, w, 4) and prompts of up to 100 pictures that the model draws."""
    prompts, latents = np.random.default_rng(args.seed).permutation(prompts)[:100].tolist(), []
    for seed, prompt in enumerate(tqdm(prompts, "drawing what it knows", leave=False)):
        *_, x = like_diffusers.generate(model, prompt, None, [seed], width=args.width,
                                        height=args.height)
        latents.append(x)
    return latents, prompts


def lessons(model, pictures, prompts, args):
    """Return the latents (n, h, w, 4) and captions to show: half of them taught, half its own.

    What a model draws itself keeps it from forgetting that (Ruiz et al., 2023).
    """
    taught, captions = encode_pictures(model, pictures, args)
    own, prompts = own_pictures(model, prompts, args)
    n = max(1, len(own) // len(taught))
    latents = torch.from_numpy(np.concatenate(taught * n + own))
    return latents.to(args.device, torch.float32), captions * n + prompts


# ── The LoRA ────────────────────────────────────────────────────────────────────────────────────

# Which matrices are adapted in each part: those with this in their names.
WITHIN = {"unet": ".attentions.", "text_encoder": "encoder.layers.",
          "text_encoder_2": "encoder.layers."}
METADATA = {"format": "pt", "ss_network_module": "networks.lora"}   # how programs tell what it is


class Adapted:
    """A weight W + B A, which torch.nn.functional.linear takes like a tensor.

    x (W + B A)ᵀ is computed as x Wᵀ + (x Aᵀ) Bᵀ: neither the sum nor its gradient, each as large
    as W, is ever written.
    """

    def __init__(self, weight, down, up):
        self.weight, self.down, self.up = weight, down, up

    def __len__(self):
        return len(self.weight)

    def reshape(self, *shape):
        """Return self: __torch_function__ has W as a matrix anyway."""
        return self

    @classmethod
    def __torch_function__(cls, function, types, args, kwargs=None):
        x, adapted, bias = args
        y = F.linear(x, adapted.weight.reshape(len(adapted), -1), bias)
        return y + F.linear(F.linear(x, adapted.down), adapted.up)


def adapt(model, rank, text=False, seed=0):
    """Return a model with W + B A for W, and {(part, name of W): (A, B)}, whose B are 0 at first.

    text: whether to adapt the text encoders, too. All other weights are the given model's own.
    """
    pairs, random = {}, torch.Generator().manual_seed(seed)
    networks = {"unet": model.unet}
    if text:
        parts = ("text_encoder", "text_encoder_2")
        networks |= {part: encoder.weights for part, encoder in zip(parts, model.encoders)}
    for part in networks:
        weights = flatten(networks[part])
        for name, weight in weights.items():
            if WITHIN[part] in name and name.endswith(".weight") and weight.ndim > 1:
                inputs = weight[0].numel()
                down = torch.randn(rank, inputs, generator=random) * inputs ** -0.5
                up = torch.zeros(len(weight), rank)
                pairs[part, name] = [p.to(weight.device).requires_grad_() for p in (down, up)]
                weights[name] = Adapted(weight, *pairs[part, name])
        networks[part] = nest(weights)
    unet, *texts = networks.values()
    encoders = [encoder._replace(weights=weights)
                for encoder, weights in zip(model.encoders, texts)] or model.encoders
    return dataclasses.replace(model, unet=unet, encoders=encoders), pairs


def kohya(model, pairs):
    """Return {name: tensor} of a model's LoRA as kohya names it, which all programs read."""
    arrays, first, unet = {}, "te1" if len(model.encoders) == 2 else "te", flatten(model.unet)
    prefix = {"unet": "lora_unet_", "text_encoder": f"lora_{first}_text_model_",
              "text_encoder_2": "lora_te2_text_model_"}
    for (part, name), (down, up) in pairs.items():
        stem = prefix[part] + name.removesuffix(".weight").replace(".", "_")
        kernel = [1] * (unet[name].ndim - 2) if part == "unet" else []      # of convolutions
        for side, p in ("down", down), ("up", up):
            arrays[f"{stem}.lora_{side}.weight"] = p.detach().cpu().reshape(*p.shape, *kernel)
        arrays[f"{stem}.alpha"] = torch.tensor(float(len(down)))
    return arrays


# ── Training ────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def recomputed(*names):
    """Keep nothing of what these functions of tiny_sd compute inside: backward does it again.

    Gradient checkpointing (Chen et al., 2016).
    """
    originals = {name: getattr(tiny_sd, name) for name in names}
    try:
        for name, function in originals.items():
            setattr(tiny_sd, name, functools.partial(checkpoint, function, use_reentrant=False))
        yield
    finally:
        for name, function in originals.items():
            setattr(tiny_sd, name, function)


class Teaching:
    """A LoRA in training: what changes from step to step, how it is kept, and what it draws."""

    def __init__(self, model, latents, captions, args):
        self.model, self.latents, self.captions, self.args = model, latents, captions, args
        self.adapted, self.pairs = adapt(model, args.rank, args.text, args.seed)
        self.matrices = [p for pair in self.pairs.values() for p in pair]
        self.optimizer = torch.optim.AdamW(self.matrices)
        self.losses, self.seconds, self.before = [], 0.0, None

    @property
    def progress(self):
        """How much of it is done, 0 to 1."""
        if self.args.steps:
            return len(self.losses) / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def autocast(self):
        """Return a context in which torch computes in the dtype asked for."""
        dtype = getattr(torch, self.args.dtype)
        return torch.autocast(self.args.device, dtype, enabled=dtype != torch.float32)

    def step(self):
        """Take one step of tiny_sd.train, which depends on the seed and its number alone."""
        n, args = len(self.losses), self.args
        for group in self.optimizer.param_groups:       # up over 20 steps, then down along a cosine
            group["lr"] = args.rate * min(1, (n + 1) / 20) * math.cos(self.progress * math.pi / 2)
        with self.autocast():
            rng = np.random.default_rng([args.seed, n])
            batches = tiny_sd.random_batches(self.latents, self.captions, args.batch_size, rng)
            loss = next(tiny_sd.train(self.adapted, self.optimizer, batches, rng))
        require(math.isfinite(loss), f"the loss is {loss} at step {n}: begin again with a lower "
                f"--rate; if {state_of(args.output)} is there, remove it first")
        self.losses.append(loss)

    def facts(self):
        """Return what must be the same to go on."""
        names = ("model", "rank", "text", "seed", "batch_size", "rate", "width", "height")
        facts = {name: str(getattr(self.args, name)) for name in names}
        return facts | {"captions": self.captions}

    def keep(self, file):
        """Write all that restore() needs."""
        torch.save({"facts": self.facts(), "matrices": self.matrices, "losses": self.losses,
                    "optimizer": self.optimizer.state_dict(), "seconds": self.seconds}, file)

    def restore(self, file):
        """Go on from what was kept; UserError if that was begun otherwise."""
        try:
            kept = torch.load(file, self.args.device, weights_only=True)
            same = kept["facts"] == self.facts()
        except Exception as error:      # of whatever kind torch raises
            reason = str(error).split("\n")[0]
            raise UserError(f"{file} cannot be read, remove it: {reason}") from None
        require(same, f"{file} was begun with other options or captions: go on with those, or "
                      "remove it")
        for p, values in zip(self.matrices, kept["matrices"]):
            p.data.copy_(values)
        self.optimizer.load_state_dict(kept["optimizer"])
        self.losses, self.seconds = kept["losses"], kept["seconds"]
        tell(f"going on from step {len(self.losses)}")

    @torch.no_grad()
    def draw(self, model):
        """Return a picture for each of the first four captions, from seeds 0 to 3."""
        pictures, size = [], (self.args.width, self.args.height)
        for seed, prompt in enumerate([*dict.fromkeys(self.captions)][:4]):
            with self.autocast():
                *_, x = like_diffusers.generate(model, prompt, None, [seed], width=size[0],
                                                height=size[1])
            pictures.append(Image.fromarray(tiny_sd.decode(model, x)[0]))
        return pictures

    def draw_sheet(self, file):
        """Write a PNG of pictures without what was learnt, and with it."""
        self.before = self.before or self.draw(self.model)
        rows = [self.before, self.draw(self.adapted)]
        show.sheet(rows, down=["before", "after"]).save(file, "PNG")


def fit(teaching, begun, keep, draw):
    """Take all steps; keep what was reached every minute, and draw a sheet now and then."""
    args, begun = teaching.args, begun - teaching.seconds
    total, to_keep, to_draw = args.steps or round(60 * args.minutes), 60, 300
    with tqdm(total=total, unit="step" if args.steps else "s", desc="teaching") as bar:
        while teaching.progress < 1:
            teaching.step()
            now = teaching.seconds = time.monotonic() - begun
            bar.set_postfix_str(f"loss {np.mean(teaching.losses[-100:]):.4f}", refresh=False)
            bar.update(min(total, round(teaching.progress * total)) - bar.n)
            if now > to_keep:
                keep()
                to_keep = now + 60
            if now > to_draw:       # every five minutes, and for at most a tenth of the time
                draw()
                took = time.monotonic() - begun - now
                to_draw = now + max(300, 10 * took)


# ── The command line ────────────────────────────────────────────────────────────────────────────

OPTIONS = [     # (flags, type, default, help)
    ("-o --output", Path, None, "the .safetensors to write, for --lora"),
    ("-m --model", str, tiny_sd.HERE / "weights" / "emoji", "as tiny_sd.py takes it (emoji)"),
    ("--caption", str, None, "for the pictures that have no .txt"),
    ("--keep", Path, None, "file of prompts whose pictures should stay as they are, one a line "
                           "(the things that the model says it knows)"),
    ("--flip", bool, False, "show the pictures mirrored, too"),
    ("--rank", int, 8, "how many rows A has, so how much it can hold (%(default)s)"),
    ("--text", bool, False, "adapt the text encoder, or both of SDXL's, too"),
    ("--from-scratch", bool, False, "make no LoRA but a whole model, in the folder --output"),
    ("--config", ("small", "base"), "small", "the model's size, with --from-scratch (%(default)s)"),
    ("--minutes", float, None, "how long to teach (10; 180 from scratch)"),
    ("--steps", int, None, "how many steps to take instead"),
    ("-b --batch-size", int, None, "pictures a step (one of 512 x 512, or as much of smaller)"),
    ("--rate", float, None, "the highest learning rate (lower, the wider the model)"),
    ("-s --seed", int, 0, "(%(default)s)"),
    ("-W --width", int, None, "in pixels (the model's own size)"), ("-H --height", int, None, None),
    ("--device", ("cpu", "cuda", "mps"), "cpu", "(%(default)s)"),
    ("--dtype", ("float32", "bfloat16"), "float32", "(%(default)s)"),
    ("--save-memory", bool, False, "compute layers twice rather than keep what gradients need"),
]


def parse_arguments(argv):
    """Return the options, checked as far as no model is needed for that."""
    parser = tiny_sd.Parser(prog="teach.py", allow_abbrev=False,
                            description="Teach a model something new from captioned pictures.")
    parser.add_argument("folder", type=Path, help="pictures, and captions: a.png, a.txt, ...")
    for flags, kind, default, text in OPTIONS:
        how = {"action": "store_true"} if kind is bool else {"type": kind, "default": default}
        how = {"choices": kind, "default": default} if isinstance(kind, tuple) else how
        parser.add_argument(*flags.split(), help=text, required=flags == "-o --output", **how)
    args = parser.parse_args(argv)
    for name, low, high in (("rank", 1, 1024), ("steps", 1, 10 ** 7), ("minutes", 0.001, 10 ** 5),
                            ("batch_size", 1, 4096), ("rate", 1e-9, 1), ("seed", 0, 2 ** 32)):
        value = getattr(args, name)
        require(value is None or low <= value <= high,
                f"--{name.replace('_', '-')} {value} is not from {low:g} to {high:g}")
    require(not (args.steps and args.minutes), "give --steps or --minutes, not both")
    check_output(args)
    return args


def state_of(output):
    """Return the name of the file that keeps what was reached."""
    return output.with_name(f"{output.name}.state")


def check_output(args):
    """UserError if the files could not be written at the end."""
    output = args.output
    require(args.from_scratch or output.suffix == ".safetensors",
            f"--output {output} does not end in .safetensors")
    require(output.parent.is_dir(), f"there is no folder {output.parent} to write to")
    require(os.access(output.parent, os.W_OK), f"the folder {output.parent} cannot be written to")
    for path in [output] + [output.with_suffix(".png")] * (not state_of(output).exists()):
        require(not path.exists(), f"{path} is there already")


def fill_in(args, model):
    """Set what is not given to what suits the model."""
    require(not model.inpaints and not model.config.unet.time_cond_proj_dim, "a model for "
            "inpainting, or a distilled one, is not taught here: teach the one it was made from")
    h, w, _ = tiny_sd.latent_shape(model, args.width, args.height)
    args.height, args.width = h * model.factor, w * model.factor
    args.batch_size = args.batch_size or max(1, 64 * 64 // (h * w))
    args.rate = args.rate or 0.2 / max(model.config.unet.block_out_channels)
    args.minutes = args.minutes or 10


def write(path, fill):
    """Replace a file by what fill(unfinished) writes, or leave it as it is."""
    with files.replace_atomically(path) as unfinished:
        fill(unfinished)


def train_from_scratch(args):
    """Hand over to the recipe in weights/, which trains a whole model; does not return."""
    require(args.caption is None, "--from-scratch learns what words mean: give each picture its "
                                  "own caption, not --caption")
    for name in ("keep", "flip", "text", "width", "height", "save_memory"):
        require(not getattr(args, name), f"--{name.replace('_', '-')} is for a LoRA, and does not "
                                         "go with --from-scratch")
    require(args.device != "mps", "--from-scratch trains with --device cpu or cuda")
    files.read_captioned(args.folder)
    how = {"data": args.folder, "out": args.output, "state": state_of(args.output),
           "config": args.config, "device": args.device, "seed": args.seed}
    how |= {"batch": args.batch_size} if args.batch_size else {}
    how |= {"rate": args.rate} if args.rate else {}
    how |= {"steps": args.steps} if args.steps else {"minutes": args.minutes or 180}
    recipe = tiny_sd.HERE / "weights" / "train.py"
    options = [text for name, value in how.items() for text in (f"--{name}", str(value))]
    os.execv(sys.executable, [sys.executable, str(recipe), "all", *options])


def run(argv):
    """Do what the command line asks for."""
    args, begun = parse_arguments(argv), time.monotonic()
    if args.from_scratch:
        train_from_scratch(args)
    pictures, prompts = files.read_captioned(args.folder, args.caption), prompts_to_keep(args)
    model = formats.load(args.model, "torch", args.device, args.dtype)
    fill_in(args, model)
    fast.keep_freed_memory()
    teaching = Teaching(model, *lessons(model, pictures, prompts, args), args)
    state = state_of(args.output)
    if state.exists():
        teaching.restore(state)
    keep = functools.partial(write, state, teaching.keep)
    draw = functools.partial(write, args.output.with_suffix(".png"), teaching.draw_sheet)

    try:
        with recomputed(*("resnet", "transformer") * args.save_memory):
            fit(teaching, begun, keep, draw)
    except (KeyboardInterrupt, SystemExit):
        keep()
        tell(f"step {len(teaching.losses)} is kept in {state}: the same command resumes from there")
        raise
    draw()
    arrays = kohya(model, teaching.pairs)
    write(args.output, lambda file: file.write_bytes(save(arrays, METADATA)))
    state.unlink(missing_ok=True)
    print(args.output)


def main(argv=None):
    """Run the program; return its exit status, as cli.main does."""
    return cli.main(argv, run)
