"""Every layout of Stable Diffusion 1.x gives the same weights, and a wrong file is refused by name.
"""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny_sd
from conftest import compvis_name
from extras import formats, like_diffusers, singlefile
from extras.narrow import wide
from extras.tools import models
from helpers import drawn, write_model

PARTS = ("text_encoder", "vae", "unet")


def rewrite(path, change):
    """Lets change() edit the arrays of a file.

    The old file, perhaps linked to by others, stays as it is.
    """
    arrays = load_file(path)
    path.unlink()
    arrays = change(arrays) or arrays
    save_file({name: array.contiguous() for name, array in arrays.items()}, path)


def rename(*rules):
    """A change of names, by regular expressions."""
    def change(arrays):
        renamed = {}
        for name, array in arrays.items():
            for old, new in rules:
                name = re.sub(old, new, name)
            renamed[name] = array
        assert renamed.keys() != arrays.keys()
        return renamed
    return change


def network(model, part):
    return model.encoders[0].weights if part == "text_encoder" else getattr(model, part)


def same_weights(ours, others, change=lambda array: array):
    """Bit for bit, in any dtype and axis order."""
    for part in PARTS:
        found, expected = (tiny_sd.flatten(network(model, part)) for model in (ours, others))
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            array = change(torch.from_numpy(np.array(array, np.float32))).numpy()
            same = np.asarray(wide(found[name]), np.float32).ravel() == array.ravel()
            assert same.all(), name


@pytest.fixture(scope="module")
def plain(folder):
    return formats.load(folder)


def weights_file(folder, part):
    return next((folder / part).glob("*.safetensors"))


