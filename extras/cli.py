"""The command line: every option of `python tiny_sd.py`, and the program behind them."""

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import secrets
import sys
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

# isort: split      (fast comes first: it sets up BLAS before NumPy is loaded)
from extras import fast  # noqa: F401

# isort: split
from PIL import features
from tqdm import tqdm

import tiny_sd
from extras import (
    choices,
    drawing,
    facts,
    files,
    formats,
    grid,
    larger,
    like_diffusers,
    named,
    narrow,
    prompts,
    samplers,
)
from extras.checks import nearest
from extras.schedules import NAMES, schedule_named
from extras.start import check_heard, import_problem
from extras.things import describe_things, known_things
from tiny_sd import SAMPLERS, UserError, require, tell

tqdm.monitor_interval = 0       # do without tqdm's monitor thread

# ── Options ─────────────────────────────────────────────────────────────────────────────────────


def lora(text):
    """Parse FILE or FILE:WEIGHT into (file, weight)."""
    file, weight = re.fullmatch(r"(.*?)(?::(-?[\d.]+))?", text, re.DOTALL).groups()
    return file, prompts.lora_weight(weight or "1")


def known_by(find, names):
    """Return a type for argparse: look a name up with find(), or suggest the nearest name."""
    def read(text):
        found = find(text)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"there is no {text!r}: choose one of {', '.join(names)}{nearest(text, names)}")
        return found
    return read


def interval(text):
    """Parse LOW:HIGH into two numbers."""
    low, high = map(float, re.split("[:-]", text))
    return low, high


def hires(text):
    """Parse SCALE[:STRENGTH[:STEPS]] into numbers; 0 steps means as many as in the first pass."""
    parts = text.split(":")
    scale, strength, steps = *parts, *("", "0.5", "0")[len(parts):]
    return float(scale), float(strength), int(steps)


def output(text):
    """Parse -o: FOLDER/ means FOLDER/out.png."""
    return Path(text, "out.png") if text.endswith(("/", os.sep)) else Path(text)


EXAMPLES = """examples:
  python tiny_sd.py "a fox on a light blue background" -s 7 -o fox.png
  python tiny_sd.py "lion" --sampler euler_a -b 4                   four pictures, seeds 0 to 3
  python tiny_sd.py "frog" -i fox.png --strength 0.7                from a picture
  python tiny_sd.py "rabbit face" -i fox.png --mask ears.png        where the mask is white
  python tiny_sd.py "a (red:1.3) lighthouse, [fog]" -m sd15         words with more and less weight
  python tiny_sd.py "a boat <lora:ink:0.8>" -m model.safetensors    with loras/ink.safetensors
  python tiny_sd.py --like fox.png -s 8                             the same from another seed
  python tiny_sd.py --prompts prompts.txt -o cards.png              a picture for each line
"""


NUMBER, AMOUNT = {"type": int, "metavar": "N"}, {"type": float, "metavar": "X"}
FILE, SWITCH = {"metavar": "FILE"}, {"action": "store_true"}
REPEATED = {"action": "append", "default": []}


