"""Where the `kvmesh` program begins: this imports nothing heavy, so that Ctrl-C is answered quietly from the start."""

import os
import signal
import sys
from contextlib import suppress

_INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit."""
    # Not as KeyboardInterrupt while modules load: that shows a traceback, and some of them swallow it.
    signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    from kvmesh.cli.main import main as run

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:
        # What the command held was given back on the way here; gRPC's threads must not keep an interrupted program.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(_INTERRUPTED)
