"""--prompts: lists of prompts, in one process or in several."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from conftest import ROOT
from extras import cli, formats
from helpers import Fork, finish, write_model
from helpers_cli import *  # noqa: F403
from helpers_cli import PLAIN, parse, write_facts


def test_prompts_from_a_file(tmp_path, capsys, monkeypatch):
    model, out, lines = (str(write_model(tmp_path / "m")), tmp_path / "p.png",
                         tmp_path / "prompts.txt")
    lines.write_text("# first\nred apple\n\na dog's house -s 5 --steps 2 -n 'b, c'   # a comment\n"
                     "well-known -b 2\n", encoding="utf-8")
    run = ["--prompts", str(lines), "-m", model, "-o", str(out), "--steps", "1"]
    assert cli.main(run) == 0
    names = ["p-0002.png", "p-0004.png", "p-0005-000.png", "p-0005-001.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    prompt, negative, last = parse(Image.open(tmp_path / "p-0004.png"))
    assert (prompt, negative, last["Seed"], last["Steps"]) == ("a dog's house", "b, c", "5", "2")
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    (tmp_path / "p-0004.png").unlink()
    assert cli.main(run) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert sum((tmp_path / name).stat().st_mtime_ns != before[name] for name in names) == 1
    monkeypatch.setattr(
        formats, "load", None
    )  # no need to wait for a model if nothing is to be drawn
    capsys.readouterr()
    assert (cli.main(run) == 0
            and capsys.readouterr() == ("", f"tiny_sd: {lines}: every picture exists already\n"))
    for line, said in (("red --steps 0", "--steps 0"), ("red -h 64", "-h"),
                       ("red --preview x.png", "--preview"), ("red -m x", "--model"),
                       ("red --seamless", "--seamless"),
                       ("--seed 3 red", "it cannot start with --seed")):
        lines.write_text(line, encoding="utf-8")
        assert cli.main(run) == 2
        err = capsys.readouterr().err
        assert "line 1: " in err and said in err and err.count("\n") == 1


@pytest.mark.slow
def test_two_processes_share_the_prompts(tmp_path):
    pytest.importorskip("torch")
    model, lines = str(write_model(tmp_path / "m")), tmp_path / "prompts.txt"
    lines.write_text("red\napple\nred apple\n", encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", ROOT / "tiny_sd.py", "--prompts", lines, "-m",
                           model, "-o", tmp_path / "p.png", "--steps", "1"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name
                  for path in tmp_path.glob("*.png")) == ["p-0001.png", "p-0002.png", "p-0003.png"]


def test_a_batch_that_broke_off_goes_on(run):
    """All pictures of a line are looked for, not only the first."""
    Path("p.txt").write_text("red -b 3\napple\n")
    assert len(run("--prompts", "p.txt")[1]) == 4
    Path("out-0001-002.png").unlink()
    assert run("--prompts", "p.txt")[1] == ["out-0001-000-1.png", "out-0001-001-1.png",
                                            "out-0001-002.png"]
    assert run("--prompts", "p.txt")[1] == []


@pytest.mark.slow
def test_an_edited_line_is_drawn_again(run):
    """By its prompts and options; a file without a record is not one of its pictures."""
    Path("p.txt").write_text("red\napple -s 5\nblue -n x\ngreen\n")
    assert len(run("--prompts", "p.txt")[1]) == 4
    PLAIN.save("out-0004.png")
    Path("p.txt").write_text("red apple\napple -s 6\nblue -n y\ngreen\n")
    again = ["out-0001-1.png", "out-0002-1.png", "out-0003-1.png", "out-0004-1.png"]
    assert run("--prompts", "p.txt")[1] == again
    assert run("--prompts", "p.txt")[1] == []
    Path("p.txt").write_text("red\napple -s 5\nblue -n x\n")
    assert run("--prompts", "p.txt")[1] == []


@pytest.mark.parametrize("option", [
    "--steps 3", "--cfg-scale 3", "--sampler euler", "--sampler dpm++2m --karras", "-W 32 -H 16",
    "--clip-skip 1", "--plain-prompt", "-i in.png", "-i in.png --mask in.png", "-n ''"])
def test_other_options_draw_a_line_again(run, option):
    """A line that leaves them to the model takes any."""
    PLAIN.save("in.png")
    Path("p.txt").write_text("red")
    assert run("--prompts", "p.txt")[1] == ["out-0001.png"]
    Path("p.txt").write_text(f"red {option}")
    assert run("--prompts", "p.txt")[1] == ["out-0001-1.png"]
    assert run("--prompts", "p.txt")[1] == []


@pytest.mark.parametrize("text", ["", "# none\n\n"])
def test_a_list_without_prompts(refuse, text):
    Path("p.txt").write_text(text)
    assert refuse("--prompts", "p.txt") == "tiny_sd: --prompts p.txt has no prompts"


@pytest.mark.parametrize("option", ["-i p.txt", "-i in.png --mask p.txt", "--control p.txt in.png",
                                    "--control word.safetensors in.png"])
def test_a_file_that_cannot_be_used_stops_the_list_before_it_begins(refuse, option):
    PLAIN.save("in.png")
    save_file({"emb_params": np.ones((2, 12), np.float32)}, "word.safetensors")
    Path("p.txt").write_text(f"red\napple {option}\n")
    assert refuse("--prompts", "p.txt").split()[1] in ("p.txt", "word.safetensors")


def test_seeds_at_random_are_drawn_once(run):
    Path("p.txt").write_text("red -s -1\napple -s -1\n")
    _, out, _ = run("--prompts", "p.txt")
    assert len({parse(Image.open(name))[2]["Seed"] for name in out}) == 2
    assert run("--prompts", "p.txt")[1] == []


def test_which_of_how_many(run):
    Path("p.txt").write_text("red\napple\nblue\n")
    err = "\n".join(run("--prompts", "p.txt")[2])
    assert re.search(r"1 of 3: .*\n?", err) and re.search(r"3 of 3, \d\d:\d\d left: ", err)


def test_a_number_sign_in_a_prompt(run):
    Path("p.txt").write_text("a house, #1 in the list\nred  # a comment\na#b\n")
    said = [line for line in run("--prompts", "p.txt")[2] if line.startswith("tiny_sd: ")]
    assert said == ["tiny_sd: p.txt, line 1: #1 in the list is read as a comment"]
    assert parse(Image.open("out-0001.png"))[0] == "a house,"
    assert parse(Image.open("out-0003.png"))[0] == "a#b"


def test_lines_of_the_web_uis_lists(run):
    """Its flags have underscores; so has the prompt one."""
    Path("p.txt").write_text(
        '--prompt "red, apple" --negative_prompt "x y" --cfg_scale 3 --steps 3 --sampler_name '
        '"Euler a"\n--seed 4 --prompt apple\n"a red apple" -s 5\n')
    status, out, err = run("--prompts", "p.txt")
    found = [parse(Image.open(name)) for name in out]
    assert [prompt for prompt, _, _ in found] == ["red, apple", "apple", "a red apple"]
    assert found[0][1] == "x y" and found[0][2].items() >= {
        "CFG scale": "3.0", "Steps": "3", "Sampler": "Euler a"}.items()
    assert [facts["Seed"] for _, _, facts in found] == ["0", "4", "5"]


def test_a_list_without_end_is_refused(refuse):
    assert refuse("--prompts", "/dev/zero") == (
        "tiny_sd: /dev/zero is larger than 16,777,216 bytes")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
def test_a_list_from_a_pipe(run):
    """Its writer may be slow; without a writer, a line says so instead of waiting."""
    os.mkfifo("list.txt")
    assert run("--prompts", "list.txt") == (2, [], [
        "tiny_sd: list.txt is a FIFO that nobody writes to"])
    writer = subprocess.Popen(["sh", "-c", "exec > list.txt; sleep 3; echo red; echo apple"])
    assert len(run("--prompts", "list.txt", "--steps", "1")[1]) == 2
    assert writer.wait() == 0


def test_lines_end_where_files_say(run):
    """Not at a form feed or U+2028; and a byte-order mark is not part of the prompt."""
    Path("p.txt").write_bytes("\ufeffred\fapple\u2028blue\r\ngreen".encode())
    assert run("--prompts", "p.txt")[1] == ["out-0001.png", "out-0002.png"]
    assert parse(Image.open("out-0001.png"))[0] == "red apple blue"


@pytest.mark.parametrize("line", ["red -i none.png", "red -i in.png --mask none.png"])
def test_a_picture_that_is_missing_is_found_before_anything_is_drawn(refuse, line):
    PLAIN.save("in.png")
    Path("p.txt").write_text(f"apple\n{line}\n")
    assert refuse("--prompts", "p.txt") == "tiny_sd: p.txt, line 2: there is no file none.png"


def test_a_line_of_a_million_spaces(run):
    Path("p.txt").write_text("red" + " " * 10 ** 6 + "apple" + " -" * 40_000 + "\n")
    start = time.process_time()
    assert run("--prompts", "p.txt", "--steps", "1")[0] == 0
    assert time.process_time() - start < 20


@pytest.mark.slow
def test_a_line_like_another_picture(run):
    assert run("red", "-o", "a.png", "-s", "4")[0] == 0
    Path("p.txt").write_text("apple --like a.png\nblue --like a.png -s 5\ngreen\n")
    _, out, err = run("--prompts", "p.txt")
    drawn = [parse(Image.open(name)) for name in out]
    assert [(prompt, facts["Seed"]) for prompt, _, facts in drawn] == [
        ("apple", "4"), ("blue", "5"), ("green", "0")]
    Path("p.txt").write_text("apple\nblue\n")
    write_facts("b.png", "red\nSteps: 2, Sampler: Euler, Seed: 3, Size: 16x16, ENSD: 2")
    _, out, err = run("--prompts", "p.txt", "--like", "b.png", "-o", "c.png")
    assert [parse(Image.open(name))[2]["Seed"] for name in out] == ["3", "3"]
    assert sum("ENSD" in line for line in err) == 1


@pytest.mark.parametrize("environment",
                         [{"RANK": ""}, {"RANK": "", "WORLD_SIZE": ""}, {"WORLD_SIZE": "2"},
                          {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "1"},
                          {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"}])
def test_half_of_what_torchrun_says(run, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Path("p.txt").write_text("red\napple\n")
    assert run("--prompts", "p.txt")[1] == ["out-0001.png", "out-0002.png"]


RANK = """
import time
from datetime import timedelta
import torch.distributed.distributed_c10d as distributed
distributed.default_pg_timeout = timedelta(seconds=2)
from extras import files
save_picture = files.save_picture
files.save_picture = lambda *args: time.sleep(8) or save_picture(*args)
"""


def start_rank(rank, model, port):
    """One of two processes that share a list of one prompt, as torchrun starts them."""
    pytest.importorskip("torch")
    Path("p.txt").write_text("red\n")
    return Fork("--prompts", "p.txt", "-m", model, first=RANK, modules=("torch.distributed",),
                RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_an_idle_process_waits_for_the_busy_ones(model):
    """Longer than torch's own limit, which is two seconds here."""
    port = free_port()
    busy, idle = (start_rank(rank, model, port) for rank in (0, 1))
    assert finish(idle)[:2] == (0, "") and Path("out-0001.png").exists()
    assert finish(busy)[:2] == (0, "out-0001.png\n")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process")
def test_an_idle_process_can_be_interrupted(model):
    """The other is not there, and never will be."""
    idle = start_rank(1, model, free_port())
    while b"waits for the others" not in (line := idle.stderr.readline()):
        assert line
    time.sleep(1)
    idle.send_signal(signal.SIGINT)
    assert idle.wait() == 130


@pytest.mark.slow
def test_processes_that_cannot_meet(model):
    """What they have drawn is there."""
    status, out, err = finish(start_rank(0, model, "nowhere"))
    assert (status, out) == (2, "out-0001.png\n") and "Traceback" not in err
    assert "the other processes cannot be reached: " in err
