"""Guidance rescaled, within an interval, of several prompts; prompts that change on the way."""


import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image

import tiny_sd as sd
from extras import guidance, in_time, like_diffusers, samplers
from helpers_cli import *  # noqa: F403


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ── Guidance ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("phi", [0, 0.3, 0.7, 1])
def test_rescaled_guidance_is_that_of_diffusers(phi):
    uncond, cond = normal(3, 5, 4, 4), 2 + 3 * normal(3, 5, 4, 4, seed=1)
    guided = sd.guide(uncond, cond, 7.5)
    expected = rescale_noise_cfg(torch.tensor(guided), torch.tensor(cond), phi)
    found = guidance.rescaled(phi)(uncond, cond, 7.5)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_several_prompts_are_added_up():
    uncond, one, two = (normal(2, 3, seed=i) for i in range(3))
    found = guidance.composed([0.5, 2.0])(uncond, one, two, 7.0)
    expected = uncond + 7 * (0.5 * (one - uncond) + 2 * (two - uncond))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    alone = guidance.composed([1.0])(uncond, one, 7.0)
    np.testing.assert_allclose(alone, sd.guide(uncond, one, 7.0))


@pytest.fixture(scope="module")
def loaded(model):
    return sd.load(model)


def counting(asked):
    """Return like_diffusers.denoiser, recording the contexts that its denoisers get and use."""
    def make(model, context, *args):
        denoise = like_diffusers.denoiser(model, context, *args)

        def counted(x, t, alpha_bar):
            asked.append((t, context, args[0]))
            return denoise(x, t, alpha_bar)
        return counted
    return make


def test_outside_of_the_interval_the_prompt_alone_is_asked_for(loaded):
    asked = []
    make = guidance.within(counting(asked), 0.2, 0.8)
    *_, x = like_diffusers.generate(loaded, "red", steps=10, sampler="euler", make_denoiser=make)
    assert len(asked) == 10
    prompt = sd.embed_prompts(loaded, ["red"])[0][0]
    for t, contexts, scale in asked:
        inside = 0.2 <= t / 1000 <= 0.8
        assert (len(contexts), scale) == ((2, 7.5) if inside else (1, 1.0))
        np.testing.assert_allclose(contexts[-1], prompt, atol=1e-6)
    assert {len(contexts) for _, contexts, _ in asked} == {1, 2}

    *_, whole = like_diffusers.generate(loaded, "red", steps=10, sampler="euler")
    *_, same = like_diffusers.generate(loaded, "red", steps=10, sampler="euler",
                                       make_denoiser=guidance.within(like_diffusers.denoiser, 0, 1))
    assert np.array_equal(whole, same) and not np.array_equal(whole, x)


def test_several_prompts_are_guided_within_the_interval_too(draw):
    """A prompt in two halves is that prompt."""
    for flags in ["--cfg-interval", "0.2:0.6"], ["--cfg-interval", "0.2:0.6", "-n", "blue"]:
        one, halves = (np.asarray(draw(prompt, "--steps", "4", *flags)).astype(int)
                       for prompt in ("red", "red :0.5 AND red :0.5"))
        assert abs(one - halves).max() <= 1


def test_options_of_guidance(run):
    pictures = []
    for i, flags in enumerate(([], ["--cfg-rescale", "0.7"], ["--cfg-interval", "0.3:0.9"],
                               ["--cfg-rescale", "0.7", "--cfg-interval", "0.3:0.9"])):
        assert run("red", *flags, "-o", f"{i}.png")[0] == 0
        assert run("--like", f"{i}.png", "-o", f"{i}-again.png")[0] == 0
        pictures.append(np.asarray(Image.open(f"{i}.png")))
        assert np.array_equal(pictures[-1], np.asarray(Image.open(f"{i}-again.png")))
    assert len({picture.tobytes() for picture in pictures}) == 4
    facts = Image.open("3.png").info["parameters"]
    assert "CFG rescale: 0.7, CFG interval: 0.3-0.9" in facts


