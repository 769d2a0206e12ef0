"""The process that draws for the page of extras/play.py.

Requests arrive as lines of JSON on stdin, and answers go to stdout with the request's number.
Anything that the program prints, for example in an edited line, appears as a note on the page.
"""

import base64
import contextlib
import io
import json
import os
import queue
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from types import SimpleNamespace

# isort: split      (first of all fast: it sets up BLAS before NumPy is loaded)
from extras import fast  # noqa: F401

# isort: split
import numpy as np
from PIL import Image

import tiny_sd
from extras import cli, drawing, facts, files, in_time, like_diffusers, prompts, show, things
from extras.checks import check_memory
from extras.samplers import SCHEDULED, TITLES
from extras.schedules import NAMES, title
from tiny_sd import UserError, require, tell

LIVE = 256 ** 2     # pixels up to which the page redraws whenever a control moves
KEPT = 4            # the last drawings, kept to inspect
FIELDS = {"prompt": str, "negative_prompt": str, "seed": int, "steps": int, "cfg_scale": float,
          "sampler": str, "schedule": str, "width": int, "height": int, "strength": float}
ELSEWHERE = {      # options that do not affect the picture, or that the page does not need
    "version", "words", "prompt", "prompts", "batch_size", "like", "things", "output",
    "preview", "film", "show", "play", "port", "no_browser", "explain", "low_memory", "formulas"}


def main():
    """Run the process; return its status, as the command line does."""
    return cli.main(run=work)


