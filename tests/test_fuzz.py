"""Valid inputs, spoilt at random: each run draws a whole picture or says in one line why not, and
leaves nothing else behind.

Others each time: the seed stands under the results.

    python -m pytest tests/test_fuzz.py --fuzz 5000 --fuzz-seed 1
"""

import contextlib
import json
import math
import os
import random
import re
import shutil
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file, save_file

from conftest import compvis_unet_name, compvis_vae_name, open_clip_names
from extras import cli, facts, files, formats, things
from extras.samplers import SCHEDULERS
from helpers import (
    CONFIG,
    FILES,
    TWO_ENCODERS,
    contents,
    random_arrays,
    sd,
    shapes_of,
    write_model,
)
from helpers_comfy import graph, write_graph

pytestmark = pytest.mark.slow

JSON = [None, True, 0, -1, 1, 7, 2.5, 1e30, float("nan"), "", "gelu", [], [4, 8], [0], {}, {"a": 1},
        10**30]
FLAGS = {
    "--steps": ["0", "1", "3", "5000", "x", "-1", "1e3"],
    "--cfg-scale": ["0", "1", "nan", "inf", "-1", "100", "x"],
    "--strength": ["0", "0.01", "1", "nan", "2", "x"],
    "-W": ["0", "1", "4", "26", "99999", "-4", "x"], "-H": ["6", "1000000", "5"],
    "-s": ["-1", "-2", "0", str(2**64 - 1), str(2**64), "x"], "-b": ["0", "2", "1001", "x"],
    "--sampler": [*sd.SAMPLERS, "x", "DPM++ 2M Karras", "k_euler_a"],
    "-i": ["in.png", "none.png", ".", ""], "--mask": ["in.png", "none.png", "", "."],
    "-m": ["", "none", "in.png", "kept.png"],
    "-o": ["out.png", "x.jpg", "x.webp", "x.gif", "./", "no/", "{seed}.png", "{prompt}.jpg",
           "no/x.png", "/proc/x.png", "", "kept.png", "a" * 300 + ".png"],
    "--lora": ["in.png", "none", "lora.safetensors", "lora.safetensors:nan", ":", "a:b:1"],
    "--embedding": ["in.png", "none", "word.safetensors", "lora.safetensors", "", ".", "kept.png"],
    "--clip-skip": ["0", "1", "2", "3", "101", "x", "-1"], "--plain-prompt": [None],
    "--vae": ["model", "xl/vae", "vae.safetensors", "single.ckpt", "in.png", "lora.pt", "taesd"],
    "--prediction": ["v", "sample", "x"],
    "--preview": ["preview.png", "kept.png", "x.jpg", "no/x.png", "", ".", "a" * 300 + ".png"],
    "--karras": [None], "--scheduler": ["simple", "sgm uniform", "automatic", "x", ""],
    "--cfg-rescale": ["0", "0.7", "2", "nan", "x"],
    "--cfg-interval": ["0:1", "0.2:0.8", "0.9:0.1", "1", "x:", ":", "nan:nan", "0-1"],
    "--control-from": ["0", "0.5", "1", "x"], "--control-until": ["0", "0.5", "nan"],
    "--as": ["web-ui", "comfyui", "x"], "--merge": ["model", "none:1", "lora.safetensors:nan", ""],
    "--web-ui": [None], "--enlarge": ["0", "1", "3", "17", "x"], "--things": [None, "apple", ""],
    "--dtype": ["float16", "x"], "--device": ["x"], "--backend": ["numpy", "x"],
    "--hires": ["2", "1.3:1:1", "2:0.5:0", "0", "2:nan", "1e9:1", ":", "2:1:x"],
    "--grid": ["steps=1,2", "seed=1", "x=1", "steps=", "steps", "cfg=1,x", "steps=1,2,3000"],
    "--models-dir": [".", "none", "in.png", ""], "--wildcards": [".", "none", "in.png", ""],
    "--only-masked": ["0", "3", "-1", "x", "5000"],
    "--tiles": [None], "--seamless": [None],
    "--resize": ["crop", "fit", "fill", "x"],
    "--frobnicate": [None], "--like": ["like.png", "in.png", "none.png", ""],
    "--show": ["", ".", "no/such", "in.png"],
    "--prompts": ["prompts.txt", "in.png", "none.txt", ""]}
FACTS = ["", "x", "-1", "0", "1", "2", "3.5", "1e3", "nan", "inf", "99999", "1" * 30, "1" * 5000,
         "--help", "-h", "..", "/", "a\0b", "🍎", "Euler a", "Euler Karras", "LCM", "8x", "x8",
         "8x8", "-8x8", "8x8x8", "12x16", "emoji", '"a, Steps: 2, Seed: 3, Size: 8x8"', '"a',
         '{"a": [1, {}', "[[", "UniPC", "DPM++ 2M SDE Karras", "euler_ancestral_sgm_uniform",
         "web UI", "some 0.8 other thing 1"]