@pytest.mark.parametrize("name, scheduler", [("DDIM CFG++", None), ("euler_cfg_pp", "karras")])
@pytest.mark.parametrize("scale", [0.6, 1.0])
def test_guided_pictures_along_noise_that_is_not(loaded, name, scheduler, scale):
    """CFG++ by the paper's algorithm, and in the coordinates of k-diffusion, as ComfyUI has it."""
    sampler, _ = samplers.sampler_named(name)
    steps = like_diffusers.sampling_steps(sampler, 5, loaded.config.scheduler, loaded.alpha_bars,
                                          scheduler)
    context, _ = sd.embed_prompts(loaded, ["blue", "red"])
    x = like_diffusers.torch_noise([3], (8, 8, 4))()
    if name == "euler_cfg_pp":
        x = x / steps[0][1] ** 0.5
    for t, now, after in steps:
        x_t = x if scheduler is None else x * now ** 0.5
        uncond, cond = (sd.predict(loaded, x_t, t, row[None]) for row in context)
        if scheduler is None:
            guided = uncond + scale * (cond - uncond)
            picture = (x - (1 - now) ** 0.5 * guided) / now ** 0.5
            x = after ** 0.5 * picture + (1 - after) ** 0.5 * uncond
        else:
            sigma, sigma_next = sd.sigma_of(now), sd.sigma_of(after)
            denoised = [x - sigma * eps for eps in (uncond, cond)]
            along = (x - denoised[0]) / sigma
            x = denoised[0] + scale * (denoised[1] - denoised[0]) + along * sigma_next
    *_, found = like_diffusers.generate(loaded, "red", "blue", [3], 5, scale, sampler, scheduler)
    np.testing.assert_allclose(found, x, atol=1e-4)


def test_cfg_pp_on_the_command_line(run, monkeypatch):
    """With its own scale, at the end of every chain of guidance, and again from the picture."""
    monkeypatch.setattr(sd, "FAST", dict(sd.FAST))      # --formulas empties it
    pictures = []
    for i, flags in enumerate(([], ["--cfg-scale", "0.6"], ["--cfg-scale", "1"],
                               ["--cfg-rescale", "0.7", "--cfg-interval", "0.1:1"],
                               ["--formulas"], ["--sampler", "ddim", "--cfg-scale", "0.6"])):
        assert run("red", "--sampler", "ddim_cfg_pp", *flags, "-o", f"{i}.png")[0] == 0
        pictures.append(np.asarray(Image.open(f"{i}.png")).astype(int))
    assert run("--like", "2.png", "-o", "again.png")[0] == 0
    assert np.array_equal(pictures[2], np.asarray(Image.open("again.png")))
    assert np.array_equal(pictures[0], pictures[1]) and abs(pictures[0] - pictures[4]).max() <= 1
    assert len({pictures[i].tobytes() for i in (0, 2, 3, 5)}) == 4
    assert run("[red:blue:1] AND apple", "--sampler", "ddim_cfg_pp", "-o", "t.png")[0] == 0


@pytest.mark.parametrize("flags, said", [
    ("--cfg-rescale 1.5", "--cfg-rescale 1.5"), ("--cfg-rescale nan", "--cfg-rescale nan"),
    ("--cfg-rescale x", "'x'"), ("--cfg-interval 0.8:0.2", "--cfg-interval 0.8:0.2"),
    ("--cfg-interval 0.8", "'0.8'"), ("--cfg-interval nan:1", "--cfg-interval nan:1"),
    ("--cfg-interval 0:2", "--cfg-interval 0:2"), ("--cfg-interval -1:1", "--cfg-interval")])
def test_bad_options_of_guidance(refuse, flags, said):
    assert said in refuse("red", *flags.split())


# ── Prompts in time ─────────────────────────────────────────────────────────────────────────────

