"""Equations of NOTES.md that no other test computes a second way.

Each calls the program on one side. A table in extras/REFERENCE.md says which test has which
equation.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from extras import samplers
from helpers import CONFIG, random_arrays, sd, shapes_of, write_model

ALPHA_BAR = sd.scaled_linear_schedule()
RNG = np.random.default_rng(0)


def log_normal(x, mean, variance):
    return -(x - mean) ** 2 / (2 * variance) - math.log(2 * math.pi * variance) / 2


@pytest.mark.parametrize("size, kernel, stride, before, after",
                         [(16, 3, 1, 1, 1), (16, 3, 2, 0, 1), (17, 3, 2, 1, 1), (9, 5, 3, 0, 0)])
def test_how_often_a_window_fits(size, kernel, stride, before, after):
    """(1.3), by counting."""
    padded = size + before + after
    fits = sum(start + kernel <= padded for start in range(0, padded, stride))
    x, weight = np.ones((1, size, size, 1)), np.ones((1, kernel, kernel, 1))
    y = sd.conv2d.formula(x, weight, None, stride, (before, after))
    assert y.shape[1] == fits == (padded - kernel) // stride + 1


# ── What is learnt ──────────────────────────────────────────────────────────────────────────────


def test_clip_loss():
    """(3.4), summand by summand."""
    u, w = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in RNG.standard_normal((2, 5, 8)))
    scale, total = 7.0, 0.0
    for i in range(5):
        own = math.exp(scale * u[i] @ w[i])
        total += math.log(own / sum(math.exp(scale * u[i] @ w[j]) for j in range(5)))
        total += math.log(own / sum(math.exp(scale * u[j] @ w[i]) for j in range(5)))
    log_scale = torch.tensor(math.log(scale), dtype=torch.float64)
    loss = sd.clip_loss(torch.tensor(u), torch.tensor(w), log_scale)
    assert loss.item() == pytest.approx(-total / 10)


def test_the_bound(monkeypatch):
    """(4.6): vae_loss is -log p(x) plus the divergence from the true posterior.

    For normal z and x = slope z + shift + noise, p(x) and the posterior are known. Twice the loss
    of (4.6) is quadratic in ε, so its mean over ε = 1 and ε = -1 is that over all ε.
    """
    slope, shift, noise = 0.8, 0.3, 0.5                 # p(x | z) = N(slope z + shift, noise²)
    x, mean, logvar = 1.1, -0.4, math.log(0.3)          # q(z | x) = N(mean, 0.3), anything

    def as_array(value):
        return torch.full((1, 1, 1, 1), value, dtype=torch.float64)

    def minus_log_likelihood(picture, reference):
        return -log_normal(reference, picture, noise ** 2).mean()
    monkeypatch.setattr(sd, "vae_encode", lambda *_: (as_array(mean), as_array(logvar)))
    monkeypatch.setattr(sd, "vae_decode", lambda z, *_: slope * z + shift)
    losses = [sd.vae_loss(as_array(x), as_array(eps), None, 1, minus_log_likelihood, 1).item()
              for eps in (1.0, -1.0)]

    evidence = log_normal(x, shift, slope ** 2 + noise ** 2)
    precision = 1 + slope ** 2 / noise ** 2
    posterior = Normal(slope * (x - shift) / noise ** 2 / precision, precision ** -0.5)
    q = Normal(mean, math.exp(logvar / 2))
    assert np.mean(losses) == pytest.approx(-evidence + kl_divergence(q, posterior).item())


@pytest.fixture(scope="module")
def vae():
    """helpers' VAE in torch, in float64."""
    arrays = random_arrays(shapes_of("vae", CONFIG["vae"]))
    return sd.nest({name: sd.to_backend(array, "torch", dtype="float64")
                    for name, array in arrays.items()})


