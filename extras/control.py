"""ControlNet: a second network that sees another picture and steers the U-Net (REFERENCE §9).

Zhang et al., 2023. It is a copy of the U-Net's way down, with a few convolutions in front for the
other picture, such as outlines, and a 1x1 convolution after each skip. Their outputs are added to
the U-Net's skips and middle. They started as zeros, so training started from the unchanged U-Net.
"""

import functools
import re
from pathlib import Path

import numpy as np

import tiny_sd
from extras.narrow import to_backend
from extras.singlefile import from_original_name
from extras.tensors import read_tensors
from tiny_sd import (
    UserError,
    array_like,
    conv2d,
    down_block,
    flatten,
    group_norm,
    linear,
    nest,
    require,
    shorten,
    silu,
    to_numpy,
    up_block,
)

COPIED = ("time_embedding", "add_embedding", "conv_in", "down_blocks", "mid_block")
WIDEST = 512        # channels of the layers that see the picture, at first at its full size
OWN = ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block")


@functools.lru_cache(4)
def read_control(path, n, backend="numpy", device="cpu", dtype="float32"):
    """Return the nested weights of a control network in a file or a diffusers folder.

    n: ResNet blocks a level of the U-Net's way up, by which the original names count.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "diffusion_pytorch_model.safetensors"
    require(file.is_file(), f"there is no control network {file}")
    arrays = read_tensors(file)
    start = "control_model."
    if any(name.startswith(start) for name in arrays):
        arrays = {from_original_name("unet", name.removeprefix(start), None, n): array
                  for name, array in arrays.items() if name.startswith(start)}
    require(all(any(name.startswith(own) for name in arrays) for own in OWN),
            f"{path} is not a control network")
    return nest({name: to_backend(array, backend, device, dtype)
                 for name, array in arrays.items()})


def without_attention(flat):
    """Return the items of {name: x}, of a way down, that a small control network has.

    diffusers' "DownBlock2D" and "UNetMidBlock2D": the middle is a single ResNet block then.
    """
    return {name: x for name, x in flat.items()
            if not re.search(r"\.attentions\.|mid_block\.resnets\.1\.", name)}


def check_control(path, weights, model):
    """UserError unless the network is complete and fits this model, as a copy of its way down."""
    def shapes(tree, parts):
        return {name: tuple(array.shape) for name, array in flatten(
            {part: tree[part] for part in parts if part in tree}).items()}
    ours, wanted = shapes(weights, COPIED + OWN[1:]), shapes(model.unet, COPIED)
    wanted.pop("time_embedding.cond_proj.weight", None)
    if not any(".attentions." in name for name in ours):
        wanted = without_attention(wanted)
    if model.inpaints:
        wanted["conv_in.weight"] = ours.get("conv_in.weight")
    for name, n in zeros(model.unet).items():
        wanted |= {f"{name}.weight": (n, 1, 1, n), f"{name}.bias": (n,)}
    wrong = next((name for name in wanted | ours if ours.get(name) != wanted.get(name)), None)
    require(wrong is None, f"{path} is a control network for another model than {model.name}: its "
            f"{wrong} is {ours.get(wrong)}, not {wanted.get(wrong)}")


def zeros(unet):
    """Return {name: channels} of the 1x1 convolutions, one for each skip and one for the middle."""
    layers = [unet["conv_in"]]
    for block in unet["down_blocks"]:
        layers += [resnet["conv2"] for resnet in block["resnets"]]
        layers += [layer["conv"] for layer in block.get("downsamplers", ())]
    channels = [len(layer["bias"]) for layer in layers]
    return {f"controlnet_down_blocks.{i}": n for i, n in enumerate(channels)} | {
        "controlnet_mid_block": channels[-1]}


def hint_features(picture, conv_in, blocks, conv_out):
    """Shrink the other picture (1, 8 h, 8 w, 3) in [0, 1] to (1, h, w, 320)."""
    h = silu(conv2d(picture, **conv_in))
    for i, block in enumerate(blocks):
        h = silu(conv2d(h, **block, stride=1 + i % 2))      # every second one halves the size
    return conv2d(h, **conv_out)


def way_down(x, temb, context, n_head, groups, down_blocks, mid_block=None):
    """Return the middle and the skips: the first half of tiny_sd.unet, after its conv_in."""
    skips = [x]
    for heads, block in zip(n_head, down_blocks):
        x = down_block(x, skips, temb, context, heads, groups, **block)
    if mid_block:
        x = down_block(x, [], temb, context, n_head[-1], groups, **mid_block)
    return x, skips


def residuals(weights, model, x, hint, t, context, pooled=None):
    """Return a network's residuals for the U-Net's middle and skips at x (batch, h, w, 4).

    hint: of hint_features; t: one time, or one of each picture.
    """
    config = model.config.unet
    embed_time = tiny_sd.embed_time_and_text if pooled is not None else tiny_sd.embed_time
    twin = tiny_sd.Model("", model.config, [], {}, weights, model.alpha_bars)
    temb = embed_time(twin, x, np.full(len(x), t), pooled)
    h = conv2d(x[..., :weights["conv_in"]["weight"].shape[-1]], **weights["conv_in"])
    middle, skips = way_down(h + hint, temb, context, config.n_head, config.norm_num_groups,
                             weights["down_blocks"], weights["mid_block"])
    return linear(middle, **weights["controlnet_mid_block"]), [
        linear(skip, **zero)
        for skip, zero in zip(skips, weights["controlnet_down_blocks"], strict=True)]


def steered(model, x, temb, context, added):
    """Like tiny_sd.unet, with the residuals of control networks added (9.20)."""
    unet, heads, size = model.unet, model.config.unet.n_head, model.config.unet.norm_num_groups
    h, skips = way_down(conv2d(x, **unet["conv_in"]), temb, context, heads, size,
                        unet["down_blocks"], unet.get("mid_block"))
    for middle, more in added:
        h, skips = h + middle, [skip + one for skip, one in zip(skips, more, strict=True)]

    for n, block in zip(reversed(heads), unet["up_blocks"]):
        h = up_block(h, skips, temb, context, n, size, **block)
    h = silu(group_norm(h, size, 1e-5, **unet["conv_norm_out"]))
    return conv2d(h, **unet["conv_out"])


class Control:
    """A control network and its picture (height, width, 3) of uint8.

    strength: a factor for its outputs. start, end: the part of the steps in which it acts, 0 to 1.
    """

    def __init__(self, model, weights, picture, strength=1.0, start=0.0, end=1.0):
        self.weights, self.strength, self.start, self.end = weights, strength, start, end
        self.now = strength
        pixels = array_like(weights["conv_in"]["bias"], picture[None] / 255)
        try:
            layers = weights["controlnet_cond_embedding"]
            require(all(len(p) <= WIDEST for p in flatten(layers).values()),
                    f"a layer has more than {WIDEST} channels")
            self.hint = hint_features(pixels, **layers)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError,
                ArithmeticError) as error:
            raise UserError("the control network's controlnet_cond_embedding is not whole: "
                            f"{shorten(str(error))}") from None
        h, w, _ = tiny_sd.latent_shape(model, *picture.shape[1::-1])
        wanted = 1, h, w, len(weights["conv_in"]["bias"])
        require(tuple(self.hint.shape) == wanted, "the control network's picture does not shrink "
                f"as the model's: to {tuple(self.hint.shape)}, not {wanted}")

    def count(self, step, n):
        """Note that step `step` of n is next, counted from 0."""
        inside = step / n >= self.start and (step + 1) / n <= self.end
        self.now = self.strength if inside else 0.0

    def added(self, model, x, t, context, pooled):
        """Return what to add to the U-Net's middle and skips at x (batch, h, w, 4), or None."""
        if not self.now:
            return None
        middle, skips = residuals(self.weights, model, x, self.hint, t, context, pooled)
        return self.now * middle, [self.now * skip for skip in skips]


def predict(controls, model, x, t, context, pooled=None, guidance=1.0):
    """Like tiny_sd.predict, but steered by control networks."""
    x = array_like(context, x)
    added = [control.added(model, x, t, context, pooled) for control in controls]
    temb = model.embed_time(model, x, np.full(len(x), t), pooled, guidance)
    return to_numpy(steered(model, x, temb, context, filter(None, added)))
