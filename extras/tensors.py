"""Read tensor files written by any program, and recognise what a file contains.

extras/pickles.py reads torch's files without running anything in them.
"""

import json
import re
from pathlib import Path

import numpy as np

from extras import pickles
from tiny_sd import DTYPES, UserError, require, shorten, widen

SUFFIXES = (".safetensors", *pickles.SUFFIXES)
SAFETENSORS, TORCH = "a safetensors file", "a zip, as torch writes"
OLD_TORCH = "a pickle, as torch wrote before version 1.6"
CONTENTS = {    # {kind of file: pattern of its first bytes}
    SAFETENSORS: rb".{4}\0{4}\s*\{", TORCH: rb"PK\x03\x04", "empty": rb"\Z",
    OLD_TORCH: rb"\x80[\x02-\x05]",
    "a pointer of Git LFS to a file that was not fetched (git lfs pull)": rb"version https://git-l",
    "a web page, not the file that was to be downloaded": rb"\s*<(!doctype|html|head|\?xml)",
    "a picture": rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP", "a GGUF file": rb"GGUF",
    "an archive": rb"\x1f\x8b|7z\xbc\xaf|Rar!", "a text, such as a config": rb"[\t\r\n -~]+\Z"}
WHOLE_MODEL = "a whole model: --model"
KINDS = {   # {what a file contains: pattern of a tensor's name in it}
    "a LoRA: --lora": r"lora_|\w+:\d+:|"
                      r".*[._](lora_\w+|hada_w\w+|lokr_w\w+|oft_\w+|dora_scale)(\.|$)",
    "an embedding: --embedding": r"(emb_params|string_to_\w+|clip_[lg]|<[^<>.]+>)$",
    "a ControlNet": r"control_model\.|controlnet_|.*zero_convs\.",
    "an IP-Adapter": r"image_proj\.|ip_adapter\.", "a motion module": r".*motion_modules\.",
    "a Stable Diffusion 3": r"(model\.diffusion_model\.)?joint_blocks\.",
    "a Flux": r"(model\.diffusion_model\.)?double_blocks\.",
    "the refiner of SDXL": r"conditioner\.embedders\.0\.model\.transformer\.resblocks\.31\.",
    WHOLE_MODEL: r"model\.diffusion_model\.|cond_stage_model\.|conditioner\.",
    "only the running mean (EMA) of a model": r"model_ema\.diffusion_model",
    "a U-Net alone": r"(unet\.)?(down_blocks|input_blocks|mid_block)\.",
    "a VAE: --vae": r"(first_stage_model\.|vae\.)?(en|de)coder\.(down|up|mid|conv_|layers\.\d\.)",
    "a text encoder alone": r"(text_model\.)?(encoder\.layers\.|transformer\.resblocks|embeddings)",
    "half of a TAESD: --vae": r"\d+\.(conv\.\d\.)?weight$",
    "an upscaler": r"(model\.\d|conv_first|body\.\d|RRDB_trunk)\.",
    "an optimizer's state": r"(state|optimizer)\."}


def kind_of(names):
    """Return what the tensors with these names are, or None."""
    return next((kind for kind, pattern in KINDS.items()
                 if any(map(re.compile(pattern).match, names))), None)


def content_of(path):
    """Return the kind of a file by its first bytes, or None."""
    with open(path, "rb") as file:
        start = file.read(500)
    return next((what for what, pattern in CONTENTS.items()
                 if re.match(pattern, start, re.DOTALL | re.IGNORECASE)), None)


def is_pickle(path):
    """Does a file's name say that torch wrote it?"""
    return Path(path).suffix.lower() in pickles.SUFFIXES


def check_content(path):
    """UserError if a file's first bytes contradict its suffix."""
    require(Path(path).exists(), f"there is no file {path}")
    require(Path(path).is_file(), f"{path} is not a file")
    pickled, what = is_pickle(path), content_of(path)
    other = "whatever its name says" if what in (SAFETENSORS, TORCH) else "not a file of weights"
    require(what in ((TORCH, OLD_TORCH) if pickled else (SAFETENSORS,)) or not what,
            f"{path} is {what}, {other}")


