"""What the mathematics of diffusion promises, without a reference implementation.

On a Gaussian, for which every score, posterior and trajectory is known in closed form; with a
random U-Net where a network is needed; and with a small one that learns three pictures from
scratch.
"""

import doctest
import math
from fractions import Fraction
from itertools import islice, pairwise

import numpy as np
import pytest

import extras.samplers  # noqa: F401  (registers plms and lcm)
from conftest import ROOT
from extras import like_diffusers, samplers
from helpers import (
    CONFIG,
    FILES,
    TOKENIZER,
    TWO_ENCODERS,
    random_arrays,
    scheduler,
    sd,
    shapes_of,
    write_model,
)

BETA = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
ALPHA_BAR = sd.scaled_linear_schedule()
SAMPLERS = pytest.mark.parametrize("sampler", sd.SAMPLERS)
KINDS = {"epsilon": lambda x_0, eps, a: eps, "sample": lambda x_0, eps, a: x_0,
         "v_prediction": lambda x_0, eps, a: math.sqrt(a) * eps - math.sqrt(1 - a) * x_0}
MEAN, STD = 0.7, 0.4


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def at_any_level(denoise):
    """Give a denoiser what samplers need that ask it between the levels of the steps."""
    denoise.alpha_bars = ALPHA_BAR
    return denoise


def knows(x_0):
    """The denoiser of someone who knows the picture."""
    return at_any_level(lambda x, t, a: (x_0, (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)))


@at_any_level
def gaussian(x, t, a):
    """The ideal denoiser, E[x_0 | x_t], when pictures are drawn from N(MEAN, STD²)."""
    x_0 = MEAN + STD ** 2 * math.sqrt(a) / (a * STD ** 2 + 1 - a) * (x - math.sqrt(a) * MEAN)
    return knows(x_0)(x, t, a)


@at_any_level
def flow(x, t, a):
    """Where the probability flow takes x_t.

    In a Gaussian each point stays at the same number of standard deviations.
    """
    return MEAN + STD * (x - math.sqrt(a) * MEAN) / math.sqrt(a * STD ** 2 + 1 - a), None


@at_any_level
def crooked(x, t, a):
    """Some denoiser that is far from linear."""
    return knows(np.tanh(3 * x) + np.sin(t))(x, t, a)


def levels_between(high, low, n):
    """Steps from σ = high to σ = low, evenly spaced in log σ."""
    a = 1 / (1 + np.geomspace(high, low, n + 1) ** 2)
    return [(0.0, *pair) for pair in pairwise(a.tolist())]


def steps_of(sampler, n, schedule=None, **settings):
    """The steps of a sampler with a scheduler's config."""
    return like_diffusers.sampling_steps(sampler, n, scheduler(**settings), ALPHA_BAR, schedule)


# ── The forward process ─────────────────────────────────────────────────────────────────────────


def test_the_schedule():
    assert ALPHA_BAR[0] == pytest.approx(1 - 0.00085)
    assert ALPHA_BAR[999] == pytest.approx(0.00466, abs=5e-6)
    assert len(ALPHA_BAR) == 1000 and (np.diff(ALPHA_BAR) < 0).all()


@pytest.mark.parametrize("t", [0, 1, 20, 500, 999])
def test_the_closed_form_has_the_coefficients_of_single_steps(t):
    """Each step shrinks x and adds variance."""
    signal, variance = 1.0, 0.0
    for beta in BETA[:t + 1]:
        signal = sd.add_noise(signal, 1 - beta, 0.0)
        kept, added = sd.add_noise(1.0, 1 - beta, 0.0), sd.add_noise(0.0, 1 - beta, 1.0)
        variance = kept ** 2 * variance + added ** 2
    assert sd.add_noise(1.0, ALPHA_BAR[t], 0.0) == pytest.approx(signal, rel=1e-9)
    assert sd.add_noise(0.0, ALPHA_BAR[t], 1.0) ** 2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("t", [20, 200, 500])
