"""The command line, with a random model that draws in milliseconds.

Its output, its messages, and its errors.
"""

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from extras import cli, fast, formats, like_diffusers, named
from helpers import finish, launch, sd
from helpers_cli import *  # noqa: F403
from helpers_cli import PLAIN, SCHEDULER, change, cli_lines, parse, pixels, start

# ── What it writes ────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("flags, size", [("", (16, 16)), ("-W 12", (12, 16)), ("-H 26", (16, 26)),
                                         ("-W 4 -H 34", (4, 34))])
def test_size(draw, flags, size):
    """Any multiples of the model's factor, here 2; by default the model's own size."""
    picture = draw("red apple", *flags.split())
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", size)


def test_parameters(draw):
    prompt, negative = "a lighthouse, (stormy:1.2), 灯台\nat night", "blur: none"
    picture = draw(*"-s 42 --steps 3 --cfg-scale 4.5 --sampler dpm++2m --karras -W 12".split(),
                   prompt, "-n", negative)
    assert parse(picture) == (prompt, negative,
                              {"Steps": "3", "Sampler": "DPM++ 2M Karras", "CFG scale": "4.5",
                               "Seed": "42", "Size": "12x16", "Model": "tiny", "RNG": "CPU",
                               "Version": f"tiny_sd {sd.__version__}"})


def test_parameters_with_all_left_as_it_is(draw):
    prompt, negative, facts = parse(draw("-p", "red apple"))
    assert (prompt, negative) == ("red apple", "")
    assert facts.items() >= {"Sampler": "DPM++ 2M", "CFG scale": "7.5", "Seed": "0"}.items()
    assert "Denoising strength" not in facts


def test_parameters_of_a_batch_from_a_picture(run):
    Image.new("RGB", (9, 5), "red").save("in.png")
    _, out, _ = run(*"apple -b 2 -s 7 -i in.png --strength 0.5 --sampler euler_a".split())
    facts = [parse(Image.open(path))[2] for path in out]
    assert [f["Seed"] for f in facts] == ["7", "8"]
    assert all((f["Denoising strength"], f["Sampler"]) == ("0.5", "Euler a") for f in facts)


def test_a_batch_is_numbered_and_each_picture_is_that_of_its_own_seed(run, draw):
    status, out, _ = run("apple", "-b", "3", "-s", "5", "-o", "some.png")
    assert status == 0 and out == ["some-000.png", "some-001.png", "some-002.png"]
    for seed, path in zip((5, 6, 7), out):
        assert abs(pixels(draw("apple", "-s", str(seed))) - pixels(Image.open(path))).max() <= 1


def test_the_same_command_draws_the_same_file(run):
    run("apple")
    run("apple")
    assert Path("out.png").read_bytes() == Path("out-1.png").read_bytes()


@pytest.mark.parametrize(
    "flags", ["-s 1", "-n apple", "--cfg-scale 2", "--guidance-scale 1", "--steps 3", "--karras",
              "--web-ui", *(f"--sampler {name}" for name in sd.SAMPLERS if name != "dpm++2m")])
def test_every_option_matters(draw, flags):
    plain = ["red", "--steps", "4", "--sampler", "dpm++2m"]
    assert abs(pixels(draw(*plain, *flags.split())) - pixels(draw(*plain))).max() > 0


@pytest.mark.slow
def test_the_library_draws_the_commands_picture(run, model):
    """Without options, both use the model's own sampler, steps and guidance."""
    folder = Path(shutil.copytree(model, "model"))
    change(SCHEDULER, _class_name="EulerDiscreteScheduler", _guidance_scale=3)(folder)
    assert run.bare("red", "-m", "model")[0] == 0
    loaded, drawn = sd.load("model"), pixels(Image.open("out.png"))
    for said, same in ({}, True), ({"guidance": 7.5}, False):
        *_, x = like_diffusers.generate(loaded, "red", **said)
        assert np.array_equal(sd.decode(loaded, x)[0], drawn) == same


