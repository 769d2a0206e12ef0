"""extras/training/teach.py: a LoRA has the gradients of peft's, resumes bit for bit, and draws the
same picture here and in diffusers; errors of the user get one line.
"""

import contextlib
import functools
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny_sd
from conftest import ROOT, SCHEDULER, make_unet, same
from extras import cli, files, formats, like_diffusers, show
from extras.training import fitting, lora, teach
from helpers import CONFIG, contents, drawn, write_model
from helpers_diffusers import PROMPT, SECOND, drawn_by, same_pictures

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "extras.training.teach"]
FROM_ANYWHERE = os.environ | {"PYTHONPATH": str(ROOT)}

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model that is taught in milliseconds a step."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of three captioned pictures, squares of noise, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i, side in enumerate([16, 40, 9]):
        pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"apple {i}\n")
    return folder


@pytest.fixture
def run(pictures, tiny, capsys):
    """run(option, ...) -> (status, lines on stdout, tiny_sd's lines on stderr)"""
    def run(*options, model=tiny, output="mine.safetensors"):
        capsys.readouterr()
        status = teach.main([str(pictures), "-m", str(model), "-o", output, *map(str, options)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), re.findall("tiny_sd: (.*)", err)
    return run


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, do): do() when step n begins, which the number 0 is the first of."""
    begin = fitting.begin_step

    def at_step(n, do, patch=monkeypatch):
        patch.setattr(fitting, "begin_step", lambda rng, seed, step, stage: (
            do() if step == n else None, begin(rng, seed, step, stage)))
    return at_step


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def random_pairs(model, rank=3, text=True):
    """A model with a LoRA, and the LoRA, with nonzero B."""
    adapted, pairs = lora.adapt(model, rank, text)
    for _, up in pairs.values():
        up.data.normal_(0, 0.3)
    return adapted, pairs


def loss_of(model, weights, context):
    """The loss of one picture at one time, differentiable in the weights."""
    torch.manual_seed(1)
    x_0, eps = torch.randn(2, 1, 8, 8, 4)
    level = torch.tensor(0.5).reshape(1, 1, 1, 1)
    temb = tiny_sd.time_mlp(x_0, [300], **weights["time_embedding"])
    predict = functools.partial(tiny_sd.unet, temb=temb, context=context,
                                n_head=model.config.unet.n_head,
                                groups=model.config.unet.norm_num_groups, **weights)
    return tiny_sd.diffusion_loss(predict, "epsilon", x_0, level, eps).mean(), (x_0, level, eps)


# ── W + B A ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kernel", [(), (1, 1)], ids=["linear", "convolution"])
def test_an_adapted_weight_is_the_sum(kernel):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 5, 6), torch.randn(8, *kernel, 6), torch.randn(8)
    down, up = torch.randn(3, 6, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    written_out = weight + (up @ down).reshape(weight.shape)
    ours = tiny_sd.linear(x, lora.Adapted(weight, down, up), bias)
    theirs = tiny_sd.linear(x, written_out, bias)
    same("adapted layer", ours.detach(), theirs.detach(), 1e-6)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (down, up)) for y in (ours, theirs))):
        same("gradient of an adapted layer", a, b, 1e-5)


def test_before_the_first_step_the_model_predicts_what_it_did(folder):
    model = formats.load(folder, "torch")
    adapted, _ = lora.adapt(model, 4, text=True)
    context = tiny_sd.embed_prompts(model, ["a cat"])[0]
    assert torch.equal(tiny_sd.embed_prompts(adapted, ["a cat"])[0], context)
    assert loss_of(model, adapted.unet, context)[0] == loss_of(model, model.unet, context)[0]


@pytest.mark.parametrize("changes", [{}, SECOND], ids=["1", "2"])
def test_what_kohya_adapts_is_adapted(changes, folder_with, reference):
    """All linear layers and 1x1 convolutions of the transformers, by diffusers' class of them."""
    unet = make_unet(**changes)
    _, pairs = lora.adapt(formats.load(folder_with(unet=unet), "torch"), 2, text=True)
    expected = {("unet", f"{name}.{inner}.weight") for name, module in unet.named_modules()
                if type(module).__name__ == "Transformer2DModel"
                for inner, layer in module.named_modules()
                if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))}
    expected |= {("text_encoder", f"{name.removeprefix('text_model.')}.weight")
                 for name, layer in reference.text_encoder.named_modules()
                 if isinstance(layer, torch.nn.Linear)}
    assert pairs.keys() == expected