def test_the_closed_form_has_the_distribution_of_single_steps(t):
    rng = np.random.default_rng(0)
    single = closed = np.full(20000, 1.5)
    for beta in BETA[:t + 1]:
        single = sd.add_noise(single, 1 - beta, rng.standard_normal(20000))
    closed = sd.add_noise(closed, ALPHA_BAR[t], rng.standard_normal(20000))
    assert single.mean() == pytest.approx(closed.mean(), abs=0.03)
    levels = [0.1, 0.3, 0.7, 0.9]
    assert np.quantile(single - single.mean(), levels) == pytest.approx(
        np.quantile(closed - closed.mean(), levels), rel=0.06)


@pytest.mark.parametrize("beta", [0, 0.00085, 0.3, 1])
def test_a_step_is_the_first_jump_and_keeps_a_variance_of_one(beta):
    x, eps = normal(3, 5), normal(3, 5, seed=1)
    np.testing.assert_allclose(sd.add_noise(x, 1 - beta, eps), sd.add_noise(x, 1 - beta, eps))
    kept, added = sd.add_noise(1.0, 1 - beta, 0.0), sd.add_noise(0.0, 1 - beta, 1.0)
    assert kept ** 2 + added ** 2 == pytest.approx(1)


def test_a_batch_has_a_level_for_each_picture():
    """In NumPy and in torch: training draws a time for each picture, sampling has one for all."""
    import torch
    x_0, eps = normal(3, 4, 5, 2), normal(3, 4, 5, 2, seed=1)
    a = ALPHA_BAR[[3, 500, 999]]
    for noised in (sd.add_noise, sd.velocity):
        one_by_one = [noised(x_0[i], a[i], eps[i]) for i in range(3)]
        batch = noised(x_0, a[:, None, None, None], eps)
        tensors = map(torch.tensor, (x_0, a[:, None, None, None], eps))
        np.testing.assert_allclose(batch, one_by_one)
        np.testing.assert_allclose(noised(*tensors), one_by_one)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
@pytest.mark.parametrize("kind", KINDS)
def test_every_prediction_type_tells_picture_and_noise(kind, t):
    a, x_0, eps = ALPHA_BAR[t], normal(3, 5), normal(3, 5, seed=1)
    x_t = sd.add_noise(x_0, a, eps)
    found = sd.split_prediction(kind, KINDS[kind](x_0, eps, a), x_t, a)
    np.testing.assert_allclose(found, (x_0, eps), atol=1e-9)


# ── The reverse process ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("t, before", [(1, 0), (500, 499), (981, 961), (999, 500)])
def test_ddpm_draws_from_the_posterior_of_bayes(t, before):
    """q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0), multiplied out on a grid."""
    x_0, a, a_next = 0.8, ALPHA_BAR[t], ALPHA_BAR[before]
    x_t, alpha, width = sd.add_noise(x_0, a, -1.3), a / a_next, math.sqrt(1 - a_next)
    grid = math.sqrt(a_next) * x_0 + width * np.linspace(-9, 9, 200001)
    square = (x_t - math.sqrt(alpha) * grid) ** 2 / (1 - alpha)
    square = square + (grid - math.sqrt(a_next) * x_0) ** 2 / width ** 2
    q = np.exp((square.min() - square) / 2)
    mean = (q * grid).sum() / q.sum()
    std = math.sqrt((q * (grid - mean) ** 2).sum() / q.sum())
    at = [next(sd.ddpm(knows(x_0), x_t, [(t, a, a_next)], lambda z=z: z)) for z in (0, 1)]
    assert at == pytest.approx([mean, mean + std], rel=1e-6)


def test_ddim_with_the_true_noise_walks_back_the_way_it_came():
    x_0, eps = normal(3, 5), normal(3, 5, seed=1)
    steps = steps_of("ddim", 20, set_alpha_to_one=True)
    x = sd.add_noise(x_0, steps[0][1], eps)

    def denoise(x, t, a):
        return sd.split_prediction("epsilon", eps, x, a)
    reached = list(sd.ddim(denoise, x, steps, None))
    for (_, _, a_next), x_t in zip(steps, reached, strict=True):
        np.testing.assert_allclose(x_t, sd.add_noise(x_0, a_next, eps), atol=1e-9)
    np.testing.assert_allclose(reached[-1], x_0, atol=1e-9)


