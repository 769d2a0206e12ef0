"""Draw the same pictures as diffusers, with its timesteps and torch's random numbers.

generate() here takes seeds, a number of steps and a sampler's name, and calls tiny_sd.generate()
with the levels and the noise that diffusers would use: the same prompt, seed and settings give the
same picture. Distilled models also get the guidance scale as an input, as in diffusers.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real

import numpy as np

import tiny_sd
from extras.guidance import with_plain_noise
from extras.samplers import SCHEDULERS
from extras.schedules import NAMES, SCHEDULES, SPACINGS, time_of
from tiny_sd import SAMPLERS, Model, array_like, guide, latent_shape, linear, require, sigma_of


def defaults(model, sampler=None):
    """Return the sampler (the model's own if None), and the default steps and guidance for it."""
    own, steps, scale = own_defaults(model)
    return sampler or own, steps, getattr(function_of(sampler or own), "guidance", scale)


def own_defaults(model):
    """Return the model's own sampler, steps and guidance."""
    scheduler = model.config.scheduler
    sampler = SCHEDULERS.get(scheduler._class_name, "dpm++2m")
    if scheduler._class_name == "LCMScheduler":
        return sampler, 4, 8.5
    trailing = scheduler.timestep_spacing == "trailing" and model.alpha_bars[-1] > 1e-3
    if sampler in ("euler", "euler_a") and trailing and scheduler.prediction_type == "epsilon":
        return sampler, 1, 1.0      # Turbo
    return sampler, 20, model.guidance


def picture_size(model, width=None, height=None):
    """Return (width, height) in pixels; None means the model's own."""
    h, w, _ = latent_shape(model, width, height)
    return w * model.factor, h * model.factor


def generate(model: Model, prompt: str, negative: str | None = None, seeds: Sequence[int] = (0,),
             steps: int | None = None, guidance: float | None = None,
             sampler: str | Callable | None = None, schedule: str | None = None,
             width: int | None = None, height: int | None = None, init: np.ndarray | None = None,
             strength=0.75, mask: np.ndarray | None = None, make_denoiser=None,
             embed=tiny_sd.embed_prompts) -> Iterator[np.ndarray]:
    """Return a generator of the latents x_t (len(seeds), h, w, 4) after each step, as in diffusers.

    steps, guidance, sampler, width, height: None means the model's own. sampler: a name in
    SAMPLERS, or a function like those. init: a picture to start from. The other arguments are
    those of tiny_sd.generate. Raises UserError for values out of range.
    """
    sampler, own_steps, own_guidance = defaults(model, sampler)
    guidance = own_guidance if guidance is None else guidance
    for name, text in ("prompt", prompt), ("negative", negative):
        require(isinstance(text, (str, type(None))), f"{name} must be a text, not {text!r:.50}")
    for name, number in ("guidance", guidance), ("strength", strength):
        require(isinstance(number, Real), f"{name} must be a number, not {number!r:.50}")
    require(math.isfinite(guidance), f"guidance {guidance} is not a finite number")
    sampler = function_of(sampler)
    require(np.ndim(seeds) == 1 and len(seeds) > 0 and all(hasattr(s, "__index__") for s in seeds),
            f"seeds must be a list of whole numbers, not {seeds}")
    check_start(model, init, mask)
    if negative is None and not getattr(model.config.scheduler, "_force_zeros", True):
        negative = ""       # the folder's model_index.json asks for this
    if init is not None:
        height, width = init.shape[:2]

    levels = sampling_steps(sampler, own_steps if steps is None else steps, model.config.scheduler,
                            model.alpha_bars, own_schedule(schedule, model))
    configured = getattr(sampler, "configured", lambda *_: sampler)
    sampler_here = configured(model.config.scheduler, levels, model.alpha_bars, init is None)
    shape = latent_shape(model, width, height)
    noise = torch_noise(seeds, shape)
    encoded = init is not None and not (model.inpaints and strength == 1)
    if encoded and getattr(sampler, "from_the_mean", False):
        noise = after_zeros(noise, (len(seeds), *shape))
    if init is None or mask is not None and strength == 1:
        scale = initial_scale(sampler, model.config.scheduler, levels)
        sampler_here = from_scaled_noise(sampler_here, scale)
    plain_noise = getattr(sampler, "plain_noise", False)
    scale = 0.0 if plain_noise else guidance        # at 1 the negative prompt would be left out
    if model.config.unet.time_cond_proj_dim:
        scale = 1.0     # a distilled model takes the scale as an input instead
    own = with_plain_noise(denoiser) if plain_noise else denoiser
    make = functools.partial(with_guidance, make_denoiser or own, guidance)
    return tiny_sd.generate(model, prompt, negative, scale, sampler_here, levels, noise, init,
                            strength, mask, make, embed)


def check_start(model, picture, mask):
    """UserError unless a start picture and its mask fit each other and the model."""
    require(mask is not None or not model.inpaints, f"{model.name} is a model for inpainting, "
            "which needs a picture and a mask")
    is_array = isinstance(picture, np.ndarray)
    require(picture is None or is_array and picture.ndim == 3 and picture.shape[2] == 3,
            "a picture to start from is an array (height, width, 3), not "
            f"{picture.shape if is_array else type(picture).__name__}")
    floats = picture is not None and picture.dtype.kind == "f"
    require(not floats or not 0 < np.max(picture, initial=0) <= 1, "a picture to start from has "
            "values from 0 to 255, but this one only up to 1")
    require(mask is None or isinstance(mask, np.ndarray) and mask.dtype == bool,
            "a mask is an array of bool")
    require(mask is None or picture is not None and mask.shape == picture.shape[:2],
            "a mask needs a picture of its size to start from")


def with_guidance(make_denoiser, guidance, model, context, _, *others):
    """Make a denoiser with this guidance, not the one that generate() passes; add .alpha_bars."""
    denoise = functools.partial(make_denoiser(model, context, guidance, *others))
    denoise.alpha_bars = model.alpha_bars
    return denoise


def denoiser(model: Model, context, guidance=1.0, pooled=None, extra_channels=None,
             combine=guide, predict=None) -> Callable:
    """Like tiny_sd.denoiser, but run the U-Net on both contexts at once.

    With extras/fast.py, NumPy runs each context on its own cores. Torch gets both in one batch, and
    so does NumPy if weights are prepared at every use (extras/narrow.py), so that this happens only
    once. combine: see extras/guidance.py; it may take more than two contexts. predict: a
    replacement for tiny_sd.predict. If both are left out, and extras/fast.py is not loaded or finds
    tiny_sd.denoiser edited, tiny_sd.denoiser itself is used; otherwise an edit has no effect.
    """
    if combine is guide and predict is None and "denoiser" not in tiny_sd.FAST:
        return tiny_sd.denoiser(model, context, guidance, pooled, extra_channels)
    fleeting = getattr(model.unet["conv_in"]["weight"], "fleeting", False)
    apart = isinstance(context, np.ndarray) and not fleeting

    def denoise(x_t, t, alpha_bar):
        x = x_t if extra_channels is None else tiny_sd.concat(x_t, extra_channels)

        def ask(contexts):      # for every picture, with each of these contexts
            rows = np.repeat(contexts, len(x))
            pooled_rows = None if pooled is None else pooled[rows]
            return (predict or tiny_sd.predict)(model, np.concatenate([x] * len(contexts)), t,
                                                context[rows], pooled_rows, guidance)

        both = list(range(len(context)))
        halves = (list(tiny_sd.FAST.get("each", map)(ask, [[i] for i in both])) if apart
                  else np.split(ask(both), len(both)))
        output = halves[0] if len(halves) == 1 else combine(*halves, guidance)
        kind = model.config.scheduler.prediction_type
        return tiny_sd.split_prediction(kind, output, x_t, alpha_bar)

    return denoise


# ── Levels ─────────────────────────────────────────────────────────────────── REFERENCE §9 ──


def noise_levels(scheduler):
    """Return ᾱ_t of t = 0 .. T - 1, as diffusers computes it from a scheduler's config."""
    T, low, high = scheduler.num_train_timesteps, scheduler.beta_start, scheduler.beta_end
    cos = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = {"linear": np.linspace(low, high, T),
             "squaredcos_cap_v2": np.minimum(1 - cos[1:] / cos[:-1], 0.999)}
    alpha_bars = (tiny_sd.scaled_linear_schedule(T, low, high)
                  if scheduler.beta_schedule == "scaled_linear"
                  else np.cumprod(1 - betas[scheduler.beta_schedule]))
    if getattr(scheduler, "rescale_betas_zero_snr", False):     # Lin et al., 2024
        signal = alpha_bars ** 0.5
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        alpha_bars = signal ** 2
        if scheduler.prediction_type == "epsilon":      # ε says nothing about x_0 if ᾱ = 0
            alpha_bars[-1] = 2 ** -24
    return alpha_bars


def as_pipelines_have_it(settings, two_encoders):
    """Return a scheduler's config as diffusers' scheduler class and pipeline complete it."""
    kind, linear_schedule = str(settings.get("_class_name")), {}
    if kind in SCHEDULERS and kind not in ("LCMScheduler", "TCDScheduler"):
        linear_schedule = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    if two_encoders:
        return linear_schedule | {"steps_offset": 0} | settings
    return linear_schedule | settings | {"steps_offset": 1, "clip_sample": False}


def function_of(sampler):
    """Return the sampler of this name, or a function unchanged."""
    require(callable(sampler) or sampler in SAMPLERS,
            f"there is no sampler {sampler}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS.get(sampler, sampler)


def timestep_spacing(sampler, scheduler):
    """Return how to space the timesteps: the sampler's own way, the config's, or the default."""
    own = getattr(sampler, "spacing", None)
    return own or scheduler.timestep_spacing or getattr(sampler, "default_spacing", "leading")


def timesteps(sampler, n, scheduler, spacing=None):
    """Return n timesteps, the noisiest first (9.1). spacing: see SPACINGS (timestep_spacing's)."""
    T, spacing = scheduler.num_train_timesteps, spacing or timestep_spacing(sampler, scheduler)
    if custom := getattr(sampler, "timesteps", None):
        return custom(n, scheduler)
    if spacing == "trailing":
        return (T - np.arange(n) * T / n).round() - 1
    m = n + getattr(sampler, "drops_last", 0)
    if spacing == "leading":
        t = np.arange(m) * (T // m) + scheduler.steps_offset
    else:
        t = np.linspace(0, T - 1, m)
    return t[::-1][:n]


def own_schedule(schedule, model):
    """Return the name of the schedule for this model: one of them has a version for SDXL."""
    xl = schedule == "align your steps" and len(model.encoders) == 2
    return "align your steps xl" if xl else schedule


def schedule_of(sampler, scheduler):
    """Return the schedule that the config asks for, if diffusers' sampler would follow it."""
    follows = hasattr(sampler, "range") and getattr(sampler, "follows_config", True)
    return next((name for name in ("karras", "exponential", "beta")
                 if follows and getattr(scheduler, f"use_{name}_sigmas", False)), None)


def sampling_steps(sampler, n, scheduler, alpha_bars, schedule=None):
    """Return the n steps (t, ᾱ_t, ᾱ_next) that diffusers takes with this sampler and config.

    schedule: a name in SCHEDULES or SPACINGS; if None, the levels are spaced as the config says.
    """
    sampler = function_of(sampler)
    T, sigmas = len(alpha_bars), sigma_of(np.maximum(alpha_bars, 2 ** -24))
    most = min(T, 1000) - 1
    require(hasattr(n, "__index__") and 1 <= n <= most, f"steps {n} is not from 1 to {most}")
    require(schedule in (None, *NAMES), f"there is no schedule {schedule}")
    require(not schedule or not hasattr(sampler, "timesteps"),
            f"schedule {schedule} does not go with sampler {getattr(sampler, 'name', sampler)}")
    name = schedule or schedule_of(sampler, scheduler)

    t = timesteps(sampler, n, scheduler, name if name in SPACINGS else None)
    require(t[0] < T, f"{n} steps are more than this sampler can take")
    if not getattr(sampler, "fractional", False):
        t = np.round(t)
    sigma = np.interp(t, np.arange(T), sigmas)
    if name in SCHEDULES:
        sigma, t = scheduled_levels(name, n, sampler, sigma, sigmas, scheduler)
    levels = (1 / (1 + sigma ** 2)).tolist()
    if alpha_bars[-1] == 0 and t[0] == T - 1 and getattr(sampler, "from_nothing", False):
        levels[0] = 0.0

    asked = getattr(scheduler, "timestep_type", None), scheduler.prediction_type
    if getattr(sampler, "continuous", False) and asked == ("continuous", "v_prediction"):
        t = np.log(sigma) / 4

    ends_clean = getattr(sampler, "ends_clean", True)
    if getattr(sampler, "follows_set_alpha", False) and scheduler.set_alpha_to_one is not None:
        ends_clean = scheduler.set_alpha_to_one
    last = 1.0 if ends_clean or name in SCHEDULES else float(alpha_bars[0])
    ends = [*levels[1:], last]
    if getattr(sampler, "strides", False) and not name:
        ends = [float(alpha_bars[i]) if i >= 0 else last for i in t.astype(int) - T // n]
    return list(zip(t.tolist(), levels, ends))


def scheduled_levels(name, n, sampler, sigma, sigmas, scheduler):
    """Return a schedule's levels and their times.

    sigma: the levels that the sampler would take, whose range some schedules cover; sigmas: all
    levels of the model. Three of the schedules are also in diffusers: there a config may set the
    range, and samplers in log σ round the times to integers.
    """
    in_diffusers = name in ("karras", "exponential", "beta") and getattr(sampler, "range", None)
    known = sigma[::-1] if in_diffusers == "steps" else sigmas
    if in_diffusers:
        known = np.array([getattr(scheduler, "sigma_min", None) or known[0],
                          getattr(scheduler, "sigma_max", None) or known[-1]])
    sigma = SCHEDULES[name](n, known)
    t = time_of(sigma, sigmas)
    if in_diffusers == "model":
        # diffusers truncates the others; the first comes out as 998.9999
        t = t.round() if name == "karras" else np.floor(t - 1e-4).clip(0)
    return sigma, t


def initial_scale(sampler, scheduler, steps):
    """Return the standard deviation of x_T: 1, or only that of its noise."""
    if getattr(sampler, "scaled", False) and timestep_spacing(sampler, scheduler) != "leading":
        return (1 - steps[0][1]) ** 0.5
    return 1.0


def from_scaled_noise(sampler, scale):
    """Return the sampler, changed to start from x_T times this scale."""
    def scaled(denoise, x, steps, noise):
        return sampler(denoise, scale * x, steps, noise)
    return scaled


# ── Distilled models ────────────────────────────────────────────────────────────────────────────


def embed_time_and_guidance(model, x, t, pooled=None, guidance=1.0):
    """Return the time embedding of a model that takes the guidance scale as an input.

    Meng et al., 2023. Like tiny_sd.time_mlp, with the scale's embedding added (9.5).
    """
    weights = model.unet["time_embedding"]
    times = tiny_sd.timestep_embedding(t, weights["linear_1"]["weight"].shape[1])
    scale = guidance_condition(model.config.unet.time_cond_proj_dim, guidance)
    h = array_like(x, times) + linear(array_like(x, np.tile(scale, (len(t), 1))),
                                      **weights["cond_proj"])
    h = tiny_sd.silu(linear(h, **weights["linear_1"]))
    return linear(h, **weights["linear_2"])


def guidance_condition(dim, guidance):
    """Return the embedding of the guidance scale that a distilled model gets, (1, dim) (9.5).

    A timestep embedding, sines first, whose last frequency is 1/10000.
    """
    angles = 1000 * (guidance - 1) * 10000 ** -np.linspace(0, 1, dim // 2)
    return np.concatenate([np.sin(angles), np.cos(angles)])[None]


# ── Torch's random numbers ──────────────────────────────────────────────────────────────────────


class Noise:
    """torch.randn on a CPU generator with this seed: MT19937, then Box and Muller (9.3), (9.4)."""

    def __init__(self, seed):
        self.words = np.random.RandomState(int(seed) & 0xffffffff)

    def uniform(self, n):
        """Return n numbers in [0, 1), from the low 24 bits of each word."""
        words = np.frombuffer(self.words.bytes(4 * n), "<u4")
        return (words & 0xffffff).astype(np.float32) * np.float32(2 ** -24)

    def __call__(self, height, width, channels):
        """Return standard normal numbers (height, width, channels), drawn channels first."""
        n = height * width * channels                   # at least 16
        z = box_muller(self.uniform(n)[:n // 16 * 16])
        if n % 16:                                      # torch draws the last 16 again
            z = np.concatenate([z[:n - 16], box_muller(self.uniform(16))])
        return z.reshape(channels, height, width).transpose(1, 2, 0)


def box_muller(u):
    """Turn uniform numbers (16 n,) into normal ones: of each 16, 8 radii and 8 angles (9.4)."""
    u1, u2 = np.split(u.reshape(-1, 16), 2, axis=1)
    radius, angle = np.sqrt(-2 * np.log(1 - u1)), np.float32(2 * np.pi) * u2
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def torch_noise(seeds, shape):
    """Return noise(), which draws (len(seeds), *shape) numbers, each picture's from its seed."""
    streams = [Noise(seed) for seed in seeds]
    return lambda: np.stack([stream(*shape) for stream in streams])


def after_zeros(noise, shape):
    """Return noise(), changed to return zeros first: tiny_sd.generate encodes a picture with them.
    """
    def numbers():
        yield np.zeros(shape, np.float32)
        while True:
            yield noise()
    return numbers().__next__
