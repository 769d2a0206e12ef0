"""More samplers, the details in which each follows diffusers, and their names in other programs.

Importing this adds the samplers to tiny_sd.SAMPLERS. Each detail is an attribute of the function:

    name, title         as in SAMPLERS, and as recorded in pictures
    spacing             how its timesteps are always spaced: "leading", "trailing" or "linspace"
    default_spacing     the same, used if the scheduler's config does not say ("leading")
    timesteps           a function (n, scheduler) that chooses them; schedules do not apply then
    configured          a function (scheduler, steps, alpha_bars, from_noise) that returns the
                        sampler adapted to a config
    drops_last          1 if it takes the first n of n + 1 timesteps (0)
    fractional          its times need not be integers (False)
    plain_noise         it needs denoisers from guidance.with_plain_noise (False)
    guidance            its default guidance scale (the model's own)
    scaled              x_T has the standard deviation of its noise, not 1 (False)
    from_the_mean       a start picture is encoded without noise (False)
    range               the range of a schedule such as Karras': "model", all levels of the model,
                        or "steps", the levels that the sampler would take ("model")
    follows_config      it uses the schedule that the config asks for (True if it has a range)
    ends_clean          the last step ends at ᾱ = 1, not at the model's first level (True)
    follows_set_alpha   ... unless the config's set_alpha_to_one says otherwise (False)
    strides             each step ends T // n times lower, even if the next starts elsewhere (False)
    from_nothing        it can start at ᾱ = 0 exactly (False)
    continuous          its times are log σ / 4 if the config says so (False)

Some samplers call the model at levels between those of the steps. They look up the time of a level
in denoise.alpha_bars, which like_diffusers.generate adds to the denoiser.
"""

import functools
import math
import re
from itertools import zip_longest

import numpy as np

from extras.schedules import karras, schedule_named, time_of
from tiny_sd import (
    SAMPLERS,
    add_noise,
    ddim,
    ddpm,
    dpm_pp_2m,
    require,
    sigma_of,
    split_prediction,
    velocity,
)

TITLES, SCHEDULERS = {}, {}     # {name: title}, {diffusers' class: name}


def sampler(name, title, scheduler=None, **facts):
    """Register a sampler under these names, with its attributes."""
    def register(function):
        vars(function).update(facts, name=name, title=title)
        SAMPLERS[name], TITLES[name] = function, title
        if scheduler:
            SCHEDULERS[scheduler] = name
        return function
    return register


SIGMA = {"default_spacing": "linspace", "fractional": True, "scaled": True,     # samplers in σ
         "range": "steps"}
LAMBDA = {"default_spacing": "linspace", "drops_last": 1, "range": "model"}     # in log σ
sampler("ddim", "DDIM", "DDIMScheduler", follows_set_alpha=True, strides=True,
        from_nothing=True)(ddim)
sampler("dpm++2m", "DPM++ 2M", "DPMSolverMultistepScheduler", **LAMBDA)(dpm_pp_2m)


@sampler("ddim_cfg++", "DDIM CFG++", strides=True, from_nothing=True, follows_set_alpha=True,
         plain_noise=True, guidance=0.6)
def ddim_cfg_pp(denoise, x, steps, noise=None):
    """Take ddim's steps with a guided x̂_0 and an unguided ε̂ (9.19).

    Chung et al., 2024. Its guidance scale is from 0 to 1.
    """
    return ddim(denoise, x, steps, noise)


@sampler("euler", "Euler", "EulerDiscreteScheduler", continuous=True, **SIGMA)
def euler(denoise, x, steps, noise=None):
    """Follow dx̄/dσ = ε̂, where x̄ = x_t / √ᾱ, by Euler's method (6.22): ddim in other coordinates.

    Karras et al., 2022.
    """
    for t, alpha_bar, alpha_bar_next in steps:
        _, eps = denoise(x, t, alpha_bar)
        x_bar = x / alpha_bar ** 0.5
        x_bar = x_bar + (sigma_of(alpha_bar_next) - sigma_of(alpha_bar)) * eps
        x = alpha_bar_next ** 0.5 * x_bar
        yield x


