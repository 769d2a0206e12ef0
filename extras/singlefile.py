"""Read single-file checkpoints in the original layout: Stable Diffusion 1, 2 and XL.

Translate the names to those of diffusers, and infer the configs from the arrays.
"""

import hashlib
import re

import numpy as np

from extras.checks import first_five
from extras.tensors import kind_of, metadata_of, not_but, read_tensors
from tiny_sd import Tokenizer, UserError, require

TEXT_NAMES = [      # (pattern, replacement), applied in this order
    (r"^text_model\.", ""), (r"^(token|positional)_embedding", r"embeddings.\g<0>"),
    (r"positional_embedding$", "position_embedding.weight"),     # from here on OpenCLIP's names
    (r"^transformer\.resblocks", "encoder.layers"), (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."), (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."),
    (r"^ln_final", "final_layer_norm")]
VAE_NAMES = [
    (r"^encoder\.down\.", "encoder.down_blocks."), (r"^decoder\.up\.", "decoder.up_blocks."),
    (r"mid\.block_1", "mid_block.resnets.0"), (r"mid\.block_2", "mid_block.resnets.1"),
    (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"),
    (r"mid\.attn_1\.", "mid_block.attentions.0."), (r"0\.([qkv])\.", r"0.to_\1."),
    (r"0\.proj_out\.", "0.to_out.0."), (r"\.block\.", ".resnets."),
    (r"\.(down|up)sample\.", r".\1samplers.0."), ("nin_shortcut", "conv_shortcut"),
    (r"\.norm_out", ".conv_norm_out")]
HINT_NAMES = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]      # of ControlNet
UNET_NAMES = [
    (r"^time_embed\.0", "time_embedding.linear_1"), (r"^time_embed\.2", "time_embedding.linear_2"),
    (r"^time_embed\.cond_proj", "time_embedding.cond_proj"),
    (r"^label_emb\.0\.0", "add_embedding.linear_1"),
    (r"^label_emb\.0\.2", "add_embedding.linear_2"), (r"^input_blocks\.0\.0", "conv_in"),
    (r"^out\.0", "conv_norm_out"), (r"^out\.2", "conv_out"), (r"in_layers\.0", "norm1"),
    (r"in_layers\.2", "conv1"), (r"emb_layers\.1", "time_emb_proj"), (r"out_layers\.0", "norm2"),
    (r"out_layers\.3", "conv2"), ("skip_connection", "conv_shortcut"),
    (r"^middle_block\.0", "mid_block.resnets.0"), (r"^middle_block\.1", "mid_block.attentions.0"),
    (r"^middle_block\.2", "mid_block.resnets.1"),
    (r"^zero_convs\.(\d{1,2})\.0\.", r"controlnet_down_blocks.\1."),     # from here on ControlNet's
    (r"^middle_block_out\.0\.", "controlnet_mid_block."),
    (r"^input_hint_block\.(\d{1,2})\.",
     lambda m: f"controlnet_cond_embedding.{HINT_NAMES[min(int(m[1]) // 2, 7)]}.")]


def from_original_name(part, name, levels, n):
    """Return the diffusers name of a weight in the original layout.

    levels: of the VAE; n: ResBlocks per level on the U-Net's way up.
    """
    for old, new in {"vae": VAE_NAMES, "unet": UNET_NAMES}.get(part, TEXT_NAMES):
        name = re.sub(old, new, name)
    numbers = re.match(r"(\w+)\.(\d{1,3})\.(\d{1,3})\.(?:(op|conv)(?=\.))?", name)
    if part == "vae":       # its decoder counts levels from the bottom
        return re.sub(r"^decoder\.up_blocks\.(\d{1,3})",
                      lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name)
    if part != "unet" or not numbers:
        return name

    side, index, slot = numbers[1], int(numbers[2]), int(numbers[3])
    rest = name[numbers.end():]
    kind = ("resnets", "attentions")[min(slot, 1)]
    if side == "input_blocks" and numbers[4] == "op":
        return f"down_blocks.{index // n - 1}.downsamplers.0.conv{rest}"
    if side == "input_blocks":
        return f"down_blocks.{(index - 1) // n}.{kind}.{(index - 1) % n}.{rest}"
    if side == "output_blocks" and numbers[4] == "conv":
        return f"up_blocks.{index // n}.upsamplers.0.conv{rest}"
    if side == "output_blocks":
        return f"up_blocks.{index // n}.{kind}.{index % n}.{rest}"
    return name


SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "set_alpha_to_one": False, "steps_offset": 1}
PNDM = SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
EULER = SCHEDULER | {"_class_name": "EulerDiscreteScheduler"}
FAMILIES = {    # what the arrays do not tell: sample_size, channels per head (None: 8 heads),
    # scaling_factor of the latents, scheduler
    "Stable Diffusion 1": (64, None, 0.18215, PNDM),
    "Stable Diffusion 2": (96, 64, 0.18215, PNDM | {"prediction_type": "v_prediction"}),
    "Stable Diffusion 2, inpainting": (64, 64, 0.18215, PNDM),
    "SD Turbo": (64, 64, 0.18215, EULER | {"timestep_spacing": "trailing"}),
    "SDXL": (128, 64, 0.13025, EULER | {"timestep_spacing": "leading"})}
PARTS = {       # {prefix of names: part}; prefixes of OpenCLIP's encoders end in ".model."
    "cond_stage_model.transformer.": "text_encoder", "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2", "first_stage_model.": "vae",
    "model.diffusion_model.": "unet"}
USUAL_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
             "latent_channels": 4}        # for a file without a VAE
TEXT_INSIDE = r"(embeddings|encoder|final_layer_norm)\.(?!position_ids)"
INSIDE = {      # {part: pattern of the names of weights in use, in the diffusers layout}
    "text_encoder": TEXT_INSIDE, "text_encoder_2": rf"text_projection|{TEXT_INSIDE}",
    "vae": r"(encoder|decoder|quant_conv|post_quant_conv)\.", "unet": ""}
FLAGS = {       # {empty tensor: what its presence sets in the scheduler's config}
    "v_pred": {"prediction_type": "v_prediction"}, "ztsnr": {"rescale_betas_zero_snr": True}}
HEADER = {      # {field of the header: {its text: the same}}
    "modelspec.prediction_type": {"v": {"prediction_type": "v_prediction"},
                                  "v_prediction": {"prediction_type": "v_prediction"},
                                  "epsilon": {"prediction_type": "epsilon"}},
    "modelspec.architecture": {"stable-diffusion-v2-512": {"prediction_type": "epsilon"},
                               "stable-diffusion-v2-768-v": {"prediction_type": "v_prediction"}},
    "ss_zero_terminal_snr": {"True": {"rescale_betas_zero_snr": True}}}
OTHER_NOISE = r"edm_mean|edm_std|edm_vpred\.\w+"     # of Playground 2.5, CosXL
USUAL = re.compile(     # other tensors that are common, and ignored without a note
    r"(betas|.*alphas_cumprod\w*|posterior_\w+|logvar|model_ema\.(decay|num_updates)|"
    r"v_pred|ztsnr|global_step|.*scaled_fp8|.*position_ids|"
    r"cond\w+(\.embedders\.\d)?\.model\.(logit_scale|text_projection))$")


def read_names(path):
    """Return {name: array} of a checkpoint, in the original layout."""
    return {re.sub(r"^(state_dict\.)+", "", name): array
            for name, array in read_tensors(path).items()}


def read_single_file(path):
    """Return configs, arrays, padding tokens, digest and notes for the user of a checkpoint.

    Translate the names and read sizes off the arrays; the rest comes from the model's family.
    Arrays that belong to no network are ignored, with a note.
    """
    file = read_names(path)
    arrays, others, open_clip = sort_out(file)
    turbo = "conditioner.embedders.0.model." in open_clip.values()
    check_family(path, file, arrays, turbo)
    try:
        for part in open_clip:
            arrays[part] = from_open_clip(arrays[part])
        family = family_of(arrays, open_clip, turbo)
        if "text_encoder" in open_clip:
            arrays["text_encoder"] = without_last_layer(arrays["text_encoder"])
        settings = read_off(*FAMILIES[family], open_clip, arrays)
    except (KeyError, IndexError) as error:
        which = error.args[0] if isinstance(error, KeyError) else "one of its weights"
        raise UserError(f"{path} is not a Stable Diffusion 1, 2 or XL: {which} is missing or "
                        "misshapen") from None
    follow_facts(settings, file, metadata_of(path))
    with open(path, "rb") as whole:
        digest = hashlib.file_digest(whole, "sha256").hexdigest()[:10]
    pads_with_0 = family not in ("Stable Diffusion 1", "SDXL")
    pads = ["!" if pads_with_0 or part == "text_encoder_2" else Tokenizer.EOS
            for part in settings if part.startswith("text")]
    notes = [f"{path} holds more than a model; ignored: {first_five(others)}"] if others else []
    return settings, arrays, pads, digest, notes


