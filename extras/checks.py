"""Check a model before it is used: its configs, the shapes of its weights, and the memory at hand.

Whatever is wrong raises tiny_sd.UserError, a line that names it.
"""

import contextlib
import difflib
import math
import re
from pathlib import Path

from extras.samplers import SCHEDULERS
from tiny_sd import (
    ACTIVATIONS,
    CONFIG_DEFAULTS,
    flatten,
    read_config,
    require,
    scaled_linear_schedule,
    shorten,
)

# ── Configs ─────────────────────────────────────────────────────────────────────────────────────
#
# What each field may say: range(...) is a whole number in it; (low, high) a number from low to
# high; {...} one of these; [...] a list of 1 to 8 such values; str a text.

WIDTH, COUNT, HEADS = range(1, 2 ** 14), range(1, 17), range(1, 1000)
CONFIG_FIELDS = {
    "text_encoder": {
        "vocab_size": range(1, 10 ** 7), "hidden_size": WIDTH, "num_attention_heads": HEADS,
        "intermediate_size": range(1, 2 ** 16), "num_hidden_layers": range(1, 100),
        "max_position_embeddings": range(3, 10 ** 5), "hidden_act": {*ACTIVATIONS}},
    "vae": {
        "block_out_channels": [WIDTH], "layers_per_block": COUNT, "latent_channels": range(1, 65),
        "in_channels": {3}, "out_channels": {3}, "norm_num_groups": WIDTH,
        "scaling_factor": (1e-9, 1e9)},
    "unet": {
        "block_out_channels": [WIDTH], "layers_per_block": COUNT, "sample_size": range(1, 4096),
        "in_channels": range(1, 256), "out_channels": range(1, 256), "cross_attention_dim": WIDTH,
        "norm_num_groups": WIDTH, "n_head": [HEADS],
        "down_block_types": [{"DownBlock2D", "CrossAttnDownBlock2D"}],
        "up_block_types": [{"UpBlock2D", "CrossAttnUpBlock2D"}],
        "mid_block_type": {"UNetMidBlock2DCrossAttn", None},
        "time_cond_proj_dim": {None, *range(4, 2049)},
        "transformer_layers_per_block": [COUNT], "addition_embed_type": {None, "text_time"},
        "addition_time_embed_dim": {None, *range(2, 2049, 2)},
        "projection_class_embeddings_input_dim": {None, *range(1, 2 ** 15)}},
    "scheduler": {
        "_class_name": str, "num_train_timesteps": range(2, 10 ** 5), "beta_start": (1e-9, 0.999),
        "beta_end": (1e-9, 0.999), "beta_schedule": {"scaled_linear"},
        "prediction_type": {"epsilon", "v_prediction", "sample"},
        "timestep_spacing": {None, "leading", "trailing", "linspace"}, "steps_offset": range(1000),
        "set_alpha_to_one": {None, True, False}, "use_karras_sigmas": {None, True, False},
        "_guidance_scale": (0, 100)}}
CONFIG_FIELDS["text_encoder_2"] = CONFIG_FIELDS["text_encoder"] | {"projection_dim": WIDTH}
MAY_LACK = {    # what a config may leave out besides tiny_sd.CONFIG_DEFAULTS
    "vae": {"in_channels": 3, "out_channels": 3},
    "unet": {"addition_embed_type": None, "projection_class_embeddings_input_dim": None}}

FIXED = {   # fields that tiny_sd.py does not read, since its formulas have one value for them
    "text_encoder": {"layer_norm_eps": 1e-5},
    "vae": {"act_fn": "silu", "mid_block_add_attention": True, "shift_factor": None,
            "latents_mean": None, "latents_std": None, "use_quant_conv": True,
            "use_post_quant_conv": True},
    "unet": {"act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
             "resnet_time_scale_shift": "default", "only_cross_attention": False,
             "center_input_sample": False, "dual_cross_attention": False, "class_embed_type": None,
             "encoder_hid_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
             "downsample_padding": 1, "mid_block_scale_factor": 1,
             "reverse_transformer_layers_per_block": None, "time_embedding_type": "positional"},
    "scheduler": {"rescale_betas_zero_snr": False, "trained_betas": None, "thresholding": False,
                  "clip_sample": False, "algorithm_type": "dpmsolver++", "solver_order": 2,
                  "solver_type": "midpoint", "final_sigmas_type": "zero",
                  "interpolation_type": "linear", "use_exponential_sigmas": False,
                  "use_beta_sigmas": False, "use_lu_lambdas": False, "use_flow_sigmas": False}}
