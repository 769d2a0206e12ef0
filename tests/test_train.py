"""weights/train.py on 24 things: every stage from nothing, on after a kill, in two processes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import tiny_sd
from conftest import ROOT
from extras import like_diffusers

sys.path.insert(0, str(ROOT / "weights"))
import fitting  # noqa: E402
import measure  # noqa: E402
import scenes  # noqa: E402
import train as train_py  # noqa: E402

pytestmark = pytest.mark.slow

DATA = ROOT / "tests" / "emoji.zip"     # 24 things of those that `render` makes, at 64 x 64 pixels
SHORT = ["--batch", "8", "--bank", "64", "--draw-steps", "2", "--threads", "1"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def command(stage, state, *options, launcher=(), out=True):
    where = ["--data", DATA, "--state", state, *(["--out", state / "emoji"] if out else [])]
    words = [launcher, [ROOT / "weights/train.py", stage], where, SHORT, options]
    return [sys.executable, *(str(word) for part in words for word in part)]


def run(*args, **options):
    return subprocess.run(command(*args, **options), capture_output=True, text=True, timeout=500)


def train(*args, **options):
    done = run(*args, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def saved(state, stage):
    return torch.load(state / f"{stage}.pt", weights_only=True)


@pytest.fixture(scope="module")
def things():
    return scenes.load_things(DATA, 64)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """What `all` leaves, trained from nothing for a few steps a stage."""
    path = tmp_path_factory.mktemp("train")
    train("all", path, "--steps", 4)
    return path


# ── Drawings, captions and scenes ───────────────────────────────────────────────────────────────

def test_test_data(things):
    assert things.drawings.shape == (24, 6) and (things.drawings >= 0).all()
    assert things.names[2][:2] == ["car", "automobile"]
    assert all(n == len({*names}) for names in things.names for n in [len(names)])


def test_scenes_hold_out(things):
    """Among many scenes there is no drawing, background or pair that is held out; all fit."""
    names = [names[0] for names in things.names]
    owner = {int(p): (i, s) for i, row in enumerate(things.drawings) for s, p in enumerate(row)}
    words = tiny_sd.load("emoji").tokenizer
    colours = {colour: name for name, colour in scenes.COLOURS.items()}
    rng, seen = np.random.default_rng(0), set()
    for _ in range(2000):
        scene = scenes.draw_scene(things, rng)
        shown = [owner[part.picture] for part in scene.parts]
        assert not any(scenes.held_out_style(names[i], scenes.STYLES[s]) for i, s in shown)
        if len(shown) == 2:
            assert not scenes.held_out_pair(*(names[i] for i, _ in shown))
        assert not any(scenes.held_out_background(names[i], colours[scene.colour])
                       for i, _ in shown)
        assert words.encode(scene.caption)[1] == ""
        seen |= {*shown}
    assert len(seen) == sum(not scenes.held_out_style(name, style)
                            for name in names for style in scenes.STYLES)


def test_captions():
    cat = scenes.in_style("a cat", "blob")
    assert scenes.describe(cat, colour="light blue") == \
        "a cat in the blob style on a light blue background"
    assert scenes.describe(scenes.in_style("a ghost", "flat"), "in the top left corner",
                           small=True) == "a small ghost in the flat style in the top left corner"
    assert [*map(scenes.article, ("apple", "ufo", "hourglass", "grapes", "cactus"))] == \
        ["an apple", "a ufo", "an hourglass", "grapes", "a cactus"]
    assert scenes.share("style", "cat", "blob") == \
        zlib.crc32(b"style|cat|blob") / 2 ** 32


def test_pictures_say_what_captions_do(things):
    """A caption that names a style shows a drawing in it; painting puts it where it says."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = scenes.draw_scene(things, rng)
        styles = [s for s in scenes.STYLES if f"in the {s} style" in scene.caption]
        if len(scene.parts) == 1 and styles:
            assert scene.parts[0].picture in things.drawings[:, scenes.STYLES.index(styles[0])]
        picture = scenes.paint(scene, things)
        assert picture.shape == (64, 64, 3)
        if "in the top left corner" in scene.caption:
            assert (picture[32:] == scene.colour).all() and (picture[:, 32:] == scene.colour).all()


def test_names_of_emoji():
    """Unicode's own words and the usual aliases, without skin tones and flags."""
    names = dict(scenes.emoji_names())
    assert names["🍎"] == ["red apple", "apple"] and names["🐶"][0] == "dog face"
    assert len(names) > 1600
    assert not any("skin tone" in name or name.startswith("flag:")
                   for said in names.values() for name in said)


