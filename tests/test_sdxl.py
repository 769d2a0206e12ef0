"""Models with two text encoders: SDXL, small and random, equal to diffusers' on both backends.

And as folders, single files and with LoRAs, in all spellings.
"""

import dataclasses
import functools
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.models.embeddings import TimestepEmbedding
from PIL import Image
from safetensors.torch import load_file, save_file
from test_lora import largest_error

import tiny_sd
from conftest import TEXT, VAE, name_scheduler, same, with_torch_too
from extras import cli, formats, like_diffusers, shapes
from helpers import TWO_ENCODERS, drawn, write_model
from helpers_diffusers import (  # noqa: F401  (no_gradients is a fixture of all tests)
    PROMPT,
    TEXT_1,
    TEXT_2,
    UNET,
    arrays,
    drawn_by,
    first,
    last,
    no_gradients,
    original_layout,
    same_pictures,
    some_mask,
    some_picture,
    unet_name,
)

pytestmark = pytest.mark.slow

TRAILING = diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}
SAMPLERS = {"euler": (diffusers.EulerDiscreteScheduler, {}), "ddim": (diffusers.DDIMScheduler, {}),
            "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {}), "euler_a": TRAILING}


@pytest.fixture(scope="module")
def pipe(xl):
    """The small model as a diffusers pipeline."""
    return xl[0]


@pytest.fixture(scope="module")
def folder(xl):
    """The small model as a folder, written by diffusers."""
    return xl[1]


@pytest.fixture
def folder_with(folder, tmp_path):
    """folder_with("unet", sample_size=9): a copy of the folder with another config."""
    def write(part, **changes):
        copy = shutil.copytree(folder, tmp_path / "xl", copy_function=os.link)
        path = next((copy / part).glob("*config.json"))
        config = {**json.loads(path.read_text()), **changes}
        path.unlink()
        path.write_text(json.dumps(config))
        if part == "scheduler":
            name_scheduler(copy, config["_class_name"])
        return copy
    return write


@pytest.fixture(scope="module")
def model(folder, backend):
    return formats.load(folder, backend)


@pytest.fixture
def small(tmp_path):
    """A model with two text encoders that draws in milliseconds, as a folder."""
    return write_model(tmp_path / "small", TWO_ENCODERS)


# ── The parts ───────────────────────────────────────────────────────────────────────────────────


def test_both_text_encoders(model, pipe):
    """(9.8): side by side before their last layers; and the second's projected row at the end."""
    texts = [PROMPT, "", "日本語 " * 50, "a <|endoftext|> b"]
    expected, _, expected_pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    context, pooled = tiny_sd.embed_prompts(model, texts)
    same("two text encoders", tiny_sd.to_numpy(context), expected, 1e-5)
    same("pooled text", tiny_sd.to_numpy(pooled), expected_pooled, 1e-5)
    assert np.array_equal(tiny_sd.embed_prompts(model, texts)[0], context)


def test_an_encoder_of_one_layer(folder, tmp_path):
    """Its state before the last layer is that of the embeddings."""
    encoder = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**TEXT_2 | {"num_hidden_layers": 1})).eval()
    copy = shutil.copytree(folder, tmp_path / "xl", copy_function=os.link)
    shutil.rmtree(copy / "text_encoder_2")
    encoder.save_pretrained(copy / "text_encoder_2")
    model = formats.load(copy)
    ids = torch.from_numpy(model.encoders[1].tokenizer.encode(PROMPT)[0])[None]
    expected = encoder(ids, output_hidden_states=True).hidden_states[-2]
    context, _ = tiny_sd.embed_prompts(model, [PROMPT])
    same("a text encoder of one layer", context[..., -128:], expected, 1e-5)


def test_no_text_is_zero_and_an_empty_one_is_not(model):
    context, pooled = map(tiny_sd.to_numpy, tiny_sd.embed_prompts(model, [None, "", PROMPT]))
    assert not context[0].any() and not pooled[0].any()
    assert context[1].any(-1).all() and pooled[1].any() and (context[2] != context[1]).any()


