"""TAESD, an autoencoder so small that a picture costs next to nothing; and any other VAE.

    python tiny_sd.py "a lighthouse in a storm" -m sd15 --vae taesd

Ollin Boer Bohan trained it to do what Stable Diffusion's VAE does, with layers in a row and without
norms and attention: https://github.com/madebyollin/taesd. read_vae() returns what formats.load()
puts in the place of a model's own VAE.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny_sd
from extras import formats
from extras.checks import (
    check_shapes,
    check_weights,
    checked_config,
    conv_shapes,
    first_five,
    nearest,
)
from extras.pickles import SUFFIXES, read_tensors
from tiny_sd import (
    UserError,
    array_like,
    conv2d,
    flatten,
    require,
    shorten,
    sigmoid,
    tell,
    upsample,
)

# ── What it computes ────────────────────────────────────────────────────────────────────────────
#
# A letter for each layer, in diffusers' order: C a convolution, c one without bias, s the same with
# stride 2, B a block, r a ReLU, u doubling.

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
    """Return what tiny_sd.vae_encode does: latents, which need no scale, and log 0 for variance."""
    require("encoder" in vae, "this VAE cannot read a picture to start from: put its encoder's "
                              "file beside its decoder's")
    layers = vae["encoder"]["layers"]
    mean = run_layers(array_like(layers[0]["bias"], picture) / 2 + 0.5, ENCODER, layers)
    return mean, 0 * mean - math.inf


def decode(z, vae, groups):
    """Return what tiny_sd.vae_decode does, of latents as the U-Net has them."""
    layers = vae["decoder"]["layers"]
    z = 6 * sigmoid(array_like(layers[0]["bias"], z) * (2 / 3)) - 3     # 3 tanh(z / 3)
    return 2 * run_layers(z, DECODER, layers) - 1


def tiny_shapes(letters, i, width, o):
    """Return the shapes of layers from i to o channels, with `width` between."""
    three = [conv_shapes(width, width), None] * 3
    bare = {"weight": (width, width, 3, 3)}
    inner = {"B": {"conv": three}, "s": bare, "c": bare, "C": None, "r": None, "u": None}
    layers = [inner[letter] for letter in letters]
    layers[0], layers[-1] = conv_shapes(i, width), conv_shapes(width, o)
    return {"layers": layers}


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────

HUB = {     # alias: repository on the hub, revision, licence; and the scale of the latents it knows
    "taesd": ("madebyollin/taesd", "main", "mit", 0.18215),
    "taesdxl": ("madebyollin/taesdxl", "main", "mit", 0.13025)}
WEIGHTS = "diffusion_pytorch_model"
TINY = {    # what the config of a TAESD may say
    "act_fn": "relu", "scaling_factor": 1, "shift_factor": 0, "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2, "in_channels": 3, "out_channels": 3}


@dataclass
class Vae:
    """What stands in for a model's own VAE; encode and decode are functions like tiny_sd's."""
    name: str
    settings: dict
    arrays: dict
    encode: Callable = tiny_sd.vae_encode
    decode: Callable = tiny_sd.vae_decode

    def in_place_of(self, own):
        """Return the settings to use instead of the config of a model's own VAE.

        Settings missing here are the model's own. UserError if it is for other latents.
        """
        settings = vars(own) | self.settings
        config, what = checked_config("vae", settings), f"the VAE {self.name}"
        ours, theirs = (f"{vae.latent_channels} numbers for "
                        f"{2 ** (len(vae.block_out_channels) - 1)} pixels" for vae in (config, own))
        require(ours == theirs, f"{what} is for another model: its latents have {ours}, and the "
                                f"model's {theirs}")
        scale = next((HUB[key][-1] for key in ("taesdxl", "taesd") if key in self.name), None)
        if scale and abs(scale / own.scaling_factor - 1) > 0.1:
            tell(f"{what} knows latents with a scale of {scale}, and the model's have "
                 f"{own.scaling_factor}: colours may be wrong")
        if self.decode is tiny_sd.vae_decode:
            divides = all(n % config.norm_num_groups == 0 for n in config.block_out_channels)
            require(divides, f"{what}: its channels do not divide into its norm_num_groups")
            check_weights("vae", self.arrays, config)
        return settings


def read_vae(name):
    """Return the Vae that a name in HUB, OWNER/NAME on the hub, a folder or a file stands for.

    A folder is one of diffusers, or has a vae/ in it; a file has weights under diffusers' names or
    the original ones, or one half of a TAESD, whose other half lies beside it.
    """
    path = Path(name) if Path(name).exists() else fetch(name)
    try:
        settings, arrays = read_folder(path) if path.is_dir() else ({}, read_file(path))
        if any(re.match(r"(en|de)coder\.layers\.", key) for key in arrays):
            return read_tiny(name, settings, arrays)
        return Vae(name, settings or formats.read_off_vae(arrays), arrays)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{name} is not a VAE: it has no {shorten(str(error))}") from None
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise UserError(f"{name} is not a VAE: {shorten(str(error))}") from None


def fetch(name):
    """Return the folder of a VAE on the hub, downloaded if the cache does not hold it."""
    repository, pin, licence, _ = HUB.get(name, (name, "main", None, None))
    file = Path(name).suffix in (".safetensors", *SUFFIXES)
    require(re.fullmatch(r"\w[\w.-]*/[\w.-]+", repository) and not file,
            f"there is no VAE {name}: no such file or folder{nearest(name, HUB)}")
    files = ["config.json", f"{WEIGHTS}.safetensors"]
    try:
        return formats.download(repository, pin, licence, lambda has: files)
    except Exception as error:      # of whatever kind the HTTP library below raises
        raise UserError(f"there is no VAE {name}: no such file or folder; {' and '.join(files)} of "
                        f"{repository} could not be fetched: {error}; or put these two files into "
                        "a folder, and name that with --vae") from None


def read_folder(folder):
    """Return the config and the arrays of a VAE's folder, or of the vae/ in it."""
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    files = [folder / f"{WEIGHTS}{end}.safetensors" for end in ("", ".fp16")]
    config = folder / "config.json"
    require(config.is_file() and any(map(Path.is_file, files)),
            f"{folder} is not a VAE's folder, with config.json and {files[0].name}")
    settings = {**json.loads(config.read_text(encoding="utf-8"))}
    return settings, read_file(next(filter(Path.is_file, files)))


