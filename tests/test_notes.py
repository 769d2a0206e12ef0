"""NOTES.md beside the program: sections, names, equations and links, and the numbers that the notes state.

A code span of the notes that holds nothing but a name, dotted or called (`unet`, `Noise.normal`, `resnet(x, **weights)`),
is a name of tiny_sd.py, in §10 of fast.py, or of weights/train.py, formats.py or show.py if it begins with `train.`, `formats.`
or `show.`.
"""

import ast
import functools
import math
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

import fast
import formats
import show
import tiny_sd as sd

ROOT = Path(__file__).resolve().parent.parent

PROGRAM, FAST, TRAINING, NOTES = ((ROOT / name).read_text(encoding="utf-8") for name in (
    "tiny_sd.py", "fast.py", "weights/train.py", "NOTES.md"))
BLOCKS = re.findall(r"^```math\n(.*?)^```$", NOTES, re.M | re.S)
PROSE = re.sub(r"^```.*?^```$", "", NOTES, flags=re.M | re.S)
WORDS = re.sub(r"\$`[^`]*`\$", "", PROSE)               # without inline mathematics
LESSON, EFFICIENCY, REST = re.fullmatch(r"(.*)(^## §10 .*?)(^## (?!§).*)", WORDS, re.M | re.S).groups()
ALPHA_BAR = sd.alpha_bars({})


def defined_in(source):
    """The functions and classes at the top level of some Python."""
    return {node.name for node in ast.parse(source).body if hasattr(node, "name")}


def names_in(words):
    return {m[1] for span in re.findall(r"`([^`\n]+)`", words)
            if (m := re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)*)(?:\(.*\))?", span))}


# ── The files agree ─────────────────────────────────────────────────────────────────────────────────────────────

def test_sections():
    """Every ruler of the program is a heading of the notes, with the same title and in the same order; the last is fast.py's."""
    rulers = re.findall(r"^# ── (\d+)\. (.+?) ─+ NOTES §(\d+) ──$", PROGRAM + FAST, re.M)
    assert [n for n, _, _ in rulers] == [n for _, _, n in rulers] == [str(i + 1) for i in range(len(rulers))]
    assert re.findall(r"^## §(\d+) (.+)$", NOTES, re.M) == [(n, title) for n, title, _ in rulers]
    assert set(re.findall(r"NOTES §(\d+)", PROGRAM + FAST)) == {n for n, _, _ in rulers}
    assert set(re.findall(r"§(\d+)", PROSE)) <= {n for n, _, _ in rulers}


@pytest.mark.parametrize("module, name", [
    (module, name) for module, words in ((sd, LESSON + REST), (fast, EFFICIENCY)) for name in sorted(names_in(words))])
def test_names_exist(module, name):
    first, _, rest = name.partition(".")
    if first == "train":
        assert rest in defined_in(TRAINING)
    else:
        parts = {"formats": (formats, rest), "show": (show, rest)}.get(first, (module, name))
        functools.reduce(getattr, parts[1].split("."), parts[0])


def test_every_function_is_named():
    """The notes leave no function or class of the lesson out."""
    assert sorted(defined_in(PROGRAM) - {name.split(".")[0] for name in names_in(LESSON)}) == []


def test_equations():
    """Numbered 1, 2, 3 in each section, one number a block, and none referred to that is not there."""
    tags = [re.findall(r"\\tag\{(\d+)\.(\d+)\}", block) for block in BLOCKS]
    assert all(len(found) == 1 for found in tags)
    sections = re.split(r"^## §\d+ .*$", NOTES, flags=re.M)
    for n, text in enumerate(sections):
        found = re.findall(r"\\tag\{(\d+)\.(\d+)\}", text)
        assert found == [(str(n), str(k + 1)) for k in range(len(found))] and (found or not n)
    numbers = {".".join(found[0]) for found in tags}
    assert set(re.findall(r"\((?:the form )?(\d\d?\.\d+)\)", WORDS)) <= numbers


