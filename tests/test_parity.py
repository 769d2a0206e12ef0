"""Equal to the reference libraries.

Every part of tiny_sd.py against diffusers, transformers and torch, on both backends.
"""

import dataclasses
import itertools
import random
import unicodedata
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import tiny_sd
from conftest import ROOT, SCHEDULER, TEXT, make_unet, name_of, same, with_torch_too
from extras import formats, like_diffusers, samplers
from extras.tools import models
from helpers import drawn, shapes_of
from helpers_diffusers import (  # noqa: F401  (no_gradients is a fixture of all tests)
    PROMPT,
    arrays,
    drawn_by,
    first,
    last,
    no_gradients,
    same_pictures,
    some_picture,
)
from layers import network

CLASSES = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler,
           "euler": diffusers.EulerDiscreteScheduler,
           "euler_a": diffusers.EulerAncestralDiscreteScheduler,
           "dpm++2m": diffusers.DPMSolverMultistepScheduler, "plms": diffusers.PNDMScheduler,
           "lcm": diffusers.LCMScheduler, "heun": diffusers.HeunDiscreteScheduler,
           "dpm++2msde": diffusers.DPMSolverMultistepScheduler,
           "unipc": diffusers.UniPCMultistepScheduler, "tcd": diffusers.TCDScheduler}
OPTIONS = {"plms": {"skip_prk_steps": True}, "dpm++2msde": {"algorithm_type": "sde-dpmsolver++"},
           "karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}
SAMPLERS = [
    *((name, None) for name in CLASSES), ("euler", "karras"), ("dpm++2m", "karras"),
    ("heun", "exponential"), ("unipc", "karras"), ("dpm++2msde", "exponential"),
]  # and schedules


# ── Tokenizer ─────────────────────────────────────────────────────────────────────────────────────

TEXTS = ["", " ", "hello world", "A Photo of a CAT", "it's they'LL 'S we've!!'s don''t",
         "x² ½ Ⅷ 12345 3.14", "ΟΔΟΣ ΣΊΣΥΦΟΣ", "İstanbul ǅ ǆ", "ﬁ ﬀ ﷺ", "e\u0301 \u0344 \u0345a",
         "ß ẞ", "ᾳ ᾼ", "🍎🍎🏽 👨‍👩‍👧 🇫🇷", "日本語テキスト", "नमस्ते", "한국어", "𝐀𝐁", "_a_b__",
         "a\x00b\x07c\ud7ff", "a\x1cb\x1db\x1fc\x85d\u180ee\u200bf", "\u3000x\u2028y\u00a0z",
         "\t a \r\n b ", "a" * 300, "<|startoftext|><|endoftext|>", "a<|endoftext|>b",
         "<|endoftext|> a <|startoftext|>b", "!!<|endoftext|>!!", "<|ENDOFTEXT|>", "<|endoftext",
         "|><|endoftext|><|"]


def assigned(low, high):
    """The characters from low to high that this Python knows.

    Of newer ones the reference may know; private use is dull.
    """
    return [chr(c) for c in range(low, high)
            if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]


def without_new_marks(characters):
    """Leave out combining marks newer than Unicode 3.2: the reference may order them otherwise."""
    return [c for c in characters if unicodedata.combining(c) == unicodedata.ucd_3_2_0.combining(c)]


def same_ids(ours, reference, texts):
    for text, ids in zip(texts, reference(texts, add_special_tokens=False).input_ids):
        assert ours.tokens(text) == ids, repr(text)


@pytest.fixture(scope="module")
def tokenizer():
    return formats.clip_tokenizer()


def test_vocabulary(tokenizer, reference):
    assert len(tokenizer.vocab) == 49408 == len(set(tokenizer.vocab.values()))
    assert tokenizer.vocab == reference.tokenizer.get_vocab()
    assert tokenizer.tokens("a photo of a cat") == [
        320, 1125, 539, 320, 2368,
    ]  # as published with CLIP
    assert (tokenizer.vocab[tokenizer.BOS], tokenizer.vocab[tokenizer.EOS],
            tokenizer.pad) == (49406, 49407, 49407)


def test_tokenizer_on_hard_texts(tokenizer, reference):
    same_ids(tokenizer, reference.tokenizer, TEXTS)


@pytest.mark.slow
def test_tokenizer_on_every_character(tokenizer, reference):
    """Each in a row with its neighbours, and each but Han and Hangul between letters and digits."""
    characters = assigned(0, 0x30000)
    assert len(characters) > 100_000
    rows = without_new_marks(characters)
    same_ids(tokenizer, reference.tokenizer,
             ["".join(rows[i : i + 100]) for i in range(0, len(rows), 100)])
    alone = [f"a{c}b {c}1{c}" for c in characters
             if not "\u3400" <= c <= "\ud7a3" and c < "\U00020000"]
    same_ids(tokenizer, reference.tokenizer,
             ["".join(alone[i : i + 20]) for i in range(0, len(alone), 20)])


@pytest.mark.slow
def test_tokenizer_on_random_texts(tokenizer, reference):
    chance = random.Random(0)
    ascii, other = assigned(32, 127), without_new_marks(assigned(0, 0x20000))
    pool = (ascii * 20 + chance.choices(other, k=2000) + chance.choices(other[:10_000], k=2000)
            + [" ", "'"] * 200)
    texts = ["".join(chance.choices(pool, k=chance.randrange(1, 40))) for _ in range(2000)]
    for i in range(0, 2000, 10):
        texts[i] += chance.choice(["<|endoftext|>", "<|startoftext|>"]) + texts[i - 1]
    same_ids(tokenizer, reference.tokenizer, texts)


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_padding_and_truncation(pad, reference, tmp_path):
    """Stable Diffusion 1 pads with the end of text, 2 with "!"."""
    words = ["red", "12", "x²", "日本", "apple,"]
    texts = [" ".join(words[i % 5] for i in range(n))
             for n in (0, 1, 10, 30, 37, 38, 39, 40, 41, 42, 50, 200)]
    reference.tokenizer.save_pretrained(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path, pad_token=pad)
    ours = tiny_sd.Tokenizer(formats.clip_tokenizer().rank, pad=pad)
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True).input_ids
    cuts = []
    for text, ids in zip(texts, expected):
        found, cut = ours.encode(text)
        assert found.tolist() == ids
        cuts.append(cut)
        whole = theirs(text, add_special_tokens=False).input_ids
        assert (bool(cut) == (len(whole) > 75)
                and theirs(cut, add_special_tokens=False).input_ids == whole[75:])
    assert any(cuts) and not all(cuts)