# ── Layouts ───────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype",
                         [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_single_file_equals_folder(kind, dtype, single_file, plain):
    """Bit for bit, after rounding to the file's type."""
    same_weights(formats.load(single_file(kind)), plain, lambda array: array.to(dtype).float())


@pytest.mark.slow
def test_single_file_draws_the_folders_picture(single_file, folder, backend):
    one, other = (drawn(formats.load(path, backend), "a photo of a cat", "a dog", (3,), 3,
                        sampler="ddim", width=72, height=64)
                  for path in (folder, single_file("F32")))
    assert np.array_equal(one, other) and one.std() > 20


@pytest.mark.slow
def test_diffusers_reads_the_single_file(single_file, folder, reference):
    """So its names are those of CompVis, as diffusers knows them."""
    pipe = StableDiffusionPipeline.from_single_file(single_file("F32"), config=str(folder),
                                                    local_files_only=True)
    for part in PARTS:
        theirs, ours = (getattr(p, part).state_dict() for p in (reference, pipe))
        assert (theirs.keys() == ours.keys()
                and all(torch.equal(theirs[name], ours[name]) for name in theirs))


def test_single_file_without_text_model(single_file, plain, tmp_path):
    path = shutil.copy(single_file("F16"), tmp_path / "old.safetensors")
    rewrite(path, rename((r"transformer\.text_model\.", "transformer.")))
    same_weights(formats.load(path), plain, lambda array: array.half().float())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folder(dtype, folder_with, plain):
    """As diffusers' variant="fp16" names its files."""
    folder = folder_with()
    for part in PARTS:
        path = weights_file(folder, part)
        rewrite(path, lambda arrays: {name: array.to(dtype) for name, array in arrays.items()})
        path.rename(path.with_suffix(".fp16.safetensors"))
    same_weights(formats.load(folder), plain, lambda array: array.to(dtype).float())


def convolutions(arrays):
    for name in arrays:
        if "attentions.0" in name and arrays[name].ndim == 2:
            arrays[name] = arrays[name][:, :, None, None]


def positions(arrays):
    arrays["text_model.embeddings.position_ids"] = torch.arange(77)[None]


OLD_VAE = rename((r"0\.to_q", "0.query"), (r"0\.to_k", "0.key"), (r"0\.to_v", "0.value"),
                 (r"0\.to_out\.0", "0.proj_attn"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, changes",
    {"text_model. before each name": ("text_encoder",
                                      [rename((r"^(text_model\.)?", "text_model."))]),
     "position_ids": ("text_encoder", [rename((r"^(text_model\.)?", "text_model.")), positions]),
     "VAE with query, key, value, proj_attn": ("vae", [OLD_VAE]),
     "VAE whose attention is 1x1 convolutions": ("vae", [convolutions]),
     "both": ("vae", [OLD_VAE, convolutions]),
     "U-Net whose 1x1 convolutions are linear": ("unet", [lambda arrays: {name: array.flatten(
         1) if array.shape[2:] == (1, 1) else array for name, array in arrays.items()}])}.items(),
    ids=lambda x: x if isinstance(x, str) else "")
def test_older_folders(part, changes, folder_with, plain):
    folder = folder_with()
    for change in changes[1]:
        rewrite(weights_file(folder, changes[0]), change)
    same_weights(formats.load(folder), plain)


@pytest.mark.slow
def test_both_forms_of_tokenizer(folder_with):
    """tokenizer.json as written today, vocab.json and merges.txt as written before."""
    new = folder_with()
    assert ((new / "tokenizer/tokenizer.json").exists()
            and not (new / "tokenizer/merges.txt").exists())
    one = formats.load(new).encoders[0].tokenizer
    (new / "tokenizer/tokenizer.json").unlink()
    models.write_tokenizer(new / "tokenizer", formats.clip_tokenizer())
    other = formats.load(new).encoders[0].tokenizer
    assert vars(one) == vars(other) == vars(formats.clip_tokenizer())


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────

def spoil(arrays):
    del arrays["conv_in.bias"]
    arrays["conv_in.scale"] = torch.zeros(3)
    arrays["conv_out.bias"] = torch.zeros(5)
    arrays["down_blocks.0.resnets.0.conv1.weight"] = torch.zeros(32, 32, 1, 1)


def test_wrong_weights_are_named(folder_with):
    folder = folder_with()
    rewrite(weights_file(folder, "unet"), spoil)
    with pytest.raises(tiny_sd.UserError) as error:
        formats.load(folder)
    for line in (
        "unet", "conv_in.bias is missing", "conv_in.scale is unknown",
        "conv_out.bias has shape (5,) instead of (4,)",
        "down_blocks.0.resnets.0.conv1.weight has shape (32, 32, 1, 1) instead of (32, 32, 3, 3)",
    ):
        assert line in str(error.value)


@pytest.mark.slow
def test_every_missing_array_is_named(single_file, plain, tmp_path, monkeypatch):
    """Also for a single file, from which the sizes must be inferred.

    One array of many is left out in turn.
    """
    empty = SimpleNamespace(vocab={"": 0}, EOS="", length=77)   # quicker, as is a small vocabulary
    monkeypatch.setattr(formats, "clip_tokenizer", lambda *pad: empty)
    arrays = load_file(single_file("BF16"))
    tokens = compvis_name("text_encoder", "embeddings.token_embedding.weight")
    arrays[tokens] = arrays[tokens][:16].clone()
    path = tmp_path / "missing.safetensors"
    for part in PARTS:
        names = list(tiny_sd.flatten(network(plain, part)))
        sizes = [name for name in names
                 if re.search(r"resnets\.0\.conv1|conv_in|embedding|fc1|quant|samplers|0\.attn2",
                              name)]
        for name in {*sizes, *names[::40]}:
            old = compvis_name(part, name)
            save_file({other: array for other, array in arrays.items() if other != old}, path)
            with pytest.raises(tiny_sd.UserError) as error:
                formats.load(path)
            assert name in str(error.value) or old in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name, named", [
    ("model.diffusion_model.label_emb.0.0.weight", "add_embedding.linear_1.weight"),
    ("model.diffusion_model.input_blocks.x.0", "input_blocks.x.0"),
    (f"model.diffusion_model.input_blocks.{'1' * 250}.0.op.weight", "input_blocks.1111"),
    ("model.diffusion_model.extra", "extra"), ("first_stage_model.encoder.extra", "encoder.extra"),
    ("cond_stage_model.transformer.text_model.encoder.extra", "encoder.extra")],
    ids=lambda name: name[:60])
def test_unknown_arrays_of_a_network_in_a_single_file_are_named(name, named, single_file, tmp_path):
    path = shutil.copy(single_file("BF16"), tmp_path / "more.safetensors")
    rewrite(path, lambda arrays: arrays.update({name: torch.zeros(1)}))
    with pytest.raises(tiny_sd.UserError, match=rf"its config: {re.escape(named)}\S* is unknown"):
        formats.load(path)


@pytest.mark.parametrize("shape", [(4, 2), (4,), ()])
def test_queries_keys_and_values_that_do_not_divide_by_three(shape):
    name = "encoder.layers.0.self_attn.in_proj_weight"
    with pytest.raises(tiny_sd.UserError, match=f"{re.escape(name)} does not hold q, k and v"):
        singlefile.from_open_clip({name: np.zeros(shape)})


OTHERS = [      # as files hold them beside the networks
    "cond_stage_model.logit_scale", "cond_stage_model.text_projection",
    "cond_stage_model.transformer.text_projection.weight", "control_model.time_embed.0.weight",
    "cond_stage_model.transformer.vision_model.embeddings.class_embedding", "denoiser.sigmas",
    "embedding_manager.string_to_param_dict.*", "first_stage_model.loss.discriminator.main.0.bias",
    "first_stage_model.model_ema.decay", "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
    "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight",
    "model_ema.diffusion_modelconv_inbias"]


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "state_dict."])
def test_what_lies_outside_the_networks_is_left_out(prefix, single_file, plain, tmp_path, capsys):
    """And named in one line, the first five of many."""
    path = shutil.copy(single_file("F32"), tmp_path / "more.safetensors")
    rewrite(path, lambda arrays: {prefix + name: array for name, array in arrays.items()}
            | {name: torch.zeros(3) for name in OTHERS})
    same_weights(formats.load(path), plain)
    names = f"{'; '.join(sorted(OTHERS)[:5])}; and {len(OTHERS) - 5} more"
    assert capsys.readouterr().err == (
        f"tiny_sd: {path} holds more than a model; ignored: {names}\n")


