"""Check a model before use: its configs, the shapes of its weights, and the free memory.

Each problem raises tiny_sd.UserError with one line that names it.
"""

import contextlib
import difflib
import math
import re
from pathlib import Path

from extras import shapes
from extras.like_diffusers import noise_levels
from extras.samplers import SCHEDULERS, solver_steps
from tiny_sd import (
    ACTIVATIONS,
    CONFIG_DEFAULTS,
    flatten,
    read_config,
    require,
    shorten,
)

# ── Configs ─────────────────────────────────────────────────────────────────────────────────────
#
# Allowed values of each field: (low, high) a number from low to high, an integer if these are
# integers; {...} one of these; [...] a list of 1 to 8 such values; str a text. Fields that may be
# None may be missing. check_weights() checks the rest, by the shapes of the weights.

SIZE, FEW, LONGEST_SYMBOL = (1, 2 ** 24), (1, 30), 1000
CONFIG_FIELDS = {
    "text_encoder": {
        **dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"),
                        SIZE),
        "num_hidden_layers": FEW, "max_position_embeddings": (3, 1024),
        "hidden_act": {*ACTIVATIONS}},
    "vae": {
        "block_out_channels": [SIZE], "layers_per_block": FEW, "latent_channels": (1, 64),
        "norm_num_groups": SIZE, "scaling_factor": (1e-9, 1e9)},
    "unet": {
        "block_out_channels": [SIZE], "layers_per_block": FEW, "sample_size": (1, 4096),
        **dict.fromkeys(("in_channels", "out_channels", "cross_attention_dim", "norm_num_groups"),
                        SIZE),
        "n_head": [SIZE], "down_block_types": [{"DownBlock2D", "CrossAttnDownBlock2D"}],
        "up_block_types": [{"UpBlock2D", "CrossAttnUpBlock2D"}],
        "mid_block_type": {"UNetMidBlock2DCrossAttn", None},
        "time_cond_proj_dim": {None, (4, 2048)},
        "transformer_layers_per_block": [FEW], "addition_embed_type": {None, "text_time"},
        "addition_time_embed_dim": {None, *range(2, 2049, 2)},
        "projection_class_embeddings_input_dim": {None, (1, 2 ** 15)}},
    "scheduler": {
        "_class_name": str, "num_train_timesteps": (2, 10 ** 5), "beta_start": (1e-9, 0.999),
        "beta_end": (1e-9, 0.999),
        "beta_schedule": {"scaled_linear", "linear", "squaredcos_cap_v2"},
        "prediction_type": {"epsilon", "v_prediction", "sample"},
        "timestep_spacing": {None, "leading", "trailing", "linspace"}, "steps_offset": (0, 999),
        "timestep_type": {None, "discrete", "continuous"},
        **dict.fromkeys(("set_alpha_to_one", "use_karras_sigmas", "use_exponential_sigmas",
                         "use_beta_sigmas", "rescale_betas_zero_snr", "skip_prk_steps"),
                        {None, True, False}),
        **dict.fromkeys(("sigma_min", "sigma_max"), {None, (1e-6, 1e6)}),
        "original_inference_steps": {None, (1, 10 ** 5)}, "variance_type": object,
        "_guidance_scale": (0.0, 100.0)}}
CONFIG_FIELDS["text_encoder_2"] = CONFIG_FIELDS["text_encoder"] | {"projection_dim": SIZE}

