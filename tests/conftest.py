"""What every test needs before gRPC is imported."""

import os

# Read once, at import: gRPC's core would tell of connections that tests end on purpose, amid pytest's own output.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
