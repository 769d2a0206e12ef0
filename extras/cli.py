"""The command line: every option of `python tiny_sd.py`, and what is done for them."""

import contextlib
import os
import re
import shlex
import sys
from datetime import timedelta
from pathlib import Path

from extras import fast, samplers  # noqa: F401  (first: it sets up BLAS before NumPy is loaded)
from tqdm import tqdm

import tiny_sd
from extras import files, formats
from extras.checks import check_memory
from tiny_sd import OPTIONS, UserError, require, tell


def lora(text):
    """Return FILE or FILE:WEIGHT as (file, weight)."""
    file, weight = re.fullmatch(r"(.*?)(?::(-?[\d.]+))?", text, re.DOTALL).groups()
    return file, float(weight or 1)


def option_parser(**settings):
    """Return the parser of all options: those of tiny_sd.py, and these."""
    parser = tiny_sd.option_parser(OPTIONS, **settings)
    what, model, sampling, start, output, hardware = (
        parser.sections[heading].add_argument for heading in
        ("what to draw", "model", "sampling", "from a picture", "output", "hardware"))
    what("-b", "--batch-size", type=int, default=1, metavar="N",
         help="pictures, with the seeds seed, seed + 1, ... (%(default)s)")
    what("--prompts", metavar="FILE", help="a picture for each line, which may end in flags of "
                                           "its own; # begins a comment")
    what("--like", metavar="PNG", help="draw that picture again, but for the flags given")
    model("--lora", type=lora, action="append", default=[], metavar="FILE[:WEIGHT]",
          help="a LoRA to add; repeatable")
    sampling("--prediction", choices=("epsilon", "v", "sample"),
             help="what the U-Net predicts (as the model's config says)")
    sampling("--karras", action="store_true", help="Karras' spacing of the noise levels")
    start("--mask", metavar="FILE", help="a picture, white where the first is to be drawn anew")
    output("--preview", type=Path, metavar="PNG",
           help="a new file, or a preview, to show in small what each step expects")
    output("--show", type=Path, metavar="DIR",
           help="a new folder for pictures of what is computed on the way")
    output("--explain", action="store_true",
           help="draw nothing: print the prompt's tokens and the model's parts")
    hardware("--formulas", action="store_true",
             help="compute by tiny_sd.py's formulas alone, slowly")
    parser.epilog = ("--model takes a folder, a .safetensors file, a name in weights/, OWNER/NAME "
                     f"on the Hugging Face hub, or one of {', '.join(formats.HUB)}.")
    return parser


def parse_arguments(argv, **settings):
    """Return the command line as a namespace, filled in as far as no model is needed for that."""
    parser = option_parser(**settings)
    args = parser.parse_args(argv)
    if args.like and not args.prompts:
        recorded = files.recorded(args.like)
        check_one_prompt(args, parser, at_least=0)
        args = parser.parse_args(recorded + argv)
    else:
        check_one_prompt(args, parser, at_least=1)
    prompt = (args.prompt or "") if args.words is None else args.words
    args.prompt, args.negative_prompt = (
        files.printable("--" if text == [] else text) for text in (prompt, args.negative_prompt))

    if args.strength is None:
        args.strength = 0.75 if args.mask is None else 1.0
    if args.backend is None:
        args.backend = "numpy" if args.device == "cpu" else "torch"
    check_arguments(args)
    return args


def check_one_prompt(args, parser, at_least):
    """UserError unless there is one prompt, or with --like at most one."""
    given = sum(source is not None for source in (args.words, args.prompt, args.prompts))
    if not at_least <= given <= 1:
        parser.error("give one prompt")


def check_arguments(args):
    """UserError where an option is out of range, or does not go with another."""
    plain = (args.device, args.dtype) == ("cpu", "float32")
    require(args.backend == "torch" or plain,
            f"NumPy computes in float32 on the CPU: --device {args.device} "
            f"--dtype {args.dtype} need --backend torch")
    for option, low, high in ("steps", 1, 999), ("cfg_scale", 0, 100), ("batch_size", 1, 1000):
        value = getattr(args, option)
        require(value is None or low <= value <= high,
                f"--{option.replace('_', '-')} {value} is not from {low} to {high}")
    require(0 <= args.seed <= 2 ** 64 - args.batch_size,
            f"--seed {args.seed} is not from 0 to 2^64 - 1")
    require(0 < args.strength <= 1, f"--strength {args.strength} is not above 0 and up to 1")
    require(args.mask is None or args.init_img is not None,
            "--mask needs --init-img, the picture that it belongs to")
    require(not args.karras or args.sampler in (None, *tiny_sd.KARRAS),
            f"--karras does not go with --sampler {args.sampler}")
    require(not args.show or not args.explain, "--explain draws nothing that --show could show")
    require(not args.prompts or not (args.show or args.explain),
            "--show and --explain take one prompt, not --prompts")
    check_outputs(args)


def check_outputs(args):
    """UserError where a file could not be written at the end."""
    suffixes = {"output": files.SUFFIXES, "preview": (".png",)}
    for option, path in (("output", args.output), ("preview", args.preview or args.output)):
        require(path.suffix.lower() in suffixes[option] or path == args.output,
                f"--{option} {path} does not end in .png")
        require(path.suffix.lower() in files.SUFFIXES,
                f"--{option} {path} does not end in .png (nor in .jpg or .webp)")
        require(path.parent.is_dir(), f"there is no folder {path.parent} to write to")
        require(os.access(path.parent, os.W_OK), f"the folder {path.parent} cannot be written to")


