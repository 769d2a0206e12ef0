"""extras/training on 24 things: every stage from nothing, on after a kill, in two processes."""

import copy
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from PIL import EpsImagePlugin, Image

import tiny_sd
from conftest import ROOT
from extras import checks, cli, control, files
from extras.training import drawings, fitting, folder, measure, painting, scenes
from extras.training import train as train_py
from helpers import TWO_ENCODERS, contents, drawn, write_model
from helpers_diffusers import drawn_by, first, last

DATA = ROOT / "tests" / "emoji.zip"     # 24 things of those that `render` makes, at 64 x 64 pixels
TRUE_SIZES = train_py.CONFIGS["small"]
SHORT = ["--batch", "2", "--bank", "8", "--draw-steps", "1", "--threads", "1"]


def arguments(stage, state, *options, out=True, data=DATA):
    folder = state / ("outlines" if stage == "control" else "emoji")
    where = ["--data", data, "--state", state, *(["--out", folder] if out else [])]
    return [*map(str, [stage, *where, *SHORT, *options])]


def launch(script, *argv, under=()):
    """The finished process of some Python that has the program, with fewer of both."""
    return subprocess.run([sys.executable, *under, "-c", FEWER + script, *map(str, argv)],
                          capture_output=True, text=True, timeout=500, cwd=ROOT)


def train(*args, **where):
    assert train_py.main(arguments(*args, **where)) == 0


def refused(capsys, *args, **where):
    """The one line with which a command fails, besides the progress bar, with status 2."""
    capsys.readouterr()
    assert train_py.main(arguments(*args, **where)) == 2
    *progress, said = capsys.readouterr().err.strip().split("\n")
    assert said.startswith("tiny_sd: ") and all("it/s" in p or "step" in p for p in progress)
    return said


def saved(state, stage):
    return torch.load(state / f"{stage}.pt", weights_only=True)


@pytest.fixture(scope="module")
def things():
    return drawings.load_things(DATA, 64)


FEWER = """
import functools, os, signal, sys
from extras.training import fitting, folder, measure, train
measure.PROMPTS = {kind: some[:4] for kind, some in measure.PROMPTS.items()}
train.train_tokenizer = functools.partial(train.train_tokenizer, captions=500)
measure.Judge = functools.partial(measure.Judge, tries=2)
train.CONFIGS = train.CONFIGS | {"small": train.CONFIGS["small"]._replace(
    vae=folder.vae_config(size=64, channels=(8, 16, 16, 16), groups=8),
    unet=folder.unet_config(latents=8, channels=(16, 32, 32), attends=(False, True, True),
                            heads=(2, 4, 4), groups=8, context=32),
    text=folder.text_config(width=32, layers=2, heads=2))}
"""


@pytest.fixture(scope="module", autouse=True)
def fewer():
    """Networks for 64 x 64 pixels; sheets of four prompts, words from 500 captions, two tries.

    test_teach.py trains, and the folder weights/emoji has, the true sizes.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((measure, "PROMPTS"), (measure, "Judge"),
                             (train_py, "train_tokenizer"), (train_py, "CONFIGS")):
            patch.setattr(module, name, getattr(module, name))      # as they are, at the end
        exec(FEWER, {})
        yield


def test_the_bundled_model_has_the_sizes_of_the_recipe():
    model, setting = tiny_sd.load("emoji"), TRUE_SIZES
    for part, weights in (("vae", model.vae), ("unet", model.unet),
                          ("text_encoder", model.encoders[0].weights)):
        shapes = {name: p.shape for name, p in fitting.initial(setting.shapes(part), 0).items()}
        assert {name: p.shape for name, p in tiny_sd.flatten(weights).items()} == shapes


@pytest.fixture(scope="module")
def state(fewer, tmp_path_factory):
    """What `all` and `control` leave, trained from nothing for two steps a stage."""
    path = tmp_path_factory.mktemp("train")
    train("all", path, "--steps", 2)
    train("control", path, "--steps", 2)
    return path


# ── Drawings ────────────────────────────────────────────────────────────────────────────────────

def test_test_data(things):
    assert things.drawings.shape == (24, 6) and (things.drawings >= 0).all()
    assert things.names[2][:2] == ["car", "automobile"]
    assert all(n == len({*names}) for names in things.names for n in [len(names)])


def test_names_of_emoji():
    """Unicode's own words and the usual aliases, without skin tones and flags."""
    names = dict(drawings.emoji_names())
    assert names["🍎"] == ["red apple", "apple"] and names["🐶"][0] == "dog face"
    assert len(names) > 1600
    assert not any("skin tone" in name or name.startswith("flag:")
                   for said in names.values() for name in said)


def test_names_as_people_say_them():
    said = drawings.say_names([["automobile", "red car"], ["cat", "cat2", "pet"], ["dog", "pet"],
                               ["couch and lamp"]])
    assert said == [["car", "automobile", "red car"], ["cat"], ["dog"],
                    ["couch", "couch and lamp", "sofa"]]


def test_the_tables_name_emoji_that_there_are():
    """Each emoji that words.json names is one of Unicode's; the others are named after these."""
    unicode = {name for _, names in drawings.emoji_names() for name in names}
    table = drawings.TABLES
    for kind in ("added", "persons", "hands", "said"):
        assert {*table[kind]} <= unicode
    known = unicode | {*table["said"].values()}
    for names in (table["also"], *drawings.ROLES.values()):
        assert {*names} <= known


def test_drawing_icons(tmp_path):
    """A package's drawings are found by name, alias or characters, and cut to their ink."""
    red = '<path fill="#f00" d="M2 4h8v4H2z"/>'
    texts = {"icons.json": {"icons": {"red-box": {"body": red}}, "width": 16, "height": 16,
                            "aliases": {"box": {"parent": "red-box"}}},
             "chars.json": {"1f4e6": "red-box"}}
    texts["icons.json"]["info"] = " " * 2 ** 25      # as large as the packages' own are
    for name, value in texts.items():
        (tmp_path / name).write_text(json.dumps(value))
    icons = drawings.read_icons(tmp_path)
    found = [drawings.find_drawing(icons, text, names) for text, names in
             (("📦", []), ("x", ["Red box"]), ("x", ["box"]), ("x", ["boxes"]))]
    assert found == ["red-box", "red-box", "red-box", None]
    picture = np.asarray(drawings.draw_icon(icons, "red-box"))
    assert picture.shape == (128, 128, 4) and (picture[64, 64] == (255, 0, 0, 255)).all()
    rows, columns = np.nonzero(picture[..., 3] > 128)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (4, 123, 34, 93)


def test_npm_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    said = refused(capsys, "render", tmp_path, data=tmp_path / "none.zip")
    assert said.startswith("tiny_sd: npm is missing")


