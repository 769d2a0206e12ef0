"""The two moons of NOTES §6: a small network for points in the plane, and the exact guess.

A "picture" is a point near one of two half circles. The network is an MLP, trained with the
lesson's diffusion_loss. Needs torch.
"""

import math

import numpy as np
import torch

import tiny_sd

ALPHA_BARS = tiny_sd.scaled_linear_schedule()


def two_moons(n, rng):
    """Return points (n, 2) near two half circles, and whether each is from the upper one (n,)."""
    angle, upper = math.pi * rng.random(n), rng.random(n) < 0.5
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points = np.where(upper[:, None], circle, [1, 0.5] - circle)
    return 1.4 * (points - [0.5, 0.25]) + 0.07 * rng.standard_normal((n, 2)), upper


def exact_denoiser(points):
    """Return denoise() for samplers, if these points (n, 2) are the only pictures.

    Its guess is their mean, each weighted by its probability given x_t, by Bayes' rule.
    """
    def denoise(x_t, t, alpha_bar):
        square = np.square(x_t[:, None] - alpha_bar ** 0.5 * points).sum(-1)    # (batch, n)
        x_0 = tiny_sd.softmax(-square / (2 * (1 - alpha_bar))) @ points
        return x_0, (x_t - alpha_bar ** 0.5 * x_0) / (1 - alpha_bar) ** 0.5
    return denoise


def new_layer(n_in, n_out, rng):
    """Return random weights of a linear layer that roughly preserves the variance."""
    weight = torch.from_numpy(rng.standard_normal((n_out, n_in), np.float32) / n_in ** 0.5)
    return {"weight": weight, "bias": torch.zeros(n_out)}


def new_network(rng, dim=2, width=128, depth=3):
    """Return the weights of network(), for points with dim coordinates."""
    return {"first": new_layer(dim + 32, width, rng), "last": new_layer(width, dim, rng),
            "blocks": [new_layer(width, width, rng) for _ in range(depth)]}


def network(x, t, first, blocks, last):
    """Predict the noise in x (batch, 1, 1, dim) at the times t (batch,)."""
    times = tiny_sd.array_like(x, tiny_sd.timestep_embedding(t, 32))[:, None, None]
    h = tiny_sd.linear(tiny_sd.concat(x, times), **first)           # (batch, 1, 1, width)
    for block in blocks:
        h = h + tiny_sd.linear(tiny_sd.silu(h), **block)
    return tiny_sd.linear(tiny_sd.silu(h), **last)


def train(weights, draw, steps, rng, batch_size=256):
    """Train the network in place; draw(n) returns pictures (n, dim). Yields each step's loss."""
    optimizer = torch.optim.Adam(tiny_sd.parameters(weights), lr=4e-3)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(steps):
        x_0 = torch.from_numpy(draw(batch_size)).float()[:, None, None]
        t = rng.integers(len(ALPHA_BARS), size=batch_size)
        alpha_bar = tiny_sd.array_like(x_0, ALPHA_BARS[t])[:, None, None, None]
        eps = tiny_sd.array_like(x_0, rng.standard_normal(x_0.shape))

        def predict(x_t, t=t):
            return network(x_t, t, **weights)
        loss = tiny_sd.diffusion_loss(predict, "epsilon", x_0, alpha_bar, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        yield loss.item()


def learnt_denoiser(weights):
    """Return denoise() for samplers, computed by the network."""
    @torch.no_grad()
    def denoise(x_t, t, alpha_bar):
        x = torch.from_numpy(x_t).float()[:, None, None]
        eps = network(x, np.full(len(x), t), **weights)[:, 0, 0].numpy()
        return tiny_sd.split_prediction("epsilon", eps, x_t, alpha_bar)
    return denoise
