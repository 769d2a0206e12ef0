"""The training loop shared by all stages of train.py, in one process or several; it resumes.

    fit(stage, begin, loss, draw, setting, schedule, state)

lowers a loss of nested parameters and keeps in STATE what it needs to resume after a kill.
"""

import contextlib
import math
import signal
import sys
import time
import zlib

import measure
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from tiny_sd import UserError, flatten, nest, require

# ── Several processes ───────────────────────────────────────────────────────────────────────────

def process():
    """(which process this is, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(x, n):
    """The first n rows of all processes' x, in the order in which the rows were dealt out."""
    _, ranks = process()
    if ranks == 1:
        return x[:n]
    shares = [torch.empty_like(x) for _ in range(ranks)]
    dist.all_gather(shares, x)
    return torch.stack(shares, 1).flatten(0, 1)[:n]


# ── Parameters and optimizers ───────────────────────────────────────────────────────────────────

# Where a residual branch ends: with weights of 0, every branch begins as nothing.
ZERO = ("conv2.weight", "to_out.0.weight", "net.2.weight", "proj_out.weight", "out_proj.weight",
        "fc2.weight")


def initial(shapes, seed, zero=ZERO):
    """{name: tensor} for nested checkpoint shapes, convolutions as (out, kh, kw, in).

    Norms 1, biases 0, weights of variance 1 / inputs, but 0 where the name ends in one of `zero`.
    """
    noise = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in flatten(shapes).items():
        shape = [shape[0], *shape[2:], shape[1]] if len(shape) == 4 else shape
        if len(shape) == 1:
            params[name] = torch.full(shape, float("norm" in name and name.endswith("weight")))
            continue
        std = 0.02 if "embedding.weight" in name else math.prod(shape[1:]) ** -0.5
        params[name] = torch.randn(shape, generator=noise) * (0 if name.endswith(zero) else std)
    return params


class Loss(torch.nn.Module):
    """A loss of nested parameters as a module, for DistributedDataParallel to wrap.

    It holds each convolution's weight as the matrix (out, kh · kw · in), the form in which Muon
    makes its steps orthogonal.
    """

    def __init__(self, loss, params):
        super().__init__()
        self.loss, self.shapes = loss, {name: p.shape for name, p in params.items()}
        self.leaves = torch.nn.ParameterList(map(as_matrix, params.values()))

    def forward(self, *batch):
        return self.loss(nest(self.named(self.leaves)), *batch)

    def named(self, leaves):
        """{name: tensor} of these leaves in the parameters' own shapes."""
        return {name: p.reshape(shape) for (name, shape), p in zip(self.shapes.items(), leaves)}


def as_matrix(p):
    return p.flatten(1) if p.ndim > 2 else p


def optimizers(model, rate):
    """Muon (Jordan et al., 2024) for the matrices inside the network; AdamW for the rest."""
    inner, rest = [], []
    for name, p in zip(model.shapes, model.leaves):
        (inner if p.ndim == 2 and "embedding.weight" not in name else rest).append(p)
    return [torch.optim.Muon(inner, rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, rate, (0.9, 0.99), weight_decay=0.0, fused=True)]