def write_data(path, names, files):
    """A zip as people make it: things.json, and a coloured square for each name of a file."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("things.json", names if isinstance(names, str) else json.dumps(names))
        for i, file in enumerate(files):
            with archive.open(file, "w") as png:
                Image.new("RGBA", (16, 16), (9 * i, 255, 0, 200)).save(png, "PNG")
    return path


def test_drawings_of_ones_own(tmp_path):
    """With one style each, which training shows although it would be held out of more."""
    names = [[f"thing {i}", f"alias {i}"] for i in range(40)]
    data = write_data(tmp_path / "own.zip", names, [f"{i:04}-flat.png" for i in range(40)])
    things = drawings.load_things(data, 32)
    assert things.names == names and (things.drawings[:, 3] == range(40)).all()
    assert any(scenes.held_out("style", name, "flat") for name, _ in names)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(500):
        seen |= {part.picture for part in scenes.draw_scene(things, rng).parts}
    assert seen == {*range(40)}


def test_the_form_that_the_readme_gives_for_them(tmp_path):
    text = (ROOT / "weights/README.md").read_text(encoding="utf-8")
    names, = re.findall(r"`(\[\[.*\]\])`", text)
    data = write_data(tmp_path / "own.zip", names, re.findall(r"`(\d{4}-\w+\.png)`", text))
    assert drawings.load_things(data, 32).names == json.loads(names)


@pytest.mark.parametrize("names, files, said", [
    ([["a"], ["b"]], ["0000-noto.png"], "b has no drawing"), ([["a"]], ["0000-noto.png"], "two"),
    ({"a": 1}, [], "things.json"), ([["a"], []], [], "things.json"), (["a", "b"], [], "things"),
    ([["a"], [""]], [], "things.json"), ("[" * 100_000, [], "recursion"), ("[", [], "Expecting"),
    ([["a"], ["b"]], ["0000-mine.png"], "0000-mine.png"), ([["a"], ["b"]], ["x.png"], "x.png"),
    ([["a"], ["b"]], ["0007-noto.png"], "0007-noto.png")])
def test_what_is_wrong_with_them_is_said(tmp_path, names, files, said):
    data = write_data(tmp_path / "own.zip", names, files)
    with pytest.raises(tiny_sd.UserError, match="own.zip: .*" + said):
        drawings.load_things(data, 32)


def encrypted(data):
    """Say in every header that the file is encrypted."""
    for mark, at in (b"PK\1\2", 8), (b"PK\3\4", 6):
        for match in re.finditer(re.escape(mark), bytes(data)):
            data[match.start() + at] |= 1


def compressed_by_nobody(data):
    for match in re.finditer(b"PK\1\2", bytes(data)):
        data[match.start() + 10] = 77


@pytest.mark.parametrize("spoil, said", [
    (encrypted, "encrypted"), (compressed_by_nobody, "compression method")])
def test_an_odd_zip_is_one_line(tmp_path, spoil, said):
    data = bytearray(DATA.read_bytes())
    spoil(data)
    (tmp_path / "own.zip").write_bytes(data)
    with pytest.raises(tiny_sd.UserError, match="own.zip: .*" + said):
        drawings.load_things(tmp_path / "own.zip", 32)


def test_a_zip_unpacks_to_no_more_than_it_should(tmp_path):
    with zipfile.ZipFile(tmp_path / "own.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("things.json", " " * 2 ** 25)
    with pytest.raises(tiny_sd.UserError, match="has more than"):
        drawings.load_things(tmp_path / "own.zip", 32)


def test_more_pictures_than_memory_holds_are_refused_before_they_are_read(tmp_path, monkeypatch):
    """A small zip can name one picture a million times."""
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")     # that a name comes twice
        archive.writestr("things.json", '[["a"], ["b"]]')
        for _ in range(2000):
            archive.writestr("0000-noto.png", b"no picture")
    for i in range(20):
        Image.new("1", (8, 8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a thing")
    monkeypatch.setattr(checks, "free_memory", lambda: 10_000)
    with pytest.raises(tiny_sd.UserError, match="a zip of 2,000 pictures needs at least 0.0 GB"):
        drawings.load_things(tmp_path / "own.zip", 32)
    with pytest.raises(tiny_sd.UserError, match="with 20 pictures, needs at least 0.0 GB"):
        drawings.load_captioned(tmp_path, 32)


def test_postscript_in_a_zip_is_not_run(tmp_path, monkeypatch):
    """For which Pillow would start Ghostscript: here, a program that leaves a trace."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)      # it looks once
    picture = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n"
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        archive.writestr("things.json", '[["a"], ["b"]]')
        archive.writestr("0000-noto.png", picture)
    with pytest.raises(tiny_sd.UserError, match="own.zip"):
        drawings.load_things(tmp_path / "own.zip", 32)
    assert not (tmp_path / "ran").exists()


def test_endless_pictures_in_a_zip_are_refused(tmp_path):
    png = io.BytesIO()
    Image.new("1", (2000, 10)).save(png, "PNG")
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        archive.writestr("things.json", '[["a"], ["b"]]')
        archive.writestr("0000-noto.png", png.getvalue())
    with pytest.raises(tiny_sd.UserError, match="wider or higher than 1024"):
        drawings.load_things(tmp_path / "own.zip", 32)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.zip")
    for data in tmp_path / "pipe.zip", Path("/dev/zero"):
        with pytest.raises(tiny_sd.UserError, match=f"there is no file {data}"):
            drawings.load_things(data, 32)


# ── Captions and scenes ─────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def shown(things):
    """3,000 random scenes, each with the subject and the manner that it was composed of."""
    rng, found = np.random.default_rng(0), []

    def recorded(things, rng, subject, manner, compose=scenes.compose):
        found.append((compose(things, rng, subject, manner), subject, manner))
        return found[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "compose", recorded)
        for _ in range(3000):
            scenes.draw_scene(things, rng)
    return found


def crc(*words):
    return zlib.crc32("|".join(words).encode()) / 2 ** 32


def test_scenes_hold_out(things, shown):
    """Among many scenes, none is held out by a rule of weights/README.md.

    If a caption is too long, only words that mean nothing are cut off.
    """
    names, seen = [names[0] for names in things.names], set()
    owner = {int(p): (i, s) for i, row in enumerate(things.drawings) for s, p in enumerate(row)}
    words = tiny_sd.load("emoji").encoders[0].tokenizer
    for scene, (ids, count, relation), manner in shown:
        drawn = {owner[part.picture] for part in scene.parts}
        assert all(crc("style", names[i], scenes.STYLES[s]) >= .1 for i, s in drawn)
        seen |= drawn
        one, *others = (names[i] for i in ids)
        for other in others:
            assert crc("pair", *sorted((one, other))) >= .1
        if relation:
            assert crc("relation", one, relation, others[0]) >= 1 / 8
        if count > 1:
            assert crc("count", one, str(count)) >= 1 / 8
        for i, tint in zip(ids, manner.tints):
            for kind, word in (("tint", tint), ("medium", manner.medium),
                               ("scene", manner.surroundings), ("background", manner.colour)):
                assert word in ("", "white") and kind != "tint" or not word \
                    or crc(kind, names[i], word) >= 1 / 8
        lost = words.encode(scene.caption)[1]
        assert any(extra.endswith(lost) for extra in scenes.SAID["adornments"])
    assert len(seen) == sum(crc("style", name, style) >= .1
                            for name in names for style in scenes.STYLES)


def test_scenes_are_of_every_kind(shown):
    """Each relation, number, colour, size, place, medium and surroundings that is taught comes."""
    subjects, manners = zip(*((subject, manner) for _, subject, manner in shown))
    assert {s.relation for s in subjects} == {"", *scenes.taught(scenes.RELATIONS)}
    assert {s.count for s in subjects} == {1, *scenes.taught(scenes.COUNTS)}
    assert {tint for m in manners for tint in m.tints} == {"", *scenes.TINTS}
    assert {m.medium for m in manners} == {"", *scenes.taught(scenes.MEDIA_SHARES)}
    assert {m.surroundings for m in manners} == {"", *scenes.taught(scenes.SURROUNDINGS_SHARES)}
    assert {m.size for m in manners} == {"", "small", "big", "huge"}
    assert {m.colour for m in manners} == {*scenes.COLOURS}
    assert {m.place for m in manners} == {"", *scenes.PLACES}


def test_captions_say_what_is_shown(things, shown):
    """Every word for what a scene has is in its caption, unless that is one word alone."""
    said = scenes.SAID
    for scene, subject, manner in shown:
        text = scene.caption
        alone = [*filter(None, (*manner.tints, manner.medium, manner.surroundings))]
        if text in alone or re.fullmatch(r"in the \w+ style", text):
            continue
        for tint in filter(None, manner.tints):
            assert tint in text or {"golden": "gold", "gray": "grey"}[tint] in text
        if subject.count > 1:
            assert any(word.removeprefix("a ") in text     # "neon pair of roses"
                       for word in said["counts"][str(subject.count)])
            assert len(scene.parts) == subject.count
        if manner.surroundings:
            assert any(word in text for word in said["surroundings"][manner.surroundings])
        if subject.relation:
            assert any(word in text for word in said["relations"][subject.relation])
        if manner.colour != "white":
            assert f"{manner.colour} background" in text
        if manner.size:
            assert any(word in text for word in said["sizes"][manner.size])
        assert manner.place in text