def test_by_the_formulas_alone(run, monkeypatch):
    """No faster form is called, although all are loaded."""
    def fail(*args, **settings):
        raise AssertionError
    monkeypatch.setattr(sd, "FAST", dict.fromkeys(sd.FAST, fail))
    assert run("red", "--formulas")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags, tolerance",
                         [("--backend torch", 1), ("--backend torch --dtype bfloat16", 60),
                          ("--backend torch --dtype float16", 12)])
def test_torch_draws_the_same_picture(draw, flags, tolerance):
    pytest.importorskip("torch")
    assert abs(pixels(draw("red apple", *flags.split()))
               - pixels(draw("red apple"))).max() <= tolerance


def test_a_model_by_name_lies_in_weights_unless_there_is_a_folder_of_that_name(draw, model, here,
                                                                               monkeypatch):
    monkeypatch.setattr(sd, "HERE", here / "program")
    shutil.copytree(model, here / "program/weights/mine")
    assert parse(draw("a", "-m", "mine"))[2]["Model"] == "mine"
    Path("mine").mkdir()
    assert cli.main(["a", "-m", "mine"]) == 2


@pytest.mark.parametrize("argv", [["red apple " * 6], ["red", "-n", "red apple " * 6]])
def test_a_prompt_that_is_too_long_says_what_is_cut(run, argv):
    """On a separate line. The model has room for ten words."""
    status, _, err = run(*argv)
    said = [line for line in err if line.startswith("tiny_sd: ")]
    assert status == 0 and len(said) == 1 and said[0].endswith("does not see: red apple")
    assert "the prompt 'red apple red apple red apple" in said[0] and "10 tokens" in said[0]


def test_what_is_cut_changes_nothing(draw):
    assert np.array_equal(pixels(draw("red apple " * 9)), pixels(draw("red apple " * 5)))


@pytest.mark.parametrize(
    "prompt", ["", " ", "\0\a\x1b[31m", "🍎🍏 日本語", "e\u0301", "<|endoftext|>", "a" * 3000,
               "a " * 20000], ids=lambda prompt: ascii(prompt[:9]))
def test_any_prompt_draws(draw, prompt):
    draw(f"--prompt={prompt}")


def test_a_strength_for_nothing_is_said(run):
    said = cli_lines(run, "red", "--strength", ".5")[2]
    assert said == ["--strength does nothing without --init-img"]


# ── What it refuses ───────────────────────────────────────────────────────────────────────────────