THEIRS = ["Hires upscale", "ADetailer prompt", "ControlNet 0", "Denoising strength", "Mask", "VAE",
          "Lora", "Levels", "Enlarged", "Model hash", "Civitai resources", "Foo", "Schedule type"]
GRAPH = graph([("drawn", "steps", 2), ("size", "width", 16), ("size", "height", 12)])
LINES = ["red apple", "red", "# red", "", " ", "-s 5", "-s", "-n 'blue'", "-n 'blue", '"',
         "--steps 1", "--steps x", "-b 2", "-o x.png", "--help", "-h", "--explain", "--show x",
         "--prompts prompts.txt", "--like like.png", "--like none.png", "-m none",
         "-i in.png --mask in.png", "--mask in.png", "-p blue", "blue -p blue", "--preview x.png",
         "--karras --sampler ddim", "\0", "\x1b[31m", "\ud800", "a" * 3000, "red -- blue",
         "well-known", "--", "-", "-x", "--no-such", "\\", "\u2028", "\x85", "\f", "🍎 -s 1",
         '--prompt "red" --cfg_scale 3', "--seed 3 --prompt", '--prompt "', '"red" -s 1', '"',
         "{red|blue} __a__ [a|b]", "--negative_prompt x", "[red:apple:1]", "[[red|]:0.5] AND re :2",
         "a AND", "AND", "[:1]", f"[a:b:{'9' * 400}]", "[|]" * 400, "[" * 300 + "a:1" + "]" * 300,
         "--control lora.safetensors in.png", "--control x"]


def bytes_spoilt(path, rng):
    data = bytearray(path.read_bytes())
    kind = rng.randrange(6)
    if kind == 0:
        data = data[:rng.randrange(len(data))]
    elif kind == 1:
        data = b""
    elif kind == 2:  # the length of the header, or of whatever stands first
        data[:8] = rng.choice([0, 1, 2**40, 2**63, 2**64 - 1, len(data)]).to_bytes(8, "little")
    elif kind == 3:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(min(len(data), 2000))] = rng.randrange(256)
    elif kind == 4:
        data += bytes(rng.randrange(1, 100))
    else:
        data = rng.randbytes(rng.randrange(1, 3000))
    path.unlink()                                           # it may be linked to by the original
    path.write_bytes(data)


def header_spoilt(path, rng):
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    rng.choice([lambda: entry.update(dtype=rng.choice(["F64", "F16", "BF16", "U8", "BOOL",
                                                       "F8_E4M3", "X", 3])),
                lambda: entry.update(data_offsets=rng.choice([[0, 4], [-4, 0], [0], [4, 0],
                                                              [0, 2**62], "x"])),
                lambda: entry.update(shape=rng.choice([[], [0], [-1], [2**62, 4], "x", [1.5]])),
                lambda: entry.pop(rng.choice(list(entry))),
                lambda: header.update({"a\nb" * rng.randrange(1, 50): entry}),
                lambda: header.update({name: rng.choice(JSON)})])()
    text = json.dumps(header).encode()
    path.unlink()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def arrays_spoilt(path, rng):
    arrays = load_file(path)
    name = rng.choice(list(arrays))
    array = arrays[name].copy()
    kind = rng.randrange(6)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[rng.choice(["extra", "", "0", "a.b", name + ".x", "conv_in", "ä" * 99])] = array
    elif kind == 2:
        arrays[name] = rng.choice([array[:-1], array[None], array.reshape(-1), array[:0],
                                   np.asarray(array.sum(dtype=array.dtype))])
    elif kind == 3:
        array.reshape(-1)[rng.randrange(array.size)] = rng.choice([np.nan, np.inf, -np.inf, 3e38])
        arrays[name] = array
    elif kind == 4:
        arrays[name] = array.astype(
            rng.choice([np.float64, np.float16, np.int32, np.uint8, np.bool_]))
    else:
        arrays = dict(rng.sample(list(arrays.items()), rng.randrange(len(arrays))))
    path.unlink()
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def json_spoilt(path, rng):
    config = json.loads(path.read_text(encoding="utf-8"))
    key = rng.choice(list(config))
    if rng.random() < 0.2:
        config.pop(key)
    elif rng.random() < 0.1:
        config = rng.choice(JSON)
    else:
        config[key] = rng.choice(JSON)
    path.unlink()
    path.write_text(json.dumps(config), encoding="utf-8")


