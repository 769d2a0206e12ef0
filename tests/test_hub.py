"""A model by name.

From weights/, from the Hugging Face cache, or fetched; against a server that speaks the hub's
protocol.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from conftest import ROOT
from extras import cli, formats
from helpers import FILES, TWO_ENCODERS, Fork, finish, launch, sd, write_model

pytestmark = pytest.mark.slow

COMMIT, REPOSITORY, TOKEN = ("0123456789abcdef0123456789abcdef01234567", "someone/small-model",
                             "hf_secret")
WEIGHTS = {f"{part}/{stem}.safetensors" for part, stem in FILES.items()}
UNET = "unet/diffusion_pytorch_model.safetensors"
LICENCE = "mit"


class Hub:
    """The endpoints of huggingface.co that its library uses, serving a folder.

    Weights are sent from another address, to which the first redirects, as on the hub. `requests`
    lists (method, path, Range) of all requests.
    """

    def __init__(self, folder, private=False):
        self.folder, self.private, self.requests, self.stop_after = folder, private, [], {}
        self.etag = None
        hub, self.stalled, self.go = self, threading.Event(), threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.requests.append((self.command, self.path, self.headers.get("Range")))
                hub.answer(self, unquote(urlsplit(self.path).path))

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.go.set()
        self.server.shutdown()
        self.server.server_close()

    def files(self):
        return {str(path.relative_to(self.folder)): path for path in self.folder.rglob("*")
                if path.is_file()}

    def answer(self, request, path):
        api = re.fullmatch(rf"/api/models/{REPOSITORY}(/revision/[^/]+)?(/tree/[^/]+)?", path)
        file = re.fullmatch(rf"/(?:{REPOSITORY}/resolve/(?P<revision>[^/]+)|cdn)/(?P<file>.+)",
                            path)
        if (self.private and not path.startswith("/cdn/")
            and request.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self.send(request, 401, {"X-Error-Code": "RepoNotFound",
                                            "X-Error-Message": "Invalid username or password."})
        if api and api[2]:
            return self.send(request, 200, {}, json.dumps([
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": sha1(path)}
                for name, path in self.files().items()]).encode())
        if api:
            return self.send(
                request, 200, {},
                json.dumps({"id": REPOSITORY, "sha": COMMIT, "private": False, "tags": [],
                            "downloads": 0, "likes": 0, "cardData": {"license": LICENCE},
                            "siblings": [{"rfilename": name, "size": path.stat().st_size}
                                         for name, path in self.files().items()]}).encode())
        if not file:
            return self.send(request, 404, {"X-Error-Code": "RepoNotFound",
                                            "X-Error-Message": "Repository not found"})
        if file["revision"] not in (None, "main", COMMIT):
            return self.send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        if file["file"] not in self.files():
            return self.send(request, 404,
                             {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        source = self.folder / file["file"]
        size, etag = source.stat().st_size, f'"{self.etag or sha1(source)}"'
        if file["revision"] and source.suffix == ".safetensors":
            return self.send(request, 302,
                             {"Location": f"/cdn/{file['file']}", "X-Linked-Size": str(size),
                              "X-Linked-ETag": etag, "X-Repo-Commit": COMMIT})
        self.send(request, 200, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"},
                  source.read_bytes(), file["file"])

    def send(self, request, status, headers, body=b"", name=None):
        size, begin = len(body), 0
        if status == 200 and (match := re.fullmatch(r"bytes=(\d+)-",
                                                    request.headers.get("Range") or "")):
            status, begin = 206, int(match[1])
            headers = {**headers, "Content-Range": f"bytes {begin}-{size - 1}/{size}"}
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(size - begin)}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        kind, end = self.stop_after.pop(name, (None, size))
        request.wfile.write(body[begin:end])
        if kind == "stall":
            request.wfile.flush()
            self.stalled.set()
            self.go.wait(60)
        if kind:
            request.close_connection = True


def sha1(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def model(tmp_path):
    """The random model as a repository might hold it, with files that are not needed."""
    folder = write_model(tmp_path / "repository")
    for name in ("README.md", "model.ckpt", "unet/diffusion_pytorch_model.bin",
                 "unet/diffusion_pytorch_model.non_ema.safetensors",
                 "safety_checker/model.safetensors", "tokenizer/README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    return folder


@pytest.fixture
def serve(model):
    """serve(private=False) -> Hub"""
    hubs = []

    def serve(**how):
        hubs.append(Hub(model, **how))
        return hubs[-1]
    yield serve
    for hub in hubs:
        hub.close()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(hub or its address, argument, ...) -> the program in a new process, with its own cache.
    """
    monkeypatch.chdir(tmp_path)

    def start(hub, *argv, **environment):
        environment = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": getattr(hub, "url", hub),
                       "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "60", **environment}
        begin = launch if "PYTHONPATH" in environment else Fork
        return begin("apple", "--steps", "1", *argv, **environment)

    return start


