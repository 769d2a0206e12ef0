"""NOTES.md and extras/REFERENCE.md beside the program: names, equations, links, and the numbers.

A code span that holds nothing but a name, dotted or called (`unet`, `Tokenizer.merge`,
`resnet(x, **weights)`), must be a name in tiny_sd.py or, in §12, in extras/fast.py. With another
file's name before it, as in `formats.fetch`, it must be a name in that file.
"""

import ast
import contextlib
import functools
import importlib
import io
import math
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

import tiny_sd as sd
from extras import fast, formats, like_diffusers, samplers
from helpers import scheduler, shapes_of

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {path.stem for path in (ROOT / "extras").glob("*.py")}
PATHS = {"NOTES": "NOTES.md", "REFERENCE": "extras/REFERENCE.md"}
TEXTS = {name: (ROOT / path).read_text(encoding="utf-8") for name, path in PATHS.items()}
PROSE = {name: re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
         for name, text in TEXTS.items()}
WORDS = {name: re.sub(r"\$`[^`]*`\$", "", text) for name, text in PROSE.items()}

PROGRAM = (ROOT / "tiny_sd.py").read_text(encoding="utf-8")
NOTES, BOTH = TEXTS["NOTES"], "\n".join(TEXTS.values())
BLOCKS = re.findall(r"^```math\n(.*?)^```$", BOTH, re.M | re.S)
RULERS = re.findall(r"^# ── (\d+)\. (.+?) ─+ NOTES §(\d+) ──$", PROGRAM, re.M)
ALPHA_BAR = sd.scaled_linear_schedule()


@functools.cache
def defined_in(source):
    """Return the functions and classes at the top level of some Python."""
    return [node.name for node in ast.parse(source).body if hasattr(node, "name")]


def section(n):
    """Return the text of §n, without its mathematics."""
    return re.search(rf"^## §{n} .*?(?=^## )", "\n".join(WORDS.values()), re.M | re.S)[0]


def lesson_names():
    """Return the functions and classes of each section of the lesson, in the program's order."""
    lesson = PROGRAM[:PROGRAM.index("The lesson ends here")].rpartition("\n\n")[0]
    return [defined_in(part) for part in re.split(r"^# ── \d+\. .*$", lesson, flags=re.M)[1:]]


def names_in(words):
    return {m[1] for span in re.findall(r"`([^`\n]+)`", words)
            if (m := re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)*)(?:\(.*\))?", span))}


# ── The files agree ─────────────────────────────────────────────────────────────────────────────


def test_sections():
    """The lesson's rulers are the notes' headings §1 to §8; the reference continues to §12."""
    headings = {name: re.findall(r"^## §(\d+) (.+)$", text, re.M) for name, text in TEXTS.items()}
    assert headings["NOTES"] == [(n, title) for n, title, _ in RULERS]
    assert [n for n, _, _ in RULERS] == [cited for _, _, cited in RULERS] == list("12345678")
    assert [n for n, _ in headings["REFERENCE"]] == ["9", "10", "11", "12"]
    for path in [ROOT / "tiny_sd.py", *(ROOT / "extras").rglob("*.py")]:
        source = path.read_text(encoding="utf-8")
        assert set(re.findall(r"REFERENCE §(\d+)", source)) <= {"9", "10", "11", "12"}, path
        assert set(re.findall(r"(?<!REFERENCE )§(\d+)", source)) <= set("12345678"), path
    assert set(re.findall(r"§(\d+)", BOTH)) <= {str(n) for n in range(1, 13)}


@pytest.mark.parametrize("module, name", [
    (module, name) for module, words in
    ((sd, "\n".join(WORDS.values()).replace(section(12), "")), (fast, section(12)))
    for name in sorted(names_in(words))])
def test_names_exist(module, name):
    first, _, rest = name.partition(".")
    if first in EXTRAS:
        module, name = importlib.import_module(f"extras.{first}"), rest
    functools.reduce(getattr, name.removeprefix("tiny_sd.").split("."),
                     sd if first == "tiny_sd" else module)


