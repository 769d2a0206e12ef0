"""A run that is stopped, by Ctrl-C, by a full disk or by lack of memory.

In every phase of the real program, with the bundled model, it says so in one line, leaves nothing
half done behind, and harms nothing that was there.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from extras import cli, drawing, formats
from extras.tools import models
from helpers import FILES, PROGRAM, Fork, all_signals_end_it, finish, launch, sd, write_model

pytestmark = pytest.mark.slow

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals, rights and shells")
SMALL = "-W 32 -H 32 --steps 2".split()


def interrupt(where, name="SIGINT"):
    """Python that sends its process a signal when FUNCTION of FILE is called the COUNTth time."""
    file, function, count = where.split(":")
    return f"""
import os, signal, sys
left = iter(range({int(count) - 1}))

def watch(frame, event, arg):
    code = frame.f_code
    here = event == "call" and code.co_name == {function!r} and code.co_filename.endswith({file!r})
    if here and next(left, None) is None:
        sys.setprofile(None)
        os.kill(os.getpid(), signal.{name})
sys.setprofile(watch)
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run each test in a new folder, with a file and an empty folder that must stay."""
    monkeypatch.chdir(tmp_path)
    Path("out.png").write_text("mine")
    Path("seen").mkdir()
    return tmp_path


def program(*argv, first=""):
    """(status, stdout, stderr) of the program in a process of its own, a copy of one.

    first: what Python runs before it. Without the progress bar, and what is said of pictures that
    are small.
    """
    return without_bar(*finish(Fork(*argv, first=first)))


def new_program(*argv, under=(), first=""):
    """The same of the program from Python's start on, with `first` before all imports."""
    lib = Path(tempfile.mkdtemp())      # on whose path Python finds and runs sitecustomize.py
    (lib / "sitecustomize.py").write_text(first)
    ended = finish(launch(*argv, under=under, PYTHONPATH=str(lib), PYTHONDONTWRITEBYTECODE="1"))
    shutil.rmtree(lib)
    return without_bar(*ended)


def without_bar(status, out, err):
    lines = [line for line in re.split("[\r\n]+", err)
             if line and not re.search(r"\d+/\d+ \[|the model was trained on pictures of", line)]
    return status, out, lines


def contents():
    return {str(path): path.read_bytes() if path.is_file() and "large" not in path.parts else None
            for path in Path().rglob("*")}


# ── Ctrl-C ────────────────────────────────────────────────────────────────────────────────────────

PHASES = {  # the arguments, where it is interrupted, and what is there already by then
    "reading the weights": ("", "tiny_sd.py:to_backend:100", []),
    "reading a prompt": ("", "tiny_sd.py:merge:2", []),
    "encoding the prompt": ("", "tiny_sd.py:text_layer:3", []),
    "encoding a picture": ("-i in.png", "tiny_sd.py:vae_block:2", []),
    "sampling": ("", "like_diffusers.py:denoise:2", []),
    "writing a preview": ("--preview preview.png", "PngImagePlugin.py:putchunk:5", ["preview.png"]),
    "decoding": ("", "tiny_sd.py:vae_decode:1", []),
    "writing the picture": ("", "PngImagePlugin.py:putchunk:2", []),
    "writing the second picture": ("-b 2", "files.py:save_picture:2", ["out-000.png"]),
    "writing the page": ("--show seen", "PngImagePlugin.py:putchunk:12", ["out-1.png"]),
    "between two prompts": ("--prompts prompts.txt", "drawing.py:make_room:2", ["out-0001.png"]),
    "writing the second prompt's": (
        "--prompts prompts.txt", "PngImagePlugin.py:putchunk:8", ["out-0001.png"],
    ),
}


@posix
@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c(here, phase):
    flags, where, there = PHASES[phase]
    argv = [*flags.split(), *([] if "--prompts" in flags else ["red apple"]), *SMALL]
    Path("prompts.txt").write_text("red apple\ngreen apple\nblue apple\n")
    Image.new("RGB", (32, 32), "red").save("in.png")
    before = contents()
    status, out, err = program(*argv, first=interrupt(where))
    after = contents()
    assert (status, err, out.split()) == (130, ["tiny_sd: interrupted"],
                                          [name for name in there if name != "preview.png"])
    assert after.items() >= before.items() and sorted(after.keys() - before.keys()) == there
    for name in there:
        Image.open(name).load()
    if "--prompts" in flags:  # the same command goes on where it was stopped
        assert (program(*argv)[:2] == (0, "out-0002.png\nout-0003.png\n")
                and contents().items() >= after.items())


@posix
@pytest.mark.parametrize("where", [f"{file}.py:<module>:1"
                                   for file in ("numpy/__init__", "PIL/Image", "tqdm/std")])
