"""Every primitive against torch's, every layer against that of diffusers or transformers.

The references compute in float64 with the same weights; ours in float32, by the formula, by what
NumPy has in its place, and on torch tensors. The first three tests show the principle; all the
rest is in the tables of layers.py and below.
"""

import functools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets import unet_2d_blocks as blocks
from transformers import CLIPTextConfig, CLIPTextModel

from conftest import ROOT
from helpers import random_arrays, sd
from layers import (
    LAYERS,
    PICTURE,
    PRIMITIVES,
    assert_close,
    each,
    layer_inputs,
    layer_weights,
    leaves,
    primitive_inputs,
    run,
)

partial = functools.partial


# ── Three tests as one would write them by hand ─────────────────────────────────────────────────


def test_linear_is_torchs():
    layer = torch.nn.Linear(7, 11)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    x = np.random.default_rng(0).standard_normal((3, 5, 7), np.float32)

    ours = sd.linear(x, weight, bias)

    np.testing.assert_allclose(ours, layer(torch.tensor(x)).detach(), atol=1e-5)


def test_resnet_is_that_of_diffusers():
    block = ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=20, groups=4, eps=1e-5)
    weights = {}    # {"norm1": {"weight": array, "bias": array}, "conv1": ...}
    for name, parameter in block.named_parameters():
        layer, leaf = name.split(".")
        array = parameter.detach().numpy()
        if array.ndim == 4:     # a convolution (out, in, kh, kw)
            array = array.transpose(0, 2, 3, 1)
        weights.setdefault(layer, {})[leaf] = array
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 7, 5, 8), np.float32)       # (batch, height, width, channels)
    temb = rng.standard_normal((3, 20), np.float32)

    ours = sd.resnet(x, temb, groups=4, delta=1e-5, **weights)

    theirs = block(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(temb)).detach()
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-5)


def test_attention_is_a_weighted_mean_of_values():
    """Each query of each head, by loops: its weights are softmax(q · k / √d) over the keys."""
    rng = np.random.default_rng(0)
    x, context = rng.standard_normal((5, 8)), rng.standard_normal((6, 10))
    to_q, to_k, to_v = rng.standard_normal((8, 8)), *rng.standard_normal((2, 8, 10))
    to_out, bias = rng.standard_normal((8, 8)), rng.standard_normal(8)

    ours = sd.attention(x[None], context[None], 2, {"weight": to_q}, {"weight": to_k},
                        {"weight": to_v}, [{"weight": to_out, "bias": bias}])

    for i, row in enumerate(x):
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            q = to_q[head] @ row
            keys = [to_k[head] @ word for word in context]
            values = [to_v[head] @ word for word in context]
            powers = [math.exp(q @ k / math.sqrt(4)) for k in keys]
            heads += [sum(p / sum(powers) * v for p, v in zip(powers, values))]
        expected = to_out @ np.concatenate(heads) + bias
        np.testing.assert_allclose(ours[0, i], expected, rtol=1e-9)


# ── What the tables below need ──────────────────────────────────────────────────────────────────


@pytest.fixture
def formulas(monkeypatch):
    """Every primitive by its formula, even if NumPy has a faster form."""
    monkeypatch.setattr(sd, "FAST", {})


@pytest.fixture(params=["formula", "numpy", "torch"])
def place(request):
    """place(array): a copy for one of the ways to compute."""
    if request.param == "formula":
        request.getfixturevalue("formulas")
    else:
        assert sd.FAST, "conftest.py imports extras.fast"
    return torch.tensor if request.param == "torch" else np.array


def channels_first(operation):
    """Make a function of torch's take and return pictures (and convolutions) channels last."""
    def move(*axes):
        return lambda a: a.permute(axes) if a.ndim == 4 else a
    return lambda *xs: each(move(0, 2, 3, 1), operation(*each(move(0, 3, 1, 2), xs)))


def in_float64(a):
    return torch.tensor(a, dtype=torch.float64 if a.dtype == np.float32 else None)


def assert_unchanged(now, before):
    assert all(np.array_equal(a, b) for a, b in zip(leaves(now), leaves(before), strict=True))


# ── Primitives ──────────────────────────────────────────────────────────────────────────────────


def conv(stride=1, padding=(1, 1)):
    return channels_first(lambda x, *p: F.conv2d(F.pad(x, padding * 2), *p, stride=stride))


def norm(groups, eps):
    return channels_first(lambda x, *p: F.group_norm(x, groups, *p, eps))


