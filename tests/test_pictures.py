"""Reading pictures with --init-img and --mask, output names, and previews."""

import contextlib
import errno
import io
import os
import shutil
import struct
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from conftest import ROOT
from extras import checks, cli, files, like_diffusers, show
from helpers import sd
from helpers_cli import *  # noqa: F403
from helpers_cli import PLAIN, RNG, cli_lines, pixels, start, write_lora

# ── From a picture ────────────────────────────────────────────────────────────────────────────────

GREY, PALETTE, TURNED = PLAIN.convert("L"), PLAIN.quantize(16), Image.Exif()
TURNED[0x112] = 6                       # the orientation: to be turned clockwise
HOLES = RNG.random((16, 24)) < 0.5


def around(colour, width, height):
    """PLAIN in the middle of a larger picture."""
    picture = Image.new("RGB", (width, height), colour)
    picture.paste(PLAIN, ((width - 24) // 2, (height - 16) // 2))
    return picture


def on_white(picture, holes):
    return Image.composite(Image.new("RGB", picture.size, "white"), picture.convert("RGB"),
                           Image.fromarray(holes))


def with_alpha(picture, alpha):
    picture = picture.copy()
    picture.putalpha(Image.fromarray(alpha))
    return picture


PICTURES = {  # the picture as it is saved, the file, settings, and the plain picture that it means
    "RGBA": (PLAIN.convert("RGBA"), "in.png", {}, PLAIN),
    "transparent": (
        with_alpha(PLAIN, np.uint8(255 * ~HOLES)), "in.png", {}, on_white(PLAIN, HOLES),
    ),
    "greyscale": (GREY, "in.png", {}, GREY.convert("RGB")),
    "greyscale, transparent": (
        with_alpha(GREY, np.uint8(255 * ~HOLES)), "in.png", {}, on_white(GREY, HOLES),
    ),
    "16 bits": (
        Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "in.png", {},
        GREY.convert("RGB"),
    ),
    "16 bits, TIFF": (
        Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "in.tiff", {},
        GREY.convert("RGB"),
    ),
    "black and white": (PLAIN.convert("1"), "in.png", {}, PLAIN.convert("1").convert("RGB")),
    "palette": (PALETTE, "in.png", {}, PALETTE.convert("RGB")),
    "palette, GIF": (PALETTE, "in.gif", {}, PALETTE.convert("RGB")),
    "palette, transparent": (
        PALETTE, "in.png", {"transparency": 3}, on_white(PALETTE, np.asarray(PALETTE) == 3),
    ),
    "CMYK": (PLAIN.convert("CMYK"), "in.tiff", {}, PLAIN),
    "turned": (PLAIN.transpose(Image.Transpose.ROTATE_90), "in.png", {"exif": TURNED}, PLAIN),
    "too wide": (around("red", 48, 16), "in.png", {}, PLAIN),
    "too high": (around("red", 24, 36), "in.png", {}, PLAIN),
}


@pytest.mark.parametrize("name", PICTURES)
def test_from_any_picture(draw, name):
    """The same as from the plain picture that it means."""
    picture, file, settings, plain = PICTURES[name]
    picture.save(file, **settings)
    plain.save("plain.png")
    ours, reference = (draw(*"apple -W 24 -H 16 --strength 0.5 -i".split(), path)
                       for path in (file, "plain.png"))
    assert ours.size == (24, 16) and np.array_equal(pixels(ours), pixels(reference))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (500, 300)])
def test_from_a_picture_of_any_size(draw, size):
    Image.new("RGB", size, "red").save("in.png")
    assert draw("apple", "-i", "in.png").size == (16, 16)


def test_strength_leads_away_from_the_picture(run, monkeypatch):
    """Counted in steps; the fewer of them, the less noise the sampler starts from."""
    PLAIN.save("in.png")
    started = []
    monkeypatch.setitem(sd.SAMPLERS, "ddim",
                        lambda denoise, x, levels, noise: started.append(levels) or iter([x]))
    for strength in ("0.1", "0.58", "1"):
        run(*f"apple -i in.png --steps 50 --sampler ddim --strength {strength}".split())
    assert [len(levels) for levels in started] == [5, 29, 50]
    assert started[0][0][1] > started[1][0][1] > started[2][0][1]


