"""Start the program: `python tiny_sd.py` calls this before it loads NumPy."""

import importlib
import os
import signal
import sys
import threading
import time

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]        # the ones that end a program


class Unfailing:
    """A stream that keeps its first error: a full disk or a closed pipe must not cost a picture."""

    def __init__(self, stream):
        self.stream, self.error = stream, None

    def write(self, text):
        """Write the text if possible."""
        try:
            self.stream.write(text)
        except (OSError, ValueError) as error:
            self.error = self.error or error

    def flush(self):
        """Flush the stream if possible."""
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.error = self.error or error

    def __getattr__(self, name):
        return getattr(self.stream, name)


def set_up_streams():
    """Replace closed standard streams by /dev/null, so that no other file gets their numbers."""
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    sys.stdout.reconfigure(errors="backslashreplace")   # for terminals that lack some characters
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)


def check_heard():
    """Raise the error of stdout, if there was one, and print nothing more."""
    sys.stdout.flush()
    if error := getattr(sys.stdout, "error", None):
        sys.stdout = open(os.devnull, "w")
        raise error


def set_up_signals():
    """Make Ctrl-C, SIGTERM and SIGHUP raise an exception, so that unfinished files get removed.

    For one second further signals are ignored; after that, another one ends the program at once.
    An exception is lost if the signal comes while Python frees an object: then it is sent again.
    """
    stopped, report = [], sys.unraisablehook

    def stop(number, frame):
        if not stopped:
            stopped.append((number, time.monotonic()))
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if time.monotonic() - stopped[0][1] > 1:
            os._exit(128 + number)

    def lost(error):
        if not stopped or not isinstance(error.exc_value, (KeyboardInterrupt, SystemExit)):
            return report(error)
        number, _ = stopped.pop()
        # Windows has no pthread_kill, which also wakes a main thread that waits
        send = getattr(signal, "pthread_kill", lambda _, number: signal.raise_signal(number))
        return threading.Timer(0.1, send, [threading.main_thread().ident, number]).start()

    sys.unraisablehook = lost
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


def quiet_interrupt(kind, *error):
    """Print no traceback for Ctrl-C before main() can catch it."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, *error)


def import_problem(error):
    """Return an ImportError's message in one line, and how to install a missing package."""
    text, name = " ".join(str(error).split()), getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and name and "." not in name:
        text += f": pip install {'pillow' if name == 'PIL' else name}"
    return text


def command(name):
    """Return the words of a command that runs a module as program() does.

    It imports nothing from the current folder, which may hold other people's code; a path in
    PYTHONPATH could be split at a colon.
    """
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return [sys.executable, "-P", "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); "
            f"from extras.start import program; program({name!r})", here]


def program(name="extras.cli"):
    """Run main() of the module of this name and end the process with its status."""
    sys.excepthook = quiet_interrupt
    set_up_streams()
    set_up_signals()
    if sys.version_info < (3, 11):
        print("tiny_sd: this needs Python 3.11 or later; this is", sys.version.split()[0],
              file=sys.stderr)
        sys.exit(2)
    try:
        status = importlib.import_module(name).main()
    except SystemExit as end:       # after --help or a signal, or from an edited line
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