@sampler("euler_a", "Euler a", "EulerAncestralDiscreteScheduler", follows_config=False, **SIGMA)
def euler_ancestral(denoise, x, steps, noise):
    """Step below the next level, then back up to it with fresh noise (6.23)."""
    for t, alpha_bar, alpha_bar_next in steps:
        _, eps = denoise(x, t, alpha_bar)
        sigma, sigma_next = sigma_of(alpha_bar), sigma_of(alpha_bar_next)
        sigma_up = sigma_next / sigma * (sigma ** 2 - sigma_next ** 2) ** 0.5
        sigma_down = (sigma_next ** 2 - sigma_up ** 2) ** 0.5

        x_bar = x / alpha_bar ** 0.5 + (sigma_down - sigma) * eps
        x = alpha_bar_next ** 0.5 * (x_bar + sigma_up * noise())
        yield x


def ddpm_large(denoise, x, steps, noise):
    """Like ddpm, but add noise of variance β, the upper bound in Ho et al."""
    for t, alpha_bar, alpha_bar_next in steps:
        alpha = alpha_bar / alpha_bar_next
        *_, mean = ddpm(denoise, x, [(t, alpha_bar, alpha_bar_next)], lambda: 0)
        x = mean + ((1 - alpha) ** 0.5 * noise() if t > 0 else 0)
        yield x


sampler("ddpm", "DDPM", "DDPMScheduler", from_nothing=True, configured=lambda scheduler, *_: (
    ddpm_large if getattr(scheduler, "variance_type", None) == "fixed_large" else ddpm))(ddpm)


ADAMS_BASHFORTH = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12),
                   (55 / 24, -59 / 24, 37 / 24, -9 / 24)]      # weights of 1 to 4 past values


def ddim_step(x, output, alpha_bar, alpha_bar_next, kind="epsilon"):
    """Take ddim's step, given the model's output of this kind."""
    x_0, eps = split_prediction(kind, output, x, alpha_bar)
    return add_noise(x_0, alpha_bar_next, eps)


def plms_of(velocities=False, level=None, stride=0, runge_kutta=False):
    """Return PLMS, which extrapolates ε̂ or, if `velocities`, the velocity that the model predicts.

    level(t): ᾱ of a time; stride: the distance between times; with these the first step is that of
    diffusers. runge_kutta: start with three Runge-Kutta steps, as Liu et al. do.
    """
    def what(guess, alpha_bar):
        return velocity(guess[0], alpha_bar, guess[1]) if velocities else guess[1]

    step = functools.partial(ddim_step, kind="v_prediction" if velocities else "epsilon")

    def mean_of_four(denoise, x, first, t, alpha_bar, t_next):
        """Return the Runge-Kutta mean of the directions over a step; `first`: the one at its start.

        Halfway, x moves to t - half but the model is called at t_next + half, a different time if
        the stride is odd.
        """
        half, direction, total = stride // 2, first, first
        for end, at, weight in ((t - half, t_next + half, 2), (t_next + half, t_next + half, 2),
                                (t_next, t_next, 1)):
            guess = step(x, direction, alpha_bar, level(end))
            direction = what(denoise(guess, at, level(at)), level(at))
            total = total + weight * direction
        return total / 6

    def plms(denoise, x, steps, noise=None):
        """Take ddim's step along ε̂, extrapolated from up to four steps by Adams-Bashforth.

        Liu et al., 2022. The first step, having no history yet, uses the mean of the noise here and
        at the next level (Heun).
        """
        past = []
        for (t, alpha_bar, alpha_bar_next), following in zip_longest(steps, steps[1:]):
            past = [what(denoise(x, t, alpha_bar), alpha_bar), *past[:3]]
            weights = ADAMS_BASHFORTH[len(past) - 1]
            direction = sum(weight * each for weight, each in zip(weights, past))

            if runge_kutta and following and len(past) < 4:
                t_next, alpha_bar_next, _ = following
                direction = mean_of_four(denoise, x, past[0], t, alpha_bar, t_next)
            elif following and len(past) == 1:
                t_next, alpha_bar_after, _ = following
                guess = step(x, direction, alpha_bar, alpha_bar_next)
                direction = (direction + what(denoise(guess, t_next, alpha_bar_after),
                                              alpha_bar_after)) / 2
                if level:
                    alpha_bar, alpha_bar_next = level(t_next + stride), alpha_bar_after
            x = step(x, direction, alpha_bar, alpha_bar_next)
            yield x
    return plms


def plms_configured(scheduler, steps, alpha_bars, from_noise):
    """Return PLMS as diffusers runs it with this config."""
    T, own = len(alpha_bars), scheduler._class_name == "PNDMScheduler"
    return plms_of(scheduler.prediction_type == "v_prediction",
                   lambda t: float(alpha_bars[min(int(t), T - 1)]), T // len(steps),
                   from_noise and own and not getattr(scheduler, "skip_prk_steps", None))