def option_parser(**settings):
    """Return the parser; its attribute .options lists all options."""
    parser = tiny_sd.Parser(
        description="Draw a picture from a prompt with Stable Diffusion.", allow_abbrev=False,
        usage="python tiny_sd.py PROMPT [option ...]", epilog=EXAMPLES,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=100,
                                          max_help_position=28), **settings)
    group, parser.options = parser, []

    def add(*flags, **how):
        parser.options.append(group.add_argument(*flags, **how))

    if parser.add_help:     # a line of --prompts must not end the program
        add("--version", action="version", version=f"tiny_sd {tiny_sd.__version__}",
            help="print the version and exit")

    group = parser.add_argument_group("what to draw")
    add("words", nargs="?", metavar="PROMPT", help="the prompt")
    add("-p", "--prompt", help="the same, as an option")
    add("-n", "--negative-prompt", metavar="PROMPT", help="what to avoid")
    add("-s", "--seed", default=0, **NUMBER,
        help="the seed of the random noise; -1 picks a random one (%(default)s)")
    add("-b", "--batch-size", default=1, **NUMBER, help="how many pictures: "
        "out-000.png and so on, from the seeds seed, seed + 1, ... (%(default)s)")
    add("--prompts", **FILE,
        help="draw a picture for each line, which may end in its own flags; # starts a comment")
    add("--grid", nargs="+", type=grid.axis, default=[], metavar="NAME=A,B,...", help="draw a "
        "sheet of pictures over values of one or two options: steps=10,20 cfg=2,5,8")
    add("--like", metavar="PNG", help="draw that picture again, with changes by other flags")
    add("--wildcards", metavar="DIR", help="let the seed choose one of {a|b|c}, and for __name__ a "
        "line of name.txt in this folder")
    add("--styles", nargs=2, metavar=("FILE.csv", "NAME"), **REPEATED,
        help="add the prompts of a style, a row of a table; repeatable")
    add("--plain-prompt", **SWITCH,
        help="treat brackets, BREAK and <lora:...> in prompts as plain text")

    group = parser.add_argument_group("model")
    add("-m", "--model", help="a folder, a .safetensors or .ckpt file, a name in weights/, "
        f"OWNER/NAME on the Hugging Face hub, or {', '.join(formats.HUB)} (emoji)")
    add("--things", nargs="?", const="", metavar="WORD",
        help="draw nothing; list what the model can draw, or only things with WORD in their names")
    add("--models-dir", metavar="DIR",
        help="another folder to search for files by name, such as a web UI's models folder")
    add("--lora", type=lora, metavar="FILE[:WEIGHT]", **REPEATED,
        help="add a LoRA: a file, or the name of one in loras/; repeatable")
    add("--vae", metavar="NAME", help="another VAE: a file, a folder, OWNER/NAME on the hub, or "
        f"one of the tiny ones, {' or '.join(formats.VAES)} (the model's own)")
    add("--embedding", metavar="FILE", **REPEATED, help="a textual inversion: adds a word named "
        "like its file, which may be in embeddings/; repeatable")
    add("--clip-skip", **NUMBER,
        help="stop N - 1 layers before CLIP's last (1; 2 in Stable Diffusion 2 and XL)")

    add("--merge", nargs="+", type=lora, default=[], metavar="MODEL[:WEIGHT]", help="draw nothing; "
        "write the weighted mean of models to --output, in the form of the first")

    group = parser.add_argument_group("sampling")
    add("--steps", **NUMBER,
        help="sampling steps (20; fewer for distilled models)")
    add("--cfg-scale", "--guidance-scale", **AMOUNT,
        help="guidance scale: how strongly to follow the prompt (7.5, or the model's own)")
    add("--cfg-rescale", default=0.0, **AMOUNT,
        help="how much to undo the contrast that guidance adds, 0 to 1 (%(default)s)")
    add("--cfg-interval", type=interval, metavar="LOW:HIGH", help="guide only at these times, "
        "from 0 (picture) to 1 (noise); other steps take half as long")
    add("--sampler", type=known_by(samplers.sampler_named, SAMPLERS), metavar="NAME",
        help=f"{', '.join(SAMPLERS)}; other programs' names work too (the model's own)")
    add("--prediction", choices=("epsilon", "v", "sample"),
        help="what the U-Net predicts (from the model's config)")
    add("--scheduler", type=known_by(schedule_named, NAMES), dest="schedule", metavar="NAME",
        help=f"which noise levels to visit: {', '.join(NAMES)} (from the model's config)")
    add("--karras", action="store_const", dest="schedule", const="karras",
        help="same as --scheduler karras")
    add("--as", choices=facts.PROGRAMS, dest="program", help="use the noise levels of "
        "AUTOMATIC1111's web UI, or ComfyUI's noise levels and prompt syntax; --like sets it")
    add("--web-ui", action="store_const", dest="program", const="web-ui",
        help="same as --as web-ui")

    group = parser.add_argument_group("size")
    add("-W", "--width", **NUMBER, help="width in pixels (the model's own)")
    add("-H", "--height", **NUMBER, help="height in pixels (the model's own)")
    add("--hires", type=hires, metavar="SCALE[:STRENGTH[:STEPS]]", help="enlarge the picture "
        "SCALE times and draw over it (strength 0.5, the same number of steps)")
    add("--seamless", **SWITCH, help="draw a picture that tiles: its opposite edges match")
    add("--tiles", **SWITCH, help="decode the picture in pieces, in half of the memory, to the "
        "same pixels; automatic if memory is short")

    group = parser.add_argument_group("from a picture")
    add("-i", "--init-img", **FILE, help="a picture to start from")
    add("--resize", choices=files.RESIZE, default="crop", help="how to change the shape of that "
        "picture: crop it, stretch it, or repeat its edges (%(default)s)")
    add("--strength", **AMOUNT, help="how much to change it, 0 to 1 (0.75, or 1 with --mask)")
    add("--mask", **FILE, help="a picture that is white where the first one should change")
    add("--only-masked", nargs="?", const=32, type=int, metavar="PIXELS",
        help="draw only the masked part and this many pixels around it (32), at the size of a "
        "whole picture, and paste it back")
    add("--control", nargs=2, metavar=("FILE[:WEIGHT]", "PICTURE"), **REPEATED,
        help="a ControlNet and the picture that it follows, such as outlines; repeatable")
    add("--control-from", default=0.0, **AMOUNT,
        help="the fraction of the steps where it starts (%(default)s)")
    add("--control-until", default=1.0, **AMOUNT, help="and where it stops (%(default)s)")

    group = parser.add_argument_group("output")
    add("-o", "--output", type=output, default=Path("out.png"), **FILE,
        help="the .png, .jpg or .webp to write, or a folder/; {seed} and {prompt} in the name are "
        "filled in; existing files are kept: then it is out-1.png (%(default)s)")
    add("--enlarge", default=1, **NUMBER,
        help="save pictures N times as large, smoothed (%(default)s)")
    add("--preview", type=Path, metavar="PNG",
        help="a file that shows a blurred guess of the picture after each step")
    add("--film", type=Path, **FILE,
        help="an animated .gif or .png of the guesses of all steps, decoded (slow)")
    add("--show", type=Path, metavar="DIR",
        help="a new folder for a page that shows how the picture was computed")
    add("--play", **SWITCH, help="open a page to play with in the browser")
    add("--port", default=0, **NUMBER, help="the port of --play (any free one)")
    add("--no-browser", **SWITCH, help="only print the address of --play")
    add("--explain", **SWITCH,
        help="draw nothing; print the prompt's tokens and the model's parts")

    group = parser.add_argument_group("hardware")
    add("--backend", choices=("numpy", "torch"),
        help="the library that computes (numpy, or torch for a GPU)")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu",
        help="where to compute (%(default)s)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
        help="the number type to compute in (%(default)s); the VAE always uses float32")
    add("--low-memory", **SWITCH, help="read weights from the file as they are needed: 2 GB are "
        "enough for Stable Diffusion 1.5, but it is up to twice as slow")
    add("--formulas", **SWITCH, help="use only tiny_sd.py's own formulas (slow)")
    return parser