def enlarge(*size):
    return channels_first(lambda x: F.interpolate(x, size))


TORCHS = {  # the same as each primitive in layers.py
    "linear": F.linear,
    "linear, no bias": F.linear,
    "linear, a 1x1 convolution": channels_first(F.conv2d),
    "conv2d": conv(),
    "conv2d, no bias": conv(),
    "conv2d, one row": conv(),
    "conv2d, 1x1": conv(padding=(0, 0)),
    "conv2d, 5x3": conv(padding=(0, 0)),
    "conv2d, stride 2, odd": conv(2),
    "conv2d, stride 2, even": conv(2),
    "conv2d, one-sided, odd": conv(2, (0, 1)),
    "conv2d, one-sided, even": conv(2, (0, 1)),
    "group_norm, 1": norm(1, 1e-5),
    "group_norm, 2": norm(2, 1e-2),
    "group_norm, 4": norm(4, 1e-6),
    "layer_norm": lambda x, *p: F.layer_norm(x, (7,), *p),
    "layer_norm, eps": lambda x, *p: F.layer_norm(x, (7,), *p, 0.1),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "softmax": partial(F.softmax, dim=-1),
    "attention": F.scaled_dot_product_attention,
    "attention, causal": partial(F.scaled_dot_product_attention, is_causal=True),
    "upsample, even": enlarge(14, 10),
    "upsample, odd": enlarge(13, 9),
    "upsample, odd height": enlarge(13, 10),
    "upsample, one pixel": enlarge(1, 2),
    "concat": lambda *xs: torch.cat(xs, -1),
}


def primitive_reference(name):
    """Return what torch makes of a primitive's inputs, in float64."""
    return TORCHS[name](*each(in_float64, primitive_inputs(name)))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(name, place):
    ours, *_ = PRIMITIVES[name]
    arrays = primitive_inputs(name)
    inputs = each(place, arrays)
    assert_close(ours(*inputs), primitive_reference(name))
    assert_unchanged(inputs, arrays)


def test_conv2d_is_a_sum_over_places(place):
    """In plain loops, without any library's convolution."""
    shapes = {"x": (2, 7, 5, 4), "w": (6, 3, 3, 4), "bias": (6,)}
    x, weight, bias = random_arrays(shapes).values()
    padded, y = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]), np.zeros((2, 4, 3, 6)) + bias
    for i, j, u, v in np.ndindex(4, 3, 3, 3):
        y[:, i, j] += padded[:, 2 * i + u, 2 * j + v] @ weight[:, u, v].T
    assert_close(sd.conv2d(*each(place, [x, weight, bias]), stride=2), y)


def test_gelu_is_exact(place):
    """To 1e-6 of its definition by erf; the form with tanh is 4.7e-4 off."""
    x = np.linspace(-6, 6, 2001, dtype=np.float32)
    exact = [t * (1 + math.erf(t / math.sqrt(2))) / 2 for t in x.tolist()]
    np.testing.assert_allclose(sd.gelu(place(x)), exact, rtol=0, atol=1e-6)


LIMITS = {  # the operation, the numbers, and what they become
    "sigmoid": (sd.sigmoid, [-1e4, -100, 0, 100, 1e4], [0, 0, 0.5, 1, 1]),
    "silu": (sd.silu, [-1e4, -200, 0, 200, 1e4], [0, 0, 0, 200, 1e4]),
    "gelu": (sd.gelu, [-1e4, -200, 0, 200, 1e4], [0, 0, 0, 200, 1e4]),
    "quick_gelu": (sd.quick_gelu, [-1e4, -200, 0, 200, 1e4], [0, 0, 0, 200, 1e4]),
    "softmax": (sd.softmax, [[1e4, 0, -1e4], [-1e4, -2e4, -1e4]], [[1, 0, 0], [0.5, 0, 0.5]]),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.filterwarnings("error")
def test_large_numbers(name, place):
    operation, x, limit = LIMITS[name]
    np.testing.assert_allclose(operation(place(np.float32(x))), limit, atol=1e-30)


@pytest.mark.filterwarnings("error")
def test_attention_with_large_scores_copies_the_value_of_the_best_key(place):
    order = [3, 1, 4, 0, 2]
    q = 1e3 * np.eye(5, dtype=np.float32)[None, None]
    v = np.arange(15, dtype=np.float32).reshape(1, 1, 5, 3)
    qkv = each(place, [q, q[:, :, order], v[:, :, order]])
    assert_close(sd.dot_product_attention(*qkv), v)


def test_a_word_sees_no_later_word(place):
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 3, 7, 4), np.float32)
    later = np.arange(7)[:, None] >= 4
    before, after = (np.asarray(sd.dot_product_attention(*each(place, qkv), causal=True))
                     for qkv in ([q, k, v], [q, k + later, v + later]))
    assert_close(after[:, :, :4], before[:, :, :4])
    assert (abs(after - before)[:, :, 4:] > 1e-3).all()


