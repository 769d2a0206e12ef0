"""The training loop of all stages, and of a LoRA, in one process or several; it resumes.

    optimizer = Optimizer(parameters, schedule)
    losses = minimize(loss, optimizer, batches)     or tiny_sd.train(model, optimizer, batches, ...)
    fit(stage, optimizer, losses, rng, schedule, state)
"""

import contextlib
import functools
import io
import math
import os
import signal
import sys
import time
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from extras.files import free_name, replace_atomically
from extras.start import SIGNALS
from tiny_sd import UserError, require, tell

# ── Settings ────────────────────────────────────────────────────────────────────────────────────

class Schedule(NamedTuple):
    """How long and how fast to train, and how often to save and show samples."""
    minutes: float = 30
    steps: int = None       # instead of minutes
    batch: int = None       # pictures per step, over all processes, instead of the setting's
    rate: float = None      # instead of the setting's
    bank: int = None        # scenes encoded ahead
    seed: int = 0
    keep_every: float = 60      # seconds
    show_every: float = 600     # seconds

    def progress(self, step, seconds):
        """The fraction of the steps, or else of the minutes, that is done."""
        return step / self.steps if self.steps else seconds / (60 * self.minutes)

    def rate_at(self, step, progress):
        """The learning rate: it rises for fifty steps, then falls to a hundredth along a cosine."""
        return self.rate * min(1, (step + 1) / 50) * (
            0.01 + 0.99 * math.cos(progress * math.pi / 2) ** 2)


def process():
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(device):
    """Connect to the other processes if torchrun started several."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def share_of_batch(stage, schedule):
    """The number of pictures that this process draws in each step."""
    _, ranks = process()
    require(schedule.batch % ranks == 0, f"{stage}: {schedule.batch} pictures a step cannot be "
            f"shared by {ranks} processes: give --batch a multiple of {ranks}")
    return schedule.batch // ranks


def as_one(tensors, exchange):
    """Exchange tensors with the other processes, if any, in one message: hundreds are slow."""
    if process()[1] > 1 and tensors:
        vector = parameters_to_vector(tensors)
        exchange(vector)
        vector_to_parameters(vector, tensors)


# ── Parameters ──────────────────────────────────────────────────────────────────────────────────

# The last layer of each residual branch: with weights of 0, every branch starts as zero.
ZERO = ("conv2.weight", "to_out.0.weight", "net.2.weight", "proj_out.weight", "out_proj.weight",
        "fc2.weight")


def initial(shapes, seed, zero=ZERO):
    """{name: tensor} for {name: shape} of a checkpoint, convolutions as (out, kh, kw, in).

    Norms 1, biases 0, weights of variance 1 / inputs, but 0 where the name ends in one of `zero`.
    """
    noise = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in shapes.items():
        shape = [shape[0], *shape[2:], shape[1]] if len(shape) == 4 else shape
        if len(shape) == 1:
            params[name] = torch.full(shape, float("norm" in name and name.endswith("weight")))
            continue
        std = 0.02 if "embedding.weight" in name else math.prod(shape[1:]) ** -0.5
        params[name] = torch.randn(shape, generator=noise) * (0 if name.endswith(zero) else std)
    return params


# ── The optimizer ───────────────────────────────────────────────────────────────────────────────

class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised step for each matrix (Jordan et al., 2024).

    torch's own version computes in bfloat16, which takes minutes on processors that lack it.
    """

    @torch.no_grad()
    def step(self):
        rank, ranks = process()
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                if i % ranks == rank:       # every process computes some, and sends them to all
                    step = orthogonal(p.grad.lerp(momentum, 0.95).flatten(1))
                    size = 0.2 * math.sqrt(max(step.shape))     # that of AdamW's steps
                    p.sub_(step.reshape(p.shape), alpha=group["lr"] * size)
            for owner in range(ranks):
                as_one(group["params"][owner::ranks], functools.partial(dist.broadcast, src=owner))


def orthogonal(x):
    """A matrix near U Vᵀ for x = U S Vᵀ, by Newton-Schulz iteration.

    Each of five rounds multiplies X by a polynomial in A = X Xᵀ. The polynomials need only the
    small matrix A: Q accumulates them, and X is multiplied once.
    """
    if len(x) > x.shape[1]:
        return orthogonal(x.T).T
    x = x / (x.norm() + 1e-7)
    one = torch.eye(len(x), device=x.device)
    a, q = x @ x.T, one
    for _ in range(5):
        p = 3.4445 * one - 4.7750 * a + 2.0315 * a @ a
        a, q = p @ a @ p, p @ q
    return q @ x


