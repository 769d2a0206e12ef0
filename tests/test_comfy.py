"""ComfyUI's pictures: their graphs are read as by the package sd-parsers, and the pictures are
drawn again by ComfyUI's own equations.
"""

import contextlib
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sd_parsers import ParserManager

import tiny_sd
from conftest import same
from extras import cli, comfy, formats
from helpers_cli import *  # noqa: F403
from helpers_cli import PLAIN, cli_lines, parse, pixels, write_lora
from helpers_comfy import graph, node, write_graph
from tiny_sd import UserError


def job_of(nodes, *argv, **how):
    links = [[0, value[0], value[1], key, 0, "X"] for key, part in nodes.items()
             for value in part["inputs"].values() if isinstance(value, list)]
    workflow = json.dumps({"links": links})     # the editor's own record, which sd-parsers needs
    write_graph("a.png", json.dumps(nodes), workflow=workflow, **how)
    return cli.make_job(["--like", "a.png", *argv])


def said(job):
    return [line.removeprefix("--like a.png: ") for line in job.notes]


def options(job):
    return (job.prompt, job.negative_prompt, job.seed, job.steps, job.cfg_scale, job.sampler,
            job.schedule, job.width, job.height, job.program)


USUAL = ("a (red:1.3) apple", "blue, (dog)", 2 ** 40 + 7, 20, 6.5, "dpm++2m", "karras", 64, 128,
         "comfyui")
LORAS = {"one": node("LoraLoader", lora_name="x/ink.safetensors", strength_model=0.5,
                     strength_clip=0.5, model="@model", clip="@model"),
         "two": node("LoraLoader", lora_name="pen.safetensors", strength_model=1.0,
                     strength_clip=0.25, model="@one", clip="@one")}
FROM_A_PICTURE = [("drawn", "latent_image", "@latents"), ("drawn", "denoise", 0.5)]
LATENTS = {"latents": node("VAEEncode", pixels="@photo", vae="@model"),
           "photo": node("LoadImage", image="photo.png"), "size": None}
ADVANCED = node("KSamplerAdvanced", add_noise="enable", noise_seed=5, steps=20, cfg=6.5,
                sampler_name="euler", scheduler="normal", start_at_step=0, end_at_step=10000,
                return_with_leftover_noise="disable", model="@model", positive="@good",
                negative="@bad", latent_image="@size")

RING = {f"n{i}": node("ControlNetApply", control_net=f"@n{(i + 1) % 1900}",
                      conditioning=f"@n{(i + 1) % 1900}", image=f"@n{(i + 1) % 1900}",
                      **{f"i{j}": "@n0" for j in range(20)}) for i in range(1900)}


def test_a_ring_of_networks_takes_no_time(tmp_path, monkeypatch):
    """Each was followed through the whole ring."""
    monkeypatch.chdir(tmp_path)
    nodes = graph(**RING, drawn=node("KSampler", seed=1, steps=2, cfg=2, sampler_name="euler",
                                     scheduler="normal", denoise=1, model="@model",
                                     positive="@n0", negative="@bad", latent_image="@size"))
    write_graph("a.png", json.dumps(nodes))
    start = time.process_time()
    with contextlib.suppress(UserError):
        cli.make_job(["--like", "a.png"])
    assert time.process_time() - start < 10