def test_vae_loss(vae):
    """(4.5) as in torch.distributions, and (8.1): the rest is the error of the reconstruction."""
    picture, eps = (torch.tensor(RNG.standard_normal(shape))
                    for shape in ((3, 8, 6, 3), (3, 4, 3, 4)))
    mean, logvar = sd.vae_encode(picture, vae, 2)
    q = Normal(mean, (logvar / 2).exp())
    divergence = kl_divergence(q, Normal(0, 1)).mean()
    drawn = sd.vae_decode(mean + q.stddev * eps, vae, 2)

    assert divergence > 0.1
    error = F.l1_loss(drawn, picture)
    for weight in (0, 1e-4, 1):
        loss = sd.vae_loss(picture, eps, vae, 2, kl_weight=weight)
        assert loss.item() == pytest.approx((error + weight * divergence).item(), rel=1e-9)
    default = sd.vae_loss(picture, eps, vae, 2)
    assert default.item() == pytest.approx((error + 1e-4 * divergence).item(), rel=1e-9)
    squares = sd.vae_loss(picture, eps, vae, 2, error=F.mse_loss, kl_weight=0)
    assert squares.item() == pytest.approx(F.mse_loss(drawn, picture).item(), rel=1e-9)


def test_vae_loss_teaches_every_weight(vae):
    picture, eps = (torch.tensor(RNG.standard_normal(shape))
                    for shape in ((2, 8, 6, 3), (2, 4, 3, 4)))
    weights = sd.parameters(vae)
    gradients = torch.autograd.grad(sd.vae_loss(picture, eps, vae, 2), weights)
    assert len(weights) == len(sd.flatten(vae)) and all(g.any() for g in gradients)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_loss(kind):
    """(8.2), for each prediction type, by the scheduler of diffusers; each picture's t its own."""
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    x_0, eps = (torch.tensor(RNG.standard_normal((4, 6, 5, 3))) for _ in range(2))
    t = torch.tensor([0, 17, 500, 999])
    asked = []

    def predict(x_t):
        asked.append(x_t)
        return torch.tanh(2 * x_t) + 0.1
    alpha_bar = torch.tensor(ALPHA_BAR[t])[:, None, None, None]
    losses = sd.diffusion_loss(predict, kind, x_0, alpha_bar, eps)

    x_t = scheduler.add_noise(x_0, eps, t)
    targets = {"epsilon": eps, "sample": x_0, "v_prediction": scheduler.get_velocity(x_0, eps, t)}
    expected = [F.mse_loss(torch.tanh(2 * x) + 0.1, target)
                for x, target in zip(x_t, targets[kind])]
    np.testing.assert_allclose(asked, x_t[None], atol=1e-5)     # theirs are levels of float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_prediction_without_loss_splits_into_picture_and_noise(kind):
    """What diffusion_loss teaches is what split_prediction takes apart."""
    x_0, eps = (torch.tensor(RNG.standard_normal((2, 6, 5, 3))) for _ in range(2))
    alpha_bar = torch.tensor(ALPHA_BAR[[30, 800]])[:, None, None, None]
    right = {"epsilon": eps, "sample": x_0, "v_prediction": sd.velocity(x_0, alpha_bar, eps)}[kind]
    loss = sd.diffusion_loss(lambda x_t: right, kind, x_0, alpha_bar, eps)
    assert loss.shape == (2,) and not loss.any()
    parts = sd.split_prediction(kind, right, sd.add_noise(x_0, alpha_bar, eps), alpha_bar)
    for found, expected in zip(parts, (x_0, eps)):
        np.testing.assert_allclose(found, expected, atol=1e-9)


# ── Latents ─────────────────────────────────────────────────────────────────────────────────────


def test_drawn_latents(tmp_path):
    """(4.3), (4.4): their mean and spread, over many draws."""
    model = sd.load(write_model(tmp_path / "tiny"))
    picture = RNG.integers(256, size=(4, 4, 3), dtype=np.uint8)
    draws = sd.encode(model, picture, RNG.standard_normal((40000, 2, 2, 4)))
    pixels = picture[None].astype(np.float32) / 127.5 - 1
    mean, logvar = sd.vae_encode(pixels, model.vae, 2)
    np.testing.assert_allclose(draws.mean(0), 0.5 * mean[0], atol=0.02 * np.exp(logvar / 2).max())
    np.testing.assert_allclose(draws.std(0), 0.5 * np.exp(logvar[0] / 2), rtol=0.02)


