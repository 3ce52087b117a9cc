"""What a process is told about its memory: the garbage collector once it has started, the allocator before."""

import ctypes
import gc

_YOUNG_OBJECTS = 20_000
"""Allocations between two looks at the youngest. References free nearly everything; cycles come with tracebacks."""
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEPT_BYTES = 1 << 30
_STEP_BYTES = 64 << 20


def settle_heap() -> None:
    """Leave out of every later collection what has been loaded and built so far, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to 1 GiB, instead of giving it back and taking it again; elsewhere nothing.

    Prompts come as messages of a megabyte: mapping, touching and unmapping each costs page faults, and on a virtual
    machine stalls of a tenth of a second.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        set_option(_M_TOP_PAD, _STEP_BYTES)
        set_option(_M_MMAP_THRESHOLD, _KEPT_BYTES)
