"""The command line: every option of `python tiny_sd.py`, and what is done for them."""

import argparse
import contextlib
import os
import re
import secrets
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

# isort: split      (first of all fast: it sets up BLAS before NumPy is loaded)
from extras import fast  # noqa: F401

# isort: split
from PIL import features
from tqdm import tqdm

import tiny_sd
from extras import (
    facts,
    files,
    formats,
    guidance,
    in_time,
    like_diffusers,
    named,
    narrow,
    prompts,
    things,
    tiny_vae,
)
from extras.checks import check_memory, nearest
from extras.samplers import KARRAS, sampler_named
from extras.schedules import SCHEDULES, SPACINGS, schedule_named
from extras.start import import_problem
from tiny_sd import SAMPLERS, UserError, require, tell

tqdm.monitor_interval = 0       # needs no thread of its own

# ── Options ─────────────────────────────────────────────────────────────────────────────────────


def lora(text):
    """Return FILE or FILE:WEIGHT as (file, weight)."""
    file, weight = re.fullmatch(r"(.*?)(?::(-?[\d.]+))?", text, re.DOTALL).groups()
    return file, float(weight or 1)


def sampler(text):
    """Return (sampler, schedule or None) for a name that people know them by.

    An error names the nearest.
    """
    named = sampler_named(text)
    if named is None:
        raise argparse.ArgumentTypeError(
            f"there is no {text!r}: choose one of {', '.join(SAMPLERS)}{nearest(text, SAMPLERS)}")
    return named


def schedule(text):
    """Return a schedule's name here, "" for "automatic"; an error names the nearest."""
    name = "" if text.lower() in ("automatic", "default") else schedule_named(text)
    if name is None:
        raise argparse.ArgumentTypeError(
            f"there is no {text!r}: choose one of {', '.join((*SCHEDULES, *SPACINGS))}"
            f"{nearest(text, (*SCHEDULES, *SPACINGS))}")
    return name


def interval(text):
    """Return LOW:HIGH as two numbers."""
    low, high = map(float, re.split("[:-]", text))
    return low, high


def output(text):
    """Return the file that -o names: of a folder, written with a slash at its end, out.png."""
    return Path(text, "out.png") if text.endswith(("/", os.sep)) else Path(text)


OPTIONS = [     # (heading, flags, type or choices, default, help)
    ("what to draw", "words", str, None, "the prompt"),
    ("what to draw", "-p --prompt", str, None, "the same, as an option"),
    ("what to draw", "-n --negative-prompt", str, None, "what to avoid"),
    ("what to draw", "-s --seed", int, 0, "(%(default)s)"),
    ("model", "-m --model", str, None, "a folder, or a name in weights/ (emoji)"),
    ("sampling", "--steps", int, None, "(20, fewer for distilled models)"),
    ("sampling", "--cfg-scale --guidance-scale", float, None,
     "guidance: how much to stress the prompt (7.5, or the model's own)"),
    ("sampling", "--sampler", SAMPLERS, None, "(the model's own)"),
    ("size", "-W --width", int, None, "in pixels (the model's own size)"),
    ("size", "-H --height", int, None, None),
    ("from a picture", "-i --init-img", str, None, "a picture to start from"),
    ("from a picture", "--strength", float, None, "how much to change it, 0 to 1 (0.75)"),
    ("output", "-o --output", Path, Path("out.png"), "the file to write (%(default)s)"),
    ("hardware", "--backend", ("numpy", "torch"), None, "numpy; torch on a GPU, or not in float32"),
    ("hardware", "--device", ("cpu", "cuda", "mps"), "cpu", "(%(default)s)"),
    ("hardware", "--dtype", ("float32", "float16", "bfloat16"), "float32", "(%(default)s)"),
]


def table_parser(options, **settings):
    """Return a parser of a table like OPTIONS."""
    parser = tiny_sd.Parser(description="Draw a picture from a prompt with Stable Diffusion.",
                    allow_abbrev=False, **settings)
    parser.sections = {heading: parser.add_argument_group(heading)
                       for heading in dict.fromkeys(heading for heading, *_ in options)}
    for heading, flags, kind, default, text in options:
        how = {"type": kind} if callable(kind) else {"choices": kind}
        if flags == "words":
            how |= {"nargs": "?", "metavar": "PROMPT"}
        parser.sections[heading].add_argument(*flags.split(), default=default, help=text, **how)
    return parser


