"""The transports of one worker, best first: by which it can pull, and by which others pull from it."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvmesh import telemetry
from kvmesh.core.errors import ConflictError, MeshError, Reason
from kvmesh.transports.transport import Transport

log = telemetry.logger(__name__)


class ServedBy(NamedTuple):
    """How a worker's blocks can be pulled: what a handoff says."""

    reach: str
    agent_name: str
    """The public one."""


class WorkerTransports:
    """Owns the transports of one worker."""

    def __init__(self, transports: Sequence[Transport]) -> None:
        """Own `transports`, in order of preference."""
        self._transports = {transport.reach: transport for transport in transports}
        self._served: dict[str, ServedBy] = {}

    @property
    def reaches(self) -> tuple[str, ...]:
        """By what this worker can pull: what its tasks say."""
        return tuple(self._transports)

    @property
    def served_reaches(self) -> tuple[str, ...]:
        """By what others can pull from it: what it tells the queue."""
        return tuple(self._served)

    async def serve(self, agent_name: str, memory: npt.NDArray[np.uint8]) -> None:
        """Let others pull from `memory` by every transport that can serve it; the log tells of the others."""
        for reach, transport in self._transports.items():
            try:
                public_name = await transport.serve(agent_name, memory)
            except MeshError as error:
                log.warning("transport.left_out", transport=transport.name, error=error.message)
                continue
            self._served[reach] = ServedBy(reach, public_name)

    def choose(self, reaches: Sequence[str]) -> ServedBy:
        """Return the first of this worker's own that a puller with `reaches` has too.

        Of a puller that says nothing, nothing is assumed: the last is chosen, which reaches furthest.

        Raises: ConflictError(LAYOUT_MISMATCH) when they have none in common.
        """
        common = [served for reach, served in self._served.items() if reach in reaches]
        if common:
            return common[0]
        if self._served and not reaches:
            return list(self._served.values())[-1]
        raise ConflictError(
            Reason.LAYOUT_MISMATCH, f"blocks are wanted by {_listed(reaches)} and served by {_listed(self._served)}"
        )

    def get(self, reach: str) -> Transport:
        """Return the transport to pull by what a handoff names. Raises: ConflictError(LAYOUT_MISMATCH)."""
        transport = self._transports.get(reach)
        if transport is None:
            raise ConflictError(
                Reason.LAYOUT_MISMATCH, f"blocks are served by {reach or 'nothing'}, not {_listed(self._transports)}"
            )
        return transport

    async def aclose(self) -> None:
        """Stop serving and pulling."""
        self._served.clear()
        await asyncio.gather(*(transport.aclose() for transport in self._transports.values()))


def _listed(reaches: Iterable[str]) -> str:
    return ", ".join(reaches) or "nothing"
