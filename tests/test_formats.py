"""Settings in a folder or file are followed as in transformers and diffusers, refused, or reported;
and if a file is not a model, the error says what it is.
"""

import json
import re
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_sd
from conftest import compvis, record
from extras import cli, formats, like_diffusers, singlefile, tensors
from extras.tools import models
from helpers import CONFIG, TOKENIZER, TWO_ENCODERS, write_model

pytestmark = pytest.mark.slow


@pytest.fixture
def small(tmp_path):
    return write_model(tmp_path / "model")


def changed(file, **fields):
    """Change fields of a JSON file; remove those given as None."""
    settings = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in settings.items()
                                if value is not None}))


# ── Tokenizers ──────────────────────────────────────────────────────────────────────────────────

EOS, BANG = "<|endoftext|>", {"content": "!", "lstrip": False, "rstrip": False, "normalized": False,
                              "single_word": False}
DECODER = {"49406": {"content": "<|startoftext|>", "special": True},
           "49407": {"content": EOS, "special": True}}
WORD = {"content": "<Cat-Toy>", "lstrip": False, "rstrip": False, "normalized": True,
        "single_word": False}
TOKENIZERS = {      # name: {file: content}
    "plain": {}, "pad in the config": {"tokenizer_config.json": {"pad_token": "!"}},
    "pad in the map": {"tokenizer_config.json": {"pad_token": EOS},
                       "special_tokens_map.json": {"pad_token": "!"}},
    "pad in the map, at length": {"tokenizer_config.json": {"pad_token": EOS},
                                  "special_tokens_map.json": {"pad_token": BANG}},
    "pad in both, with a decoder": {
        "tokenizer_config.json": {"pad_token": EOS, "added_tokens_decoder": DECODER},
        "special_tokens_map.json": {"pad_token": "!"}},
    "a word added": {"added_tokens.json": {"<cat-toy>": 49408, "sks": 49409}},
    "an empty word": {"added_tokens.json": {"": 49408}},
    "a word with a capital": {"added_tokens.json": {"<Cat-Toy>": 49408}},
    "a word in the decoder": {"tokenizer_config.json": {
        "added_tokens_decoder": DECODER | {"49408": WORD | {"special": False}}}},
    "a special word": {"tokenizer_config.json": {"added_tokens_decoder": DECODER | {
        "49408": WORD | {"special": True, "normalized": False}}}},
    "a word by itself": {"tokenizer_config.json": {"added_tokens_decoder": DECODER | {
        "49408": WORD | {"content": "sks", "single_word": True, "special": False}}}},
    "special words": {"special_tokens_map.json": {
        "mask_token": "photo", "cls_token": {"content": "SKS"},
        "additional_special_tokens": ["<cat-toy>", "sks"]}},
    "a word that pads": {"tokenizer_config.json": {"added_tokens_decoder": DECODER | {
        "0": BANG | {"special": True}}, "pad_token": "!"}}}
TEXTS = ["", "a <cat-toy>, on <Cat-Toy>s and sks", "SKSs x sks", "a photo <|endoftext|> of",
         "<cat-toy><cat-toy>", "Wow!! a!b !"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_transformers(name, tmp_path):
    from transformers import CLIPTokenizer
    folder = tmp_path / "tokenizer"
    models.write_tokenizer(folder, formats.clip_tokenizer())
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77,
                                                              "tokenizer_class": "CLIPTokenizer"}))
    for file, content in TOKENIZERS[name].items():
        path = folder / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | content))
    reference = CLIPTokenizer.from_pretrained(folder)
    ours = formats.read_tokenizer(folder, folder, "")
    for text in TEXTS:
        theirs = reference(text, padding="max_length", max_length=77).input_ids
        assert ours.encode(text)[0].tolist() == theirs, (text, reference.tokenize(text))
    saved = tmp_path / "saved"      # by today's transformers: all of it in tokenizer.json
    reference.save_pretrained(saved)
    again = formats.read_tokenizer(saved, saved, "")
    for text in TEXTS:
        assert again.encode(text)[0].tolist() == ours.encode(text)[0].tolist()


