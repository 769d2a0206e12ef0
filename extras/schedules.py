"""Schedules: which noise levels to visit, under the names of other programs.

A schedule is a function of n and the model's σ (T,), which rises with t; it returns n levels σ, the
noisiest first. The last step goes from the last level to 0. The names in SPACINGS space the model's
times t instead, as samplers do by default (timesteps in extras/like_diffusers.py).
"""

import re

import numpy as np

SPACINGS = ("leading", "linspace", "trailing")
SCHEDULES = {}      # {name: function}
ALIASES = {"uniform": "normal", "ddim": "ddim uniform", "sgm": "sgm uniform", "turbo": "trailing",
           "ays": "align your steps", "alignyoursteps11": "align your steps"}


def schedule(function):
    """Register a schedule under its function's name."""
    SCHEDULES[function.__name__.replace("_", " ")] = function
    return function


def time_of(sigma, sigmas):
    """Return the times t that have these levels, by interpolation of log σ (9.2)."""
    return np.interp(np.log(sigma), np.log(sigmas), np.arange(len(sigmas)))


def sigma_at(t, sigmas):
    """Undo time_of."""
    return np.exp(np.interp(t, np.arange(len(sigmas)), np.log(sigmas)))


@schedule
def karras(n, sigmas):
    """Space evenly in σ^(1/7) (9.2). Karras et al., 2022, eq. 5."""
    low, high = sigmas[0] ** (1 / 7), sigmas[-1] ** (1 / 7)
    return (high + np.linspace(0, 1, n) * (low - high)) ** 7


@schedule
def exponential(n, sigmas):
    """Space evenly in log σ."""
    return np.exp(np.linspace(np.log(sigmas[-1]), np.log(sigmas[0]), n))


@schedule
def beta(n, sigmas):
    """Space by the quantiles of a beta distribution: many at both ends. Lee et al., 2024."""
    return sigmas[0] + beta_quantile(1 - np.linspace(0, 1, n)) * (sigmas[-1] - sigmas[0])


def beta_quantile(p, a=0.6):
    """Return the quantiles p of the beta distribution with density u^(a-1) (1-u)^(a-1).

    Integrate one half over w = u^a, which removes the pole of the density; the rest is symmetry.
    """
    w = np.linspace(0, 0.5 ** a, 10001)
    density = (1 - w ** (1 / a)) ** (a - 1)
    reached = np.cumsum(density) - (density[0] + density) / 2       # the trapezoidal rule
    u = np.interp(np.minimum(p, 1 - p), reached / (2 * reached[-1]), w) ** (1 / a)
    return np.where(p < 0.5, u, 1 - u)


@schedule
def kl_optimal(n, sigmas):
    """Space evenly in arctan σ. Sabour et al., 2024."""
    return np.tan(np.linspace(np.arctan(sigmas[-1]), np.arctan(sigmas[0]), n))


@schedule
def normal(n, sigmas):
    """Space the times evenly, from the noisiest to the least noisy."""
    return sigma_at(np.linspace(len(sigmas) - 1, 0, n), sigmas)


@schedule
def sgm_uniform(n, sigmas):
    """Space n + 1 times evenly and leave out the last, as in Stability's generative models."""
    return sigma_at(np.linspace(len(sigmas) - 1, 0, n + 1)[:-1], sigmas)


@schedule
def simple(n, sigmas):
    """Take every (T / n)th time, starting at the noisiest."""
    return sigmas[len(sigmas) - 1 - np.arange(n) * len(sigmas) // n]


@schedule
def ddim_uniform(n, sigmas):
    """Space as "leading" with an offset of 1."""
    return sigmas[1 + np.arange(n)[::-1] * (len(sigmas) // n)]


ALIGNED = {     # {SDXL?: times optimised for ten steps, and the end of the last}
    False: (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    True: (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0)}


@schedule
def align_your_steps(n, sigmas, xl=False):
    """Interpolate log σ between ten optimised times. Sabour et al., 2024."""
    times = np.array(ALIGNED[xl]) * (len(sigmas) - 1) / 999
    at = np.linspace(0, 10, n + 1)[:-1]
    return np.exp(np.interp(at, np.arange(11), np.log(sigma_at(times, sigmas))))


@schedule
def align_your_steps_xl(n, sigmas):
    """Like align_your_steps, with the times optimised for SDXL."""
    return align_your_steps(n, sigmas, xl=True)


def plain(name):
    """Return a name in lower case, letters and digits only."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


NAMES = (*SCHEDULES, *SPACINGS)
KNOWN = {plain(name): name for name in NAMES}
KNOWN |= {plain(name): target for name, target in ALIASES.items()}
KNOWN |= {"automatic": "", "default": ""}       # the sampler's own, or the config's


def schedule_named(text):
    """Return the name in NAMES for a schedule's name in any program, or None if unknown.

    For example "Karras", "sgm_uniform" or "Align Your Steps". "Automatic" gives "".
    """
    return KNOWN.get(plain(text))


def title(name):
    """Return a schedule's name as other programs write it: "Align Your Steps"; "" for None."""
    return " ".join({"kl": "KL", "sgm": "SGM", "ddim": "DDIM", "xl": "XL"}.get(word, word.title())
                    for word in (name or "").split())