def check_family(path, file, arrays, turbo):
    """UserError unless a checkpoint's arrays are a Stable Diffusion 1, 2 or XL."""
    other_noise = list(filter(re.compile(OTHER_NOISE).fullmatch, file))
    require(not other_noise, f"{path} was trained with other noise levels, not supported here: "
                             f"it has {first_five(other_noise)}")
    missing = [part for part in ("text_encoder", "unet") if not arrays.get(part)]
    refiner = turbo and any(name.startswith("add_embedding") for name in arrays["unet"])
    require(not missing and not refiner, f"{path} is not a Stable Diffusion 1, 2 or XL: "
            + ("it is the refiner of SDXL" if refiner else f"it has no {', no '.join(missing)}"
               + not_but(None if any(arrays.values()) else kind_of(file))))


def without_last_layer(arrays):
    """Return an OpenCLIP text encoder's arrays without the last layer, which is never used.

    Files with 23 layers have left it out already.
    """
    n = count(arrays, "encoder.layers")
    last = f"encoder.layers.{max(0, n - 1)}."
    return {name: array for name, array in arrays.items() if n == 23 or not name.startswith(last)}


def follow_facts(settings, file, header):
    """Change configs, in place, as a checkpoint's flags and header say."""
    for facts in [*(FLAGS.get(name, {}) for name in file),
                  *(values.get(header.get(name), {}) for name, values in HEADER.items())]:
        settings["scheduler"] = settings["scheduler"] | facts
    if size := re.fullmatch(r"(\d{2,4})x\1", header.get("modelspec.resolution", "")):
        factor = 2 ** (len(settings["vae"]["block_out_channels"]) - 1)
        settings["unet"]["sample_size"] = int(size[1]) // factor


def family_of(arrays, open_clip, turbo):
    """Return the name in FAMILIES of a checkpoint, mostly by the shapes of its arrays."""
    if "text_encoder_2" in arrays:
        return "SDXL"
    width = arrays["text_encoder"]["embeddings.token_embedding.weight"].shape[1]
    if width < 1024 and "text_encoder" not in open_clip:
        return "Stable Diffusion 1"
    inpaints = arrays["unet"]["conv_in.weight"].shape[1] == 9
    return "SD Turbo" if turbo else f"Stable Diffusion 2{', inpainting' * inpaints}"


def sort_out(file):
    """Return {part: {current name: array}}, unknown names, and {part: prefix} of OpenCLIP encoders.

    Names in USUAL are left out.
    """
    downs = map(re.compile(r"model\.diffusion_model\.input_blocks\.(\d{1,3})\.0\.op\.").match, file)
    levels = count(file, "first_stage_model.decoder.up")
    n = max(1, min((int(match[1]) for match in downs if match), default=3))

    arrays, others, open_clip = {"text_encoder": {}, "vae": {}, "unet": {}}, [], {}
    for name, array in file.items():
        prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), None)
        part = PARTS.get(prefix)
        new = part and from_original_name(part, name.removeprefix(prefix), levels, n)
        if part and re.match(INSIDE[part], new):
            arrays.setdefault(part, {})[new] = array
            if prefix.endswith(".model."):
                open_clip[part] = prefix
        elif not USUAL.match(name):
            others.append(name)
    return arrays, others, open_clip