TYPES = {"--sampler": sampler, "-o --output": output}       # in place of tiny_sd.py's
HELP = {        # likewise
    "-W --width": "in pixels (the model's own)",
    "-H --height": "in pixels (the model's own)",
    "--strength": "how much to change it, 0 to 1 (0.75, or 1 with --mask)",
    "--device": "where to compute (%(default)s)",
    "--dtype": "the numbers to compute with (%(default)s); the VAE's are float32",
    "-s --seed": "the number that the noise is made from; -1 draws one at random (%(default)s)",
    "--steps": "how many, from noise to the picture (20, fewer for distilled models)",
    "--backend": "what computes (numpy, unless a GPU is asked for)",
    "-m --model": "a folder, a .safetensors or .ckpt file, a name in weights/, OWNER/NAME on the "
                  f"Hugging Face hub, or {', '.join(formats.HUB)} (emoji)",
    "--sampler": f"{', '.join(SAMPLERS)}, by these names or those of other programs (the model's "
                 "own)",
    "-o --output": "the .png, .jpg or .webp to write, or a folder/; {seed} and {prompt} in the "
                   "name are filled in; a file that is there is kept, and out-1.png taken "
                   "(%(default)s)",
}


METAVARS = {"negative_prompt": "PROMPT", "seed": "N", "steps": "N", "cfg_scale": "X",
            "sampler": "NAME", "width": "N", "height": "N", "init_img": "FILE", "strength": "X",
            "output": "FILE"}
EXAMPLES = """examples:
  python tiny_sd.py "a fox on a light blue background" -s 7 -o fox.png
  python tiny_sd.py "lion" -n yellow --sampler euler_a -b 4         four pictures, seeds 0 to 3
  python tiny_sd.py "frog" -i fox.png --strength 0.7                from a picture
  python tiny_sd.py "rabbit face" -i fox.png --mask ears.png        where the mask is white
  python tiny_sd.py "a (red:1.3) lighthouse, [fog]" -m sd15         words with more and less weight
  python tiny_sd.py "a boat <lora:ink:0.8>" -m model.safetensors    with loras/ink.safetensors
  python tiny_sd.py --like fox.png -s 8                             again, but for the seed
  python tiny_sd.py --prompts prompts.txt -o cards.png              a picture for each line
"""


