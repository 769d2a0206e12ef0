"""play.py and studio.py: who may talk to the page, what it draws, and the page in a browser."""

import contextlib
import http.client
import io
import json
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import tiny_sd
from conftest import ROOT
from extras import checks, cli, drawing, formats, play, studio
from helpers import Fork, all_signals_end_it, finish, write_model

pytestmark = pytest.mark.slow
NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]
LONG = {"prompt": "red apple", "steps": 900}        # the steps of a drawing that has to be stopped


def start(folder, *argv):
    """Start the page of a copy of the program; return its process, once the address is printed."""
    process = subprocess.Popen(
        [sys.executable, folder / "tiny_sd.py", "--play", "--no-browser", *argv],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=all_signals_end_it)
    process.address = process.stdout.readline().decode().strip()
    return process


def copy_program(folder):
    """Copy the program to a folder, with a small random model."""
    for name in "tiny_sd.py", "extras":
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "weights").symlink_to(ROOT / "weights")
    write_model(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A running page: its folder, process, address, host, port and token."""
    folder = copy_program(tmp_path_factory.mktemp("play"))
    process = start(folder, "-m", "tiny", "--steps", "4")
    host, port, token = re.fullmatch(r"http://([\d.]+):(\d+)/([\w-]+)/", process.address).groups()
    yield SimpleNamespace(folder=folder, process=process, address=process.address, host=host,
                          port=int(port), token=token)
    process.terminate()
    process.wait(10)


def ask(site, name, body=None, token=None, **headers):
    """Send a request; return the status and the open response."""
    connection = http.client.HTTPConnection(site.host, site.port, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST",
                       f"/{site.token if token is None else token}/{name}", data, headers)
    response = connection.getresponse()
    response.connection = connection        # which is closed with it
    return response.status, response


def answers(site, name, body):
    """Return all answers to a request."""
    status, response = ask(site, name, body)
    assert status == 200
    return [json.loads(line) for line in response]


def state(site):
    """Return the state of the process that draws, once it is ready or broken."""
    status, response = ask(site, "events")
    for line in response:
        if json.loads(line)["state"] != "loading":
            response.connection.close()
            return json.loads(line)


def only(events, kind):
    return [answer for answer in events if answer["event"] == kind]


# ── Who may talk to it ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name, body", [("", None), ("events", None), ("draw", {"prompt": "x"}),
                                        ("save", {"run": 1}), ("look", {"run": 1}),
                                        ("picture", b"x")])
@pytest.mark.parametrize("wrong", [
    {"token": ""}, {"token": "a"}, {"Host": "example.com"}, {"Host": "example.com:{port}"},
    {"Host": "127.0.0.1:1"}, {"Origin": "http://example.com"}, {"Origin": "null"},
    {"Origin": "https://127.0.0.1:{port}"}, {"Origin": "http://127.0.0.1:1"}], ids=str)
def test_others_are_refused(site, name, body, wrong):
    """Before anything of the request is read."""
    wrong = {key: value.format(port=site.port) for key, value in wrong.items()}
    status, response = ask(site, name, body, **wrong)
    assert status == 403 and site.token not in response.read().decode()


def test_the_page_is_served_to_itself(site):
    for host in site.host, "localhost":
        own = f"{host}:{site.port}"
        status, response = ask(site, "", Host=own, Origin=f"http://{own}")
        assert status == 200 and response.read() == (ROOT / "extras/play.html").read_bytes()
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]


def test_it_listens_on_this_machine_alone(site):
    with pytest.raises(OSError):
        socket.create_connection((own_address(), site.port), timeout=5)


def own_address():
    """Return an address of this machine for others; skip if it has none."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("192.0.2.1", 9))     # sends nothing: asks which address would
        except OSError:
            pytest.skip("this machine has no other address")
        address = probe.getsockname()[0]
    if address.startswith("127."):
        pytest.skip("this machine has no other address")
    return address


@pytest.mark.parametrize("name, body, status", [
    ("draw", b"x" * (play.LARGEST_REQUEST + 1), 413), ("draw", b"no json", 400), ("draw", [1], 400),
    ("draw", b"[" * 90_000, 400), ("draw", {"init_img": "/etc/passwd"}, 400),
    ("draw", {"init_img": 99}, 400), ("draw", {"mask": [1]}, 400), ("etc/passwd", {}, 404),
    ("../tiny_sd.py", None, 404), ("draw", None, 404)])
def test_requests_that_no_page_sends(site, name, body, status):
    assert ask(site, name, body)[0] == status


def test_a_picture_has_a_largest_size(site):
    """It is refused by its announced length, before it is sent."""
    with socket.create_connection((site.host, site.port), timeout=20) as connection:
        connection.sendall(f"POST /{site.token}/picture HTTP/1.1\r\nHost: {site.host}:{site.port}"
                           f"\r\nContent-Length: {10 ** 12}\r\n\r\n".encode())
        assert connection.makefile().readline().split()[1] == "413"


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "+5", "", "\xb2", "1_0"])
def test_a_length_that_is_no_number(site, length):
    with socket.create_connection((site.host, site.port), timeout=20) as connection:
        connection.sendall(f"POST /{site.token}/draw HTTP/1.1\r\nHost: {site.host}:{site.port}"
                           f"\r\nContent-Length: {length}\r\n\r\n".encode("latin-1"))
        assert connection.makefile().readline().split()[1] == "413"