def test_every_function_is_named():
    """The sections of the lesson leave none of its functions and classes out."""
    parts = [sorted(set(names) - {name.split(".")[0] for name in names_in(section(n))})
             for n, names in enumerate(lesson_names(), start=1)]
    assert parts == [[]] * len(RULERS)


def numbers_of(text):
    return [tuple(map(int, found)) for found in re.findall(r"\\tag\{(\d+)\.(\d+)\}", text)]


def test_equations():
    """One number a block; each section's are 1, 2, 3, ...; none is referred to that is not there.

    In Part I, and in the reference, they rise; Part II has those that are missing between them.
    """
    assert all(len(numbers_of(block)) == 1 for block in BLOCKS)
    numbers = sorted(numbers_of(BOTH))
    for n in range(1, 13):
        found = [k for m, k in numbers if m == n]
        assert found == list(range(1, len(found) + 1)) != []
    first, _ = NOTES.split("\n## Part II")
    for text in (first, TEXTS["REFERENCE"]):
        assert numbers_of(text) == sorted(numbers_of(text))

    known = {f"{m}.{k}" for m, k in numbers}
    assert set(re.findall(r"\((?:the form )?(\d\d?\.\d+)\)", "\n".join(WORDS.values()))) <= known
    for path in [ROOT / "tiny_sd.py", *(ROOT / "extras").rglob("*.py")]:
        cited = re.findall(r"\(([1-9]\d?\.\d\d?)\)", path.read_text(encoding="utf-8"))
        assert set(cited) <= known, path.name


def test_part_one_needs_nothing_of_part_two():
    """It names equations of Part II only in brackets or beside the words Part II."""
    first, second = NOTES.split("\n## Part II")
    later = {f"({m}.{k})" for m, k in numbers_of(second)}
    for paragraph in re.split(r"\n\n", re.sub(r"^```.*?^```$", "", first, flags=re.M | re.S)):
        if any(number in paragraph for number in later) and not paragraph.startswith("|"):
            assert "Part II" in paragraph, paragraph


def test_every_equation_names_a_test():
    """Each number is in the table of tests once, and each test in the file named there."""
    table = TEXTS["REFERENCE"].split("## Where each equation is checked")[1].split("\n## ")[0]
    named = re.findall(r"^\| (.+) \| \[(test_\w+)\]\(\.\./(\S+)\) \|$", table, re.M)
    numbers = [n for numbers, _, _ in named for n in re.findall(r"\((\d+)\.(\d+)\)", numbers)]
    assert [tuple(map(int, n)) for n in numbers] == sorted(numbers_of(BOTH))
    for _, test, path in named:
        assert test in defined_in((ROOT / path).read_text(encoding="utf-8")), test


@pytest.mark.parametrize("name", PATHS)
def test_mathematics_as_github_reads_it(name):
    """Inline mathematics is $`...`$, after a space and before no letter.

    And no formula has a macro that GitHub refuses.
    """
    assert TEXTS[name].count("```") % 2 == 0 and "$" not in WORDS[name]
    for before, formula, behind in re.findall(r"(^|.)\$`([^`]*)`\$(.|$)", PROSE[name], re.M):
        assert before in " (" and not re.match(r"[\w$`-]", behind), formula
        assert "\n" not in formula and formula.count("{") == formula.count("}")
    refused = r"\\(operatorname|require|newcommand|def|unicode|href|class|style|label|ref)\b|[<>$]"
    for formula in BLOCKS + re.findall(r"\$`([^`]*)`\$", PROSE[name]):
        assert not re.search(refused, formula), formula


@pytest.mark.parametrize("name", PATHS)
def test_lines_are_short(name):
    """Prose and code blocks have at most 120 columns; tables and formulas are free."""
    text = re.sub(r"^```math\n.*?^```$", "", TEXTS[name], flags=re.M | re.S)
    assert [line for line in text.split("\n") if len(line) > 120 and line[0] != "|"] == []


def anchors_of(text):
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("name", PATHS)
def test_contents(name):
    """The table of contents leads to every section, in order."""
    linked = re.findall(r"\]\(#([^)]+)\)", TEXTS[name].split("\n## §")[0])
    sections = anchors_of("\n".join(re.findall(r"^## .*$", TEXTS[name], re.M)))
    assert [anchor for anchor in linked if anchor in sections] == [
        anchor for anchor in sections if anchor != "how-to-read-this"]