FIXED["text_encoder_2"] = FIXED["text_encoder"]


def allows(allowed, value):
    """Is the value one that a field of CONFIG_FIELDS allows?"""
    if isinstance(allowed, list):
        return isinstance(value, list) and 1 <= len(value) <= 8 and all(
            allows(allowed[0], v) for v in value)
    if isinstance(allowed, tuple):
        return type(value) in (int, float) and allowed[0] <= value <= allowed[1]
    if isinstance(allowed, set):
        same = [v for v in allowed if not isinstance(value, (list, dict)) and v == value]
        return any(type(v) is type(value) for v in same)
    if allowed is str:
        return isinstance(value, str)
    return type(value) is int and value in allowed


def checked_config(part, settings):
    """Return the record of a part's config, with every field's type and range checked."""
    settings = CONFIG_DEFAULTS[part] | MAY_LACK.get(part, {}) | settings
    if settings.get("_class_name") is None and part == "scheduler":
        settings["_class_name"] = ""
    for name, value in FIXED[part].items():
        given = settings.get(name, value)
        levels = [value] * len(given) if isinstance(given, list) else None
        require(part == "scheduler" or given in (value, None) or given and given == levels,
                f"the {part}'s {name} {shorten(repr(given))} is not supported")
    levels = settings.get("block_out_channels")
    if part in ("unet", "vae"):
        require(allows([WIDTH], levels),
                f"the {part}'s block_out_channels cannot be {shorten(repr(levels))}")
    config = read_config(part, settings)
    if part == "unet":
        config.transformer_layers_per_block = depths(config)
    for name, allowed in CONFIG_FIELDS[part].items():
        require(hasattr(config, name), f"the {part}'s config has no {name}")
        value = getattr(config, name)
        require(allows(allowed, value), f"the {part}'s {name} cannot be {shorten(repr(value))}")
    return config


def replaced_settings(settings):
    """Return a line for each setting of a scheduler's config that is not followed here."""
    scheduler, lines = settings["scheduler"], []
    for name, value in FIXED["scheduler"].items():
        given = scheduler.get(name, value)
        if given not in (value, None):
            lines.append(f"the scheduler's {name} is {value!r} here, not {shorten(repr(given))}")
    kind = scheduler.get("_class_name") or ""
    if kind and kind not in SCHEDULERS:
        lines.append(f"the scheduler {shorten(kind)} is not known here: dpm++2m draws instead")
    return lines


def nearest(word, known):
    """Return "; did you mean ...?" if one of the known words is like this one."""
    found = [other for other in known if other.strip("-") == word.strip("-")]       # --W: -W
    found = found or difflib.get_close_matches(word[:60].lower(), list(known), 1, 0.79)
    return f"; did you mean {found[0]}?" if found else ""


def check_configs(settings, tokenizers):
    """Check each part's config, and that the parts fit each other."""
    config = {part: checked_config(part, settings[part]) for part in settings}
    vae, unet, scheduler = (config[part] for part in ("vae", "unet", "scheduler"))

    def divides(widths, parts):
        return len(widths) == len(parts) and all(w % n == 0 for w, n in zip(widths, parts))

    for name, part in (("vae", vae), ("unet", unet)):
        groups = [part.norm_num_groups] * len(part.block_out_channels)
        require(divides(part.block_out_channels, groups),
                f"the {name}'s channels do not divide into its norm_num_groups")
    require(divides(unet.block_out_channels, unet.n_head),
            "the unet's channels do not divide into its heads")
    for side in (unet.down_block_types, unet.up_block_types, unet.transformer_layers_per_block):
        require(len(side) == len(unet.block_out_channels), "the unet's block types, or its "
                "transformer_layers_per_block, are not as many as its block_out_channels")
    z = vae.latent_channels
    require(unet.out_channels == z,
            f"the unet gives {unet.out_channels} channels, the vae takes {z}")
    require(unet.in_channels in (z, 2 * z + 1), f"a unet with {unet.in_channels} input channels is "
            f"not supported, but {z}, or {2 * z + 1} for inpainting")
    require(scheduler.beta_start <= scheduler.beta_end, "the scheduler's beta_end is below its "
                                                        "beta_start")
    levels = scaled_linear_schedule(scheduler.num_train_timesteps, scheduler.beta_start,
                                    scheduler.beta_end)
    require(levels[-1] > 1e-8, "the scheduler's betas leave nothing of a picture: beta_end "
                               f"{scheduler.beta_end} is too large")
    check_text_encoders(config, tokenizers)
    return config


