"""Which GPUs each worker of a graph sees: each one's own, by CUDA_VISIBLE_DEVICES."""

from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.sdk.definitions import ServiceDefinition

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEVICES = Path("/dev")


def devices_here(environment: Mapping[str, str], *, devices: Path = _DEVICES) -> tuple[str, ...]:
    """Return the GPUs that this process may give away: what it is told to see, or all that the machine has."""
    told = environment.get(VISIBLE)
    if told is not None:
        names = (name.strip() for name in told.split(","))
        return tuple(takewhile(lambda name: name and not name.startswith("-"), names))  # as CUDA reads it
    numbers = (path.name.removeprefix("nvidia") for path in devices.glob("nvidia[0-9]*"))
    return tuple(sorted(numbers, key=int))


def assign_gpus(
    services: Iterable[tuple[ServiceDefinition, int]], devices: tuple[str, ...]
) -> dict[tuple[str, int], str | None]:
    """Return what each worker sees, by (address of its component, index); None = as its parent does.

    `services` come with their numbers of workers. A service that asks for 0 GPUs sees none.
    Raises: FixRequestError(INVALID_FIELD) where they ask for more than there are.
    """
    wanted = list(services)
    asked = [(definition, workers, definition.resources.gpu) for definition, workers in wanted]
    total = sum(workers * (gpus or 0) for _, workers, gpus in asked)
    if total > len(devices):
        who = ", ".join(f"{one.cls.__name__} {workers} x {gpus}" for one, workers, gpus in asked if gpus)
        raise FixRequestError(
            Reason.INVALID_FIELD,
            f"resources.gpu: {who} is {total} GPUs, and {len(devices)} are here: lower workers or resources.gpu, "
            f"or set {VISIBLE}",
            field="resources.gpu",
        )
    free = iter(devices)
    return {
        (definition.address, index): None if gpus is None else ",".join(next(free) for _ in range(gpus))
        for definition, workers, gpus in asked
        for index in range(workers)
    }
