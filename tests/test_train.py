"""weights/train.py on 24 emoji: every stage from nothing, on after a kill, and on two processes as on one."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import tiny_sd
from conftest import ROOT

sys.path.insert(0, str(ROOT / "weights"))
import train as train_py  # noqa: E402

DATA = ROOT / "tests" / "emoji.zip"                     # 24 of the pictures that `train.py render` makes from the font
SHORT = ["--batch", "8", "--bank", "64", "--draw-steps", "2"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def command(stage, state, *options, launcher=()):
    return [sys.executable, *launcher, ROOT / "weights/train.py", stage, "--data", DATA, "--state", state,
            "--out", state / "emoji", "--threads", "1", *SHORT, *map(str, options)]


def train(*args, **launcher):
    run = subprocess.run(command(*args, **launcher), capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def saved(state, stage):
    return torch.load(state / f"{stage}.pt", weights_only=True)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """What `all` leaves, trained from nothing for a few steps a stage."""
    path = tmp_path_factory.mktemp("train")
    train("all", path, "--steps", 4)
    return path


def test_all_stages(state):
    for stage in train_py.STAGES:
        losses = saved(state, stage)["losses"]
        assert len(losses) == 4 and np.isfinite(losses).all()
    for name in ("vae.png", "decoder.png", "unet.png", "emoji.png"):
        assert (state / name).stat().st_size > 10_000
    model = tiny_sd.load(state / "emoji")
    assert model.config["vae"]["scaling_factor"] == json.loads((state / "scaling_factor.json").read_text())
    assert model.factor == 4 and len(model.tokenizer.vocab) == 2000
    *_, x = tiny_sd.generate(model, "red apple", steps=2)
    pictures = tiny_sd.decode(model, x)
    assert pictures.shape == (1, 64, 64, 3) and pictures.std() > 0


def test_the_folder_is_diffusers(state):
    """The reference loads it without a word about missing or unknown weights, and draws the same picture."""
    pipe = StableDiffusionPipeline.from_pretrained(state / "emoji")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("a cat on a red background", num_inference_steps=4, generator=torch.Generator().manual_seed(3)).images[0]
    model = tiny_sd.load(state / "emoji")
    *_, x = tiny_sd.generate(model, "a cat on a red background", seeds=(3,), steps=4)
    assert np.abs(tiny_sd.decode(model, x)[0].astype(int) - np.asarray(theirs)).max() <= 1


def test_the_decoder_alone(state):
    """Its stage leaves the encoder as it was, changes the decoder, and the exported folder has both."""
    o = argparse.Namespace(state=state, device="cpu", setting=train_py.CONFIGS["small"], seed=0)
    before, after = (train_py.trained(o, stage) for stage in ("vae", "decoder"))
    exported = tiny_sd.flatten(tiny_sd.load(state / "emoji").vae)
    for name in before:
        expected = before[name] if name.startswith(("encoder.", "quant_conv.")) else after[name]
        np.testing.assert_allclose(exported[name].ravel(), expected.numpy().ravel(), rtol=1e-3, atol=1e-6)
    assert not torch.equal(before["decoder.conv_out.weight"], after["decoder.conv_out.weight"])


def test_evaluate(state):
    report = train("evaluate", state, "--limit", 2).stdout
    table = json.loads((state / "emoji.json").read_text())
    assert table["names drawn"] == 2 and all(name in report for name in table) and np.isfinite(list(table.values())).all()


def test_finished_stages_are_left_alone(state):
    before = (state / "vae.pt").read_bytes()
    train("vae", state, "--steps", 4)
    assert (state / "vae.pt").read_bytes() == before


def copy_before(stage, state, path):
    """What the stages before this one left."""
    before = {"vae": [], "decoder": ["vae.pt"], "clip": ["vae.pt", "merges.txt", "scaling_factor.json"]}
    for name in before.get(stage, [*before["clip"], "clip.pt"]):
        os.link(state / name, path / name)


@pytest.mark.parametrize("stage", train_py.STAGES)
def test_on_after_a_kill(stage, state, tmp_path):
    """Killed outright in a stage, the same command goes on from the last step kept; the VAE's and its decoder's end bit
    for bit where they would have ended undisturbed; the others, whose bank of scenes is filled anew, go on with the
    optimizers' state of that step."""
    copy_before(stage, state, tmp_path)
    run = subprocess.Popen(command(stage, tmp_path, "--steps", 4, "--keep-every", 0), stderr=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while not (tmp_path / f"{stage}.pt").exists() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    killed = saved(tmp_path, stage)
    assert 0 < killed["step"] < 4
    train(stage, tmp_path, "--steps", 4)
    ours, undisturbed = saved(tmp_path, stage), saved(state, stage)
    assert ours["losses"][:killed["step"]] == killed["losses"] == undisturbed["losses"][:killed["step"]]
    adam = [[int(s["step"]) for s in state["optimizers"][1]["state"].values()] for state in (ours, undisturbed)]
    assert {*adam[0]} == {*adam[1]} == {4} and len(ours["losses"]) == 4 and np.isfinite(ours["losses"]).all()
    if stage in ("vae", "decoder"):
        assert ours["losses"] == undisturbed["losses"]
        assert all(torch.equal(a, b) for a, b in zip(ours["mean"], undisturbed["mean"], strict=True))


@pytest.mark.parametrize("stage", train_py.STAGES)
def test_two_processes_equal_one(stage, state, tmp_path):
    """With the same pictures a step in all, the loss has the same curve."""
    copy_before(stage, state, tmp_path)
    train(stage, tmp_path, "--steps", 4, launcher=TORCHRUN)
    np.testing.assert_allclose(saved(tmp_path, stage)["losses"], saved(state, stage)["losses"], rtol=0.01)


def test_names_of_emoji():
    """Unicode's own words and the usual aliases, without skin tones and flags."""
    names = dict(train_py.emoji_names())
    assert names["🍎"] == ["red apple", "apple"] and names["🐶"][0] == "dog face" and len(names) > 1600
    assert not any("skin tone" in name or name.startswith("flag:") for said in names.values() for name in said)


def test_too_little_is_said(tmp_path):
    run = subprocess.run(command("clip", tmp_path, "--steps", 1), capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.strip() == f"train.py: {tmp_path / 'vae.pt'} is missing: run the stage vae first"