def read_contents(path):
    """Return {name: value} of a .safetensors file, or of one that torch wrote."""
    check_content(path)
    if not is_pickle(path):
        return read_safetensors(path)
    found = pickles.read_pickle(path)
    if isinstance(found, list):     # up, down, up, down, ... of cloneofsimo's LoRAs
        part = "text_encoder" if ".text_encoder." in Path(path).name else "unet"
        return {f"{part}:{i // 2}:{'down' if i % 2 else 'up'}": array
                for i, array in enumerate(found)}
    return found if isinstance(found, dict) else {}


def read_tensors(path):
    """Return {name: array} of a .safetensors file, or of one that torch wrote.

    In torch's files the arrays may be in a "state_dict". bfloat16 stays uint16.
    """
    found = read_contents(path)
    if not is_pickle(path):
        return found
    inner = found.get("state_dict")
    arrays = {name: array for name, array in (inner if isinstance(inner, dict) else found).items()
              if isinstance(name, str) and isinstance(array, np.ndarray)}
    require(arrays, f"{path} has no named tensors" + not_but(kind_of(found)))
    return arrays


def not_but(kind):
    """Return ": it is KIND", or "" if the kind is None."""
    return f": it is {kind}" if kind else ""


def opened(path):
    """Open a .safetensors file, which reads its header."""
    from safetensors import SafetensorError, safe_open
    try:
        file = safe_open(path, "np")
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    require(max(map(len, file.keys()), default=0) <= pickles.LONGEST_NAME,
            f"{path} has a tensor's name of more than {pickles.LONGEST_NAME} characters")
    return file


def names_in(path):
    """Return the names of a file's tensors, without reading them: they may be converted."""
    check_content(path)
    return read_contents(path) if is_pickle(path) else opened(path).keys()


def metadata_of(path):
    """Return the metadata {name: text} in a .safetensors file's header."""
    return {} if is_pickle(path) else opened(path).metadata() or {}


TYPES = DTYPES | {"U64": "<u8", "U32": "<u4", "U16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}


def read_safetensors(path):
    """Return {name: array} of a .safetensors file, mapped into memory if NumPy has the dtype.

    float8 becomes float16, or float32 if NAME.scale_weight has a scale for it.
    """
    metadata_of(path)       # checks the header
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():      # in the file's order, the same in every process
        dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
        require(dtype in TYPES, f"{path}: {name} is {dtype}, not one of {', '.join(TYPES)}")
        try:
            array = data[start + begin:start + end].view(TYPES[dtype]).reshape(entry["shape"])
        except ValueError as error:     # too many axes, or one of 0 and a huge one
            raise UserError(f"{path}: NumPy cannot shape {shorten(name)}: {error}") from None
        array = array.astype("<u4") if dtype == "U16" else array    # uint16 stands for bfloat16
        arrays[name] = from_float8(array, dtype) if dtype.startswith("F8") else array
    for name in [name for name in arrays if name.endswith(".scale_weight")]:
        weight = name.removesuffix("scale_weight") + "weight"
        scale = widen(arrays.pop(name)).astype(np.float32)
        require(weight in arrays and scale.size in (1, *arrays[weight].shape[:1]),
                f"{path}: {name} does not fit a weight")
        scale = scale.reshape(-1, *[1] * (arrays[weight].ndim - 1))
        arrays[weight] = widen(arrays[weight]).astype(np.float32) * scale
        arrays.pop(name.replace("scale_weight", "scale_input"), None)
    return arrays


def from_float8(array, dtype):
    """Convert float8 to float16, exactly.

    e5m2 is the upper half of a float16. e4m3 has one exponent bit less, three fraction bits and no
    infinity: shifted into a float16, its value is 2**8 too small.
    """
    bits = array.astype(np.uint16)
    if dtype == "F8_E5M2":
        return (bits << 8).view(np.float16)
    values = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).view(np.float16) * np.float16(256)
    return np.where(bits & 0x7F == 0x7F, np.float16(np.nan), values)
