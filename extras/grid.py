"""Draw a sheet of pictures over values of one or two options: --grid steps=10,20,30 cfg=2,5,8."""

import csv

import numpy as np
from PIL import ImageOps

from extras import files
from tiny_sd import UserError, require

NAMES = {"cfg": "cfg-scale", "guidance-scale": "cfg-scale", "negative": "negative-prompt"}
MOST = 1000     # pictures


def axis(text):
    """Parse NAME=A,B,... into (name of an option, values); ValueError if it has another form."""
    name, values = text.split("=", 1)
    try:
        return NAMES.get(name, name), next(csv.reader([values]))
    except csv.Error as error:
        raise ValueError(str(error)) from None


def check_grid(job):
    """UserError if --grid has bad values, or comes with --batch-size."""
    counts = [len(values) for _, values in job.grid]
    require(len(counts) <= 2 and min(counts) > 0 and np.prod(counts) <= MOST, "--grid takes one "
            f"or two options, NAME=A,B,..., and draws at most {MOST} pictures")
    names = [name for name, _ in job.grid]
    require(len({*names}) == len(names), f"--grid takes two options, but not {names[0]} twice")
    require(job.batch_size == 1, "--grid does not go with --batch-size")


def cells(axes):
    """Return the flags of each picture, row by row; the first option varies along a row."""
    flags = [[f"--{name}={value}" for value in values] for name, values in axes]
    return [[across, *down] for down in (zip(flags[1]) if axes[1:] else [()])
            for across in flags[0]]


def jobs_of(first, argv, make_job):
    """Return the job of each cell. make_job(argv, number) makes one."""
    jobs = []
    for number, flags in enumerate(cells(first.grid), 1):
        try:
            jobs.append(make_job([*argv, f"--seed={first.seed}", *flags], number))
            require(jobs[-1].lora == first.lora, "all pictures must use the same LoRAs")
        except ValueError as error:
            raise UserError(f"--grid, {' '.join(flags)}: {error}") from None
    return jobs


def save(path, axes, names):
    """Write the sheet, with the values above and beside the pictures, and print its name.

    axes: (name, values) of one or two options. names: for each cell an iterator over the names of
    its pictures.
    """
    from extras import show
    names = [next(name) for name in names]
    require(None not in names, "cannot make the sheet, because a picture cannot be read back (is "
            "it too large, or gone?)")
    pictures = [files.upright(name).convert("RGB") for name in names]
    size = tuple(max(picture.size[i] for picture in pictures) for i in (0, 1))
    pictures = [ImageOps.pad(picture, size, color="white") for picture in pictures]
    n = len(axes[0][1])
    rows = [pictures[i:i + n] for i in range(0, len(pictures), n)]
    words = [[f"{name} {value}" for value in values] for name, values in axes]
    page = show.sheet(rows, *words, size=size[0])
    print(files.save_picture(np.asarray(page), path, ""))
