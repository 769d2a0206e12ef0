"""Train a LoRA: replace matrices W of a network by W + B A, with two narrow matrices B and A.

Only B (out, r) and A (r, in) are trained (Hu et al., 2021), by tiny_sd.train in the loop of
fitting.py. teach.py is the program.
"""

import contextlib
import dataclasses
import functools
import math
import zlib
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch.utils.checkpoint import checkpoint

import tiny_sd
from extras.training import fitting
from tiny_sd import flatten, nest, require, tell, to_numpy

# ── W + B A ─────────────────────────────────────────────────────────────────────────────────────

# The matrices adapted in each part have this in their names.
WITHIN = {"unet": ".attentions.", "text_encoder": "encoder.layers.",
          "text_encoder_2": "encoder.layers."}
METADATA = {"format": "pt", "ss_network_module": "networks.lora"}   # so that programs recognise it


class Adapted:
    """A weight W + B A that torch.nn.functional.linear accepts like a tensor.

    x (W + B A)ᵀ is computed as x Wᵀ + (x Aᵀ) Bᵀ, so neither the sum nor its gradient, each as large
    as W, is ever stored.
    """

    def __init__(self, weight, down, up):
        self.weight, self.down, self.up = weight, down, up

    def __len__(self):
        return len(self.weight)

    def reshape(self, *shape):
        """Return self, as __torch_function__ reshapes W."""
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
    """Return a model with W + B A for W, and {(part, name of W): (A, B)}; B is 0 at first.

    text: also adapt the text encoders. All other weights are shared with the given model.
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
    """Return a model's LoRA as the bytes of a .safetensors file with kohya's names."""
    arrays, first, unet = {}, "te1" if len(model.encoders) == 2 else "te", flatten(model.unet)
    prefix = {"unet": "lora_unet_", "text_encoder": f"lora_{first}_text_model_",
              "text_encoder_2": "lora_te2_text_model_"}
    for (part, name), (down, up) in pairs.items():
        stem = prefix[part] + name.removesuffix(".weight").replace(".", "_")
        kernel = [1] * (unet[name].ndim - 2) if part == "unet" else []      # of convolutions
        for side, p in ("down", down), ("up", up):
            arrays[f"{stem}.lora_{side}.weight"] = p.detach().cpu().reshape(*p.shape, *kernel)
        arrays[f"{stem}.alpha"] = torch.tensor(float(len(down)))
    return save(arrays, METADATA)


def drawable(model, device):
    """Return a model to draw with, where W + B A is one array.

    On a CPU its arrays are NumPy's, which is faster; float32 ones share the tensors' memory.
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
    """Gradient checkpointing (Chen et al., 2016) for these functions of tiny_sd.

    Within the context, store none of their intermediate results; backward recomputes them.
    """
    forms = {name: functools.partial(checkpoint, getattr(tiny_sd, name), use_reentrant=False)
             for name in names}
    return mock.patch.multiple(tiny_sd, **forms) if forms else contextlib.nullcontext()


class Schedule(fitting.Schedule):
    """A Schedule whose learning rate rises for twenty steps, then falls along a cosine."""

    def rate_at(self, step, progress):
        return self.rate * min(1, (step + 1) / 20) * math.cos(progress * math.pi / 2)


class State(fitting.State):
    """The folder with the progress, and the facts that must not change for it to resume."""

    def __init__(self, folder, device, facts):
        super().__init__(folder, device)
        self.facts = facts

    def load(self, stage):
        kept = super().load(stage)
        if kept:
            require(kept.get("facts") == self.facts, f"{self.path(stage)} was started with other "
                    "options, captions or weights: use those, or move it elsewhere")
            tell(f"resuming at step {kept['step']}")
        return kept

    def save(self, stage, checkpoint):
        require(all(p.isfinite().all() for p in checkpoint["params"].values()), "the LoRA is not "
                f"finite after {checkpoint['step']} steps: begin again with a lower --rate, and "
                "without what was kept")
        super().save(stage, checkpoint | {"facts": self.facts})


def facts(model, pairs, captions, args):
    """Return what must be the same to go on: options, captions, and the model's weights."""
    names = ("rank", "text", "seed", "batch_size", "rate", "width", "height", "dtype")
    unet = flatten(model.unet)
    rows = [to_numpy(unet[name].reshape(len(unet[name]), -1)[0]) for part, name in pairs
            if part == "unet"]
    return {name: str(getattr(args, name)) for name in names} | {
        "captions": captions, "model": zlib.crc32(np.concatenate(rows)),
        "shapes": [[*p.shape] for pair in pairs.values() for p in pair]}


def optimizer_of(pairs, args):
    """Return AdamW for the pairs, as fitting.fit takes it."""
    params = {f"{part}.{name}.{side}": p for (part, name), pair in pairs.items()
              for side, p in zip(("down", "up"), pair)}
    schedule = Schedule(minutes=args.minutes, steps=args.steps, rate=args.rate, seed=args.seed,
                        show_every=300)
    return fitting.Optimizer(params, schedule, [torch.optim.AdamW(params.values())])


def losses(adapted, optimizer, latents, captions, args, rng):
    """Yield the loss of each step of tiny_sd.train; what batches hold is drawn by rng."""
    latents = torch.from_numpy(latents).to(args.device, torch.float32)
    batches = tiny_sd.random_batches(latents, captions, args.batch_size, rng)
    steps = tiny_sd.train(adapted, optimizer, batches, rng)
    while True:
        n = optimizer.taken
        with recomputed(*("resnet", "transformer") * args.save_memory):
            loss = next(steps)
        require(math.isfinite(loss), f"the loss is {loss} at step {n}: begin again with a lower "
                "--rate, and without what was kept of this")
        yield loss


def train(model, adapted, pairs, latents, captions, args, folder, show):
    """Train the pairs, in place; return how many steps were taken, in how many seconds.

    folder: for what was reached, and for a picture by show() now and then.
    """
    optimizer, rng = optimizer_of(pairs, args), np.random.default_rng()
    state = State(folder, args.device, facts(model, pairs, captions, args))
    seconds = fitting.fit(
        "teaching", optimizer, losses(adapted, optimizer, latents, captions, args, rng), rng,
        optimizer.schedule, state, show, getattr(torch, args.dtype))
    return optimizer.taken, seconds
