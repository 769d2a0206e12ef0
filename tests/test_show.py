"""show.py: watching changes nothing, what it records is correct, and so is the page that it writes.
"""

import html
import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from conftest import ROOT
from extras import explain, formats, like_diffusers, prompts, shapes, show
from helpers import CONFIG, TOKENIZER, finish, launch, random_arrays, sd, shapes_of, write_model

NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
PRIMITIVES = {name: value for name, value in vars(sd).items() if hasattr(value, "formula")}
PREDICT = sd.predict


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(params=["epsilon", "v_prediction", "sample"])
def kind(request, monkeypatch):
    monkeypatch.setitem(CONFIG["scheduler"], "prediction_type", request.param)


@pytest.fixture(params=["numpy", "torch"])
def model(request, tmp_path):
    pytest.importorskip(request.param)
    return formats.load(write_model(tmp_path / "tiny"), request.param)


def nothing_is_watched():
    """Are all primitives, and the denoiser, the same as when this file was imported?"""
    same = all(getattr(sd, name) is value for name, value in PRIMITIVES.items())
    return len(PRIMITIVES) >= 10 and same and sd.predict is PREDICT


def filmed(model, *args, **settings):
    film = show.Film()
    *_, x = like_diffusers.generate(model, *args, **settings, make_denoiser=film)
    return film.steps, x


# ── What is heard ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", [{}, {"guidance": 1}, {"sampler": "euler_a"},
                                      {"width": 10, "height": 18}])
def test_watching_changes_nothing(kind, model, settings):
    settings = {"seeds": (0, 7), "steps": 3, "sampler": "ddim", **settings}
    *_, plain = like_diffusers.generate(model, "red apple", "app", **settings)
    steps, x = filmed(model, "red apple", "app", **settings)
    assert np.array_equal(x, plain) and len(steps) == 3
    assert nothing_is_watched()


def test_guesses_and_the_push_of_guidance(kind, model):
    """Against denoisers of each half alone."""
    context = sd.embed_prompts(model, ["app", "red apple"])[0]
    uncond, cond = (sd.denoiser(model, context[i:i + 1], 1) for i in range(2))
    for step in filmed(model, "red apple", "app", seeds=(0, 7), steps=3)[0]:
        halves = [denoise(step.x, step.t, step.alpha_bar) for denoise in (uncond, cond)]
        x_0, eps = (sd.guide(*parts, 7.5) for parts in zip(*halves))
        np.testing.assert_allclose(step.x, sd.add_noise(x_0, step.alpha_bar, eps), atol=1e-4)
        np.testing.assert_allclose(step.x_0, x_0, atol=1e-4 / math.sqrt(step.alpha_bar))
        np.testing.assert_allclose(step.push, halves[1][1] - halves[0][1], atol=1e-4)


def test_attention_is_the_prompts(model):
    """Shares that sum to 1, equal to those of the prompt alone, for each picture of a batch."""
    guided = filmed(model, "red apple", "app", seeds=(0, 7), steps=1)[0][0].attention
    shapes = {size: m.shape for size, m in guided.items()}
    assert shapes == {(8, 8): (2, 12, 8, 8), (4, 4): (2, 12, 4, 4)}
    for k, seed in enumerate((0, 7)):
        alone = filmed(model, "red apple", seeds=(seed,), steps=1, guidance=1)[0][0].attention
        for size, m in guided.items():
            np.testing.assert_allclose(m.sum(1), 1, atol=1e-5)
            np.testing.assert_allclose(m[k], alone[size][0], atol=1e-5)
    other = filmed(model, "red", seeds=(0,), steps=1, guidance=1)[0][0].attention
    assert abs(guided[8, 8][0] - other[8, 8][0]).max() > 1e-3


def test_layers_of_one_resolution_are_averaged():
    """Of pictures of 5 x 3, and half of that, rounded up; each pixel's place is kept."""
    rng = np.random.default_rng(0)
    one, other, half = (rng.random((2, n, 4)) for n in (15, 15, 6))
    found = show.attention_maps([one, half, other], 5, 3)
    assert {size: m.shape for size, m in found.items()} == {
        (5, 3): (2, 4, 5, 3), (3, 2): (2, 4, 3, 2)}
    np.testing.assert_allclose(found[5, 3][1, 2, 4, 0], (one[1, 12, 2] + other[1, 12, 2]) / 2)
    np.testing.assert_allclose(found[3, 2][0, 3, 1, 1], half[0, 3, 3])


