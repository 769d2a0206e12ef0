"""A page to play with, in the browser: python tiny_sd.py --play

There are two processes. This one is the server, which serves play.html and passes requests on. The
other, extras/studio.py, imports tiny_sd and draws. When tiny_sd.py is saved, the server restarts
it; the weights are still in the system's cache.

The server listens only on the loopback address and answers only the page: see Handler.refusal.
"""

import ast
import functools
import hmac
import itertools
import json
import os
import queue
import re
import secrets
import select
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from extras.start import command
from tiny_sd import HERE, UserError, require

LESSON = HERE / "tiny_sd.py"
PAGE = HERE / "extras" / "play.html"
LARGEST_REQUEST, LARGEST_PICTURE = 100_000, 20_000_000      # bytes
LONGEST_ANSWER, LONGEST_LINE = 2 ** 26, 10_000     # bytes; enough for twelve million pixels
KEPT = 4        # pictures from the page, the last ones


def play(argv, port=0, browser=True):
    """Serve the page until Ctrl-C; UserError if the port is in use or the model cannot be loaded.

    argv: the command line, whose options are the page's initial settings.
    """
    with tempfile.TemporaryDirectory(prefix="tiny_sd-") as folder:
        worker = Worker(argv)
        try:
            server = Server(port, worker, Path(folder))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: {error}") from None
        try:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            worker.start()
            state = worker.news(state="loading")
            said = state.get("text", "").strip().split("\n")[-1].removeprefix("tiny_sd: ")
            require(state["state"] == "ready", said)
            print(server.address, flush=True)
            if browser:
                webbrowser.open(server.address)
            tell_changes(worker)
        finally:
            worker.end()
            server.server_close()


def tell_changes(worker):
    """Start the worker again whenever tiny_sd.py is saved."""
    seen = saved = stamp(LESSON)
    while True:
        time.sleep(0.2)
        now = stamp(LESSON)
        if now != saved and now == seen and now:    # it exists, and is no longer being written
            saved = now
            worker.start()
        seen = now