def test_gradients_are_those_of_peft(folder, reference):
    """Of all matrices of the U-Net, with diffusers' network and peft's layers."""
    peft = pytest.importorskip("peft")
    model = formats.load(folder, "torch")
    adapted, pairs = random_pairs(model, text=False)
    unet = make_unet()
    names = [name.removesuffix(".weight") for _, name in pairs]
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=names))
    layers = dict(unet.named_modules())
    theirs = [layers[name].lora_A.default.weight for name in names] + \
        [layers[name].lora_B.default.weight for name in names]
    ours = [down for down, _ in pairs.values()] + [up for _, up in pairs.values()]
    for p, q in zip(theirs, ours):
        p.data.copy_(q.reshape(p.shape))

    context = tiny_sd.embed_prompts(model, ["a photo of a cat"])[0]
    loss, (x_0, level, eps) = loss_of(model, adapted.unet, context)
    x_t = tiny_sd.add_noise(x_0, level, eps).movedim(-1, 1)
    predicted = unet(x_t, torch.tensor([300]), context).sample
    their_loss = torch.nn.functional.mse_loss(predicted, eps.movedim(-1, 1))
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    found = [torch.cat([p.flatten() for p in torch.autograd.grad(value, matrices)])
             for value, matrices in ((loss, ours), (their_loss, theirs))]
    same("gradient of a LoRA", *found, 1e-4)


def test_gradients_are_the_same_where_layers_are_recomputed(folder):
    """With less kept on the way."""
    model = formats.load(folder, "torch")
    adapted, pairs = random_pairs(model)
    matrices, found = [p for pair in pairs.values() for p in pair], []
    for names in (), ("resnet", "transformer"):
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        context = tiny_sd.embed_prompts(adapted, ["a photo of a cat"])[0]
        with lora.recomputed(*names):
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                loss, _ = loss_of(model, adapted.unet, context)
            found.append((kept, torch.autograd.grad(loss, matrices)))
    assert found[1][0] < found[0][0] / 3
    for a, b in zip(found[0][1], found[1][1]):
        same("gradient with recomputation", a, b, 1e-6)


# ── The file ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["Stable Diffusion 1", "Stable Diffusion 2", "SDXL", "emoji"])
@pytest.mark.filterwarnings("ignore")
def test_diffusers_draws_the_same(name, folder, folder_with, run, request, monkeypatch):
    """With load_lora_weights, which must apply all of it; trained at a rate that shows.

    Its own pictures, before and on its sheet, take two steps each.
    """
    pytest.importorskip("peft")
    from diffusers import DDIMScheduler, DiffusionPipeline
    if name == "emoji":
        folder = ROOT / "weights/emoji"
    if name == "Stable Diffusion 2":
        folder = folder_with(unet=make_unet(**SECOND), scheduler=DDIMScheduler(
            **SCHEDULER | {"prediction_type": "v_prediction"}))
    if name == "SDXL":
        folder = request.getfixturevalue("xl")[1]
    Path("keep.txt").write_text("a cat")        # rather than all hundred things of the model
    own = like_diffusers.defaults
    monkeypatch.setattr(like_diffusers, "defaults", lambda *args: (own(*args)[0], 2, 2.0))
    status, _, said = run("--steps", 4, "--rate", 0.03, "--text", "--rank", 3, "-b", 1,
                          "-W", 64, "-H", 64, "--keep", "keep.txt", model=folder)
    assert status == 0, said
    if name == "SDXL":
        parts = {key.split("_")[1] for key in load_file("mine.safetensors")}
        assert parts == {"unet", "te1", "te2"}

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    how = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 5, "width": 64, "height": 64}
    before = drawn_by(pipe, **how)
    pipe.load_lora_weights("mine.safetensors")
    model = formats.load(folder, loras=[("mine.safetensors", 1)])
    ours = drawn(model, PROMPT, None, (3,), 3, 5, "ddim", width=64, height=64)
    same_pictures(f"picture of a taught model, {name}", ours, drawn_by(pipe, **how), before)