GRAPHS = {      # name: the graph, what it changes of USUAL, and what is said of it
    "text to image": (graph(), {}, []),
    "the noise of steps": (graph([("drawn", "sampler_name", "euler_ancestral")]), {5: "euler_a"}, [
        "the noise of its steps: it came from a Brownian tree or a GPU and is different here"]),
    "advanced": (graph(drawn=ADVANCED), {2: 5, 5: "euler", 6: "normal"}, []),
    "names of schedules": (graph([("drawn", "scheduler", "sgm_uniform"),
                                  ("drawn", "sampler_name", "ddim")]),
                           {5: "ddim", 6: "sgm uniform"}, []),
    "a text from another node": (graph([("good", "text", "@words")],
                                       words=node("String Literal", string="a cat")),
                                 {0: "a cat"}, []),
    "a seed from another node": (graph([("drawn", "seed", "@n")], n=node("Seed", seed=9)),
                                 {2: 9}, []),
    "a model between": (graph([("drawn", "model", "@free")], free=node(
        "FreeU_V2", b1=1.3, model="@model")), {}, [
            "Nodes FreeU_V2 is not repeated: these nodes have no effect here"]),
    "a conditioning between": (graph([("drawn", "positive", "@both")], both=node(
        "ConditioningCombine", conditioning_1="@good", conditioning_2="@bad")), {}, [
            "Nodes ConditioningCombine is not repeated: these nodes have no effect here"]),
    "LoRAs": (graph([("drawn", "model", "@two"), ("good", "clip", "@two")], **LORAS), {}, [
        "Lora pen 1.0 ink 0.5 is not repeated: give it with --lora",
        "LoRA clip pen is not repeated: the U-Net's weight is used for both networks"]),
    "a VAE": (graph([("seen", "vae", "@vae")], vae=node("VAELoader", vae_name="v.pt")), {}, [
        "VAE v.pt is not repeated: give it with --vae"]),
    "an embedding": (graph([("bad", "text", "embedding:easy, (embedding:x.pt:1.2)")]),
                     {1: "embedding:easy, (embedding:x.pt:1.2)"},
                     ["Embedding easy x is not repeated: give it with --embedding"]),
    "from a picture": (graph(FROM_A_PICTURE, **LATENTS), {3: 40}, [
        "Denoising strength 0.5 is not repeated: give its start picture with --init-img"]),
    "from a picture, all of it": (graph(FROM_A_PICTURE[:1], **LATENTS), {}, [
        "Denoising strength 1 is not repeated: give its start picture with --init-img"]),
    "from a picture, advanced": (graph(drawn=ADVANCED | {"inputs": ADVANCED["inputs"] | {
        "start_at_step": 5, "latent_image": ["latents", 0]}}, **LATENTS),
        {2: 5, 5: "euler", 6: "normal"}, [
            "Denoising strength 0.75 is not repeated: give its start picture with --init-img"]),
    "a masked one": (graph([("drawn", "latent_image", "@latents")], **LATENTS | {
        "latents": node("VAEEncodeForInpaint", pixels="@photo", mask="@hole", vae="@model"),
        "hole": node("LoadImage", image="hole.png")}), {}, [
            "Denoising strength 1 is not repeated: give its start picture with --init-img",
            "Mask hole.png is not repeated: give it with --mask"]),
    "a ControlNet": (graph([("drawn", "positive", "@led")], led=node(
        "ControlNetApply", conditioning="@good", control_net="@net", image="@lines", strength=0.8),
        net=node("ControlNetLoader", control_net_name="canny.pth"),
        lines=node("LoadImage", image="lines.png")), {}, [
            "ControlNet canny 0.8 lines.png is not repeated: give it with --control"]),
    "enlarged": (graph([("seen", "samples", "@over")], large=node(
        "LatentUpscaleBy", scale_by=2, samples="@drawn"), over=node(
        "KSampler", seed=1, steps=9, cfg=3, sampler_name="ddim", scheduler="simple", denoise=0.5,
        model="@model", positive="@good", negative="@bad", latent_image="@large")), {}, [
            "Hires KSampler is not repeated: it was enlarged and drawn over: use --hires SCALE",
            "Nodes LatentUpscaleBy is not repeated: these nodes have no effect here"]),
    "half of the steps": (graph(drawn=ADVANCED | {"inputs": ADVANCED["inputs"] | {
        "end_at_step": 10, "return_with_leftover_noise": "enable"}}),
        {2: 5, 5: "euler", 6: "normal"},
        ["this version of euler is not repeated: it takes other steps there"]),
    "refined": (graph([("seen", "samples", "@over")], drawn=ADVANCED, over=ADVANCED | {
        "inputs": ADVANCED["inputs"] | {"add_noise": "disable", "start_at_step": 15,
                                        "latent_image": ["drawn", 0]}}),
                {2: 5, 5: "euler", 6: "normal"}, ["Refiner KSamplerAdvanced is not repeated: a "
                                                  "second model drew the last steps"]),
    "a batch": (graph([("size", "batch_size", 4)]), {}, [
        "one of a batch of 4 is not repeated: only the first is drawn"]),
    "others of the name": (graph([("drawn", "sampler_name", "uni_pc"),
                                  ("drawn", "scheduler", "beta")]), {5: "unipc", 6: "beta"}, [
        "this version of uni_pc is not repeated: it takes other steps there",
        "Noise Schedule beta is not repeated: it used other noise levels"])}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_is_followed(name):
    """sd-parsers, an independent reader, finds the same, as far as it looks."""
    nodes, changed, lines = GRAPHS[name]
    job = job_of(nodes, "--models-dir", ".")
    assert options(job) == tuple(changed.get(i, value) for i, value in enumerate(USUAL))
    assert said(job) == lines

    theirs = next(sampler for sampler in ParserManager().parse("a.png").samplers
                  if sampler.sampler_id == "drawn")
    ours = nodes["drawn"]["inputs"]
    assert (theirs.name, theirs.parameters["cfg_scale"]) == (ours["sampler_name"], job.cfg_scale)
    assert theirs.parameters["steps"] == job.steps or "denoise" in ours and ours["denoise"] < 1
    assert theirs.parameters.get("seed", theirs.parameters.get("noise_seed", job.seed)) == job.seed
    assert theirs.model.name == "some/emoji.safetensors" or nodes["drawn"]["inputs"]["model"] != [
        "model", 0]     # it takes the next node's link for a name
    if not isinstance(nodes["good"]["inputs"]["text"], list):
        assert theirs.prompts[0].value == job.prompt
    assert theirs.negative_prompts[0].value == job.negative_prompt