@pytest.mark.parametrize("values, said", [
    ({"steps": 1000}, "steps 1000"), ({"width": 8192}, "width 8192"), ({"width": 7}, "width 7"),
    ({"seed": -3}, "seed -3"), ({"cfg_scale": 1e9}, "1000000000"), ({"strength": 0}, "strength"),
    ({"sampler": "none"}, "there is no sampler"), ({"steps": "4"}, "steps"),
    ({"prompt": ["a"]}, "prompt"),
    ({"schedule": 1}, "schedule"), ({"schedule": "x"}, "x"), ({"seed": 2 ** 70}, "seed"),
    ({"cfg_scale": True}, "cfg_scale")])
def test_what_is_out_of_range_is_said(site, values, said):
    """In a line, and the next picture is drawn."""
    found = answers(site, "draw", {"prompt": "apple", **values})
    assert said in only(found, "error")[0]["text"] and not only(found, "step")
    assert only(answers(site, "draw", {"prompt": "apple", "steps": 1}), "done")


def test_a_hundred_who_say_nothing(site):
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection((site.host, site.port), timeout=20))
        assert only(answers(site, "draw", {"prompt": "apple"}), "done")


# ── What it draws ───────────────────────────────────────────────────────────────────────────────


def pixels(data):
    """Return a data URL's picture as an array."""
    import base64
    import io
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))))


def test_steps_arrive_and_then_the_picture(site):
    found = answers(site, "draw", {"prompt": "red apple", "steps": 3, "cfg_scale": 3.5})
    assert [answer["event"] for answer in found] == [
        "begin", *["step"] * 3, "done", *["sharp"] * 3, "end"]
    assert [step["n"] for step in only(found, "step")] == [1, 2, 3]
    assert [step["left"] for step in only(found, "step")][-1] == 0
    assert pixels(found[1]["x_0"]).shape == (8, 8, 3)      # blurred, and decoded after the result
    assert pixels(only(found, "done")[0]["picture"]).shape == (16, 16, 3)
    assert [guess["n"] for guess in only(found, "sharp")] == [1, 2, 3]
    assert all(pixels(guess["x_0"]).shape == (16, 16, 3) for guess in only(found, "sharp"))
    assert len(only(found, "done")[0]["pushes"]) == 3
    words = found[0]["words"]
    assert [word["text"] for word in words] == ["(start)", "red", "apple", "(end and padding)"]


def test_prompts_that_change_on_the_way(site):
    """And several at once are drawn; their words are not shown."""
    for prompt in "[red:app:0.5] apple", "red AND apple":
        found = answers(site, "draw", {"prompt": prompt})
        assert only(found, "done") and only(found, "begin")[0]["words"] == [], prompt


