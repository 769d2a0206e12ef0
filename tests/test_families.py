"""Models of other families, small and random.

U-Nets, text encoders and whole pictures equal to diffusers', on both backends.
"""

import copy
import dataclasses
import functools
import itertools
import json
import re
import shutil

import diffusers
import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import tiny_sd
from conftest import (
    ROOT,
    SCHEDULER,
    TEXT,
    compvis,
    make_unet,
    name_scheduler,
    open_clip_names,
    randomise,
    record,
    same,
    with_torch_too,
)
from extras import explain, formats, like_diffusers, prompts
from helpers import drawn
from helpers_diffusers import (  # noqa: F401  (no_gradients is a fixture of all tests)
    PROMPT,
    SECOND,
    drawn_by,
    first,
    last,
    no_gradients,
    same_pictures,
    some_mask,
    some_picture,
)

pytestmark = pytest.mark.slow

FAMILIES = {"pruned": ({"layers_per_block": 1, "mid_block_type": None}, diffusers.PNDMScheduler,
                       {"skip_prk_steps": True}),
            "three levels": ({"layers_per_block": 1, "mid_block_type": None,
                              "block_out_channels": (32, 64, 96),
                              "down_block_types": ("CrossAttnDownBlock2D",) * 3,
                              "up_block_types": ("CrossAttnUpBlock2D",) * 3},
                             diffusers.PNDMScheduler, {"skip_prk_steps": True}),
            "Stable Diffusion 2": (SECOND, diffusers.DDIMScheduler,
                                   {"prediction_type": "v_prediction"}),
            "Turbo": (SECOND, diffusers.EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
            "consistency": ({"time_cond_proj_dim": 64}, diffusers.LCMScheduler, {}),
            "Euler, silent": ({}, diffusers.EulerDiscreteScheduler, {}),
            "DPM, silent": ({}, diffusers.DPMSolverMultistepScheduler, {}),
            "DPM, Karras": ({}, diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
            "Euler ancestral, silent": ({}, diffusers.EulerAncestralDiscreteScheduler, {}),
            "DDPM, silent": ({}, diffusers.DDPMScheduler, {"clip_sample": False})}
SILENT = {key: value for key, value in SCHEDULER.items()
          if key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}


@pytest.fixture(scope="module")
def family(reference, tmp_path_factory):
    """family(name): the pipeline, and its folder as diffusers writes it."""
    known = {}

    def make(name):
        if name not in known:
            changes, scheduler, options = FAMILIES[name]
            parts = {**reference.components, "unet": make_unet(**changes),
                     "scheduler": scheduler(**SILENT | options)}
            if "use_linear_projection" in changes:
                torch.manual_seed(0)
                parts["text_encoder"] = randomise(transformers.CLIPTextModel(
                    transformers.CLIPTextConfig(**{**TEXT, "hidden_act": "gelu"})), 4, weight=3)
            pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
            folder = tmp_path_factory.mktemp("families") / "model"
            pipe.save_pretrained(folder)
            known[name] = pipe, folder
        return known[name]
    return make


def draw(model, prompt=PROMPT, **settings):
    return drawn(model, prompt, "a dog", (5,), **settings)


OTHERS = [name for name in FAMILIES if FAMILIES[name][0]]      # with a U-Net of their own


@with_torch_too("name, steps", [*itertools.product(FAMILIES, [4]), *itertools.product(OTHERS, [1])],
                itertools.product(OTHERS, [4]))
def test_a_folders_own_defaults(name, steps, family, backend):
    """The sampler, the spacing and the prediction type come from the folder.

    Only the prompt is given.
    """
    pipe, folder = family(name)
    guidance = 1.0 if name == "Turbo" else 3.0
    expected = drawn_by(pipe, negative_prompt="a dog", num_inference_steps=steps,
                        guidance_scale=guidance, width=72, height=64)
    model = formats.load(folder, backend)
    same_pictures("pictures of other families",
                  draw(model, steps=steps, guidance=guidance, width=72, height=64), expected)


def test_defaults(family):
    assert like_diffusers.defaults(formats.load(ROOT / "weights/emoji"))[1:] == (20, 3.0)
    assert [like_diffusers.defaults(formats.load(family(name)[1]))[1:]
            for name in ("pruned", "Turbo", "consistency")] == [(20, 7.5), (1, 1.0), (4, 8.5)]


def test_guidance_reaches_a_consistency_model(family, backend):
    model = formats.load(family("consistency")[1], backend)
    one, other = (draw(model, steps=2, guidance=scale).astype(int) for scale in (2.0, 9.0))
    assert np.abs(one - other).mean() > 0.5


# ── A single file of Stable Diffusion 2, with OpenCLIP's text encoder ─────────────────────────────

PAD, CONFIG = "tokenizer/special_tokens_map.json", "scheduler/scheduler_config.json"
FACTS = [       # a file of a folder, the scheduler's class, and what the file says further
    (PAD, "PNDM", {"pad_token": "!"}), (CONFIG, "DDPM", {"variance_type": "fixed_large"}),
    (CONFIG, "PNDM", {"timestep_spacing": "linspace"}),
    (CONFIG, "PNDM", {"prediction_type": "v_prediction"}),
    (CONFIG, "PNDM", {"skip_prk_steps": False}),
    (CONFIG, "EulerDiscrete", {"timestep_type": "continuous", "use_karras_sigmas": True,
                               "prediction_type": "v_prediction"}),
    (CONFIG, "PNDM", {"set_alpha_to_one": True}), (CONFIG, "DDIM", {"set_alpha_to_one": False}),
    (CONFIG, "DDIM", {"timestep_spacing": "linspace"}),
    (CONFIG, "DDIM", {"timestep_spacing": "trailing"}),
    (CONFIG, "DDIM", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
                      "prediction_type": "v_prediction"}),
    (CONFIG, "DDIM", {"beta_schedule": "linear"}), (CONFIG, "DDIM", {"num_train_timesteps": 500}),
    (CONFIG, "EulerDiscrete", {"use_karras_sigmas": True}),
    (CONFIG, "EulerDiscrete", {"use_karras_sigmas": True, "sigma_min": 0.3, "sigma_max": 9.0}),
    (CONFIG, "EulerAncestralDiscrete", {"timestep_spacing": "trailing"}),
    (CONFIG, "DPMSolverMultistep", {"use_karras_sigmas": True}),
    (CONFIG, "LCM", {"original_inference_steps": 100})]


@pytest.fixture(scope="module")
def silent(folder, tmp_path_factory):
    """silent(scheduler): a folder with few other settings, the settings, and the picture."""
    @functools.cache
    def make(kind):
        place = shutil.copytree(folder, tmp_path_factory.mktemp("silent") / "model")
        settings = {"_class_name": f"{kind}Scheduler", "steps_offset": 1, "skip_prk_steps": True}
        settings = SILENT | settings
        (place / CONFIG).write_text(json.dumps(settings))
        name_scheduler(place, f"{kind}Scheduler")
        tokenizer = json.loads((place / "tokenizer/tokenizer_config.json").read_text())
        (place / "tokenizer/tokenizer_config.json").write_text(json.dumps(
            {name: tokenizer[name] for name in ("model_max_length", "tokenizer_class")}))
        picture = draw(formats.load(place), steps=7, guidance=3, width=64, height=64)
        return place, settings, picture
    return make


@pytest.mark.parametrize("file, kind, fields", FACTS, ids=lambda value: value if isinstance(
    value, str) else "-".join(map(str, value.values())))
def test_a_fact_of_a_folder_draws_as_in_diffusers(file, kind, fields, reference, silent, tmp_path):
    """In seven steps; and without the fact, the picture would be another."""
    place, settings, without = silent(kind)
    place = shutil.copytree(place, tmp_path / "model")
    (place / file).write_text(json.dumps((settings if file == CONFIG else {}) | fields))
    parts = {"scheduler": getattr(diffusers, f"{kind}Scheduler").from_pretrained(
        place / "scheduler")}
    if file == PAD:
        parts["tokenizer"] = transformers.CLIPTokenizer.from_pretrained(place / "tokenizer")
    expected = theirs(reference, **parts)
    ours = draw(formats.load(place), steps=7, guidance=3, width=64, height=64)
    followed(f"{kind} {' '.join(f'{name} {value}' for name, value in fields.items())}", ours,
             without, expected)


def theirs(reference, prompt=PROMPT, **parts):
    """Return the picture that diffusers draws with these parts in place of the reference's."""
    pipe = diffusers.StableDiffusionPipeline(**reference.components | parts,
                                             requires_safety_checker=False)
    return drawn_by(pipe, prompt=prompt, negative_prompt="a dog", num_inference_steps=7,
                    guidance_scale=3.0, width=64, height=64)


def followed(what, ours, without, expected):
    """Record how far two pictures are from diffusers'; the first must be it, and not the second."""
    apart = {how: np.abs(picture.astype(int) - expected)
             for how, picture in (("followed", ours), ("passed over", without))}
    for how, error in apart.items():
        record(f"{what}, {how}: largest", error.max())
        record(f"{what}, {how}: mean", error.mean())
    assert apart["followed"].max() <= 1 and apart["passed over"].mean() > 0.05


def test_a_fact_of_other_files_draws_as_in_diffusers(reference, folder, tmp_path):
    """A learnt word of a tokenizer, peft's config, a single file's flag, ComfyUI's embedding."""
    plain, settings = formats.load(folder), {"steps": 7, "guidance": 3, "width": 64, "height": 64}
    encoder = copy.deepcopy(reference.text_encoder)
    encoder.resize_token_embeddings(49409, mean_resizing=False)
    vector = torch.randn(encoder.config.hidden_size)
    encoder.get_input_embeddings().weight[49408] = vector
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<toy>"])
    expected = theirs(reference, "a photo of a <toy>", text_encoder=encoder, tokenizer=tokenizer)

    added = shutil.copytree(folder, tmp_path / "added")
    encoder.save_pretrained(added / "text_encoder")
    tokenizer.save_pretrained(added / "tokenizer")
    ours = formats.load(added)
    without = dataclasses.replace(ours, encoders=[
        tiny_sd.Encoder(plain.encoders[0].tokenizer, *ours.encoders[0][1:])])
    followed("a learnt word of the tokenizer", draw(ours, "a photo of a <toy>", **settings),
             draw(without, "a photo of a <toy>", **settings), expected)
    save_file({"emb_params": vector[None]}, tmp_path / "toy.safetensors")
    ours = prompts.with_embeddings(plain, [tmp_path / "toy.safetensors"])
    followed("ComfyUI's embedding:name", draw(ours, "a photo of a embedding:toy", **settings),
             draw(ours, "a photo of a embedding, : toy", **settings), expected)

    for fields in {"use_rslora": True}, {"alpha_pattern": {"attn2.to_q": 40}}, {"lora_alpha": 9}:
        network = peft.get_peft_model(copy.deepcopy(reference.unet), peft.LoraConfig(
            **{"r": 4, "lora_alpha": 12, "target_modules": ["to_q", "to_v"]} | fields))
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape) / 6
        network.save_pretrained(tmp_path / "lora")
        lora = tmp_path / "lora/adapter_model.safetensors", 1.0
        ours = formats.load(folder, loras=[lora])
        config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
        (tmp_path / "lora/adapter_config.json").write_text(json.dumps(
            {key: value for key, value in config.items() if key not in fields}))
        followed(f"peft's {[*fields][0]}", draw(ours, **settings),
                 draw(formats.load(folder, loras=[lora]), **settings),
                 theirs(reference, unet=network.merge_and_unload()))

    arrays = compvis(folder)
    for name, more in ("flagged", {"v_pred": torch.zeros(0)}), ("plain", {}):
        save_file(arrays | more, tmp_path / f"{name}.safetensors")
    ours, without = (draw(formats.load(tmp_path / f"{name}.safetensors"), **settings)
                     for name in ("flagged", "plain"))
    scheduler = diffusers.PNDMScheduler(**SILENT, skip_prk_steps=True,
                                        prediction_type="v_prediction")
    followed("v_pred in a single file", ours, without, theirs(reference, scheduler=scheduler))


