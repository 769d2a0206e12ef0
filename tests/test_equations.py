"""Equations of NOTES.md that no other test computes a second way; the table at the notes' end says which test has which."""

import math
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from helpers import sd, write_model

sys.path.insert(0, str(ROOT / "weights"))

ALPHA_BAR = sd.alpha_bars({})
RNG = np.random.default_rng(0)


def log_normal(x, mean, variance):
    return -(x - mean) ** 2 / (2 * variance) - math.log(2 * math.pi * variance) / 2


@pytest.mark.parametrize("size, kernel, stride, before, after", [(16, 3, 1, 1, 1), (16, 3, 2, 0, 1), (17, 3, 2, 1, 1), (9, 5, 3, 0, 0)])
def test_how_often_a_window_fits(size, kernel, stride, before, after):
    """(1.3), by counting."""
    fits = sum(start + kernel <= size + before + after for start in range(0, size + before + after, stride))
    y = sd.conv2d.formula(np.ones((1, size, size, 1)), np.ones((1, kernel, kernel, 1)), None, stride, (before, after))
    assert y.shape[1] == fits == (size + before + after - kernel) // stride + 1


def test_clip_loss(monkeypatch):
    """(3.4), summand by summand."""
    train = pytest.importorskip("train")
    u, w = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in RNG.standard_normal((2, 5, 8)))
    monkeypatch.setattr(train, "embed_text", lambda *_: torch.from_numpy(u))
    monkeypatch.setattr(train, "embed_image", lambda *_: torch.from_numpy(w))
    scale, total = 7.0, 0.0
    for i in range(5):
        own = math.exp(scale * u[i] @ w[i])
        total += math.log(own / sum(math.exp(scale * u[i] @ w[j]) for j in range(5)))
        total += math.log(own / sum(math.exp(scale * u[j] @ w[i]) for j in range(5)))
    loss = train.clip_loss(None, {"logit_scale": torch.tensor(math.log(scale), dtype=torch.float64)}, None, None)
    assert loss.item() == pytest.approx(-total / 10)


def test_the_best_score_is_how_much_more_often_than_by_chance():
    """(3.5): its softmax is the probability by Bayes' rule, counted over all ways to draw three pictures of four."""
    joint = RNG.random((3, 4))
    joint /= joint.sum()
    p_w, p_y = joint.sum(0), joint.sum(1)
    score = np.log(joint / (p_w * p_y[:, None]))
    for y in range(3):
        for pictures in np.ndindex(4, 4, 4):
            ways = [joint[y, pictures[j]] / p_y[y] * math.prod(p_w[pictures[i]] for i in range(3) if i != j) for j in range(3)]
            np.testing.assert_allclose(np.exp(score[y, list(pictures)]) / np.exp(score[y, list(pictures)]).sum(), ways / np.sum(ways))


def test_the_bound():
    """(4.1) with four latents: what the bound leaves out is the divergence from the true posterior."""
    prior, likelihood, q = (p / p.sum() for p in RNG.random((3, 4)))
    posterior = prior * likelihood / (prior * likelihood).sum()
    bound = (q * np.log(likelihood)).sum() - (q * np.log(q / prior)).sum()
    assert bound + (q * np.log(q / posterior)).sum() == pytest.approx(math.log((prior * likelihood).sum()))


def test_drawn_latents(tmp_path):
    """(4.3), (4.4): their mean and spread, over many draws."""
    model = sd.load(write_model(tmp_path / "tiny"))
    picture = RNG.integers(256, size=(4, 4, 3), dtype=np.uint8)
    draws = sd.encode(model, picture, RNG.standard_normal((40000, 2, 2, 4)))
    mean, logvar = sd.vae_encode(picture[None].astype(np.float32) / 127.5 - 1, model.vae, 2)
    np.testing.assert_allclose(draws.mean(0), 0.5 * mean[0], atol=0.02 * np.exp(logvar / 2).max())
    np.testing.assert_allclose(draws.std(0), 0.5 * np.exp(logvar[0] / 2), rtol=0.02)


def test_the_scale_makes_the_variance_one(tmp_path):
    """(4.4)"""
    from types import SimpleNamespace
    train = pytest.importorskip("train")
    z = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert (train.scaling_factor(SimpleNamespace(state=tmp_path), z) * z).std().item() == pytest.approx(1)


@pytest.mark.parametrize("s, m, t", [(0, 1, 2), (10, 200, 900)])
def test_two_jumps_are_one(s, m, t):
    """(6.3): from s to m to t, means and variances."""
    first, second, whole = (ALPHA_BAR[j] / ALPHA_BAR[i] for i, j in ((s, m), (m, t), (s, t)))
    assert math.sqrt(first * second) == pytest.approx(math.sqrt(whole))
    assert second * (1 - first) + 1 - second == pytest.approx(1 - whole)