SCHEDULER = {  # what a scheduler's config may hold; a value of SPOILT for some of these
    "_class_name": [*SCHEDULERS, "X"], "skip_prk_steps": [True, False, None],
    "timestep_type": ["continuous", "discrete"], "variance_type": ["fixed_large", "fixed_small"],
    "sigma_min": [0.03, 0.5, None], "sigma_max": [14.6, 3, 700.0], "use_beta_sigmas": [True],
    "original_inference_steps": [50, 20, 1, 999], "use_exponential_sigmas": [True],
    "num_train_timesteps": [1000, 2, 50, 999], "beta_start": [0.00085, 1e-9, 0.5],
    "beta_end": [0.012, 0.02, 0.999], "beta_schedule": ["scaled_linear", "linear"],
    "prediction_type": ["epsilon", "v_prediction", "sample"], "steps_offset": [0, 1, 999],
    "timestep_spacing": ["leading", "trailing", "linspace", None], "_guidance_scale": [1, 7.5, 100],
    "set_alpha_to_one": [True, False, None], "use_karras_sigmas": [True, False],
    "rescale_betas_zero_snr": [True], "clip_sample": [True], "algorithm_type": ["sde-dpmsolver"],
    "solver_order": [3], "trained_betas": [[0.1]],
}
SPOILT = [*JSON, 10 ** 400, 0.999, 1000.0, -5, 10 ** 7, [2], [2, 2, 2], "0.012", 1e-300]
NETWORKS = {    # numbers that are valid in themselves, and need not fit each other
    "text_encoder": {"hidden_size": [12, 24], "num_hidden_layers": [1, 2, 3, 10 ** 10],
                     "num_attention_heads": [1, 3, 4], "intermediate_size": [20, 21],
                     "vocab_size": [520, 600, 3], "max_position_embeddings": [12, 77, 5],
                     "hidden_act": ["gelu", "quick_gelu", "relu"], "layer_norm_eps": [1e-5, 1e-6]},
    "vae": {"block_out_channels": [[4, 8], [8, 4], [4], [4, 8, 8], []], "layers_per_block": [1, 2],
            "latent_channels": [4, 3, 8], "in_channels": [3, 1, 4], "out_channels": [3, 4],
            "norm_num_groups": [2, 3, 4], "scaling_factor": [0.5, 1e-9, 1e9, 0], "act_fn": ["x"]},
    "unet": {"block_out_channels": [[8, 16], [16, 8], [8], [8, 16, 16]], "layers_per_block": [1, 2],
             "cross_attention_dim": [12, 16], "attention_head_dim": [2, [2, 4], [2], 3],
             "num_attention_heads": [2, [2], [2, 2, 2]], "in_channels": [3, 4, 5, 8, 9],
             "out_channels": [3, 4, 8], "sample_size": [1, 8, 9, 4095], "norm_eps": [1e-6],
             "down_block_types": [["DownBlock2D"] * 2, ["CrossAttnDownBlock2D"], ["X", "X"]],
             "up_block_types": [["UpBlock2D"] * 2, ["CrossAttnUpBlock2D"] * 2],
             "mid_block_type": [None, "X"], "time_cond_proj_dim": [None, 4, 3],
             "transformer_layers_per_block": [1, 2, [1, 3], [1], 0], "addition_embed_type": [
                 None, "text_time", "X"], "addition_time_embed_dim": [None, 4, 6, 3],
             "projection_class_embeddings_input_dim": [None, 34, 46, 35]}}
NETWORKS["text_encoder_2"] = NETWORKS["text_encoder"] | {
    "hidden_size": [16, 12], "num_attention_heads": [1, 2, 3], "projection_dim": [10, 12, None]}


def scheduler_spoilt(path, rng):
    """A scheduler with several settings, most of them good ones."""
    config = {"prediction_type": "epsilon"}
    for key in rng.sample(list(SCHEDULER), rng.randrange(1, 6)):
        config[key] = rng.choice(SCHEDULER[key] if rng.random() < 0.8 else SPOILT)
    if "_class_name" in config:
        index = path.parent.parent / "model_index.json"
        text = json.loads(index.read_text()) | {"scheduler": ["diffusers", config["_class_name"]]}
        index.unlink()
        index.write_text(json.dumps(text))
    path.unlink()
    path.write_text(json.dumps(config), encoding="utf-8")


WORDS = ["<toy>", "red", "apple", "!", "", "a\nb", "🍎", "(", "[a|b]", "a" * 300, "<|endoftext|>"]