@pytest.fixture
def run(start):
    """run(hub, argument, ...) -> (status, stdout, this program's lines on stderr, all of stderr)"""

    def run(*argv, **environment):
        status, out, err = finish(start(*argv, **environment))
        assert "Traceback" not in err
        return status, out, [line for line in err.splitlines() if line.startswith("tiny_sd: ")], err

    return run


def fetched(hub):
    """The files that were downloaded from a server."""
    return {re.sub(r".*/resolve/[^/]+/|^/cdn/", "", path) for method, path, _ in hub.requests
            if method == "GET" and not path.startswith("/api/")}


def cached(tmp_path):
    """The files in the cache's snapshot."""
    folder = tmp_path / "hf/hub" / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots" / COMMIT
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def half(model, *parts):
    """Give the repository an fp16 variant of some parts next to the full one."""
    for part in parts:
        full = next(model / name for name in WEIGHTS if name.startswith(part))
        shutil.copy(full, full.with_suffix(".fp16.safetensors"))


CONFIGS = {"model_index.json", "scheduler/scheduler_config.json",
           *(f"{part}/config.json" for part in FILES)}
TOKENIZER = {"tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}


# ── Fetched once, then found ──────────────────────────────────────────────────────────────────────

def test_fetched_once_then_found_without_a_network(serve, run, model, tmp_path):
    """It downloads only what it needs.

    It says what it downloads, how much, from where and under which licence. The picture is that of
    the folder itself, and names the model. The second time there are no requests, nor with the hub
    switched off.
    """
    hub = serve()
    status, out, said, _ = run(hub, "-m", REPOSITORY)
    assert ((status, out) == (0, "out.png\n")
            and cached(tmp_path) == fetched(hub) == CONFIGS | TOKENIZER | WEIGHTS)
    assert said == [f"tiny_sd: fetching {hub.url}/{REPOSITORY}, 0.0 GB, licence: mit"]
    hub.requests.clear()
    assert run(hub, "-m", REPOSITORY)[:3] == (0, "out-1.png\n", []) and hub.requests == []
    assert run("http://127.0.0.1:9", "-m", REPOSITORY,
               HF_HUB_OFFLINE="1")[:3] == (0, "out-2.png\n", [])
    assert run(hub, "-m", str(model))[:2] == (0, "out-3.png\n")
    pictures = [Image.open(name) for name in ("out.png", "out-1.png", "out-2.png", "out-3.png")]
    assert (len({picture.tobytes() for picture in pictures}) == 1
            and "Model: small-model," in pictures[0].text["parameters"])


def test_a_server_does_not_choose_where_files_go(serve, run, tmp_path):
    """The hub's library makes a path of the ETag."""
    hub = serve()
    hub.etag = "../../../../../stolen"
    status, out, said, _ = run(hub, "-m", REPOSITORY)
    assert (status, out) == (2, "") and "a header that is not a file name" in said[-1]
    assert not [*tmp_path.rglob("*stolen*")] and not [*tmp_path.parent.glob("*stolen*")]


def test_a_second_text_encoder_comes_too(serve, run, model, tmp_path):
    """If there is one: its config comes first, so that the next run knows that the rest is missing.
    """
    shutil.rmtree(model)
    hub, second = serve(), {"text_encoder_2/config.json", "text_encoder_2/model.safetensors",
                            "tokenizer_2/tokenizer_config.json"}
    write_model(model, TWO_ENCODERS)
    assert run(hub, "-m", REPOSITORY)[0] == 0
    assert cached(tmp_path) == CONFIGS | TOKENIZER | WEIGHTS | second
    hub.requests.clear()
    assert run(hub, "-m", REPOSITORY)[0] == 0 and hub.requests == []


@pytest.mark.parametrize("parts", [("unet",), tuple(FILES)])
def test_half_precision_where_there_is_one_and_never_both(parts, serve, run, model, tmp_path):
    half(model, *parts)
    hub = serve()
    assert run(hub, "-m", REPOSITORY)[0] == 0
    expected = {re.sub(r"\.safetensors$", ".fp16.safetensors", name)
                if name.startswith(parts) else name for name in WEIGHTS}
    assert fetched(hub) == cached(tmp_path) == CONFIGS | TOKENIZER | expected


def test_what_a_tokenizer_adds_comes_too(serve, run, model):
    added = {"added_tokens.json": {"<thing>": 999}, "special_tokens_map.json": {"pad_token": "!"}}
    for name, words in added.items():
        (model / "tokenizer" / name).write_text(json.dumps(words))
    hub = serve()
    run(hub, "-m", REPOSITORY)
    assert fetched(hub) >= {f"tokenizer/{name}" for name in added}


def test_the_newer_form_of_the_tokenizer(serve, run, model):
    from tokenizers.models import BPE
    files = {name: model / "tokenizer" / name for name in ("vocab.json", "merges.txt")}
    merges = [line.split() for line in files["merges.txt"].read_text().splitlines()[1:]]
    assert BPE(
        json.loads(files["vocab.json"].read_text()), [tuple(merge) for merge in merges]
    )  # it is one
    (model / "tokenizer/tokenizer.json").write_text(json.dumps({"model": {
        "type": "BPE", "vocab": json.loads(files["vocab.json"].read_text()), "merges": merges}}))
    for path in files.values():
        path.unlink()
    hub = serve()
    assert run(hub, "-m", REPOSITORY)[0] == 0 and "tokenizer/tokenizer.json" in fetched(hub)


def test_what_another_program_left_in_the_cache_is_used(serve, run, model, tmp_path):
    """The full weights that diffusers would have fetched, though there are others by now."""
    hub = serve()
    script = ("from huggingface_hub import snapshot_download; "
              f"snapshot_download({REPOSITORY!r}, ignore_patterns=['*.bin', '*.ckpt'])")
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True,
                   env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url,
                                     "HF_HUB_OFFLINE": "0"})
    half(model, *FILES)
    hub.requests.clear()
    assert run(hub, "-m", REPOSITORY)[:3] == (0, "out.png\n", []) and hub.requests == []


