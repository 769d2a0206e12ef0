"""A small SDXL with random weights, as diffusers writes it and as Stability AI did."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from conftest import (
    SCHEDULER,
    TEXT,
    VAE,
    compvis_name,
    compvis_unet_name,
    open_clip_names,
    randomise,
    reference_tokenizer,
)

TEXT_1 = {**TEXT, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1}
TEXT_2 = {**TEXT, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2,
          "num_hidden_layers": 4, "hidden_act": "gelu", "projection_dim": 80}
UNET = {"block_out_channels": (64, 128, 192), "layers_per_block": 2, "cross_attention_dim": 192,
        "attention_head_dim": (1, 2, 3), "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True, "sample_size": 8, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 80 + 6 * 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}


def make_pipeline(folder, scheduler=EulerDiscreteScheduler, **options):
    """Return a small SDXL as a diffusers pipeline; folder: an empty one for its tokenizers."""
    first = reference_tokenizer(folder)
    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        vae=randomise(AutoencoderKL(**{**VAE, "scaling_factor": 0.13025}), 3),
        text_encoder=randomise(CLIPTextModel(CLIPTextConfig(**TEXT_1)), 4, weight=3),
        text_encoder_2=randomise(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)), 5,
                                 weight=3), tokenizer=first,
        tokenizer_2=CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="!"),
        unet=randomise(UNet2DConditionModel(**UNET), 2, attn2=2, add_embedding=2, conv_out=2),
        scheduler=scheduler.from_config({**SCHEDULER, **options}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def original_layout(folder):
    """Return the weights in a folder of an SDXL under the names of a single file."""
    arrays = {}
    for part in ("text_encoder", "vae", "unet"):
        for name, array in load_file(next(Path(folder, part).glob("*.safetensors"))).items():
            arrays[original_name(part, name)] = array
    second = load_file(Path(folder, "text_encoder_2/model.safetensors"))
    projection = second.pop("text_projection.weight").T
    second = open_clip_names(second) | {"text_projection": projection}
    return arrays | {f"conditioner.embedders.1.model.{name}": array.contiguous()
                     for name, array in second.items()}


def original_name(part, name):
    """Return the name in a single file of an array that diffusers or transformers calls `name`."""
    if part == "text_encoder":
        name = name.removeprefix("text_model.")
        return f"conditioner.embedders.0.transformer.text_model.{name}"
    if part == "unet":
        return f"model.diffusion_model.{unet_name(name)}"
    return compvis_name(part, name)


def unet_name(name):
    """Return the name in the original layout of an array of the U-Net."""
    return compvis_unet_name(name, attends=True)