# ── Pictures of any depth ─────────────────────────────────────────────────────────────────────────

RAMP = np.arange(16 * 24).reshape(16, 24) % 256
DEEP = {  # the file, its numbers, and the 8 bits that they mean
    "in.pgm": (RAMP.astype(np.uint16) * 257, RAMP),
    "in16.tiff": (RAMP.astype(np.uint16) * 257, RAMP),
    "in32.tiff": (RAMP.astype(np.int32) * 257, RAMP),
    "float.tiff": (RAMP.astype(np.float32) / 255, RAMP),
    "float255.tiff": (RAMP.astype(np.float32), RAMP),
    "nan.tiff": (np.where(RAMP == 3, np.nan, RAMP / 255).astype(np.float32), RAMP * (RAMP != 3)),
}


@pytest.mark.parametrize("name", DEEP)
def test_pictures_of_16_and_32_bits_and_floats(name):
    values, expected = DEEP[name]
    Image.fromarray(values).save(name)
    read = files.read_picture(name, 24, 16)
    assert abs(read.astype(int) - expected[..., None]).max() <= 1


def test_what_is_cut_off_is_said(run):
    """From one pixel of the picture drawn on, here 20 of 320."""
    for width, height, cut in (48, 16, True), (344, 320, True), (338, 320, False):
        Image.new("RGB", (width, height), "red").save("in.png")
        line = f"tiny_sd: in.png, {width} x {height}, is cropped to the shape of 16 x 16"
        assert (line in run("red", "-i", "in.png")[2]) == cut


def test_a_mask_has_the_shape_of_its_picture(run, refuse):
    PLAIN.resize((32, 16)).save("in.png")
    Image.new("L", (64, 32), 255).save("mask.png")
    assert run("red", "-i", "in.png", "--mask", "mask.png")[0] == 0
    Image.new("L", (16, 16), 255).save("mask.png")
    assert refuse("red", "-i", "in.png", "--mask", "mask.png") == (
        "tiny_sd: --mask mask.png is 16 x 16, but in.png is 32 x 16: they must have the same shape")


def test_a_mask_is_black_where_it_is_transparent(run):
    """Like the layers that GIMP and Photoshop export."""
    PLAIN.resize((16, 16)).save("in.png")
    drawn = {}
    for mode, white, clear in ("L", 255, 0), ("RGBA", (255,) * 4, (255, 255, 255, 0)):
        mask = Image.new(mode, (16, 16), clear)
        mask.paste(white, (0, 0, 8, 16))
        mask.save("mask.png")
        drawn[mode] = np.asarray(Image.open(run("red", "-i", "in.png", "--mask", "mask.png")[1][0]))
    np.testing.assert_array_equal(drawn["L"], drawn["RGBA"])
    Image.new("RGBA", (16, 16)).save("mask.png")
    err = run("red", "-i", "in.png", "--mask", "mask.png")[2]
    assert "tiny_sd: mask.png has no white, so nothing is replaced" in err


def test_a_mask_by_transparency(run):
    """A hole in the picture itself, or in a copy of it, as ComfyUI's editor leaves it."""
    hole = np.zeros((16, 16), bool)
    hole[3:9, 4:14] = True
    picture = with_alpha(PLAIN.resize((16, 16)), np.uint8(255 * ~hole))
    picture.save("in.png")
    picture.save("copy.png")
    Image.fromarray(hole).save("mask.png")
    drawn = [run("red", "-i", "in.png", "--mask", name) for name in
             ("mask.png", "in.png", "copy.png")]
    one, *others = (np.asarray(Image.open(out[0])) for _, out, _ in drawn)
    for (_, _, err), other, name in zip(drawn[1:], others, ("in.png", "copy.png")):
        assert np.array_equal(one, other)
        assert f"tiny_sd: {name} is used as a mask by its transparency: its hole is replaced" in err


