"""The command line. Commands import what they need when they run: `kvmesh --help` loads neither gRPC nor an engine."""

import time

STARTED_S = time.monotonic()
"""When this process began, but for the interpreter's own start: importing this package is the first thing it does."""