def tokenizer_spoilt(folder, rng):
    """What a tokenizer's files say besides its vocabulary: specials, padding, words added."""
    words = rng.sample(WORDS, 2)
    token = {"content": words[0], "single_word": rng.random() < 0.5, "special": rng.random() < 0.5}
    special = rng.choice(["pad_token", "bos_token", "eos_token", "unk_token", "padding_side"])
    said = rng.choice([words[1], {"content": words[1]}, *JSON])
    name, content = rng.choice([
        ("special_tokens_map.json", {special: said}), ("added_tokens.json", {words[0]: said}),
        ("added_tokens.json", {word: 518 + i for i, word in enumerate(words)}),
        ("tokenizer_config.json", {"added_tokens_decoder": {rng.choice(["519", "520", "x"]): token},
                                   "model_max_length": rng.choice([77, 5, 10 ** 30])}),
        ("tokenizer.json", {"added_tokens": [token | {"id": rng.choice([520, 3, "x", 10 ** 9])}]}),
        ("tokenizer_config.json", {special: said, "tokenizer_class": "CLIPTokenizerFast"})])
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def networks_spoilt(folder, rng):
    """Configs with other numbers, and with weights that fit them, if there can be such."""
    part = rng.choice([part for part in NETWORKS if (folder / part).exists()])
    config = json.loads((folder / part / "config.json").read_text())
    for key in rng.sample(list(NETWORKS[part]), rng.randrange(1, 3)):
        config[key] = rng.choice(NETWORKS[part][key] if rng.random() < 0.9 else SPOILT)
    (folder / part / "config.json").unlink()
    (folder / part / "config.json").write_text(json.dumps(config))
    if rng.random() < 0.8:
        path = folder / part / f"{FILES.get(part, 'model')}.safetensors"
        with contextlib.suppress(Exception):    # of whatever has no shapes
            shapes = shapes_of(part, config)
            if sum(map(math.prod, shapes.values())) < 10 ** 6:
                path.unlink()
                save_file(random_arrays(shapes), path)


def single_file_spoilt(path, rng):
    """A checkpoint with names in the original layout: sizes, names and types."""
    arrays = load_file(path)
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(list(arrays))
        array, kind = arrays[name], rng.randrange(6)
        if kind == 0:
            del arrays[name]
        elif kind == 1:
            arrays[name] = rng.choice([array[:-1], array[None], array.reshape(-1), array[:0],
                                       np.asarray(array.sum(dtype=array.dtype))])
        elif kind == 2:
            other = re.sub(r"\d+", lambda m: rng.choice(["0", "7", "99", "x", "9" * 30, m[0]]),
                           name)
            arrays[other] = arrays.pop(name)
        elif kind == 3:
            prefix = rng.choice(["model.diffusion_model.", "first_stage_model.",
                                 "cond_stage_model.transformer.", "cond_stage_model.model.",
                                 "conditioner.embedders.0.transformer.text_model.",
                                 "conditioner.embedders.1.model.", "conditioner.embedders.2."])
            word = rng.choice(["input_blocks.x.0", "input_blocks." + "1" * 5000 + ".0.op.weight",
                               "", "out.0", "output_blocks.0.0.conv.weight",
                               "decoder.up.9.block.0.x",
                               "transformer.resblocks.0.attn.in_proj_weight", "a..b", ".", "1"])
            arrays[prefix + word] = array
        elif kind == 4:
            arrays[name] = array.astype(rng.choice([np.float64, np.float16, np.int32, np.bool_]))
        else:
            arrays = {name: array for name, array in arrays.items() if rng.random() < 0.97}
        if not arrays:
            break
    path.unlink()
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def lora_spoilt(path, rng):
    """A LoRA with another alpha, other shapes, other names or other settings in its metadata."""
    arrays, name = load_file(path), "lora_unet_mid_block_resnets_0_conv1"
    kind, metadata = rng.randrange(7), None
    if kind == 0:
        arrays[f"{name}.alpha"] = rng.choice([np.float32(1), np.float32([1]), np.float32([[2]]),
                                              np.float32([1, 2]), np.float32([]), np.float16(0),
                                              np.float32(np.nan), np.float32(1e38), np.int64(3)])
    elif kind == 1:
        side = rng.choice(["lora_down.weight", "lora_up.weight"])
        array = arrays[f"{name}.{side}"]
        arrays[f"{name}.{side}"] = rng.choice(
            [array[:1], array[:, :1], array[:0], array.reshape(-1), array.reshape(len(array), -1),
             array[..., 0, 0], np.swapaxes(array, 0, 1), array * 1e30])
    elif kind == 2:
        arrays = {rng.choice([key, key.replace("unet", "te"), key.replace("lora_", ""), "x" + key,
                              key.replace("resnets_0", "resnets_1")]): array
                  for key, array in arrays.items()}
    elif kind == 3:
        metadata = {"lora_adapter_metadata": rng.choice([json.dumps(
            {"unet.lora_alpha": rng.choice(SPOILT)}), "[]", "{", "[" * 100_000, "1", ""])}
        arrays.pop(f"{name}.alpha")
    elif kind == 4:
        arrays = {key: array for key, array in arrays.items() if rng.random() < 0.7}
    elif kind == 5:     # layers by number: the text encoder's two have four each, of 12 x 12
        arrays = {f"{rng.choice(['text_encoder'] * 99 + ['unet'])}:{i}:{side}":
                  np.ones(rng.choice([shape] * 99 + [shape[1:], (0, 12)]), np.float32)
                  for i in range(rng.choice([8, 8, 9])) for side, shape in (("up", (12, 1)),
                                                                            ("down", (1, 12)))}
        arrays |= rng.choice([{}, {"<toy>": np.ones(12, np.float32)}, {"<x": arrays.popitem()[1]}])
    else:               # of other kinds, for a matrix of 12 x 12
        shapes = [(12, 2), (2, 12), (12, 12), (12,), (1, 12), (3, 3), (4, 4), (2, 2), (1,), (0, 2)]
        names = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w2",
                 "lokr_w2_a", "lokr_w2_b", "dora_scale", "diff", "diff_b", "weight", "on_input",
                 "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "oft_blocks"]
        name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
        arrays = {f"{name}.{key}": np.ones(rng.choice(shapes), np.float32)
                  for key in rng.sample(names, rng.randrange(1, 7))}
    path.unlink()
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path, metadata)