def test_what_the_unet_is_told(model, backend, pipe):
    """(9.9), as the pipeline and the reference U-Net make it."""
    x, t, pooled = arrays(backend, np.zeros((2, 13, 9, 4)), np.array([1, 500]),
                          np.random.default_rng(0).normal(size=(2, 80)))
    given = {"text_embeds": torch.as_tensor(pooled),
             "time_ids": torch.tensor([[104, 72, 0, 0, 104, 72.0]] * 2)}
    heard = []
    handles = [network.register_forward_hook(lambda module, inputs, y: heard.append(y))
               for network in (pipe.unet.time_embedding, pipe.unet.add_embedding)]
    pipe.unet(first(x), torch.as_tensor(t), torch.zeros(2, 77, 192), added_cond_kwargs=given)
    for handle in handles:
        handle.remove()
    same("time, pooled text and sizes", model.embed_time(model, x, t, pooled), sum(heard), 1e-5)


def test_a_distilled_model_is_told_its_guidance():
    """(9.5), as diffusers' pipeline makes it, in every row."""
    torch.manual_seed(0)
    network = TimestepEmbedding(16, 24, cond_proj_dim=64)
    weights = {name: array.numpy() for name, array in network.state_dict().items()}
    model = SimpleNamespace(config=SimpleNamespace(unet=SimpleNamespace(time_cond_proj_dim=64)),
                            unet={"time_embedding": tiny_sd.nest(weights)})
    t, x = np.array([1, 500, 981]), np.zeros((3, 8, 8, 4), np.float32)
    times = torch.tensor(tiny_sd.timestep_embedding(t, 16), dtype=torch.float32)
    told = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(
        None, torch.tensor([7.5] * 3), 64)
    ours = like_diffusers.embed_time_and_guidance(model, x, t, guidance=8.5)
    same("time and guidance", ours, network(times, told), 1e-4)     # of phases up to 7500


@pytest.mark.parametrize("size", [(13, 9), (8, 16), (5, 3)])
def test_unet(size, model, backend, pipe):
    """Each picture at its own time, with its own words and pooled text."""
    chance, (h, w) = np.random.default_rng(0), size
    x, t, context, pooled = arrays(
        backend, chance.normal(size=(3, h, w, 4)), np.array([1, 500, 981]),
        chance.normal(size=(3, 77, 192)), chance.normal(size=(3, 80)))
    ids = torch.tensor([[8 * h, 8 * w, 0, 0, 8 * h, 8 * w]] * 3)
    expected = pipe.unet(first(x), torch.as_tensor(t), torch.as_tensor(context), added_cond_kwargs={
        "text_embeds": torch.as_tensor(pooled), "time_ids": ids}).sample
    temb = model.embed_time(model, x, t, pooled)
    ours = tiny_sd.unet(x, temb, context, [1, 2, 3], 32, **model.unet)
    same("U-Net of SDXL", ours, last(expected), 1e-5)


SIZES = {   # of the true SDXL, with the number of parameters
    "text_encoder": ({**TEXT, "hidden_size": 768, "intermediate_size": 3072,
                      "num_hidden_layers": 12, "num_attention_heads": 12}, 123_060_480),
    "text_encoder_2": ({**TEXT, "hidden_size": 1280, "intermediate_size": 5120,
                        "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu",
                        "projection_dim": 1280}, 694_659_840),
    "vae": ({**VAE, "block_out_channels": (128, 256, 512, 512), "in_channels": 3,
             "out_channels": 3}, 83_653_863),
    "unet": ({**UNET, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
              "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
              "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
              "in_channels": 4, "out_channels": 4}, 2_567_463_684)}


@pytest.mark.parametrize("part", SIZES)
def test_parameters_at_true_size(part):
    """Names, shapes and number, against the reference without its numbers."""
    config, number = SIZES[part]
    make = {"text_encoder": lambda **c: transformers.CLIPTextModel(
                transformers.CLIPTextConfig(**c)),
            "text_encoder_2": lambda **c: transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(**c)),
            "vae": diffusers.AutoencoderKL, "unet": diffusers.UNet2DConditionModel}[part]
    with torch.device("meta"):
        network = make(**config)

    def plain(shape):       # a 1x1 convolution is a linear layer
        return tuple(shape[:2] if tuple(shape[2:]) == (1, 1) else shape)
    theirs = {name.removeprefix("text_model."): plain(p.shape)
              for name, p in network.named_parameters()}
    ours = tiny_sd.flatten(shapes.SHAPES[part](tiny_sd.read_config(part, config)))
    assert {name: plain(shape) for name, shape in ours.items()} == theirs
    assert sum(map(math.prod, ours.values())) == number


