"""Read any picture and any text file; write files completely or not at all, replacing nothing."""

import contextlib
import errno
import functools
import itertools
import math
import mmap
import os
import re
import secrets
import select
import shutil
import time
import warnings
from pathlib import Path

try:
    import fcntl
except ImportError:     # on Windows, where two processes can use one folder
    fcntl = None

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from extras.checks import first_five
from tiny_sd import UserError, require, tell

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")       # of pictures that we write
LONGEST_SIDES = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500, ".gif": 65535}      # in pixels
PICTURES = (*SUFFIXES, ".bmp", ".gif", ".tif", ".tiff")     # of pictures to train on
# Pillow's names of what may be read: not PostScript, a program, nor IPTC, which may contain some.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM",
           "TGA", "ICO", "PCX", "PSD", "SGI", "QOI", "DDS")
USER_COMMENT, EXIF_IFD = 0x9286, 0x8769
MOST_PIECES = 1000      # of a picture's Exif, comment or scans
LONGEST_RECORD = 4_000_000      # characters of a text in a picture that we still parse
LONGEST_NAME = 240      # bytes, before a number; most file systems take 255
ODD = re.compile(r'[<>:"|?*\\]|[. ]\Z')      # some file systems do not allow these
UNKNOWN = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS)   # of those without fsync
AT_ONCE = getattr(os, "O_NONBLOCK", 0)      # opens a FIFO that has no writer yet


@contextlib.contextmanager
def opened(path):
    """Open a picture file; UserError if it is not a picture, or is a decompression bomb."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
                raise ValueError("it is not a file")        # a pipe might never deliver anything
            check_pieces(path)
            Image.init()
            known = [name for name in FORMATS if name in Image.OPEN]
            with Image.open(path, formats=known) as picture:
                check_tiles(picture)
                yield picture
    except MemoryError:
        raise
    except Exception as error:      # Pillow raises many kinds for broken files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path} is not a picture that can be read: {reason}") from None


def check_pieces(path):
    """ValueError if a JPEG, GIF or PPM has so many pieces that to read it takes minutes.

    Pillow copies all that it has of an Exif or a comment for each further piece, or all that is
    left of a PPM. Each scan of a progressive JPEG costs as much as a picture.
    """
    if Path(path).stat().st_size > 13:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            kind = KINDS.get(data[:2], lambda data: ())
            if len([*itertools.islice(kind(data), MOST_PIECES)]) == MOST_PIECES:
                raise ValueError(f"it has more than {MOST_PIECES} scans, or pieces of text")


def check_tiles(picture):
    """ValueError if a picture is made of very many tiles, or of tiles that cover it many times."""
    boxes = [extents for _, extents, *_ in picture.tile if extents]
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    if len(boxes) > 2 ** 17 or area > 16 * picture.width * picture.height + 2 ** 24:
        raise ValueError("its tiles cover it many times")


def jpeg_pieces(data):
    """Yield the kind of each scan, and of each piece of Exif, of a JPEG."""
    at, scanned = 2, False
    while marker := re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])").search(data, at):
        kind, at = marker[1][0], marker.end()
        if kind == 0xD9:        # the end of the picture, if it has begun
            if scanned:
                return
            continue
        scanned |= kind == 0xDA
        if kind in (0xDA, 0xE1):
            yield kind
        at += int.from_bytes(data[at:at + 2], "big")


def gif_pieces(data):
    """Yield each piece of the comments before a GIF's first picture."""
    at = 13 + (3 << (data[10] % 8 + 1) if data[10] & 128 else 0)
    while at < len(data) and data[at] not in b",;":
        kind, at = data[at:at + 2], at + (2 if data[at] == ord("!") else 1)
        while kind[:1] == b"!" and at < len(data):
            length, at = data[at], at + 1 + data[at]
            if not length:
                break
            if kind == b"!\xfe":
                yield length


KINDS = {b"\xff\xd8": jpeg_pieces, b"GI": gif_pieces,       # by the first two bytes
         **dict.fromkeys((b"P1", b"P2", b"P3"), functools.partial(re.finditer, b"#"))}


