"""Prompts with weights, of any length, with LoRAs by name, and with layers left out.

What they mean is computed again with transformers' encoders, chunk by chunk, and pictures with
diffusers.
"""

import contextlib
import hashlib
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import tiny_sd
from conftest import TEXT, randomise, same
from extras import checks, cli, drawing, formats, in_time, like_diffusers, named, prompts, show
from helpers import own_lines
from tiny_sd import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    return formats.clip_tokenizer()


@pytest.fixture
def run(folder, tmp_path, monkeypatch, command):
    """run(argument, ...) -> (status, lines on stdout, the program's lines on stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, model=folder):
        status, out, err = command(*argv, "-m", model, "--steps", "2", "-W", "32", "-H", "32")
        return status, out, own_lines(err)
    return run


# ── Weights ───────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("text, parts", [
    # the web UI's own example
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
     [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55),
      (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)]),
    ("", [("", 1)]), ("()", [("", 1)]), ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
    ("[[a]]", [("a", 1 / 1.21)]), ("((a:2):3)", [("a", 6)]), ("(a:-.5)", [("a", -0.5)]),
    (r"\(a\) \[b\] \\ \c", [(r"(a) [b] \ c", 1)]), (r"(a\)b)", [("a)b", 1.1)]),
    ("a) b] c:1.2)", [("a) b] c:1.2)", 1)]), ("(a", [("a", 1.1)]), ("[a (b", [
        ("a ", 1 / 1.1), ("b", 1)]),
    ("(a: 1.2 )", [("a", 1.2)]), ("[a:1.2]", [("a:1.2", 1 / 1.1)]),
    ("(a)(b) c", [("ab", 1.1), (" c", 1)]), ("(a [b) c]", [
        ("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
    ("a BREAK\nb", [("a", 1), ("BREAK", -1), ("b", 1)]), ("aBREAK b", [("aBREAK b", 1)]),
    ("a BREAK BREAK", [("a", 1), ("BREAK", -1), ("", 1), ("BREAK", -1), ("", 1)]),
    ("(a BREAK b)", [("a", 1.1), ("BREAK", -1.1), ("b", 1.1)])])
def test_the_weights_of_a_prompt(text, parts):
    found = prompts.weighted_parts(text)
    assert [part for part, _ in found] == [part for part, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize("text, said", [
    ("(a:1.2.3)", "the prompt's weight 1.2.3 is not a number"),
    ("(a:.)", "weight . is not a number"),
    ("(a:" + "9" * 500 + ")", "beyond a million"), ("(" * 150 + "a", "beyond a million"),
    ("[a" * 200, "nests brackets 200 deep"),
    ("a" * 10_001, "has 10001 characters, 10001 of them in one word: at most 100000"),
    ("a " * 50_001, "has 100002 characters, 1 of them in one word"),
    ("BREAK " * 1000, "has 1001 chunks: at most 1000")])
def test_what_no_prompt_can_mean_is_refused(tokenizer, text, said):
    with pytest.raises(UserError, match=re.escape(said)):
        prompts.chunks_of(tokenizer, text)


# ── Chunks ────────────────────────────────────────────────────────────────────────────────────────

def x(n):
    """A text of n tokens."""
    return " ".join("x" * n)


@pytest.mark.parametrize("text, chunks", [
    ("", [""]), ("a cat", ["a cat"]), (x(75), [x(75)]), (x(76), [x(75), "x"]),
    (x(160), [x(75), x(75), x(10)]),
    # after a comma among the last 20 tokens, the rest moves on; a comma before them does nothing
    (f"{x(55)}, {x(20)}", [f"{x(55)} ,", x(20)]), (f"{x(75)}, y", [x(75), ", y"]),
    (f"{x(54)}, {x(21)}", [f"{x(54)} , {x(20)}", "x"]), (f"{x(74)}, y z", [f"{x(74)} ,", "y z"]),
    (f"a, {x(60)}, {x(20)}", [f"a , {x(60)} ,", x(20)]),
    ("a BREAK b, c", ["a", "b , c"]), ("a BREAK", ["a"]), ("BREAK a", ["", "a"]),
    ("BREAK", [""]), (f"{x(80)} BREAK b", [x(75), x(5), "b"]),
    (f"a, BREAK {x(76)}", ["a ,", x(75), "x"])])
def test_chunks(tokenizer, text, chunks):
    found = prompts.chunks_of(tokenizer, text)
    assert [tokenizer.decode([i for i, _ in chunk]) for chunk in found] == chunks


def test_a_part_that_moves_on_keeps_its_weight(tokenizer):
    first, second = prompts.chunks_of(tokenizer, f"{x(60)}, ({x(10)}:1.5) {x(10)}")
    assert {weight for _, weight in first} == {1}
    assert [weight for _, weight in second] == [1.5] * 10 + [1] * 10


def test_any_text_has_chunks(tokenizer):
    """Or one line that says why not, in no time."""
    marks = [*"()[]\\:,<1\n🍎", ":1.2)", " BREAK ", "red", " a"]
    chance, start, read = random.Random(0), time.process_time(), 0
    texts = ["".join(chance.choices(marks, k=chance.choice([5, 50, 500]))) for _ in range(300)]
    for text in [*texts, "a" * 10_000, "," * 10_000, "🍎" * 10_000, "BREAK " * 16_000,
                 "(a)[b] " * 14_000]:
        try:
            chunks = prompts.chunks_of(tokenizer, text)
        except UserError:
            continue
        read += 1
        assert chunks and all(len(chunk) <= 75 for chunk in chunks)
        ids = [i for chunk in chunks for i, _ in chunk]
        assert ids == [i for part, weight in prompts.weighted_parts(text)
                       if (part, weight) != prompts.BREAK for i in tokenizer.tokens(part)]
    assert read > 150 and time.process_time() - start < 20


def expected_context(encoder, tokenizer, chunks, layer=-1):
    """Return the context of chunks, lists of (text, weight), in torch's own words."""
    parts = []
    for chunk in chunks:
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in chunk:
            new = tokenizer(text, add_special_tokens=False).input_ids
            ids, weights = ids + new, weights + [weight] * len(new)
        ids = ids + [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (76 - len(ids))
        weights = torch.tensor(weights + [1.0] * (77 - len(weights)))
        with torch.no_grad():
            out = encoder(torch.tensor([ids]), output_hidden_states=True)
        z = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        weighted = z * weights[None, :, None]
        parts.append(weighted * (z.mean() / weighted.mean()))
    return torch.cat(parts, 1)


LONG = f"red (apple:1.4), {x(70)}, on [[a table]] BREAK (((sky)))"
LONG_CHUNKS = [[("red ", 1), ("apple", 1.4), (", " + x(70) + ",", 1)],
               [(" on ", 1), ("a table", 1 / 1.21)], [("sky", 1.1 ** 3)]]


def test_contexts_of_weighted_chunks(model, reference):
    encoder, tokenizer = reference.text_encoder, reference.tokenizer
    context, pooled = prompts.embed_prompts(model, ["a (blurry:0.6) thing", LONG])
    negative = expected_context(encoder, tokenizer, [[("a ", 1), ("blurry", 0.6), (" thing", 1)]])
    positive = expected_context(encoder, tokenizer, LONG_CHUNKS)
    assert pooled is None and context.shape[1] == 3 * 77
    # divided by means near 0, which have fewer digits
    same("weighted context", tiny_sd.to_numpy(context[1]), positive[0], 1e-4)
    same("weighted context", tiny_sd.to_numpy(context[0]), negative[0].repeat(3, 1), 1e-4)


def test_a_film_counts_the_attention_to_each_token(model, monkeypatch):
    """Of a prompt of 72 kB, each step had a third of a gigabyte."""
    job = cli.make_job(["red", "--show", "new", "--steps", "50", "-W", "64", "-H", "64"])
    job = drawing.filled(model, job)
    one, many = (drawing.bytes_of_a_step(model, job._replace(prompt=" BREAK ".join(["a"] * n)))
                 for n in (1, 100))
    chunk = 4 * 77 * 64 * 64 / model.factor ** 2
    assert (one, many) == (3 * 64 * 64 + chunk, 3 * 64 * 64 + 100 * chunk)
    monkeypatch.setattr(checks, "free_memory", lambda: 50 * many - 1)
    drawing.make_room(model, job)
    with pytest.raises(UserError, match="--show new needs at least .* take fewer steps"):
        drawing.make_room(model, job._replace(prompt=" BREAK ".join(["a"] * 100)))


def test_many_texts_beside_a_long_one_are_refused(model):
    """Each would be repeated to its length: 73 kB would take 16 GB."""
    with pytest.raises(UserError, match="302 texts of 50 chunks, more than 4096"):
        prompts.embed_prompts(model, ["a BREAK " * 50, *"b" * 301])


def test_two_and_three_chunks_have_six_in_common(model):
    context, _ = prompts.embed_prompts(model, ["a BREAK b", "a BREAK b BREAK c"])
    two, three = (context[i].reshape(6, 77, -1) for i in range(2))
    assert (two[:4] == two[2:]).all() and (three[:3] == three[3:]).all()
    assert abs(two[:2] - three[:2]).max() < 1e-5 < abs(two[0] - two[1]).max()


def test_many_chunks_have_no_more_in_common_than_they_have(model):
    one, other = " BREAK ".join("a" * 8), " BREAK ".join("a" * 9)
    assert prompts.embed_prompts(model, [one, other])[0].shape[1] == 9 * 77


def test_a_text_without_marks_is_read_as_the_lesson_reads_it(model):
    texts = ["", "a photo of a cat, 1: x² <b>", None]
    for one, other in zip(prompts.embed_prompts(model, texts), tiny_sd.embed_prompts(model, texts)):
        assert one is other is None or (one == other).all()


def test_nothing_of_a_long_prompt_is_cut(model, capsys):
    one, other = prompts.embed_prompts(model, [x(80), x(79) + " y"])[0]
    assert (one != other).any() and capsys.readouterr().err == ""


def test_copies_of_the_shorter_prompt_are_as_if_it_was_read_alone(model, reference):
    """The web UI runs the U-Net twice if two prompts differ in length."""
    context, _ = prompts.embed_prompts(model, ["blurry", LONG])
    noisy = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    x_0, eps = tiny_sd.denoiser(model, context, 5.0)(noisy, 500, 0.4)

    latents = torch.from_numpy(noisy).permute(0, 3, 1, 2)
    halves = []
    for chunks in [[("blurry", 1)]], LONG_CHUNKS:
        words = expected_context(reference.text_encoder, reference.tokenizer, chunks)
        with torch.no_grad():
            halves.append(reference.unet(latents, 500, words).sample)
    expected = halves[0] + 5 * (halves[1] - halves[0])
    same("guided noise of weighted prompts", eps, expected.permute(0, 2, 3, 1), 1e-4)


def test_a_picture_from_weights_and_chunks(folder, reference):
    words = [expected_context(reference.text_encoder, reference.tokenizer, chunks)
             for chunks in ([[("blurry", 1)]], LONG_CHUNKS)]
    expected = reference(
        prompt_embeds=words[1], negative_prompt_embeds=words[0].repeat(1, 3, 1),
        num_inference_steps=4, guidance_scale=5.0, output_type="np",
        generator=torch.Generator().manual_seed(3)).images[0]
    model = formats.load(folder)
    *_, latents = like_diffusers.generate(model, LONG, "blurry", [3], 4, 5.0, "ddim",
                                   embed=prompts.embed_prompts)
    found = tiny_sd.decode(model, latents)[0].astype(int)
    assert np.abs(found - (expected * 255).round()).max() <= 1 and np.ptp(found) > 50


# ── Layers left out ───────────────────────────────────────────────────────────────────────────────

def skipped(encoder, tokenizer, text, layer):
    """Return the final norm of a hidden state, with transformers' modules."""
    ids = tokenizer([text], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = encoder(ids, output_hidden_states=True).hidden_states[layer]
        return getattr(encoder, "text_model", encoder).final_layer_norm(hidden)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_clip_skip(model, reference, n):
    expected = skipped(reference.text_encoder, reference.tokenizer, "a red apple", -n)
    context, _ = prompts.skipping(prompts.embed_prompts, n)(model, ["a red apple"])
    same(f"clip skip {n}", tiny_sd.to_numpy(context), expected, 1e-5)


@pytest.mark.parametrize("n, layer", [(1, 3), (2, 3), (3, 2)])
def test_clip_skip_of_an_open_clip_encoder(folder_with, reference, n, layer):
    """Stable Diffusion 2's has left out its last layer already: 2 changes nothing."""
    from transformers import CLIPTextConfig, CLIPTextModel
    config = CLIPTextConfig(**{**TEXT, "hidden_act": "gelu"})
    encoder = randomise(CLIPTextModel(config), 4, weight=3)
    expected = skipped(encoder, reference.tokenizer, "an apple", layer)
    model = formats.load(folder_with(text_encoder=encoder))
    context, _ = prompts.skipping(tiny_sd.embed_prompts, n)(model, ["an apple"])
    same(f"clip skip {n}", context, expected, 1e-5)


def test_clip_skip_that_leaves_no_layer_is_refused(run):
    status, out, err = run("a cat", "--clip-skip", "4")
    assert (status, out) == (2, []) and err == [
        "--clip-skip 4 leaves nothing of a text encoder of 3 layers"]
    assert run("a cat", "--clip-skip", "0")[2] == ["--clip-skip 0 is not from 1 to 100"]


# ── Two text encoders ─────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("n", [1, 2, 3])
def test_clip_skip_of_two_encoders(xl, n, backend):
    """Both leave out one layer already; the pooled vector is that of all layers."""
    pipe, path = xl
    expected, _, pooled, _ = pipe.encode_prompt(
        "a red apple", device="cpu", do_classifier_free_guidance=False, clip_skip=max(0, n - 2))
    found = prompts.skipping(prompts.embed_prompts, n)(formats.load(path, backend), ["a red apple"])
    same(f"XL, clip skip {n}", tiny_sd.to_numpy(found[0]), expected.detach(), 1e-5)
    same("XL, pooled", tiny_sd.to_numpy(found[1]), pooled.detach(), 1e-5)


def test_each_encoder_weighs_for_itself(xl, backend):
    """An absent negative prompt is all zero; the pooled vector is of the first chunk."""
    pipe, path = xl
    context, pooled = prompts.embed_prompts(formats.load(path, backend), [None, LONG])
    parts = [expected_context(encoder, tokenizer, LONG_CHUNKS, layer=-2) for encoder, tokenizer in (
        (pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))]
    ids = pipe.tokenizer_2("red apple, " + x(70) + ",", padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = pipe.text_encoder_2(ids.input_ids)[0]
    same("XL, weighted", tiny_sd.to_numpy(context[1]), torch.cat(parts, -1)[0], 1e-5)
    same("XL, pooled of the first chunk", tiny_sd.to_numpy(pooled[1]), expected[0], 1e-5)
    assert not context[0].any() and not pooled[0].any()


# ── On the command line ───────────────────────────────────────────────────────────────────────────

def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def draw(run, *argv, **how):
    """Return the pixels of the one picture drawn, and the program's lines on stderr."""
    status, out, err = run(*argv, **how)
    assert status == 0 and len(out) == 1, err
    return pixels(out[0]), err


def test_the_command_line_reads_weights_unless_told_not_to(run, folder):
    plain, err = draw(run, "a (red:1.5) apple")
    model = formats.load(folder)
    *_, latents = like_diffusers.generate(model, "a (red:1.5) apple", steps=2, width=32, height=32,
                                   embed=prompts.embed_prompts)
    assert err == [] and np.array_equal(plain, tiny_sd.decode(model, latents)[0])
    literal, err = draw(run, "a (red:1.5) apple", "--plain-prompt")
    *_, latents = like_diffusers.generate(model, "a (red:1.5) apple", steps=2, width=32, height=32)
    assert err == [] and np.array_equal(literal, tiny_sd.decode(model, latents)[0])
    assert not np.array_equal(plain, literal)


def test_a_long_prompt_is_cut_only_where_it_is_taken_literally(run):
    assert draw(run, x(90))[1] == []
    assert "has more than 75 tokens; the model does not see: x x" in draw(
        run, x(90), "--plain-prompt")[1][0]


def test_clip_skip_on_the_command_line(run):
    one, two, three = (draw(run, "a (red:1.5) apple", "--clip-skip", n)[0] for n in "123")
    assert np.array_equal(one, draw(run, "a (red:1.5) apple")[0])
    assert not np.array_equal(one, two) and not np.array_equal(two, three)


@pytest.mark.parametrize("prompt, said", [
    ("a {red|blue} cat", ["{red|blue} in the prompt is read as plain text: --wildcards DIR "
                          "would choose from lists"]),
    ("a __animal__", ["__animal__ in the prompt is read as plain text: --wildcards DIR would "
                      "choose from lists"]),
    (r"a \[red|blue\] box", []), ("a | b: 3 {c} _ d", []),
    ("a [cat] (dog:0.5) and SAND", [])])
def test_what_is_drawn_from_lists_elsewhere_gets_a_line(run, prompt, said):
    assert draw(run, prompt)[1] == said
    assert draw(run, prompt, "--plain-prompt")[1] == []


@pytest.mark.parametrize("text", ["[|" * 40_000, "[" * 90_000, "a" + " " * 90_000 + "BREAK",
                                  "[:1" * 30_000, ":" + "1 " * 40_000, "__" * 40_000, "{" * 90_000])
def test_nothing_takes_for_ever(tokenizer, text):
    start = time.process_time()
    prompts.LISTS.search(text)
    in_time.all_words(text)
    with contextlib.suppress(UserError):
        prompts.weighted_parts(text)
    assert time.process_time() - start < 3


def test_too_many_tags_are_refused(run):
    status, out, err = run("a " + "<lora:x:1>" * 101)
    assert (status, out) == (2, []) and err == [
        "the prompt has 101 tags like <lora:name:weight>: at most 100"]


def test_a_model_with_a_tokenizer_of_its_own_says_that_it_has_no_weights(run):
    picture, err = draw(run, "a (red:1.5) apple", model="emoji")
    assert "(red:1.5) is read as plain text: this model's prompts have no weights" in err
    literal, _ = draw(run, "a (red:1.5) apple", "--plain-prompt", model="emoji")
    assert np.array_equal(picture, literal)


@pytest.mark.parametrize("prompt, said", [
    ("(a:1.2.3)",
     "the prompt's weight 1.2.3 is not a number (--plain-prompt reads brackets as plain text)"),
    ("(" * 160 + "a", "the weight of 'a' in the prompt is beyond a million")])
def test_bad_weights_are_refused_in_one_line(run, tmp_path, prompt, said):
    for argv in [prompt], ["a", "-n", prompt]:
        assert run(*argv) == (2, [], [said])
    assert not list(tmp_path.glob("*.png"))


# ── LoRAs in the prompt ───────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of the small model, which changes its pictures."""
    name, path = "lora_unet_mid_block_attentions_0_proj_in", tmp_path_factory.mktemp("lora") / "l"
    torch.manual_seed(0)
    save_file({f"{name}.lora_down.weight": torch.randn(2, 128),
               f"{name}.lora_up.weight": torch.randn(128, 2) / 4}, path)
    return path


@pytest.fixture
def beside(folder, tmp_path):
    """The folder of the small model, alone in another folder."""
    return Path(shutil.copytree(folder, tmp_path / "models" / "small", symlinks=True))


@pytest.mark.parametrize("place", ["models/small", "models/small/loras", "models/loras",
                                   "models/Lora", "Lora", "here", "here/loras"])
def test_where_a_lora_is_looked_for(beside, lora, tmp_path, monkeypatch, place):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / place).mkdir(exist_ok=True)
    file = Path(shutil.copy(lora, tmp_path / place / "some thing-2.safetensors"))
    for name in "some thing-2", "some thing-2.safetensors":
        assert Path(named.find_file("lora", name, str(beside))).resolve() == file
        assert named.find_file("vae", name, str(beside)) is None or place in (
            "models/small", "here")


@pytest.mark.parametrize("name", ["", ".", "..", "../l", "/etc/passwd", "a\0b", "a\\b", "a" * 300])
def test_no_name_is_a_path(beside, lora, name):
    shutil.copy(lora, beside / ".." / "l.safetensors")
    assert named.find_file("lora", name, str(beside)) is None


def test_a_lora_named_in_the_prompt_is_added(run, beside, lora):
    file = shutil.copy(lora, beside / "some thing-2.safetensors")
    without, _ = draw(run, "an apple", model=beside)
    expected, _ = draw(run, "an apple", "--lora", f"{file}:0.5", model=beside)
    found, err = draw(run, "an <lora:some thing-2:0.5>apple", model=beside)
    assert err == [] and np.array_equal(found, expected) and not np.array_equal(found, without)
    text = Image.open("out-2.png").text["parameters"]
    assert text.startswith("an <lora:some thing-2:0.5>apple\n") and "Lora: some thing-2 0.5" in text


def test_the_flag_wins_over_the_tag():
    """Which is not looked for."""
    args = cli.make_job(["a <lora:l:0.5>", "--lora", "elsewhere/l.safetensors:2"])
    assert args.lora == [("elsewhere/l.safetensors", 2.0)]


@pytest.mark.parametrize("tag, said", [
    ("<lora:none:1>", "there is no such LoRA beside the model, in loras/ or here: --lora FILE "
                      "names one elsewhere"),
    ("<lora:../l:1>", "there is no such LoRA"), ("<lora:..:1>", "there is no such LoRA"),
    ("<lora:/etc/passwd>", "there is no such LoRA"),
    ("<lora:l:x>", "it is not of the form <lora:name"),
    ("<lora:l:nan>", "it is not of the form"),
    ("<lora:l:1e308>", "it is not of the form"), ("<lora:l:1:0.5>", "it is not of the form"),
    ("<hypernet:l:1>", "only tags <lora:name:weight> work here")])
def test_a_tag_that_cannot_be_followed_is_refused(run, beside, lora, tmp_path, tag, said):
    shutil.copy(lora, tmp_path / "models" / "l.safetensors")
    status, out, err = run(f"apple {tag}", model=beside)
    assert (status, out) == (2, []) and len(err) == 1
    assert err[0].startswith(f"{tag} in the prompt: {said}")


@pytest.mark.parametrize("tag, weight", [
    ("<lora:l>", 1), ("<lyco:l:-.5>", -0.5), ("<lora:l:2:2>", 2), ("<lora:l.safetensors:1>", 1)])
def test_tags_of_the_web_ui(beside, lora, tmp_path, monkeypatch, tag, weight):
    monkeypatch.chdir(tmp_path)
    shutil.copy(lora, "l.safetensors")
    args = cli.make_job([f"a {tag} b", "-m", str(beside)])
    assert args.lora == [("l.safetensors", weight)]
    assert prompts.without_tags(f"a {tag} b, x < 3 > <3") == "a  b, x < 3 > <3"


def test_a_tag_that_is_taken_literally(run, beside):
    assert draw(run, "apple<lora:none>", "--plain-prompt", model=beside)[1] == []


def test_all_lines_of_a_list_have_the_same_loras(run, beside, lora):
    shutil.copy(lora, "l.safetensors")
    Path("p.txt").write_text("apple <lora:l:0.5>\n<lora:l:0.5> pear -s 3\n")
    status, out, err = run("--prompts", "p.txt", model=beside)
    assert (status, out, err) == (0, ["out-0001.png", "out-0002.png"], [])
    Path("p.txt").write_text("apple <lora:l:0.5>\n\npear <lora:l:0.4>\n")
    assert run("--prompts", "p.txt", model=beside) == (2, [], [
        "p.txt, line 3: all prompts must use the same LoRAs as the first: pear <lora:l:0.4>"])
    Path("p.txt").write_text("apple <lora:none>\n")
    assert run("--prompts", "p.txt", model=beside)[2][0].startswith("p.txt, line 1: <lora:none> in")


def test_like_repeats_all_of_it(run, beside, lora, tmp_path):
    """Weights, layers left out, a LoRA by its tag, one by its flag, a VAE."""
    for name in "l.safetensors", "other.safetensors":
        shutil.copy(lora, beside / name)
    vae = load_file(beside / "vae/diffusion_pytorch_model.safetensors")
    save_file({name: 0.9 * array for name, array in vae.items()}, beside / "light.safetensors")
    draw(run, "a (red:1.5) <lora:l:0.5> apple", "--clip-skip", "2", "-n", "(blue)", "--lora",
         f"{beside}/other.safetensors:-0.25", "--sampler", "euler_a", "--vae",
         f"{beside}/light.safetensors", model=beside)
    status, out, err = run("--like", "out.png", model=beside)
    assert (status, err) == (0, []) and Path(out[0]).read_bytes() == Path("out.png").read_bytes()
    draw(run, "a (red:1.5) apple", "--plain-prompt", "-o", "plain.png", model=beside)
    status, out, err = run("--like", "plain.png", model=beside)
    assert (status, err) == (0, []) and Path(out[0]).read_bytes() == Path("plain.png").read_bytes()



def test_hashes_tell_another_file(run, beside, lora, single_file):
    shutil.copy(lora, beside.parent / "l.safetensors")
    model = shutil.copy(single_file("F32"), beside.parent / "m.safetensors")
    shutil.copy(model, beside.parent / "v.safetensors")
    facts = "Steps: 1, Sampler: Euler, Seed: 1, Size: 32x32, RNG: CPU, Model hash: {}, VAE: v, "
    facts += 'VAE hash: {}, Lora hashes: "l: {}"'
    whole = hashlib.sha256(Path(model).read_bytes()).hexdigest()[:10]
    data = Path(lora).read_bytes()
    numbers = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()[:12]
    for hashes, said in [((whole, whole, numbers), []), (("0" * 10, "1" * 10, "2" * 12), [
            f"--like a.png: the {name} is not the file that the picture was made with"
            for name in ("model m", "VAE v", "LoRA l")])]:
        info = PngInfo()
        info.add_text("parameters", f"a <lora:l:1>\n{facts.format(*hashes)}")
        Image.new("RGB", (8, 8)).save("a.png", pnginfo=info)
        assert run("--like", "a.png", model=model)[::2] == (0, said)


# ── What is shown of them ─────────────────────────────────────────────────────────────────────────

def test_places_of_words_in_chunks(tokenizer):
    chunks = prompts.chunks_of(tokenizer, "a (hippopotamus:1.5) BREAK b")
    found = {word: places.tolist() for word, places in show.positions_of_words(
        tokenizer, chunks, 4 * 77)}
    length = len(tokenizer.tokens("hippopotamus"))
    assert found["(start)"] == [0, 77, 154, 231] and found["a"] == [1, 155]
    assert found["hippopotamus × 1.5"] == [*range(2, 2 + length), *range(156, 156 + length)]
    assert found["b"] == [78, 232]
    assert sorted(sum(found.values(), [])) == list(range(4 * 77))


def test_explain_shows_chunks_and_weights(run, capsys, folder):
    assert cli.main(["a (red:1.5) apple BREAK sky <lora:x", "-m", str(folder), "--explain"]) == 0
    out = capsys.readouterr().out
    assert "The text encoder reads 2 chunks of up to 75 tokens" in out
    assert "  a, red × 1.5, apple\n    320 736 3055\n" in out and "Nothing is cut off" not in out


def test_show_with_weights(run, tmp_path):
    status, out, _ = run("a (red:1.5) apple BREAK sky", "-n", "x", "--show", "seen")
    page = (tmp_path / "seen" / "index.html").read_text()
    assert status == 0 and "<th>red × 1.5" in page and "<th>sky" in page
