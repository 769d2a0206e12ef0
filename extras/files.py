"""Pictures in and out.

Read any picture; write one whole or not at all, and never over another; record how it was made.
"""

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

import tiny_sd
from extras.checks import first_five
from extras.prompts import file_hash, find_file, lora_hashes
from extras.samplers import TITLES, sampler_named
from extras.tiny_vae import HUB as VAES
from tiny_sd import UserError, require, tell

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")       # of what is written
PICTURES = (*SUFFIXES, ".bmp", ".gif", ".tif", ".tiff")     # and read, in a folder
USER_COMMENT, EXIF_IFD = 0x9286, 0x8769
NOT_A_PICTURE = (    # what Pillow raises, for all the ways in which a file can be broken
    OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, AttributeError,
    ArithmeticError, RecursionError, NotImplementedError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning)


@contextlib.contextmanager
def opened(path):
    """Open a picture file; UserError if it is none, or a decompression bomb."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if picture.format == "EPS":     # for which Pillow starts Ghostscript
                    raise ValueError("PostScript is a program, which need not come to an end")
                yield picture
    except NOT_A_PICTURE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path} is not a picture that can be read: {reason}") from None


def eight_bits(picture):
    """Return a picture of 16 or 32 bits or of floats as one of 8, which Pillow would clip."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(picture, np.float64))
        largest = values.max(initial=0)
        white = next((top for top in (1, 255, 2 ** 16 - 1) if largest <= top), 2 ** 32 - 1)
        if picture.mode == "I" and white == 1:
            white = 255
        return Image.fromarray((values.clip(0, white) / white * 255).round().astype(np.uint8))
    return picture


def read_picture(path, width, height, notes=None, ground="white"):
    """Return a picture file as (height, width, 3) uint8.

    It is turned upright, laid on a ground where it is transparent, resized and cut at the centre.
    notes: a list that gets a line if something is cut off.
    """
    with opened(path) as file:
        picture = eight_bits(ImageOps.exif_transpose(file)).convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture)
        picture = picture.convert("RGB")
        w, h = picture.size
        if notes is not None and abs(w * height - h * width) >= max(w, h):
            notes.append(f"{path}, {w} x {h}, is cut to the shape of {width} x {height}")
        if picture.size != (width, height):
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        return np.asarray(picture)


def read_mask(path, init, width, height, notes):
    """Return a mask file as (height, width) of bool, true where it is white; see read_picture.

    init: the picture file that it belongs to, whose proportions it must have.
    """
    (w, h), (init_w, init_h) = map(upright_size, (path, init))
    require(abs(w * init_h - h * init_w) < max(w, h, init_w, init_h),
            f"--mask {path} is {w} x {h}, and {init} is {init_w} x {init_h}: they must have the "
            "same shape")
    mask = read_picture(path, width, height, ground="black").mean(axis=-1) > 127.5
    if not mask.any():
        notes.append(f"{path} has no white, and so nothing is replaced")
    return mask


def upright_size(path):
    """Return the (width, height) of a picture file after it is turned upright."""
    with opened(path) as picture:
        return ImageOps.exif_transpose(picture).size


def read_captioned(folder, caption=None):
    """Return [(path, caption)] of a folder's pictures; caption: of those that have no .txt file.

    UserError if there is no picture, one that cannot be read, or one without a caption.
    """
    require(folder.is_dir(), f"there is no folder {folder}")
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = [path for path in paths if path.suffix.lower() in PICTURES]
    require(pictures, f"{folder} has no pictures: none of its files ends in {', '.join(PICTURES)}")
    for path in pictures:
        with opened(path) as picture:
            picture.load()
    captions = [read_caption(path.with_suffix(".txt"), path, caption) for path in pictures]
    used = {*pictures, *(path.with_suffix(".txt") for path in pictures)}
    if unused := [path.name for path in paths if path not in used]:
        tell(f"{folder}: ignored, neither pictures nor their captions: {first_five(unused)}")
    return list(zip(pictures, captions))