def check_record(path, text):
    """UserError if the text that a picture file records is too long."""
    require(len(text) <= LONGEST_RECORD, f"{path} records {len(text)} characters, more than "
                                         f"{LONGEST_RECORD}")


def eight_bits(picture):
    """Convert a picture of 16 or 32 bits or of floats to 8 bits (Pillow would clip it)."""
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


def upright(path):
    """Read a picture file as 8-bit RGBA, turned upright."""
    with opened(path) as file:
        return eight_bits(ImageOps.exif_transpose(file)).convert("RGBA")


def with_edges(picture, size, resample):
    """Fit a whole picture into this size, and repeat its edges to fill the rest."""
    scale = min(new / old for new, old in zip(size, picture.size))
    picture = picture.resize([max(1, round(old * scale)) for old in picture.size], resample)
    rows, columns = (new - old for new, old in zip(size[::-1], picture.size[::-1]))
    ends = [(n // 2, n - n // 2) for n in (rows, columns)]
    return Image.fromarray(np.pad(picture, [*ends, (0, 0)], "edge"))


RESIZE = {"crop": ImageOps.fit, "fit": Image.Image.resize, "fill": with_edges}


def fitted(picture, width, height, ground, resize="crop"):
    """Lay an RGBA picture on a background colour and resize it; return RGB as uint8."""
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture).convert("RGB")
    if picture.size != (width, height):
        picture = RESIZE[resize](picture, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def read_picture(path, width, height, notes=None, resize="crop"):
    """Read a picture file as (height, width, 3) uint8.

    It is turned upright; transparent pixels become white. resize: how to change its shape: "crop"
    it around the centre, stretch it to "fit", or "fill" by repeating its edges. notes: a list that
    gets a line if something is cropped.
    """
    picture = upright(path)
    w, h = picture.size
    if notes is not None and resize == "crop" and abs(w * height - h * width) >= max(w, h):
        notes.append(f"{path}, {w} x {h}, is cropped to the shape of {width} x {height}")
    return fitted(picture, width, height, "white", resize)


def read_mask(path, init, width, height, notes, resize="crop"):
    """Read a mask file as (height, width) of bool, true where init should be replaced.

    White pixels are true. If the file is not black and white but a picture with a hole, as
    ComfyUI's editor saves it, the hole is true. init: the picture file to mask, which must have the
    same proportions.
    """
    picture = upright(path)
    (w, h), (init_w, init_h) = picture.size, upright(init).size
    require(abs(w * init_h - h * init_w) < max(w, h, init_w, init_h),
            f"--mask {path} is {w} x {h}, but {init} is {init_w} x {init_h}: they must have the "
            "same shape")
    alpha = picture.getchannel("A")
    itself = os.path.samefile(path, init) or not looks_like_mask(picture)
    if itself and alpha.getextrema()[0] < 128:
        notes.append(f"{path} is used as a mask by its transparency: its hole is replaced")
        picture = Image.eval(alpha, lambda a: 255 - a).convert("RGBA")
    red, green, blue = np.moveaxis(fitted(picture, width, height, "black", resize), -1, 0)
    mask = red.astype(np.uint16) + green + blue > 3 * 127.5
    if not mask.any():
        notes.append(f"{path} has no white, so nothing is replaced")
    return mask


def looks_like_mask(picture):
    """Are at least 95 % of an RGBA picture's visible pixels nearly black or nearly white?

    Of a large picture, a million pixels are enough.
    """
    pixels = np.asarray(picture)[::1 + picture.height // 1024, ::1 + picture.width // 1024]
    seen = pixels[pixels[..., 3] > 127][:, :3]
    plain = (seen < 32).all(axis=1) | (seen > 223).all(axis=1)
    return not len(seen) or plain.mean() > 0.95


def read_captioned(folder, caption=None):
    """Return [(path, caption)] of a folder's pictures; caption: for pictures without a .txt file.

    UserError if there is no picture, or one cannot be read or has no caption.
    """
    require(folder.is_dir(), f"there is no folder {folder}")
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = [path for path in paths if path.suffix.lower() in PICTURES and path.is_file()]
    require(pictures, f"{folder} has no pictures: none of its files ends in {', '.join(PICTURES)}")
    for path in pictures:
        with opened(path) as picture:
            picture.load()
    captions = [read_caption(path.with_suffix(".txt"), path, caption) for path in pictures]
    used = {*pictures, *(path.with_suffix(".txt") for path in pictures)}
    if unused := [path.name for path in paths if path not in used]:
        tell(f"{folder}: ignored, as neither a picture nor its caption: {first_five(unused)}")
    return list(zip(pictures, captions))


def read_caption(file, picture, caption):
    """Return the text of this file, or else the caption, on one line."""
    require(file.is_file() or not file.exists(), f"{file} is not a file")
    words = " ".join((read_text(file, 2 ** 13) if file.exists() else caption or "").split())
    require(words, f"{picture} has no caption: write one in {file} (or, for a LoRA, give teach.py "
                   "one --caption for all)")
    return words


def first_byte(file):
    """Wait until a FIFO has a writer; return the byte read while waiting, b"" for other files.

    UserError if it has no writer within two seconds.
    """
    first = b""
    if not AT_ONCE:
        return first
    if not select.select([file], [], [], 2)[0]:
        first = file.read(1)        # None: a writer has opened it but written nothing yet
        require(first != b"", f"{file.name} is a FIFO that nobody writes to")
    os.set_blocking(file.fileno(), True)
    return first or b""


def read_text(file, limit=2 ** 24):
    """Return a file's text; UserError if it cannot be read or exceeds the limit in bytes."""
    try:
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | AT_ONCE)) as stream:
            content = first_byte(stream.raw) + stream.read(limit + 1)
        require(len(content) <= limit, f"{file} is larger than {limit:,} bytes")
        return content.decode("utf-8-sig")
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} cannot be read: {reason}") from None