def open_clip(arrays):
    """transformers' text encoder under OpenCLIP's names, with one more layer, which Stable
    Diffusion 2 leaves out.
    """
    count = 1 + max(int(match[1]) for match in map(re.compile(r".*layers\.(\d+)\.").match, arrays)
                    if match)
    arrays |= {name.replace(f"layers.{count - 1}.", f"layers.{count}."): torch.randn_like(array)
               for name, array in arrays.items() if f"layers.{count - 1}." in name}
    return open_clip_names(arrays) | {"text_projection": torch.ones(2, 2),
                                      "logit_scale": torch.tensor(1.0)}


def test_single_file_of_the_second(family, backend, tmp_path):
    pipe, folder = family("Stable Diffusion 2")
    arrays, text = {}, {}
    for name, array in compvis(folder).items():
        if name.startswith("cond_stage_model."):
            text[name.removeprefix("cond_stage_model.transformer.")] = array
        else:
            arrays[name] = array
    path = tmp_path / "second.safetensors"
    save_file(arrays | {f"cond_stage_model.model.{name}": array.contiguous()
                        for name, array in open_clip(text).items()}, path)
    model = formats.load(path, backend)
    assert model.config.scheduler.prediction_type == "v_prediction"
    assert model.encoders[0].tokenizer.pad == 0
    ids = np.array([[3, 7, 11, 0, 0], [1, 2, 3, 4, 5]])
    expected = pipe.text_encoder(torch.from_numpy(ids))[0]
    weights = model.encoders[0].weights
    states = tiny_sd.text_encoder(ids, 2, tiny_sd.gelu, weights["embeddings"],
                                  weights["encoder"]["layers"])
    ours = tiny_sd.layer_norm(states[-1], **weights["final_layer_norm"])
    same("text encoder of Stable Diffusion 2", tiny_sd.to_numpy(ours), expected, 1e-5)
    chance = np.random.default_rng(0)
    x, context = (chance.normal(size=(1, 8, 6, 4)).astype(np.float32),
                  chance.normal(size=(1, 7, 128)).astype(np.float32))
    like = model.unet["conv_in"]["bias"]
    ours = tiny_sd.predict(model, x, 500, tiny_sd.array_like(like, context))
    same("U-Net of Stable Diffusion 2", ours,
         last(pipe.unet(first(x), 500, torch.as_tensor(context)).sample), 2e-5)