def test_the_names_are_kohyas(run):
    assert run("--steps", 1, "--text", "--rank", 2)[0] == 0
    arrays = load_file("mine.safetensors")
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    assert arrays[f"{stem}.lora_down.weight"].shape == (2, 12)
    assert arrays[f"{stem}.lora_up.weight"].shape == (8, 2) and arrays[f"{stem}.alpha"] == 2
    assert "lora_te_text_model_encoder_layers_1_mlp_fc2.lora_up.weight" in arrays
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    assert arrays[f"{stem}.lora_down.weight"].shape == (2, 16, 1, 1)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────


def test_it_learns(run, tiny):
    """The error at fixed times and noises falls, and without --text only the U-Net changes."""
    def errors(loras):
        model = formats.load(tiny, "torch", loras=loras)
        still = torch.optim.SGD(tiny_sd.parameters(model.unet), 0.0)
        rng, (latents, captions) = np.random.default_rng(9), shown(tiny)
        batches = tiny_sd.random_batches(torch.from_numpy(latents), captions, 8, rng)
        return np.mean([*itertools.islice(tiny_sd.train(model, still, batches, rng), 30)])

    assert run("--steps", 80, "--rate", 0.02)[0] == 0
    assert errors([("mine.safetensors", 1)]) < 0.9 * errors([])
    assert not [name for name in load_file("mine.safetensors") if name.startswith("lora_te")]


@pytest.mark.parametrize("options", [(), ("--text", "--flip"), ("--save-memory",),
                                     ("--dtype", "bfloat16")], ids=lambda words: " ".join(words))
def test_a_stopped_run_goes_on_to_the_bit(options, run, monkeypatch, at_step):
    """Ctrl-C in step 3 of 6, and the same command again, is the same as 6 steps at once."""
    how = ("--steps", 6, "--rate", 0.01, *options)
    assert run(*how, output="once.safetensors")[0] == 0
    with monkeypatch.context() as patch:
        at_step(2, ctrl_c, patch)
        status, out, said = run(*how)
    assert status == 130 and not out and "step 3 is kept in mine.safetensors.state" in said[0]
    status, out, said = run(*how)
    assert (status, out) == (0, ["mine.safetensors"]) and "resuming at step 3" in said[0]
    once, again = load_file("once.safetensors"), load_file("mine.safetensors")
    assert once.keys() == again.keys() and all(torch.equal(once[k], again[k]) for k in once)


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds): the loop's clock advances by this much at each reading."""
    def tick(seconds):
        times = itertools.count(0.0, seconds)
        monkeypatch.setattr(fitting, "time", SimpleNamespace(monotonic=lambda: next(times)))
    return tick


def test_what_was_reached_is_kept_every_minute(run, monkeypatch, clock):
    """And the sheet is drawn every five, while it runs; nothing of that is left but the sheet."""
    clock(25)
    seen, save, sample = [], fitting.State.save, fitting.save_sample
    monkeypatch.setattr(fitting.State, "save", lambda *args: (seen.append("kept"), save(*args)))
    monkeypatch.setattr(fitting, "save_sample",
                        lambda *args: (seen.append("sheet"), sample(*args)))
    assert run("--steps", 30)[0] == 0
    assert (seen.count("kept"), seen.count("sheet")) == (13, 2)


@pytest.fixture
def progress(monkeypatch):
    """How much was done when each step began."""
    seen, advance = [], fitting.advance
    monkeypatch.setattr(fitting, "advance", lambda bar, optimizer, *others: (
        seen.append(optimizer.progress), advance(bar, optimizer, *others)))
    return seen


def test_minutes_end_it(run, clock, progress):
    clock(10)
    assert run("--minutes", 1)[0] == 0
    assert progress == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])


def test_a_state_of_other_options_is_refused(run, pictures, monkeypatch, at_step):
    at_step(0, ctrl_c)
    assert run("--steps", 2)[0] == 130
    monkeypatch.undo()
    monkeypatch.chdir(pictures.parent)
    for change in (("--rank", 4), ("--text",), ("--rate", 0.1)):
        status, _, (line,) = run("--steps", 2, *change)
        assert status == 2 and "was started with other options" in line
    (pictures / "0.txt").write_text("red apple")
    status, _, (line,) = run("--steps", 2)
    assert status == 2 and "was started with other options, captions or weights" in line
    Path("mine.safetensors.state/teaching.pt").write_bytes(b"PK")
    status, _, (line,) = run("--steps", 2)
    assert status == 2
    assert "mine.safetensors.state/teaching.pt is not whole: move it elsewhere" in line