def test_the_guesses_of_large_pictures(site, monkeypatch):
    """Are shown in small: a map of the latents, which takes no VAE."""
    monkeypatch.setattr(studio, "LIVE", 0)
    found = []
    room = studio.Studio(["--play", "-m", str(site.folder / "tiny")], queue.SimpleQueue(),
                         lambda **answer: found.append(answer))
    room.answer({"id": 1, "ask": "draw", "prompt": "red", "steps": 1})
    assert pixels(found[1]["x_0"]).shape == (8, 8, 3)
    assert pixels(found[2]["picture"]).shape == (16, 16, 3) and not only(found, "sharp")


def test_a_film_that_memory_cannot_hold_is_not_begun(site, monkeypatch):
    found = []
    room = studio.Studio(["--play", "-m", str(site.folder / "tiny")], queue.SimpleQueue(),
                         lambda **answer: found.append(answer))
    monkeypatch.setattr(checks, "free_memory", lambda: 600_000)
    room.answer({"id": 1, "ask": "draw", "prompt": "red", "steps": 999})
    assert "a film of 999 steps needs" in only(found, "error")[0]["text"]
    room.answer({"id": 2, "ask": "draw", "prompt": "red", "steps": 2})
    assert len(only(found, "error")) == 1


def test_the_page_computes_by_the_formulas_where_asked(site):
    with mock.patch.dict(tiny_sd.FAST, linear=None):
        studio.Studio(["--play", "--formulas", "-m", str(site.folder / "tiny")],
                      queue.SimpleQueue(), print)
        assert not tiny_sd.FAST


def test_it_saves_what_the_command_line_draws(site):
    """The same pixels, and the same record of how they were made; nothing is overwritten."""
    values = {"prompt": "red apple's", "negative_prompt": "app", "seed": 7, "steps": 3,
              "cfg_scale": 3.5, "sampler": "euler", "schedule": "karras", "width": 24}
    found = answers(site, "draw", values)
    command = found[0]["command"]
    names = [answers(site, "save", {"run": found[-1]["id"]})[0]["name"] for _ in range(2)]
    assert names == ["out.png", "out-1.png"] and "--scheduler karras" in command
    assert subprocess.run(f"{command} -o again.png", shell=True, cwd=site.folder, env=os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}).returncode == 0
    ours, other = (Image.open(site.folder / name) for name in ("out.png", "again.png"))
    assert np.array_equal(ours, other) and ours.text == other.text
    assert np.array_equal(ours, pixels(only(found, "done")[0]["picture"]))


def test_a_picture_and_a_mask(site, tmp_path):
    """The unmasked part is unchanged, and it takes a tenth of the steps."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    mask = Image.new("RGB", (32, 32))
    mask.paste("white", (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    init_img, mask = (json.loads(ask(site, "picture", (tmp_path / name).read_bytes())[1].read())
                      for name in ("red.png", "mask.png"))
    values = {"prompt": "apple", "init_img": init_img, "strength": 0.5}
    whole, half = (answers(site, "draw", values | more) for more in ({}, {"mask": mask}))
    assert len(only(whole, "step")) == len(only(half, "step")) == 2
    one, other = (pixels(only(found, "done")[0]["picture"]).astype(int) for found in (whole, half))
    assert abs(one - other)[:, 12:].max() > 0
    broken = json.loads(ask(site, "picture", b"this is no picture")[1].read())
    found = answers(site, "draw", {"prompt": "apple", "init_img": broken})
    assert "not a picture" in only(found, "error")[0]["text"]


def test_the_command_on_the_page(site):
    """Has every option that a picture can depend on, each read again as it was."""
    given = [*"-m tiny -n app -s 7 --steps 3 --cfg-scale 3.25 --cfg-rescale 0.5 --sampler euler "
             "--scheduler exponential --web-ui -W 18 -H 20 --plain-prompt --enlarge 2".split(),
             "--cfg-interval", "0.25:1.0", "--prediction", "v", "--prompt=-a 'b'"]
    model = formats.load(site.folder / "tiny")
    job = drawing.filled(model, cli.make_job(given))
    again = cli.make_job(shlex.split(studio.command_line(model, job))[2:])
    again = drawing.filled(model, again)
    assert again == job
    options = {option.dest for option in cli.option_parser().options}
    assert studio.ELSEWHERE < options       # none of them is an old one


def test_where_words_are_listened_to(site):
    found = answers(site, "draw", {"prompt": "red apple", "steps": 2})
    run = found[-1]["id"]
    looks = [answers(site, "look", {"run": run, **what})[0] for what in (
        {"word": 1}, {"word": 2}, {"word": 1, "step": 0}, {})]
    pictures = [pixels(look["picture"]) for look in looks]
    assert all(look["event"] == "look" and 0 < look["mean"] <= look["most"] for look in looks)
    assert all(abs(pictures[0].astype(int) - other).max() > 3 for other in pictures[1:])
    shares = [answers(site, "look", {"run": run, "word": n})[0]["mean"] for n in range(4)]
    assert sum(shares) == pytest.approx(1, abs=1e-5)        # of each pixel's attention
    for wrong in {"run": 10 ** 6, "word": 1}, {"run": run, "word": 99}, {"run": run, "word": "x"}:
        assert answers(site, "look", wrong)[0]["event"] == "error"


def test_a_second_tab_takes_over(site):
    first = ask(site, "draw", LONG)[1]
    assert [json.loads(first.readline())["event"] for _ in range(2)] == ["begin", "step"]
    assert only(answers(site, "draw", {"prompt": "apple"}), "done")
    assert [json.loads(line)["event"] for line in first][-2:] == ["stopped", "end"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_closing_the_tab_stops_the_work(site):
    response = ask(site, "draw", LONG)[1]
    for _ in range(3):
        response.readline()
    pid = state(site)["pid"]
    assert is_busy(pid)
    response.close()
    response.connection.close()
    assert wait_for(lambda: not is_busy(pid))


def is_busy(pid):
    """Does a process compute?"""
    def used():
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(facts[11]) + int(facts[12])
    before = used()
    time.sleep(1)
    return used() - before > 5      # hundredths of a second


def wait_for(condition, seconds=30):
    """Wait until the condition holds; return whether it came to that."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return met


