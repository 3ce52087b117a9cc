"""What the contract's comments say, by full protobuf name: the words of the API document.

Generated code has no comments; the descriptor set that is committed beside it (`make protos`) has.
"""

from functools import lru_cache
from pathlib import Path

from google.protobuf import descriptor_pb2

from kvmesh.v1 import frontend_pb2
from kvmesh.wire.comments import comments_of

_CONTRACT = "contract.binpb"


def contract_path() -> Path:
    """Return the contract's descriptor set: imports and comments included, as Envoy and grpcurl take it."""
    return Path(frontend_pb2.__file__).with_name(_CONTRACT)


@lru_cache(maxsize=1)
def contract_comments() -> dict[str, str]:
    """Return the comments of all of the contract. Raises: OSError where the package is not whole."""
    files = descriptor_pb2.FileDescriptorSet.FromString(contract_path().read_bytes())
    return {
        name: " ".join(text.split())
        for file in files.file
        if file.package.startswith("kvmesh.")
        for name, text in comments_of(file).items()
    }