ARGUMENTS = {  # the arguments, and what the line must name
    "": "prompt", "one -p two": "prompt", "one two": "two", "a --frobnicate": "--frobnicate",
    "a --prom b": "--prom", "a -s": "--seed", "a -s x": "'x'", "a -s 1.5": "1.5",
    "a -s -2": "--seed -2", f"a -s {2**64}": f"{2**64}", "a --steps 0": "--steps 0",
    "a --steps -3": "--steps -3", "a --steps 5000": "5000", "a --steps x": "'x'",
    "a --cfg-scale nan": "--cfg-scale nan", "a --cfg-scale -1": "-1", "a --cfg-scale inf": "inf",
    "a --cfg-scale x": "'x'", "a -i in.png --strength 0": "--strength 0",
    "a -i in.png --strength -0.5": "-0.5", "a -i in.png --strength 1.01": "1.01",
    "a -i in.png --strength nan": "--strength nan", "a -i in.png --strength inf": "--strength inf",
    "a -i in.png --strength 0.4": "--strength 0.4", "a --sampler heum": "'heum'",
    "a --scheduler nix": "'nix'",
    "a --mask in.png": "--init-img", "a --karras --sampler tcd": "--scheduler karras",
    "a --prompts in.png": "one prompt", "--prompts none.txt": "none.txt",
    "--like none.png": "none.png", "--like in.png": "in.png", "a --preview x.jpg": "x.jpg",
    "a --scheduler simple --sampler lcm": "--scheduler simple", "a -W 15": "--width 15",
    "a -H 17": "--height 17",
    "a -W -16": "--width -16", "a -W 0": "--width 0", "a -H 0": "--height 0", "a -W 2": "--width 2",
    "a -H 4098": "--height 4098", "a -W 1e3": "1e3", "a -b 0": "--batch-size 0", "a -b -1": "-1",
    "a --hires 1": "--hires 1:0.5:0", "a --hires 2:nan": "2:nan:0", "a --hires 2:1:x": "'2:1:x'",
    "a --hires 2:0.01:20": "999 steps times", "a --hires 2 -i in.png": "go with --init-img",
    "a --only-masked": "needs --mask", "a --only-masked x": "'x'",
    "a -i in.png --mask in.png --only-masked -1": "--only-masked -1 is not from 0",
    "a --grid steps": "'steps'", "a --grid steps=": "at most 1000 pictures",
    "a --grid steps=1 -b 2": "go with --batch-size", "a --grid foo=1": "--foo=1",
    "a --grid sampler=foo": "no 'foo'", "a --grid steps=1,x": "--grid, --steps=x",
    "a --grid model=a,b": "same for all",
    "a --tiles --seamless": "--tiles does not go with --seamless", "a --hires 2 -W 4096": "8192",
    "a -i in.png --resize x": "'x'",
    "a -b 1001": "1001", "a -o no/such.png": "no", "a -o out.gif": "out.gif", "a -o out": "out",
    "a -o .png": ".png", "a -o folder": "folder", "a -o in.png/out.png": "in.png",
    "a --backend jax": "'jax'", "a --device tpu": "'tpu'", "a --dtype int8": "'int8'",
    "a --dtype float16": "--dtype float16", "a --backend numpy --device cuda": "--device cuda",
    "a --device mps": "mps", "a -m none": "none", "a -m no/such/folder": "no/such/folder",
    "a -m none.safetensors": "none.safetensors", "a -m folder": "folder", "a -m in.png": "in.png",
    "a -m sd-v1-4.ckpt": "sd-v1-4.ckpt", "a -m ''": "Stable Diffusion folder",
    "a -i none.png": "none.png", "a -i folder": "folder", "a -i empty.png": "empty.png",
    "a -i text.png": "text.png", "a -i cut.png": "cut.png", "a -i ''": "picture",
}


@pytest.mark.parametrize("argv", ARGUMENTS)
def test_bad_arguments(refuse, argv):
    if "mps" in argv:
        pytest.importorskip("torch")
    PLAIN.save("in.png")
    Path("folder").mkdir()
    Path("empty.png").touch()
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("in.png").read_bytes()[:-200])
    assert ARGUMENTS[argv] in refuse(*shlex.split(argv))


@pytest.mark.parametrize("flag", ["-i", "--like"])
def test_a_picture_that_is_a_program(refuse, flag):
    PLAIN.save("in.eps")
    assert "cannot identify" in refuse(*["a"] * (flag == "-i"), flag, "in.eps")


def test_a_decompression_bomb(refuse, monkeypatch):
    PLAIN.save("in.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "in.png" in refuse("a", "-i", "in.png")


# ── Names that people know ────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("flags, recorded", [
    (["DPM++ 2M Karras"], "DPM++ 2M Karras"), (["dpm++ 2m"], "DPM++ 2M"),
    (["dpmpp_2m"], "DPM++ 2M"), (["Euler a"], "Euler a"), (["EULER_ANCESTRAL"], "Euler a"),
    (["k_euler_a"], "Euler a"), (["k_euler"], "Euler"), (["EulerDiscreteScheduler"], "Euler"),
    (["PNDM"], "PLMS"), (["euler_karras"], "Euler Karras"),
    (["DPM++ 2M SDE", "--scheduler", "sgm_uniform"], "DPM++ 2M SDE SGM Uniform"),
    (["heun karras", "--scheduler", "simple"], "Heun Simple"),
    (["heun karras", "--scheduler", "automatic"], "Heun"),
    (["ddim", "--karras"], "DDIM Karras")])
def test_samplers_by_the_names_of_other_programs(draw, flags, recorded):
    assert parse(draw("apple", "--sampler", *flags))[2]["Sampler"] == recorded



