"""Transports by name, best first: what the composition root gives to each worker."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvmesh import telemetry
from kvmesh.core.errors import FixRequestError, MeshError, Reason, TryElsewhereError
from kvmesh.engines.paged_model import Allocate, allocate_here
from kvmesh.transports import nixl_library
from kvmesh.transports.memory import MemoryNetwork, MemoryTransport
from kvmesh.transports.nixl import NixlTransport
from kvmesh.transports.shared_memory import SHARED_DIRECTORY, SharedMemoryTransport
from kvmesh.transports.tcp import TcpTransport
from kvmesh.transports.transport import Transport

log = telemetry.logger(__name__)

KINDS = ("nixl", "shared_memory", "tcp")
"""Between processes, best first."""
WITHIN_A_PROCESS = "memory"


class WorkerMemory(NamedTuple):
    """What one worker moves KV by, and where its pool is to lie."""

    transports: tuple[Transport, ...]
    """In order of preference; for its Worker to own."""
    allocate: Allocate
    """For its engine, which is made first."""


def open_transports(
    *,
    network: MemoryNetwork | None,
    host: str,
    advertised_host: str | None = None,
    shared_directory: Path = SHARED_DIRECTORY,
    kinds: Sequence[str] = KINDS,
) -> WorkerMemory:
    """Open the transports of one worker; nothing is served yet.

    `network`: of the workers of this process, for `memory`; None: there is only one.
    `host`: where the worker listens.
    `kinds`: those of KINDS to have, or `memory`, best first; what this host cannot run is left out.

    Raises: FixRequestError(INVALID_FIELD) for a kind that is none, or a wildcard `host` without an `advertised_host`.
    """
    openers: dict[str, Callable[[], Transport]] = {
        "nixl": lambda: NixlTransport(host),
        "shared_memory": lambda: SharedMemoryTransport(shared_directory),
        "tcp": lambda: TcpTransport(host, advertised_host=advertised_host),
    }
    if network is not None:
        openers[WITHIN_A_PROCESS] = lambda: MemoryTransport(network)
    transports: list[Transport] = []
    for kind in kinds:
        if kind in openers:
            transports += _opened(kind, openers[kind])
        elif kind != WITHIN_A_PROCESS:
            raise FixRequestError(
                Reason.INVALID_FIELD, f"{kind!r} is no transport: there are {', '.join(KINDS)}", field="transports"
            )
    return WorkerMemory(tuple(transports), allocator(transports))


def _opened(name: str, open_one: Callable[[], Transport]) -> list[Transport]:
    """Return a transport, or none and a line in the log when this host cannot run it."""
    if name == "nixl" and not nixl_library.is_installed():
        log.info("transport.not_installed", transport=name, install=nixl_library.INSTALL)
        return []
    try:
        return [open_one()]
    except TryElsewhereError as error:
        log.info("transport.left_out", transport=name, error=error.message)
        return []


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