def is_running(pid):
    """Is a process running, and not a zombie?"""
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_ends_at_once(tmp_path, monkeypatch, number):
    """In the middle of a drawing, and leaves no process and no folder; a kill cannot be helped."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = start(ROOT, "-m", str(write_model(tmp_path / "tiny")))
    host, port, token = re.fullmatch(r"http://(.+):(\d+)/(.+)/", process.address).groups()
    site = SimpleNamespace(host=host, port=int(port), token=token)
    pid = state(site)["pid"]
    response = ask(site, "draw", LONG)[1]
    response.readline()
    begun = time.monotonic()
    process.send_signal(number)
    assert process.wait(10) == {2: 130, 15: 143, 9: -9}[number] and time.monotonic() - begun < 3
    assert wait_for(lambda: not is_running(pid), 10)
    assert number == signal.SIGKILL or not list(tmp_path.glob("tiny_sd-*"))
    assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("flags, said", [
    ("-m nowhere", "nowhere"), ("--port {port}", "--port"), ("--port 99999", "--port 99999"),
    ("--steps 0", "--steps 0"), ("--play --prompts list.txt", "--prompts"),
    ("--film x.gif", "--film"), ("--preview x.png", "--preview"), ("--show seen", "--show")])
def test_what_cannot_start(site, flags, said, monkeypatch):
    """One line, and status 2."""
    monkeypatch.chdir(site.folder)
    Path("list.txt").write_text("apple")
    flags = flags.format(port=site.port).split()
    status, out, err = finish(Fork("--play", "--no-browser", "-m", "tiny", *flags))
    assert (status, out) == (2, "") and re.fullmatch(rf"tiny_sd: .*{said}.*\n", err), err


def test_changed_names():
    before = "import a\nx = 1\ndef f(): return 1\nclass C:\n    def g(self): return 1\n"
    for old, new, names in [("x = 1", "x = 2", ["x"]), ("f(): return 1", "f(): return 2", ["f"]),
                            ("self): return 1", "self): return 2", ["C.g"]), ("x = 1", "#", ["x"]),
                            ("return 1", "return 1  # one", []), ("x = 1", "x = ", [])]:
        assert play.changed_names(before, before.replace(old, new, 1)) == names


@pytest.mark.parametrize("code", ["+".join("1" * 5000), "-" * 20_000 + "1", "(" * 300 + ")" * 300])
def test_a_change_too_deep_for_python(code):
    assert play.changed_names("x = 1", f"x = {code}") == []


def test_a_change_that_prints_without_end():
    """Neither process keeps more of a line than somebody could read."""
    said = []
    notes = studio.Notes(said.append)
    for _ in range(100):
        notes.write("x" * 1000)
    notes.write("\n")
    assert len(notes.rest) == 0 and [*map(len, said)] == [1000]
    pieces = play.lines_of(io.BytesIO(b"x" * 100 + b"\na\n"), 60)
    assert [*pieces] == [b"x" * 60, b"x" * 40 + b"\n", b"a\n"]


@pytest.mark.parametrize("said", ["{}", '{"id": 1}', "[" * 100_000], ids=["{}", "1", "deep"])
def test_a_change_that_prints_json_is_not_the_process_that_is_ready(said):
    worker, process = play.Worker([]), SimpleNamespace(stdout=io.BytesIO(f"{said}\n".encode()))
    worker.read_answers(process, [])
    assert worker.state == {"state": "loading"}


def test_a_change_that_starts_another_process(monkeypatch):
    """Which holds the pipes open when its parent has ended."""
    monkeypatch.setattr(play, "command", lambda name: [
        sys.executable, "-c", "import subprocess, sys\nsubprocess.Popen(["
        "sys.executable, '-c', 'import time; time.sleep(40)'])\n1 / 0"])
    worker = play.Worker([])
    worker.start()
    said = worker.news(state="loading", timeout=30)
    assert said["state"] == "broken" and "\nZeroDivisionError" in said["text"]


def test_requests_that_come_together_start_one_process(monkeypatch):
    """When the process that draws has ended, as where memory ran out."""
    worker, started = play.Worker([]), []

    def launch():
        started.append(time.sleep(0.05))
        worker.process = SimpleNamespace(stdin=io.BytesIO(), kill=print, wait=print)
    monkeypatch.setattr(worker, "launch", launch)
    threads = [threading.Thread(target=worker.ask, args=({"ask": "draw"},)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1


def test_a_command_imports_nothing_from_the_current_folder(tmp_path, monkeypatch):
    """Not even where the program's own folder has a colon in its name, at which paths split."""
    shutil.copytree(ROOT / "extras", tmp_path / "a:b/extras",
                    ignore=shutil.ignore_patterns("__pycache__", "training", "tools", "pictures"))
    (tmp_path / "b/extras").mkdir(parents=True)
    for name in "extras/__init__", "extras/start", "os":
        (tmp_path / f"b/{name}.py").write_text("print('foreign')\n1 / 0\n")
    found = tmp_path / "a:b/extras/start.py"
    (tmp_path / "a:b/extras/own.py").write_text("def main():\n    print('own', __file__)\n")
    source = f"import sys; sys.path.insert(0, {str(found.parents[1])!r}); import extras.start as s"
    words = subprocess.run([sys.executable, "-P", "-c", f"{source}; print(*s.command('extras.own'),"
                            "sep='\\n')"], capture_output=True, text=True, check=True).stdout
    done = subprocess.run(words.splitlines(), cwd=tmp_path / "b", capture_output=True, text=True)
    assert done.stdout == f"own {found.parent / 'own.py'}\n" and not done.returncode, done


