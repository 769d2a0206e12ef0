"""Weights that stay in their file, in the type that they have there: --low-memory."""

import gc

import numpy as np
import pytest

import tiny_sd
from extras import cli, drawing, fast, formats, like_diffusers, narrow


def bfloat16(array):
    """Return float32 numbers as bfloat16, kept as uint16, cut rather than rounded."""
    return (np.ascontiguousarray(array, "<f4").view("<u4") >> 16).astype("<u2")


def narrowed(array, kind):
    """Return an array as stored in a file, as Narrow, and its float32 values."""
    stored = bfloat16(array) if kind == "bfloat16" else array.astype(kind)
    return stored.view(narrow.Narrow), tiny_sd.widen(stored).astype(np.float32)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("form", ["formula", "fast"])
def test_a_narrow_weight_computes_as_a_wide_one(kind, form):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 17, 19, 32), np.float32)
    for name, shape in ("linear", (40, 32)), ("conv2d", (40, 3, 3, 32)):
        weight, wide = narrowed(rng.standard_normal(shape, np.float32), kind)
        operation = tiny_sd.FAST[name] if form == "fast" else getattr(tiny_sd, name).formula
        y = operation(x, weight)
        assert type(y) is np.ndarray and y.dtype == np.float32
        expected = operation(x, wide)       # BLAS may add up in another order, for another layout
        assert abs(y - expected).max() < 1e-6 * abs(expected).max()


def test_what_is_prepared_is_kept_unless_the_weight_is_fleeting_and_no_longer_than_it():
    def prepared():
        return len(fast.filters.known) + len(fast.transposed.known)

    gc.collect()        # or weights of earlier tests could go in the middle of this one
    known, x = prepared(), np.ones((1, 32, 32, 32), np.float32)
    for kind, more in (narrow.Fleeting, 0), (narrow.Narrow, 3):
        weight = np.ones((32, 3, 3, 32), np.float16).view(kind)
        matrix = np.ones((40, 32), np.float16).view(kind)
        fast.fast_conv2d(x, weight)
        fast.fast_conv2d(x, weight, stride=2)
        fast.blocked_linear(x, matrix)
        assert prepared() == known + more
    del weight, matrix
    assert prepared() == known


@pytest.mark.slow
def test_the_same_picture_from_weights_that_stay_in_their_file():
    pictures = []
    for low_memory in False, True:
        model = formats.load("emoji", low_memory=low_memory)
        *_, x = like_diffusers.generate(model, "a cat", steps=3)
        pictures.append(tiny_sd.decode(model, x).astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 1
    leaves = tiny_sd.flatten(model.unet).values()
    assert all(isinstance(leaf, narrow.Fleeting) for leaf in leaves if leaf.ndim > 1)
    assert len(model.files) == 3


@pytest.mark.parametrize("line, kept", [
    ("--steps 1", [False, False, False]), ("--steps 1 --cfg-scale 1 -b 5", [False, True, False]),
    ("--steps 4", [False, False, False]), ("--steps 5 --cfg-scale 1", [True, False, False]),
    ("--steps 5", [True, False, False]), ("--steps 20", [True, False, False])])
def test_a_weight_is_kept_only_where_it_is_used_often(line, kept):
    model = formats.load("emoji")
    args = cli.make_job(["a cat", *line.split()])
    narrow.keep_what_pays(model, drawing.passes_of([drawing.filled(model, args)]))
    networks = model.unet, model.vae, model.encoders[0].weights
    for network, stays in zip(networks, kept):
        kinds = {type(leaf) for leaf in tiny_sd.flatten(network).values() if leaf.ndim > 1}
        assert kinds == {narrow.Narrow if stays else narrow.Fleeting}


def test_fleeting_weights_are_prepared_once_for_both_halves_of_guidance(monkeypatch):
    model = formats.load("emoji", low_memory=True)
    context, _ = tiny_sd.embed_prompts(model, ["", "a cat"])
    x = np.random.default_rng(0).standard_normal((1, 16, 16, 4), np.float32)
    apart = tiny_sd.denoiser(model, context, 3.0)(x, 500, 0.3)
    asked = []
    monkeypatch.setattr(tiny_sd, "predict", lambda model, x, *rest, ask=tiny_sd.predict: (
        asked.append(len(x)), ask(model, x, *rest))[1])
    together = tiny_sd.FAST["denoiser"](model, context, 3.0)(x, 500, 0.3)
    assert asked == [2]
    for one, other in zip(together, apart):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_low_memory_is_for_numpy():
    with pytest.raises(tiny_sd.UserError, match="--low-memory"):
        cli.make_job(["a cat", "--low-memory", "--backend", "torch"])
