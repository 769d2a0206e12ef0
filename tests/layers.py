"""The primitives and layers that test_layers.py and test_golden.py compute, at awkward sizes.

Here are our functions with their settings, and the shapes of their inputs; test_layers.py has the
references. No picture is square, and no batch has size one.
"""

import math
from functools import partial

import numpy as np

from helpers import sd

PICTURE, KERNEL = (3, 7, 5, 4), (6, 3, 3, 4)
QKV = [(3, 2, 5, 4), (3, 2, 9, 4), (3, 2, 9, 4)]


def conv(stride=1, padding=(1, 1)):
    return partial(sd.conv2d, stride=stride, padding=padding)


def norm(groups, eps):
    return lambda x, weight, bias: sd.group_norm(x, groups, eps, weight, bias)


def enlarge(height, width):
    return lambda x: sd.upsample(x, height, width)


PRIMITIVES = {  # our operation, and the shapes of the arrays that it is given
    "linear": (sd.linear, (3, 5, 7), (11, 7), (11,)),
    "linear, no bias": (sd.linear, (3, 5, 7), (11, 7)),
    "linear, a 1x1 convolution": (sd.linear, PICTURE, (6, 1, 1, 4), (6,)),
    "conv2d": (conv(), PICTURE, KERNEL, (6,)),
    "conv2d, no bias": (conv(), PICTURE, KERNEL),
    "conv2d, one row": (conv(), (2, 1, 9, 4), KERNEL, (6,)),
    "conv2d, 1x1": (conv(padding=(0, 0)), PICTURE, (6, 1, 1, 4), (6,)),
    "conv2d, 5x3": (conv(padding=(0, 0)), PICTURE, (2, 5, 3, 4), (2,)),
    "conv2d, stride 2, odd": (conv(2), PICTURE, KERNEL, (6,)),
    "conv2d, stride 2, even": (conv(2), (2, 6, 10, 4), KERNEL, (6,)),
    "conv2d, one-sided, odd": (conv(2, (0, 1)), PICTURE, KERNEL, (6,)),
    "conv2d, one-sided, even": (conv(2, (0, 1)), (2, 6, 10, 4), KERNEL, (6,)),
    "group_norm, 1": (norm(1, 1e-5), PICTURE, (4,), (4,)),
    "group_norm, 2": (norm(2, 1e-2), PICTURE, (4,), (4,)),
    "group_norm, 4": (norm(4, 1e-6), PICTURE, (4,), (4,)),
    "layer_norm": (sd.layer_norm, (3, 5, 7), (7,), (7,)),
    "layer_norm, eps": (partial(sd.layer_norm, delta=0.1), (3, 5, 7), (7,), (7,)),
    "sigmoid": (sd.sigmoid, PICTURE),
    "silu": (sd.silu, PICTURE),
    "gelu": (sd.gelu, PICTURE),
    "quick_gelu": (sd.quick_gelu, PICTURE),
    "softmax": (sd.softmax, (3, 2, 5, 7)),
    "attention": (sd.dot_product_attention, *QKV),
    "attention, causal": (partial(sd.dot_product_attention, causal=True), *[(3, 2, 7, 4)] * 3),
    "upsample, even": (enlarge(14, 10), PICTURE),
    "upsample, odd": (enlarge(13, 9), PICTURE),
    "upsample, odd height": (enlarge(13, 10), PICTURE),
    "upsample, one pixel": (enlarge(1, 2), (2, 1, 1, 4)),
    "concat": (sd.concat, PICTURE, (3, 7, 5, 2)),
}

TIME, WORDS, PLACES = (3, 20), (3, 6, 10), (3, 35, 8)
X, WIDE = (3, 7, 5, 8), (3, 7, 5, 12)
LARGE = (3, 13, 9, 8)       # what the way up must come back to


def down_block(x, *inputs, **weights):
    """One level down: what it returns, and the skips that it leaves."""
    skips = []
    return sd.down_block(x, skips, *inputs, n_head=2, groups=4, **weights), skips


def middle(x, *inputs, **weights):
    return down_block(x, *inputs, **weights)[0]


def up_block(x, skips, *inputs, **weights):
    """One level up; the first of the skips is the next level's: only its size matters."""
    return sd.up_block(x, [*skips], *inputs, n_head=2, groups=4, **weights)


def unet(x, t, context, **weights):
    """The U-Net with the time embedding that it expects."""
    temb = sd.time_mlp(x, t, **weights["time_embedding"])
    return sd.unet(x, temb, context, n_head=(2, 3, 4), groups=4, **weights)


def text_encoder(ids, embeddings, encoder, final_layer_norm):
    """The last state, normalised: what Stable Diffusion 1 takes."""
    states = sd.text_encoder(ids, 3, sd.quick_gelu, embeddings, **encoder)
    return sd.layer_norm(states[-1], **final_layer_norm)