def their_option(flag):
    """Return a hint about an option of another program, or ""."""
    flag = flag.replace("_", "-").lower() if flag.startswith("--") else flag
    theirs = json.loads(Path(__file__).with_name("theirs.json").read_text(encoding="utf-8"))
    for flags, ours in theirs.items():
        if flag in flags.split():
            return f": here, {ours}" if ours else ": there is nothing like it here"
    return ""


def parse_known(parser, argv):
    """Return the parsed arguments; UserError, with a hint, for unknown ones."""
    args, left = parser.parse_known_args(argv)
    flags = [word for word in left if word.startswith("-")]
    if left and not flags and isinstance(args.words, str):
        parser.error(f'quote the prompt: "{" ".join([args.words, *left])}"')
    if left:
        flag = flags[0].partition("=")[0] if flags else ""
        ours = ["--help", *(flag for option in parser.options for flag in option.option_strings)]
        hint = their_option(flag) or flag and nearest(flag, ours)
        parser.error(f"unrecognized arguments: {' '.join(left)}{hint}")
    return args


# ── Jobs ────────────────────────────────────────────────────────────────────────────────────────

# The options of a command or of a line of a list, plus: was the seed random, the facts in the
# picture of --like, and lines to print when drawing starts.
Job = namedtuple("Job", [*vars(option_parser().parse_args([])), "any_seed", "facts", "notes"])


def output_names(job):
    """Return the name of each picture: with {seed} filled in, or numbered."""
    path, seeds = job.output, drawing.seeds_of(job)
    words = re.sub(r"[^\w-]+", "-", job.prompt).strip("-").encode()[:100].decode(errors="ignore")
    stem = path.stem.replace("{prompt}", words or "picture")
    if "{seed}" in stem:
        return [path.with_stem(stem.replace("{seed}", str(seed))) for seed in seeds]
    if len(seeds) == 1:
        return [path.with_stem(stem)]
    return [path.with_stem(f"{stem}-{k:03d}") for k in range(len(seeds))]