def test_ctrl_c_while_libraries_are_imported(here, where):
    """Before main() is there to say so, Python ends itself by the same signal."""
    before = contents()
    status, out, err = new_program("apple", *SMALL, first=interrupt(where))
    assert ((status, out, err) in [(130, "", ["tiny_sd: interrupted"]), (-signal.SIGINT, "", [])]
            and contents() == before)


def test_a_line_that_ends_the_program_in_words(tmp_path):
    """As an exercise may have: sys.exit("...") prints that, and the status is 1."""
    (tmp_path / "odd.py").write_text("def main(): raise SystemExit('bye')")
    run = "from extras.start import program; program('odd')"
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    done = subprocess.run([sys.executable, "-c", run], env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "bye\n")


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("phase", ["sampling", "writing the picture", "writing the page"])
def test_other_signals_leave_nothing_unfinished(here, name, phase):
    flags, where, there = PHASES[phase]
    before = contents()
    status, out, err = program(*flags.split(), "apple", *SMALL, first=interrupt(where, name))
    after = contents()
    assert (status, err, out.split()) == (128 + getattr(signal, name), [], there)
    assert after.items() >= before.items() and sorted(after.keys() - before.keys()) == there


@posix
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_first_process_of_a_container_can_be_stopped(here, name, status):
    """There the system ignores each signal that the program does not catch."""
    container = ["unshare", "--pid", "--fork", "--mount-proc"]
    before = contents()
    first = interrupt("PngImagePlugin.py:putchunk:2", name) + "print(os.getpid(), file=sys.stderr)"
    stopped, out, err = new_program("apple", *SMALL, under=possible(container), first=first)
    said = ["tiny_sd: interrupted"] * (name == "SIGINT")
    assert (stopped, out, err) == (status, "", ["1", *said]) and contents() == before


@posix
def test_ctrl_c_again_while_it_tidies_up(here):
    """As of people who press it twice: nothing unfinished is left."""
    before = contents()
    status, out, err = program("apple", *SMALL, "--show", "new", first="""
import os, signal, sys
functions = ["latents_section", "rmtree", "tell"]

def watch(frame, event, arg):
    if event == "call" and functions and frame.f_code.co_name == functions[0]:
        functions.pop(0)
        os.kill(os.getpid(), signal.SIGINT)
sys.setprofile(watch)
""")
    assert (status, out, err) == (130, "out-1.png\n", ["tiny_sd: interrupted"])
    assert contents().keys() - before.keys() == {"out-1.png"}


@posix
def test_a_signal_that_is_not_heeded_is_heeded_when_it_comes_again(here):
    """For example one that came while Python removed an object and ignores exceptions."""
    stuck = """
import signal, time
from extras import start
start.set_up_signals()
for pause, number in (0, signal.SIGINT), (0, signal.SIGTERM), (1.1, signal.SIGTERM):
    time.sleep(pause)
    try:
        signal.raise_signal(number)
        print("on", flush=True)
    except KeyboardInterrupt:
        print("stopped", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", stuck], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, preexec_fn=all_signals_end_it)
    assert (done.returncode, done.stdout) == (143, "stopped\non\n"), done.stderr


def possible(command):
    """Return the start of a command, or skip the test if the system does not allow it."""
    try:
        refused = subprocess.run([*command, "true"], capture_output=True).returncode
    except OSError:
        refused = True
    if refused:
        pytest.skip(f"this system does not let a test call {command[0]}")
    return command


IN_A_FINALIZER = """
import signal, time, weakref
from extras.start import set_up_signals
set_up_signals()

class Thing:
    pass

thing = Thing()
seen = weakref.ref(thing, lambda _: signal.raise_signal(signal.{}))
del thing
time.sleep(60)
"""


@pytest.mark.parametrize("name, status", [("SIGINT", -2), ("SIGTERM", 143)])
def test_a_signal_while_an_object_is_freed_is_not_lost(name, status):
    """There Python prints exceptions, and goes on: one Ctrl-C of a hundred did nothing."""
    ended = subprocess.run([sys.executable, "-c", IN_A_FINALIZER.format(name)], cwd=ROOT,
                           capture_output=True, text=True, timeout=50)
    assert ended.returncode in (status, 130) and "ignored" not in ended.stderr


@posix
def test_nohup_is_heeded(here):
    """Signals that were ignored stay ignored."""
    code = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from extras import start
start.set_up_signals()
print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "True\n", done.stderr


@posix
@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(here, closed):
    """The picture is still drawn, and no library's output gets into it."""
    command = f"exec {sys.executable} {PROGRAM} apple {' '.join(SMALL)} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "out-1.png\n")
    Image.open("out-1.png").load()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("prompt, flags, status", [
    ("apple", [], 0), ("apple " * 200, [], 0), ("apple", ["--steps=0"], 2)])
