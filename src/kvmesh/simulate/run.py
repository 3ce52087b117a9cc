"""One policy over one trace."""

from collections.abc import Callable

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.policies.policy import Policy
from kvmesh.simulate.file_order import FileOrderSimulation
from kvmesh.simulate.options import Order, SimulationOptions
from kvmesh.simulate.prompts import TraceBlocks
from kvmesh.simulate.result import PolicyResult
from kvmesh.simulate.simulation import Simulation


def simulate_policy(
    options: SimulationOptions,
    blocks: TraceBlocks,
    policy: Policy,
    *,
    on_end: Callable[[int], None] = lambda _: None,
) -> PolicyResult:
    """Play the whole trace; `on_end` hears of every request that ends. The same arguments give the same result.

    Raises: FixRequestError(INVALID_FIELD) if a request does not fit into a worker, naming its row, or if prefill
    workers are asked for where nothing queues.
    """
    if options.total_blocks is not None:
        _check_fit(blocks, options.total_blocks)
    if options.order is Order.TIME:
        return Simulation(options, blocks, policy).run(on_end=on_end)
    if options.prefill_workers:
        raise FixRequestError(
            Reason.INVALID_FIELD, "in file order nothing queues: prefill workers need order time", field="prefill"
        )
    return FileOrderSimulation(options, blocks, policy).run(on_end=on_end)


def _check_fit(blocks: TraceBlocks, total_blocks: int) -> None:
    for number, row in enumerate(blocks.rows, start=1):
        needed = -(-(row.input_length + row.output_length) // blocks.block_size)
        if needed > total_blocks:
            raise FixRequestError(
                Reason.INVALID_FIELD,
                f"request {number} of the trace needs {needed} blocks of {blocks.block_size}; a worker has "
                f"{total_blocks}",
                field="blocks",
            )