def test_names_stand_for_repositories(monkeypatch, model, tmp_path):
    """An alias is a row of the table.

    A folder of that name in weights/, or at the given path, comes first.
    """
    assert formats.HUB.keys() == {"sd14", "sd15", "sd21", "sd21-base", "sd-turbo", "lcm", "tiny",
                                  "sdxl", "sdxl-turbo"}
    for repository, revision, licence in formats.HUB.values():
        assert (re.fullmatch(r"[\w-]+/[\w.-]+", repository)
                and re.fullmatch("[0-9a-f]{40}|main", revision) and licence)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sd, "HERE", tmp_path / "program")
    shutil.copytree(model, tmp_path / "program/weights/sd15")
    assert formats.load("sd15").name == "sd15"
    Path("sd15").mkdir()
    with pytest.raises(sd.UserError, match="^sd15 is not a whole"):
        formats.load("sd15")


def test_help_tells_the_names(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert f"or {', '.join(formats.HUB)} (emoji)" in " ".join(capsys.readouterr().out.split())


def test_an_alias_is_fetched_at_its_revision(serve, run, start, model, tmp_path):
    """And looked for in the cache at that revision, else at main.

    Older versions did not fetch the file that may name the padding token: it is fetched now, or a
    line says that it is not there.
    """
    (model / formats.PADS).write_text('{"pad_token": "!"}')
    program = tmp_path / "program"
    program.mkdir()
    shutil.copy(ROOT / "tiny_sd.py", program)
    table = "HUB = {'sd15': (%r, %r, 'creativeml-openrail-m')}\n\ndef fetch" % (REPOSITORY, COMMIT)
    shutil.copytree(ROOT / "extras", program / "extras", ignore=shutil.ignore_patterns("pictures"))
    text = (ROOT / "extras/formats.py").read_text(encoding="utf-8")
    (program / "extras/formats.py").write_text(text.replace("def fetch", table), encoding="utf-8")
    hub = serve()
    for offline, lacking, asked, said in (
            ("0", False, True, "creativeml-openrail-m"), ("0", False, False, ""),
            ("1", True, False, "lacks tokenizer/special_tokens_map.json in the cache"),
            ("0", True, True, "")):
        if lacking:
            (tmp_path / f"hf/hub/models--{REPOSITORY.replace('/', '--')}/snapshots" / COMMIT
             / formats.PADS).unlink(missing_ok=True)
        script = "from extras import formats; print(formats.load('sd15').encoders[0].tokenizer.pad)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                              cwd=program,
                              env=os.environ | {"HF_HOME": str(tmp_path / "hf"),
                                                "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": offline})
        assert (done.stdout == "0\n") == (not said or not lacking)
        assert said in done.stderr and len(done.stderr.splitlines()) == bool(said), done.stderr
        assert (bool(hub.requests) == asked
                and all("main" not in path for _, path, _ in hub.requests))
        hub.requests.clear()


# ── Interrupted ───────────────────────────────────────────────────────────────────────────────────

def ranges(hub, name):
    return [wanted for method, path, wanted in hub.requests
            if method == "GET" and path == f"/cdn/{name}"]