@pytest.mark.parametrize("file", ["README.md", *PATHS.values()])
def test_links(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    plain = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.M | re.S)
    targets = re.findall(r"\]\(([^()\s]+)\)", plain)
    targets += re.findall(r"(?:src|href)=\"([^\"]+)\"", plain)
    for target in targets:
        path, _, anchor = unquote(target).partition("#")
        if not re.match(r"[a-z]+:", target):
            target = (ROOT / file).parent / path if path else ROOT / file
            assert target.exists(), f"{file} points to {path}"
            assert not anchor or anchor in anchors_of(target.read_text(encoding="utf-8")), anchor


def test_the_code_in_the_notes_prints_what_stands_below_it():
    """The world with two pictures, at the beginning of §6."""
    pairs = re.findall(r"^```python\n(.*?)^```$(?:(?!^```).)*?^```text\n(.*?)^```$", NOTES,
                       re.M | re.S)
    assert len(pairs) == BOTH.count("\n```python\n") == 1
    for code, output in pairs:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, "NOTES.md", "exec"), {})
        assert said.getvalue() == output


# ── What the notes state in numbers ─────────────────────────────────────────────────────────────


def denoise_two(x, t, alpha_bar, spread=0.2):
    """Return E[x_0 | x_t] for pictures of one number, normal around +1 or -1."""
    signal, variance = math.sqrt(alpha_bar), alpha_bar * spread ** 2 + 1 - alpha_bar
    pull = spread ** 2 * signal / variance
    x_0 = pull * x + (1 - pull * signal) * np.tanh(signal * x / variance)
    return x_0, (x - signal * x_0) / math.sqrt(1 - alpha_bar)


def denoise_crooked(x, t, alpha_bar):
    x_0 = np.tanh(3 * x) + np.sin(t)
    return x_0, (x - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)


def rows(words):
    """Return the cells of the table that follows some words of the notes, but its ruler."""
    start = re.search(r"\s+".join(map(re.escape, words.split())), NOTES).start()
    table = NOTES[start:].split("\n|", 1)[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]
    return lines[:1] + lines[2:]


def number(cell):
    return float(cell.replace("−", "-"))


def test_gelu():
    """(1.7), (1.8)"""
    x = np.linspace(-9, 9, 9001)
    exact = x * np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    y = x[x > 1e-3]
    error_of_erf = 2 * sd.gelu.formula(y) / y - 2 * exact[x > 1e-3] / y
    assert abs(error_of_erf).max() < 1.5e-7
    assert 0.0203 < abs(sd.quick_gelu(x) - exact).max() < 0.0204


def test_attention_by_hand():
    """The table under (1.10), by dot_product_attention."""
    def numbers(cell):
        return [float(n) for n in re.findall(r"[\d.]+", cell)]
    table = np.array([sum(map(numbers, cells), []) for cells in rows("is divided by $`")[1:]])
    q, scores, weights, means = np.split(table, [4, 7, 10], axis=1)
    k, v = 2 * np.eye(4)[:3], np.array([[1, 0], [0, 1], [1, 1.0]])
    np.testing.assert_array_equal(scores, q @ k.T / 2)
    np.testing.assert_allclose(weights, sd.softmax(scores), atol=0.0005)
    found = sd.dot_product_attention(*(x[None, None] for x in (q, k, v)))
    np.testing.assert_allclose(means, found[0, 0], atol=0.0005)
    given = ("the keys are (2, 0, 0, 0), (0, 2, 0, 0), (0, 0, 2, 0), "
             "their values (1, 0), (0, 1), (1, 1)")
    assert given in " ".join(NOTES.split())