# ── Text encoder, VAE, U-Net ──────────────────────────────────────────────────────────────────────

def test_text_encoder(model, reference):
    texts = ["a photo of a cat", "", "日本語 " * 50]
    ids = reference.tokenizer(texts, padding="max_length", truncation=True,
                              return_tensors="pt").input_ids
    expected = reference.text_encoder(ids)[0]
    same("text encoder", tiny_sd.to_numpy(tiny_sd.embed_prompts(model, texts)[0]), expected, 1e-5)


def test_text_encoder_of_other_sizes(folder_with, backend, reference):
    """As of Stable Diffusion 2: the exact GELU, and heads of another size."""
    config = transformers.CLIPTextConfig(**{**TEXT, "hidden_act": "gelu", "num_attention_heads": 4,
                                            "num_hidden_layers": 2})
    torch.manual_seed(0)
    encoder = transformers.CLIPTextModel(config).eval()
    ids = reference.tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
    model = formats.load(folder_with(text_encoder=encoder), backend)
    context, _ = tiny_sd.embed_prompts(model, ["a cat"])
    same("text encoder", tiny_sd.to_numpy(context), encoder(ids)[0], 1e-5)


def test_vae_encoder(model, backend, reference):
    image, = arrays(backend, np.random.default_rng(0).uniform(-1, 1, (3, 104, 72, 3)))
    expected = reference.vae.encode(first(image)).latent_dist
    mean, logvar = tiny_sd.vae_encode(image, model.vae, 32)
    same("VAE encoder", mean, last(expected.mean), 2e-5)
    same("VAE encoder", logvar, last(expected.logvar), 2e-5)