def read_prompts(args, argv):
    """Return the arguments of each line of --prompts, without those whose picture is there."""
    try:
        text = Path(args.prompts).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"the prompts cannot be read: {error}") from None
    jobs = []
    for number, line in enumerate(text.split("\n"), 1):
        words = re.sub(r"(^|(?<=\s))#.*", "", " ".join(line.split()))
        prompt, *flags = re.split(r" (?=--?[A-Za-z])", words.strip(), maxsplit=1)
        if not prompt:
            continue
        target = args.output.with_stem(f"{args.output.stem}-{number:04d}")
        try:
            given = [*argv, f"--prompts={args.prompts}", *shlex.split("".join(flags)),
                     f"--output={target}"]
            job = parse_arguments(given, add_help=False)
            for file in filter(None, (job.init_img, job.mask)):
                require(Path(file).exists(), f"{file} is not there")
        except ValueError as error:
            raise UserError(f"{args.prompts}, line {number}: {error}") from None
        fixed = ("model", "lora", "backend", "device", "dtype", "prediction", "preview")
        require(all(getattr(job, name) == getattr(args, name) for name in fixed),
                f"{args.prompts}, line {number}: the model and --preview are the same for all "
                "lines")
        job.prompt = prompt
        if not all(path.exists() for path in numbered(target, job.batch_size)):
            jobs.append(job)
    return jobs


def numbered(path, n):
    """Return the names of n pictures."""
    if n == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{k:03d}") for k in range(n)]


def run(argv):
    """Do what the command line asks for."""
    args = parse_arguments(argv)
    if args.formulas:
        tiny_sd.FAST.clear()
    rank, ranks = torchrun_rank()
    jobs = read_prompts(args, argv)[rank::ranks] if args.prompts else [args]
    if not jobs and ranks == 1:
        return tell(f"{args.prompts} has no prompt whose picture is not there yet")

    film, denoiser = None, tiny_sd.denoiser
    if args.show or args.explain or args.preview:
        from extras import show
        if args.show:
            film = denoiser = show.Film(args.show)
        if args.preview:
            denoiser = show.previewer(args.preview, denoiser)
    model = formats.load(args.model or tiny_sd.HERE / "weights" / "emoji", args.backend,
                         args.device, args.dtype, args.lora)
    if args.prediction:
        kind = args.prediction + "_prediction" * (args.prediction == "v")
        model.config.scheduler.prediction_type = kind
    if args.explain:
        h, w, _ = tiny_sd.image_size(model, args.width, args.height)
        return show.explain(model, args.prompt, w * model.factor, h * model.factor)

    for job in jobs:
        x, seeds = draw(model, job, denoiser, last=job is jobs[-1])
    if film:
        print(film.save(x, args.prompt, seeds))
    if args.prompts and ranks > 1:
        wait_for_other_ranks()
    return None


def torchrun_rank():
    """Return (rank, number of processes) as torchrun tells them."""
    rank, ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and ranks.isdecimal()):
        return 0, 1
    return int(rank), max(1, int(ranks))


def wait_for_other_ranks():
    """Wait, however long it takes: torchrun ends all processes when one ends."""
    import torch.distributed as dist
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    dist.barrier()
    dist.destroy_process_group()


def draw(model, args, denoiser=tiny_sd.denoiser, last=False):
    """Draw and save the pictures that args ask for; return their latents and seeds.

    While the last of all are drawn, this program's model loses each network that has done its
    work: the rest need the memory.
    """
    h, w, _ = tiny_sd.image_size(model, args.width, args.height)
    height, width = h * model.factor, w * model.factor
    fill_in(model, args)
    check_picture_memory(model, args, width, height)
    init, mask = (file and files.read_picture(file, width, height)
                  for file in (args.init_img, args.mask))
    if mask is not None:
        mask = mask.mean(axis=-1) > 127.5

    seeds = [args.seed + k for k in range(args.batch_size)]
    walk = tiny_sd.generate(model, args.prompt, args.negative_prompt, seeds, args.steps,
                            args.cfg_scale, args.sampler, args.karras, width, height, init,
                            args.strength, mask, denoiser)
    total = args.steps if init is None else int(round(args.steps * args.strength, 9))
    if last:
        model.text_encoder = None
    for x in tqdm(walk, total=total, unit="step"):      # noqa: B007
        pass
    if last:
        model.unet = None
    names = numbered(args.output, len(seeds))
    for seed, path, pixels in zip(seeds, names, tiny_sd.decode(model, x)):
        text = files.parameters_text(args, model, seed, width, height)
        print(files.save_picture(pixels, path, text), flush=True)
    return x, seeds


def fill_in(model, args):
    """Set sampler, steps and guidance to the model's own where they are not given."""
    sampler, steps, guidance = tiny_sd.defaults(model)
    args.sampler, args.steps = args.sampler or sampler, args.steps or steps
    args.cfg_scale = guidance if args.cfg_scale is None else args.cfg_scale


def check_picture_memory(model, args, width, height):
    """UserError if three of the largest arrays (VAE float32, U-Net float16) do not fit."""
    if args.device == "cpu":
        vae, unet = model.config.vae.block_out_channels, model.config.unet.block_out_channels
        bytes_per_pixel = max(4 * vae[:2][-1], 2 * unet[0] * args.batch_size // model.factor ** 2)
        check_memory(3 * bytes_per_pixel * width * height, f"--width {width} --height {height}")


def main(argv=None):
    """Run the program; return 0, 2 after one line that says what is wrong, or 130 after Ctrl-C."""
    try:
        run(sys.argv[1:] if argv is None else argv)
        print(end="", flush=True)       # here, so that it can fail here
    except MemoryError as error:
        tell(str(error) or "there is not enough memory")
        return 2
    except (UserError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise       # but torch has no other error for want of memory
        tell(str(error))
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            tell("interrupted")
        return 130
    return 0