def test_tokens_of_the_example():
    """(2.2)"""
    clip = formats.clip_tokenizer()
    merges = [("m", "o"), ("j", "i</w>"), ("e", "mo"), ("emo", "ji</w>")]
    assert [clip.rank[pair] for pair in merges] == [105, 2185, 3226, 15815]
    assert clip.tokens("emoji") == [512 + 15815] == [16327]
    assert len(clip.vocab) == 49408
    assert (clip.vocab[clip.BOS], clip.vocab[clip.EOS]) == (49406, 49407)
    assert [len(clip.bytes[b]) for b in range(256)] == [1] * 256
    assert [len(text.encode()) for text in "é🍎"] == [2, 4]
    assert sum(ord(symbol) != byte for byte, symbol in clip.bytes.items()) == 68


@pytest.mark.parametrize("mean, logvar", [(0.3, -1.0), (2.0, 0.5), (-1.0, -4.0)])
def test_divergence_from_the_standard_normal(mean, logvar, monkeypatch):
    """(4.5), against the integral; and vae_loss adds this KL times its weight."""
    torch = pytest.importorskip("torch")
    std = math.exp(logvar / 2)
    z = mean + std * np.linspace(-12, 12, 100001)
    log_q = -(z - mean) ** 2 / (2 * std ** 2) - math.log(std)
    q = np.exp(log_q)
    divergence = (q * (log_q + z ** 2 / 2)).sum() / q.sum()
    assert divergence == pytest.approx((mean ** 2 + math.exp(logvar) - 1 - logvar) / 2)

    x = torch.full((1, 1, 1, 4), mean, dtype=torch.float64)
    monkeypatch.setattr(sd, "vae_encode", lambda *_: (x, torch.full_like(x, logvar)))
    monkeypatch.setattr(sd, "vae_decode", lambda z, *_: z)
    with_kl, without = (sd.vae_loss(x, torch.ones_like(x), {}, 1, kl_weight=w) for w in (1, 0))
    assert (with_kl - without).item() == pytest.approx(divergence)
    assert without.item() == pytest.approx(std)         # the absolute error of mean + std


@pytest.mark.parametrize("padding, shift", [((0, 1), 7), ((1, 1), 0)])
def test_where_three_halvings_look(padding, shift):
    """(4.2): a kernel that copies the centre of its window tells which row it saw."""
    kernel = np.zeros((1, 3, 3, 1))
    kernel[0, 1, 1, 0] = 1
    x = np.tile(np.arange(64.0)[None, :, None, None], (1, 1, 64, 1))
    for _ in range(3):
        x = sd.conv2d(x, kernel, stride=2, padding=padding)
    assert x[0, :, 3, 0].tolist() == [8 * i + shift for i in range(8)]


def test_timestep_embedding_knows_distances():
    """(5.1)"""
    e = sd.timestep_embedding(np.array([10.0, 47, 500, 537]), 320)
    frequencies = 10000.0 ** (-np.arange(160) / 160)
    assert e[0] == pytest.approx(np.r_[np.cos(10 * frequencies), np.sin(10 * frequencies)])
    assert e[0] @ e[1] == pytest.approx(e[2] @ e[3])
    assert e[0] @ e[1] == pytest.approx(np.cos(frequencies * 37).sum())


SD1 = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
       "cross_attention_dim": 768, "in_channels": 4, "out_channels": 4,
       "down_block_types": ["CrossAttn"] * 3 + [""], "up_block_types": [""] + ["CrossAttn"] * 3}


def test_the_drawing_of_the_unet():
    """Channels of each level and of its skips, blocks and transformers, against all weights."""
    drawing = re.search(r"^```text\n x_t .*?^```$", NOTES, re.M | re.S)[0]
    lines = [line for line in drawing.split("\n") if re.match(r" \d.*────►", line)]
    shapes = shapes_of("unet", SD1)
    for level, line in enumerate(lines):
        size, width, skips, last = re.fullmatch(
            r" (\d+)×\1×(\d+) +[RT ]+─+ ([\d, ]+?) ─+► +[RT ]+(\d+×\d+×\d+)", line).groups()
        assert last == f"{size}×{size}×{width}" and int(size) == 64 >> level
        down, up = (re.findall("R T|R", side) for side in (line.split("─")[0], line.split("►")[1]))
        for name, drawn, n in (("down", down, level), ("up", up, 3 - level)):
            assert len(drawn) == sum(
                re.fullmatch(rf"{name}_blocks\.{n}\.resnets\.\d+\.conv1\.bias", key) is not None
                for key in shapes)
            has_words = f"{name}_blocks.{n}.attentions.0.proj_in.bias" in shapes
            assert drawn == ["R T" if has_words else "R"] * len(drawn)
            for i in range(len(drawn)):
                assert shapes[f"{name}_blocks.{n}.resnets.{i}.conv1.bias"] == (int(width),)
        for i, skip in enumerate(reversed(skips.split(","))):
            before = 1280 if level > 1 else 2 * int(width)
            before = int(width) if i else before
            name = f"up_blocks.{3 - level}.resnets.{i}.conv1.weight"
            assert shapes[name][1] == before + int(skip), line
    assert len(lines) == 4