def test_vae_decoder(model, backend, reference):
    z, = arrays(backend, np.random.default_rng(0).normal(size=(3, 13, 9, 4)))
    expected = reference.vae.decode(first(z)).sample
    same("VAE decoder", tiny_sd.vae_decode(z, model.vae, 32), last(expected), 2e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"use_linear_projection": True, "attention_head_dim": (2, 4, 6, 8)},
                {"in_channels": 9}, {"layers_per_block": 1}],
    ids=["as Stable Diffusion 1", "as Stable Diffusion 2", "as for inpainting", "shallow"])
def test_unet(changes, folder_with, model, backend, reference):
    """At odd sizes too, where the way up must return to the sizes of the way down.

    Each picture at its own time.
    """
    network = make_unet(**changes) if changes else reference.unet
    model = formats.load(folder_with(unet=network), backend) if changes else model
    heads = network.config.attention_head_dim
    heads = heads if isinstance(heads, tuple) else [heads] * 4
    for size in (13, 9), (8, 16), (5, 3):
        chance = np.random.default_rng(0)
        x, t, context = arrays(backend, chance.normal(size=(3, *size, network.config.in_channels)),
                               np.array([1, 500, 981]), chance.normal(size=(3, 77, 128)))
        expected = network(first(x), torch.as_tensor(t), torch.as_tensor(context)).sample
        temb = model.embed_time(model, x, t)
        ours = tiny_sd.unet(x, temb, context, heads, 32, **model.unet)
        same("U-Net", ours, last(expected), 2e-5)


# ── Samplers ──────────────────────────────────────────────────────────────────────────────────────

def options(sampler, schedule):
    return OPTIONS.get(sampler, {}) | OPTIONS.get(schedule, {})


def reference_trajectory(scheduler, x, steps, seed):
    """Each (t, x_t) of a diffusers scheduler, scaled so that signal and noise variance sum to 1."""
    scheduler.set_timesteps(steps)
    stream = torch.Generator().manual_seed(seed)
    takes = {"generator": stream} if "generator" in scheduler.step.__code__.co_varnames else {}
    twice = (
        isinstance(scheduler, diffusers.PNDMScheduler) and steps > 1
    )  # its first step, whose first end is not yet x_t
    heun = isinstance(scheduler, diffusers.HeunDiscreteScheduler)   # two a step, but the last
    divided = heun or isinstance(scheduler, (diffusers.EulerDiscreteScheduler,
                                             diffusers.EulerAncestralDiscreteScheduler))
    if divided:      # by √ᾱ
        x = x * (1 + scheduler.sigmas[0] ** 2) ** 0.5
    for i, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, **takes).prev_sample
        if twice and i == 0 or heun and i % 2 == 0 and i + 1 < len(scheduler.timesteps):
            continue
        began = twice and i == 1 or heun and i % 2
        yield (float(scheduler.timesteps[i - 1] if began else t),
               last(x / (1 + scheduler.sigmas[i + 1] ** 2) ** 0.5 if divided else x))


# ddim and plms step to levels where no step begins; PNDMScheduler extrapolates v itself, ours the
# noise, whatever the model predicts
@pytest.mark.parametrize("sampler, schedule, spacing, kind", [
    (*sampler, spacing, kind) for sampler in SAMPLERS
    for spacing in ("leading", "trailing", "linspace") for kind in ("epsilon", "v_prediction")
    if (sampler[0], spacing) not in (("ddim", "linspace"), ("plms", "linspace"))
    and (sampler[0], kind) != ("plms", "v_prediction")])