def pickle_spoilt(path, rng):
    """A file that torch wrote: bytes of its pickle, its members, how they are stored."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    program, kind = next(name for name in members if name.endswith("data.pkl")), rng.randrange(6)
    name = rng.choice(list(members))
    if kind < 3:
        data = bytearray(members[program])
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(min(len(data), rng.choice([60, 600, 10 ** 9])))] = rng.randrange(256)
        members[program] = bytes(data)
    elif kind == 3:
        del members[name]
    elif kind == 4:
        members[name] = rng.choice([b"", members[name][:-3], members[name] * 2, b"x" * 99])
    else:
        members[rng.choice(["data.pkl", "a/data.pkl", "../x", name + "\n"])] = members[name]
    path.unlink()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def text_spoilt(path, rng):
    """A picture's `parameters`: a fact, the text around it, or some letters."""
    picture = Image.open(path)
    text, _ = facts.recorded_text(path)
    kind = rng.randrange(4)
    if kind == 0:
        text = re.sub(rng.choice(["Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "RNG",
                                  "Clip skip", "TI hashes", "Version"]) + ": [^,]*",
                      lambda match: match[0].split(":")[0] + ": " + rng.choice(FACTS), text)
    elif kind == 1:
        text = text.replace(
            *rng.choice([("\n", ""), ("Negative prompt:", ""), ("Steps", "Step"), (", ", ""),
                         (": ", ":"), ("red", "-h"), ("red", "--help"), ("red", "\0Steps: 3\n" * 9),
                         ("Steps: ", "Steps: 2, Steps: "), ("Seed", "Schedule type: Karras, Seed"),
                         ("RNG", f"{rng.choice(THEIRS)}: {rng.choice(FACTS)}, RNG"),
                         ("\nSteps", " Steps"), ("CFG scale", "CFG Scale"),
                         ("\nSteps", "\nTemplate: Steps: 2, Seed: 1, Size: 8x8\nSteps")]))
    elif kind == 2:
        text = text[:rng.randrange(len(text))]
    else:
        for _ in range(rng.randrange(1, 9)):
            i = rng.randrange(len(text))
            text = (text[:i] + chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xD7FF)]))
                    + text[i + 1 :])
    picture.load()
    path.unlink()
    if path.suffix == ".png":
        info = PngInfo()
        info.add_itxt("parameters", text)
        picture.save(path, pnginfo=info)
    else:
        with open(path, "wb") as file:
            files.write_picture(picture, file, path.suffix, text)


def graph_spoilt(path, rng):
    """A picture's graph, of ComfyUI: nodes, inputs, links, or some letters."""
    nodes = json.loads(Image.open(path).text["prompt"])
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice(list(nodes))
        inputs, kind = nodes[key].get("inputs", {}), rng.randrange(5)
        if kind == 0 and inputs:
            inputs[rng.choice(list(inputs))] = rng.choice([
                [rng.choice(list(nodes)), 0], [key, 0], [[key], 0], [None, 0], [0], *JSON, *FACTS])
        elif kind == 1 and inputs:
            inputs.pop(rng.choice(list(inputs)))
        elif kind == 2:
            nodes[key]["class_type"] = rng.choice(["KSamplerAdvanced", "Reroute", "\x1b[2J", *JSON])
        elif kind == 3:
            nodes[key] = rng.choice([{"class_type": "X", "inputs": inputs}, {"inputs": {}}, {}])
        elif len(nodes) > 1:
            del nodes[key]
    text = json.dumps(nodes)
    if rng.random() < 0.2:
        i = rng.randrange(len(text))
        text = text[:i] + rng.choice(["", "[" * 10 ** 5, "9" * 5000, "NaN", text[i + 1:]])
    path.unlink()
    write_graph(path, text)


