"""A LoRA: beside each matrix W of a network two narrow ones, of which W + B A is made, in training.

Only B (out, r) and A (r, in) are trained (Hu et al., 2021), by tiny_sd.train. teach.py is the
program.
"""

import contextlib
import dataclasses
import functools
import io
import math
import signal
import zlib
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch.utils.checkpoint import checkpoint

import tiny_sd
from extras.start import SIGNALS
from tiny_sd import UserError, flatten, nest, require, to_numpy

# ── W + B A ─────────────────────────────────────────────────────────────────────────────────────

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

    @torch.no_grad()
    def summed(self):
        """Return W + B A as a tensor."""
        return self.weight + (self.up @ self.down).reshape(self.weight.shape).to(self.weight)

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


def drawable(model, device):
    """Return a model to draw with, where W + B A is one array.

    On a CPU it is NumPy's, which draws faster; what is float32 there shares the tensors' memory.
    """
    def convert(network):
        arrays = {name: p.summed() if isinstance(p, Adapted) else p
                  for name, p in flatten(network).items()}
        if device == "cpu":
            arrays = {name: to_numpy(p) for name, p in arrays.items()}
        return nest(arrays)

    encoders = [encoder._replace(weights=convert(encoder.weights)) for encoder in model.encoders]
    return dataclasses.replace(model, unet=convert(model.unet), vae=convert(model.vae),
                               encoders=encoders)


# ── Training ────────────────────────────────────────────────────────────────────────────────────


def recomputed(*names):
    """Keep nothing of what these functions of tiny_sd compute inside: backward does it again.

    Gradient checkpointing (Chen et al., 2016). Returns a context manager.
    """
    forms = {name: functools.partial(checkpoint, getattr(tiny_sd, name), use_reentrant=False)
             for name in names}
    return mock.patch.multiple(tiny_sd, **forms) if forms else contextlib.nullcontext()


@contextlib.contextmanager
def signals_wait():
    """Let a signal that would end the program wait until this block is done."""
    caught = []
    before = {number: signal.signal(number, lambda number, _: caught.append(number))
              for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in caught[:1]:
            signal.raise_signal(number)


class AdamW(torch.optim.AdamW):
    """AdamW whose steps a signal does not break off: what is kept then is always a whole step."""

    def step(self):
        """Take a step."""
        with signals_wait():
            super().step()


class Teaching:
    """A LoRA in training: what changes from step to step, and how it is kept."""

    def __init__(self, model, latents, captions, args):
        self.latents = torch.from_numpy(latents).to(args.device, torch.float32)
        self.model, self.captions, self.args, self.seconds = model, captions, args, 0.0
        self.adapted, self.pairs = adapt(model, args.rank, args.text, args.seed)
        self.matrices = [p for pair in self.pairs.values() for p in pair]
        self.optimizer = AdamW(self.matrices)

    @property
    def steps(self):
        """How many steps were taken, as the optimizer counts them."""
        return next((int(state["step"]) for state in self.optimizer.state.values()), 0)

    @property
    def progress(self):
        """How much of it is done, 0 to 1."""
        if self.args.steps:
            return self.steps / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def autocast(self):
        """Return a context in which torch computes in the dtype asked for."""
        dtype = getattr(torch, self.args.dtype)
        return torch.autocast(self.args.device, dtype, enabled=dtype != torch.float32)

    def step(self):
        """Take one step of tiny_sd.train, which depends on the seed and its number alone.

        Returns the loss.
        """
        n, args = self.steps, self.args
        for group in self.optimizer.param_groups:       # up over 20 steps, then down along a cosine
            group["lr"] = args.rate * min(1, (n + 1) / 20) * math.cos(self.progress * math.pi / 2)
        with self.autocast(), recomputed(*("resnet", "transformer") * args.save_memory):
            rng = np.random.default_rng([args.seed, n])
            batches = tiny_sd.random_batches(self.latents, self.captions, args.batch_size, rng)
            loss = next(tiny_sd.train(self.adapted, self.optimizer, batches, rng))
        require(math.isfinite(loss), f"the loss is {loss} at step {n}: begin again with a lower "
                "--rate, and without what was kept of this")
        return loss

    def facts(self):
        """Return what must be the same to go on: options, captions, and the model's weights."""
        names = ("rank", "text", "seed", "batch_size", "rate", "width", "height", "dtype")
        weights = [flatten(self.adapted.unet)[name].weight for part, name in self.pairs
                   if part == "unet"]
        rows = [to_numpy(weight.reshape(len(weight), -1)[0]) for weight in weights]
        return {name: str(getattr(self.args, name)) for name in names} | {
            "captions": self.captions, "model": zlib.crc32(np.concatenate(rows)),
            "shapes": [[*p.shape] for p in self.matrices]}

    def check(self):
        """UserError if training has failed."""
        require(all(p.isfinite().all() for p in self.matrices), f"the LoRA is not finite after "
                f"{self.steps} steps: begin again with a lower --rate, and without what was kept")

    def lora(self):
        """Return the bytes of a .safetensors with what was learnt."""
        self.check()
        return save(kohya(self.model, self.pairs), METADATA)

    def kept(self):
        """Return, as bytes, all that restore() needs."""
        self.check()
        file = io.BytesIO()     # torch.save has an error of its own for a full disk
        torch.save({"facts": self.facts(), "matrices": self.matrices, "seconds": self.seconds,
                    "optimizer": self.optimizer.state_dict()}, file)
        return file.getvalue()

    def restore(self, file):
        """Go on from what was kept in a file; UserError if that was begun otherwise."""
        try:
            kept = torch.load(file, self.args.device, weights_only=True)
            same = kept["facts"] == self.facts()
            if same:
                for p, values in zip(self.matrices, kept["matrices"], strict=True):
                    p.data.copy_(values)
                self.optimizer.load_state_dict(kept["optimizer"])
                self.seconds = float(kept["seconds"])
        except Exception as error:      # of whatever kind torch raises
            reason = str(error).split("\n")[0]
            raise UserError(f"{file} cannot be read, remove it: {reason}") from None
        require(same, f"{file} was begun with other options, captions or weights: go on with "
                      "those, or remove it")