def test_the_scale_makes_the_variance_one(tmp_path):
    """(4.4): encode multiplies by 1 / std(z), and decode divides by it again."""
    model = sd.load(write_model(tmp_path / "tiny"))
    picture = RNG.integers(256, size=(32, 32, 3), dtype=np.uint8)
    eps = RNG.standard_normal((4, 16, 16, 4))
    model.config.vae.scaling_factor = 1
    z = sd.encode(model, picture, eps)
    plain = sd.decode(model, z)
    model.config.vae.scaling_factor = 1 / z.std()
    x_0 = sd.encode(model, picture, eps)
    assert abs(z.std() - 1) > 0.1 and x_0.std() == pytest.approx(1)
    assert abs(sd.decode(model, x_0).astype(int) - plain).max() <= 1


def test_every_grey_level_comes_back(tmp_path):
    """(7.1), there and back: what encode makes of a picture, decode makes a picture of."""
    model = sd.load(write_model(tmp_path / "tiny"))
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    seen = []

    def vae_encode(pixels, *_):
        seen.append(pixels)
        return np.zeros((2, 1, 8, 8, 4), np.float32)
    model.vae_encode, model.vae_decode = vae_encode, lambda *_: seen[0]
    x = sd.encode(model, levels, np.zeros((1, 8, 8, 4)))
    assert (seen[0].min(), seen[0].max()) == (-1, 1) and seen[0].dtype == np.float32
    assert np.array_equal(sd.decode(model, x)[0], levels)


# ── Diffusion ───────────────────────────────────────────────────────────────────────────────────


def jump(x, s, t, eps):
    """Take x from level s to level t by (6.3), at once."""
    return sd.add_noise(x, ALPHA_BAR[t] / ALPHA_BAR[s], eps)


@pytest.mark.parametrize("s, m, t", [(0, 1, 2), (10, 200, 900)])
def test_two_jumps_are_one(s, m, t):
    """(6.3): from s to m to t, means and variances, and as many single steps."""
    signal, variance = jump(1.0, s, t, 0.0), jump(0.0, s, t, 1.0) ** 2

    assert jump(jump(1.0, s, m, 0.0), m, t, 0.0) == pytest.approx(signal)
    first, second = jump(jump(0.0, s, m, 1.0), m, t, 0.0), jump(0.0, m, t, 1.0)
    assert first ** 2 + second ** 2 == pytest.approx(variance)

    steps_signal, steps_variance = 1.0, 0.0
    for beta in np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000)[s + 1:t + 1] ** 2:
        steps_signal = sd.add_noise(steps_signal, 1 - beta, 0.0)
        steps_variance = (sd.add_noise(steps_variance ** 0.5, 1 - beta, 0.0) ** 2
                          + sd.add_noise(0.0, 1 - beta, 1.0) ** 2)
    assert (steps_signal, steps_variance) == pytest.approx((signal, variance))


