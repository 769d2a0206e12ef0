"""Using another VAE: TAESD against diffusers', and every layout of both kinds."""

import copy
import functools
import itertools
import json
import math
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny_sd
from conftest import VAE, compvis_vae_name, randomise, same, with_torch_too
from extras import cli, formats, like_diffusers, shapes, tiny_vae
from extras.formats import read_vae
from helpers import drawn
from helpers_cli import write_facts
from helpers_diffusers import PROMPT, drawn_by, first, last, same_pictures

pytestmark = pytest.mark.slow

WEIGHTS = "diffusion_pytorch_model.safetensors"
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(256, size=(4, 5, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
NONE = np.float32(0)        # the noise of a VAE without variance


@pytest.fixture(scope="module")
def taesd():
    """A small TAESD with random weights, by diffusers."""
    torch.manual_seed(5)
    network = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    network = randomise(network, 6, weight=1.3)
    network.decoder.layers[0].weight.data *= 4
    return network


@pytest.fixture(scope="module")
def tiny(taesd, tmp_path_factory):
    """The same, as the folder that diffusers writes."""
    path = tmp_path_factory.mktemp("tiny") / "taesd"
    taesd.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def halves(tiny, tmp_path_factory):
    """The same, as the two original files: the folder that they are in."""
    path = tmp_path_factory.mktemp("halves")
    for side, arrays in original(load_file(tiny / WEIGHTS)).items():
        save_file(arrays, path / f"taesd_{side}.safetensors")
    return path


def original(arrays):
    """Return {side: {original name: array}} of a TAESD; the decoder there starts with a tanh."""
    sides = {"encoder": {}, "decoder": {}}
    for name, array in arrays.items():
        side, _, number, rest = name.split(".", 3)
        sides[side][f"{int(number) + (side == 'decoder')}.{rest}"] = array
    return sides


@pytest.fixture(scope="module")
def other():
    """An ordinary VAE that is not the model's, by diffusers."""
    torch.manual_seed(8)
    return randomise(diffusers.AutoencoderKL(**VAE | {"scaling_factor": 0.25}), 9)


@pytest.fixture
def other_folder(other, tmp_path):
    other.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def load(folder, vae, backend="numpy"):
    return formats.load(folder, backend, vae=read_vae(str(vae)))


def pixels_of(sample):
    """A reference's picture in [-1, 1] as one of 0 to 255."""
    return ((last(sample) / 2 + 0.5).clip(0, 1) * 255).round()


# ── TAESD ───────────────────────────────────────────────────────────────────────────────────────


def test_both_halves_equal_diffusers(folder, tiny, taesd, backend):
    model = load(folder, tiny, backend)
    with torch.no_grad():
        latents = taesd.encode(first(PICTURE[None] / 127.5 - 1)).latents
        ours = tiny_sd.encode(model, PICTURE, NONE)
        same("TAESD's encoder", ours, last(latents), 1e-5)
        x = 3 * RNG.normal(size=(2, 7, 9, 4)).astype(np.float32)
        ours = tiny_sd.to_numpy(model.vae_decode(x, model.vae, 1))
        sample = taesd.decode(first(x)).sample
    same("TAESD's decoder", ours, last(sample), 1e-5)
    decoded = tiny_sd.decode(model, x)
    assert decoded.dtype == np.uint8 and abs(decoded - pixels_of(sample)).max() <= 1


def test_no_variance(folder, tiny):
    model = load(folder, tiny)
    noisy = tiny_sd.encode(model, PICTURE, RNG.normal(size=(1, 8, 10, 4)))
    assert np.array_equal(noisy, tiny_sd.encode(model, PICTURE, NONE))


def test_pictures_equal_diffusers(folder, tiny, taesd, reference, backend):
    model = load(folder, tiny, backend)
    pipe = diffusers.StableDiffusionPipeline(**reference.components | {"vae": taesd},
                                             requires_safety_checker=False)
    theirs = drawn_by(pipe, seed=7, height=64, width=64, num_inference_steps=3, guidance_scale=4)
    ours = drawn(model, PROMPT, "", [7], 3, 4, "ddim")
    same_pictures("pictures with TAESD", ours, theirs)


def test_image_to_image_starts_from_its_latents(folder, tiny, taesd, backend):
    """Noised by the second noise that a seed gives; the first is that of a VAE with variance."""
    seen = []

    def denoiser(model, *_):
        def denoise(x_t, t, alpha_bar):
            seen.append((x_t, alpha_bar))
            return x_t, x_t
        return denoise

    model = load(folder, tiny, backend)
    list(like_diffusers.generate(model, "a", seeds=[7], steps=4, init=PICTURE,
                                 make_denoiser=denoiser))
    noise = like_diffusers.torch_noise([7], (8, 10, 4))
    noise()
    (x_t, alpha_bar), *_ = seen
    with torch.no_grad():
        latents = last(taesd.encode(first(PICTURE[None] / 127.5 - 1)).latents)
    same("TAESD's start", x_t, tiny_sd.add_noise(latents, alpha_bar, noise()), 1e-5)


def multiplications(vae, decode, shape, monkeypatch):
    """Return how many multiplications a decoder's layers take, without computing them."""
    total = 0

    def layer(x, weight, bias=None, stride=1, padding=(1, 1)):
        nonlocal total
        out, *kernel = np.shape(weight)
        y = np.broadcast_to(np.float32(0), (*x.shape[:-1], out))
        total += y.size * math.prod(kernel)
        return y

    def attention(q, k, v, causal=False):
        nonlocal total
        total += 2 * q.size * k.shape[-2]
        return q

    for module in tiny_sd, tiny_vae:
        monkeypatch.setattr(module, "conv2d", layer)
    monkeypatch.setattr(tiny_sd, "linear", layer)
    monkeypatch.setattr(tiny_sd, "dot_product_attention", attention)
    monkeypatch.setattr(tiny_sd, "group_norm", lambda x, *_, **weights: x)
    monkeypatch.setattr(tiny_sd, "silu", lambda x: x)
    decode(np.broadcast_to(np.float32(0), shape), vae, 32)
    return total


def empty(shapes):
    flat = {name: np.broadcast_to(np.float32(0), shape)
            for name, shape in tiny_sd.flatten(shapes).items()}
    return tiny_sd.nest({name: array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
                         for name, array in flat.items()})


def test_a_twentieth_of_the_vaes_multiplications(monkeypatch):
    """With the channels of Stable Diffusion."""
    config = tiny_sd.read_config("vae", {"block_out_channels": [128, 256, 512, 512],
                                         "layers_per_block": 2, "latent_channels": 4})
    full, small = empty(shapes.vae_shapes(config)), empty(
        {"decoder": tiny_vae.tiny_shapes(tiny_vae.DECODER, 4, 64, 3)})
    assert sum(a.size for a in tiny_sd.flatten(small).values()) == 1_222_531
    shape = 1, 16, 16, 4
    much = multiplications(full, tiny_sd.vae_decode, shape, monkeypatch)
    little = multiplications(small, tiny_vae.decode, shape, monkeypatch)
    assert 0.03 < little / much < 0.07


@pytest.mark.parametrize("name", ["taesd_decoder.safetensors", "taesd_encoder.safetensors"])
def test_the_original_files(name, halves, tiny):
    ours, theirs = read_vae(str(halves / name)), read_vae(str(tiny))
    assert ours.settings == theirs.settings and ours.arrays.keys() == theirs.arrays.keys()
    assert all(np.array_equal(ours.arrays[key], theirs.arrays[key]) for key in theirs.arrays)


@with_torch_too("dtype, suffix", itertools.product([torch.float16, torch.bfloat16],
                                                   [".safetensors", ".pth"]),
                [(torch.bfloat16, ".pth")])
def test_half_precision_and_pickles(dtype, suffix, taesd, tmp_path, folder, backend):
    """As the published files: half precision, and .pth in the original repository."""
    network = copy.deepcopy(taesd).to(dtype)
    arrays = network.state_dict()
    for side, half in original(arrays).items():
        path = tmp_path / f"taesd_{side}{suffix}"
        save_file(half, path) if suffix == ".safetensors" else torch.save(half, path)
    x = RNG.normal(size=(1, 4, 4, 4)).astype(np.float32)
    with torch.no_grad():
        expected = pixels_of(network.float().decode(first(x)).sample)
    for low_memory in {False, backend == "numpy"}:
        model = formats.load(folder, backend, vae=read_vae(str(path)), low_memory=low_memory)
        assert abs(tiny_sd.decode(model, x) - expected).max() <= 1


def test_a_decoder_alone_draws_but_reads_no_picture(halves, tmp_path, folder):
    model = load(folder, shutil.copy(halves / "taesd_decoder.safetensors", tmp_path))
    assert drawn(model, "a cat", steps=1).shape == (1, 64, 64, 3)
    with pytest.raises(tiny_sd.UserError, match="encoder's file next to"):
        like_diffusers.generate(model, "a cat", steps=2, init=PICTURE)
    alone = tmp_path / "alone"
    alone.mkdir()
    path = shutil.copy(halves / "taesd_encoder.safetensors", alone)
    with pytest.raises(tiny_sd.UserError, match="no decoder"):
        read_vae(str(path))


def test_weights_stay_in_their_file(tiny, folder):
    model = load(folder, tiny)
    assert str(tiny / WEIGHTS) in model.files
    assert not any("/vae/" in path for path in model.files)


# ── Any other VAE ───────────────────────────────────────────────────────────────────────────────


def original_vae(folder):
    """Return a VAE's weights under the original names, with attention by 1x1 convolutions."""
    arrays = {}
    for name, array in load_file(folder / WEIGHTS).items():
        name = compvis_vae_name(name)
        arrays[name] = array[:, :, None, None] if "attn_1" in name and array.ndim == 2 else array
    return arrays


def more(arrays):
    """As in vae-ft-mse-840000-ema-pruned.safetensors, and older files."""
    return {**arrays, "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight":
            torch.zeros(3), "model_ema.decay": torch.zeros(())}


LAYOUTS = {     # name: (ending, what to make of the folder's arrays and the original ones)
    "diffusers": (".safetensors", lambda new, old: new),
    "original": (".safetensors", lambda new, old: old),
    "original and more": (".safetensors", lambda new, old: more(old)),
    "within a model": (".safetensors", lambda new, old: {
        **{f"first_stage_model.{name}": array for name, array in old.items()},
        "model.diffusion_model.out.2.bias": torch.zeros(4)}),
    "a pickle": (".ckpt", lambda new, old: {"epoch": 1, "state_dict": more(old)}),
    "half": (".safetensors", lambda new, old: {name: a.bfloat16() for name, a in new.items()}),
}


@with_torch_too("layout", LAYOUTS, ["within a model", "half"])
def test_every_layout_of_a_vae(layout, folder, other, other_folder, tmp_path, backend, capsys):
    """Decodes and encodes as diffusers does, with the model's own scale."""
    suffix, change = LAYOUTS[layout]
    path = tmp_path / f"vae{suffix}"
    arrays = change(load_file(other_folder / WEIGHTS), original_vae(other_folder))
    torch.save(arrays, path) if suffix == ".ckpt" else save_file(arrays, path)
    capsys.readouterr()
    model = load(folder, path, backend)
    said = capsys.readouterr().err
    assert ("loss.logvar" in said and said.count("\n") == 1) == ("model_ema.decay" in str(arrays))
    assert model.config.vae.scaling_factor == 0.18215
    check_vae(model, other.bfloat16().float() if layout == "half" else other, 0.18215)


def check_vae(model, network, scale):
    x = RNG.normal(size=(1, 4, 6, 4)).astype(np.float32)
    picture = RNG.integers(256, size=(40, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        sample = network.decode(first(x) / scale).sample
        mean = network.encode(first(picture[None] / 127.5 - 1)).latent_dist.mean
    assert abs(tiny_sd.decode(model, x) - pixels_of(sample)).max() <= 1
    same("another VAE", tiny_sd.encode(model, picture, NONE), scale * last(mean), 2e-5)


def test_a_single_file_that_comes_without_a_vae(single_file, folder, tmp_path):
    """With one it draws the same as with the whole file; without, it says what to do."""
    arrays = load_file(single_file("F32"))
    bare = {name: a for name, a in arrays.items() if not name.startswith("first_stage_model.")}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(tiny_sd.UserError, match="has no VAE: give one with --vae"):
        formats.load(tmp_path / "bare.safetensors")
    models = formats.load(single_file("F32")), load(tmp_path / "bare.safetensors", folder)
    one, other = (drawn(model, "a cat", steps=2, width=64, height=64) for model in models)
    assert (one == other).all()


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_has_its_own_scale(inside, folder, other, other_folder, tmp_path):
    path = other_folder
    if inside:
        (tmp_path / "model").mkdir()
        path = other_folder.rename(tmp_path / "model/vae").parent
    model = load(folder, path)
    assert model.config.vae.scaling_factor == 0.25
    check_vae(model, other, 0.25)


def test_the_half_precision_file_of_a_folder(folder, other_folder):
    (other_folder / WEIGHTS).rename(other_folder / WEIGHTS.replace(".", ".fp16.", 1))
    assert load(folder, other_folder).config.vae.scaling_factor == 0.25


def test_the_rest_of_the_model_is_what_it_was(folder, other_folder, tiny):
    plain = formats.load(folder)
    for vae in other_folder, tiny:
        model = load(folder, vae)
        for part in lambda m: m.unet, lambda m: m.encoders[0].weights:
            ours, theirs = (tiny_sd.flatten(part(m)) for m in (model, plain))
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


# ── From the hub ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name, repository", [
    ("taesd", "madebyollin/taesd"), ("taesdxl", "madebyollin/taesdxl"),
    ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse")])
def test_names_on_the_hub(name, repository, tiny, tmp_path, monkeypatch):
    """Files in the cache are used; otherwise a line says what to fetch."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(tiny_sd.UserError, match=f"config.json and {WEIGHTS} of {repository}"):
        read_vae(name)
    cache = tmp_path / f"models--{repository.replace('/', '--')}"
    shutil.copytree(tiny, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0" * 40)
    assert tiny_vae.is_tiny(read_vae(name).arrays)


# ── The command line ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(folder, tmp_path, monkeypatch, command):
    """run(argument, ...) -> (status, lines on stdout, lines on stderr), in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return functools.partial(command, "a cat", "-m", folder, "--steps", "2")


def test_it_draws_with_another_vae_and_repeats_it(run, folder, halves, other_folder):
    shutil.copytree(halves, "vae")
    shutil.copy(other_folder / WEIGHTS, "vae/mine.safetensors")
    pictures = {}
    for name, argv in {"own": [], "tiny": ["--vae", "vae/taesd_decoder.safetensors"],
                       "mine": ["--vae", "vae/mine.safetensors"]}.items():
        assert run(*argv, "-o", f"{name}.png")[0] == 0
        pictures[name] = np.asarray(Image.open(f"{name}.png"))
    assert not any(np.array_equal(pictures["own"], pictures[name]) for name in ("tiny", "mine"))
    assert "VAE: mine.safetensors," in Image.open("mine.png").text["parameters"]
    assert "VAE:" not in Image.open("own.png").text["parameters"]

    for name in "tiny", "mine":
        assert cli.main(["--like", f"{name}.png", "-m", str(folder), "-o", "again.png"]) == 0
        assert np.array_equal(np.asarray(Image.open("again.png")), pictures[name])
        Path("again.png").unlink()
    assert cli.main(["--like", "mine.png", "-m", str(folder), "-o", "again.png", "--vae",
                     "vae/taesd_decoder.safetensors"]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), pictures["tiny"])


def test_a_recorded_vae_that_is_not_there_is_told(run, folder, tiny, capsys):
    shutil.copytree(tiny, "mine")
    assert run("--vae", "mine", "-o", "a.png")[0] == 0
    capsys.readouterr()
    assert cli.main(["--like", "a.png", "-m", str(folder), "-o", "b.png"]) == 0
    assert "VAE mine is not repeated: give it with --vae" in capsys.readouterr().err


def test_a_recorded_alias_is_taken_up(run):
    facts = "red\nSteps: 1, Sampler: Euler, Seed: 1, Size: 8x8, Model: emoji, RNG: CPU, VAE: "
    write_facts("a.png", facts + "taesdxl")
    args = cli.make_job(["--like", "a.png"])
    assert (args.vae, args.notes) == ("taesdxl", [])
    write_facts("a.png", facts + "../taesd")
    args = cli.make_job(["--like", "a.png"])
    assert args.vae is None and args.notes == [
        "--like a.png: VAE ../taesd is not repeated: give it with --vae"]


def test_the_preview_is_the_tiny_vaes(run, tiny):
    """The last guess is the picture; else something like it."""
    argv = ["--sampler", "euler", "--preview", "now.png"]
    assert run(*argv, "--vae", str(tiny), "-o", "a.png")[0] == 0
    picture, preview = (np.asarray(Image.open(name)).astype(int) for name in ("a.png", "now.png"))
    assert abs(picture - preview).max() <= 1 and np.ptp(picture) > 100
    assert run(*argv, "-o", "b.png")[0] == 0
    assert Image.open("now.png").size == Image.open("b.png").size


def test_one_vae_for_all_prompts(run, folder, tiny, capsys):
    Path("prompts.txt").write_text(f"a cat\na dog --vae {tiny}\n")
    capsys.readouterr()
    assert cli.main(["--prompts", "prompts.txt", "-m", str(folder)]) == 2
    assert "line 2" in capsys.readouterr().err


def test_explained(run, tiny):
    status, out, _ = run("--vae", str(tiny), "--explain")
    assert status == 0 and any(line.startswith("vae decoder layers") for line in out)


def write(path, arrays=None, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(arrays, path / WEIGHTS)
    return path


def changed(tiny, drop="", **arrays):
    return {name: array for name, array in load_file(tiny / WEIGHTS).items()
            if name != drop} | arrays


def test_what_is_no_vae_is_refused_in_one_line(run, folder, tiny, other, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    bias, weight = "decoder.layers.2.conv.0.bias", "decoder.layers.18.weight"
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes((tiny / WEIGHTS).read_bytes()[:5000])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "half").mkdir()
    shutil.copy(tiny / "config.json", tmp_path / "half")
    broken = write(tmp_path / "broken", changed(tiny))
    (broken / "config.json").write_text("{")
    listed = write(tmp_path / "listed", changed(tiny))
    (listed / "config.json").write_text("[1]")
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    save_file({"0.weight": torch.zeros(3), "x": torch.zeros(3)}, tmp_path / "mixed.safetensors")
    save_file({"0.weight": torch.zeros(3), "1": torch.zeros(3)}, tmp_path / "number.safetensors")
    save_file({"1.weight": torch.zeros(3), "1x.a": torch.zeros(3)}, tmp_path / "x.safetensors")
    save_file({"1.weight": torch.zeros(())}, tmp_path / "scalar.safetensors")
    small = diffusers.AutoencoderKL(**VAE | {
        "block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2})
    small.save_pretrained(tmp_path / "small")
    wide = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        latent_channels=16)
    wide.save_pretrained(tmp_path / "wide")
    other.save_pretrained(tmp_path / "groups")
    settings = json.loads((tmp_path / "groups/config.json").read_text())
    (tmp_path / "groups/config.json").write_text(json.dumps(settings | {"norm_num_groups": 5}))
    cases = {
        "": "config.json", "nothing": "there is no VAE nothing", "taesdx": "did you mean taesd",
        "no/such.safetensors": "no/such.safetensors", "../no": "../no",
        tmp_path / "empty": "config.json", tmp_path / "half": WEIGHTS,
        tmp_path / "cut.safetensors": "not a whole", tmp_path / "text.safetensors": "is a text",
        broken: "not a VAE", listed: "not a VAE",
        tmp_path / "other.safetensors": "not a VAE", tmp_path / "mixed.safetensors": "not a VAE",
        tmp_path / "number.safetensors": "decoder", tmp_path / "x.safetensors": "not a VAE",
        tmp_path / "scalar.safetensors": "not a VAE",
        write(tmp_path / "1", changed(tiny, bias), **config): f"{bias} is missing",
        write(tmp_path / "2", changed(tiny, more=torch.zeros(2)), **config): "more is unknown",
        write(tmp_path / "3", changed(tiny, **{weight: torch.zeros(3, 8, 1, 1)}), **config): weight,
        write(tmp_path / "4", changed(tiny), **config | {"act_fn": "silu"}): "act_fn 'silu'",
        write(tmp_path / "5", changed(tiny), **config | {"scaling_factor": 2.0}): "scaling_factor",
        tmp_path / "small": "4 numbers for 2 pixels, the model's 4 numbers for 8",
        tmp_path / "wide": "16 numbers for 8 pixels, the model's 4",
        tmp_path / "groups": "norm_num_groups",
    }
    for vae, named in cases.items():
        status, out, err = run("--vae", str(vae))
        assert (status, out, len(err)) == (2, [], 1) and named in err[0], (vae, err)
        assert not list(Path().iterdir())


def test_colours_of_another_family_are_told(folder, halves, tmp_path, capsys):
    for kind, told in ("taesdxl", True), ("taesd", False):
        for side in "encoder", "decoder":
            shutil.copy(halves / f"taesd_{side}.safetensors",
                        tmp_path / f"{kind}_{side}.safetensors")
        capsys.readouterr()
        load(folder, tmp_path / f"{kind}_decoder.safetensors")
        assert ("colours" in capsys.readouterr().err) == told