def test_names_as_people_say_them():
    said = scenes.say_names([["automobile", "red car"], ["cat", "cat2", "pet"], ["dog", "pet"]])
    assert said == [["car", "automobile", "red car"], ["cat"], ["dog"]]


def test_drawing_icons(tmp_path):
    """A package's drawings are found by name, alias or characters, and cut to their ink."""
    red = '<path fill="#f00" d="M2 4h8v4H2z"/>'
    texts = {"icons.json": {"icons": {"red-box": {"body": red}}, "width": 16, "height": 16,
                            "aliases": {"box": {"parent": "red-box"}}},
             "chars.json": {"1f4e6": "red-box"}}
    for name, value in texts.items():
        (tmp_path / name).write_text(json.dumps(value))
    icons = scenes.read_icons(tmp_path)
    found = [scenes.find_drawing(icons, text, names) for text, names in
             (("📦", []), ("x", ["Red box"]), ("x", ["box"]), ("x", ["boxes"]))]
    assert found == ["red-box", "red-box", "red-box", None]
    picture = np.asarray(scenes.draw_icon(icons, "red-box"))
    assert picture.shape == (128, 128, 4) and (picture[64, 64] == (255, 0, 0, 255)).all()
    rows, columns = np.nonzero(picture[..., 3] > 128)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (4, 123, 34, 93)


def test_npm_is_missing(tmp_path):
    done = subprocess.run(command("render", tmp_path)[:-4] + ["--data", tmp_path / "none.zip"],
                          capture_output=True, text=True, env={**os.environ, "PATH": ""})
    assert done.returncode == 2 and done.stderr.startswith("train.py: npm is missing")


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
    things = scenes.load_things(data, 32)
    assert things.names == names and (things.drawings[:, 3] == range(40)).all()
    assert any(scenes.held_out_style(name, "flat") for name, _ in names)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(500):
        seen |= {part.picture for part in scenes.draw_scene(things, rng).parts}
    assert seen == {*range(40)}


def test_the_form_that_the_readme_gives_for_them(tmp_path):
    text = (ROOT / "weights/README.md").read_text(encoding="utf-8")
    names, = re.findall(r"`(\[\[.*\]\])`", text)
    data = write_data(tmp_path / "own.zip", names, re.findall(r"`(\d{4}-\w+\.png)`", text))
    assert scenes.load_things(data, 32).names == json.loads(names)


@pytest.mark.parametrize("names, files, said", [
    ([["a"], ["b"]], ["0000-noto.png"], "b has no drawing"), ([["a"]], ["0000-noto.png"], "two"),
    ({"a": 1}, [], "things.json"), ([["a"], []], [], "things.json"), (["a", "b"], [], "things"),
    ([["a"], [""]], [], "things.json"), ("[" * 100_000, [], "recursion"), ("[", [], "Expecting"),
    ([["a"], ["b"]], ["0000-mine.png"], "0000-mine.png"), ([["a"], ["b"]], ["x.png"], "x.png"),
    ([["a"], ["b"]], ["0007-noto.png"], "0007-noto.png")])
def test_what_is_wrong_with_them_is_said(tmp_path, names, files, said):
    data = write_data(tmp_path / "own.zip", names, files)
    with pytest.raises(tiny_sd.UserError, match="own.zip: .*" + said):
        scenes.load_things(data, 32)


# ── Stages ──────────────────────────────────────────────────────────────────────────────────────

def test_all_stages(state):
    for stage in train_py.STAGES:
        losses = saved(state, stage)["losses"]
        assert len(losses) == 4 and np.isfinite(losses).all()
    for name in ("vae.png", "decoder.png", "unet.png", "emoji.png", "emoji-guesses.png",
                 "emoji-strength.png"):
        assert (state / name).stat().st_size > 10_000
    model = tiny_sd.load(state / "emoji")
    assert model.factor == 4 and len(model.encoders[0].tokenizer.vocab) == 2000
    *_, x = like_diffusers.generate(model, "red apple", steps=2)
    pictures = tiny_sd.decode(model, x)
    assert pictures.shape == (1, 64, 64, 3) and pictures.std() > 0


def test_the_folder_says_what_it_knows(state, things):
    known = json.loads((state / "emoji/things.json").read_text())
    assert known["things"] == things.names and known["styles"] == scenes.STYLES
    assert "light blue" in known["backgrounds"] and "on the left" in known["places"]
    factor = json.loads((state / "emoji/vae/config.json").read_text())["scaling_factor"]
    assert factor == json.loads((state / "scaling_factor.json").read_text())