def stretch(path, size):
    """The same weights in a file of `size` more bytes.

    The library keeps a download in pieces of ten million.
    """
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes((end - 8 + size).to_bytes(8, "little") + data[8:end] + b" " * size
                     + data[end:])


def test_a_connection_that_breaks_is_resumed(serve, run, model):
    stretch(model / UNET, 25_000_000)
    hub = serve()
    hub.stop_after[UNET] = "cut", 24_000_000
    assert run(hub, "-m", REPOSITORY)[:2] == (0, "out.png\n")
    first, second = ranges(hub, UNET)
    assert first is None and int(re.fullmatch(r"bytes=(\d+)-", second)[1]) >= 20_000_000


def test_ctrl_c_in_a_download_and_on_from_there(serve, start, run):
    """Status 130 at once, nothing drawn.

    The next run does not ask for what came whole before, and draws.
    """
    hub = serve()
    hub.stop_after[UNET] = "stall", 20000
    process = start(hub, "-m", REPOSITORY)
    assert hub.stalled.wait(120)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert ((status, out) == (130, "") and err.endswith("tiny_sd: interrupted\n")
            and "Traceback" not in err)
    assert not list(Path().glob("*.png"))
    before = fetched(hub)
    hub.go.set()
    hub.requests.clear()
    assert run(hub, "-m", REPOSITORY)[:2] == (0, "out.png\n")
    assert (before & fetched(hub) == {UNET}
            and before | fetched(hub) == CONFIGS | TOKENIZER | WEIGHTS)


# ── Refused ───────────────────────────────────────────────────────────────────────────────────────

def refused(result, *named):
    """Status 2 and one line, which names the reason, and the files to put into a folder of
    weights/.
    """
    status, out, said, err = result
    assert (status, out) == (2, "") and len(said) == 1 and err.splitlines() == said
    for words in (*named, *WEIGHTS, *CONFIGS, *TOKENIZER):
        assert words in said[0], said[0]
    assert said[0].index("could not be fetched") < said[0].index("; put ")     # the reason first
    assert not list(Path().glob("*.png"))


def test_a_private_repository(serve, run):
    hub = serve(private=True)
    refused(run(hub, "-m", REPOSITORY), "401", f"weights/{REPOSITORY}")
    assert run(hub, "-m", REPOSITORY, HF_TOKEN=TOKEN)[0] == 0


def test_no_such_repository(serve, run):
    refused(run(serve(), "-m", "no/such"), "404", "weights/no/such")


def test_a_repository_that_lacks_a_file(serve, run, model):
    (model / UNET).unlink()
    refused(run(serve(), "-m", REPOSITORY), f"no {UNET}")


def test_no_server(run):
    refused(run("http://127.0.0.1:9", "-m", "sd15"), "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "weights/sd15")


def test_offline(serve, run):
    hub = serve()
    refused(run(hub, "-m", REPOSITORY, HF_HUB_OFFLINE="1"), "offline")
    assert hub.requests == []


def test_half_of_it_in_the_cache_is_not_taken_for_all(serve, run, model):
    (model / UNET).unlink()
    hub = serve()
    refused(run(hub, "-m", REPOSITORY), f"no {UNET}")
    write_model(model)
    assert run(hub, "-m", REPOSITORY)[0] == 0


def test_without_the_package(run, tmp_path):
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking/huggingface_hub.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'huggingface_hub'\")")
    refused(run("http://127.0.0.1:9", "-m", "tiny", PYTHONPATH=str(tmp_path / "lacking")),
            "huggingface_hub", "nota-ai/bk-sdm-tiny")


@pytest.mark.parametrize("name", ["nothing", "no/such/folder", "../no", "folder/sd.safetensors"])
def test_a_path_is_no_repository(name, serve, run):
    hub = serve()
    status, _, said, _ = run(hub, "-m", name)
    place = ROOT / "weights" / name
    assert status == 2 and hub.requests == []
    assert said == [f"tiny_sd: there is no model {name}: no such file or folder, and no {place}"]


def test_the_nearest_alias_is_named(serve, run):
    hub = serve()
    _, _, said, _ = run(hub, "-m", "sd1.5")
    assert said[0].endswith("; did you mean sd15?") and hub.requests == []


@pytest.mark.parametrize("licence", ["mit\x1b[2J\x1b[31mred", "mit\ntiny_sd: all is well"])
def test_a_licence_cannot_write_to_the_terminal(licence, serve, run, monkeypatch):
    """What a server says stays in its line, without control characters."""
    monkeypatch.setattr(sys.modules[__name__], "LICENCE", licence)
    _, _, said, err = run(serve(), "-m", REPOSITORY)
    assert "\x1b" not in err and len(said) == 1
    assert said[0].endswith("licence: " + re.sub(r"\s+", " ", licence.replace("\x1b", " ")))