def test_a_signal_while_the_last_step_is_kept(run, monkeypatch):
    """It waits until what was reached is on the disk."""
    wait = os.fsync

    def fsync(handle):
        os.kill(os.getpid(), signal.SIGINT)
        wait(handle)
    monkeypatch.setattr(os, "fsync", fsync)
    assert run("--steps", 2)[0] == 130
    monkeypatch.setattr(os, "fsync", wait)
    state = torch.load("mine.safetensors.state/teaching.pt", weights_only=True)
    assert state["step"] == 2
    assert run("--steps", 2)[0] == 0 and Path("mine.safetensors").exists()


def test_the_sheet_shows_it_without_and_with(run, tiny):
    """The command line's pictures of each caption, from seeds 0, 1 and 2."""
    assert run("--steps", 5, "--rate", 0.05)[0] == 0
    rows = []
    for loras in [], [("mine.safetensors", 1)]:
        model = formats.load(tiny, loras=loras)
        rows.append([Image.fromarray(drawn(model, f"apple {i}", None, [i])[0]) for i in range(3)])
    ours, expected = (np.asarray(sheet).astype(int) for sheet in (
        Image.open("mine.png").convert("RGB"), show.sheet(rows, down=["before", "after"])))
    assert ours.shape == expected.shape and np.abs(ours - expected).max() <= 2
    before, after = (np.stack(row).astype(int) for row in rows)
    assert np.abs(before - after).mean() > 5


def test_the_clock_starts_at_the_first_step(run, monkeypatch, clock, progress):
    """Ten minutes of drawing known things do not count towards a minute of teaching."""
    clock(10)
    lessons = teach.lessons

    def slow(*args):
        for _ in range(60):
            fitting.time.monotonic()
        return lessons(*args)

    monkeypatch.setattr(teach, "lessons", slow)
    assert run("--minutes", 1)[0] == 0
    assert progress == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])


def test_the_bar_says_step_steps_expected_and_loss(pictures, tiny, clock, capsys):
    """Also with --minutes: at ten seconds per step, one minute is six steps."""
    clock(10)
    assert teach.main(["pictures", "-m", str(tiny), "-o", "a.safetensors", "--minutes", "1"]) == 0
    bars = re.findall(r"(\d+)/(\d+) \[[^\]]*step.*?loss (\d\.\d+)", capsys.readouterr().err)
    assert bars and {total for _, total, _ in bars} == {"6"} and bars[-1][0] == "6"


@pytest.mark.parametrize("steps, said", [(149, ["--minutes 84"]), (150, [])])
def test_too_few_steps_are_said(steps, said, capsys):
    """If 149 steps take 25 minutes, 500 take 84."""
    teach.say_if_short(steps, 25)
    assert re.findall(r"--minutes \d+", capsys.readouterr().err) == said

def test_a_short_run_says_so(run):
    status, _, said = run("--steps", 3)
    assert status == 0 and "there were only 3 steps" in said[-1]


def test_what_is_drawn_is_drawn_by_numpy(run, monkeypatch):
    """On a CPU: its own pictures, the encoding of those taught, and the sheet."""
    kinds, generate = [], like_diffusers.generate

    def watched(model, *args, **settings):
        kinds.extend(map(type, tiny_sd.flatten([model.unet, model.vae]).values()))
        return generate(model, *args, **settings)

    monkeypatch.setattr(like_diffusers, "generate", watched)
    Path("keep.txt").write_text("dog")
    assert run("--steps", 1, "--keep", "keep.txt")[0] == 0
    assert {*kinds} == {np.ndarray}


# ── What must not be lost ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def stopped(run, monkeypatch, at_step):
    """stopped(): a run that Ctrl-C ended in step 2 of 4."""
    def stopped():
        with monkeypatch.context() as patch:
            at_step(1, ctrl_c, patch)
            assert run("--steps", 4)[0] == 130
    return stopped


def test_a_picture_made_in_between_is_kept(run, stopped):
    stopped()
    Path("mine.png").write_text("the user's")
    Path("mine.safetensors").write_text("the user's")
    assert run("--steps", 4)[:2] == (0, ["mine-1.safetensors"])
    assert Path("mine.png").read_text() == Path("mine.safetensors").read_text() == "the user's"
    assert load_file("mine-1.safetensors") and Image.open("mine-1.png").size
    assert not Path("mine.safetensors.state").exists()