def lines_spoilt(path, rng):
    """A file of prompts and flags."""
    lines = [" ".join(rng.choices(LINES, k=rng.randrange(1, 4))) for _ in range(rng.randrange(4))]
    path.unlink()
    path.write_bytes("\n".join(lines).encode(errors=rng.choice(["replace", "surrogatepass"])))


def prompt(rng):
    return rng.choice(["", " ", "red apple" * rng.randrange(50),
                       "".join(chr(rng.randrange(1, 32)) for _ in range(20)), "\0",
                       "🍎👩‍👩‍👧" * rng.randrange(1, 40),
                       "".join(chr(rng.randrange(0xD7FF)) for _ in range(rng.randrange(200))),
                       "\ud800", "--", "a" * rng.randrange(1, 20000), "<|endoftext|>" * 9,
                       "\x1c" * 5000, "\u3000" * 5000 + "red", "\r\nred\n" * 30, "x " * 30000,
                       "<lora:lora:0.5>red", "<lora:x:1>", "<lora:lora:nan>", "<lora:" + "a" * 5000
                       + ">", "(red:1.5) [" * 300, "<a:b>" * 300, "(red:1.2.3)"])


def write_single_file(path, encoders=1):
    """The same kind of model in the original layout, its vocabulary CLIP's; or an SDXL."""
    names = {"vae": "first_stage_model.", "unet": "model.diffusion_model."}
    names |= {"text_encoder": "cond_stage_model.transformer.text_model."} if encoders == 1 else {
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model."}
    config = {part: dict((CONFIG if encoders == 1 else TWO_ENCODERS)[part]) for part in names}
    for part in ("text_encoder", "text_encoder_2")[:encoders]:
        config[part] |= {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 2,
                         "num_attention_heads": 1, "num_hidden_layers": encoders}
    config["unet"] |= {"cross_attention_dim": 2 * encoders, "norm_num_groups": 32,
                       "attention_head_dim": 8, "block_out_channels": [32, 64]}
    config["vae"] |= {"norm_num_groups": 32, "block_out_channels": [32, 32]}
    arrays = {}
    for part, prefix in names.items():
        weights = random_arrays(shapes_of(part, config[part]))
        if part == "text_encoder_2":
            weights = open_clip_names({k: torch.from_numpy(a) for k, a in weights.items()})
            weights = {name: tensor.numpy() for name, tensor in weights.items()}
            weights["text_projection"] = weights.pop("text_projection.weight").T.copy()
        for name, array in weights.items():
            arrays[prefix + original_name(part, name)] = array
    save_file(arrays, path)


def original_name(part, name):
    """Return CompVis' name of a weight of this model, whose networks have two levels."""
    if part == "vae":
        return compvis_vae_name(name, levels=2)
    return compvis_unet_name(name, n=2) if part == "unet" else name


def test_the_single_file_and_the_lora_are_good_ones(folder, monkeypatch):
    """So that nothing else is wrong with them."""
    monkeypatch.chdir(folder / "original")
    for flags in (["-m", "single.safetensors"], ["-m", "single-xl.safetensors"],
                  ["-m", "model", "--lora", "lora.safetensors"],
                  ["-m", "single.ckpt"], ["-m", "model", "--lora", "lora.pt"], ["-m", "xl"],
                  ["-m", "model", "--embedding", "word.pt"], ["-m", "xl", "--low-memory"]):
        assert cli.main(["red", "--steps", "1", "-W", "16", "-H", "16", *flags]) == 0


def case(folder, rng):
    """Spoil one thing in a folder of models, pictures, LoRAs and prompts; return the arguments."""
    model = rng.choice(["model", "model", "xl"])
    argv, kind = ["--model", model, "--steps", "2"], rng.randrange(22)
    model = folder / model
    weights = sorted(str(path.relative_to(model)) for path in model.glob("*/*.safetensors"))
    configs = sorted(str(path.relative_to(model)) for path in model.glob("*/*.json"))
    if kind == 0:
        bytes_spoilt(model / rng.choice(weights + configs + ["tokenizer/merges.txt"]), rng)
    elif kind == 1:
        header_spoilt(model / rng.choice(weights), rng)
    elif kind == 2:
        arrays_spoilt(model / rng.choice(weights), rng)
    elif kind == 3:
        json_spoilt(model / rng.choice(configs), rng)
    elif kind == 4:
        rng.choice([bytes_spoilt, bytes_spoilt, lambda path, rng: Image.new(
            "L", rng.choice([(1, 1), (1, 10000), (9, 9)])).save(path)])(folder / "in.png", rng)
        argv += rng.choice([["-i", "in.png"], ["-i", "in.png"],
                            ["-i", "like.png", "--mask", "in.png"]])
    elif kind == 5:
        rng.choice([bytes_spoilt, header_spoilt, arrays_spoilt])(folder / "lora.safetensors", rng)
        argv += ["--lora", "lora.safetensors"]
    elif kind == 6:
        for flag in rng.sample(list(FLAGS), rng.randrange(1, 4)):
            argv += [flag] if (value := rng.choice(FLAGS[flag])) is None else [flag, value]
    elif kind == 8:
        rng.choice([text_spoilt, text_spoilt, text_spoilt, bytes_spoilt])(folder / "like.png", rng)
        return (argv[:2] + ["--like", "like.png"]
                + rng.choice([[], ["blue"], ["-s", "3"], ["-p", "-h"]]))
    elif kind == 9:
        rng.choice([lines_spoilt, lines_spoilt, lines_spoilt, bytes_spoilt])(folder / "prompts.txt",
                                                                             rng)
        return (argv + ["--prompts", "prompts.txt"]
                + rng.choice([[], ["-b", "2"], ["-s", "3"], ["-o", "x/out.png"]]))
    elif kind == 10:
        argv += ["--preview", rng.choice(FLAGS["--preview"])]
    elif kind == 11:
        scheduler_spoilt(model / "scheduler/scheduler_config.json", rng)
        argv += rng.choice([[], ["--sampler", rng.choice(list(sd.SAMPLERS))], ["--karras"]])
    elif kind == 12:
        networks_spoilt(model, rng)
    elif kind == 13:
        argv[1] = rng.choice(["single.safetensors", "single.safetensors", "single-xl.safetensors"])
        single_file_spoilt(folder / argv[1], rng)
    elif kind == 14:
        lora_spoilt(folder / "lora.safetensors", rng)
        argv += ["--lora", "lora.safetensors"]
    elif kind == 15:
        rng.choice([text_spoilt, bytes_spoilt])(folder / rng.choice(["like.jpg", "like.webp"]), rng)
        return argv[:2] + ["--like", rng.choice(["like.jpg", "like.webp"])]
    elif kind == 16:
        rng.choice([bytes_spoilt, header_spoilt, arrays_spoilt])(folder / "word.safetensors", rng)
        argv += ["--embedding", "word.safetensors"]
    elif kind == 17:
        flag, name = rng.choice([("--model", "single.ckpt"), ("--model", "single.ckpt"),
                                 ("--embedding", "word.pt"), ("--lora", "lora.pt")])
        rng.choice([pickle_spoilt, pickle_spoilt, bytes_spoilt])(folder / name, rng)
        argv += [flag, name]
    elif kind == 18:
        (model / "things.json").write_text(json.dumps({
            key: rng.choice([[["apple"], ["x", "\x1b[2J"]], ["a"], [[]], *JSON])
            for key in rng.sample([*things.KEYS, "more"], rng.randrange(2, 6))}))
    elif kind == 21:
        graph_spoilt(folder / "graph.png", rng)
        return argv[:2] + ["--like", "graph.png"] + rng.choice([[], ["-i", "in.png"], ["-n", "x"]])
    elif kind == 20:
        tokenizer_spoilt(model / "tokenizer", rng)
    elif kind == 19:
        rng.choice([bytes_spoilt, header_spoilt, arrays_spoilt, single_file_spoilt])(
            folder / "vae.safetensors", rng)
        argv += ["--vae", "vae.safetensors"]
    if argv[1].startswith("single") or "single.ckpt" in argv:
        argv += ["-W", "16", "-H", "16"]
    if rng.random() < 0.1:
        argv.append("--low-memory")
    return argv + [f"--prompt={prompt(rng) if kind == 7 else 'red apple'}"]


# What may be said beside the one line: of a scheduler, of --like, of a list, of a prompt.
NOTES = (r"tiny_sd: (the scheduler's \S+ is .* here, not |the scheduler \S+ does not exist here"
         r"|--like \S+: (.* (is|are) (not repeated|not the file that .*)|the model is not "
         r"recorded: |the noise of its steps: )|the seed is \d+$|the model was trained on pictures "
         r"|--output: .* stays as it is; |\S+ is used as a mask by its transparency: "
         r"|.* is read as a comment$|no prompt uses |.* is read as plain text: "
         r"|the model (knows nothing in|never learnt) "
         r"|--strength does nothing without |\S+ has no white, so nothing is replaced"
         r"|\S+ holds more than |\S+, \d+ x \d+, is cropped to the shape of "
         r"|the prompt is too long to be recorded)")


def draws_or_says(argv, folder, capsys):
    before = contents(folder)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        status = cli.main(argv)
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("tiny_sd: ")]
    said = [line for line in said if not re.match(NOTES, line)] or said[-1:] * (status != 0)
    after = contents(folder)
    assert all(after.get(path) == data for path, data in before.items()), "a file was changed"
    new = {str(path.relative_to(folder)) for path in after.keys() - before.keys()}
    for name in {"preview.png"} & new & set(argv):
        Image.open(folder / name).load()
        (folder / name).unlink()
        new.remove(name)
    if status == 0:
        assert (new == set(out.split("\n")) - {""} and (new or "--prompts" in argv)
                and len(said) <= 2 + len(new))
        for name in new:
            Image.open(folder / name).load()
    else:
        assert status == 2 and not new and out == "" and "Traceback" not in err, err
        assert len(said) == 1 and len(said[0]) < 2500, err
        lines = [line for line in err.splitlines() if line and not re.match(NOTES, line)]
        assert [line for line in lines
                if "step/s" not in line and "s/step" not in line] == said, (err)
    for name in new:
        (folder / name).unlink()
    return status


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_model(tmp_path / "original/model")
    write_model(tmp_path / "original/xl", TWO_ENCODERS)
    Image.effect_noise((9, 7), 50).save(tmp_path / "original/in.png")
    (tmp_path / "original/prompts.txt").write_text("red apple\n# red\napple -s 5\n",
                                                   encoding="utf-8")
    monkeypatch.chdir(tmp_path / "original")
    save_file({"emb_params": np.ones((2, 12), np.float32)}, "word.safetensors")
    assert cli.main(["red apple word", "-n", "blue", "-m", "model", "-o", "like.png", "--steps",
                     "2", "--sampler", "euler", "--clip-skip", "2", "--embedding",
                     "word.safetensors"]) == 0
    write_graph("graph.png", json.dumps(GRAPH))
    name, rng = "lora_unet_mid_block_resnets_0_conv1", np.random.default_rng(0)
    save_file({f"{name}.lora_down.weight": rng.random((2, 16, 3, 3), np.float32),
               f"{name}.alpha": np.float32(1)[None],
               f"{name}.lora_up.weight": rng.random((16, 2, 1, 1), np.float32)},
              tmp_path / "original/lora.safetensors")
    draw = ["red apple", "-n", "blue", "-m", "model", "--steps", "2"]
    for name in ("like.jpg", "like.webp"):
        assert cli.main([*draw, "-o", name]) == 0
    write_single_file(tmp_path / "original/single.safetensors")
    write_single_file(tmp_path / "original/single-xl.safetensors", encoders=2)
    single = load_file("single.safetensors")
    save_file({name: array for name, array in single.items() if name.startswith("first_stage")},
              "vae.safetensors")
    for name, new in ("single", "single.ckpt"), ("lora", "lora.pt"), ("word", "word.pt"):
        arrays = load_file(f"{name}.safetensors")
        torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, new)
    return tmp_path


