"""Teach a model something new from a handful of pictures: train a LoRA.

    python -m extras.training.teach pictures/ -o mine.safetensors
    python tiny_sd.py "a zorp on a blue background" --lora mine.safetensors

pictures/ holds pictures of any size, each with a caption: a.png, a.txt, b.jpg, b.txt, ... lora.py
explains what is trained, REFERENCE.md what it can achieve. Needs torch.

mine.png is a sheet of some captions, drawn without and with the LoRA from fixed seeds.
mine.safetensors.state/ holds the progress, and a sheet every five minutes: after Ctrl-C or a kill
the same command resumes from there.

If you have several thousand pictures, train your own model on them, by the recipe in train.py:

    python -m extras.training.teach pictures/ -o mine --from-scratch --minutes 600
    python tiny_sd.py "a zorp on a blue background" -m mine
"""

import functools
import math
import os
import sys
from pathlib import Path

if __name__ == "__main__":      # runs main() below, as tiny_sd.py runs the command line
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from extras.start import program
    program("extras.training.teach")

# isort: split      (cli comes first: it sets up BLAS before NumPy is loaded)
from extras import cli, like_diffusers

# isort: split
import numpy as np
from PIL import Image
from tqdm import tqdm

import tiny_sd
from extras import fast, files, formats, show, things
from extras.start import command
from tiny_sd import UserError, require, tell

# ── The pictures ────────────────────────────────────────────────────────────────────────────────


def encode_pictures(model, pictures, args):
    """Return the scaled latents (1, h, w, 4) and captions; with --flip, also mirrored ones."""
    size = tiny_sd.latent_shape(model, args.width, args.height)
    noise, notes, latents, captions = like_diffusers.torch_noise([args.seed], size), [], [], []
    for path, caption in tqdm(pictures, "encoding", leave=False):
        picture = files.read_picture(path, args.width, args.height, notes)
        for pixels in [picture, picture[:, ::-1]][:1 + args.flip]:
            latents.append(tiny_sd.encode(model, pixels, noise()))
            captions.append(caption)
    for note in notes[:5]:
        tell(note)
    return latents, captions


def prompts_to_keep(args):
    """Return the lines of --keep, or else the things listed in the model's folder."""
    if args.keep:
        return [*filter(None, map(str.strip, files.read_text(args.keep).splitlines()))]
    known = things.known_things(args.model) or {"things": []}
    return [name for name, *_ in known["things"]]