def test_the_folder_is_diffusers(state):
    """The reference loads it and draws the same picture."""
    pipe = StableDiffusionPipeline.from_pretrained(state / "emoji")
    pipe.set_progress_bar_config(disable=True)
    prompt, seed = "a cat on a red background", torch.Generator().manual_seed(3)
    theirs = pipe(prompt, num_inference_steps=4, guidance_scale=4.0, generator=seed).images[0]
    model = tiny_sd.load(state / "emoji")
    *_, x = like_diffusers.generate(model, prompt, seeds=(3,), steps=4, guidance=4.0)
    ours = tiny_sd.decode(model, x)[0].astype(int)
    assert np.abs(ours - np.asarray(theirs)).max() <= 1


def test_the_decoder_alone(state):
    """Its stage leaves the encoder as it was, changes the decoder; the folder has both."""
    kept = train_py.State(state)
    before, after = kept.trained("vae"), kept.trained("decoder")
    exported = tiny_sd.flatten(tiny_sd.load(state / "emoji").vae)
    for name in before:
        alone = name.startswith(("encoder.", "quant_conv."))
        expected = (before if alone else after)[name].numpy().ravel()
        np.testing.assert_allclose(exported[name].ravel(), expected, rtol=1e-3, atol=1e-6)
    name = "decoder.conv_out.weight"
    assert not torch.equal(before[name], after[name])


def test_finished_stages_are_left_alone(state):
    before = (state / "vae.pt").read_bytes()
    assert "vae: finished, after 4 steps" in train("vae", state, "--steps", 4).stderr
    assert (state / "vae.pt").read_bytes() == before


def test_models_are_not_overwritten(state):
    for name in ("export", "all"):
        done = run(name, state, "--steps", 4, out=False)
        assert done.returncode == 2 and "is there already: name it with --out" in done.stderr


def test_on_from_a_model(state, tmp_path):
    """A stage can begin from an exported folder: its weights are the first step's."""
    train("unet", tmp_path, "--steps", 1, "--start", state / "emoji", "--rate", 1e-9)
    ours, theirs = saved(tmp_path, "unet")["params"], saved(state, "unet")["mean"]
    for name, p in theirs.items():
        np.testing.assert_allclose(ours[name], p, rtol=1e-3, atol=1e-4)
    assert (tmp_path / "merges.txt").read_text() == (state / "merges.txt").read_text()
    train("export", tmp_path)
    assert tiny_sd.load(tmp_path / "emoji").factor == 4


def copy_before(stage, state, path):
    """What the stages before this one left."""
    first = ["vae.pt", "merges.txt", "scaling_factor.json"]
    before = {"vae": [], "decoder": first[:1], "clip": first, "unet": [*first, "clip.pt"]}
    for name in before[stage]:
        os.link(state / name, path / name)


def signalled(name):
    """What starts weights/train.py so that it gets this signal after its second step."""
    return ["-c", f"""
import os, signal, sys
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import fitting, train

def advance(bar, training, schedule, before=fitting.advance):
    before(bar, training, schedule)
    if training.step == 2:
        os.kill(os.getpid(), signal.{name})

fitting.advance = advance
train.main()
"""]


@pytest.mark.parametrize("stage", train_py.STAGES)
def test_on_after_a_kill(stage, state, tmp_path):
    """Killed outright, a stage goes on from the last step kept, here the first.

    The VAE's and its decoder's end bit for bit where they would have ended undisturbed; the others,
    whose bank is filled again, go on with the optimizers' state of that step.
    """
    copy_before(stage, state, tmp_path)
    done = run(stage, tmp_path, "--steps", 4, "--keep-every", 0, launcher=signalled("SIGKILL"))
    killed = saved(tmp_path, stage)
    assert (done.returncode, killed["step"]) == (-signal.SIGKILL, 1)
    train(stage, tmp_path, "--steps", 4)
    ours, undisturbed = saved(tmp_path, stage), saved(state, stage)
    assert ours["losses"][:1] == killed["losses"] == undisturbed["losses"][:1]
    for final in (ours, undisturbed):
        assert {int(s["step"]) for s in final["optimizers"][1]["state"].values()} == {4}
    assert len(ours["losses"]) == 4 and np.isfinite(ours["losses"]).all()
    if stage in ("vae", "decoder"):
        assert ours["losses"] == undisturbed["losses"]
        for name, p in undisturbed["mean"].items():
            assert torch.equal(ours["mean"][name], p)