def check_text_encoders(config, tokenizers):
    """Check that the text encoders, one or two, fit their tokenizers and the U-Net."""
    texts = {part: config[part] for part in config if part.startswith("text_encoder")}
    for (part, text), tokenizer in zip(texts.items(), tokenizers, strict=True):
        require(text.hidden_size % text.num_attention_heads == 0,
                f"the {part}'s hidden_size does not divide into its num_attention_heads")
        require(all(allows(range(text.vocab_size), i) for i in tokenizer.vocab.values()), "the "
                f"tokenizer's vocabulary is not one of numbers below the {part}'s vocab_size")
        limit, length = text.max_position_embeddings, tokenizer.length
        require(allows(range(3, limit + 1), length) or allows((10 ** 6, math.inf), length),
                f"the {part} has no room for the tokenizer's {shorten(repr(length))} tokens")
        require((limit, length) == (texts["text_encoder"].max_position_embeddings,
                                    tokenizers[0].length), "the text encoders do not take equally "
                                                           "many tokens")

    unet, widths = config["unet"], [text.hidden_size for text in texts.values()]
    given = " + ".join(map(str, widths))
    require(unet.cross_attention_dim == sum(widths),
            f"the unet attends to words of {unet.cross_attention_dim} numbers "
            f"(cross_attention_dim), and those of the {' and '.join(texts)} have {given}")
    check_added_conditions(unet, config.get("text_encoder_2"))


def check_added_conditions(unet, second):
    """Check that the U-Net takes pooled text and sizes if and only if a second encoder gives it."""
    size = unet.addition_time_embed_dim
    added = unet.addition_embed_type, bool(size), unet.projection_class_embeddings_input_dim
    if second is None:
        require(added == (None, False, None), "the unet expects an added condition "
                "(addition_embed_type), and there is no text_encoder_2 to give it")
        return
    width = second.projection_dim + 6 * (size or 0)
    require(added == ("text_time", True, width), "with this text_encoder_2, the unet needs "
            f"addition_embed_type \"text_time\" and projection_class_embeddings_input_dim {width}")
    require(not unet.time_cond_proj_dim, "a unet with both added text and an embedded guidance "
                                         "scale (time_cond_proj_dim) is not supported")


# ── Shapes ──────────────────────────────────────────────────────────────────────────────────────
#
# The shapes of each network as a checkpoint holds them: what a file must contain, no more and no
# less. A name in a file is the path to the array: down_blocks.0.resnets.1.conv1.weight.


def norm_shapes(n):
    """Return the shapes of a normalisation of n channels."""
    return {"weight": (n,), "bias": (n,)}


def linear_shapes(i, o):
    """Return the shapes of a linear layer from i to o numbers."""
    return {"weight": (o, i), "bias": (o,)}


def bare_shapes(i, o):
    """Return the shapes of a linear layer without bias."""
    return {"weight": (o, i)}


def conv_shapes(i, o, size=3):
    """Return the shapes of a convolution from i to o channels."""
    return {"weight": (o, i, size, size), "bias": (o,)}


def resnet_shapes(i, o, temb=None):
    """Return the shapes of a ResBlock; temb: width of the time embedding, None in the VAE."""
    shapes = {"norm1": norm_shapes(i), "conv1": conv_shapes(i, o),
              "norm2": norm_shapes(o), "conv2": conv_shapes(o, o)}
    if temb:
        shapes["time_emb_proj"] = linear_shapes(temb, o)
    if i != o:
        shapes["conv_shortcut"] = conv_shapes(i, o, 1)
    return shapes


def attention_shapes(width, context, project=bare_shapes):
    """Return the shapes of attention: queries of `width` channels, keys and values of context."""
    return {"to_q": project(width, width), "to_k": project(context, width),
            "to_v": project(context, width), "to_out": [linear_shapes(width, width)]}


