"""The samplers and schedules in extras/: their order, their formulas, their names."""

import math
from itertools import pairwise

import numpy as np
import pytest
from test_diffusion import ALPHA_BAR, at_any_level, crooked, gaussian, knows, normal

import tiny_sd as sd
from extras import like_diffusers, samplers, schedules
from helpers import scheduler

SIGMAS = sd.sigma_of(ALPHA_BAR)
PICTURES = 0.8          # a world of two pictures, 0.8 and -0.8


@at_any_level
def two_pictures(x, t, a):
    """The ideal denoiser E[x_0 | x_t] of that world (6.2), by Bayes."""
    x_0 = PICTURES * np.tanh(PICTURES * math.sqrt(a) * x / (1 - a))
    return knows(x_0)(x, t, a)


def steps_between(high, low, n):
    """Steps from σ = high to σ = low, evenly spaced in log σ."""
    a = 1 / (1 + np.geomspace(high, low, n + 1) ** 2)
    return [(0.0, *pair) for pair in pairwise(a.tolist())]


def walk(name, denoise, x, steps, seed=0):
    """Return a sampler's result, and the noise that it drew."""
    rng, drawn = np.random.default_rng(seed), []

    def noise():
        drawn.append(rng.standard_normal(np.shape(x)))
        return drawn[-1]
    *_, x = sd.SAMPLERS[name](denoise, x, steps, noise)
    return x, drawn


# ── Order ───────────────────────────────────────────────────────────────────────────────────────


def exact(x, speed, high, low, n=3000):
    """Follow dx̄/dλ = speed (x̂_0 - x̄) by Runge-Kutta: speed 1 is the probability flow.

    Speed 2 is the drift of the process with fresh noise, which remains of the samplers with noise
    if the noise is set to zero.
    """
    h, x_bar, lam = math.log(high / low) / n, x * math.sqrt(1 + high ** 2), -math.log(high)

    def slope(x_bar, lam):
        a = 1 / (1 + math.exp(-2 * lam))
        return speed * (two_pictures(math.sqrt(a) * x_bar, 0, a)[0] - x_bar)
    for _ in range(n):
        k_1 = slope(x_bar, lam)
        k_2 = slope(x_bar + h / 2 * k_1, lam + h / 2)
        k_3 = slope(x_bar + h / 2 * k_2, lam + h / 2)
        k_4 = slope(x_bar + h * k_3, lam + h)
        x_bar, lam = x_bar + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4), lam + h
    return x_bar / math.sqrt(1 + low ** 2)


ORDERS = {"ddpm": (1, 2), "ddim": (1, 1), "ddim_cfg++": (1, 1), "euler": (1, 1),
          "euler_a": (1, 2), "dpm++2m": (2, 1),
          "plms": (2, 1), "heun": (2, 1), "restart": (2, 1), "dpm++2msde": (2, 2),
          "dpm++3msde": (2, 2), "dpm++sde": (2, 2), "unipc": (3, 1)}     # {name: (order, speed)}


def test_every_sampler_has_its_order():
    """With twice as many steps the error falls as h^p, in the world of two pictures.

    LCM and TCD do not solve an equation: their model jumps.
    """
    assert ORDERS.keys() == sd.SAMPLERS.keys() - {"lcm", "tcd"}
    x, high, low = np.linspace(-2.5, 2.5, 41), 10.0, 0.11
    expected = {speed: exact(x, speed, high, low) for speed in (1, 2)}
    for name, (order, speed) in ORDERS.items():
        errors = []
        for n in (80, 160, 320):
            *_, found = sd.SAMPLERS[name](two_pictures, x, steps_between(high, low, n),
                                          lambda: np.zeros_like(x))
            errors.append(abs(found - expected[speed]).max())
        assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.3), name


def test_the_flow_is_known_exactly():
    """What `exact` integrates keeps each point's quantile among all."""
    x, high, low = np.array([-1.5, -0.3, 0.1, 1.2]), 10.0, 0.1

    def quantile(x, sigma):
        a = 1 / (1 + sigma ** 2)
        z = [(x - s * math.sqrt(a) * PICTURES) / math.sqrt(2 * (1 - a)) for s in (-1, 1)]
        return np.mean([[math.erf(v) for v in row] for row in z], axis=0)
    np.testing.assert_allclose(quantile(exact(x, 1, high, low), low), quantile(x, high), atol=1e-7)


