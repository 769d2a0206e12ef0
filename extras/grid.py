"""A sheet of pictures that differ in one option or two: --grid steps=10,20,30 cfg=2,5,8."""

import csv

import numpy as np
from PIL import ImageOps

from extras import files
from tiny_sd import UserError, require

NAMES = {"cfg": "cfg-scale", "guidance-scale": "cfg-scale", "negative": "negative-prompt"}
MOST = 1000     # pictures


def axis(text):
    """Return NAME=A,B,... as (name of an option, values); ValueError if it does not read so."""
    name, values = text.split("=", 1)
    try:
        return NAMES.get(name, name), next(csv.reader([values]))
    except csv.Error as error:
        raise ValueError(str(error)) from None


def check_grid(job):
    """UserError where a sheet of these options cannot be made, or does not go with another."""
    counts = [len(values) for _, values in job.grid]
    require(len(counts) <= 2 and min(counts) > 0 and np.prod(counts) <= MOST, "--grid takes one "
            f"option or two, NAME=A,B,..., and comes to at most {MOST} pictures")
    names = [name for name, _ in job.grid]
    require(len({*names}) == len(names), f"--grid takes two options, and not {names[0]} twice")
    clash = next((name for name in ("prompts", "show", "explain", "film", "play", "merge", "things")
                  if getattr(job, name)), None)
    require(not clash and job.batch_size == 1,
            f"--grid does not go with --{clash or 'batch-size'}")


def cells(axes):
    """Return the flags of each picture, row by row: the first option changes along the rows."""
    flags = [[f"--{name}={value}" for value in values] for name, values in axes]
    return [[across, *down] for down in (zip(flags[1]) if axes[1:] else [()])
            for across in flags[0]]


def jobs_of(first, argv, make_job):
    """Return the job of each cell. make_job: a function of the command line, and a number."""
    jobs = []
    for number, flags in enumerate(cells(first.grid), 1):
        try:
            jobs.append(make_job([*argv, f"--seed={first.seed}", *flags], number))
            require(jobs[-1].lora == first.lora, "all have one model, with its LoRAs")
        except ValueError as error:
            raise UserError(f"--grid, {' '.join(flags)}: {error}") from None
    return jobs


def save(path, axes, names):
    """Write the sheet, with words above and beside the pictures, and print its name.

    axes: (name, values) of one option or two. names: of each cell, the names of its picture.
    """
    from extras import show
    names = [next(name) for name in names]
    require(None not in names, "there is no sheet: its pictures cannot be read again (are they too "
            "large, or gone?)")
    pictures = [files.upright(name).convert("RGB") for name in names]
    size = tuple(max(picture.size[i] for picture in pictures) for i in (0, 1))
    pictures = [ImageOps.pad(picture, size, color="white") for picture in pictures]
    n = len(axes[0][1])
    rows = [pictures[i:i + n] for i in range(0, len(pictures), n)]
    words = [[f"{name} {value}" for value in values] for name, values in axes]
    page = show.sheet(rows, *words, size=size[0])
    print(files.save_picture(np.asarray(page), path, ""))