@pytest.mark.parametrize("argv, hint", [
    ("red --stepps 3", "did you mean --steps?"), ("red --sampler eular", "did you mean euler?"),
    ("red --guidance 3", "here, --cfg-scale X"), ("red --schedule Karras", "here, --scheduler"),
    ("red --scheduler karas", "did you mean karras?"),
    ("red --lowvram", "here, --low-memory"), ("red --n 4", "here, -b N"),
    ("red --eta 0.5", "eta 0"),
    ("red --gfpgan", "there is nothing like it here"),
    ("red --tiling", "here, --seamless"), ("red --hr-scale 2", "here, --hires SCALE"),
    ("red --num_inference_steps=9", "here, --steps N"), ("red --zzzz 1", "--zzzz 1 (--help lists"),
    ("red --sampler 'DPM adaptive'", "unipc, tcd (--help"),
    ("--prompts p.txt red", "or a list with --prompts, not both"),
    (f"red -b 2 -s {2 ** 64 - 1}", "the seeds of --batch-size 2 and --seed"),
    ("red -i in.png --strength 0", "near 0 keeps the picture"),
    ("red --lora x:1001", "--lora"), ("red --W 8", "did you mean -W?"),
    ("red -m sd1.5", "did you mean sd15?"), ("red -m sdxl-trubo", "did you mean sdxl-turbo?"),
    ("red -m emogi", "did you mean emoji?"), ("red --clip_skip 2", "did you mean --clip-skip?"),
    ("red --embeding x", "did you mean --embedding?"),
    ("red apple", 'quote the prompt: "red apple"'), ("-p red -s 3 apple pie", 'quote the prompt'),
    ("red --sampler 'DPM++ 2S a'", "there is no 'DPM++ 2S a': choose one of ddpm, ddim,"),
    ("red --sampler x", "there is no 'x': choose one of ddpm")])
def test_a_hint(refuse, argv, hint):
    assert hint in refuse(*shlex.split(argv))


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"tiny_sd {sd.__version__}\n"


def test_things_that_nobody_reads_to_the_end():
    """As after "| head -1"."""
    process = launch("--things")
    process.stdout.close()
    err = process.stderr.read().decode()
    assert (process.wait(), err) == (0, "")