def test_share_of_the_transformers():
    """Six sevenths, as the notes say."""
    expected = tiny_sd.flatten(shapes.unet_shapes(tiny_sd.read_config("unet", SIZES["unet"][0])))
    inside = sum(math.prod(shape) for name, shape in expected.items() if "attentions" in name)
    assert inside / SIZES["unet"][1] == pytest.approx(6 / 7, abs=0.005)


# ── Whole pictures ──────────────────────────────────────────────────────────────────────────────


def draw(model, negative="a dog", **settings):
    return drawn(model, PROMPT, negative, **{"steps": 3, "guidance": 5.0, "seeds": (5,)} | settings)


@pytest.fixture(scope="module")
def reference_picture(pipe):
    """reference_picture(sampler, pipeline, arguments): what diffusers draws."""
    def draw(sampler="euler", cls=diffusers.StableDiffusionXLPipeline, negative="a dog", **how):
        scheduler, options = SAMPLERS[sampler]
        scheduler = scheduler.from_config(pipe.scheduler.config, clip_sample=False, **options)
        how = {"num_inference_steps": 3, "guidance_scale": 5.0, "width": 72, "height": 104} | how
        return drawn_by(cls(**{**pipe.components, "scheduler": scheduler}),
                        negative_prompt=negative, **how)
    return functools.cache(draw)


def with_sampler(model, sampler):
    """Return the model with the spacing that the reference has for this sampler."""
    scheduler, options = SAMPLERS[sampler]
    settings = vars(model.config.scheduler) | {"_class_name": scheduler.__name__} | options
    config = vars(model.config) | {"scheduler": SimpleNamespace(**settings)}
    return dataclasses.replace(model, config=SimpleNamespace(**config))


EULERS = [("euler", negative) for negative in (None, "", "a dog")]


@with_torch_too("sampler, negative", [*EULERS, *((name, "a dog") for name in SAMPLERS
                                                if name != "euler")], EULERS)
def test_text_to_image(sampler, negative, model, reference_picture):
    ours = draw(with_sampler(model, sampler), negative, width=72, height=104)
    same_pictures("pictures of SDXL", ours, reference_picture(sampler, negative=negative))


@with_torch_too("sampler", SAMPLERS, ["euler"])
def test_image_to_image(sampler, model, reference_picture, pipe):
    picture = some_picture(1, 72, 104)
    ours = draw(with_sampler(model, sampler), steps=6, init=picture, strength=0.5)
    expected = reference_picture.__wrapped__(
        sampler, diffusers.StableDiffusionXLImg2ImgPipeline, image=Image.fromarray(picture),
        strength=0.5, num_inference_steps=6)
    same_pictures("pictures of SDXL from pictures", ours, expected)


@with_torch_too("sampler, strength", [*zip(SAMPLERS, (1.0, 0.6, 1.0, 0.6)), ("euler", 0.6)],
                [("euler", 0.6)])
def test_inpainting_with_an_ordinary_model(sampler, strength, model, reference_picture):
    picture, (mask, white) = some_picture(1, 72, 64), some_mask()
    ours = draw(with_sampler(model, sampler), None, steps=5, init=picture, strength=strength,
                 mask=mask)
    expected = reference_picture.__wrapped__(
        sampler, diffusers.StableDiffusionXLInpaintPipeline, None, height=64, strength=strength,
        image=Image.fromarray(picture), num_inference_steps=5, mask_image=white)
    same_pictures("pictures of SDXL inpainted", ours, expected)


@pytest.mark.parametrize("change", [
    {"negative": None}, {"negative": ""}, {"original_size": (9, 999)}, {"target_size": (999, 9)},
    {"crops_coords_top_left": (50, 7)}, {"prompt_2": "a tree"}, {"sampler": "euler_a"}],
    ids=lambda change: next(iter(change)))
def test_the_reference_answers(change, reference_picture):
    """Every input changes the picture; otherwise equal pictures would show nothing."""
    one, other = reference_picture(), reference_picture(**change)
    assert np.abs(one.astype(int) - other).mean() > 0.5


def test_defaults(folder_with):
    turbo = folder_with("scheduler", _class_name="EulerAncestralDiscreteScheduler",
                        timestep_spacing="trailing")
    assert like_diffusers.defaults(formats.load(turbo)) == ("euler_a", 1, 1.0)