LAYERS = {  # our layer with its settings, and its inputs or their shapes
    "resnet": (partial(sd.resnet, groups=4, delta=1e-5), X, TIME),
    "resnet, as wide as before": (partial(sd.resnet, groups=4, delta=1e-5), X, TIME),
    "resnet, timeless": (partial(sd.resnet, temb=None, groups=2, delta=1e-6), X),
    "attention": (partial(sd.attention, n_head=2), PLACES, WORDS),
    "self-attention": (lambda x, **p: sd.attention(x, x, 4, **p), PLACES),
    "vae_attention": (partial(sd.vae_attention, groups=4), X),
    "vae_block, middle": (partial(sd.vae_block, groups=4), X),
    "vae_block, down": (partial(sd.vae_block, groups=4), X),
    "vae_block, up": (partial(sd.vae_block, groups=4), X),
    "vae_encoder": (partial(sd.vae_encoder, groups=2), (2, 14, 11, 3)),
    "vae_decoder": (partial(sd.vae_decoder, groups=2), (2, 5, 3, 4)),
    "feed_forward": (sd.feed_forward, PLACES),
    "transformer_block": (partial(sd.transformer_block, n_head=2), PLACES, WORDS),
    "transformer": (partial(sd.transformer, n_head=2, groups=4), X, WORDS),
    "down_block": (down_block, X, TIME, WORDS),
    "down_block, wordless": (partial(down_block, context=None), X, TIME),
    "down_block, middle": (middle, X, TIME, WORDS),
    "up_block": (up_block, X, [LARGE, X, WIDE], TIME, WORDS),
    "up_block, wordless": (partial(up_block, context=None), X, [X, WIDE], TIME),
    "unet": (unet, (3, 11, 6, 4), np.array([0, 37.5, 999], np.float32), WORDS),
    "text_encoder": (text_encoder, np.arange(21).reshape(3, 7) * 17 % 50),
}


SAMPLERS = ["ddpm", "ddim", "euler", "euler_a", "dpm++2m", "plms", "lcm"]


def network(x, t):
    """A stand-in for the U-Net: a smooth function of x_t and t, the same in NumPy and torch."""
    return 0.9 * x + 0.2 * (x * x + t / 300) / (1 + x * x)


def noisy_picture():
    """Return the x_T (1, 6, 5, 4) that the samplers start from."""
    return np.random.RandomState(0).standard_normal((1, 6, 5, 4)).astype(np.float32)


def each(f, tree):
    """Return f of every array in nested mappings, lists and tuples."""
    if isinstance(tree, dict):
        return {key: each(f, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(each(f, value) for value in tree)
    return f(tree)


def leaves(tree):
    found = []
    each(found.append, tree)
    return [leaf for leaf in found if leaf is not None]


def primitive_inputs(name):
    """Return random inputs for a primitive."""
    _, *shapes = PRIMITIVES[name]
    rng = np.random.RandomState(0)      # the same numbers with every version of NumPy
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def layer_inputs(name):
    """Return the inputs of a layer, so small that its norms' eps shows: 1e-5 or 1e-6."""
    rng = np.random.RandomState(0)

    def draw(x):
        if isinstance(x, np.ndarray):
            return x
        if isinstance(x, list):
            return [draw(shape) for shape in x]
        return (0.1 * rng.standard_normal(x)).astype(np.float32)
    return list(map(draw, LAYERS[name][1:]))


def layer_weights(shapes):
    """Return random weights {name: array} in a checkpoint's layout, for {name: shape}."""
    rng = np.random.RandomState(1)

    def draw(name, shape):
        z = rng.standard_normal(shape)
        if len(shape) == 1:
            z = 0.2 * z + name.endswith("weight")
        else:
            z = z / math.sqrt(math.prod(shape[1:])) * (0.5 if len(shape) == 4 else 1)
        return z.astype(np.float32)
    return {name: draw(name, shape) for name, shape in shapes.items()}


def run(name, inputs, weights):
    """Apply our layer to the inputs, with weights in a checkpoint's layout."""
    last = {key: w.transpose(0, 2, 3, 1) if isinstance(w, np.ndarray) else w.permute(0, 2, 3, 1)
            for key, w in weights.items() if w.ndim == 4}
    return LAYERS[name][0](*inputs, **sd.nest(weights | last))


def assert_close(ours, theirs, rtol=1e-5):
    """Fail if an error exceeds rtol times the largest number, or shape or dtype differ."""
    for y, reference in zip(leaves(ours), leaves(theirs), strict=True):
        assert y.shape == reference.shape and str(y.dtype).endswith("float32")
        y, reference = np.asarray(y), np.asarray(reference)
        error = abs(y - reference).max() / max(abs(reference).max(), 1e-30)
        assert error <= rtol, f"an error of {error:.1e} of the largest number, not {rtol:.1e}"