def work(argv):
    """Answer the requests on stdin until it is closed, then end at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the server gets it, too, and closes stdin
    sys.stdout.flush()
    answers, inbox, lock = os.fdopen(os.dup(1), "wb", 0), queue.SimpleQueue(), threading.Lock()
    os.dup2(2, 1)       # other prints must not end up among the answers

    def read():
        for line in sys.stdin.buffer:
            inbox.put(json.loads(line))
        os._exit(0)

    def send(**answer):
        with lock:
            answers.write(json.dumps(answer).encode() + b"\n")

    threading.Thread(target=read, daemon=True).start()
    Studio(argv, inbox, send).run()


class Notes(io.TextIOBase):
    """A stream that calls tell(line) for each line written to it."""

    def __init__(self, tell):
        self.tell, self.rest = tell, ""

    def write(self, text):
        """Pass on complete lines, and keep the rest."""
        *lines, rest = (self.rest + text).split("\n")
        self.rest = rest[:1000]
        for line in filter(None, lines):
            self.tell(line.removeprefix("tiny_sd: ")[:1000])
        return len(text)


class Studio:
    """The model, and the last few drawings with everything computed for them."""

    def __init__(self, argv, inbox, send):
        self.inbox, self.send, self.runs = inbox, send, {}
        self.next, self.stopped = None, 0       # the request to draw next, the number to stop
        job = cli.make_job(argv)
        if job.formulas:
            tiny_sd.FAST.clear()
        self.known, self.model = things.known_things(job.model), drawing.load_model(job)
        self.job = drawing.filled(self.model, job._replace(batch_size=1))
        self.quick = show.quick_decoder(self.model)

    def run(self):
        """Describe the model, then answer requests."""
        self.send(model=self.model.name, factor=self.model.factor, live=LIVE, pid=os.getpid(),
                  samplers={name: TITLES.get(name, name) for name in tiny_sd.SAMPLERS},
                  schedules={name: title(name) for name in NAMES},
                  scheduled=SCHEDULED, values={name: getattr(self.job, name) for name in FIELDS},
                  things=[names[0] for names in (self.known or {}).get("things", [])])
        while True:
            while not (self.next and self.inbox.empty()):
                self.receive(self.inbox.get())
            request, self.next = self.next, None
            self.answer(request)

    def receive(self, request):
        """Answer a request now, or queue it if it asks to draw; only the newest stays queued."""
        if request["ask"] == "draw":
            if self.next:
                self.send(id=self.next["id"], event="stopped")
                self.send(id=self.next["id"], event="end")
            self.next = request
        elif request["ask"] == "stop":
            self.stopped = request["run"]
            if self.next and self.next["id"] == self.stopped:
                self.next = None
        else:
            self.answer(request)

    def interrupted(self, number):
        """Receive new requests; is there a reason to stop this drawing?"""
        while not self.inbox.empty():
            self.receive(self.inbox.get())
        return self.next or self.stopped == number

    def answer(self, request):
        """Do what a request asks for; errors are answers, too."""
        def send(event, **answer):
            self.send(id=request["id"], event=event, **answer)

        def note(line):     # without advice on options, since the page has none
            send("note", text=re.sub(r" \(--[^)]*\)|: --things .*", "", line))

        notes = Notes(note)
        try:
            with contextlib.redirect_stderr(notes), contextlib.redirect_stdout(notes):
                {"draw": self.draw, "look": self.look, "save": self.save}[request["ask"]](
                    request, send)
        except (UserError, OSError, MemoryError) as error:
            text = re.sub(r"(?<![^\s(])--(?=[a-z])", "", str(error))     # the page has no options
            send("error", text=text or "there is not enough memory")
        except Exception as error:      # most likely in an edited line
            send("error", text=f"{type(error).__name__}: {error}", details=traceback.format_exc())
        send("end")

    def draw(self, request, send):
        """Draw a picture, and send each step."""
        job, model, begun = job_of(self.job, request), self.model, time.monotonic()
        drawing.make_room(model, job)
        need = drawing.bytes_of_a_step(model, job._replace(show="page")) * drawing.steps_of(job)
        check_memory(need, f"a film of {job.steps} steps", "take fewer steps")
        if prompts.TAG.search(job.prompt) and not job.plain_prompt:
            tell("tags like <lora:name> do not work on the page: start it with --play --lora FILE")
        film, run = show.Film(), SimpleNamespace(job=job, steps=[], guesses=[], picture=None)
        run.chunks = chunks_of(model, job)
        walk, notes = drawing.start_walk(model, job, film, drawing.remarks(model, job, self.known))
        for note in notes:
            tell(note)
        send("begin", command=command_line(model, job), words=list(self.described_words(run)))

        for x in walk:      # noqa: B007
            run.steps.append(film.steps[-1])
            self.send_step(run, time.monotonic() - begun, send)
            if self.interrupted(request["id"]):
                return send("stopped")
        run.picture = tiny_sd.decode(model, x)[0]
        self.runs[request["id"]] = run
        for old in [*self.runs][:-KEPT]:
            del self.runs[old]
        guided = any(step.push is not None for step in run.steps)
        send("done", picture=png(run.picture), seconds=time.monotonic() - begun,
             pushes=show.push_lengths(run.steps, 0).tolist() if guided else [])
        return self.sharpen(request["id"], run, send)

    def send_step(self, run, seconds, send):
        """Send the newest step, quickly decoded, and the time left."""
        n, of, step = len(run.steps), drawing.steps_of(run.job), run.steps[-1]
        run.guesses.append(show.as_pixels(self.quick(step.x_0)[0]))
        send("step", n=n, of=of, t=step.t, sigma=show.sigma(step), left=seconds / n * (of - n),
             x=png(self.quick(step.x)[0]), x_0=png(run.guesses[-1]))

    def sharpen(self, number, run, send):
        """Decode a small picture's guesses; doing so during sampling would double the time."""
        for i, step in enumerate(run.steps):
            if run.job.width * run.job.height > LIVE or self.interrupted(number):
                return
            run.guesses[i] = tiny_sd.decode(self.model, step.x_0)[0]
            send("sharp", n=i + 1, x_0=png(run.guesses[i]))

    def described_words(self, run):
        """Yield {text, chunk, tokens, unknown} of each word, with the start and the end."""
        tokenizer = self.model.encoders[0].tokenizer
        unknown = things.unknown_words(self.known, run.job.prompt) if self.known else []
        bos, eos = tokenizer.vocab[tokenizer.BOS], tokenizer.vocab[tokenizer.EOS]
        ids = []
        for chunk in run.chunks:
            ids += [bos, *(i for i, _ in chunk), eos]
            ids += [tokenizer.pad] * (-len(ids) % tokenizer.length)
        for word, positions in run.chunks and show.positions_of_words(
                tokenizer, run.chunks, len(ids)):
            yield {"text": word, "chunk": int(positions[0]) // tokenizer.length,
                   "tokens": [[tokenizer.symbol[ids[p]], int(ids[p])] for p in positions[:20]],
                   "unknown": word in unknown}

    def look(self, request, send):
        """Send a heat map over a picture: the attention to a word, or what guidance added.

        For one step it lies over that step's guess; the mean of all steps lies over the result.
        """
        run, n, word = self.run_of(request), request.get("step"), request.get("word")
        whole = n is None or not 0 <= n < len(run.steps)
        steps = run.steps if whole else [run.steps[n]]
        if word is None:
            values = show.push_maps(steps, 0).mean(0)
        else:
            tokens = next(iter(run.steps[0].attention.values())).shape[1]
            words = show.positions_of_words(self.model.encoders[0].tokenizer, run.chunks, tokens)
            values = show.word_maps(steps, words[word][1], 0)[1].mean(0)
        picture = show.over(run.picture if whole else run.guesses[n], values)
        send("look", picture=png(picture), mean=float(values.mean()), most=float(values.max()))

    def save(self, request, send):
        """Save a picture as the command line would, and send its name."""
        run = self.run_of(request)
        text = facts.parameters_text(run.job, self.model)
        name, = cli.output_names(run.job)
        name = files.save_picture(run.picture, name, text, run.job.enlarge)
        send("saved", name=str(name))

    def run_of(self, request):
        """Return the drawing that a request is about."""
        run = self.runs.get(request.get("run"))
        require(run, f"only the last {KEPT} drawings are kept: draw this one again")
        return run