def read_caption(file, picture, caption):
    """Return what this file says, or else the caption, on one line."""
    words = " ".join((read_text(file) if file.exists() else caption or "").split())
    require(words, f"{picture} has no caption: write one into {file} (for a LoRA, teach.py also "
                   "takes one --caption for all)")
    return words


def read_text(file):
    """Return a file's text; UserError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


@contextlib.contextmanager
def unfinished_name(path, inside=False):
    """Yield a new name to write a file or folder to; what is still there at the end is removed.

    The name is beside path; with inside, it is in the folder path, which itself is not replaced.
    """
    name = f".tiny_sd-{secrets.token_hex(8)}.part"
    unfinished = path / name if inside else path.with_name(name)
    try:
        yield unfinished
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if unfinished.is_dir() and not unfinished.is_symlink():
            shutil.rmtree(unfinished, ignore_errors=True)
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_atomically(path):
    """Yield a name to write to, which then becomes path: nobody sees a half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_name(path) as unfinished:
        yield unfinished
        os.replace(unfinished, path)


def save_picture(pixels, path, parameters):
    """Write a picture whole or not at all, under the first free name of a.png, a-1.png, ...

    parameters: the text to record in it. Returns the name taken.
    """
    with unfinished_name(path) as unfinished:
        with open(unfinished, "xb") as file:
            write_picture(Image.fromarray(pixels), file, path.suffix.lower(), parameters)
        for target in free_names(path):
            try:
                os.link(unfinished, target)     # which, unlike renaming, refuses a taken name
            except OSError:     # it is taken, or this file system, as on USB sticks, has no links
                try:
                    open(target, "xb").close()
                except FileExistsError:
                    continue
                os.replace(unfinished, target)
            return target


def free_names(path):
    """Yield a.png, a-1.png, a-2.png, ...: all the names to try."""
    yield path
    for number in itertools.count(1):
        yield path.with_stem(f"{path.stem}-{number}")


def write_picture(picture, file, suffix, parameters):
    """Write a picture to an open file as PNG, JPEG or WebP, with a text that tools look for."""
    if suffix == ".png":
        info = PngInfo()
        info.add_text("parameters", parameters)
        return picture.save(file, "PNG", pnginfo=info)
    comment = b"UNICODE\0" + parameters.encode("utf-16-be", errors="replace")
    exif = Image.Exif()
    if len(comment) < 65000:
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = comment
    else:
        tell(f"the prompt is too long to be recorded in a {suffix} file")
    return picture.save(file, "WEBP" if suffix == ".webp" else "JPEG", quality=95, exif=exif)


# ── How a picture was made ──────────────────────────────────────────────────────────────────────


def printable(text):
    """Return a text whose letters all can be written: lone surrogates become question marks."""
    return text.encode(errors="replace").decode()


def plain(text):
    """Return a text as the value of a fact: without commas and colons."""
    return re.sub("[,:]", " ", printable(text))


def facts_of(args, seed):
    """Return {fact: value} of what the arguments say, in the order in which it is recorded.

    A value is "" where nothing is to be recorded, and None where the model decides.
    """
    sampler = size = None
    if args.sampler:
        sampler = plain(TITLES.get(args.sampler, args.sampler)) + " Karras" * args.karras
    if args.width and args.height:
        size = f"{args.width}x{args.height}"
    empty = args.negative_prompt == ""      # which some models tell from none
    return {"Steps": args.steps, "Sampler": sampler, "CFG scale": args.cfg_scale, "Seed": seed,
            "Size": size, "Model hash": None, "Model": None,
            "Denoising strength": args.strength if args.init_img else "",
            "Mask": plain(Path(args.mask or "").name),
            "Clip skip": args.clip_skip or "", "Plain prompt": args.plain_prompt or "",
            "Empty negative": "encoded" if empty else "",
            "VAE hash": vae_hash(args.vae), "VAE": plain(Path(args.vae or "").name),
            "Lora": plain(" ".join(f"{Path(file).stem} {weight}" for file, weight in args.lora)),
            "Lora hashes": None, "TI hashes": None, "Prediction": args.prediction or ""}


