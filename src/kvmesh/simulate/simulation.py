"""Plays a trace to a mesh in virtual time: arrivals and the ends of steps, in order, and nothing in between.

A request goes the way it goes in the mesh: reserved at the router; prefilled where its decode worker's rule says, by
way of the queue if that is elsewhere; its progress reported, its booking released. Routers learn of blocks and
progress at the end of each step, without delay.
"""

from collections.abc import Callable

import numpy as np

from kvmesh.core.ids import SequenceHash, WorkerRank
from kvmesh.core.policies.policy import Policy, name_of
from kvmesh.core.remote_prefill import decide
from kvmesh.core.roster import WorkerRole
from kvmesh.simulate.clock import VirtualTime
from kvmesh.simulate.cluster import attempt_key, new_router, place, query_for, tell_router, worker_rank
from kvmesh.simulate.engine import EngineLimits, Finished, VirtualEngine
from kvmesh.simulate.options import COST_MODELS, SimulationOptions
from kvmesh.simulate.prefill_side import PrefillSide
from kvmesh.simulate.prompts import OutputHashes, TraceBlocks
from kvmesh.simulate.request import VirtualRequest
from kvmesh.simulate.result import PolicyResult, Timeline, summarise
from kvmesh.simulate.worker import VirtualWorker

_SAMPLES = 200