plms = plms_of()
sampler("plms", "PLMS", "PNDMScheduler", ends_clean=False, follows_set_alpha=True, strides=True,
        configured=plms_configured)(plms)


SIGMA_DATA, TIMESTEP_SCALE = 0.5, 10        # of latent consistency distillation


def solver_steps(scheduler):
    """Return the number of timesteps on which a consistency model was distilled."""
    return getattr(scheduler, "original_inference_steps", None) or 50


def lcm_timesteps(n, scheduler):
    """Return n of the timesteps on which the model was distilled."""
    T, solver = scheduler.num_train_timesteps, solver_steps(scheduler)
    require(n <= solver, f"steps {n} is not from 1 to {solver}")
    t = np.arange(1, solver + 1)[::-1] * (T // solver) - 1
    return t[np.arange(n) * solver // n]


@sampler("lcm", "LCM", "LCMScheduler", timesteps=lcm_timesteps, from_nothing=True)
def lcm(denoise, x, steps, noise):
    """Consistency sampling: each step jumps to the clean picture; all but the last noise it again.

    Luo et al., 2023. The jump mixes in x_t, so that at t = 0 it is the identity.
    """
    for t, alpha_bar, alpha_bar_next in steps:
        x_0, _ = denoise(x, t, alpha_bar)
        share = SIGMA_DATA ** 2 / (SIGMA_DATA ** 2 + (TIMESTEP_SCALE * t) ** 2)
        x = share * x + (1 - share) ** 0.5 * x_0
        if alpha_bar_next < 1:
            x = add_noise(x, alpha_bar_next, noise())
        yield x


def time_of_level(denoise, alpha_bar):
    """Return the model's time t for this level."""
    return float(time_of(sigma_of(alpha_bar), sigma_of(denoise.alpha_bars)))


@sampler("heun", "Heun", "HeunDiscreteScheduler", **SIGMA)
def heun(denoise, x, steps, noise=None):
    """Take ddim's step along the mean of the noise here and at its end (9.10).

    Karras et al., 2022.
    """
    for (t, alpha_bar, alpha_bar_next), following in zip_longest(steps, steps[1:]):
        _, eps = denoise(x, t, alpha_bar)
        if alpha_bar_next < 1:
            guess = ddim_step(x, eps, alpha_bar, alpha_bar_next)
            t = following[0] if following else time_of_level(denoise, alpha_bar_next)
            eps = (eps + denoise(guess, t, alpha_bar_next)[1]) / 2
        x = ddim_step(x, eps, alpha_bar, alpha_bar_next)
        yield x


@sampler("restart", "Restart", **SIGMA)
def restart(denoise, x, steps, noise):
    """Heun's steps, but after passing σ = 0.1 noise x up to σ = 2 and come down again (9.11).

    Xu et al., 2023. The number of restarts and their steps are the web UI's, from 20 steps on.
    """
    n, highest = len(steps), min(2, sigma_of(steps[0][1]))
    times, again = (2, n // 4) if n >= 36 else (1, 9) if n >= 20 else (0, 0)
    path = heun(denoise, x, steps)
    for (_, alpha_bar, alpha_bar_next), x in zip(steps, path):
        low = sigma_of(alpha_bar_next)
        if times and 0 < low <= 0.1 < sigma_of(alpha_bar):
            sigma = karras(again + 1, np.array([low, highest]))
            levels = (1 / (1 + sigma ** 2)).tolist()
            t = [time_of_level(denoise, alpha_bar) for alpha_bar in levels]
            for _ in range(times):
                noised = add_noise(x, levels[0] / alpha_bar_next, noise())
                *_, x[...] = heun(denoise, noised, list(zip(t, levels, levels[1:])))
        yield x


def ddpm_step(x, x_0, alpha_bar, alpha_bar_next, eps):
    """Draw x at the next level as ddpm does, given x̂_0 and the fresh noise (6.18)."""
    return next(ddpm(lambda *_: (x_0, None), x, [(None, alpha_bar, alpha_bar_next)], lambda: eps))


def lam(alpha_bar):
    """Return λ = -log σ = ½ log(ᾱ / (1 - ᾱ)) (6.24)."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def slope(past):
    """Return the slope of x̂_0 over λ between the first two of [(λ, x̂_0), ...]."""
    (lam_0, x_0), (lam_1, x_1), *_ = past
    return (x_0 - x_1) / (lam_0 - lam_1)


@sampler("dpm++2msde", "DPM++ 2M SDE", **LAMBDA)
def dpm_pp_2m_sde(denoise, x, steps, noise):
    """Take ddpm's step with x̂_0 extrapolated to the middle of the step, as in dpm_pp_2m (9.12)."""
    past = []
    for t, alpha_bar, alpha_bar_next in steps:
        x_0, _ = denoise(x, t, alpha_bar)
        past = [(lam(alpha_bar), x_0), *past[:1]]
        if len(past) == 2 and alpha_bar_next < 1:
            x_0 = x_0 + (lam(alpha_bar_next) - lam(alpha_bar)) / 2 * slope(past)
        x = ddpm_step(x, x_0, alpha_bar, alpha_bar_next, noise())
        yield x


@sampler("dpm++3msde", "DPM++ 3M SDE", **LAMBDA)
def dpm_pp_3m_sde(denoise, x, steps, noise):
    """Take ddpm's step with the mean, over the step, of a parabola through three x̂_0 (9.13).

    Crowson, 2023, who takes half of the curvature.
    """
    past = []
    for t, alpha_bar, alpha_bar_next in steps:
        x_0, _ = denoise(x, t, alpha_bar)
        past = [(lam(alpha_bar), x_0), *past[:2]]
        if len(past) > 1 and alpha_bar_next < 1:
            h, bend = lam(alpha_bar_next) - lam(alpha_bar), 0.0
            if len(past) == 3:
                bend = (slope(past) - slope(past[1:])) / (past[0][0] - past[2][0])
            start = slope(past) + (past[0][0] - past[1][0]) * bend      # the slope here
            reach = -math.expm1(-2 * h)
            phi = 1 - reach / (2 * h)
            x_0 = x_0 + (phi * h * start + (h - phi) * h / 2 * bend) / reach
        x = ddpm_step(x, x_0, alpha_bar, alpha_bar_next, noise())
        yield x


@sampler("dpm++sde", "DPM++ SDE", "DPMSolverSDEScheduler", **SIGMA)
def dpm_pp_sde(denoise, x, steps, noise):
    """Take half a step in λ, and use the x̂_0 found there for ddpm's whole step (9.14).

    Lu et al., 2022, as in k-diffusion: the noise is a Brownian motion in σ, so a step's noise
    contains the noise of its first half.
    """
    for t, alpha_bar, alpha_bar_next in steps:
        x_0, _ = denoise(x, t, alpha_bar)
        eps = first = noise()
        if alpha_bar_next < 1:
            sigma, sigma_next = sigma_of(alpha_bar), sigma_of(alpha_bar_next)
            middle = (sigma * sigma_next) ** 0.5
            level = 1 / (1 + middle ** 2)
            halfway = ddpm_step(x, x_0, alpha_bar, level, first)
            x_0, _ = denoise(halfway, time_of_level(denoise, level), level)
            share = (sigma - middle) / (sigma - sigma_next)
            eps = share ** 0.5 * first + (1 - share) ** 0.5 * noise()
        x = ddpm_step(x, x_0, alpha_bar, alpha_bar_next, eps)
        yield x


@sampler("unipc", "UniPC", "UniPCMultistepScheduler", **LAMBDA)
def unipc(denoise, x, steps, noise=None):
    """Take dpm_pp_2m's steps, each corrected by the guess at its end (9.15). Zhao et al., 2023."""
    past, weight, direction = [], 0.0, 0.0
    for t, alpha_bar, alpha_bar_next in steps:
        x_0, _ = denoise(x, t, alpha_bar)
        if past:
            x = x + weight * (corrected(past, lam(alpha_bar), x_0) - direction)

        past, direction = [(lam(alpha_bar), x_0), *past[:1]], x_0
        if len(past) == 2 and alpha_bar_next < 1:
            direction = x_0 + (lam(alpha_bar_next) - lam(alpha_bar)) / 2 * slope(past)
        weight = alpha_bar_next ** 0.5 * (1 - sigma_of(alpha_bar_next) / sigma_of(alpha_bar))
        x = ((1 - alpha_bar_next) / (1 - alpha_bar)) ** 0.5 * x + weight * direction
        yield x


def corrected(past, lam_1, x_1):
    """Return the mean of x̂_0 over the last step, given the guess x_1 at its end (9.15).

    past: (λ, x̂_0) at its start, then that of the step before, if any.
    """
    lam_0, x_0 = past[0]
    if len(past) == 1:
        return (x_0 + x_1) / 2
    h, before = lam_1 - lam_0, lam_0 - past[1][0]
    b_1 = -1 / math.expm1(-h) - 1 / h
    b_2 = -1 / math.expm1(-h) - 2 * b_1 / h
    rho = (b_1 - b_2) / (1 + before / h)
    return x_0 + rho * h * slope(past) + (b_1 - rho) * (x_1 - x_0)


GAMMA = 0.3     # how far below the next time tcd jumps, as a fraction of that time


@sampler("tcd", "TCD", "TCDScheduler", timesteps=lcm_timesteps, ends_clean=False)
def tcd(denoise, x, steps, noise):
    """Jump along ε̂ below the next level, then noise x up to it (9.16). Zheng et al., 2024."""
    for (t, alpha_bar, alpha_bar_next), following in zip_longest(steps, steps[1:]):
        t_next = following[0] if following else 0
        level = float(denoise.alpha_bars[int((1 - GAMMA) * t_next)])
        x_0, eps = denoise(x, t, alpha_bar)
        x = add_noise(x_0, level, eps)
        if following:
            x = add_noise(x, alpha_bar_next / level, noise())
        yield x


def as_web_ui(function):
    """Return a sampler that visits the levels of AUTOMATIC1111's web UI and Forge.

    Samplers from k-diffusion take linspace(T - 1, 0, n), and their x_T has the standard deviation
    of the noise; for the others the timesteps are "leading".
    """
    same = functools.partial(function)
    vars(same).update(vars(function), spacing="leading")
    if hasattr(function, "range"):
        vars(same).update(spacing="linspace", drops_last=0, fractional=True, scaled=True,
                          range="steps", follows_config=False)
    return same


def as_comfyui(function):
    """Return a sampler that visits ComfyUI's levels and times.

    Schedules cover all levels of the model, and it is called at integer times. x_T is noise of
    variance 1, and a start picture is encoded without noise, to the VAE's mean.
    """
    def rounding(denoise, x, steps, noise=None):
        def ask(x_t, t, alpha_bar):
            return denoise(x_t, round(t), alpha_bar)
        ask.alpha_bars = denoise.alpha_bars
        return function(ask, x, steps, noise)

    kept = ("name", "title", "timesteps", "plain_noise", "guidance")
    vars(rounding).update({key: vars(function)[key] for key in kept if hasattr(function, key)},
                          spacing="linspace", fractional=True, from_the_mean=True)
    return rounding


def counting(sampler, *counts):
    """Return the sampler, changed to call count(i, n) of each in counts before step i of n."""
    @functools.wraps(sampler)
    def counted(denoise, x, steps, noise=None):
        def count(i):
            for call in counts:
                call(i, len(steps))
        count(0)
        for i, x in enumerate(sampler(denoise, x, steps, noise), 1):        # noqa: B020
            count(i)
            yield x
    if hasattr(sampler, "configured"):
        counted.configured = lambda *config: counting(sampler.configured(*config), *counts)
    return counted


# ── The names of samplers ───────────────────────────────────────────────────────────────────────

# samplers that work with any schedule
SCHEDULED = tuple(name for name, function in SAMPLERS.items() if not hasattr(function, "timesteps"))

SPELLINGS = (("dpmpp", "dpm++"), ("ancestral", "a"), ("discrete", ""), ("multistep", ""),
             ("dpmsolversde", "dpm++sde"), ("bh2", ""), ("cfgpp", "cfg++"),
             ("eulercfg", "ddimcfg"))       # the same steps


def bare(name):
    """Return a name in lower case, with the programs' different spellings made equal."""
    name = re.sub(r"[^a-z0-9+]", "", name.lower()).removesuffix("scheduler").removesuffix("gpu")
    for old, new in SPELLINGS:
        name = name.replace(old, new)
    return name


def sampler_named(text):
    """Return (sampler, schedule or None) for its name in any program, or None if unknown.

    For example "DPM++ 2M Karras", "dpmpp_2m", "k_euler_a" or "EulerDiscreteScheduler".
    """
    known = {bare(name): name for name in SAMPLERS}
    known |= {bare(title): name for name, title in TITLES.items() if name in SAMPLERS}
    known |= {bare(name): sampler for name, sampler in SCHEDULERS.items()}
    name = bare(text)
    for key in name, name.removeprefix("k"), name.removeprefix("sample"):
        if key in known:
            return known[key], None
        for start in sorted(filter(key.startswith, known), key=len, reverse=True):
            if schedule := schedule_named(key.removeprefix(start)):
                return known[start], schedule
    return None