def test_a_row_for_each_picture_of_a_batch(model):
    both = draw(model, None, steps=1, seeds=(5, 6), width=64, height=64)
    alone = draw(model, None, steps=1, seeds=(6,), width=64, height=64)
    first, second = (np.abs(picture.astype(int) - alone[0]).max() for picture in both)
    assert second <= 1 < first


def test_in_half_precision(folder):
    """Both text encoders and the U-Net have the dtype requested."""
    model = formats.load(folder, dtype="bfloat16")
    kinds = {array.dtype for name, array in everything(model).items() if "vae" not in name}
    assert kinds == {torch.bfloat16} and model.vae["quant_conv"]["bias"].dtype == torch.float32
    plain = draw(formats.load(folder), None, steps=1, width=64, height=64)
    half = draw(model, None, steps=1, width=64, height=64)
    assert 0 < np.abs(plain.astype(int) - half).mean() < 10


# ── Folders ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("part, changes, named", [
    ("unet", {"cross_attention_dim": 64}, "cross_attention_dim is 64, but .* is 64 [+] 128"),
    ("unet", {"addition_embed_type": "image"}, "addition_embed_type cannot be 'image'"),
    ("unet", {"addition_embed_type": None}, "projection_class_embeddings_input_dim 272"),
    ("unet", {"addition_time_embed_dim": None}, "projection_class_embeddings_input_dim 80"),
    ("unet", {"addition_time_embed_dim": 31}, "addition_time_embed_dim cannot be 31"),
    ("unet", {"projection_class_embeddings_input_dim": 99}, "projection_class_embed.* 272"),
    ("unet", {"transformer_layers_per_block": [1, 2]}, "_layers_per_block.*differ in number"),
    ("unet", {"transformer_layers_per_block": 0}, r"transformer_layers_per_block cannot be \[0, 0"),
    ("unet", {"transformer_layers_per_block": [1, [2], 3]}, "transformer_layers_per_block cannot"),
    ("unet", {"transformer_layers_per_block": [1, 2, 4]}, "transformer_blocks.3.* is missing"),
    ("unet", {"reverse_transformer_layers_per_block": [3, 2, 1]}, "reverse_.* is not supported"),
    ("unet", {"time_cond_proj_dim": 32}, "both added text and an embedded guidance scale"),
    ("scheduler", {"steps_offset": "1"}, "steps_offset cannot be '1'"),
    ("scheduler", {"steps_offset": None}, "steps_offset cannot be None"),
    ("text_encoder_2", {"projection_dim": 81}, "projection_class_embeddings_input_dim 273"),
    ("text_encoder_2", {"projection_dim": None}, "text_encoder_2's projection_dim cannot be None"),
    ("text_encoder_2", {"hidden_act": "relu"}, "text_encoder_2's hidden_act cannot be 'relu'"),
    ("text_encoder_2", {"layer_norm_eps": 1e-6}, "text_encoder_2's layer_norm_eps 1e-06"),
    ("text_encoder_2", {"num_attention_heads": 3}, "text_encoder_2's hidden_size does not divide"),
    ("text_encoder_2", {"vocab_size": 49407}, "below the text_encoder_2's vocab_size"),
    ("text_encoder_2", {"max_position_embeddings": 76}, "text_encoder_2 has no room for"),
    ("text_encoder_2", {"max_position_embeddings": 78}, "take different numbers of tokens"),
    ("tokenizer_2", {"model_max_length": 60}, "take different numbers of tokens"),
    ("tokenizer_2", {"pad_token": "!?!"}, "vocabulary has no '!.!'"),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_configs_are_checked(part, changes, named, folder_with):
    with pytest.raises(tiny_sd.UserError, match=named):
        formats.load(folder_with(part, **changes))


@pytest.mark.parametrize("name", ["text_encoder_2/config.json", "text_encoder_2/model.safetensors",
                                  "tokenizer_2/tokenizer_config.json"])
def test_missing_files_are_named(name, small):
    (small / name).unlink()
    with pytest.raises(tiny_sd.UserError, match=name):
        formats.load(small)


def test_without_its_second_text_encoder(small):
    shutil.rmtree(small / "text_encoder_2")
    with pytest.raises(tiny_sd.UserError, match="no text_encoder_2|cross_attention_dim is 28"):
        formats.load(small)


