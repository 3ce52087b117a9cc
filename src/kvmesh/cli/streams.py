"""The three standard streams, made safe for a process that outlives who started it."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


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


class LossyStream(io.TextIOBase):
    """Text for a reader who may go away: what cannot be written is dropped, so that logging never fails a request."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what the reader takes; the length is that of the whole text."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what the reader takes."""
        with suppress(OSError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Tell whether the reader is a terminal."""
        return self._stream.isatty()
