"""What the garbage collector is told once a process has started."""

import gc

_YOUNG_OBJECTS = 20_000
"""Allocations between two looks at the youngest. References free nearly everything; cycles come with tracebacks."""


def settle_heap() -> None:
    """Leave out of every later collection what has been loaded and built so far, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)