@pytest.mark.parametrize("fields, named", [
    ({"padding_side": "left"}, "padding_side 'left'"),
    ({"split_special_tokens": True}, "split_special_tokens True"),
    ({"additional_special_tokens": [*map(str, range(10 ** 5))]}, "adds words of more than"),
    ({"bos_token": "!"}, "bos_token '!'"),
    ({"tokenizer_class": "T5Tokenizer"}, "T5Tokenizer"),
    ({"added_tokens_decoder": {"9000": {"content": "<new>"}}}, "vocabulary are not all below"),
    ({"added_tokens_decoder": {"9000": {"content": "x" * 200_000}}}, "adds words of more than"),
    ({"added_tokens_decoder": {"x": {"content": "<new>"}}}, "not a Stable Diffusion"),
    ({"added_tokens_decoder": {"1": {}}}, "not a Stable Diffusion"),
    ({"added_tokens_decoder": [3]}, "not a Stable Diffusion")])
def test_tokenizers_that_are_not_clips_are_refused(fields, named, small):
    changed(small / "tokenizer/tokenizer_config.json", **fields)
    with pytest.raises(tiny_sd.UserError, match=named):
        formats.load(small)


# ── Folders ─────────────────────────────────────────────────────────────────────────────────────


def test_sdxl_without_zeros_for_an_empty_prompt(tmp_path):
    """What diffusers' force_zeros_for_empty_prompt says; unless it is false, no text is zeros."""
    folder, drawn = write_model(tmp_path / "model", TWO_ENCODERS), {}
    for zeros in None, True, False:
        changed(folder / "model_index.json", force_zeros_for_empty_prompt=zeros)
        for negative in None, "":
            *_, drawn[zeros, negative] = like_diffusers.generate(
                formats.load(folder), "red apple", negative, steps=2, guidance=5)
    assert np.array_equal(drawn[None, None], drawn[True, None])
    assert np.array_equal(drawn[False, None], drawn[True, ""])
    assert not np.allclose(drawn[True, None], drawn[True, ""])


@pytest.mark.parametrize("named, sampler", [
    (["diffusers", "EulerDiscreteScheduler"], "euler"), (["diffusers", "LCMScheduler"], "lcm"),
    ([None, None], "plms"), (["diffusers"], "plms"), ("DDIMScheduler", "plms"), (3, "plms")])
def test_the_index_names_the_schedulers_class(named, sampler, small):
    """As in diffusers, which knows the configs of all its schedulers to fit each other's."""
    changed(small / "scheduler/scheduler_config.json", _class_name="PNDMScheduler")
    changed(small / "model_index.json", scheduler=named)
    assert like_diffusers.defaults(formats.load(small))[0] == sampler


@pytest.mark.parametrize("fields, steps, guidance", [
    ({}, 1, 1.0), ({"prediction_type": "v_prediction"}, 20, 7.5),
    ({"rescale_betas_zero_snr": True}, 20, 7.5), ({"timestep_spacing": "leading"}, 20, 7.5)])
def test_trailing_euler_is_turbo_only_for_epsilon(fields, steps, guidance, small):
    changed(small / "scheduler/scheduler_config.json", **{
        "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"} | fields)
    assert like_diffusers.defaults(formats.load(small))[1:] == (steps, guidance)