AT_TEN_STEPS = {        # {prompt: [(last step, text), ...]}, as in the web UI's own documentation
    "a [b:3]": [(3, "a "), (10, "a b")], "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")], "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")], "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a::4]b": [(4, "ab"), (10, "b")], "[a:b:0.25]": [(2, "a"), (10, "b")],
    "[a:b:1.0]": [(10, "a")], "[a:b:99]": [(10, "a")], "[a:b:0]": [(10, "b")],
    "[a:b:-1]": [(10, "b")], "[a:b: 3 ]": [(3, "a"), (10, "b")], "[b]": [(10, "[b]")],
    r"\[a:b:3\]": [(10, r"\[a:b:3\]")], "[a:b:c:3]": [(10, "[a:b:c:3]")],
    "a | b [c:3]": [(10, "a | b [c:3]")], "[a:b|c:3]": [(10, "[a:b|c:3]")],
    "[(a|b):3]": [(10, "[(a|b):3]")], "[a(b:3]": [(10, "[a(b:3]")], "": [(10, "")],
    "[[a:b:2]:c:5]": [(2, "a"), (5, "b"), (10, "c")]}


@pytest.mark.parametrize("prompt, expected", AT_TEN_STEPS.items())
def test_what_a_prompt_says_at_ten_steps(prompt, expected):
    texts, steps = in_time.texts_of(prompt, 10), iter(expected)
    last, text = next(steps)
    for step, found in enumerate(texts, 1):
        if step > last:
            last, text = next(steps)
        assert found == text
    assert last == 10
    assert in_time.changes(prompt) == (len(expected) > 1 or prompt.count(":") > 1
                                       and len({*texts}) == 1 and texts[0] != prompt)


def test_alternatives():
    assert in_time.texts_of("[a|(b:1.1)]", 5) == ["a", "(b:1.1)"] * 2 + ["a"]
    assert in_time.texts_of("[fe|]male", 3) == ["female", "male", "female"]
    assert in_time.texts_of(f"[a:b:{'9' * 400}]", 2) == ["a", "a"]
    with pytest.raises(sd.UserError, match="after AND is beyond a million"):
        in_time.Timeline(f"a AND b:{'9' * 400}", "", 2, None)
    changing = "".join(f"[a:b:{i}]" for i in range(1, 50)) + " x" * 20_000
    with pytest.raises(sd.UserError, match="becomes 2,002,450 characters over all steps"):
        in_time.Timeline(changing, None, 50, None)      # a context of 100 GB at 999 steps
    assert in_time.texts_of("[a|b|[c:d:3]]", 6) == ["a", "b", "c", "a", "b", "d"]


def test_parts():
    assert in_time.parts_of("a cat :1.2 AND a dog AND b: c : .5") == [
        ("a cat ", 1.2), (" a dog ", 1.0), (" b: c ", 0.5)]
    assert in_time.parts_of("SAND: 3") == [("SAND: 3", 1.0)]
    assert in_time.changes("a AND b") and not in_time.changes("a (b:1.2)", None, "SAND [c]")
    assert in_time.all_words("a [b:[c|d]:3] AND e:2").split() == ["a", "b", "c", "d", "e"]


def test_deep_brackets_are_text():
    for n in (3, 40, 60, 5000):
        text = "[" * n + "a" + ":2]" * n
        assert len({*in_time.texts_of(text, 4)}) == (2 if n < 50 else 1)