class Help(argparse.RawDescriptionHelpFormatter):
    """A page of help that is 100 columns wide."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=100)


def option_parser(**settings):
    """Return the parser of all options: those of tiny_sd.py, and these."""
    table = [(heading, flags, TYPES.get(flags, kind), default, HELP.get(flags, text))
             for heading, flags, kind, default, text in OPTIONS]
    parser = table_parser(table, usage="python tiny_sd.py PROMPT [option ...]",
                                   epilog=EXAMPLES, formatter_class=Help, **settings)
    for action in parser._actions:
        action.metavar = METAVARS.get(action.dest, action.metavar)
    what, model, sampling, start, files_out, hardware = (
        parser.sections[heading].add_argument for heading in
        ("what to draw", "model", "sampling", "from a picture", "output", "hardware"))
    what("-b", "--batch-size", type=int, default=1, metavar="N",
         help="how many pictures, out-000.png and so on, of the seeds seed, seed + 1, ... "
              "(%(default)s)")
    what("--prompts", metavar="FILE", help="a picture for each line, which may end in flags of "
                                           "its own; # begins a comment")
    what("--like", metavar="PNG", help="draw that picture again, but for the flags given")
    what("--plain-prompt", action="store_true",
         help="take brackets, BREAK and <lora:...> in prompts for words")
    model("--things", action="store_true",
          help="draw nothing: list what the model can draw, where it says so")
    model("--lora", type=lora, action="append", default=[], metavar="FILE[:WEIGHT]",
          help="a LoRA to add; repeatable")
    model("--vae", metavar="NAME", help="another VAE: a file, a folder, OWNER/NAME on the hub, or "
                                        f"{' or '.join(tiny_vae.HUB)}, tiny ones (the model's own)")
    model("--embedding", action="append", default=[], metavar="FILE",
          help="a textual inversion, a word for prompts with the name of its file; repeatable")
    model("--clip-skip", type=int, metavar="N",
          help="stop N - 1 layers before CLIP's last (1; 2 in Stable Diffusion 2 and XL)")
    sampling("--prediction", choices=("epsilon", "v", "sample"),
             help="what the U-Net predicts (as the model's config says)")
    sampling("--scheduler", type=schedule, dest="schedule", metavar="NAME",
             help=f"which noise levels to visit: {', '.join((*SCHEDULES, *SPACINGS))} (as the "
                  "model's config says)")
    sampling("--cfg-rescale", type=float, default=0.0, metavar="X", help="how much to undo the "
             "contrast that guidance adds, 0 to 1 (%(default)s)")
    sampling("--cfg-interval", type=interval, metavar="LOW:HIGH", help="guide only at these times, "
             "0:1 from picture to noise; elsewhere steps take half as long")
    sampling("--karras", action="store_const", dest="schedule", const="karras",
             help="--scheduler karras")
    start("--mask", metavar="FILE", help="a picture, white where the first is to be replaced")
    files_out("--preview", type=Path, metavar="PNG",
              help="a file that shows, in small, what the picture looks like after each step")
    files_out("--show", type=Path, metavar="DIR",
              help="a new folder for pictures of what is computed on the way")
    files_out("--play", action="store_true",
              help="a page to play with, in the browser")
    files_out("--port", type=int, default=0, metavar="N",
              help="where --play listens (any that is free)")
    files_out("--no-browser", action="store_true",
              help="print the address of --play, and open no browser")
    files_out("--explain", action="store_true",
              help="draw nothing: print the prompt's tokens and the model's parts")
    hardware("--low-memory", action="store_true", help="keep the weights in their file, widening "
             "each as it is used: 2 GB do for Stable Diffusion 1.5, up to twice as slowly")
    hardware("--formulas", action="store_true",
             help="compute by tiny_sd.py's formulas alone, slowly")
    return parser


def parse_known(parser, argv):
    """Return the parsed arguments; UserError, with a hint, if something is left over."""
    args, left = parser.parse_known_args(argv)
    flags = [word for word in left if word.startswith("-")]
    if left and not flags and isinstance(args.words, str):
        parser.error(f'quote the prompt: "{" ".join([args.words, *left])}"')
    if left:
        hint = nearest(flags[0].partition("=")[0], parser._option_string_actions) if flags else ""
        parser.error(f"unrecognized arguments: {' '.join(left)}{hint}")
    return args


def parse_arguments(argv, **settings):
    """Return the command line as a namespace, filled in as far as no model is needed for that.

    Its notes are lines to print as soon as drawing begins.
    """
    parser = option_parser(**settings)
    args, found, notes = parse_known(parser, argv), {}, []
    given = sum(source is not None for source in (args.words, args.prompt, args.prompts))
    if given > 1 or not given and not (args.like or args.things or args.play):
        parser.error("give one prompt, in quotes")
    if args.like:
        flags, found, notes = flags_like(args)
        args = parse_known(parser, flags + argv)
    args.notes, args.facts = notes, found
    complete(args)
    check_arguments(args)
    return args


def flags_like(args):
    """Return the flags that draw the picture of --like again, its facts, and lines on the rest."""
    options, found, notes = facts.read_again(args.like, args)
    flags = [f"--{option}" if value is None else f"--{option}={value}"
             for option, values in options.items() for value in values]
    return flags, found, notes


def take_up_loras(args):
    """Add to args.lora what the prompt names as <lora:name:weight>.

    UserError for what cannot be found, or, with --like, a note.
    """
    if args.plain_prompt:
        return
    found, wrong, given = [], {}, {facts.stem(file) for file, _ in args.lora}
    for tag, name, weight in prompts.tags(args.prompt):
        file = name and name not in given and named.find_file("lora", name, args.model)
        if file:
            found.append((file, weight))
        elif name is None or name not in given:
            reason = weight if name is None else (
                "there is no such LoRA beside the model, in loras/ or here: --lora FILE names one "
                "elsewhere")
            wrong.setdefault(reason, []).append(tiny_sd.shorten(tag, 60))
    for reason, tags in wrong.items():
        require(args.like, f"{tags[0]} in the prompt: {reason}")
        args.notes.append(f"--like {args.like}: {', '.join(tags)} "
                          f"{'are' if len(tags) > 1 else 'is'} not taken up: {reason}")
    args.lora = [*args.lora, *found]


def complete(args):
    """Fill in what is not given."""
    prompt = (args.prompt or "") if args.words is None else args.words
    args.prompt, args.negative_prompt = (
        text if text is None else files.printable("--" if text == [] else text)
        for text in (prompt, args.negative_prompt))
    if args.sampler:
        args.sampler, own = args.sampler
        args.schedule = own if args.schedule is None else args.schedule
    args.schedule = args.schedule or None
    emoji = str(tiny_sd.HERE / "weights" / "emoji")
    args.model = emoji if args.model is None else named.find_model(args.model)
    args.any_seed = args.seed == -1
    if args.any_seed:
        args.seed = secrets.randbelow(2 ** 32)
    if args.strength is not None and not args.init_img and not args.like:
        args.notes.append("--strength does nothing without --init-img")
    if args.strength is None:
        args.strength = 0.75 if args.mask is None else 1.0
    if args.backend is None:
        args.backend = "numpy" if args.device == "cpu" else "torch"


def check_arguments(args):
    """UserError where an option is out of range, or does not go with another."""
    plain = (args.device, args.dtype) == ("cpu", "float32")
    require(args.backend == "torch" or plain,
            f"NumPy computes in float32 on the CPU: --device {args.device} "
            f"--dtype {args.dtype} need --backend torch")
    require(args.backend == "numpy" or not args.low_memory, "--low-memory goes with NumPy alone")
    for option, low, high in ("steps", 1, 999), ("cfg_scale", 0, 100), ("batch_size", 1, 1000), (
            "clip_skip", 1, 100):
        value = getattr(args, option)
        require(value is None or low <= value <= high,
                f"--{option.replace('_', '-')} {value} is not from {low} to {high}")
    require(0 <= args.seed <= 2 ** 64 - args.batch_size,
            f"--seed {args.seed} is not from 0 to 2^64 - 1")
    require(0 < args.strength <= 1, f"--strength {args.strength} is not above 0 and up to 1")
    require(0 <= args.cfg_rescale <= 1, f"--cfg-rescale {args.cfg_rescale} is not from 0 to 1")
    low, high = args.cfg_interval or (0, 1)
    require(0 <= low < high <= 1, f"--cfg-interval {low:g}:{high:g} is not two rising numbers from "
                                  "0 to 1")
    require(args.mask is None or args.init_img is not None,
            "--mask needs --init-img, the picture that it belongs to")
    require(not args.schedule or args.sampler in (None, *KARRAS),
            f"--scheduler {args.schedule} does not go with --sampler {args.sampler}")
    require(not args.show or not args.explain, "--explain draws nothing that --show could show")
    require(not args.prompts or not (args.show or args.explain or args.play),
            "--show, --explain and --play take one prompt, not --prompts")
    check_outputs(args)


def check_outputs(args):
    """UserError where a file could not be written at the end."""
    require(not args.output.is_dir() or args.output == Path(),
            f"--output {args.output} is a folder: {args.output}/ writes into it")
    suffix = args.output.suffix.lower()
    require(suffix in files.SUFFIXES, f"--output {args.output} does not end in .png (nor in .jpg "
                                      "or .webp)")
    require(suffix != ".webp" or features.check("webp"), "this Pillow cannot write WebP")
    require(args.preview is None or args.preview.suffix.lower() == ".png",
            f"--preview {args.preview} does not end in .png")
    require(args.preview != args.output, f"--preview and --output are both {args.output}")
    for path in filter(None, (*output_names(args), args.preview)):
        require(path.parent.is_dir(), f"there is no folder {path.parent} to write to")
        require(os.access(path.parent, os.W_OK), f"the folder {path.parent} cannot be written to")
        free = next(name for name in files.free_names(path) if not os.path.lexists(name))
        with contextlib.suppress(FileNotFoundError, ValueError):
            free.lstat()        # fails where a name is too long
        page = args.show and args.show.resolve()
        require(page not in (path.resolve(), *path.resolve().parents),
                f"--show {args.show} needs a folder of its own, without {path}")


# ── Lists of prompts ────────────────────────────────────────────────────────────────────────────


def read_prompts(args, argv):
    """Return the arguments of each line of --prompts that holds a prompt."""
    try:
        text = Path(args.prompts).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--prompts {args.prompts} cannot be read: {reason}") from None
    jobs = []
    for number, line in enumerate(text.split("\n"), 1):
        words = " ".join(line.split())
        kept, mark, comment = re.match(r"(.*?)(?:(?<!\S)(#)(.*))?$", words, re.DOTALL).groups()
        prompt, *flags = re.split(r" (?=--?[A-Za-z])", kept.strip(), maxsplit=1)
        if not prompt:
            continue
        require(not re.match("--?[A-Za-z]", prompt), f"{args.prompts}, line {number}: a line "
                f"begins with its prompt, not with {prompt.split()[0]}; flags follow it")
        target = args.output.with_stem(f"{args.output.stem}-{number:04d}")
        try:
            job = line_arguments(args, [*argv, f"--prompts={args.prompts}",
                                        *shlex.split("".join(flags)), f"--output={target}"])
            job.prompt = files.printable(prompt)
            take_up_loras(job)
            require(not jobs or job.lora == jobs[0].lora, "its LoRAs are not those of the first "
                    f"prompt, and all have one model: {tiny_sd.shorten(job.prompt, 100)}")
        except ValueError as error:
            raise UserError(f"{args.prompts}, line {number}: {error}") from None
        if mark and comment[:1].strip():
            job.notes.append(f"{args.prompts}, line {number}: from #{comment} on, this is a "
                             "comment")
        jobs.append(job)
    require(jobs, f"--prompts {args.prompts} has no prompt in it")
    return jobs


def line_arguments(args, argv):
    """Return the arguments of a line, whose flags follow the command's."""
    job = parse_arguments(argv, add_help=False)
    for file in filter(None, (job.init_img, job.mask)):
        require(Path(file).exists(), f"{file} is not there")
    fixed = ("model", "lora", "vae", "embedding", "backend", "device", "dtype", "prediction",
             "preview", "formulas", "low_memory")
    require(all(getattr(job, name) == getattr(args, name) for name in fixed),
            "the model and --preview are the same for all lines")
    return job


