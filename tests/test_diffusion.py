"""What the mathematics of diffusion promises, without a reference implementation: a Gaussian, for which every score,
posterior and trajectory is known in closed form, and a random U-Net where one is needed."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from helpers import CONFIG, random_arrays, sd, write_model

BETA = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
ALPHA_BAR = sd.alpha_bars({})
SAMPLERS = pytest.mark.parametrize("sampler", sd.SAMPLERS)
KINDS = {"epsilon": lambda x_0, eps, a: eps, "sample": lambda x_0, eps, a: x_0,
         "v_prediction": lambda x_0, eps, a: math.sqrt(a) * eps - math.sqrt(1 - a) * x_0}
MEAN, STD = 0.7, 0.4


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def knows(x_0):
    """The denoiser of someone who knows the picture."""
    return lambda x, t, a: (x_0, (x - math.sqrt(a) * x_0) / math.sqrt(1 - a))


def gaussian(x, t, a):
    """The ideal denoiser, E[x_0 | x_t], when pictures are drawn from N(MEAN, STD²)."""
    x_0 = MEAN + STD ** 2 * math.sqrt(a) / (a * STD ** 2 + 1 - a) * (x - math.sqrt(a) * MEAN)
    return knows(x_0)(x, t, a)


def flow(x, t, a):
    """Where the probability flow takes x_t: in a Gaussian each place keeps its number of standard deviations."""
    return MEAN + STD * (x - math.sqrt(a) * MEAN) / math.sqrt(a * STD ** 2 + 1 - a), None


def crooked(x, t, a):
    """Some denoiser that is far from linear."""
    return knows(np.tanh(3 * x) + np.sin(t))(x, t, a)


def levels_between(high, low, n):
    """Steps from σ = high to σ = low, evenly spaced in log σ."""
    a = 1 / (1 + np.geomspace(high, low, n + 1) ** 2)
    return [(0.0, *pair) for pair in pairwise(a.tolist())]


# ── The forward process ──────────────────────────────────────────────────────────────────────────────────────────────

def test_the_schedule():
    assert ALPHA_BAR[0] == pytest.approx(1 - 0.00085) and ALPHA_BAR[999] == pytest.approx(0.00466, abs=5e-6)
    assert len(ALPHA_BAR) == 1000 and (np.diff(ALPHA_BAR) < 0).all()


@pytest.mark.parametrize("t", [0, 1, 20, 500, 999])
def test_the_closed_form_has_the_coefficients_of_single_steps(t):
    """x_s = √(1 - β_s) x_{s-1} + √β_s ε: each step shrinks what is there, and adds variance."""
    signal, variance = 1.0, 0.0
    for beta in BETA[:t + 1]:
        signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
    assert sd.add_noise(1.0, ALPHA_BAR[t], 0.0) == pytest.approx(signal, rel=1e-9)
    assert sd.add_noise(0.0, ALPHA_BAR[t], 1.0) ** 2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("t", [20, 200, 500])
def test_the_closed_form_has_the_distribution_of_single_steps(t):
    rng = np.random.default_rng(0)
    single = closed = np.full(20000, 1.5)
    for beta in BETA[:t + 1]:
        single = math.sqrt(1 - beta) * single + math.sqrt(beta) * rng.standard_normal(20000)
    closed = sd.add_noise(closed, ALPHA_BAR[t], rng.standard_normal(20000))
    assert single.mean() == pytest.approx(closed.mean(), abs=0.03)
    assert np.quantile(single - single.mean(), [0.1, 0.3, 0.7, 0.9]) == pytest.approx(
        np.quantile(closed - closed.mean(), [0.1, 0.3, 0.7, 0.9]), rel=0.06)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
@pytest.mark.parametrize("kind", KINDS)
def test_every_prediction_type_tells_picture_and_noise(kind, t):
    a, x_0, eps = ALPHA_BAR[t], normal(3, 5), normal(3, 5, seed=1)
    x_t = sd.add_noise(x_0, a, eps)
    np.testing.assert_allclose(sd.split_prediction(kind, KINDS[kind](x_0, eps, a), x_t, a), (x_0, eps), atol=1e-9)


# ── The reverse process ──────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("t, before", [(1, 0), (500, 499), (981, 961), (999, 500)])
def test_ddpm_draws_from_the_posterior_of_bayes(t, before):
    """q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0), multiplied out on a grid."""
    x_0, a, a_next = 0.8, ALPHA_BAR[t], ALPHA_BAR[before]
    x_t, alpha, width = sd.add_noise(x_0, a, -1.3), a / a_next, math.sqrt(1 - a_next)
    grid = math.sqrt(a_next) * x_0 + width * np.linspace(-9, 9, 200001)
    square = (x_t - math.sqrt(alpha) * grid) ** 2 / (1 - alpha) + (grid - math.sqrt(a_next) * x_0) ** 2 / width ** 2
    q = np.exp((square.min() - square) / 2)
    mean = (q * grid).sum() / q.sum()
    std = math.sqrt((q * (grid - mean) ** 2).sum() / q.sum())
    at = [next(sd.ddpm(knows(x_0), x_t, [(t, a, a_next)], lambda: z)) for z in (0, 1)]
    assert at == pytest.approx([mean, mean + std], rel=1e-6)


def test_ddim_with_the_true_noise_walks_back_the_way_it_came():
    x_0, eps = normal(3, 5), normal(3, 5, seed=1)
    steps = sd.sampling_steps("ddim", 20, {"set_alpha_to_one": True})
    x = sd.add_noise(x_0, steps[0][1], eps)
    reached = sd.ddim(lambda x, t, a: sd.split_prediction("epsilon", eps, x, a), x, steps, None)
    for (_, _, a_next), x in zip(steps, reached, strict=True):
        np.testing.assert_allclose(x, sd.add_noise(x_0, a_next, eps), atol=1e-9)
    np.testing.assert_allclose(x, x_0, atol=1e-9)


@SAMPLERS
@pytest.mark.parametrize("n", [1, 2, 20, 50, 998])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_sampler_finds_a_picture_that_the_denoiser_knows(sampler, n, spacing):
    """Whatever the noise on the way: the last step goes to the picture itself."""
    x_0, rng, n = normal(3, 5), np.random.default_rng(1), min(n, 50) if sampler == "lcm" else n
    steps = sd.sampling_steps(sampler, n, {"set_alpha_to_one": True, "timestep_spacing": spacing})
    *_, x = sd.SAMPLERS[sampler](knows(x_0), normal(3, 5, seed=2), steps, lambda: rng.standard_normal((3, 5)))
    np.testing.assert_allclose(x, x_0, atol=2e-5 if sampler == "lcm" else 1e-9)     # which keeps a trace of x_t, by 1 / (20 t)²


def test_euler_is_ddim_in_other_coordinates():
    """And DPM++ 2M begins with the same step, having no second point yet."""
    steps = sd.sampling_steps("euler", 20, {"timestep_spacing": "leading"})
    euler, ddim, dpm = (list(sampler(crooked, normal(3, 5), steps, None)) for sampler in (sd.euler, sd.ddim, sd.dpm_pp_2m))
    np.testing.assert_allclose(euler, ddim, rtol=1e-6)
    np.testing.assert_allclose(dpm[0], ddim[0], rtol=1e-6)
    assert abs(dpm[1] - ddim[1]).max() > 1e-3


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("euler", 1), ("dpm++2m", 2), ("plms", 2)])
def test_order_of_convergence(sampler, order):
    """Twice the steps, half the error, or a quarter. The Gaussian's flow in x / √ᾱ keeps (x - mean) / √(std² + σ²)."""
    high, low, x = 10.0, 0.1, normal(100)
    a, a_end = 1 / (1 + high ** 2), 1 / (1 + low ** 2)
    spread = math.sqrt((STD ** 2 + low ** 2) / (STD ** 2 + high ** 2))
    exact = math.sqrt(a_end) * (MEAN + spread * (x / math.sqrt(a) - MEAN))
    coarse, fine = (abs(list(sd.SAMPLERS[sampler](gaussian, x, levels_between(high, low, n), None))[-1] - exact).max()
                    for n in (40, 80))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@SAMPLERS