# ── Inpainting ────────────────────────────────────────────────────────────────────────────────────

INPAINTED = [       # any two of these together
    (4, 1.0, diffusers.DDIMScheduler), (9, 0.6, diffusers.DDIMScheduler),
    (9, 1.0, diffusers.DPMSolverMultistepScheduler),
    (4, 0.6, diffusers.DPMSolverMultistepScheduler),
    (4, 1.0, diffusers.EulerAncestralDiscreteScheduler),
    (9, 0.6, diffusers.EulerAncestralDiscreteScheduler)]


@with_torch_too("channels, strength, scheduler", INPAINTED, [INPAINTED[0], INPAINTED[-1]])
def test_inpainting(channels, strength, scheduler, reference, folder_with, backend):
    """With a model for it, and with any other.

    The same picture as diffusers', inside of the mask and outside.
    """
    network = make_unet(in_channels=channels) if channels == 9 else reference.unet
    schedule = scheduler.from_config(reference.scheduler.config, timestep_spacing="leading",
                                     clip_sample=False)
    pipe = diffusers.StableDiffusionInpaintPipeline(**{**reference.components, "unet": network,
                                                       "scheduler": schedule},
                                                    requires_safety_checker=False)
    picture, (mask, white) = some_picture(1, 72, 64), some_mask()
    expected = drawn_by(pipe, Image.fromarray(picture), white, negative_prompt="a dog", width=72,
                        height=64, strength=strength, num_inference_steps=5, guidance_scale=3.0)
    model = formats.load(folder_with(unet=network, scheduler=schedule), backend)
    ours = draw(model, steps=5, guidance=3.0, init=picture, strength=strength, mask=mask)
    same_pictures("pictures inpainted", ours, expected)


def test_a_model_for_inpainting_needs_a_mask(folder_with):
    model = formats.load(folder_with(unet=make_unet(in_channels=9)))
    assert explain.sizes(model, "red", 32, 32)
    with pytest.raises(tiny_sd.UserError, match="needs a picture and a mask"):
        draw(model, steps=2)