def test_trajectory(sampler, schedule, spacing, kind):
    """Each x_t of the whole way, the stream of noise included."""
    bars = tiny_sd.scaled_linear_schedule()

    def denoise(x, t, a):
        return tiny_sd.split_prediction(kind, network(x, t), x, a)
    denoise.alpha_bars = bars

    counts = (20, 1, 2, 20, 50, *((7, 30) if spacing == "leading" else ()))
    for steps, alpha_to_one in zip(counts, itertools.cycle((False, True))):
        config = {**SCHEDULER, "prediction_type": kind, "timestep_spacing": spacing,
                  "steps_offset": int(not alpha_to_one), "set_alpha_to_one": alpha_to_one}
        scheduler = CLASSES[sampler].from_config(config, **options(sampler, schedule))
        ours = tiny_sd.read_config("scheduler", config)
        levels = like_diffusers.sampling_steps(sampler, steps, ours, bars, schedule)
        stream = like_diffusers.Noise(7)
        x = np.random.default_rng(0).normal(size=(1, 6, 5, 4)).astype(np.float32)
        path = tiny_sd.SAMPLERS[sampler](denoise, x, levels,
                                         lambda stream=stream: stream(6, 5, 4)[None])
        expected = reference_trajectory(scheduler, first(x), steps, 7)
        for (t, _, _), ours, (their_t, theirs) in zip(levels, path, expected, strict=True):
            assert abs(t - their_t) < 2e-3
            same(f"x_t of {sampler}, {schedule}", ours, theirs, 2e-5)


# ── Seeds ─────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("seed", [0, 1, 42, 2 ** 31, 2 ** 32 - 1, 2 ** 32 + 5, 2 ** 63 + 9])
def test_noise(seed):
    """Also the second and third draw, with sizes that are not multiples of 16."""
    ours, stream = like_diffusers.Noise(seed), torch.Generator().manual_seed(seed)
    for h, w in ((64, 64), (13, 9), (2, 2), (9, 5), (13, 9)):
        same("noise", ours(h, w, 4), last(torch.randn(1, 4, h, w, generator=stream))[0], 5e-7)


# ── Names and sizes of the true Stable Diffusion 1.5 ──────────────────────────────────────────────

NETWORKS = {    # and how many numbers each has
    "text_encoder": (lambda **config: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**config)), 123_060_480),
    "vae": (diffusers.AutoencoderKL, 83_653_863),
    "unet": (diffusers.UNet2DConditionModel, 859_520_964)}


@pytest.mark.parametrize("part", NETWORKS)
def test_parameters_of_stable_diffusion(part):
    config, (network, count) = models.sd15()[part], NETWORKS[part]
    with torch.device("meta"):
        theirs = {name.removeprefix("text_model."): tuple(p.shape)
                  for name, p in network(**config).named_parameters()}
    assert shapes_of(part, config) == theirs
    assert sum(map(np.prod, theirs.values())) == count


# ── Whole pictures ────────────────────────────────────────────────────────────────────────────────

PICTURE = {"prompt": PROMPT, "negative": "a dog", "seeds": (5,), "steps": 6,
           "guidance": 7.5, "sampler": "ddim", "schedule": None, "width": 72, "height": 104,
           "init": None, "strength": 0.5, "kind": "epsilon"}
CHANGES = [*({"sampler": sampler, "schedule": schedule} for sampler, schedule in SAMPLERS),
           {"width": None, "height": None}, {"width": 128, "height": 64, "steps": 1},
           {"guidance": 1.0}, {"seeds": (8, 2**40)}, {"seeds": (8, 3), "sampler": "euler_a"},
           {"prompt": "ein Bär, ½ 日本 " * 30, "negative": ""}, {"kind": "v_prediction"}]
FROM_PICTURES = [*({"sampler": sampler} for sampler in CLASSES if sampler != "plms"),
                 {"sampler": "unipc", "schedule": "karras"}, {"strength": 1.0, "sampler": "euler"},
                 {"seeds": (8, 3), "sampler": "ddpm"}, {"width": 128, "height": 64}]
FROM_PICTURES = [{"init": 1, "steps": 8, **change} for change in FROM_PICTURES]