def test_captions():
    cat = scenes.in_style("a cat", "blob")
    assert scenes.describe(cat, colour="light blue") == \
        "a cat in the blob style on a light blue background"
    assert scenes.describe(scenes.in_style("a ghost", "flat"), "in the top left corner",
                           small=True) == "a small ghost in the flat style in the top left corner"
    assert [*map(scenes.article, ("apple", "ufo", "hourglass", "grapes", "cactus"))] == \
        ["an apple", "a ufo", "an hourglass", "grapes", "a cactus"]
    assert [*map(scenes.many, ("cat", "cherry", "fox", "wolf", "grapes", "piece of cake", "goose",
                               "potato", "piano", "man with a beard", "toy"))] == \
        ["cats", "cherries", "foxes", "wolves", "grapes", "pieces of cake", "geese", "potatoes",
         "pianos", "men with a beard", "toys"]
    assert scenes.share("style", "cat", "blob") == crc("style", "cat", "blob")


def test_things_stand_where_captions_say(things):
    """By their ink: above and below, on and under, side by side, hats on heads, riders on top."""
    rng, (cat, dog) = np.random.default_rng(0), (things.numbers["cat"], things.numbers["dog"])

    def boxes(relation):
        """(left, top, right, bottom) of the first and of the second."""
        subject, manner = scenes.Subject((cat, dog), relation=relation), scenes.Manner(("", ""))
        scene = scenes.compose(things, rng, subject, manner)
        first, = (p for p in scene.parts if p.picture in things.drawings[cat])
        second, = (p for p in scene.parts if p.picture in things.drawings[dog])
        return *(scenes.ink(things, part) for part in (first, second)), scene.parts[-1] is first

    for _ in range(20):
        for relation, upper in (("above", 0), ("on", 0), ("riding", 0), ("inside", 0),
                                ("below", 1), ("under", 1)):
            both = boxes(relation)
            middles = [(box[1] + box[3]) / 2 for box in both[:2]]
            assert middles[upper] < middles[1 - upper]
            inside = all(-0.02 <= x <= 1.02 for box in both[:2] for x in box)
            assert inside
        one, other, _ = boxes("next to")
        assert one[2] <= other[0]
        for relation, first_is_near in (("in front of", True), ("behind", False)):
            *_, near = boxes(relation)
            assert near == first_is_near
        wearer, worn, near = boxes("wearing")
        assert not near and worn[3] < (wearer[1] + wearer[3]) / 2


def test_pictures_say_what_captions_do(things):
    """A caption that names a style shows a drawing in it; the thing is painted at its position."""
    rng, placed = np.random.default_rng(1), 0
    for _ in range(1000):
        scene = scenes.draw_scene(things, rng)
        styles = [s for s in scenes.STYLES if f"in the {s} style" in scene.caption]
        if len(scene.parts) == 1 and styles:
            assert scene.parts[0].picture in things.drawings[:, scenes.STYLES.index(styles[0])]
        if "in the top left corner" in scene.caption and not scene.medium:
            picture = scenes.paint(scene, things)
            assert (picture[32:] == scene.ground).all() and (picture[:, 32:] == scene.ground).all()
            placed += 1
    assert placed


# ── Painting ────────────────────────────────────────────────────────────────────────────────────

def test_repainting_keeps_the_drawing(things):
    """Shades of one colour, of the same opacity; mean lightness gets the colour itself."""
    drawing = things.pictures[64][things.drawings[things.numbers["cat"], 0]]
    for colour in scenes.TINTS.values():
        painted = painting.repaint(drawing, colour)
        assert (painted[..., 3] == drawing[..., 3]).all()
        assert (painted[..., :3] <= painted[..., 3:].astype(int) + 1).all()
    flat = np.full((4, 4, 4), 255, np.uint8)
    flat[..., :3] = 90
    assert (painting.repaint(flat, (45, 100, 225))[..., :3] == (45, 100, 225)).all()
    assert np.ptp(painting.repaint(drawing, (225, 40, 40)).astype(int)[..., 0]) > 100


def scene_of(things, name, **manner):
    subject = scenes.Subject((things.numbers[name],))
    return scenes.compose(things, np.random.default_rng(0), subject, scenes.Manner(**manner))


@pytest.mark.parametrize("medium", painting.MEDIA)
def test_media_look_alike_in_both_sizes(medium, things):
    """Each changes the picture, and at twice the size shows the same."""
    scene, plain = scene_of(things, "house", medium=medium), scene_of(things, "house")
    small, large = (scenes.paint(scene, things, side).astype(float) for side in (64, 128))
    halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(halved - small).mean() < 16
    assert np.abs(small - scenes.paint(plain, things, 64)).mean() > 5


def test_media_do_what_they_say():
    rng = np.random.default_rng(0)
    x, cover = rng.random((64, 64, 3), np.float32), np.zeros((64, 64, 1), np.float32)
    cover[16:48, 16:48] = 1
    drawn = {name: medium(x, cover) for name, medium in painting.MEDIA.items()}
    assert (drawn["upside down"][0] == x[-1]).all()
    assert np.ptp(drawn["black and white"], axis=-1).max() == 0
    assert np.ptp(drawn["sketch"], axis=-1).max() == 0
    assert np.ptp(drawn["pixel art"].reshape(16, 4, 16, 4, 3), axis=(1, 3)).max() == 0
    assert drawn["silhouette"][32, 32].max() < 0.1 and (drawn["silhouette"][0] == x[0]).all()
    assert (drawn["wood"][0] == x[0]).all() and (drawn["sticker"][32, 32] == x[32, 32]).all()
    assert drawn["blueprint"][..., 2].min() > drawn["blueprint"][..., 0].min()
    for picture in drawn.values():
        assert np.isfinite(picture).all() and picture.shape == x.shape