def stamp(path):
    """Return a value that changes when a file is saved; None while it does not exist."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):        # a pipe would never end
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
    except OSError:
        return None


def definitions(source):
    """Return {name: code} of the functions, methods and other statements of a source."""
    found = {}

    def visit(nodes, prefix=""):
        for i, node in enumerate(nodes):
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            name = getattr(node, "name", None) or getattr(targets[0], "id", f"statement {i}")
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{name}.")
            else:
                found[prefix + name] = ast.dump(node)

    visit(ast.parse(source).body)
    return found


def changed_names(before, after):
    """Return the names whose code differs between two sources, [] if one does not parse."""
    try:
        old, new = definitions(before), definitions(after)
    except (SyntaxError, ValueError, RecursionError, MemoryError):      # the last if deeply nested
        return []
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


def lines_of(stream, longest):
    """Yield the lines of a stream, long ones in pieces: an edited line may print without end."""
    return iter(functools.partial(stream.readline, longest), b"")


# ── The process that draws ──────────────────────────────────────────────────────────────────────


class Worker:
    """The process that draws, restarted after each change of tiny_sd.py.

    Its messages about itself update the state; answers go to the queue of their request.
    """

    def __init__(self, argv):
        self.argv, self.source, self.process = argv, LESSON.read_text(encoding="utf-8"), None
        self.numbers, self.queues = itertools.count(1), {}
        self.changed, self.state, self.version = threading.Condition(), {"state": "loading"}, 0
        self.turn = threading.RLock()       # for the thread that starts or ends the process

    def start(self):
        """Start the process, or restart it."""
        with self.turn:
            self.end()
            try:
                self.launch()
            except OSError as error:    # as where tiny_sd.py is gone for a moment
                self.tell("broken", text=f"the process that draws cannot be started: {error}")

    def launch(self):
        """Start the process, and threads that listen to it; OSError where it cannot be."""
        if not stamp(LESSON):
            raise FileNotFoundError(f"No such file: {LESSON}")
        source = LESSON.read_text(encoding="utf-8", errors="replace")
        self.tell("loading", edited=source != self.source, notes=[],
                  changed=changed_names(self.source, source))
        self.process = subprocess.Popen(
            [*command("extras.studio"), *self.argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        said = deque(maxlen=40)
        readers = [threading.Thread(target=read, args=(self.process, said), daemon=True)
                   for read in (self.read_notes, self.read_answers)]
        watcher = threading.Thread(target=self.watch, args=(self.process, said, readers),
                                   daemon=True)
        for thread in (*readers, watcher):
            thread.start()

    def watch(self, process, said, readers):
        """Report when the process ends unexpectedly."""
        process.wait()
        for reader in readers:      # its pipes stay open where a changed line started another one
            reader.join(1)
        with self.turn:
            if process is self.process:
                self.end()
                self.tell("broken", text="".join(said))

    def end(self):
        """End the process, and notify those who wait for it."""
        process, self.process = self.process, None
        if process:
            process.kill()
            process.wait()
        for answers in [*self.queues.values()]:
            answers.put({"event": "stopped"})
            answers.put({"event": "end"})

    def tell(self, state=None, **news):
        """Change the state, and wake those who wait for it."""
        with self.changed:
            self.state = {**self.state, **news, "state": state or self.state["state"]}
            self.version += 1
            self.changed.notify_all()

    def news(self, version=None, state=None, timeout=None):
        """Wait until both differ from this version and state; return the state."""
        with self.changed:
            self.changed.wait_for(lambda: self.version != version and self.state["state"] != state,
                                  timeout)
            return self.state | {"version": self.version}

    def read_notes(self, process, said):
        """Read what the process writes on stderr."""
        for line in lines_of(process.stderr, LONGEST_LINE):
            said.append(line.decode(errors="replace"))
            if line.startswith(b"tiny_sd: "):
                self.note(process, said[-1])

    def note(self, process, line):
        """Add a line to the state's notes."""
        if process is self.process:
            line = line.removeprefix("tiny_sd: ").strip()[:1000]
            self.tell(notes=[*self.state["notes"], line][-20:])

    def read_answers(self, process, said):
        """Pass on the process's answers."""
        for line in lines_of(process.stdout, LONGEST_ANSWER):
            try:
                answer = json.loads(line) | {}
            except (ValueError, TypeError, RecursionError):     # printed during import
                self.note(process, line.decode(errors="replace"))
                continue
            if "pid" in answer:
                if process is self.process:
                    self.tell("ready", **answer)
            elif answers := self.queues.get(answer.get("id")):
                answers.put(answer)

    def ask(self, request):
        """Send a request; return its number and a queue of its answers, the last one "end"."""
        with self.turn:
            if self.process is None:
                self.start()
        number, answers = next(self.numbers), queue.SimpleQueue()
        self.queues[number] = answers
        self.send(request | {"id": number})
        return number, answers

    def send(self, request):
        """Write a request for the process to read."""
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except (AttributeError, OSError, ValueError, RecursionError):    # gone, or too deep
            if answers := self.queues.get(request["id"]):
                answers.put({"event": "error", "text": "the process that draws has ended"})
                answers.put({"event": "end"})

    def forget(self, number):
        """Stop a request that nobody waits for."""
        if self.queues.pop(number, None):
            self.send({"id": 0, "ask": "stop", "run": number})


# ── The server ──────────────────────────────────────────────────────────────────────────────────


class Server(ThreadingHTTPServer):
    """Serve the page on the loopback address, with a thread for each connection."""

    daemon_threads, request_queue_size, allow_reuse_address = True, 128, os.name != "nt"

    def __init__(self, port, worker, folder):
        super().__init__(("127.0.0.1", port), Handler)
        self.worker, self.folder, self.token = worker, folder, secrets.token_urlsafe(24)
        self.pictures, self.numbers = {}, itertools.count(1)
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.address = f"http://{self.hosts[0]}/{self.token}/"

    def get_request(self):
        """Accept a connection; if there are no descriptors left, pause before the next try."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)
            raise

    def handle_error(self, request, client_address):
        """Ignore broken connections."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


