"""Two more samplers, PLMS and LCM, and the names that samplers go by elsewhere.

Importing this registers the two.
"""

import re

import numpy as np

from tiny_sd import SAMPLERS, SCHEDULERS, add_noise

ADAMS_BASHFORTH = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12),
                   (55 / 24, -59 / 24, 37 / 24, -9 / 24)]      # weights of 1 to 4 past values


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


def lcm_timesteps(n, T):
    """Return n of the 50 timesteps of the solver that the model was distilled from."""
    if n > SOLVER_STEPS:
        return np.array([T])
    t = np.arange(1, SOLVER_STEPS + 1)[::-1] * (T // SOLVER_STEPS) - 1
    return t[np.arange(n) * SOLVER_STEPS // n]


lcm.timesteps = lcm_timesteps
SAMPLERS |= {"plms": plms, "lcm": lcm}
SCHEDULERS |= {"PNDMScheduler": "plms", "LCMScheduler": "lcm"}

# ── The names of samplers ───────────────────────────────────────────────────────────────────────

TITLES = {"ddpm": "DDPM", "ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a",
          "dpm++2m": "DPM++ 2M", "plms": "PLMS", "lcm": "LCM"}      # as pictures record them


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