def test_ctrl_c(tmp_path):
    """It takes the step that has begun, keeps it, and says how to go on, without a traceback.

    In the first minute too, when nothing is kept yet.
    """
    done = run("vae", tmp_path, "--steps", 4, launcher=signalled("SIGINT"))
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert f"train.py: vae: stopped at step 3, kept in {tmp_path / 'vae.pt'}; " in done.stderr
    assert saved(tmp_path, "vae")["step"] == 3
    train("vae", tmp_path, "--steps", 4)
    assert saved(tmp_path, "vae")["step"] == 4


@pytest.mark.parametrize("stage", train_py.STAGES)
def test_two_processes_equal_one(stage, state, tmp_path):
    """With the same pictures a step in all, the loss has the same curve."""
    copy_before(stage, state, tmp_path)
    train(stage, tmp_path, "--steps", 4, launcher=TORCHRUN)
    ours, theirs = saved(tmp_path, stage)["losses"], saved(state, stage)["losses"]
    np.testing.assert_allclose(ours, theirs, rtol=0.01)


def test_a_batch_that_two_processes_cannot_share(state, tmp_path):
    copy_before("clip", state, tmp_path)
    done = run("clip", tmp_path, "--steps", 1, "--batch", 7, launcher=TORCHRUN)
    assert done.returncode and "give --batch a multiple of 2" in done.stderr


def test_a_bank_as_large_as_asked_for(state, things):
    """Even where that is more than its capacity; then new scenes take the place of the oldest."""
    kept, schedule = train_py.State(state), train_py.Schedule(bank=12)
    bank = train_py.Bank(things, train_py.CONFIGS["small"], schedule, kept, filled=4, capacity=8)
    assert len(bank.ids) == len(bank.latents) == 12
    before = bank.latents.clone()
    bank.renew(5, np.random.default_rng(1))
    assert len(bank.latents) == 12 and torch.equal(bank.latents[5:], before[5:])
    assert not torch.equal(bank.latents[:5], before[:5])


def test_too_little_is_said(tmp_path):
    done = run("clip", tmp_path, "--steps", 1)
    message = f"train.py: {tmp_path / 'vae.pt'} is missing: run the stage vae first"
    assert done.returncode == 2 and done.stderr.strip() == message


@pytest.mark.parametrize("options, said", [
    ("--rate nan", "--rate"), ("--minutes inf", "--minutes"), ("--steps -1", "--steps"),
    ("--seed -1", "--seed"), ("--threads -2", "--threads"), ("--device tpu", "no tpu device")])
def test_numbers_that_mean_nothing_are_refused(tmp_path, options, said):
    done = run("vae", tmp_path / "new", *options.split())
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "new").exists()


def test_a_state_that_cannot_be_used(tmp_path):
    (tmp_path / "vae.pt").write_text("no checkpoint")
    (tmp_path / "file").write_text("mine")
    for state, said in (tmp_path, "vae.pt is not whole"), (tmp_path / "file", "file"):
        done = run("vae", state, "--steps", 1, out=False)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "vae.pt").read_text() == "no checkpoint"


def test_a_loss_that_is_not_finite_is_said():
    training = SimpleNamespace(step=0, seconds=0.0, losses=[], device="cpu",
                               lower=lambda *_: math.nan)
    with pytest.raises(tiny_sd.UserError, match="vae: the loss is nan at step 0; lower --rate"):
        fitting.step("vae", training, lambda *_: (), 1e-3, train_py.Schedule(steps=4), 0.0, [])


def test_the_tokenizer_is_learnt_from_captions():
    """Words become a token each; idle pairs fill the vocabulary; parts come before wholes."""
    merges = train_py.train_tokenizer([["cat", "kitty"], ["hot dog"]])
    assert len(merges) == len({*merges}) == train_py.VOCABULARY - 514
    words = tiny_sd.Tokenizer(merges)
    for word in ("cat", "kitty", "dog", "background", "turquoise", "twemoji"):
        assert words.merge(word) == [f"{word}</w>"]
    known = {symbol + end for symbol in words.bytes.values() for end in ("", "</w>")}
    for one, other in merges:
        assert {one, other} <= known
        known.add(one + other)


def test_what_a_cpu_prefers_is_the_same():
    torch.manual_seed(0)
    torchs = tiny_sd.torch_operations()
    ours = dict(torchs)
    train_py.prefer_on_cpu(ours)
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    for causal in (False, True):
        one, other = (form["dot_product_attention"](q, k, v, causal) for form in (ours, torchs))
        np.testing.assert_allclose(one, other, atol=1e-5)
    x, weight, bias = torch.randn(2, 5, 3, 8), torch.randn(8), torch.randn(8)
    one, other = (form["group_norm"](x, 4, 1e-5, weight, bias) for form in (ours, torchs))
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert ours["group_norm"](x.bfloat16(), 4, 1e-5, weight, bias).dtype == torch.bfloat16