def check_outputs(job):
    """UserError if an output file could not be written at the end."""
    require(not job.output.is_dir() or job.output == Path(),
            f"--output {job.output} is a folder: {job.output}/ writes into it")
    suffix = job.output.suffix.lower()
    require(suffix in files.SUFFIXES, f"--output {job.output} does not end in .png, .jpg or .webp")
    require(suffix != ".webp" or features.check("webp"), "this Pillow cannot write WebP")
    require(job.preview is None or job.preview.suffix.lower() == ".png",
            f"--preview {job.preview} does not end in .png")
    require(job.film is None or job.film.suffix.lower() in (".gif", ".png"),
            f"--film {job.film} does not end in .gif or .png")
    require(job.preview != job.output, f"--preview and --output are both {job.output}")
    for path in filter(None, (*output_names(job), job.preview, job.film)):
        files.check_folder_of(path)
        with contextlib.suppress(FileNotFoundError, ValueError):
            files.free_name(path).lstat()        # fails if a name is too long
        page, place = (other and Path(os.path.realpath(other)) for other in (job.show, path))
        require(page not in (place, *place.parents),        # Path.resolve fails on a link to itself
                f"--show {job.show} needs a separate folder, without {path}")


RANGES = {"steps": (1, 999), "cfg_scale": (0, 100), "cfg_rescale": (0, 1), "batch_size": (1, 1000),
          "clip_skip": (1, 100), "enlarge": (1, 16), "only_masked": (0, 4096)}


CLASHES = {     # options that exclude each other
    "control": ("show", "play"), "play": ("show", "film", "preview"), "tiles": ("seamless",),
    "hires": ("init_img", "control", "show", "film", "play"), "only_masked": ("control", "play"),
    "explain": ("show", "prompts"), "prompts": ("show", "play", "film"),
    "grid": ("prompts", "show", "explain", "film", "play", "merge", "things")}


def flag_of(name):
    """Return an option's flag: --only-masked for only_masked."""
    return f"--{name.replace('_', '-')}"


def check_ranges(values, ranges):
    """UserError if an option's value is out of range; None is allowed."""
    for name, (low, high) in ranges.items():
        value = getattr(values, name)
        require(value is None or low <= value <= high,
                f"{flag_of(name)} {value} is not from {low:g} to {high:g}")


def check_job(job):
    """UserError if an option is out of range, or excludes another."""
    given = {name for name, value in job._asdict().items()
             if value is not None and value is not False and value != []}
    for name, others in CLASHES.items():
        for other in others:
            require(not {name, other} <= given, f"{flag_of(name)} does not go with "
                                                f"{flag_of(other)}")
    plain = (job.device, job.dtype) == ("cpu", "float32")
    require(job.backend == "torch" or plain,
            f"NumPy computes in float32 on the CPU: --device {job.device} "
            f"--dtype {job.dtype} need --backend torch")
    require(job.backend == "numpy" or not job.low_memory, "--low-memory needs --backend numpy")
    check_ranges(job, RANGES)
    require(0 <= job.seed < 2 ** 64, f"--seed {job.seed} is not from 0 to 2^64 - 1")
    require(job.seed + job.batch_size <= 2 ** 64, f"the seeds of --batch-size {job.batch_size} "
            f"and --seed {job.seed} exceed 2^64 - 1")
    require(0 < job.strength <= 1, f"--strength {job.strength} is not above 0 and up to 1 (near 0 "
                                   "keeps the picture, 1 keeps little of it)")
    low, high = job.cfg_interval or (0, 1)
    require(0 <= low < high <= 1, f"--cfg-interval {low:g}:{high:g} must be two rising numbers "
                                  "from 0 to 1")
    require(0 <= job.control_from < job.control_until <= 1,
            f"--control-from {job.control_from:g} and --control-until {job.control_until:g} must "
            "be two rising numbers from 0 to 1")
    require(job.mask is None or job.init_img is not None, "--mask needs --init-img, its picture")
    require(job.only_masked is None or job.mask is not None, "--only-masked needs --mask")
    require(not job.schedule or job.sampler in (None, *samplers.SCHEDULED),
            f"--scheduler {job.schedule} does not go with --sampler {job.sampler}")
    if job.hires:
        larger.check_hires(job)
    if job.grid:
        grid.check_grid(job)
    for text in filter(None, (job.prompt, job.negative_prompt)):
        prompts.check_length(text)
    if not job.merge:
        check_outputs(job)