def is_drawn(job):
    """Is each picture of a line there already, with its prompts and options recorded in it?"""
    for seed, path in zip(seeds_of(job), output_names(job)):
        for name in files.free_names(path):
            if not os.path.lexists(name):
                return False
            if facts.records(name, changed(job, seed=None if job.any_seed else seed)):
                break
    return True


def changed(args, **fields):
    """Return a copy of the arguments with some of them changed."""
    return argparse.Namespace(**vars(args) | fields)


def seeds_of(args):
    """Return the seed of each picture."""
    return [args.seed + k for k in range(args.batch_size)]


def output_names(args):
    """Return the name of each picture, numbered unless it has its seed in it."""
    path, seeds = args.output, seeds_of(args)
    words = re.sub(r"[^\w-]+", "-", args.prompt).strip("-").encode()[:100].decode(errors="ignore")
    stem = path.stem.replace("{prompt}", words or "picture")
    if "{seed}" in stem:
        return [path.with_stem(stem.replace("{seed}", str(seed))) for seed in seeds]
    if len(seeds) == 1:
        return [path.with_stem(stem)]
    return [path.with_stem(f"{stem}-{k:03d}") for k in range(len(seeds))]


# ── What is done for them ───────────────────────────────────────────────────────────────────────


def run(argv):
    """Do what the command line asks for."""
    args = parse_arguments(argv)
    known = things.known_things(args.model)
    if args.things:
        return print(things.describe_things(known))
    if args.play:
        from extras.play import play
        return play(argv, args.port, not args.no_browser)
    if args.formulas:
        tiny_sd.FAST.clear()
    rank, ranks = torchrun_rank()
    jobs = [args]
    if args.prompts:    # shared out first: what is drawn already changes while others start
        jobs = [job for job in read_prompts(args, argv)[rank::ranks] if not is_drawn(job)]
        args.lora = jobs[0].lora if jobs else []
    else:
        take_up_loras(args)
    if not jobs and ranks == 1:
        return tell(f"{args.prompts}: every picture is there already")

    film, denoiser = watchers(args)
    model = load_model(args, jobs)
    if args.explain:
        from extras import show
        h, w, _ = tiny_sd.latent_shape(model, args.width, args.height)
        return show.explain(model, words_of(args), w * model.factor, h * model.factor,
                            prompts.reads_weights(model) and not args.plain_prompt)

    begun, notes = time.monotonic(), set()
    for number, job in enumerate(jobs):
        job.notes = [note for note in [*job.notes, *remarks(model, job, known)]
                     if note not in notes]
        notes |= set(job.notes)
        title = queue_title(number, len(jobs), time.monotonic() - begun)
        x = draw(model, job, denoiser, last=job is jobs[-1], title=title)
    if film:
        if prompts.reads_weights(model) and not args.plain_prompt:
            film.chunks = prompts.chunks_of(model.encoders[0].tokenizer, words_of(args))
        print(film.save(x, args.prompt, seeds_of(args)))
    if args.prompts and ranks > 1:
        wait_for_other_ranks()
    return None


