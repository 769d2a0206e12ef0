"""Start the program: python tiny_sd.py hands over to this before NumPy is loaded."""

import os
import sys


def quiet_interrupt(kind, *error):
    """On Ctrl-C before main() is there to catch it, print no traceback."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, *error)


def program():
    """Run the command line and end the process with its status."""
    sys.excepthook = quiet_interrupt
    from extras import cli
    sys.stdout.reconfigure(errors="backslashreplace")   # not every terminal has every letter
    status = cli.main()
    if status:
        os._exit(status)    # at once: threads may still be in the middle of a step
    sys.exit()