def split_up(folder, part, suffix):
    """Part a part's weights into two files with an index, as diffusers and transformers do."""
    path, = (folder / part).glob("*.safetensors")
    arrays, stem = load_file(path), path.stem if suffix == ".safetensors" else (
        "pytorch_model" if part.startswith("text") else path.stem)
    path.unlink()
    where = {name: f"{stem}-0000{1 + i % 2}-of-00002{suffix}" for i, name in enumerate(arrays)}
    for file in {*where.values()}:
        shard = {name: arrays[name] for name in arrays if where[name] == file}
        save = save_file if suffix == ".safetensors" else torch.save
        save(shard, folder / part / file)
    (folder / part / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": where}))


def same_weights(model, other):
    for ours, theirs in [(model.unet, other.unet), (model.vae, other.vae), *(
            (a.weights, b.weights) for a, b in zip(model.encoders, other.encoders))]:
        ours, theirs = tiny_sd.flatten(ours), tiny_sd.flatten(theirs)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("parts", ["shards", "whole", "variant"])
def test_folders_in_other_files(suffix, parts, small, tmp_path):
    plain = formats.load(shutil.copytree(small, tmp_path / "plain"))
    for part in "unet", "vae", "text_encoder":
        path, = (small / part).glob("*.safetensors")
        if parts == "shards":
            split_up(small, part, suffix)
        else:
            middle = ".fp16" if parts == "variant" else ""
            arrays = load_file(path)
            path.unlink()
            stem = "pytorch_model" if suffix == ".bin" and part == "text_encoder" else path.stem
            new = small / part / f"{stem}{middle}{suffix}"
            save_file(arrays, new) if suffix == ".safetensors" else torch.save(arrays, new)
    same_weights(formats.load(small), plain)


def test_weights_of_another_variant_are_told(small, capsys):
    path = small / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    formats.load(small)
    said = capsys.readouterr().err
    assert "unet is read from diffusion_pytorch_model.non_ema.safetensors" in said


def test_a_folder_whose_vae_is_taesd(small, tmp_path):
    from diffusers import AutoencoderTiny
    torch.manual_seed(3)
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    shutil.rmtree(small / "vae")
    tiny.save_pretrained(small / "vae")
    tiny.save_pretrained(tmp_path / "tiny")
    model, x = formats.load(small), np.random.default_rng(0).normal(size=(1, 4, 4, 4))
    with torch.no_grad():
        theirs = tiny.decode(torch.from_numpy(x).permute(0, 3, 1, 2).float()).sample
    theirs = (theirs.permute(0, 2, 3, 1).numpy() / 2 + 0.5).clip(0, 1) * 255
    assert np.abs(tiny_sd.decode(model, x).astype(float) - theirs.round()).max() <= 1


@pytest.mark.parametrize("fields", [{f"new{i}": 1 for i in range(100_000)}, {"": 1}],
                         ids=["many", "one without a name"])
def test_unknown_settings_take_one_line(fields, small, capsys):
    changed(small / "unet/config.json", **fields)
    formats.load(small)
    line, = capsys.readouterr().err.splitlines()
    assert "of the unet are unknown here" in line and len(line) < 500


@pytest.mark.parametrize("ids", [
    [k * (2 ** 61 - 1) for k in range(1, 100_000)], [-k * (2 ** 61 - 1) for k in range(1, 100_000)],
    [1.5], [None], ["0"]], ids=["colliding", "negative", "a fraction", "none", "a text"])
@pytest.mark.parametrize("load", [formats.load, tiny_sd.load])
def test_ids_that_are_none(load, ids, small, capsys):
    """A dict of numbers chosen to collide takes a time that grows with their square."""
    changed(small / "tokenizer/vocab.json", **{f"new{i}": n for i, n in enumerate(ids) if n})
    if ids == [None]:
        (small / "tokenizer/vocab.json").write_text("{}")
    start = time.process_time()
    with pytest.raises(tiny_sd.UserError, match="tokenizer"):
        load(small)
    assert time.process_time() - start < 10


def test_what_would_fill_the_memory_is_refused(small):
    """The attention of a prompt of 20,000 tokens; a page that shows a token of 4 MB."""
    changed(small / "text_encoder/config.json", max_position_embeddings=20_000)
    with pytest.raises(tiny_sd.UserError, match="max_position_embeddings cannot be 20000"):
        formats.load(small)
    changed(small / "text_encoder/config.json", max_position_embeddings=77)
    vocab = json.loads((small / "tokenizer/vocab.json").read_text())
    changed(small / "tokenizer/vocab.json", **{"a" * 5000: vocab.pop(next(iter(vocab)))})
    with pytest.raises(tiny_sd.UserError, match="more than 1000 characters"):
        formats.load(small)


@pytest.mark.parametrize("word, written", [
    ("µm", "μm"), ("s", "ſ"), ("i̇", "İ"), ("İ", "i"), ("K", "K")])
def test_an_added_word_in_letters_that_only_look_alike(word, written, small):
    """(?i:µ) matches three letters, which lower() does not turn into one."""
    token = {"content": word, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": True, "special": False}
    changed(small / "tokenizer/tokenizer_config.json", added_tokens_decoder={"20": token})
    model = formats.load(small)
    ids = model.encoders[0].tokenizer.tokens(f"a {written} cat")
    assert {*map(type, ids)} == {int}


@pytest.mark.parametrize("file, fields, named", [
    ("model_index.json", {"_class_name": "FluxPipeline"}, "says that it is a FluxPipeline"),
    ("unet/config.json", {"strange_new_thing": 3}, "strange_new_thing: "),
    ("vae/config.json", {"strange_new_thing": True}, "strange_new_thing: "),
    ("scheduler/scheduler_config.json", {"strange": "x"}, "strange: "),
    ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler",
                                         "interpolation_type": "log_linear"}, "interpolation_type"),
    ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler", "timestep_scaling": 5.0},
     "timestep_scaling"),
    ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding"),
    ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow_sigmas")])
def test_what_is_not_followed_is_named(file, fields, named, small, capsys):
    changed(small / file, **fields)
    formats.load(small)
    line, = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.parametrize("file, fields, named", [
    ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
    ("unet/config.json", {"attention_type": "gated"}, "attention_type"),
    ("unet/config.json", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type"),
    ("vae/config.json", {"_class_name": "AsymmetricAutoencoderKL"}, "AsymmetricAutoencoderKL"),
    ("vae/config.json", {"down_block_types": ["DownEncoderBlock2D", "AttnDown"]}, "AttnDown"),
    ("text_encoder/config.json", {"model_type": "xlm-roberta"}, "xlm-roberta"),
    ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask"),
    ("text_encoder/config.json", {"eos_token_id": 5}, "eos_token_id 5 is not the tokenizer's"),
    ("model_index.json", {"requires_aesthetics_score": True}, "the refiner of SDXL"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
    ("scheduler/scheduler_config.json", {"sigma_min": "x"}, "sigma_min"),
    ("scheduler/scheduler_config.json", {"original_inference_steps": 0}, "original_inference"),
    ("unet/config.json", {"in_channels": 5}, "5 input channels, one of them depth"),
    ("unet/config.json", {"in_channels": 8}, "InstructPix2Pix"),
    ("unet/config.json", {"layers_per_block": 31}, "layers_per_block"),
    ("text_encoder/config.json", {"num_hidden_layers": 10 ** 9}, "num_hidden_layers")])
def test_what_changes_the_picture_is_refused(file, fields, named, small):
    changed(small / file, **fields)
    with pytest.raises(tiny_sd.UserError, match=re.escape(named)):
        formats.load(small)


def test_every_field_of_a_network_is_known():
    """In diffusers' classes: followed, refused or known to be unread; none is forgotten."""
    import inspect

    import diffusers

    from extras import checks
    for part, kind in ("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL):
        fields = {*inspect.signature(kind.__init__).parameters} - {"self"}
        known = {*checks.CONFIG_FIELDS[part], *checks.FIXED[part], *checks.UNREAD[part].split()}
        assert fields <= known, fields - known


# ── Single files ────────────────────────────────────────────────────────────────────────────────

KEY = "conditioner.embedders.0.model.transformer.resblocks.31.ln_1.weight"


def text_of(layers, width=1024):
    """Return the shapes of a text encoder, under transformers' names, cheap in memory."""
    config = CONFIG["text_encoder"] | {
        "vocab_size": 49408, "hidden_size": width, "intermediate_size": 8,
        "num_hidden_layers": layers, "max_position_embeddings": 77, "num_attention_heads": 1}
    return {name: torch.zeros(shape, dtype=torch.float16)
            for name, shape in models.shapes_of("text_encoder", config).items()}


@pytest.mark.parametrize("start, layers, kept", [
    ("cond_stage_model.model.", 24, 23), ("cond_stage_model.model.", 23, 23),
    ("conditioner.embedders.0.model.", 24, 23), ("cond_stage_model.model.", 5, 4)])
def test_layers_of_open_clip(start, layers, kept, folder, tmp_path):
    """Published files have 24 layers, and Stable Diffusion 2 skips the last; others have 23."""
    from test_families import open_clip_names
    names = {name: array for name, array in compvis(folder).items() if "cond_stage" not in name}
    text = open_clip_names(text_of(layers, 64))
    path = tmp_path / "second.safetensors"
    save_file(names | {f"{start}{name}": array.contiguous() for name, array in text.items()}, path)
    settings, arrays, pads, *_ = singlefile.read_single_file(path)
    assert singlefile.count(arrays["text_encoder"], "encoder.layers") == kept == settings[
        "text_encoder"]["num_hidden_layers"]
    assert pads == ["!"] and settings["text_encoder"]["hidden_act"] == "gelu"
    turbo = "conditioner" in start
    scheduler = settings["scheduler"]
    assert scheduler.get("prediction_type", "epsilon") == ("epsilon" if turbo else "v_prediction")
    assert (scheduler.get("timestep_spacing") == "trailing") == turbo


def test_stable_diffusion_2_under_transformers_names(folder, tmp_path):
    names = {name: array for name, array in compvis(folder).items() if "cond_stage" not in name}
    path = tmp_path / "second.safetensors"
    save_file(names | {f"cond_stage_model.transformer.text_model.{name}": array
                       for name, array in text_of(2).items()}, path)
    settings, arrays, pads, *_ = singlefile.read_single_file(path)
    assert pads == ["!"] and settings["text_encoder"]["hidden_act"] == "gelu"
    assert singlefile.count(arrays["text_encoder"], "encoder.layers") == 2
    assert settings["scheduler"]["prediction_type"] == "v_prediction"
    assert settings["unet"]["attention_head_dim"] != 8


@pytest.mark.parametrize("more, header, expected", [
    ({"v_pred": torch.zeros(0)}, {}, {"prediction_type": "v_prediction"}),
    ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {},
     {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ({}, {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
    ({}, {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
    ({"flag": torch.tensor([True]), "n": torch.zeros(2, dtype=torch.uint8),
      "odd": torch.zeros(2, dtype=torch.uint16),
      "i": torch.zeros(2, dtype=torch.int16)}, {}, {})])
def test_flags_and_headers_of_a_single_file(more, header, expected, single_file, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    save_file(load_file(single_file("F16")) | more, path, header)
    settings, *_ = formats.read(path)
    plain, *_ = formats.read(single_file("F16"))
    assert settings["scheduler"] == plain["scheduler"] | expected
    model = formats.load(path)
    zero = model.alpha_bars[-1] == 0
    assert zero == ("ztsnr" in more)
    assert ("ignored" in capsys.readouterr().err) == ("flag" in more)


def test_the_size_in_the_header(single_file, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(load_file(single_file("F16")), path, {"modelspec.resolution": "768x768"})
    assert formats.load(path).config.unet.sample_size == 96


FILES = {       # name: (bytes or tensors, what is said)
    "ema.safetensors": ({"model_ema.diffusion_modelinput_blocks00weight": torch.zeros(2)},
                        "only the running mean (EMA) of a model"),
    "refiner.safetensors": ({KEY: torch.zeros(2), "model.diffusion_model.label_emb.0.0.weight":
                             torch.zeros(2, 2)}, "the refiner of SDXL"),
    "lora.safetensors": ({"lora_unet_a.lora_up.weight": torch.zeros(2, 2)}, "a LoRA: --lora"),
    "flux.safetensors": ({"double_blocks.0.a": torch.zeros(2)}, "a Flux"),
    "playground.safetensors": ({"edm_mean": torch.zeros(2)}, "other noise levels"),
    "model.yaml": (b"model:\n  target: ldm.models.diffusion.ddpm\n", "a text, such as a config"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4\n",
                        "Git LFS"),
    "page.safetensors": (b"<!DOCTYPE html>\n<html><head>", "a web page"),
    "page.ckpt": (b"\n<html>", "a web page"), "empty.safetensors": (b"", "empty"),
    "model.gguf": (b"GGUF\3\0\0\0", "a GGUF file"),
    "a.safetensors": (b"\x1f\x8b\x08", "an archive"),
    "pickle.safetensors": (b"\x80\x02}q\x00.", "a pickle, as torch wrote before"),
    "picture.safetensors": (b"\x89PNG\r\n\x1a\n", "a picture")}


@pytest.mark.parametrize("option", ["-m", "--vae", "--lora", "--embedding"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_told_what_it_is(name, option, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, said = FILES[name]
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    argv = ["cat", *(["-m", str(small)] if option != "-m" else []), option, str(path)]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "Traceback" not in err
    own = said.startswith("a LoRA") and option == "--lora" or "levels" in said and option != "-m"
    assert own or said in err, err


@pytest.mark.parametrize("option", ["-m", "--vae", "--lora"])
def test_a_name_that_says_something_else(option, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(2)}, "torch.safetensors")
    save_file({"a": torch.zeros(2)}, "safe.ckpt")
    with zipfile.ZipFile("zip.safetensors", "w") as file:
        file.writestr("a.txt", "a")
    for name, said in {"torch.safetensors": tensors.TORCH, "safe.ckpt": tensors.SAFETENSORS,
                       "zip.safetensors": tensors.TORCH}.items():
        assert cli.main(["cat", *(["-m", str(small)] if option != "-m" else []), option, name]) == 2
        err = capsys.readouterr().err
        assert f"{name} is {said}, whatever its name says" in err and err.count("\n") == 1


# ── float8 ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("scaled", [False, True])
def test_float8(kind, scaled, single_file, tmp_path):
    """Every value of a byte; and a whole model, whose numbers are those that torch reads."""
    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, kind))
    arrays = {"every": every}
    for name, array in load_file(single_file("F32")).items():
        narrow = array.ndim > 1 and array.dtype == torch.float32
        arrays[name] = array.to(every.dtype) if narrow else array
        if narrow and scaled and name.endswith("weight") and "diffusion_model" in name:
            arrays[name[:-len("weight")] + "scale_weight"] = torch.tensor(1.5)
    path = tmp_path / "a.safetensors"
    save_file(arrays, path)
    found = tensors.read_tensors(path)
    assert np.array_equal(found["every"], every.float(), equal_nan=True)
    for name, array in arrays.items():
        if array.dtype == every.dtype and name != "every":
            factor = 1.5 if name[:-len("weight")] + "scale_weight" in arrays else 1
            error = np.abs(found[name].astype(np.float32) - array.float().numpy() * factor).max()
            record(f"weights of {kind}", error)
            assert error == 0
    assert formats.load(path).config.unet.in_channels == 4


# ── What hangs ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [
    "model_index.json", "tokenizer/special_tokens_map.json", "tokenizer/added_tokens.json",
    "tokenizer/tokenizer.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"])
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_a_pipe_or_an_endless_file_is_refused(name, kind, small, capsys):
    """Reading them would take forever."""
    import os
    (small / name).unlink(missing_ok=True)
    os.mkfifo(small / name) if kind == "pipe" else os.symlink("/dev/zero", small / name)
    assert cli.main(["cat", "-m", str(small), "--steps", "1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and Path(name).name in err


@pytest.mark.parametrize("arrays", [
    {"decoder.layers.0.weight": torch.zeros(())}, {"0.weight": torch.zeros(0)},
    {"decoder.layers.99999999.weight": torch.zeros(1)},
    {"decoder.layers.0.weight": torch.zeros(8, 4, 3, 3), "decoder.layers.x": torch.zeros(1)},
    {"decoder.layers.0.weight": torch.zeros(0, 0, 3, 3)}, {"encoder.layers.": torch.zeros(1)},
    {"1.weight": torch.zeros(1), "": torch.zeros(1)},
    {"99999999999.weight": torch.zeros(1)}])
def test_hostile_taesds_are_refused(arrays, small, tmp_path, capsys):
    save_file(arrays, tmp_path / "taesd_decoder.safetensors")
    argv = ["cat", "-m", str(small), "--vae", str(tmp_path / "taesd_decoder.safetensors")]
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_added_word_is_one_token_of_the_model(small):
    """It is in the prompt's ids, in the program's pictures, and in the line about cut text."""
    n = len(TOKENIZER.vocab)
    (small / "tokenizer/added_tokens.json").write_text(json.dumps({"<toy>": n}))
    changed(small / "text_encoder/config.json", vocab_size=n + 1)
    path = small / "text_encoder/model.safetensors"
    arrays = load_file(path)
    name = "text_model.embeddings.token_embedding.weight"
    arrays[name] = torch.cat([arrays[name], torch.ones(1, 12)])
    save_file(arrays, path)
    tokenizer = formats.load(small).encoders[0].tokenizer
    ids, cut = tokenizer.encode("red <TOY> apple <toy>")
    assert list(ids).count(n) == 2 and not cut
    assert tokenizer.decode([n]) == "<toy>"
