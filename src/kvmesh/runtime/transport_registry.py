"""Transports by name, best first: what the composition root gives to each worker."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvmesh import telemetry
from kvmesh.core.errors import MeshError
from kvmesh.engines.paged_model import Allocate, allocate_here
from kvmesh.transports.memory import MemoryNetwork, MemoryTransport
from kvmesh.transports.shared_memory import SHARED_DIRECTORY, SharedMemoryTransport
from kvmesh.transports.tcp import TcpTransport
from kvmesh.transports.transport import Transport

log = telemetry.logger(__name__)


class WorkerMemory(NamedTuple):
    """What one worker moves KV by, and where its pool is to lie."""

    transports: tuple[Transport, ...]
    """In order of preference; for its Worker to own."""
    allocate: Allocate
    """For its engine, which is made first."""


def open_transports(
    *,
    network: MemoryNetwork | None,
    host: str | None,
    advertised_host: str | None = None,
    shared_directory: Path = SHARED_DIRECTORY,
) -> WorkerMemory:
    """Open the transports of one worker; nothing is served yet.

    `network`: of the workers of this process; None: its workers never pull from each other.
    `host`: where the worker listens, for pullers of other processes; None: there are none.

    Raises: FixRequestError(INVALID_FIELD) for a wildcard `host` without an `advertised_host`.
    """
    transports: list[Transport] = []
    if network is not None:
        transports.append(MemoryTransport(network))
    if host is not None:
        try:
            transports.append(SharedMemoryTransport(shared_directory))
        except MeshError as error:
            log.warning("transport.left_out", transport="shared_memory", error=error.message)
        transports.append(TcpTransport(host, advertised_host=advertised_host))
    return WorkerMemory(tuple(transports), allocator(transports))


def allocator(transports: Sequence[Transport]) -> Allocate:
    """Return what makes a pool where the first of `transports` that cares wants it to lie, or else in the process."""

    def allocate(blocks: int, block_bytes: int) -> npt.NDArray[np.uint8]:
        for transport in transports:
            try:
                memory = transport.allocate(blocks, block_bytes)
            except MeshError as error:
                log.warning("transport.no_room", transport=transport.name, error=error.message)
                continue
            if memory is not None:
                return memory
        return allocate_here(blocks, block_bytes)

    return allocate