def test_without_descriptors_it_waits(monkeypatch):
    """Instead of trying to accept a connection without a pause."""
    waited = []
    monkeypatch.setattr(play.time, "sleep", waited.append)

    def get_request(self):
        raise OSError("too many open files")
    monkeypatch.setattr(play.ThreadingHTTPServer, "get_request", get_request)
    with pytest.raises(OSError, match="too many"):
        play.Server.__new__(play.Server).get_request()
    assert waited == [0.1]


def test_a_pipe_in_place_of_the_lesson_is_not_read(tmp_path, monkeypatch):
    """It would hold up the server for ever."""
    os.mkfifo(tmp_path / "tiny_sd.py")
    worker = play.Worker([])
    monkeypatch.setattr(play, "LESSON", tmp_path / "tiny_sd.py")
    assert play.stamp(play.LESSON) is None
    worker.start()
    assert worker.state["state"] == "broken" and "No such file" in worker.state["text"]


def test_a_request_that_is_too_deep_to_pass_on():
    """It may be just deep enough to be read."""
    worker, deep = play.Worker([]), []
    for _ in range(100_000):
        deep = [deep]
    worker.process = SimpleNamespace(stdin=io.BytesIO())
    _, answers = worker.ask({"ask": "draw", "prompt": deep})
    assert [answers.get(timeout=1)["event"] for _ in range(2)] == ["error", "end"]


