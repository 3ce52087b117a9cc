"""The transports of one worker, best first: by which it can pull, and by which others pull from it."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvmesh import telemetry
from kvmesh.core.errors import ConflictError, MeshError, Reason
from kvmesh.transports.transport import Transport

log = telemetry.logger(__name__)

_METADATA = "kv."


class ServedBy(NamedTuple):
    """How a worker's blocks can be pulled: what a handoff says."""

    reach: str
    agent_name: str
    """The public one."""


@runtime_checkable
class WarmedUp(Protocol):
    """A transport whose first pull from a source takes longer than the others, unless it is warmed up."""

    async def warm_up(self, agent_name: str, target: npt.NDArray[np.uint8]) -> None:
        """Make ready to pull into `target`. Raises: as `Transport.pull`."""


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

    @property
    def can_warm_up(self) -> bool:
        """Whether any of them is the better for it."""
        return any(isinstance(transport, WarmedUp) for transport in self._transports.values())

    @property
    def metadata(self) -> dict[str, str]:
        """How others pull from it, for its discovery record: `kv.<reach>` to public name."""
        return {f"{_METADATA}{served.reach}": served.agent_name for served in self._served.values()}

    async def serve(self, agent_name: str, memory: npt.NDArray[np.uint8]) -> None:
        """Let others pull from `memory` by every transport that can serve it; the log tells of the others."""
        for reach, transport in self._transports.items():
            try:
                public_name = await transport.serve(agent_name, memory)
            except MeshError as error:
                log.debug("transport.not_served", transport=transport.name, error=error.message)
                continue
            self._served[reach] = ServedBy(reach, public_name)

    async def warm_up(self, metadata: Mapping[str, str], target: npt.NDArray[np.uint8]) -> None:
        """Make ready to pull from the worker whose record has this `metadata`, by what it would choose; or do nothing.

        Raises: TryElsewhereError(KV_TRANSFER_FAILED) when that fails; so may the first pull.
        """
        for key, agent_name in metadata.items():
            transport = self._transports.get(key.removeprefix(_METADATA)) if key.startswith(_METADATA) else None
            if transport is not None:
                if isinstance(transport, WarmedUp):
                    await transport.warm_up(agent_name, target)
                return

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

    def others(self, metadata: Mapping[str, str], *, than: ServedBy) -> list[ServedBy]:
        """Return by what else this worker can pull from the one whose record has this `metadata`, best first."""
        known = [ServedBy(reach, metadata.get(f"{_METADATA}{reach}", "")) for reach in self._transports]
        return [served for served in known if served.agent_name and served.reach != than.reach]

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