FIXED = {   # fields that tiny_sd.py does not read, as its formulas assume these values
    "text_encoder": {"layer_norm_eps": 1e-5, "model_type": "clip_text_model",
                     "use_attention_mask": False},      # read by the pipeline
    "vae": {"_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True,
            "use_quant_conv": True, "use_post_quant_conv": True, "in_channels": 3,
            "out_channels": 3, "down_block_types": "DownEncoderBlock2D",    # on every level
            "up_block_types": "UpDecoderBlock2D",
            **dict.fromkeys(("shift_factor", "latents_mean", "latents_std"))},
    "unet": {"_class_name": "UNet2DConditionModel", "act_fn": "silu", "norm_eps": 1e-5,
             "flip_sin_to_cos": True, "freq_shift": 0,
             "resnet_time_scale_shift": "default", "resnet_out_scale_factor": 1.0,
             "conv_in_kernel": 3, "conv_out_kernel": 3, "downsample_padding": 1,
             "mid_block_scale_factor": 1, "time_embedding_type": "positional",
             "attention_type": "default",
             **dict.fromkeys(("only_cross_attention", "center_input_sample", "resnet_skip_time_act",
                              "dual_cross_attention", "class_embeddings_concat"), False),
             **dict.fromkeys(("class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type",
                              "num_class_embeds", "time_embedding_dim", "time_embedding_act_fn",
                              "timestep_post_act", "cross_attention_norm",
                              "mid_block_only_cross_attention",
                              "reverse_transformer_layers_per_block"))},
    "scheduler": {"trained_betas": None}}
FIXED["text_encoder_2"] = FIXED["text_encoder"]
REPLACED = {    # {start of a scheduler's class: {field: the only value that we follow}}
    "": {"thresholding": False, "clip_sample": False, "use_flow_sigmas": False},
    "DPMSolverMultistep": {
        "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
        "final_sigmas_type": "zero", "lower_order_final": True, "euler_at_final": False,
        "use_lu_lambdas": False, "use_dynamic_shifting": False, "lambda_min_clipped": -math.inf,
        "variance_type": None},
    "Euler": {"interpolation_type": "linear", "final_sigmas_type": "zero"},
    "LCM": {"timestep_scaling": 10.0},
    "UniPC": {
        "solver_order": 2, "solver_type": "bh2", "predict_x0": True, "lower_order_final": True,
        "disable_corrector": [], "solver_p": None, "final_sigmas_type": "zero"},
    "DDPM": {"variance_type": "fixed_small"}}
UNREAD = {      # fields that do not change the picture
    "vae": "force_upcast sample_size",
    "unet": "dropout upcast_attention use_linear_projection attention_head_dim num_attention_heads "
            "addition_embed_type_num_heads",
    "scheduler": "dynamic_thresholding_ratio sample_max_value clip_sample_range flow_shift rho "
                 "time_shift_type shift_terminal "
                 + " ".join(name for fields in REPLACED.values() for name in fields)}
OTHER_INPUTS = {    # {number of extra input channels: what they are}
    1: ", one of them depth,", 3: ", three of them a smaller picture,",
    4: ", four of them a picture to edit (InstructPix2Pix),"}


def allows(allowed, value):
    """Is the value one of those allowed, written as in CONFIG_FIELDS?"""
    if isinstance(allowed, list):
        return isinstance(value, list) and 1 <= len(value) <= 8 and all(
            allows(allowed[0], v) for v in value)
    if isinstance(allowed, tuple):
        kinds = (int,) if type(allowed[0]) is int else (int, float)
        return type(value) in kinds and allowed[0] <= value <= allowed[1]
    if isinstance(allowed, set):
        return any(allows(one, value) if isinstance(one, tuple)
                   else type(one) is type(value) and one == value for one in allowed)
    return isinstance(value, allowed)


def checked_config(part, settings):
    """Check the type and range of every field of a part's config; return it as a record."""
    fields = CONFIG_FIELDS[part]
    settings = {name: None for name in fields if allows(fields[name], None)} | CONFIG_DEFAULTS[
        part] | settings
    if settings.get("_class_name") is None and part == "scheduler":
        settings["_class_name"] = ""
    for name, value in FIXED[part].items():
        given = settings.get(name, value)
        levels = [value] * len(given) if isinstance(given, list) else None
        require(given in (value, None) or given and given == levels,
                f"the {part}'s {name} {shorten(repr(given))} is not supported")
    levels = settings.get("block_out_channels")
    if part in ("unet", "vae"):
        require(allows([SIZE], levels),
                f"the {part}'s block_out_channels cannot be {shorten(repr(levels))}")
    config = read_config(part, settings)
    if part == "unet":
        config.transformer_layers_per_block = shapes.depths(config)
    for name, allowed in fields.items():
        require(hasattr(config, name), f"the {part}'s config has no {name}")
        value = getattr(config, name)
        require(allows(allowed, value), f"the {part}'s {name} cannot be {shorten(repr(value))}")
    return config