@pytest.mark.slow
def test_training_state_is_ignored(single_file, plain, tmp_path):
    """As in v1-5-pruned.safetensors: the moving averages and the schedule, of any dtype."""
    path = shutil.copy(single_file("F32"), tmp_path / "pruned.safetensors")
    rewrite(path, lambda arrays: arrays.update(
        {"model_ema.num_updates": torch.tensor(5, dtype=torch.int32),
         "model_ema.diffusion_modelconv_inbias": torch.zeros(4),
         "alphas_cumprod_prev": torch.zeros(9), "sqrt_alphas_cumprod": torch.zeros(9),
         "posterior_variance": torch.zeros(9), "log_one_minus_alphas_cumprod": torch.zeros(9),
         "logvar": torch.zeros(9)}))
    same_weights(formats.load(path), plain)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_files_are_refused(keep, single_file, folder_with, tmp_path):
    data = single_file("BF16").read_bytes()[:keep]
    (tmp_path / "cut.safetensors").write_bytes(data)
    folder = folder_with()
    weights_file(folder, "vae").unlink()
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(data)
    for path in (tmp_path / "cut.safetensors", folder):
        with pytest.raises(tiny_sd.UserError, match="safetensors"):
            formats.load(path)


@pytest.mark.parametrize("name", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors",
                                  "text_encoder/config.json", "scheduler/scheduler_config.json",
                                  "tokenizer/tokenizer.json"])
def test_missing_files_are_named(name, folder_with):
    folder = folder_with()
    (folder / name).unlink()
    with pytest.raises(tiny_sd.UserError, match=name):
        formats.load(folder)


@pytest.mark.parametrize("part", PARTS)
def test_configs_are_checked(part, folder_with):
    """Invalid JSON, and a config without one of the sizes.

    One line that names the file or the size, and no traceback.
    """
    folder = folder_with()
    path = folder / part / "config.json"
    config = json.loads(path.read_text())
    for text, expected in [
            ("{", f"{part}/config.json"),
            *((json.dumps({k: v for k, v in config.items() if k != key}), key)
              for key in ({"text_encoder": ["hidden_size"], "vae": ["latent_channels"],
                           "unet": ["block_out_channels"]}[part]))]:
        path.unlink()
        path.write_text(text)
        with pytest.raises(tiny_sd.UserError, match=expected):
            formats.load(folder)


def test_no_model(tmp_path):
    with pytest.raises(tiny_sd.UserError, match="nothing"):
        formats.load(tmp_path / "nothing")


# ── As a library ─────────────────────────────────────────────────────────────────────────────────


def test_the_bundled_model_from_another_folder(tmp_path, monkeypatch):
    """By the name that the README has."""
    monkeypatch.chdir(tmp_path)
    assert formats.load("weights/emoji").name == formats.load("emoji").name == "emoji"
    with pytest.raises(tiny_sd.UserError, match="weights/none: no such file or folder"):
        formats.load("weights/none")
    assert tiny_sd.load("emoji").name == "emoji"
    place = re.escape(str(tiny_sd.HERE / "weights" / "none"))
    with pytest.raises(tiny_sd.UserError, match=f"^there is no folder none nor {place}: "):
        tiny_sd.load("none")


@pytest.mark.parametrize("load", [formats.load, tiny_sd.load])
def test_a_type_that_numpy_does_not_compute_in_means_torch(load, tmp_path):
    """As on the command line; also a device."""
    folder = write_model(tmp_path / "tiny")
    assert load(folder, dtype="bfloat16").unet["conv_in"]["weight"].dtype == torch.bfloat16
    assert isinstance(load(folder).unet["conv_in"]["weight"], np.ndarray)
    with pytest.raises(tiny_sd.UserError, match="need backend torch"):
        load(folder, "numpy", dtype="float16")
    if not torch.cuda.is_available():
        for device in "cuda", "cuda:1", "gpu":
            with pytest.raises(tiny_sd.UserError, match=f"no {device}"):
                load(folder, "torch", device)
    with pytest.raises(tiny_sd.UserError, match="no backend jax"):
        load(folder, "jax")