@pytest.mark.parametrize("module, name", [(play, "LESSON"), (play.sys, "executable")])
def test_a_process_that_cannot_be_started(module, name, monkeypatch):
    """As when tiny_sd.py is gone for a moment: the page stays, and the next change starts it."""
    worker = play.Worker([])
    monkeypatch.setattr(module, name, Path("/nowhere/x"))
    worker.start()
    assert worker.state["state"] == "broken" and "No such file" in worker.state["text"]


# ── In a browser ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome is installed")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, site):
    """The page, freshly opened; it must send no other requests, and have no errors."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(60_000)
    errors, asked = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site.address)
    page.locator("#sampler option").first.wait_for(state="attached")
    yield page
    page.close()
    assert errors == []
    assert all(url.startswith((site.address, "data:", "blob:")) for url in asked)


def drawn(page, prompt="red apple"):
    """Draw by the keyboard, and wait for the result."""
    page.locator("#prompt").fill(prompt)
    page.keyboard.press("Enter")
    finished(page)


def finished(page):
    page.locator("#where", has_text="the result").wait_for()
    page.locator("#stop:disabled").wait_for()


def source(page, selector="#now img"):
    return page.locator(selector).get_attribute("src")


def test_draw_and_drag_the_handle(page):
    drawn(page)
    result = source(page)
    assert page.locator("#strip div").count() == 5 and source(page, "#latents img")
    page.locator("#handle").focus()
    page.keyboard.press("Home")
    assert "step 1 of 4: t = " in page.locator("#where").inner_text()
    assert source(page) == source(page, "#strip div:nth-child(1) img") != result
    assert page.locator("#now img.blurred").count() == 0       # it was sharpened after the result
    box = page.locator("#handle").bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    assert "step 3 of 4" in page.locator("#where").inner_text()
    page.keyboard.press("End")
    assert source(page) == result


def test_hover_a_word(page):
    """A heat map takes the picture's place, until the mouse leaves."""
    drawn(page)
    result = source(page)
    page.locator("#words button", has_text="apple").hover()
    page.wait_for_timeout(100)
    assert wait_for(lambda: source(page) != result)
    assert re.search(r"“apple” gets [\d.]+ % .* at most", page.locator("#words-hint").inner_text())
    page.mouse.move(0, 0)
    assert wait_for(lambda: source(page) == result)
    page.locator("#push").click()
    assert wait_for(lambda: source(page) != result)


def test_a_control_draws_again(page):
    drawn(page)
    first = source(page)
    page.locator("#seed").fill("5")
    assert wait_for(lambda: " -s 5 " in page.locator("#command").inner_text())
    finished(page)
    assert source(page) != first


def test_an_empty_number_is_the_models_own(page):
    """While the field is empty, nothing is drawn; when it is left, the model's number is in it."""
    drawn(page)
    command = page.locator("#command").inner_text()
    page.locator("#cfg_scale").fill("")
    page.wait_for_timeout(300)
    assert page.locator("#stop").is_disabled()
    page.keyboard.press("Tab")
    assert wait_for(lambda: page.locator("#cfg_scale").input_value() == "7.5")
    finished(page)
    assert page.locator("#notes").inner_text() == ""
    assert page.locator("#command").inner_text() == command


def test_a_file_that_is_no_picture_is_named(page, tmp_path):
    """And the start picture stays."""
    drawn(page)
    page.locator("#start summary").click()
    page.locator("#take").click()
    page.locator("#started").wait_for()
    finished(page)
    (tmp_path / "no.png").write_text("no picture")
    page.locator("#file").set_input_files(tmp_path / "no.png")
    page.locator("#notes", has_text="no.png is not a picture").wait_for()
    page.locator("#seed").fill("3")
    assert wait_for(lambda: " -s 3 " in page.locator("#command").inner_text())
    assert re.search(" -i .* # this file exists until", page.locator("#command").inner_text())
    finished(page)