def read_file(path):
    """Return the arrays of a VAE's file under the names that diffusers has today."""
    require(path.is_file(), f"{path} is neither a folder nor a file")
    arrays = read_tensors(path)
    if all(key[:1].isdigit() for key in arrays):
        return read_halves(path, arrays)
    within = {key.removeprefix("first_stage_model."): array for key, array in arrays.items()
              if key.startswith("first_stage_model.")}
    arrays = within or arrays
    if not any(key.startswith("decoder.up.") for key in arrays):
        return {tiny_sd.current_name(key): array for key, array in arrays.items()}
    file = {f"first_stage_model.{key}": array for key, array in arrays.items()}
    sorted_out, others = formats.sort_out(file, formats.FAMILIES[0])
    others = [key.removeprefix("first_stage_model.") for key in others]
    if others:
        tell(f"{path} holds more than a VAE, which is left out: {first_five(others)}")
    return sorted_out["vae"]


def read_halves(path, arrays):
    """Return the arrays of a TAESD in two files, this and the one beside it, by diffusers' names.

    There, the decoder's tanh is not counted as a layer.
    """
    side, other = "decoder", "encoder"
    if "0.weight" in arrays:
        side, other = other, side
    halves, found = {side: arrays}, {}
    beside = path.with_name(path.name.replace(side, other))
    if beside.is_file() and beside != path:
        halves[other] = read_tensors(beside)
    for side, arrays in halves.items():
        for key, array in arrays.items():
            number, _, rest = key.partition(".")
            found[f"{side}.layers.{int(number) - (side == 'decoder')}.{rest}"] = array
    return found


def read_tiny(name, settings, arrays):
    """Return the Vae of a TAESD, checked; its encoder may be missing."""
    for key, value in TINY.items():
        given = settings.get(key, value)
        require(given == value, f"{name}: the {key} {shorten(repr(given))} is not supported")
    require("decoder.layers.0.weight" in arrays, f"{name} has no decoder")
    width, z = arrays["decoder.layers.0.weight"].shape[:2]
    shapes = {"decoder": tiny_shapes(DECODER, z, width, 3)}
    if any(key.startswith("encoder.") for key in arrays):
        shapes["encoder"] = tiny_shapes(ENCODER, 3, width, z)
    check_shapes(f"the TAESD {name}", arrays, flatten(shapes))

    settings = {"block_out_channels": [width] * 4, "layers_per_block": 3, "latent_channels": z,
                "norm_num_groups": 1, "scaling_factor": 1.0}
    return Vae(name, settings, arrays, encode, decode)