def test_probabilities():
    """Times the values they are attention, by torch."""
    import torch
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, n, 8)).astype(np.float32) for n in (50, 7, 7))
    expected = torch.nn.functional.scaled_dot_product_attention(*map(torch.from_numpy, (q, k, v)))
    np.testing.assert_allclose(show.probabilities(q, k) @ v, expected, atol=1e-5)


def test_watchers_leave_when_something_fails():
    with pytest.raises(ZeroDivisionError), show.watching(linear=print, conv2d=print):
        assert sd.linear is not PRIMITIVES["linear"]
        raise ZeroDivisionError
    assert nothing_is_watched()


def test_sigma_of_nothing_but_noise():
    """As in like_diffusers.sampling_steps, if the first level of a model is ᾱ = 0."""
    assert show.sigma(SimpleNamespace(alpha_bar=0.0)) == pytest.approx(4096)
    assert show.sigma(SimpleNamespace(alpha_bar=0.5)) == 1


def test_positions_of_words():
    """Of the start, of each word that fits, and of the rest: every position once."""
    tokenizer = sd.Tokenizer([("a", "p")], length=8)

    def positions(prompt):
        chunks = prompts.chunks_of(tokenizer, prompt, weighted=False)
        found = show.positions_of_words(tokenizer, chunks, tokenizer.length)
        return [(word, positions.tolist()) for word, positions in found]

    assert positions("red Ap") == [("(start)", [0]), ("red", [1, 2, 3]), ("ap", [4, 5]),
                                   ("(end and padding)", [6, 7])]
    assert positions("red <|endoftext|> apple pie")[1:] == [
        ("red", [1, 2, 3]), ("<|endoftext|>", [4]), ("app", [5, 6]), ("(end and padding)", [7])]


# ── The page ──────────────────────────────────────────────────────────────────────────────────────

class Parsed(html.parser.HTMLParser):
    """The pictures and tags of a page; fails if tags do not nest."""

    ATTRIBUTES = {"svg": {"viewbox", "class"}, "path": {"d", "stroke"},
                  "polyline": {"points", "fill", "stroke", "stroke-width"},
                  "text": {"x", "y", "text-anchor"}}

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.tags = [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "img", "th", "td", "tr"):        # the last three may be left open
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        assert attributes.keys() <= self.ATTRIBUTES.get(tag, {
            "lang", "charset", "name", "content", "class", "src", "alt"})
        if tag == "img":
            assert "alt" in attributes
            self.images.append(attributes["src"])

    def handle_endtag(self, tag):
        if tag != "tr":
            assert self.open.pop() == tag


@pytest.fixture
def run(tiny, tmp_path, monkeypatch, command):
    """run(argument, ...) -> (status, lines on stdout, this program's lines on stderr)"""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        status, out, err = command("-m", tiny, "--steps", "2", "--sampler", "ddim", *argv)
        return status, out, [line for line in err if line.startswith("tiny_sd: ")]
    return run


@pytest.mark.parametrize("flags, pictures, steps, guided", [
    ("", 1, 2, True), ("-b 2", 2, 2, True), ("--cfg-scale 1", 1, 2, False),
    ("-i in.png --backend torch", 1, 1, True), ("-W 10 -H 18 --steps 4", 1, 4, True),
    ("--cfg-interval 0.5:1 --steps 4", 1, 4, True)])