def test_a_full_stderr(prompt, flags, status):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, PROGRAM, *SMALL, prompt, *flags],
                              stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.returncode == status
    assert (done.stdout == ("" if status else "out-1.png\n")
            and Path("out-1.png").exists() != bool(status))


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps it")
def test_a_current_folder_that_is_gone(here):
    """It is refused in a line; with a whole path for the output, it draws."""
    gone = "import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')"
    status, _, err = program("red", first=gone)
    assert (status, err) == (2, ["tiny_sd: the current folder no longer exists: go to another"])
    assert program("red", "-o", here / "a.png", "--steps", "1", first=gone)[0] == 0


# ── A full disk ───────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def disk(here):
    """disk(room): a file system of 64 kB, where a file leaves only `room` kB."""
    place = here / "disk"
    place.mkdir()
    mounted = not sys.platform.startswith("linux") or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True).returncode
    if mounted:
        pytest.skip("to mount a small file system needs Linux and its administrator's rights")

    def fill(room):
        (place / "mine").write_bytes(b"mine" * 256 * (64 - room))
        return place
    yield fill
    subprocess.run(["umount", place], check=True)


# A picture and a preview have 16 to 20 kB, a page more than 64; a disk gives out 4 at once.
FULL = [("-o disk/out.png", 0, "disk/out.png", []), ("-o disk/out.png", 4, "disk/out.png", []),
        ("-b 2 -o disk/out.png", 24, "disk/out-001.png", ["disk/out-000.png"]),
        ("--show disk/seen", 0, "disk/seen", ["out-1.png"]),
        ("--show disk/seen", 40, "disk/seen", ["out-1.png"]),
        ("--preview disk/preview.png", 0, "disk/preview.png", []),
        ("--preview disk/preview.png", 24, "disk/preview.png", ["disk/preview.png"])]


@pytest.mark.parametrize("flags, room, named, there", FULL)
def test_a_full_disk(here, disk, flags, room, named, there):
    disk(room)
    before = contents()
    status, out, err = program("red apple", *flags.split(), "--steps", "2")
    assert (status, len(err)) == (2, 1)
    assert out.split() == [name for name in there if "preview" not in name]  # told, though piped
    assert err[0].replace(f"{here}/",
                          "") == f"tiny_sd: {named} cannot be written: No space left on device"
    after = contents()
    assert after.items() >= before.items() and sorted(after.keys() - before.keys()) == there
    for name in there:
        Image.open(name).load()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("flags", ["--explain", "-W 32 -H 32 --steps 1"])
