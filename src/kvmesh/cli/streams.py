"""The three standard streams, made safe for a process that outlives who started it."""

import os
import sys


def open_closed_streams() -> None:
    """Open on /dev/null each standard stream that was closed at the start.

    Its descriptor would otherwise go to the next socket, and whatever is printed into a client's connection.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    sys.stdin = sys.stdin or os.fdopen(0, "r")
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def give_up_stdout() -> None:
    """Drop what is left in stdout's buffer, and all that comes: the end of the process would fail to write it again."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