def passes_of(model, jobs):
    """Return {part of the model: how many times it will run, for all jobs}."""
    _, own_steps, own_guidance = like_diffusers.defaults(model)
    passes = {"unet": 0, "vae": 0, "text": len(jobs)}
    for job in jobs:
        guidance = own_guidance if job.cfg_scale is None else job.cfg_scale
        contexts = 1 if guidance == 1 or model.config.unet.time_cond_proj_dim else 2
        share = job.strength if job.init_img else 1
        passes["unet"] += contexts * share * (job.steps or own_steps)
        passes["vae"] += job.batch_size
    return passes


def load_model(args, jobs=()):
    """Return the model that args name, with its LoRAs, VAE and learnt words.

    jobs: what it will draw, where that is known: for a few steps some weights are kept narrow.
    """
    vae = None if args.vae is None else tiny_vae.read_vae(args.vae)
    model = formats.load(args.model, args.backend, args.device, args.dtype, args.lora,
                         args.low_memory, vae)
    if jobs and args.backend == "numpy" and not args.low_memory:
        narrow.keep_what_pays(model, passes_of(model, jobs))
    if args.embedding:
        model = prompts.with_embeddings(model, args.embedding)
    if args.prediction:
        kind = args.prediction + "_prediction" * (args.prediction == "v")
        model.config.scheduler.prediction_type = kind
    return model