def test_why_four_sizes():
    """The table in §5, and how far one pixel at the end of the middle sees."""
    for size, channels, scores, products, covers in rows("whatever a pixel stands for")[1:]:
        n, m = int(size.split("×")[0]), int(channels)
        assert int(scores.replace(",", "")) == n ** 4
        assert products == f"{n * n * 9 * m * m / 1e9:.1f} billion"
        assert covers.startswith(f"{512 // n}×{512 // n}")
    levels = [(f"down_blocks.{i}.", 2 ** i) for i in range(4)] + [("mid_block.", 8)]
    convolutions, seen, names = 1, 3, list(shapes_of("unet", SD1))     # conv_in
    for prefix, step in levels:
        windows = [name for name in names if name.startswith(prefix)
                   and re.search(r"conv[12]?\.weight$", name)]
        convolutions += len(windows)
        seen += 2 * step * len(windows)     # each reaches one pixel further to both sides
    assert (convolutions, 1 + 2 * convolutions, seen) == (24, 49, 201)
    assert "24 convolutions" in NOTES and "201" in NOTES
    assert 8 * 8 * 1280 == 5 * 64 * 64 * 4


def test_table_of_noise_levels():
    """(6.5), and the curve."""
    for index, mean, bar, *cells in rows("is `sigma_of`:")[1:]:
        a = ALPHA_BAR[int(index)]
        values = (math.sqrt(a), math.sqrt(1 - a), math.sqrt((1 - a) / a), math.log(a / (1 - a)) / 2)
        assert [number(cell) for cell in cells] == pytest.approx(values, abs=0.0051)
        assert sd.sigma_of(a) == pytest.approx(values[2])
        assert number(mean) == pytest.approx(a, abs=0.00051) and bar == "█" * round(20 * a)
    assert abs(ALPHA_BAR - 0.5).argmin() == 354
    assert math.sqrt(ALPHA_BAR[999]) == pytest.approx(0.068, abs=0.0005)


@pytest.mark.parametrize("t, s", [(999, 998), (981, 961), (500, 20), (1, 0)])
def test_weights_of_the_bound(t, s):
    """(6.8) into (6.11); and (6.19) with the posterior's variance is (6.18), as ddpm takes it."""
    a, b = ALPHA_BAR[t], ALPHA_BAR[s]

    def drawn(x_t, x_0, noise):
        return next(sd.ddpm(lambda *_: (x_0, None), x_t, [(t, a, b)], lambda: noise))
    slope = drawn(0.7, 1.0, 0.0) - drawn(0.7, 0.0, 0.0)
    spread = drawn(0.7, 0.0, 1.0) - drawn(0.7, 0.0, 0.0)
    weight = (b / (1 - b) - a / (1 - a)) / 2
    assert slope ** 2 / (2 * spread ** 2) == pytest.approx(weight)

    x_0, eps, z, variance = 0.4, -1.1, 0.8, (1 - a / b) * (1 - b) / (1 - a)
    expected = math.sqrt(b) * x_0 + math.sqrt(1 - b - variance) * eps + math.sqrt(variance) * z
    assert drawn(sd.add_noise(x_0, a, eps), x_0, z) == pytest.approx(expected)