# ── Formulas, another way: k-diffusion's, in x̄ = x / √ᾱ and σ ───────────────────────────────────


def k_steps(steps):
    """Return [(σ, σ_next), ...]."""
    return [(sd.sigma_of(a), sd.sigma_of(a_next)) for _, a, a_next in steps]


def k_denoise(x_bar, sigma):
    """Return x̂_0 of the crooked denoiser, given x̄ and σ."""
    a = 1 / (1 + sigma ** 2)
    return crooked(x_bar * math.sqrt(a), schedules.time_of(sigma, SIGMAS), a)[0]


def ancestral(sigma, sigma_next):
    """Return the level to step down to, and how much noise to add."""
    up = math.sqrt(sigma_next ** 2 * (sigma ** 2 - sigma_next ** 2) / sigma ** 2)
    return math.sqrt(sigma_next ** 2 - up ** 2), up


def k_heun(x, steps, noise):
    for sigma, sigma_next in steps:
        d = (x - k_denoise(x, sigma)) / sigma
        if sigma_next:
            y = x + (sigma_next - sigma) * d
            d = (d + (y - k_denoise(y, sigma_next)) / sigma_next) / 2
        x = x + (sigma_next - sigma) * d
    return x


def k_3m_sde(x, steps, noise):
    x_1 = x_2 = h_1 = h_2 = None
    for (sigma, sigma_next), eps in zip(steps, noise):
        x_0 = k_denoise(x, sigma)
        if not sigma_next:
            return x_0
        h = math.log(sigma) - math.log(sigma_next)
        phi_2 = (math.exp(-2 * h) - 1) / (2 * h) + 1
        x = math.exp(-2 * h) * x + (1 - math.exp(-2 * h)) * x_0
        if h_2 is not None:
            r_0, r_1 = h_1 / h, h_2 / h
            d_0, d_1 = (x_0 - x_1) / r_0, (x_1 - x_2) / r_1
            x = x + phi_2 * (d_0 + (d_0 - d_1) * r_0 / (r_0 + r_1))
            x = x - (phi_2 / (2 * h) - 0.5) * (d_0 - d_1) / (r_0 + r_1)
        elif h_1 is not None:
            x = x + phi_2 * (x_0 - x_1) * h / h_1
        x = x + eps * sigma_next * math.sqrt(1 - math.exp(-2 * h))
        x_1, x_2, h_1, h_2 = x_0, x_1, h, h_1


def k_sde(x, steps, noise):
    noise = iter(noise)
    for sigma, sigma_next in steps:
        x_0 = k_denoise(x, sigma)
        if not sigma_next:
            return x_0
        first, second = next(noise), next(noise)
        middle = math.exp((math.log(sigma) + math.log(sigma_next)) / 2)
        down, up = ancestral(sigma, middle)
        x_2 = down / sigma * x + (1 - down / sigma) * x_0 + up * first
        path = math.sqrt(sigma - middle) * first + math.sqrt(middle - sigma_next) * second
        down, up = ancestral(sigma, sigma_next)
        x = (down / sigma * x + (1 - down / sigma) * k_denoise(x_2, middle)
             + up * path / math.sqrt(sigma - sigma_next))


@pytest.mark.parametrize("n", [1, 2, 3, 12])
@pytest.mark.parametrize("name, theirs", [("heun", k_heun), ("dpm++3msde", k_3m_sde),
                                          ("dpm++sde", k_sde)])
def test_formulas_of_k_diffusion(name, theirs, n):
    x = normal(4, 3)
    steps = like_diffusers.sampling_steps(name, n, scheduler(), ALPHA_BAR, "normal")
    ours, drawn = walk(name, crooked, x, steps)
    expected = theirs(x / math.sqrt(steps[0][1]), k_steps(steps), drawn)
    np.testing.assert_allclose(ours, expected, atol=1e-11)