def test_wrong_weights_are_named(small):
    path = small / "text_encoder_2/model.safetensors"
    weights = load_file(path)
    weights["text_projection.bias"] = weights.pop("text_projection.weight")[0].clone()
    save_file(weights, path)
    with pytest.raises(tiny_sd.UserError, match="text_encoder_2 do not fit its config: "
                       "text_projection.bias is unknown; text_projection.weight is missing"):
        formats.load(small)


def test_the_plain_loader_reads_it_too(folder):
    one, other = tiny_sd.load(folder), formats.load(folder)
    assert np.array_equal(draw(one, steps=1, width=64, height=64),
                          draw(other, steps=1, width=64, height=64))


def test_a_change_of_the_second_text_encoders_file_is_noticed(small):
    model, path = formats.load(small), small / "text_encoder_2/model.safetensors"
    formats.check_unchanged(model)
    os.utime(path, ns=(0, 0))
    with pytest.raises(tiny_sd.UserError, match="text_encoder_2/model.safetensors was changed"):
        formats.check_unchanged(model)


def test_too_little_memory_is_one_line(folder, monkeypatch):
    """Told before anything large is made: the U-Net's 27 million numbers are 0.1 GB."""
    import extras.checks
    monkeypatch.setattr(extras.checks, "free_memory", lambda: 5e7)
    with pytest.raises(tiny_sd.UserError, match=r"needs at least 0\.1 GB of memory"):
        formats.load(folder)


def test_the_files_to_fetch():
    """Of a model with a second text encoder those of it as well."""
    def names(has):
        return {name for name in formats.files_of(has) if "_2" in name}
    assert names(lambda name: "_2" not in name) == set()
    assert names(lambda name: True) == {
        "text_encoder_2/config.json", "text_encoder_2/model.fp16.safetensors",
        "tokenizer_2/tokenizer_config.json", "tokenizer_2/special_tokens_map.json"}
    assert names(lambda name: "fp16" not in name) == {
        "text_encoder_2/config.json", "text_encoder_2/model.safetensors",
        "tokenizer_2/tokenizer_config.json", "tokenizer_2/special_tokens_map.json"}


# ── Single files ────────────────────────────────────────────────────────────────────────────────

SURPLUS = {
    "conditioner.embedders.1.model.logit_scale": torch.tensor(1.0),
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77),
    "betas": torch.zeros(9)}


@pytest.fixture(scope="module")
def single_file(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "xl.safetensors"
    save_file(original_layout(folder) | SURPLUS, path)
    return path


def everything(model):
    """Return {name: array} of all networks of a model."""
    texts = {str(i): encoder.weights for i, encoder in enumerate(model.encoders)}
    return tiny_sd.flatten({"unet": model.unet, "vae": model.vae} | texts)


def config_of(model, part):
    encoders = dict(zip(("text_encoder", "text_encoder_2"), model.encoders))
    return encoders[part].config if part in encoders else getattr(model.config, part)


def test_single_file_equals_folder(single_file, folder, capsys):
    """Bit for bit, its settings included; and nothing usual is worth a line."""
    one, other = formats.load(single_file), formats.load(folder)
    assert capsys.readouterr().err == ""
    ours, theirs = everything(one), everything(other)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name].ravel(), theirs[name].ravel()) for name in theirs)
    for part, names in {
            "text_encoder": TEXT_1.keys() - {"bos_token_id", "eos_token_id"},
            "text_encoder_2": TEXT_2.keys() - {"bos_token_id", "eos_token_id"},
            "vae": ["block_out_channels", "layers_per_block", "latent_channels", "scaling_factor"],
            "unet": UNET.keys() - {"use_linear_projection", "sample_size"},
            "scheduler": ["_class_name", "timestep_spacing", "steps_offset", "prediction_type",
                          "beta_start", "beta_end"]}.items():
        for name in names:
            ours, theirs = (getattr(config_of(model, part), name) for model in (one, other))
            assert ours == theirs, name
    assert one.config.unet.sample_size == 128 and one.digest
    assert [encoder.tokenizer.pad for encoder in one.encoders] == [49407, 0]