def test_every_sampler_keeps_the_marginals(sampler):
    """With the ideal denoiser, x_t is N(√ᾱ mean, ᾱ std² + 1 - ᾱ) all the way down."""
    rng, consistent = np.random.default_rng(0), sampler == "lcm"        # its ideal leads each x_t along its flow to the end
    steps = sd.sampling_steps(sampler, 50 if consistent else 500, {})
    x = sd.add_noise(rng.normal(MEAN, STD, 10000), steps[0][1], rng.standard_normal(10000))
    reached = sd.SAMPLERS[sampler](flow if consistent else gaussian, x, steps, lambda: rng.standard_normal(10000))
    for i, ((_, _, a), x) in enumerate(zip(steps, reached, strict=True)):
        if i % (len(steps) // 10) == 0:
            assert x.mean() == pytest.approx(math.sqrt(a) * MEAN, abs=0.05)
            assert x.std() == pytest.approx(math.sqrt(a * STD ** 2 + 1 - a), rel=0.05)


# ── Steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SPACINGS = [("ddpm", "leading", 50, 981, 961, 1), ("ddim", "leading", 50, 981, 961, 1),
            ("euler", "leading", 50, 981, 961, 1), ("euler_a", "leading", 20, 951, 901, 1), ("dpm++2m", "leading", 50, 951, 932, 20),
            ("dpm++2m", "leading", 20, 941, 894, 48), ("ddim", "trailing", 50, 999, 979, 19),
            ("euler", "linspace", 10, 999, 888, 0), ("dpm++2m", "linspace", 10, 999, 899, 100)]