def parameters_text(args, model, seed, width, height):
    """Return how a picture was made, as other programs read it from a PNG's `parameters`."""
    def hashes(files, hash_of):     # but in quotes: "name: hash, name: hash"
        pairs = [f"{plain(Path(file).stem)}: {hash_of(file)}".replace('"', "'") for file in files]
        return pairs and json.dumps(", ".join(pairs), ensure_ascii=False)

    facts = facts_of(args, seed) | {
        "Size": f"{width}x{height}", "Model hash": model.digest,
        "Model": plain(model.name),
        "Lora hashes": hashes([file for file, _ in args.lora], lambda file: lora_hashes(file)[0]),
        "TI hashes": hashes(args.embedding, file_hash), "RNG": "CPU",
        "Version": f"tiny_sd {tiny_sd.__version__}"}
    line = ", ".join(f"{key}: {value}" for key, value in facts.items() if value not in ("", []))
    return f"{words_text(args.prompt, args.negative_prompt)}{line}"


def records(path, args, seed):
    """Does a picture file say that it was made from these arguments?

    What they leave to the model may be anything; so may the seed, if it is None.
    """
    try:
        words, mark, line = recorded_text(path).rpartition("Steps: ")
    except UserError:
        return False
    found = recorded_facts(mark + line)
    return words == words_text(args.prompt, args.negative_prompt) and all(
        value is None or str(value) == found.get(fact, "")
        for fact, value in facts_of(args, seed).items())


def vae_hash(name):
    """Return the first 10 digits of the SHA-256 of a VAE's file, none of other VAEs."""
    return file_hash(name)[:10] if name and Path(name).is_file() else ""


def words_text(prompt, negative):
    """Return the prompts' lines of a picture's text: "Negative prompt:" begins only the last."""
    negative = (negative or "").replace("\nNegative prompt:", " Negative prompt:")
    return f"{prompt}\nNegative prompt: {negative}\n"


def recorded_text(path):
    """Return the text that this program, or another, left in a picture."""
    with opened(path) as picture:
        text = picture.info.get("parameters", "")
        comment = picture.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
        if not text and isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
            text = comment[8:].decode("utf-16-be", errors="replace")
    return text if isinstance(text, str) else ""


FACT = re.compile(r'([^:,"]{1,60}):\s*("(?:\\.|[^"\\])*"|\{[^{}]*\}|[^,]*)(?:,|$)')


def recorded_facts(line):
    """Return {key: value} of a line "Steps: 20, Sampler: ...", where quotes protect commas."""
    facts = {}
    for key, value in FACT.findall(line[:10000]):
        if value.startswith('"'):
            with contextlib.suppress(ValueError):
                value = str(json.loads(value))
        facts[key.strip()] = value.strip()
    return facts


READ_OTHERWISE = {"Steps", "Sampler", "CFG scale", "Seed", "Size", "Schedule type", "Prediction",
                  "Model", "Model hash", "Version", "User", "Hashes", "Batch size", "Batch pos",
                  "Clip skip", "Plain prompt", "Empty negative", "VAE", "VAE hash", "Lora hashes",
                  "Lora", "TI hashes", "RNG"}


def recorded(path, sampler=None):
    """Return ({option: value}, {fact: value}): how a picture says it was made.

    sampler: what is taken instead of its own, which then may be unknown.
    """
    words, _, line = recorded_text(path).rpartition("Steps: ")
    prompt, mark, negative = f"\n{words}".rpartition("\nNegative prompt:")
    facts = recorded_facts(f"Steps: {line}")
    title = facts.get("Sampler", "")
    sampler, karras = sampler_named(title) or (sampler, False)
    require({"Steps", "Seed", "Size"} <= facts.keys(),
            f"{path} does not record its steps, seed and size as AUTOMATIC1111 does")
    require(sampler, f"{path} was drawn with {title or 'no sampler'}, which is not known here: "
                     "add --sampler NAME")

    width, _, height = facts["Size"].partition("x")
    options = {"prompt": prompt[1:] if mark else words.removesuffix("\n"),
               "steps": facts["Steps"], "seed": facts["Seed"], "width": width, "height": height,
               "sampler": sampler, "cfg-scale": facts.get("CFG scale", "7.5")}
    negative = negative.removeprefix(" ").removesuffix("\n") if mark else ""
    if negative or "Empty negative" in facts:       # else none was given
        options["negative-prompt"] = negative
    for fact, option in (("Denoising strength", "strength"), ("Prediction", "prediction"),
                         ("Clip skip", "clip-skip")):
        if fact in facts:
            options[option] = facts[fact]
    if karras or facts.get("Schedule type") == "Karras":
        options["karras"] = None
    if facts.get("Plain prompt"):
        options["plain-prompt"] = None
    if "ComfyUI" in facts.get("Version", "") and "(" in re.sub(r"\\.", "", words):
        facts["Emphasis"] = "ComfyUI's"
    return options, facts