def tagged_loras(args, notes):
    """Return [(file, weight), ...] of the tags <lora:name:weight> in the prompt.

    UserError, or with --like a note, if a LoRA is not found. Those given with --lora are skipped.
    """
    found, wrong, given = [], {}, {facts.stem(file) for file, _ in args.lora}
    for tag, name, weight in prompts.tags(args.prompt):
        file = name and name not in given and named.find_file(
            "lora", name, args.model, args.models_dir)
        if file:
            found.append((file, weight))
        elif name not in given:
            reason = weight if name is None else (
                "there is no such LoRA beside the model, in loras/ or here: --lora FILE names one "
                "elsewhere")
            wrong.setdefault(reason, []).append(tiny_sd.shorten(tag, 60))
    for reason, tags in wrong.items():
        require(args.like, f"{tags[0]} in the prompt: {reason}")
        notes.append(f"--like {args.like}: {', '.join(tags)} {'are' if len(tags) > 1 else 'is'} "
                     f"not repeated: {reason}")
    return found


def make_job(argv, prompt=None, **settings):
    """Return the Job of a command line, checked as far as possible without the model.

    prompt: from a line of --prompts. settings: for the parser.
    """
    parser, found, notes = option_parser(**settings), {}, []
    args = parse_known(parser, argv)
    given = [text for text in (args.words, args.prompt) if text is not None]
    both = given and args.prompts and prompt is None
    enough = (given or args.prompts or args.like or args.play or args.things is not None
              or args.merge)
    if len(given) > 1 or both or not enough:
        other = ", or a list with --prompts, not both" if args.prompts else ""
        parser.error(f"give one prompt, in quotes{other}")
    if args.like:
        options, found, notes = facts.read_again(args.like, args)
        flags = [f"--{option}" if value is None else f"--{option}={value}"
                 for option, values in options.items() for value in values]
        args = parse_known(parser, flags + argv)

    words = next((text for text in (prompt, args.words, args.prompt) if text is not None), "")
    texts = ["--" if text == [] else text       # [] is what argparse makes of --prompt=--
             for text in (words, args.negative_prompt)]
    any_seed = args.seed == -1
    if any_seed:
        args.seed = secrets.randbelow(2 ** 32)
    args.prompt, args.negative_prompt = (
        text and files.printable(text) for text in choices.made(texts, args))
    require(args.models_dir is None or Path(args.models_dir).is_dir(),
            f"--models-dir {args.models_dir} is not a folder")
    args.model = named.find_model(args.model, args.models_dir)
    find = functools.partial(named.find, model=args.model, models_dir=args.models_dir)
    args.lora = [(find("lora", file), weight) for file, weight in args.lora]
    args.embedding = [find("embedding", file) for file in args.embedding]
    args.vae = args.vae and find("vae", args.vae)
    args.plain_prompt = args.plain_prompt or args.program == "comfyui"
    if not args.plain_prompt:
        args.lora += tagged_loras(args, notes)

    args.control = [(find("control", file), weight, picture) for (file, weight), picture in
                    ((lora(text), picture) for text, picture in args.control)]
    args.sampler, own = args.sampler or (None, None)
    args.schedule = (own if args.schedule is None else args.schedule) or None
    if any_seed and not args.prompts:
        notes.append(f"the seed is {args.seed}")
    if args.strength is not None and not args.init_img and not args.like:
        notes.append("--strength does nothing without --init-img")
    if args.strength is None:
        args.strength = 0.75 if args.mask is None else 1.0
    args.backend = args.backend or ("numpy" if args.device == "cpu" else "torch")
    for name in re.findall(r"\{\w*\}|\[\w+\]", args.output.stem):
        if name not in ("{seed}", "{prompt}"):
            notes.append(f"--output: {name} stays as it is; only {{seed}} and {{prompt}} are "
                         "filled in")
    job = Job(**vars(args), any_seed=any_seed, facts=found, notes=notes)
    check_job(job)
    return job


# ── Lists of prompts ────────────────────────────────────────────────────────────────────────────