def test_the_page(run, flags, pictures, steps, guided):
    """Of every picture.

    The result, the film whole and step by step, a map of each word over all, at two resolutions and
    in up to three parts of the way, guidance as a curve and at each step, and four channels.
    """
    if "torch" in flags:
        pytest.importorskip("torch")
    Image.new("RGB", (9, 9), "red").save("in.png")
    status, out, err = run('<red> & "apple"', "--show", "seen", *flags.split())
    assert status == 0 and err == [] and Path(out[-1]) == Path("seen/index.html").resolve()
    text = Path("seen/index.html").read_text(encoding="utf-8")
    page, words = Parsed(text), len(["(start)", "<", "red", ">", "&", '"', "apple", '"', "(rest)"])
    assert "script" not in page.tags and "://" not in text
    assert "&lt;red&gt; &amp; &quot;apple&quot;" in text
    assert sorted(page.images) == sorted(path.name for path in Path("seen").glob("*.png"))
    assert len(page.images) == pictures * (
        1 + 1 + 2 * steps + words * (3 + min(3, steps)) + steps * guided + 4)
    assert text.count("<svg") == pictures * guided
    for name in page.images:
        Image.open(f"seen/{name}").load()
    assert all(path.name[0] != "." for path in Path().iterdir())


def test_the_film_shows_each_step(run):
    assert run("apple", "--show", "seen", "--steps", "3")[0] == 0
    film = Image.open("seen/film.png")
    assert film.n_frames == 4
    pairs = [(f"film-{i:03d}-x", f"film-{i:03d}-x0") for i in range(1, 4)]
    for i, pair in enumerate([*pairs, ("picture", "picture")]):
        film.seek(i)
        both = np.asarray(film.convert("RGB"))
        for half, name in zip((both[:, :128], both[:, -128:]), pair):
            frame = Image.open(f"seen/{name}.png").resize((128, 128), Image.Resampling.NEAREST)
            assert np.array_equal(half, np.asarray(frame))


def test_the_picture_is_the_same_as_without(run):
    assert run("apple", "-o", "plain.png")[0] == 0
    assert run("apple", "-o", "shown.png", "--show", "seen")[0] == 0
    plain, *shown = (np.asarray(Image.open(path))
                     for path in ("plain.png", "shown.png", "seen/picture.png"))
    assert all(np.array_equal(plain, other) for other in shown)


@pytest.mark.parametrize("name", ["full", "file", "file/new", "none/new", ".", "a" * 300])
def test_a_folder_that_cannot_be_made(run, name):
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("file").write_text("mine")
    before = sorted(Path().rglob("*"))
    status, out, err = run("apple", "--show", name)
    assert status == 2 and out == [] and len(err) == 1 and sorted(Path().rglob("*")) == before


def test_an_empty_folder_is_filled(run):
    Path("empty").mkdir()
    assert run("apple", "--show", "empty")[0] == 0 and Path("empty/index.html").exists()


@pytest.mark.parametrize("folder", [".", "link", "mount"])
def test_empty_folders_on_which_nothing_can_be_put(run, tmp_path, monkeypatch, folder):
    """The current folder, a link to one, and a mount point: the pages go into them."""
    place = tmp_path / "place"
    place.mkdir()
    if folder == ".":
        monkeypatch.chdir(place)
    elif folder == "link":
        Path("link").symlink_to("place")
    else:
        place = tmp_path / "mount"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
            pytest.skip("to mount a file system needs the administrator's rights")
    try:
        status, out, err = run("apple", "--show", folder, "-o", str(tmp_path / "out.png"))
        assert (status, err) == (0, []) and Path(out[-1]).samefile(place / "index.html")
        images = Parsed((place / "index.html").read_text(encoding="utf-8")).images
        assert sorted([*images, "index.html"]) == sorted(path.name for path in place.iterdir())
    finally:
        if folder == "mount":
            subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("flags", ["--show sub -o sub/out.png", "--show sub --preview sub/p.png",
                                   "--show out.png -o out.png", "--show . -o out.png",
                                   "--show sub -o sub/deep/out.png", "--show link -o sub/out.png"])
def test_a_page_needs_a_folder_of_its_own(run, flags):
    """Said before anything is drawn."""
    Path("sub/deep").mkdir(parents=True)
    Path("link").symlink_to("sub")
    before = sorted(Path().rglob("*"))
    status, out, err = run("apple", *flags.split())
    assert (status, out) == (2, []) and len(err) == 1 and "a separate folder" in err[0]
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_filled_in_the_meantime(run, monkeypatch, exists):
    """Other programs' files there stay, and the page is not lost."""
    if exists:
        Path("seen").mkdir()
    section = show.latents_section

    def disturb(*args):
        Path("seen").mkdir(exist_ok=True)
        Path("seen/mine.txt").write_text("mine")
        section(*args)
    monkeypatch.setattr(show, "latents_section", disturb)
    status, out, err = run("apple", "--show", "seen")
    assert (status, err) == (0, []) and Path("seen/mine.txt").read_text() == "mine"
    assert Path(out[-1]).parent.resolve() == Path("seen/page" if exists else "seen-1").resolve()
    assert len(list(Path(out[-1]).parent.iterdir())) > 10