def test_every_equation_names_a_test():
    """Each number stands once in the table of tests, and each test in the file that it is said to be in."""
    table = NOTES.split("## Where each equation is checked")[1].split("\n## ")[0]
    named = re.findall(r"^\| (.+) \| \[(test_\w+)\]\((\S+)\) \|$", table, re.M)
    numbers = [n for numbers, _, _ in named for n in re.findall(r"\((\d+\.\d+)\)", numbers)]
    assert numbers == re.findall(r"\\tag\{(\d+\.\d+)\}", NOTES)
    for _, test, path in named:
        assert test in defined_in((ROOT / path).read_text(encoding="utf-8")), test


def test_mathematics_as_github_reads_it():
    """Inline mathematics is $`...`$ with a space before and no letter behind; no macro that GitHub refuses."""
    assert NOTES.count("```") % 2 == 0 and "$" not in WORDS
    for before, formula, behind in re.findall(r"(^|.)\$`([^`]*)`\$(.|$)", PROSE, re.M):
        assert before in " " and not re.match(r"[\w$`-]", behind), formula
        assert "\n" not in formula and formula.count("{") == formula.count("}")
    refused = r"\\(operatorname|require|newcommand|def|unicode|href|class|style|label|ref)\b|[<>$]"
    for formula in BLOCKS + re.findall(r"\$`([^`]*)`\$", PROSE):
        assert not re.search(refused, formula), formula


@pytest.mark.parametrize("file", ["NOTES.md", "README.md"])
def test_links(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    plain = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.M | re.S)
    targets = re.findall(r"\]\(([^()\s]+)\)", plain) + re.findall(r"(?:src|href)=\"([^\"]+)\"", plain)
    for path in (unquote(target.split("#")[0]) for target in targets if not re.match(r"[a-z]+:", target)):
        assert not path or (ROOT / path).exists(), f"{file} points to {path}"
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
    assert {target[1:] for target in targets if target.startswith("#")} <= anchors


# ── What the notes state in numbers ─────────────────────────────────────────────────────────────────────────────────

def denoise_two(x, t, a, spread=0.2):
    """E[x_0 | x_t] where a picture is one number, normal about +1 or -1."""
    signal, variance = math.sqrt(a), a * spread ** 2 + 1 - a
    pull = spread ** 2 * signal / variance
    x_0 = pull * x + (1 - pull * signal) * np.tanh(signal * x / variance)
    return x_0, (x - signal * x_0) / math.sqrt(1 - a)


def denoise_crooked(x, t, a):
    x_0 = np.tanh(3 * x) + np.sin(t)
    return x_0, (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)


def rows(section):
    """The cells of the table that follows some words of the notes."""
    table = NOTES[NOTES.index(section):].split("\n|", 1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]


def test_gelu():
    """(1.7), (1.8)"""
    x = np.linspace(-9, 9, 9001)
    exact = x * np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    y = x[x > 1e-3]
    assert abs(2 * sd.gelu.formula(y) / y - 2 * exact[x > 1e-3] / y).max() < 1.5e-7           # the error of erf
    assert 0.0203 < abs(sd.quick_gelu(x) - exact).max() < 0.0204


def test_tokens_of_the_example():
    """(2.2)"""
    clip = sd.clip_tokenizer()
    ranks = [clip.rank[pair] for pair in [("m", "o"), ("j", "i</w>"), ("e", "mo"), ("emo", "ji</w>")]]
    assert ranks == [105, 2185, 3226, 15815] and clip.tokens("emoji") == [512 + 15815] == [16327]
    assert len(clip.vocab) == 49408 and (clip.vocab[clip.BOS], clip.vocab[clip.EOS]) == (49406, 49407)
    assert [len(text.encode()) for text in "é🍎"] == [2, 4]
    assert sum(ord(symbol) != byte for byte, symbol in clip.bytes.items()) == 68