def test_weights_come_in_the_order_of_their_file(folder_with):
    """The same in every process: a training that is resumed depends on it."""
    path = next(folder_with().glob("unet/*.safetensors"))
    data = path.read_bytes()
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    assert [*tiny_sd.read_safetensors(path)] == [*header]


def test_the_plain_loader_names_what_a_config_lacks(tmp_path):
    folder = write_model(tmp_path / "tiny")
    path = folder / "unet/config.json"
    config = json.loads(path.read_text())
    del config["block_out_channels"]
    path.write_text(json.dumps(config))
    with pytest.raises(tiny_sd.UserError, match="its configs do not describe .*block_out_channels"):
        tiny_sd.load(folder)


def test_the_plain_loader_reads_no_device(tmp_path):
    """Which would fill the memory, or never end."""
    folder = write_model(tmp_path / "tiny")
    for name in "vae/config.json", "unet/diffusion_pytorch_model.safetensors":
        (folder / name).rename(tmp_path / "kept")
        (folder / name).symlink_to("/dev/zero")
        with pytest.raises(tiny_sd.UserError, match=name):
            tiny_sd.load(folder)
        (tmp_path / "kept").replace(folder / name)


def test_the_plain_loader_refuses_arrays_that_overlap(tmp_path):
    """A small file of thousands that share their numbers would fill the memory."""
    folder = write_model(tmp_path / "tiny")
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(tiny_sd.UserError, match="is not a whole safetensors file: its arrays over"):
        tiny_sd.load(folder)


@pytest.mark.parametrize("part, name, value", [
    ("unet", "sample_size", 10 ** 9), ("unet", "sample_size", "64"),
    ("unet", "addition_time_embed_dim", 10 ** 9), ("vae", "latent_channels", 10 ** 9),
    ("vae", "latent_channels", [4]), ("scheduler", "num_train_timesteps", 10 ** 9)])
def test_the_plain_loader_refuses_sizes_that_no_weights_confirm(part, name, value, tmp_path):
    """They would fill the memory as soon as something is drawn."""
    folder = write_model(tmp_path / "tiny")
    file = folder / part / f"{'scheduler_' * (part == 'scheduler')}config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(tiny_sd.UserError, match=re.escape(f"{part}'s {name} cannot be {value!r}")):
        tiny_sd.load(folder)


@pytest.mark.parametrize("name, said", [
    ("a." * 3000 + "weight", "recursion"), ("down_blocks.999.x", "counts to 999")])
def test_the_plain_loader_refuses_a_name_without_end(name, said, tmp_path):
    """Nor does a number in it make a list of so many: thousands of names would fill the memory."""
    folder = write_model(tmp_path / "tiny")
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(1)}, path)
    with pytest.raises(tiny_sd.UserError, match=said):
        tiny_sd.load(folder)


@pytest.mark.parametrize(
    "settings, named",
    [({"seeds": 0}, "seeds"), ({"seeds": ()}, "seeds"),
     ({"sampler": "x"}, "no sampler x: choose one of ddpm"), ({"steps": 0}, "steps 0"),
     ({"steps": 2.0}, "steps 2.0"), ({"width": 65}, "width 65"), ({"height": 8}, "height 8"),
     ({"sampler": "lcm", "schedule": "karras"}, "lcm"),
     ({"guidance": "7"}, "guidance must be a number, not '7'"), ({"steps": "20"}, "steps 20"),
     ({"strength": "0.5"}, "strength must be a number, not '0.5'"), ({"width": "64"}, "width 64"),
     ({"guidance": np.zeros(2)}, "guidance must be a number, not array([0., 0.])"),
     ({"prompt": ["a cat", "a dog"]}, "prompt must be a text, not ['a cat', 'a dog']"),
     ({"negative": 5}, "negative must be a text, not 5"),
     ({"init": Image.new("RGB", (64, 64))}, "an array (height, width, 3), not Image"),
     ({"init": "a.png"}, "an array (height, width, 3), not str"),
     ({"init": np.ones((64, 64, 3), np.uint8), "mask": Image.new("1", (64, 64))}, "array of bool"),
     ({"init": np.zeros((64, 64))}, "3), not (64, 64)"),
     ({"init": np.zeros((64, 64, 4))}, "3), not (64, 64, 4)"),
     ({"mask": np.zeros((64, 64), bool)}, "a mask needs a picture of its size"),
     ({"init": np.zeros((64, 64, 3)), "mask": np.zeros((64, 72), bool)},
      "a mask needs a picture of its size")])
def test_one_clear_error(plain, settings, named):
    with pytest.raises(tiny_sd.UserError, match=re.escape(named)):
        like_diffusers.generate(plain, **{"prompt": "a cat"} | settings)


def test_latents_of_one_picture_alone(plain):
    with pytest.raises(tiny_sd.UserError, match="channels., not .8, 8, 4."):
        tiny_sd.decode(plain, np.zeros((8, 8, 4), np.float32))