def test_files_by_their_names(run, model, here, monkeypatch):
    """A checkpoint in weights/, a LoRA and an embedding in their folders; and a folder of files."""
    monkeypatch.setattr(sd, "HERE", here / "program")
    for file in ("program/weights/dreamy_v2.safetensors", "loras/ink.safetensors",
                 "embeddings/word.pt", "checkpoints/other.ckpt", "checkpoints/one.safetensors"):
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).touch()
    job = cli.make_job(["red", "-m", "dreamy_v2", "--lora", "ink:0.5", "--embedding", "word"])
    assert Path(job.model) == here / "program/weights/dreamy_v2.safetensors"
    (lora, weight), (word,) = *job.lora, job.embedding
    assert Path(lora).samefile("loras/ink.safetensors") and weight == 0.5
    assert Path(word).samefile("embeddings/word.pt")
    assert Path(cli.make_job(["red", "-m", "other"]).model).samefile("checkpoints/other.ckpt")
    assert run.bare("red", "-m", "checkpoints")[2] == [
        "tiny_sd: checkpoints is a folder of models, not a model: choose one of one.safetensors, "
        "other.ckpt"]
    save_file({"emb_params": np.zeros((1, 8), np.float32)}, "checkpoints/aa_word.safetensors")
    header = json.dumps({"model.diffusion_model.x": {        # float8, which would be converted
        "dtype": "F8_E4M3", "shape": [2 ** 37], "data_offsets": [0, 2 ** 37]}}).encode()
    with open("checkpoints/huge.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 ** 37)
    line, = run.bare("red", "-m", "checkpoints")[2]
    assert line.endswith("choose one of huge.safetensors, one.safetensors, other.ckpt")
    for number in range(50):
        Path(f"checkpoints/a{number:02}.ckpt").touch()
    looked_at = []
    monkeypatch.setattr(named, "may_be_model", lambda file: looked_at.append(file) or True)
    line, = run.bare("red", "-m", "checkpoints")[2]
    assert line.endswith("a08.ckpt, a09.ckpt, ...") and len(looked_at) == 11    # not all of them


def test_a_seed_drawn_at_random(run, draw):
    assert re.search(r"tiny_sd: the seed is \d+$", "\n".join(run("apple", "-s", "-1")[2]), re.M)
    seeds = {parse(draw("apple", "-s", "-1", "-b", "1"))[2]["Seed"] for _ in range(3)}
    assert len(seeds) == 3 and all(0 <= int(seed) < 2 ** 32 for seed in seeds)
    again = draw("apple", "-s", seeds.copy().pop())
    assert any(np.array_equal(pixels(again), pixels(Image.open(path)))
               for path in Path().glob("*.png") if path.name != Path(again.filename).name)


# ── A sampler of one's own ────────────────────────────────────────────────────────────────────────

def halves(denoise, x, steps, noise):
    """A sampler that we do not have."""
    for _, alpha_bar, alpha_bar_next in steps:
        x_0, eps = denoise(x, _, alpha_bar)
        x = sd.add_noise(x_0, alpha_bar_next, 0.5 * eps)
        yield x


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(sd.SAMPLERS, "half-way", halves)


def test_a_sampler_is_a_function(registered, model):
    loaded = sd.load(model)
    *_, one = like_diffusers.generate(loaded, "red", steps=3, sampler=halves)
    *_, other = like_diffusers.generate(loaded, "red", steps=3, sampler="half-way")
    *_, ddim = like_diffusers.generate(loaded, "red", steps=3, sampler="ddim")
    assert np.array_equal(one, other) and not np.array_equal(one, ddim)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_sampler_says_its_spacing(registered, spacing, monkeypatch):
    monkeypatch.setattr(halves, "spacing", spacing, raising=False)
    scheduler = sd.read_config("scheduler", {})
    expected = {"leading": [501, 1], "trailing": [999, 499], "linspace": [999, 0]}[spacing]
    for name in (halves, "half-way"):
        steps = like_diffusers.sampling_steps(name, 2, scheduler, sd.scaled_linear_schedule())
        assert [t for t, _, _ in steps] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half-way", "Half way: mine, too"])
def test_a_registered_sampler_goes_from_the_command_line_into_the_picture_and_back(
        name, monkeypatch, run):
    monkeypatch.setitem(sd.SAMPLERS, name, halves)
    assert run("red", "--sampler", name, "-o", "a.png")[0] == 0
    assert parse(Image.open("a.png"))[2]["Sampler"] == re.sub("[:,]", " ", name)
    assert run("--like", "a.png", "-o", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_karras_with_a_models_own_sampler_that_has_none(run, model):
    """Found when the sampler is known, before anything is drawn."""
    change(SCHEDULER, _class_name="LCMScheduler")(Path(shutil.copytree(model, "model")))
    status, out, err = run("red", "-m", "model", "--karras")
    assert (status, out) == (2, []) and err[-1].endswith(
        "--scheduler karras does not go with --sampler lcm")


# ── When it cannot go on ──────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_too_little_memory(run, monkeypatch, backend):
    """More than any system has; each library reports it differently."""
    pytest.importorskip(backend)

    def decode(model, x):
        like = model.vae["quant_conv"]["weight"]
        return sd.array_like(like, np.broadcast_to(np.float32(0), 2 ** 60)) + 1
    monkeypatch.setattr(sd, "decode", decode)
    status, out, err = run("apple", "--backend", backend)
    assert status == 2 and re.search("allocate|memory", err[-1]) and not list(Path().iterdir())


def test_networks_are_dropped_when_nothing_needs_them_any_more(run, monkeypatch):
    seen, decode = [], sd.decode

    def look(model, x):
        seen.append((model.encoders[0].weights, model.unet))
        return decode(model, x)
    monkeypatch.setattr(sd, "decode", look)
    Path("prompts.txt").write_text("red\napple\n")
    assert run("--prompts", "prompts.txt")[0] == 0
    assert len(seen) == 2 and all(seen[0]) and seen[1] == (None, None)


def test_a_bug_is_not_hidden(run, monkeypatch):
    def decode(model, x):
        raise RuntimeError("a bug")
    monkeypatch.setattr(sd, "decode", decode)
    with pytest.raises(RuntimeError):
        run("apple")


def test_a_message_of_one_line_without_control_characters(refuse, monkeypatch):
    def load(*args):
        raise sd.UserError("a\x1b[31m\nb" + 9999 * "c")
    monkeypatch.setattr(formats, "load", load)
    said = refuse("apple")
    assert said.startswith("tiny_sd: a [31m bccc") and len(said) == 2009


# ── As a program ──────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("module, package", [("PIL", "pillow"), ("numpy", "numpy")])
def test_a_missing_package_is_named(module, package):
    """With what to do about it."""
    Path("lacking").mkdir()
    Path(f"lacking/{module}.py").write_text(
        f"raise ModuleNotFoundError('No module named {module}', name='{module}')")
    status, out, err = finish(launch("apple", PYTHONPATH="lacking"))
    said = f"tiny_sd: No module named {module}: pip install {package}\n"
    assert (status, out, err) == (2, "", said)


def test_numpy_is_enough(model):
    """With torch, diffusers and transformers out of reach.

    A bar on stderr, and on stdout nothing but the path.
    """
    status, out, err = finish(start("apple", "-m", model, "--steps", "2",
                                    without=["torch", "diffusers", "transformers"]))
    assert (status, out) == (0, "out.png\n") and "2/2" in err and err.count("\n") == 1
    assert Image.open("out.png").size == (16, 16)


@pytest.mark.parametrize("argv, without, named", [(["apple", "--steps", "0"], [], "--steps 0"), (
    ["apple", "--backend", "torch"], ["torch"], "torch"), (["apple"], ["tqdm"], "tqdm")])
def test_one_line_and_no_traceback(model, argv, without, named):
    status, out, err = finish(start(*argv, "-m", model, without=without))
    assert (status, out) == (2, "") and re.fullmatch(f"tiny_sd: .*{named}.*\n", err), err
    assert not list(Path().glob("*.png"))


def test_an_old_python(here):
    (here / "lib").mkdir()
    (here / "lib/sitecustomize.py").write_text("import sys\nsys.version_info = (3, 10)\n")
    status, out, err = finish(launch("red", PYTHONPATH=str(here / "lib")))
    assert (status, out) == (2, "") and err.startswith("tiny_sd: this needs Python 3.11 or later")
    assert err.count("\n") == 1


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    shown = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))
    flags = {flag for option in cli.option_parser().options for flag in option.option_strings}
    assert len(flags) > 40 and shown >= flags and "PROMPT" in text
    headings = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert headings == ["options", "what to draw", "model", "sampling", "size", "from a picture",
                        "output", "hardware", "examples"]
    assert max(map(len, text.splitlines())) <= 100