def test_clip_skip_and_files_that_are_there(model):
    write_lora("ink.safetensors")
    job = job_of(graph([("drawn", "model", "@one"), ("good", "clip", "@skip")], one=LORAS["one"],
                       skip=node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip="@one")),
                 "-m", str(model))
    assert (job.clip_skip, job.lora, job.notes) == (2, [("ink.safetensors", 0.5)], [])


@pytest.mark.parametrize("suffix, tag", [(".webp", 0x0110), (".jpg", 0x010F), (".png", 0x010E)])
def test_graphs_in_exif(suffix, tag):
    exif = Image.Exif()
    exif[tag] = "Prompt:" + json.dumps(graph())
    Image.new("RGB", (8, 8)).save(f"a{suffix}", exif=exif)
    assert options(cli.make_job(["--like", f"a{suffix}"])) == USUAL


def test_a_text_of_the_web_uis_comes_first():
    text = "a cat\nSteps: 3, Sampler: Euler, Seed: 4, Size: 8x8, Model: emoji, Version: ComfyUI"
    job = job_of(graph(), parameters=text)
    assert (job.prompt, job.steps, job.program, job.notes) == ("a cat", 3, "comfyui", [])


def test_not_a_number_beside_the_inputs():
    """ComfyUI itself writes it."""
    nodes = graph()
    nodes["drawn"]["is_changed"] = [float("nan")]
    assert options(job_of(nodes)) == USUAL


# ── Graphs that lead nowhere ────────────────────────────────────────────────────────────────────

CIRCLE = graph([("model", "model", "@one"), ("size", "samples", "@drawn"),
                ("good", "clip", "@one")], one=LORAS["one"])
MANY = {f"n{i}": node("X", a=f"@n{i + 1}") for i in range(3000)}


@pytest.mark.parametrize("nodes, line", [
    ({"3": {"class_type": "KSampler"}}, "a.png does not record its steps, seed and size"),
    (graph(drawn=node("SamplerCustom", model="@model")), "a ComfyUI graph in which no KSampler"),
    (graph([("drawn", "steps", "x")]), "graph whose steps or seed cannot be read"),
    (graph([("drawn", "steps", 10 ** 400)]), "whose steps or seed cannot be read"),
    (graph([("drawn", "denoise", 1e-300)]), "whose steps or seed cannot be read"),
    (graph([("drawn", "denoise", float("nan"))]), "whose steps or seed cannot be read"),
    (graph([("drawn", "steps", 9000)]), "--steps 9000 is not from 1 to 999"),
    (graph([("drawn", "seed", -7)]), "--seed -7 is not from 0 to 2"),
    (graph([("drawn", "cfg", "@none")]), None),
    (graph([("drawn", "seed", [])]), "whose steps or seed cannot be read"),
    (graph([("drawn", "sampler_name", ["x"])]), "drawn with no sampler, which does not exist here"),
    (graph([("drawn", "sampler_name", "dpm_2")]), "drawn with dpm_2, which does not exist here"),
    (graph([("size", "width", "y")]), "invalid int value: 'y'"),
    (graph([("good", "text", {"a": [1]})]), None), (graph([("good", "text", 5)]), None),
    (graph([("drawn", "positive", [["good"], 0]), ("drawn", "negative", 3)]), None),
    (graph([("model", "ckpt_name", "../../etc/x")]), "drawn by the model x, which was not found"),
    (CIRCLE, None), (MANY, "records 3000 nodes: at most 2000"),
    (graph([("good", "text", "a" * 5_000_000)]), "records 500"),
    ("[" * 100_000, "does not record"), ('{"a": ' * 100_000, "does not record"),
    ('{"a": {"class_type": "KSampler", "inputs": {"steps": ' + "[" * 100_000, "does not record")])