def test_a_folder_that_is_taken_at_the_last_moment(run, monkeypatch):
    """By another page, after it was seen to be free."""
    rename = Path.rename

    def too_late(path, target):
        if not Path("seen").exists():
            Path("seen").mkdir()
            Path("seen/mine.txt").write_text("mine")
        return rename(path, target)
    monkeypatch.setattr(Path, "rename", too_late)
    status, out, err = run("apple", "--show", "seen")
    assert (status, err) == (0, []) and Path("seen/mine.txt").read_text() == "mine"
    assert Path(out[-1]).parent.resolve() == Path("seen-1").resolve()


def test_a_unet_without_attention(run, tmp_path):
    """It also has a page, but without the words."""
    plain = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
             "mid_block_type": None}
    config = CONFIG["unet"] | plain
    folder = write_model(tmp_path / "plain")
    (folder / "unet/config.json").write_text(json.dumps(config))
    save_file(random_arrays(shapes_of("unet", config)),
              folder / "unet/diffusion_pytorch_model.safetensors")
    status, out, err = run("apple", "-m", str(folder), "--show", "seen")
    assert (status, err) == (0, []) and "listens" not in Path(out[-1]).read_text(encoding="utf-8")
    assert run("apple", "-m", str(folder), "--explain")[0] == 0


def test_a_large_file_is_not_read_to_see_that_it_is_no_preview(run):
    with open("large.png", "wb") as file:
        file.truncate(200_000_000_000)
    status, out, err = run("apple", "--preview", "large.png")
    assert (status, out) == (2, []) and "not a preview" in err[0]


@pytest.mark.parametrize("error, status", [(OSError(28, "No space left on device"), 2),
                                           (KeyboardInterrupt(), 130)])
def test_a_page_half_written_is_taken_away(run, monkeypatch, error, status):
    def fail(*args):
        raise error
    monkeypatch.setattr(show, "latents_section", fail)
    result, out, err = run("apple", "--show", "seen")
    assert (result, out, len(err)) == (status, ["out.png"], 1)
    assert [path.name for path in Path().iterdir()] == ["out.png"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_the_page_in_a_browser(run):
    """Each picture has pixels on the screen, in one column or in many, and nothing is asked for
    from elsewhere. The question is put by a script in a copy of the page.
    """
    assert run("red apple", "--show", "seen")[0] == 0
    text = Path("seen/index.html").read_text(encoding="utf-8")
    question = """<script>addEventListener("load", () => { document.title = JSON.stringify({
        images: [...document.images].map(
            i => [i.getAttribute("src"), i.complete && i.naturalWidth, i.width]),
        width: document.documentElement.scrollWidth, window: innerWidth,
        asked: performance.getEntriesByType("resource").map(e => e.name)})})</script>"""
    asked = Path("seen/asked.html")
    asked.write_text(text.replace("</body>", question + "</body>"), encoding="utf-8")
    for width in (1280, 500):
        done = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             f"--user-data-dir={Path('profile').resolve()}", f"--window-size={width},900",
             "--dump-dom", asked.resolve().as_uri()], capture_output=True, text=True, timeout=120)
        answer = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout, re.S)[1]))
        assert [name for name, _, _ in answer["images"]] == Parsed(text).images
        assert all(natural > 0 and shown > 0 for _, natural, shown in answer["images"])
        assert answer["width"] <= answer["window"]      # what is wider scrolls by itself
        assert all(name.startswith("file:") for name in answer["asked"])


