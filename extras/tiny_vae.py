"""TAESD, a tiny autoencoder that decodes almost for free.

    python tiny_sd.py "a lighthouse in a storm" -m sd15 --vae taesd

Ollin Boer Bohan trained it to imitate Stable Diffusion's VAE with a plain sequence of layers,
without norms or attention: https://github.com/madebyollin/taesd. formats.read_vae() reads it.
"""

import math
import re

from extras.checks import check_shapes
from extras.shapes import bare, conv
from tiny_sd import array_like, conv2d, flatten, require, shorten, sigmoid, upsample

# ── What it computes ────────────────────────────────────────────────────────────────────────────
#
# One letter per layer, in diffusers' order: C a convolution, c one without bias, s the same with
# stride 2, B a block, r a ReLU, u upsampling.

ENCODER = "CB" + "sBBB" * 3 + "C"
DECODER = "Cr" + "BBBuc" * 3 + "BC"


def block(x, conv):
    """Return relu(conv(relu(conv(relu(conv x)))) + x). x: (batch, height, width, 64)."""
    h = conv2d(x, **conv[0]).clip(0)
    h = conv2d(h, **conv[2]).clip(0)
    return (conv2d(h, **conv[4]) + x).clip(0)


def run_layers(x, letters, layers):
    """Run x, (batch, height, width, channels), through the layers."""
    for letter, weights in zip(letters, layers, strict=True):
        match letter:
            case "B":
                x = block(x, **weights)
            case "r":
                x = x.clip(0)
            case "u":
                x = upsample(x, 2 * x.shape[1], 2 * x.shape[2])
            case _:
                x = conv2d(x, **weights, stride=2 if letter == "s" else 1)
    return x


def encode(picture, vae, groups):
    """Like tiny_sd.vae_encode: return latents, which need no scale, and log variance -∞."""
    require("encoder" in vae, "this VAE cannot encode a start picture: put its encoder's file "
                              "next to its decoder's")
    layers = vae["encoder"]["layers"]
    mean = run_layers(array_like(layers[0]["bias"], picture) / 2 + 0.5, ENCODER, layers)
    return mean, 0 * mean - math.inf


def decode(z, vae, groups):
    """Like tiny_sd.vae_decode, for latents with the U-Net's scale."""
    layers = vae["decoder"]["layers"]
    z = 6 * sigmoid(array_like(layers[0]["bias"], z) * (2 / 3)) - 3     # 3 tanh(z / 3)
    return 2 * run_layers(z, DECODER, layers) - 1


def tiny_shapes(letters, i, width, o):
    """Return the shapes of layers from i to o channels, with `width` between."""
    three, narrow = [conv(width, width), None] * 3, bare(width, width, 3, 3)
    inner = {"B": {"conv": three}, "s": narrow, "c": narrow, "C": None, "r": None, "u": None}
    layers = [inner[letter] for letter in letters]
    layers[0], layers[-1] = conv(i, width), conv(width, o)
    return {"layers": layers}


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────

SCALES = {"taesdxl": 0.13025, "taesd": 0.18215}     # {name: scale of the latents it is for}
FIXED = {   # the only values supported in a TAESD's config
    "act_fn": "relu", "scaling_factor": 1, "shift_factor": 0, "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2, "in_channels": 3, "out_channels": 3}


def is_tiny(arrays):
    """Are these the arrays of a TAESD?"""
    return any(re.match(r"(en|de)coder\.layers\.", key) for key in arrays)


def joined(path, read):
    """Return the arrays of a VAE's file; for half of a TAESD, also those of the other half's file.

    A TAESD's arrays get diffusers' names. The original files count the decoder's tanh as a layer.
    """
    arrays = read(path)
    if not all(key[:1].isdigit() for key in arrays):
        return arrays
    side, other = ("encoder", "decoder") if "0.weight" in arrays else ("decoder", "encoder")
    halves, found = {side: arrays}, {}
    beside = path.with_name(path.name.replace(side, other))
    if beside.is_file() and beside != path:
        halves[other] = read(beside)
    for side, arrays in halves.items():
        for key, array in arrays.items():
            number, _, rest = key.partition(".")
            found[f"{side}.layers.{int(number) - (side == 'decoder')}.{rest}"] = array
    return found


def config_of(name, settings, arrays):
    """Check the arrays of a TAESD and return its config; the encoder may be missing."""
    for key, value in FIXED.items():
        given = settings.get(key, value)
        require(given == value, f"{name}: the {key} {shorten(repr(given))} is not supported")
    require("decoder.layers.0.weight" in arrays, f"{name} has no decoder")
    width, z = arrays["decoder.layers.0.weight"].shape[:2]
    shapes = {"decoder": tiny_shapes(DECODER, z, width, 3)}
    if any(key.startswith("encoder.") for key in arrays):
        shapes["encoder"] = tiny_shapes(ENCODER, 3, width, z)
    check_shapes(f"the TAESD {name}", arrays, flatten(shapes))

    return {"block_out_channels": [width] * 4, "layers_per_block": 3, "latent_channels": z,
            "norm_num_groups": 1, "scaling_factor": 1.0}