HEADERS = {
    "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy":
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: "
        "blob:; connect-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors "
        "'none'"}


class Handler(BaseHTTPRequestHandler):
    """Answer one request of the page."""

    timeout = 10        # seconds that a connection may be silent

    def log_message(self, *args):
        """Do not print a line for every request."""

    def refusal(self, token):
        """Return why a request is refused, or None.

        Only the page knows the token. A site whose name was made to resolve to this address sends
        another Host, and a request from another site in the same browser has another Origin.
        """
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        if host not in self.server.hosts:
            return "this page has another address"
        if origin not in (None, f"http://{host}"):
            return "the request comes from another site"
        if not hmac.compare_digest(token.encode(errors="replace"), self.server.token.encode()):
            return "the address lacks its token: use the address that was printed"
        return None

    def admitted(self, names):
        """Return the name requested, one of these; None after a refusal."""
        token, _, name = self.path.removeprefix("/").partition("/")
        if reason := self.refusal(token):
            return self.respond(403, reason)
        if name not in names:
            return self.respond(404, "there is no such page")
        return name

    def respond(self, status, text, kind="text/plain"):
        """Send a complete response."""
        self.begin(status, kind)
        self.wfile.write(text if isinstance(text, bytes) else f"{text}\n".encode())

    def begin(self, status, kind):
        """Send the head of a response."""
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()

    def line(self, value):
        """Send a line of JSON."""
        self.wfile.write(json.dumps(value).encode() + b"\n")

    def do_GET(self):
        """Send the page, or the worker's state, now and whenever it changes."""
        name = self.admitted(["", "events"])
        if name == "":
            self.respond(200, PAGE.read_bytes(), "text/html")
        elif name == "events":
            self.begin(200, "application/x-ndjson")
            state = {"version": -1}
            while not self.is_gone():
                new = self.server.worker.news(state["version"], timeout=1)
                if new["version"] != state["version"]:
                    state = new
                    self.line(state)

    def do_POST(self):
        """Receive a picture, or pass a request on and stream its answers."""
        name = self.admitted(["picture", "draw", "look", "save"])
        length, most = self.headers.get("Content-Length", ""), LARGEST_REQUEST
        if name == "picture":
            most = LARGEST_PICTURE
        if name is None:
            return None
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > most:
            return self.respond(413, f"that is more than {most:,} bytes")
        body = self.rfile.read(int(length))
        if name == "picture":
            return self.respond(200, json.dumps(self.take_picture(body)), "application/json")
        try:
            request = json.loads(body) | {"ask": name}
            for key in "init_img", "mask":      # the page sends only their numbers
                if request.get(key) is not None:
                    request[key] = str(self.server.pictures[request[key]])
        except (ValueError, KeyError, TypeError, RecursionError):
            return self.respond(400, "this is not a request of the page")
        return self.stream(*self.server.worker.ask(request))

    def take_picture(self, data):
        """Save a picture in the folder under a new number; return the number."""
        number = next(self.server.numbers)
        path = self.server.folder / f"picture-{number}.png"
        path.parent.mkdir(mode=0o700, exist_ok=True)        # systems clean up /tmp now and then
        path.write_bytes(data)
        self.server.pictures[number] = path
        for old in [*self.server.pictures][:-2 * KEPT]:
            self.server.pictures.pop(old).unlink(missing_ok=True)
        return number

    def stream(self, number, answers):
        """Send the answers as they arrive; stop the work if the page no longer waits."""
        try:
            self.begin(200, "application/x-ndjson")
            answer = {"event": ""}
            while answer["event"] != "end" and not self.is_gone():
                try:
                    answer = answers.get(timeout=0.2)
                except queue.Empty:
                    continue
                self.line(answer)
        finally:
            self.server.worker.forget(number)

    def is_gone(self):
        """Has the other end closed the connection?"""
        readable, *_ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