def test_how_much_more_the_bound_weighs_step_2_than_step_500():
    """Under (6.11): for an error of the noise, and for one of the picture."""
    def weights(t):     # steps count from 1
        before, now = (a / (1 - a) for a in ALPHA_BAR[t - 2:t])
        return (before / now - 1) / 2, (before - now) / 2
    noise, picture = (x / y for x, y in zip(weights(2), weights(500)))
    assert "150 times" in NOTES and round(noise, -1) == 150
    assert "229,000 times" in NOTES and round(picture, -3) == 229_000


def test_the_ideal_noise_is_the_score():
    """(6.13): the ε̂ that split_prediction makes of E[x_0 | x_t], against the slope of log q."""
    a, x, h = 0.3, np.linspace(-3, 3, 13), 1e-5
    guess, _ = denoise_two(x, 0, a)
    _, eps = sd.split_prediction("sample", guess, x, a)
    variance = (0.2 * sd.add_noise(1.0, a, 0.0)) ** 2 + sd.add_noise(0.0, a, 1.0) ** 2

    def log_q(x):
        return np.log(sum(np.exp(-(x - sd.add_noise(k, a, 0.0)) ** 2 / (2 * variance))
                          for k in (1, -1)))
    slope = (log_q(x + h) - log_q(x - h)) / (2 * h)
    np.testing.assert_allclose(slope, -eps / math.sqrt(1 - a), atol=1e-8)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_guidance_may_come_before_or_after_the_split(kind):
    uncond, cond, x = np.random.default_rng(0).standard_normal((3, 5))
    first = sd.split_prediction(kind, sd.guide(uncond, cond, 7.5), x, 0.3)
    parts = (sd.split_prediction(kind, output, x, 0.3) for output in (uncond, cond))
    np.testing.assert_allclose(first, [sd.guide(u, c, 7.5) for u, c in zip(*parts)], atol=1e-9)


def test_flow_matching_is_ddim():
    """(6.29), (6.30): Euler's method along straight lines, and ddim, at the same σ."""
    rng = np.random.default_rng(0)
    times = np.linspace(0.99, 0, 21).tolist()
    steps = [(r, *((1 - s) ** 2 / ((1 - s) ** 2 + s ** 2) for s in (r, after)))
             for r, after in zip(times, times[1:])]

    def mixed(r):       # (6.29); its derivative is u
        return (1 - r) * x_0 + r * eps
    x_0, eps = rng.standard_normal((2, 50))
    np.testing.assert_allclose((mixed(0.7) - mixed(0.4)) / 0.3, eps - x_0)
    for r, alpha_bar, _ in steps:       # the same as x_t, in other units
        np.testing.assert_allclose(mixed(r) / (1 - r),
                                   sd.add_noise(x_0, alpha_bar, eps) / alpha_bar ** 0.5)
        assert sd.sigma_of(alpha_bar) == pytest.approx(r / (1 - r))

    x = rng.standard_normal(50)
    y = x * (1 - times[0]) / steps[0][1] ** 0.5
    for (r, alpha_bar, level), after, ours in zip(steps, times[1:],
                                                  sd.ddim(denoise_crooked, x, steps)):
        x_t = y * alpha_bar ** 0.5 / (1 - r)
        picture, noise = denoise_crooked(x_t, r, alpha_bar)
        y = y + (after - r) * (noise - picture)                                     # (6.30)
        np.testing.assert_allclose(y, (1 - after) * picture + after * noise, atol=1e-9)
        np.testing.assert_allclose(y / (1 - after), ours / level ** 0.5, atol=1e-9)


def test_what_flow_matching_weighs():
    """Under (6.30): an error of u, in those of the picture."""
    rng, r = np.random.default_rng(0), 0.8
    x_0, guess, eps = rng.standard_normal((3, 50))
    y = (1 - r) * x_0 + r * eps
    u, other = eps - x_0, (y - (1 - r) * guess) / r - guess
    sigma = r / (1 - r)
    np.testing.assert_allclose(np.square(u - other), (1 + 1 / sigma) ** 2 * np.square(x_0 - guess))