def test_two_forms_of_the_bound():
    """(6.9) is (6.10), and above -log p(x_0).

    In a chain of three steps whose guess of the picture is 0.6 x_t.
    """
    rng, x_0, a = np.random.default_rng(0), 0.8, [1, 0.8, 0.5, 0.1]
    beta = [None] + [1 - a[t] / a[t - 1] for t in (1, 2, 3)]

    def posterior(x_t, picture, t):     # what ddpm draws: its mean and its variance
        def draw(z):
            return next(sd.ddpm(lambda *_: (picture, None), x_t, [(t, a[t], a[t - 1])], lambda: z))
        mean = draw(0.0)
        return mean, np.mean(draw(1.0) - mean) ** 2

    def model(x_t, t):      # at the last step a normal distribution too, of some width
        return (0.6 * x_t, 0.3) if t == 1 else posterior(x_t, 0.6 * x_t, t)

    def forward(x, t):      # the mean and variance of one step
        return sd.add_noise(x, 1 - beta[t], 0.0), sd.add_noise(0.0, 1 - beta[t], 1.0) ** 2

    x = [np.full(400000, x_0)]
    for t in (1, 2, 3):
        x.append(sd.add_noise(x[-1], 1 - beta[t], rng.standard_normal(len(x[0]))))
    forwards = sum(log_normal(x[t], *forward(x[t - 1], t)) for t in (1, 2, 3))
    backwards = log_normal(x[3], 0, 1) + sum(log_normal(x[t - 1], *model(x[t], t))
                                             for t in (1, 2, 3))
    whole = (forwards - backwards).mean()

    mean, variance = sd.add_noise(x_0, a[3], 0.0), sd.add_noise(0.0, a[3], 1.0) ** 2
    parts = (mean ** 2 + variance - 1 - math.log(variance)) / 2
    parts -= log_normal(x[0], *model(x[1], 1)).mean()
    for t in (2, 3):
        (exact, width), (guess, _) = posterior(x[t], x_0, t), model(x[t], t)
        parts += ((exact - guess) ** 2).mean() / (2 * width)
    assert whole == pytest.approx(parts, rel=0.01)

    m, v = 0.0, 1.0         # p(x_0) itself: a linear chain of normal steps
    for t in (3, 2, 1):
        factor, noise = model(1.0, t)
        m, v = factor * m, factor ** 2 * v + noise
    assert -log_normal(x_0, m, v) < whole


@pytest.mark.parametrize("t", [0, 300, 999])
def test_the_weights_of_the_small_models_loss(t):
    """Around (8.3): by loss_weight, an error of v counts min(SNR + 1, 5) times that of x_0."""
    from extras.training.train import loss_weight

    a, snr = ALPHA_BAR[t], ALPHA_BAR[t] / (1 - ALPHA_BAR[t])
    x_t, v, w = 0.3, 1.1, 1.4
    one, other = (sd.split_prediction("v_prediction", answer, x_t, a)[0] for answer in (v, w))
    weight = loss_weight(a)
    assert weight * (v - w) ** 2 == pytest.approx(min(snr + 1, 5) * (one - other) ** 2)


def test_velocity():
    """(6.14), as a difference quotient."""
    x_0, eps, phi, h = 0.7, -1.2, 0.9, 1e-6
    a = math.cos(phi) ** 2
    ahead, behind = (sd.add_noise(x_0, math.cos(phi + step) ** 2, eps) for step in (h, -h))
    slope = (ahead - behind) / (2 * h)
    assert sd.velocity(x_0, a, eps) == pytest.approx(slope)
    x_t = sd.add_noise(x_0, a, eps)
    assert sd.split_prediction("v_prediction", slope, x_t, a) == pytest.approx((x_0, eps))


@pytest.mark.parametrize("scale", [0, 1, 3, 7.5])
def test_guidance_is_the_slope_of_a_classifier(scale):
    """(6.16), (6.17), for a normal p(x_t | c), and p(x_t) the mean of two of them.

    Every slope is a difference quotient.
    """
    a, x, h = 0.4, 0.3, 1e-5

    def log_p(x, c):
        return log_normal(x, c * math.sqrt(a), 1 - 0.9 * a)

    def log_any(x):
        return np.logaddexp(log_p(x, 1), log_p(x, -1)) - math.log(2)

    def log_classifier(x):
        return log_p(x, 1) - math.log(2) - log_any(x)

    def slope(f):
        return (f(x + h) - f(x - h)) / (2 * h)

    cond, uncond = (-math.sqrt(1 - a) * slope(f) for f in (lambda x: log_p(x, 1), log_any))
    assert slope(log_classifier) == pytest.approx((uncond - cond) / math.sqrt(1 - a), abs=1e-6)
    sharpened = slope(lambda x: log_any(x) + scale * log_classifier(x))
    guided = sd.guide(uncond, cond, scale)
    assert guided == pytest.approx(-math.sqrt(1 - a) * sharpened, abs=1e-6)


def two_pictures(x, t, a):
    """The ideal denoiser for the two pictures +1 and -1."""
    x_0 = np.tanh(x * math.sqrt(a) / (1 - a))
    return x_0, (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)