def recorded_files(facts, model, given):
    """Return {option: files} of the files that a picture names, and {fact: names} of the missing.

    given: {option: names that need not be looked for}.
    """
    loras = re.findall(r"(\S.*?) (-?\d+(?:\.\d+)?)(?!\S)", facts.get("Lora", ""))
    wanted = [("lora", "Lora", name, f":{weight}") for name, weight in loras]
    wanted += [("embedding", "Embedding", name, "") for name in named_hashes(facts, "TI hashes")]
    wanted += [("vae", "VAE", facts["VAE"], "")] if "VAE" in facts else []

    options, missing = {}, {}
    for option, fact, name, weight in wanted:
        named = option == "vae" and name in VAES
        path = name if named else find_file(option, name, model)
        if path and Path(name).stem not in given[option]:
            options.setdefault(option, []).append(f"{path}{weight}")
        elif not path:
            missing.setdefault(fact, []).append(name + weight.replace(":", " "))
    return options, {fact: " ".join(names) for fact, names in missing.items()}


def named_hashes(facts, fact):
    """Return {name: hash} of a fact like "Lora hashes"."""
    pairs = [pair.rpartition(":") for pair in facts.get(fact, "").split(",")]
    return {name.strip(): digest.strip() for name, colon, digest in pairs if colon}


def known_model(name):
    """Return the path of a model of this name in weights/, or of a file of this name here.

    It is never a path that a picture names.
    """
    folder = tiny_sd.HERE / "weights"
    if not re.fullmatch(r"\w[\w .-]*", name):
        return None
    files = [place / f"{name}{suffix}" for place in (folder, Path())
             for suffix in (".safetensors", ".ckpt")]
    found = [folder / name] * (folder / name).is_dir() + [file for file in files if file.is_file()]
    return str(found[0]) if found else None


def facts_left(facts):
    """Return the recorded facts that --like makes no use of, as {fact: value}."""
    left = {key: value for key, value in facts.items() if key not in READ_OTHERWISE}
    web_ui = re.match(r"[vf]?\d|$", facts.get("Version", ""))       # whose noise is a GPU's, unless
    noise = facts.get("RNG", "GPU" if web_ui else "CPU")            # it says something else
    if noise != "CPU":
        left["RNG"] = noise
    if facts.get("Schedule type", "Karras") not in ("Karras", "Automatic"):
        left["Schedule type"] = facts["Schedule type"]
    return left


def other_files(facts, args, model):
    """Yield the names of the files in use that are not those which a picture was made with."""
    model_hash, ours = facts.get("Model hash", ""), vae_hash(args.vae)
    digest = model.digest
    if digest and len(model_hash) >= 10 and model_hash[:10] != digest:
        yield f"model {model.name}"     # shorter ones are older, and not of SHA-256
    if ours and facts.get("VAE hash", ours)[:10] != ours:
        yield f"VAE {Path(args.vae).stem}"
    for kind, files, hashes_of in (("Lora", [file for file, _ in args.lora], lora_hashes),
                                   ("TI", args.embedding, lambda file: [file_hash(file)])):
        known = named_hashes(facts, f"{kind} hashes")
        for file in files:
            name = Path(file).stem
            if known.get(name) and known[name] not in hashes_of(file):
                yield f"{'LoRA' if kind == 'Lora' else 'embedding'} {name}"
