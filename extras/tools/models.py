"""Write random models with the shapes of Stable Diffusion as diffusers folders.

Benchmarks time full-size ones; tests draw with small ones in milliseconds.
"""

import json
import math
import re

import numpy as np
from safetensors.numpy import save_file

from extras import formats
from extras.shapes import SHAPES
from tiny_sd import WEIGHT_FILES, flatten, read_config


def sd15(width=320):
    """Return the configs of Stable Diffusion 1.5, as if its U-Net began with `width` channels."""
    def scaled(n, step=32):
        return max(step, round(n * width / 320 / step) * step)

    words = scaled(768, 64)
    text_encoder = {
        "vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406,
        "eos_token_id": 49407, "hidden_act": "quick_gelu", "num_hidden_layers": 12,
        "num_attention_heads": words // 64, "hidden_size": words, "intermediate_size": 4 * words}
    vae = {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4,
        "block_out_channels": [scaled(n) for n in (128, 256, 512, 512)], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "sample_size": 512}
    unet = {
        "in_channels": 4, "out_channels": 4,
        "block_out_channels": [scaled(n) for n in (320, 640, 1280, 1280)], "layers_per_block": 2,
        "cross_attention_dim": words, "attention_head_dim": 8, "sample_size": 64,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
    scheduler = {
        "_class_name": "PNDMScheduler", "skip_prk_steps": True,
        "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
    return {"text_encoder": text_encoder, "vae": vae, "unet": unet, "scheduler": scheduler}


def sdxl(width=320):
    """Return the configs of SDXL, as if its U-Net began with `width` channels."""
    config = sd15(width)
    words = config["text_encoder"]["hidden_size"]
    second = max(64, round(1280 * width / 320 / 64) * 64)
    widths = config["unet"]["block_out_channels"][:3]
    config["text_encoder_2"] = config["text_encoder"] | {
        "hidden_act": "gelu", "num_hidden_layers": 32, "num_attention_heads": second // 64,
        "hidden_size": second, "intermediate_size": 4 * second, "projection_dim": second}
    config["vae"] |= {"scaling_factor": 0.13025, "sample_size": 1024}
    config["unet"] |= {
        "block_out_channels": widths, "attention_head_dim": [max(1, n // 64) for n in widths],
        "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
        "cross_attention_dim": words + second, "sample_size": 128,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": second + 6 * 256,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"]}
    return config


CONFIGS = {"sd15": sd15, "sdxl": sdxl}
CLASSES = {     # {part: library and class in a folder's model_index.json}
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"]}


def shapes_of(part, config):
    """Return {name: shape} of a part's weights in a checkpoint with this config."""
    return flatten(SHAPES[part](read_config(part, config)))


def random_arrays(shapes, seed=0, dtype=np.float32):
    """Return {name: array} for {name: shape}.

    Scales are about 1, shifts about 0, and matrices preserve the variance.
    """
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        z = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            return (0.2 * z + name.endswith("weight")).astype(dtype)
        return (z / np.float32(math.sqrt(math.prod(shape[1:])))).astype(dtype)
    return {name: draw(name, shape) for name, shape in shapes.items()}


def save_random(path, shapes, dtype=np.float32):
    """Write random arrays of these shapes as a safetensors file."""
    save_file(random_arrays(shapes, dtype=dtype), path, {"format": "pt"})


def save_holes(path, shapes):
    """Write a sparse float16 safetensors file of zeros, which needs no space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_model(folder, config, tokenizer=None, save=save_random):
    """Write a model as a diffusers folder; return the folder.

    config: {part: config}; with a second text encoder the folder is an SDXL. tokenizer: CLIP's by
    default. save(path, shapes) writes the weights of a part.
    """
    tokenizer = tokenizer or formats.clip_tokenizer()
    parts = [part for part in CLASSES if part in config]
    two = "text_encoder_2" in config
    pads = {"tokenizer": tokenizer.EOS} | ({"tokenizer_2": "!"} if two else {})
    for part in parts:
        library, name = CLASSES[part]
        known_by = {"_class_name": name} if library == "diffusers" else {
            "architectures": [name], "model_type": "clip_text_model"}
        write_text(folder / part / "config.json", known_by | config[part])
        path = folder / part / f"{WEIGHT_FILES.get(part, 'model')}.safetensors"
        save(path, stored_shapes(part, config[part]))
    write_text(folder / "scheduler/scheduler_config.json", config["scheduler"])
    scheduler = {"scheduler": ["diffusers", config["scheduler"].get("_class_name")]}
    write_text(folder / "model_index.json", {
        "_class_name": f"StableDiffusion{'XL' * two}Pipeline",
        **{part: CLASSES[part] for part in parts}, **scheduler,
        **dict.fromkeys(pads, ["transformers", "CLIPTokenizer"]),
        **dict.fromkeys(["feature_extractor", "image_encoder" if two else "safety_checker"],
                        [None, None])})
    for name, pad in pads.items():
        write_text(folder / name / "tokenizer_config.json", {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length,
            "pad_token": pad, "unk_token": tokenizer.EOS})
        write_tokenizer(folder / name, tokenizer)
    return folder


def stored_shapes(part, config):
    """Return {name: shape} of a part's weights, with its library's names and shapes."""
    shapes = shapes_of(part, config)
    if part.startswith("text"):
        return {name if name.startswith("text_projection") else f"text_model.{name}": shape
                for name, shape in shapes.items()}
    if config.get("use_linear_projection"):
        return {name: shape[:2] if re.search(r"\.proj_(in|out)\.weight", name) else shape
                for name, shape in shapes.items()}
    return shapes


def write_tokenizer(folder, tokenizer):
    """Write a tokenizer's vocab.json and merges.txt."""
    write_text(folder / "vocab.json", tokenizer.vocab)
    lines = ["#version: 0.2", *map(" ".join, tokenizer.rank)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")


def write_text(path, content):
    """Write a text, or another value as JSON, to a file; create its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