def test_graphs_that_lead_nowhere(nodes, line):
    write_graph("a.png", nodes if isinstance(nodes, str) else json.dumps(nodes))
    if line:
        with pytest.raises(UserError) as error:
            cli.make_job(["--like", "a.png"])
        assert line in str(error.value) and "\n" not in str(error.value)
    else:
        cli.make_job(["--like", "a.png"])


CHAIN = {f"n{i}": node("X", **{f"a{k}": f"@n{i + 1}" for k in range(100)}) for i in range(900)}
ENDS = {f"e{i}": node("SaveImage", images="@n0") for i in range(1000)}


@pytest.mark.parametrize("text", [" " * 60_000 + "x", json.dumps(CHAIN | ENDS)], ids=["", "ends"])
def test_graphs_that_lead_nowhere_in_many_ways(text):
    write_graph("a.png", text)
    start = time.process_time()
    with pytest.raises(UserError):
        cli.make_job(["--like", "a.png"])
    assert time.process_time() - start < 10


# ── Prompts ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text, parts", [
    ("a cat", [("a cat", 1)]), ("a (cat) b", [("a ", 1), ("cat", 1.1), (" b", 1)]),
    ("(a (b:1.3) c:0.5)", [("a ", 0.5), ("b", 1.3), (" c", 0.5)]),
    ("((a))", [("a", 1.1 ** 2)]), ("(a:x)", [("a:x", 1.1)]), ("(:2)", [(":2", 1.1)]),
    (r"\(a\) (b\):2)", [("(a) ", 1), ("b)", 2)]), ("[a] BREAK", [("[a] BREAK", 1)]),
    ("a (b", [("a ", 1), ("(b", 1)]), ("a) b (c)", [("a) b (c)", 1)]), ("()", []), ("", []),
    ("(a:1:2)", [("a:1", 2)]), ("(a: 1.5 )", [("a", 1.5)]), ("(a:-1)", [("a", -1)])])