@pytest.mark.parametrize("sampler", [samplers.euler, sd.ddim])
def test_the_cloud_keeps_its_density(sampler):
    """(6.21), (6.22): points of x_0 + σ ε, moved by Euler's method, are spread as at the lower σ.

    Pictures are +1 or -1.
    """
    rng = np.random.default_rng(0)
    x_0, eps = rng.choice([-1.0, 1.0], 20000), rng.standard_normal((2, 20000))
    alpha_bar = (1 / (1 + np.geomspace(3, 0.5, 300) ** 2)).tolist()
    steps = [(0, *pair) for pair in zip(alpha_bar, alpha_bar[1:])]
    high = sd.add_noise(x_0, alpha_bar[0], eps[0])
    low = sd.add_noise(x_0, alpha_bar[-1], eps[1])

    *_, moved = sampler(two_pictures, high, steps)
    moved, low = moved / alpha_bar[-1] ** 0.5, low / alpha_bar[-1] ** 0.5
    levels = [0.05, 0.2, 0.35, 0.65, 0.8, 0.95]
    assert np.quantile(moved, levels) == pytest.approx(np.quantile(low, levels), abs=0.06)


def steps_in_lambda(lam, target, n):
    """Steps evenly spaced in λ = -log σ."""
    alpha_bar = (1 / (1 + np.exp(-2 * np.linspace(lam, target, n + 1)))).tolist()
    return [(0, *pair) for pair in zip(alpha_bar, alpha_bar[1:])]


def euler_in_small_steps(x_0_of_sigma, x_t, lam, target):
    """What 20000 steps of Euler's method make of x_t, given x̂_0 as a function of σ."""
    def denoise(x, t, alpha_bar):
        x_0 = x_0_of_sigma(sd.sigma_of(alpha_bar))
        return x_0, (x - alpha_bar ** 0.5 * x_0) / (1 - alpha_bar) ** 0.5
    *_, x = samplers.euler(denoise, x_t, steps_in_lambda(lam, target, 20000))
    return x


def test_the_linear_part_is_exact():
    """(6.24), (6.25): with x̂_0 = e^-λ the integral is h, whatever the step."""
    lam, target, start = -1.0, 0.5, 1.7                 # of x̄ = x / √ᾱ
    (_, a, a_end), = steps_in_lambda(lam, target, 1)
    x = euler_in_small_steps(lambda sigma: sigma, a ** 0.5 * start, lam, target)
    x_bar = x / a_end ** 0.5
    expected = start * math.exp(lam) + target - lam
    assert x_bar * math.exp(target) == pytest.approx(expected, rel=1e-3)


def test_one_step_with_a_constant_guess_is_exact():
    """(6.26): dpm_pp_2m and ddim go in one step where Euler's method goes in 20000."""
    lam, target, guess = -1.0, 0.5, 0.6
    steps = steps_in_lambda(lam, target, 1)
    x_t = 0.9

    def denoise(x, t, a):
        return guess, (x - a ** 0.5 * guess) / (1 - a) ** 0.5
    small = euler_in_small_steps(lambda sigma: guess, x_t, lam, target)
    for sampler in (sd.dpm_pp_2m, sd.ddim):
        assert next(sampler(denoise, x_t, steps)) == pytest.approx(small, rel=1e-9)


# ── Weights ─────────────────────────────────────────────────────────────────────────────────────


def test_bfloat16_is_half_a_float32():
    """(10.1), with the words that torch writes."""
    values = torch.tensor([1.0, -2.5, 3.1e-20, 7.7e30, 0.1])
    words = values.bfloat16().view(torch.int16).numpy().view("<u2")
    decoded = sd.widen(words)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, values.bfloat16().float().numpy())
    for word, value in zip(words.tolist(), decoded.tolist()):
        sign, exponent, fraction = word >> 15, word >> 7 & 255, (word & 127) << 16
        assert value == (-1) ** sign * 2.0 ** (exponent - 127) * (1 + fraction / 2 ** 23)
