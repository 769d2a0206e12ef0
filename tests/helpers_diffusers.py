"""Helpers for tests against diffusers, and a small random SDXL, in the layouts of diffusers and of
Stability AI.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
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
    record,
    reference_tokenizer,
)

PROMPT = "a photo of a cat"
SECOND = {"attention_head_dim": (1, 2, 2, 2), "block_out_channels": (64, 128, 128, 128),
          "use_linear_projection": True}        # the U-Net's as in Stable Diffusion 2


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def first(x):
    """Pictures, channels last, for a reference."""
    return torch.as_tensor(np.ascontiguousarray(x)).float().permute(0, 3, 1, 2)


def last(x):
    """A reference's pictures, channels first, as ours lie."""
    return x.permute(0, 2, 3, 1).numpy()


def arrays(backend, *xs):
    """float32 arrays of the backend."""
    return [x.astype(np.float32) if backend == "numpy" else torch.from_numpy(x.astype(np.float32))
            for x in xs]


def some_picture(seed, width, height):
    """Colours that change slowly, and noise: (height, width, 3) uint8."""
    chance = np.random.default_rng(seed)
    slow = Image.fromarray(chance.integers(0, 256, (4, 4, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC)
    return (np.asarray(slow) * 0.8 + chance.integers(0, 51, (height, width, 3))).astype(np.uint8)


def some_mask():
    """A mask of a picture of 72 x 64, as bool and as a picture."""
    mask = np.zeros((64, 72), bool)
    mask[16:48, 24:] = True
    return mask, Image.fromarray((mask * 255).astype(np.uint8))


def drawn_by(pipe, *args, seed=5, prompt=PROMPT, **how):
    """Draw with a pipeline of diffusers: (1, height, width, 3) of uint8."""
    picture, = pipe(prompt, *args, generator=torch.Generator().manual_seed(seed), **how).images
    return np.asarray(picture)[None]


def same_pictures(part, ours, reference, before=None):
    """Fail if two pictures differ by more than one level of 255 at any pixel.

    before: the reference's picture without the feature under test, which must be different.
    """
    assert ours.dtype == reference.dtype == np.uint8 and ours.shape == reference.shape
    assert reference.std(axis=(1, 2, 3)).min() > 20, "a picture without contrast tests nothing"
    assert before is None or np.abs(reference.astype(int) - before).max() > 20
    levels = np.abs(ours.astype(int) - reference).max()
    record(f"{part}, in levels of 255", levels)
    assert levels <= 1


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
    return StableDiffusionXLPipeline(
        vae=randomise(AutoencoderKL(**{**VAE, "scaling_factor": 0.13025}), 3),
        text_encoder=randomise(CLIPTextModel(CLIPTextConfig(**TEXT_1)), 4, weight=3),
        text_encoder_2=randomise(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)), 5,
                                 weight=3), tokenizer=first,
        tokenizer_2=CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="!"),
        unet=randomise(UNet2DConditionModel(**UNET), 2, attn2=2, add_embedding=2, conv_out=2),
        scheduler=scheduler.from_config({**SCHEDULER, **options}))


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