def test_files_that_came_while_it_ran_are_kept(run, at_step):
    def meanwhile():
        Path("mine.png").write_text("the user's")
        Path("mine.safetensors").symlink_to("nowhere")

    at_step(0, meanwhile)
    assert run("--steps", 1)[:2] == (0, ["mine-1.safetensors"])
    assert Path("mine.png").read_text() == "the user's" and Path("mine.safetensors").is_symlink()
    assert Image.open("mine-1.png").size


def test_the_sheets_on_the_way_replace_no_picture(run, at_step, clock):
    clock(100)
    at_step(1, lambda: Path("mine.png").write_text("the user's"))
    assert run("--steps", 8)[0] == 0
    assert Path("mine.png").read_text() == "the user's" and Image.open("mine-1.png").size


@pytest.mark.skipif(files.fcntl is None, reason="there are no such locks")
def test_two_teachers_do_not_share_a_state(run, pictures, tiny, monkeypatch):
    """The second is refused while the first runs in another process."""
    command = [*COMMAND, "pictures", "-m", tiny, "-o", "mine.safetensors", "--minutes", "5"]
    with subprocess.Popen(command, env=FROM_ANYWHERE, stderr=subprocess.PIPE) as first:
        while not (found := [*Path().glob("mine.safetensors.state")]):
            assert first.poll() is None
            time.sleep(0.01)
        status, _, (line,) = run("--steps", 1)
        first.kill()
    assert found and status == 2 and "by another training process" in line
    assert run("--steps", 1)[0] == 0        # once that is gone


def never(*_, **__):
    raise KeyboardInterrupt


def not_finite(model, *_, **__):
    yield np.full((1, *tiny_sd.latent_shape(model, 16, 16)), np.nan, np.float32)