@functools.cache
def sweep(folder):
    """Remove this program's unfinished files that are older than a day, once per process."""
    with contextlib.suppress(OSError):      # some folders can be written to, but not read
        for path in folder.iterdir():
            ours = re.fullmatch(r"\.tiny_sd-[0-9a-f]{16}\.part", path.name)
            if ours and path.lstat().st_mtime < time.time() - 24 * 3600:
                remove(path)


def remove(path):
    """Remove a file, or a folder and its contents, if possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def unfinished_name(path, inside=False):
    """Yield a temporary name for a file or folder, and remove it at the end if it still exists.

    The name is next to path or, if `inside`, in the folder path.
    """
    name = f".tiny_sd-{secrets.token_hex(8)}.part"
    unfinished = path / name if inside else path.with_name(name)
    try:
        sweep(unfinished.parent.absolute())
        yield unfinished
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        remove(unfinished)


def settle(path):
    """Wait until a file, or every file in a folder, is on the disk: a power cut would empty it."""
    for file in [path, *path.rglob("*")]:
        if file.is_file() and os.access(file, os.R_OK):
            handle = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
            try:
                os.fsync(handle)
            except OSError as error:
                if error.errno not in UNKNOWN:      # the disk is full, or broken
                    raise
            finally:
                os.close(handle)


def settle_name(path):
    """Wait until a file's name is on the disk, too, where the system can do that; return it."""
    with contextlib.suppress(OSError):
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return path


