"""Helpers of the tests: a small random Stable Diffusion that draws in milliseconds, and the program
in a separate process.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiny_sd as sd
from extras import like_diffusers
from extras.tools import models
from extras.tools.models import random_arrays, shapes_of  # noqa: F401  (for the tests)

MERGES = [("r", "e"), ("re", "d</w>"), ("a", "p"), ("p", "l"), ("ap", "pl"), ("appl", "e</w>")]
TOKENIZER = sd.Tokenizer(MERGES, length=12)
CONFIG = {
    "text_encoder": {"vocab_size": len(TOKENIZER.vocab), "hidden_size": 12, "intermediate_size": 20,
                     "num_hidden_layers": 2, "num_attention_heads": 3,
                     "max_position_embeddings": 12, "hidden_act": "quick_gelu"},
    "vae": {"block_out_channels": [4, 8], "layers_per_block": 1, "latent_channels": 4,
            "in_channels": 3, "out_channels": 3, "norm_num_groups": 2, "scaling_factor": 0.5},
    "unet": {"block_out_channels": [8, 16], "layers_per_block": 1, "cross_attention_dim": 12,
             "attention_head_dim": 2, "norm_num_groups": 4, "sample_size": 8,
             "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
             "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "in_channels": 4,
             "out_channels": 4}, "scheduler": {"prediction_type": "epsilon", "beta_start": 0.00085,
                                               "beta_end": 0.012, "beta_schedule": "scaled_linear"}}
TWO_ENCODERS = CONFIG | {       # as in SDXL
    "text_encoder_2": CONFIG["text_encoder"] | {
        "hidden_size": 16, "num_attention_heads": 2, "hidden_act": "gelu", "projection_dim": 10},
    "unet": CONFIG["unet"] | {
        "cross_attention_dim": 12 + 16, "transformer_layers_per_block": [2, 1],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 10 + 6 * 4}}
FILES = sd.WEIGHT_FILES


def contents(folder="."):
    """Return {path: its bytes, or None for a folder} for everything in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def own_lines(lines):
    """Return the program's messages among the lines on stderr, without the prefix and the bar."""
    return [line.removeprefix("tiny_sd: ") for line in lines if line.startswith("tiny_sd: ")]


def drawn(model, *args, **settings):
    """Draw with like_diffusers.generate; return the pictures (batch, height, width, 3)."""
    *_, x = like_diffusers.generate(model, *args, **settings)
    return sd.decode(model, x)


def scheduler(**settings):
    """Return the record of a scheduler's config."""
    return sd.read_config("scheduler", settings)


def write_model(folder, config=CONFIG):
    """Write the random model as a diffusers folder, and return the folder.

    config: CONFIG or TWO_ENCODERS.
    """
    return models.write_model(folder, config, TOKENIZER)


PROGRAM = Path(sd.__file__).parent / "tiny_sd.py"


def launch(*argv, program=PROGRAM, python=(), under=(), cwd=None, **environment):
    """Start the program in a new process that any signal ends; return its Popen.

    python: options of Python itself. under: a command to run it under. Its stdout is buffered, even
    if the tests' own is not.
    """
    return subprocess.Popen([*under, sys.executable, *python, program, *argv],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=os.environ
                            | {"PYTHONUNBUFFERED": ""} | environment, preexec_fn=all_signals_end_it)


def all_signals_end_it():
    """Reset signals that the tests' own parent may ignore, as nohup ignores SIGHUP."""
    for name in ("SIGINT", "SIGHUP", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def finish(process):
    """Wait for a launched program; return (status, stdout, stderr)."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out.decode(), err.decode()


@functools.cache
def fork_server(*modules):
    """The socket of a fork server (forks.py) that has imported these modules."""
    ours, theirs = socket.socketpair()
    script = Path(__file__).with_name("forks.py")
    subprocess.Popen([sys.executable, script, *modules], stdin=theirs, stdout=subprocess.DEVNULL,
                     start_new_session=True)        # it ends when this process does
    theirs.close()
    return ours


class Fork:
    """The program in a process of the fork server, with part of the interface of Popen.

    first: Python code to run before it.
    """

    def __init__(self, *argv, first="", modules=(), **environ):
        job = {"argv": [*map(str, argv)], "first": first, "cwd": os.getcwd(),
               "environ": os.environ | environ}
        ends = [os.pipe() for _ in range(3)]
        socket.send_fds(fork_server(*modules), [json.dumps(job).encode()], [end for _, end in ends])
        for _, end in ends:
            os.close(end)
        self.stdout, self.stderr, self.told = (open(end, "rb") for end, _ in ends)
        self.pid = int(self.told.readline())

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self):
        self.returncode = int(self.told.readline())
        return self.returncode

    def communicate(self, timeout=None):
        """Return stdout and stderr; the program ends itself after five minutes."""
        with ThreadPoolExecutor(1) as other, self.stdout, self.stderr, self.told:
            err = other.submit(self.stderr.read)
            out = self.stdout.read(), err.result()
            self.wait()
        return out