@pytest.mark.parametrize("sampler, spacing, n, first, second, last", SPACINGS)
def test_spacing(sampler, spacing, n, first, second, last):
    steps = sd.sampling_steps(sampler, n, {"timestep_spacing": spacing})
    assert [steps[i][0] for i in (0, 1, -1)] == [first, second, last]
    assert [a for _, a, _ in steps] == pytest.approx([ALPHA_BAR[int(t)] for t, _, _ in steps])


@SAMPLERS
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_lead_from_noise_to_picture(sampler, spacing, karras):
    for n in [1, 2, 3, 20, 49, 50] if sampler == "lcm" else [1, 2, 3, *range(20, 998, 50), 223, 998]:
        t, a, a_next = zip(*sd.sampling_steps(sampler, n, {"timestep_spacing": spacing, "set_alpha_to_one": False}, karras))
        assert len(t) == n and max(t) < 1000 and min(t) >= 0, n
        assert all(x < y for x, y in pairwise(a)) and a[1:] == a_next[:-1], n
        assert a[-1] <= a_next[-1] == (ALPHA_BAR[0] if sampler in ("ddim", "plms") else 1), n


def test_strength_takes_whole_steps_of_what_was_written():
    """50 x 0.58 is 29, though 50 * 0.58 is 28.999999999999996."""
    assert sd.steps_left(50, 0.58) == 29
    for steps in (1, 2, 20, 25, 50, 999):
        for percent in range(1, 101):
            assert sd.steps_left(steps, percent / 100) == steps * Fraction(percent, 100) // 1


# ── With a U-Net ─────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sd.load(write_model(tmp_path_factory.mktemp("model")))


def last(*args, **kwargs):
    *_, x = sd.generate(*args, **kwargs)
    return x


def test_guidance():
    uncond, cond = normal(3, 5), normal(3, 5, seed=1)
    assert np.allclose(sd.guide(uncond, cond, 1), cond) and np.allclose(sd.guide(uncond, cond, 0), uncond)
    assert np.allclose(sd.guide(cond, cond, 7.5), cond)


def test_guidance_of_one_is_the_prompt_alone(model):
    context = sd.encode_prompts(model, ["a dog", "red apple"])
    x = normal(3, 8, 6, 4).astype(np.float32)
    guided, alone, other = (sd.denoiser(model, rows, scale)(x, 500, ALPHA_BAR[500])
                            for rows, scale in ((context, 1), (context[1:], 7.5), (context, 7.5)))
    np.testing.assert_allclose(guided, alone, atol=1e-5)
    assert abs(other[1] - alone[1]).max() > 1e-3


@SAMPLERS
def test_a_seed_means_the_same_picture_in_any_batch(model, sampler):
    three, one = (last(model, "red apple", seeds=seeds, steps=4, sampler=sampler) for seeds in ((5, 6, 7), (6,)))
    assert three.shape == (3, 8, 8, 4) and three.dtype == np.float32
    np.testing.assert_allclose(three[1], one[0], atol=1e-5 * abs(one).max())
    assert abs(three[0] - three[1]).max() > 0.1


@SAMPLERS
def test_image_to_image_takes_part_of_the_steps(model, sampler):
    picture = np.random.default_rng(0).integers(256, size=(12, 20, 3), dtype=np.uint8)

    def run(strength, *seeds):
        return list(sd.generate(model, "red apple", "", seeds, 10, 7.5, sampler, init=picture, strength=strength))

    assert [len(run(strength, 0)) for strength in (0.1, 0.58, 1)] == [1, 5, 10]
    batch, alone = run(0.3, 5, 6)[-1], run(0.3, 6)[-1]
    assert batch.shape == (2, 6, 10, 4)
    np.testing.assert_allclose(batch[1], alone[0], atol=1e-4)


def test_training_lowers_the_loss():
    """The simple loss, |ε - ε̂|² (Ho et al., 2020, eq. 14), through the same function that draws, on one batch."""
    place = sd.placer("torch", "cpu", "float32")
    arrays = random_arrays(sd.flatten(sd.unet_shapes(CONFIG["unet"])))
    flat = {name: place(array).requires_grad_() for name, array in arrays.items()}
    weights, a = sd.nest(flat), torch.tensor(ALPHA_BAR[[10, 300, 900]], dtype=torch.float32)[:, None, None, None]
    x_0, eps, words = (torch.tensor(normal(3, *shape, seed=i), dtype=torch.float32)
                       for i, shape in enumerate([(8, 6, 4), (8, 6, 4), (12, 12)]))
    x_t, losses = a.sqrt() * x_0 + (1 - a).sqrt() * eps, []
    for _ in range(5):
        loss = ((sd.unet(x_t, torch.tensor([10., 300, 900]), words, (2, 2), 4, **weights) - eps) ** 2).mean()
        gradients = torch.autograd.grad(loss, list(flat.values()))
        with torch.no_grad():
            for w, gradient in zip(flat.values(), gradients):
                w -= 0.01 * gradient
        losses.append(loss.item())
    assert all(gradient.any() for gradient in gradients)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]