@contextlib.contextmanager
def replace_atomically(path):
    """Yield a temporary name to write to, then rename it to path, so path is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_name(path) as unfinished:
        yield unfinished
        settle(unfinished)
        os.replace(unfinished, path)


@contextlib.contextmanager
def held(folder):
    """Make a folder and keep other processes out of it; remove it at the end if it is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if fcntl:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.path.samestat(os.fstat(handle), os.stat(folder))      # not just removed
            except (BlockingIOError, FileNotFoundError):
                free = False
            except OSError:     # a file system without locks
                free = True
            require(free, f"{folder} is in use by another training process")
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_folder_of(path, what=""):
    """UserError, starting with `what`, unless this file could be written to its folder."""
    require(path.parent.is_dir(), f"{what}there is no folder {path.parent} to write to")
    require(os.access(path.parent, os.W_OK),
            f"{what}the folder {path.parent} cannot be written to")
    if ODD.search(path.name):
        try:
            open(path, "xb").close()
            path.unlink()
        except FileExistsError:
            pass
        except (OSError, ValueError):
            raise UserError(f"{what}{path} is a name that this file system does not allow"
                            ) from None


def save_picture(pixels, path, parameters, enlarge=1):
    """Save a picture completely or not at all, as the first free name of a.png, a-1.png, ...

    parameters: the text to record in it. enlarge: save it this many times as large, smoothed.
    Returns the name used.
    """
    picture = Image.fromarray(pixels)
    if enlarge > 1:
        picture = ImageOps.scale(picture, enlarge, Image.Resampling.LANCZOS)
    path = that_holds(path, picture)
    return save_new(path, lambda file: write_picture(picture, file, path.suffix.lower(),
                                                     parameters))


def that_holds(path, picture):
    """Return the path, with the suffix .png if its own format has no pictures this large."""
    if max(picture.size) <= LONGEST_SIDES.get(path.suffix.lower(), math.inf):
        return path
    tell(f"{path} is saved as a .png: {path.suffix} cannot hold {picture.width} x {picture.height}")
    return path.with_suffix(".png")


def save_film(frames, path):
    """Save pictures as a GIF or an animated PNG, by path's suffix; return the name used."""
    first, *others = map(Image.fromarray, frames)
    path = that_holds(path, first)
    return save_new(path, lambda file: first.save(
        file, path.suffix[1:].upper(), save_all=True, append_images=others, loop=0,
        duration=[120] * len(others) + [2000]))


def save_new(path, write):
    """Write a file with write(file), as the first free name of a.png, a-1.png, ...; return it."""
    with unfinished_name(path) as unfinished:
        with open(unfinished, "xb") as file:
            write(file)
        return take_free_name(unfinished, path)


def take_free_name(unfinished, path):
    """Rename a finished file to the first free name of a.png, a-1.png, ...; return that name."""
    settle(unfinished)
    for target in free_names(path):
        try:
            os.link(unfinished, target)     # unlike renaming, this refuses an existing name
        except FileNotFoundError:       # it was removed meanwhile
            raise
        except OSError:     # the name exists, or the file system has no links (USB sticks)
            try:
                open(target, "xb").close()
            except FileExistsError:
                continue
            os.replace(unfinished, target)
        return settle_name(target)


def put_folder(folder, path):
    """Rename a folder to the first free name of path, path-1, path-2, ...; return that."""
    for target in free_names(path):
        try:
            if not os.path.lexists(target):
                return folder.rename(target)
        except OSError:     # try the next name if this one appeared meanwhile
            if not os.path.lexists(target):
                raise


def free_name(path):
    """Return the first free name of a.png, a-1.png, a-2.png, ..."""
    return next(name for name in free_names(path) if not os.path.lexists(name))


def free_names(path):
    """Yield a.png, a-1.png, a-2.png, ...: all the names to try."""
    yield path
    stem, suffix = (path.stem, path.suffix) if len(path.suffix) < 20 else (path.name, "")
    while len(os.fsencode(stem + suffix)) > LONGEST_NAME:
        stem = stem[:-1]
    for number in itertools.count(1):
        yield path.with_name(f"{stem}-{number}{suffix}")


def write_picture(picture, file, suffix, parameters):
    """Write a picture to an open file as PNG, JPEG or WebP, with its text where tools look."""
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


def printable(text, control=True):
    """Replace lone surrogates in a text by question marks, so that it can be written.

    control: keep control characters; if false, they become spaces.
    """
    text = text.encode(errors="replace").decode()
    return text if control else "".join(c if c.isprintable() else " " for c in text)