def replaced_settings(settings):
    """Return a line for each setting in the configs that is not followed here."""
    scheduler, lines = settings["scheduler"], []
    kind = scheduler.get("_class_name") or ""
    for start, fields in REPLACED.items():
        for name, value in fields.items() if kind.startswith(start) else ():
            given = scheduler.get(name, value)
            followed = (value, None, "fixed_large") if name == "variance_type" else (value, None)
            if given not in followed:
                lines.append(f"the scheduler's {name} is {value!r} here, not "
                             f"{shorten(repr(given))}")
    if kind and kind not in SCHEDULERS:
        lines.append(f"the scheduler {shorten(kind)} does not exist here: dpm++2m draws instead")
    for part, unread in UNREAD.items():
        known = {*CONFIG_FIELDS[part], *FIXED[part], *unread.split()}
        said = [f"{shorten(name, 40)}: {shorten(repr(value), 60)}"
                for name, value in settings[part].items() if name not in known
                and not name.startswith("_") and value not in (None, False, [], {})]
        if said:
            lines.append(f"these settings of the {part} are unknown here and ignored: "
                         f"{first_five(said)}")
    return lines


def nearest(word, known):
    """Return "; did you mean ...?" if one of the known words is similar, or ""."""
    found = [other for other in known if other.strip("-") == word.strip("-")]       # --W: -W
    found = found or difflib.get_close_matches(word[:60].lower(), list(known), 1, 0.79)
    return f"; did you mean {found[0]}?" if found else ""


def check_configs(settings, tokenizers):
    """Check each part's config, and that the parts fit together."""
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
                "transformer_layers_per_block, differ in number from its block_out_channels")
    z = vae.latent_channels
    require(unet.out_channels == z,
            f"the unet returns {unet.out_channels} channels, but the vae takes {z}")
    what = OTHER_INPUTS.get(unet.in_channels - z, "")
    require(unet.in_channels in (z, 2 * z + 1), f"a unet with {unet.in_channels} input channels"
            f"{what} is not supported, only {z}, or {2 * z + 1} for inpainting")
    require(scheduler.beta_start <= scheduler.beta_end, "the scheduler's beta_end is below its "
                                                        "beta_start")
    require(solver_steps(scheduler) <= scheduler.num_train_timesteps,
            "the scheduler's original_inference_steps exceed its num_train_timesteps")
    levels = noise_levels(scheduler)
    require(levels[-2] > 1e-10, "the scheduler's betas leave nothing of a picture: beta_end "
                               f"{scheduler.beta_end} is too large")
    check_text_encoders(config, tokenizers)
    return config