def test_restart_is_heun_that_goes_up_again():
    """Its extra steps visit Karras' levels; with fewer than 20 steps there are none."""
    x = normal(4, 3)
    for n, times, again in (19, 0, 0), (20, 1, 9), (40, 2, 10):
        steps = like_diffusers.sampling_steps("restart", n, scheduler(), ALPHA_BAR, "karras")
        ours, drawn = walk("restart", crooked, x, steps)
        sigmas = k_steps(steps)
        i = next(i for i, (_, low) in enumerate(sigmas) if low <= 0.1)
        y = k_heun(x / math.sqrt(steps[0][1]), sigmas[:i + 1], ())
        low = sigmas[i][1]
        levels = schedules.karras(again + 1, np.array([low, 2.0]))
        for eps in drawn:
            y = k_heun(y + math.sqrt(2 ** 2 - low ** 2) * eps, [*pairwise(levels)], ())
        assert len(drawn) == times
        np.testing.assert_allclose(ours, k_heun(y, sigmas[i + 1:], ()), atol=1e-10)


def test_restart_does_not_go_above_where_it_began():
    """From a picture, with a strength that leaves little of the way."""
    steps = steps_between(0.5, 0.05, 25)
    levels = []

    def denoise(x, t, a):
        levels.append(sd.sigma_of(a))
        return gaussian(x, t, a)
    walk("restart", at_any_level(denoise), normal(3), steps)
    assert len(levels) > 2 * 25 + 10 and max(levels) == pytest.approx(0.5)


@pytest.mark.parametrize("name", [name for name in sd.SAMPLERS if name not in ("lcm", "tcd")])
def test_what_callers_change_on_the_way_stays_changed(name):
    """Inpainting writes into the yielded array; the next step starts from there."""
    steps = like_diffusers.sampling_steps(name, 8, scheduler(set_alpha_to_one=True), ALPHA_BAR)

    def far(x, t, a):
        return np.zeros_like(x), x / math.sqrt(1 - a)
    far.alpha_bars = ALPHA_BAR
    ends = []
    for change in (0.0, 3.0):
        path = sd.SAMPLERS[name](far, np.ones(4), steps, lambda: np.zeros(4))
        xs = []
        for i, x in enumerate(path):
            x += change * (i == 5)
            xs.append(x.copy())
        ends.append(xs)
    assert (abs(ends[1][6] - ends[0][6]) > 1e-3).all()


# ── Schedules ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*schedules.SCHEDULES, *schedules.SPACINGS])
def test_a_schedule_leads_down_with_any_sampler(name):
    for sampler in ("ddim", "plms", "euler_a", "dpm++3msde"):
        for n in (1, 2, 3, 20, 333, 998):
            t, a, a_next = zip(*like_diffusers.sampling_steps(sampler, n, scheduler(), ALPHA_BAR,
                                                              name))
            assert len(t) == n and 0 <= min(t) and max(t) <= 999
            assert all(x < y for x, y in pairwise(a)) and a[1:] == a_next[:-1]
            assert a_next[-1] == 1 or name in schedules.SPACINGS


SHAPES = {      # how each spaces what, over the model's whole range
    "exponential": np.log, "kl optimal": np.arctan, "karras": lambda s: s ** (1 / 7),
    "normal": lambda s: schedules.time_of(s, SIGMAS)}


@pytest.mark.parametrize("name", SHAPES)
def test_evenly_spaced_in_something(name):
    sigma = schedules.SCHEDULES[name](12, SIGMAS)
    assert sigma[[0, -1]] == pytest.approx(SIGMAS[[-1, 0]])
    np.testing.assert_allclose(np.diff(SHAPES[name](sigma), 2), 0, atol=1e-9)


def test_times_of_other_programs():
    """Those of ComfyUI's loops, and of the table in diffusers."""
    def times(name, n):
        return schedules.time_of(schedules.SCHEDULES[name](n, SIGMAS), SIGMAS)
    np.testing.assert_allclose(times("sgm uniform", 4), [999, 749.25, 499.5, 249.75])
    for n in (4, 7, 30):
        np.testing.assert_allclose(times("simple", n), [1000 - (1 + int(i * (1000 / n)))
                                                        for i in range(n)])
    np.testing.assert_allclose(times("ddim uniform", 20), [*range(1, 1000, 50)][::-1])
    from diffusers.schedulers import AysSchedules
    for name, table in (("align your steps", "StableDiffusion"),
                        ("align your steps xl", "StableDiffusionXL")):
        expected = AysSchedules.get(f"{table}Timesteps")
        if expected:
            np.testing.assert_allclose(times(name, 10), expected, atol=1e-6)
        np.testing.assert_allclose(schedules.SCHEDULES[name](10, SIGMAS),
                                   AysSchedules[f"{table}Sigmas"][:-1], rtol=0.02)