def test_two_side_by_side(page):
    drawn(page)
    first = source(page)
    page.locator("#keep").click()
    page.locator("#cfg_scale").fill("1")
    page.locator("#before figcaption", has_text=re.compile("^guidance 7.5$")).wait_for()
    finished(page)
    assert source(page, "#before img") == first != source(page)
    assert page.locator("#now figcaption").inner_text() == "guidance 1"
    page.locator("#handle").focus()
    page.keyboard.press("Home")
    assert source(page, "#before img") != first


def test_stop(page):
    page.locator("#steps").fill("900")
    page.locator("#prompt").fill("apple")
    page.locator("#draw").click()
    page.locator("#status", has_text="step").wait_for()
    page.keyboard.press("Escape")
    page.locator("#status", has_text="stopped").wait_for()
    page.locator("#steps").fill("2")
    page.locator("#draw").click()
    finished(page)


def test_save_from_the_page(page, site):
    drawn(page)
    page.locator("#save").click()
    assert wait_for(lambda: page.locator("#saved").inner_text().endswith(".png"))
    assert Image.open(site.folder / page.locator("#saved").inner_text()).text["parameters"]


def test_start_from_the_result(page):
    drawn(page)
    page.locator("#start summary").click()
    page.locator("#take").click()
    page.locator("#easel canvas").wait_for()
    assert wait_for(lambda: " -i " in page.locator("#command").inner_text())
    finished(page)
    box = page.locator("#easel").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 60, steps=4)
    page.mouse.up()
    assert wait_for(lambda: " --mask " in page.locator("#command").inner_text())
    finished(page)
    page.locator("#leave").click()
    assert wait_for(lambda: " -i " not in page.locator("#command").inner_text())


def test_a_line_is_changed(page, site):
    """The page says which function it is, and draws again; an error keeps the picture."""
    drawn(page)
    first, lesson = source(page), site.folder / "tiny_sd.py"
    text = lesson.read_text(encoding="utf-8")
    assert "return x * sigmoid(x)" in text and "return uncond + scale * " in text
    try:
        lesson.write_text(text.replace("return x * sigmoid(x)", "return x * sigmoid(2 * x)"))
        page.locator("#code", has_text="silu").wait_for()
        page.locator("#code", has_text="silu was edited").wait_for()
        page.locator("#before").wait_for()
        finished(page)
        changed = source(page)
        assert source(page, "#before img") == first != changed

        lesson.write_text(text.replace("return x * sigmoid(x)", "return x * sigmoid(x"))
        page.locator("#code", has_text="SyntaxError").wait_for()
        assert "tiny_sd.py does not run at the moment" in page.locator("#code").inner_text()
        assert source(page) == changed
        lesson.write_text(text.replace("uncond + scale *", "uncond + scales *"))
        page.locator("#notes", has_text="NameError").wait_for()
        assert source(page) == changed
        lesson.write_text(text.replace("return uncond + scale",
                                       "print('guided'); return uncond + scale"))
        page.locator("#notes", has_text="guided").wait_for()
        lesson.write_text(text + "\nprint('imported')\n")
        page.locator("#code", has_text="imported").wait_for()
    finally:
        lesson.write_text(text)
    page.locator("#code").wait_for(state="hidden")
    assert wait_for(lambda: source(page) == first)


@pytest.mark.parametrize("width", [360, 768, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_screen(page, width, scheme):
    """Nothing extends beyond the window, and everything can be read."""
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ink, ground = page.evaluate("[getComputedStyle(document.body).color, "
                                "getComputedStyle(document.body).backgroundColor]")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, ground)]
    assert abs(light[0] - light[1]) > 400 and (light[0] < light[1]) == (scheme == "light")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_the_process_that_draws_is_killed(page, site):
    """As when memory runs out: the page says so, and Draw starts another."""
    drawn(page)
    os.kill(state(site)["pid"], signal.SIGKILL)
    page.locator("#code", has_text="has ended").wait_for()
    drawn(page)
    page.locator("#code").wait_for(state="hidden")
