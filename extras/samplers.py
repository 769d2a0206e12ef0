"""More samplers, the facts by which each follows diffusers, and the names people know them by.

Importing this adds the samplers to tiny_sd.SAMPLERS. A fact is an attribute of the function:

    name, title         as in SAMPLERS, and as pictures record it
    spacing             how its timesteps are always spaced: "leading", "trailing" or "linspace"
    default_spacing     likewise, where the scheduler's config does not say ("leading")
    timesteps           a function (n, T) that chooses them instead
    drops_last          1 if it takes the first n of n + 1 timesteps (0)
    fractional          its times need not be whole, and x_T has the standard deviation of its noise
    karras              it can take Karras' levels: over the "whole range" of the model's, or over
                        the "range of the steps"
    follows_config      ... whenever the config says use_karras_sigmas (True)
    ends_clean          the last step ends at ᾱ = 1, not at the model's first level (True)
    follows_set_alpha   ... unless the config's set_alpha_to_one says otherwise (False)
"""

import re

import numpy as np

from tiny_sd import SAMPLERS, add_noise, ddim, ddpm, dpm_pp_2m, sigma_of

TITLES, SCHEDULERS = {}, {}     # {name: title}, {diffusers' class: name}


def sampler(name, title, scheduler, **facts):
    """Register a sampler under these names, with its facts."""
    def register(function):
        vars(function).update(facts, name=name, title=title)
        SAMPLERS[name], TITLES[name], SCHEDULERS[scheduler] = function, title, name
        return function
    return register


SIGMA = {"default_spacing": "linspace", "fractional": True}     # of samplers that think in σ
sampler("ddpm", "DDPM", "DDPMScheduler")(ddpm)
sampler("ddim", "DDIM", "DDIMScheduler", follows_set_alpha=True)(ddim)
sampler("dpm++2m", "DPM++ 2M", "DPMSolverMultistepScheduler", default_spacing="linspace",
        drops_last=1, karras="whole range")(dpm_pp_2m)


@sampler("euler", "Euler", "EulerDiscreteScheduler", karras="range of the steps", **SIGMA)
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


@sampler("euler_a", "Euler a", "EulerAncestralDiscreteScheduler", karras="range of the steps",
         follows_config=False, **SIGMA)
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


ADAMS_BASHFORTH = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12),
                   (55 / 24, -59 / 24, 37 / 24, -9 / 24)]      # weights of 1 to 4 past values


@sampler("plms", "PLMS", "PNDMScheduler", ends_clean=False, follows_set_alpha=True)
def plms(denoise, x, steps, noise=None):
    """Take ddim's step along ε̂, extrapolated from up to four steps by Adams and Bashforth.

    Liu et al., 2022. The first step, having no history yet, goes along the mean of the noise here
    and at the next level (Heun).
    """
    past = []
    for t, alpha_bar, alpha_bar_next in steps:
        past = [denoise(x, t, alpha_bar)[1], *past[:3]]
        weights = ADAMS_BASHFORTH[len(past) - 1]
        eps = sum(weight * e for weight, e in zip(weights, past))

        if len(past) == 1 and len(steps) > 1:
            guess = ddim_step(x, eps, alpha_bar, alpha_bar_next)
            t_next, level, _ = steps[1]
            eps = (eps + denoise(guess, t_next, level)[1]) / 2
        x = ddim_step(x, eps, alpha_bar, alpha_bar_next)
        yield x


def ddim_step(x, eps, alpha_bar, alpha_bar_next):
    """Return x at the next level, along the noise eps."""
    signal = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar ** 0.5
    return add_noise(signal, alpha_bar_next, eps)


SIGMA_DATA, TIMESTEP_SCALE, SOLVER_STEPS = 0.5, 10, 50      # of latent consistency distillation


def lcm_timesteps(n, T):
    """Return n of the 50 timesteps of the solver that the model was distilled from."""
    if n > SOLVER_STEPS:
        return np.array([T])
    t = np.arange(1, SOLVER_STEPS + 1)[::-1] * (T // SOLVER_STEPS) - 1
    return t[np.arange(n) * SOLVER_STEPS // n]


@sampler("lcm", "LCM", "LCMScheduler", timesteps=lcm_timesteps)
def lcm(denoise, x, steps, noise):
    """Consistency sampling: each step leaps to the picture, all but the last noise it again.

    Luo et al., 2023. x_t keeps a share in the leap, so that the one from t = 0 is the identity.
    """
    for t, alpha_bar, alpha_bar_next in steps:
        x_0, _ = denoise(x, t, alpha_bar)
        share = SIGMA_DATA ** 2 / (SIGMA_DATA ** 2 + (TIMESTEP_SCALE * t) ** 2)
        x = share * x + (1 - share) ** 0.5 * x_0
        if alpha_bar_next < 1:
            x = add_noise(x, alpha_bar_next, noise())
        yield x


# ── The names of samplers ───────────────────────────────────────────────────────────────────────

KARRAS = tuple(name for name, function in SAMPLERS.items() if hasattr(function, "karras"))


def bare(name):
    """Return a name in lower case, without what programs disagree on."""
    name = re.sub(r"[^a-z0-9+]", "", name.lower()).removesuffix("scheduler")
    for old, new in ("dpmpp", "dpm++"), ("ancestral", "a"), ("discrete", ""):
        name = name.replace(old, new)
    return name


def sampler_named(text):
    """Return (sampler, whether with Karras' spacing) for a name that people know it by, or None.

    "DPM++ 2M Karras", "dpmpp_2m", "k_euler_a" and "EulerDiscreteScheduler" are such names.
    """
    known = {bare(name): name for name in SAMPLERS}
    known |= {bare(title): name for name, title in TITLES.items() if name in SAMPLERS}
    known |= {bare(name): sampler for name, sampler in SCHEDULERS.items()}
    name = bare(text)
    for spacing in False, True:
        for key in name, name.removeprefix("k"), name.removeprefix("sample"):
            if key in known:
                return known[key], spacing
        name = name.removesuffix("karras")
    return None
