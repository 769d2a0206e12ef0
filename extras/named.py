"""Find models, LoRAs, embeddings and VAEs by name in the usual folders, and hash them."""

import functools
import hashlib
import itertools
from pathlib import Path

import tiny_sd
from extras import formats
from extras.tensors import SUFFIXES, WHOLE_MODEL, kind_of, metadata_of, names_in
from tiny_sd import UserError

FOLDERS = {"model": ("models", "models/Stable-diffusion", "checkpoints", "models/checkpoints"),
           "lora": ("loras", "Lora", "lora"), "embedding": ("embeddings",), "vae": ("vae", "VAE"),
           "control": ("controlnet", "ControlNet")}


def find_model(name, models_dir=None):
    """Return a model's path or name for formats.load; None means the bundled model.

    models_dir: see places. UserError, which lists the models, if the name is a folder of models.
    """
    if name is None:
        return str(tiny_sd.HERE / "weights" / "emoji")
    path = Path(name)
    if path.is_dir() and not (path / "unet").exists():
        models = filter(may_be_model, sorted(path.iterdir()))
        inside = [file.name for file in itertools.islice(models, 11)]
        if inside:
            more = ", ..." if len(inside) > 10 else ""
            raise UserError(f"{name} is a folder of models, not a model: choose one of "
                            f"{', '.join(inside[:10])}{more}")
    if path.exists() or (tiny_sd.HERE / "weights" / name).exists() or name in formats.HUB:
        return name
    return known_model(name, models_dir) or name


def may_be_model(path):
    """Could a file be a model? Its suffix fits, and its contents are not known to be another kind.
    """
    try:
        return path.suffix in SUFFIXES and kind_of(names_in(path)) in (None, WHOLE_MODEL)
    except (UserError, OSError):        # report it only if this file is chosen
        return True


def known_model(name, models_dir=None):
    """Return the path of a model of this name in weights/ or in one of places(), or None.

    A name with a slash finds nothing: it may come from a stranger's picture.
    """
    if not is_name(name):
        return None
    folder = tiny_sd.HERE / "weights" / name
    return str(folder) if folder.is_dir() else find_file(
        "model", name, None, models_dir)


def is_name(name):
    """Is this a plain file name? A stranger's picture may name anything."""
    letters = name.encode(errors="replace")
    return name.strip(".") != "" and len(letters) <= 200 and not {*b"/\\\0"} & {*letters}


def find_file(kind, name, model=None, models_dir=None):
    """Return the path of a file of a kind in FOLDERS, by its name with or without suffix, or None.

    Look in the folders that places() returns.
    """
    if not is_name(name):
        return None
    for folder in places(kind, model, models_dir):
        for file in name, *(f"{name}{suffix}" for suffix in SUFFIXES):
            path = folder / file
            if path.suffix in SUFFIXES and path.is_file():
                return str(path)
    return None


def find(kind, name, model, models_dir=None):
    """Return the path of a file given in an option: as a path, or as a name to look for."""
    return name if Path(name).exists() else find_file(kind, name, model, models_dir) or name


def places(kind, model=None, models_dir=None):
    """Return the folders in which to look for files of a kind, given the model in use.

    models_dir: a folder laid out like those of AUTOMATIC1111's web UI or ComfyUI.
    """
    paths = [tiny_sd.HERE / "weights" / "x"]
    if model:
        paths = [path for path in (Path(model), tiny_sd.HERE / "weights" / model) if path.exists()]
    beside = [path if path.is_dir() else path.parent for path in map(Path.resolve, paths[:1])]
    above = [folder for path in beside for folder in (path, *path.parents[:2])]
    inside = [folder / name for folder in (*above, Path()) for name in FOLDERS[kind]]
    if models_dir is not None:
        inside += [Path(models_dir, name) for name in ("", "Stable-diffusion", *FOLDERS[kind])]
        inside += [Path(models_dir).absolute().parent / name for name in FOLDERS[kind]]
    return [*beside, Path(), *inside]


@functools.cache
def file_hash(file, skip_header=False):
    """Return the first 12 digits of a file's SHA-256; skip_header: of a .safetensors' data only."""
    with open(file, "rb") as data:
        if skip_header:
            data.seek(8 + int.from_bytes(data.read(8), "little"))
        return hashlib.file_digest(data, "sha256").hexdigest()[:12]


def lora_hashes(file):
    """Return the hashes that the web UI may record for a LoRA: of its data, and its header's."""
    if not str(file).endswith(".safetensors"):
        return [file_hash(file)]
    return [file_hash(file, skip_header=True), metadata_of(file).get("sshs_model_hash", "")[:12]]


def vae_hash(name):
    """Return the first 10 digits of the SHA-256 of a VAE's file, or "" if it is not a file."""
    return file_hash(name)[:10] if name and Path(name).is_file() else ""