def lessons(artist, pictures, prompts, args):
    """Return the latents (n, h, w, 4) and captions to train on: half new, half drawn by the model.

    Training on its own pictures, here of up to 100 prompts, keeps the model from forgetting them
    (Ruiz et al., 2023). artist: the model from lora.drawable.
    """
    taught, captions = encode_pictures(artist, pictures, args)
    order = np.random.default_rng(args.seed).permutation(len(prompts))
    prompts = [prompts[i] for i in order[:100]]     # as an array, all would be as long as one
    bar = tqdm(prompts, "drawing what it knows", leave=False)
    own = [draw(artist, prompt, seed, args) for seed, prompt in enumerate(bar)]
    n = max(1, len(own) // len(taught))
    return np.concatenate(taught * n + own), captions * n + prompts


def draw(artist, prompt, seed, args):
    """Draw a prompt; return the latents (1, h, w, 4)."""
    *_, x = like_diffusers.generate(artist, prompt, None, [seed], width=args.width,
                                    height=args.height)
    return x


def sheet_row(artist, captions, args):
    """Draw the first four captions with this model, from seeds 0 to 3."""
    return [Image.fromarray(tiny_sd.decode(artist, draw(artist, caption, seed, args))[0])
            for seed, caption in enumerate([*dict.fromkeys(captions)][:4])]


# ── The command line ────────────────────────────────────────────────────────────────────────────

OPTIONS = [     # (flags, type, default, help)
    ("-o --output", Path, None, "the .safetensors to write, for --lora"),
    ("-m --model", str, tiny_sd.HERE / "weights" / "emoji", "a model, as for tiny_sd.py (emoji)"),
    ("--caption", str, None, "for the pictures that have no .txt"),
    ("--keep", Path, None, "a file of prompts that the model should not forget, one per line (the "
                           "things that its folder lists)"),
    ("--flip", bool, False, "also train on mirrored pictures"),
    ("--rank", int, 8, "the rank of the matrices B A, which limits what they can learn "
                       "(%(default)s)"),
    ("--text", bool, False, "also adapt the text encoder, or both of SDXL's"),
    ("--from-scratch", bool, False, "train a whole model, not a LoRA, in the folder --output"),
    ("--config", ("small", "base"), "small", "the model's size, with --from-scratch (%(default)s)"),
    ("--minutes", float, None, "how long to train, from the first step on (10; 180 from scratch)"),
    ("--steps", int, None, "how many steps to train, instead of --minutes"),
    ("-b --batch-size", int, None, "pictures per step (one of 512 x 512, or more smaller ones)"),
    ("--rate", float, None, "the highest learning rate (lower for wider models)"),
    ("-s --seed", int, 0, "(%(default)s)"),
    ("-W --width", int, None, "in pixels (the model's own size)"), ("-H --height", int, None, None),
    ("--device", ("cpu", "cuda", "mps"), "cpu", "(%(default)s)"),
    ("--dtype", ("float32", "bfloat16"), "float32", "(%(default)s)"),
    ("--save-memory", bool, False, "recompute layers for the gradients instead of storing them"),
]


def parse_arguments(argv):
    """Return the options, checked as far as possible without the model."""
    parser = tiny_sd.Parser(prog="python -m extras.training.teach", allow_abbrev=False,
                            description="Teach a model something new from captioned pictures.")
    parser.add_argument("folder", type=Path, help="pictures, and captions: a.png, a.txt, ...")
    for flags, kind, default, text in OPTIONS:
        how = {"action": "store_true"} if kind is bool else {"type": kind, "default": default}
        how = {"choices": kind, "default": default} if isinstance(kind, tuple) else how
        parser.add_argument(*flags.split(), help=text, required=flags == "-o --output", **how)
    args = parser.parse_args(argv)
    cli.check_ranges(args, {
        "rank": (1, 1024), "steps": (1, 10 ** 7), "minutes": (0.001, 10 ** 5),
        "batch_size": (1, 4096), "rate": (1e-9, 1), "seed": (0, 2 ** 32)})
    require(not (args.steps and args.minutes), "give --steps or --minutes, not both")
    check_output(args)
    return args


REACHED, SHEET = "teaching.pt", "teaching.png"      # in the folder with the progress


def state_of(output):
    """Return the folder that holds the progress."""
    return output.with_name(f"{output.name}.state")


def check_output(args):
    """UserError if the output files could not be written at the end."""
    output = args.output
    require(args.from_scratch or output.suffix == ".safetensors",
            f"--output {output} does not end in .safetensors")
    require(output.name not in ("", ".."), f"--output {output} does not name a new folder")
    state = state_of(output)
    reached = state / REACHED
    files.check_folder_of(output)
    require(state.is_dir() or not os.path.lexists(state), f"{state} is not a folder: move it "
                                                          "elsewhere")
    require(reached.is_file() or not os.path.lexists(reached), f"{reached} is not a file")
    for path in [] if reached.exists() else [output, output.with_suffix(".png")]:
        require(not os.path.lexists(path), f"{path} exists already")


def fill_in(args, model):
    """Set missing options to values that suit the model."""
    require(not model.inpaints and not model.config.unet.time_cond_proj_dim, "a model for "
            "inpainting, or a distilled one, cannot be taught: teach the model it was made from")
    args.width, args.height = like_diffusers.picture_size(model, args.width, args.height)
    pixels = args.width * args.height // model.factor ** 2
    args.batch_size = args.batch_size or max(1, 64 * 64 // pixels)
    args.rate = args.rate or 0.2 / max(model.config.unet.block_out_channels)
    args.minutes = args.minutes or 10


def train_from_scratch(args):
    """Run train.py in place of this process, to train a whole model; does not return."""
    require(args.caption is None, "--from-scratch has to learn words: give each picture its own "
                                  "caption, not --caption")
    for name in ("keep", "flip", "text", "width", "height", "save_memory"):
        require(not getattr(args, name), f"{cli.flag_of(name)} is for a LoRA, and does not go with "
                                         "--from-scratch")
    require(args.device != "mps", "--from-scratch trains with --device cpu or cuda")
    files.read_captioned(args.folder)
    minutes = None if args.steps else args.minutes or 180
    how = {"data": args.folder, "out": args.output, "state": state_of(args.output),
           "config": args.config, "device": args.device, "seed": args.seed, "steps": args.steps,
           "minutes": minutes, "batch": args.batch_size, "rate": args.rate}
    options = [text for name, value in how.items() if value is not None
               for text in (f"--{name}", str(value))]
    os.execv(sys.executable, [*command("extras.training.train"), "all", *options])


# ── Teaching ────────────────────────────────────────────────────────────────────────────────────


def say_if_short(steps, minutes):
    """Warn if there were too few steps to learn much, and suggest a time."""
    if steps < 150:
        tell(f"there were only {steps} steps, but a new thing needs about 500: try "
             f"--minutes {math.ceil(500 * minutes / steps)}")


def finish(output, lora, sheet, state):
    """Write the LoRA, then draw its sheet, which takes time and may fail."""
    output = files.save_new(output, lambda file: file.write(lora))
    for file in state / REACHED, state / SHEET, *state.glob(".tiny_sd-*.part"):
        file.unlink(missing_ok=True)
    print(output, flush=True)
    try:
        files.save_picture(sheet(), output.with_suffix(".png"), "")
    except UserError as error:
        raise UserError(f"{output} is saved, but not its sheet: {error}") from None


def teach(args, pictures, prompts, state):
    """Train a LoRA, and write it and its sheet; state: the folder for the progress."""
    from extras.training import lora  # not above: --help needs no torch
    model = formats.load(args.model, "torch", args.device, args.dtype)
    fill_in(args, model)
    fast.keep_freed_memory()
    latents, captions = lessons(lora.drawable(model, args.device), pictures, prompts, args)
    adapted, pairs = lora.adapt(model, args.rank, args.text, args.seed)

    @functools.cache
    def before():
        return sheet_row(lora.drawable(model, args.device), captions, args)

    def sheet():
        after = sheet_row(lora.drawable(adapted, args.device), captions, args)
        return np.asarray(show.sheet([before(), after], down=["before", "after"]))

    steps, seconds = lora.train(model, adapted, pairs, latents, captions, args, state, sheet)
    say_if_short(steps, seconds / 60)
    finish(args.output, lora.kohya(model, pairs), sheet, state)


def run(argv):
    """Do what the command line asks for."""
    args = parse_arguments(argv)
    # By default torch's threads wait for each other busily, which wastes cores that others need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if args.from_scratch:
        train_from_scratch(args)
    with files.held(state_of(args.output)) as state:
        pictures, prompts = files.read_captioned(args.folder, args.caption), prompts_to_keep(args)
        teach(args, pictures, prompts, state)


def main(argv=None):
    """Run the program; return its exit status, as cli.main does."""
    return cli.main(argv, run)