def test_diffusers_reads_the_single_file(single_file, folder, pipe):
    """So its names are the ones that diffusers knows."""
    read = diffusers.StableDiffusionXLPipeline.from_single_file(
        single_file, config=str(folder), local_files_only=True)
    for part in ("text_encoder", "text_encoder_2", "vae", "unet"):
        theirs, ours = (getattr(p, part).state_dict() for p in (pipe, read))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_half_precision_single_file(folder, tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        halved = {name: array.to(dtype) for name, array in original_layout(folder).items()}
        save_file(halved, tmp_path / "half.safetensors")
        ours = everything(formats.load(tmp_path / "half.safetensors"))
        for name, array in everything(formats.load(folder)).items():
            expected = torch.from_numpy(np.array(array)).to(dtype).float().numpy()
            found = np.array(tiny_sd.to_numpy(ours[name] + np.float32(0)))
            assert np.array_equal(found.ravel(), expected.ravel()), name


@pytest.mark.parametrize("name", [
    "conditioner.embedders.1.model.text_projection",
    "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_bias",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
    "model.diffusion_model.label_emb.0.0.weight", "model.diffusion_model.label_emb.0.2.bias",
    "model.diffusion_model.output_blocks.5.2.conv.weight"])
def test_what_is_missing_is_named(name, folder, tmp_path):
    weights = original_layout(folder)
    del weights[name]
    save_file(weights, tmp_path / "less.safetensors")
    *_, kind = name.rpartition(".")
    with pytest.raises(tiny_sd.UserError, match=f"{kind if kind != 'in_proj_bias' else 'q_proj'}"
                                                ".* is missing"):
        formats.load(tmp_path / "less.safetensors")


# ── LoRAs ───────────────────────────────────────────────────────────────────────────────────────

MODULES = {"unet": ["down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
                    "down_blocks.2.attentions.1.proj_in", "down_blocks.1.resnets.0.conv1",
                    "down_blocks.0.downsamplers.0.conv",
                    "mid_block.attentions.0.transformer_blocks.2.attn2.to_out.0",
                    "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj",
                    "up_blocks.1.upsamplers.0.conv", "up_blocks.2.resnets.1.conv_shortcut"],
           "text_encoder": ["encoder.layers.0.self_attn.q_proj",
                            "encoder.layers.0.self_attn.out_proj", "encoder.layers.1.mlp.fc1"],
           "text_encoder_2": ["encoder.layers.0.self_attn.out_proj", "encoder.layers.3.mlp.fc2"]}


def kohya(part, name, rename=lambda name: name):
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_",
              "text_encoder_2": "lora_te2_text_model_"}[part]
    name = prefix + (rename(name) if part == "unet" else name).replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def kohya_original(part, name):
    return kohya(part, name, lambda name: unet_name(f"{name}.weight").removesuffix(".weight"))


def of_diffusers(part, name):
    name = f"{part}.{'text_model.' * (part != 'unet')}{name}"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha"


NAMINGS = {"kohya": kohya, "kohya, original layout": kohya_original, "diffusers": of_diffusers}


def named_weights(model):
    """Return {part: {name: array}} of what LoRAs change, as a folder has the names."""
    return {"unet": tiny_sd.flatten(model.unet),
            "text_encoder": tiny_sd.flatten(model.encoders[0].weights),
            "text_encoder_2": tiny_sd.flatten(model.encoders[1].weights)}


@pytest.fixture(scope="module")
def pairs(folder):
    """{(part, module): (A, B)}, of rank 3."""
    torch.manual_seed(5)
    known, made = named_weights(formats.load(folder)), {}
    for part, names in MODULES.items():
        for name in names:
            out, *inner = known[part][f"{name}.weight"].shape
            inner = [inner[-1], *inner[:-1]]
            ones = [1] * (len(inner) - 1)
            made[part, name] = (torch.randn(3, *inner) / math.prod(inner) ** 0.5,
                                torch.randn(out, 3, *ones) / 3 ** 0.5)
    return made


def write_lora(path, pairs, naming, alpha=None):
    weights = {}
    for (part, name), (A, B) in pairs.items():
        down, up, scale = naming(part, name)
        weights |= {down: A.contiguous(), up: B.contiguous()}
        weights |= {} if alpha is None else {scale: torch.tensor(float(alpha))}
    save_file(weights, path)
    return path