@SAMPLERS
@pytest.mark.parametrize("n", [1, 2, 20, 50, 998])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_sampler_finds_a_picture_that_the_denoiser_knows(sampler, n, spacing):
    """Whatever the noise of the steps, the last one ends at the picture itself."""
    x_0, rng = normal(3, 5), np.random.default_rng(1)
    n = min(n, 50) if sampler in ("lcm", "tcd") else n
    steps = steps_of(sampler, n, set_alpha_to_one=True, timestep_spacing=spacing)
    ends = [*(level for _, level, _ in steps[1:]), 1.0]     # ddim and plms may step elsewhere
    steps = [(t, level, end) for (t, level, _), end in zip(steps, ends)]
    *_, x = sd.SAMPLERS[sampler](knows(x_0), normal(3, 5, seed=2), steps,
                                 lambda: rng.standard_normal((3, 5)))
    # lcm keeps a trace of x_t, by 1 / (20 t)², tcd of the noise, by σ of the first level
    trace = {"lcm": 2e-5, "tcd": 0.1}.get(sampler, 1e-9)
    np.testing.assert_allclose(x, x_0, atol=trace)


@pytest.mark.parametrize("sampler", [name for name in sd.SAMPLERS if name not in ("lcm", "tcd")])
@pytest.mark.parametrize("n", [1, 2, 20, 50, 998])
def test_evenly_spaced_steps_lead_every_sampler_to_the_picture(sampler, n):
    x_0, rng = normal(3, 5), np.random.default_rng(1)
    *_, x = sd.SAMPLERS[sampler](knows(x_0), normal(3, 5, seed=2),
                                 sd.evenly_spaced_steps(n, ALPHA_BAR),
                                 lambda: rng.standard_normal((3, 5)))
    np.testing.assert_allclose(x, x_0, atol=1e-9)


def test_euler_is_ddim_in_other_coordinates():
    """And DPM++ 2M begins with the same step, having no second point yet."""
    steps = steps_of("euler", 20, timestep_spacing="leading")
    euler, ddim, dpm = (list(sampler(crooked, normal(3, 5), steps, None))
                        for sampler in (samplers.euler, sd.ddim, sd.dpm_pp_2m))
    np.testing.assert_allclose(euler, ddim, rtol=1e-6)
    np.testing.assert_allclose(dpm[0], ddim[0], rtol=1e-6)
    assert abs(dpm[1] - ddim[1]).max() > 1e-3