@pytest.mark.parametrize("mean, logvar", [(0.3, -1.0), (2.0, 0.5), (-1.0, -4.0)])
def test_divergence_from_the_standard_normal(mean, logvar):
    """(4.2), against the integral."""
    std = math.exp(logvar / 2)
    z = mean + std * np.linspace(-12, 12, 100001)
    log_q = -(z - mean) ** 2 / (2 * std ** 2) - math.log(std)
    q = np.exp(log_q)
    assert (q * (log_q + z ** 2 / 2)).sum() / q.sum() == pytest.approx((mean ** 2 + math.exp(logvar) - 1 - logvar) / 2)


@pytest.mark.parametrize("padding, shift", [((0, 1), 7), ((1, 1), 0)])
def test_where_three_halvings_look(padding, shift):
    """(4.6): a kernel that copies the centre of its window tells which row it saw."""
    kernel = np.zeros((1, 3, 3, 1))
    kernel[0, 1, 1, 0] = 1
    x = np.tile(np.arange(64.0)[None, :, None, None], (1, 1, 64, 1))
    for _ in range(3):
        x = sd.conv2d(x, kernel, stride=2, padding=padding)
    assert x[0, :, 3, 0].tolist() == [8 * i + shift for i in range(8)]


def test_time_encoding_knows_distances():
    """(5.2)"""
    e = sd.time_encoding(np.array([10.0, 47, 500, 537]), 320)
    frequencies = 10000.0 ** (-np.arange(160) / 160)
    assert e[0] @ e[1] == pytest.approx(e[2] @ e[3]) == pytest.approx(np.cos(frequencies * 37).sum())


def test_table_of_noise_levels():
    """(6.5)"""
    for index, *cells in rows("in use:\n")[2:]:
        a = ALPHA_BAR[int(index)]
        values = (math.sqrt(a), math.sqrt(1 - a), math.sqrt((1 - a) / a), math.log(a / (1 - a)) / 2)
        assert [float(cell.replace("−", "-")) for cell in cells] == pytest.approx(values, abs=0.0051)
    assert abs(ALPHA_BAR - 0.5).argmin() == 354


@pytest.mark.parametrize("t, s", [(999, 998), (981, 961), (500, 20), (1, 0)])
def test_weights_of_the_bound(t, s):
    """(6.8) into (6.11); and (6.19) with the posterior's variance is (6.18)."""
    a, b = ALPHA_BAR[t], ALPHA_BAR[s]
    beta, alpha = 1 - a / b, a / b
    variance = beta * (1 - b) / (1 - a)
    weight = (math.sqrt(b) * beta / (1 - a)) ** 2 / (2 * variance)
    assert weight == pytest.approx((b / (1 - b) - a / (1 - a)) / 2)
    assert math.sqrt(1 - b - variance) == pytest.approx(math.sqrt(alpha) * (1 - b) / math.sqrt(1 - a))


def test_the_ideal_noise_is_the_score():
    """(6.13), against the slope of log q."""
    a, x, h = 0.3, np.linspace(-3, 3, 13), 1e-5

    def log_q(x):
        return np.log(sum(np.exp(-(x - k * math.sqrt(a)) ** 2 / (2 * (a * 0.04 + 1 - a))) for k in (1, -1)))
    slope = (log_q(x + h) - log_q(x - h)) / (2 * h)
    np.testing.assert_allclose(slope, -denoise_two(x, 0, a)[1] / math.sqrt(1 - a), atol=1e-8)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_guidance_may_come_before_or_after_the_split(kind):
    uncond, cond, x = np.random.default_rng(0).standard_normal((3, 5))
    first = sd.split_prediction(kind, sd.guide(uncond, cond, 7.5), x, 0.3)
    parts = (sd.split_prediction(kind, output, x, 0.3) for output in (uncond, cond))
    np.testing.assert_allclose(first, [sd.guide(u, c, 7.5) for u, c in zip(*parts)], atol=1e-9)


