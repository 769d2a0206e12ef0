"""Write the small model as a diffusers folder, with its configs."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from extras.checks import first_five
from extras.files import LONGEST_NAME, free_name, read_text, remove, settle, unfinished_name
from extras.training.scenes import (
    COLOURS,
    COUNTS,
    MEDIA_SHARES,
    PLACES,
    RELATIONS,
    SAID,
    STYLES,
    SURROUNDINGS_SHARES,
    TINTS,
    taught,
)
from tiny_sd import flatten, require, tell

VOCABULARY, LENGTH = 2000, 32       # tokens known, and tokens in a caption
HINT_CHANNELS = [8, 16, 32, 64]     # of the convolutions by which a control network sees outlines
MODEL = {       # the files in a model's folder
    "model_index.json", "things.json", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors"}
CONTROL = {"config.json", "diffusion_pytorch_model.safetensors"}    # in a control network's
NAME = {"_name_or_path": "tiny_sd"}     # in model_index.json or config.json: we wrote the folder
SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")     # macOS and Windows put them anywhere
SCHEDULER = {"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000,
             "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "steps_offset": 1, "timestep_spacing": "leading", "prediction_type": "v_prediction",
             "_guidance_scale": 3.0}    # tiny_sd's own, the default: a higher one costs variety


def vae_config(size, channels, groups):
    n = len(channels)
    return {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
            "latent_channels": 4, "block_out_channels": list(channels), "layers_per_block": 1,
            "norm_num_groups": groups, "act_fn": "silu", "sample_size": size,
            "down_block_types": ["DownEncoderBlock2D"] * n,
            "up_block_types": ["UpDecoderBlock2D"] * n}


def unet_config(latents, channels, attends, heads, groups, context):
    """latents: their height and width; attends: for each level, whether it attends to the text."""
    kinds = ["CrossAttn" if attention else "" for attention in attends]
    return {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4,
            "sample_size": latents, "block_out_channels": list(channels), "layers_per_block": 1,
            "cross_attention_dim": context, "attention_head_dim": list(heads),
            "norm_num_groups": groups, "act_fn": "silu", "center_input_sample": False,
            "flip_sin_to_cos": True, "freq_shift": 0,
            "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind in kinds[::-1]]}


def control_config(unet):
    """That of a control network for a U-Net with this config.

    It has no attention, which is half of the weights: what the prompt says, the U-Net reads itself.
    """
    others = ("out_channels", "sample_size", "center_input_sample", "up_block_types")
    kept = {name: value for name, value in unet.items() if name not in others}
    return NAME | kept | {"_class_name": "ControlNetModel", "mid_block_type": "UNetMidBlock2D",
                   "down_block_types": ["DownBlock2D"] * len(unet["block_out_channels"]),
                   "conditioning_embedding_out_channels": HINT_CHANNELS}


def text_config(width, layers, heads):
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
            "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 4 * width,
            "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": "quick_gelu",
            "max_position_embeddings": LENGTH, "layer_norm_eps": 1e-5, "torch_dtype": "float32",
            "projection_dim": width, "bos_token_id": VOCABULARY - 2,
            "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}


def vocabulary(things):
    """The contents of things.json: what a model knows, with an example of each kind."""
    said = {'colours, as in "a blue cat"': [*TINTS],
            'media, as in "a sketch of a cat"': [
                frame.format("...") for medium in taught(MEDIA_SHARES)
                for frame in SAID["media"][medium][:2]],
            'surroundings, as in "a cat at night"': [
                text for place in taught(SURROUNDINGS_SHARES)
                for text in SAID["surroundings"][place]],
            'relations, as in "a cat riding a horse"': [
                text for relation in taught(RELATIONS) for text in SAID["relations"][relation]
                if text != ","],
            'numbers and sizes, as in "three big cats"': [
                text for texts in [*(SAID["counts"][str(n)] for n in taught(COUNTS)),
                                   *SAID["sizes"].values()] for text in dict.fromkeys(texts)]}
    return {"things": things.names, "styles": STYLES, "backgrounds": [*COLOURS],
            "places": [*PLACES], "more": said}


def check_replaceable(out, kept, ours, asked):
    """UserError unless a model may be written to the folder out.

    It may replace one that we wrote, if asked, and nothing else: not what was added to it. It must
    not be or contain any of the files and folders to keep. ours: MODEL or CONTROL.
    """
    require(len(os.fsencode(out.name)) <= LONGEST_NAME, f"the name {out} is too long")
    if os.path.lexists(out):
        require(asked, f"{out} exists already: name it with --out to replace it, or name another")
        file = "config.json" if ours is CONTROL else "model_index.json"
        mark = json.dumps(NAME)[1:-1]
        require((out / file).is_file() and mark in read_text(out / file), f"{out} exists already "
                f"and is not one of our models (it has no {file} with {mark}): name another --out")
    place = Path(os.path.realpath(out))
    for path in map(Path, map(os.path.realpath, kept)):
        require(place not in (path, *path.parents),
                f"{out} contains {path}: name another --out")
    added = added_to(out, ours)
    require(not added, f"{out} contains {first_five(added)}: name another --out")


def added_to(folder, ours=MODEL | CONTROL):
    """The files in a model's folder that this program did not write, as texts."""
    return [str(file) for file in folder.rglob("*")
            if not file.is_dir() and file.relative_to(folder).as_posix() not in ours
            and file.name not in SYSTEMS]