@SAMPLERS
def test_every_sampler_keeps_the_marginals(sampler):
    """With the ideal denoiser, x_t is N(√ᾱ mean, ᾱ std² + 1 - ᾱ) all the way down."""
    rng = np.random.default_rng(0)
    consistent = sampler == "lcm"       # its ideal leads each x_t along its flow to the end
    steps = steps_of(sampler, 50 if sampler in ("lcm", "tcd") else 500)
    x = sd.add_noise(rng.normal(MEAN, STD, 10000), steps[0][1], rng.standard_normal(10000))
    reached = sd.SAMPLERS[sampler](flow if consistent else gaussian, x, steps,
                                   lambda: rng.standard_normal(10000))
    for i, ((_, _, a), x) in enumerate(zip(steps, reached, strict=True)):
        if i % (len(steps) // 10) == 0:
            assert x.mean() == pytest.approx(math.sqrt(a) * MEAN, abs=0.05)
            assert x.std() == pytest.approx(math.sqrt(a * STD ** 2 + 1 - a), rel=0.05)


# ── Steps ───────────────────────────────────────────────────────────────────────────────────────


SPACINGS = [("ddpm", "leading", 50, 981, 961, 1), ("ddim", "leading", 50, 981, 961, 1),
            ("euler", "leading", 50, 981, 961, 1), ("euler_a", "leading", 20, 951, 901, 1),
            ("dpm++2m", "leading", 50, 951, 932, 20), ("dpm++2m", "leading", 20, 941, 894, 48),
            ("ddim", "trailing", 50, 999, 979, 19), ("euler", "linspace", 10, 999, 888, 0),
            ("dpm++2m", "linspace", 10, 999, 899, 100)]


@pytest.mark.parametrize("sampler, spacing, n, first, second, last", SPACINGS)
def test_spacing(sampler, spacing, n, first, second, last):
    steps = steps_of(sampler, n, timestep_spacing=spacing)
    assert [steps[i][0] for i in (0, 1, -1)] == [first, second, last]
    assert [a for _, a, _ in steps] == pytest.approx([ALPHA_BAR[int(t)] for t, _, _ in steps])


@SAMPLERS
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_lead_from_noise_to_picture(sampler, spacing, karras):
    settings = {"timestep_spacing": spacing, "set_alpha_to_one": False}
    if karras and sampler not in samplers.SCHEDULED:
        with pytest.raises(sd.UserError, match="karras"):
            steps_of(sampler, 20, "karras", **settings)
        return
    counts = [1, 2, 3, *range(20, 998, 50), 223, 998]
    for n in [1, 2, 3, 20, 49, 50] if sampler in ("lcm", "tcd") else counts:
        t, a, a_next = zip(*steps_of(sampler, n, "karras" if karras else None, **settings))
        assert len(t) == n and max(t) < 1000 and min(t) >= 0, n
        assert all(x < y for x, y in pairwise(a)), n
        if getattr(sd.SAMPLERS[sampler], "strides", False) and not karras:
            ahead = [int(time) - 1000 // n for time in t]       # as diffusers, whatever comes next
            assert [*a_next] == [ALPHA_BAR[max(time, 0)] for time in ahead], n
        else:
            assert a[1:] == a_next[:-1], n
        early = "ddim", "ddim_cfg++", "plms", "tcd"
        end = ALPHA_BAR[0] if sampler in early and not karras else 1
        assert a[-1] <= a_next[-1] == end, n


@pytest.mark.parametrize("n", [1, 2, 3, 20, 50, 223, 998, 999])
def test_evenly_spaced_steps(n):
    """From the noisiest level on, each 999 / n times below the one before; the end is clean."""
    t, a, a_next = zip(*sd.evenly_spaced_steps(n, ALPHA_BAR))
    assert len(t) == n and t[0] == 999 and all(type(time) is int for time in t)
    assert all(abs(time - 999 * (1 - i / n)) <= 0.5 for i, time in enumerate(t))
    assert all(x > y for x, y in pairwise(t)) and t[-1] > 0
    assert list(a) == [ALPHA_BAR[time] for time in t]
    assert a[1:] == a_next[:-1] and a_next[-1] == 1


def test_evenly_spaced_steps_of_another_schedule():
    levels = sd.scaled_linear_schedule(11, 0.1, 0.2)
    expected = [(10, levels[10], levels[5]), (5, levels[5], 1.0)]
    assert sd.evenly_spaced_steps(2, levels) == expected


def test_strength_takes_whole_steps_of_what_was_written():
    """50 x 0.58 is 29, though 50 * 0.58 is 28.999999999999996."""
    assert sd.last_steps(list(range(50)), 0.58) == list(range(21, 50))
    for n in (1, 2, 20, 25, 50, 999):
        steps = list(range(n))
        for percent in range(1, 101):
            count = n * Fraction(percent, 100) // 1
            if count:
                assert sd.last_steps(steps, percent / 100) == steps[n - count:]
            else:
                with pytest.raises(sd.UserError, match="strength"):
                    sd.last_steps(steps, percent / 100)


# ── With a U-Net ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sd.load(write_model(tmp_path_factory.mktemp("model")))


def last(*args, **kwargs):
    *_, x = sd.generate(*args, **kwargs)
    return x


def drawn(*args, **kwargs):
    *_, x = like_diffusers.generate(*args, **kwargs)
    return x


@pytest.mark.slow
def test_the_pipeline_of_the_docstring(monkeypatch):
    """The lines after >>> at the head of tiny_sd.py run unchanged, print that, and draw."""
    monkeypatch.chdir(ROOT)
    test = doctest.DocTestParser().get_doctest(sd.__doc__, vars(sd), "tiny_sd", None, None)
    assert len(test.examples) == 7
    assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
    names, picture = test.globs, test.globs["picture"]
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8 and picture.std() > 20

    size = names["model"].config.unet.sample_size
    assert names["x_T"].shape == (1, size, size, 4)
    *_, x = sd.generate(names["model"], "red apple on a blue background", "")
    assert np.array_equal(sd.decode(names["model"], x)[0], picture)


def test_guidance():
    uncond, cond = normal(3, 5), normal(3, 5, seed=1)
    assert np.allclose(sd.guide(uncond, cond, 1), cond)
    assert np.allclose(sd.guide(uncond, cond, 0), uncond)
    assert np.allclose(sd.guide(cond, cond, 7.5), cond)


def test_guidance_of_one_is_the_prompt_alone_and_of_none_the_negative_one(model):
    context, _ = sd.embed_prompts(model, ["a dog", "red apple"])
    x = normal(3, 8, 6, 4).astype(np.float32)
    for denoiser in sd.denoiser, like_diffusers.denoiser:
        one, prompt, none, negative, other = (
            denoiser(model, rows, scale)(x, 500, ALPHA_BAR[500]) for rows, scale in
            ((context, 1), (context[1:], 7.5), (context, 0), (context[:1], 7.5), (context, 7.5)))
        np.testing.assert_allclose(one, prompt, atol=1e-5)
        np.testing.assert_allclose(none, negative, atol=1e-5)
        assert abs(other[1] - prompt[1]).max() > 1e-3 < abs(negative[1] - prompt[1]).max()


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("config", [CONFIG, TWO_ENCODERS], ids=["one encoder", "two encoders"])
def test_both_contexts_at_once_are_one_after_the_other(config, backend, tmp_path):
    """As the command line asks, and as the lesson does: by batch or by core."""
    model = sd.load(write_model(tmp_path / "model", config), backend)
    context, pooled = sd.embed_prompts(model, ["a dog", "red apple"])
    x = normal(3, 8, 6, 4).astype(np.float32)
    lesson, command = (denoiser(model, context, 3.0, pooled)(x, 500, ALPHA_BAR[500])
                       for denoiser in (sd.denoiser, like_diffusers.denoiser))
    assert (pooled is None) == (config is CONFIG)
    for ours, theirs in zip(lesson, command, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * abs(theirs).max())


def test_a_picture_with_nothing_but_a_prompt(model):
    """20 evenly spaced steps of ddim from NumPy's noise of seed 0, at the model's own guidance."""
    *_, x = path = list(sd.generate(model, "red apple"))
    context, pooled = sd.embed_prompts(model, [None, "red apple"])
    x_T = np.random.default_rng(0).standard_normal((8, 8, 4), np.float32)[None]
    *_, expected = sd.ddim(sd.denoiser(model, context, 7.5, pooled), x_T,
                           sd.evenly_spaced_steps(20, model.alpha_bars))
    assert len(path) == 20 and np.array_equal(x, expected)


def test_noise_says_how_many_pictures_and_how_large(model):
    def draw(seeds, shape):
        return last(model, "red", steps=sd.evenly_spaced_steps(2, ALPHA_BAR),
                    sampler=sd.ddpm, noise=sd.numpy_noise(seeds, shape))

    three, one = draw([4, 5, 6], (6, 10, 4)), draw([5], (6, 10, 4))
    assert three.shape == (3, 6, 10, 4)
    np.testing.assert_allclose(three[1], one[0], atol=1e-5 * abs(one).max())
    assert abs(three[0] - three[1]).max() > 0.1


def test_a_picture_from_a_picture_begins_at_its_level(model):
    """Whatever the sampler starts from; and with a mask the rest of the picture stays."""
    picture = np.random.default_rng(0).integers(256, size=(12, 20, 3), dtype=np.uint8)
    steps, rng = sd.evenly_spaced_steps(10, ALPHA_BAR), np.random.default_rng(3)
    eps = [rng.standard_normal((1, 6, 10, 4), np.float32) for _ in range(3)]
    begun = []

    def sampler(denoise, x, steps, noise):
        begun.append((x.copy(), len(steps)))
        return sd.ddim(denoise, x, steps)

    def draw(**settings):
        stream = iter(eps)
        return last(model, "red", sampler=sampler, steps=steps, noise=lambda: next(stream),
                    picture=picture, **settings)

    draw(strength=0.4)
    x_0 = sd.encode(model, picture, eps[0])
    np.testing.assert_allclose(begun[0][0], sd.add_noise(x_0, steps[6][1], eps[1]), atol=1e-6)
    assert begun[0][1] == 4

    mask = np.arange(12)[:, None] + np.zeros(20) >= 6
    partly, afresh = draw(strength=0.4, mask=mask), draw(strength=1, mask=mask)
    for x in partly, afresh:
        np.testing.assert_allclose(x[:, :3], x_0[:, :3], atol=1e-6)
        assert abs(x[:, 3:] - x_0[:, 3:]).min(axis=-1).max() > 0.01
    assert np.array_equal(begun[1][0], begun[0][0]) and np.array_equal(begun[2][0], eps[1])


@SAMPLERS
def test_a_sampler_given_as_a_function_takes_the_steps_of_its_name(model, sampler):
    """The spacing depends on the name: linspace for euler, leading for ddim."""
    by_name, by_function = (drawn(model, "red apple", steps=4, sampler=which)
                            for which in (sampler, sd.SAMPLERS[sampler]))
    assert np.array_equal(by_name, by_function)


@SAMPLERS
def test_a_seed_means_the_same_picture_in_any_batch(model, sampler):
    three, one = (drawn(model, "red apple", seeds=seeds, steps=4, sampler=sampler)
                  for seeds in ((5, 6, 7), (6,)))
    assert three.shape == (3, 8, 8, 4) and three.dtype == np.float32
    np.testing.assert_allclose(three[1], one[0], atol=1e-5 * abs(one).max())
    assert abs(three[0] - three[1]).max() > 0.1


@SAMPLERS
def test_image_to_image_takes_part_of_the_steps(model, sampler):
    picture = np.random.default_rng(0).integers(256, size=(12, 20, 3), dtype=np.uint8)

    def run(strength, *seeds):
        return list(like_diffusers.generate(model, "red apple", "", seeds, 10, 7.5, sampler,
                                            init=picture, strength=strength))

    assert [len(run(strength, 0)) for strength in (0.1, 0.58, 1)] == [1, 5, 10]
    batch, alone = run(0.3, 5, 6)[-1], run(0.3, 6)[-1]
    assert batch.shape == (2, 6, 10, 4)
    np.testing.assert_allclose(batch[1], alone[0], atol=1e-4)


# ── Training ────────────────────────────────────────────────────────────────────────────────────


def test_training_lowers_the_loss():
    """The simple loss, |ε - ε̂|² (Ho et al., 2020, eq. 14), on one batch.

    Through the same function that draws, and with the slope of every weight.
    """
    import torch
    arrays = random_arrays(shapes_of("unet", CONFIG["unet"]))
    weights = sd.nest({name: sd.to_backend(array, "torch") for name, array in arrays.items()})
    learnt = sd.parameters(weights)
    alpha_bar = torch.tensor(ALPHA_BAR[[10, 300, 900]], dtype=torch.float32)[:, None, None, None]
    x_0, eps, words = (torch.tensor(normal(3, *shape, seed=i), dtype=torch.float32)
                       for i, shape in enumerate([(8, 6, 4), (8, 6, 4), (12, 12)]))

    def predict(x_t):
        temb = sd.time_mlp(x_t, np.array([10., 300, 900]), **weights["time_embedding"])
        return sd.unet(x_t, temb, words, (2, 2), 4, **weights)

    losses = []
    for _ in range(5):
        loss = sd.diffusion_loss(predict, "epsilon", x_0, alpha_bar, eps).mean()
        gradients = torch.autograd.grad(loss, learnt)
        with torch.no_grad():
            for w, gradient in zip(learnt, gradients, strict=True):
                w -= 0.01 * gradient
        losses.append(loss.item())
    assert len(learnt) == len(arrays) and all(gradient.any() for gradient in gradients)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("rate", [0, 0.1, 0.5, 1])
def test_captions_are_dropped_at_the_rate_that_was_asked_for(rate):
    captions = [f"picture {i}" for i in range(40000)]
    kept = sd.drop_captions(captions, np.random.default_rng(0), rate)
    dropped = [old for old, new in zip(captions, kept, strict=True) if new is None]
    assert all(new in (None, old) for old, new in zip(captions, kept))
    four_deviations = 4 * math.sqrt(40000 * rate * (1 - rate))
    assert abs(len(dropped) - 40000 * rate) <= four_deviations
    assert None not in captions                 # the caller's list is as it was


def test_one_time_in_ten_unless_said_otherwise():
    kept = sd.drop_captions(["apple"] * 40000, np.random.default_rng(0))
    assert kept.count(None) / 40000 == pytest.approx(0.1, abs=0.006)


def three_pictures():
    """Latents (3, 8, 8, 4) of three pictures of -1 and 1: halves, a chessboard, a lozenge."""
    y, x = np.mgrid[:8, :8] / 7 - 0.5
    halves = [np.sign(y), np.sign(x), np.sign(y), -np.sign(x)]
    board = [np.sign(x * y), np.sign(x * y), np.sign(x), np.sign(x)]
    lozenge = [np.sign(abs(x) + abs(y) - 0.5)] * 4
    pictures = [np.stack(picture, axis=-1) for picture in (halves, board, lozenge)]
    return np.stack(pictures).astype(np.float32)


def test_training_at_chosen_times_with_chosen_weights(tmp_path):
    """Without a rate nothing changes but the loss, by the weight of the time's level."""
    import torch
    model = sd.load(write_model(tmp_path / "model"), "torch")
    latents = torch.tensor(normal(3, 8, 8, 4), dtype=torch.float32)

    def losses(**settings):
        rng, optimizer = np.random.default_rng(1), torch.optim.SGD(sd.parameters(model.unet), 0.0)
        batches = sd.random_batches(latents, ["red", "apple", "re"], 4, rng)
        return list(islice(sd.train(model, optimizer, batches, rng, **settings), 2))

    asked = []

    def at_900(n, T, rng):
        asked.append((n, T))
        return np.full(n, 900)
    plain = losses(times=at_900)
    twice = losses(times=at_900, weight=lambda levels: 2 * (levels == ALPHA_BAR[900]))
    assert set(asked) == {(4, 1000)} and twice == pytest.approx([2 * x for x in plain])
    assert losses() != pytest.approx(plain)


@pytest.mark.slow
def test_training_from_nothing():
    """tiny_sd.train alone: the loss falls to a sixth, and each caption draws its own picture.

    From random weights, on three pictures, in 350 steps. The U-Net and the text encoder learn
    together, since nothing else tells the captions apart; the VAE is left alone.
    """
    import torch
    settings = {**CONFIG, "scheduler": {"prediction_type": "v_prediction"},
                "unet": {**CONFIG["unet"], "block_out_channels": [16, 16]}}
    arrays = {part: random_arrays(shapes_of(part, settings[part]), seed)
              for seed, part in enumerate(FILES)}
    model = sd.assemble("small", settings, arrays, [TOKENIZER], backend="torch")
    pictures, captions = three_pictures(), ["red", "apple", "re"]
    before = [array.clone() for array in sd.flatten(model.vae).values()]

    optimizer = torch.optim.Adam(sd.parameters(model.unet, model.encoders[0].weights), lr=0.005)
    rng = np.random.default_rng(0)
    batches = sd.random_batches(torch.tensor(pictures), captions, 12, rng)
    losses = np.array(list(islice(sd.train(model, optimizer, batches, rng), 350)))
    assert losses[-30:].mean() < losses[:10].mean() / 6
    assert all(torch.equal(a, b) for a, b in zip(before, sd.flatten(model.vae).values()))

    for caption, own in zip(captions, pictures):
        for guidance in (1, 2):
            noise = sd.numpy_noise((1, 2), own.shape)
            for x in last(model, caption, guidance=guidance, noise=noise):
                errors = [np.sqrt(np.square(x - other).mean()) for other in pictures]
                assert errors[np.argmin(errors)] == np.sqrt(np.square(x - own).mean()) < 0.5
                assert sorted(errors)[1] > 1
                assert (np.sign(x) == own).mean() > 0.95


@pytest.mark.parametrize("picture, said", [
    (np.ones((128, 128, 3)), "from 0 to 255"), (np.ones((128, 128)), "(height, width, 3)"),
    (np.ones((0, 0, 3)), "")])
def test_what_is_no_picture_to_start_from(picture, said):
    """Above all, one from 0 to 1, as other libraries have them, would be all but black."""
    with pytest.raises(sd.UserError) as error:
        like_diffusers.generate(sd.load("emoji"), "apple", init=picture)
    assert said in str(error.value)