class Optimizer:
    """Muon for the matrices inside a network and AdamW for the rest, over all processes.

    params: {name: tensor}, changed in place. Keeps their running average, and sets the rate from
    the schedule; fit() sets progress. parts: optimizers to use instead of those two.
    """

    def __init__(self, params, schedule, parts=None):
        self.params, self.schedule = params, schedule
        self.taken, self.progress = 0, 0.0
        self.mean = {name: p.detach().clone() for name, p in params.items()}
        inner = [p for name, p in params.items() if p.ndim > 1 and "embedding.weight" not in name]
        rest = [p for p in params.values() if all(p is not q for q in inner)]
        for p in params.values():
            p.requires_grad_()
        self.parts = parts or [Muon(inner, {"lr": 0.0}), torch.optim.AdamW(
            rest, 0.0, (0.9, 0.99), weight_decay=0.0, fused=True)]

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    @torch.no_grad()
    def step(self):
        """Take a step along the mean of all processes' gradients."""
        if process()[1] > 1:
            as_one([p.grad for p in self.params.values()], dist.all_reduce)
            for p in self.params.values():
                p.grad /= process()[1]
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.schedule.rate_at(self.taken, self.progress)
            part.step()
        self.taken += 1
        torch._foreach_lerp_([*self.mean.values()], [*self.params.values()],
                             1 - min(0.998, self.taken / (self.taken + 10)))

    def restore(self, checkpoint):
        """Resume from a checkpoint; UserError if it does not fit."""
        found, mean = checkpoint["params"], checkpoint["mean"]
        for name, p in self.params.items():
            require(name in found and found[name].shape == p.shape == mean[name].shape,
                    f"what was kept does not fit: {name} is of another size or missing. Was it "
                    "begun with another --config or --data? Name another --state")
            p.data.copy_(found[name])
            self.mean[name].copy_(mean[name])
        try:
            for part, saved in zip(self.parts, checkpoint.get("optimizers", [])):
                part.load_state_dict(part.state_dict() | {"state": saved["state"]})
                for p, kept in part.state.items():
                    require(all(x.shape in (p.shape, ()) for x in kept.values()), "sizes differ")
        except Exception as error:      # torch raises many kinds
            raise UserError(f"what was kept does not fit; move it elsewhere: {error}") from None
        self.taken = checkpoint["step"]

    def checkpoint(self):
        return {"params": {name: p.detach() for name, p in self.params.items()},
                "mean": self.mean, "step": self.taken,
                "optimizers": [part.state_dict() for part in self.parts]}