@pytest.fixture(scope="session")
def reference_pictures(reference):
    """Draws with diffusers; each picture once."""
    drawn = {}

    def draw(**changes):
        key = tuple((PICTURE | changes).items())
        if key not in drawn:
            drawn[key] = draw_with(reference, **PICTURE | changes)
        return drawn[key]
    return draw


def draw_with(pipe, prompt, negative, seeds, steps, guidance, sampler, schedule, width, height,
              init, strength, kind):
    scheduler = CLASSES[sampler].from_config(
        pipe.scheduler.config, timestep_spacing="leading", clip_sample=False, prediction_type=kind,
        **options(sampler, schedule))
    takes = {"width": width, "height": height}
    cls = diffusers.StableDiffusionPipeline
    if init:
        cls = diffusers.StableDiffusionImg2ImgPipeline
        takes = {"image": Image.fromarray(some_picture(init, width, height)), "strength": strength}
    pipe = cls(**{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False)
    takes |= {"eta": samplers.GAMMA} if sampler == "tcd" else {}    # a pipeline's own is 0
    images = pipe(prompt, negative_prompt=negative, num_images_per_prompt=len(seeds),
                  generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                  num_inference_steps=steps, guidance_scale=guidance, **takes).images
    return np.stack(list(map(np.asarray, images)))


def draw(model, prompt, negative, seeds, steps, guidance, sampler, schedule, width, height, init,
         strength, kind):
    scheduler = SimpleNamespace(**vars(model.config.scheduler) | {"prediction_type": kind})
    config = SimpleNamespace(**vars(model.config) | {"scheduler": scheduler})
    model = dataclasses.replace(model, config=config)
    init = some_picture(init, width, height) if init else None
    return drawn(model, prompt, negative, seeds, steps, guidance, sampler, schedule, width, height,
                 init, strength)


@pytest.mark.slow
@with_torch_too("changes", CHANGES, CHANGES[:1] + CHANGES[len(SAMPLERS):])
def test_text_to_image(changes, model, reference_pictures):
    same_pictures("pictures from text", draw(model, **PICTURE | changes),
                  reference_pictures(**changes))


@pytest.mark.slow
@with_torch_too("changes", FROM_PICTURES, FROM_PICTURES[:1] + FROM_PICTURES[-3:])
def test_image_to_image(changes, model, reference_pictures):
    same_pictures("pictures from pictures", draw(model, **PICTURE | changes),
                  reference_pictures(**changes))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"prompt": "a photo of a car"}, {"negative": "a tree"},
                                     {"seeds": (6,)}, {"steps": 7}, {"guidance": 1.0},
                                     {"kind": "v_prediction"}, {"sampler": "ddpm"}, {"init": 1},
                                     {"init": 2}, {"init": 1, "strength": 0.9}], ids=name_of)
def test_the_reference_answers(changes, reference_pictures):
    """Every setting changes the picture; otherwise equal pictures would show nothing."""
    like = {"init": 1} if "strength" in changes or changes.get("init") == 2 else {}
    one, other = reference_pictures(**like), reference_pictures(**changes)
    assert np.abs(one.astype(int) - other).mean() > 2


# ── The model that comes with the file ────────────────────────────────────────────────────────────

EMOJI = ROOT / "weights" / "emoji"
PROMPTS = ["red apple", "red apple on a blue background", "smiling face", "a dog, 3 cats & ünïcode"]


@pytest.fixture(scope="module")
def bundled_reference():
    return diffusers.StableDiffusionPipeline.from_pretrained(EMOJI)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_bundled_model(prompt, backend, bundled_reference):
    """diffusers loads the folder unchanged, and draws the same picture with its own sampler."""
    sampler = next(name for name, cls in CLASSES.items()
                   if isinstance(bundled_reference.scheduler, cls))
    expected = drawn_by(bundled_reference, seed=3, prompt=prompt, negative_prompt="blue",
                        num_inference_steps=10, guidance_scale=5.0)
    ours = drawn(formats.load(EMOJI, backend), prompt, "blue", (3,), 10, 5.0, sampler)
    same_pictures("pictures of weights/emoji", ours, expected)