def test_pipes_are_not_waited_for(run, refuse):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has none")
    os.mkfifo("pipe.png")
    for flag in "-i", "--like":
        assert "pipe.png is not a picture that can be read: it is not a file" in refuse(
            *["red"] * (flag == "-i"), flag, "pipe.png")
    assert run("red", "-o", "pipe.png")[:2] == (0, ["pipe-1.png"])
    Path("p.txt").write_text("red")
    os.mkfifo("out-0001.png")
    assert run("--prompts", "p.txt")[1] == ["out-0001-1.png"]
    assert run("--prompts", "p.txt")[1] == []


def test_what_a_killed_program_left_is_removed_a_day_later(run):
    names = [f".tiny_sd-{k * 16}.part" for k in "abc"] + [".tiny_sd-x.part", "mine.part"]
    for name in names:
        Path(name).mkdir() if "c" * 16 in name else Path(name).touch()
    for name in names[1:]:
        os.utime(name, (0, 0))
    files.sweep.cache_clear()
    assert run("red")[0] == 0
    assert {*map(str, Path().glob("*.part"))} == {names[0], *names[3:]}


def test_a_mask_is_recorded(run):
    PLAIN.resize((16, 16)).save("in.png")
    Image.new("L", (16, 16), 255).save("mask.png")
    assert run("red", "-i", "in.png", "--mask", "mask.png", "-o", "a.png")[0] == 0
    said = cli_lines(run, "--like", "a.png", "-i", "in.png")[2]
    assert said == ["--like a.png: Mask mask.png is not repeated: give it with --mask"]
    assert cli_lines(run, "--like", "a.png", "-i", "in.png", "--mask", "mask.png")[2] == []


def test_too_little_memory_for_a_picture_is_said(refuse, monkeypatch):
    """A MemoryError has no text of its own."""
    PLAIN.save("in.png")

    def fail(*args):
        raise MemoryError
    monkeypatch.setattr(files, "eight_bits", fail)
    assert refuse("red", "-i", "in.png") == "tiny_sd: there is not enough memory"


@pytest.mark.parametrize("flags", [["--enlarge", "16"], ["--film", "a.gif", "--steps", "999"],
                                   ["--show", "page", "--steps", "999"]])
def test_what_memory_cannot_hold_at_the_end_is_refused_at_the_beginning(refuse, monkeypatch, flags):
    monkeypatch.setattr(checks, "free_memory", lambda: 20_000_000)
    said = refuse("red", "-W", "256", "-H", "256", *flags)
    assert f"{flags[0]} {flags[1]} needs at least" in said


# ── Where it writes ───────────────────────────────────────────────────────────────────────────────

def test_an_existing_file_stays_and_the_next_free_name_is_printed(run):
    mine = ["out.png", "out-1.png", "out-001.png", "out-2.png.part"]
    for name in mine:
        Path(name).write_text("mine")
    for argv, names in [("a", ["out-2.png"]), ("a", ["out-3.png"]),
                        ("a -b 2", ["out-000.png", "out-001-1.png"])]:
        assert run(*argv.split())[1] == names
    assert {path.name for path in Path().iterdir() if path.read_bytes() == b"mine"} == set(mine)
    assert len(list(Path().iterdir())) == len(mine) + 4


@pytest.mark.parametrize("name", ["sub folder/picture.png", "P.PNG", "a.b.png"])
def test_output(run, name):
    Path("sub folder").mkdir()
    assert run("apple", "-o", name)[:2] == (0, [name])
    assert Image.open(name).size == (16, 16) and not list(Path().rglob("*.part"))


