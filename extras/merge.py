"""Merge models (--merge): each weight of the new one is a weighted mean of theirs.

Models fine-tuned from the same model are close enough for their mean to work as well as each of
them (Wortsman et al., 2022). The difference between two models is what one has learnt beyond the
other, and can be added to a third: a:1 b:1 c:-1 is a + (b - c), the web UI's "add difference".
"""

import json
import os
import shutil

import numpy as np

from extras import formats, singlefile
from extras.checks import first_five
from extras.files import (
    check_folder_of,
    settle,
    settle_name,
    take_free_name,
    unfinished_name,
)
from extras.tensors import SUFFIXES, TYPES, metadata_of
from tiny_sd import DTYPES, WEIGHT_FILES, current_name, require, tell, widen

KINDS = {np.dtype(code): kind for kind, code in     # uint16 stands for bfloat16
         (*TYPES.items(), *DTYPES.items())}


def merge(models, output):
    """Write the weighted mean of models [(path or name, weight), ...]; return the name written.

    The result has the form of the first model: a .safetensors file or a folder, with its names,
    dtypes and configs. The weights are divided by their sum. UserError if the models are of
    different kinds, `output` exists, or the disk is too full.
    """
    paths, total = [formats.find(path) for path, _ in models], sum(w for _, w in models)
    require(len(models) > 1, "--merge needs at least two models")
    require(abs(total) > 1e-6, "the weights of --merge sum to 0")
    suffix = ".safetensors" if paths[0].is_file() else ""
    require(output.suffix == suffix or not suffix and output.suffix not in (".safetensors", ".png"),
            f"--output {output} must name a {suffix or 'folder'}, like {paths[0]}")
    check_folder_of(output)
    require(not os.path.lexists(output), f"{output} exists already")
    read = [formats.read(path) for path in paths]
    check_alike(paths, read)

    shares = [(weight / total, arrays) for (_, weight), (_, arrays, *_) in zip(models, read)]
    files = files_of(paths[0], read[0][1])
    need = sum(array.nbytes for arrays, _ in files.values() for array in arrays.values())
    free = shutil.disk_usage(output.parent).free
    require(need < free, f"{output} needs {need / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are "
                         "free")
    copied = [] if suffix else other_files(paths[0])    # of before: output may lie in that folder
    with unfinished_name(output) as unfinished:
        for path in copied:
            place = unfinished / path.relative_to(paths[0])
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        for name, (arrays, places) in files.items():
            write_safetensors(unfinished / name, arrays, metadata_of(paths[0]) if suffix else {},
                              lambda old, places=places: mean(shares, *places[old])
                              if old in places else None)
        if abs(total - 1) > 1e-3:
            tell(f"the weights of --merge sum to {total:g}, so each is divided by that")
        if suffix:
            return take_free_name(unfinished, output)
        settle(unfinished)
        return settle_name(unfinished.replace(output))


def check_alike(paths, read):
    """UserError unless all models have the same weights and predict the same thing.

    read: what formats.read returned for each.
    """
    def shapes(arrays):         # without sides of 1: a 1x1 convolution may be stored as a matrix
        return {f"{part}'s {name}": [n for n in array.shape if n != 1]
                for part in arrays for name, array in arrays[part].items()}

    ours, *_ = wanted = [shapes(arrays) for _, arrays, *_ in read]
    kinds = [settings["scheduler"].get("prediction_type", "epsilon") for settings, *_ in read]
    for path, theirs, kind in zip(paths, wanted, kinds):
        differ = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        require(not differ, f"{path} is not the same kind of model as {paths[0]}: they differ in "
                            f"{first_five(differ)}")
        require(kind == kinds[0], f"{path} predicts {kind}, but {paths[0]} predicts {kinds[0]}")


def files_of(path, parts):
    """Return {file: ({name: array}, {name: (part, its name in sort_out() or in diffusers)})}.

    path: of a model; parts: its arrays from formats.read. The second mapping leaves out arrays
    that the networks do not use.
    """
    if path.is_file():
        arrays = singlefile.read_names(path)
        found, _, _ = singlefile.sort_out({name: name for name in arrays})
        return {"": (arrays, {old: (part, new) for part, names in found.items()
                              for new, old in names.items() if part in parts})}
    files = {}
    for part, known in parts.items():
        arrays, _ = formats.read_weights(path / part, str(path))
        files[f"{part}/{WEIGHT_FILES.get(part, 'model')}.safetensors"] = arrays, {
            old: (part, current_name(old)) for old in arrays if current_name(old) in known}
    return files


def mean(shares, part, name):
    """Return the weighted mean of one array in [(share, {part: {name: array}}), ...], or None.

    None: the networks do not use it. Names of OpenCLIP's arrays are translated first, as
    singlefile.from_open_clip() split and transposed those arrays.
    """
    if "in_proj_" in name:
        thirds = [mean(shares, part, name.replace("in_proj_", f"{x}_proj.")) for x in "qkv"]
        return None if thirds[0] is None else np.concatenate(thirds)
    if name == "text_projection":
        return mean(shares, part, "text_projection.weight").T
    if name not in shares[0][1][part]:
        return None
    return sum(share * widen(arrays[part][name]).astype(np.float32).squeeze()
               for share, arrays in shares)


def write_safetensors(path, arrays, metadata, changed):
    """Write {name: array} as a .safetensors file, one array at a time.

    changed(name): float32 values to write instead of this array's, or None.
    """
    header, end = {"__metadata__": {"format": "pt"} | {
        key: metadata[key] for key in singlefile.HEADER if key in metadata}}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": KINDS[array.dtype], "shape": list(array.shape),
                        "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in arrays.items():
            new = changed(name)
            if new is not None:
                array = narrowed(new.reshape(array.shape), array.dtype)
                require(np.isfinite(widen(array)).all(), f"the mean of {name} is not finite")
            file.write(np.ascontiguousarray(array).data)


def narrowed(values, dtype):
    """Round float32 values to a dtype; uint16 means bfloat16."""
    if dtype != np.uint16:
        return values.astype(dtype)
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def other_files(folder):
    """Return the files in a model's folder, and in its parts', that do not hold its weights."""
    found = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()
             and not any(name.startswith(".") for name in path.relative_to(folder).parts)]
    places = {folder, *(folder / part for part in (*WEIGHT_FILES, "text_encoder_2"))}
    return [path for path in found if path.parent not in places
            or path.suffix not in SUFFIXES and ".index." not in path.name]