def transformer_shapes(width, context, depth=1):
    """Return the shapes of a transformer of `width` channels and words of `context` numbers.

    depth: how many blocks it has.
    """
    feed_forward = [{"proj": linear_shapes(width, 8 * width)}, None,
                    linear_shapes(4 * width, width)]
    block = {"norm1": norm_shapes(width), "attn1": attention_shapes(width, width),
             "norm2": norm_shapes(width), "attn2": attention_shapes(width, context),
             "norm3": norm_shapes(width), "ff": {"net": feed_forward}}
    return {"norm": norm_shapes(width), "proj_in": conv_shapes(width, width, 1),
            "transformer_blocks": [block] * depth, "proj_out": conv_shapes(width, width, 1)}


def text_shapes(config):
    """Return the shapes of the text encoder with this config."""
    width, wide = config.hidden_size, config.intermediate_size
    layer = {"layer_norm1": norm_shapes(width), "layer_norm2": norm_shapes(width),
             "self_attn": {f"{name}_proj": linear_shapes(width, width)
                           for name in ("q", "k", "v", "out")},
             "mlp": {"fc1": linear_shapes(width, wide), "fc2": linear_shapes(wide, width)}}
    embeddings = {"token_embedding": bare_shapes(width, config.vocab_size),
                  "position_embedding": bare_shapes(width, config.max_position_embeddings)}
    return {"embeddings": embeddings, "encoder": {"layers": [layer] * config.num_hidden_layers},
            "final_layer_norm": norm_shapes(width)}


def projected_text_shapes(config):
    """Return the shapes of a second text encoder, which has a projection at its end."""
    projection = bare_shapes(config.hidden_size, config.projection_dim)
    return text_shapes(config) | {"text_projection": projection}


def vae_shapes(config):
    """Return the shapes of the VAE with this config."""
    widths, n, z = config.block_out_channels, config.layers_per_block, config.latent_channels
    top = widths[-1]
    middle = {"resnets": [resnet_shapes(top, top)] * 2, "attentions": [
        {"group_norm": norm_shapes(top), **attention_shapes(top, top, linear_shapes)}]}

    def levels(widths, n, resample):
        blocks = []
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths)):
            inputs = [before] + [width] * (n - 1)
            block = {"resnets": [resnet_shapes(width_in, width) for width_in in inputs]}
            if i < len(widths) - 1:
                block[resample] = [{"conv": conv_shapes(width, width)}]
            blocks.append(block)
        return blocks

    return {"encoder": {"conv_in": conv_shapes(3, widths[0]),
                        "down_blocks": levels(widths, n, "downsamplers"), "mid_block": middle,
                        "conv_norm_out": norm_shapes(top), "conv_out": conv_shapes(top, 2 * z)},
            "quant_conv": conv_shapes(2 * z, 2 * z, 1), "post_quant_conv": conv_shapes(z, z, 1),
            "decoder": {"conv_in": conv_shapes(z, top), "mid_block": middle,
                        "up_blocks": levels(widths[::-1], n + 1, "upsamplers"),
                        "conv_norm_out": norm_shapes(widths[0]),
                        "conv_out": conv_shapes(widths[0], 3)}}


def depths(config):
    """Return how many blocks the transformers of each level of a U-Net have, from the top."""
    depth = config.transformer_layers_per_block
    return [depth] * len(config.block_out_channels) if isinstance(depth, int) else depth