@with_torch_too("naming", NAMINGS, ["kohya"])
def test_loras(naming, folder, pairs, backend, tmp_path):
    path = write_lora(tmp_path / "lora.safetensors", pairs, NAMINGS[naming], 6)
    plain = named_weights(formats.load(folder))
    model = formats.load(folder, backend, loras=[(path, 0.5)])
    names = sum(MODULES.values(), [])
    assert largest_error(model, plain, pairs, names, 1.0) < 1e-5


@with_torch_too("naming", NAMINGS, ["kohya"])
def test_diffusers_draws_the_same_with_a_lora(naming, folder, pairs, backend, tmp_path):
    pytest.importorskip("peft")
    # the names that diffusers' own reader of each spelling knows
    known = {key: pair for key, pair in pairs.items() if "attn" in key[1] or "ff." in key[1]}
    path = write_lora(tmp_path / "lora.safetensors", known, NAMINGS[naming],
                      None if naming == "diffusers" else 2)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    how = {"num_inference_steps": 3, "guidance_scale": 5, "width": 64, "height": 64}
    before = drawn_by(pipe, **how)
    pipe.load_lora_weights(str(path))
    pipe.fuse_lora(lora_scale=0.8)
    ours = draw(formats.load(folder, backend, loras=[(path, 0.8)]), None, width=64, height=64)
    same_pictures("picture of SDXL with a LoRA", ours, drawn_by(pipe, **how), before)


@pytest.mark.parametrize("name", [
    "lora_te3_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_9_mlp_fc1",
    "lora_unet_input_blocks_30_1_proj_in", "lora_unet_down_blocks_0_attentions_0_proj_in"])
def test_what_does_not_fit_is_named(name, folder, tmp_path):
    save_file({f"{name}.lora_up.weight": torch.zeros(3, 8)}, tmp_path / "lora.safetensors")
    with pytest.raises(tiny_sd.UserError, match=name):
        formats.load(folder, loras=[(tmp_path / "lora.safetensors", 1)])


# ── The command line ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(small, tmp_path, monkeypatch, capsys):
    """run(argument, ...): the picture that the program draws, and its parameters."""
    monkeypatch.chdir(tmp_path)

    def draw(*argv):
        assert cli.main(["red apple", "-m", str(small), "--steps", "2", *argv]) == 0
        with Image.open(capsys.readouterr().out.split()[0]) as picture:
            return np.asarray(picture), picture.text["parameters"]
    return draw


def test_no_negative_prompt_is_not_an_empty_one(run, small):
    """And --like draws each again."""
    none, empty, other = run()[0], run("-n", "")[0], run("-n", "red")[0]
    assert len({picture.tobytes() for picture in (none, empty, other)}) == 3
    model = formats.load(small)
    for negative, picture in (None, none), ("", empty), ("red", other):
        assert np.array_equal(drawn(model, "red apple", negative, steps=2)[0], picture)
    for name, negative in ("out.png", None), ("out-1.png", ""), ("out-2.png", "red"):
        args = cli.make_job(["--like", name, "-m", str(small)])
        assert args.negative_prompt == negative


def test_a_list_goes_on_where_it_was(run, small, tmp_path, capsys):
    """A picture without a negative prompt differs from one with an empty prompt."""
    (tmp_path / "prompts.txt").write_text("red apple\n")
    argv = ["--prompts", "prompts.txt", "-m", str(small), "--steps", "1"]
    assert cli.main(argv) == cli.main(argv) == 0
    assert capsys.readouterr().out == "out-0001.png\n"
    assert cli.main([*argv, "-n", ""]) == cli.main([*argv, "-n", ""]) == 0
    assert capsys.readouterr().out == "out-0001-1.png\n"


def test_explain_show_and_preview(run, small, tmp_path, capsys):
    assert cli.main(["red apple", "-m", str(small), "--explain"]) == 0
    said = capsys.readouterr().out
    counted = sum(array.size for array in everything(formats.load(small)).values())
    totals = {name: int(number.replace(",", "")) for name, number in re.findall(
        r"^(\w+), all of it +([\d,]+)", said, re.M)}
    assert list(totals) == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert sum(totals.values()) == counted
    assert re.search(r"^text_encoder_2 text_projection +10 ", said, re.M)

    run("--preview", "preview.png")
    assert Image.open("preview.png").size == Image.open("out.png").size
    assert cli.main(["red apple", "-m", str(small), "--steps", "2", "--show", "page"]) == 0
    assert (tmp_path / "page/index.html").exists()
