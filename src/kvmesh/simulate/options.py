"""What a simulation is asked to do."""

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from kvmesh.core.remote_prefill import RemotePrefillRules
from kvmesh.core.step_cost import CurvedStepCost, StepCost, StepTimes


class Order(StrEnum):
    """When the next request comes."""

    TIME = "time"
    """At its timestamp."""
    FILE = "file"
    """When the one before it has ended: routing and caches alone, no queueing."""


class CostModel(StrEnum):
    """How long the steps of the engines take; see `kvmesh.core.step_cost`."""

    CURVED = "curved"
    """Fitted to another simulator, so that figures compare."""
    LINEAR = "linear"
    """The simulated engine's own."""


COST_MODELS: MappingProxyType[CostModel, StepTimes] = MappingProxyType(
    {CostModel.CURVED: CurvedStepCost(), CostModel.LINEAR: StepCost()}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions:
    """One cluster, and how the trace is played to it."""

    workers: int = 4
    """That decode, and prefill what is not remote."""
    prefill_workers: int = 0
    total_blocks: int | None = 16_384
    """Per worker; None = as many as the trace could ever fill."""
    block_size: int = 64
    speed: float = 1.0
    """Divides the times between requests."""
    order: Order = Order.TIME
    seed: int = 0
    cost_model: CostModel = CostModel.CURVED
    remote_prefill: RemotePrefillRules = RemotePrefillRules()
    """Counts only where there are prefill workers."""
    transfer_s_per_block: float = 0.4e-3
    """A handoff's KV on its way: 8 MiB blocks of 64 tokens at 20 GB/s."""