def unet_shapes(config):
    """Return the shapes of the U-Net with this config.

    Each ResBlock on the way down leaves a skip for the way up, and so does each downsampler. In
    Stable Diffusion 1, with 320, 640, 1280, 1280 channels and 2 ResBlocks a level, the skips have
    320 | 320 320 320 | 640 640 640 | 1280 1280 1280 | 1280 1280 channels, from conv_in on. On the
    way up each level takes 3 from the end: the last level's ResBlocks get 1280 + 1280 channels
    three times, the next one's 1280 + 1280, 1280 + 1280 and 1280 + 640, and so on.
    """
    widths, n = config.block_out_channels, config.layers_per_block
    first, top, temb, depth = widths[0], widths[-1], 4 * widths[0], depths(config)

    def level(inputs, width, kind, depth):
        block = {"resnets": [resnet_shapes(i, width, temb) for i in inputs]}
        if "Attn" in kind:
            transformer = transformer_shapes(width, config.cross_attention_dim, depth)
            block["attentions"] = [transformer] * len(inputs)
        return block

    down, skips, x = [], [first], first
    for i, (width, kind) in enumerate(zip(widths, config.down_block_types)):
        down.append(level([x] + [width] * (n - 1), width, kind, depth[i]))
        skips += [width] * n
        if i < len(widths) - 1:
            down[-1]["downsamplers"] = [{"conv": conv_shapes(width, width)}]
            skips.append(width)
        x = width

    up = []
    for i, (width, kind) in enumerate(zip(reversed(widths), config.up_block_types)):
        skips, used = skips[:-n - 1], skips[-n - 1:][::-1]
        inputs = [before + skip for before, skip in zip([x] + [width] * n, used)]
        up.append(level(inputs, width, kind, depth[-1 - i]))
        if i < len(widths) - 1:
            up[-1]["upsamplers"] = [{"conv": conv_shapes(width, width)}]
        x = width

    shapes = {"time_embedding": {"linear_1": linear_shapes(first, temb),
                                 "linear_2": linear_shapes(temb, temb)},
              "conv_in": conv_shapes(config.in_channels, first), "down_blocks": down,
              "up_blocks": up, "conv_norm_out": norm_shapes(first),
              "conv_out": conv_shapes(first, config.out_channels)}
    if config.time_cond_proj_dim:
        shapes["time_embedding"]["cond_proj"] = bare_shapes(config.time_cond_proj_dim, first)
    if config.addition_time_embed_dim:
        shapes["add_embedding"] = {
            "linear_1": linear_shapes(config.projection_class_embeddings_input_dim, temb),
            "linear_2": linear_shapes(temb, temb)}
    if config.mid_block_type:
        shapes["mid_block"] = {"resnets": [resnet_shapes(top, top, temb)] * 2, "attentions": [
            transformer_shapes(top, config.cross_attention_dim, depth[-1])]}
    return shapes


SHAPES = {"text_encoder": text_shapes, "text_encoder_2": projected_text_shapes, "vae": vae_shapes,
          "unet": unet_shapes}


def check_weights(part, arrays, config):
    """Raise UserError unless the weights of a part are those that its config describes."""
    check_shapes(f"the {part}", arrays, flatten(SHAPES[part](config)))


def check_shapes(what, arrays, expected):
    """Raise UserError where weights are missing, unknown or misshapen, naming five at most.

    expected: {name: shape}.
    """
    def core(shape):    # files differ on whether a 1x1 convolution (o, i, 1, 1) is a linear layer
        return tuple(shape[:2] if tuple(shape[2:]) == (1, 1) else shape)

    wrong = [f"{name} is missing" for name in expected.keys() - arrays.keys()]
    wrong += [f"{name} is unknown" for name in arrays.keys() - expected.keys()]
    wrong += [f"{name} has shape {arrays[name].shape} instead of {expected[name]}"
              for name in expected.keys() & arrays.keys()
              if core(arrays[name].shape) != core(expected[name])]
    require(not wrong, f"the weights of {what} do not fit its config: {first_five(wrong)}")


def first_five(problems):
    """Return some problems in one line, of many the first five."""
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(sorted(problems)[:5]) + more


# ── Memory ──────────────────────────────────────────────────────────────────────────────────────


def numbers_in(file, pattern=r"(\d+)"):
    """Return all matches of a pattern in a file of the system; none if there is no such file."""
    with contextlib.suppress(OSError):
        return re.findall(pattern, Path(file).read_text())
    return []


def free_memory():
    """Return the bytes that this process can still come to hold, swap included.

    Counts what is free, its own limit, and that of its control group, as far as Linux tells;
    infinite elsewhere.
    """
    free, swap, held = (1024 * sum(map(int, numbers_in(file, rf"{name}:\s+(\d+)")))
                        for file, name in (("/proc/meminfo", "MemAvailable"),
                                           ("/proc/meminfo", "SwapFree"),
                                           ("/proc/self/status", "RssAnon")))
    limits = numbers_in("/proc/self/limits", r"address space\s+(\d+)")
    for group in ("", *numbers_in("/proc/self/cgroup", ":(?:memory)?:(/.+)")):
        limits += numbers_in(f"/sys/fs/cgroup{group}/memory.max")
        limits += numbers_in(f"/sys/fs/cgroup/memory{group}/memory.limit_in_bytes")
    return min([free + held if free else math.inf, *map(int, limits)]) + swap


def check_memory(need, what, instead="take a smaller picture"):
    """Raise UserError if there are not `need` bytes, a lower bound of what a run comes to."""
    room = free_memory()
    require(need <= room, f"{what} needs at least {need / 1e9:.1f} GB of memory, and there are "
            f"{room / 1e9:.1f} GB: close other programs, or {instead}")