class Training:
    """Parameters in training, their optimizers, their running average, and the losses so far."""

    def __init__(self, loss, params, rate, device, compiled=False):
        self.model = Loss(loss, {name: p.detach().clone().to(device)
                                 for name, p in params.items()})
        self.optimizers = optimizers(self.model, rate)
        self.mean = [p.detach().clone() for p in self.model.leaves]
        self.seconds, self.losses, self.device = 0.0, [], device
        several = process()[1] > 1
        run = torch.nn.parallel.DistributedDataParallel(self.model) if several else self.model
        self.run = torch.compile(run) if compiled else run

    @property
    def step(self):
        """How many steps were taken."""
        return len(self.losses)

    def restore(self, checkpoint):
        """Go on where a checkpoint was kept."""
        means = [as_matrix(p) for p in checkpoint["mean"].values()]
        torch._foreach_copy_(self.mean, means)
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizers", [])):
            optimizer.load_state_dict(saved)
        self.seconds, self.losses = checkpoint["seconds"], checkpoint["losses"]

    def checkpoint(self):
        """All that `restore` needs."""
        params = self.model.named([p.data for p in self.model.leaves])
        return {"params": params, "mean": self.averaged(), "step": self.step,
                "seconds": self.seconds, "losses": self.losses,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def averaged(self):
        """The running average, {name: tensor}."""
        return self.model.named(self.mean)

    def lower(self, batch, rate):
        """Take one step on a batch that the processes share among them."""
        rank, ranks = process()
        with torch.autocast(self.device, torch.bfloat16):
            value = self.run(*(part[rank::ranks] for part in batch))
        value.backward()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        n = self.step + 1
        leaves = [p.data for p in self.model.leaves]
        torch._foreach_lerp_(self.mean, leaves, 1 - min(0.998, n / (n + 10)))
        return value.item()


# ── Fitting: one loop for all stages ────────────────────────────────────────────────────────────

def learning_rate(highest, step, progress):
    """Up during the first hundred steps, then down to a hundredth, along a cosine."""
    warm = min(1, (step + 1) / 100)
    return highest * warm * (0.01 + 0.99 * math.cos(progress * math.pi / 2) ** 2)


@contextlib.contextmanager
def interruptible():
    """Yield a list that is empty until Ctrl-C is pressed; a second Ctrl-C stops at once."""
    pressed = []

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def agree(device, seconds, loss, stop):
    """(seconds, loss, stop) for all processes: the first one's clock, the mean loss, any stop."""
    rank, ranks = process()
    report = torch.tensor([seconds * (rank == 0), loss / ranks, float(stop)])
    if ranks > 1:
        report = report.to(device)
        dist.all_reduce(report)
    seconds, loss, stop = report.tolist()
    return seconds, loss, bool(stop)


def fit(stage, begin, loss, draw, setting, schedule, state, show=None):
    """Lower loss(nested params, *batch) until the schedule ends; return the averaged parameters.

    begin() -> {name: tensor}, called unless STATE/stage.pt exists, from which training resumes.
    draw(step, rng) -> batch; show(params) -> a picture for STATE/stage.png.
    """
    batch, (_, ranks) = schedule.batch or setting.batch[stage], process()
    require(batch % ranks == 0, f"{stage}: {batch} pictures a step cannot be shared by {ranks} "
                                f"processes: give --batch a multiple of {ranks}")
    rate = schedule.rate or setting.rate[stage]
    training = restore(stage, begin, loss, rate, schedule, state)
    begun, stop = time.monotonic() - training.seconds, False
    to_keep, to_show = Timer(schedule.keep_every), Timer(schedule.show_every)

    with interruptible() as pressed, progress_bar(stage, training, schedule) as bar:
        while not stop and schedule.progress(training.step, training.seconds) < 1:
            stop = step(stage, training, draw, rate, schedule, begun, pressed)
            advance(bar, training, schedule)
            if to_keep.due():
                keep(stage, training, state)
            if to_show.due():
                save_sample(stage, training, state, show)

    keep(stage, training, state)
    if stop:
        raise Stopped(f"{stage}: stopped at step {training.step}, kept in {state.path(stage)}; "
                      "the same command resumes from there")
    save_sample(stage, training, state, show)
    return training.averaged()


def restore(stage, begin, loss, rate, schedule, state):
    """The stage's training as it was kept, or as it begins."""
    checkpoint = state.load(stage)
    params = checkpoint["params"] if checkpoint else begin()
    training = Training(loss, params, rate, state.device, schedule.compile)
    if checkpoint:
        training.restore(checkpoint)
    return training


def step(stage, training, draw, rate, schedule, begun, pressed):
    """Draw a batch, take a step, note time and loss; return whether to stop."""
    rng = np.random.default_rng([schedule.seed, training.step, zlib.crc32(stage.encode())])
    torch.manual_seed(int(rng.integers(2 ** 31)))
    progress = schedule.progress(training.step, training.seconds)
    batch = draw(training.step, rng)
    loss = training.lower(batch, learning_rate(rate, training.step, progress))

    seconds = time.monotonic() - begun
    training.seconds, loss, stop = agree(training.device, seconds, loss, bool(pressed))
    training.losses.append(loss)
    if not math.isfinite(loss):
        raise UserError(f"{stage}: the loss is {loss} at step {training.step}; lower --rate and "
                        "run it again, which resumes from what was kept before")
    return stop


def keep(stage, training, state):
    """Write STATE/stage.pt."""
    if process()[0] == 0:
        state.save(stage, training.checkpoint())


def save_sample(stage, training, state, show):
    """Write STATE/stage.png."""
    if process()[0] == 0 and show:
        measure.save_picture(show(training.averaged()), state.folder / f"{stage}.png")


class Timer:
    """Something that is due every so many seconds."""

    def __init__(self, seconds):
        self.seconds, self.last = seconds, time.monotonic()

    def due(self):
        if time.monotonic() - self.last <= self.seconds:
            return False
        self.last = time.monotonic()
        return True


class Stopped(Exception):
    """Training was stopped by Ctrl-C, with all kept."""


def progress_bar(stage, training, schedule):
    reached = training.step if schedule.steps else training.seconds
    return tqdm(total=round(schedule.goal), initial=round(reached), desc=stage,
                disable=process()[0] > 0,
                unit="step" if schedule.steps else "s",
                mininterval=1 if sys.stderr.isatty() else 20)


def advance(bar, training, schedule):
    recent = np.mean(training.losses[-200:])
    bar.set_postfix_str(f"step {training.step}, loss {recent:.4f}", refresh=False)
    bar.update(round(training.step if schedule.steps else training.seconds) - bar.n)
