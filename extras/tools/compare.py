"""What samplers draw from one prompt and seed: a row for each, a column for each number of steps.

    python -m extras.tools.compare "a cat" -o compared.png
    python -m extras.tools.compare "a cat" -m sd15 --samplers euler dpm++2m unipc --steps 5 10 20
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import extras.fast  # noqa: F401  (speed)
import tiny_sd
from extras import cli, files, formats, show
from extras.like_diffusers import generate
from extras.samplers import sampler_named
from tiny_sd import require


def parse_arguments(argv):
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.tools.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("-m", "--model", default="emoji")
    parser.add_argument("-s", "--seed", type=int, default=0)
    parser.add_argument("--samplers", nargs="+", metavar="NAME", help="as --sampler takes them",
                        default=["ddim", "euler_a", "dpm++2m", "unipc"])
    parser.add_argument("--steps", nargs="+", type=int, metavar="N", default=[2, 4, 6, 10, 20])
    parser.add_argument("--cfg-scale", type=float, metavar="X")
    parser.add_argument("-o", "--output", type=Path, default="compared.png")
    return parser.parse_args(argv)


def run(argv):
    """Draw all the pictures, and write the sheet."""
    args = parse_arguments(argv)
    require(args.output.suffix.lower() in files.SUFFIXES,
            f"--output {args.output} does not end in {', '.join(files.SUFFIXES)}")
    named = [sampler_named(name) for name in args.samplers]
    for name, found in zip(args.samplers, named):
        require(found, f"--samplers {name}: choose among {', '.join(tiny_sd.SAMPLERS)}")

    model, drawn = formats.load(args.model), []
    for sampler, schedule in tqdm(named, unit="sampler"):
        latents = [list(generate(model, args.prompt, None, [args.seed], n, args.cfg_scale, sampler,
                                 schedule))[-1] for n in args.steps]
        drawn.append([Image.fromarray(tiny_sd.decode(model, x)[0]) for x in latents])
    page = show.sheet(drawn, [f"{n} steps" for n in args.steps], args.samplers, size=128)
    print(files.save_picture(np.asarray(page), args.output, ""))


def main(argv=None):
    """Run the program; return its exit status, as cli.main does."""
    return cli.main(argv, run)


if __name__ == "__main__":
    from extras.start import program
    program("extras.tools.compare")