@pytest.mark.parametrize("name", ["/proc/out.png", "a" * 300 + ".png"], ids=["/proc", "long"])
def test_an_output_that_cannot_be_written(run, name):
    if not Path(name).parent.is_dir():
        pytest.skip(f"there is no {Path(name).parent} here")
    status, out, err = run("apple", "-o", name)
    assert (status, out) == (2, []) and err[-1].startswith("tiny_sd: ")
    assert not list(Path().iterdir())


def test_an_output_whose_name_leaves_no_room_for_a_suffix(run):
    name = "a" * 249 + ".png"
    assert run("apple", "-o", name)[:2] == (0, [name])
    assert [path.name for path in Path().iterdir()] == [name]


def test_a_name_that_a_picture_cannot_have(run, refuse):
    if Path("/proc").is_dir():
        assert run("apple", "-o", "/proc/out.png")[2][
            -1] == "tiny_sd: /proc/out.png cannot be written: No such file or directory"
    assert refuse("apple", "--preview",
                  "no/such.png") == "tiny_sd: there is no folder no to write to"


def test_into_a_folder(run, refuse):
    Path("sub").mkdir()
    assert run("apple", "-o", "sub/")[1] == ["sub/out.png"]
    assert run("apple", "-o", "sub/")[1] == ["sub/out-1.png"]
    assert "--output sub is a folder: sub/ writes into it" in refuse("apple", "-o", "sub")
    assert "there is no folder none" in refuse("apple", "-o", "none/")


@pytest.mark.parametrize(
    "flags, names",
    [("-o {seed}.png -s 7", ["7.png"]), ("-o a-{seed}.png -s 7 -b 2", ["a-7.png", "a-8.png"]),
     ("-o {prompt}.png", ["red-apple-on-a-b.png"]),
     ("-o {x}{prompt}.png", ["{x}red-apple-on-a-b.png"]),
     ("-o {prompt}-{seed}.jpg", ["red-apple-on-a-b-0.jpg"]),
     ("-o {prompt}.png -b 2", ["red-apple-on-a-b-000.png", "red-apple-on-a-b-001.png"])])
def test_names_filled_in(run, flags, names):
    assert run("red/apple, on a: ../b.", *flags.split())[:2] == (0, names)
    assert sorted(path.name for path in Path().iterdir()) == names


@pytest.mark.parametrize("name", ["{x}{seed}", "[seed]-{prompt}"])
def test_what_is_not_filled_in_is_told(run, name):
    what = name[:name.index("{", 1)].rstrip("-")
    said = cli_lines(run, "red", "-o", f"{name}.png")[2]
    assert said == [
        f"--output: {what} stays as it is; only {{seed}} and {{prompt}} are filled in"]


def test_larger_pictures(run):
    assert run("red", "-o", "a.png")[0] == run("red", "--enlarge", "4", "-o", "b.png")[0] == 0
    one, large = (Image.open(name) for name in ("a.png", "b.png"))
    assert one.size == (16, 16) and large.size == (64, 64)
    assert abs(pixels(large.resize((16, 16), Image.Resampling.BOX)) - pixels(one)).mean() < 12
    assert "Size: 16x16" in large.text["parameters"]
    assert run("--like", "b.png", "-o", "c.png")[0] == 0
    assert Path("b.png").read_bytes() == Path("c.png").read_bytes()


@pytest.mark.parametrize("name, side", [("a.webp", 16384), ("a.jpg", 65501), ("a.gif", 65536)])
def test_a_picture_too_large_for_its_format_is_not_lost(here, capsys, name, side):
    """It took minutes to draw; before, --enlarge 16 -o a.webp ended in a traceback."""
    pixels = np.zeros((1, side, 3), np.uint8)
    for taken in "a.png", "a-1.png":
        saved = (files.save_film([pixels] * 2, Path(name)) if "gif" in name
                 else files.save_picture(pixels, Path(name), "said"))
        assert str(saved) == taken and Image.open(taken).size == (side, 1)
    assert f"cannot hold {side} x 1" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["a-1.png", "a.png"]