def test_each_option_says_what_it_does():
    """Each help text is different, and gives the option's default."""
    actions = cli.option_parser().options
    said = [action.help % vars(action) for action in actions]
    assert len({*said}) == len(said) and min(map(len, said)) > 8
    for action, text in zip(actions, said):
        value = action.default
        if value and not isinstance(value, bool) and value != argparse.SUPPRESS:
            assert str(value) in text, action.option_strings


def test_the_examples_of_help_can_be_read():
    for line in cli.EXAMPLES.splitlines()[1:]:
        command = line.split("   ")[0]
        args = cli.parse_known(cli.option_parser(), shlex.split(command)[2:])
        assert args.words or args.like or args.prompts


def test_no_thread_can_be_started(run, monkeypatch):
    def submit(*args):
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(fast.pool, "submit", submit)
    assert run("red apple", "-b", "2", "-W", "64", "-H", "64")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-P", "-I", "-O", "-S"])
def test_pythons_flags(model, flag):
    """With -P, and PYTHONSAFEPATH, the file's own folder is not on the path."""
    if flag == "-S":        # without site-packages: one line
        status, _, err = finish(launch("apple", "-m", model, python=["-S"], PYTHONSAFEPATH="1"))
        assert status == 2 and err.count("\n") == 1 and err.startswith("tiny_sd: ")
        return
    status, out, err = finish(launch("apple", "-m", model, "--steps", "1", python=[flag],
                                     PYTHONSAFEPATH="1"))
    assert (status, out) == (0, "out.png\n"), err