# ── The prompt and the parts ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("word", ["emoji", "internationalization", "aaaaaaa", "é🍎", "x"])
def test_merges_step_by_step(word):
    """One pair at a time, the earliest learnt first, from single bytes to the word's final symbols.
    """
    clip = formats.clip_tokenizer()
    steps = list(explain.merging(clip, word))
    assert len(steps[0]) == len(word.encode()) and steps[-1] == clip.merge(word)
    ranks = []
    for before, after in zip(steps, steps[1:]):
        assert "".join(before) == "".join(after)
        new = next(s for s in after if after.count(s) > before.count(s))
        ranks.append(min(rank for pair, rank in clip.rank.items()
                         if "".join(pair) == new and {*pair} <= {*before}))
    assert ranks == sorted(ranks)


def test_explain(run):
    status, out, err = run("Red apple " * 6, "--explain")
    text = "\n".join(out)
    assert status == 0 and not list(Path().glob("*.png"))
    assert ("  red: bytes 72 65 64\n      r e d</w>\n    → re d</w>\n    → red</w>\n      513\n"
            "  apple: ") in text
    assert "Cut off, because it does not fit: red apple\n" in text and "nothing" not in text.lower()
    ids = TOKENIZER.encode("red apple " * 6)[0]
    assert " ".join(map(str, ids)) + "\n" in text
    numbers = {line.split(",")[0]: line for line in out if ", all of it" in line}
    for part, network in (("text_encoder", "text_encoder"), ("unet", "unet"), ("vae", "vae")):
        total = sum(math.prod(shape) for shape in sd.flatten(
            shapes.SHAPES[network](sd.read_config(network, CONFIG[network]))).values())
        assert f" {total:,} " in numbers[part]


def test_the_padding_is_a_special_token_too():
    tokenizer = sd.Tokenizer([], pad="!")
    assert f"  !: a special token\n      !\n      {tokenizer.vocab['!']}\n" in explain.tokens_text(
        tokenizer, "a!b")


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("size", [(16, 16), (10, 18)])
def test_operations_are_counted_as_torch_counts_them(tiny, backend, size):
    """By torch.utils.flop_counter, which listens to torch's own kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    (width, height), model = size, formats.load(tiny, "torch")
    x = np.zeros((1, height // 2, width // 2, 4), np.float32)
    ours = {}
    for name, row in explain.sizes(formats.load(tiny, backend), "red apple", width, height).items():
        ours[name.split()[0]] = ours.get(name.split()[0], 0) + row.flops
    context = sd.embed_prompts(model, ["red apple"])[0]
    works = {"text_encoder": lambda: sd.embed_prompts(model, ["red apple"])[0],
             "unet": lambda: sd.denoiser(model, context, 1)(x, 500, 0.5),
             "vae": lambda: (sd.encode(model, np.zeros((height, width, 3), np.uint8), x),
                             sd.decode(model, x))}
    for name, work in works.items():        # with attention as plain products
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        assert ours[name] == counter.get_total_flops() > 0


def test_letters_that_the_terminal_has_not(tiny):
    """A token of two bytes of an apple is no letter of any code page of Windows."""
    done = subprocess.run(
        [sys.executable, ROOT / "tiny_sd.py", "🍎 æ", "-m", tiny, "--explain"], capture_output=True,
        text=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, encoding="cp1252")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "\\" in done.stdout and "æ" in done.stdout


def test_nothing_that_controls_a_terminal_is_printed(run):
    status, out, err = run("red \x1b[31m\x07\x9b apple " * 6, "--explain")
    text = "\n".join(out + err)
    assert status == 0 and all(c.isprintable() or c == "\n" for c in text)


def test_explain_or_show(run):
    status, out, err = run("apple", "--explain", "--show", "seen")
    assert status == 2 and out == [] and "--explain" in err[0]


@pytest.mark.slow
def test_as_a_program(tiny, tmp_path, monkeypatch):
    """Which imports itself as a library, once."""
    monkeypatch.chdir(tmp_path)
    for flags in (["--show", "seen"], ["--explain"]):
        status, _, err = finish(launch("red apple", "-m", tiny, "--steps", "2", *flags))
        assert status == 0, err
    status, _, err = finish(launch("red apple", "-m", tiny, "--show", "seen"))
    assert status == 2 and re.fullmatch("tiny_sd: --show seen .*\n", err), err