class Simulation:
    """One policy over one trace, requests at their times."""

    def __init__(self, options: SimulationOptions, blocks: TraceBlocks, policy: Policy) -> None:
        """Start with empty caches."""
        self._options = options
        self._blocks = blocks
        self._policy = policy
        self._router = new_router(options, policy)
        self._fallbacks: list[str] = []
        self._time = VirtualTime()
        self._limits = EngineLimits(
            total_blocks=options.total_blocks or _most_blocks(blocks), block_size=blocks.block_size
        )
        self._new_hash = OutputHashes()
        ranks = [worker_rank(WorkerRole.DECODE, number) for number in range(options.workers)]
        self._workers = {
            rank: VirtualWorker(rank, self._new_engine(), self._time, on_finish=self._finish) for rank in ranks
        }
        self._prefill_side = PrefillSide(
            options, self._time, new_engine=self._new_engine, on_events=self._note_events, on_done=self._hand_over
        )
        self._arrival_s = np.array([row.timestamp_ms for row in blocks.rows]) / 1000 / options.speed
        self._first_token_s = np.full(len(blocks.rows), np.nan)
        self._end_s = np.full(len(blocks.rows), np.nan)
        self._cached = np.full(len(blocks.rows), np.nan)
        """Tokens of each prompt that were cached where it was prefilled."""
        self._away: dict[int, VirtualRequest] = {}
        """Requests whose prefill runs elsewhere."""
        self._placed: dict[int, VirtualWorker] = {}
        """Where they will decode."""

    def run(self, *, on_end: Callable[[int], None] = lambda _: None) -> PolicyResult:
        """Play the whole trace, once; `on_end` hears of every request that ends."""
        self._on_end = on_end
        arrivals = self._arrival_s.tolist()
        sampled_s = np.linspace(arrivals[0], arrivals[-1], _SAMPLES)
        load: list[list[int]] = []
        for row, arrival_s in enumerate(arrivals):
            self._time.run_until(arrival_s)
            while len(load) < _SAMPLES and sampled_s[len(load)] <= arrival_s:
                load.append([worker.engine.requests for worker in self._workers.values()])
            self._arrive(row, arrival_s)
        self._time.run_until(float("inf"))
        load += [[worker.engine.requests for worker in self._workers.values()]] * (_SAMPLES - len(load))
        return self._summarise(sampled_s.tolist(), load)

    def _new_engine(self) -> VirtualEngine:
        return VirtualEngine(self._limits, COST_MODELS[self._options.cost_model], new_hash=self._new_hash)

    def _arrive(self, number: int, now: float) -> None:
        row = self._blocks.rows[number]
        hashes = self._blocks.full_blocks(number)
        query = query_for(row.input_length, hashes, block_size=self._limits.block_size)
        worker = self._workers[place(self._router, number, query, now=now, fallbacks=self._fallbacks)]
        request = VirtualRequest(number, row.input_length, row.output_length, list(hashes))
        if self._options.prefill_workers and self._send_away(request, worker, hashes, now=now):
            self._router.report_progress(attempt_key(number), prefill_complete=True, now=now)
        else:
            worker.add(request, now=now)

    # Prefill elsewhere.

    def _send_away(
        self, request: VirtualRequest, worker: VirtualWorker, hashes: tuple[SequenceHash, ...], *, now: float
    ) -> bool:
        """Apply the decode worker's rule; True if the prefill is queued for a prefill worker."""
        cached = worker.engine.pool.cached_prefix(request.reusable(self._limits.block_size)) * self._limits.block_size
        decision = decide(
            self._options.remote_prefill,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=cached,
            queue_depth=self._prefill_side.depth,
            capable_workers=self._options.prefill_workers,
        )
        if not decision.is_remote or request.prompt_tokens <= self._limits.block_size:
            return False
        self._away[request.number], self._placed[request.number] = request, worker
        is_queued = self._prefill_side.submit(
            request.number, prompt_tokens=request.prompt_tokens, hashes=hashes, cached=cached, now=now
        )
        if not is_queued:
            del self._away[request.number], self._placed[request.number]
        return is_queued

    def _hand_over(self, task: VirtualRequest, now: float) -> None:
        """Let a finished prefill's blocks, those that the decode worker lacks, travel to it."""
        request, worker = self._away.pop(task.number), self._placed.pop(task.number)
        self._cached[task.number] = task.cached_tokens or 0
        hashes = request.reusable(self._limits.block_size)
        missing = len(hashes) - worker.engine.pool.cached_prefix(hashes)

        def arrive(now: float) -> None:
            worker.engine.bring(request, hashes)  # without room for them it prefills here after all
            tell_router(self._router, worker.rank, worker.engine.pool.drain_events(), now=now)
            worker.add(request, now=now)

        self._time.at(now + missing * self._options.transfer_s_per_block, arrive)

    # What becomes of requests.

    def _note_events(self, rank: WorkerRank, finished: Finished, now: float) -> None:
        tell_router(self._router, rank, finished.events, now=now)

    def _finish(self, worker: VirtualWorker, finished: Finished, now: float) -> None:
        router = self._router
        self._note_events(worker.rank, finished, now)
        for request in finished.grown:
            router.report_progress(attempt_key(request.number), output_blocks=1, now=now)
        for request in finished.prefilled:
            number = request.number
            if np.isnan(self._first_token_s[number]):
                self._first_token_s[number] = now
            if np.isnan(self._cached[number]):
                self._cached[number] = request.cached_tokens or 0
            router.report_progress(attempt_key(number), prefill_complete=True, now=now)
        for request in finished.ended:
            self._end_s[request.number] = now
            router.release(attempt_key(request.number), now=now)
            self._on_end(request.number)

    def _summarise(self, sampled_s: list[float], load: list[list[int]]) -> PolicyResult:
        decoding = [worker.engine.totals for worker in self._workers.values()]
        prefilling = [worker.engine.totals for worker in self._prefill_side.workers]
        timeline = Timeline(
            ttft_ms=(self._first_token_s - self._arrival_s) * 1000,
            e2e_ms=(self._end_s - self._arrival_s) * 1000,
            gap_ms=np.concatenate([np.array(totals.gaps_s, dtype=np.float64) for totals in decoding]) * 1000,
            gap_count=np.concatenate([np.array(totals.gap_counts, dtype=np.float64) for totals in decoding]),
            cached=self._cached,
            prompt=np.array([row.input_length for row in self._blocks.rows], dtype=np.float64),
            arrival_s=self._arrival_s,
            sampled_s=np.array(sampled_s),
            load=np.array(load, dtype=np.float64),
        )
        return summarise(
            name_of(self._policy),
            timeline,
            uncached=[totals.uncached_tokens for totals in prefilling or decoding],
            fallbacks=self._fallbacks,
            duration_s=self._time.now,
            preempted=sum(totals.preempted for totals in (*decoding, *prefilling)),
        )


def _most_blocks(blocks: TraceBlocks) -> int:
    """Return how many blocks a worker fills that gets every request and never forgets."""
    return sum(-(-(row.input_length + row.output_length) // blocks.block_size) for row in blocks.rows)