def from_open_clip(arrays):
    """Convert OpenCLIP's text encoder to the layout of transformers.

    OpenCLIP keeps q, k and v in one array, and its projection is transposed.
    """
    split = {}
    for name, array in arrays.items():
        if name == "text_projection":
            split["text_projection.weight"] = array.T
        elif "in_proj_" in name:
            require(array.ndim and len(array) % 3 == 0, f"{name} does not hold q, k and v")
            for letter, third in zip("qkv", np.split(array, 3)):
                split[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            split[name] = array
    return split


def count(arrays, numbered):
    """Count the different numbers that follow the text `numbered` in the arrays' names."""
    found = map(re.compile(rf"{re.escape(numbered)}\.(\d{{1,3}})\.").match, arrays)
    return len({match[1] for match in found if match})


def widths(arrays, side):
    """Return the channels of each level on one side of a VAE or U-Net."""
    return [len(arrays[f"{side}.{i}.resnets.0.conv1.weight"]) for i in range(count(arrays, side))]


def read_off(sample_size, head_size, scaling_factor, scheduler, open_clip, arrays):
    """Infer the configs from the arrays of a single file; KeyError if one is missing.

    open_clip: the text encoders from OpenCLIP.
    """
    unet = arrays["unet"]
    second = "text_encoder_2" not in arrays and head_size       # Stable Diffusion 2
    settings = {part: read_off_text(arrays[part], second or part in open_clip) for part in arrays
                if part.startswith("text_encoder")}
    shape = read_off_vae(arrays["vae"]) if arrays["vae"] else USUAL_VAE
    settings["vae"] = shape | {"scaling_factor": scaling_factor}
    settings["unet"] = read_off_unet(sample_size, head_size, unet)
    settings["scheduler"] = scheduler
    if "time_embedding.cond_proj.weight" in unet:
        settings["scheduler"] = scheduler | {"_class_name": "LCMScheduler"}
        settings["unet"]["time_cond_proj_dim"] = unet["time_embedding.cond_proj.weight"].shape[1]
    if "text_encoder_2" in settings:
        told = unet["add_embedding.linear_1.weight"].shape[1]
        pooled = len(arrays["text_encoder_2"]["text_projection.weight"])
        settings["text_encoder_2"]["projection_dim"] = pooled
        settings["unet"] |= {
            "addition_embed_type": "text_time", "projection_class_embeddings_input_dim": told,
            "addition_time_embed_dim": (told - pooled) // 6}
    return settings


def read_off_vae(arrays):
    """Infer the config of a VAE, without the scale of its latents."""
    return {
        "block_out_channels": widths(arrays, "encoder.down_blocks"),
        "layers_per_block": count(arrays, "encoder.down_blocks.0.resnets"),
        "latent_channels": len(arrays["post_quant_conv.weight"])}


def read_off_text(arrays, open_clip):
    """Infer the config of a text encoder."""
    tokens = arrays["embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": tokens[0], "hidden_size": tokens[1],
        "max_position_embeddings": len(arrays["embeddings.position_embedding.weight"]),
        "num_hidden_layers": count(arrays, "encoder.layers"),
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "num_attention_heads": max(1, tokens[1] // 64),
        "intermediate_size": len(arrays["encoder.layers.0.mlp.fc1.weight"])}


def read_off_unet(sample_size, size, arrays):
    """Infer the config of a U-Net, without added conditions."""
    down = widths(arrays, "down_blocks")
    depth = [count(arrays, f"down_blocks.{i}.attentions.0.transformer_blocks")
             for i in range(len(down))]
    words = next(filter(re.compile(r".*\.attn2\.to_k\.weight").match, arrays), "attn2.to_k.weight")
    middle = any(name.startswith("mid_block.") for name in arrays)
    return {
        "block_out_channels": down, "sample_size": sample_size,
        "layers_per_block": count(arrays, "down_blocks.0.resnets"),
        "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in depth],
        "up_block_types": ["CrossAttnUpBlock2D" if n else "UpBlock2D" for n in depth[::-1]],
        "transformer_layers_per_block": [max(1, n) for n in depth],
        "attention_head_dim": [max(1, width // size) for width in down] if size else 8,
        "cross_attention_dim": arrays[words].shape[1],
        "in_channels": arrays["conv_in.weight"].shape[1],
        "out_channels": len(arrays["conv_out.weight"]),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else None}