def remarks(model, args, known):
    """Yield warnings about what was asked for and cannot be done.

    known: see things.known_things.
    """
    if known and not (args.lora or args.embedding):     # which teach new words
        words = words_of(args)
        yield from things.remarks(known, words if args.plain_prompt else in_time.all_words(words))
    for name in facts.other_files(args.facts, args, model):
        yield f"--like {args.like}: the {name} is another file than the picture was made with"
    yield from prompts.remarks(model, [words_of(args), args.negative_prompt or ""],
                               args.plain_prompt)


def watchers(args):
    """Return the film of --show, or None, and the denoiser to draw with."""
    film, denoiser = None, like_diffusers.denoiser
    if args.show or args.preview:
        from extras import show
        if args.show:
            film = denoiser = show.Film(args.show)
        if args.preview:
            denoiser = show.previewer(args.preview, denoiser)
    return film, denoiser


def queue_title(number, total, seconds):
    """Return "3 of 7, 01:20 left": what the bar says of a list of prompts, None of one picture."""
    if total == 1:
        return None
    left = f", {tqdm.format_interval(seconds / number * (total - number))} left" if number else ""
    return f"{number + 1} of {total}{left}"


def torchrun_rank():
    """Return (rank, number of processes) as torchrun tells them."""
    rank, ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)):
        return 0, 1
    return int(rank), int(ranks)


def wait_for_other_ranks():
    """Wait, however long it takes: torchrun ends all processes when one ends."""
    if "MASTER_ADDR" not in os.environ:     # it was not torchrun
        return
    import torch.distributed as dist

    def meet():
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.barrier()
        dist.destroy_process_group()
    tell("this process has drawn its share, and waits for the others")
    try:
        ThreadPoolExecutor(1).submit(meet).result()     # torch's own waiting hears no Ctrl-C
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the other processes cannot be reached: {error}") from None