def check_text_encoders(config, tokenizers):
    """Check that the text encoders, one or two, fit their tokenizers and the U-Net."""
    texts = {part: config[part] for part in config if part.startswith("text_encoder")}
    for (part, text), tokenizer in zip(texts.items(), tokenizers, strict=True):
        require(text.hidden_size % text.num_attention_heads == 0,
                f"the {part}'s hidden_size does not divide into its num_attention_heads")
        require(max(map(len, tokenizer.vocab)) <= LONGEST_SYMBOL, "a token of the vocabulary has "
                f"more than {LONGEST_SYMBOL} characters")
        ids = tokenizer.vocab.values()
        require({*map(type, ids)} == {int} and 0 <= min(ids) and max(ids) < text.vocab_size, "the "
                f"ids in the tokenizer's vocabulary are not all below the {part}'s vocab_size")
        end = getattr(text, "eos_token_id", None)       # 2 in old configs, whatever the tokenizer's
        require(end in (None, 2, tokenizer.vocab[tokenizer.EOS]), f"the {part}'s eos_token_id "
                f"{shorten(repr(end))} is not the tokenizer's")
        limit, length = text.max_position_embeddings, tokenizer.length
        require(allows((3, limit), length) or allows((1e6, math.inf), length),
                f"the {part} has no room for the tokenizer's {shorten(repr(length))} tokens")
        require((limit, length) == (texts["text_encoder"].max_position_embeddings,
                                    tokenizers[0].length), "the text encoders take different "
                                                           "numbers of tokens")

    unet, widths = config["unet"], [text.hidden_size for text in texts.values()]
    given = " + ".join(map(str, widths))
    require(unet.cross_attention_dim == sum(widths),
            f"the unet's cross_attention_dim is {unet.cross_attention_dim}, but the width of the "
            f"{' and '.join(texts)} is {given}")
    check_added_conditions(unet, config.get("text_encoder_2"))


def check_added_conditions(unet, second):
    """Check that the U-Net takes pooled text and sizes if and only if there is a second encoder."""
    size = unet.addition_time_embed_dim
    added = unet.addition_embed_type, bool(size), unet.projection_class_embeddings_input_dim
    if second is None:
        require(added == (None, False, None), "the unet expects an added condition "
                "(addition_embed_type), but there is no text_encoder_2 to compute it")
        return
    width = second.projection_dim + 6 * (size or 0)
    require(added == ("text_time", True, width), "with this text_encoder_2, the unet needs "
            f"addition_embed_type \"text_time\" and projection_class_embeddings_input_dim {width}")
    require(not unet.time_cond_proj_dim, "a unet with both added text and an embedded guidance "
                                         "scale (time_cond_proj_dim) is not supported")


# ── Weights ─────────────────────────────────────────────────────────────────────────────────────


def check_weights(part, arrays, config):
    """Raise UserError unless the weights of a part match its config."""
    check_shapes(f"the {part}", arrays, flatten(shapes.SHAPES[part](config)))


def core(shape):
    """Return a shape; a 1x1 convolution's as that of a matrix, since files store either."""
    return tuple(shape[:2] if {*shape[2:]} <= {1} else shape)


def check_shapes(what, arrays, expected):
    """Raise UserError if weights are missing, unknown or of the wrong shape; name at most five.

    expected: {name: shape}.
    """
    wrong = [f"{name} is missing" for name in expected.keys() - arrays.keys()]
    wrong += [f"{name} is unknown" for name in arrays.keys() - expected.keys()]
    wrong += [f"{name} has shape {arrays[name].shape} instead of {expected[name]}"
              for name in expected.keys() & arrays.keys()
              if core(arrays[name].shape) != core(expected[name])]
    require(not wrong, f"the weights of {what} do not fit its config: {first_five(wrong)}")


def first_five(problems):
    """Join problems into one line; name only the first five."""
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(sorted(problems)[:5]) + more


# ── Memory ──────────────────────────────────────────────────────────────────────────────────────


def numbers_in(file, pattern=r"(\d+)"):
    """Return all matches of a pattern in a system file; none if the file does not exist."""
    with contextlib.suppress(OSError):
        return re.findall(pattern, Path(file).read_text())
    return []


def free_memory():
    """Return how many bytes this process can hold, including swap; infinity if not on Linux.

    This is the smallest of the free memory plus its own, its own limit and its control group's.
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


def check_memory(need, what, instead="draw a smaller picture"):
    """Raise UserError if `need` bytes, a lower bound for a run, do not fit into memory."""
    room = free_memory()
    require(need <= room, f"{what} needs at least {need / 1e9:.1f} GB of memory, but only "
            f"{room / 1e9:.1f} GB are free: close other programs, or {instead}")
