"""Plays a trace in the order of its file, each request ending before the next begins: routing and caches alone.

A request is its prompt here, in the blocks that the trace names, the begun last one too; nothing else enters a cache.
Nothing queues, so no worker would ever look busy: its load, to the router, is all that it has had to compute so far.
Times are those of a request alone on its worker.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvmesh.core.block_pool import BlockPool
from kvmesh.core.hashing import max_overlap_blocks
from kvmesh.core.ids import WorkerRank
from kvmesh.core.load_report import LoadReport, RouterLoad
from kvmesh.core.policies.policy import Policy, name_of
from kvmesh.core.roster import WorkerRole
from kvmesh.replay.trace import TraceRow
from kvmesh.simulate.cluster import EPOCH, attempt_key, new_router, place, query_for, tell_router, worker_rank
from kvmesh.simulate.engine import EngineLimits
from kvmesh.simulate.options import COST_MODELS, SimulationOptions
from kvmesh.simulate.prompts import TraceBlocks
from kvmesh.simulate.result import Numbers, PolicyResult, Timeline, summarise


@dataclass(slots=True, eq=False)
class _Worker:
    rank: WorkerRank
    pool: BlockPool
    requests: int = 0
    uncached_blocks: int = 0


class FileOrderSimulation:
    """One policy over one trace, one request after the other."""

    def __init__(self, options: SimulationOptions, blocks: TraceBlocks, policy: Policy) -> None:
        """Start with empty caches."""
        self._blocks = blocks
        self._policy = policy
        self._router = new_router(options, policy)
        self._fallbacks: list[str] = []
        self._cost = COST_MODELS[options.cost_model]
        total_blocks = options.total_blocks or sum(-(-row.input_length // blocks.block_size) for row in blocks.rows)
        self._limits = EngineLimits(total_blocks=total_blocks, block_size=blocks.block_size)
        ranks = [worker_rank(WorkerRole.DECODE, number) for number in range(options.workers)]
        self._workers = {rank: _Worker(rank, BlockPool(total_blocks)) for rank in ranks}

    def run(self, *, on_end: Callable[[int], None] = lambda _: None) -> PolicyResult:
        """Play the whole trace; `on_end` hears of every request that ends."""
        begin_s: list[float] = []
        ttft_s: list[float] = []
        e2e_s: list[float] = []
        runs: list[tuple[float, int]] = []
        cached: list[int] = []
        load: list[list[int]] = []
        now = 0.0
        for number, row in enumerate(self._blocks.rows):
            begin_s.append(now)
            cached.append(self._serve(number, row, now=now))
            ttft_s.append(self._prefill_s(row, cached[-1]))
            decode = self._decode_runs(row)
            runs += decode
            e2e_s.append(ttft_s[-1] + sum(run_s for run_s, _ in decode))
            now += e2e_s[-1]
            load.append([worker.uncached_blocks for worker in self._workers.values()])
            on_end(number)
        size = self._limits.block_size
        timeline = Timeline(
            ttft_ms=_numbers(ttft_s) * 1000,
            e2e_ms=_numbers(e2e_s) * 1000,
            gap_ms=_numbers([run_s / steps for run_s, steps in runs]) * 1000,
            gap_count=_numbers([steps for _, steps in runs]),
            cached=_numbers(cached),
            prompt=_numbers([-(-row.input_length // size) for row in self._blocks.rows]),
            arrival_s=_numbers(begin_s),
            sampled_s=_numbers(begin_s),
            load=np.array(load, dtype=np.float64),
        )
        uncached = [worker.uncached_blocks for worker in self._workers.values()]
        return summarise(name_of(self._policy), timeline, uncached=uncached, fallbacks=self._fallbacks, duration_s=now)

    def _serve(self, number: int, row: TraceRow, *, now: float) -> int:
        """Route a request, let it compute, and end it; return the leading blocks that were cached."""
        hashes = self._blocks.begun_blocks(number)
        key = attempt_key(number)
        query = query_for(row.input_length, hashes, block_size=self._limits.block_size)
        worker = self._workers[place(self._router, number, query, now=now, fallbacks=self._fallbacks)]
        pool = worker.pool
        held = pool.hold_prefix(hashes)
        hits = len(held)
        taken = pool.allocate(len(hashes) - hits)
        assert taken is not None, "a prompt fits into the pool"
        for index, block in enumerate(taken, start=hits):
            parent = hashes[index - 1] if index else None
            held.append(pool.seal(block, hashes[index], parent=parent, local_hash=hashes[index]))
        pool.give_back(held)
        tell_router(self._router, worker.rank, pool.drain_events(), now=now)
        self._router.release(key, now=now)
        worker.requests += 1
        worker.uncached_blocks += len(hashes) - hits
        self._report_load(worker, now=now)
        return hits

    def _report_load(self, worker: _Worker, *, now: float) -> None:
        load = RouterLoad(worker.requests, decode_blocks=worker.uncached_blocks)
        report = LoadReport(epoch=EPOCH, sequence=worker.requests, received_at=now, unrouted=load)
        self._router.apply_load(worker.rank, report, now=now)

    def _prefill_s(self, row: TraceRow, hits: int) -> float:
        size, chunk = self._limits.block_size, self._limits.max_batched_tokens
        tokens = row.input_length - min(hits, max_overlap_blocks(row.input_length, size)) * size
        full, rest = divmod(tokens, chunk)
        chunks = [chunk] * full + [rest] * bool(rest)
        return sum(
            self._cost.step_s(decode_sequences=0, decode_blocks=0, prefill_tokens=prefill_tokens)
            for prefill_tokens in chunks
        )

    def _decode_runs(self, row: TraceRow) -> list[tuple[float, int]]:
        """Return the seconds and steps of each stretch of output within one block."""
        size = self._limits.block_size
        tokens, last = row.input_length + 1, row.input_length + row.output_length
        runs = []
        while tokens < last:
            steps = min(-(tokens - 1) % size or size, last - tokens)
            run_s = self._cost.decode_run_s(
                steps, decode_sequences=1, decode_blocks=-(-tokens // size), decode_tokens=tokens
            )
            runs.append((run_s, steps))
            tokens += steps
        return runs


def _numbers(values: list[float] | list[int]) -> Numbers:
    return np.array(values, dtype=np.float64)