def job_of(base, request):
    """Return the job of a request; UserError as for a command line."""
    given = {"init_img": request.get("init_img"), "mask": request.get("mask")}
    for name, kind in FIELDS.items():
        value = request.get(name)
        if value is None:
            continue
        value = float(value) if kind is float and type(value) is int else value
        require(type(value) is kind, f"{name} {value!r:.50} is not of type {kind.__name__}")
        given[name] = files.printable(value) if kind is str else value
    job = base._replace(**given, notes=[], facts={})
    job = job._replace(negative_prompt=job.negative_prompt or None, schedule=job.schedule or None)
    require(job.sampler in tiny_sd.SAMPLERS, f"there is no sampler {job.sampler!r:.50}")
    cli.check_job(job)
    return job


def chunks_of(model, job):
    """Return the chunks of the prompt, [] if it changes during sampling."""
    if not job.plain_prompt and in_time.changes(drawing.words_of(job), job.negative_prompt):
        tell("attention is not shown for prompts that change during sampling")
        return []
    return drawing.chunks_of(model, job)


def command_line(model, job):
    """Return the command that draws the same picture, without options at the model's defaults."""
    own = dict(zip(("sampler", "steps", "cfg_scale"), like_diffusers.defaults(model)))
    own |= dict(zip(("width", "height"), like_diffusers.picture_size(model)))
    own |= {"backend": "numpy", "model": str(tiny_sd.HERE / "weights" / "emoji")}
    if not job.init_img:
        own["strength"] = job.strength
    words = [f"--prompt={job.prompt}" if job.prompt.startswith("-") else job.prompt]
    for action in cli.option_parser().options:
        value = getattr(job, action.dest, None)
        first = own.setdefault(action.dest, action.default)     # the first of two options' defaults
        if action.dest not in ELSEWHERE and value not in (None, first):
            own[action.dest] = value
            words += option_words(action.option_strings[0], value)
    return "python tiny_sd.py " + shlex.join(words)


def option_words(flag, value):
    """Return the words of the command line that give an option this value."""
    if isinstance(value, list):
        return [word for item in value for word in option_words(flag, item)]
    if value is True:
        return [flag]
    if flag == "--control":
        file, weight, picture = value
        return [flag, f"{file}:{weight}", str(picture)]
    return [flag, ":".join(map(str, value)) if isinstance(value, tuple)
            else str(value).removesuffix(".0")]


def png(picture):
    """Return a picture as the text of a data URL."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(show.as_pixels(picture))
    data = io.BytesIO()
    picture.save(data, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