@pytest.mark.parametrize("place", ["formula", "numpy"], indirect=True)
def test_group_norm_far_from_zero(place):
    """If the mean is 500 standard deviations, E[x²] - E[x]² loses all precision: see torch."""
    x, weight, bias = random_arrays({"x": PICTURE, "weight": (4,), "bias": (4,)}).values()
    given = [500 + x, weight, bias]
    x, weight, bias = each(place, given)
    ours = sd.group_norm(x, 2, 1e-5, weight, bias)
    assert_close(ours, norm(2, 1e-5)(*each(in_float64, given)), 2e-3)


def test_timestep_embedding(place):
    """Cosines first. At t = 999 a phase of diffusers' float32 is itself uncertain by 3e-5."""
    t = np.array([0, 1, 37.5, 999], np.float32)
    ours = sd.timestep_embedding(place(t), 20)
    theirs = get_timestep_embedding(torch.tensor(t), 20, flip_sin_to_cos=True,
                                    downscale_freq_shift=0)
    assert_close(ours.astype(np.float32), theirs, 1e-4)

    angles = [[time * 10000 ** (-i / 10) for i in range(10)] for time in t.tolist()]
    exact = [[*map(math.cos, row), *map(math.sin, row)] for row in angles]
    np.testing.assert_allclose(ours, exact, atol=1e-9)


# ── Layers ──────────────────────────────────────────────────────────────────────────────────────


TIMED = dict(temb_channels=20, resnet_eps=1e-5, resnet_groups=4)
WORDED = dict(TIMED, num_attention_heads=2, cross_attention_dim=10)
VAE = dict(block_out_channels=(4, 8, 12), layers_per_block=2, norm_num_groups=2)
UNET = dict(block_out_channels=(8, 12, 16), layers_per_block=2, cross_attention_dim=10,
            attention_head_dim=(2, 3, 4), norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))
TEXT = dict(vocab_size=50, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
            num_attention_heads=3, max_position_embeddings=9)


MODULES = {     # the same as each layer in layers.py
    "resnet": ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=20, groups=4, eps=1e-5),
    "resnet, as wide as before": ResnetBlock2D(in_channels=8, temb_channels=20, groups=4, eps=1e-5),
    "resnet, timeless": ResnetBlock2D(
        in_channels=8, out_channels=6, temb_channels=None, groups=2, eps=1e-6),
    "attention": Attention(8, 10, heads=2, dim_head=4),
    "self-attention": Attention(8, heads=4, dim_head=2),
    "vae_attention": Attention(
        8, heads=1, dim_head=8, norm_num_groups=4, eps=1e-6, bias=True, residual_connection=True),
    "vae_block, middle": blocks.UNetMidBlock2D(8, None, resnet_groups=4, attention_head_dim=8),
    "vae_block, down": blocks.DownEncoderBlock2D(
        8, 12, num_layers=2, resnet_groups=4, downsample_padding=0),
    "vae_block, up": blocks.UpDecoderBlock2D(8, 12, num_layers=2, resnet_groups=4),
    "vae_encoder": Encoder(3, 4, ("DownEncoderBlock2D",) * 3, **VAE),
    "vae_decoder": Decoder(4, 3, ("UpDecoderBlock2D",) * 3, **VAE),
    "feed_forward": FeedForward(8, activation_fn="geglu"),
    "transformer_block": BasicTransformerBlock(8, 2, 4, cross_attention_dim=10),
    "transformer": Transformer2DModel(2, 4, 8, norm_num_groups=4, cross_attention_dim=10),
    "down_block": blocks.CrossAttnDownBlock2D(8, 12, num_layers=2, **WORDED),
    "down_block, wordless": blocks.DownBlock2D(
        8, 12, num_layers=2, add_downsample=False, **TIMED),
    "down_block, middle": blocks.UNetMidBlock2DCrossAttn(8, **WORDED),
    "up_block": blocks.CrossAttnUpBlock2D(8, 12, 8, num_layers=2, **WORDED),
    "up_block, wordless": blocks.UpBlock2D(8, 8, 12, num_layers=2, add_upsample=False, **TIMED),
    "unet": UNet2DConditionModel(**UNET),
    "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
}
CALLS = {       # where one does not just call it with the inputs
    "resnet, timeless": lambda block, x: block(x, None),
    "transformer_block": lambda block, x, words: block(x, None, words),
    "transformer": lambda block, *inputs: block(*inputs, return_dict=False)[0],
    "up_block": lambda block, x, skips, *inputs: block(
        x, skips, *inputs, upsample_size=skips[0].shape[2:]),
    "unet": lambda unet, *inputs: unet(*inputs).sample,
    "text_encoder": lambda clip, ids: clip(ids).last_hidden_state,
}