def test_spoilt_inputs(folder, capsys, monkeypatch, pytestconfig):
    count, seed = pytestconfig.option.fuzz, pytestconfig.option.fuzz_seed
    results, failures = [], []
    for number in range(count):
        rng = random.Random(seed * 1_000_003 + number)
        place = folder / "case"
        shutil.copytree(folder / "original", place, copy_function=os.link)
        (place / "kept.png").write_bytes(b"kept")
        monkeypatch.chdir(place)
        argv = case(place, rng)
        try:
            results.append(draws_or_says(argv, place, capsys))
        except (Exception, SystemExit) as error:
            failures.append(f"case {number} of seed {seed}: {ascii(argv)[:200]}: "
                            f"{type(error).__name__}: {ascii(str(error))[:300]}")
        monkeypatch.chdir(folder)
        shutil.rmtree(place)
    assert not failures, "\n".join([f"{len(failures)} of {count}", *failures[:20]])
    assert results.count(0) > count / 20 and results.count(2) > count / 4


@pytest.mark.parametrize("text",
                         ["a" * 10**6, "".join(random.Random(0).choices("abcdefghij", k=10**6)),
                          "red apple " * 10**5, "\x1c" * 10**6, "🍎" * 250000, " " * 10**6 + "x"],
                         ids=lambda text: ascii(text[:6]))
def test_a_prompt_of_a_megabyte(text):
    """Cut before it is merged, in a second or two.

    The ids kept are those of the first few thousand letters merged whole.
    """
    tokenizer = formats.clip_tokenizer()
    start = time.process_time()
    ids, cut = tokenizer.encode(text)
    assert time.process_time() - start < 20
    assert (ids.tolist()[1:76] == (tokenizer.tokens(text.strip(" ")[:4000]) + [tokenizer.pad]
                                   * 75)[:75] and bool(cut) == (len(text.strip(" ")) > 1))


def test_a_picture_of_a_hundred_megapixels(folder, capsys, monkeypatch):
    """Pillow only warns up to twice its limit.

    Its warning must not appear next to the one line.
    """
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    monkeypatch.chdir(folder / "original")
    assert draws_or_says(["red", "-m", "model", "-i", "in.png"], folder / "original", capsys) == 2
