"""The public name of a pool served over NIXL: who serves it, and all that a puller needs to know to reach it.

    <agent name>@<base64url of the rest>

    digest        8 bytes   of the agent name and all that follows: a name that was altered is refused
    version       u8        1
    token         16 bytes  random; lies in the source's memory for as long as it serves, see `nixl`
    blocks        u64
    block bytes   u64
    address       u64       of block 0 in the source's memory
    token address u64
    metadata      rest      NIXL's own: how to connect and what is registered

All numbers are little-endian. Nobody is authenticated: as with tcp, run it where only the mesh can connect.
"""

import binascii
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from hashlib import blake2b

from kvmesh.transports.blocks import failed

TOKEN_BYTES = 16
_DIGEST_BYTES = 8
_VERSION = 1
_HEAD = struct.Struct(f"<B{TOKEN_BYTES}sQQQQ")
_SEPARATOR = "@"
_MAX_CHARACTERS = 16_384
"""Metadata grows with the network devices of a host; a name is some 600 characters on most."""


@dataclass(frozen=True, slots=True)
class NixlName:
    """What a public name says."""

    agent_name: str
    token: bytes
    blocks: int
    block_bytes: int
    address: int
    token_address: int
    metadata: bytes

    def __str__(self) -> str:
        """Return the public name."""
        head = _HEAD.pack(_VERSION, self.token, self.blocks, self.block_bytes, self.address, self.token_address)
        rest = head + self.metadata
        encoded = urlsafe_b64encode(_digest(self.agent_name, rest) + rest).decode().rstrip("=")
        return f"{self.agent_name}{_SEPARATOR}{encoded}"

    @classmethod
    def parse(cls, public_name: str) -> "NixlName":
        """Read a public name. Raises: TryElsewhereError(KV_TRANSFER_FAILED)."""
        agent_name, _, encoded = public_name.rpartition(_SEPARATOR)
        if not agent_name or len(public_name) > _MAX_CHARACTERS:
            raise failed("no pool is served under such a name")
        try:
            decoded = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        except (binascii.Error, ValueError) as exc:
            raise failed(f"{agent_name} is no name of NIXL's") from exc
        rest = decoded[_DIGEST_BYTES:]
        if len(rest) < _HEAD.size or decoded[:_DIGEST_BYTES] != _digest(agent_name, rest):
            raise failed(f"the name of {agent_name} is not whole")
        version, token, blocks, block_bytes, address, token_address = _HEAD.unpack_from(rest)
        if version != _VERSION:
            raise failed(f"the name of {agent_name} is of version {version}, not {_VERSION}")
        return cls(agent_name, token, blocks, block_bytes, address, token_address, rest[_HEAD.size :])


def _digest(agent_name: str, rest: bytes) -> bytes:
    return blake2b(agent_name.encode(errors="replace") + b"\0" + rest, digest_size=_DIGEST_BYTES).digest()