def job_of_line(first, argv, number, prompt=None):
    """Return the Job of a line, or of a cell of a grid; first: the command's own Job.

    UserError if it needs another model than `first`, or an input picture is missing.
    """
    target = first.output.with_stem(f"{first.output.stem}-{number:04d}")
    job = make_job([*argv, f"--output={target}"], prompt, add_help=False)
    for file in filter(None, (job.init_img, job.mask, *(net[2] for net in job.control))):
        require(Path(file).exists(), f"there is no file {file}")
    fixed = ("model", "vae", "embedding", "backend", "device", "dtype", "prediction", "preview",
             "formulas", "low_memory", "seamless", "tiles")
    other = next((name for name in fixed if getattr(job, name) != getattr(first, name)), None)
    require(not other, f"{flag_of(str(other))} must be the same for all lines")
    return job


def read_prompts(first, argv):
    """Return the Job of each prompt in --prompts; first: the command's own Job."""
    jobs, text = [], files.read_text(Path(first.prompts))
    for number, line in enumerate(text.split("\n"), 1):
        words = " ".join(line.split())
        kept, mark, comment = re.match(r"(.*?)(?:(?<!\S)(#)(.*))?$", words, re.DOTALL).groups()
        if not kept.strip():
            continue
        try:
            prompt, flags = choices.split_line(kept.strip())
            job = job_of_line(first, [*argv, f"--prompts={first.prompts}", *flags], number, prompt)
            require(not jobs or job.lora == jobs[0].lora, "all prompts must use the same LoRAs as "
                    f"the first: {tiny_sd.shorten(job.prompt, 100)}")
        except ValueError as error:
            raise UserError(f"{first.prompts}, line {number}: {error}") from None
        if mark and comment[:1].strip():
            said = f"{first.prompts}, line {number}: #{comment} is read as a comment"
            job = job._replace(notes=[*job.notes, said])
        jobs.append(job)
    require(jobs, f"--prompts {first.prompts} has no prompts")
    return jobs


def drawn_names(job):
    """Yield for each picture of a job the file that already has it, with the same options, or None.
    """
    for seed, path in zip(drawing.seeds_of(job), output_names(job)):
        wanted = job._replace(seed=None if job.any_seed else seed)
        taken = itertools.takewhile(os.path.lexists, files.free_names(path))
        yield next((name for name in taken if facts.records(name, wanted)), None)


# ── What is done for them ───────────────────────────────────────────────────────────────────────


def say(text):
    """Print a text; that a reader such as `| head` stops early is not an error."""
    with contextlib.suppress(BrokenPipeError):
        print(text)
        check_heard()


def watchers(job):
    """Return the Film of --show or None, a list to fill with the frames of --film, the denoiser."""
    film, frames, denoiser = None, [], like_diffusers.denoiser
    if job.show or job.preview or job.film:
        from extras import show
        if job.show:
            film = denoiser = show.Film(job.show)
        if job.preview:
            denoiser = show.previewer(job.preview, denoiser)
        if job.film:
            denoiser = show.recorder(frames, denoiser)
    return film, frames, denoiser


def queue_title(number, total, seconds):
    """Return "3 of 7, 01:20 left", the progress bar's title in a list of prompts, or None."""
    if total == 1:
        return None
    left = f", {tqdm.format_interval(seconds / number * (total - number))} left" if number else ""
    return f"{number + 1} of {total}{left}"


def torchrun_rank():
    """Return (rank, number of processes), which torchrun puts into the environment."""
    rank, ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)):
        return 0, 1
    return int(rank), int(ranks)


def wait_for_other_ranks():
    """Wait as long as it takes, because torchrun ends all processes when one ends."""
    if "MASTER_ADDR" not in os.environ:     # it was not torchrun
        return
    import torch.distributed as dist

    def meet():
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.barrier()
        dist.destroy_process_group()
    tell("this process is done and waits for the others")
    try:
        ThreadPoolExecutor(1).submit(meet).result()     # waiting inside torch would block Ctrl-C
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the other processes cannot be reached: {error}") from None


def save_pictures(model, job, x, texts):
    """Decode and save the pictures one by one, and print each name."""
    for latents, path, text in zip(x, output_names(job), texts):
        pixels, = tiny_sd.decode(model, latents[None])
        if job.only_masked is not None:
            pixels = larger.pasted(job, pixels)
        print(files.save_picture(pixels, path, text, job.enlarge), flush=True)


