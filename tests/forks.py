"""A fork server: it has imported the program, so it runs it faster than a new Python would.

    python forks.py MODULE ...      also imports these; stdin is a socket

Each message on the socket is {"argv", "cwd", "environ", "first"} as JSON, with three descriptors:
the copy's stdout, its stderr, and a pipe for its process id and then its status.
"""

import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from extras import explain, play, show, start  # noqa: E402,F401


def serve(channel):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)       # so that the guards leave no zombies
    while True:
        message, files, *_ = socket.recv_fds(channel, 2 ** 20, 3)
        if not message:
            return
        if not os.fork():
            guard(json.loads(message), *files)
        for file in files:
            os.close(file)


def guard(job, out, err, told):
    """Run the program in a copy of this process, and write its id and its status to `told`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    program = os.fork()
    if not program:
        os.close(told)
        run(job, out, err)
    os.write(told, f"{program}\n".encode())
    for file in out, err:
        os.close(file)
    _, status = os.waitpid(program, 0)
    os.write(told, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def run(job, out, err):
    """Become the program, as if Python had just started it; end after five minutes."""
    signal.alarm(300)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
        os.dup2(file, number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", 1)
    os.environ.clear()
    os.environ.update(job["environ"])
    os.chdir(job["cwd"])
    sys.argv = [str(ROOT / "tiny_sd.py"), *job["argv"]]
    status = 0
    try:
        exec(job["first"], {})
        start.program()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for module in sys.argv[1:]:
    importlib.import_module(module)
serve(socket.socket(fileno=0))
