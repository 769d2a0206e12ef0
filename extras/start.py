"""Start the program: python tiny_sd.py hands over to this before NumPy is loaded."""

import contextlib
import importlib
import os
import signal
import sys
import time

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]        # those that end a program


class Unfailing:
    """stderr that drops what it cannot write: a full disk there is no reason to lose a picture."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        """Write the text if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self):
        """Write what is held back, if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def set_up_streams():
    """Open /dev/null where a standard stream is closed, so that no other file gets its number."""
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    sys.stdout.reconfigure(errors="backslashreplace")   # not every terminal has every letter
    sys.stderr = Unfailing(sys.stderr)


def set_up_signals():
    """Let Ctrl-C, SIGTERM and SIGHUP end the program by an exception: unfinished files are removed.

    For a second, no other signal disturbs that; from then on, another one ends the program at once.
    """
    stopped = []

    def stop(number, frame):
        if not stopped:
            stopped.append(time.monotonic())
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if time.monotonic() - stopped[0] > 1:
            os._exit(128 + number)

    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


def quiet_interrupt(kind, *error):
    """On Ctrl-C before main() is there to catch it, print no traceback."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, *error)


def import_problem(error):
    """Return what an ImportError says in one line, and how to install a package that is missing."""
    text, name = " ".join(str(error).split()), getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and name and "." not in name:
        text += f": pip install {'pillow' if name == 'PIL' else name}"
    return text


def program(name="extras.cli"):
    """Run the main() of this module and end the process with its status."""
    sys.excepthook = quiet_interrupt
    set_up_streams()
    set_up_signals()
    if sys.version_info < (3, 11):
        print("tiny_sd: this needs Python 3.11 or later, and is", sys.version.split()[0],
              file=sys.stderr)
        sys.exit(2)
    try:
        status = importlib.import_module(name).main()
    except SystemExit as end:       # after --help, a signal, or a line that was changed
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except ImportError as error:    # one of the four packages
        print("tiny_sd:", import_problem(error), file=sys.stderr)
        status = 2
    if status:
        os._exit(status)    # at once: threads may still be in the middle of a step
    sys.exit()