def test_euler_ancestral_is_ddpm():
    """(6.24) is (6.18), given the same noise."""
    rng = np.random.default_rng(0)
    x, z, steps = rng.standard_normal(50), rng.standard_normal((20, 50)), sd.sampling_steps("ddpm", 20, {})
    one, other = (list(sd.SAMPLERS[name](denoise_crooked, x, steps, iter(z).__next__)) for name in ("ddpm", "euler_a"))
    np.testing.assert_allclose(one, other, atol=1e-9)


def test_dpm_pp_2m_is_the_formula_of_the_notes():
    """(6.26), (6.27) in the coordinates x / √ᾱ and σ."""
    x, before = np.random.default_rng(0).standard_normal(50), None
    steps = sd.sampling_steps("dpm++2m", 20, {})
    for (t, a, b), ours in zip(steps, sd.dpm_pp_2m(denoise_crooked, x, steps, None)):
        sigma, target = math.sqrt(1 / a - 1), math.sqrt(1 / b - 1)
        D = x_0 = denoise_crooked(x, t, a)[0]
        if before and target:
            h, h_before = math.log(sigma / target), math.log(before[1] / sigma)
            D = x_0 + h / 2 * (x_0 - before[0]) / h_before
        x = math.sqrt(b) * (target / sigma * x / math.sqrt(a) + (1 - target / sigma) * D)
        before = x_0, sigma
        np.testing.assert_allclose(ours, x, atol=1e-9)


def test_table_of_errors():
    """Root-mean-square distances from the exact flow, as the notes print them."""
    x = np.random.default_rng(0).standard_normal(2000)

    def solve(sampler, n):
        a = (1 / (1 + np.geomspace(14.6, 0.03, n + 1) ** 2)).tolist()
        return [*sampler(denoise_two, x, [(0, *pair) for pair in zip(a, a[1:])], None)][-1]
    exact, ((_, *counts), _, *table) = solve(sd.dpm_pp_2m, 5000), rows("evenly spaced in")
    assert [row[0] for row in table] == ["`ddim`", "`dpm_pp_2m`"]
    for name, *cells in table:
        errors = [math.sqrt(np.square(solve(getattr(sd, name.strip("`")), int(n)) - exact).mean()) for n in counts]
        assert [float(cell) for cell in cells] == pytest.approx(errors, rel=0.06, abs=0.0006)


def test_numbers_of_the_spacings():
    """Around (6.28) and (8.2)."""
    assert [round(step[0]) for step in sd.sampling_steps("ddim", 50, {})][:2] == [981, 961]
    first = sd.sampling_steps("ddim", 600, {})[0]
    assert first[0] == 600 and math.sqrt(first[1]) == pytest.approx(0.40, abs=0.005)
    t, a, _ = sd.sampling_steps("dpm++2m", 20, {"timestep_spacing": "leading"})[-sd.steps_left(20, 0.75)]
    assert t == 706 and (math.sqrt(1 / a - 1), math.sqrt(a)) == pytest.approx((3.4, 0.28), abs=0.05)


def test_the_largest_normal_number():
    """(6.31)"""
    u = np.zeros(16, np.float32)
    u[:8] = np.float32(1 - 2 ** -24)
    assert sd.box_muller(u).max() == pytest.approx(math.sqrt(48 * math.log(2))) == pytest.approx(5.77, abs=0.005)


def test_share_of_the_parameters():
    """Around (7.1)"""
    config = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 768, "in_channels": 4,
              "out_channels": 4, "down_block_types": ["CrossAttn"] * 3 + [""], "up_block_types": [""] + ["CrossAttn"] * 3}
    sizes = {name: math.prod(shape) for name, shape in sd.flatten(sd.unet_shapes(config)).items()}
    shapes = sd.flatten(sd.unet_shapes(config))
    assert sum(sizes.values()) == 859_520_964
    assert round(sum(sizes[name] for name in sizes if shapes[name][2:] == (3, 3)) / 1e6) == 541
    assert round(sum(sizes[name] for name in sizes if ".attn2." in name) / 1e6) == 44