@pytest.mark.parametrize("place", painting.SURROUNDINGS)
def test_surroundings(place, things):
    """Different for each seed, the same in both sizes, and the thing can still be seen."""
    one, other = (painting.surroundings(place, variant, 64) for variant in (0, 1))
    assert one.shape == (64, 64, 3) and (one != other).any()
    large = painting.surroundings(place, 0, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(large - one).mean() < 8
    scene = scene_of(things, "house", surroundings=place)
    empty = scenes.paint(scene._replace(parts=[]), things, 64).astype(float)
    assert np.abs(scenes.paint(scene, things, 64) - empty).mean() > 3


# ── Stages ──────────────────────────────────────────────────────────────────────────────────────

def test_all_stages(state):
    """Each stage took its steps and changed its weights; the sheets show each prompt's pictures."""
    for stage in train_py.STAGES:
        kept = saved(state, stage)
        assert len(kept["losses"]) == kept["step"] == 2 and np.isfinite(kept["losses"]).all()
        assert any((p != kept["mean"][name]).any() for name, p in kept["params"].items())
    sizes = {"vae.png": (768, 256), "decoder.png": (768, 256), "emoji.png": (768, 128),
             "control.png": (768, 192)}
    for name, size in sizes.items():
        with Image.open(state / name) as picture:
            assert picture.size == size
            assert len({*np.asarray(picture.convert("L").resize((48, 32))).flat}) > 8
    assert (state / "emoji-overview.png").exists()


@pytest.fixture(scope="module")
def exported(state):
    return tiny_sd.load(state / "emoji")


def test_the_exported_model_is_what_was_trained(exported, state):
    """The averages, in float16; 64 x 64 pixels, of 8 x 8 latents."""
    assert exported.factor == 8 and len(exported.encoders[0].tokenizer.vocab) == folder.VOCABULARY
    encoder, = exported.encoders
    for stage, weights in (("unet", {"text": encoder.weights, "unet": exported.unet}),
                           ("decoder", {"decoder": exported.vae["decoder"]})):
        mean = saved(state, stage)["mean"]
        for name, p in tiny_sd.flatten(weights).items():
            np.testing.assert_allclose(p, mean[name], rtol=1e-3, atol=1e-6)
    *_, x = tiny_sd.generate(exported, "red apple", steps=tiny_sd.evenly_spaced_steps(
        2, exported.alpha_bars))
    assert tiny_sd.decode(exported, x).shape == (1, 64, 64, 3)


def test_the_folder_says_what_it_knows(state, things):
    known = json.loads((state / "emoji/things.json").read_text())
    assert known["things"] == things.names and known["styles"] == scenes.STYLES
    assert "light blue" in known["backgrounds"] and "on the left" in known["places"]
    words = [text for texts in known["more"].values() for text in texts]
    assert {"turquoise", "at night", "riding", "three", "huge", "a sketch of ..."} <= {*words}
    factor = json.loads((state / "emoji/vae/config.json").read_text())["scaling_factor"]
    assert factor == json.loads((state / "scaling_factor.json").read_text())


def test_the_folder_is_diffusers(state, exported):
    """The reference loads it and draws the same picture."""
    pipe = StableDiffusionPipeline.from_pretrained(state / "emoji")
    prompt = "a cat on a red background"
    theirs = drawn_by(pipe, seed=3, prompt=prompt, num_inference_steps=4, guidance_scale=4.0)
    ours = drawn(exported, prompt, seeds=(3,), steps=4, guidance=4.0)
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_the_decoder_alone(state, exported):
    """Its stage leaves the encoder as it was, changes the decoder; the folder has both."""
    before, after = saved(state, "vae")["mean"], saved(state, "decoder")["mean"]
    whole = tiny_sd.flatten(exported.vae)
    for name in before:
        alone = name.startswith(("encoder.", "quant_conv."))
        expected = (before if alone else after)[name].numpy().ravel()
        np.testing.assert_allclose(whole[name].ravel(), expected, rtol=1e-3, atol=1e-6)
    name = "decoder.conv_out.weight"
    assert not torch.equal(before[name], after[name])


def test_a_discriminator_learns_against_the_decoder():
    """It learns to tell pictures apart; neither error reaches into the other network."""
    torch.manual_seed(0)
    image = torch.rand(8, 32, 32, 3) * 2 - 1
    drawn = torch.nn.functional.avg_pool2d(image, 3, 1, 1).requires_grad_()     # over channels, too
    params = train_py.new_discriminator(0)
    optimizer = fitting.Optimizer(params, fitting.Schedule(rate=3e-3, steps=40))
    layers = tiny_sd.nest(params)["discriminator"]
    errors = []
    for _ in range(40):
        errors.append(train_py.misjudged(drawn, image, layers))
        optimizer.zero_grad()
        errors[-1].backward()
        optimizer.step()
    assert drawn.grad is None and errors[-1] < 0.2 < 1.5 < errors[0]
    alike, fooled = train_py.judged(drawn, image, layers)
    same, real = train_py.judged(image, image, layers)
    assert real < fooled and alike > same == 0
    for p in params.values():
        p.grad = None
    (alike + fooled).backward()
    assert drawn.grad.norm() > 0 and all(p.grad is None for p in params.values())


def test_errors_are_balanced():
    """However large they are, their gradients are as large as the first one's, times a share."""
    drawn = torch.ones(2, 3, 4, 3, requires_grad=True)
    train_py.balanced([10 ** k * drawn[:, k].square().sum() for k in range(3)], drawn).backward()
    sizes = drawn.grad.square().sum((0, 2, 3)).sqrt()
    torch.testing.assert_close(sizes / sizes[0], torch.tensor(train_py.SHARES) / train_py.SHARES[0])


# ── The control network ─────────────────────────────────────────────────────────────────────────

def outlined(things, n):
    """Outlines (n, 64, 64) of some scenes."""
    rng = np.random.default_rng(0)
    return np.stack([painting.outlines(scenes.paint(scenes.draw_scene(things, rng), things))
                     for _ in range(n)])


def test_a_control_network_begins_with_the_unet_as_it_is(state, things):
    """And with copies of all its weights on the way down, but for attention."""
    job = train_py.Job(things, train_py.CONFIGS["small"], fitting.Schedule(),
                       train_py.State(state))
    whole = saved(state, "unet")["mean"]
    params = train_py.control_parameters(job, whole)
    new = {name for name in params if f"unet.{name}" not in whole}
    assert all(name.startswith("controlnet_") for name in new)
    assert all(torch.equal(params[name], whole[f"unet.{name}"]) for name in params.keys() - new)
    assert not any(".attentions." in name for name in params)
    model, lines = train_py.as_model(job, None, whole), outlined(things, 2)
    x, context = torch.randn(4, 8, 8, 4), torch.randn(4, 32, 32)
    t = np.array([10, 400, 700, 990])
    with torch.no_grad():
        temb = model.embed_time(model, x, t)
        led = train_py.led_unet(model, tiny_sd.nest(params), lines, x, t, context)
        alone = tiny_sd.unet(x, temb, context, model.config.unet.n_head, 8, **model.unet)
    torch.testing.assert_close(led, alone)


def test_the_control_network_is_diffusers(state, exported, things):
    """Its folder opens there, and adds the same to the U-Net as in extras.control."""
    network = ControlNetModel.from_pretrained(state / "outlines")
    ours = control.read_control(state / "outlines", 2)
    control.check_control("outlines", ours, exported)
    mean = saved(state, "control")["mean"]
    for name, p in tiny_sd.flatten(ours).items():
        np.testing.assert_allclose(p, mean[name], rtol=1e-3, atol=1e-6)
    rng, picture = np.random.default_rng(0), outlined(things, 1)[0][..., None].repeat(3, -1)
    x, context = (rng.normal(size=shape).astype(np.float32)
                  for shape in ((2, 8, 8, 4), (2, 32, 32)))
    middle, skips = control.Control(exported, ours, picture).added(exported, x, 500, context, None)
    with torch.no_grad():
        down, mid = network(first(x), 500, torch.from_numpy(context),
                            first(picture[None] / np.float32(255)).repeat(2, 1, 1, 1),
                            return_dict=False)
    assert len(skips) == len(down) == 6
    for found, expected in zip([*skips, middle], [*down, mid], strict=True):
        np.testing.assert_allclose(found, last(expected), atol=1e-5)
        assert np.abs(found).max() > 1e-4


def test_the_control_network_leads_on_the_command_line(state, things, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(outlined(things, 1)[0]).save("lines.png")
    base = ["a cat", "-m", str(state / "emoji"), "--steps", "2", "-o"]
    assert cli.main([*base, "alone.png"]) == 0
    assert cli.main([*base, "led.png", "--control", f"{state}/outlines:999", "lines.png"]) == 0
    alone, led = (np.asarray(Image.open(name)) for name in ("alone.png", "led.png"))
    assert alone.shape == led.shape and (alone != led).any()


def test_how_far_outlines_are_followed(things):
    lines = outlined(things, 4)
    pictures = np.repeat(lines[..., None], 3, -1)
    assert measure.agreement(255 - pictures, lines) == measure.agreement(pictures, lines)
    assert measure.agreement(pictures, lines) > measure.agreement(pictures[::-1], lines) + 0.1


def test_only_control_networks_are_replaced(state, tmp_path, capsys):
    """By control networks; and it needs a U-Net."""
    for out in state / "emoji", state / "emoji/unet":
        before = contents(out)
        said = refused(capsys, "control", state, "--steps", 3, "--out", out)
        assert "is not one of our models (it has no config.json with" in said
        assert contents(out) == before
    said = refused(capsys, "control", tmp_path, "--steps", 3)
    assert said == f"tiny_sd: {tmp_path / 'unet.pt'} is missing: run the stage unet first"


def test_finished_stages_are_left_alone(state, capsys):
    before = (state / "vae.pt").read_bytes()
    train("vae", state, "--steps", 2)
    assert "vae: finished after 2 steps" in capsys.readouterr().err
    assert (state / "vae.pt").read_bytes() == before


def test_on_from_a_model(state, tmp_path):
    """A stage can begin from an exported folder: its weights are the first step's."""
    train("unet", tmp_path, "--steps", 1, "--start", state / "emoji", "--rate", 1e-9)
    ours, theirs = saved(tmp_path, "unet")["params"], saved(state, "unet")["mean"]
    for name, p in theirs.items():
        np.testing.assert_allclose(ours[name], p, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "merges.txt").read_text() == (state / "merges.txt").read_text()
    train("export", tmp_path)
    assert tiny_sd.load(tmp_path / "emoji").factor == 8


def copy_before(stage, state, path):
    """The results of the previous stages."""
    first = ["vae.pt", "decoder.pt", "merges.txt", "scaling_factor.json"]
    before = {"vae": [], "decoder": first[:1], "clip": first, "unet": [*first, "clip.pt"],
              "control": [*first, "unet.pt"]}
    for name in before[stage]:
        os.link(state / name, path / name)


SIGNALLED = """
def advance(bar, optimizer, *others, before=fitting.advance):
    before(bar, optimizer, *others)
    if optimizer.taken == {after}:
        os.kill(os.getpid(), signal.{name})
fitting.advance = advance
"""


@pytest.fixture(scope="module")
def killed(state, tmp_path_factory):
    """{stage: its state, whose process was killed outright after the second step}.

    One launch for all: what it has imported it hands on to a process for each.
    """
    folders, commands = {}, []
    for stage in train_py.STAGES:
        path = folders[stage] = tmp_path_factory.mktemp(stage)
        copy_before(stage, state, path)
        commands.append(arguments(stage, path, "--steps", 2, "--keep-every", 0))
    done = launch(SIGNALLED.format(after=2, name="SIGKILL") + f"""
for command in {commands}:
    child = os.fork()
    if not child:
        sys.exit(train.main(command))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(commands), done.stderr
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("stage", train_py.STAGES)
def test_on_after_a_kill(stage, state, killed):
    """Killed outright, a stage resumes from the last step kept, here the first.

    The VAE's and its decoder's end bit for bit where they would have ended undisturbed; the others,
    whose bank is filled again, go on with the optimizers' state of that step.
    """
    before = saved(killed[stage], stage)
    assert before["step"] == 1
    train(stage, killed[stage], "--steps", 2)
    ours, undisturbed = saved(killed[stage], stage), saved(state, stage)
    assert ours["losses"][:1] == before["losses"] == undisturbed["losses"][:1]
    for final in (ours, undisturbed):
        assert {int(s["step"]) for s in final["optimizers"][1]["state"].values()} == {2}
    assert len(ours["losses"]) == 2 and np.isfinite(ours["losses"]).all()
    if stage in ("vae", "decoder"):
        assert ours["losses"] == undisturbed["losses"]
        for name, p in undisturbed["mean"].items():
            assert torch.equal(ours["mean"][name], p)


@pytest.mark.slow
def test_ctrl_c(tmp_path):
    """It finishes the current step, saves it, and says how to resume, without a traceback.

    Also in the first minute, before anything is saved.
    """
    done = launch(SIGNALLED.format(after=1, name="SIGINT") + "sys.exit(train.main())",
                  *arguments("vae", tmp_path, "--steps", 4))
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert f"tiny_sd: step 2 is kept in {tmp_path / 'vae.pt'}: the same comm" in done.stderr
    assert saved(tmp_path, "vae")["step"] == 2
    train("vae", tmp_path, "--steps", 3)
    assert saved(tmp_path, "vae")["step"] == 3


# ── Two processes ───────────────────────────────────────────────────────────────────────────────

AVERAGED = """
import torch
from extras.training import fitting
rank, ranks = fitting.process()
p = {"w": torch.ones(3, 4), "b": torch.ones(3)}
optimizer = fitting.Optimizer(p, fitting.Schedule(rate=0.1, steps=5))
x = torch.arange(12.).reshape(3, 4) + 1
for i in range(3):
    optimizer.zero_grad()
    part = x + rank * i if ranks > 1 else x + i / 2      # whose mean over two processes that is
    ((p["w"] * part).sum() + (p["b"] * part[:, 0]).sum()).backward()
    optimizer.step()
"""


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What `all` and `control` leave in two processes, and in averaged.pt what AVERAGED does."""
    path = tmp_path_factory.mktemp("two")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                "--no-python", sys.executable]
    done = launch(f"""
fitting.join_processes("cpu")
{AVERAGED}
if rank == 0:
    torch.save(p, {str(path / "averaged.pt")!r})
train.join_processes = lambda device: None      # they have met
train.dist.destroy_process_group = lambda: None
sys.exit(train.main() or train.main({arguments("control", path, "--steps", 2)}))
""", *arguments("all", path, "--steps", 2), under=torchrun)
    assert done.returncode == 0, done.stderr[-2000:]
    return path


@pytest.mark.slow
@pytest.mark.parametrize("stage", train_py.STAGES)
def test_two_processes(stage, state, of_two):
    """Each draws half of the pictures of a step; their state is one."""
    ours, theirs = saved(of_two, stage)["losses"], saved(state, stage)["losses"]
    close = 0.3 if stage == "vae" else 1        # the others' scenes differ a lot
    np.testing.assert_allclose(np.mean(ours), np.mean(theirs), rtol=close)
    assert ours != theirs


@pytest.mark.slow
def test_processes_take_the_mean_of_their_gradients(of_two):
    alone = {}
    exec(AVERAGED, alone)
    together = torch.load(of_two / "averaged.pt")
    for name, p in alone["p"].items():
        torch.testing.assert_close(together[name], p.detach(), check_stride=False)
        assert (p != 1).all()


@pytest.mark.parametrize("theirs", [{}, {"step": 2, "losses": [0.5, 0.25]},
                                    {"step": 2, "losses": [0.5, 0.2]}], ids=str)
def test_processes_that_read_different_states_are_stopped(theirs, monkeypatch, tmp_path):
    """As on two machines without a common disk: half of the weights would be another network's."""
    seen, ours = [], {"step": 2, "losses": [0.5, 0.25]}
    state = train_py.State(tmp_path)
    monkeypatch.setattr(fitting.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(fitting.dist, "all_reduce", lambda marks, _: seen.append(marks.clone()))
    fitting.check_same(state, theirs)
    monkeypatch.setattr(fitting.dist, "all_reduce",
                        lambda marks, _: marks.copy_(torch.maximum(marks, seen[0])))
    if theirs == ours:
        return fitting.check_same(state, ours)
    with pytest.raises(tiny_sd.UserError, match="a disk that all of them share"):
        fitting.check_same(state, ours)


def test_too_few_things_to_evaluate(things, monkeypatch):
    """If nothing at all is held out, the search for it ends, in a line."""
    monkeypatch.setattr(measure, "held_out", lambda *_: False)
    for ask in (lambda: measure.unshown(things, "tint", ["red"], 1, None),
                lambda: measure.unshown_relations(things, 1)):
        with pytest.raises(tiny_sd.UserError, match="too few things to evaluate"):
            ask()


def test_a_batch_that_two_processes_cannot_share(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "process", lambda: (0, 2))
    said = refused(capsys, "vae", tmp_path, "--batch", 7)
    assert "give --batch a multiple of 2" in said


def test_a_bank_as_large_as_asked_for(state, things):
    """Even if that exceeds its capacity; then new scenes replace the oldest."""
    job = train_py.Job(things, train_py.CONFIGS["small"],
                       fitting.Schedule(bank=12), train_py.State(state))
    bank = train_py.Bank(job, filled=4, capacity=8)
    assert len(bank.captions) == len(bank.latents) == 12
    before, captions = bank.latents.clone(), [*bank.captions]
    bank.renew(5, np.random.default_rng(1))
    assert len(bank.latents) == 12 and torch.equal(bank.latents[5:], before[5:])
    assert bank.captions[5:] == captions[5:]
    assert not torch.equal(bank.latents[:5], before[:5])
    latents, captions = next(bank.batches(3, 1, np.random.default_rng(2)))
    places = [bank.captions.index(caption) for caption in captions]
    assert torch.equal(latents, bank.latents[places])


# ── The optimizer ───────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_orthogonal(shape):
    """U Vᵀ of U S Vᵀ, except for singular values between 0.6 and 1.3."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    values = (u.T @ fitting.orthogonal(x) @ v.T).diagonal()
    assert (values > 0.6).all() and (values < 1.3).all()
    off = fitting.orthogonal(x) - u @ torch.diag(values) @ v
    assert off.abs().max() < 1e-4


def test_the_rate():
    """It rises, then falls along a cosine to a hundredth."""
    schedule = fitting.Schedule(rate=2.0)
    assert schedule.rate_at(0, 0) == pytest.approx(2 / 50)
    assert schedule.rate_at(100, 0) == 2
    assert schedule.rate_at(100, 0.5) == pytest.approx(2 * (0.01 + 0.99 / 2))
    assert schedule.rate_at(100, 1) == pytest.approx(0.02)


def test_noisy_times_come_more_often():
    t = train_py.noisy_times(100_000, 1000, np.random.default_rng(0))
    counts, _ = np.histogram(t, 10, (0, 1000))
    assert 2.3 < counts[-1] / (len(t) / 10) < 3 and 0.33 < counts[0] / (len(t) / 10) < 0.42
    assert t.min() >= 0 and t.max() <= 999


def test_ctrl_c_while_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    done = subprocess.run([sys.executable, "-m", "extras.training.train", "vae"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr


# ── Errors ──────────────────────────────────────────────────────────────────────────────────────

def test_too_little_is_said(tmp_path, capsys):
    """Without escape sequences of a name, which could change the terminal."""
    said = refused(capsys, "clip", tmp_path / "\x1b[31m", "--steps", 1)
    assert said == f"tiny_sd: {tmp_path}/ [31m/vae.pt is missing: run the stage vae first"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_too_little_memory_is_one_line(error, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_py, "run_stage", Mock(side_effect=error))
    assert "memory" in refused(capsys, "vae", tmp_path)


def test_a_rank_alone_is_not_from_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    fitting.join_processes("cpu")
    assert fitting.process() == (0, 1)


@pytest.mark.parametrize("options, said", [
    ("--rate nan", "--rate"), ("--minutes inf", "--minutes"), ("--steps -1", "--steps"),
    ("--out .", "--out ."), ("--out mine/..", "--out mine/.."), ("--out /", "--out /"),
    ("--seed -1", "--seed"), ("--seed 99999999999999999999", "--seed"),
    ("--threads -2", "--threads"), ("--threads 1000000", "--threads"), ("--batch 1" + "0" * 12,
     "--batch"), ("--bank 1" + "0" * 12, "--bank"), ("--minutes 1e308", "--minutes"),
    ("--draw-steps 0", "--draw-steps"), ("--device tpu", "no tpu device")])
def test_numbers_that_mean_nothing_are_refused(tmp_path, options, said, capsys):
    with pytest.raises(SystemExit) as status:
        train_py.main(arguments("vae", tmp_path / "new", *options.split()))
    assert status.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_a_state_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "vae.pt").write_text("no checkpoint")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/vae.pt")     # it would be waited for
    for state, said in ((tmp_path, "vae.pt is not whole"), (tmp_path / "file", "file"),
                        (tmp_path / "pipe", "it is not a file")):
        assert said in refused(capsys, "vae", state, "--steps", 1, out=False)
    assert (tmp_path / "vae.pt").read_text() == "no checkpoint"


@pytest.mark.parametrize("content", [
    {}, [1, 2], {"params": {}, "mean": 3}, {"params": {}, "mean": {}, "step": "x"},
    {"params": {"a": 1}, "mean": {"a": 1}, "step": 1, "seconds": 1.0, "losses": []},
    *({"params": {}, "mean": {}, "step": 1, "seconds": 1.0, "losses": []} | other for other in (
        {"losses": ["x"]}, {"losses": torch.ones(1)}, {"step": 1.5}, {"step": torch.tensor(1)},
        {"seconds": math.inf}, {"seconds": 10 ** 400}))])
def test_a_state_of_another_content(tmp_path, capsys, content):
    torch.save(content, tmp_path / "vae.pt")
    before = (tmp_path / "vae.pt").read_bytes()
    assert "vae.pt" in refused(capsys, "vae", tmp_path, "--steps", 1)
    assert (tmp_path / "vae.pt").read_bytes() == before


def test_an_optimizers_state_of_other_sizes():
    params = {"a": torch.ones(2, 3), "b": torch.ones(3)}
    optimizer = fitting.Optimizer(params, fitting.Schedule(rate=0.1))
    (params["a"].sum() + params["b"].sum()).backward()
    optimizer.step()
    good = copy.deepcopy(optimizer.checkpoint())
    for i, name in enumerate(["momentum", "exp_avg"]):
        optimizer.restore(good)
        kept = copy.deepcopy(good)
        kept["optimizers"][i]["state"][0][name] = torch.ones(2)
        with pytest.raises(tiny_sd.UserError, match="does not fit; move it elsewhere: sizes"):
            optimizer.restore(kept)


@pytest.mark.parametrize("stage", train_py.STAGES)
def test_a_state_of_another_config(stage, state, capsys):
    assert "--config" in refused(capsys, stage, state, "--steps", 3, "--config", "base")


@pytest.mark.parametrize("name, text", [
    ("scaling_factor.json", "{"), ("scaling_factor.json", "[1]"), ("scaling_factor.json", "NaN"),
    ("scaling_factor.json", "0"), ("merges.txt", "x"), ("merges.txt", "#version: 0.2\na b c\n")])
def test_spoilt_texts_of_a_state(name, text, state, tmp_path, capsys):
    for kept in state.iterdir():
        if kept.is_file() and kept.name != name:
            os.link(kept, tmp_path / kept.name)
    (tmp_path / name).write_text(text)
    said = refused(capsys, "unet", tmp_path, "--steps", 3)
    assert name in said and "name another --state" in said
    assert (tmp_path / name).read_text() == text


def test_a_start_that_does_not_fit_leaves_the_state_empty(tmp_path, state, capsys):
    said = refused(capsys, "unet", tmp_path / "new", "--start", state / "emoji", "--config", "base")
    assert "training cannot start from" in said and not (tmp_path / "new").exists()
    said = refused(capsys, "unet", tmp_path / "new", "--start", tmp_path)
    assert str(tmp_path) in said and not (tmp_path / "new").exists()
    two = write_model(tmp_path / "two", TWO_ENCODERS)
    said = refused(capsys, "unet", tmp_path / "new", "--start", two)
    assert "training cannot start from" in said and not (tmp_path / "new").exists()


def test_a_picture_in_the_state_that_is_not_the_trainings_stays(tmp_path, capsys):
    (tmp_path / "vae.png").write_text("mine")
    said = refused(capsys, "vae", tmp_path, "--steps", 1)
    assert "vae.png is not of this training" in said
    assert contents(tmp_path) == {tmp_path / "vae.png": b"mine"}


def test_a_full_disk(tmp_path, capsys):
    """Here a limit on file sizes; what was saved before stays."""
    train("vae", tmp_path, "--steps", 1)
    before, limits = (tmp_path / "vae.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        said = refused(capsys, "vae", tmp_path, "--steps", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in said
    assert (tmp_path / "vae.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"vae.pt", "vae.png"}


OURS = '{"_name_or_path": "tiny_sd"}'


@pytest.mark.parametrize("command", ["export", "all"])
def test_only_models_are_replaced(command, state, tmp_path, capsys):
    """And only if asked; never other people's files, nor folders with the data or the state."""
    said = refused(capsys, command, state, "--steps", 2, out=False)
    assert "exists already: name it with --out" in said
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    inside = shutil.copy(DATA, mine / "data.zip")
    for data, out in ((DATA, mine), (inside, mine), (inside, mine / "thesis.txt")):
        said = refused(capsys, command, state, "--steps", 2, "--out", out, data=data)
        assert "is not one of our models" in said
    for name in "model_index.json", "controlnet/diffusion_pytorch_model.safetensors":
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text(OURS)
    said = refused(capsys, command, state, "--steps", 2, "--out", mine, data=mine / "data.zip")
    assert f"{mine} contains {mine / 'data.zip'}" in said
    (mine / ".git/refs").mkdir(parents=True)
    (mine / ".git/config").write_text("a repository")
    said = refused(capsys, command, state, "--steps", 2, "--out", mine)
    network = mine / "controlnet/diffusion_pytorch_model.safetensors"
    added = mine / ".git/config", network, mine / "data.zip", mine / "thesis.txt"
    assert f"contains {'; '.join(map(str, added))}: name another" in said
    (state / "model_index.json").write_text(OURS)
    try:
        said = refused(capsys, command, state, "--steps", 2, "--out", state)
    finally:
        (state / "model_index.json").unlink()
    assert f"{state} contains {state}" in said
    assert (mine / "thesis.txt").read_text() == "years of work"
    said = refused(capsys, command, state, "--steps", 2, "--out", tmp_path / ("x" * 255))
    assert said.endswith("is too long")


@pytest.mark.parametrize("kind", ["a model", "with a control network"])
def test_models_of_others_are_not_replaced(kind, state, tmp_path, capsys):
    """Even if their files have the same names."""
    mine = tmp_path / "mine"
    if kind == "a model":
        write_model(mine)
        words = "is not one of our models (it has no model_index.json with"
    else:
        shutil.copytree(state / "emoji", mine)
        shutil.copytree(state / "outlines", mine, dirs_exist_ok=True)
        words = f"{mine} contains {mine / 'config.json'}; "
    before = contents(mine)
    assert words in refused(capsys, "export", state, "--out", mine)
    assert contents(mine) == before


def test_what_came_while_it_trained_is_not_replaced(state, tmp_path, capsys, monkeypatch):
    mine = tmp_path / "mine"

    def meanwhile(*_):
        mine.mkdir(exist_ok=True)
        for name in "model_index.json", "thesis.txt":
            (mine / name).write_text("years of work")

    monkeypatch.setattr(train_py, "run_stage", meanwhile)
    before = contents(state)
    assert "exists already" in refused(capsys, "all", state, "--out", mine)
    assert {*contents(mine).values()} == {b"years of work"}
    new = tmp_path / "new"      # the state, which is there only later
    assert f"{new} contains {new}" in refused(capsys, "all", new, "--out", new)
    assert contents(state) == before and not new.exists()


def test_a_kill_while_a_model_is_replaced_loses_none(tmp_path):
    """Between two renamings: the old one is the only one until the next is whole."""
    (tmp_path / ".mine.old").mkdir()
    (tmp_path / ".mine.old/model").write_text("the old one")
    with pytest.raises(tiny_sd.UserError), folder.folder_atomically(tmp_path / "mine", print):
        raise OSError("a full disk")
    assert (tmp_path / ".mine.old/model").read_text() == "the old one"


def test_what_is_added_while_a_model_is_replaced_stays(tmp_path, capsys):
    out = tmp_path / "mine"
    (out / "unet").mkdir(parents=True)
    (out / "unet/config.json").write_text("ours")
    with folder.folder_atomically(out, print) as new:
        (new / "model_index.json").write_text("the new one")
        (out / "unet/notes.txt").write_text("by the user")
    assert (out / "model_index.json").read_text() == "the new one"
    assert (tmp_path / ".mine.old/unet/notes.txt").read_text() == "by the user"
    assert "stays, since it contains" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "all"])
@pytest.mark.parametrize("kind", ["file", "model"])
def test_what_comes_while_a_model_is_written_is_not_replaced(
        kind, command, state, tmp_path, capsys, monkeypatch):
    """Nor does the later of two exports replace the other's model."""
    mine, shapes = tmp_path / "mine", train_py.unet_stage_shapes

    def meanwhile(*args):       # the last thing before writing
        if kind == "file":
            mine.write_text("years of work")
        else:
            shutil.copytree(state / "emoji", mine)
        return shapes(*args)

    monkeypatch.setattr(train_py, "run_stage", lambda *_: None)
    monkeypatch.setattr(train_py, "unet_stage_shapes", meanwhile)
    said = refused(capsys, command, state, "--out", mine)
    assert f"{mine} exists already" in said
    if kind == "file":
        assert mine.read_text() == "years of work"
    else:
        assert {*contents(mine).values()} == {*contents(state / "emoji").values()}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("option", ["--keep-every", "--show-every"])
@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
def test_a_time_without_end_is_refused(option, seconds, tmp_path, capsys):
    """With NaN nothing was saved before the end."""
    with pytest.raises(SystemExit):
        train_py.main(arguments("vae", tmp_path / "state", option, seconds))
    assert f"{option} must be from 0" in capsys.readouterr().err


@pytest.mark.skipif(files.fcntl is None, reason="there are no such locks")
def test_a_state_that_was_just_removed_is_not_held(tmp_path, monkeypatch):
    """Two processes would hold it: one the folder that is gone, one the next of its name."""
    lock = files.fcntl.flock

    def slow(handle, kind):
        (tmp_path / "state").rmdir()
        lock(handle, kind)
    monkeypatch.setattr(files.fcntl, "flock", slow)
    with pytest.raises(tiny_sd.UserError, match="in use"), files.held(tmp_path / "state"):
        pass


@pytest.mark.parametrize("error, said", [
    (PermissionError(13, "Permission denied"), "Permission denied"), (MemoryError(), "cannot be"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "cannot be read: Default")])
def test_a_whole_state_is_not_called_broken(error, said, state, monkeypatch):
    """Whoever reads so might delete days of training."""
    monkeypatch.setattr(fitting.torch, "load", Mock(side_effect=error))
    with pytest.raises(tiny_sd.UserError, match=said) as told:
        fitting.State(state).load("vae")
    assert "move it" not in str(told.value) and "remove" not in str(told.value)


def test_a_model_is_on_the_disk_before_the_old_one_is_removed(tmp_path, monkeypatch):
    kept, wait = [], os.fsync

    def fsync(handle):
        kept.append((os.fstat(handle).st_ino, (tmp_path / "mine/old").exists()))
        wait(handle)
    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/old").touch()
    with folder.folder_atomically(tmp_path / "mine", print) as new:
        (new / "unet").mkdir()
        (new / "unet/weights").write_text("new")
    assert kept == [((tmp_path / "mine/unet/weights").stat().st_ino, True)]


def test_what_appears_while_it_renders_stays(tmp_path, monkeypatch):
    """The drawings then get another name."""
    data = tmp_path / "mine.zip"
    monkeypatch.setattr(drawings, "install_sets", lambda _: [tmp_path])
    monkeypatch.setattr(drawings, "SETS", {"noto": "noto"})
    monkeypatch.setattr(drawings, "read_icons", lambda _: None)
    monkeypatch.setattr(drawings, "choose_things", lambda *_: [(["a cat"], {"noto": "cat"})])
    (tmp_path / "metadata.json").write_text('{"categories": {}}')

    def draw_icon(*_):
        data.write_text("years of drawings")
        return Image.new("RGBA", (128, 128))
    monkeypatch.setattr(drawings, "draw_icon", draw_icon)
    assert drawings.render(data, tmp_path) == tmp_path / "mine-1.zip"
    assert data.read_text() == "years of drawings"
    assert zipfile.ZipFile(tmp_path / "mine-1.zip").namelist() == ["0000-noto.png", "things.json"]


def test_a_state_that_comes_while_it_trains_is_kept(tmp_path, capsys):
    """Such as the backup that was missing at the start."""
    state = fitting.State(tmp_path)
    assert state.load("vae") == {}
    (tmp_path / "vae.pt").write_text("weeks of training")
    for step in 1, 2:
        state.save("vae", {"step": step})
    assert saved(tmp_path, "vae") == {"step": 2}
    assert (tmp_path / "vae-1.pt").read_text() == "weeks of training"
    assert {path.name for path in tmp_path.iterdir()} == {"vae.pt", "vae-1.pt"}
    assert f"it is now {tmp_path / 'vae-1.pt'}" in capsys.readouterr().err


def test_a_model_put_aside_is_told(tmp_path, monkeypatch, capsys):
    """If the new one cannot take its name."""
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(os, "rename", Mock(side_effect=OSError("Directory not empty")))
    with pytest.raises(tiny_sd.UserError), folder.folder_atomically(tmp_path / "mine", print):
        pass
    assert (tmp_path / ".mine.old").exists() and ".mine.old" in capsys.readouterr().err


@pytest.mark.skipif(files.fcntl is None, reason="there are no such locks")
def test_two_trainings_do_not_share_a_state(tmp_path, capsys):
    with files.held(tmp_path / "state"):
        said = refused(capsys, "vae", tmp_path / "state", "--steps", 1)
    assert "state is in use by another training process" in said


def test_a_model_is_replaced(state, tmp_path):
    """Also where a link leads, and again; folders of similar names stay."""
    shutil.copytree(state / "emoji", tmp_path / "old")
    (tmp_path / "old/things.json").unlink()
    for name in ".DS_Store", "unet/Thumbs.db", "desktop.ini":   # of macOS and Windows
        (tmp_path / "old" / name).write_bytes(b"")
    (tmp_path / "link").symlink_to("old")
    for name in ".old.old", ".old.new", ".link.new":
        (tmp_path / name).mkdir()
    before = {*tmp_path.iterdir()}
    for _ in range(2):
        train("export", state, "--out", tmp_path / "link")
    assert (tmp_path / "old/things.json").exists() and {*tmp_path.iterdir()} == before


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    """And what was saved before stays."""
    weights = {"w": torch.ones(3, 4), "b": torch.ones(3)}
    optimizer = fitting.Optimizer(weights, fitting.Schedule(rate=1.0))

    def losses():
        optimizer.taken += 1
        yield math.nan

    with pytest.raises(tiny_sd.UserError, match="vae: the loss is nan at step 1; lower --rate"):
        fitting.fit("vae", optimizer, losses(), np.random.default_rng(), fitting.Schedule(steps=4),
                    train_py.State(tmp_path))
    assert not (tmp_path / "vae.pt").exists()


def test_the_tokenizer_is_learnt_from_captions(things):
    """Common words become a token each; idle pairs fill the vocabulary; parts before wholes."""
    merges = train_py.train_tokenizer(things, captions=500)
    assert len(merges) == len({*merges}) == folder.VOCABULARY - 514
    words = tiny_sd.Tokenizer(merges)
    for word in ("cat", "house", "background", "turquoise", "riding", "blueprint"):
        assert words.merge(word) == [f"{word}</w>"]
    known = {symbol + end for symbol in words.bytes.values() for end in ("", "</w>")}
    for one, other in merges:
        assert {one, other} <= known
        known.add(one + other)


def test_what_a_cpu_prefers_is_the_same():
    torch.manual_seed(0)
    torchs = tiny_sd.torch_operations()
    ours = torchs | train_py.faster_on_cpu(torchs)
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    for causal in (False, True):
        one, other = (form["dot_product_attention"](q, k, v, causal) for form in (ours, torchs))
        np.testing.assert_allclose(one, other, atol=1e-5)
    x, weight, bias = torch.randn(2, 5, 3, 8), torch.randn(8), torch.randn(8)
    one, other = (form["group_norm"](x, 4, 1e-5, weight, bias) for form in (ours, torchs))
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert ours["group_norm"](x.bfloat16(), 4, 1e-5, weight, bias).dtype == torch.bfloat16


# ── Measuring ───────────────────────────────────────────────────────────────────────────────────

def test_many_pictures_at_once(exported, state):
    """Each is what tiny_sd draws for its prompt, its seed and its negative prompt alone."""
    model = tiny_sd.load(state / "emoji", "torch")
    prompts, negatives, seeds = ["cat", "a dog on the left", "key"], ["", "red", ""], [3, 4, 3]
    for guidance in (1, 4.0):
        pictures = measure.draw(model, prompts, seeds, negatives, steps=3, guidance=guidance)
        for i in range(3):
            alone, = drawn(exported, prompts[i], negatives[i], seeds[i:i + 1], steps=3,
                           guidance=guidance)
            assert np.abs(pictures[i] - alone.astype(int)).max() <= 1


def test_the_judge_knows_true_pictures(things):
    """True pictures of combinations never trained are judged right; wrong ones are not."""
    judge, rng = measure.Judge(things, tries=40), np.random.default_rng(5)
    for title, (asked, alternatives) in measure.questions(things, 4).items():
        wrong = [next(iter(alternatives(*one))) for one in asked]
        true, false = (
            judge.rates(title, [scenes.paint(scenes.compose(things, rng, *one), things, 128)
                                for one in some], asked, alternatives) for some in (asked, wrong))
        assert len(true) == 3 and {*true.values()} == {1.0}, title
        assert false[f"{title}: the {title}"] == false[f"{title}: both"] == 0


def test_questions_are_of_what_is_held_out(things):
    questions = measure.questions(things, 6)
    assert {*questions} == {"colour", "medium", "surroundings", "number", "relation"}
    for asked, _ in questions.values():
        assert len(asked) == 6
        for subject, manner in asked:
            assert not scenes.may_show(things, subject, manner)


def test_spread():
    """One picture a thing spreads by 0, any picture for any thing by 1."""
    rng = np.random.default_rng(0)
    one = np.repeat(rng.integers(0, 256, (20, 32, 32, 3), np.uint8), 4, axis=0)
    assert measure.spread(one, 4) == 0
    any_ = rng.integers(0, 256, (80, 32, 32, 3), np.uint8)
    assert measure.spread(any_, 4) == pytest.approx(1, abs=0.02)


def test_errors_in_decibels_and_edges():
    black = np.zeros((8, 8, 3), np.uint8)
    assert measure.psnr(black, black + 255) == 0
    assert measure.psnr(black, black + 51) == pytest.approx(20 * math.log10(5))
    half = black.copy()
    half[:, 4:] = 10
    assert measure.edge_energy(half) == 8 * 3 * 100 and measure.edge_energy(black) == 0


@pytest.mark.slow
def test_evaluate(state, capsys):
    """A table of rates, on paper and in a file of a new name."""
    (state / "emoji.json").write_text("mine")
    train("evaluate", state, "--limit", 2)
    said, table = capsys.readouterr().out, json.loads((state / "emoji-1.json").read_text())
    assert table["of each kind"] == 2 and all(name in said for name in table)
    rates = [table[f"{kind}: both"] for kind in
             ("colour", "medium", "surroundings", "number", "relation")]
    assert all(0 <= rate <= 1 for rate in rates)
    assert table["megabytes"] < 40
    assert (state / "emoji.json").read_text() == "mine"


def test_two_evaluations_at_once_write_two_files(things, tmp_path, monkeypatch):
    """The measures are made up; the second evaluation comes between the two of the first."""
    (tmp_path / "v1.5").symlink_to(ROOT / "weights/emoji")
    rounds = iter("12")

    def measures(*_):
        number = next(rounds)
        yield {"of each kind": number}
        if number == "1":
            measure.evaluate(tmp_path / "v1.5", things, 1, 1, "cpu")
        yield {"megabytes": 0}

    monkeypatch.setattr(measure, "measures", measures)
    monkeypatch.setattr(measure, "table", str)
    measure.evaluate(tmp_path / "v1.5", things, 1, 1, "cpu")
    found = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert found == {"v1.5.json": {"of each kind": "1", "megabytes": 0},
                     "v1.5-1.json": {"of each kind": "2", "megabytes": 0}}


@pytest.mark.slow
def test_a_sheet_does_not_replace_one(state, capsys):
    before = (state / "emoji.png").read_bytes()
    train("sheet", state)
    assert str(state / "emoji-1.png") in capsys.readouterr().out
    assert (state / "emoji.png").read_bytes() == before and (state / "emoji-1.png").exists()
