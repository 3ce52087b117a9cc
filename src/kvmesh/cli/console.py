"""Where tables are printed."""

from rich.console import Console

_PIPE_WIDTH = 240
"""Columns where there is no terminal to ask: wide enough that no cell of ours is cut for the program that reads it."""


def output_console(*, stderr: bool = False) -> Console:
    """Return a console on stdout (or stderr) that never guesses at what text means."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console