def draw(model, args, denoiser=like_diffusers.denoiser, last=False, title=None):
    """Draw and save the pictures that args ask for; return their latents.

    While the last of all are drawn, this program's model loses each network that has done its
    work: the rest need the memory.
    """
    h, w, _ = tiny_sd.latent_shape(model, args.width, args.height)
    height, width = h * model.factor, w * model.factor
    fill_in(model, args)
    check_picture_memory(model, args, width, height)
    formats.check_unchanged(model)
    texts = [facts.parameters_text(changed(args, seed=seed, width=width, height=height), model)
             for seed in seeds_of(args)]
    walk = start_walk(model, args, width, height, denoiser)
    for note in args.notes:
        tell(note)

    total = args.steps if args.init_img is None else int(round(args.steps * args.strength, 9))
    if last:
        model.encoders = [encoder._replace(weights=None) for encoder in model.encoders]
    for x in tqdm(walk, desc=title, total=total, unit="step"):      # noqa: B007
        pass
    if last:
        model.unet = None
    formats.check_unchanged(model)
    save_pictures(model, x, output_names(args), texts)
    return x


def save_pictures(model, x, paths, texts):
    """Decode, save and name the pictures, one after the other, so that none waits for the last."""
    unheard = None
    for latents, path, text in zip(x, paths, texts):
        pixels, = tiny_sd.decode(model, latents[None])
        name = files.save_picture(pixels, path, text)
        try:
            print(name, flush=True)
        except OSError as error:        # stdout is full or closed, which is no picture's fault
            unheard = error
    if unheard:
        raise unheard


def start_walk(model, args, width, height, denoiser):
    """Return the generator of latents that args ask for."""
    init = mask = None
    if args.init_img is not None:
        init = files.read_picture(args.init_img, width, height, args.notes)
    if args.mask is not None:
        mask = files.read_mask(args.mask, args.init_img, width, height, args.notes)
    make, embed, sampler = denoiser, embedder(model, args), tiny_sd.SAMPLERS[args.sampler]
    combine = tiny_sd.guide
    timeline = timeline_of(args, embed)
    if timeline:
        embed, sampler, combine = timeline.embed, timeline.sampler(sampler), timeline.combine
    if args.cfg_rescale:
        combine = guidance.rescaled(args.cfg_rescale, combine)
    if combine is not tiny_sd.guide:
        make = guidance.combining(make, combine)
    if args.cfg_interval:
        make = guidance.within(make, *args.cfg_interval)
    if timeline:
        make = timeline.denoiser(make)
    return like_diffusers.generate(
        model, words_of(args), args.negative_prompt, seeds_of(args), args.steps, args.cfg_scale,
        sampler, args.schedule, width, height, init, args.strength, mask, make, embed)


def timeline_of(args, embed):
    """Return the Timeline of prompts that change on the way, or None."""
    texts = words_of(args), args.negative_prompt
    if args.plain_prompt or not in_time.changes(*texts):
        return None
    require(not args.show, "--show takes a prompt that stays the same")
    return in_time.Timeline(*texts, args.steps, embed)


def words_of(args):
    """Return the prompt without <lora:...>."""
    return args.prompt if args.plain_prompt else prompts.without_tags(args.prompt)


def embedder(model, args):
    """Return the function that makes contexts of the prompts, as args want them read."""
    weighted = prompts.reads_weights(model) and not args.plain_prompt
    embed = prompts.embed_prompts if weighted else tiny_sd.embed_prompts
    return prompts.skipping(embed, args.clip_skip) if args.clip_skip else embed


def fill_in(model, args):
    """Set sampler, steps and guidance to the model's own where they are not given."""
    sampler, steps, scale = like_diffusers.defaults(model)
    args.sampler, args.steps = args.sampler or sampler, args.steps or steps
    args.cfg_scale = scale if args.cfg_scale is None else args.cfg_scale


def check_picture_memory(model, args, width, height):
    """UserError if three of the largest arrays (VAE float32, U-Net float16) do not fit."""
    if args.device == "cpu":
        vae, unet = model.config.vae.block_out_channels, model.config.unet.block_out_channels
        bytes_per_pixel = max(4 * vae[:2][-1], 2 * unet[0] * args.batch_size // model.factor ** 2)
        check_memory(3 * bytes_per_pixel * width * height, f"--width {width} --height {height}")


def main(argv=None, run=run):
    """Run the program; return 0, 2 after one line that says what is wrong, or 130 after Ctrl-C."""
    try:
        run(sys.argv[1:] if argv is None else argv)
        print(end="", flush=True)       # here, so that it can fail here
    except MemoryError as error:
        tell(str(error) or "there is not enough memory")
        return 2
    except ImportError as error:
        tell(import_problem(error))
        return 2
    except (UserError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise       # torch reports a lack of memory this way
        tell(str(error))
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            tell("interrupted")
        return 130
    return 0