def test_weights(text, parts):
    found = comfy.weighted_parts(text)
    assert [part for part, _ in found] == [part for part, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize("text", ["(a:nan)", "(a:inf)", "(" * 300 + "a" + ")" * 300, "(a:1e7)",
                                  "a" * 20_000])
def test_weights_beyond_reason(text):
    with pytest.raises(UserError, match="the prompt"):
        comfy.chunks_of(formats.clip_tokenizer(), text)


def x(n):
    return " ".join("x" * n)


@pytest.mark.parametrize("text, lengths", [
    ("", [0]), (x(75), [75]), (x(76), [75, 1]), (f"{x(70)}, {x(10)}", [75, 6]),
    (f"({x(70)}:1.2) {x(7)}", [70, 7]), (f"({x(70)}:1.2) {x(8)}", [75, 3]),
    (f"({x(70)}:1.2) {x(170)}", [75, 75, 75, 15])])
def test_chunks(text, lengths):
    """A short part that does not fit moves to the next chunk as a whole; commas do not matter."""
    assert [*map(len, comfy.chunks_of(formats.clip_tokenizer(), text))] == lengths


@pytest.mark.slow
def test_contexts(reference, folder):
    """Against transformers' encoder: each row moves away from that of the empty prompt."""
    model, tokenizer = formats.load(folder), reference.tokenizer
    ids, weights = [tokenizer.bos_token_id], [1.0]
    for text, weight in (("a ", 1.0), ("red", 1.3), (" apple", 1.0), ("dog", 0.0)):
        new = tokenizer(text, add_special_tokens=False).input_ids
        ids, weights = ids + new, weights + [weight] * len(new)
    pad = [tokenizer.eos_token_id]
    with torch.no_grad():
        z, empty = reference.text_encoder(torch.tensor(
            [ids + pad * (77 - len(ids)), [tokenizer.bos_token_id] + pad * 76]))[0]
    w = torch.tensor(weights + [1.0] * (77 - len(weights)))[:, None]
    context, _ = comfy.embed_prompts(model, ["a (red:1.3) apple(dog:0)", ""])
    same("ComfyUI's context", tiny_sd.to_numpy(context[0]), empty + w * (z - empty), 1e-5)
    same("ComfyUI's context", tiny_sd.to_numpy(context[1]), empty, 1e-5)


# ── Pictures ────────────────────────────────────────────────────────────────────────────────────


def as_in_comfyui(model, prompt, n, sampler, karras=False, picture=None, last=None):
    """Return the latents that ComfyUI computes: seed 3, CFG 5, x divided by √ᾱ.

    picture: (its latents' mean; then only the `last` steps are taken).
    """
    context, _ = comfy.embed_prompts(model, ["", prompt])
    logs = np.log((1 - model.alpha_bars) / model.alpha_bars) / 2
    sigmas = np.exp(np.interp(np.linspace(999, 0, n), np.arange(1000), logs))
    if karras:
        low, high = np.exp(logs[[0, -1]]) ** (1 / 7)
        sigmas = (high + np.linspace(0, 1, n) * (low - high)) ** 7
    sigmas = [*sigmas[-(last or n):], 0.0]
    noise = torch.randn((1, 4, 8, 8), generator=torch.manual_seed(3)).numpy()
    noise = noise.transpose(0, 2, 3, 1).astype(float)

    def denoised(x, sigma):
        t = abs(logs - np.log(sigma)).argmin()
        one, other = (x - sigma * tiny_sd.predict(model, (x / (sigma ** 2 + 1) ** 0.5).astype(
            np.float32), int(t), row[None]) for row in context)
        return one + 5 * (other - one), one

    x = noise * (1 + sigmas[0] ** 2) ** 0.5 if picture is None else picture + sigmas[0] * noise
    old = None
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        new, plain = denoised(x, sigma)
        slope = new
        if sampler == "dpmpp_2m" and old is not None and after:
            r = np.log(sigmas[i - 1] / sigma) / np.log(sigma / after)
            slope = (1 + 1 / (2 * r)) * new - old / (2 * r)
        old = new
        if sampler == "euler_cfg_pp":
            x = new + after * (x - plain) / sigma
        else:
            x = after / sigma * x + (1 - after / sigma) * slope
    return x.astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_cfg_pp"])
@pytest.mark.parametrize("scheduler", ["normal", "karras"])
def test_a_graph_draws_what_comfyui_draws(folder, sampler, scheduler):
    job_of(graph([
        ("drawn", "seed", 3), ("drawn", "cfg", 5), ("drawn", "sampler_name", sampler),
        ("drawn", "scheduler", scheduler), ("drawn", "steps", 6), ("bad", "text", ""),
        ("size", "width", 64), ("size", "height", 64)]))
    assert cli.main(["--like", "a.png", "-m", str(folder), "-o", "b.png"]) == 0
    model = formats.load(folder)
    x = as_in_comfyui(model, "a (red:1.3) apple", 6, sampler, scheduler == "karras")
    found = pixels(Image.open("b.png"))
    assert abs(found - tiny_sd.decode(model, x)[0]).max() <= 1 and found.std() > 1


@pytest.mark.slow
def test_a_graph_that_begins_with_a_picture(folder):
    PLAIN.resize((64, 64)).save("photo.png")
    job_of(graph([
        *FROM_A_PICTURE, ("drawn", "seed", 3), ("drawn", "cfg", 5), ("drawn", "steps", 4),
        ("drawn", "sampler_name", "euler"), ("drawn", "scheduler", "normal"), ("bad", "text", "")],
        **LATENTS), size=(64, 64))
    assert cli.main(["--like", "a.png", "-m", str(folder), "-i", "photo.png", "-o", "b.png"]) == 0
    model = formats.load(folder)
    mean = tiny_sd.encode(model, np.asarray(PLAIN.resize((64, 64))), 0.0)
    x = as_in_comfyui(model, "a (red:1.3) apple", 8, "euler", picture=mean, last=4)
    assert abs(pixels(Image.open("b.png")) - tiny_sd.decode(model, x)[0]).max() <= 1


def test_a_graph_draws_what_the_same_options_draw(run):
    """And the picture records it, for the next one."""
    job_of(graph([("size", "height", 16), ("size", "width", 16)]))
    assert run.bare("--like", "a.png", "-m", run.model, "-o", "b.png")[0] == 0
    assert run.bare("a (red:1.3) apple", "-n", "blue, (dog)", "-s", str(2 ** 40 + 7), "--steps",
                    "20", "--cfg-scale", "6.5", "--sampler", "DPM++ 2M Karras", "-W", "16", "-H",
                    "16", "-m", run.model, "--as", "comfyui", "-o", "c.png")[0] == 0
    assert (pixels(Image.open("b.png")) == pixels(Image.open("c.png"))).all()
    assert parse(Image.open("b.png"))[2]["Levels"] == "ComfyUI"
    assert cli_lines(run, "--like", "b.png", "-o", "d.png")[::2] == (0, [])
    assert (pixels(Image.open("d.png")) != pixels(Image.open("b.png"))).any()   # of 2 steps
    assert run.bare("--like", "b.png", "-m", run.model, "-o", "e.png")[0] == 0
    assert (pixels(Image.open("e.png")) == pixels(Image.open("b.png"))).all()
