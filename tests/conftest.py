"""What every test needs before gRPC and numpy are imported."""

import os

# Read once, at import: gRPC's core would tell of connections that tests end on purpose, amid pytest's own output.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Children that tests start would sometimes die between fork and exec; see cli/main.py.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# Tests run side by side, and threads that wait for each other on a core that another test has cost more than they save.
for _threads in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")