@pytest.mark.parametrize("sampler", ["euler", "heun", "restart", "ddpm", "plms"])
def test_a_prompt_that_changes_is_asked_for_in_time(loaded, sampler):
    """Heun calls the network twice per step; changes still happen after whole steps."""
    encoded, rows = [], []

    def embed(model, texts):
        encoded.append(texts)
        return sd.embed_prompts(model, texts)

    def make(model, context, *args):
        denoise = like_diffusers.denoiser(model, context, *args)

        def seen(x, t, alpha_bar):
            rows.append(context)
            return denoise(x, t, alpha_bar)
        return seen

    timeline = in_time.Timeline("[red:apple:2] re", "[a|b]", 4, embed)
    walk = like_diffusers.generate(
        loaded, "", None, steps=4, guidance=3, make_denoiser=timeline.denoiser(make),
        embed=timeline.embed, sampler=samplers.counting(sd.SAMPLERS[sampler], timeline.count))
    assert encoded == [["a", "red re", "b", "apple re"]]
    contexts, _ = sd.embed_prompts(loaded, encoded[0])
    expected = [(0, 1), (2, 1), (0, 3), (2, 3)]
    for i, _ in enumerate(walk):
        assert rows and all(np.array_equal(context, contexts[list(expected[i])])
                            for context in rows)
        rows.clear()


def test_a_prompt_in_time_begins_and_ends_as_its_texts_do(loaded):
    """The first steps are those of the first text; a change after the last step does nothing."""
    def walk(prompt):
        timeline = in_time.Timeline(prompt, None, 6, sd.embed_prompts)
        sampler = samplers.counting(sd.SAMPLERS["euler"], timeline.count)
        return list(like_diffusers.generate(
            loaded, prompt, steps=6, sampler=sampler,
            make_denoiser=timeline.denoiser(like_diffusers.denoiser), embed=timeline.embed))
    red, changed, late = (walk(text) for text in ("red", "[red:apple:4]", "[red:apple:6]"))
    for x, y in zip(red[:4], changed[:4]):
        assert np.allclose(x, y, atol=1e-5)
    assert abs(red[4] - changed[4]).max() > 1e-3
    assert np.allclose(red[-1], late[-1], atol=1e-5)


def test_two_prompts_at_once_are_the_formula(loaded):
    timeline = in_time.Timeline("red :0.5 AND apple", "re", 3, sd.embed_prompts)
    make = guidance.combining(like_diffusers.denoiser, timeline.combine)
    context, pooled = timeline.embed(loaded, ["re", ""])
    denoise = timeline.denoiser(make)(loaded, context, 4.0, pooled, None)
    x, a = normal(2, 8, 8, 4), loaded.alpha_bars[500]

    def ask(text):
        return like_diffusers.denoiser(loaded, sd.embed_prompts(loaded, [text])[0])(x, 500, a)[1]
    uncond, red, apple = map(ask, ("re", "red ", " apple"))
    expected = uncond + 4 * (0.5 * (red - uncond) + apple - uncond)
    np.testing.assert_allclose(denoise(x, 500, a)[1], expected, atol=1e-4 * abs(expected).max())


def test_a_batch_and_one_encoder_for_each_text(run, monkeypatch):
    """On the command line: two seeds, one text encoder's run for all the texts."""
    calls = []
    encoder = sd.text_encoder
    monkeypatch.setattr(sd, "text_encoder", lambda ids, *args: calls.append(len(ids)) or
                        encoder(ids, *args))
    status, out, _ = run("[red|apple] re", "-b", "2", "--steps", "4")
    assert status == 0 and len(out) == 2 and calls == [3]       # and the negative prompt
    assert run("red AND apple", "-o", "a.png", "--cfg-scale", "1")[0] == 0
    assert run("red AND apple", "-o", "b.png", "--plain-prompt")[0] == 0
    assert run("--like", "a.png", "-o", "c.png")[0] == 0
    a, b, c = (np.asarray(Image.open(f"{name}.png")) for name in "abc")
    assert np.array_equal(a, c) and not np.array_equal(a, b)


@pytest.mark.parametrize("argv, said", [
    (["[a|b]", "--show", "page"], "--show"), (["[a|b]" * 1001], "a thousand places")])
def test_what_prompts_in_time_cannot_do(refuse, argv, said):
    assert said in refuse(*argv)