# ── Measuring ───────────────────────────────────────────────────────────────────────────────────

def test_many_pictures_at_once(state):
    """Each is what tiny_sd draws for its prompt, its seed and its negative prompt alone."""
    model = tiny_sd.load(state / "emoji", "torch")
    prompts, negatives, seeds = ["cat", "a dog on the left", "key"], ["", "red", ""], [3, 4, 3]
    pictures = measure.draw(model, prompts, seeds, negatives, steps=3)
    for i in range(3):
        *_, x = like_diffusers.generate(model, prompts[i], negatives[i], (seeds[i],), steps=3,
                                 guidance=4.0)
        alone = tiny_sd.decode(model, x)[0].astype(int)
        assert np.abs(pictures[i] - alone).max() <= 1


def test_the_judge_knows_the_drawings(state, things):
    """Of every drawing itself it says: the right thing, in the right style."""
    judge = measure.Judge(tiny_sd.load(state / "emoji", "torch"), things)
    ids, styles = np.nonzero(things.drawings >= 0)
    for colour in ((255, 255, 255), (50, 160, 70)):
        pictures = measure.on_colour(things.pictures[64][things.drawings[ids, styles]], colour)
        for space in (judge.latents, measure.signature):
            verdict = judge.verdict(space, pictures, ids, colour)
            assert verdict.top(1) == 1 and (verdict.styles == styles).all()


@pytest.mark.parametrize("colour, lab", [
    ((255, 255, 255), (100, 0, 0)), ((255, 0, 0), (53.24, 80.09, 67.20)),
    ((0, 0, 255), (32.30, 79.19, -107.86))])
def test_lab(colour, lab):
    """CIE's values of white, red and blue under D65."""
    assert measure.to_lab(colour) == pytest.approx(lab, abs=0.1)


def test_spread():
    """One picture a thing spreads by 0, any picture for any thing by 1."""
    rng = np.random.default_rng(0)
    one = np.repeat(rng.random((20, 32, 32, 3)), 4, axis=0)
    assert measure.spread(one, 4) == 0
    assert measure.spread(rng.random((80, 32, 32, 3)), 4) == pytest.approx(1, abs=0.02)


def test_the_most_variety_is_that_of_the_drawings():
    """Things with one drawing have none; with more, as many come as that many seeds can show."""
    things = scenes.load_things(DATA, 64)
    first = [np.flatnonzero(row >= 0)[0] for row in things.drawings]
    alone = np.full_like(things.drawings, -1)
    alone[np.arange(len(first)), first] = things.drawings[np.arange(len(first)), first]
    spread, found = measure.most_variety(things._replace(drawings=alone), range(10)).values()
    assert spread == 0 and found == 1
    spread, found = measure.most_variety(things, range(10), seeds=100).values()
    styles = [len(scenes.styles_to_train(things, i)) for i in range(10)]
    assert spread > 0.1 and found == np.mean(styles)


def test_an_ideal_denoiser_draws_what_training_shows(state, things):
    """Of a thing any of its drawings, of a style any thing's in it, and never one held out."""
    judge = measure.IdealJudge(tiny_sd.load(state / "emoji", "torch"), things, steps=8)
    blob = scenes.STYLES.index("blob")
    shown = [[row[s] for s in scenes.styles_to_train(things, i)]
             for i, row in enumerate(things.drawings)]
    meant = {things.names[i][0]: shown[i] for i in range(3)}
    meant["in the blob style"] = {row[blob] for row in things.drawings} & {*sum(shown, [])}
    prompts = [prompt for prompt in meant for _ in range(8)]
    pictures = judge.draw(prompts, [*range(8)] * len(meant)).astype(int)
    originals = tiny_sd.decode(judge.model, judge.z.reshape(len(judge.z), 16, 16, 4)).astype(int)
    errors = np.abs(pictures[:, None] - originals).max((2, 3, 4))
    assert errors.min(1).max() <= 2
    for prompt, drawn in zip(meant, errors.argmin(1).reshape(-1, 8)):
        assert {*drawn} <= {*meant[prompt]} and len({*drawn}) > 1


def test_evaluate(state):
    said = train("evaluate", state, "--limit", 3).stdout
    table = json.loads((state / "emoji.json").read_text())
    assert table["things"] == 3 and all(name in said for name in table)
    rates = [value for name, value in table.items() if "right" in name and value == value]
    assert len(rates) > 10 and all(0 <= value <= 1 for value in rates)