def write_model(out, params, vae, things, setting, state, check):
    """Write the trained parts in float16 as a diffusers folder, with things.json.

    params: {"text", "unet"}, nested; vae: nested. check: for folder_atomically."""
    weights = {"text_encoder": params["text"], "vae": vae, "unet": params["unet"]}
    texts = folder_texts(state.tokenizer(things), setting, state.scaling_factor())
    if things.drawings is not None:
        texts["things.json"] = vocabulary(things)
    with folder_atomically(out, check) as folder:
        for name, value in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            indent = None if name == "things.json" else 2
            text = json.dumps(value, indent=indent, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        merges = read_text(state.folder / "merges.txt")
        (folder / "tokenizer/merges.txt").write_text(merges, encoding="utf-8")
        for part, tree in weights.items():
            is_text = part == "text_encoder"
            name = "model" if is_text else "diffusion_pytorch_model"
            arrays = {("text_model." if is_text else "") + key: to_file(p)
                      for key, p in flatten(tree).items()}
            file = folder / part / f"{name}.safetensors"
            file.write_bytes(save(arrays, {"format": "pt"}))    # save_file's is private to the user


def write_control(out, params, config, check):
    """Write a control network in float16 as diffusers' folder of one. params: {name: tensor}."""
    with folder_atomically(out, check) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        arrays = {name: to_file(p) for name, p in params.items()}
        file = folder / "diffusion_pytorch_model.safetensors"
        file.write_bytes(save(arrays, {"format": "pt"}))


def to_file(p):
    """Convert a tensor for a checkpoint: float16, convolutions as (out, in, kh, kw)."""
    p = p.permute(0, 3, 1, 2) if p.ndim == 4 else p
    return np.ascontiguousarray(p.detach().half().cpu().numpy())


def folder_texts(words, setting, scaling_factor):
    """{file name: JSON} of a diffusers folder."""
    classes = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer",
               "vae": "AutoencoderKL", "unet": "UNet2DConditionModel",
               "scheduler": SCHEDULER["_class_name"]}
    index = NAME | {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0",
             "requires_safety_checker": False, "safety_checker": [None, None],
             "feature_extractor": [None, None], "image_encoder": [None, None]}
    index |= {part: ["transformers" if "CLIP" in name else "diffusers", name]
              for part, name in classes.items()}
    begin, end = words.BOS, words.EOS
    specials = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": end}
    tokenizer = specials | {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH,
                            "do_lower_case": True}
    return {"model_index.json": index, "tokenizer/vocab.json": words.vocab,
            "tokenizer/special_tokens_map.json": specials,
            "tokenizer/tokenizer_config.json": tokenizer,
            "text_encoder/config.json": setting.text, "unet/config.json": setting.unet,
            "vae/config.json": setting.vae | {"scaling_factor": scaling_factor},
            "scheduler/scheduler_config.json": SCHEDULER}


@contextlib.contextmanager
def folder_atomically(path, check):
    """Yield a temporary folder to fill, then put it in place of path, or of what path links to.

    check: called before that, to raise UserError if what is there by then must not be replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_name(path) as temporary:
        temporary.mkdir()
        yield temporary
        settle(temporary)
        check()
        old = free_name(path.with_name(f".{path.name}.old"))
        if path.exists():       # a kill between the next lines leaves the old one under that name
            os.replace(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            if old.exists():
                tell(f"the previous model is now {old}")
            raise
        if added := added_to(old):      # since the check
            tell(f"{old} stays, since it contains {first_five(added)}")
        else:
            remove(old)
