"""The wire of the tcp transport: a puller connects, asks and is answered, any number of times, one at a time.

All numbers are little-endian. A request:

    magic         4 bytes   "kvmQ"
    version       u16       1
    agent bytes   u16       1 .. 1024
    blocks        u32       1 .. 4096
    block bytes   u64       what the puller takes a block to have
    agent         agent bytes, UTF-8
    block ids     blocks x u32

and its answer:

    magic         4 bytes   "kvmA"
    version       u16       1
    status        u16       0 = the blocks follow; else nothing does, see Status
    size          u64       bytes that follow: blocks x block bytes, or 0
    blocks        in the order asked for

A source that cannot read a request answers BAD_REQUEST and ends the connection; every other refusal leaves it open.
Nobody is authenticated: run it where only the mesh can connect.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

MAX_AGENT_BYTES = 1024
MAX_BLOCKS = 4096
_VERSION = 1
_REQUEST = struct.Struct("<4sHHIQ")
_REQUEST_MAGIC = b"kvmQ"
_ANSWER = struct.Struct("<4sHHQ")
_ANSWER_MAGIC = b"kvmA"
_ID = np.dtype("<u4")

REQUEST_BYTES = _REQUEST.size
ANSWER_BYTES = _ANSWER.size


class Status(IntEnum):
    """How a request ended."""

    OK = 0
    BAD_REQUEST = 1
    """It is no request of this version, or it is out of bounds."""
    UNKNOWN_AGENT = 2
    OTHER_BLOCK_SIZE = 3
    NO_SUCH_BLOCK = 4


class ProtocolError(Exception):
    """The other side does not speak this protocol."""


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The fixed part of a request; the rest is `rest_bytes` long."""

    agent_bytes: int
    blocks: int
    block_bytes: int

    @property
    def rest_bytes(self) -> int:
        """Bytes of agent and block ids."""
        return self.agent_bytes + self.blocks * _ID.itemsize


def write_request(agent_name: str, block_ids: Sequence[int], *, block_bytes: int) -> bytes:
    """Return the bytes of a request. Raises: ProtocolError when it would be out of bounds."""
    agent = agent_name.encode()
    if not 1 <= len(agent) <= MAX_AGENT_BYTES or not 1 <= len(block_ids) <= MAX_BLOCKS:
        raise ProtocolError(f"an agent of {len(agent)} bytes or {len(block_ids)} blocks cannot be asked for")
    if min(block_ids) < 0 or max(block_ids) > np.iinfo(_ID).max:
        raise ProtocolError("a block id is not in 0 .. 2**32 - 1")
    head = _REQUEST.pack(_REQUEST_MAGIC, _VERSION, len(agent), len(block_ids), block_bytes)
    return head + agent + np.array(block_ids, dtype=_ID).tobytes()


def read_request_head(data: bytes | bytearray) -> RequestHead:
    """Read the first REQUEST_BYTES. Raises: ProtocolError."""
    magic, version, agent_bytes, blocks, block_bytes = _REQUEST.unpack(data)
    if (magic, version) != (_REQUEST_MAGIC, _VERSION):
        raise ProtocolError(f"no request of version {_VERSION}: {bytes(data[:6]).hex()}")
    if not 1 <= agent_bytes <= MAX_AGENT_BYTES or not 1 <= blocks <= MAX_BLOCKS:
        raise ProtocolError(f"an agent of {agent_bytes} bytes and {blocks} blocks are out of bounds")
    return RequestHead(agent_bytes, blocks, block_bytes)


def read_request_rest(head: RequestHead, data: bytes | bytearray) -> tuple[str, list[int]]:
    """Read what follows the head: agent name and block ids. Raises: ProtocolError."""
    try:
        agent = bytes(data[: head.agent_bytes]).decode()
    except UnicodeDecodeError as exc:
        raise ProtocolError("the agent name is no UTF-8") from exc
    ids: list[int] = np.frombuffer(data, dtype=_ID, offset=head.agent_bytes).tolist()
    return agent, ids


def write_answer(status: Status, *, size: int = 0) -> bytes:
    """Return the head of an answer, after which `size` bytes follow."""
    return _ANSWER.pack(_ANSWER_MAGIC, _VERSION, status, size)


def read_answer(data: bytes | bytearray) -> tuple[Status, int]:
    """Read the ANSWER_BYTES that begin an answer: its status and the bytes that follow. Raises: ProtocolError."""
    magic, version, status, size = _ANSWER.unpack(data)
    if (magic, version) != (_ANSWER_MAGIC, _VERSION):
        raise ProtocolError(f"no answer of version {_VERSION}: {bytes(data[:6]).hex()}")
    try:
        return Status(status), size
    except ValueError as exc:
        raise ProtocolError(f"status {status} is not known") from exc