def test_a_name_filled_in_is_never_too_long(run):
    assert run("🍎" * 300, "-o", "{prompt}{seed}.png")[0] == 0
    assert run("苹" * 300, "-o", "{prompt}{seed}.png")[0] == 0
    assert len(list(Path().iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.jpg", "out.jpeg", "out.webp", "P.JPG"])
def test_other_formats_tell_how_they_were_made(run, name):
    """As A1111 writes it, in EXIF's UserComment; --like reads it back."""
    flags = "--steps 3 -s 9 --sampler euler --karras -n".split() + ["x: y, z"]
    assert run("灯台 apple", "-o", name, *flags)[:2] == (0, [name])
    comment = Image.open(name).getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    assert run("灯台 apple", *flags)[0] == 0
    assert comment[8:].decode("utf-16-be") == Image.open("out.png").text["parameters"]
    assert run.bare("--like", name, "-o", "again.png", "-m", run.model)[0] == 0
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()


def test_a_prompt_too_long_for_a_jpeg(run):
    status, out, err = run("x " * 30000, "-o", "out.jpg")
    assert ((status, out) == (0, ["out.jpg"])
            and any("too long to be recorded" in line for line in err))
    Image.open("out.jpg").load()


def test_a_name_that_is_too_long_is_refused_before_anything_is_drawn(refuse, monkeypatch):
    """With its number, too."""
    monkeypatch.setattr(like_diffusers, "generate", None)
    assert "too long" in refuse("apple", "-o", "a" * 300 + ".png")
    refuse("apple", "-b", "2", "-o", "a" * 249 + ".png")


@pytest.mark.parametrize("letter", ["a", "ä", "🦊"])
def test_a_long_name_that_exists_is_shortened_to_get_a_number(letter, run):
    """In bytes, and without cutting a character in two."""
    long = letter * (250 // len(letter.encode()))
    Path(f"{long}.png").write_text("mine")
    status, (name,), _ = run("apple", "-o", f"{long}.png")
    assert status == 0 and long.startswith(name.removesuffix("-1.png"))
    assert Image.open(name).size == (16, 16) and Path(f"{long}.png").read_text() == "mine"


def test_a_suffix_without_end_gets_a_number_too():
    names = files.free_names(Path("x." + "a" * 245))
    assert [len(next(names).name) for _ in range(3)] == [247, 242, 242]


@pytest.mark.parametrize("flags", ["-o what?.png", "--film a|b.gif", "--show sh?ow", "-o a:b.png"])
@pytest.mark.parametrize("holds", [True, False])
def test_a_name_that_the_disk_cannot_hold(flags, holds, run, monkeypatch):
    """As on memory cards: it is refused before anything is drawn."""
    def found(path, mode="r", *args, **how):
        if mode == "xb" and not holds:
            raise OSError(22, "Invalid argument")
        return open(path, mode, *args, **how)
    monkeypatch.setattr(files, "open", found, raising=False)
    if not holds:
        monkeypatch.setattr(like_diffusers, "generate", None)
    status, _, err = run("apple", *flags.split())
    path = Path(flags.split()[1])
    assert status == (0 if holds else 2) and path.exists() == holds
    assert holds or f"{path} is a name that this file system does not allow" in err[0]
    assert not holds or path.stat().st_size


# ── Previews ──────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
def test_preview_is_close_to_the_picture(tmp_path):
    """The linear map of the last latents, compared with a small version of the decoded picture."""
    picture, preview = tmp_path / "a.png", tmp_path / "preview.png"
    assert cli.main(["red apple", "-m", str(ROOT / "weights" / "emoji"), "-o", str(picture),
                     "--preview", str(preview), "--steps", "8"]) == 0
    guess, drawn = (pixels(Image.open(path)) for path in (preview, picture))
    assert guess.shape == drawn.shape and np.corrcoef(guess.ravel(), drawn.ravel())[0, 1] > 0.8


@pytest.mark.parametrize("suffix, kind", [(".gif", "GIF"), (".png", "PNG")])
def test_a_film(run, refuse, suffix, kind):
    """Of each guess; the last of them is the picture."""
    status, out, _ = run("red", "-b", "2", "--sampler", "ddim", "--film", f"film{suffix}")
    assert (status, out[2:]) == (0, [f"film{suffix}"])
    film = Image.open(f"film{suffix}")
    assert (film.format, film.n_frames, film.size) == (kind, 2, (32, 16))
    film.seek(1)
    drawn = np.concatenate([pixels(Image.open(name)) for name in out[:2]], axis=1)
    assert abs(pixels(film.convert("RGB")) - drawn).mean() < (12 if kind == "GIF" else 1)
    assert "--film film.jpg does not end in .gif or .png" in refuse("red", "--film", "film.jpg")


def test_preview_replaces_only_a_preview(run, refuse):
    PLAIN.save("mine.png")
    Path("text.png").write_text("mine")
    assert run("tiny_sd preview", "-o", "named.png")[0] == 0    # its prompt is near the beginning
    for name in ("mine.png", "text.png", "named.png"):
        assert (refuse("apple", "--preview", name)
                == f"tiny_sd: --preview {name} exists already and is not a preview: name another "
                   "file")
    for seed in "12":
        assert run("apple", "--preview", "new.png", "-s", seed)[0] == 0
        assert Image.open("new.png").size == (16, 16)
    assert "are both out.png" in refuse("apple", "--preview", "out.png", "-o", "out.png")


def test_preview_replaces_no_picture_saved_in_the_meantime(run, monkeypatch):
    """Such as the one that another process was drawing."""
    fit = show.colour_map

    def colour_map(model):
        PLAIN.save("mine.png")
        return fit(model)
    monkeypatch.setattr(show, "colour_map", colour_map)
    status, out, err = run("apple", "--preview", "mine.png")
    assert (status, out) == (2, []) and "not a preview" in err[-1]
    assert np.array_equal(pixels(Image.open("mine.png")), pixels(PLAIN))


# ── Pictures that take minutes ────────────────────────────────────────────────────────────────────

def segments(kind, piece, n):
    """A JPEG, or GIF, with n more pieces."""
    data = io.BytesIO()
    Image.new("RGB" if kind == "JPEG" else "P", (16, 16)).save(data, kind)
    data = data.getvalue()
    at = 2 if kind == "JPEG" else 13 + 3 * 2 ** (data[10] % 8 + 1)
    return data[:at] + piece * n + data[at:]


def scans(n):
    data = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(data, "JPEG", progressive=True)
    data = data.getvalue()
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 2)
    return data[:first] + data[first:second] * n + data[second:]


EXIF, COMMENT = b"\xff\xe1\0\x0aExif\0\0ab", b"\x21\xfe\1x\0"


@pytest.mark.parametrize("make", [
    lambda n: segments("JPEG", EXIF, n), lambda n: segments("GIF", COMMENT, n),
    lambda n: segments("GIF", b"\x21\xfe" + b"\1x" * n + b"\0", 1), scans,
    lambda n: b"P3\n" + b"#\n" * n + b"16 16\n255\n" + b"0 " * 768],
    ids=["Exif", "comments", "a comment", "scans", "a PPM's comments"])
def test_endless_pieces_are_refused(make, refuse):
    """Few are not."""
    for n in 5000, 20:
        Path(f"{n}.jpg").write_bytes(make(n))
    for flag in "-i", "--like":
        assert "1000 scans" in refuse(*["a"] * (flag == "-i"), flag, "5000.jpg")
    assert files.upright("20.jpg").size[0] in (16, 64)


def test_pieces_behind_an_end_are_counted(refuse):
    """Pillow reads on until the first scan."""
    Path("a.jpg").write_bytes(segments("JPEG", b"\xff\xd9" + EXIF * 5000, 1))
    assert "1000 scans" in refuse("a", "-i", "a.jpg")


def test_tiles_that_cover_a_picture_many_times(refuse):
    """A TIFF may list a strip of two million pixels a hundred thousand times."""
    def tags(*entries):
        return len(entries).to_bytes(2, "little") + b"".join(
            struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    n = 100_000
    data = b"II*\0" + (8).to_bytes(4, "little") + tags(
        (256, 4, 1, 2000), (257, 4, 1, 2000), (258, 3, 1, 1), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, n, 200), (277, 3, 1, 1), (278, 4, 1, 1000), (279, 4, n, 200 + 4 * n))
    data = data.ljust(200, b"\0") + struct.pack(f"<{n}I", *[200, 300] * (n // 2))
    Path("a.tif").write_bytes(data + struct.pack(f"<{n}I", *[250_000] * n) + bytes(300_000))
    assert "cover it many times" in refuse("a", "-i", "a.tif")
    Image.new("RGB", (2000, 2000)).save("plain.tif")
    Image.new("CMYK", (500, 500)).save("other.tif", compression="tiff_lzw")
    assert files.upright("plain.tif").size == (2000, 2000) and files.upright("other.tif")


@pytest.mark.skipif(os.name == "nt", reason="needs a script")
def test_postscript_inside_is_not_run(refuse, tmp_path, monkeypatch):
    """An IPTC file may hold any other, and Pillow would start Ghostscript for some."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)      # it looks once
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n%%EOF\n"
    fields = [(3, 60, b"\1\0"), (3, 65, b"\0"), (3, 20, b"\0\x40"), (3, 30, b"\0\x40"),
              (3, 120, b"\5"), (8, 10, program)]
    Path("a.png").write_bytes(b"".join(bytes([28, record, number]) + len(data).to_bytes(2, "big")
                                       + data for record, number, data in fields))
    with Image.open("a.png") as picture, contextlib.suppress(OSError):
        picture.load()
    assert (tmp_path / "ran").exists()      # it is no dud
    (tmp_path / "ran").unlink()
    for flag in "-i", "--like":
        assert "cannot identify" in refuse(*["a"] * (flag == "-i"), flag, "a.png")
    assert not (tmp_path / "ran").exists()


# ── Nothing is lost ───────────────────────────────────────────────────────────────────────────────

def test_a_folder_that_can_be_written_to_but_not_read(capsys):
    """The picture was drawn, and then lost: leftovers could not be looked for."""
    folder, root = Path(tempfile.mkdtemp()), os.name == "posix" and os.geteuid() == 0
    folder.chmod(0o333)
    try:
        if root:        # who may read everything
            os.seteuid(65534)
        for name in "a.png", "a-1.png":
            pixels = np.zeros((8, 8, 3), np.uint8)
            assert files.save_picture(pixels, folder / "a.png", "") == folder / name
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o777)
    assert sorted(path.name for path in folder.iterdir()) == ["a-1.png", "a.png"]
    shutil.rmtree(folder)


def test_a_link_to_itself_is_a_name_taken(run):
    Path("out.png").symlink_to("out.png")
    assert run("apple")[:2] == (0, ["out-1.png"])


def test_an_unfinished_file_that_is_gone_leaves_no_empty_one(tmp_path):
    with pytest.raises(sd.UserError, match="cannot be written"):
        files.save_new(tmp_path / "a.png", lambda file: Path(file.name).unlink())
    assert not [*tmp_path.iterdir()]


def test_a_file_system_without_links(run, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", link)
    Path("out.png").write_text("mine")
    Path("out-1.png").symlink_to("nowhere")
    assert run("apple")[:2] == (0, ["out-2.png"]) and Image.open("out-2.png").size == (16, 16)
    assert (Path("out.png").read_text() == "mine" and Path("out-1.png").is_symlink()
            and len(list(Path().iterdir())) == 3)


def test_what_is_written_survives_a_power_cut(run, monkeypatch):
    """It is on the disk before it gets its name."""
    kept, wait = set(), os.fsync

    def fsync(handle):
        kept.add(os.fstat(handle).st_ino)
        wait(handle)
    monkeypatch.setattr(os, "fsync", fsync)
    assert run("apple", "--film", "a.gif", "--show", "seen")[0] == 0
    with files.replace_atomically(Path("state/a.pt")) as unfinished:
        unfinished.write_text("days of training")
    assert Path().stat().st_ino in kept     # the names
    written = [path for path in Path().rglob("*") if path.is_file()]
    assert len(written) > 5 and {path.stat().st_ino for path in written} <= kept


@pytest.mark.parametrize("number, status", [(errno.EINVAL, 0), (errno.ENOTSUP, 0), (errno.EIO, 2)])
def test_a_file_system_that_cannot_wait(number, status, run, monkeypatch):
    """Some network folders; what fails to reach the disk is not there, not even in part."""
    def fsync(handle):
        raise OSError(number, "the reason")
    monkeypatch.setattr(os, "fsync", fsync)
    found, _, err = run("apple")
    assert found == status and Path("out.png").exists() == (status == 0)
    assert status == 0 or err[-1] == "tiny_sd: out.png cannot be written: the reason"
    assert not [*Path().glob(".tiny_sd*")]


@pytest.mark.parametrize("flags, names", [
    ("-b 3", "out-000.png out-001.png out-002.png"),
    ("--film out.gif --show seen", "out.png out.gif seen/index.html")])
def test_nobody_reads_the_names(model, flags, names):
    """As after "| head -1": what was drawn is still saved."""
    process = start("red", "-m", model, "--steps", "1", *flags.split())
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 2 and err.endswith("tiny_sd: [Errno 32] Broken pipe\n")
    missing = [name for name in names.split() if not Path(name).exists()]
    assert not missing, [*Path().rglob("*")]


def test_a_lora_that_goes_while_it_is_in_use(run, monkeypatch):
    """Its hash was recorded before."""
    write_lora("l.safetensors")
    generate = like_diffusers.generate

    def gone(*args, **settings):
        walk = generate(*args, **settings)
        Path("l.safetensors").unlink()
        return walk
    monkeypatch.setattr(like_diffusers, "generate", gone)
    assert run("red", "--lora", "l.safetensors")[:2] == (0, ["out.png"])


def test_each_picture_is_saved_before_the_next_is_decoded(run, monkeypatch):
    decode = sd.decode

    def interrupted(model, x):
        if Path("out-001.png").exists():
            raise KeyboardInterrupt
        return decode(model, x)
    monkeypatch.setattr(sd, "decode", interrupted)
    assert run("red", "-b", "3")[:2] == (130, ["out-000.png", "out-001.png"])


def test_threads_that_save_under_one_name(here):
    """Each picture is saved once, completely, under its own name."""
    threads = [threading.Thread(target=lambda k=k: files.save_picture(
        np.full((4, 4, 3), k, np.uint8), Path("a.png"), str(k))) for k in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted((int(Image.open(path).text["parameters"]), pixels(Image.open(path)).max())
                   for path in Path().iterdir())
    assert found == [(k, k) for k in range(24)]


@pytest.mark.parametrize("left", ["link", "folder"])
def test_processes_of_one_number(run, monkeypatch, left):
    """Of two containers that share a folder: the unfinished file's name is not the process's."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    Path("precious").write_text("mine")
    if left == "link":
        Path(".tiny_sd-1.part").symlink_to("precious")
    else:
        Path(".tiny_sd-1.part").mkdir()
    assert run("red")[:2] == (0, ["out.png"]) and Path("precious").read_text() == "mine"


def test_an_unfinished_name_that_is_taken_is_not_followed(run, monkeypatch):
    Path("precious").write_text("mine")
    Path(".tiny_sd-x.part").symlink_to("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "x")
    assert run("red")[0] == 2 and Path("precious").read_text() == "mine"


def test_file_systems_without_links_lose_nothing_either(here, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", link)
    test_threads_that_save_under_one_name(here)