def test_a_full_stdout(flags):
    """The last of these has drawn its picture, which stays."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "tiny_sd.py", "red", *flags.split()],
                              stdout=full, stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert (done.returncode == 2
            and done.stderr.splitlines()[-1] == "tiny_sd: [Errno 28] No space left on device")
    assert Path("out-1.png").exists() == (flags[-1] == "1")


# ── Too little memory ─────────────────────────────────────────────────────────────────────────────

linux = pytest.mark.skipif(not sys.platform.startswith("linux"),
                           reason="only Linux tells how much memory there is")


@pytest.fixture
def large(here):
    """A folder of Stable Diffusion 1.5 with sparse files of the right size.

    They need no space on the disk.
    """
    return models.write_model(here / "large", models.sd15(), save=models.save_holes)


def limited(limit, how):
    """The start of a command that limits a program to `limit` bytes.

    Of addresses, or of memory in a control group, as in a container; here only the file that states
    the limit is real.
    """
    inside = {"addresses": f"ulimit -v {limit // 1024}",
              "container": "mount -t tmpfs tmpfs /sys/fs/cgroup && "
              f"echo {limit} > /sys/fs/cgroup/memory.max"}[how]
    command = [*(["unshare", "-rm"] if how == "container" else []), "sh", "-c",
               f'{inside} && exec "$@"', "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let a test set such a limit")
    return command


def swap():
    return int(re.search(r"SwapFree:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024 / 1e9


@linux
@pytest.mark.parametrize(
    "flags, what, need, room, how",
    [("-m large", "the model large", 3.4, 3.2, "addresses"),
     ("-m large", "the model large", 3.4, 3.3, "container"),
     ("-m large --backend torch --dtype float16", "the model large", 1.7, 1.6, "container"),
     ("-W 4096 -H 4096", "--width 4096 --height 4096", 6.4, 6.3, "container"),
     ("-W 512 -H 512 -b 1000", "--width 512 --height 512", 1.6, 1.5, "container")])
def test_too_little_memory(large, flags, what, need, room, how):
    if "torch" in flags:
        pytest.importorskip("torch")
    if swap() > need - room:
        pytest.skip("with so much swap it would fit")
    before = contents()
    status, out, err = new_program("red apple", *flags.split(), under=limited(int(room * 1e9), how))
    said = re.fullmatch(
        r"tiny_sd: (.*) needs at least ([\d.]+) GB of memory, but only ([\d.]+) GB are free: .*",
        err[-1])
    assert (status, out, len(err)) == (2, "", 1) and said, err
    assert ((said[1], float(said[2])) == (what, need) and float(said[3]) <= room + swap() + 0.06
            and contents() == before)


@linux
def test_half_precision_is_not_widened_before_it_is_refused(large):
    """bfloat16, which NumPy lacks, is twice as large in float32."""
    for part, stem in FILES.items():
        path = large / part / f"{stem}.safetensors"
        with open(path, "r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size).replace(b'"F16"', b'"BF16"')
            file.seek(0)
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(path.stat().st_size + len(text) - size)
    limit = limited(int(3.2e9), "addresses")
    status, out, err = new_program("red apple", "-m", "large", under=limit)
    assert ((status, out, len(err)) == (2, "", 1)
            and "the model large needs at least 3.4 GB" in err[0])


@linux
def test_a_picture_too_large_to_start_from(here):
    Image.new("RGB", (9000, 9000)).save("in.png")
    status, out, err = new_program("apple", "-i", "in.png", under=limited(int(0.7e9), "addresses"))
    assert (status, out, len(err)) == (2, "", 1) and len(err[0]) > 20, err


@linux
@pytest.mark.parametrize("argv, what", [("-m medium -W 32 -H 32", "the model medium"),
                                        ("-W 256 -H 256", "--width 256 --height 256")])
def test_what_is_refused_would_have_failed(here, argv, what, monkeypatch):
    """The memory reported as needed is less than the run uses, but not by much."""
    if "medium" in argv:
        models.write_model(here / "medium", models.sd15(64),
                           save=partial(models.save_random, dtype=np.float16))
    argv, needs = ["red apple", "--steps", "1", *argv.split()], {}
    measure = "import atexit, shutil; atexit.register(shutil.copyfile, '/proc/self/status', 'peak')"
    assert new_program(*argv, first=measure)[0] == 0
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("peak").read_text())[1])

    def check_memory(need, what, *advice):
        needs[what] = need
    for module in (drawing, formats):
        monkeypatch.setattr(module, "check_memory", check_memory)
    monkeypatch.setattr(sd, "generate", None)
    with pytest.raises(TypeError):
        cli.main(argv)
    assert needs[what] < peak < 3 * needs[what] + 60e6, (needs, peak)


# ── What the system does not allow ────────────────────────────────────────────────────────────────

ROOT_USER = os.name != "nt" and os.getuid() == 0
# As root, files can be read whatever they allow, and threads be started without limit. So begin:
READ_WHAT_IS_ALLOWED = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
AS_ANOTHER_USER = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups",
                   "--inh-caps", "+dac_override", "--ambient-caps", "+dac_override"]


@posix
@pytest.mark.parametrize("name", [
    "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer/vocab.json", "vae"])
def test_what_cannot_be_read_is_not_said_to_be_missing(here, name):
    under = possible(READ_WHAT_IS_ALLOWED) if ROOT_USER else []
    path = write_model(here / "model") / name
    path.chmod(0)
    status, out, err = new_program("red", "-m", "model", under=under)
    path.chmod(0o700)
    assert (status, out, len(err)) == (2, "", 1)
    assert name in err[0] and "Permission denied" in err[0]


@posix
@pytest.mark.parametrize("flags", [
    "-o kept/out.png", "--preview kept/p.png", "--show kept", "--show kept/new"])
def test_a_folder_that_may_only_be_read_is_not_said_to_be_missing(here, flags):
    """Nor is that found only at the end."""
    under = possible(READ_WHAT_IS_ALLOWED) if ROOT_USER else []
    Path("kept").mkdir(0o500)
    status, out, err = new_program("red", *flags.split(), under=under)
    assert (status, out, len(err)) == (2, "", 1)
    assert "kept" in err[0] and err[0].endswith("cannot be written to")


@linux
def test_no_thread_can_be_started(here):
    """The program continues with the one that it has."""
    under = [*(AS_ANOTHER_USER if ROOT_USER else []), "prlimit", "--nproc=1"]
    here.chmod(0o777)
    status, out, err = new_program("red apple", "--steps", "2", under=possible(under), first="""
import os, sys, threading
os.sched_getaffinity = lambda process: {0, 1}
try:
    threading.Thread(target=print).start()
except RuntimeError as error:
    print(error, file=sys.stderr)
""")
    assert (status, out, err) == (0, "out-1.png\n", ["can't start new thread"])
    Image.open("out-1.png").load()
