"""Read what InvokeAI, Fooocus and NovelAI record in a picture: JSON, with names of their own."""

import json
import re

from extras.files import check_record, opened, printable

CHUNKS = {"InvokeAI": ("invokeai_metadata", "sd-metadata"), "Fooocus": ("parameters",),
          "NovelAI": ("Comment",)}
ASIDE = {"positive_prompt", "prompt", "negative_prompt", "uc", "width", "height", "resolution",
         "sampler", "scheduler", "noise_schedule", "loras", "rand_device"}     # read by name below
NAMES = {       # {their name of a fact: ours}
    "steps": "Steps", "seed": "Seed", "cfg_scale": "CFG scale", "guidance_scale": "CFG scale",
    "scale": "CFG scale", "cfg_rescale": "CFG rescale", "cfg_rescale_multiplier": "CFG rescale",
    "strength": "Denoising strength", "base_model": "Model", "model": "Model",
    "model_weights": "Model", "vae": "VAE", "refiner_model": "Refiner"}
NO_MATTER = re.compile(     # facts that do not change the picture
    "created|full_|hide_|request_|signed_|app_id|n_samples|performance|uncond_scale|type$|"
    "model_list|.*(version|hash|mode|scheme)$")


def named(value):
    """Return the name or the prompt in a JSON object; any other value unchanged."""
    names = ("name", "model_name", "prompt")
    return next((value[name] for name in names if name in value), "") if isinstance(
        value, dict) else value


def scalar(value):
    """Turn a JSON value into a text or number: an object into its name, a list into "a, b"."""
    value = named(value)
    if isinstance(value, list):
        items = [item for item in map(named, value) if isinstance(item, (str, int, float))]
        value = ", ".join(map(str, items))
    return value if isinstance(value, (str, int, float)) else ""


def lora(value):
    """Return "name weight" of a LoRA as InvokeAI or Fooocus records it, or ""."""
    match value:
        case [str(name), (int() | float()) as weight, *_]:
            return f"{name.removesuffix('.safetensors')} {weight}"
        case {"weight": weight, "model": model} | {"weight": weight, "lora": model}:
            return f"{scalar(model)} {scalar(weight)}"
    return ""


def read_record(path, program):
    """Return the prompt, the negative prompt and {fact: value}; program: a key of CHUNKS.

    Facts are named as in extras/facts.py, unknown ones keep their names. There are none if the
    steps, the seed or the size is missing.
    """
    with opened(path) as picture:
        text = next(filter(None, map(picture.info.get, CHUNKS[program])), "")
    check_record(path, text)
    try:
        said = {**json.loads(text, parse_constant=str)}
        said |= {**said.pop("image", {})}   # where old versions of InvokeAI put them
    except (ValueError, TypeError, RecursionError):
        said = {}

    def get(*names):
        return str(next((scalar(said[name]) for name in names if name in said), ""))

    facts = {NAMES.get(name, printable(name, control=False)[:60]): str(scalar(value))
             for name, value in said.items() if name not in ASIDE and not NO_MATTER.match(name)}
    size = re.findall(r"\d+", " ".join(get(name) for name in ("width", "height", "resolution")))
    facts |= {"Sampler": re.sub("_k$", " karras", get("sampler", "scheduler")),
              "Schedule type": get("noise_schedule", "scheduler") if "sampler" in said else "",
              "Size": "x".join(size[:2]),
              "RNG": "" if get("rand_device") in ("", "cpu") else "GPU"}
    if isinstance(said.get("loras"), list):
        facts["Lora"] = " ".join(filter(None, map(lora, said["loras"])))
    nothing = ("", "0", "None", "native")
    facts = {name: value for name, value in facts.items()
             if value not in nothing or name == "Seed"}
    whole = {"Steps", "Seed"} <= facts.keys() and len(size) > 1
    return get("positive_prompt", "prompt"), get("negative_prompt", "uc"), facts if whole else {}