class State:
    """The folder for the state of the training, and the device to load it to.

    STAGE.pt: {"params": {name: tensor}, "mean": their running average, "optimizers", "step",
    "seconds", "losses"}.
    """

    def __init__(self, folder, device="cpu"):
        self.folder, self.device, self.begun = folder, device, set()

    def path(self, stage):
        return self.folder / f"{stage}.pt"

    def load(self, stage):
        """The saved state of a stage, or {}."""
        path = self.path(stage)
        if not path.exists():
            self.begun.add(stage)
            return {}
        try:
            require(path.is_file(), "it is not a file")     # a pipe might never deliver anything
            kept = torch.load(path, map_location=self.device, weights_only=True)
            params, mean, losses = (kept[name] for name in ("params", "mean", "losses"))
            whole = (isinstance(kept["step"], int) and kept["step"] >= 0 <= kept["seconds"]
                     and isinstance(losses, list) and math.isfinite(kept["seconds"] + sum(losses))
                     and {*params} == {*mean} and all(isinstance(p, torch.Tensor) for p in
                                                      [*params.values(), *mean.values()]))
        except (OSError, MemoryError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        except Exception as error:      # torch and pickle raise many kinds
            reason = str(error)[:100]
            require("memory" not in reason, f"{path} cannot be read: {reason}")
            raise UserError(f"{path} is not whole: move it elsewhere ({reason})") from None
        require(whole, f"{path} was not kept by this program: move it elsewhere")
        return kept

    def save(self, stage, checkpoint):
        """Save the state of a stage; what came to its name since it was begun gets another."""
        path = self.path(stage)
        if stage in self.begun and os.path.lexists(path):
            aside = free_name(path)
            os.rename(path, aside)
            tell(f"{path} appeared while this training ran: it is now {aside}")
        self.begun.discard(stage)
        whole = io.BytesIO()    # on a full disk torch.save would abort the process
        torch.save(checkpoint, whole)
        with replace_atomically(path) as temporary:
            temporary.write_bytes(whole.getbuffer())


# ── The loop ────────────────────────────────────────────────────────────────────────────────────

def minimize(loss, optimizer, batches):
    """Minimise loss(*batch), one step per batch; yield its values, as tiny_sd.train does."""
    for batch in batches:
        value = loss(*batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        yield value.item()


def fit(stage, optimizer, losses, rng, schedule, state, show=None, dtype=None):
    """Take steps by iterating over losses until the schedule ends; return the seconds.

    rng: the generator that losses uses; its state is set from the number of each step, so that a
    resumed training takes the same steps. show() -> a picture for STATE/stage.png, called for at
    most a tenth of the time. dtype: to compute in, instead of the faster one.
    """
    kept = state.load(stage)
    if kept:
        optimizer.restore(kept)
    picture = state.path(stage).with_suffix(".png")
    require(optimizer.taken or not os.path.lexists(picture),
            f"{picture} is not of this training, which would replace it: name another --state")
    record = {"losses": kept.get("losses", []), "seconds": kept.get("seconds", 0.0)}
    begun, stop = time.monotonic() - record["seconds"], False
    to_keep, to_show = (record["seconds"] + n for n in (schedule.keep_every, schedule.show_every))
    faster = state.device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    dtype = dtype or (torch.bfloat16 if faster else torch.float32)
    bar = tqdm(initial=optimizer.taken, desc=stage, disable=process()[0] > 0, unit="step",
               mininterval=1 if sys.stderr.isatty() else 20)

    def keep():
        if process()[0] == 0:
            state.save(stage, optimizer.checkpoint() | record)

    with signals_wait() as caught, bar:
        while not stop and schedule.progress(optimizer.taken, record["seconds"]) < 1:
            optimizer.progress = schedule.progress(optimizer.taken, record["seconds"])
            begin_step(rng, schedule.seed, optimizer.taken, stage)
            with torch.autocast(state.device, dtype, enabled=dtype != torch.float32):
                loss = next(losses)
            now, loss, stop = agree(state.device, time.monotonic() - begun, loss, bool(caught))
            record["seconds"] = now
            record["losses"].append(loss)
            require(math.isfinite(loss), f"{stage}: the loss is {loss} at step {optimizer.taken}; "
                    "lower --rate and run it again, which resumes from what was kept before")
            advance(bar, optimizer, record, schedule)
            to_draw = show and now > to_show
            if now > to_keep or to_draw:
                keep()
                to_keep = now + schedule.keep_every
            if to_draw:
                save_sample(stage, state, show)
                took = time.monotonic() - begun - now
                to_show = now + max(schedule.show_every, 10 * took)
        keep()

    if dist.is_initialized():       # the next stage reads what the first process saved
        dist.barrier()
    if stop or caught:
        tell(f"step {optimizer.taken} is kept in {state.path(stage)}: the same command resumes "
             "from there")
        for number in caught[:1]:
            signal.raise_signal(number)
        raise KeyboardInterrupt     # of another process
    return record["seconds"]


def begin_step(rng, seed, step, stage):
    """Seed the random generators for this step of this process."""
    key = [seed, step, zlib.crc32(stage.encode()), process()[0]]
    rng.bit_generator.state = np.random.default_rng(key).bit_generator.state
    torch.manual_seed(int(rng.integers(2 ** 31)))


def agree(device, seconds, loss, stop):
    """(seconds, loss, stop) for all processes: the first one's clock, the mean loss, any stop."""
    rank, ranks = process()
    report = torch.tensor([seconds * (rank == 0), loss / ranks, float(stop)], dtype=torch.float64)
    if ranks > 1:
        report = report.to(device)
        dist.all_reduce(report)
    seconds, loss, stop = report.tolist()
    return seconds, loss, bool(stop)


def check_same(state, kept):
    """UserError unless all processes read the same state, which only the first one saves."""
    mark = zlib.crc32(repr((kept.get("step"), kept.get("losses"))).encode())
    marks = torch.tensor([mark, -mark], device=state.device)
    if dist.is_initialized():
        dist.all_reduce(marks, dist.ReduceOp.MAX)
    require(marks.sum() == 0, f"the processes read different states: {state.folder} has to lie on "
                              "a disk that all of them share")


@contextlib.contextmanager
def signals_wait():
    """Yield a list that collects a signal, instead of ending the program; a second one ends it.

    So only whole steps are saved.
    """
    caught = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def catch(number, _):
        caught.append(number)
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    for number, handler in before.items():
        if handler != signal.SIG_IGN:       # keep signals ignored, as nohup ignores SIGHUP
            signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


def advance(bar, optimizer, record, schedule):
    done = schedule.progress(optimizer.taken, record["seconds"]) or 1
    bar.total = max(optimizer.taken, round(optimizer.taken / done))
    bar.set_postfix_str(f"loss {np.mean(record['losses'][-100:]):.4f}", refresh=False)
    bar.update()


def save_sample(stage, state, show):
    """Write STATE/stage.png, if possible."""
    if process()[0] == 0:
        try:
            with replace_atomically(state.folder / f"{stage}.png") as unfinished:
                Image.fromarray(show()).save(unfinished, "PNG")
        except (UserError, MemoryError, RuntimeError) as error:     # torch's is for lack of memory
            tell(f"there is no sheet this time: {error}")


def grid(pictures, columns):
    """Join pictures (n, height, width, 3) row by row; fill up the last row with white."""
    pictures = np.asarray(pictures)
    empty = np.full_like(pictures[:1], 255).repeat(-len(pictures) % columns, 0)
    rows = np.concatenate([pictures, empty]).reshape(-1, columns, *pictures.shape[1:])
    return np.concatenate([np.concatenate([*row], axis=1) for row in rows])