def test_quantiles_of_the_beta_distribution():
    """The incomplete beta function, by its power series, leads back to the shares."""
    p = np.linspace(0, 0.5, 41)[1:]
    u, a = schedules.beta_quantile(p), 0.6
    series, term = np.zeros_like(u), np.ones_like(u)
    for k in range(200):
        series = series + term / (a + k)
        term = term * u * (k + 1 - a) / (k + 1)
    reached = u ** a * series * math.gamma(2 * a) / math.gamma(a) ** 2
    np.testing.assert_allclose(reached, p, atol=1e-8)
    np.testing.assert_allclose(schedules.beta_quantile(1 - p), 1 - u, atol=1e-12)
    assert schedules.beta_quantile(np.array([0.0, 1.0])).tolist() == [0, 1]
    sigma = schedules.SCHEDULES["beta"](9, SIGMAS)
    np.testing.assert_allclose(sigma[[0, -1]], SIGMAS[[-1, 0]])
    np.testing.assert_allclose(sigma + sigma[::-1], SIGMAS[0] + SIGMAS[-1])     # symmetric


def test_sdxl_has_times_of_its_own():
    class Two:
        encoders = (1, 2)
    assert like_diffusers.own_schedule("align your steps", Two) == "align your steps xl"
    assert like_diffusers.own_schedule("karras", Two) == "karras"


@pytest.mark.parametrize("settings, expected", [({"use_exponential_sigmas": True}, "exponential"), (
    {"use_beta_sigmas": True}, "beta"), ({"use_karras_sigmas": True}, "karras"), ({}, None)])
def test_the_config_may_ask_for_a_schedule(settings, expected):
    """diffusers' Euler and DPM-Solvers follow it, its DDIM does not."""
    config = scheduler(**settings)
    steps, named, ddim, plain = (
        like_diffusers.sampling_steps(name, 9, config if follow else scheduler(), ALPHA_BAR,
                                      schedule)
        for name, follow, schedule in (("euler", True, None), ("euler", False, expected),
                                       ("ddim", True, None), ("ddim", False, None)))
    assert steps == named and ddim == plain


# ── Names ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text, found", {
    "DPM++ 2M SDE Karras": ("dpm++2msde", "karras"), "dpmpp_2m_sde_gpu": ("dpm++2msde", None),
    "DPM++ 3M SDE Exponential": ("dpm++3msde", "exponential"), "k_dpmpp_sde": ("dpm++sde", None),
    "DPMSolverSDEScheduler": ("dpm++sde", None), "uni_pc_bh2": ("unipc", None),
    "UniPCMultistepScheduler": ("unipc", None), "HEUN": ("heun", None), "TCD": ("tcd", None),
    "Restart": ("restart", None), "Euler a Align Your Steps": ("euler_a", "align your steps"),
    "Euler SGM Uniform": ("euler", "sgm uniform"), "euler beta": ("euler", "beta"),
    "DDIM CFG++": ("ddim_cfg++", None), "euler_cfg_pp": ("ddim_cfg++", None),
    "DDIM CFG++ Karras": ("ddim_cfg++", "karras"), "euler_ancestral_cfg_pp": None,
    "DPM++ 2M SDE Heun": None, "nonsense": None, "": None, "Karras": None}.items())
def test_names_of_samplers(text, found):
    assert samplers.sampler_named(text) == found


def test_every_name_and_title_is_known_with_every_schedule():
    for name, title in samplers.TITLES.items():
        assert samplers.sampler_named(title) == samplers.sampler_named(name) == (name, None)
        for schedule in (*schedules.SCHEDULES, *schedules.SPACINGS):
            words = schedules.title(schedule)
            assert schedules.schedule_named(words) == schedule
            assert samplers.sampler_named(f"{title} {words}") == (name, schedule)