def draw(model, job, notes=(), denoiser=like_diffusers.denoiser, last=False, title=None):
    """Draw and save the pictures of a filled job; return their latents.

    notes: lines to print once nothing can stop the drawing from starting. last: whether no job
    follows, so that each network can be dropped after its work, to free memory.
    """
    drawing.make_room(model, job)
    formats.check_unchanged(model)
    texts = [facts.parameters_text(job._replace(seed=seed), model)
             for seed in drawing.seeds_of(job)]
    walk, notes = drawing.start_walk(model, job, denoiser, notes)
    for note in notes:
        tell(note)

    if last and not job.hires:
        model.encoders = [encoder._replace(weights=None) for encoder in model.encoders]
    for x in tqdm(walk, desc=title, total=drawing.steps_of(job), unit="step"):      # noqa: B007
        pass
    if last:
        model.unet = None
    save_pictures(model, job, x, texts)
    return x


def save_grid(first, queue):
    """Write the sheet of --grid, if there is one."""
    if first.grid:
        grid.save(output_names(first)[0], first.grid, map(drawn_names, queue))


def run(argv):
    """Do what the command line asks for."""
    first = make_job(argv)
    known = known_things(first.model)
    if first.things is not None:
        return say(describe_things(known, first.things))
    if first.merge:
        from extras.merge import merge
        models = [(named.find_model(name, first.models_dir), share) for name, share in first.merge]
        return say(merge(models, first.output))
    if first.play:
        from extras.play import play
        return play(argv, first.port, not first.no_browser)
    if first.formulas:
        tiny_sd.FAST.clear()
    rank, ranks = torchrun_rank()
    jobs = queue = [first]
    if first.prompts or first.grid:     # share first: other processes may draw before we look
        make = functools.partial(job_of_line, first)
        queue = read_prompts(first, argv) if first.prompts else grid.jobs_of(first, argv, make)
        jobs = [job for job in queue[rank::ranks] if not all(drawn_names(job))]
    if not jobs and ranks == 1:
        tell(f"{first.prompts or '--grid'}: every picture exists already")
        return save_grid(first, queue)

    film, frames, denoiser = watchers(first)
    model = drawing.load_model(jobs[0] if jobs else first)
    jobs = drawing.ready(model, jobs)
    if first.backend == "numpy" and not first.low_memory:
        narrow.keep_what_pays(model, drawing.passes_of(jobs))
    if first.explain:
        from extras.explain import explain
        job, = jobs
        return say(explain(model, drawing.words_of(job), job.width, job.height,
                           drawing.weighted(model, job)))

    begun, told = time.monotonic(), set()
    for number, job in enumerate(jobs):
        check_heard()       # stop if nobody reads the names
        notes = [*job.notes, *drawing.remarks(model, job, known)]
        notes = [note for note in notes if note not in told]
        told |= {*notes}
        title = queue_title(number, len(jobs), time.monotonic() - begun)
        x = draw(model, job, notes, denoiser, last=job is jobs[-1], title=title)
    if film:
        chunks = drawing.chunks_of(model, first)
        print(film.save(x, first.prompt, chunks, drawing.seeds_of(first)))
    if frames:
        print(files.save_film(frames, first.film))
    formats.check_unchanged(model)      # not before saving: the picture may be fine
    if (first.prompts or first.grid) and ranks > 1:
        wait_for_other_ranks()
    return save_grid(first, queue) if rank == 0 else None


FLAGS = {       # parameters in the library's messages: the options that set them
    "^(steps|strength|width|height) ": r"--\1 ", "^guidance ": "--cfg-scale ",
    "^schedule ": "--scheduler ",
    "with sampler ": "with --sampler ", "a picture and a mask$": "--init-img and --mask",
    r"\(take float32\)": "(--dtype float32)"}


def main(argv=None, run=run):
    """Run the program; return 0, 2 after printing an error in one line, or 130 after Ctrl-C."""
    try:
        with warnings.catch_warnings():     # of NumPy: decode() reports numbers that are not finite
            warnings.simplefilter("ignore", RuntimeWarning)
            run(sys.argv[1:] if argv is None else argv)
        check_heard()
    except MemoryError as error:
        tell(str(error) or "there is not enough memory")
        return 2
    except ImportError as error:
        tell(import_problem(error))
        return 2
    except (UserError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("memory|new thread", str(error)):
            raise       # torch reports a lack of memory this way
        message = str(error)
        if isinstance(error, FileNotFoundError) and not error.filename:     # of os.getcwd()
            message = "the current folder no longer exists: go to another"
        for words, flags in FLAGS.items():
            message = re.sub(words, flags, message)
        tell(message)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            tell("interrupted")
        return 130
    return 0