def test_euler_ancestral_is_ddpm():
    """(6.23) is (6.18), given the same noise."""
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal(50), rng.standard_normal((20, 50))
    steps = like_diffusers.sampling_steps("ddpm", 20, scheduler(), ALPHA_BAR)
    one, other = (list(sampler(denoise_crooked, x, steps, iter(z).__next__))
                  for sampler in (sd.ddpm, samplers.euler_ancestral))
    np.testing.assert_allclose(one, other, atol=1e-9)


def test_dpm_pp_2m_is_the_formula_of_the_notes():
    """(6.26), (6.28) in the coordinates x / √ᾱ and σ."""
    x, before = np.random.default_rng(0).standard_normal(50), None
    steps = like_diffusers.sampling_steps("dpm++2m", 20, scheduler(), ALPHA_BAR)
    for (t, a, b), ours in zip(steps, sd.dpm_pp_2m(denoise_crooked, x, steps)):
        sigma, target = math.sqrt(1 / a - 1), math.sqrt(1 / b - 1)
        D = x_0 = denoise_crooked(x, t, a)[0]
        if before and target:
            h, h_before = math.log(sigma / target), math.log(before[1] / sigma)
            D = x_0 + h / 2 * (x_0 - before[0]) / h_before
        x = math.sqrt(b) * (target / sigma * x / math.sqrt(a) + (1 - target / sigma) * D)
        before = x_0, sigma
        np.testing.assert_allclose(ours, x, atol=1e-9)


@pytest.mark.parametrize("h", [0.4, 0.2, 0.1])
def test_the_middle_of_a_step_is_right_to_third_order(h):
    """(6.27): two steps of dpm_pp_2m, for a guess of the picture that is a line in λ."""
    start, slope = 0.5, 0.7
    levels = [1 / (1 + math.exp(-2 * (start + k * h))) for k in range(3)]

    def denoise(x, t, alpha_bar):
        return 0.3 + slope * (-math.log(sd.sigma_of(alpha_bar)) - start), None
    first, second = sd.dpm_pp_2m(denoise, 0.9, [(0, *pair) for pair in zip(levels, levels[1:])])

    n, sigma = 20001, sd.sigma_of(levels[2])            # (6.25), by the rule of trapezoids
    lam = np.linspace(start + h, start + 2 * h, n)
    values = np.exp(lam) * (0.3 + slope * (lam - start))
    integral = (values.sum() - (values[0] + values[-1]) / 2) * h / (n - 1)
    x_bar = first / math.sqrt(levels[1])
    exact = sigma * (x_bar / sd.sigma_of(levels[1]) + integral)
    off = second / math.sqrt(levels[2]) - exact
    assert off == pytest.approx(slope * (h / 2 * (1 - math.exp(-h)) - (h - 1 + math.exp(-h))))
    assert abs(off) < slope * h ** 3 / 12 and abs(off) > slope * h ** 3 / 20


def test_table_of_errors():
    """Root-mean-square distances from the exact flow, as the notes print them."""
    x = np.random.default_rng(0).standard_normal(2000)

    def solve(sampler, n):
        a = (1 / (1 + np.geomspace(14.6, 0.03, n + 1) ** 2)).tolist()
        return [*sampler(denoise_two, x, [(0, *pair) for pair in zip(a, a[1:])])][-1]
    exact, ((_, *counts), *table) = solve(sd.dpm_pp_2m, 5000), rows("with steps evenly spaced in")
    assert [row[0] for row in table] == ["`ddim`", "`dpm_pp_2m`"]
    for name, *cells in table:
        sampler = getattr(sd, name.strip("`"))
        errors = [math.sqrt(np.square(solve(sampler, int(n)) - exact).mean()) for n in counts]
        assert [float(cell) for cell in cells] == pytest.approx(errors, abs=0.00006)