def layer_shapes(name):
    """Return {name: shape} of a layer's weights in diffusers."""
    return {key: tuple(p.shape) for key, p in MODULES[name].named_parameters()}


@functools.cache
def setting(name):
    """Return random inputs and weights {name: array} of a layer."""
    return layer_inputs(name), layer_weights(layer_shapes(name))


@torch.no_grad()
def layer_reference(name):
    """Apply diffusers' layer to the inputs, in float64."""
    module, (inputs, weights) = MODULES[name], setting(name)
    module.double().load_state_dict(each(torch.tensor, weights), strict=False)
    call = partial(CALLS[name], module) if name in CALLS else module
    return channels_first(call)(*each(in_float64, inputs))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layer(name, place):
    inputs, weights = given = each(place, setting(name))
    assert_close(run(name, inputs, weights), layer_reference(name))
    assert_unchanged(given, setting(name))


FAILING = """
import numpy as np
from layers import assert_close
def test():
    assert_close(np.zeros((9, 99), np.float32), np.ones((9, 99)))
"""


@pytest.mark.slow
def test_a_layer_that_fails_says_so_in_few_lines(tmp_path):
    (tmp_path / "test_it.py").write_text(FAILING)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "-p",
         "no:cacheprovider", tmp_path / "test_it.py"], capture_output=True, text=True)
    assert "AssertionError: an error of 1.0e+00 of the largest number, not 1.0e-05" in done.stdout
    assert done.returncode == 1 and len(done.stdout.splitlines()) < 20, done.stdout


# all but the unet, which is made of the others
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "unet"])
def test_a_missing_or_unknown_weight_is_an_error_that_names_it(name):
    inputs, weights = setting(name)
    for key in weights:
        owner, _, leaf = key.rpartition(".")
        if "_embedding." not in key:                            # a table, not a layer
            with pytest.raises(TypeError, match="surplus"):
                run(name, inputs, weights | {f"{owner}.surplus": weights[key]})
        if leaf == "weight":                # a bias may be absent, as attention's are
            rest = {other: weights[other] for other in weights if other != key}
            with pytest.raises((TypeError, KeyError), match=f"weight|{owner.rpartition('.')[2]}"):
                run(name, inputs, rest)


@pytest.mark.parametrize("name", ["resnet", "attention", "transformer", "vae_block, down",
                                  "vae_decoder", "unet"])
def test_autograd_is_the_slope_of_numpy(name, formulas):
    """Through all inputs and weights at once, along a random direction, in float64.

    Except the U-Net's times, which are integers and not differentiable.
    """
    inputs, weights = setting(name)
    times = inputs[1:2] if name == "unet" else []
    learnt = inputs[:1] + inputs[1 + len(times):]
    point = [a.astype(np.float64) for a in [*learnt, *weights.values()]]
    rng = np.random.default_rng(1)
    direction = [rng.standard_normal(a.shape) for a in point]

    def loss(point):
        x, *rest = point[:len(learnt)]
        y = run(name, [x, *times, *rest], dict(zip(weights, point[len(learnt):])))
        return (y * y).sum()

    above, below = (loss([a + h * d for a, d in zip(point, direction)]) for h in (1e-6, -1e-6))
    tensors = [torch.tensor(a, requires_grad=True) for a in point]
    gradients = torch.autograd.grad(loss(tensors), tensors)
    along = sum((g.numpy() * d).sum() for g, d in zip(gradients, direction))
    assert along == pytest.approx((above - below) / 2e-6, rel=1e-5)