@contextlib.contextmanager
def full_disk(room=0):
    """Let no file grow beyond this many bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("spoilt, status, said", [
    (never, 130, "interrupted"), (not_finite, 2, "mine.safetensors is saved, but not its sheet"),
    (None, 2, "mine.safetensors is saved, but not its sheet: mine.png cannot be written")])
def test_what_ends_the_last_sheet_loses_nothing(spoilt, status, said, run, monkeypatch):
    generate, train = spoilt or like_diffusers.generate, lora.train
    with contextlib.ExitStack() as stack:
        def then_spoilt(*args):
            found = train(*args)
            monkeypatch.setattr(like_diffusers, "generate", generate)
            return found

        monkeypatch.setattr(lora, "train", then_spoilt)
        if spoilt is None:
            take = files.take_free_name

            def take_and_fill(*names):
                name = take(*names)
                stack.enter_context(full_disk())
                return name
            monkeypatch.setattr(files, "take_free_name", take_and_fill)
        found, out, lines = run("--steps", 2)
    assert (found, out) == (status, ["mine.safetensors"]) and said in lines[-1]
    assert load_file("mine.safetensors") and not Path("mine.png").exists()
    assert not Path("mine.safetensors.state").exists()


def test_a_sheet_on_the_way_that_cannot_be_drawn_is_passed_over(run, monkeypatch, clock):
    clock(100)
    train, generate = lora.train, like_diffusers.generate

    def spoilt_on_the_way(*args):
        monkeypatch.setattr(like_diffusers, "generate", not_finite)
        found = train(*args)
        monkeypatch.setattr(like_diffusers, "generate", generate)
        return found

    monkeypatch.setattr(lora, "train", spoilt_on_the_way)
    status, out, lines = run("--steps", 8)
    assert (status, out) == (0, ["mine.safetensors"])
    assert [line for line in lines if "there is no sheet this time: the picture is not" in line]


def test_a_full_disk_is_one_line_and_what_was_kept_stays(run, stopped):
    stopped()
    kept = Path("mine.safetensors.state/teaching.pt").read_bytes()
    with full_disk(1000):
        status, out, lines = run("--steps", 4)
    assert (status, out) == (2, []) and lines[-1].startswith(
        "mine.safetensors.state/teaching.pt cannot be written: ")
    assert {*contents("mine.safetensors.state").values()} == {kept}
    assert run("--steps", 4)[0] == 0


def test_a_signal_waits_for_the_end_of_a_step(run, monkeypatch):
    """Ctrl-C while the optimizer changes the matrices: a whole step is saved."""
    assert run("--steps", 4, output="once.safetensors")[0] == 0
    lerp, calls = torch.Tensor.lerp_, []

    def pressed(*args):
        calls.append(args)
        if len(calls) == 50:
            signal.raise_signal(signal.SIGINT)
        return lerp(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "lerp_", pressed)
        status, _, said = run("--steps", 4)
    assert status == 130 and "is kept in mine.safetensors.state" in said[0]
    assert run("--steps", 4)[0] == 0
    once, again = load_file("once.safetensors"), load_file("mine.safetensors")
    assert all(torch.equal(once[k], again[k]) for k in once)


def other_values(model):
    file = next((model / "unet").glob("*.safetensors"))
    save_file({name: array + 0.1 for name, array in load_file(file).items()}, file)


def other_shapes(model):
    shutil.rmtree(model)
    write_model(model, CONFIG | {"unet": CONFIG["unet"] | {"block_out_channels": [8, 24]}})


@pytest.mark.parametrize("change", [other_values, other_shapes])
def test_a_model_that_was_replaced_is_not_gone_on_with(change, run, tiny, tmp_path, monkeypatch,
                                                       at_step):
    model = shutil.copytree(tiny, tmp_path / "model")
    with monkeypatch.context() as patch:
        at_step(0, ctrl_c, patch)
        assert run("--steps", 4, model=model)[0] == 130
    change(model)
    status, _, (line,) = run("--steps", 4, "--rate", 0.0125, model=model)
    assert status == 2 and "was started with other options, captions or weights" in line


def test_a_lora_that_is_not_finite_is_not_written(run, monkeypatch):
    advance = fitting.advance

    def spoilt(bar, optimizer, *others):
        advance(bar, optimizer, *others)
        if optimizer.taken == 2:
            next(iter(optimizer.params.values())).data[0, 0] = math.inf

    monkeypatch.setattr(fitting, "advance", spoilt)
    status, out, lines = run("--steps", 2)
    assert (status, out) == (2, []) and "the LoRA is not finite after 2 steps" in lines[-1]
    assert not Path("mine.safetensors").exists()


# ── The pictures ──────────────────────────────────────────────────────────────────────────────────


def shown(tiny, *options):
    """Return the latents and captions that training shows."""
    model = formats.load(tiny)
    args = teach.parse_arguments(["pictures", "-o", "x.safetensors", "-m", str(tiny), *options])
    teach.fill_in(args, model)
    pictures = files.read_captioned(args.folder, args.caption)
    return teach.lessons(model, pictures, teach.prompts_to_keep(args), args)


def test_pictures_are_cut_to_the_size(pictures, tiny, capsys):
    Image.new("RGB", (30, 40)).save(pictures / "1.png")
    latents, captions = shown(tiny)
    assert latents.shape == (3, 8, 8, 4) and captions == ["apple 0", "apple 1", "apple 2"]
    assert "1.png, 30 x 40, is cropped to the shape of 16 x 16" in capsys.readouterr().err
    assert shown(tiny, "-W", "32", "-H", "24")[0].shape == (3, 12, 16, 4)


def test_flip_shows_each_picture_mirrored_too(pictures, tiny, monkeypatch):
    monkeypatch.setattr(like_diffusers, "torch_noise",
                        lambda seeds, size: lambda: np.zeros((1, *size)))
    both, captions = shown(tiny, "--flip")
    assert captions == ["apple 0", "apple 0", "apple 1", "apple 1", "apple 2", "apple 2"]
    plain, _ = shown(tiny)
    for path in pictures.glob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    same("mirrored latents", both, np.stack([plain, shown(tiny)[0]], 1).reshape(both.shape), 1e-3)


def test_half_of_what_is_shown_is_what_the_model_draws_itself(pictures, tiny):
    """Of the prompts of --keep, with seeds 0, 1, ...; their pictures are as generate draws them."""
    (pictures.parent / "keep.txt").write_text("\ufeffred apple\n\n a  dog \n" + "apple\n" * 5)
    latents, captions = shown(tiny, "--keep", "keep.txt")
    taught = ["apple 0", "apple 1", "apple 2"]
    assert captions[:6] == 2 * taught and len(latents) == len(captions) == 13
    assert sorted(captions[6:]) == ["a  dog", *["apple"] * 5, "red apple"]
    *_, x = like_diffusers.generate(formats.load(tiny), captions[8], seeds=(2,))
    same("a picture of its own", latents[8:9], x, 1e-6)
    assert shown(tiny)[1] == taught
    known = ROOT / "weights/emoji/things.json"
    (pictures.parent / "model").mkdir()
    (pictures.parent / "model/things.json").write_bytes(known.read_bytes())
    args = teach.parse_arguments(["pictures", "-o", "x.safetensors", "-m", "model"])
    assert "red apple" in teach.prompts_to_keep(args)


def test_captions(pictures, capsys):
    """A file's own first; else the one for all; on one line; with or without a byte order mark."""
    (pictures / "0.txt").write_text("\ufeffa red\r\n apple ", encoding="utf-8")
    (pictures / "1.txt").unlink()
    Image.new("L", (8, 8)).save(pictures / "more.JPG")
    (pictures / "list.csv").write_text("1")
    (pictures / ".hidden").write_text("1")
    os.mkfifo(pictures / "pipe.png")
    (pictures / "zero.png").symlink_to("/dev/zero")
    read = files.read_captioned(pictures, "cat")
    assert [(path.name, words) for path, words in read] == [
        ("0.png", "a red apple"), ("1.png", "cat"), ("2.png", "apple 2"), ("more.JPG", "cat")]
    assert capsys.readouterr().err.endswith("caption: list.csv; pipe.png; zero.png\n")