@pytest.mark.parametrize("t", [0, 300, 999])
def test_what_each_target_weighs(t):
    """(8.3): diffusion_loss of one wrong guess of the picture, for the three kinds of targets."""
    rng, a = np.random.default_rng(0), ALPHA_BAR[t]
    x_0, guess, eps = rng.standard_normal((3, 2, 4, 4, 4))
    error, snr = np.square(x_0 - guess).mean((1, 2, 3)), a / (1 - a)

    def predict(kind, x_t):
        noise = (x_t - math.sqrt(a) * guess) / math.sqrt(1 - a)
        return {"sample": guess, "epsilon": noise, "v_prediction": sd.velocity(guess, a, noise)}[
            kind]
    for kind, weight in (("sample", 1), ("epsilon", snr), ("v_prediction", snr + 1)):
        loss = sd.diffusion_loss(functools.partial(predict, kind), kind, x_0, a, eps)
        np.testing.assert_allclose(loss, weight * error)
    assert ALPHA_BAR[999] / (1 - ALPHA_BAR[999]) == pytest.approx(0.0047, abs=0.00005)


def test_numbers_of_the_spacings():
    """Around (9.1)."""
    def steps(sampler, n, **settings):
        return like_diffusers.sampling_steps(sampler, n, scheduler(**settings), ALPHA_BAR)
    assert [round(step[0]) for step in steps("ddim", 50)][:2] == [981, 961]
    first = steps("ddim", 600)[0]
    assert first[0] == 600 and math.sqrt(first[1]) == pytest.approx(0.40, abs=0.005)
    assert samplers.lcm_timesteps(50, scheduler()).tolist() == list(range(999, 0, -20))
    left = steps("ddim", 20, set_alpha_to_one=False)[-1][2]
    assert left == ALPHA_BAR[0] and math.sqrt(1 - left) == pytest.approx(0.029, abs=0.0005)


def test_where_a_strength_begins():
    """Under (7.2)"""
    t, a, _ = sd.last_steps(sd.evenly_spaced_steps(20, ALPHA_BAR), 0.75)[0]
    assert t == 749 and (sd.sigma_of(a), math.sqrt(a)) == pytest.approx((4.1, 0.24), abs=0.05)


def test_the_largest_normal_number():
    """(9.4)"""
    u = np.zeros(16, np.float32)
    u[:8] = np.float32(1 - 2 ** -24)
    largest = math.sqrt(48 * math.log(2))
    assert like_diffusers.box_muller(u).max() == pytest.approx(largest)
    assert largest == pytest.approx(5.77, abs=0.005)


def test_the_condition_of_a_distilled_model():
    """(9.5), as powers of e^i."""
    w = 1000 * (8.5 - 1)
    condition = like_diffusers.guidance_condition(64, 8.5)
    turned = np.exp(1j * w / 10000 ** (np.arange(32) / 31))
    np.testing.assert_allclose(condition, np.r_[turned.imag, turned.real][None])


@pytest.mark.parametrize("degree", range(4))
def test_adams_and_bashforth(degree):
    """(9.6): the last weights take the mean over the next step exactly, up to cubics.

    The noise of this denoiser is a power of the number of the step.
    """
    levels = 1 / (1 + np.linspace(5, 0.5, 9) ** 2)      # even in σ: steps of one length
    steps = [(k, *pair) for k, pair in enumerate(zip(levels, levels[1:]))]
    path = [*samplers.plms(lambda x, t, a: (None, float(t) ** degree), 1.0, steps)]
    for k in range(4, 8):
        before, after = path[k - 1] / math.sqrt(levels[k]), path[k] / math.sqrt(levels[k + 1])
        noise = (after - before) / (sd.sigma_of(levels[k + 1]) - sd.sigma_of(levels[k]))
        assert noise == pytest.approx(((k + 1) ** (degree + 1) - k ** (degree + 1)) / (degree + 1))


def test_the_leap_of_a_consistency_model():
    """Around (9.7): at t = 0 nothing changes, at t = 19 x_t is gone to five digits."""
    def leap(t):
        return next(samplers.lcm(lambda *_: (0.0, None), 1.0, [(t, 0.5, 1.0)], None))
    assert leap(0) == 1 and leap(19) < 1e-5


def test_share_of_the_parameters():
    """Around (10.2)"""
    shapes = shapes_of("unet", SD1)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(sizes.values()) == 859_520_964
    windows = sum(sizes[name] for name in sizes if shapes[name][2:] == (3, 3))
    assert round(windows / 1e6) == 541
    assert round(sum(sizes[name] for name in sizes if ".attn2." in name) / 1e6) == 44
