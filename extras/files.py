"""Pictures in and out: read any picture, write one whole or not at all, and record how it was made."""

import contextlib
import itertools
import os
import re
import secrets
import shutil
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

import tiny_sd
from tiny_sd import UserError, require

SAMPLER_TITLES = {"ddpm": "DDPM", "ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a",
                  "dpm++2m": "DPM++ 2M", "plms": "PLMS", "lcm": "LCM"}
USER_COMMENT, EXIF_IFD = 0x9286, 0x8769
NOT_A_PICTURE = (OSError, ValueError, SyntaxError, EOFError, MemoryError,
                 Image.DecompressionBombError, Image.DecompressionBombWarning)


@contextlib.contextmanager
def opened(path):
    """Open a picture file; UserError if it is none, or a decompression bomb."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                yield picture
    except NOT_A_PICTURE as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
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


def read_picture(path, width, height):
    """Return a picture file as (height, width, 3) uint8.

    It is turned upright, laid on white where it is transparent, resized and cut at the centre.
    """
    with opened(path) as file:
        picture = eight_bits(ImageOps.exif_transpose(file)).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
        if picture.size != (width, height):
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        return np.asarray(picture)


@contextlib.contextmanager
def write_atomically(path):
    """Yield a new name beside path to write a file or folder to; what stays there is removed."""
    unfinished = path.with_name(f".tiny_sd-{secrets.token_hex(8)}.part")
    try:
        yield unfinished
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if unfinished.is_dir() and not unfinished.is_symlink():
            shutil.rmtree(unfinished, ignore_errors=True)
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def save_picture(pixels, path, parameters):
    """Write a picture whole or not at all, under the first free name of a.png, a-1.png, ...

    parameters: the text to record in it. Returns the name taken.
    """
    with write_atomically(path) as unfinished:
        with open(unfinished, "xb") as file:
            write_picture(Image.fromarray(pixels), file, path.suffix.lower(), parameters)
        for number in itertools.count():
            target = path.with_stem(f"{path.stem}-{number}") if number else path
            try:
                os.link(unfinished, target)     # which, unlike renaming, refuses a taken name
            except OSError:
                if os.path.lexists(target):
                    continue
                os.rename(unfinished, target)   # some file systems, as on USB sticks, have no links
            return target


def write_picture(picture, file, suffix, parameters):
    """Write a picture to an open file as PNG, JPEG or WebP, with a text that tools look for."""
    if suffix == ".png":
        info = PngInfo()
        info.add_text("parameters", parameters)
        return picture.save(file, "PNG", pnginfo=info)
    exif = Image.Exif()
    comment = b"UNICODE\0" + parameters.encode("utf-16-be", errors="replace")
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = comment
    kind = "WEBP" if suffix == ".webp" else "JPEG"
    return picture.save(file, kind, quality=95, exif=exif)


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


# ── How a picture was made ──────────────────────────────────────────────────────────────────────


def printable(text):
    """Return a text whose letters all can be written: lone surrogates become question marks."""
    return text.encode(errors="replace").decode()


def parameters_text(args, model, seed, width, height):
    """Return how a picture was made, as other programs read it from a PNG's `parameters`."""
    def plain(text):        # no comma or colon inside a value
        return re.sub("[,:]", " ", printable(text))

    sampler = SAMPLER_TITLES.get(args.sampler, args.sampler) + (" Karras" if args.karras else "")
    loras = " ".join(f"{Path(file).stem} {weight}" for file, weight in args.lora)
    facts = {"Steps": args.steps, "Sampler": sampler, "CFG scale": args.cfg_scale, "Seed": seed,
             "Size": f"{width}x{height}", "Model hash": model.digest, "Model": plain(model.name),
             "Denoising strength": args.strength if args.init_img else "", "Lora": plain(loras),
             "Prediction": args.prediction or "", "RNG": "CPU",
             "Version": f"tiny_sd {tiny_sd.__version__}"}
    line = ", ".join(f"{key}: {value}" for key, value in facts.items() if value != "")
    return f"{args.prompt}\nNegative prompt: {args.negative_prompt}\n{line}"


def recorded_text(path):
    """Return the text that this program, or another, left in a picture."""
    with opened(path) as picture:
        text = picture.info.get("parameters", "")
        comment = picture.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
        if not text and isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
            text = comment[8:].decode("utf-16-be", errors="replace")
    return text if isinstance(text, str) else ""


def recorded(path):
    """Return {option: value} that draw a picture again; see parameters_text."""
    words, _, line = recorded_text(path).rpartition("Steps: ")
    prompt, mark, negative = words.rpartition("Negative prompt:")
    pairs = [part.partition(": ") for part in f"Steps: {line[:10000]}".split(",")]
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    title = facts.get("Sampler", "").removesuffix(" Karras")
    sampler = next((name for name, known in SAMPLER_TITLES.items() if known == title), None)
    require({"Steps", "Seed", "Size"} <= facts.keys() and sampler, f"{path} does not say how it "
            f"was made, or by a sampler that is unknown here ({title or 'none'})")

    width, _, height = facts["Size"].partition("x")
    options = {"prompt": (prompt if mark else words).removesuffix("\n"),
               "negative-prompt": negative.strip() if mark else "", "steps": facts["Steps"],
               "seed": facts["Seed"], "width": width, "height": height, "sampler": sampler,
               "cfg-scale": facts.get("CFG scale", "7.5")}
    if "Denoising strength" in facts:
        options["strength"] = facts["Denoising strength"]
    if "Prediction" in facts:
        options["prediction"] = facts["Prediction"]
    name = facts.get("Model", "")
    if re.fullmatch(r"\w[\w .-]*", name) and (tiny_sd.HERE / "weights" / name).is_dir():
        options["model"] = name
    karras = "Karras" in facts["Sampler"] or facts.get("Schedule type") == "Karras"
    return [f"--{flag}={value}" for flag, value in options.items()] + ["--karras"] * karras
