"""--like: pictures drawn again from what they record, by this program and by others."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager

from extras import cli, facts, formats, like_diffusers, prompts, samplers
from helpers import sd, write_model
from helpers_cli import *  # noqa: F403
from helpers_cli import PLAIN, cli_lines, parse, pixels, write_facts
from tiny_sd import UserError


def test_like_draws_the_picture_again(tmp_path):
    first, again, other, model = (tmp_path / "first.png", tmp_path / "again.png",
                                  tmp_path / "other.png", str(write_model(tmp_path / "m")))
    prompt = "red, apple: Steps: 3\nNegative prompt: x"
    how = ["-n", "a, b: c", "--steps", "3", "-s", "7", "--sampler", "euler", "--karras",
           "--cfg-scale", "3.5", "-W", "20", "-H", "12"]
    assert cli.main([prompt, "-m", model, "-o", str(first), *how]) == 0
    words, negative, facts = parse(Image.open(first))
    assert (words, negative, facts["Seed"]) == (prompt, "a, b: c", "7")
    assert cli.main(["--like", str(first), "-m", model, "-o", str(again)]) == 0
    assert again.read_bytes() == first.read_bytes()
    assert cli.main(["blue", "--like", str(first), "-m", model, "-o", str(other), "-s", "8"]) == 0
    words, _, facts = parse(Image.open(other))
    assert (words, facts["Seed"], facts["Sampler"]) == ("blue", "8", "Euler Karras")


def test_like_reads_what_other_programs_write(tmp_path):
    info = PngInfo()
    info.add_text(
        "parameters",
        "a (cat:1.2), sitting\nNegative prompt: dog, bad\nSteps: 25, Sampler: DPM++ 2M, "
        "Schedule type: Karras, CFG scale: 6.5, Seed: 42, Size: 512x768, Model hash: 6ce0161689, "
        "Model: v1-5-pruned-emaonly, RNG: CPU, Version: v1.10.1")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    args = cli.make_job(["--like", str(tmp_path / "a.png"), "--steps", "9", "-m", "emoji"])
    assert (args.prompt, args.negative_prompt, args.steps, args.sampler, args.schedule,
            args.cfg_scale, args.seed, args.width, args.height) == (
                "a (cat:1.2), sitting", "dog, bad", 9, "dpm++2m", "karras", 6.5, 42, 512, 768)


def test_like_says_what_it_does_not_take_up(run):
    PLAIN.save("in.png")
    write_facts("a.png",
                "red apple\nNegative prompt: \nSteps: 2, Sampler: Euler, Seed: 3, Size: 16x16, "
                "Model: /etc/other, Denoising strength: 0.5, Lora: some 0.8 other 1, Eta: 0.5, "
                "Foo: 1, Hires resize: 32x0, ENSD: 31337, RNG: NV")
    status, out, err = cli_lines(run, "--like", "a.png", model=False)
    assert (status, out) == (2, []) and err == [
        "a.png was drawn by the model /etc/other, which was not found: give it, or "
        "another one, with --model"]
    _, _, err = cli_lines(run, "--like", "a.png")
    assert err == ["--like a.png: " + line for line in [
        "Lora some 0.8 other 1 is not repeated: give it with --lora",
        "Hires resize 32x0 is not repeated: it was enlarged and drawn over: use --hires SCALE",
        "RNG NV is not repeated: its noise came from a GPU and is different here",
        "ENSD 31337 is not repeated: the sampler's own noise came from another seed",
        "Eta 0.5; Foo 1 are not repeated"]]


def test_like_image_to_image(run):
    PLAIN.resize((16, 16)).save("in.png")
    write_facts("a.png", "red apple\nSteps: 2, Sampler: Euler, Seed: 3, Size: 16x16, Model: m, "
                "Denoising strength: 0.5, RNG: CPU, Mask blur: 4")
    assert cli_lines(run, "--like", "a.png")[2] == [
        "--like a.png: Denoising strength 0.5 is not repeated: give its start picture with "
        "--init-img"]
    status, out, err = cli_lines(run, "--like", "a.png", "-i", "in.png")
    assert (status, err) == (0, [])
    assert parse(Image.open(out[0]))[2]["Denoising strength"] == "0.5"


@pytest.mark.parametrize("facts, line", [
    ("Version: v1.10.1", "RNG GPU is not repeated"), ("User: me", "RNG GPU is not repeated"),
    ("Version: f2.0.1v1.10.1-previous", "RNG GPU is not repeated"),
    ("RNG: CPU, Version: v1.10.1", None), ("Version: ComfyUI", None),
    ("RNG: CPU, Module 1: x", "Module 1 x is not repeated: give it with --vae"),
    ("RNG: CPU, Postprocess upscale by: 2", "Postprocess upscale by 2 is not repeated"),
    ("RNG: CPU, Fooocus V2 Expansion: a cat", "Fooocus V2 Expansion a cat is not repeated"),
    ("RNG: CPU, Refiner: x, Refiner switch at: 0.8", "Refiner x is not repeated: a second model"),
    ("RNG: CPU, Face restoration: CodeFormer", "Face restoration CodeFormer is not repeated"),
    ("RNG: CPU, Token merging ratio: 0.5", "Token merging ratio 0.5 is not repeated"),
    ("RNG: CPU, Variation seed: 3, Variation seed strength: 0.1", "Variation seed 3 is not"),
    ('RNG: CPU, ControlNet 0: "Module: canny, Weight: 1"', "ControlNet 0 Module: canny, Weight: 1"),
    ('RNG: CPU, Hashes: {"model": "ab", "lora:x": "cd"}, Batch size: 2, Batch pos: 1', None)])
def test_like_names_what_other_programs_do(facts, line):
    write_facts("a.png", "a (cat:1.2)\nSteps: 2, Sampler: Euler, Seed: 3, Size: 8x8, Model: emoji, "
                f"{facts}")
    notes = cli.make_job(["--like", "a.png"]).notes
    assert len(notes) == (line is not None)
    assert not line or notes[0].startswith(f"--like a.png: {line}")


@pytest.mark.parametrize("facts, expected", [
    ("Sampler: Euler, Version: v1.10.1", ("euler", None, "web-ui")),
    ("Sampler: DPM++ 2M, Schedule type: SGM Uniform, Version: f2.0.1v1.10.1",
     ("dpm++2m", "sgm uniform", "web-ui")),
    ("Sampler: DPM++ 2M Karras", ("dpm++2m", "karras", "web-ui")),
    ("Sampler: dpmpp_2m", ("dpm++2m", "normal", "comfyui")),
    ("Sampler: dpmpp_2m_karras", ("dpm++2m", "karras", "comfyui")),
    ("Sampler: euler simple", ("euler", "simple", "comfyui")),
    ("Sampler: Euler, Version: tiny_sd 0.2.0", ("euler", None, None)),
    ("Sampler: Euler, Levels: web UI, Version: tiny_sd 0.3.0", ("euler", None, "web-ui")),
    ("Sampler: Euler, Levels: ComfyUI, Version: tiny_sd 0.3.0", ("euler", None, "comfyui"))])
def test_the_levels_are_those_of_the_program(facts, expected):
    write_facts("a.png", f"red\nSteps: 2, Seed: 3, Size: 64x64, Model: emoji, RNG: CPU, {facts}")
    job = cli.make_job(["--like", "a.png"])
    assert (job.sampler, job.schedule, job.program) == expected and job.notes == []


def test_the_scale_of_cfg_pp_in_the_web_ui():
    write_facts("a.png", "red\nSteps: 2, Sampler: DDIM CFG++, CFG scale: 7.5, Seed: 3, "
                "Size: 64x64, Model: emoji, RNG: CPU, Version: v1.10.1")
    job = cli.make_job(["--like", "a.png"])
    assert (job.sampler, job.cfg_scale) == ("ddim_cfg++", 0.6)


def test_the_noise_of_a_sampler_that_is_other_noise_here():
    write_facts("a.png", "red\nSteps: 2, Sampler: DPM++ 2M SDE Karras, Seed: 3, Size: 64x64, "
                "Model: emoji, RNG: CPU, Version: v1.10.1")
    note, = cli.make_job(["--like", "a.png"]).notes
    assert note.endswith("steps: it came from a Brownian tree or a GPU and is different here")


def test_like_a_picture_of_the_web_ui(model):
    """With all that it records of a prompt, and no negative prompt."""
    write_facts("a.png", "a (cat:1.2) <lora:some thing:0.8>, neg-emb\nSteps: 20, Sampler: Euler a, "
                "Schedule type: Automatic, CFG scale: 7, Seed: 42, Size: 512x768, Model hash: "
                "6ce0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, "
                'TI hashes: "neg-emb: c74b4e810b03, neg-emb: c74b4e810b03", '
                'Lora hashes: "some thing: 0123456789ab", RNG: CPU, Version: v1.10.1')
    Path("loras").mkdir()
    for name in "loras/some thing.safetensors", "neg-emb.pt", "v1-5-pruned-emaonly.safetensors":
        Path(name).touch()
    args = cli.make_job(["--like", "a.png"])
    assert args.notes == [] and args.model == "v1-5-pruned-emaonly.safetensors"
    assert args.prompt.startswith("a (cat:1.2) <lora") and args.negative_prompt is None
    assert (args.sampler, args.clip_skip, args.seed) == ("euler_a", 2, 42)
    (lora, weight), (embedding,) = *args.lora, args.embedding
    assert Path(lora).samefile("loras/some thing.safetensors") and weight == 0.8
    assert Path(embedding).samefile("neg-emb.pt")


def test_like_without_a_lora_says_so_and_draws(run):
    write_facts("a.png", "red <lora:none:0.8> <hypernet:x:1> <lora:no:1>\nSteps: 2, "
                         "Sampler: Euler, Seed: 3, Size: 16x16, RNG: CPU")
    status, out, err = cli_lines(run, "--like", "a.png")
    assert ((status, out) == (0, ["out.png"]) and err == [
        "--like a.png: <lora:none:0.8>, <lora:no:1> are not repeated: there is no such LoRA beside "
        "the model, in loras/ or here: --lora FILE names one elsewhere",
        "--like a.png: <hypernet:x:1> is not repeated: only tags <lora:name:weight> work here"])


def test_like_with_a_sampler_instead_of_one_unknown_here(run, refuse):
    write_facts("a.png", "red\nSteps: 2, Sampler: DPM2 a, Seed: 3, Size: 16x16, RNG: CPU")
    assert "a.png was drawn with DPM2 a" in refuse("--like", "a.png")
    assert run("--like", "a.png", "--sampler", "ddim")[0] == 0
    assert parse(Image.open("out.png"))[2]["Sampler"] == "DDIM"


def test_an_empty_negative_prompt_is_not_none(run):
    assert run("red", "-n", "", "-o", "a.png")[0] == run("red", "-o", "b.png")[0] == 0
    for name, negative in ("a.png", ""), ("b.png", None):
        args = cli.make_job(["--like", name, "-m", run.model])
        assert args.negative_prompt == negative


def test_like_takes_no_model_from_a_strangers_picture(run, refuse, here):
    for name in (str(here), "..", "a/b", "../weights/emoji", "state\0", "463d6a9fe8"):
        write_facts("a.png", "red\nSteps: 2, Sampler: Euler, Seed: 3, Size: 16x16, Model hash: x, "
                    f"Model: {name}")
        with pytest.raises(UserError, match="a.png was drawn by the model "):
            cli.make_job(["--like", "a.png"])
    write_facts("a.png", "red\nSteps: 2, Sampler: Euler, Seed: 3, Size: 16x16, Model hash: 463d6a9")
    with pytest.raises(UserError, match="drawn by the model 463d6a9, which"):
        cli.make_job(["--like", "a.png"])
    write_facts("a.png", "red\nSteps: 2, Sampler: Euler, Seed: 3, Size: 16x16, RNG: CPU")
    note = "the model is not recorded: the bundled model draws; choose another with --model"
    assert cli.make_job(["--like", "a.png"]).notes == [f"--like a.png: {note}"]
    assert cli_lines(run, "--like", "a.png")[2] == []


@pytest.mark.parametrize("negative", [
    "blue Negative prompt: green", "Negative prompt: green", "a\nNegative prompt: b", " a ", "\n",
    "Steps: 3", "a, b: c\n"])
def test_a_negative_prompt_stays_where_it_is(run, negative):
    assert run("red", "-n", negative, "-o", "a.png")[0] == 0
    assert run("--like", "a.png", "-o", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize("prompt", ["red\nNegative prompt: x", "\n\nred\n", "Steps: 5, Sampler: x",
                                    "\ud800", "", "a\0b", "🍎\r\n"])
def test_any_prompt_is_drawn_again(run, prompt):
    assert run(f"--prompt={prompt}", "-o", "a.png")[0] == 0
    assert run("--like", "a.png", "-o", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize("kind", ["v", "sample", "epsilon"])
def test_what_is_predicted_is_recorded(run, kind):
    assert run("red", "--prediction", kind, "-o", "a.png")[0] == 0
    assert run("--like", "a.png", "-o", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_like_with_another_sampler_leaves_karras(run):
    assert run("red", "--sampler", "euler", "--karras", "-o", "a.png")[0] == 0
    assert run("--like", "a.png", "--sampler", "lcm", "-o", "b.png")[0] == 0
    assert parse(Image.open("b.png"))[2]["Sampler"] == "LCM"
    assert run("--like", "a.png", "--sampler", "dpm++2m", "-o", "c.png")[0] == 0
    assert parse(Image.open("c.png"))[2]["Sampler"] == "DPM++ 2M Karras"


@pytest.mark.parametrize("text", ["a" * 10 ** 6, "a: " * 330_000, "A " * 500_000, '"' * 10 ** 6])
def test_a_million_letters_that_tell_nothing(refuse, text):
    write_facts("a.png", f"Steps: 2, {text}")
    start = time.process_time()
    assert "a.png" in refuse("--like", "a.png")
    assert time.process_time() - start < 20


def test_a_picture_that_names_files_without_end(refuse):
    write_facts("a.png", "Steps: 2, Sampler: Euler, Seed: 1, Size: 16x16, Lora: " + "a 1 " * 10_000)
    start = time.process_time()
    assert "names 10000 files" in refuse("--like", "a.png")
    assert time.process_time() - start < 20


LINE = ("Steps: 20, Sampler: Euler a, CFG scale: 6.5, Seed: 42, Size: 512x768, Model: emoji, "
        "RNG: CPU")
DETAILER = LINE + ', ADetailer prompt: "a face, Steps: 3, Seed: 4", ADetailer model: face.pt'


@pytest.mark.parametrize("text", [
    f"a cat\nNegative prompt: dog\n{LINE}", f"a cat\nNegative prompt: dog\n{DETAILER}",
    f"a cat Negative prompt: dog {LINE}", f"a cat\nNegative prompt: dog {DETAILER}",
    f"a cat\nNegative prompt: dog\n{LINE.replace('CFG scale', 'CFG Scale')}",
    f"a cat\nNegative prompt: dog\n{LINE}\nTemplate: a __cat__, {{a|b}}\nNegative Template: dog",
    f'a cat\nNegative prompt: dog\n{LINE}, Civitai resources: [{{"type":"checkpoint","a":[1,2]}}], '
    'Civitai metadata: {}'])
def test_each_program_has_its_own_spelling(text):
    write_facts("a.png", text)
    args = cli.make_job(["--like", "a.png"])
    assert (args.prompt, args.negative_prompt, args.cfg_scale, args.seed, args.steps, args.width,
            args.sampler) == ("a cat", "dog", 6.5, 42, 20, 512, "euler_a")
    said = ["details such as faces were detected and redrawn"] * ("ADetailer" in text)
    assert [note.split(": ")[-1] for note in args.notes] == said


@pytest.mark.parametrize("code", [b"UNICODE\0", b"ASCII\0\0\0", b"\0" * 8, b""])
@pytest.mark.parametrize("codec", ["utf-16-be", "utf-16-le", "utf-16", "utf-8", "utf-8-sig"])
@pytest.mark.parametrize("directory", ["Exif", "first"])
def test_texts_in_exif(code, codec, directory):
    if codec.startswith("utf-16") and code != b"UNICODE\0":
        pytest.skip("only UNICODE means UTF-16")
    exif, text = Image.Exif(), f"a café\nNegative prompt: 灯台\n{LINE}"
    (exif.get_ifd(0x8769) if directory == "Exif" else exif)[0x9286] = code + text.encode(codec)
    Image.new("RGB", (8, 8)).save("a.jpg", exif=exif)
    args = cli.make_job(["--like", "a.jpg"])
    assert (args.prompt, args.negative_prompt, args.seed) == ("a café", "灯台", 42)


@pytest.mark.parametrize("chunks, program", [
    ({"prompt": '{"3": {"class_type": "KSampler"}}', "workflow": "{}"}, "ComfyUI"),    # no inputs
    ({"invokeai_metadata": '{"seed": 1, "steps": 30}'}, "InvokeAI"),
    ({"Software": "NovelAI", "Description": "a cat", "Comment": '{"steps": 28}'}, "NovelAI"),
    ({"parameters": '{"sui_image_params": {"prompt": "a cat", "steps": 20}}'}, "SwarmUI"),
    ({"fooocus_scheme": "fooocus", "parameters": '{"steps": 30, "seed": 1}'}, "Fooocus")])
def test_pictures_of_other_programs_are_told_apart(refuse, chunks, program):
    info = PngInfo()
    for name, text in chunks.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=info)
    assert refuse("--like", "a.png") == (
        "tiny_sd: a.png does not record its steps, seed and size as AUTOMATIC1111 does, nor as "
        f"{program} may do")


RECORDS = {     # program: its texts, what sd-parsers needs besides, and what is not repeated
    "InvokeAI": ({"invokeai_metadata": {
        "app_version": "3.7.0", "generation_mode": "txt2img", "positive_prompt": "a cat",
        "negative_prompt": "dog", "width": 64, "height": 128, "seed": 42, "rand_device": "cpu",
        "cfg_scale": 6.5, "steps": 25, "scheduler": "dpmpp_2m_k", "model": {
            "model_name": "emoji", "base_model": "sd-1"}, "controlnets": [], "clip_skip": 0,
        "loras": [{"lora": {"model_name": "ink"}, "weight": 0.5}]}}, {}, [
            "Lora ink 0.5 is not repeated: give it with --lora"]),
    "InvokeAI of its first years": ({"sd-metadata": {
        "model": "stable diffusion", "model_weights": "emoji", "model_hash": "x", "image": {
            "prompt": [{"prompt": "a cat", "weight": 1}], "steps": 25, "cfg_scale": 6.5,
            "sampler": "dpmpp_2m karras", "seed": 42, "width": 64, "height": 128, "uc": "dog"}}},
        {}, []),
    "Fooocus": ({"parameters": {
        "base_model": "emoji", "base_model_hash": "ab", "created_by": "me", "full_prompt": ["x"],
        "guidance_scale": 6.5, "loras": [["ink.safetensors", 0.5, "ab"]],
        "metadata_scheme": "fooocus", "negative_prompt": "dog", "performance": "Speed",
        "prompt": "a cat", "refiner_model": "None", "resolution": "(64, 128)",
        "sampler": "dpmpp_2m", "scheduler": "karras", "seed": "42", "sharpness": 2, "steps": 25,
        "styles": "['V2']", "version": "Fooocus v2.3.1"}}, {"fooocus_scheme": "fooocus"}, [
            "Lora ink 0.5 is not repeated: give it with --lora",
            "sharpness 2; styles ['V2'] are not repeated"]),
    "NovelAI": ({"Comment": {
        "prompt": "a {cat}", "steps": 25, "height": 128, "width": 64, "scale": 6.5, "seed": 42,
        "uncond_scale": 1.0, "n_samples": 1, "noise_schedule": "karras", "sampler": "k_dpmpp_2m",
        "uc": "dog", "sm": False}},
        {"Software": "NovelAI", "Description": "a {cat}", "Source": "Stable Diffusion F64BA557"}, [
            "the model is not recorded: the bundled model draws; choose another with --model",
            "RNG GPU is not repeated: its noise came from a GPU and is different here",
            "Emphasis NovelAI's is not repeated: weights work differently there",
            "sm False is not repeated"])}


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_other_programs(name):
    """sd-parsers, a reader by others, finds the same."""
    chunks, others, lines = RECORDS[name]
    info = PngInfo()
    for key, text in ({key: json.dumps(said) for key, said in chunks.items()} | others).items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=info)
    job = cli.make_job(["--like", "a.png"])
    assert (job.prompt, job.negative_prompt, job.steps, job.cfg_scale, job.seed, job.width,
            job.height, job.sampler, job.schedule, job.program) == (
                "a {cat}" if name == "NovelAI" else "a cat", "dog", 25, 6.5, 42, 64, 128,
                "dpm++2m", "karras", None)
    assert [line.removeprefix("--like a.png: ") for line in job.notes] == lines

    theirs, = ParserManager().parse("a.png").samplers
    assert samplers.sampler_named(theirs.name.removesuffix("_k"))[0] == job.sampler
    assert theirs.parameters["cfg_scale"] == job.cfg_scale
    assert [prompt.value for prompt in theirs.prompts] == [job.prompt]
    assert int(theirs.parameters["seed"]) == job.seed


@pytest.mark.parametrize("said", [
    [], 5, {"seed": 1}, {"steps": [[[[1]]]], "seed": {"name": {}}, "width": 1, "height": 2},
    {"steps": "x", "seed": 1, "width": 8, "height": 8}, {"image": 5, "seed": 1, "steps": 2},
    {"image": [[True, 0]], "steps": 2, "seed": 1, "width": 8, "height": 8},
    {"steps": 2, "seed": float("nan"), "width": "8", "height": "8"}, "[" * 10 ** 5])
def test_records_that_say_nothing(refuse, said):
    info = PngInfo()
    info.add_text("invokeai_metadata", said if isinstance(said, str) else json.dumps(said))
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=info)
    assert refuse("--like", "a.png")


def test_the_weightiest_comes_first_and_nothing_is_cut(model):
    write_facts("a.png", "a\nSteps: 30, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, "
                "Size: 512x768, Model hash: 463d6a9fe8, Model: m, Denoising strength: 0.35, "
                "ADetailer model: a, "
                "ADetailer confidence: 0.3, ADetailer dilate erode: 4, ADetailer mask blur: 4, "
                "ADetailer version: 24, ControlNet 0: x, ControlNet 1: y, Hires upscale: 2, "
                "Eta: 1, Hires upscaler: Latent, Variation seed: 1, ENSD: 3, Foo: 1, Bar: 2, "
                "Version: v1.6.0")
    args = cli.make_job(["--like", "a.png", "-m", str(model)])
    assert [line.split(": ")[1].split(" is not")[0] for line in args.notes] == [
        "Hires upscaler Latent", "ControlNet 0 x", "RNG GPU", "ADetailer model a",
        "Variation seed 1", "ENSD 3", "Bar 2; Eta 1; Foo 1 are not repeated"]


def test_quoted_facts_of_other_programs():
    found = facts.read_facts('Steps: 2, Lora hashes: "a: 1, b: 2", Seed: 3')
    assert found == {"Steps": "2", "Lora hashes": "a: 1, b: 2", "Seed": "3"}
    found = facts.read_facts('Steps: 2, Hashes: {"model": "a", "b": "c"}, X: "\\"a\\\\", Y: 4')
    assert found == {"Steps": "2", "Hashes": '{"model": "a", "b": "c"}', "X": '"a\\', "Y": "4"}


# ── The levels of the web UI ──────────────────────────────────────────────────────────────────────

def drawn_by_the_web_ui(model, prompt, n, sampler, karras):
    """Return the latents as k-diffusion walks to them, in the web UI's settings: seed 3, CFG 5.

    x is x̄ = x_t / √ᾱ throughout, as there, and in float64.
    """
    context, _ = prompts.embed_prompts(model, [None, prompt])
    logs = np.log((1 - model.alpha_bars) / model.alpha_bars) / 2
    sigmas = np.exp(np.interp(np.linspace(999, 0, n), np.arange(1000), logs))
    if karras:
        low, high = np.exp(logs[[0, -1]]) ** (1 / 7)
        sigmas = (high + np.linspace(0, 1, n) * (low - high)) ** 7
    sigmas, noise = [*sigmas, 0.0], like_diffusers.Noise(3)

    def denoised(x, sigma):
        t, x_in = np.interp(np.log(sigma), logs, np.arange(1000)), x / (sigma ** 2 + 1) ** 0.5
        one, other = (x - sigma * sd.predict(model, x_in.astype(np.float32), t, row[None])
                      for row in context)
        return one + 5 * (other - one)

    x, old = sigmas[0] * noise(8, 8, 4)[None].astype(float), None
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        new = denoised(x, sigma)
        if sampler == "Euler":
            x = x + (x - new) / sigma * (after - sigma)
        elif sampler == "Euler a":
            up = after / sigma * (sigma ** 2 - after ** 2) ** 0.5
            x = x + (x - new) / sigma * ((after ** 2 - up ** 2) ** 0.5 - sigma)
            x = x + noise(8, 8, 4) * up if after else x
        else:       # DPM++ 2M
            slope = new
            if old is not None and after:
                r = np.log(sigmas[i - 1] / sigma) / np.log(sigma / after)
                slope = (1 + 1 / (2 * r)) * new - old / (2 * r)
            x, old = after / sigma * x + (1 - after / sigma) * slope, new
    return x


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DPM++ 2M", "Euler Karras",
                                     "DPM++ 2M Karras"])
def test_like_draws_with_the_levels_of_the_program(folder, sampler):
    """Whatever the model's own config is, here "leading"."""
    facts = f"Steps: 6, Sampler: {sampler}, CFG scale: 5, Seed: 3, Size: 64x64, Model: small"
    write_facts("a.png", f"a red apple\n{facts}, RNG: CPU, Version: v1.10.1")
    assert cli.main(["--like", "a.png", "-m", str(folder), "-o", "b.png"]) == 0
    model = formats.load(folder)
    x = drawn_by_the_web_ui(model, "a red apple", 6, sampler.removesuffix(" Karras"),
                            "Karras" in sampler)
    assert abs(pixels(Image.open("b.png")) - sd.decode(model, x.astype(np.float32))[0]).max() <= 1
    assert cli.main(["--like", "b.png", "-m", str(folder), "-o", "c.png"]) == 0
    assert Path("b.png").read_bytes() == Path("c.png").read_bytes()
    assert cli.main(["a red apple", "-m", str(folder), "--sampler", sampler, "--steps", "6",
                     "-s", "3", "--cfg-scale", "5", "-o", "d.png"]) == 0
    assert Path("b.png").read_bytes() != Path("d.png").read_bytes()