def broken(pictures):
    (pictures / "b.png").write_bytes(b"\x89PNG")
    return ()


def no_caption(pictures):
    (pictures / "1.txt").unlink()
    return ()


def empty_caption(pictures):
    (pictures / "1.txt").write_text(" \n")
    return ()


def latin(pictures):
    (pictures / "1.txt").write_bytes(b"caf\xe9")
    return ()


def unending(name, target=None):
    """A FIFO that blocks forever, or a link to a file without end."""
    def make(pictures):
        path = pictures / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target) if target else os.mkfifo(path)
        return ("--keep", path) if name == "../keep" else ()
    return make


def empty(pictures):
    for path in pictures.iterdir():
        path.unlink()
    return ()


def missing(pictures):
    empty(pictures)
    pictures.rmdir()
    return ()


def there(name):
    def make(pictures):
        (pictures.parent / name).write_text("x")
        return ()
    return make


@pytest.mark.parametrize("prepare, said", [
    (broken, "b.png is not a picture"), (no_caption, "1.png has no caption: write one in"),
    (empty_caption, "1.png has no caption"), (latin, "1.txt cannot be read"),
    (empty, "has no pictures"), (missing, "there is no folder"),
    (unending("1.txt"), "1.txt is not a file"),
    (unending("1.txt", "/dev/zero"), "1.txt is not a file"),
    (unending("../keep", "/dev/zero"), "keep is larger"),
    (unending("../mine.safetensors"), "mine.safetensors exists already"),
    (unending("../mine.safetensors.state"), "mine.safetensors.state is not a folder"),
    (unending("../mine.safetensors.state/teaching.pt"), "teaching.pt is not a file"),
    (there("mine.safetensors"), "mine.safetensors exists already"),
    (there("mine.png"), "mine.png exists already"),
    (lambda _: ("--rank", "0"), "--rank 0 is not from 1 to 1024"),
    (lambda _: ("--rank", "x"), "invalid int value: 'x'"),
    (lambda _: ("--rate", "nan"), "--rate nan is not"),
    (lambda _: ("--minutes", "-1"), "--minutes -1.0 is not"),
    (lambda _: ("--steps", "0"), "--steps 0 is not from 1"),
    (lambda _: ("--steps", "5", "--minutes", "5"), "--steps or --minutes, not both"),
    (lambda _: ("-o", "mine.ckpt"), "mine.ckpt does not end in .safetensors"),
    (lambda _: ("-o", ""), "--output . does not end in .safetensors"),
    (lambda _: ("-o", "/", "--from-scratch"), "--output / does not name a new folder"),
    (lambda _: ("-o", "..", "--from-scratch"), "--output .. does not name a new folder"),
    (lambda _: ("--from-scratch", "--caption", "cat"), "give each picture its own caption"),
    (lambda _: ("--from-scratch", "--flip"), "--flip is for a LoRA"),
    (lambda _: ("--from-scratch", "--device", "mps"), "trains with --device cpu or cuda"),
    (lambda _: ("--keep", "none.txt"), "none.txt cannot be read"),
    (lambda _: ("-o", "nowhere/mine.safetensors"), "there is no folder nowhere to write to"),
], ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_user_error_is_one_line_before_anything_is_loaded(prepare, said, run, pictures,
                                                            monkeypatch):
    monkeypatch.setattr(formats, "load", None)
    options = prepare(pictures)
    before = contents(pictures.parent)
    status, out, lines = run(*options)
    assert (status, out, len(lines)) == (2, [], 1) and said in lines[0]
    assert contents(pictures.parent) == before


@pytest.mark.parametrize("name, said", [("a.png", "is not a picture"), ("1.txt", "is larger")])
def test_a_file_of_a_terabyte_is_refused(name, said, run, pictures):
    with open(pictures / name, "w") as file:
        file.truncate(2 ** 40)
    status, _, (line,) = run("--steps", 1)
    assert status == 2 and f"{name} {said}" in line


def test_a_loss_that_is_not_finite_is_one_line(run, monkeypatch):
    monkeypatch.setattr(tiny_sd, "train", lambda *_: iter([float("nan")]))
    status, out, lines = run("--steps", 2)
    assert (status, out) == (2, []) and "the loss is nan at step 0: begin again" in lines[-1]
    assert not Path("mine.safetensors").exists()


@pytest.mark.parametrize("changes", [{"in_channels": 9}, {"time_cond_proj_dim": 64}], ids=str)
def test_models_that_are_not_taught(changes, run, folder_with):
    status, _, (line,) = run("--steps", 1, model=folder_with(unet=make_unet(**changes)))
    assert status == 2 and "cannot be taught" in line


def test_one_endless_prompt_to_keep(monkeypatch):
    """The others do not take as much memory."""
    monkeypatch.setattr(teach, "encode_pictures", lambda *_: ([np.zeros((1, 2, 2, 4))], ["a"]))
    monkeypatch.setattr(teach, "draw", lambda *_: np.zeros((1, 2, 2, 4)))
    prompts = ["x" * 10 ** 5, *map(str, range(2000))]
    tracemalloc.start()
    _, captions = teach.lessons(None, [], prompts, SimpleNamespace(seed=0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 ** 7 and {*captions[-100:]} < {*prompts}


def test_it_runs_as_a_program(pictures, tiny):
    """From another folder; and torch's threads do not wait busily.

    With other programs on the same cores, the waiting would take most of the time.
    """
    environment = FROM_ANYWHERE | {"OMP_DISPLAY_ENV": "true"}
    environment.pop("OMP_WAIT_POLICY", None)
    done = subprocess.run([*COMMAND, "pictures", "-m", tiny, "-o", "a.safetensors", "--steps", "1"],
                          env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a.safetensors\n"), done.stderr
    if sys.platform == "linux":         # other systems have another OpenMP
        assert re.findall("OMP_WAIT_POLICY = '(.*)'", done.stderr) == ["PASSIVE"]


def test_help_needs_no_torch(pictures):
    """And if torch is missing, it says how to install it."""
    script = ("import sys; sys.modules['torch'] = None; from extras.training import teach; "
              "sys.exit(teach.main(sys.argv[1:]))")

    def without_torch(*options):
        return subprocess.run([sys.executable, "-c", script, *options], env=FROM_ANYWHERE,
                              capture_output=True, text=True)

    done = without_torch("--help")
    assert done.returncode == 0 and "--from-scratch" in done.stdout and not done.stderr
    done = without_torch("pictures", "-o", "a.safetensors")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "torch" in done.stderr


def test_the_lora_is_one_for_the_command_line(run, tiny):
    assert run("--steps", 1)[0] == 0
    assert cli.main(["apple", "-m", str(tiny), "--steps", "1", "--lora", "mine.safetensors"]) == 0


def test_a_model_of_ones_own_from_scratch(pictures):
    """Through every stage of the recipe; its folder draws, and is never replaced.

    No code in the current folder is run: pictures of others may come with some.
    """
    Path("tqdm.py").write_text("raise SystemExit('this is not tqdm')")
    command = [*COMMAND, "pictures", "-o", "mine", "--from-scratch", "--steps", "1", "-b", "2"]
    done = subprocess.run(command, env=FROM_ANYWHERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not Path("mine/things.json").exists()
    assert Image.open("mine.png").size == (12 * 128, 128)     # four seeds of three captions
    assert cli.main(["apple 1", "-m", "mine", "--steps", "1", "-o", "apple.png"]) == 0
    assert Image.open("apple.png").size == (128, 128)
    done = subprocess.run(command, env=FROM_ANYWHERE, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "tiny_sd: mine exists already\n")