def test_two_forms_of_the_bound():
    """(6.9) is (6.10), and above -log p(x_0): a chain of three steps whose guess of the picture is 0.6 x_t."""
    rng, x_0, a = np.random.default_rng(0), 0.8, np.array([1, 0.8, 0.5, 0.1])

    def posterior(x_t, picture, t):
        alpha, beta = a[t] / a[t - 1], 1 - a[t] / a[t - 1]
        return (math.sqrt(a[t - 1]) * beta * picture + math.sqrt(alpha) * (1 - a[t - 1]) * x_t) / (1 - a[t]), beta * (1 - a[t - 1]) / (1 - a[t])

    def model(x_t, t):      # at the last step a normal distribution too, of some width
        return (0.6 * x_t, 0.3) if t == 1 else posterior(x_t, 0.6 * x_t, t)
    x = [np.full(400000, x_0)]
    for t in (1, 2, 3):
        x.append(math.sqrt(a[t] / a[t - 1]) * x[-1] + math.sqrt(1 - a[t] / a[t - 1]) * rng.standard_normal(len(x[0])))
    forward = sum(log_normal(x[t], math.sqrt(a[t] / a[t - 1]) * x[t - 1], 1 - a[t] / a[t - 1]) for t in (1, 2, 3))
    backward = log_normal(x[3], 0, 1) + sum(log_normal(x[t - 1], *model(x[t], t)) for t in (1, 2, 3))
    whole = (forward - backward).mean()
    mean, variance = math.sqrt(a[3]) * x_0, 1 - a[3]
    parts = (mean ** 2 + variance - 1 - math.log(variance)) / 2 - log_normal(x[0], *model(x[1], 1)).mean()
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
    """Around (6.12): an error of v, weighted by min(1, 5 (1 - ᾱ)), is one of the picture, by min(SNR + 1, 5)."""
    a, snr = ALPHA_BAR[t], ALPHA_BAR[t] / (1 - ALPHA_BAR[t])
    x_t, v, w = 0.3, 1.1, 1.4
    picture = [sd.split_prediction("v_prediction", answer, x_t, a)[0] for answer in (v, w)]
    assert min(1, 5 * (1 - a)) * (v - w) ** 2 == pytest.approx(min(snr + 1, 5) * (picture[0] - picture[1]) ** 2)


def test_velocity():
    """(6.14), as a difference quotient."""
    x_0, eps, phi, h = 0.7, -1.2, 0.9, 1e-6
    a = math.cos(phi) ** 2
    slope = (sd.add_noise(x_0, math.cos(phi + h) ** 2, eps) - sd.add_noise(x_0, math.cos(phi - h) ** 2, eps)) / (2 * h)
    assert slope == pytest.approx(math.sqrt(a) * eps - math.sqrt(1 - a) * x_0)
    assert sd.split_prediction("v_prediction", slope, sd.add_noise(x_0, a, eps), a) == pytest.approx((x_0, eps))


@pytest.mark.parametrize("scale", [0, 1, 3, 7.5])
def test_guidance_is_the_slope_of_a_classifier(scale):
    """(6.16), (6.17), where p(x_t | c) is normal, p(x_t) the mean of two, and every slope a difference quotient."""
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
    assert sd.guide(uncond, cond, scale) == pytest.approx(-math.sqrt(1 - a) * sharpened, abs=1e-6)


def test_the_cloud_keeps_its_density():
    """(6.21), (6.22): points of x_0 + σ ε, moved along the ordinary differential equation, are distributed as those drawn at
    the lower σ; pictures are +1 or -1."""
    rng = np.random.default_rng(0)
    x_0, x = rng.choice([-1.0, 1.0], 20000), rng.standard_normal((2, 20000))
    high, low = x_0 + 3 * x[0], x_0 + 0.5 * x[1]
    for sigma, target in zip(*(lambda s: (s, s[1:]))(np.geomspace(3, 0.5, 300))):
        high = high + (target - sigma) * (high - np.tanh(high / sigma ** 2)) / sigma
    levels = [0.05, 0.2, 0.35, 0.65, 0.8, 0.95]
    assert np.quantile(high, levels) == pytest.approx(np.quantile(low, levels), abs=0.06)


def test_the_linear_part_is_exact():
    """(6.25): with x̂_0 = e^-λ the integral is h, whatever the step; against 20000 small steps of Euler."""
    lam, target = -1.0, 0.5
    x = start = 1.7
    grid = np.linspace(lam, target, 20001)
    for l, step in zip(grid, np.diff(grid)):
        x += step * (math.exp(-l) - x)          # dx̄/dλ = -σ ε̂ = x̂_0 - x̄
    assert x * math.exp(target) == pytest.approx(start * math.exp(lam) + target - lam, rel=1e-3)


def test_bfloat16_is_half_a_float32():
    """(7.2), with the words that torch writes."""
    values = torch.tensor([1.0, -2.5, 3.1e-20, 7.7e30, 0.1])
    words = values.bfloat16().view(torch.int16).numpy().view("<u2")
    decoded = (words.astype("<u4") << 16).view("<f4")
    assert np.array_equal(decoded, values.bfloat16().float().numpy())
    for word, value in zip(words.tolist(), decoded.tolist()):
        sign, exponent, fraction = word >> 15, word >> 7 & 255, (word & 127) << 16
        assert value == (-1) ** sign * 2.0 ** (exponent - 127) * (1 + fraction / 2 ** 23)


def test_every_grey_level_comes_back():
    """(8.1), there and back."""
    pixel = np.arange(256)
    y = pixel / 127.5 - 1
    assert np.array_equal((np.clip(y / 2 + 0.5, 0, 1) * 255).round(), pixel)


def test_what_noise_erases():
    """(8.3), against the integral."""
    a, one, other = 0.3, 0.9, -0.4
    x = np.linspace(-12, 12, 100001)
    p, q = (log_normal(x, math.sqrt(a) * mean, 1 - a) for mean in (one, other))
    assert (np.exp(p) * (p - q)).sum() * (x[1] - x[0]) == pytest.approx(a * (one - other) ** 2 / (2 * (1 - a)))
